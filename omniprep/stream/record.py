"""A record of a shard as arrays over the bytes that were read: nothing is copied and nothing is decoded.

```
one pread ──> buffer ── view_record ──> Record(tokens, mel, frames, json)
              │hdr│frames.mjpg│hdr│json│hdr│mel.npy│hdr│tokens.npy│
```

What can be checked without touching the data is: the first tar header names this record's member and its size, every `.npy`
header is, byte for byte, the one that an array of that size and type has, and items lie inside the mel and the frames.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic_core import from_json

from omniprep.errors import DatasetError
from omniprep.profile import QWEN2_5_OMNI
from omniprep.shards.members import (
    FORMAT_VERSION,
    FRAMES,
    JSON,
    MEL,
    NPY_HEADER_BYTES,
    NUM_TOKEN_ROWS,
    SEQUENCES,
    MemberFormat,
    json_after_segments,
    json_start,
    npy_header,
    sequence_member,
)
from omniprep.types import FrameFormat, Int32Array

MelArray = npt.NDArray[np.float16] | npt.NDArray[np.float32]


class AudioItem(NamedTuple):
    """A sound of a record: mel frames [mel_offset, mel_offset + num_mel_frames)."""

    mel_offset: int
    num_mel_frames: int
    num_samples: int


class VisionItem(NamedTuple):
    """An image or video of a record: its frames are bytes [offset, offset + size) of `Record.frames`, one after another."""

    kind: Literal["image", "video"]
    grid_thw: tuple[int, int, int]
    height: int
    width: int
    frame_offsets: tuple[int, ...]
    frame_sizes: tuple[int, ...]
    audio_index: int | None
    """Which audio item is this video's track, if it is interleaved."""
    second_per_grid: float


Items = tuple[tuple[AudioItem, ...], tuple[VisionItem, ...]]
NO_ITEMS: Items = ((), ())


@dataclass(slots=True)
class Record:
    """One record. Its arrays are views into the buffer that it was read into, and hold their values as long as that does."""

    key: str
    source: str
    tokens: dict[str, Int32Array]
    """{"tokens": (5, T)}, or {"chosen": ..., "rejected": ...}: input_ids, labels (unshifted), t, h, w."""
    mel: MelArray
    """(128, F) of all audio items one after another; width 0 if there is none."""
    frames: memoryview
    """Bytes of all frames one after another: JPEG files, or raw uint8 (height, width, 3) pixels."""
    json: memoryview
    """UTF-8 text of the `json` member."""
    frame_format: FrameFormat
    items: Items | None = field(default=None, repr=False)
    """The sounds and pictures if they are known already; read from `json` when they are first asked for."""

    @property
    def audio(self) -> tuple[AudioItem, ...]:
        """Return the sounds. Raises `DatasetError` if `json` does not describe the record."""
        return (self.items or self.parse())[0]

    @property
    def vision(self) -> tuple[VisionItem, ...]:
        """Return the images and videos. Raises `DatasetError` if `json` does not describe the record."""
        return (self.items or self.parse())[1]

    @property
    def num_tokens(self) -> int:
        """Return the tokens of all sequences together."""
        return sum(array.shape[1] for array in self.tokens.values())

    def parse(self) -> Items:
        """Read `json` and check that it describes this record. Raises `DatasetError`."""
        self.items = _items(self.json.tobytes(), key=self.key, num_mel_frames=self.mel.shape[1], num_bytes=len(self.frames))
        return self.items

    def has_its_json(self) -> bool:
        """Return whether `json` begins and ends as our writer's for this key: enough where there are no media to read of it."""
        return self.json.tobytes().startswith(json_start(self.key)) and self.json[-1:].tobytes() == b"}"


@dataclass(frozen=True)
class MemberPlaces:
    """Which member of a record is which, worked out once for all records of a dataset."""

    form: MemberFormat

    @cached_property
    def json(self) -> int:
        """Return the place of `json` among the members."""
        return self.form.names.index(JSON)

    @cached_property
    def mel(self) -> int:
        """Return the place of the mel."""
        return self.form.names.index(MEL)

    @cached_property
    def frames(self) -> int:
        """Return the place of the frames."""
        return self.form.names.index(FRAMES[self.form.frame_format])

    @cached_property
    def sequences(self) -> tuple[tuple[str, int], ...]:
        """Return the name and place of each token sequence."""
        return tuple((name, self.form.names.index(sequence_member(name))) for name in SEQUENCES[self.form.kind])

    @cached_property
    def mel_dtype(self) -> "np.dtype[Any]":
        """Return the type of mel values."""
        return np.dtype(self.form.mel_dtype).newbyteorder("<")


