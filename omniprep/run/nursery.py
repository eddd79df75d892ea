"""The other side of `guard`: a process that builds the function once and forks a child for every time it is needed.

It is started as a program of its own, by `START`, and runs one thread. The parent asks it over a socket: to build a
function, for a child with given pipes, or for the end of the child, which only it can wait for. It ends when the parent does.

A child reads a whole batch of items before it answers the first, so both sides never write at the same time.
"""

import ctypes
import faulthandler
import gc
import os
import pickle
import resource
import select
import signal
import socket
import sys
import threading
import time
import traceback
import warnings
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from enum import Enum, auto
from pathlib import Path
from typing import Any, NoReturn

from omniprep.run.frames import Frame, FrameReader, PipeClosed, to_frame, write_frames

START = "import sys; sys.path[:] = sys.argv[3:]; from omniprep.run.nursery import main; main(*map(int, sys.argv[1:3]))"
"""Run with `python -P -c`, and the socket, the parent's process id and the parent's `sys.path` as arguments."""

BUILD, FORK, WAIT, KILL = b"B", b"F", b"W", b"K"
"""What the parent asks for: the function that children run from now on (with the memory that they may add and what builds
it); a child; the exit code of one that seems to have ended; the end of one."""

_WAIT_S = 2.0
"""How long a child that closed its pipe may take to end: a large one gives back its memory first."""
_KILL_S = 5.0
"""How long a killed child may take: one that waits for a dead network drive may not end at all, and is left behind."""
_ORPHAN_CHECK_S = 2.0
"""How often to look whether the parent lives, should another process hold its end of the socket open."""
_PR_SET_PDEATHSIG = 1


class Answer(Enum):
    """What a child, or the nursery about its function, may say."""

    READY = auto()
    RESULT = auto()
    RAISED = auto()
    """With the exception and its traceback in words."""
    FAULT = auto()
    """With the kind and detail of a `Fault`; the child ends."""


def main(socket_fd: int, parent: int) -> None:
    """Build what the parent asks for and fork children for it until it closes the socket or ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    faulthandler.disable()
    with suppress(OSError):
        os.dup2(2, 1)  # standard output belongs to the command
    # Python 3.12 warns of native threads too; Arrow's allocator has one, and it is made to be forked.
    warnings.filterwarnings("ignore", message=".*fork.*", category=DeprecationWarning)
    sys.argv = [""]
    with socket.socket(fileno=socket_fd) as control, suppress(PipeClosed, ConnectionError):
        _serve(control, parent=parent)


def _build(build: bytes) -> Callable[[Any], Any]:
    gc.unfreeze()
    try:
        function: Callable[[Any], Any] = pickle.loads(build)()
    except AttributeError as error:
        if "__main__" in str(error):
            raise TypeError(f"{error}: what builds a guarded function must be in a module that can be imported") from None
        raise
    if threading.active_count() > 1:
        names = ", ".join(thread.name for thread in threading.enumerate())
        raise RuntimeError(f"building a guarded function started threads ({names}), which a forked child would lack")
    gc.collect()
    gc.freeze()  # the collector of a child would touch, and so copy, every page
    return function


def _serve(control: socket.socket, *, parent: int) -> None:
    function: Callable[[Any], Any] | None = None
    memory_bytes = child = 0
    poll = select.poll()
    poll.register(control, select.POLLIN)
    try:
        while True:
            while not poll.poll(_ORPHAN_CHECK_S * 1000):
                if os.getppid() != parent:
                    return
            command, fds, _, _ = socket.recv_fds(control, 1, 2)
            if not command:
                return
            if command == BUILD:
                function = None  # two at once would take the memory of both
                memory_bytes, build = FrameReader(control.fileno()).read_value()
                try:
                    function = _build(build)
                    answer = to_frame((Answer.READY, None))
                except Exception as error:
                    answer = _raised(error)
            elif command == FORK:
                assert function is not None
                child = _fork(control, function, fds, memory_bytes=memory_bytes)
                answer = to_frame(child)
            else:
                code, child = _end(child, grace_s=_WAIT_S if command == WAIT else 0.0), 0
                answer = to_frame(code)
            write_frames(control.fileno(), [answer])
    finally:
        if child:
            _end(child, grace_s=0.0)


def _fork(control: socket.socket, function: Callable[[Any], Any], fds: list[int], *, memory_bytes: int) -> int:
    """Fork a child that works on the pipes `fds`, and return its process id."""
    nursery = os.getpid()
    child = os.fork()
    if child == 0:
        control.close()
        for fd in fds:
            os.set_inheritable(fd, False)  # a program that it leaves behind must not keep its pipe open
        _work(function, *fds, nursery=nursery, memory_bytes=memory_bytes)
    for fd in fds:
        os.close(fd)
    with suppress(OSError):  # the child does the same: whoever comes first
        os.setpgid(child, child)
    return child


def _end(child: int, *, grace_s: float) -> int:
    """Return a child's exit code (negative: the signal), killing it and all that it started after `grace_s`."""
    code = _wait_for(child, timeout_s=grace_s)
    _kill_group(child)  # with the programs that it had started
    if code is None:
        code = _wait_for(child, timeout_s=_KILL_S)
    return -signal.SIGKILL if code is None else code


