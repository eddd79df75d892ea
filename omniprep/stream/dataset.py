"""The stream as torch sees it: an `IterableDataset` whose position is one integer.

```
plan(epoch) ── steps ──> this rank's bins ── threads: pread, decode, pack ──> batches, in order
```

Threads of this process do the work, for handing arrays from one process to another costs several times what reading them
does (`docs/streaming.md` has figures). Worker processes of a `DataLoader` are possible all the same: worker k of n makes
every n-th batch, and the loader takes them in turn, so the order is the same for any number of them.

Importing this module imports torch.
"""

import sys
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from copy import copy
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from omniprep.errors import ConfigError
from omniprep.profile import QWEN2_5_OMNI, ModelProfile
from omniprep.stream.ahead import ahead, shards_of
from omniprep.stream.batch import Batch, pack, pad
from omniprep.stream.catalog import read_catalog
from omniprep.stream.corrupt import Corrupt
from omniprep.stream.curriculum import Curriculum
from omniprep.stream.decode import DamagedRecord, PictureDecoder
from omniprep.stream.plan import Blended, Plan, PlanConfig, make_plan
from omniprep.stream.position import NUM_CELLS, Place, Position, Worker
from omniprep.stream.ranks import Ranks, find_ranks, ranks_of_group, refuse_second_split
from omniprep.stream.reader import RecordReader
from omniprep.stream.shard_cache import ShardCache

TorchBatch = dict[str, Any]


