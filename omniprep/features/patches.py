"""Frame sizes and the patches that the vision tower reads: the only size arithmetic in OmniPrep.

Sizes follow `qwen_omni_utils` (`vision_process.py: smart_resize`), which the reference runs before the processor; the
processor's own resize is then a no-op. Rows and columns of the patches follow `Qwen2VLImageProcessor`.
"""

import math

import numpy as np

from omniprep.errors import Reason, RejectSample
from omniprep.profile import QWEN2_5_OMNI, ModelProfile, PixelLimits
from omniprep.types import Float32Array, Uint8Array

_ROWS_PER_BLOCK = 256
"""Rows converted at a time: 256 x 1176 float32 are 1.2 MB, which stay in the second-level cache."""


def smart_resize(height: int, width: int, *, limits: PixelLimits, profile: ModelProfile = QWEN2_5_OMNI) -> tuple[int, int]:
    """Return the (height, width) in pixels that a picture is resized to: multiples of 28 with an area within `limits`.

    Raises `RejectSample` (`IMAGE_ASPECT`) if one side is over 200 times the other, (`MEDIA_RANGE`) if the limits cross.

    >>> smart_resize(720, 1280, limits=QWEN2_5_OMNI.video_limits)
    (560, 1008)
    >>> smart_resize(1, 1, limits=QWEN2_5_OMNI.image_limits)
    (56, 56)
    """
    return fit_pixels(height, width, min_pixels=limits.min_pixels, max_pixels=limits.max_pixels, profile=profile)


def fit_pixels(
    height: int, width: int, *, min_pixels: float, max_pixels: float, profile: ModelProfile = QWEN2_5_OMNI
) -> tuple[int, int]:
    """Return the size as `smart_resize` does, under limits that may be fractions (a share of a video's pixel budget).

    Python's `round` is meant: halves go to the even multiple, as in the reference. Where the reference would return a
    side of zero (a long picture under a small maximum), this returns one multiple.
    """
    if height < 1 or width < 1:
        raise RejectSample(
            Reason.MEDIA_EMPTY, f"expected a picture of at least 1x1 pixels, got {width}x{height} (width x height)"
        )
    if max_pixels < min_pixels:
        raise RejectSample(
            Reason.MEDIA_RANGE, f"max_pixels={max_pixels:.0f} is below min_pixels={min_pixels:.0f}; lower min_pixels as well"
        )
    if max(height, width) > profile.max_aspect_ratio * min(height, width):
        raise RejectSample(
            Reason.IMAGE_ASPECT,
            f"expected one side to be at most {profile.max_aspect_ratio} times the other, "
            f"got {width}x{height} (width x height); crop or split the picture",
        )
    factor = profile.resize_factor
    new_height = max(factor, round(height / factor) * factor)
    new_width = max(factor, round(width / factor) * factor)
    if new_height * new_width > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif new_height * new_width < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * grow / factor) * factor
        new_width = math.ceil(width * grow / factor) * factor
    return new_height, new_width


def patchify(frames: Uint8Array, profile: ModelProfile = QWEN2_5_OMNI) -> Float32Array:
    """Return the normalised patch rows of an image or a video.

    `frames` is (n, H, W, 3) uint8 with H and W multiples of 28. The result is (rows, 1176) float32, one row per 14x14
    patch of two frames: rows in the order (frame pair, block row, block column, row and column within the 2x2 block),
    columns (channel, frame of the pair, y, x). One frame is an image, which the model takes as the same frame twice;
    with an odd n the last frame is repeated. Values are (x - 255 mean) / (255 std), as the reference fuses them.
    """
    num_frames, height, width, _ = frames.shape
    patch, merge, pair = profile.patch_size, profile.merge_size, profile.temporal_patch_size
    if num_frames < 1 or height % profile.resize_factor or width % profile.resize_factor:
        raise ValueError(f"expected (n >= 1, H, W, 3) with H, W multiples of {profile.resize_factor}, got {frames.shape = }")
    grid_t, grid_h, grid_w = profile.grid_thw(num_frames, height, width)
    if num_frames % pair:
        frames = np.concatenate([frames, np.repeat(frames[-1:], pair - num_frames % pair, axis=0)])
    # Bytes are moved before they become floats: a quarter of the traffic. Planes first, so that runs of one patch row stay whole.
    planes = np.ascontiguousarray(frames.transpose(0, 3, 1, 2))
    blocks = planes.reshape(grid_t, pair, 3, grid_h // merge, merge, patch, grid_w // merge, merge, patch)
    pixels = blocks.transpose(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(grid_t * grid_h * grid_w, -1)
    columns_per_channel = pair * patch * patch
    mean = np.repeat(np.asarray(profile.image_mean, np.float32) * np.float32(255), columns_per_channel)
    std = np.repeat(np.asarray(profile.image_std, np.float32) * np.float32(255), columns_per_channel)
    rows = np.empty(pixels.shape, np.float32)
    for start in range(0, len(rows), _ROWS_PER_BLOCK):
        block = rows[start : start + _ROWS_PER_BLOCK]
        np.subtract(pixels[start : start + _ROWS_PER_BLOCK], mean, out=block, dtype=np.float32)
        np.divide(block, std, out=block)
    return rows