def _wait_for(child: int, *, timeout_s: float) -> int | None:
    deadline = time.monotonic() + timeout_s
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= deadline:
            return None
        time.sleep(0.0005)


def _kill_group(child: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)


def _work(function: Callable[[Any], Any], items_fd: int, answers_fd: int, *, nursery: int, memory_bytes: int) -> NoReturn:
    """Be a child: answer batches of items until the pipe is closed."""
    code = 1
    try:
        _limit(nursery=nursery, memory_bytes=memory_bytes)
        write_frames(answers_fd, [to_frame((Answer.READY, None))])
        items = FrameReader(items_fd)
        while True:
            batch = deque(items.read_pickle() for _ in range(items.read_value()))
            while batch:
                kind, frame = _answer(function, batch)
                write_frames(answers_fd, [frame])
                if kind is Answer.FAULT:
                    os._exit(code)
    except PipeClosed:
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _limit(*, nursery: int, memory_bytes: int) -> None:
    """Be the process that the kernel kills first, die with the nursery, and fail to allocate far above the limit."""
    with suppress(OSError):
        os.setpgid(0, 0)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != nursery:
            os._exit(1)
        with suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("1000")
        num_data_pages = int(Path("/proc/self/statm").read_text().split()[5])
        # The parent looks at resident memory, and now and then; this stops a sudden allocation.
        most = num_data_pages * resource.getpagesize() + memory_bytes * 3 // 2
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_DATA, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def _answer(function: Callable[[Any], Any], batch: deque[bytes | bytearray]) -> tuple[Answer, Frame]:
    """Take the first item of a batch and return the kind of its answer and the answer."""
    try:
        result = function(pickle.loads(batch.popleft()))
        return Answer.RESULT, _result(result)
    except MemoryError as error:
        return Answer.FAULT, to_frame((Answer.FAULT, ("memory", f"an allocation failed: {str(error) or 'MemoryError'}"[:300])))
    except Exception as error:
        return Answer.RAISED, _raised(error)
    except SystemExit:
        raise
    except BaseException as error:  # a panic of a library in Rust: as much as a crash
        return Answer.FAULT, to_frame((Answer.FAULT, ("crash", " ".join(f"{type(error).__name__}: {error}".split())[:300])))


def _result(result: object) -> Frame:
    try:
        return to_frame((Answer.RESULT, result))
    except MemoryError:
        raise
    except Exception as error:
        raise TypeError(f"the result of a guarded function must pickle, but {type(result).__name__} does not: {error}") from error


def _raised(error: Exception) -> Frame:
    """Return an exception as an answer; one that cannot be pickled and read again becomes a `RuntimeError` with its words."""
    words = "".join(traceback.format_exception(error)).rstrip()
    try:
        frame = to_frame((Answer.RAISED, (error, words)))
        pickle.loads(pickle.dumps(error))
    except Exception:
        return to_frame((Answer.RAISED, (RuntimeError(f"{type(error).__qualname__}: {error}"), words)))
    return frame