class StreamingDataset(IterableDataset[TorchBatch]):  # type: ignore[misc]
    """Batches of this rank, in the order of the plan; one iteration is one epoch, or what is left of it.

    `datasets` is a folder or URL, a list of them, a mapping of them to their weights in the blend, or `Blended` catalogs;
    `plan` says how bins are made of them. Instead of both, a `Curriculum` says it stage by stage.

    Each batch is a dict: `inputs` (the keyword arguments of transformers' Thinker), `shift_labels`, `cu_seqlens`, `keys`,
    `num_supervised` and `state`, which is what `load_state_dict` takes to go on after this batch. Use it as it is, or in a
    `DataLoader(dataset, batch_size=None)`.
    """

    def __init__(
        self,
        datasets: str | Sequence[str | Blended] | Mapping[str, float] | Curriculum,
        plan: PlanConfig | None = None,
        *,
        split: str = "train",
        rank: int | None = None,
        world_size: int | None = None,
        num_threads: int = 2,
        cache: ShardCache | None = None,
        max_corrupt: int = 10,
        pad_to: int | None = None,
        max_batches: int | None = None,
        profile: ModelProfile = QWEN2_5_OMNI,
    ) -> None:
        """`num_threads=0` reads in the caller's own thread; `rank` and `world_size` are found if they are not given.

        `max_batches` ends this rank's epochs early, for a trial: nothing is made ahead that nobody takes.
        """
        super().__init__()
        if isinstance(datasets, Curriculum):
            if plan is not None:
                raise ConfigError("expected a curriculum, or datasets and a plan, got both: its stages have their own plans")
            self._make_plan: Callable[..., Plan] = datasets.plan
        else:
            self._make_plan = partial(make_plan, _blend(datasets, split), plan or PlanConfig())
        stages = datasets.stages if isinstance(datasets, Curriculum) else ()
        for config in (stage.config for stage in stages) if stages else (plan or PlanConfig(),):
            _check_pad_to(pad_to, config)
        self.profile = profile
        self._given_ranks = (rank, world_size)
        self._num_threads, self._pad_to, self._max_batches = num_threads, pad_to, max_batches
        self._cache, self._max_corrupt = cache, max_corrupt
        self._position = Position(torch.zeros(NUM_CELLS, dtype=torch.int64).share_memory_())
        self._plan: Plan | None = None
        self.corrupt: list[Corrupt] = []
        """Records that this process has left out of the last epoch that it read."""
        _ = self.ranks  # what is wrong with them is told here, where it can be known already

    def __getstate__(self) -> dict[str, Any]:
        """Return what a spawned worker needs: it is no member of this process's group, so it is told the rank."""
        ranks = self._given_ranks if ranks_of_group() is None else (self.ranks.rank, self.ranks.world_size)
        return {**self.__dict__, "_given_ranks": ranks}

    # Position ------------------------------------------------------------------------------------------------------

    @property
    def ranks(self) -> Ranks:
        """Return this process's share, looked up anew: a process group may have come up since."""
        return find_ranks(*self._given_ranks)

    @property
    def epoch(self) -> int:
        """Return the epoch that the next iteration reads."""
        return self._position.epoch

    @property
    def plan(self) -> Plan:
        """Return the plan of that epoch."""
        return self._plan_of(self.epoch)

    def __len__(self) -> int:
        """Return how many batches this rank has in the whole epoch: the steps, times its share of one, up to `max_batches`."""
        return self._num_bins(self.plan)

    def set_epoch(self, epoch: int) -> None:
        """Begin at the start of an epoch, unless that is the one that comes next: then a loaded position is kept.

        After an iteration with worker processes was broken off, call it, or `load_state_dict`: they read ahead, and may be
        through with an epoch when the trainer is not. What they have read since the position was set is then forgotten.
        """
        if epoch != self.epoch or self._position.is_read_by_workers:
            self._go_to(Place(epoch))

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last batch that this process has yielded.

        Raises `ConfigError` where worker processes read: how far the trainer is, is not known here. Save `batch["state"]` of
        the last batch that was trained on, or use torchdata's `StatefulDataLoader`, which asks the workers.
        """
        if not _worker() and self._position.is_read_by_workers:
            raise ConfigError(
                "worker processes of a DataLoader read this stream, and how far the trainer is, is not known here: save "
                'batch["state"] of the last batch trained on, or use torchdata\'s StatefulDataLoader'
            )
        return self._state(self._position.next(_worker()))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a state was taken: with any number of ranks and workers if that was between two steps.

        Raises `ConfigError` if the data or the plan are not what they were, or if the state is from the middle of a step,
        or of a single worker, and the number of ranks or workers is another.
        """
        try:
            epoch, done, world_size = (int(state[name]) for name in ("epoch", "bin", "world_size"))
            worker = tuple(state["worker"])
        except (KeyError, TypeError, ValueError):
            wanted = ", ".join(self._state(Place(self.epoch)))
            raise ConfigError(f"expected the state of a stream ({wanted}), got {state!r:.200}") from None
        plan = self._plan_of(epoch)
        step = plan.check_state(state)
        ranks = self.ranks
        if (done or worker) and world_size != ranks.world_size:
            what = f"is of worker {worker[0]}" if worker else f"was taken in the middle of step {step}"
            raise ConfigError(
                f"the state {what} by {world_size} ranks, and there are {ranks.world_size} now; "
                'to change their number, load a `batch["state"]` of the end of a step (global_batch_size bins)'
            )
        if worker not in ((), _worker()):
            raise ConfigError(
                f"the state is that of worker {worker[0]} of {worker[1]}; it belongs into the same StatefulDataLoader, "
                'with as many workers; batch["state"] goes with any number of them'
            )
        self._go_to(Place(epoch, step * self._bins_a_step(plan) + done, of_worker=bool(worker)))

    def _go_to(self, place: Place) -> None:
        is_over = place.bin > 0 and place.bin >= self._num_bins(self._plan_of(place.epoch))
        self._position.go_to(place, is_over=is_over, worker=_worker())

    def _state(self, place: Place) -> dict[str, Any]:
        plan = self._plan_of(place.epoch)
        step, done = divmod(place.bin, self._bins_a_step(plan))
        return {
            **plan.state(step),
            "bin": done,
            "world_size": self.ranks.world_size,
            "worker": list(_worker()) if place.of_worker else [],
        }

    def _plan_of(self, epoch: int) -> Plan:
        if self._plan is None or self._plan.epoch != epoch:
            self._plan = self._make_plan(epoch=epoch)
        return self._plan

    def _bins_a_step(self, plan: Plan) -> int:
        size, ranks = plan.config.global_batch_size, self.ranks
        if size % ranks.world_size:
            plan.bins_of(0, rank=ranks.rank, world_size=ranks.world_size)  # says what is wrong
        return size // ranks.world_size

    def _num_bins(self, plan: Plan) -> int:
        num_bins = plan.num_steps * self._bins_a_step(plan)
        return num_bins if self._max_batches is None else min(num_bins, self._max_batches)

    # Reading -------------------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[TorchBatch]:
        """Yield what is left of the epoch; after its last batch, the next iteration reads the next epoch.

        An iteration that is broken off before that is begun again by the next one, where it began.
        """
        self._position.rewind()  # at once: a StatefulDataLoader asks for the state before it asks for a batch
        return self._iterate()

    def _iterate(self) -> Iterator[TorchBatch]:
        refuse_second_split(sys._getframe(1))
        worker, position = _worker(), self._position
        start = position.begin(worker)
        plan = self._plan_of(start.epoch)
        offset, stride = worker or (0, 1)
        num_bins = self._num_bins(plan)
        numbers = range(start.bin + (0 if start.of_worker else offset), num_bins, stride)
        with closing(self._batches(plan, numbers)) as batches:
            for number, batch in batches:
                # Of a worker, its own next bin, for StatefulDataLoader asks each; with the batch goes the rank's.
                position.reach(Place(plan.epoch, min(number + stride, num_bins), of_worker=bool(worker)))
                if number == numbers[-1]:  # who knows the length does not ask for what would come after the last
                    position.finish(plan.epoch, worker)
                yield {**batch, "state": self._state(Place(plan.epoch, number + 1))}
        if not numbers:
            position.finish(plan.epoch, worker)

    def _batches(self, plan: Plan, numbers: range) -> Generator[tuple[int, TorchBatch], None, None]:
        """Yield some of this rank's batches in order, with their numbers; threads make them ahead."""
        # One of its own over the same folder: others may read through it, and what a fork inherits lacks its threads.
        cache = copy(self._cache)
        reader = RecordReader([dataset.catalog for dataset in plan.datasets], cache=cache, max_corrupt=self._max_corrupt)
        decoder = PictureDecoder(profile=self.profile)  # in the thread that makes the batch: there are enough of those
        try:
            reader.prefetch(shards_of(plan, map(self._bin_of(plan), numbers)))
            bin_of = self._bin_of(plan)
            yield from ahead(
                lambda number: (number, self._make(reader, decoder, plan, bin_of(number))),
                numbers,
                num_threads=self._num_threads,
            )
        finally:
            self.corrupt = list(reader.corrupt)
            reader.close()
            decoder.close()

    def _bin_of(self, plan: Plan) -> Callable[[int], int]:
        """Return a function that tells the bin of one of this rank's batches; it is quick for neighbours."""
        ranks, per_step = self.ranks, self._bins_a_step(plan)
        bins_of = lru_cache(maxsize=64)(partial(plan.bins_of, rank=ranks.rank, world_size=ranks.world_size))

        def bin_of(number: int) -> int:
            step, place = divmod(number, per_step)
            return bins_of(step)[place]

        return bin_of

    def _make(self, reader: RecordReader, decoder: PictureDecoder, plan: Plan, number: int) -> TorchBatch:
        """Return a bin's batch, without records that cannot be read or do not agree with themselves."""
        collate = pad if plan.config.batching == "padded" else pack
        with reader.read_bin(plan.samples_of(number)) as found:
            records, samples = found.records, found.samples
            while True:
                try:
                    return to_torch(collate(records, pad_to=self._pad_to, decoder=decoder, profile=self.profile))
                except DamagedRecord as error:
                    reader.leave_out(*samples[error.number], error.detail)
                    records, samples = ([*items[: error.number], *items[error.number + 1 :]] for items in (records, samples))


