"""Progress of a run: bars in a terminal, a plain line every few seconds elsewhere.

Finished partitions are counted for good (`advance`); what the others have done so far is said again and again
(`working`) and replaces what was said before, so that a partition that is begun anew is not counted twice.
"""

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from omniprep.run import metrics

_SECONDS_PER_LINE = 5.0


class Progress(Protocol):
    """Is told of finished partitions, and now and then of the others."""

    def advance(self, *, num_rows: int, num_rejected: int, num_bytes: int) -> None:
        """Count one more finished partition."""

    def working(self, totals: metrics.Totals) -> None:
        """Take what the unfinished partitions have counted so far, all together."""


@dataclass
class Done:
    """Rows and bytes."""

    num_rows: int = 0
    num_rejected: int = 0
    num_bytes: int = 0


@dataclass
class Counts:
    """What has been done so far, of what is planned."""

    num_partitions: int = 0
    """Finished ones."""
    planned_rows: int | None = None
    finished: Done = field(default_factory=Done)
    in_flight: Done = field(default_factory=Done)
    started_s: float = field(default_factory=time.monotonic)

    def advance(self, *, num_rows: int, num_rejected: int, num_bytes: int) -> None:
        """Count one more finished partition."""
        self.num_partitions += 1
        self.finished.num_rows += num_rows
        self.finished.num_rejected += num_rejected
        self.finished.num_bytes += num_bytes
        # It was among those in flight, if it was seen at all; the next report has the rest.
        flying = self.in_flight
        self.in_flight = Done(
            num_rows=max(0, flying.num_rows - num_rows),
            num_rejected=max(0, flying.num_rejected - num_rejected),
            num_bytes=max(0, flying.num_bytes - num_bytes),
        )

    def working(self, totals: metrics.Totals) -> None:
        """Take what the unfinished partitions have counted so far."""
        self.in_flight = Done(num_rows=totals.num_rows, num_rejected=totals.num_rejected, num_bytes=totals.num_bytes)

    @property
    def num_rows(self) -> int:
        """Return the rows done, of finished partitions and of others."""
        return self.finished.num_rows + self.in_flight.num_rows

    def describe(self) -> str:
        """Return rows, rate, rejects, bytes and time left in words."""
        elapsed_s = time.monotonic() - self.started_s
        rate = self.num_rows / max(1e-6, elapsed_s)
        rows = f"{self.num_rows:,}" + (f" of {self.planned_rows:,}" if self.planned_rows is not None else "")
        rejected = self.finished.num_rejected + self.in_flight.num_rejected
        words = f"{rows} records, {rate:,.0f}/s, {rejected:,} rejected"
        words += f", {in_bytes(self.finished.num_bytes + self.in_flight.num_bytes)}"
        left = self.planned_rows - self.num_rows if self.planned_rows is not None and self.num_rows else 0
        return words + (f", {in_time(left / rate)} left" if left > 0 else "")


class Silent:
    """Shows nothing."""

    def advance(self, *, num_rows: int, num_rejected: int, num_bytes: int) -> None:
        """Do nothing."""

    def working(self, totals: metrics.Totals) -> None:
        """Do nothing."""


class _Shown:
    """Counts, and shows what it has counted when it has changed."""

    def __init__(self, counts: Counts, show: Callable[[Counts], None]) -> None:
        self._counts, self._show = counts, show

    def advance(self, *, num_rows: int, num_rejected: int, num_bytes: int) -> None:
        self._counts.advance(num_rows=num_rows, num_rejected=num_rejected, num_bytes=num_bytes)
        self._show(self._counts)

    def working(self, totals: metrics.Totals) -> None:
        self._counts.working(totals)
        self._show(self._counts)


@contextmanager
def show_progress(title: str, *, num_partitions: int, num_rows: int | None = None) -> Iterator[Progress]:
    """Show a run on stderr: a bar with rows, rate, rejects, bytes and time left in a terminal, plain lines otherwise.

    `num_rows` is how many the partitions have together, if that is known. At the end a line says which stages took the
    time (`omniprep.run.metrics.timed`), if any was counted.
    """
    from rich.console import Console

    console = Console(stderr=True)
    counts = Counts(planned_rows=num_rows, started_s=time.monotonic())
    before = metrics.totals()
    with (_bar if console.is_terminal else _lines)(title, num_partitions, console) as show:
        yield _Shown(counts, show)
    stages = in_shares(metrics.totals().minus(before).by_label(metrics.STAGE_SECONDS, "stage"))
    if stages:
        _line(f"{title}: time of the workers: {stages}")


