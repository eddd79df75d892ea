"""What a run counts: rows, rejects, bytes and where the time went, for progress and for Prometheus.

Code that works on partitions calls `count` and `timed` and knows nothing of Ray. They add to the process's totals,
which costs about a microsecond; whoever runs the partition (`serial.py`, `ray.py`) wraps it in `collecting`, which
says now and then how far it is.

Totals are cumulative and belong to one attempt at one partition, so that an attempt that dies takes its counts with it
and nothing is counted twice.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["counter", "gauge", "histogram"]
Series = tuple[str, tuple[str, ...]]
"""A metric's name and the values of its labels, in the order of `METRICS`."""

ROWS = "omniprep_rows_total"
REJECTS = "omniprep_rejects_total"
BYTES_WRITTEN = "omniprep_bytes_written_total"
STAGE_SECONDS = "omniprep_stage_seconds_total"
GUARD_RESTARTS = "omniprep_guard_restarts_total"
PARTITIONS = "omniprep_partitions_total"
PARTITION_SECONDS = "omniprep_partition_seconds"
PARTITIONS_LEFT = "omniprep_partitions_left"

Stage = Literal["read", "encode", "write", "commit"]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """What a name stands for."""

    kind: Kind
    labels: tuple[str, ...] = ()
    description: str


METRICS: dict[str, Metric] = {
    ROWS: Metric(kind="counter", labels=("source", "outcome"), description="Rows worked on; outcome is stored or rejected."),
    REJECTS: Metric(kind="counter", labels=("source", "reason"), description="Rows put into the quarantine."),
    BYTES_WRITTEN: Metric(kind="counter", labels=("source",), description="Bytes of finished shards."),
    STAGE_SECONDS: Metric(kind="counter", labels=("stage",), description="Wall seconds of read, encode, write and commit."),
    GUARD_RESTARTS: Metric(kind="counter", labels=("kind",), description="Decoding processes given up: timeout, crash, memory."),
    PARTITIONS: Metric(kind="counter", labels=("source",), description="Partitions finished."),
    PARTITION_SECONDS: Metric(kind="histogram", description="Wall seconds of a finished partition."),
    PARTITIONS_LEFT: Metric(kind="gauge", description="Partitions not finished yet, as the driver sees it."),
}
"""Every metric there is. The names are public: dashboards are made of them."""


@dataclass(eq=False)
class Totals:
    """Sums by metric and labels."""

    sums: dict[Series, float] = field(default_factory=dict)

    def add(self, other: "Totals") -> None:
        """Add what another has counted."""
        for series, value in other.sums.items():
            self.sums[series] = self.sums.get(series, 0.0) + value

    def minus(self, earlier: "Totals") -> "Totals":
        """Return what was counted since a copy was taken."""
        rest = ((series, value - earlier.sums.get(series, 0.0)) for series, value in self.sums.items())
        return Totals({series: value for series, value in rest if value})

    def copy(self) -> "Totals":
        """Return the sums as they are now."""
        return Totals(dict(self.sums))

    def total(self, name: str, **labels: str) -> float:
        """Return the sum of a metric over the labels that are not given."""
        wanted = [(METRICS[name].labels.index(label), value) for label, value in labels.items()]
        return sum(
            value
            for (found, values), value in self.sums.items()
            if found == name and all(values[place] == value for place, value in wanted)
        )

    def by_label(self, name: str, label: str) -> dict[str, float]:
        """Return the sums of a metric for each value of one label."""
        place = METRICS[name].labels.index(label)
        found: dict[str, float] = {}
        for (metric, values), value in self.sums.items():
            if metric == name:
                found[values[place]] = found.get(values[place], 0.0) + value
        return found

    @property
    def num_rows(self) -> int:
        """Return the rows worked on."""
        return int(self.total(ROWS))

    @property
    def num_rejected(self) -> int:
        """Return the rows rejected."""
        return int(self.total(ROWS, outcome="rejected"))

    @property
    def num_bytes(self) -> int:
        """Return the bytes written."""
        return int(self.total(BYTES_WRITTEN))


@dataclass(eq=False)
class _Sink:
    """What the process adds to, and whom it tells."""

    totals: Totals = field(default_factory=Totals)
    report: Callable[[Totals], None] | None = None
    every_s: float = 1.0
    due_s: float = 0.0


_lock = threading.Lock()
_sink = _Sink()


def count(name: str, value: float = 1, **labels: str) -> None:
    """Add to a counter. The labels are those of `METRICS`, all of them: anything else is a `ValueError`."""
    metric = METRICS.get(name)
    if metric is None or metric.kind != "counter" or len(labels) != len(metric.labels):
        raise ValueError(_misuse(name, labels))
    try:
        series = (name, tuple([labels[label] for label in metric.labels]))
    except KeyError:
        raise ValueError(_misuse(name, labels)) from None
    sink = _sink
    with _lock:
        sums = sink.totals.sums
        sums[series] = sums.get(series, 0.0) + value
        now = time.monotonic()
        if sink.report is None or now < sink.due_s:
            return
        sink.due_s = now + sink.every_s
        so_far = sink.totals.copy()
    sink.report(so_far)


def _misuse(name: str, labels: dict[str, str]) -> str:
    metric = METRICS.get(name)
    if metric is None:
        return f"no metric {name!r}; there are {', '.join(METRICS)}"
    return f"{name} is a {metric.kind} with the labels ({', '.join(metric.labels)}); got ({', '.join(labels)})"


@contextmanager
def timed(stage: Stage) -> Iterator[None]:
    """Add the wall time of a block to its stage, also if the block raises."""
    start_s = time.perf_counter()
    try:
        yield
    finally:
        count(STAGE_SECONDS, time.perf_counter() - start_s, stage=stage)


@contextmanager
def collecting(report: Callable[[Totals], None] | None = None, *, every_s: float = 1.0) -> Iterator[Totals]:
    """Give the block totals of its own, and add them to the process's when it ends well.

    `report` is told the block's totals so far, at most every `every_s` seconds and only when something is counted.
    """
    global _sink  # noqa: PLW0603 - one sink a process: the code that counts must not have to be handed it
    before, _sink = _sink, _Sink(report=report, every_s=every_s, due_s=time.monotonic() + every_s)
    mine = _sink
    try:
        yield mine.totals
    finally:
        _sink = before
    add(mine.totals)


def add(other: Totals) -> None:
    """Add what was counted elsewhere (by a worker process, for a partition that is finished)."""
    with _lock:
        _sink.totals.add(other)


def totals() -> Totals:
    """Return what this process has counted, and what its workers have for finished partitions."""
    with _lock:
        return _sink.totals.copy()
