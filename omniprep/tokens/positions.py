"""TMRoPE ids of one block: temporal, height and width rows for text, an image, a video, a video with its sound.

Every function returns ids that start at `base`; the block ends at the largest id that `next_id` must pass. Sources: the
Qwen2.5-Omni report, section 2.2 (TMRoPE; one temporal id is 40 ms), and `get_rope_index` of transformers 5.23.
"""

from collections.abc import Sequence

import numpy as np

from omniprep.profile import ModelProfile
from omniprep.types import Float64Array, Int32Array, Int64Array


def vision_ids(grid_ids: Int64Array, grid_thw: tuple[int, int, int], *, base: int, profile: ModelProfile) -> Int32Array:
    """Return (3, tokens) ids of an image or video in raster order of its merged patches.

    `grid_ids` (t,) are the temporal ids of the grid steps, from the block's start.
    """
    steps, height, width = grid_thw[0], grid_thw[1] // profile.merge_size, grid_thw[2] // profile.merge_size
    ids = np.empty((3, steps, height, width), np.int32)
    ids[0] = (grid_ids + base)[:, None, None]
    ids[1] = np.arange(base, base + height, dtype=np.int32)[:, None]
    ids[2] = np.arange(base, base + width, dtype=np.int32)
    return ids.reshape(3, -1)


def audio_ids(num_tokens: int, *, first: int) -> Int32Array:
    """Return (3, tokens) ids of sound: one id per 40 ms token in all rows."""
    ids = np.empty((3, num_tokens), np.int32)
    ids[:] = np.arange(first, first + num_tokens, dtype=np.int32)
    return ids


def reference_grid_ids(num_steps: int, second_per_grid: float, profile: ModelProfile) -> Int64Array:
    """Return (t,) temporal ids as the reference rounds them: float32, in this order, cut off."""
    seconds = np.arange(num_steps, dtype=np.float32) * np.float32(second_per_grid)
    return (seconds * np.float32(profile.position_id_per_second)).astype(np.int64)


def reference_grid_ticks(num_steps: int, second_per_grid: float, profile: ModelProfile) -> Float64Array:
    """Return (t,) ticks by which the reference's processor cuts chunks: float64, not rounded.

    They can fall into other chunks than `reference_grid_ids`; the reference computes both, in different code.
    """
    ticks: Float64Array = np.arange(num_steps, dtype=np.float64) * second_per_grid * profile.position_id_per_second
    return ticks


def aligned_ids(times_s: Sequence[float] | Float64Array, *, zero_s: float, profile: ModelProfile) -> Int64Array:
    """Return the temporal ids of true times, counted from `zero_s`: within half an id of 25 per second."""
    seconds = np.asarray(times_s, dtype=np.float64) - zero_s
    ids: Int64Array = np.rint(seconds * profile.position_id_per_second).astype(np.int64)
    return ids
