"""From a recipe to a sealed dataset.

```
recipe ── partitions ──> [ one worker each: prepare_partition.py ] ── receipts ──> manifest
```

A partition is the unit of work, of failure and of resume. The driver only cuts the work, waits, adds up receipts and
seals. What a finished receipt still vouches for is not done again: after a kill, after rows were added, after another
source of the recipe changed.

Keys are `SOURCE-ROW`, so they are unique whatever the records' own ids are; those are kept beside them. Two records
with one id are therefore both kept, and land in the same split.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from omniprep import __version__
from omniprep.config import parse_config
from omniprep.errors import ConfigError, OmniPrepError
from omniprep.prepare_partition import Job, Worker, prepare_partition, retry_partition, rows_sha256, source_files
from omniprep.probe import choose_rows
from omniprep.receipts import (
    Claim,
    ClaimMode,
    Receipt,
    files_are_there,
    open_build,
    read_claim,
    read_inputs,
    read_inputs_folder,
    read_receipt,
    sweep,
    write_claim,
)
from omniprep.recipe import Recipe
from omniprep.run import serial
from omniprep.run.progress import Progress, Scan, Silent
from omniprep.seal import check_rate, seal
from omniprep.shards.manifest import MANIFEST_NAME, Manifest
from omniprep.sources.jsonl import JsonlSource
from omniprep.sources.media_facts import OF_ROWS, changed, location_of
from omniprep.storage.folder import open_folder

_log = logging.getLogger(__name__)

_TRIAL_NAME = "trial"
_RECEIPT_THREADS = 16
"""Receipts read at a time: on an object store each takes a few round trips."""


class Show(Protocol):
    """Starts the display of a run."""

    def __call__(self, todo: Sequence[Job], num_all: int) -> Progress:
        """Return what is told of progress. `todo` are the partitions to do, of `num_all`."""

    def scanning(self) -> AbstractContextManager[Scan]:
        """Start the display of what is found while the sources are scanned."""


def prepare(recipe: Recipe, *, mode: ClaimMode = "continue", show: Show | None = None) -> Manifest:
    """Build the recipe's dataset, or what is missing of it, seal it and return its manifest.

    `mode` says what becomes of a folder that was built from another recipe: `continue` refuses it, `update` does again
    what the change touches, `overwrite` deletes everything. Raises `ConfigError`, `StorageError` (a full disk), and
    `DatasetError` if the result may not be sealed. After any of these, a kill or a `KeyboardInterrupt` the same call goes
    on from the partitions that are finished.
    """
    worker = Worker(recipe.anchored())
    place = Path(worker.recipe.folder)
    jobs = plan_jobs(worker.located, _known_sizes(worker.recipe, mode), show=show)
    _check_places(worker.recipe, jobs)
    with open_build(worker.folder, recipe.identity(), mode=mode, inputs_folder=place) as claim:
        write_claim(worker.folder, _with_sizes(claim, jobs))
        with ThreadPoolExecutor(_RECEIPT_THREADS) as threads:
            found = threads.map(lambda job: valid_receipt(worker, job), jobs)
            # A build that was stopped, perhaps because a store was down, asks again for what it did not get.
            again = worker.folder.size(MANIFEST_NAME) is None
            receipts = {done.stem: done for done in found if done is not None and not (again and done.num_retryable)}
        todo = [job for job in jobs if job.stem not in receipts]
        if todo:
            worker.folder.remove(MANIFEST_NAME)  # first: a manifest must not name what is swept away
            sweep(worker.folder, receipts.values())
        sealed = worker.folder.version(MANIFEST_NAME)
        _run(worker, prepare_partition, todo, jobs, receipts, stage="prepare", show=show)
        return seal(worker.recipe, jobs, [receipts[job.stem] for job in jobs], version=sealed)


def _known_sizes(recipe: Recipe, mode: ClaimMode) -> Claim | None:
    """Return how the folder's sources are cut already, but for those whose `limit` has changed: a trial does not decide."""
    claim = read_claim(open_folder(recipe.output)) if mode != "overwrite" else None
    if claim is None:
        return None
    limits = {source["name"]: source.get("limit") for source in claim.recipe.get("sources", ())}
    kept = {source.name for source in recipe.sources if limits.get(source.name) == source.limit}
    return claim.model_copy(update={"rows_per_partition": {k: v for k, v in claim.rows_per_partition.items() if k in kept}})


def _check_places(recipe: Recipe, jobs: Iterable[Job]) -> None:
    """Raise `ConfigError` if a build would read what it writes itself."""
    output, cache = recipe.output, recipe.run.media_cache
    inside = next((piece.path for job in jobs for piece in job.partition.slices if _lies_in(piece.path, output)), None)
    if inside is not None:
        raise ConfigError(
            f"{inside}: matched by a source's path, but it lies in the output {output}; choose another output, or another path"
        )
    if cache is not None and _lies_in(cache, output):
        raise ConfigError(f"run.media_cache {cache}: lies in the output {output}, which holds the dataset alone; choose another")
    if cache is not None and (problem := _why_unwritable(cache)):
        _log.warning("run.media_cache: nothing new is kept there: %s", problem)


