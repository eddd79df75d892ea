"""One partition: what a worker does.

```
rows ──> guarded process: parse, decode, encode, pack ──> shards, index, quarantine, list of inputs, receipt
```

The worker reads rows and writes files; everything that touches what is in a row happens in a process that may be killed
(`run/guard.py`). A partition's files are a function of its rows, their media, the recipe and the version of OmniPrep; the
receipt is written last, so a partition is finished or it is not.
"""

import hashlib
import importlib
import json
import time
from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

from omniprep import __version__
from omniprep.encode.estimate import Estimate
from omniprep.encode.media_cache import MediaCache, library_versions
from omniprep.encode.thinker import ThinkerEncoder
from omniprep.errors import ConfigError, Reason, RejectSample
from omniprep.guarded_rows import GuardedRows, RowTask
from omniprep.probe import BuildProber
from omniprep.profile import QWEN2_5_OMNI, ModelProfile
from omniprep.receipts import Receipt, read_inputs, read_receipt, receipt_name, write_inputs, write_receipt
from omniprep.recipe import Recipe
from omniprep.rng import uniform_for
from omniprep.run import metrics
from omniprep.shards.manifest import ShardInfo
from omniprep.shards.quarantine import Rejected, read_quarantine, store_blobs, write_quarantine
from omniprep.shards.writer import PartitionWriter, ShardRecord, partition_stem, record_key, to_record
from omniprep.sources.files import is_url
from omniprep.sources.media_facts import OF_ROWS, MediaFact, MediaLedger, media_sha256
from omniprep.sources.media_store import MediaStore
from omniprep.sources.partitions import Partition, Row
from omniprep.sources.source import Source
from omniprep.storage.folder import Folder, open_folder
from omniprep.storage.remote import stamp_of_url
from omniprep.tokens.vocab import VOCABULARY_SHA256
from omniprep.types import EncodedSample, Rejection

LIBRARIES = (
    "av",
    "decord",
    "librosa",
    "numpy",
    "pillow",
    "pyarrow",
    "scipy",
    "simplejpeg",
    "soundfile",
    "soxr",
    "tiktoken",
    "tokenizers",
    "torch",
    "torchaudio",
    "torchvision",
)
"""Libraries whose version may show in the bytes; the manifest names them."""

_DECODERS = ("av", "decord", "PIL.Image", "simplejpeg", "soundfile", "soxr")

Stage = Literal["read", "parse", "encode"]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Job:
    """One partition of a recipe."""

    source: int
    """Position of its source in the recipe."""
    partition: Partition
    rows_per_partition: int
    """How its source is cut."""

    @property
    def stem(self) -> str:
        """Return what its files are named by."""
        return partition_stem(self.partition.source, self.partition.index)


class EncodedRow(NamedTuple):
    """What became of a row: a record, or why there is none, and the media files that it took.

    A tuple, for it crosses a pipe: pickling a data class with slots takes ten times as long.
    """

    record: ShardRecord | None = None
    error: RejectSample | None = None
    stage: Stage = "encode"
    media: tuple[MediaFact, ...] = ()


class RowEncoder:
    """What the guarded process builds once: rows in, records out."""

    def __init__(self, recipe: Recipe, profile: ModelProfile = QWEN2_5_OMNI) -> None:
        located = recipe.located()
        cache = recipe.run.media_cache
        self._recipe, self._profile, self._sources = recipe, profile, located.sources
        self._store = MediaStore(located.media, folder=recipe.folder)
        self._has_cache = cache is not None
        media_cache = None if cache is None else MediaCache(open_folder(cache), mel_dtype=recipe.shards.mel_dtype)
        self._encoder = ThinkerEncoder(located.encode, profile, cache=media_cache)

    def __call__(self, task: RowTask) -> EncodedRow:
        """Return the record of a row, or why it cannot be used."""
        source, row = self._sources[task.source], task.row
        ledger = MediaLedger(self._store.resolve, hash_rows=self._has_cache)
        stage: Stage = "read"
        try:
            if row.error is not None:
                raise row.error
            stage = "parse"
            record = source.to_record(row.value)
            stage = "encode"
            sample = self._encoder.encode(record, key=task.key, resolve=lambda ref: ledger.resolve(ref, base=row.base))
            split = record.split or source.split or choose_split(record.id or task.key, self._recipe)
            sample = replace(sample, source=source.name, row=row.index, split=split)
            if self._recipe.require_supervised:
                check_supervised(sample)
            stored = to_record(sample, self._recipe.member_format, profile=self._profile)
        except RejectSample as error:
            return EncodedRow(error=error, stage=stage, media=ledger.facts)
        return EncodedRow(record=stored, media=ledger.facts)


