"""The members of a record: the only file that knows their names and what is in them.

```
EncodedSample ── to_members ──> {"frames.mjpg": …, "json": …, "mel.npy": …, "tokens.npy": …} ── from_members ──> EncodedSample
```

Every record of a dataset has the same members, present even where they are empty, and the `json` member has the same
keys with the same types: readers that infer a schema from the first records (HF `datasets`) then accept all of them.
What varies in shape (`audio`, `vision`, `meta`) is therefore JSON text inside the JSON, and nothing is ever null outside it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from itertools import accumulate
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from omniprep.errors import DatasetError, Reason, RejectSample
from omniprep.profile import QWEN2_5_OMNI, ModelProfile
from omniprep.types import (
    EncodedAudio,
    EncodedSample,
    EncodedVision,
    FrameFormat,
    Layout,
    Segment,
    VideoTiming,
)

FORMAT_VERSION = 1
MelDtype = Literal["float16", "float32"]
SampleKind = Literal["sequence", "preference"]

SEQUENCES: dict[SampleKind, tuple[str, ...]] = {"sequence": ("tokens",), "preference": ("chosen", "rejected")}
"""The token sequences of a record, by the kind of dataset."""

JSON = "json"
MEL = "mel.npy"
FRAMES: dict[FrameFormat, str] = {"jpeg": "frames.mjpg", "raw": "frames.npy"}
NUM_TOKEN_ROWS = 5
"""Rows of a token sequence: input_ids, labels (unshifted), temporal, height, width."""

_ENCODER = json.JSONEncoder(separators=(",", ":"), allow_nan=False, default=str)
_END_OF_SEGMENTS, _AFTER_SEGMENTS = b"],", b'"audio":"'


@dataclass(frozen=True, kw_only=True)
class MemberFormat:
    """What every record of one dataset has in common."""

    kind: SampleKind = "sequence"
    frame_format: FrameFormat = "jpeg"
    mel_dtype: MelDtype = "float16"

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Return the names of the members in the order in which they are stored.

        >>> MemberFormat().names
        ('frames.mjpg', 'json', 'mel.npy', 'tokens.npy')
        """
        sequences = [sequence_member(name) for name in SEQUENCES[self.kind]]
        return tuple(sorted([JSON, MEL, FRAMES[self.frame_format], *sequences]))


def sequence_member(name: str) -> str:
    """Return the name of the member that holds a token sequence."""
    return f"{name}.npy"


def to_members(
    sample: EncodedSample, form: MemberFormat | None = None, *, profile: ModelProfile = QWEN2_5_OMNI
) -> dict[str, bytes]:
    """Return a sample's members by name, in the order of `form.names`.

    `json` UTF-8 text; `NAME.npy` int32 (5, T) of input_ids, labels, t, h, w; `mel.npy` (128, ΣF) of all audio items one
    after another; `frames.mjpg` all JPEG files one after another, or `frames.npy` uint8 (bytes of all frames,).
    Raises `RejectSample` if the sample is not of the dataset's kind or its `meta` is not JSON.
    """
    form = form or MemberFormat()
    sequences = SEQUENCES[form.kind]
    if tuple(sample.layouts) != sequences:
        raise RejectSample(
            Reason.SCHEMA_INVALID,
            f"expected a record of kind {form.kind!r} ({', '.join(sequences)}), got {', '.join(sample.layouts)}; "
            "put conversations and preferences into recipes of their own (`kind:` in the recipe)",
        )
    frames = [frame for item in sample.vision for frame in item.frames]
    members = {
        JSON: _describe(sample),
        MEL: _mel_bytes(sample.audio, num_mel_bins=profile.num_mel_bins, dtype=np.dtype(form.mel_dtype)),
    }
    if form.frame_format == "raw":
        members[FRAMES["raw"]] = b"".join((npy_header("|u1", (sum(map(len, frames)),)), *frames))
    else:
        members[FRAMES["jpeg"]] = b"".join(frames)
    for name in sequences:
        members[sequence_member(name)] = _layout_bytes(sample.layouts[name])
    return {name: members[name] for name in form.names}


def from_members(members: Mapping[str, bytes]) -> EncodedSample:
    """Return the sample that `to_members` stored; mel values come back as float32.

    Raises `DatasetError` that names the member if one is missing, is not what it should be or disagrees with `json`.
    """
    facts = read_facts(members)
    try:
        sequences = tuple(dict.fromkeys(segment["sequence"] for segment in facts["segments"]))
        mel = load_npy(members, MEL).astype(np.float32)
        frames = _frame_bytes(members)
        return EncodedSample(
            key=facts["key"],
            id=facts["id"],
            layouts={name: _layout(load_npy(members, sequence_member(name)), name, facts["segments"]) for name in sequences},
            audio=tuple(_audio(item, mel) for item in json.loads(facts["audio"])),
            vision=tuple(_vision(item, frames) for item in json.loads(facts["vision"])),
            rope_mode=facts["rope_mode"],
            source=facts["source"],
            row=facts["row"],
            split=facts["split"],
            meta=json.loads(facts["meta"]),
        )
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise DatasetError(f"json: does not describe the other members: {type(error).__name__}: {error}") from None


