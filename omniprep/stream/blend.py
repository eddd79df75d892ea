"""Datasets blended by weight, the ratio exact at every prefix.

```
a (weight 0.5)  . | . | . | . | .        each sample is in the middle of its stretch of a common clock, which
b (weight 0.3)  .  |  .  |  .  |         is as long as its amount (1, or its tokens) divided by the weight;
c (weight 0.2)    .    |    .    |       read from left to right this is a b c a a b a c b a
```

Of the first n samples, dataset i has n·w_i give or take 0.5 + 0.5·w_i·(K - 2) of K datasets: less than one sample for up
to three datasets. No draw of random numbers comes near that, and nothing has to be remembered. Measured in tokens, what
was given so far is as close as that times the longest sample.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from omniprep.errors import ConfigError
from omniprep.types import Float64Array, Int64Array

MAX_SAMPLES = 500_000_000
"""In one epoch: beside a dataset of small weight, `all_exhausted` takes the others very often."""


class Share(NamedTuple):
    """One dataset of a blend."""

    num_samples: int
    amount: int
    """What one pass over it comes to: its samples, or their tokens."""
    weight: float | None
    """None in all shares of a blend, or in none."""
    pass_of: Callable[[int], tuple[Int64Array, Int64Array]]
    """Return the samples in the order of pass 0, 1, …, and the amount that each of them counts."""


class Blend(NamedTuple):
    """S samples of several datasets in one order."""

    dataset_of: npt.NDArray[np.int16]
    """(S,)"""
    sample_of: Int64Array
    """(S,)"""


def blend(shares: Sequence[Share], *, until_all: bool = False) -> Blend:
    """Return the datasets' samples in one order, in which each has its share at every prefix.

    Without weights every sample comes exactly once. With them the blend ends where the first dataset is used up (none
    comes twice), or, `until_all`, where the last one is: the others begin again.
    """
    weighted = shares[0].weight is not None
    rates = np.array([share.amount if share.weight is None else share.weight for share in shares], np.float64)
    ends = np.array([share.amount for share in shares], np.float64) / rates
    end = float(ends.max() if until_all else ends.min())
    num_passes = np.ceil(end / ends).astype(np.int64) if weighted else np.ones(len(shares), np.int64)
    _check_size(shares, num_passes)
    samples, times = [], []
    for share, number, rate in zip(shares, num_passes.tolist(), rates.tolist(), strict=True):
        passes = [share.pass_of(one) for one in range(number)]
        clock = _middles(np.concatenate([counts for _, counts in passes])) / rate
        kept = int(np.searchsorted(clock, end)) if weighted else len(clock)
        samples.append(np.concatenate([order for order, _ in passes])[:kept])
        times.append(clock[:kept])
    dataset_of = np.repeat(np.arange(len(shares), dtype=np.int16), [len(own) for own in samples])
    if len(shares) == 1:
        return Blend(dataset_of, samples[0])
    order = np.argsort(np.concatenate(times), kind="stable")  # runs that are in order already: a merge
    return Blend(dataset_of[order], np.concatenate(samples)[order])


def _middles(counts: Int64Array) -> Float64Array:
    """Return where the middle of each sample lies when all are laid end to end.

    >>> _middles(np.array([1, 1, 4])).tolist()
    [0.5, 1.5, 4.0]
    """
    return np.cumsum(counts) - counts / 2


def _check_size(shares: Sequence[Share], num_passes: Int64Array) -> None:
    total = sum(number * share.num_samples for share, number in zip(shares, num_passes.tolist(), strict=True))
    if total > MAX_SAMPLES:
        raise ConfigError(
            f"datasets.{int(num_passes.argmin())}: at its weight it lasts while datasets.{int(num_passes.argmax())} is taken "
            f"{num_passes.max():,} times, {total:,} samples in one epoch (at most {MAX_SAMPLES:,}); raise its weight, "
            "or set stopping_strategy to 'first_exhausted'"
        )