@dataclass(frozen=True, kw_only=True)
class _Build:
    """Makes a `RowEncoder` in another process."""

    recipe: Recipe
    profile: ModelProfile

    def __call__(self) -> RowEncoder:
        """Return it, with all that decodes imported: the process that takes a killed one's place has it from the start."""
        encode = self.recipe.encode
        torch = encode.video.resize == "exact" or encode.audio.backend == "torchaudio"
        for name in (*_DECODERS, *(("torch",) if torch else ())):
            with suppress(ImportError):  # told where it is needed, if it is
                importlib.import_module(name)
        return RowEncoder(self.recipe, self.profile)


@dataclass(frozen=True)
class Worker:
    """What a worker process builds once. `close` it: a guarded process may hang on it."""

    recipe: Recipe
    profile: ModelProfile = QWEN2_5_OMNI

    @cached_property
    def located(self) -> Recipe:
        """Return the recipe with the paths of its inputs placed."""
        return self.recipe.located()

    @cached_property
    def folder(self) -> Folder:
        """Return the dataset's folder."""
        return open_folder(self.recipe.output)

    @cached_property
    def digests(self) -> tuple[str, ...]:
        """Return the recipe's digest for each of its sources."""
        return tuple(self.recipe.sha256_of(source) for source in self.recipe.sources)

    @cached_property
    def _rows(self) -> GuardedRows[EncodedRow]:
        return GuardedRows(_Build(recipe=self.recipe, profile=self.profile), self.recipe.run.guard)

    def source(self, job: Job) -> Source:
        """Return the source that a job reads."""
        return self.located.sources[job.source]

    def encode_rows(self, job: Job, rows: Iterable[Row]) -> Generator[tuple[Row, EncodedRow], None, None]:
        """Yield what became of each row, in order."""
        for row, outcome in self._rows.map(rows, source=job.source, source_name=self.source(job).name):
            yield row, EncodedRow(error=outcome) if isinstance(outcome, RejectSample) else outcome

    @cached_property
    def _probes(self) -> GuardedRows[Estimate | RejectSample]:
        return GuardedRows(BuildProber(self.recipe), self.recipe.run.guard)

    def probe_rows(self, job: Job, rows: Iterable[Row]) -> Iterator[tuple[Row, Estimate | RejectSample]]:
        """Yield what each row will cost, or why it cannot be used, in order."""
        return self._probes.map(rows, source=job.source, source_name=self.source(job).name)

    def hand_over(self, successor: "Worker") -> None:
        """Leave what takes long to start to a worker with another recipe."""
        if "_rows" in self.__dict__:
            self._rows.hand_over(successor._rows)

    def close(self) -> None:
        """End the guarded processes."""
        for name in {"_rows", "_probes"} & self.__dict__.keys():
            self.__dict__[name].close()


def prepare_partition(worker: Worker, job: Job) -> Receipt:
    """Read, encode and write one partition, and return its receipt, which is written last."""
    worker.folder.remove(receipt_name(job.stem))
    source = worker.source(job)
    written = _write_rows(worker, job, source.read(job.partition))
    rejected = written.rejected
    receipt = Receipt(
        source=source.name,
        partition=job.partition.index,
        partition_sha256=job.partition.digest,
        rows_sha256=written.rows_sha256,
        media_sha256=media_sha256(written.media),
        recipe_sha256=worker.digests[job.source],
        omniprep=__version__,
        libraries=library_versions(*LIBRARIES),
        tokenizer_sha256=VOCABULARY_SHA256,
        num_rows=written.num_rows,
        rejects=count_reasons(rejected),
        num_retryable=count_retryable(rejected),
        shards=written.shards,
        quarantine=write_quarantine(
            worker.folder, job.stem, partition=job.partition.index, source=source.name, rejected=rejected
        ),
    )
    write_inputs(worker.folder, job.stem, [*source_files(job.partition), *written.media])
    write_receipt(worker.folder, receipt)
    metrics.count(metrics.PARTITIONS, source=source.name)
    return receipt


