"""Parallel reading against what people train with: webdataset, HF `datasets` streaming, LitData and MosaicML Streaming.

The same samples for all: webdataset and HF `datasets` read the tars of the OmniPrep dataset, the others a copy in their own
format. Every loader hands every sample to a consumer as arrays, shuffled, with the number of workers of 0, 1 and 2 that is
best for it (OmniPrep: threads). Each epoch runs in a process of its own, in turn with one of OmniPrep; ratios are medians of
these pairs, of wall time and of the CPU time of all processes. All are asserted to have seen the same.

LitData and MosaicML Streaming live in environments below `build/peers`, made here when they are missing; a peer that cannot
be installed is left out, and said to be.
"""

import functools
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import stream_corpus
from ratios import Ratio

ROOT = Path(__file__).parents[2]
PEERS = ROOT / "build" / "peers"
OWN_ENVIRONMENT = ("litdata", "mosaicml-streaming")
NAMES = ("webdataset", "datasets", *OWN_ENVIRONMENT)
WORKERS = (0, 1, 2)
NUM_PAIRS = 3
NUM_EPOCHS = 2
"""Of each process; the better one counts: what a loader prepares once is not held against it."""
TARGET = 3.0
CPU_TARGET = 2.0
"""Below that of wall time: MosaicML Streaming without workers waits half of it."""

Epoch = Mapping[str, Any]


def run() -> list[Ratio]:
    """Return, for each peer, its wall and CPU time over OmniPrep's."""
    data = stream_corpus.dataset()
    with tempfile.TemporaryDirectory(prefix="omniprep-peers-") as folder:
        copies = Path(folder)
        peers = [name for name in NAMES if _is_ready(name, data, copies / name)]
        workers = {name: _best_workers(name, data, copies / name) for name in ("omniprep", *peers)}
        return [ratio for name in peers for ratio in _against(name, workers, data, copies / name)]


def _against(name: str, workers: Mapping[str, int], data: Path, copy: Path) -> list[Ratio]:
    pairs = [
        (_read("omniprep", data, copy, workers["omniprep"]), _read(name, data, copy, workers[name])) for _ in range(NUM_PAIRS)
    ]
    assert all(ours["seen"] == theirs["seen"] for ours, theirs in pairs), pairs
    num_samples = pairs[0][0]["seen"]["samples"]
    what = f"{num_samples:,} samples to a consumer: {name} ({workers[name]} workers) / ours ({workers['omniprep']} threads)"
    return [
        _ratio(f"{what}, wall", [(ours["wall_s"], theirs["wall_s"]) for ours, theirs in pairs], TARGET),
        _ratio(f"{what}, CPU", [(ours["cpu_s"], theirs["cpu_s"]) for ours, theirs in pairs], CPU_TARGET),
    ]


def _ratio(name: str, pairs: Sequence[tuple[float, float]], target: float) -> Ratio:
    return Ratio(
        name=name,
        ours_ms=statistics.median(ours for ours, _ in pairs) * 1e3,
        other_ms=statistics.median(theirs for _, theirs in pairs) * 1e3,
        ratio=statistics.median(theirs / ours for ours, theirs in pairs),
        target=target,
        at_least=True,
    )


def _best_workers(name: str, data: Path, copy: Path) -> int:
    """Return the number of workers with which a loader is fastest."""
    wall_s = {workers: _read(name, data, copy, workers, epochs=1)["wall_s"] for workers in WORKERS}
    print(f"{name}: " + ", ".join(f"{workers} workers {wall:.2f} s" for workers, wall in wall_s.items()), flush=True)
    return min(wall_s, key=wall_s.__getitem__)


def _read(name: str, data: Path, copy: Path, workers: int, *, epochs: int = NUM_EPOCHS) -> Epoch:
    places = ("--data", str(data), "--copy", str(copy))
    done = _call(name, "read", name, *places, "--workers", str(workers), "--epochs", str(epochs))
    found: Epoch = json.loads(done.splitlines()[-1])
    return found


def _is_ready(name: str, data: Path, copy: Path) -> bool:
    """Install a peer and store the samples in its format, where it needs that; say so if it cannot be had."""
    if name not in OWN_ENVIRONMENT:
        return True
    try:
        _python_of(name)
        _call(name, "make", name, "--data", str(data), "--copy", str(copy))
    except subprocess.CalledProcessError as error:
        lines = (error.stderr or error.stdout or "").strip().splitlines()
        print(f"{name}: left out, it cannot be installed or used here: {lines[-1] if lines else error}", flush=True)
        return False
    return True


def _call(name: str, *arguments: str) -> str:
    python = _python_of(name) if name in OWN_ENVIRONMENT else sys.executable
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    script = str(Path(__file__).with_name("stream_peers.py"))
    done = subprocess.run([python, script, *arguments], check=True, capture_output=True, text=True, env=environment, timeout=900)
    return done.stdout


@functools.cache
def _python_of(name: str) -> str:
    """Return the interpreter of a peer's environment, made when it is missing.

    It borrows what this one has (PyTorch above all) and holds what the peer wants in other versions. Raises
    `CalledProcessError`.
    """
    folder = PEERS / name
    python = str(folder / "bin" / "python")
    if not (folder / "installed").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True, capture_output=True, text=True)
        own = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
        (own / "borrowed.pth").write_text(f"{sysconfig.get_path('purelib')}\n", encoding="utf-8")
        subprocess.run([python, "-m", "pip", "install", "-q", name], check=True, capture_output=True, text=True)
        (folder / "installed").touch()
    return python


if __name__ == "__main__":
    for line in run():
        print(line)
