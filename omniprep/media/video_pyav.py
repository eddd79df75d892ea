"""Chosen frames of a video file through PyAV: exact frames, little decoding.

Frames far apart are reached by seeking to the key frame before them. Of the frames in between, those that no other
frame refers to (most B-frames) are not decoded at all. Both change nothing in the frames that are kept: 5 s of 720p
film, 10 of 132 frames kept: 189 ms instead of 244 ms, decord 265 ms; all three equal bit for bit.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np

from omniprep.errors import Reason, RejectSample
from omniprep.media.video_probe import VideoInfo, open_video, reading_video
from omniprep.types import MediaFile, Uint8Array

_MIN_SEEK_FRAMES = 16
"""Seeking drops the decoder's state; below this many frames it is not worth it."""


class _FrameMissingError(Exception):
    """The decoder has passed a chosen frame without giving it out."""


def read_pyav(
    media: MediaFile, info: VideoInfo, indices: Sequence[int], *, size: tuple[int, int] | None = None
) -> Iterator[Uint8Array]:
    """Yield frames `indices` (not decreasing) as (height, width, 3) uint8 RGB, upright, one source frame in memory.

    With `size` = (height, width) frames are resized by swscale (bicubic) in one step with the colour conversion. Raises
    `RejectSample` (`MEDIA_CORRUPT`) for a frame that cannot be decoded.
    """
    todo = list(indices)
    # A container whose seek lands behind the frame asked for is read once more: from its start, leaving out no frame.
    for thrifty in (True, False):
        try:
            with reading_video(media):
                for index, frame in _chosen_frames(media, info, todo, thrifty=thrifty):
                    image = _to_rgb(frame, info.rotation, size)
                    while todo and todo[0] == index:
                        yield image
                        todo.pop(0)
                return
        except _FrameMissingError:
            continue
    raise RejectSample(
        Reason.MEDIA_CORRUPT,
        f"{media.name}: frame {todo[0]} at {info.frame_times_s[todo[0]]:.3f} s cannot be decoded; repair the file",
    )


def _to_rgb(frame: Any, rotation: int, size: tuple[int, int] | None) -> Uint8Array:
    """Return a PyAV frame upright; the colour conversion is swscale's default, which decord uses too."""
    if size is None:
        image = frame.to_ndarray(format="rgb24")
    else:
        height, width = size if rotation % 180 == 0 else size[::-1]
        image = frame.reformat(width, height, "rgb24", interpolation="BICUBIC").to_ndarray()
    return np.ascontiguousarray(np.rot90(image, rotation // 90))


def _chosen_frames(media: MediaFile, info: VideoInfo, indices: Sequence[int], *, thrifty: bool) -> Iterator[tuple[int, Any]]:
    """Yield (index, decoded frame) for each different index."""
    stamps = info.frame_pts if thrifty and info.seekable else None
    with ExitStack() as files:
        if stamps is not None and info.opened is not None:
            container, stream = info.opened
            container.seek(int(stamps[0]), stream=stream)
        else:
            container, stream = open_video(media)
            files.callback(container.close)
        runs = _runs(info, indices) if stamps is not None else [(0, list(indices))]
        for key, wanted in runs:
            if key and stamps is not None:
                container.seek(int(stamps[key]), stream=stream)
            yield from _decode_run(container, stream, info, sorted(set(wanted)), thrifty=thrifty)


def _runs(info: VideoInfo, indices: Sequence[int]) -> list[tuple[int, list[int]]]:
    """Return (key frame to seek to, or 0 for the file's start; chosen frames that are decoded from there on)."""
    keys = np.flatnonzero(info.keyframes)
    runs: list[tuple[int, list[int]]] = []
    position = 0
    for index in indices:
        slot = int(np.searchsorted(keys, index, side="right")) - 1
        key = int(keys[slot]) if slot >= 0 else 0
        far = key - position >= _MIN_SEEK_FRAMES
        if far or not runs:
            runs.append((key if far else 0, []))
        runs[-1][1].append(index)
        position = index
    return runs


def _decode_run(container: Any, stream: Any, info: VideoInfo, wanted: list[int], *, thrifty: bool) -> Iterator[tuple[int, Any]]:
    """Yield (index, frame) of the `wanted` frames, increasing, decoding on from where the container stands."""
    import av

    codec = stream.codec_context
    stamps = info.frame_pts
    wanted_at = {int(stamps[index]) if stamps is not None else index: index for index in wanted}
    due = sorted(wanted_at)
    num_decoded = 0
    for packet in container.demux(stream):
        skippable = thrifty and stamps is not None and packet.pts is not None and packet.pts not in wanted_at
        codec.skip_frame = "NONREF" if skippable else "DEFAULT"
        try:
            frames = packet.decode()
        except (av.error.FFmpegError, EOFError):
            continue  # a damaged packet matters only if a chosen frame is then missing
        for frame in frames:
            stamp = frame.pts if stamps is not None else num_decoded
            num_decoded += 1
            if stamp is None or stamp < due[0]:
                continue
            if stamp > due[0]:
                raise _FrameMissingError
            yield wanted_at[due.pop(0)], frame
            if not due:
                return
    raise _FrameMissingError
