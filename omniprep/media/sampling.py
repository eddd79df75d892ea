"""Which frames of a video are kept, and how large they become. Pure arithmetic, no decoder.

`reference` follows `qwen_omni_utils` (`vision_process.py`: `calculate_video_frame_range`, `smart_nframes`,
`fetch_video`) to the last rounding. `budget` takes as many frames as a number of tokens allows. `adaptive` spreads the
frames by time and by change, for which the sizes of the coded packets stand: what did not change costs few bytes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from omniprep.errors import Reason, RejectSample
from omniprep.features.patches import fit_pixels
from omniprep.profile import QWEN2_5_OMNI, ModelProfile
from omniprep.types import Float64Array, Int64Array

_TIME_SHARE = 0.5
"""Share of the frames that `adaptive` spreads evenly over time; the rest follows the change of the picture."""
_SMOOTHING_S = 0.4
"""Span over which packet sizes are averaged, so that the rhythm of P and B frames does not count as change."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FrameRequest:
    """What is asked of one video, the record's keys over the recipe's over the profile's."""

    nframes: int | None = None
    fps: float
    """Rate aimed at, frames per second; for `budget` a cap."""
    min_frames: int
    max_frames: int | None = None
    """None: the profile's limit or all frames, whichever is less."""
    min_pixels: int
    max_pixels: int | None = None
    total_pixels: int
    resized_height: int | None = None
    resized_width: int | None = None


def clip_range(num_frames: int, source_fps: float, start_s: float | None, end_s: float | None) -> tuple[int, int]:
    """Return the (first, last) frame index, both included, of the cut [start_s, end_s] of a constant-rate video.

    Arithmetic of `calculate_video_frame_range`. Raises `RejectSample` (`MEDIA_RANGE`) if the cut holds fewer than two frames.

    >>> clip_range(100, 25.0, 1.0, 2.0)
    (25, 50)
    """
    if start_s is None and end_s is None:
        return 0, num_frames - 1
    duration_s = num_frames / source_fps
    first, last = 0, num_frames - 1
    if start_s is not None:
        first = math.ceil(max(0.0, min(start_s, duration_s)) * source_fps)
    if end_s is not None:
        last = min(math.floor(max(0.0, min(end_s, duration_s)) * source_fps), num_frames - 1)
    return _checked_range(first, last, start_s, end_s, duration_s)


def clip_range_by_time(times_s: Float64Array, start_s: float | None, end_s: float | None) -> tuple[int, int]:
    """Return the (first, last) frame index of the frames shown within [start_s, end_s], for a file of variable rate.

    `times_s` is (N,) increasing. Raises as `clip_range` does.
    """
    first = 0 if start_s is None else int(np.searchsorted(times_s, start_s - 1e-6))
    last = len(times_s) - 1 if end_s is None else int(np.searchsorted(times_s, end_s + 1e-6, side="right")) - 1
    if start_s is None and end_s is None:
        return first, last
    return _checked_range(first, last, start_s, end_s, float(times_s[-1]))


def _checked_range(first: int, last: int, start_s: float | None, end_s: float | None, duration_s: float) -> tuple[int, int]:
    if first >= last:
        asked = f"[{0 if start_s is None else start_s:g} s, {'end' if end_s is None else f'{end_s:g} s'})"
        raise RejectSample(
            Reason.MEDIA_RANGE,
            f"the cut {asked} holds fewer than two frames of a video of {duration_s:.3f} s; correct video_start and video_end",
        )
    return first, last


def reference_num_frames(num_frames: int, source_fps: float, request: FrameRequest, profile: ModelProfile = QWEN2_5_OMNI) -> int:
    """Return how many of `num_frames` frames at `source_fps` the reference takes: an even number (`smart_nframes`).

    Raises `RejectSample` (`VIDEO_TOO_SHORT`) for fewer than two frames, (`MEDIA_RANGE`) for a count that cannot be met.
    """
    step = profile.temporal_patch_size
    if num_frames < step:
        raise RejectSample(
            Reason.VIDEO_TOO_SHORT, f"expected at least {step} frames, got {num_frames}; give a still picture as an image part"
        )
    if request.nframes is not None:
        wanted = round(request.nframes / step) * step
    else:
        ceiling = request.max_frames if request.max_frames is not None else min(profile.max_video_frames, num_frames)
        count = max(num_frames / source_fps * request.fps, math.ceil(request.min_frames / step) * step)
        wanted = math.floor(min(count, math.floor(ceiling / step) * step, num_frames) / step) * step
    if not step <= wanted <= num_frames:
        asked = f"nframes={request.nframes}" if request.nframes is not None else f"max_frames={request.max_frames}"
        raise RejectSample(
            Reason.MEDIA_RANGE,
            f"{asked} asks for {wanted} frames, expected {step} to {num_frames} (the clip has {num_frames}); "
            "correct it or give `fps`",
        )
    return wanted


