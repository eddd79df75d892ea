"""How fast a dataset comes to a trainer on this machine: `omniprep bench loader`.

```
open ── iterate ── batch ── batch ── … ── last batch consumed
└── first_batch_s ─┘ └── wait_share: waiting, of this ──┘
     └──────────── wall_s, cpu_s ─────────────────────────┘
```

A run reads some batches as a trainer does and sleeps after each, as long as a GPU would take for its tokens: what the loader
does meanwhile costs no time. Without a consumer's speed nothing sleeps, and the rates are what the loader can do at most.

Everything is read once before it is measured, so the figures are those of a warm page cache: a disk or a network that is
slower is a limit of its own. `cpu_s` is that of this process and its workers; OmniPrep reads nothing beyond the last batch.

The other loaders read the tars of the same dataset one record after another, as many records as OmniPrep's first run had
samples, and hand over the members as arrays. That is less than a batch is: `NOT_DONE_BY_OTHERS`. What they are compared
with is therefore OmniPrep's reader doing as little, in runs of its own, of the same samples as the first run.
"""

import resource
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, computed_field

from omniprep.errors import ConfigError, DatasetError
from omniprep.shards.index import read_index_table
from omniprep.shards.members import SEQUENCES
from omniprep.storage.folder import as_folder
from omniprep.storage.local import LocalFolder
from omniprep.stream.catalog import Catalog, read_catalog
from omniprep.stream.plan import Blended, Plan, PlanConfig, make_plan
from omniprep.stream.reader import RecordReader
from omniprep.stream.record import Record

OURS = "omniprep"
OUR_RECORDS = "omniprep records"
"""OmniPrep's reader alone: members as arrays, record after record, in the order of the plan."""
NOT_DONE_BY_OTHERS = (
    "webdataset and datasets decode the members of one record after another to arrays, in the order of the tars; they do not "
    "shuffle, blend, pack, batch, make positions or shifted labels, or decode pictures to pixels"
)
_MAX_WORKERS = 256


class LoaderRun(BaseModel):
    """What reading some batches took, with one loader and one number of workers."""

    model_config = ConfigDict(frozen=True)

    loader: str
    num_workers: int
    """Processes; 0 reads in this one."""
    num_threads: int | None
    """Of OmniPrep, in each process."""
    num_batches: int
    """Of all but `omniprep`: the records, which come one by one."""
    num_samples: int
    num_tokens: int
    num_bytes: int
    """Of the records as they are stored."""
    first_batch_s: float
    """From before the dataset is opened: manifest, indexes, plan, workers, first batch."""
    wall_s: float
    """From the start of the iteration until the last batch was consumed."""
    cpu_s: float
    wait_share: float | None
    """Of the time after the first batch, what was spent waiting for one, in 0..1. None for a single batch."""

    @computed_field  # type: ignore[prop-decorator]
    @property
    def samples_per_s(self) -> float:
        """Return the rate with the consumer's time in it."""
        return self.num_samples / self.wall_s

    @computed_field  # type: ignore[prop-decorator]
    @property
    def tokens_per_s(self) -> float:
        """Return the rate in tokens."""
        return self.num_tokens / self.wall_s

    @computed_field  # type: ignore[prop-decorator]
    @property
    def mb_per_s(self) -> float:
        """Return the rate in 10^6 stored bytes."""
        return self.num_bytes / 1e6 / self.wall_s

    @computed_field  # type: ignore[prop-decorator]
    @property
    def cpu_ms_per_sample(self) -> float:
        """Return the CPU time of all processes over the samples."""
        return self.cpu_s * 1e3 / self.num_samples


class LoaderRatio(BaseModel):
    """OmniPrep's reader over another loader, both with the number of workers or threads that is best for them."""

    model_config = ConfigDict(frozen=True)

    loader: str
    samples_per_s: float | None
    """None with a consumer's speed, which bounds both."""
    samples_per_cpu_s: float


class LoaderBench(BaseModel):
    """All runs over one dataset."""

    model_config = ConfigDict(frozen=True)

    place: str
    plan: PlanConfig
    consumer_tokens_per_s: float | None
    runs: tuple[LoaderRun, ...]
    ratios: tuple[LoaderRatio, ...] = ()


