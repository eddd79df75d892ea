"""Sums that become means only when they are told: over documents, micro-batches, steps and ranks."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Self

import torch

from omniprep.stream.batch import BatchDocument
from omniprep.train.parallel import World


class Tally:
    """Pairs of a sum and what it is divided by, by name.

    >>> tally = Tally()
    >>> tally.add("loss", 6.0, weight=2)
    >>> tally.add("loss", 3.0, weight=1)
    >>> tally.means()
    {'loss': 3.0}
    """

    def __init__(self) -> None:
        self._sums: defaultdict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])

    def add(self, name: str, total: float, *, weight: float) -> None:
        """Add to a sum and to what it is divided by."""
        pair = self._sums[name]
        pair[0] += total
        pair[1] += weight

    def add_by_document(
        self, name: str, documents: Iterable[BatchDocument], totals: Iterable[float], weights: Iterable[float]
    ) -> None:
        """Add what each document has to the whole, to its modalities and to its source."""
        for document, total, weight in zip(documents, totals, weights, strict=True):
            if weight:
                for key in (name, f"{name}/modality/{document.modalities}", f"{name}/source/{document.source}"):
                    self.add(key, total, weight=weight)

    def weight(self, name: str) -> float:
        """Return what a mean is divided by; 0 if nothing was added."""
        return self._sums[name][1] if name in self._sums else 0.0

    def means(self) -> dict[str, float]:
        """Return the mean of every sum that has something to be divided by, sorted by name."""
        return {name: total / weight for name, (total, weight) in sorted(self._sums.items()) if weight}

    def over_ranks(self, world: World) -> Self:
        """Return the sums of all ranks together; all of them call this. Which names a rank has may differ."""
        parts: list[Mapping[str, list[float]]] = [dict(self._sums)] * world.world_size
        if world.is_distributed:
            torch.distributed.all_gather_object(parts, dict(self._sums))
        merged = type(self)()
        for part in parts:
            for name, (total, weight) in part.items():
                merged.add(name, total, weight=weight)
        return merged
