"""Map over partitions on Ray: the only file that imports it.

One partition is one task. A worker process builds its function once and keeps it; no sample crosses the object store,
only items in and small results out. With `num_gpus` the workers are actors, which hold their share of a GPU and what
they keep on it; all else is the same.

What may happen, and what is done:

- A worker dies (killed, out of memory, a crash): its partition is given to another, `max_retries` times. Ray could do
  that by itself, but would repeat a partition that runs out of memory for ever, and could not tell it from a node that
  was taken away, which is not the partition's fault and counts apart.
- A partition is given up: the others are finished first, so that a rerun has little to do; then `WorkerLost` names it.
- Nodes come and go: how many tasks are in flight follows the CPUs and the memory that the cluster has now.
- This process dies: Ray ends the tasks of a driver that is gone.

Tasks in flight are as many as there are workers; items are taken when one is free. Queuing more would gain nothing,
for a partition takes seconds and the way to Ray milliseconds.
"""

import itertools
import logging
import os
import re
import socket
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import omniprep
from omniprep.errors import ConfigError, OmniPrepError
from omniprep.run import metrics
from omniprep.run.capacity import Needs, Node, describe_shortage, needs_of, num_workers_that_fit
from omniprep.run.metrics import METRICS, Totals

Item = TypeVar("Item")
Result = TypeVar("Result")

WORKER_ENVIRONMENT = {
    # One thread a worker: the work is parallel over partitions, and thread pools would only fight for the same cores.
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "NUMEXPR_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "RAYON_NUM_THREADS": "1",
}
_DRIVER_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # silences a warning about GPUs that tasks without GPUs do not see
}
_MAX_SOCKET_PATH = 60
"""Ray appends about 45 characters to its folder for socket names, which end at 107."""

_CONNECT_TIMEOUT_S = 10.0
_LOOK_EVERY_S = 1.0
"""How often the driver looks at the cluster's nodes and at the progress of its tasks while none of them ends."""
_TELL_EVERY_S = 60.0
"""How often it is said that no node can take a task."""
_MAX_NODE_LOSSES = 5
"""How often a partition may lose its node. More than that, and it may be what takes the nodes down."""
_MAX_GIVEN_UP_IN_A_ROW = 10
"""Partitions given up one after the other, none finished between them: the rest would fare no better."""

_log = logging.getLogger(__name__)


class WorkerLost(OmniPrepError):
    """A partition's worker died again and again: the machine kills it, most often for its memory."""


@dataclass(frozen=True, kw_only=True)
class RayOptions:
    """How to run on Ray."""

    num_workers: int | None = None
    """Partitions at a time; None: as many as the CPUs and the memory of the machine or cluster hold, while it runs."""
    address: str | None = None
    """Cluster to join (`auto`, `ray://host:10001`, `host:6379`); None: start Ray in this process and stop it at the end."""
    max_retries: int = 3
    """How often a partition is given to another worker after its worker died."""
    memory_bytes_per_worker: int | None = None
    """Memory that a worker takes of its node's; a node runs no more workers than its memory holds. None: 1.5 GB, or all
    that the largest node has."""
    num_gpus: float = 0.0
    """Share of a GPU that each worker holds; above 0 the workers are actors."""
    dashboard: bool = False
    """Start Ray's dashboard; only for a Ray that is started here."""
    metrics_port: int | None = None
    """Port on which Prometheus finds the metrics of a Ray that is started here; None: any."""


@dataclass(frozen=True, kw_only=True)
class _Attempt:
    """One try at one item."""

    position: int
    item: Any
    num_crashes: int = 0
    num_node_losses: int = 0


def map_partitions(
    build: Callable[[], Callable[[Item], Result]],
    items: Iterable[Item],
    options: RayOptions | None = None,
    *,
    cache_key: str,
    name_of: Callable[[Item], str] | None = None,
    on_progress: Callable[[Totals], None] | None = None,
) -> Iterator[tuple[int, Result]]:
    """Yield (position, result) of every item in the order in which they finish.

    `build` is called once in each worker process for each `cache_key`; it and the items must pickle. At most
    `num_workers` items are taken ahead. `name_of` names an item in messages; else its position does. `on_progress` is
    told about once a second what the unfinished items have counted (`omniprep.run.metrics`) so far; what a finished
    one has counted is added to this process's totals before its result is yielded.

    Raises what the function raises; `WorkerLost`, after all the others are done, for items that were given up; and
    `ConfigError` if the cluster cannot be reached or its workers lack what this process has.
    """
    options = options or RayOptions()
    num_items = len(items) if isinstance(items, Sized) else None
    waiting = enumerate(items)
    first = next(waiting, None)
    if first is None:
        return
    with _session(options) as num_workers:
        run = _Run(
            options=options,
            num_workers=num_workers,
            function=(build, cache_key, omniprep.__version__),
            name_of=name_of,
            num_items=num_items,
            on_progress=on_progress,
        )
        yield from run.results(itertools.chain([first], waiting))