def _why_unwritable(place: str) -> str:
    """Return why no file can be written there, "" if one can. What workers say of it stays on their machines."""
    try:
        folder = open_folder(place)
        folder.write(_TRIAL_NAME, b"")
        folder.remove(_TRIAL_NAME)
    except (OmniPrepError, OSError) as error:
        return " ".join(str(error).split())
    return ""


def _lies_in(path: str, folder: str) -> bool:
    return f"{path.rstrip('/')}/".startswith(f"{folder.rstrip('/')}/")


def retry(output: str, *, run: dict[str, object] | None = None, inputs: Path | None = None, show: Show | None = None) -> Manifest:
    """Try a dataset's rejected records again, after their media were mended, and seal it anew.

    What works now is written into further shards; finished ones are not touched. `run` holds fields of `RunConfig`,
    `inputs` the folder that the recipe's relative paths start from, if it is not where `prepare` found it. Raises
    `ConfigError` if the folder holds no finished build or its rows have changed: `prepare` does those again.
    """
    folder = open_folder(output)
    claim = read_claim(folder)
    if claim is None:
        raise ConfigError(f"{output}: no dataset of `omniprep prepare`; name the folder that it wrote")
    place = inputs or read_inputs_folder(folder)
    values = {**claim.recipe, "output": output, "folder": str(place)}
    given = {name: value for name, value in (run or {}).items() if value is not None}
    # It can only become better, and the recipe's own limit is not known here.
    values["run"] = {"max_reject_rate": 1.0, **claim.recipe.get("run", {}), **given}
    recipe = parse_config(Recipe, values, place=f"{output}: recipe of the build")
    worker = Worker(recipe.anchored())
    with open_build(worker.folder, recipe.identity(), mode="continue", inputs_folder=place) as claim:
        try:
            jobs = plan_jobs(worker.located, claim)
        except ConfigError as error:
            advice = "" if inputs else f"; it was built in {place}: if all that lies elsewhere now, name the folder with --inputs"
            raise ConfigError(f"{error}{advice}") from None
        found = (valid_receipt(worker, job, with_media=False) for job in jobs)
        receipts = {receipt.stem: receipt for receipt in found if receipt is not None}
        if len(receipts) < len(jobs):
            raise ConfigError(
                f"{output}: {len(jobs) - len(receipts)} of {len(jobs)} partitions are not finished or their rows have changed; "
                "run `omniprep prepare` with its recipe first"
            )
        sealed = worker.folder.version(MANIFEST_NAME)
        todo = [job for job in jobs if receipts[job.stem].num_rejected]
        _run(worker, retry_partition, todo, jobs, receipts, stage="retry", show=show)
        return seal(worker.recipe, jobs, [receipts[job.stem] for job in jobs], version=sealed)


def _run(
    worker: Worker,
    function: Callable[[Worker, Job], Receipt],
    todo: Sequence[Job],
    jobs: Sequence[Job],
    receipts: dict[str, Receipt],
    *,
    stage: str,
    show: Show | None,
) -> None:
    """Do what is to be done, adding to `receipts`; stop as soon as too many records are rejected."""
    progress = show(todo, len(jobs)) if show is not None else Silent()
    num_rows = sum(job.partition.num_rows for job in jobs)
    num_rejected = sum(receipt.num_rejected for receipt in receipts.values())
    build = partial(build_worker, function, worker.recipe)
    for _, receipt in run_jobs(build, todo, worker.recipe, stage=stage, progress=progress):
        before = receipts.get(receipt.stem)
        receipts[receipt.stem] = receipt
        num_rejected += receipt.num_rejected - (before.num_rejected if before is not None else 0)
        num_bytes = sum(shard.num_bytes for shard in receipt.shards)
        progress.advance(num_rows=receipt.num_rows, num_rejected=receipt.num_rejected, num_bytes=num_bytes)
        check_rate(worker.recipe, receipts.values(), num_rejected=num_rejected, num_rows=num_rows)


def plan_jobs(recipe: Recipe, claim: Claim | None = None, *, show: Show | None = None) -> list[Job]:
    """Return the recipe's partitions, source by source. Raises `ConfigError` if a source cannot be read.

    Where the recipe says `rows_per_partition: auto`, a source keeps the size that `claim` says it was cut by.
    """
    jobs: list[Job] = []
    with show.scanning() if show is not None else nullcontext() as scan:
        for position, source in enumerate(recipe.sources):
            rows = recipe.run.rows_per_partition
            if rows == "auto":
                known = claim.rows_per_partition.get(source.name) if claim is not None else None
                rows = known or choose_rows(recipe, position)
            parts = source.partitions(rows_per_partition=rows)
            jobs += (Job(source=position, partition=part, rows_per_partition=rows) for part in parts)
            if scan is not None:
                num_files = len({piece.path for part in parts for piece in part.slices})
                scan.add(num_files=num_files, num_rows=sum(part.num_rows for part in parts))
    return jobs


