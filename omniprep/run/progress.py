"""Progress of a run: bars in a terminal, a plain line every few seconds elsewhere."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

_SECONDS_PER_LINE = 5.0


class Progress(Protocol):
    """Is told of every finished partition."""

    def advance(self, *, num_rows: int, num_rejected: int, num_bytes: int) -> None:
        """Count one more finished partition."""


@dataclass
class Counts:
    """What has been done so far."""

    num_partitions: int = 0
    num_rows: int = 0
    num_rejected: int = 0
    num_bytes: int = 0
    started_s: float = field(default_factory=time.monotonic)

    def add(self, *, num_rows: int, num_rejected: int, num_bytes: int) -> None:
        """Count one more finished partition."""
        self.num_partitions += 1
        self.num_rows += num_rows
        self.num_rejected += num_rejected
        self.num_bytes += num_bytes

    def describe(self) -> str:
        """Return rows, rate, rejects and bytes in words."""
        rate = self.num_rows / max(1e-6, time.monotonic() - self.started_s)
        return f"{self.num_rows:,} records, {rate:,.0f}/s, {self.num_rejected:,} rejected, {in_bytes(self.num_bytes)}"


class Silent:
    """Shows nothing."""

    def advance(self, *, num_rows: int, num_rejected: int, num_bytes: int) -> None:
        """Do nothing."""


class _Lines:
    def __init__(self, title: str, total: int) -> None:
        self._title, self._total, self._counts, self._last_s = title, total, Counts(), time.monotonic()

    def advance(self, *, num_rows: int, num_rejected: int, num_bytes: int) -> None:
        self._counts.add(num_rows=num_rows, num_rejected=num_rejected, num_bytes=num_bytes)
        now = time.monotonic()
        if now - self._last_s >= _SECONDS_PER_LINE or self._counts.num_partitions == self._total:
            self._last_s = now
            done = f"{self._counts.num_partitions}/{self._total} partitions"
            sys.stderr.write(f"{self._title}: {done}, {self._counts.describe()}\n")
            sys.stderr.flush()


@contextmanager
def show_progress(title: str, *, num_partitions: int) -> Iterator[Progress]:
    """Show a run on stderr: a bar with rate, rejects, bytes and time left in a terminal, plain lines otherwise."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines(title, num_partitions)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[counts]}"),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=console) as bars:
        task = bars.add_task(title, total=num_partitions, counts="")
        counts = Counts()

        class _Bar:
            def advance(self, *, num_rows: int, num_rejected: int, num_bytes: int) -> None:
                counts.add(num_rows=num_rows, num_rejected=num_rejected, num_bytes=num_bytes)
                bars.update(task, advance=1, counts=counts.describe())

        yield _Bar()


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
