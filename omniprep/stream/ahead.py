"""What is done ahead of the reader: results by threads, in order, and the list of the shards that comes next."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

import numpy as np

from omniprep.stream.order import ranges
from omniprep.stream.plan import Plan

Item = TypeVar("Item")
Result = TypeVar("Result")

_BINS_AT_ONCE = 256
"""Bins whose shards are looked up together: enough to cost little each, and few to keep in mind."""


def ahead(function: Callable[[Item], Result], items: Iterable[Item], *, num_threads: int) -> Iterator[Result]:
    """Yield the function's results in the order of the items; threads work on the next few meanwhile."""
    if not num_threads:
        yield from map(function, items)
        return
    waiting = iter(items)
    with ThreadPoolExecutor(num_threads, thread_name_prefix="omniprep-stream") as pool:
        running: deque[Future[Result]] = deque(pool.submit(function, item) for item in islice(waiting, 2 * num_threads))
        try:
            while running:
                result = running.popleft().result()
                running.extend(pool.submit(function, item) for item in islice(waiting, 1))
                yield result
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def shards_of(plan: Plan, bins: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Yield the (dataset, shard) that some bins are read from, each once, in the order of their first use.

    Bins are asked for a few hundred at a time, as far as shards are asked for.
    """
    waiting = iter(bins)
    seen: set[tuple[int, int]] = set()
    while stretch := list(islice(waiting, _BINS_AT_ONCE)):
        for shard in _shards_of(plan, stretch):
            if shard not in seen:
                seen.add(shard)
                yield shard


def _shards_of(plan: Plan, bins: list[int]) -> list[tuple[int, int]]:
    chosen = ranges(plan.bin_starts, np.array([number for number in bins if number >= 0], np.int64))
    dataset_of, sample_of = plan.dataset_of[chosen], plan.sample_of[chosen]
    shard_of = np.zeros(len(chosen), np.int64)
    for number, dataset in enumerate(plan.datasets):
        of_it = dataset_of == number
        shard_of[of_it] = np.searchsorted(dataset.catalog.starts, sample_of[of_it], side="right") - 1
    pairs, first = np.unique(np.stack([dataset_of, shard_of]), axis=1, return_index=True)
    return [(int(dataset), int(shard)) for dataset, shard in pairs[:, np.argsort(first)].T]
