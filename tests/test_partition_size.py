"""Partition sizes depend on the records only, and hardly change when a few records are added."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omniprep.encode.estimate import Estimate
from omniprep.partition_size import (
    MAX_ROWS,
    TARGET_BYTES,
    TARGET_S,
    choose_rows_per_partition,
    seconds_of,
    step_below,
)

TEXT = Estimate(num_tokens=1000, stored_bytes=20_000)
SPEECH = Estimate(num_tokens=130, num_mel_frames=250, audio_s=2.5, stored_bytes=66_000)
FILM = Estimate(
    num_tokens=3_300, num_mel_frames=600, num_patches=12_000, num_frames=12, audio_s=6, video_s=6, stored_bytes=1_660_000
)
HOUR = Estimate(
    num_tokens=30_000, num_mel_frames=30_000, num_patches=110_000, num_frames=768, video_s=3600, stored_bytes=200_000_000
)
MANY = 10_000_000

estimates = st.builds(
    Estimate,
    num_tokens=st.integers(0, 100_000),
    num_mel_frames=st.integers(0, 30_000),
    num_patches=st.integers(0, 200_000),
    video_s=st.floats(0, 7200),
    stored_bytes=st.integers(0, 2_000_000_000),
)


@pytest.mark.parametrize(
    ("record", "rows"),
    [(TEXT, 10_000), (SPEECH, 2_000), (FILM, 100), (HOUR, 1), (Estimate(), MAX_ROWS)],
    ids=["text", "speech", "film", "hour", "empty"],
)
def test_a_partition_is_about_a_minute_or_256_mb(record: Estimate, rows: int) -> None:
    assert choose_rows_per_partition([record], num_rows=MANY) == rows


@given(records=st.lists(estimates, min_size=1, max_size=20), num_rows=st.integers(1, MANY))
def test_it_is_a_step_that_keeps_within_its_targets(records: list[Estimate], num_rows: int) -> None:
    rows = choose_rows_per_partition(records, num_rows=num_rows)
    assert 1 <= rows <= MAX_ROWS
    assert str(rows).rstrip("0") in ("1", "2", "5")
    if rows > 1:
        assert rows * sum(map(seconds_of, records)) / len(records) <= TARGET_S
        assert rows * sum(record.stored_bytes for record in records) / len(records) <= TARGET_BYTES


@given(st.floats(1, 1e9))
def test_the_step_is_the_next_one_below(rows: float) -> None:
    below = step_below(rows)
    larger = {"1": 2, "2": 2.5, "5": 2}[str(below)[0]] * below
    assert below <= rows < larger


def test_a_small_dataset_is_cut_for_several_workers() -> None:
    """2000 films are 20 partitions of 100 as it is; 100 films would be one, of 16 s, and become 10."""
    assert choose_rows_per_partition([FILM], num_rows=2_000) == 100
    assert choose_rows_per_partition([FILM], num_rows=100) == 10
    assert choose_rows_per_partition([TEXT], num_rows=100) == 1000, "0.1 s of text is not worth cutting"


@pytest.mark.parametrize("num_rows", [9_000, 90_000, 1_000_000])
def test_one_per_cent_more_records_change_nothing(num_rows: int) -> None:
    def chosen(factor: float) -> int:
        return choose_rows_per_partition([TEXT, SPEECH, SPEECH], num_rows=round(num_rows * factor))

    assert chosen(1.0) == chosen(1.01)


@given(records=st.lists(estimates, min_size=1, max_size=10))
def test_the_order_of_the_probe_does_not_matter(records: list[Estimate]) -> None:
    in_order: Callable[[list[Estimate]], int] = lambda found: choose_rows_per_partition(found, num_rows=MANY)  # noqa: E731
    costly_first = sorted(records, key=seconds_of)
    assert in_order(costly_first) == in_order(costly_first[::-1])


def test_without_a_probe_rows_count_as_text() -> None:
    assert choose_rows_per_partition([], num_rows=MANY) == choose_rows_per_partition([TEXT], num_rows=MANY)
