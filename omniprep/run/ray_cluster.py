"""A Ray cluster: joined or started, how wide it is now, and its errors in words."""

import logging
import os
import re
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omniprep.errors import ConfigError
from omniprep.run.capacity import Needs, Node, describe_shortage, needs_of, num_workers_that_fit

WORKER_ENVIRONMENT = {
    # One thread a worker: the work is parallel over partitions, and thread pools would only fight for the same cores.
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "NUMEXPR_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "RAYON_NUM_THREADS": "1",
}
DRIVER_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # silences a warning about GPUs that tasks without GPUs do not see
}
_MAX_SOCKET_PATH = 60
"""Ray appends about 45 characters to its folder for socket names, which end at 107."""

_CONNECT_TIMEOUT_S = 10.0
LOOK_EVERY_S = 1.0
"""How often the driver looks at the cluster's nodes and at the progress of its tasks while none of them ends."""
_TELL_EVERY_S = 60.0
"""How often it is said that no node can take a task."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RayOptions:
    """How to run on Ray."""

    num_workers: int | None = None
    """Partitions at a time; None: as many as the CPUs and the memory of the machine or cluster hold at that time, and one
    more in a cluster's queue, for its autoscaler."""
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


@contextmanager
def session(options: RayOptions) -> Iterator[Callable[[], tuple[int, Needs]]]:
    """Connect to Ray, or start it, and yield what tells how many partitions to run at a time now; stop what was started."""
    for name, value in DRIVER_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray

    ours = not ray.is_initialized()
    if ours:
        _keep_off_stdout()
        with _sigterm_kept():
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
        self._told_narrow = False
        self._now = (1, Needs(memory_bytes=0))

    def now(self) -> tuple[int, Needs]:
        """Return the number, at least 1, and what each takes; asks the cluster at most once a second."""
        if time.monotonic() >= self._due_s:
            self._due_s = time.monotonic() + LOOK_EVERY_S
            self._now = self._look()
        return self._now

    def _look(self) -> tuple[int, Needs]:
        nodes = _living_nodes()
        needs = needs_of(nodes, memory_bytes=self._options.memory_bytes_per_worker, num_gpus=self._options.num_gpus)
        num_fit = num_workers_that_fit(nodes, needs)
        if not num_fit and time.monotonic() - self._told_s >= _TELL_EVERY_S:
            self._told_s = time.monotonic()
            _log.warning("waiting: %s", describe_shortage(nodes, needs))
        wanted = self._options.num_workers
        if wanted is not None and 0 < num_fit < wanted and not self._told_narrow:
            self._told_narrow = True
            _log.warning("%d workers were asked for; by CPUs and memory %d fit at a time now", wanted, num_fit)
        # One more than fits, even if none fits, waits in the queue of a cluster: that is what an autoscaler goes by.
        # Actors are not queued: they would keep their item until there is a GPU for them.
        queued = 1 if self._options.address is not None and not self._options.num_gpus else 0
        return max(1, num_fit + queued if wanted is None else wanted), needs


def _living_nodes() -> list[Node]:
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


@contextmanager
def _sigterm_kept() -> Iterator[None]:
    """Keep a handler of SIGTERM that the caller has set: Ray puts its own there, which prints a stack and exits with 15."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if callable(before) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


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
        check_reachable(options.address)
        try:
            ray.init(address=options.address, runtime_env={"env_vars": WORKER_ENVIRONMENT}, **quiet)
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
    reason = one_line(error)
    if "ersion mismatch" in reason:
        return f"the cluster has other versions of Ray or Python than this process; they must be the same: {reason}"
    return f"no Ray cluster there: {reason}"


def as_config_error(error: Exception) -> Exception:
    """Return an exception of a worker as it is, but for a module that its node lacks."""
    import ray

    missing = re.search(r"No module named '([^']+)'", str(error))
    of_import = isinstance(error, (ModuleNotFoundError, ray.exceptions.RaySystemError))
    # What Ray says, as a RuntimeError or as the death of an actor, where our own function cannot be imported.
    if missing is None or not (of_import or "failed to import on the worker" in str(error)):
        return error
    return ConfigError(
        f"a worker cannot import {missing[1]}: every node of the cluster needs omniprep and what it uses, in the versions "
        "of this process; put them into the nodes' image, or into the job's runtime environment"
    )


def one_line(error: Exception) -> str:
    """Return an error's message, cut, in one line."""
    return " ".join(str(error).split())[:300]


def quietly(function: Callable[..., Any], *arguments: Any, **options: Any) -> None:
    """Call what may fail without harm: there is nothing left to do about it."""
    import ray

    try:
        function(*arguments, **options)
    except (ray.exceptions.RayError, ValueError, ConnectionError) as error:
        _log.debug("%s: %s", getattr(function, "__name__", function), one_line(error))


def check_reachable(address: str) -> None:
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