@dataclass(kw_only=True)
class _Run:
    """The state of one map."""

    options: RayOptions
    num_workers: Callable[[], tuple[int, Needs]]
    function: tuple[Callable[[], Callable[[Any], Any]], str, str]
    name_of: Callable[[Any], str] | None
    num_items: int | None
    on_progress: Callable[[Totals], None] | None
    running: dict[Any, _Attempt] = field(default_factory=dict)
    again: deque[_Attempt] = field(default_factory=deque)
    given_up: list[str] = field(default_factory=list)
    given_up_in_a_row: int = 0

    def results(self, waiting: Iterator[tuple[int, Any]]) -> Iterator[tuple[int, Any]]:
        """Run everything; at the end, raise if something was given up."""
        import ray

        live = _Live(self.on_progress) if self.on_progress is not None else None
        workers: _Tasks | _Actors = (_Actors if self.options.num_gpus else _Tasks)(
            ray.put(self.function), live.collector if live is not None else None
        )
        left = _Left(self.num_items)
        finished: list[tuple[int, Any]] = []
        try:
            while True:
                running = self._start(waiting, workers)
                yield from finished  # after new work is given out: workers do not wait for what the caller does with these
                if not running:
                    break
                finished = []
                done, _ = ray.wait(
                    [*self.running, *(live.asked if live is not None else ())], num_returns=1, timeout=_LOOK_EVERY_S
                )
                for ref in self.running.keys() & set(done):
                    attempt = self.running.pop(ref)
                    outcome = self._outcome(ref, attempt)
                    workers.free(ref, alive=outcome is not None)
                    if outcome is not None:
                        result, counted = outcome
                        metrics.add(counted)
                        self.given_up_in_a_row = 0
                        left.one_less()
                        finished.append((attempt.position, result))
                if live is not None:
                    live.look(workers.ids(self.running))
            if self.given_up:
                raise self._lost()
        finally:
            workers.stop(self.running)
            if live is not None:
                live.stop()

    def _start(self, waiting: Iterator[tuple[int, Any]], workers: "_Tasks | _Actors") -> bool:
        """Give out as much as the cluster takes now; return whether anything is running."""
        num_workers, needs = self.num_workers()
        while len(self.running) < num_workers:
            if self.again:
                attempt = self.again.popleft()
            elif (following := next(waiting, None)) is not None:
                attempt = _Attempt(position=following[0], item=following[1])
            else:
                workers.let_go()
                break
            self.running[workers.start(attempt.item, needs)] = attempt
        return bool(self.running)

    def _outcome(self, ref: Any, attempt: _Attempt) -> tuple[Any, Totals] | None:
        """Return the result of an attempt that has ended, or None if its worker was lost: it is tried again or given up."""
        import ray

        lost = ray.exceptions
        try:
            outcome: tuple[Any, Totals] = ray.get(ref)
        except lost.RayTaskError as error:
            # The cause is the exception itself; Ray's own would hide its type.
            raise (_as_config_error(error.cause) if isinstance(error.cause, Exception) else error) from error
        except lost.RaySystemError as error:  # what it was to run, or to work on, could not be unpickled
            raise _as_config_error(error) from error
        except lost.RuntimeEnvSetupError as error:
            raise ConfigError(f"a node of the cluster cannot set up its worker processes: {_one_line(error)}") from None
        except (lost.NodeDiedError, lost.ObjectLostError) as error:
            self._retry(replace(attempt, num_node_losses=attempt.num_node_losses + 1), error)
        except (lost.WorkerCrashedError, lost.OutOfMemoryError, lost.RayActorError, lost.LocalRayletDiedError) as error:
            self._retry(replace(attempt, num_crashes=attempt.num_crashes + 1), error)
        else:
            return outcome
        return None

    def _retry(self, attempt: _Attempt, error: Exception) -> None:
        if attempt.num_crashes <= self.options.max_retries and attempt.num_node_losses <= _MAX_NODE_LOSSES:
            self.again.append(attempt)
            return
        name = f"partition {attempt.position}" if self.name_of is None else self.name_of(attempt.item)
        num_deaths = attempt.num_crashes + attempt.num_node_losses
        self.given_up.append(f"{name}: its worker died {num_deaths} times ({type(error).__name__})")
        self.given_up_in_a_row += 1
        if self.given_up_in_a_row >= _MAX_GIVEN_UP_IN_A_ROW:
            raise self._lost()

    def _lost(self) -> WorkerLost:
        more = f"; and {len(self.given_up) - 5} more" if len(self.given_up) > 5 else ""
        stopped = "; stopped, for nothing was finished between them" if self.given_up_in_a_row >= _MAX_GIVEN_UP_IN_A_ROW else ""
        return WorkerLost(
            f"{'; '.join(self.given_up[:5])}{more}{stopped}; if memory was short, use fewer --workers or smaller media. "
            "What is finished is kept"
        )


