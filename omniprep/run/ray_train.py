"""Run one function on many workers of a Ray cluster that form one process group: training inside Ray Train.

Ray starts the processes, gives them their GPUs, makes the process group (gloo, and NCCL with GPUs) and, if asked to, starts
all of them anew when one is lost. The function is the same as under `torchrun`: it joins the group that it finds, saves and
resumes its own checkpoints. Nothing of Ray Train's own data, checkpoint or metric interfaces is used.
"""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from omniprep.errors import ConfigError, OmniPrepError
from omniprep.run.ray_cluster import DRIVER_ENVIRONMENT, WORKER_ENVIRONMENT, as_config_error, check_reachable, one_line

Arguments = TypeVar("Arguments")

_log = logging.getLogger(__name__)


class TrainingLost(OmniPrepError):
    """A worker died, or raised what is a bug, and was not started again."""


@dataclass(frozen=True, kw_only=True)
class RayTrainOptions:
    """How to train on Ray."""

    num_workers: int
    """Processes, which are ranks; with GPUs each has one."""
    folder: Path
    """A folder that all nodes share, such as the run's own; Ray keeps a few notes in it."""
    use_gpu: bool = False
    num_cpus_per_worker: int = 1
    address: str | None = None
    """Cluster to join (`auto`, `host:6379`); None: start Ray on this machine and stop it at the end."""
    max_restarts: int = 0
    """How often all workers are started anew after one of them failed; they go on from the last checkpoint."""
    timeout_s: float = 1800.0
    """How long a rank waits for the others in one exchange."""


def train_on_ray(main: Callable[[Arguments], object], arguments: Arguments, options: RayTrainOptions) -> None:
    """Call `main(arguments)` on every worker and return when all have; both must pickle, `main` by its name.

    Raises what `main` raised if it was an `OmniPrepError`, `TrainingLost` for anything else that ends a worker, and
    `ConfigError` if the cluster cannot be reached.
    """
    with _joined(options):
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        resources = {"CPU": float(options.num_cpus_per_worker)} | ({"GPU": 1.0} if options.use_gpu else {})
        _tell_if_too_large(resources, options.num_workers)
        trainer = TorchTrainer(
            _Main(main),
            train_loop_config={"arguments": arguments},
            # Beside NCCL, gloo: counts and the plans of checkpoints are exchanged between CPUs.
            torch_config=TorchConfig(
                backend="cpu:gloo,cuda:nccl" if options.use_gpu else "gloo", timeout_s=int(options.timeout_s)
            ),
            scaling_config=ScalingConfig(
                num_workers=options.num_workers, use_gpu=options.use_gpu, resources_per_worker=resources
            ),
            run_config=RunConfig(
                name="ray",
                storage_path=str(options.folder.absolute()),
                failure_config=FailureConfig(max_failures=options.max_restarts),
            ),
        )
        try:
            trainer.fit()
        except Exception as error:
            raise _what_ended_it(error) from error


class _Main:
    """`main` as Ray Train calls it. An object, for Ray Train looks at how many arguments a function takes."""

    def __init__(self, main: Callable[[Any], object]) -> None:
        self._main = main

    def __call__(self, config: dict[str, Any]) -> None:
        self._main(config["arguments"])


@contextmanager
def _joined(options: RayTrainOptions) -> Iterator[None]:
    """Join the cluster, or start one that has room for the workers; leave it at the end."""
    for name, value in DRIVER_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        yield
        return
    quiet = {"logging_level": logging.ERROR, "runtime_env": {"env_vars": WORKER_ENVIRONMENT}}
    if options.address is not None:
        check_reachable(options.address)
        try:
            ray.init(address=options.address, **quiet)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ConfigError(f"--address {options.address}: no Ray cluster there: {one_line(error)}") from None
    else:
        num_cpus = max(os.cpu_count() or 1, options.num_workers * options.num_cpus_per_worker)
        # With a dashboard: without, Ray Train warns every second that it has nobody to ask.
        ray.init(address="local", num_cpus=num_cpus, include_dashboard=True, object_store_memory=128 << 20, **quiet)
    try:
        yield
    finally:
        ray.shutdown()


def _tell_if_too_large(resources: dict[str, float], num_workers: int) -> None:
    """Warn where the cluster has no room now; an autoscaler may make some, so it is no error."""
    import ray

    there = ray.cluster_resources()
    short = [
        f"{amount * num_workers:g} {name} needed, {there.get(name, 0):g} there"
        for name, amount in resources.items()
        if there.get(name, 0) < amount * num_workers
    ]
    if short:
        _log.warning("waiting for the cluster to grow: %s for %d workers", "; ".join(short), num_workers)


def _what_ended_it(error: Exception) -> Exception:
    """Return the first error of a worker that says something, as our own kind of error."""
    causes = list(_causes(error))
    ours = next((cause for cause in causes if isinstance(cause, OmniPrepError)), None)
    if ours is not None:
        return ours
    first = as_config_error(causes[0])
    if isinstance(first, ConfigError):
        return first
    return TrainingLost(f"{type(first).__name__}: {one_line(first)}. Checkpoints are kept; run the same command again to go on")


def _causes(error: BaseException) -> Iterator[Exception]:
    """Yield what the workers raised, in the order of their ranks; else the error itself."""
    failures = getattr(error, "worker_failures", None)
    if failures:
        for _, failure in sorted(failures.items()):
            yield from _causes(failure)
        return
    inner = getattr(error, "cause", None) or error.__cause__
    if isinstance(inner, Exception):
        yield from _causes(inner)
    elif isinstance(error, Exception):
        yield error
