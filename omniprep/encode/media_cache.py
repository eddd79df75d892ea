"""Encoded media kept from one build to the next, so that a change of the text does not decode them again.

```
content of the files + what was asked + settings of that kind + library versions ── sha256 ──> ab/abcdef….bin
```

An entry is one encoded medium: the sound of a file or of a cut of it, a picture, the facts of a video file, the frames of
one plan. Its name is its whole key, so nothing in the folder is ever out of date: entries that no build asks for any more
only take space, and the folder may be deleted at any time, even while a build runs.

An entry is plain numbers and bytes (no pickle: a folder may be shared, and reading it must not run code) and ends with a
checksum. A damaged or foreign one is a miss. Rejections are not kept.
"""

import hashlib
import importlib.metadata
import json
import warnings
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Generic, TypeVar

import numpy as np

from omniprep import __version__
from omniprep.errors import OmniPrepError
from omniprep.media.ready_frames import ReadyFrames
from omniprep.media.video_probe import VideoInfo
from omniprep.shards.members import MelDtype
from omniprep.storage.folder import Folder
from omniprep.types import EncodedAudio, MediaFile

CACHE_VERSION = 2
"""Of the entries' own form; to be raised as well by a change between two releases of what any decoding step gives."""
_MAGIC = b"omniprep medium\n"
_CHECKSUM_BYTES = 4
_MAX_FAILED_READS = 3
"""A folder that cannot be read so often is not asked again: an object store that is away would cost a time-out an item."""

Value = TypeVar("Value")
Packed = tuple[dict[str, Any], Sequence[bytes | memoryview]]
"""JSON values, and the bytes beside them."""


@dataclass(frozen=True, slots=True)
class Form(Generic[Value]):
    """How one kind of value becomes an entry, and an entry the value."""

    name: str
    pack: Callable[[Value], Packed]
    unpack: Callable[[dict[str, Any], Sequence[memoryview]], Value]


class MediaCache:
    """A folder of encoded media. What fails in it (a full disk, no permission) never fails a build.

    `mel_dtype` is that of the dataset: float16 halves the entries, and loses nothing that its shards would keep.
    """

    def __init__(self, folder: Folder, *, mel_dtype: MelDtype = "float32") -> None:
        self.folder = folder
        self.mel_dtype = mel_dtype
        self.num_hits = 0
        self.num_misses = 0
        self.problem = ""
        """The first thing that went wrong with the folder, "" if nothing did."""
        self._num_failed_reads = 0
        self._is_writable = True

    def kept(self, form: Form[Value], files: Sequence[MediaFile], asked: dict[str, Any], make: Callable[[], Value]) -> Value:
        """Return what `make` gives for these files, from the cache if it is there.

        `asked` is all else that the value depends on, as JSON. Files without a `sha256` are not looked up.
        """
        if not files or not all(file.sha256 for file in files):
            return make()
        key = _key(form, files, asked)
        found = self._read(form, key)
        if found is not None:
            self.num_hits += 1
            return found
        self.num_misses += 1
        value = make()
        # A file that was replaced since its digest was taken would be kept under the name of the content it had.
        if self._is_writable and all(map(_is_as_found, files)):
            self._write(key, form.pack(value))
        return value

    def _read(self, form: Form[Value], key: str) -> Value | None:
        if self._num_failed_reads >= _MAX_FAILED_READS:
            return None
        try:
            data = self.folder.read(_name(key))
        except FileNotFoundError:
            return None
        except (OmniPrepError, OSError) as error:
            self._num_failed_reads += 1
            self._warn(error)
            return None
        try:
            return form.unpack(*_open_entry(key, data))
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError, RecursionError):
            return None

    def _write(self, key: str, packed: Packed) -> None:
        try:
            with self.folder.create(_name(key)) as file:
                for part in _make_entry(key, packed):
                    file.write(part)
                file.publish(synced=False)  # what a power cut takes is a miss
        except (OmniPrepError, OSError) as error:
            self._is_writable = False  # at once: a disk that is full must not lose its last bytes to a cache
            self._warn(error)

    def _warn(self, error: Exception) -> None:
        if not self.problem:
            self.problem = f"{self.folder.place}: the cache of encoded media is not used: {' '.join(str(error).split())}"
            warnings.warn(self.problem, RuntimeWarning, stacklevel=4)


