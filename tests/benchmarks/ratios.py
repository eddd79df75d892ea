"""What the benchmarks return: ratios of CPU time, measured in pairs in one run, and peaks of memory.

The machine may be noisy, a ratio of neighbours is not.
"""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Ratio:
    """One line of the benchmark table."""

    name: str
    ours_ms: float
    other_ms: float
    ratio: float
    """Median over the pairs: other / ours for a speed-up, ours / other for a distance to a floor."""
    target: float
    at_least: bool
    """True for a speed-up (ratio >= target is wanted), False for a distance to a floor (ratio <= target)."""

    @property
    def met(self) -> bool:
        return self.ratio >= self.target if self.at_least else self.ratio <= self.target


@dataclass(frozen=True, kw_only=True, slots=True)
class Peak:
    """One line of the memory table: the same work on a short and on a long file."""

    name: str
    short_mb: float
    """Peak of resident memory above what an empty worker has, in MB (10^6 bytes), on the short file."""
    long_mb: float
    limit_mb: float

    @property
    def met(self) -> bool:
        return max(self.short_mb, self.long_mb) <= self.limit_mb


def _cpu_ms(function: Callable[[], object], rounds: int) -> float:
    start = time.process_time()
    for _ in range(rounds):
        function()
    return (time.process_time() - start) * 1e3 / rounds


def _rounds_for(function: Callable[[], object], min_ms: float) -> int:
    once = max(_cpu_ms(function, 1), 1e-3)
    return max(1, round(min_ms / once))


def measure(
    name: str,
    *,
    ours: Callable[[], object],
    other: Callable[[], object],
    target: float,
    at_least: bool,
    pairs: int = 7,
    min_ms: float = 50.0,
) -> Ratio:
    """Run `ours` and `other` in turn, `pairs` times after a warm-up, and return the median ratio of their CPU times.

    Each turn repeats a short function until it takes about `min_ms`.
    """
    ours()
    other()
    rounds_ours, rounds_other = _rounds_for(ours, min_ms), _rounds_for(other, min_ms)
    gc.collect()
    times = [(_cpu_ms(ours, rounds_ours), _cpu_ms(other, rounds_other)) for _ in range(pairs)]
    ratios = [b / a if at_least else a / b for a, b in times]
    return Ratio(
        name=name,
        ours_ms=statistics.median(a for a, _ in times),
        other_ms=statistics.median(b for _, b in times),
        ratio=statistics.median(ratios),
        target=target,
        at_least=at_least,
    )
