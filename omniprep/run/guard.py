"""A function over items in a process that can be killed.

```
parent ── build ──> nursery ── fork ──> child        the nursery starts once (seconds), a child in milliseconds
   └──────── batches of items ────────────>
   <──────── answers, one by one ──────────┘
```

A decoder that hangs, crashes or eats memory costs one item. The parent waits for each answer with a time limit and an eye on
the child's memory; what breaks a limit is killed, the item at fault gets a `Fault` for an outcome, and the rest of its batch
goes to the next child.

An item is charged with a crash, or with memory, only for what it does in a child that has done nothing else: one at fault in
a child with a past is tried once more in a fresh one. So a leak or a broken heap left by one item is not
charged to another, and outcomes do not depend on what came before. A function may therefore see an item twice.

`docs/decisions/0009-guard.md` says why it is built so and what it costs.
"""

import fcntl
import os
import pickle
import resource
import select
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, Literal, TypeVar

from omniprep.run.frames import Frame, FrameReader, PipeClosed, num_bytes_of, to_frame, write_frames
from omniprep.run.nursery import BUILD, FORK, KILL, START, WAIT, Answer
from omniprep.run.ray import WORKER_ENVIRONMENT

Item = TypeVar("Item")
Result = TypeVar("Result")

_MAX_BATCH_ITEMS = 64
_MAX_BATCH_BYTES = 1 << 20
"""A batch ends with the item that reaches it, so one large item is read ahead, not many."""
_POLL_S = 0.05
"""How often a child's memory is looked at while its answer is awaited."""
_CLOSE_TIMEOUT_S = 10.0
_START_TIMEOUT_S = 60.0
"""For a fork on a machine that is short of memory."""
_MAX_FAILED_STARTS = 3
_MAX_PIPES_BYTES = 32 << 20
"""For the answers of all workers of a machine: Linux allows a user 64 MiB of pipes before it makes new ones tiny."""


@dataclass(frozen=True, kw_only=True)
class GuardLimits:
    """What one item may take."""

    timeout_s: float = 300.0
    """From the moment the child starts it."""
    memory_bytes: int = 4 << 30
    """Memory that work may add to a child. Pages of mapped files do not count: the kernel can take them back."""

    def __post_init__(self) -> None:
        if self.timeout_s <= 0 or self.memory_bytes <= 0:
            raise ValueError(f"limits must be positive, got {self.timeout_s = } and {self.memory_bytes = }")


@dataclass(frozen=True, kw_only=True)
class Fault:
    """The outcome of an item whose process had to be given up."""

    kind: Literal["timeout", "crash", "memory"]
    detail: str
    """One line for a person."""


