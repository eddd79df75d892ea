"""Which frames are chosen: equal to the reference, within the budget, denser where the picture changes."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from omniprep.errors import Reason, RejectSample
from omniprep.media.sampling import (
    FrameRequest,
    budget_num_frames,
    clip_range,
    clip_range_by_time,
    packet_activity,
    reference_num_frames,
    spread_by_activity,
    spread_evenly,
    video_size,
    video_tokens,
)
from omniprep.profile import QWEN2_5_OMNI

GOLDEN = Path(__file__).parents[1] / "golden"
LIMITS = QWEN2_5_OMNI.video_limits


def request(**keys):
    defaults = {"fps": 2.0, "min_frames": 4, "min_pixels": LIMITS.min_pixels, "total_pixels": QWEN2_5_OMNI.video_total_pixels}
    return FrameRequest(**(defaults | keys))


def test_counts_and_indices_equal_the_golden_table():
    rows = json.loads((GOLDEN / "smart_nframes.json").read_text())
    assert len(rows) == 200
    for row in rows:
        count = reference_num_frames(row["total"], row["fps"], request(**row["ele"]))
        assert count == row["nframes"], row
        indices = spread_evenly(0, row["total"] - 1, count).tolist()
        shown = indices if len(row["idx"]) == count else indices[:8] + indices[-8:]
        assert shown == row["idx"], row
        assert count / row["total"] * row["fps"] == pytest.approx(row["sample_fps"], rel=1e-12)


@pytest.mark.reference
@given(
    total=st.integers(2, 200_000),
    fps=st.sampled_from([12.5, 15.0, 23.976, 24.0, 25.0, 29.97, 30.0, 50.0, 60.0]),
    ele=st.one_of(
        st.fixed_dictionaries({"nframes": st.integers(1, 800)}),
        st.fixed_dictionaries(
            {},
            optional={"fps": st.floats(0.05, 40), "min_frames": st.integers(1, 40), "max_frames": st.integers(1, 900)},
        ),
    ),
)
def test_counts_equal_qwen_omni_utils(total, fps, ele):
    from qwen_omni_utils.v2_5 import vision_process

    try:
        expected = vision_process.smart_nframes(ele, total_frames=total, video_fps=fps)
    except ValueError:
        with pytest.raises(RejectSample) as error:
            reference_num_frames(total, fps, request(**ele))
        assert error.value.reason is Reason.MEDIA_RANGE
        return
    assert reference_num_frames(total, fps, request(**ele)) == expected


@pytest.mark.reference
@given(first=st.integers(0, 100_000), length=st.integers(2, 200_000), count=st.integers(2, 768))
def test_indices_equal_torch_linspace(first, length, count):
    import torch

    assume(count <= length)
    last = first + length - 1
    expected = torch.linspace(first, last, count).round().long().tolist()
    assert spread_evenly(first, last, count).tolist() == expected


@pytest.mark.reference
@given(
    total=st.integers(1, 5000),
    fps=st.sampled_from([10.0, 23.976023976023978, 25.0, 29.97002997002997, 60.0]),
    start=st.none() | st.floats(0, 60),
    end=st.none() | st.floats(0.01, 90),
)
def test_cuts_equal_qwen_omni_utils(total, fps, start, end):
    from qwen_omni_utils.v2_5 import vision_process

    ele = {key: value for key, value in (("video_start", start), ("video_end", end)) if value is not None}
    try:
        first, last, _ = vision_process.calculate_video_frame_range(ele, total, fps)
    except ValueError:
        with pytest.raises(RejectSample, match="fewer than two frames") as error:
            clip_range(total, fps, start, end)
        assert error.value.reason is Reason.MEDIA_RANGE
        return
    assert clip_range(total, fps, start, end) == (first, last)


@pytest.mark.reference
@given(
    size=st.tuples(st.integers(28, 4000), st.integers(28, 4000)),
    count=st.integers(1, 384).map(lambda half: 2 * half),
    keys=st.fixed_dictionaries(
        {},
        optional={
            "min_pixels": st.integers(3136, 200_000),
            "max_pixels": st.integers(210_000, 2_000_000),
            "total_pixels": st.integers(500_000, 100_000_000),
        },
    ),
)
def test_frame_sizes_equal_qwen_omni_utils(size, count, keys):
    """The arithmetic of `fetch_video` after reading, with its own smart_resize."""
    from qwen_omni_utils.v2_5 import vision_process as reference

    min_pixels = keys.get("min_pixels", 128 * 784)
    total_pixels = keys.get("total_pixels", reference.MODEL_SEQ_LEN * 784 * 0.9)
    max_pixels = max(min(768 * 784, total_pixels / count * 2), int(min_pixels * 1.05))
    max_pixels = min(keys.get("max_pixels", max_pixels), max_pixels)
    expected = reference.smart_resize(*size, factor=28, min_pixels=min_pixels, max_pixels=max_pixels)
    assert video_size(*size, count, request(**keys)) == tuple(max(28, side) for side in expected)


def test_one_frame_is_no_video():
    with pytest.raises(RejectSample, match="image part") as error:
        reference_num_frames(1, 25.0, request())
    assert error.value.reason is Reason.VIDEO_TOO_SHORT


def test_a_count_above_the_frames_of_the_clip_names_both():
    with pytest.raises(RejectSample, match=r"nframes=40 asks for 40 frames, expected 2 to 25"):
        reference_num_frames(25, 25.0, request(nframes=40))


@given(count=st.integers(1, 200), start=st.floats(0, 30), length=st.floats(0.2, 30), seed=st.integers(0, 50))
def test_cuts_by_time_hold_the_frames_within(count, start, length, seed):
    times = np.cumsum(np.random.default_rng(seed).uniform(0.01, 0.5, count))
    inside = [i for i, time in enumerate(times) if start <= time <= start + length]
    if len(inside) < 2:
        with pytest.raises(RejectSample):
            clip_range_by_time(times, start, start + length)
    else:
        assert clip_range_by_time(times, start, start + length) == (inside[0], inside[-1])


@given(
    size=st.tuples(st.integers(60, 2000), st.integers(60, 2000)),
    total=st.integers(4, 2000),
    max_tokens=st.integers(300, 60_000),
)
def test_budget_is_the_most_that_fits(size, total, max_tokens):
    def size_of(count):
        return video_size(*size, count, request())

    def fits(count):
        return video_tokens(count, size_of(count)) <= max_tokens

    most = min(total, 768) // 2 * 2
    count = budget_num_frames(most, 4, max_tokens, size_of)
    assert count % 2 == 0
    assert 4 <= count <= max(most, 4)
    if count > 4:
        assert fits(count)
    assert not any(fits(more) for more in range(count + 2, most + 1, 2))


@given(
    num_frames=st.integers(2, 300),
    start=st.integers(0, 20),
    share=st.floats(0, 1),
    seed=st.integers(0, 1000),
    power=st.sampled_from([0, 1, 8, 30]),
)
def test_adaptive_indices_rise_and_keep_both_ends(num_frames, start, share, seed, power):
    rng = np.random.default_rng(seed)
    count = 2 + int(share * (num_frames - 2))
    times = np.cumsum(rng.uniform(0.001, 1, start + num_frames + 3))
    activity = rng.random(start + num_frames + 3) ** power
    last = start + num_frames - 1
    indices = spread_by_activity(times, activity, start, last, count)
    assert indices.shape == (count,)
    assert (indices[0], indices[-1]) == (start, last)
    assert (np.diff(indices) > 0).all()
    np.testing.assert_array_equal(indices, spread_by_activity(times, activity, start, last, count))


def test_adaptive_puts_frames_where_packets_are_large():
    sizes = np.full(250, 200)
    sizes[100:150] = 8000  # two seconds of motion in ten seconds of stillness
    keyframes = np.arange(250) % 50 == 0
    sizes[keyframes] = 30_000  # key frames are large whatever happens
    times = np.arange(250) / 25
    indices = spread_by_activity(times, packet_activity(sizes, keyframes, 25.0), 0, 249, 20)
    moving = ((indices >= 100) & (indices < 150)).sum()
    assert moving >= 9  # evenly spread it would be 4
    still = spread_by_activity(times, packet_activity(np.full(250, 200), keyframes, 25.0), 0, 249, 20)
    assert np.abs(still - spread_evenly(0, 249, 20)).max() <= 1


def test_activity_of_a_file_of_key_frames_only_is_level():
    assert packet_activity(np.array([5, 900, 3]), np.ones(3, bool), 25.0).tolist() == [1, 1, 1]
