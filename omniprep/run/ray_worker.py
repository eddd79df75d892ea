"""What OmniPrep runs in Ray's processes: the call of a function, and reports of what it counts."""

import socket
import time
from collections.abc import Callable
from typing import Any

import omniprep
from omniprep.errors import ConfigError
from omniprep.run import metrics
from omniprep.run.metrics import METRICS, Totals
from omniprep.run.ray_cluster import quietly


class Worker:
    """The actor."""

    def call(self, function: tuple[Any, str, str], collector: Any, name: str, item: Any) -> tuple[Any, Totals]:
        """Do as the function `call` does."""
        return call(function, collector, name, item)


_FUNCTIONS: dict[str, Callable[[Any], Any]] = {}
"""In a worker process: the functions built so far. One key in practice; a cluster's worker may serve a second run."""


def call(
    function: tuple[Callable[[], Callable[[Any], Any]], str, str], collector: Any, name: str, item: Any
) -> tuple[Any, Totals]:
    """In a worker process: return the function's result, and what it has counted."""
    build, cache_key, version = function
    if version != omniprep.__version__:
        raise ConfigError(
            f"worker on {socket.gethostname()}: omniprep {omniprep.__version__}, but the run was started with {version}; "
            "give the cluster and the driver the same version"
        )
    work = _FUNCTIONS.get(cache_key)
    if work is None:
        earlier = _FUNCTIONS.popitem()[1] if _FUNCTIONS else None  # it is large and not needed again
        work = _FUNCTIONS[cache_key] = build()
        if type(earlier) is type(work) and hasattr(earlier, "hand_over"):
            earlier.hand_over(work)
        getattr(earlier, "close", lambda: None)()
    report = Reporter(collector, name)
    start_s = time.monotonic()
    with metrics.collecting(report) as counted:
        result = work(item)
    report.export(counted)
    meter(metrics.PARTITION_SECONDS).observe(time.monotonic() - start_s)
    return result, counted


class Reporter:
    """In a worker process: tells the driver and Prometheus, now and then, what an attempt has counted so far."""

    def __init__(self, collector: Any, name: str) -> None:
        self._collector, self._name, self._exported = collector, name, Totals()

    def __call__(self, counted: Totals) -> None:
        """Tell both."""
        if self._collector is not None:
            # All of it each time, so that a lost message or a collector that was started anew costs nothing.
            quietly(self._collector.push.remote, self._name, counted)
        self.export(counted)

    def export(self, counted: Totals) -> None:
        """Add what is new to the counters that Prometheus sees."""
        for (metric, values), value in counted.minus(self._exported).sums.items():
            meter(metric).inc(value, tags=dict(zip(METRICS[metric].labels, values, strict=True)))
        self._exported = counted.copy()


_METERS: dict[str, Any] = {}


def meter(name: str) -> Any:
    """Return this process's meter of a metric of `METRICS`."""
    from ray.util import metrics as meters

    if name not in _METERS:
        metric = METRICS[name]
        common = {"name": name, "description": metric.description, "tag_keys": metric.labels}
        if metric.kind == "histogram":
            _METERS[name] = meters.Histogram(boundaries=[1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000], **common)
        else:
            _METERS[name] = (meters.Counter if metric.kind == "counter" else meters.Gauge)(**common)
    return _METERS[name]


class Collector:
    """The actor that holds each attempt's last report."""

    def __init__(self) -> None:
        self._latest: dict[str, Totals] = {}

    def push(self, name: str, counted: Totals) -> None:
        """Take an attempt's report."""
        self._latest[name] = counted

    def read(self, running: list[str]) -> dict[str, Totals]:
        """Return the reports of the attempts that are running, and forget the others."""
        self._latest = {name: self._latest[name] for name in running if name in self._latest}
        return self._latest