def read_facts(members: Mapping[str, bytes]) -> dict[str, Any]:
    """Return the `json` member as plain values. Raises `DatasetError` if it is missing or of another format."""
    try:
        facts = json.loads(bytes(members[JSON]))
        version = facts["format"]
    except KeyError as error:
        raise DatasetError(f"json: {error} is missing") from None
    except (ValueError, TypeError) as error:
        raise DatasetError(f"json: not valid JSON: {error}") from None
    if version != FORMAT_VERSION:
        raise DatasetError(f"json: expected format {FORMAT_VERSION}, got {version!r}; read it with the omniprep that wrote it")
    return dict(facts)


def json_start(key: str) -> bytes:
    """Return how a record's `json` begins as `to_members` writes it."""
    return b'{"format":%d,"key":"%b",' % (FORMAT_VERSION, key.encode())


def json_after_segments(text: bytes) -> bytes | None:
    """Return of a `json` that `to_members` wrote what follows the segments, which are most of it; None if it is not like that.

    >>> json_after_segments(b'{"format":1,"segments":[{"start":0}],"audio":"[]","vision":"[]","meta":"{}"}')
    b'{"audio":"[]","vision":"[]","meta":"{}"}'
    """
    at = text.find(_END_OF_SEGMENTS + _AFTER_SEGMENTS)
    return None if at < 0 else b"{" + text[at + len(_END_OF_SEGMENTS) :]


def load_npy(members: Mapping[str, bytes], name: str) -> npt.NDArray[Any]:
    """Return the array of one `.npy` member. Raises `DatasetError` if it is missing or not an array."""
    if name not in members:
        raise DatasetError(f"{name}: member is missing")
    try:
        array: npt.NDArray[Any] = np.load(BytesIO(members[name]), allow_pickle=False)
    except Exception as error:  # the header is a Python literal: parsing a damaged one fails in a dozen ways
        raise DatasetError(f"{name}: not a .npy array: {' '.join(str(error).split()) or type(error).__name__:.200}") from None
    return array