def retry_partition(worker: Worker, job: Job) -> Receipt:
    """Try the rejected rows of a finished partition again; what works now goes into further shards.

    Its finished shards are left as they are. If nothing came of it, so is the receipt.
    """
    folder = worker.folder
    before = read_receipt(folder, job.stem)
    if before is None:
        raise ConfigError(f"{folder.place}: partition {job.stem} is not finished; run `omniprep prepare` with its recipe first")
    if before.quarantine is None:
        return before  # an earlier attempt was done, and its answer lost with its node
    source = worker.source(job)
    wanted = {item.rejection.row for item in read_quarantine(folder, before.quarantine.name)}
    numbers = Counter(shard.split for shard in before.shards)
    rows = (row for row in source.read(job.partition) if row.index in wanted)
    written = _write_rows(worker, job, rows, first_numbers=numbers)
    if written.num_rows != len(wanted):
        raise ConfigError(f"source {source.name!r}: {len(wanted)} rows were rejected, {written.num_rows} of them are there now")
    if not written.shards and count_reasons(written.rejected) == before.rejects:
        return before
    num_retries = before.num_retries + 1
    # Another name: receipt and manifest still say what the old file holds. It is swept away when the dataset is sealed.
    stem = f"{job.stem}-r{num_retries}"
    facts = {(fact.location, fact.name): fact for fact in [*(read_inputs(folder, job.stem) or ()), *written.media]}
    media = [fact for fact in facts.values() if fact.sha256 != OF_ROWS]
    receipt = before.model_copy(
        update={
            "num_retries": num_retries,
            "rejects": count_reasons(written.rejected),
            "num_retryable": count_retryable(written.rejected),
            "shards": tuple(sorted([*before.shards, *written.shards], key=lambda shard: shard.name)),
            "media_sha256": media_sha256(media),
            "quarantine": write_quarantine(
                folder, stem, partition=job.partition.index, source=source.name, rejected=written.rejected
            ),
        }
    )
    # In this order: if only the first is done, the list names media as they were, and `prepare` does the partition again.
    write_receipt(folder, receipt)
    folder.sync([receipt_name(job.stem)])
    write_inputs(folder, job.stem, facts.values())
    return receipt


@dataclass(frozen=True, kw_only=True)
class _Written:
    num_rows: int
    rows_sha256: str
    media: list[MediaFact]
    shards: tuple[ShardInfo, ...]
    rejected: list[Rejected]


class StageClock:
    """Counts the time that is spent waiting for the next of something, less that of what runs inside it."""

    def __init__(self) -> None:
        self._inside_s = 0.0

    def spent_in(self, stage: metrics.Stage, items: Iterable[T]) -> Iterator[T]:
        """Yield the items and count for `stage` what it took to get each."""
        iterator = iter(items)
        while True:
            before_s, start_s = self._inside_s, time.perf_counter()
            try:
                item = next(iterator)
            except StopIteration:
                return
            finally:
                took_s = time.perf_counter() - start_s
                metrics.count(metrics.STAGE_SECONDS, took_s - (self._inside_s - before_s), stage=stage)
                self._inside_s = before_s + took_s
            yield item


