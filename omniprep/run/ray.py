"""Map over partitions on Ray: the only file that imports it.

One partition is one task. A worker process builds its function once and keeps it; no sample crosses the object store,
only items in and small results out. Ray gives a task whose worker died to another worker; a task's own exception is
re-raised here as it was.
"""

import logging
import os
import socket
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from omniprep.errors import ConfigError, OmniPrepError

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


class WorkerLost(OmniPrepError):
    """A partition's worker died again and again: the machine kills it, most often for its memory."""


@dataclass(frozen=True, kw_only=True)
class RayOptions:
    """How to run on Ray."""

    num_workers: int | None = None
    """Partitions at a time; None: one a CPU of the machine or cluster."""
    address: str | None = None
    """Cluster to join (`auto`, `ray://host:10001`, `host:6379`); None: start Ray in this process and stop it at the end."""
    max_retries: int = 3
    """How often a partition is given to another worker after its worker died."""
    dashboard: bool = False


def map_partitions(
    build: Callable[[], Callable[[Item], Result]], items: Sequence[Item], options: RayOptions | None = None, *, cache_key: str
) -> Iterator[tuple[int, Result]]:
    """Yield (position, result) of every item in the order in which they finish.

    `build` is called once in each worker process for each `cache_key`; it and the items must pickle. At most
    `num_workers` tasks are in flight. Raises what the function raises, `WorkerLost` when retries are used up, and
    `ConfigError` if the cluster cannot be reached.
    """
    options = options or RayOptions()
    if not items:
        return
    with _session(options) as num_workers:
        yield from _run(build, items, num_workers=min(num_workers, len(items)), options=options, cache_key=cache_key)


def _run(
    build: Callable[[], Callable[[Item], Result]],
    items: Sequence[Item],
    *,
    num_workers: int,
    options: RayOptions,
    cache_key: str,
) -> Iterator[tuple[int, Result]]:
    import ray

    task = ray.remote(_call).options(num_cpus=1, max_retries=options.max_retries, retry_exceptions=False)
    builder = ray.put(build)
    waiting = iter(enumerate(items))
    running: dict[Any, int] = {}
    while True:
        while len(running) < num_workers and (following := next(waiting, None)) is not None:
            position, item = following
            running[task.remote(builder, cache_key, item)] = position
        if not running:
            return
        (done, *_), _ = ray.wait(list(running), num_returns=1)
        position = running.pop(done)
        try:
            result = ray.get(done)
        except ray.exceptions.RayTaskError as error:
            # The cause is the exception itself; Ray's own would hide its type.
            raise (error.cause if isinstance(error.cause, Exception) else error) from error
        except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError, ray.exceptions.NodeDiedError) as error:
            raise WorkerLost(
                f"partition {position}: its worker died {options.max_retries + 1} times ({type(error).__name__}); "
                "if memory was short, use fewer --workers or smaller media"
            ) from None
        yield position, result


_FUNCTIONS: dict[str, Callable[[Any], Any]] = {}
"""In a worker process: the functions built so far. One key in practice; a cluster's worker may serve a second run."""


def _call(build: Callable[[], Callable[[Any], Any]], cache_key: str, item: Any) -> Any:
    function = _FUNCTIONS.get(cache_key)
    if function is None:
        _FUNCTIONS.clear()  # an encoder is large and an earlier run's is not needed again
        function = _FUNCTIONS[cache_key] = build()
    return function(item)


@contextmanager
def _session(options: RayOptions) -> Iterator[int]:
    """Connect to Ray, or start it, and yield how many partitions to run at a time; stop what was started."""
    for name, value in _DRIVER_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray

    ours = not ray.is_initialized()
    if ours:
        _start(ray, options)
    try:
        yield options.num_workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
    finally:
        if ours:
            ray.shutdown()


def _start(ray: Any, options: RayOptions) -> None:
    logging.getLogger("ray").setLevel(logging.ERROR)  # notes on how it protects its own ports, and the like
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False, "configure_logging": False}
    runtime = {"env_vars": WORKER_ENVIRONMENT}
    if options.address is not None:
        _check_reachable(options.address)
        try:
            ray.init(address=options.address, runtime_env=runtime, **quiet)
        except (ConnectionError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(f"--address {options.address}: no Ray cluster there: {reason}") from None
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
            **quiet,
        )
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


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
