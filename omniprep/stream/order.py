"""The order of one pass over one dataset: shards shuffled, then samples inside windows over several shards.

A window bounds what must be at hand at a time (a local cache of remote shards holds those of one or two windows), and how
far a sample can move. Random bits come straight from the bit generator and are sorted together with the places that they
belong to: numpy promises that those bits never change, which it does not promise of `Generator.permutation`, and no two
keys are equal, so a plan is the same with every version of numpy on every machine.
"""

import numpy as np
import numpy.typing as npt

from omniprep.rng import rng_for
from omniprep.stream.catalog import Catalog
from omniprep.types import Int64Array

PLACE_BITS = 20
"""Low bits of a sort key: the place in the window. 44 random bits are left."""
MAX_WINDOW = 1 << PLACE_BITS
"""The largest window, in samples."""


def pass_order(catalog: Catalog, *, seed: int, epoch: int, number: int, window: int) -> Int64Array:
    """Return (N,) all samples of a dataset in the shuffled order of a pass: `number` is 0 unless an epoch takes several.

    A function of the dataset's content, the seed, the epoch and the pass. `window` is in samples.
    """
    bits = rng_for(f"{catalog.digest}/{epoch}/{number}", seed=seed, stage="shuffle").bit_generator
    num_shards, num_samples = len(catalog.shards), len(catalog)
    shards = np.argsort(bits.random_raw(num_shards), kind="stable")
    return ranges(catalog.starts, shards)[shuffled_in_windows(bits.random_raw(num_samples), window=window)]


def shuffled_in_windows(bits: npt.NDArray[np.uint64], *, window: int) -> Int64Array:
    """Return (N,) places 0..N-1, shuffled inside consecutive windows; (N,) `bits` are what decides.

    >>> shuffled_in_windows(np.array([9, 8, 7, 6], np.uint64) << np.uint64(20), window=2).tolist()
    [1, 0, 3, 2]
    """
    num_windows = -(-len(bits) // window)
    keys = np.full(num_windows * window, np.iinfo(np.uint64).max)
    places = np.arange(len(bits), dtype=np.uint64) % np.uint64(window)
    keys[: len(bits)] = (bits & ~np.uint64(MAX_WINDOW - 1)) | places
    keys = np.sort(keys.reshape(num_windows, window), axis=1)  # what fills the last window up sorts to its end
    order = (keys & np.uint64(MAX_WINDOW - 1)).astype(np.int64)
    order += np.arange(num_windows, dtype=np.int64)[:, None] * window
    return order.reshape(-1)[: len(bits)]


def ranges(starts: Int64Array, chosen: Int64Array) -> Int64Array:
    """Return the numbers of some of the stretches that `starts` cuts 0..N-1 into, one stretch after another.

    >>> ranges(np.array([0, 2, 5]), np.array([1, 0])).tolist()
    [2, 3, 4, 0, 1]
    """
    counts = np.diff(starts)[chosen]
    before = np.cumsum(counts) - counts
    return np.repeat(starts[chosen] - before, counts) + np.arange(counts.sum(), dtype=np.int64)
