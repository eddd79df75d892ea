"""From a recipe to a sealed dataset.

```
recipe ── partitions ──> [ read → parse → encode → write shard, index, quarantine, receipt ] ── receipts ──> manifest
```

A partition is the unit of work, of failure and of resume: its files are a function of its rows, the recipe and the
version of OmniPrep. The driver only cuts the work, waits, adds up receipts and seals.

Keys are `SOURCE-ROW`, so they are unique whatever the records' own ids are; those are kept beside them. Two records
with one id are therefore both kept, and land in the same split.
"""

import importlib.metadata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TypeVar

from omniprep import __version__
from omniprep.encode.thinker import ThinkerEncoder
from omniprep.errors import DatasetError, Reason, RejectSample
from omniprep.profile import QWEN2_5_OMNI, ModelProfile
from omniprep.receipts import (
    Receipt,
    open_build,
    read_receipt,
    remove_later_partitions,
    remove_outputs,
    remove_unused_blobs,
    write_receipt,
)
from omniprep.recipe import Recipe
from omniprep.rng import rng_for
from omniprep.run import serial
from omniprep.run.progress import Progress, Silent
from omniprep.shards.manifest import MANIFEST_NAME, Manifest, Totals, add_up, read_manifest, write_manifest
from omniprep.shards.quarantine import Rejected, store_blobs, write_quarantine
from omniprep.shards.writer import PartitionWriter, record_key
from omniprep.sources.media_store import MediaStore
from omniprep.sources.partitions import Partition, Row
from omniprep.sources.source import Source
from omniprep.types import EncodedSample, Rejection

LIBRARIES = (
    "av",
    "decord",
    "numpy",
    "pillow",
    "pyarrow",
    "simplejpeg",
    "soundfile",
    "soxr",
    "tokenizers",
    "torch",
    "torchvision",
)
"""Libraries whose version may show in the bytes; the manifest names them."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One partition of a recipe."""

    number: int
    """Over all sources, in the recipe's order; the number in file names."""
    source: int
    """Position of its source in the recipe."""
    partition: Partition


@dataclass(frozen=True)
class Worker:
    """What a worker process builds once."""

    recipe: Recipe
    profile: ModelProfile = QWEN2_5_OMNI

    @cached_property
    def encoder(self) -> ThinkerEncoder:
        """Return the encoder, built on first use."""
        return ThinkerEncoder(self.located.encode, self.profile)

    @cached_property
    def store(self) -> MediaStore:
        """Return where media are found."""
        return MediaStore(self.located.media)

    @cached_property
    def located(self) -> Recipe:
        """Return the recipe with the paths of its inputs placed."""
        return self.recipe.located()

    @property
    def folder(self) -> Path:
        """Return the dataset's folder."""
        return Path(self.recipe.output)

    def source(self, job: Job) -> Source:
        """Return the source that a job reads."""
        return self.located.sources[job.source]


def prepare_partition(worker: Worker, job: Job) -> Receipt:
    """Read, encode and write one partition, and return its receipt, which is written last."""
    source = worker.source(job)
    remove_outputs(worker.folder, job.number)
    rejected: list[Rejected] = []
    num_rows = 0
    writer = PartitionWriter(
        worker.folder,
        source=source.name,
        partition=job.number,
        form=worker.recipe.member_format,
        max_shard_bytes=worker.recipe.shards.max_shard_bytes,
        profile=worker.profile,
    )
    with writer as shards:
        for row in source.read(job.partition):
            num_rows += 1
            try:
                failed = _store_row(worker, source, row, shards)
            except Exception as error:
                error.add_note(f"while preparing row {row.place} of source {source.name!r}")
                raise
            if failed is not None:
                rejected.append(Rejected(rejection=failed, blobs=store_blobs(worker.folder, row.blobs)))
        written = shards.close()
    receipt = Receipt(
        partition=job.number,
        source=source.name,
        partition_sha256=job.partition.digest,
        recipe_sha256=worker.recipe.sha256,
        omniprep=__version__,
        libraries=library_versions(),
        tokenizer_sha256=worker.encoder.tokenizer.digest,
        num_rows=num_rows,
        rejects=dict(sorted(Counter(str(item.rejection.reason) for item in rejected).items())),
        shards=written,
        quarantine=write_quarantine(worker.folder, partition=job.number, source=source.name, rejected=rejected),
    )
    write_receipt(worker.folder, receipt)
    return receipt


