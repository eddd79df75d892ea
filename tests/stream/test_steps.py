"""Steps of bins of similar cost, shared out evenly."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from omniprep.stream.steps import share_out, step_order


@given(st.integers(0, 700), st.integers(1, 40), st.integers(0, 3))
def test_every_bin_comes_once(num_bins: int, size: int, seed: int) -> None:
    costs = np.random.default_rng(seed).integers(1, 100, num_bins)
    assert sorted(step_order(costs, size=size, key="a", seed=seed).tolist()) == list(range(num_bins))


def test_the_bins_of_a_step_cost_much_the_same_and_steps_are_shuffled() -> None:
    costs = np.random.default_rng(0).integers(1, 10_000, 10_003)
    steps = costs[step_order(costs, size=16, key="a", seed=0)][:10_000].reshape(-1, 16)
    spread = (steps.max(1) / steps.mean(1)).mean()
    alone = (costs[:10_000].reshape(-1, 16).max(1) / costs[:10_000].reshape(-1, 16).mean(1)).mean()
    assert spread < 1.2 < 1.7 < alone
    neighbours = np.abs(np.diff(steps.mean(1))).mean()
    assert neighbours > 2_000, "steps do not come sorted: a third of the range is expected between two"


def test_the_bins_that_are_left_over_are_like_the_rest() -> None:
    costs = np.arange(1000)
    left_over = step_order(costs, size=100, key="a", seed=0)
    assert len(step_order(costs[:950], size=100, key="a", seed=0)) == 950
    tail = step_order(costs[:950], size=100, key="a", seed=0)[900:]
    assert tail.min() < 200
    assert tail.max() > 700
    assert len(left_over) == 1000


def test_the_order_depends_on_key_and_seed() -> None:
    costs = np.arange(500)
    found = [step_order(costs, size=4, key=key, seed=seed).tolist() for key, seed in (("a", 0), ("a", 0), ("b", 0), ("a", 1))]
    assert found[0] == found[1]
    assert found[0] != found[2] != found[3] != found[0]


@given(st.lists(st.integers(0, 10_000), min_size=1, max_size=8), st.integers(1, 8))
def test_every_rank_takes_as_many_bins(costs: list[int], num_ranks: int) -> None:
    costs = costs * num_ranks
    found = share_out(costs, num_ranks=num_ranks)
    assert sorted(place for own in found for place in own) == list(range(len(costs)))
    assert {len(own) for own in found} == {len(costs) // num_ranks}


def test_the_costliest_rank_is_near_the_mean() -> None:
    costs = np.random.default_rng(0).integers(5_000, 15_000, 64).tolist()
    loads = [sum(costs[place] for place in own) for own in share_out(costs, num_ranks=8)]
    plain = [sum(costs[rank::8]) for rank in range(8)]
    mean = sum(costs) / 8
    assert max(loads) / mean < 1.02 < max(plain) / mean
