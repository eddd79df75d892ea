"""The layout against the installed transformers (`rope_mode: reference`) and against true time (`aligned`)."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from omniprep.errors import Reason, RejectSample
from omniprep.profile import QWEN2_5_OMNI
from omniprep.tokens.interleave import interleave, reference_chunk_edges
from omniprep.tokens.layout import AudioRun, ImageRun, Run, TrackRun, VideoRun, lay_out
from omniprep.types import Layout

GOLDEN = Path(__file__).parents[1] / "golden"
SPECIAL = QWEN2_5_OMNI.special
grids = st.tuples(st.integers(1, 12), st.integers(1, 6).map(lambda n: 2 * n), st.integers(1, 6).map(lambda n: 2 * n))
text_runs = st.tuples(st.lists(st.integers(0, 1000), min_size=1, max_size=5), st.booleans())


def regular_video(grid: tuple[int, int, int], fps: float, track: TrackRun | None = None) -> VideoRun:
    times = tuple(step * 2 / fps for step in range(grid[0]))
    return VideoRun(grid_thw=grid, grid_times_s=times, second_per_grid=2 / fps, item=0, track=track)


def track(num_tokens: int, start_s: float = 0.0) -> TrackRun:
    return TrackRun(num_tokens=num_tokens, start_s=start_s, item=0)


def num_mel_frames(num_tokens: int) -> int:
    """A number of mel frames that gives `num_tokens`."""
    return 4 * num_tokens


# --- reference -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rope() -> Any:
    pytest.importorskip("torch")
    from omniprep.reference import _build_rope

    return _build_rope(QWEN2_5_OMNI)


def reference_positions(rope: Any, layout: Layout, runs: list[Run]) -> np.ndarray:
    import torch

    images = [run.grid_thw for run in runs if isinstance(run, ImageRun)]
    videos = [run for run in runs if isinstance(run, VideoRun)]
    sounds = [run if isinstance(run, AudioRun) else run.track for run in runs if isinstance(run, (AudioRun, VideoRun))]
    lengths = [num_mel_frames(sound.num_tokens) for sound in sounds if sound is not None]
    positions, _ = rope.get_rope_index(
        torch.from_numpy(layout.input_ids.astype(np.int64))[None],
        torch.tensor(images) if images else None,
        torch.tensor([video.grid_thw for video in videos]) if videos else None,
        torch.ones(1, layout.num_tokens, dtype=torch.long),
        any(video.track is not None for video in videos),
        torch.tensor(lengths) if lengths else None,
        torch.tensor([video.second_per_grid for video in videos]) if videos else None,
    )
    return positions[:, 0].numpy()


@st.composite
def mixed_runs(draw: st.DrawFn) -> list[Run]:
    """Text between media, as every rendered record has it; silent videos only where the reference can take them."""
    fps = st.floats(0.2, 30.0)
    with_sound = draw(st.booleans())
    media: list[Run] = []
    for _ in range(draw(st.integers(0, 5))):
        kind = draw(st.sampled_from(["audio", "image", "video"]))
        if kind == "audio":
            media.append(AudioRun(num_tokens=draw(st.integers(1, 130)), item=0))
        elif kind == "image":
            media.append(ImageRun(grid_thw=(1, *draw(grids)[1:]), item=0))
        else:
            sound = track(draw(st.integers(1, 400))) if with_sound else None
            media.append(regular_video(draw(grids), draw(fps), sound))
    if with_sound and draw(st.booleans()):
        media.append(regular_video(draw(grids), draw(fps)))
        media += [ImageRun(grid_thw=(1, 4, 6), item=0)] * draw(st.integers(0, 1))
    runs: list[Run] = [draw(text_runs)]
    for run in media:
        runs += [run, draw(text_runs)]
    return runs


@pytest.mark.reference
@settings(max_examples=600)
@given(runs=mixed_runs())
def test_reference_mode_is_bit_equal_to_get_rope_index(rope: Any, runs: list[Run]) -> None:
    layout = lay_out(runs, rope_mode="reference")
    np.testing.assert_array_equal(layout.position_ids, reference_positions(rope, layout, runs))


@pytest.mark.reference
@pytest.mark.parametrize("fps", [0.3, 0.5, 1.04, 1.3, 1.9, 2.08, 2.6, 3.7, 12.5, 15, 25, 29.97])
def test_reference_mode_at_rates_where_rounding_matters(rope: Any, fps: float) -> None:
    runs: list[Run] = [([1, 2], False), regular_video((60, 4, 4), fps, track(700)), ([3], False)]
    layout = lay_out(runs, rope_mode="reference")
    np.testing.assert_array_equal(layout.position_ids, reference_positions(rope, layout, runs))


@pytest.mark.reference
@settings(max_examples=200)
@given(grid=grids, fps=st.floats(0.2, 30), num_audio=st.integers(1, 400))
def test_reference_mode_orders_placeholders_as_the_processor_does(grid: tuple[int, int, int], fps: float, num_audio: int) -> None:
    pytest.importorskip("torch")
    from types import SimpleNamespace

    from transformers import Qwen2_5OmniProcessor as Processor

    processor = SimpleNamespace(
        video_processor=SimpleNamespace(merge_size=2),
        video_token="V",
        audio_token="A",
        audio_bos_token="",
        audio_eos_token="",
        get_chunked_index=lambda *arguments: Processor.get_chunked_index(None, *arguments),
    )
    expected = Processor.replace_video_with_audio_token(
        processor,
        {"video_grid_thw": [grid], "video_second_per_grid": [2 / fps]},
        0,
        {"num_audio_tokens": [num_audio]},
        0,
        position_id_per_seconds=25,
        seconds_per_chunk=2.0,
    )
    layout = lay_out([regular_video(grid, fps, track(num_audio))], rope_mode="reference")
    assert "".join("V" if token == SPECIAL.video else "A" for token in layout.input_ids[2:-2]) == expected


def test_worked_examples() -> None:
    cases = json.loads((GOLDEN / "rope_worked.json").read_text())
    runs: dict[str, list[Run]] = {
        "text3_audio12frames_text1": [([9, 9, 9], False), AudioRun(num_tokens=3, item=0), ([9], False)],
        "text2_image_4x6_text2": [([9, 9], False), ImageRun(grid_thw=(1, 4, 6), item=0), ([9, 9], False)],
        "video_2x4x4_fps2": [([9], False), regular_video((2, 4, 4), 2.0), ([9], False)],
        "av_video_3x4x4_fps2_audio_2p4s": [([9], False), regular_video((3, 4, 4), 2.0, track(60)), ([9], False)],
    }
    for name, case in cases.items():
        if name in runs:
            layout = lay_out(runs.pop(name), rope_mode="reference")
            assert layout.position_ids.tolist() == [case["t"], case["h"], case["w"]], name
    assert not runs


def test_a_silent_video_before_one_with_sound_is_refused_in_reference_mode() -> None:
    runs: list[Run] = [regular_video((2, 4, 4), 2.0), ([1], False), regular_video((2, 4, 4), 2.0, track(20))]
    with pytest.raises(RejectSample, match="silent video comes before") as caught:
        lay_out(runs, rope_mode="reference")
    assert caught.value.reason is Reason.REFERENCE_UNDEFINED
    assert lay_out(runs, rope_mode="aligned").num_tokens > 0


# --- aligned ---------------------------------------------------------------------------------------------------------


@st.composite
def timed_video(draw: st.DrawFn) -> VideoRun:
    """Variable frame rate, any start, sound shorter or longer, earlier or later than the picture."""
    grid = draw(grids)
    gaps = draw(st.lists(st.floats(0.01, 5.0), min_size=grid[0] - 1, max_size=grid[0] - 1))
    start = draw(st.floats(0, 20))
    times = tuple(itertools.accumulate(gaps, initial=start))
    sound = draw(st.none() | st.builds(track, st.integers(1, 400), st.floats(0, 25)))
    return VideoRun(grid_thw=grid, grid_times_s=times, second_per_grid=1.0, item=0, track=sound)


@settings(max_examples=500)
@given(video=timed_video())
def test_ids_follow_true_times_within_half_an_id(video: VideoRun) -> None:
    layout = lay_out([([1], False), video, ([2], False)], rope_mode="aligned")
    base = 3 if video.track else 2
    base -= 1 if video.track else 0  # the two opening tokens share an id
    zero = min(video.grid_times_s[0], video.track.start_s if video.track else np.inf)
    is_video = layout.input_ids == SPECIAL.video
    per_step = QWEN2_5_OMNI.num_vision_tokens(video.grid_thw) // video.grid_thw[0]
    true = 25 * (np.repeat(video.grid_times_s, per_step) - zero)
    assert np.abs(layout.position_ids[0, is_video] - base - true).max() <= 0.5 + 1e-6
    height, width = video.grid_thw[1] // 2, video.grid_thw[2] // 2
    assert layout.position_ids[1, is_video].tolist() == [
        base + row for _ in video.grid_times_s for row in range(height) for _ in range(width)
    ]
    assert layout.position_ids[2, is_video].tolist() == [
        base + col for _ in video.grid_times_s for _ in range(height) for col in range(width)
    ]
    if video.track:
        is_audio = layout.input_ids == SPECIAL.audio
        true = np.arange(video.track.num_tokens) + 25 * (video.track.start_s - zero)
        for row in range(3):
            assert np.abs(layout.position_ids[row, is_audio] - base - true).max() <= 0.5 + 1e-6


@settings(max_examples=500)
@given(
    runs=st.lists(
        st.one_of(
            text_runs,
            timed_video(),
            st.builds(AudioRun, num_tokens=st.integers(1, 60), item=st.just(0)),
            grids.map(lambda grid: ImageRun(grid_thw=(1, *grid[1:]), item=0)),
        ),
        min_size=1,
        max_size=6,
    )
)
def test_ids_strictly_increase_from_block_to_block(runs: list[Run]) -> None:
    whole = lay_out(runs, rope_mode="aligned")
    start, last = 0, -1
    for run in runs:
        stop = start + lay_out([run], rope_mode="aligned").num_tokens
        block = whole.position_ids[:, start:stop]
        assert block.min() == last + 1, "a block starts right after the largest id before it"
        if isinstance(run, VideoRun) and run.track is not None:
            opening, inner, closing = block[:, :2], block[:, 2:-2], block[:, -2:]
            assert (opening == last + 1).all()
            assert inner.min() == last + 2
            assert (closing == inner.max() + 1).all()
        last = int(block.max())
        start = stop
    assert start == whole.num_tokens


@settings(max_examples=300)
@given(video=timed_video())
def test_chunks_are_two_seconds_video_first(video: VideoRun) -> None:
    assume(video.track is not None)
    layout = lay_out([video], rope_mode="aligned")
    ids = layout.position_ids[0, 2:-2] - 1
    is_audio = layout.input_ids[2:-2] == SPECIAL.audio
    chunk_then_stream = (ids // 50) * 2 + is_audio
    assert (np.diff(chunk_then_stream) >= 0).all()
    for stream in (False, True):
        assert (np.diff(ids[is_audio == stream]) >= 0).all()


@settings(max_examples=200)
@given(grid=grids, fps=st.sampled_from([0.5, 1.0, 2.0, 5.0, 10.0]), extra=st.integers(0, 80))
def test_aligned_equals_reference_where_the_reference_is_right(grid: tuple[int, int, int], fps: float, extra: int) -> None:
    """A constant rate that is what it claims, chunks that hold whole steps, and sound that outlasts the picture."""
    assume(fps >= 1)
    num_audio = int((grid[0] - 1) * 2 / fps * 25) + 7 + extra
    runs: list[Run] = [
        ([1, 2], False),
        regular_video(grid, fps, track(num_audio)),
        ([3], True),
        regular_video(grid, fps, track(num_audio)),
    ]
    one, other = (lay_out(runs, rope_mode=mode) for mode in ("aligned", "reference"))
    np.testing.assert_array_equal(one.input_ids, other.input_ids)
    np.testing.assert_array_equal(one.position_ids, other.position_ids)


def test_text_after_a_video_with_shorter_sound_does_not_collide() -> None:
    runs: list[Run] = [([1], False), regular_video((10, 4, 4), 2.0, track(20)), ([2, 3], False)]
    aligned, reference = (lay_out(runs, rope_mode=mode) for mode in ("aligned", "reference"))
    # The picture's last step is 9 s = 225 ids after the block's base (2). Sound ended long before.
    assert aligned.position_ids[0, -2:].tolist() == [229, 230]
    assert reference.position_ids[0, -2:].tolist() == [229, 230]
    runs[1] = regular_video((2, 4, 4), 2.0, track(5))
    aligned, reference = (lay_out(runs, rope_mode=mode) for mode in ("aligned", "reference"))
    assert aligned.position_ids[0, -2:].tolist() == [29, 30]
    assert reference.position_ids[0, -2:].tolist() == [8, 9], "the reference goes on below the picture's 27"


# --- both ------------------------------------------------------------------------------------------------------------


@settings(max_examples=300)
@given(runs=mixed_runs(), mode=st.sampled_from(["aligned", "reference"]))
def test_labels_segments_and_counts_agree_with_the_ids(runs: list[Run], mode: Any) -> None:
    layout = lay_out(runs, rope_mode=mode)
    kinds = {SPECIAL.audio: "audio", SPECIAL.image: "image", SPECIAL.video: "video"}
    stop = 0
    for segment in layout.segments:
        assert segment.start == stop < segment.stop
        stop = segment.stop
        ids, labels = layout.input_ids[segment.start : stop], layout.labels[segment.start : stop]
        assert (labels == (ids if segment.supervised else -100)).all()
        if segment.kind in kinds.values():
            assert {kinds[int(token)] for token in ids} == {segment.kind}
    assert stop == layout.num_tokens
    expected = sum(len(ids) for ids, supervised in (run for run in runs if isinstance(run, tuple)) if supervised)
    assert layout.num_supervised == expected
    num_audio = sum(
        run.num_tokens if isinstance(run, AudioRun) else run.track.num_tokens if isinstance(run, VideoRun) and run.track else 0
        for run in runs
    )
    assert np.count_nonzero(layout.input_ids == SPECIAL.audio) == num_audio


def loop_of_the_reference(values: list[float], size: int) -> list[int]:
    """The reference's loop over tokens, for comparison: at most one close per token."""
    edges, current = [0], 1
    for index, value in enumerate(values):
        if value >= current * size:
            edges.append(index)
            current += 1
    return [*edges, len(values)]


@settings(max_examples=300)
@given(steps=st.integers(1, 60), per_step=st.integers(1, 6), second_per_grid=st.floats(0.05, 9.0))
def test_reference_chunk_edges_equal_the_loop(steps: int, per_step: int, second_per_grid: float) -> None:
    ticks = np.repeat(np.arange(steps) * second_per_grid * 25, per_step)
    assert reference_chunk_edges(ticks, ticks_per_chunk=50) == loop_of_the_reference(ticks.tolist(), 50)


def test_interleave_leaves_out_chunks_without_tokens() -> None:
    assert interleave([np.array([0, 200]), np.array([120])], ticks_per_chunk=50) == [(0, 0, 1), (1, 0, 1), (0, 1, 2)]


def test_an_empty_sequence_has_a_layout() -> None:
    layout = lay_out([], rope_mode="aligned")
    assert (layout.num_tokens, layout.position_ids.shape) == (0, (3, 0))