class Consumed(NamedTuple):
    """What a consumer saw, and how long it waited for it."""

    keys: set[str]
    num_batches: int
    num_tokens: int
    first_s: float
    """Until the first batch came."""
    wall_s: float
    wait_share: float | None


Look = Callable[[Any], tuple[Sequence[str], int]]
"""Returns the keys and the number of tokens of what a loader hands over."""


def bench_loader(
    place: str,
    plan: PlanConfig,
    *,
    num_workers: Sequence[int] = (0, 1, 2),
    num_threads: int = 2,
    num_batches: int = 200,
    consumer_tokens_per_s: float | None = None,
    compare: bool = False,
) -> LoaderBench:
    """Read a dataset's first epoch, or its first batches, once for each number of workers; `compare`: with others as well.

    Raises `ConfigError` if torch is missing or the others cannot read from the place, `DatasetError` for a damaged dataset.
    """
    if find_spec("torch") is None:
        raise ConfigError("the loader's benchmark needs PyTorch, which is not installed: pip install 'omniprep[torch]'")
    catalog = read_catalog(place)
    others = _others(catalog) if compare else {}
    take = partial(_run, catalog=catalog, tokens_per_s=consumer_tokens_per_s)
    ours = partial(_open_stream, place, plan, num_batches=num_batches, num_threads=num_threads)
    shards = _planned_shards(catalog, plan, num_batches)
    # First without workers: a mistake is told in one line then, and not as the traceback of another process.
    _ = take(OURS, ours, _look_at_batch, limit=num_batches, shards=shards, tokens_per_s=None)
    runs = [
        take(OURS, ours, _look_at_batch, limit=num_batches, shards=shards, num_workers=workers, num_threads=num_threads)
        for workers in num_workers
    ]
    look = partial(_look_at_record, names=tuple(f"{name}.npy" for name in SEQUENCES[catalog.kind]))
    if compare:
        records = partial(_open_records, place, plan, num_batches=num_batches)
        runs += [
            take(
                OUR_RECORDS,
                partial(records, num_threads=threads),
                _look_at_our_record,
                limit=runs[0].num_samples,
                shards=shards,
                num_threads=threads,
            )
            for threads in sorted({0, num_threads})
        ]
    for name, open_other in others.items():
        theirs = partial(take, name, open_other, look, limit=runs[0].num_samples, shards=range(len(catalog.shards)))
        _ = theirs(tokens_per_s=None)
        runs += [theirs(num_workers=workers) for workers in num_workers]
    return LoaderBench(
        place=catalog.place,
        plan=plan,
        consumer_tokens_per_s=consumer_tokens_per_s,
        runs=tuple(runs),
        ratios=tuple(ratio(runs, name, is_bounded=consumer_tokens_per_s is not None) for name in others),
    )


def worker_counts(text: str) -> tuple[int, ...]:
    """Return the numbers of workers that an option names. Raises `ConfigError`.

    >>> worker_counts("0,1, 4")
    (0, 1, 4)
    """
    try:
        counts = tuple(int(part) for part in text.split(","))
    except ValueError:
        counts = (-1,)
    if not all(0 <= count <= _MAX_WORKERS for count in counts):
        raise ConfigError(f"--num-workers: expected numbers of 0 to {_MAX_WORKERS} with commas between, as 0,1,2; got {text!r}")
    return tuple(dict.fromkeys(counts))


def consume(batches: Iterable[tuple[Sequence[str], int]], *, tokens_per_s: float | None = None) -> Consumed:
    """Take (keys, number of tokens) after each other and sleep as long as a GPU of some speed would need for the tokens."""
    keys: set[str] = set()
    num_batches = num_tokens = 0
    wait_s = 0.0
    start = first = asked = time.perf_counter()
    for batch_keys, batch_tokens in batches:
        got = time.perf_counter()
        if num_batches:
            wait_s += got - asked
        else:
            first = got
        keys.update(batch_keys)
        num_batches += 1
        num_tokens += batch_tokens
        if tokens_per_s is not None:
            time.sleep(batch_tokens / tokens_per_s)
        asked = time.perf_counter()
    return Consumed(
        keys=keys,
        num_batches=num_batches,
        num_tokens=num_tokens,
        first_s=first - start,
        wall_s=asked - start,
        wait_share=wait_s / (asked - first) if num_batches > 1 else None,
    )


