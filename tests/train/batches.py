"""Batches with documents of every kind of media, as `StreamingDataset` yields them, and a model to run them through."""

from collections.abc import Callable, Sequence
from typing import Any

from omniprep.stream.batch import Batch, pack
from tests.stream.model_records import record

MIX = ("text", "audio", "image", "film", "mixed", "text pair")
"""Records with each kind of media: none, a sound, a picture, a video with its sound, all of them, a preference."""


def batch_of(*names: str, make: Callable[[Sequence[Any]], Batch] = pack) -> dict[str, Any]:
    """Return a packed row (or what else `make` makes) of some records of `tests.stream.model_records`."""
    from omniprep.stream.dataset import to_torch

    return to_torch([make([record(name) for name in names])][0])
