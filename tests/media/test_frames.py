"""Stored frames: raw is lossless, JPEG is close, damage is named."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from omniprep.errors import DatasetError
from omniprep.media.frames import decode_frame, decode_frames, encode_frame


def smooth(height, width, seed=0):
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


@given(height=st.integers(1, 60), width=st.integers(1, 60), seed=st.integers(0, 99))
def test_raw_round_trip_is_exact(height, width, seed):
    frame = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    np.testing.assert_array_equal(decode_frame(encode_frame(frame, "raw", 90), "raw", height=height, width=width), frame)


def test_jpeg_round_trip_is_close_and_better_with_quality():
    frame = smooth(84, 112)
    errors = []
    for quality in (50, 80, 95):
        data = encode_frame(frame, "jpeg", quality)
        assert data[:3] == b"\xff\xd8\xff"
        back = decode_frame(data, "jpeg", height=84, width=112)
        errors.append(np.abs(back.astype(int) - frame).mean())
    assert errors[2] < errors[0]
    assert errors[2] < 1.0


def test_jpeg_keeps_colour_at_full_resolution():
    stripes = np.zeros((28, 28, 3), np.uint8)
    stripes[:, ::2, 0] = 255
    stripes[:, 1::2, 2] = 255
    back = decode_frame(encode_frame(stripes, "jpeg", 95), "jpeg", height=28, width=28)
    assert np.abs(back.astype(int) - stripes).mean() < 6  # shared by two columns the colours would mix to about 64


def test_jpeg_of_a_view_equals_that_of_its_copy():
    frame = smooth(84, 112)[:, ::-1]
    assert encode_frame(frame, "jpeg", 90) == encode_frame(frame.copy(), "jpeg", 90)


def test_frames_are_stacked_in_order():
    frames = [np.full((28, 28, 3), level, np.uint8) for level in (0, 100, 200)]
    stack = decode_frames([encode_frame(frame, "raw", 90) for frame in frames], "raw", height=28, width=28)
    assert stack.shape == (3, 28, 28, 3)
    assert stack[:, 0, 0, 0].tolist() == [0, 100, 200]


@pytest.mark.parametrize(
    ("data", "frame_format", "message"),
    [
        (b"123", "raw", "expected 28x28x3 = 2352 bytes, got 3"),
        (b"not a jpeg", "jpeg", "cannot be decoded"),
        (encode_frame(smooth(28, 56), "jpeg", 90), "jpeg", r"expected \(28, 28, 3\), got \(28, 56, 3\)"),
    ],
)
def test_damaged_frames_are_named(data, frame_format, message):
    with pytest.raises(DatasetError, match=message):
        decode_frame(data, frame_format, height=28, width=28)
