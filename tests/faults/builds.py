"""Builds as a user starts them, what may be done to their processes, and how their records are counted afterwards."""

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from omniprep.prepare import prepare as build
from omniprep.recipe import load_recipe
from omniprep.shards.manifest import Manifest
from omniprep.shards.quarantine import QUARANTINE_FOLDER
from omniprep.storage.folder import Folder, open_folder

on_each_executor = pytest.mark.parametrize(
    "how", [pytest.param((), id="serial"), pytest.param(("--workers", "2"), id="ray", marks=pytest.mark.ray)]
)
"""Gives a test `how`, to be handed to `prepare`."""
BROKEN_DECODERS = Path(__file__).with_name("broken_decoders")
WAIT_S = 300.0
"""It only ends what hangs: Ray alone takes ten seconds to start on two cores, and more beside other work."""


def wait_until(true: Callable[[], Any], *, within_s: float = WAIT_S) -> None:
    deadline = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


def omniprep(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "omniprep", *map(str, arguments)]


def prepare(recipe: Path, out: object, *more: object) -> list[str]:
    return omniprep("prepare", recipe, "--out", out, *(more or ("--executor", "serial")))


@dataclass(kw_only=True)
class Decoders:
    """Which decoders fail on which media, and where those that wait at a gate are."""

    folder: Path
    environment: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.environment = {
            "PYTHONPATH": str(BROKEN_DECODERS),
            "OMNIPREP_TEST_FAULTS": str(self.folder / "plan.json"),
        }
        self.fail({})

    def fail(self, plan: dict[str, str]) -> None:
        for path in [*self.folder.glob("at-*"), self.folder / "open"]:
            path.unlink(missing_ok=True)
        (self.folder / "plan.json").write_text(json.dumps(plan))

    def wait_at(self, name: str) -> int:
        """Wait until a process decodes the medium at the gate; return its id."""
        mark = self.folder / f"at-{name}"
        wait_until(lambda: mark.exists() and mark.read_text())
        return int(mark.read_text())

    def open_gate(self) -> None:
        (self.folder / "open").touch()


@dataclass
class Run:
    """A command under way, the leader of a session of its own, as in a terminal."""

    process: subprocess.Popen[str]
    folder: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    def interrupt(self) -> None:
        """Do what Ctrl-C does: a signal to the whole group."""
        os.killpg(self.pid, signal.SIGINT)

    def wait(self) -> int:
        return self.process.wait(timeout=WAIT_S)

    def told(self) -> str:
        return (self.folder / f"told-{self.pid}").read_text()

    def end(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.process.wait()


def start(command: list[str], folder: Path, environment: dict[str, str] | None = None) -> Run:
    out = folder / "told"
    with out.open("w") as told:
        process = subprocess.Popen(
            command,
            env={**os.environ, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=told,
            stderr=told,
            text=True,
            start_new_session=True,
        )
    out.rename(folder / f"told-{process.pid}")
    return Run(process, folder)


def rerun(recipe: Path, out: object) -> Manifest:
    """Do what the same command does, in this process: a start of the command takes longer than most of these builds."""
    return build(load_recipe(recipe, output=str(out), executor="serial"))


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])


def is_running(pid: int) -> bool:
    """Return whether a process exists and is not just waiting to be buried."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def line_of_error(told: str) -> str:
    """Return the one line that begins with `error:`; there must be no traceback around it."""
    assert "Traceback" not in told, told
    lines = [line for line in told.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, told
    return lines[0]


def finished(out: Path) -> int:
    """Return how many partitions are finished."""
    return sum(1 for path in (out / "receipts").glob("*-0*.json"))


@dataclass
class Watch:
    """What was seen under final names while a build ran: by name the digests of every state."""

    seen: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    broken: list[str] = field(default_factory=list)
    num_looks: int = 0

    def check(self, expected: dict[str, str]) -> None:
        """Every file that ever had its final name was complete, and was what it is at the end."""
        assert self.num_looks > 5, f"looked {self.num_looks} times"
        assert self.seen, "nothing was there to be seen"
        assert self.broken == [], f"half written: {self.broken}"
        early = {name for name, digests in self.seen.items() if not digests <= {expected.get(name, "")}}
        assert early == set(), f"seen with other content than at the end: {early}"


def _reads(name: str, data: bytes) -> bool:
    try:
        if name.endswith(".json"):
            json.loads(data)
        elif name.endswith(".parquet"):
            pq.ParquetFile(pa.BufferReader(data)).read(use_threads=False)
        else:
            with tarfile.open(fileobj=io.BytesIO(data)) as tar:
                tar.getmembers()
            return data.endswith(bytes(1024))
    except (ValueError, pa.ArrowException, tarfile.TarError, OSError):
        return False
    return True


@contextmanager
def watching(out: Path) -> Iterator[Watch]:
    """Look at a folder all the time: each new file under a final name is read as it is at that moment."""
    watch = Watch()
    looked: dict[str, tuple[int, int, int]] = {}
    over = threading.Event()

    def look() -> None:
        watch.num_looks += 1
        for path in [*out.glob("*"), *out.glob("receipts/*"), *out.glob("quarantine/*")]:
            if path.suffix not in (".tar", ".parquet", ".json") or path.name == "place.json":
                continue
            name = path.relative_to(out).as_posix()
            with suppress(FileNotFoundError):
                status = path.stat()
                state = (status.st_ino, status.st_size, status.st_mtime_ns)
                if looked.get(name) == state:
                    continue
                data = path.read_bytes()
                looked[name] = state
                if not _reads(name, data):
                    watch.broken.append(f"{name}: {len(data)} bytes")
                if not name.endswith(".inputs.parquet") and name != "receipts/recipe.json":
                    watch.seen[name].add(hashlib.sha256(data).hexdigest())

    def go() -> None:
        while not over.wait(0.02):
            look()

    watcher = threading.Thread(target=go)
    watcher.start()
    try:
        yield watch
    finally:
        over.set()
        watcher.join()
        look()


def members(place: object) -> dict[str, bytes]:
    """Return every member of every shard by name, read by Python's own tarfile."""
    folder = open_folder(str(place))
    found: dict[str, bytes] = {}
    for name in folder.files():
        if name.endswith(".tar"):
            with tarfile.open(fileobj=io.BytesIO(folder.read(name))) as tar:
                for member in tar:
                    assert member.name not in found, f"{member.name} is there twice"
                    file = tar.extractfile(member)
                    assert file is not None
                    found[member.name] = file.read()
    return found


def rejected(place: object) -> dict[int, str]:
    """Return the reason of every row in the quarantine, by the number of the row; of a dataset with one source."""
    return {row["row"]: row["reason"] for row in rejected_rows(open_folder(str(place)))}


def rejected_rows(folder: Folder) -> list[dict[str, Any]]:
    files = [name for name in folder.files(QUARANTINE_FOLDER) if name.endswith(".parquet")]
    return [row for name in files for row in pq.ParquetFile(pa.BufferReader(folder.read(name))).read().to_pylist()]


def count(place: object) -> tuple[int, int]:
    """Return how many records are in shards and in the quarantine, by counting them, not by asking the manifest."""
    folder = open_folder(str(place))
    return sum(name.endswith(".json") for name in members(place)), len(rejected_rows(folder))


def files_of(folder: Folder) -> dict[str, str]:
    """Return the digest of every file of the dataset in a folder or bucket: `tests.prepare_builders.tree` for any place."""
    return {
        name: hashlib.sha256(folder.read(name)).hexdigest()
        for name in folder.files()
        if not name.endswith((".inputs.parquet", "/place.json", "/lock"))
    }
