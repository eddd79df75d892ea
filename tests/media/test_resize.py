"""Resizing: `exact` is the reference's pixels, `fast` stays near them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from omniprep.errors import ConfigError
from omniprep.media import resize
from omniprep.media.resize import resize_frame

SIDE = st.integers(3, 400)
TARGET = st.integers(1, 14).map(lambda n: 28 * n)


def noise(height, width, seed):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def smooth(height, width, seed):
    return np.asarray(Image.fromarray(noise(9, 9, seed)).resize((width, height), Image.Resampling.BICUBIC))


@pytest.mark.reference
@settings(max_examples=60)
@given(source=st.tuples(SIDE, SIDE), target=st.tuples(TARGET, TARGET), seed=st.integers(0, 99), same=st.sampled_from("-hw"))
def test_exact_video_pixels_equal_torchvision(source, target, seed, same):
    import torch
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.functional import resize as reference

    height = source[0] if same == "h" else target[0]
    width = source[1] if same == "w" else target[1]
    frame = noise(*source, seed) if seed % 2 else smooth(*source, seed)
    planes = torch.from_numpy(frame.copy()).permute(2, 0, 1)[None]
    expected = reference(planes, [height, width], InterpolationMode.BICUBIC, antialias=True)[0].permute(1, 2, 0).numpy()
    ours = resize_frame(frame, height=height, width=width, mode="exact", kind="video")
    assert ours.flags.c_contiguous
    np.testing.assert_array_equal(ours, expected)


@pytest.mark.reference
def test_fast_video_pixels_differ_from_exact_by_one_level_in_less_than_a_quarter():
    frame = smooth(360, 640, 1)
    exact = resize_frame(frame, height=364, width=644, mode="exact", kind="video").astype(int)
    fast = resize_frame(frame, height=364, width=644, mode="fast", kind="video").astype(int)
    difference = np.abs(exact - fast)
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.25


def test_image_pixels_are_pillows_bicubic():
    frame = noise(50, 70, 3)
    expected = np.asarray(Image.fromarray(frame).resize((84, 56), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(resize_frame(frame, height=56, width=84, mode="exact", kind="image"), expected)


def test_a_frame_of_the_right_size_is_left_alone():
    frame = noise(28, 56, 0)
    for mode in ("exact", "fast"):
        np.testing.assert_array_equal(resize_frame(frame, height=28, width=56, mode=mode, kind="video"), frame)


def test_exact_video_without_torch_names_the_extra(monkeypatch):
    monkeypatch.setattr(resize, "_has_torch", lambda: False)
    resize._torch.cache_clear()
    with pytest.raises(ConfigError, match=r"omniprep\[torch\]"):
        resize_frame(noise(20, 20, 0), height=28, width=28, mode="exact", kind="video")
