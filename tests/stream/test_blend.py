"""Blending: at every prefix each dataset has the share that its weight says."""

from collections import Counter
from itertools import accumulate

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from omniprep.errors import ConfigError
from omniprep.stream.blend import Share, blend

weights_strategy = st.lists(st.floats(0.01, 1.0), min_size=1, max_size=5)


def share(num_samples: int, weight: float | None = None, *, counts: list[int] | None = None) -> Share:
    """Return a dataset whose pass p is rotated by p, so that passes can be told apart."""
    amounts = np.array(counts or [1] * num_samples)

    def pass_of(number: int):
        order = np.roll(np.arange(num_samples), -number)
        return order, amounts[order]

    return Share(num_samples, int(amounts.sum()), weight, pass_of)


@given(weights_strategy, st.integers(1, 300))
def test_every_prefix_has_the_shares_of_the_weights(weights: list[float], num_samples: int) -> None:
    shares = np.array(weights) / sum(weights)
    found = blend([share(num_samples, weight) for weight in weights]).dataset_of
    bound = 0.5 + 0.5 * shares * max(0, len(weights) - 2)
    for dataset, own in enumerate(shares.tolist()):
        given_so_far = np.cumsum(found == dataset)
        expected = own * np.arange(1, len(found) + 1)
        assert (np.abs(given_so_far - expected) <= bound[dataset] + 1e-6).all()


@given(st.lists(st.integers(1, 40), min_size=1, max_size=5))
def test_without_weights_every_sample_comes_once_and_all_datasets_end_together(sizes: list[int]) -> None:
    found = blend([share(size) for size in sizes])
    pairs = list(zip(found.dataset_of.tolist(), found.sample_of.tolist(), strict=True))
    assert sorted(pairs) == [(dataset, sample) for dataset, size in enumerate(sizes) for sample in range(size)]
    for dataset, size in enumerate(sizes):
        so_far = np.cumsum(found.dataset_of == dataset)
        assert (np.abs(so_far - size / sum(sizes) * np.arange(1, sum(sizes) + 1)) <= 0.5 + 0.5 * len(sizes)).all()


@given(st.lists(st.tuples(st.integers(1, 60), st.floats(0.05, 1.0)), min_size=1, max_size=4))
def test_it_ends_where_the_first_dataset_does(parts: list[tuple[int, float]]) -> None:
    found = blend([share(*part) for part in parts])
    pairs = list(zip(found.dataset_of.tolist(), found.sample_of.tolist(), strict=True))
    assert len(set(pairs)) == len(pairs), "none comes twice"
    counts = Counter(dataset for dataset, _ in pairs)
    assert any(counts[dataset] == size for dataset, (size, _) in enumerate(parts)), "one is used up"


@given(st.lists(st.tuples(st.integers(1, 60), st.floats(0.05, 1.0)), min_size=1, max_size=4))
def test_until_all_are_exhausted_the_others_begin_again(parts: list[tuple[int, float]]) -> None:
    found = blend([share(*part) for part in parts], until_all=True)
    pairs = list(zip(found.dataset_of.tolist(), found.sample_of.tolist(), strict=True))
    seen = Counter(pairs)
    for dataset, (size, _) in enumerate(parts):
        times = [seen[dataset, sample] for sample in range(size)]
        assert min(times) >= 1
        assert max(times) - min(times) <= 1, "a pass is complete before the next begins"
        rotated = [(number + place) % size for number in range(max(times)) for place in range(size)]
        assert [sample for own, sample in pairs if own == dataset] == rotated[: sum(times)], "each pass in its own order"
    assert any(all(seen[dataset, sample] == 1 for sample in range(size)) for dataset, (size, _) in enumerate(parts))


@given(st.lists(st.tuples(st.floats(0.05, 1.0), st.lists(st.integers(1, 50), min_size=1, max_size=60)), min_size=2, max_size=4))
def test_by_tokens_every_prefix_has_its_shares_to_within_the_longest_samples(parts: list[tuple[float, list[int]]]) -> None:
    total = sum(weight for weight, _ in parts)
    found = blend([share(len(counts), weight, counts=counts) for weight, counts in parts])
    tokens = [parts[dataset][1][sample] for dataset, sample in zip(found.dataset_of, found.sample_of, strict=True)]
    longest = max(max(counts) for _, counts in parts)
    all_so_far = np.array(list(accumulate(tokens)))
    for dataset, (weight, _) in enumerate(parts):
        own = np.cumsum(np.where(found.dataset_of == dataset, tokens, 0))
        bound = longest * (0.5 + 0.5 * weight / total * len(parts))
        assert (np.abs(own - weight / total * all_so_far) <= bound + 1e-6).all()


def test_a_weight_that_would_repeat_the_others_without_end_is_refused() -> None:
    parts = [share(1000, 1e-9), share(1000, 1.0)]
    with pytest.raises(ConfigError, match=r"datasets\.0: at its weight it lasts while datasets\.1 is taken 1,000,000,000 times"):
        blend(parts, until_all=True)
    assert len(blend(parts).sample_of) == 1000


def test_the_picture_in_the_module_is_what_comes_out() -> None:
    found = blend([share(100, 0.5), share(100, 0.3), share(100, 0.2)]).dataset_of[:10]
    assert "".join("abc"[dataset] for dataset in found) == "abcaabacba"
