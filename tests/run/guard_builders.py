"""Functions that misbehave in every way a decoder can, for a guard to run."""

import ctypes
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from omniprep.errors import ConfigError, Reason, RejectSample

KEPT: list[Any] = []
"""What a leaking function never gives back."""


class Unusual(Exception):
    """An exception whose arguments are not those of its constructor."""

    def __init__(self, first: int, *, second: int) -> None:
        super().__init__(f"{first} and {second}")


class Panic(BaseException):
    """What a library in Rust raises when it is broken."""


def build_work():
    return work


def build_in(folder: Path):
    """Leave a mark for every time that the function is built."""
    with (folder / "built").open("a") as marks:
        marks.write("x")
    return work


def build_missing_tokenizer():
    raise ConfigError("tokenizer: no such file")


def build_threads():
    threading.Thread(target=time.sleep, args=(100,), daemon=True, name="pool-0").start()
    return work


def build_nothing():
    os._exit(7)


def build_forever(folder: Path):
    (folder / "pids").write_text(f"{os.getpid()}\n")
    while True:
        time.sleep(0.1)


def work(item: Any) -> Any:
    """Do what an item says: `(verb, argument...)`, or return anything else as it is."""
    match item:
        case ("segfault",):
            ctypes.string_at(0)
        case ("abort",):
            os.abort()
        case ("exit", code):
            os._exit(code)
        case ("sys.exit", code):
            sys.exit(code)
        case ("kill", number):
            os.kill(os.getpid(), number)
        case ("kill nursery",):
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(10)
        case ("panic",):
            raise Panic("index out of bounds")
        case ("loop in python",):
            while True:
                pass
        case ("loop in C",):
            sum(itertools.repeat(0))
        case ("sleep", seconds):
            time.sleep(seconds)
        case ("eat", num_bytes):
            eaten = [bytearray(b"x") * (1 << 20) for _ in range(num_bytes >> 20)]
            time.sleep(10)
            return len(eaten)
        case ("allocate", num_bytes):
            return len(bytearray(num_bytes))
        case ("leak", num_bytes):
            KEPT.append(bytearray(b"x") * num_bytes)
            time.sleep(0.12)  # long enough for a look at the memory
        case ("crash later", after_s, num_bytes):
            threading.Timer(after_s, os.abort).start()
            return bytes(num_bytes)
        case ("reject", detail):
            raise RejectSample(Reason.MEDIA_CORRUPT, detail, retryable=True)
        case ("unusual",):
            raise Unusual(1, second=2)
        case ("lambda",):
            return lambda: 0
        case ("bytes", num_bytes):
            return bytes(num_bytes)
        case ("double", array):
            return {"array": array * 2}
        case ("limits",):
            import resource

            return {
                "pid": os.getpid(),
                "nursery": os.getppid(),
                "session": os.getsid(0),
                "core": resource.getrlimit(resource.RLIMIT_CORE)[0],
                "oom": Path("/proc/self/oom_score_adj").read_text().strip(),
                "omp": os.environ["OMP_NUM_THREADS"],
                "folder": str(Path.cwd()),
                "path": list(sys.path),
            }
        case ("hang with a program" | "crash with a program" as verb, folder):
            program = subprocess.Popen(["sleep", "1000"])
            (Path(folder) / "pids").write_text(f"{os.getpid()}\n{os.getppid()}\n{program.pid}\n")
            if verb.startswith("crash"):
                os.abort()
            sum(itertools.repeat(0))
        case ("leave a mark", path):
            with Path(path).open("a") as marks:
                marks.write("x")
        case ("print", text):
            print(text)
    return item


def is_running(pid: int) -> bool:
    """Return whether a process exists and is not just waiting to be buried."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def guarded_partition(items: list[Any]) -> list[Any]:
    """What a Ray worker does with a partition."""
    from omniprep.run.guard import Guard, GuardLimits

    with Guard(build_work, GuardLimits(timeout_s=1.0)) as guard:
        return list(guard.map(items))


def build_guarded_partition():
    return partial(guarded_partition)


def array_in(order: str) -> np.ndarray:
    """Return an array with its values in an order: C, F, or every second one."""
    array = np.arange(300_000, dtype=np.float32).reshape(300, 1000)
    return array[:, ::2] if order == "strided" else np.array(array, order=order)
