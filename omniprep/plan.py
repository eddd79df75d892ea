"""`omniprep plan`: what a recipe would make, from headers alone. Nothing is decoded and nothing is written."""

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

from pydantic import Field

from omniprep.encode.estimate import Estimate
from omniprep.errors import RejectSample
from omniprep.prepare import Show, build_worker, plan_jobs, run_jobs
from omniprep.prepare_partition import Job, Worker
from omniprep.recipe import Recipe
from omniprep.run.progress import Silent
from omniprep.shards.manifest import Stored

LENGTH_EDGES = (256, 512, 1024, 2048, 4096, 8192, 16_384, 32_768, 65_536)
_TARGET_SHARD_BYTES = 256 << 20
_BYTES_PER_MEL_FRAME = 128 * 4 * 3  # float32 mel, its complex spectrum's share and the waveform


class LargestRecord(Stored):
    """The record that takes most of something."""

    place: str = ""
    value: int = 0


class PartitionPlan(Stored):
    """What one partition would make."""

    source: str
    num_rows: int = 0
    num_probed: int = 0
    num_over_length: int = 0
    num_tokens: int = 0
    num_mel_frames: int = 0
    num_patches: int = 0
    audio_s: float = 0.0
    video_s: float = 0.0
    stored_bytes: int = 0
    lengths: tuple[int, ...] = (0,) * (len(LENGTH_EDGES) + 1)
    """Records by tokens: below the first of `LENGTH_EDGES`, up to the next, …, above the last."""
    rejects: dict[str, int] = Field(default_factory=dict)
    longest: LargestRecord = LargestRecord()
    """In tokens."""
    heaviest: LargestRecord = LargestRecord()
    """In bytes of decoded media that a worker holds at once."""


class Plan(Stored):
    """What the recipe would make."""

    num_partitions: int
    totals: PartitionPlan
    by_source: dict[str, PartitionPlan]
    max_tokens: int | None
    length_edges: tuple[int, ...] = LENGTH_EDGES
    suggested_rows_per_partition: int
    """So that a partition's shard has about 256 MiB."""


def plan_recipe(recipe: Recipe, *, show: Show | None = None) -> Plan:
    """Probe every row of a recipe, in parallel, and return what it would make. Raises `ConfigError`."""
    worker = Worker(recipe.anchored())
    jobs = plan_jobs(worker.located, show=show)
    progress = show(jobs, len(jobs)) if show is not None else Silent()
    found: dict[int, PartitionPlan] = {}
    build = partial(build_worker, probe_partition, worker.recipe)
    for number, part in run_jobs(build, jobs, worker.recipe, stage="plan", progress=progress):
        found[number] = part
        progress.advance(num_rows=part.num_rows, num_rejected=sum(part.rejects.values()), num_bytes=part.stored_bytes)
    parts = [found[number] for number in range(len(jobs))]
    by_source = {
        source.name: add_plans(source.name, [part for part in parts if part.source == source.name]) for source in recipe.sources
    }
    totals = add_plans("all", parts)
    mean = totals.stored_bytes / totals.num_probed if totals.num_probed else 0.0
    return Plan(
        num_partitions=len(jobs),
        totals=totals,
        by_source=by_source,
        max_tokens=recipe.encode.max_tokens,
        suggested_rows_per_partition=max(1, min(100_000, round(_TARGET_SHARD_BYTES / mean))) if mean else 1000,
    )


def probe_partition(worker: Worker, job: Job) -> PartitionPlan:
    """Estimate every row of one partition."""
    source = worker.source(job)
    rejects: Counter[str] = Counter()
    total = Estimate()
    lengths = [0] * (len(LENGTH_EDGES) + 1)
    num_rows = num_over_length = 0
    longest, heaviest = LargestRecord(), LargestRecord()
    limit = worker.recipe.encode.max_tokens
    for row, estimate in worker.probe_rows(job, source.read(job.partition)):
        num_rows += 1
        if isinstance(estimate, RejectSample):
            rejects[str(estimate.reason)] += 1
            continue
        total += estimate
        lengths[sum(estimate.num_tokens >= edge for edge in LENGTH_EDGES)] += 1
        num_over_length += limit is not None and estimate.num_tokens > limit
        longest = _larger(longest, f"{source.name}: {row.place}", estimate.num_tokens)
        heaviest = _larger(heaviest, f"{source.name}: {row.place}", held_bytes(estimate))
    return PartitionPlan(
        source=source.name,
        num_rows=num_rows,
        num_probed=num_rows - sum(rejects.values()),
        num_over_length=num_over_length,
        num_tokens=total.num_tokens,
        num_mel_frames=total.num_mel_frames,
        num_patches=total.num_patches,
        audio_s=total.audio_s,
        video_s=total.video_s,
        stored_bytes=total.stored_bytes,
        lengths=tuple(lengths),
        rejects=dict(sorted(rejects.items())),
        longest=longest,
        heaviest=heaviest,
    )


def held_bytes(estimate: Estimate) -> int:
    """Return roughly how many bytes a worker holds for one record: what it stores, twice, and its features."""
    return 2 * estimate.stored_bytes + estimate.num_mel_frames * _BYTES_PER_MEL_FRAME


def _larger(before: LargestRecord, place: str, value: int) -> LargestRecord:
    return LargestRecord(place=place, value=value) if value > before.value else before


def add_plans(name: str, parts: Sequence[PartitionPlan]) -> PartitionPlan:
    """Return the sum of plans, under another name."""
    rejects: Counter[str] = Counter()
    for part in parts:
        rejects.update(part.rejects)
    sums: dict[str, Any] = {
        field: sum(getattr(part, field) for part in parts)
        for field, info in PartitionPlan.model_fields.items()
        if info.annotation in (int, float)
    }
    return PartitionPlan(
        source=name,
        lengths=tuple(map(sum, zip(*(part.lengths for part in parts), strict=True))) or PartitionPlan(source=name).lengths,
        rejects=dict(sorted(rejects.items())),
        longest=max((part.longest for part in parts), key=lambda record: record.value, default=LargestRecord()),
        heaviest=max((part.heaviest for part in parts), key=lambda record: record.value, default=LargestRecord()),
        **sums,
    )
