"""Chosen frames of a video file through decord: the default where it is right (`VideoInfo.decord_problem`)."""

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

from omniprep.errors import Reason, RejectSample
from omniprep.media.video_probe import VideoInfo
from omniprep.types import MediaFile, Uint8Array

_BATCH_BYTES = 32 << 20
"""Frames are asked for in batches of about this size: one call for all would hold all, single ones seek each time."""


def open_decord(media: MediaFile, info: VideoInfo, *, size: tuple[int, int] | None = None) -> Any | None:
    """Return a decord reader, or None if decord does not open the file or counts other frames than its packets have.

    With `size` = (height, width) decord resizes frames itself (swscale, bicubic), in one step with the colour conversion.
    """
    decord = _decord()
    height, width = size or (-1, -1)
    source = str(media.path) if media.path is not None else media.open()
    try:
        reader = decord.VideoReader(source, num_threads=1, width=width, height=height)
    except (decord.DECORDError, RuntimeError, AssertionError):
        return None
    return reader if len(reader) == info.num_frames else None


def held_bytes(info: VideoInfo, size: tuple[int, int] | None) -> int:
    """Return what decord may hold: it decodes every frame and runs ahead of its reader, at worst to the end of the file."""
    height, width = size or (info.height, info.width)
    return info.num_frames * height * width * 3


def read_decord(reader: Any, media: MediaFile, indices: Sequence[int]) -> Iterator[Uint8Array]:
    """Yield frames `indices` (not decreasing) as (height, width, 3) uint8 RGB, upright; a small batch in memory."""
    decord = _decord()
    per_batch, start = 1, 0
    while start < len(indices):
        batch = list(indices[start : start + per_batch])
        try:
            frames: Uint8Array = reader.get_batch(batch).asnumpy()
        except (decord.DECORDError, RuntimeError, StopIteration, IndexError):
            raise RejectSample(
                Reason.MEDIA_CORRUPT,
                f"{media.name}: decord cannot decode frame {batch[0]}; repair the file or try `video.decoder: pyav`",
            ) from None
        yield from frames
        start += len(batch)
        per_batch = max(1, _BATCH_BYTES // frames[0].nbytes)


@cache
def _decord() -> Any:
    import decord

    decord.logging.set_level(decord.logging.QUIET)
    return decord
