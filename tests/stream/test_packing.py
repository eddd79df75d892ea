"""Bins hold every sample once and no more than there is room for, and little of the room is wasted."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from omniprep.stream import packing
from omniprep.stream.packing import Bins, bucket, one_each, pack
from tests.stream.catalogs import uneven

ROOM = np.array([100, 40], np.int32)
needs_strategy = st.lists(st.tuples(st.integers(1, 100), st.integers(0, 40)), min_size=1, max_size=80)


def members(bins: Bins) -> list[list[int]]:
    return [bins.order[start:stop].tolist() for start, stop in pairwise(bins.starts.tolist())]


@pytest.fixture(params=[128, 2])
def bins_a_window(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(packing, "_BINS_A_WINDOW", request.param)
    return request.param


def check_whole(bins: Bins, num_samples: int) -> None:
    found = members(bins)
    assert sorted(sample for own in found for sample in own) == list(range(num_samples))
    assert all(own and own == sorted(own) for own in found), "no bin is empty, and samples keep their order"


@given(needs_strategy)
def test_packed_bins_hold_every_sample_once_and_keep_to_all_limits(rows: list[tuple[int, int]]) -> None:
    needs = np.array(rows, np.int32).T.copy()
    for bins_a_window in (1, 2, 128):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(packing, "_BINS_A_WINDOW", bins_a_window)
            bins = pack(needs, ROOM)
        check_whole(bins, len(rows))
        for own in members(bins):
            assert (needs[:, own].sum(1) <= ROOM).all()


@given(needs_strategy)
def test_padded_bins_hold_every_sample_once_and_count_the_padding(rows: list[tuple[int, int]]) -> None:
    needs = np.array(rows, np.int32).T.copy()
    for bins_a_window in (1, 2, 128):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(packing, "_BINS_A_WINDOW", bins_a_window)
            bins = bucket(needs, ROOM)
        check_whole(bins, len(rows))
        for own in members(bins):
            assert len(own) * needs[0, own].max() <= ROOM[0]
            assert needs[1, own].sum() <= ROOM[1]


@given(needs_strategy)
def test_one_window_is_packed_as_a_plain_loop_does(rows: list[tuple[int, int]]) -> None:
    needs = np.array(rows, np.int32).T.copy()
    longest_first = sorted(range(len(rows)), key=lambda sample: -max(rows[sample] / ROOM))
    bins: list[list[int]] = []
    for sample in longest_first:
        fits = (own for own in bins if all(needs[:, [*own, sample]].sum(1) <= ROOM))
        own = next(fits, None)
        if own is None:
            bins.append([sample])
        else:
            own.append(sample)
    assert members(pack(needs, ROOM)) == [sorted(own) for own in bins]


def test_windows_do_not_mix(bins_a_window: int) -> None:
    needs = np.array([uneven(1000)], np.int32)
    found = members(pack(needs, np.array([8192], np.int32)))
    spread = [own[-1] - own[0] for own in found]
    window = 1000 if bins_a_window == 128 else 14
    assert max(spread) < window, "two bins are about thirteen samples"
    assert max(spread) > window / 2


@pytest.mark.parametrize(
    ("lengths", "least"),
    [(uneven(50_000), 0.99), (uneven(50_000, low=20, high=8192), 0.97), (uneven(50_000, low=20, high=400), 0.99)],
    ids=["200..4000", "20..8192", "20..400"],
)
def test_little_room_is_wasted(lengths: list[int], least: float) -> None:
    needs = np.array([lengths], np.int32)
    num_bins = len(pack(needs, np.array([8192], np.int32)).starts) - 1
    assert sum(lengths) / (num_bins * 8192) >= least


def test_padded_bins_waste_little_on_padding() -> None:
    lengths = np.array(uneven(50_000), np.int32)
    found = members(bucket(lengths[None], np.array([8192], np.int32)))
    padded = sum(len(own) * int(lengths[own].max()) for own in found)
    assert lengths.sum() / padded >= 0.97


def test_bins_of_one() -> None:
    assert members(one_each(3)) == [[0], [1], [2]]