@contextmanager
def _lines(title: str, num_partitions: int, console: object) -> Iterator[Callable[[Counts], None]]:
    last_s = time.monotonic()

    def show(counts: Counts) -> None:
        nonlocal last_s
        now = time.monotonic()
        if now - last_s >= _SECONDS_PER_LINE or counts.num_partitions == num_partitions:
            last_s = now
            _line(f"{title}: {counts.num_partitions}/{num_partitions} partitions, {counts.describe()}")

    yield show


@contextmanager
def _bar(title: str, num_partitions: int, console: object) -> Iterator[Callable[[Counts], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bars

    assert isinstance(console, Console)
    columns = (TextColumn("[bold]{task.description}"), BarColumn(), TextColumn("{task.fields[counts]}"))
    with Bars(*columns, console=console) as bars:
        task = bars.add_task(title, total=num_partitions, counts="")

        def show(counts: Counts) -> None:
            words = f"{counts.num_partitions}/{num_partitions} partitions, {counts.describe()}"
            if counts.planned_rows is None:
                bars.update(task, completed=counts.num_partitions, counts=words)
            else:
                bars.update(task, completed=counts.num_rows, total=counts.planned_rows, counts=words)

        yield show


class Scan:
    """What was found so far while sources are scanned."""

    def __init__(self, show: Callable[[str], None]) -> None:
        self._show = show
        self._num_files = self._num_rows = 0

    def add(self, *, num_files: int = 0, num_rows: int = 0) -> None:
        """Count more files and rows."""
        self._num_files += num_files
        self._num_rows += num_rows
        self._show(self.describe())

    def describe(self) -> str:
        """Return the counts in words."""
        return f"{self._num_files:,} files, {self._num_rows:,} rows"


@contextmanager
def show_scan(title: str) -> Iterator[Scan]:
    """Show on stderr that sources are scanned and what was found so far; a scan of a few seconds leaves no line behind."""
    from rich.console import Console

    console = Console(stderr=True)
    if console.is_terminal:
        with console.status(f"{title}…") as status:
            yield Scan(lambda found: status.update(f"{title}… {found}"))
        return
    last_s = time.monotonic()
    shown = False

    def show(found: str) -> None:
        nonlocal last_s, shown
        if time.monotonic() - last_s >= _SECONDS_PER_LINE:
            last_s, shown = time.monotonic(), True
            _line(f"{title}… {found}")

    scan = Scan(show)
    yield scan
    if shown:
        _line(f"{title}: {scan.describe()}")


def _line(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def in_bytes(num_bytes: int) -> str:
    """Return a size in words.

    >>> in_bytes(999), in_bytes(3_500_000)
    ('999 B', '3.5 MB')
    """
    size, units = float(num_bytes), ["B", "kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size /= 1000
        units.pop(0)
    return f"{size:.0f} {units[0]}" if units[0] == "B" else f"{size:.1f} {units[0]}"


def in_time(seconds: float) -> str:
    """Return a duration in words.

    >>> in_time(0.2), in_time(75), in_time(3 * 3600 + 59), in_time(50 * 3600)
    ('1 s', '1 min 15 s', '3 h 0 min', '50 h 0 min')
    """
    left = max(1, round(seconds))
    if left < 60:
        return f"{left} s"
    if left < 3600:
        return f"{left // 60} min {left % 60} s"
    return f"{left // 3600} h {left % 3600 // 60} min"


def in_shares(seconds: Mapping[str, float]) -> str:
    """Return which part of the time went where, the largest first; nothing if there was none.

    >>> in_shares({"read": 1.0, "encode": 8.5, "write": 0.5})
    'encode 85%, read 10%, write 5%'
    """
    total = sum(seconds.values())
    largest_first = sorted(seconds.items(), key=lambda stage: -stage[1])
    return ", ".join(f"{stage} {share / total:.0%}" for stage, share in largest_first) if total else ""