class _Tasks:
    """Workers that Ray chooses anew for each item; it keeps their processes."""

    def __init__(self, function: Any, collector: Any) -> None:
        import ray

        self._function, self._collector = function, collector
        self._task = ray.remote(_call)  # once: each `ray.remote` sends the function to the cluster anew
        self._ids: dict[Any, str] = {}

    def start(self, item: Any, needs: Needs) -> Any:
        """Give an item out and return the reference to its outcome."""
        name = os.urandom(8).hex()
        # Retries are counted by `_Run`.
        task = self._task.options(num_cpus=1, memory=needs.memory_bytes or None, max_retries=0, retry_exceptions=False)
        ref = task.remote(self._function, self._collector, name, item)
        self._ids[ref] = name
        return ref

    def ids(self, running: Iterable[Any]) -> list[str]:
        """Return the names under which attempts that are running report their progress."""
        return [self._ids[ref] for ref in running]

    def free(self, ref: Any, *, alive: bool) -> None:
        """Forget an attempt that has ended."""
        del self._ids[ref]

    def let_go(self) -> None:
        """Do nothing: Ray reuses or ends idle processes by itself."""

    def stop(self, running: Iterable[Any]) -> None:
        """End what is still running: the caller has stopped listening."""
        import ray

        for ref in running:
            _quietly(ray.cancel, ref, force=True)


class _Actors:
    """Workers that live as long as there is work: what they have on their GPU is loaded once."""

    def __init__(self, function: Any, collector: Any) -> None:
        import ray

        self._function, self._collector = function, collector
        self._actor = ray.remote(_Worker)
        self._idle: list[Any] = []
        self._busy: dict[Any, tuple[Any, str]] = {}

    def start(self, item: Any, needs: Needs) -> Any:
        """Give an item to an idle actor, or to a new one, and return the reference to its outcome."""
        if self._idle:
            actor = self._idle.pop()
        else:
            # A restart is a new actor, and retries are counted by `_Run`, as for tasks.
            options = {"num_cpus": 1, "num_gpus": needs.num_gpus, "memory": needs.memory_bytes or None, "max_restarts": 0}
            actor = self._actor.options(**options).remote()
        name = os.urandom(8).hex()
        ref = actor.call.remote(self._function, self._collector, name, item)
        self._busy[ref] = (actor, name)
        return ref

    def ids(self, running: Iterable[Any]) -> list[str]:
        """Return the names under which attempts that are running report their progress."""
        return [self._busy[ref][1] for ref in running]

    def free(self, ref: Any, *, alive: bool) -> None:
        """Keep the actor of an attempt that has ended for the next one, if it lives."""
        import ray

        actor, _ = self._busy.pop(ref)
        if alive:
            self._idle.append(actor)
        else:
            _quietly(ray.kill, actor)  # one that only could not be reached must not go on beside its successor

    def let_go(self) -> None:
        """End idle actors: there is no work for them, and an actor that waits for a GPU may have theirs."""
        import ray

        while self._idle:
            _quietly(ray.kill, self._idle.pop())

    def stop(self, running: Iterable[Any]) -> None:
        """End all actors."""
        import ray

        self.let_go()
        for actor, _ in self._busy.values():
            _quietly(ray.kill, actor)