def _store_row(worker: Worker, source: Source, row: Row, shards: PartitionWriter) -> Rejection | None:
    """Put one row into the shards, or return why it cannot be used."""
    key = record_key(source.name, row.index)
    stage = "read"
    try:
        if row.error is not None:
            raise row.error
        stage = "parse"
        record = source.to_record(row.value)
        stage = "encode"
        sample = worker.encoder.encode(record, key=key, resolve=partial(worker.store.resolve, base=row.base))
        split = record.split or source.split or choose_split(record.id or key, worker.recipe)
        sample = replace(sample, source=source.name, row=row.index, split=split)
        if worker.recipe.require_supervised:
            check_supervised(sample)
        shards.add(sample)
    except RejectSample as error:
        return Rejection(
            key=key,
            source=source.name,
            row=row.index,
            place=row.place,
            stage=stage,  # type: ignore[arg-type]
            reason=str(error.reason),
            detail=error.detail,
            retryable=error.retryable,
            record=row.raw,
        )
    return None


def choose_split(name: str, recipe: Recipe) -> str:
    """Return the split of a record by a hash of its id (or key): the same whatever else is in the dataset."""
    draw = float(rng_for(name, seed=recipe.seed, stage="split").random())
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


def prepare(
    recipe: Recipe,
    *,
    overwrite: bool = False,
    retry_rejected: bool = False,
    show: Callable[[int, int], Progress] | None = None,
) -> Manifest:
    """Build the recipe's dataset, or what is missing of it, seal it and return its manifest.

    A receipt does not know whether media have been mended since: `retry_rejected` does partitions with rejections again.
    `show` is called with (partitions to do, partitions in all) and returns what is told of progress. Raises
    `ConfigError`, and `DatasetError` if the result may not be sealed; a `KeyboardInterrupt` leaves a build that the
    same call continues.
    """
    worker = Worker(recipe.anchored())
    jobs = plan_jobs(worker.located)
    place = Path(worker.recipe.folder)
    with open_build(worker.folder, recipe.identity(), overwrite=overwrite, inputs_folder=place):
        remove_later_partitions(worker.folder, len(jobs))
        finished = {job.number: receipt for job in jobs if (receipt := _finished(worker, job)) is not None}
        receipts = {number: receipt for number, receipt in finished.items() if not (retry_rejected and receipt.num_rejected)}
        todo = [job for job in jobs if job.number not in receipts]
        if todo:
            (worker.folder / MANIFEST_NAME).unlink(missing_ok=True)
            worker.encoder  # noqa: B018 - a wrong tokenizer is told here, before any worker starts
        progress = show(len(todo), len(jobs)) if show is not None else Silent()
        for _, receipt in run_jobs(partial(build_worker, prepare_partition, worker.recipe), todo, worker.recipe, stage="prepare"):
            receipts[receipt.partition] = receipt
            num_bytes = sum(shard.num_bytes for shard in receipt.shards)
            progress.advance(num_rows=receipt.num_rows, num_rejected=receipt.num_rejected, num_bytes=num_bytes)
        return seal(worker.recipe, jobs, [receipts[job.number] for job in jobs])


def plan_jobs(recipe: Recipe) -> list[Job]:
    """Return the recipe's partitions, source by source. Raises `ConfigError` if a source cannot be read."""
    rows = recipe.run.rows_per_partition
    parts = [
        (position, part) for position, source in enumerate(recipe.sources) for part in source.partitions(rows_per_partition=rows)
    ]
    return [Job(number=number, source=position, partition=part) for number, (position, part) in enumerate(parts)]


Outcome = TypeVar("Outcome")


def run_jobs(
    build: Callable[[], Callable[[Job], Outcome]], jobs: Sequence[Job], recipe: Recipe, *, stage: str
) -> Iterator[tuple[int, Outcome]]:
    """Yield the outcome of every job as it finishes, on the recipe's executor."""
    if recipe.run.executor == "serial":
        return serial.map_partitions(build, jobs)
    from omniprep.run import ray

    options = ray.RayOptions(num_workers=recipe.run.workers, address=recipe.run.address, max_retries=recipe.run.max_retries)
    return ray.map_partitions(build, jobs, options, cache_key=f"{stage} {recipe.sha256} {recipe.folder} {recipe.output}")