class Guard(Generic[Item, Result]):
    """Maps a function over items in a process that can be killed; a context manager that leaves nothing behind.

    `build` makes the function, once, in the nursery: it must pickle, be importable and start no threads, and should import
    what the function needs, or every child has to. Items and results must pickle. Nothing is started before the first item.
    """

    def __init__(self, build: Callable[[], Callable[[Item], Result]], limits: GuardLimits | None = None) -> None:
        self._build = build
        self._limits = limits or GuardLimits()
        self._nursery: _Nursery | None = None
        self._child: _Child | None = None
        self._num_children = 0
        self._num_failed_starts = 0
        self._busy = False

    @property
    def num_restarts(self) -> int:
        """How many children were started after the first."""
        return max(0, self._num_children - 1)

    def map(self, items: Iterable[Item]) -> Iterator[Result | Fault]:
        """Yield exactly one outcome for each item, in order; reads at most a batch ahead.

        An exception of the function (or of `build`) is raised here as it was, with its traceback as a note, and ends the
        map. Raises `RuntimeError` if no process can be started or kept.
        """
        if self._busy:
            raise RuntimeError("a guard runs one map at a time: finish or close the other first")
        self._busy = True
        pending: deque[Frame] = deque()
        try:
            for batch in _batches(items):
                pending.extend(batch)
                while pending:
                    yield from self._run(pending)
        finally:
            self._busy = False
            if pending:
                self.close()  # left in the middle: what a child still says belongs to no one

    def rebuild(self, build: Callable[[], Callable[[Item], Result]]) -> None:
        """Map another function from here on; the nursery keeps what it has imported."""
        if self._busy:
            raise RuntimeError("a guard runs one map at a time: finish or close the other first")
        self._build = build
        child, self._child = self._child, None
        try:
            if child is not None and self._nursery is not None:
                child.close()
                self._nursery.end_child(kill=False)
            if self._nursery is not None:
                self._nursery.introduce(build, self._limits)
        except PipeClosed:
            self.close()  # it was lost since: the next map starts another

    def close(self) -> None:
        """End all processes. A later `map` starts them anew."""
        child, self._child = self._child, None
        nursery, self._nursery = self._nursery, None
        if child is not None:
            child.close()
        if nursery is not None:
            nursery.close()

    def __enter__(self) -> "Guard[Item, Result]":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _run(self, pending: deque[Frame]) -> Iterator[Result | Fault]:
        """Give all pending items to a child and yield outcomes until none is left or the child is lost."""
        child = self._living_child()
        try:
            child.send(pending)
            while pending:
                result: Result = child.receive()
                self._num_failed_starts = 0
                pending.popleft()
                yield result
        except PipeClosed:
            fault = self._give_up(None)
        except _Exceeded as exceeded:
            fault = self._give_up(exceeded.fault)
        else:
            return
        if fault is not None and (fault.kind == "timeout" or not child.num_answers):
            pending.popleft()
            yield fault

    def _give_up(self, fault: Fault | None) -> Fault | None:
        """End the child; return the fault, for a closed pipe how it ended, or None if it was lost with the nursery."""
        assert self._child is not None
        assert self._nursery is not None
        self._child.close()
        self._child = None
        try:
            code = self._nursery.end_child(kill=fault is not None)
        except PipeClosed:
            self._start_failed()
            return None
        self._num_failed_starts = 0
        return fault or Fault(kind="crash", detail=_describe_end(code))

    def _living_child(self) -> "_Child":
        while self._child is None:
            if self._nursery is None:
                self._nursery = _Nursery(self._build, self._limits)
            try:
                self._child = self._nursery.start_child(self._limits)
                self._num_children += 1
            except (PipeClosed, _Exceeded):
                self._start_failed()
        return self._child

    def _start_failed(self) -> None:
        """Count a nursery or child that ended before it had an item, and let the next one be started anew."""
        code = self._nursery.close() if self._nursery is not None else None
        self._nursery = None
        self._num_failed_starts += 1
        if self._num_failed_starts >= _MAX_FAILED_STARTS:
            self._num_failed_starts = 0
            end = "" if code in (None, 0) else f" (the last {_describe_end(code)})"
            raise RuntimeError(
                f"the process that guards the work was lost {_MAX_FAILED_STARTS} times in a row, with nothing done{end}; "
                "what it wrote to standard error says more. If the machine is short of memory or processes, use fewer workers"
            )