def to_torch(batch: Batch) -> TorchBatch:
    """Return a batch with tensors over the same memory: what goes into the model's call apart from what is said about it."""
    return {
        "inputs": {name: _tensor(value) for name, value in batch.model_inputs().items()},
        "shift_labels": _tensor(batch.shift_labels),
        "cu_seqlens": _tensor(batch.cu_seqlens),
        "keys": list(batch.keys),
        "documents": list(batch.documents),
        "num_supervised": batch.num_supervised,
    }


def _tensor(value: Any) -> Any:
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value


def _worker() -> Worker:
    """Return (number, number of workers) in a worker process of a DataLoader, else nothing."""
    worker = get_worker_info()
    return () if worker is None else (worker.id, worker.num_workers)


def _check_pad_to(pad_to: int | None, config: PlanConfig) -> None:
    if pad_to is not None and (config.batching != "packed" or pad_to < config.max_tokens):
        raise ConfigError(
            f"pad_to={pad_to}: expected packed bins and at least max_tokens={config.max_tokens}, "
            f"got batching={config.batching!r}; leave it out, or raise it"
        )


def _blend(datasets: str | Sequence[str | Blended] | Mapping[str, float], split: str) -> tuple[Blended, ...]:
    if isinstance(datasets, str):
        return (Blended(catalog=read_catalog(datasets, split=split)),)
    if isinstance(datasets, Mapping):
        return tuple(Blended(catalog=read_catalog(place, split=split), weight=weight) for place, weight in datasets.items())
    return tuple(item if isinstance(item, Blended) else Blended(catalog=read_catalog(item, split=split)) for item in datasets)