def npy_header(descr: str, shape: tuple[int, ...]) -> bytes:
    """Return the header of a C-ordered `.npy` file: what `numpy.save` writes, at a tenth of the cost.

    >>> npy_header("<i4", (5, 7))[:10]
    b'\\x93NUMPY\\x01\\x00v\\x00'
    """
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}"
    # numpy leaves room for the first axis to grow to 21 digits in place, then aligns the data to 64 bytes.
    room = 21 - len(str(shape[0]))
    body = text.encode("latin1") + b" " * room
    body += b" " * (-(10 + len(body) + 1) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(body).to_bytes(2, "little") + body


NPY_HEADER_BYTES = len(npy_header("<i4", (NUM_TOKEN_ROWS, 1)))
"""The same for every shape that fits a tar: numpy leaves room for the first axis and aligns to 64 bytes."""


def _layout_bytes(layout: Layout) -> bytes:
    stacked = np.empty((NUM_TOKEN_ROWS, layout.num_tokens), np.int32)
    stacked[0], stacked[1], stacked[2:] = layout.input_ids, layout.labels, layout.position_ids
    return b"".join((npy_header("<i4", stacked.shape), stacked.data))


def _mel_bytes(audio: Sequence[EncodedAudio], *, num_mel_bins: int, dtype: np.dtype[Any]) -> bytes:
    stacked = np.empty((num_mel_bins, sum(item.num_mel_frames for item in audio)), dtype)
    start = 0
    for item in audio:
        stacked[:, start : start + item.num_mel_frames] = item.mel
        start += item.num_mel_frames
    return b"".join((npy_header(dtype.str, stacked.shape), stacked.data))


def _frame_bytes(members: Mapping[str, bytes]) -> bytes:
    if FRAMES["raw"] in members:
        return load_npy(members, FRAMES["raw"]).tobytes()
    if FRAMES["jpeg"] not in members:
        raise DatasetError(f"{FRAMES['jpeg']}: member is missing")
    return bytes(members[FRAMES["jpeg"]])


def _describe(sample: EncodedSample) -> bytes:
    try:
        meta = _dumps(sample.meta) if sample.meta else "{}"
    except (ValueError, TypeError) as error:
        raise RejectSample(Reason.SCHEMA_INVALID, f"meta: cannot be stored as JSON: {error}") from None
    about = {
        "format": FORMAT_VERSION,
        "key": sample.key,
        "id": sample.id,
        "source": sample.source,
        "row": sample.row,
        "split": sample.split,
        "rope_mode": sample.rope_mode,
        "codec": "",  # the codec card's name in Talker datasets
    }
    media = {
        "audio": _dumps(_audio_facts(sample.audio)) if sample.audio else "[]",
        "vision": _dumps(_vision_facts(sample.vision)) if sample.vision else "[]",
        "meta": meta,
    }
    # Segments are numbers and closed words, and a dialogue has dozens: written out, they take a fifth of the encoder's time.
    segments = ",".join(
        [
            f'{{"sequence":"{name}","kind":"{kind}","start":{start},"stop":{stop},'
            f'"supervised":{"true" if supervised else "false"},"item":{item},"offset":{offset}}}'
            for name, layout in sample.layouts.items()
            for kind, start, stop, supervised, item, offset in layout.segments
        ]
    )
    return f'{_dumps(about)[:-1]},"segments":[{segments}],{_dumps(media)[1:]}'.encode("ascii")


def _dumps(value: object) -> str:
    return _ENCODER.encode(value)


def _audio_facts(audio: Sequence[EncodedAudio]) -> list[dict[str, Any]]:
    offsets = accumulate((item.num_mel_frames for item in audio), initial=0)
    return [
        {
            "mel_offset": offset,
            "num_mel_frames": item.num_mel_frames,
            "num_samples": item.num_samples,
            "source": item.source,
            "start_s": item.start_s,
            "decoder": item.decoder,
            "truncated_from_s": item.truncated_from_s,
        }
        for item, offset in zip(audio, offsets, strict=False)
    ]


def _audio(item: Mapping[str, Any], mel: npt.NDArray[np.float32]) -> EncodedAudio:
    start, stop = item["mel_offset"], item["mel_offset"] + item["num_mel_frames"]
    if not 0 <= start <= stop <= mel.shape[1]:
        raise ValueError(f"audio item at mel frames {start}..{stop} of {mel.shape[1]}")
    return EncodedAudio(
        mel=mel[:, start:stop],
        num_samples=item["num_samples"],
        source=item["source"],
        start_s=item["start_s"],
        decoder=item["decoder"],
        truncated_from_s=item["truncated_from_s"],
    )


def _vision_facts(vision: Sequence[EncodedVision]) -> list[dict[str, Any]]:
    facts, offset = [], 0
    for item in vision:
        sizes = [len(frame) for frame in item.frames]
        offsets = list(accumulate(sizes, initial=offset))
        offset = offsets.pop()
        facts.append(
            {
                "kind": item.kind,
                "grid_thw": list(item.grid_thw),
                "height": item.height,
                "width": item.width,
                "frame_format": item.frame_format,
                "frame_offsets": offsets,
                "frame_sizes": sizes,
                "source": item.source,
                "audio_index": item.audio_index,
                "video_second_per_grid": item.second_per_grid,
                "timing": _timing_facts(item.timing),
            }
        )
    return facts


def _timing_facts(timing: VideoTiming | None) -> dict[str, Any] | None:
    if timing is None:
        return None
    return {
        "source_fps": timing.source_fps,
        "num_source_frames": timing.num_source_frames,
        "sample_fps": timing.sample_fps,
        "frame_indices": list(timing.frame_indices),
        "frame_times_s": list(timing.frame_times_s),
        "audio_start_s": timing.audio_start_s,
        "decoder": timing.decoder,
    }


def _vision(item: Mapping[str, Any], frames: bytes) -> EncodedVision:
    timing = item["timing"]
    spans = list(zip(item["frame_offsets"], item["frame_sizes"], strict=True))
    if any(offset < 0 or size < 0 or offset + size > len(frames) for offset, size in spans):
        raise ValueError(f"frames end at byte {max(sum(span) for span in spans)} of {len(frames)}")
    return EncodedVision(
        kind=item["kind"],
        grid_thw=tuple(item["grid_thw"]),
        frames=tuple(frames[offset : offset + size] for offset, size in spans),
        frame_format=item["frame_format"],
        height=item["height"],
        width=item["width"],
        source=item["source"],
        audio_index=item["audio_index"],
        second_per_grid=item["video_second_per_grid"],
        timing=None
        if timing is None
        else VideoTiming(
            source_fps=timing["source_fps"],
            num_source_frames=timing["num_source_frames"],
            frame_indices=tuple(timing["frame_indices"]),
            frame_times_s=tuple(timing["frame_times_s"]),
            sample_fps=timing["sample_fps"],
            audio_start_s=timing["audio_start_s"],
            decoder=timing["decoder"],
        ),
    )


def _layout(stacked: npt.NDArray[Any], name: str, segments: Sequence[Mapping[str, Any]]) -> Layout:
    if stacked.dtype != np.int32 or stacked.ndim != 2 or stacked.shape[0] != NUM_TOKEN_ROWS:
        raise DatasetError(f"{sequence_member(name)}: expected int32 ({NUM_TOKEN_ROWS}, T), got {stacked.dtype} {stacked.shape}")
    return Layout(
        input_ids=stacked[0],
        labels=stacked[1],
        position_ids=stacked[2:],
        segments=tuple(
            Segment(
                kind=segment["kind"],
                start=segment["start"],
                stop=segment["stop"],
                supervised=segment["supervised"],
                item=segment["item"],
                offset=segment["offset"],
            )
            for segment in segments
            if segment["sequence"] == name
        ),
    )
