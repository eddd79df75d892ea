"""Which part of every step is this process's: found, or given, and never silently wrong.

A trainer's processes (ranks) read different bins of one plan. A process that takes itself for the only one reads what all
the others read too, and nothing fails: the loss only falls a little too well. So the rank is looked up where it is used,
every source that is there must agree, and a second split by somebody else is refused.
"""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from types import FrameType

from omniprep.errors import ConfigError

_MAX_FRAMES = 6
"""How far up the stack a wrapper of the dataset would be."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """A data-parallel rank: which of how many readers this process is."""

    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ConfigError(f"expected 0 <= rank < world_size, got rank={self.rank}, world_size={self.world_size}")


def find_ranks(rank: int | None = None, world_size: int | None = None, *, environ: Mapping[str, str] = os.environ) -> Ranks:
    """Return this process's rank: as given, else that of `torch.distributed`, else of torchrun's variables, else the only one.

    Give both or neither. Given ones are data-parallel ranks: under tensor, context or pipeline parallelism the processes of
    one group read the same bins, so `world_size` may divide that of the job, but not differ from it otherwise.
    Raises `ConfigError` if what is there does not agree.
    """
    job = ranks_of_group() or _of_environment(environ)
    if (rank is None) != (world_size is None):
        raise ConfigError(f"expected both rank and world_size, or neither, got {rank = }, {world_size = }")
    if rank is None or world_size is None:
        return job or Ranks()
    given = Ranks(rank, world_size)
    if job is not None and job.world_size % given.world_size:
        raise ConfigError(
            f"world_size={given.world_size} was given, but {job.world_size} processes run: each bin would be read by some of "
            "them more often than by others; give the number of data-parallel ranks, which divides the number of processes"
        )
    if job is not None and job.world_size == given.world_size and job.rank != given.rank:
        raise ConfigError(
            f"rank={given.rank} was given, but this process is rank {job.rank} of {job.world_size}; leave rank and world_size out"
        )
    return given


def ranks_of_group() -> Ranks | None:
    """Return the rank of a process group that is up. It is inherited by the worker processes that are forked later."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return None
    return Ranks(distributed.get_rank(), distributed.get_world_size())


def _of_environment(environ: Mapping[str, str]) -> Ranks | None:
    """Return what torchrun, Lightning's and Accelerate's launchers or a cluster's start script have set."""
    found = {name: environ.get(name, "") for name in ("RANK", "WORLD_SIZE")}
    if not any(found.values()):
        return None
    try:
        return Ranks(int(found["RANK"]), int(found["WORLD_SIZE"]))
    except ValueError:
        if found["WORLD_SIZE"] in ("", "1"):
            return None  # a launcher that only says that there is one process, or names this one for its logs
        raise ConfigError(
            f"the environment says WORLD_SIZE={found['WORLD_SIZE']!r} and RANK={found['RANK']!r}: expected numbers for both; "
            "start with torchrun, set both, or give rank and world_size"
        ) from None


def refuse_second_split(frame: FrameType | None) -> None:
    """Raise `ConfigError` if Accelerate is about to split the stream again: each rank would keep a share of its share.

    `accelerator.prepare(loader)` wraps every iterable dataset so, silently, and has no switch that says that it is split
    already; the wrapper is the caller of the dataset's iterator, found from `frame` upwards.
    """
    for _ in range(_MAX_FRAMES):
        if frame is None:
            return
        caller = frame.f_locals.get("self")
        if type(caller).__name__ == "IterableDatasetShard" and getattr(caller, "num_processes", 1) > 1:
            raise ConfigError(
                "Accelerate would split this stream a second time, and every rank would lose most of its samples: "
                "leave the loader out of accelerator.prepare() and move batches with accelerate.utils.send_to_device"
            )
        frame = frame.f_back