def _write_rows(worker: Worker, job: Job, rows: Iterable[Row], *, first_numbers: Counter[str] | None = None) -> _Written:
    source = worker.source(job)
    digest = hashlib.sha256()
    num_rows = 0
    facts: dict[tuple[str, str], MediaFact] = {}
    rejected: list[Rejected] = []
    writer = PartitionWriter(
        worker.folder,
        source=source.name,
        partition=job.partition.index,
        form=worker.recipe.member_format,
        max_shard_bytes=worker.recipe.shards.max_shard_bytes,
        first_numbers=first_numbers,
    )
    stages = StageClock()
    with writer as shards, closing(worker.encode_rows(job, stages.spent_in("read", rows))) as encoded_rows:
        for row, encoded in stages.spent_in("encode", encoded_rows):
            num_rows += 1
            facts |= {(fact.location, fact.name): fact for fact in encoded.media}
            with metrics.timed("write"):
                digest.update(len(row.raw).to_bytes(8, "little") + row.raw)
                if encoded.record is not None:
                    shards.add(encoded.record)
                else:
                    rejection = _rejection(source.name, row, encoded)
                    rejected.append(Rejected(rejection=rejection, blobs=store_blobs(worker.folder, row.blobs)))
                    metrics.count(metrics.REJECTS, source=source.name, reason=rejection.reason)
            metrics.count(metrics.ROWS, source=source.name, outcome="stored" if encoded.record is not None else "rejected")
        with metrics.timed("commit"):
            written = shards.close()
        metrics.count(metrics.BYTES_WRITTEN, sum(shard.num_bytes for shard in written), source=source.name)
    return _Written(
        num_rows=num_rows, rows_sha256=digest.hexdigest(), media=list(facts.values()), shards=written, rejected=rejected
    )


def _rejection(source: str, row: Row, encoded: EncodedRow) -> Rejection:
    assert encoded.error is not None
    probe = [{"name": fact.name, "num_bytes": fact.num_bytes, "sha256": fact.sha256} for fact in encoded.media]
    return Rejection(
        key=record_key(source, row.index),
        source=source,
        row=row.index,
        place=row.place,
        stage=encoded.stage,
        reason=str(encoded.error.reason),
        detail=encoded.error.detail,
        retryable=encoded.error.retryable,
        probe=json.dumps(probe),
        record=row.raw,
    )


def count_retryable(rejected: Iterable[Rejected]) -> int:
    """Return how many records may be usable another time, as they are."""
    return sum(item.rejection.retryable for item in rejected)


def count_reasons(rejected: Iterable[Rejected]) -> dict[str, int]:
    """Return rejected records per reason."""
    return dict(sorted(Counter(item.rejection.reason for item in rejected).items()))


def source_files(partition: Partition) -> Iterator[MediaFact]:
    """Yield the files that a partition's rows are in, as they are now; `rows_sha256` covers what is read from them."""
    for piece in partition.slices:
        stamp = file_stamp(piece.path)
        if stamp is not None:
            yield MediaFact(location=piece.path, name=piece.name, num_bytes=stamp[0], stamp=stamp[1], sha256=OF_ROWS)


def file_stamp(path: str) -> tuple[int, str] | None:
    """Return size and time of a file, its ETag if it lies at a URL, or None if there is none at that path."""
    try:
        if is_url(path):
            num_bytes, stamp = stamp_of_url(path)
            return num_bytes or 0, stamp
        status = Path(path).stat()
    except OSError:
        return None
    return status.st_size, str(status.st_mtime_ns)


def rows_sha256(rows: Iterable[Row]) -> str:
    """Return the digest of rows as they are read."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(len(row.raw).to_bytes(8, "little") + row.raw)
    return digest.hexdigest()


def choose_split(name: str, recipe: Recipe) -> str:
    """Return the split of a record by a hash of its id (or key): the same whatever else is in the dataset."""
    draw = uniform_for(name, seed=recipe.seed, stage="split")
    for split, share in recipe.splits.items():
        if draw < share:
            return split
        draw -= share
    return "train"


def check_supervised(sample: EncodedSample) -> None:
    """Raise `RejectSample` (`NOTHING_SUPERVISED`) if a sequence of the sample has nothing to learn from."""
    for name, layout in sample.layouts.items():
        if not layout.num_supervised:
            raise RejectSample(
                Reason.NOTHING_SUPERVISED,
                f"{name}: none of {layout.num_tokens} tokens is supervised; add an assistant message, set `loss: true` on a "
                "message or part, or set `require_supervised: false` in the recipe",
            )
