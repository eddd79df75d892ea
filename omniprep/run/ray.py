"""Map over partitions on Ray. Only the files of this folder whose names begin with `ray` import it.

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
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import omniprep
from omniprep.errors import ConfigError, OmniPrepError
from omniprep.run import metrics
from omniprep.run.capacity import Needs
from omniprep.run.metrics import Totals
from omniprep.run.ray_cluster import LOOK_EVERY_S, WORKER_ENVIRONMENT, RayOptions, as_config_error, one_line, quietly, session
from omniprep.run.ray_worker import Collector, Worker, call, meter

__all__ = ["WORKER_ENVIRONMENT", "RayOptions", "WorkerLost", "map_partitions"]

Item = TypeVar("Item")
Result = TypeVar("Result")

_MAX_NODE_LOSSES = 5
"""How often a partition may lose its node. More than that, and it may be what takes the nodes down."""
_MAX_GIVEN_UP_IN_A_ROW = 10
"""Partitions given up one after the other, none finished between them: the rest would fare no better."""

_log = logging.getLogger(__name__)


class WorkerLost(OmniPrepError):
    """A partition's worker died again and again: the machine kills it, most often for its memory."""


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
    with session(options) as num_workers:
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
                    [*self.running, *(live.asked if live is not None else ())], num_returns=1, timeout=LOOK_EVERY_S
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
            raise (as_config_error(error.cause) if isinstance(error.cause, Exception) else error) from error
        except lost.RaySystemError as error:  # what it was to run, or to work on, could not be unpickled
            raise as_config_error(error) from error
        except lost.RuntimeEnvSetupError as error:
            raise ConfigError(f"a node of the cluster cannot set up its worker processes: {one_line(error)}") from None
        except (lost.NodeDiedError, lost.ObjectLostError) as error:
            self._retry(replace(attempt, num_node_losses=attempt.num_node_losses + 1), error)
        except (lost.WorkerCrashedError, lost.OutOfMemoryError, lost.RayActorError, lost.LocalRayletDiedError) as error:
            if isinstance(told := as_config_error(error), ConfigError):
                raise told from None
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
        self._task = ray.remote(call)  # once: each `ray.remote` sends the function to the cluster anew
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
            quietly(ray.cancel, ref, force=True)


class _Actors:
    """Workers that live as long as there is work: what they have on their GPU is loaded once."""

    def __init__(self, function: Any, collector: Any) -> None:
        import ray

        self._function, self._collector = function, collector
        self._actor = ray.remote(Worker)
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
            quietly(ray.kill, actor)  # one that only could not be reached must not go on beside its successor

    def let_go(self) -> None:
        """End idle actors: there is no work for them, and an actor that waits for a GPU may have theirs."""
        import ray

        while self._idle:
            quietly(ray.kill, self._idle.pop())

    def stop(self, running: Iterable[Any]) -> None:
        """End all actors."""
        import ray

        self.let_go()
        for actor, _ in self._busy.values():
            quietly(ray.kill, actor)


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
            meter(metrics.PARTITIONS_LEFT).set(self._num_left)


class _Live:
    """What unfinished partitions have counted, through a small actor that workers push to and the driver reads."""

    def __init__(self, on_progress: Callable[[Totals], None]) -> None:
        import ray

        self._on_progress = on_progress
        # Ray starts it anew, empty, if its node is lost; the next second's reports fill it.
        self.collector = ray.remote(Collector).options(num_cpus=0, max_restarts=-1).remote()
        self._due_s = time.monotonic() + LOOK_EVERY_S
        self.asked: list[Any] = []
        """The reference to an answer that has not come yet, or nothing."""

    def look(self, running: list[str]) -> None:
        """Tell what has come in about what is still running; ask again, at most once a second. Never waits."""
        import ray

        if self.asked and ray.wait(self.asked, timeout=0)[0]:
            try:
                latest = ray.get(self.asked.pop())
            except ray.exceptions.RayError as error:
                _log.debug("no progress this time: %s", one_line(error))
            else:
                total = Totals()
                for name in latest.keys() & set(running):
                    total.add(latest[name])
                self._on_progress(total)
        if not self.asked and time.monotonic() >= self._due_s:
            self._due_s = time.monotonic() + LOOK_EVERY_S
            self.asked.append(self.collector.read.remote(running))

    def stop(self) -> None:
        """End the actor."""
        import ray

        quietly(ray.kill, self.collector)