def build_worker(function: Callable[[Worker, Job], Outcome], recipe: Recipe) -> Callable[[Job], Outcome]:
    """Build what a worker process keeps; a module-level function, so that it pickles."""
    return partial(function, Worker(recipe))


def _finished(worker: Worker, job: Job) -> Receipt | None:
    return read_receipt(worker.folder, job.number, partition_sha256=job.partition.digest, recipe_sha256=worker.recipe.sha256)


def seal(recipe: Recipe, jobs: Sequence[Job], receipts: Sequence[Receipt]) -> Manifest:
    """Add up the receipts, check that no record was lost, and write the manifest.

    Raises `DatasetError` if the counts disagree or more was rejected than the recipe allows.
    """
    _check_counts(recipe, jobs, receipts)
    folder = Path(recipe.output)
    shards = [shard for receipt in receipts for shard in receipt.shards]
    quarantine = [receipt.quarantine for receipt in receipts if receipt.quarantine is not None]
    remove_unused_blobs(folder, {blob for info in quarantine for blob in info.blobs})
    versions: dict[str, set[str]] = {}
    for receipt in receipts:
        for name, version in receipt.libraries.items():
            versions.setdefault(name, set()).add(version)
    form = recipe.member_format
    manifest = Manifest(
        omniprep=__version__,
        libraries={name: " and ".join(sorted(found)) for name, found in sorted(versions.items())},
        profile=QWEN2_5_OMNI.name,
        kind=form.kind,
        rope_mode=recipe.encode.rope_mode,
        frame_format=form.frame_format,
        mel_dtype=form.mel_dtype,
        members=form.names,
        tokenizer_sha256=" and ".join(sorted({receipt.tokenizer_sha256 for receipt in receipts})),
        recipe=recipe.identity(),
        recipe_sha256=recipe.sha256,
        shards=tuple(shards),
        quarantine=tuple(quarantine),
        totals=add_up(("", shard.totals) for shard in shards).get("", Totals()),
        by_split=add_up((shard.split, shard.totals) for shard in shards),
        by_source=add_up((shard.source, shard.totals) for shard in shards),
        by_modality=add_up(pair for shard in shards for pair in shard.modalities.items()),
        num_rows=sum(receipt.num_rows for receipt in receipts),
        rejects=_sum_counts(receipt.rejects for receipt in receipts),
        rejects_by_source=_sum_counts({receipt.source: receipt.num_rejected} for receipt in receipts if receipt.num_rejected),
    )
    if (folder / MANIFEST_NAME).exists():
        before = read_manifest(folder)
        if before.model_copy(update={"parity": ""}) == manifest:
            return before  # nothing changed: a parity stamp stays true
    write_manifest(folder, manifest)
    return manifest


def _check_counts(recipe: Recipe, jobs: Sequence[Job], receipts: Sequence[Receipt]) -> None:
    for job, receipt in zip(jobs, receipts, strict=True):
        if not job.partition.num_rows == receipt.num_rows == receipt.num_stored + receipt.num_rejected:
            raise DatasetError(
                f"partition {job.number} ({receipt.source}): {job.partition.num_rows} rows planned, {receipt.num_rows} read, "
                f"{receipt.num_stored} stored, {receipt.num_rejected} rejected; not sealed, for records would be missing"
            )
    num_rows, num_rejected = sum(r.num_rows for r in receipts), sum(r.num_rejected for r in receipts)
    limit = recipe.run.max_reject_rate
    if limit is not None and num_rejected > limit * num_rows:
        reasons = Counter(_sum_counts(receipt.rejects for receipt in receipts)).most_common(3)
        raise DatasetError(
            f"{num_rejected} of {num_rows} records were rejected ({', '.join(f'{name}: {count}' for name, count in reasons)}), "
            f"more than run.max_reject_rate={limit:g}; not sealed. Look into {recipe.output}/quarantine, or raise the limit: "
            "the finished partitions are kept"
        )


def _sum_counts(counts: Iterator[dict[str, int]] | Sequence[dict[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    return dict(sorted(total.items()))


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that may show in the bytes."""
    found: dict[str, str] = {}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