def ratio(runs: Sequence[LoaderRun], loader: str, *, is_bounded: bool = False) -> LoaderRatio:
    """Return how many records OmniPrep reads in a second, of the clock and of CPU time, over how many another loader does.

    `is_bounded`: a consumer has set the pace, so that the clock says nothing about the loaders.
    """

    def best(name: str, value: Callable[[LoaderRun], float]) -> float:
        return max(value(run) for run in runs if run.loader == name)

    def over(value: Callable[[LoaderRun], float]) -> float:
        return best(OUR_RECORDS, value) / best(loader, value)

    return LoaderRatio(
        loader=loader,
        samples_per_s=None if is_bounded else over(lambda run: run.samples_per_s),
        samples_per_cpu_s=over(lambda run: run.num_samples / run.cpu_s),
    )


def stored_bytes(catalog: Catalog, shards: Iterable[int], keys: set[str]) -> int:
    """Return the bytes of some records in the tars; of the shards, which may be all, no more are looked into than need be."""
    import pyarrow as pa
    import pyarrow.compute as pc

    folder = as_folder(catalog.place)
    wanted = pa.array(sorted(keys), pa.string())
    num_found = num_bytes = 0
    for shard in shards:
        if num_found == len(keys):
            break
        table = read_index_table(folder, catalog.shards[shard].index_name, ("key", "size"))
        found = table.filter(pc.is_in(table["key"], value_set=wanted))["size"]
        num_found += len(found)
        num_bytes += sum(found.to_pylist())
    return num_bytes


def _run(
    loader: str,
    open_loader: Callable[..., Iterable[Any]],
    look: Look,
    *,
    catalog: Catalog,
    shards: Iterable[int],
    limit: int,
    tokens_per_s: float | None,
    num_workers: int = 0,
    num_threads: int | None = None,
) -> LoaderRun:
    """Read as far as the limit and return what it took."""
    before_s = time.perf_counter()
    opened = open_loader(num_workers=num_workers)
    open_s, cpu_s = time.perf_counter() - before_s, _cpu_s()
    seen = consume(map(look, islice(iter(opened), limit)), tokens_per_s=tokens_per_s)
    # The iterator is gone by now, and its workers with it: those that have ended are counted.
    cpu_s = _cpu_s() - cpu_s
    return LoaderRun(
        loader=loader,
        num_workers=num_workers,
        num_threads=num_threads,
        num_batches=seen.num_batches,
        num_samples=len(seen.keys),
        num_tokens=seen.num_tokens,
        num_bytes=stored_bytes(catalog, shards, seen.keys),
        first_batch_s=open_s + seen.first_s,
        wall_s=seen.wall_s,
        cpu_s=cpu_s,
        wait_share=seen.wait_share,
    )


