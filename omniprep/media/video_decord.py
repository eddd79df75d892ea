"""Chosen frames of a video file through decord: the default where it is right (`VideoInfo.decord_problem`)."""

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

from omniprep.errors import Reason, RejectSample
from omniprep.media.video_probe import VideoInfo
from omniprep.types import MediaFile, Uint8Array


def open_decord(media: MediaFile, info: VideoInfo) -> Any | None:
    """Return a decord reader, or None if decord does not open the file or counts other frames than its packets have."""
    decord = _decord()
    try:
        reader = decord.VideoReader(str(media.path) if media.path is not None else media.open(), num_threads=1)
    except (decord.DECORDError, RuntimeError, AssertionError):
        return None
    return reader if len(reader) == info.num_frames else None


def read_decord(reader: Any, media: MediaFile, indices: Sequence[int]) -> Iterator[Uint8Array]:
    """Yield frames `indices` as (height, width, 3) uint8 RGB, upright, one at a time.

    decord seeks to the key frame before a frame that is far ahead by itself. Its `get_batch` would hold all frames at once.
    """
    decord = _decord()
    for index in indices:
        try:
            frame: Uint8Array = reader[index].asnumpy()
        except (decord.DECORDError, RuntimeError, StopIteration):
            raise RejectSample(
                Reason.MEDIA_CORRUPT,
                f"{media.name}: decord cannot decode frame {index}; repair the file or try `video.decoder: pyav`",
            ) from None
        yield frame


@cache
def _decord() -> Any:
    import decord

    decord.logging.set_level(decord.logging.QUIET)
    return decord