def view_record(
    buffer: memoryview,
    spans: Sequence[tuple[int, int]],
    *,
    places: MemberPlaces,
    key: str,
    source: str,
    items: Items | None = None,
) -> Record:
    """Return the record whose members have their data at `spans` (start, size) of a buffer, in the order of their names.

    Raises `DatasetError` that names the member that is not what it should be.
    """
    start, size = spans[places.mel]
    mel = view_npy(buffer, start, size, dtype=places.mel_dtype, num_rows=QWEN2_5_OMNI.num_mel_bins, name=MEL)
    start, size = spans[places.frames]
    if places.form.frame_format == "raw":
        num_bytes = max(size - NPY_HEADER_BYTES, 0)
        _check_npy(buffer[start : start + size], npy_header("|u1", (num_bytes,)), num_bytes, FRAMES["raw"])
        start, size = start + NPY_HEADER_BYTES, num_bytes
    json_start, json_size = spans[places.json]
    return Record(
        key,
        source,
        {
            name: view_npy(buffer, *spans[at], dtype=_INT32, num_rows=NUM_TOKEN_ROWS, name=sequence_member(name))
            for name, at in places.sequences
        },
        mel,
        buffer[start : start + size],
        buffer[json_start : json_start + json_size],
        places.form.frame_format,
        items,
    )


_INT32 = np.dtype("<i4")


def view_npy(
    buffer: memoryview, start: int, size: int, *, dtype: "np.dtype[Any]", num_rows: int, name: str = ""
) -> npt.NDArray[Any]:
    """Return the C-ordered array (num_rows, n) of a `.npy` file inside a buffer; n follows from its size.

    Raises `DatasetError` unless its header is the one of that array.
    """
    num_columns = max(size - NPY_HEADER_BYTES, 0) // (num_rows * dtype.itemsize)
    header = _npy_header(dtype.str, (num_rows, num_columns))
    _check_npy(buffer[start : start + size], header, num_columns * num_rows * dtype.itemsize, name)
    return np.ndarray((num_rows, num_columns), dtype, buffer, start + NPY_HEADER_BYTES)


@lru_cache(maxsize=1 << 14)
def _npy_header(descr: str, shape: tuple[int, ...]) -> bytes:
    """Return the header of a `.npy` file; made once for each shape, of which there are not many."""
    return npy_header(descr, shape)


def _check_npy(member: memoryview, header: bytes, num_bytes: int, name: str) -> None:
    got = member[: len(header)].tobytes()
    if len(member) != len(header) + num_bytes or got != header:
        wanted = header[10:-1].decode().strip()
        raise DatasetError(f"{name}: expected {len(header) + num_bytes} bytes of {wanted}, got {len(member)}: {got!r:.150}")


def _items(text: bytes, *, key: str, num_mel_frames: int, num_bytes: int) -> Items:
    try:
        facts = _media_facts(text, key)
        audio = tuple([_audio_item(item, num_mel_frames) for item in from_json(facts["audio"])])
        vision = tuple([_vision_item(item, num_bytes) for item in from_json(facts["vision"])])
    except (ValueError, TypeError, KeyError, IndexError) as error:
        detail = " ".join(str(error).split())
        raise DatasetError(f"json: does not describe the other members: {type(error).__name__}: {detail:.200}") from None
    return audio, vision


def _media_facts(text: bytes, key: str) -> dict[str, Any]:
    """Return at least the facts `audio` and `vision` of a record's `json`."""
    if text.startswith(json_start(key)) and (rest := json_after_segments(text)) is not None:
        tail: dict[str, Any] = from_json(rest)
        return tail
    facts: dict[str, Any] = from_json(text)
    if facts["format"] != FORMAT_VERSION or facts["key"] != key:
        detail = f"expected format {FORMAT_VERSION} and key {key!r}, got {facts['format']!r} and {facts['key']!r}"
        raise DatasetError(f"json: {detail:.300}")
    return facts


def _audio_item(item: Mapping[str, Any], num_mel_frames: int) -> AudioItem:
    audio = AudioItem(int(item["mel_offset"]), int(item["num_mel_frames"]), int(item["num_samples"]))
    if not 0 <= audio.mel_offset <= audio.mel_offset + audio.num_mel_frames <= num_mel_frames:
        raise ValueError(f"a sound at mel frames {audio.mel_offset} + {audio.num_mel_frames} of {num_mel_frames}")
    return audio


def _vision_item(item: Mapping[str, Any], num_bytes: int) -> VisionItem:
    kind = item["kind"]
    if kind not in ("image", "video"):
        raise ValueError(f"an item of kind {kind!r}")
    num_steps, num_rows, num_columns = map(int, item["grid_thw"])
    index = item["audio_index"]
    vision = VisionItem(
        kind,
        (num_steps, num_rows, num_columns),
        int(item["height"]),
        int(item["width"]),
        tuple(map(int, item["frame_offsets"])),
        tuple(map(int, item["frame_sizes"])),
        None if index is None else int(index),
        float(item["video_second_per_grid"]),
    )
    for offset, size in zip(vision.frame_offsets, vision.frame_sizes, strict=True):
        if offset < 0 or size < 0 or offset + size > num_bytes:
            raise ValueError(f"a frame at bytes {offset} + {size} of {num_bytes}")
    return vision