def _key(form: Form[Any], files: Sequence[MediaFile], asked: dict[str, Any]) -> str:
    facts = {
        "cache": CACHE_VERSION,
        "omniprep": __version__,
        "form": form.name,
        # Some decoders look at the ending of a path before they look into the file.
        "files": [(file.sha256, file.path.suffix.lower() if file.path is not None else None) for file in files],
        "asked": asked,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _name(key: str) -> str:
    return f"{key[:2]}/{key}.bin"


def _is_as_found(file: MediaFile) -> bool:
    if file.path is None or not file.stamp:
        return True
    try:
        return str(file.path.stat().st_mtime_ns) == file.stamp
    except OSError:
        return False


@cache
def library_versions(*names: str) -> dict[str, str]:
    """Return the versions of libraries, of those that are installed."""
    found: dict[str, str] = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


# The file of an entry: magic, size of the header, header (JSON), payloads, CRC-32 of all that ----------------------------


def _make_entry(key: str, packed: Packed) -> list[bytes | memoryview]:
    values, payloads = packed
    header = json.dumps({"key": key, "values": values, "sizes": [len(payload) for payload in payloads]}).encode()
    parts = [_MAGIC, len(header).to_bytes(4, "little"), header, *payloads]
    checksum = 0
    for part in parts:
        checksum = zlib.crc32(part, checksum)  # against damage, not malice, and at three times the speed of SHA-256
    return [*parts, checksum.to_bytes(_CHECKSUM_BYTES, "little")]


def _open_entry(key: str, data: bytes) -> tuple[dict[str, Any], list[memoryview]]:
    """Return an entry's values and payloads. Raises `ValueError` if it is not the whole entry of that key."""
    view = memoryview(data)
    body, checksum = view[:-_CHECKSUM_BYTES], view[-_CHECKSUM_BYTES:]
    if view[: len(_MAGIC)] != _MAGIC or zlib.crc32(body) != int.from_bytes(checksum, "little"):
        raise ValueError("not a whole entry")
    position = len(_MAGIC) + 4
    stop = position + int.from_bytes(view[len(_MAGIC) : position], "little")
    header = json.loads(bytes(body[position:stop]))
    payloads = []
    for size in header["sizes"]:
        payloads.append(body[stop : stop + size])
        stop += size
    if header["key"] != key or stop != len(body):
        raise ValueError("another entry")
    return header["values"], payloads


# What is kept --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredFrames:
    """A picture, or the frames of a video, as they are stored in a shard."""

    frames: tuple[bytes, ...]
    height: int
    width: int
    decoder: str = ""


def _pack_sounds(items: tuple[EncodedAudio, ...], *, dtype: MelDtype) -> Packed:
    values = [
        {
            "num_mel_bins": item.mel.shape[0],
            "num_samples": item.num_samples,
            "start_s": item.start_s,
            "decoder": item.decoder,
            "truncated_from_s": item.truncated_from_s,
        }
        for item in items
    ]
    return {"items": values}, [np.ascontiguousarray(item.mel, dtype).tobytes() for item in items]


def _unpack_sounds(values: dict[str, Any], payloads: Sequence[memoryview], *, dtype: MelDtype) -> tuple[EncodedAudio, ...]:
    return tuple(
        EncodedAudio(
            mel=np.frombuffer(mel, dtype).reshape(item.pop("num_mel_bins"), -1).astype(np.float32, copy=False),
            source="",
            **item,
        )
        for item, mel in zip(values["items"], payloads, strict=True)
    )


SOUNDS: dict[MelDtype, Form[tuple[EncodedAudio, ...]]] = {
    dtype: Form(f"sounds {dtype}", partial(_pack_sounds, dtype=dtype), partial(_unpack_sounds, dtype=dtype))
    for dtype in ("float16", "float32")
}
"""The items of a sound, without their `source`, which is the record's name for it. No item: a track that counts as silence."""


def _pack_frames(stored: StoredFrames) -> Packed:
    return {"height": stored.height, "width": stored.width, "decoder": stored.decoder}, stored.frames


def _unpack_frames(values: dict[str, Any], payloads: Sequence[memoryview]) -> StoredFrames:
    return StoredFrames(frames=tuple(map(bytes, payloads)), **values)


FRAMES = Form("frames", _pack_frames, _unpack_frames)

_ARRAYS = {"frame_times_s": np.float64, "frame_pts": np.int64, "packet_bytes": np.int64, "keyframes": np.bool_}
_PLAIN_FACTS = tuple(name for name in VideoInfo.__dataclass_fields__ if name not in {*_ARRAYS, "opened"})


def _pack_video(info: VideoInfo) -> Packed:
    arrays = {name: getattr(info, name) for name in _ARRAYS if getattr(info, name) is not None}
    plain = {name: getattr(info, name) for name in _PLAIN_FACTS}
    return {"plain": plain, "arrays": list(arrays)}, [array.astype(_ARRAYS[name]).tobytes() for name, array in arrays.items()]


def _unpack_video(values: dict[str, Any], payloads: Sequence[memoryview]) -> VideoInfo:
    arrays: dict[str, Any] = dict.fromkeys(_ARRAYS)
    for name, payload in zip(values["arrays"], payloads, strict=True):
        arrays[name] = np.frombuffer(payload, _ARRAYS[name])
    return VideoInfo(**values["plain"], **arrays)


VIDEO = Form("video", _pack_video, _unpack_video)
"""The facts of a video file."""


def _pack_ready(ready: ReadyFrames) -> Packed:
    return {"num_frames": ready.num_frames, "height": ready.height, "width": ready.width, "decoder": ready.decoder}, []


def _unpack_ready(values: dict[str, Any], payloads: Sequence[memoryview]) -> ReadyFrames:
    return ReadyFrames(**values)


READY = Form("ready frames", _pack_ready, _unpack_ready)
"""The facts of frames made ready."""