class _Exceeded(Exception):
    """A child broke a limit, or says that it cannot go on."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.detail)
        self.fault = fault


class _Nursery:
    """The process that forks children, seen from the parent."""

    def __init__(self, build: Callable[[], Any], limits: GuardLimits) -> None:
        self.introduce(build, limits)
        self._control, theirs = socket.socketpair()
        self._answers = FrameReader(self._control.fileno())
        try:
            with theirs:
                arguments = [str(theirs.fileno()), str(os.getpid()), *sys.path]
                self._process = subprocess.Popen(
                    # -P: a file in the current folder must not stand in for a module that is needed before the path is set.
                    [sys.executable, "-P", "-c", START, *arguments],
                    stdin=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    env={**os.environ, **WORKER_ENVIRONMENT},
                    start_new_session=True,  # signals from the terminal are for the parent
                )
        except BaseException:
            self._control.close()
            raise

    def introduce(self, build: Callable[[], Any], limits: GuardLimits) -> None:
        """Say what children are to run from here on. It is built with the first of them; there must be none now."""
        self._introduction: Frame = [BUILD, *to_frame((limits.memory_bytes, pickle.dumps(build)))]
        self._ready = False

    def start_child(self, limits: GuardLimits) -> "_Child":
        """Fork a child and wait until it is ready. Raises what `build` raised, `PipeClosed` and `_Exceeded`."""
        if not self._ready:
            write_frames(self._control.fileno(), [self._introduction])
            _unwrap(self._answers.read_value())
            self._ready = True
        items_theirs, items = os.pipe()
        answers, answers_theirs = os.pipe()
        try:
            _widen(answers_theirs)
            socket.send_fds(self._control, [FORK], [items_theirs, answers_theirs])
            child = _Child(self._answers.read_value(), items_fd=items, answers_fd=answers, limits=limits)
        except BaseException as error:
            os.close(items)
            os.close(answers)
            if isinstance(error, ConnectionError):
                raise PipeClosed from None
            raise
        finally:
            os.close(items_theirs)
            os.close(answers_theirs)
        try:
            child.greet()
        except BaseException:
            child.close()
            raise
        return child

    def end_child(self, *, kill: bool) -> int:
        """Return the child's exit code, which is negative for a signal. Raises `PipeClosed`."""
        write_frames(self._control.fileno(), [[KILL if kill else WAIT]])
        code: int = self._answers.read_value()
        return code

    def close(self) -> int:
        """End the nursery and its child, and return its exit code."""
        self._control.close()
        if not self._ready:
            self._process.kill()  # it may be building for long, and has no child
        try:
            return self._process.wait(timeout=_CLOSE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()


class _Child:
    """The process that does the work, seen from the parent."""

    def __init__(self, pid: int, *, items_fd: int, answers_fd: int, limits: GuardLimits) -> None:
        self.num_answers = 0
        self._items_fd, self._answers_fd = items_fd, answers_fd
        self._limits = limits
        self._memory = _Memory(pid)
        self._first_bytes = 0
        self._answers = FrameReader(answers_fd, self._wait)
        self._poll = select.poll()
        self._poll.register(answers_fd, select.POLLIN)
        self._timeout_s = limits.timeout_s
        self._deadline = 0.0

    def greet(self) -> None:
        """Wait until the child is ready for items."""
        self._timeout_s, limit_s = _START_TIMEOUT_S, self._timeout_s
        self._first_bytes = self._memory.read()
        self._receive()
        self._first_bytes = self._memory.read()
        self._timeout_s = limit_s

    def send(self, batch: Iterable[Frame]) -> None:
        """Hand over a batch. Raises `PipeClosed`."""
        frames = list(batch)
        write_frames(self._items_fd, [to_frame(len(frames)), *frames])

    def receive(self) -> Any:
        """Return the next result. Raises `PipeClosed`, `_Exceeded`, and what the function raised."""
        result = self._receive()
        self.num_answers += 1
        return result

    def close(self) -> None:
        """Close the pipes, at which an idle child ends."""
        os.close(self._items_fd)
        os.close(self._answers_fd)
        self._memory.close()

    def _receive(self) -> Any:
        self._deadline = time.monotonic() + self._timeout_s
        return _unwrap(self._answers.read_value())

    def _wait(self) -> None:
        """Return when there is something to read; raise `_Exceeded` when a limit is broken first."""
        while True:
            left_s = self._deadline - time.monotonic()
            if self._poll.poll(max(0.0, min(_POLL_S, left_s)) * 1000):
                return
            if left_s <= _POLL_S and time.monotonic() >= self._deadline:
                raise _Exceeded(Fault(kind="timeout", detail=f"no result within {self._timeout_s:g} s"))
            if self._memory.read() - self._first_bytes > self._limits.memory_bytes:
                limit = f"{self._limits.memory_bytes / 2**30:.3g} GiB"
                raise _Exceeded(Fault(kind="memory", detail=f"took more than {limit} of memory"))


class _Memory:
    """How much memory of its own a process has; 0 where the system does not say."""

    def __init__(self, pid: int) -> None:
        self._fd: int | None = None
        with suppress(OSError):
            self._fd = os.open(f"/proc/{pid}/statm", os.O_RDONLY)

    def read(self) -> int:
        if self._fd is None:
            return 0
        try:
            _, resident, shared, *_ = os.pread(self._fd, 200, 0).split()
        except (OSError, ValueError):
            return 0  # it has ended, which the pipe will say
        return (int(resident) - int(shared)) * resource.getpagesize()

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def _batches(items: Iterable[Any]) -> Iterator[list[Frame]]:
    """Yield items, pickled, in batches bounded by number and bytes."""
    batch: list[Frame] = []
    num_bytes = 0
    for item in items:
        frame = to_frame(item)
        batch.append(frame)
        num_bytes += num_bytes_of(frame)
        if len(batch) == _MAX_BATCH_ITEMS or num_bytes >= _MAX_BATCH_BYTES:
            yield batch
            batch, num_bytes = [], 0
    if batch:
        yield batch


def _unwrap(answer: tuple[Answer, Any]) -> Any:
    """Return the result in an answer. Raises the exception in it, or `_Exceeded` with the fault in it."""
    kind, value = answer
    if kind is Answer.RAISED:
        error, words = value
        error.add_note(f"In the guarded process:\n{words}")
        raise error
    if kind is Answer.FAULT:
        fault_kind, detail = value
        raise _Exceeded(Fault(kind=fault_kind, detail=detail))
    return value


def _describe_end(code: int) -> str:
    """Return how a process ended, in words.

    >>> _describe_end(-11), _describe_end(3)
    ('killed by signal 11 (SIGSEGV)', 'ended with exit code 3')
    """
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = "unnamed"
    advice = "; the machine may be short of memory" if -code == signal.SIGKILL else ""
    return f"killed by signal {-code} ({name}){advice}"


def _widen(fd: int) -> None:
    """Make a pipe as large as useful and polite, where that can be said: frames and sound come in megabytes."""
    if hasattr(fcntl, "F_SETPIPE_SZ"):
        with suppress(OSError):
            fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, min(1 << 20, _MAX_PIPES_BYTES // (os.cpu_count() or 1)))
