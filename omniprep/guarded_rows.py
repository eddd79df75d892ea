"""Rows through a process that may be killed: what is done with a row's content costs at most that row."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, NamedTuple, TypeVar

from omniprep.errors import Reason, RejectSample
from omniprep.recipe import GuardConfig
from omniprep.run import metrics
from omniprep.run.guard import Fault, Guard, GuardLimits
from omniprep.shards.writer import record_key
from omniprep.sources.partitions import Row

Result = TypeVar("Result")


class RowTask(NamedTuple):
    """A row on its way to the guarded process."""

    source: int
    """Position of its source in the recipe."""
    key: str
    row: Row


class GuardedRows(Generic[Result]):
    """Maps rows by a function that is built once in the guarded process. `close` it."""

    def __init__(self, build: Callable[[], Callable[[RowTask], Result]], config: GuardConfig) -> None:
        self._build, self._config = build, config
        self._guard: Guard[RowTask, Result] | None = None
        self._function: Callable[[RowTask], Result] | None = None

    def map(self, rows: Iterable[Row], *, source: int, source_name: str) -> Iterator[tuple[Row, Result | RejectSample]]:
        """Yield each row with its result, in order, or with the error of a row that its process did not survive."""
        waiting: deque[Row] = deque()

        def tasks() -> Iterator[RowTask]:
            for row in rows:
                waiting.append(row)
                yield RowTask(source=source, key=record_key(source_name, row.index), row=row)

        try:
            for outcome in self._outcomes(tasks()):
                row = waiting.popleft()
                if isinstance(outcome, Fault):
                    metrics.count(metrics.GUARD_RESTARTS, kind=outcome.kind)
                    yield row, _rejected(outcome)
                else:
                    yield row, outcome
        except Exception as error:
            if waiting:
                error.add_note(f"while preparing row {waiting[0].place} of source {source_name!r}")
            raise

    def _outcomes(self, tasks: Iterator[RowTask]) -> Iterator[Result | Fault]:
        if self._config.enabled:
            if self._guard is None:
                limits = GuardLimits(timeout_s=self._config.timeout_s, memory_bytes=self._config.memory_bytes)
                self._guard = Guard(self._build, limits)
            return self._guard.map(tasks)
        if self._function is None:
            self._function = self._build()
        return map(self._function, tasks)

    def hand_over(self, successor: "GuardedRows[Any]") -> None:
        """Leave the guarded process, with all that it has imported, to what maps the rows of another recipe."""
        if self._guard is not None and self._config == successor._config and successor._guard is None:
            successor._guard, self._guard = self._guard, None
            successor._guard.rebuild(successor._build)

    def close(self) -> None:
        """End the guarded process."""
        if self._guard is not None:
            self._guard.close()
            self._guard = None


_REASONS = {"timeout": Reason.TIMED_OUT, "crash": Reason.CRASHED, "memory": Reason.OUT_OF_MEMORY}
_ADVICE = {
    "timeout": "look at the record; if its media are only long, raise `run.guard.timeout_s`",
    "crash": "a decoder crashed on it; mend or drop its media",
    "memory": "mend or cut its media, or raise `run.guard.memory_bytes`",
}


def _rejected(fault: Fault) -> RejectSample:
    return RejectSample(_REASONS[fault.kind], f"{fault.detail}; {_ADVICE[fault.kind]}")
