"""Frame sizes and the patches that the vision tower reads: the only size arithmetic in OmniPrep.

Sizes follow `qwen_omni_utils` (`vision_process.py: smart_resize`), which the reference runs before the processor; the
processor's own resize is then a no-op. Rows and columns of the patches follow `Qwen2VLImageProcessor`.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from omniprep.errors import Reason, RejectSample
from omniprep.profile import QWEN2_5_OMNI, ModelProfile, PixelLimits
from omniprep.types import Float32Array, Uint8Array


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


def patchify(frames: Uint8Array, profile: ModelProfile = QWEN2_5_OMNI, *, out: Float32Array | None = None) -> Float32Array:
    """Return the normalised patch rows of an image or a video.

    `frames` is (n, H, W, 3) uint8 with H and W multiples of 28. The result is (rows, 1176) float32, one row per 14x14
    patch of two frames: rows in the order (frame pair, block row, block column, row and column within the 2x2 block),
    columns (channel, frame of the pair, y, x). One frame is an image, which the model takes as the same frame twice;
    with an odd n the last frame is repeated. Values are (x - 255 mean) / (255 std), as the reference fuses them.
    `out` takes the rows instead of a new array; it must be C-ordered.
    """
    num_frames, height, width, _ = frames.shape
    if num_frames < 1:
        raise ValueError(f"expected (n >= 1, H, W, 3), got {frames.shape = }")
    num_steps, grid_h, grid_w = profile.grid_thw(num_frames, height, width)
    per_step = grid_h * grid_w
    expected = (num_steps * per_step, num_patch_columns(profile))
    if out is None:
        out = np.empty(expected, np.float32)
    elif out.shape != expected:
        raise ValueError(f"expected room for {expected}, got {out.shape = }")
    for step in range(num_steps):
        first = step * profile.temporal_patch_size
        pair = [frames[min(first + number, num_frames - 1)] for number in range(profile.temporal_patch_size)]
        patchify_step(pair, out[step * per_step : (step + 1) * per_step], profile)
    return out


def patchify_step(frames: Sequence[Uint8Array], out: Float32Array, profile: ModelProfile = QWEN2_5_OMNI) -> None:
    """Write the patch rows of one temporal step, as `patchify` orders them, to `out` (H / 14 * W / 14, 1176), C-ordered.

    `frames` are the two (H, W, 3) frames of the step; for an image twice the same.
    """
    height, width, _ = frames[0].shape
    patch, merge = profile.patch_size, profile.merge_size
    if height % profile.resize_factor or width % profile.resize_factor:
        raise ValueError(f"expected sides that are multiples of {profile.resize_factor}, got {frames[0].shape = }")
    blocks = (height // patch // merge, width // patch // merge)
    expected = (blocks[0] * blocks[1] * merge**2, num_patch_columns(profile))
    if out.shape != expected or not out.flags.c_contiguous:
        raise ValueError(f"expected C-ordered rows {expected}, got {out.shape = }")
    mean, std = _column_constants(profile)
    # A strip is one row of blocks: bytes become floats as they move, and a strip is still in the cache when it is normalised.
    strips = out.reshape(blocks[0], blocks[1], merge, merge, 3, len(frames), patch, patch)
    sources = [
        frame.reshape(blocks[0], merge, patch, blocks[1], merge, patch, 3).transpose(0, 3, 1, 4, 6, 2, 5) for frame in frames
    ]
    for number, strip in enumerate(strips):
        for place, source in enumerate(sources):
            strip[..., place, :, :] = source[number]
        rows = strip.reshape(-1, expected[1])
        rows -= mean
        rows /= std


def num_patch_columns(profile: ModelProfile = QWEN2_5_OMNI) -> int:
    """Return the values in one patch row.

    >>> num_patch_columns()
    1176
    """
    return 3 * profile.temporal_patch_size * profile.patch_size**2


@lru_cache(maxsize=4)
def _column_constants(profile: ModelProfile) -> tuple[Float32Array, Float32Array]:
    """Return what is taken from each column of a patch row and what it is divided by."""
    per_channel = num_patch_columns(profile) // 3
    mean = np.repeat(np.asarray(profile.image_mean, np.float32) * np.float32(255), per_channel)
    std = np.repeat(np.asarray(profile.image_std, np.float32) * np.float32(255), per_channel)
    return mean, std
