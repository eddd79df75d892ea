"""Values that travel between the stages. Arrays are never written to after they are put into one of these.

```
Record (records.py) ─ decode ─> EncodedAudio, EncodedVision ─ lay out ─> Layout ─> EncodedSample ─> shard
```

Times are seconds, intervals half-open, T is the number of tokens of a sequence.
"""

import os
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]
Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]
Uint8Array = npt.NDArray[np.uint8]

RopeMode = Literal["aligned", "reference"]
ResizeMode = Literal["exact", "fast"]


@dataclass(frozen=True, kw_only=True, slots=True)
class MediaFile:
    """Media that was found and may be read: a local path, or bytes in memory."""

    name: str
    """What the record called it, for messages and provenance."""
    path: Path | None = None
    data: bytes | None = None
    stamp: str = ""
    """What changes when the content does, and is cheap to ask for: a file's mtime in nanoseconds, a URL's ETag; "" if unknown."""
    sha256: str = ""
    """Hex digest of the content, "" where nobody asked for it."""

    def __post_init__(self) -> None:
        if (self.path is None) == (self.data is None):
            raise ValueError(
                f"{self.name}: expected either path or data, got {self.path is not None = }, {self.data is not None = }"
            )

    def open(self) -> BinaryIO:
        """Open for reading; the caller closes. A pipe that was put in the file's place is empty rather than waited for."""
        if self.path is None:
            return BytesIO(self.data or b"")
        return open(self.path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))

    @property
    def num_bytes(self) -> int:
        """Return the size of the file."""
        return self.path.stat().st_size if self.path is not None else len(self.data or b"")


@dataclass(frozen=True, kw_only=True, slots=True)
class AudioClip:
    """Decoded sound: mono, at the model's sample rate."""

    waveform: Float32Array
    """(N,) in [-1, 1] for integer sources; float sources keep their scale."""
    start_s: float
    """Time stamp of the first sample on the file's own time line (after a cut: of the first sample kept)."""
    source_sample_rate_hz: int
    source_channels: int
    decoder: str
    """Library that decoded: "soundfile" or "pyav"."""
    truncated_from_s: float | None = None
    """Length before it was cut to the limit, or None if nothing was cut."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoTiming:
    """The timing contract of a video: enough to put every frame back on the file's time line."""

    source_fps: float
    """Average rate of the file; for frames made ready, their `sample_fps`."""
    num_source_frames: int
    frame_indices: tuple[int, ...]
    """(n,) chosen frames, as indices into the file's frames in presentation order; not decreasing."""
    frame_times_s: tuple[float, ...]
    """(n,) presentation times of the chosen frames on the file's own time line."""
    sample_fps: float
    """Rate actually sampled, as the reference computes it: chosen frames / frames in the clip * source_fps."""
    audio_start_s: float | None = None
    """Time of the first audio sample on the same time line, or None if the sound is not used."""
    decoder: str = ""
    """Library that decoded: "decord", "pyav", "images" or "npy"."""

    def __post_init__(self) -> None:
        if len(self.frame_indices) != len(self.frame_times_s):
            raise ValueError(f"{len(self.frame_indices) = } but {len(self.frame_times_s) = }")


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedAudio:
    """An audio item of a sample: standalone sound, or the track of a video."""

    mel: Float32Array
    """(128, F) log-mel at true length."""
    num_samples: int
    """Samples at the model's rate; F = ceil(num_samples / hop)."""
    source: str
    start_s: float = 0.0
    decoder: str = ""
    truncated_from_s: float | None = None

    @property
    def num_mel_frames(self) -> int:
        """Return F."""
        return int(self.mel.shape[1])


FrameFormat = Literal["jpeg", "raw"]


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedVision:
    """An image or video item of a sample, resized, not normalised."""

    kind: Literal["image", "video"]
    grid_thw: tuple[int, int, int]
    """(temporal, vertical, horizontal) patches."""
    frames: tuple[bytes, ...]
    """One image, or n video frames: JPEG files, or raw uint8 (height, width, 3) bytes."""
    frame_format: FrameFormat
    height: int
    width: int
    source: str
    timing: VideoTiming | None = None
    """Set for videos."""
    second_per_grid: float = 0.0
    """Seconds from one grid step of a video to the next: 2 / sample_fps, or what `rope_mode: reference` was told."""
    audio_index: int | None = None
    """Which audio item of the sample is this video's track, if it is interleaved."""


SegmentKind = Literal["text", "control", "audio", "image", "video"]


class Segment(NamedTuple):
    """A run of tokens of one kind: tokens [start, stop) of the sequence.

    A tuple, for a dialogue has dozens: a frozen data class takes three times as long to make.
    """

    kind: SegmentKind
    start: int
    stop: int
    supervised: bool = False
    item: int = -1
    """Index in `EncodedSample.audio` or `.vision` of the item that fills it, -1 for text and control."""
    offset: int = 0
    """First token of the item that this segment holds; above 0 where a video block is interleaved."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """A token sequence with everything that must agree about it. T tokens."""

    input_ids: Int32Array
    """(T,) token ids, media placeholders expanded."""
    labels: Int32Array
    """(T,) equal to `input_ids` where supervised, else -100. Not shifted."""
    position_ids: Int32Array
    """(3, T) TMRoPE ids: temporal, height, width."""
    segments: tuple[Segment, ...]

    def __post_init__(self) -> None:
        num_tokens = self.input_ids.shape[0]
        if self.labels.shape != (num_tokens,) or self.position_ids.shape != (3, num_tokens):
            raise ValueError(f"{self.input_ids.shape = } but {self.labels.shape = } and {self.position_ids.shape = }")
        if self.segments and self.segments[-1].stop != num_tokens:
            raise ValueError(f"segments end at {self.segments[-1].stop} but there are {num_tokens} tokens")

    @property
    def num_tokens(self) -> int:
        """Return T."""
        return int(self.input_ids.shape[0])

    @property
    def num_supervised(self) -> int:
        """Return how many tokens carry a label."""
        return int(np.count_nonzero(self.labels != -100))


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedSample:
    """A record, encoded: one token sequence, or a preference's two over one stored set of media."""

    key: str
    layouts: dict[str, Layout]
    """{"tokens": ...}, or {"chosen": ..., "rejected": ...}."""
    audio: tuple[EncodedAudio, ...] = ()
    vision: tuple[EncodedVision, ...] = ()
    rope_mode: RopeMode = "aligned"
    id: str = ""
    """The user's own id, if the record has one; `key` is unique in a dataset, this need not be."""
    source: str = ""
    """Name of the source in the recipe."""
    row: int = -1
    """Row in that source."""
    split: str = "train"
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        """Return the tokens of all sequences together."""
        return sum(layout.num_tokens for layout in self.layouts.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class Rejection:
    """A record that could not be used, whole, with the reason."""

    key: str
    source: str
    row: int
    place: str
    """Where a person finds it: `data.jsonl:17`."""
    stage: Literal["read", "parse", "encode"]
    reason: str
    detail: str
    retryable: bool
    probe: str = "[]"
    """JSON list of the media files that were found before it failed: `name`, `num_bytes`, `sha256`."""
    record: bytes
    """The row as it came: its JSON text, or the raw line if it is not JSON."""