def _cpu_s() -> float:
    """Return the CPU time of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


# OmniPrep ----------------------------------------------------------------------------------------------------------


def _open_stream(place: str, plan: PlanConfig, *, num_batches: int, num_threads: int, num_workers: int) -> Iterable[Any]:
    from torch.utils.data import DataLoader

    from omniprep.stream.dataset import StreamingDataset

    dataset = StreamingDataset(place, plan, rank=0, world_size=1, num_threads=num_threads, max_batches=num_batches)
    _ = dataset.plan  # it is made when it is first asked for; to open a dataset is to have it
    return DataLoader(dataset, batch_size=None, num_workers=num_workers)  # type: ignore[no-any-return]


def _look_at_batch(batch: Mapping[str, Any]) -> tuple[Sequence[str], int]:
    return batch["keys"], int(batch["cu_seqlens"][-1])


def _open_records(place: str, config: PlanConfig, *, num_batches: int, num_threads: int, num_workers: int) -> Iterator[Record]:
    """Return an iterator over the records of the first batches; a record is valid until the next one is asked for."""
    if num_workers:
        raise ValueError(f"threads of this process read records, got {num_workers = }")
    catalog = read_catalog(place)
    plan = make_plan([Blended(catalog=catalog)], config)
    return _records(catalog, [plan.samples_of(number) for number in _first_bins(plan, num_batches)], num_threads)


def _records(catalog: Catalog, bins: Sequence[Sequence[tuple[int, int]]], num_threads: int) -> Iterator[Record]:
    from omniprep.stream.ahead import ahead

    with closing(RecordReader([catalog])) as reader:
        for records in ahead(reader.read_bin, bins, num_threads=num_threads):
            with records:
                yield from records


def _look_at_our_record(record: Record) -> tuple[Sequence[str], int]:
    return (record.key,), sum(sequence.shape[1] for sequence in record.tokens.values())


def _planned_shards(catalog: Catalog, config: PlanConfig, num_batches: int) -> list[int]:
    """Return the shards that the first batches are read from."""
    from omniprep.stream.ahead import shards_of

    plan = make_plan([Blended(catalog=catalog)], config)
    return [shard for _, shard in shards_of(plan, _first_bins(plan, num_batches))]


def _first_bins(plan: Plan, num_batches: int) -> list[int]:
    """Return the bins of the first batches, in the order of their steps."""
    steps = range(min(num_batches, plan.num_steps))
    return [number for step in steps for number in plan.bins_of(step)][:num_batches]


# Others ------------------------------------------------------------------------------------------------------------


def _others(catalog: Catalog) -> dict[str, Callable[..., Iterable[Any]]]:
    """Return how other loaders open the shards of a catalog.

    Raises `ConfigError` if they are not on this machine, `DatasetError` if one is missing.
    """
    folder = as_folder(catalog.place)
    if not isinstance(folder, LocalFolder):
        raise ConfigError(f"{catalog.place}: the comparison reads local shards only; copy some here, or leave out --compare")
    tars = [f"{folder.place}/{shard.name}" for shard in catalog.shards]
    for tar in tars:
        if not Path(tar).is_file():
            raise DatasetError(f"{tar}: is missing, though the manifest names it; copy it there, or build it again")
    arrays = tuple(name for name in catalog.member_format.names if name.endswith(".npy"))
    return {
        "webdataset": partial(_open_webdataset, tars, arrays),
        "datasets": partial(_open_datasets, tars, arrays),
    }


def _open_webdataset(tars: list[str], arrays: tuple[str, ...], *, num_workers: int) -> Iterable[Any]:
    import webdataset

    dataset = webdataset.WebDataset(tars, shardshuffle=False, empty_check=False).decode(only=list(arrays))
    return _loaded(dataset.map(partial(_as_arrays, arrays=arrays)), num_workers)


def _open_datasets(tars: list[str], arrays: tuple[str, ...], *, num_workers: int) -> Iterable[Any]:
    import datasets

    # Of local files nothing is asked of a hub; offline, nothing else is either.
    before, datasets.config.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE, True
    try:
        dataset = datasets.load_dataset("webdataset", data_files={"train": tars}, split="train", streaming=True)
    finally:
        datasets.config.HF_HUB_OFFLINE = before
    return _loaded(dataset.map(partial(_as_arrays, arrays=arrays)), num_workers)


def _as_arrays(row: dict[str, Any], *, arrays: tuple[str, ...]) -> dict[str, Any]:
    # HF `datasets` gives an array as a list of its rows.
    return {**row, **{name: np.asarray(row[name]) for name in arrays}}


def _loaded(dataset: Any, num_workers: int) -> Iterable[Any]:
    """Return a dataset as its users read it: as it is, or through torch's workers, a record at a time."""
    if not num_workers:
        found: Iterable[Any] = dataset
        return found
    from torch.utils.data import DataLoader

    return DataLoader(dataset, batch_size=None, num_workers=num_workers)  # type: ignore[no-any-return]


def _look_at_record(row: Mapping[str, Any], *, names: tuple[str, ...]) -> tuple[Sequence[str], int]:
    return (row["__key__"],), sum(int(row[name].shape[1]) for name in names)