class _Worker:
    """The actor."""

    def call(self, function: tuple[Any, str, str], collector: Any, name: str, item: Any) -> tuple[Any, Totals]:
        return _call(function, collector, name, item)


_FUNCTIONS: dict[str, Callable[[Any], Any]] = {}
"""In a worker process: the functions built so far. One key in practice; a cluster's worker may serve a second run."""


def _call(
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
        _FUNCTIONS.clear()  # an encoder is large and an earlier run's is not needed again
        work = _FUNCTIONS[cache_key] = build()
    report = _Reporter(collector, name)
    start_s = time.monotonic()
    with metrics.collecting(report) as counted:
        result = work(item)
    report.export(counted)
    _meter(metrics.PARTITION_SECONDS).observe(time.monotonic() - start_s)
    return result, counted


class _Reporter:
    """In a worker process: tells the driver and Prometheus, now and then, what an attempt has counted so far."""

    def __init__(self, collector: Any, name: str) -> None:
        self._collector, self._name, self._exported = collector, name, Totals()

    def __call__(self, counted: Totals) -> None:
        if self._collector is not None:
            # All of it each time, so that a lost message or a collector that was started anew costs nothing.
            _quietly(self._collector.push.remote, self._name, counted)
        self.export(counted)

    def export(self, counted: Totals) -> None:
        """Add what is new to the counters that Prometheus sees."""
        for (metric, values), value in counted.minus(self._exported).sums.items():
            _meter(metric).inc(value, tags=dict(zip(METRICS[metric].labels, values, strict=True)))
        self._exported = counted.copy()


_METERS: dict[str, Any] = {}


def _meter(name: str) -> Any:
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


class _Left:
    """The gauge of partitions that are not finished."""

    def __init__(self, num_items: int | None) -> None:
        self._num_left = num_items
        self._show()

    def one_less(self) -> None:
        """Count one more that is finished."""
        if self._num_left is not None:
            self._num_left -= 1
            self._show()

    def _show(self) -> None:
        import ray

        # A `ray://` client is no process of the cluster and has no metrics of its own.
        if self._num_left is not None and not ray.util.client.ray.is_connected():
            _meter(metrics.PARTITIONS_LEFT).set(self._num_left)


class _Live:
    """What unfinished partitions have counted, through a small actor that workers push to and the driver reads."""

    def __init__(self, on_progress: Callable[[Totals], None]) -> None:
        import ray

        self._on_progress = on_progress
        # Ray starts it anew, empty, if its node is lost; the next second's reports fill it.
        self.collector = ray.remote(_Collector).options(num_cpus=0, max_restarts=-1).remote()
        self._due_s = time.monotonic() + _LOOK_EVERY_S
        self.asked: list[Any] = []
        """The reference to an answer that has not come yet, or nothing."""

    def look(self, running: list[str]) -> None:
        """Tell what has come in about what is still running; ask again, at most once a second. Never waits."""
        import ray

        if self.asked and ray.wait(self.asked, timeout=0)[0]:
            try:
                latest = ray.get(self.asked.pop())
            except ray.exceptions.RayError as error:
                _log.debug("no progress this time: %s", _one_line(error))
            else:
                total = Totals()
                for name in latest.keys() & set(running):
                    total.add(latest[name])
                self._on_progress(total)
        if not self.asked and time.monotonic() >= self._due_s:
            self._due_s = time.monotonic() + _LOOK_EVERY_S
            self.asked.append(self.collector.read.remote(running))

    def stop(self) -> None:
        """End the actor."""
        import ray

        _quietly(ray.kill, self.collector)


class _Collector:
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


@contextmanager
def _session(options: RayOptions) -> Iterator[Callable[[], tuple[int, Needs]]]:
    """Connect to Ray, or start it, and yield what tells how many partitions to run at a time now; stop what was started."""
    for name, value in _DRIVER_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray

    ours = not ray.is_initialized()
    if ours:
        _keep_off_stdout()
        _start(ray, options)
    try:
        yield _Width(options).now
    finally:
        if ours:
            ray.shutdown()


class _Width:
    """How many partitions to run at a time, as the cluster is now."""

    def __init__(self, options: RayOptions) -> None:
        self._options = options
        self._due_s = 0.0
        self._told_s = time.monotonic() - _TELL_EVERY_S / 2  # an autoscaler gets half a minute before anything is said
        self._now = (1, Needs(memory_bytes=0))

    def now(self) -> tuple[int, Needs]:
        """Return the number, at least 1, and what each takes; asks the cluster at most once a second."""
        if time.monotonic() >= self._due_s:
            self._due_s = time.monotonic() + _LOOK_EVERY_S
            self._now = self._look()
        return self._now

    def _look(self) -> tuple[int, Needs]:
        nodes = _living_nodes()
        needs = needs_of(nodes, memory_bytes=self._options.memory_bytes_per_worker, num_gpus=self._options.num_gpus)
        num_fit = num_workers_that_fit(nodes, needs)
        if not num_fit and time.monotonic() - self._told_s >= _TELL_EVERY_S:
            self._told_s = time.monotonic()
            _log.warning("waiting: %s", describe_shortage(nodes, needs))
        # One is asked for even if none fits: that is what an autoscaler answers to.
        return max(1, num_fit if self._options.num_workers is None else self._options.num_workers), needs


def _living_nodes() -> list[Node]:
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _keep_off_stdout() -> None:
    """Log what Ray would print: for each lost worker or node, 20 lines of its own log on stdout, which is a command's output.

    Ray has no option for it. If a later version does it elsewhere, it prints again, and nothing else changes.
    """
    from ray._private import worker

    def log(data: dict[str, Any], **_: Any) -> None:
        _log.info("ray: %s", " ".join(data["lines"]).splitlines()[0])

    if hasattr(worker, "print_to_stdstream"):
        worker.print_to_stdstream = log


def _start(ray: Any, options: RayOptions) -> None:
    logging.getLogger("ray").setLevel(logging.ERROR)  # notes on how it protects its own ports, and the like
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False, "configure_logging": False}
    if options.address is not None:
        _check_reachable(options.address)
        is_client = "://" in options.address  # which takes none of the logging options
        try:
            ray.init(address=options.address, runtime_env={"env_vars": WORKER_ENVIRONMENT}, **({} if is_client else quiet))
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ConfigError(f"--address {options.address}: {_why_not_joined(error)}") from None
        return
    # Worker processes inherit the environment of the processes that Ray starts here.
    before = {name: os.environ.get(name) for name in WORKER_ENVIRONMENT}
    os.environ.update(WORKER_ENVIRONMENT)
    try:
        ray.init(
            address="local",
            num_cpus=options.num_workers,
            include_dashboard=options.dashboard,
            object_store_memory=128 << 20,  # only items and summaries go through it
            _temp_dir=_short_temp_folder(),
            _metrics_export_port=options.metrics_port,
            **quiet,
        )
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _why_not_joined(error: Exception) -> str:
    reason = _one_line(error)
    if "ersion mismatch" in reason:
        return f"the cluster has other versions of Ray or Python than this process; they must be the same: {reason}"
    return f"no Ray cluster there: {reason}"


