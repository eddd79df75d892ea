"""Sizes and patches equal the reference's."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from omniprep.errors import Reason, RejectSample
from omniprep.features.patches import fit_pixels, patchify, smart_resize
from omniprep.profile import QWEN2_5_OMNI, PixelLimits

GOLDEN = Path(__file__).parents[1] / "golden"
SIDES = st.integers(1, 6000)


def test_sizes_equal_the_golden_table():
    rows = json.loads((GOLDEN / "smart_resize.json").read_text())
    assert len(rows) > 200
    for row in rows:
        expected = tuple(max(28, side) for side in row["utils"])  # the reference may return a side of zero
        limits = PixelLimits(min_pixels=row["min"], max_pixels=row["max"])
        assert smart_resize(row["h"], row["w"], limits=limits) == expected, row


@pytest.mark.reference
@given(height=SIDES, width=SIDES, low=st.integers(1, 200_000), span=st.floats(1.0, 50.0))
def test_sizes_equal_qwen_omni_utils(height, width, low, span):
    from qwen_omni_utils.v2_5 import vision_process

    try:
        reference = vision_process.smart_resize(height, width, factor=28, min_pixels=low, max_pixels=low * span)
    except ValueError:
        with pytest.raises(RejectSample) as error:
            fit_pixels(height, width, min_pixels=low, max_pixels=low * span)
        assert error.value.reason is Reason.IMAGE_ASPECT
        return
    assert fit_pixels(height, width, min_pixels=low, max_pixels=low * span) == tuple(max(28, side) for side in reference)


@given(height=SIDES, width=SIDES)
def test_sides_are_positive_multiples_of_the_factor_or_the_aspect_is_refused(height, width):
    try:
        size = smart_resize(height, width, limits=QWEN2_5_OMNI.video_limits)
    except RejectSample as error:
        assert error.reason is Reason.IMAGE_ASPECT
        assert max(height, width) > 200 * min(height, width)
    else:
        assert min(size) >= 28
        assert size[0] % 28 == size[1] % 28 == 0


def test_crossed_limits_are_refused_with_both_values():
    with pytest.raises(RejectSample, match=r"max_pixels=100 is below min_pixels=200"):
        fit_pixels(30, 30, min_pixels=200, max_pixels=100)


@pytest.mark.reference
@pytest.mark.parametrize("num_frames", [1, 2, 3, 6])
def test_rows_equal_the_reference_processor(num_frames):
    import torch
    from transformers import Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    frames = np.random.default_rng(num_frames).integers(0, 256, (num_frames, 84, 140, 3), dtype=np.uint8)
    planes = torch.from_numpy(frames.transpose(0, 3, 1, 2).copy())
    if num_frames == 1:
        output = Qwen2VLImageProcessor(do_resize=False)(images=[planes[0]], return_tensors="np")
        expected, grid = output["pixel_values"], output["image_grid_thw"]
    else:
        output = Qwen2VLVideoProcessor(do_resize=False)(videos=[planes], do_sample_frames=False, return_tensors="np")
        expected, grid = output["pixel_values_videos"], output["video_grid_thw"]
    rows = patchify(frames)
    assert rows.dtype == np.float32
    assert tuple(grid[0].tolist()) == QWEN2_5_OMNI.grid_thw(num_frames, 84, 140)
    np.testing.assert_allclose(rows, expected, rtol=0, atol=1e-6)


@given(pairs=st.integers(1, 3), blocks=st.tuples(st.integers(1, 3), st.integers(1, 3)), seed=st.integers(0, 99))
def test_every_pixel_has_one_place(pairs, blocks, seed):
    """Un-normalised and put back by the documented order, the rows are the frames."""
    shape = (2 * pairs, 28 * blocks[0], 28 * blocks[1], 3)
    frames = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    mean = np.repeat(np.array(QWEN2_5_OMNI.image_mean), 392) * 255
    std = np.repeat(np.array(QWEN2_5_OMNI.image_std), 392) * 255
    pixels = np.rint(patchify(frames) * std + mean).astype(np.uint8)
    grid = pixels.reshape(pairs, blocks[0], blocks[1], 2, 2, 3, 2, 14, 14)
    back = grid.transpose(0, 6, 1, 3, 7, 2, 4, 8, 5).reshape(shape)
    np.testing.assert_array_equal(back, frames)


def test_an_odd_last_frame_is_repeated():
    frames = np.random.default_rng(0).integers(0, 256, (3, 28, 28, 3), dtype=np.uint8)
    np.testing.assert_array_equal(patchify(frames), patchify(np.concatenate([frames, frames[-1:]])))


def test_a_side_that_is_no_multiple_is_a_bug():
    with pytest.raises(ValueError, match="multiples of 28"):
        patchify(np.zeros((1, 28, 30, 3), np.uint8))
