"""What the command line tells: lines for a person, JSON for a script.

Names, ids and texts come from data. None of it may steer the terminal in which it is shown.
"""

import json
import re
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import TYPE_CHECKING

from pydantic import BaseModel
from rich.console import Console, RenderableType
from rich.segment import Segment, Segments

from omniprep.errors import printable

if TYPE_CHECKING:
    from omniprep.bench_loader import LoaderBench
    from omniprep.plan import Plan
    from omniprep.prepare_partition import Job
    from omniprep.run.progress import Progress, Scan
    from omniprep.shards.manifest import Manifest


def say(text: str) -> None:
    """Write lines to stderr: what is not the result."""
    sys.stderr.write(_lines(text))
    sys.stderr.flush()


def show(text: str) -> None:
    """Write lines to stdout."""
    sys.stdout.write(_lines(text))


def show_json(value: object) -> None:
    """Write a value as one line of JSON to stdout, in ASCII."""
    sys.stdout.write(json.dumps(value) + "\n")


def show_result(value: BaseModel, text: str, *, as_json: bool) -> None:
    """Write what a command found to stdout: all of it for a script, or what a person reads."""
    if as_json:
        show_json(value.model_dump(mode="json"))
    else:
        show(text)


def show_rich(renderable: RenderableType) -> None:
    """Write to stdout what `rich` lays out. It lets escapes in texts through, so they are taken out of what it made."""
    console = Console(markup=False)  # ids and file names may hold brackets
    shown = [Segment(_STEERS.sub(_escaped, text), style) for text, style, _ in console.render(renderable)]
    console.print(Segments(shown), end="")


def _escaped(found: re.Match[str]) -> str:
    return printable(found[0])


_STEERS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
"""Control characters but for tab and line end, and marks that turn the direction. What joins letters is part of a text."""


def _lines(text: str) -> str:
    return "".join(f"{printable(line)}\n" for line in text.split("\n"))


class Shower:
    """Starts the progress display once the number of partitions is known; the stack ends it."""

    def __init__(self, title: str, stack: ExitStack) -> None:
        self._title, self._stack = title, stack

    def __call__(self, todo: "Sequence[Job]", num_all: int) -> "Progress":
        """Start the display of a run; say first how much of it is finished already."""
        from omniprep.run.progress import show_progress

        if len(todo) < num_all:
            say(f"{self._title}: {num_all - len(todo)} of {num_all} partitions are finished already")
        num_rows = sum(job.partition.num_rows for job in todo)
        display: AbstractContextManager[Progress] = show_progress(self._title, num_partitions=len(todo), num_rows=num_rows)
        return self._stack.enter_context(display)

    def scanning(self) -> "AbstractContextManager[Scan]":
        """Start the display of a scan of the sources."""
        from omniprep.run.progress import show_scan

        return show_scan("scanning sources")


def describe_manifest(manifest: "Manifest", output: str) -> str:
    """Return what was built, in a few lines."""
    from omniprep.run.progress import in_bytes

    totals = manifest.totals
    num_bytes = sum(shard.num_bytes for shard in manifest.shards)
    lines = [
        f"{output}: {totals.num_records:,} records in {len(manifest.shards)} shards, {in_bytes(num_bytes)}; "
        f"{totals.num_tokens:,} tokens, {totals.num_supervised:,} supervised; "
        f"{totals.audio_s / 3600:.2f} h of audio, {totals.video_s / 3600:.2f} h of video",
    ]
    if manifest.by_split:
        lines.append("splits: " + ", ".join(f"{name} {part.num_records:,}" for name, part in manifest.by_split.items()))
    if manifest.rejects:
        reasons = ", ".join(f"{name} {count:,}" for name, count in sorted(manifest.rejects.items()))
        told = f"rejected: {manifest.num_rows - totals.num_records:,} ({reasons}), whole in {output}/quarantine"
        lines.append(f"{told}; see `omniprep inspect {output} --rejected`")
    return "\n".join(lines)


def show_plan(found: "Plan") -> None:
    """Write what a recipe would make."""
    from rich.table import Table

    from omniprep.run.progress import in_bytes

    table = Table(title=f"{found.num_partitions} partitions")
    for column in ("source", "rows", "rejected", "tokens", "audio h", "video h", "stored", "over length"):
        table.add_column(column, justify="left" if column == "source" else "right")
    for part in [*found.by_source.values(), *([found.totals] if len(found.by_source) > 1 else [])]:
        table.add_row(
            part.source,
            f"{part.num_rows:,}",
            f"{sum(part.rejects.values()):,}",
            f"{part.num_tokens:,}",
            f"{part.audio_s / 3600:.2f}",
            f"{part.video_s / 3600:.2f}",
            in_bytes(part.stored_bytes),
            f"{part.num_over_length:,}",
        )
    show_rich(table)
    most = max(1, *found.totals.lengths)
    for low, count in zip((0, *found.length_edges), found.totals.lengths, strict=True):
        if count:
            show(f"{int(low):>7,}+ tokens {count:>9,} {'█' * max(1, round(40 * count / most))}")
    for reason, count in found.totals.rejects.items():
        show(f"rejected: {count:,} {reason}")
    longest, heaviest = found.totals.longest, found.totals.heaviest
    show(f"longest: {longest.value:,} tokens, {longest.place}")
    show(f"memory: a worker holds up to about {in_bytes(heaviest.value)} for one record, {heaviest.place}")
    show(f"run.rows_per_partition: {found.suggested_rows_per_partition} would make shards of about 256 MiB")


def show_loader_bench(found: "LoaderBench") -> None:
    """Write what reading a dataset took, and how that compares."""
    from rich.table import Table

    from omniprep.bench_loader import NOT_DONE_BY_OTHERS, OUR_RECORDS

    speed = found.consumer_tokens_per_s
    table = Table(title=f"{found.plan.batching} bins of {found.plan.max_tokens:,} tokens", title_justify="left")
    for column in (
        *("loader", "workers", "threads", "batches", "samples", "samples/s", "tokens/s", "MB/s"),
        *("CPU ms/sample", "first batch s", "waits"),
    ):
        table.add_column(column, justify="left" if column == "loader" else "right")
    for run in found.runs:
        table.add_row(
            run.loader,
            str(run.num_workers),
            "-" if run.num_threads is None else str(run.num_threads),
            f"{run.num_batches:,}",
            f"{run.num_samples:,}",
            f"{run.samples_per_s:,.1f}",
            f"{run.tokens_per_s:,.0f}",
            f"{run.mb_per_s:,.1f}",
            f"{run.cpu_ms_per_sample:.2f}",
            f"{run.first_batch_s:.2f}",
            "-" if run.wait_share is None else f"{run.wait_share:.1%}",
        )
    show_rich(table)
    consumer = "takes no time of its own" if speed is None else f"takes {speed:,.0f} tokens/s at most"
    show(f"waits: share of the time that the consumer waits for a batch; it {consumer}")
    for ratio in found.ratios:
        clock = "" if ratio.samples_per_s is None else f"{ratio.samples_per_s:.1f}x the samples/s, "
        told = f"{clock}{ratio.samples_per_cpu_s:.1f}x the samples per CPU-second"
        show(f"{OUR_RECORDS} / {ratio.loader}, members as arrays, best of each: {told}")
    if found.ratios:
        show(f"{NOT_DONE_BY_OTHERS}. `omniprep` does all of that, so no ratio is taken from its rows")
