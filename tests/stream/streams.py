"""Streams over three small datasets, which the fixture `folders` has written."""

from typing import Any

from torch.utils.data import DataLoader

from omniprep.stream.dataset import StreamingDataset
from omniprep.stream.plan import PlanConfig

CONFIG = PlanConfig(max_tokens=64, global_batch_size=24, window_samples=100, seed=7)
NAMES = ("chat", "speech", "film")


def stream(folders: Any, rank: int = 0, world_size: int = 1, config: PlanConfig = CONFIG, **options: Any) -> StreamingDataset:
    return StreamingDataset(folders, config, rank=rank, world_size=world_size, **options)


def loader(dataset: StreamingDataset, num_workers: int) -> DataLoader:
    return DataLoader(dataset, batch_size=None, num_workers=num_workers)


def keys(batches: Any) -> list[tuple[str, ...]]:
    return [tuple(batch["keys"]) for batch in batches]