def _as_config_error(error: Exception) -> Exception:
    """Return an exception of a worker as it is, but for a module that its node lacks."""
    import ray

    missing = re.search(r"No module named '([^']+)'", str(error))
    if missing is None or not isinstance(error, (ModuleNotFoundError, ray.exceptions.RaySystemError)):
        return error
    return ConfigError(
        f"a worker cannot import {missing[1]}: every node of the cluster needs omniprep and what it uses, in the versions "
        "of this process; put them into the nodes' image, or into the job's runtime environment"
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _quietly(function: Callable[..., Any], *arguments: Any, **options: Any) -> None:
    """Call what may fail without harm: there is nothing left to do about it."""
    import ray

    try:
        function(*arguments, **options)
    except (ray.exceptions.RayError, ValueError, ConnectionError) as error:
        _log.debug("%s: %s", getattr(function, "__name__", function), _one_line(error))


def _check_reachable(address: str) -> None:
    """Raise `ConfigError` at once where nothing listens; Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        return  # `auto` and the like name no port
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise ConfigError(f"--address {address}: no Ray cluster answers there: {error}") from None


def _short_temp_folder() -> str | None:
    """Return a folder for Ray's sockets if the default one would make their names too long."""
    default = Path(tempfile.gettempdir()) / "ray"
    return "/tmp/ray" if len(str(default)) > _MAX_SOCKET_PATH else None