def _with_sizes(claim: Claim, jobs: Iterable[Job]) -> Claim:
    sizes = {job.partition.source: job.rows_per_partition for job in jobs}
    return claim.model_copy(update={"rows_per_partition": dict(sorted(sizes.items()))})


Outcome = TypeVar("Outcome")


def run_jobs(
    build: Callable[[], "WorkerFunction[Outcome]"], jobs: Sequence[Job], recipe: Recipe, *, stage: str, progress: Progress
) -> Iterator[tuple[int, Outcome]]:
    """Yield (position, outcome) of every job as it finishes, on the recipe's executor; `progress` is told of the others."""
    # One partition is one task wherever it runs; starting Ray for it would only take its seconds.
    if recipe.run.executor == "serial" or (len(jobs) == 1 and recipe.run.address is None and not num_gpus(recipe)):
        function = build()
        try:
            yield from serial.map_partitions(lambda: function, jobs, on_progress=progress.working)
        finally:
            function.close()
        return
    from omniprep.run import ray

    run = recipe.run
    options = ray.RayOptions(
        num_workers=run.workers,
        address=run.address,
        max_retries=run.max_retries,
        num_gpus=num_gpus(recipe),
        memory_bytes_per_worker=run.memory_bytes_per_worker,
        metrics_port=run.metrics_port,
    )
    key = f"{stage} {recipe.sha256} {recipe.folder} {recipe.output} {recipe.run.model_dump_json()}"
    yield from ray.map_partitions(build, jobs, options, cache_key=key, name_of=attrgetter("stem"), on_progress=progress.working)


def num_gpus(recipe: Recipe) -> float:
    """Return the share of a GPU that each worker takes."""
    return recipe.run.num_gpus or (_GPU_SHARE if recipe.encode.audio.device.startswith("cuda") else 0.0)


_GPU_SHARE = 0.25
"""A mel spectrogram takes a few hundred megabytes of a GPU and little of its time."""


class WorkerFunction(Generic[Outcome]):
    """What a worker process keeps: a function of a job, with what it builds once."""

    def __init__(self, function: Callable[[Worker, Job], Outcome], recipe: Recipe) -> None:
        self._function, self._worker = function, Worker(recipe)

    def __call__(self, job: Job) -> Outcome:
        """Do one partition."""
        return self._function(self._worker, job)

    def hand_over(self, successor: "WorkerFunction[Any]") -> None:
        """Leave what takes long to start to the function of the next run."""
        self._worker.hand_over(successor._worker)

    def close(self) -> None:
        """End what was started for it."""
        self._worker.close()


def build_worker(function: Callable[[Worker, Job], Outcome], recipe: Recipe) -> WorkerFunction[Outcome]:
    """Build what a worker process keeps; a module-level function, so that it pickles."""
    return WorkerFunction(function, recipe)


def valid_receipt(worker: Worker, job: Job, *, with_media: bool = True) -> Receipt | None:
    """Return the receipt of a partition if all that it was written for is still the same, else None."""
    receipt = read_receipt(worker.folder, job.stem)
    if receipt is None:
        return None
    wanted = (job.partition.digest, worker.digests[job.source], __version__)
    if (receipt.partition_sha256, receipt.recipe_sha256, receipt.omniprep) != wanted:
        return None
    if not files_are_there(worker.folder, receipt):
        return None
    return receipt if not with_media or not worker.recipe.run.check_media or _inputs_are_same(worker, job, receipt) else None


def _inputs_are_same(worker: Worker, job: Job, receipt: Receipt) -> bool:
    """Look whether the files that a partition read are those that it read: size and time first, content where these differ."""
    facts = read_inputs(worker.folder, job.stem)
    if facts is None:
        return False
    source = worker.source(job)
    files = {fact for fact in facts if fact.sha256 == OF_ROWS}
    # JSON lines were read whole when they were planned; of other containers only headers were.
    touched = not isinstance(source, JsonlSource) and files != set(source_files(job.partition))
    if touched and rows_sha256(source.read(job.partition)) != receipt.rows_sha256:
        return False
    bases = source.bases(job.partition)
    media = (fact for fact in facts if fact.sha256 != OF_ROWS)
    # The same name may mean another file by now: the rows, and so their folder, may have moved.
    return all(any(location_of(fact.name, base) == fact.location for base in bases) and not changed(fact) for fact in media)