def spread_evenly(first: int, last: int, count: int) -> Int64Array:
    """Return `count` frame indices from `first` to `last`, both included.

    This is torch's `linspace(first, last, count).round()`: float32, counted from the nearer end, halves to even.

    >>> spread_evenly(0, 131, 10).tolist()
    [0, 15, 29, 44, 58, 73, 87, 102, 116, 131]
    """
    if count == 1:
        return np.array([first], np.int64)
    start, end = np.float32(first), np.float32(last)
    step = (end - start) / np.float32(count - 1)
    rank = np.arange(count, dtype=np.float32)
    near_start = start + step * rank
    near_end = end - step * (np.float32(count - 1) - rank)
    return np.rint(np.where(np.arange(count) < count // 2, near_start, near_end)).astype(np.int64)


def video_size(
    height: int, width: int, num_frames: int, request: FrameRequest, profile: ModelProfile = QWEN2_5_OMNI
) -> tuple[int, int]:
    """Return the (height, width) in pixels that every one of `num_frames` frames is resized to (`fetch_video`).

    The share of the total budget and the user's `max_pixels` can only lower the profile's limit for one frame.
    """
    if request.resized_height is not None and request.resized_width is not None:
        limits = profile.image_limits
        return fit_pixels(
            request.resized_height,
            request.resized_width,
            min_pixels=limits.min_pixels,
            max_pixels=limits.max_pixels,
            profile=profile,
        )
    share = request.total_pixels / num_frames * profile.temporal_patch_size
    max_pixels: float = max(min(profile.video_limits.max_pixels, share), int(request.min_pixels * 1.05))
    if request.max_pixels is not None:
        max_pixels = min(request.max_pixels, max_pixels)
    return fit_pixels(height, width, min_pixels=request.min_pixels, max_pixels=max_pixels, profile=profile)


def video_tokens(num_frames: int, size: tuple[int, int], profile: ModelProfile = QWEN2_5_OMNI) -> int:
    """Return the tokens of `num_frames` frames of `size` (height, width).

    >>> video_tokens(10, (560, 1008))
    3600
    """
    return profile.num_vision_tokens(profile.grid_thw(num_frames, *size))


def budget_num_frames(
    max_count: int,
    min_count: int,
    max_tokens: int,
    size_of: Callable[[int], tuple[int, int]],
    profile: ModelProfile = QWEN2_5_OMNI,
) -> int:
    """Return the largest even frame count, at most `max_count`, whose tokens fit `max_tokens` at its own frame size.

    `size_of(count)` is the frame size that the pixel limits give for that many frames: the limits stay, the rate gives way.
    Returns `min_count` where not even that many fit; the caller then shrinks the frames.
    """
    step = profile.temporal_patch_size
    for count in range(max_count - max_count % step, min_count, -step):
        if video_tokens(count, size_of(count), profile) <= max_tokens:
            return count
    return min_count


def packet_activity(packet_bytes: Int64Array, keyframes: np.ndarray[tuple[int], np.dtype[np.bool_]], fps: float) -> Float64Array:
    """Return (N,) how much the picture changes at each frame, from the sizes of its packets in presentation order.

    A key frame is coded whole whatever happens, so it gets the mean of its neighbours. Sizes are then averaged over 0.4 s.
    """
    sizes = packet_bytes.astype(np.float64)
    inter = np.flatnonzero(~keyframes)
    if len(inter) < 2:  # every frame is coded whole (ProRes, MJPEG): sizes say nothing of change
        return np.ones(len(sizes))
    if len(inter) < len(sizes):
        sizes = np.where(keyframes, np.interp(np.arange(len(sizes)), inter, sizes[inter]), sizes)
    span = max(1, min(len(sizes), round(_SMOOTHING_S * fps)))
    sums = np.concatenate([[0.0], np.cumsum(sizes)])
    low = np.maximum(np.arange(len(sizes)) - span // 2, 0)
    high = np.minimum(low + span, len(sizes))
    smooth: Float64Array = (sums[high] - sums[low]) / (high - low)
    return smooth


def spread_by_activity(times_s: Float64Array, activity: Float64Array, first: int, last: int, count: int) -> Int64Array:
    """Return `count` strictly increasing frame indices from `first` to `last`, both kept, denser where `activity` is high.

    Frames stand at equal steps of a sum, of which one half grows with time and the other with activity x time.
    Needs 2 <= count <= last - first + 1.
    """
    times = times_s[first : last + 1]
    gaps = np.maximum(np.diff(times), 1e-9)
    change = gaps * activity[first + 1 : last + 1]
    weight = _TIME_SHARE * gaps / gaps.sum()
    if change.sum() > 0:
        weight = weight + (1 - _TIME_SHARE) * change / change.sum()
    position = np.concatenate([[0.0], np.cumsum(weight)])
    picked = np.rint(np.interp(np.linspace(0, position[-1], count), position, np.arange(len(position)))).astype(np.int64)
    rank = np.arange(count)
    picked[0], picked[-1] = 0, last - first
    # Push apart what rounding put together: up from the left, then down from the right end.
    picked = np.maximum.accumulate(picked - rank) + rank
    picked = np.minimum.accumulate((np.minimum(picked, last - first) - rank)[::-1])[::-1] + rank
    indices: Int64Array = first + np.minimum(picked, last - first - (count - 1 - rank))
    return indices
