"""One pass over a dataset: every sample once, near its shard's neighbours, the same for the same seed."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from omniprep.stream.order import MAX_WINDOW, pass_order, ranges, shuffled_in_windows
from tests.stream.catalogs import catalog

SOME = catalog([1] * 100)


def order(**changes: int) -> list[int]:
    values = {"seed": 0, "epoch": 0, "number": 0, "window": 20, **changes}
    return pass_order(SOME, **values).tolist()


@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 80), st.integers(0, 5))
def test_every_sample_comes_once(num_samples: int, shard_size: int, window: int, seed: int) -> None:
    found = pass_order(catalog([1] * num_samples, shard_size=shard_size), seed=seed, epoch=0, number=0, window=window)
    assert sorted(found.tolist()) == list(range(num_samples))


def test_it_depends_on_seed_epoch_pass_and_content_and_on_nothing_else() -> None:
    assert order() == order()
    others = [order(seed=1), order(epoch=1), order(number=1), order(window=50)]
    others.append(pass_order(catalog([1] * 99 + [2]), seed=0, epoch=0, number=0, window=20).tolist())
    assert len({tuple(one) for one in [order(), *others]}) == 6


def test_a_window_holds_whole_neighbouring_shards() -> None:
    found = np.array(order(window=21)).reshape(-1)
    for start in range(0, 84, 21):
        shards = {sample // 7 for sample in found[start : start + 21].tolist()}
        assert len(shards) <= 4, "three shards of seven samples, or four where the last, short one lies before"


@given(st.integers(0, 300), st.integers(1, 50))
def test_no_place_leaves_its_window(num_places: int, window: int) -> None:
    bits = np.random.default_rng(num_places).integers(0, 2**64, num_places, np.uint64)
    found = shuffled_in_windows(bits, window=window)
    assert (found // window).tolist() == [place // window for place in range(num_places)]
    assert sorted(found.tolist()) == list(range(num_places))


def test_every_order_of_a_window_is_as_likely() -> None:
    counts: dict[tuple[int, ...], int] = {}
    for seed in range(600):
        bits = np.random.default_rng(seed).integers(0, 2**64, 3, np.uint64)
        found = tuple(shuffled_in_windows(bits, window=3).tolist())
        counts[found] = counts.get(found, 0) + 1
    assert len(counts) == 6
    assert min(counts.values()) > 60, "a hundred each are expected"


def test_equal_bits_keep_their_order() -> None:
    assert shuffled_in_windows(np.zeros(5, np.uint64), window=3).tolist() == [0, 1, 2, 3, 4]
    assert shuffled_in_windows(np.full(3, 2**64 - 1, np.uint64), window=MAX_WINDOW).tolist() == [0, 1, 2]


@pytest.mark.parametrize(("chosen", "expected"), [([2, 0], [5, 0, 1]), ([1], [2, 3, 4]), ([], [])])
def test_ranges_are_laid_end_to_end(chosen: list[int], expected: list[int]) -> None:
    assert ranges(np.array([0, 2, 5, 6]), np.array(chosen, np.int64)).tolist() == expected
