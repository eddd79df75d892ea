"""Run every `bench_*.py` beside this file and print one table: `python tests/benchmarks/run.py [--only NAME] [--json FILE]`.

A benchmark module has `run()`, which returns ratios or peaks of memory. Both sides of a ratio are timed in this run, in
turn, in one thread, so a slow or busy machine changes the milliseconds but hardly the ratio. Exit code 1 if a target is
missed or a module fails.
"""

import os

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS", "RAYON_NUM_THREADS"):
    os.environ[_name] = "1"  # before numpy is imported anywhere
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse  # noqa: E402
import importlib  # noqa: E402
import json  # noqa: E402
import platform  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
import traceback  # noqa: E402
from collections.abc import Sequence  # noqa: E402
from dataclasses import asdict  # noqa: E402
from importlib.metadata import PackageNotFoundError, version  # noqa: E402
from pathlib import Path  # noqa: E402

from ratios import Peak, Ratio  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

FOLDER = Path(__file__).parent
PACKAGES = (
    "torch",
    "transformers",
    "qwen-omni-utils",
    "numpy",
    "tokenizers",
    "soxr",
    "librosa",
    "av",
    "decord",
    "simplejpeg",
    "ray",
)


def machine() -> str:
    """Return the machine in words: processor, cores, memory; nothing that names it."""
    model = platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        memory = f", {pages / 2**30:.0f} GiB memory"
    except (OSError, ValueError):
        memory = ""
    return f"{model}, {len(os.sched_getaffinity(0))} cores{memory}, {platform.system()}"


def versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that the figures depend on."""
    found = {"python": platform.python_version()}
    for name in ("omniprep", *PACKAGES):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def table(ratios: Sequence[Ratio]) -> Table:
    """Return the result as a table; a speed-up reads "x times as fast", a distance to a floor "x times its time"."""
    shown = _table("CPU time in ms, median of pairs", "ours", "other", "ratio", "target")
    for one in ratios:
        sign = "≥" if one.at_least else "≤"
        times = (f"{ms:,.0f}" if ms >= 100 else f"{ms:.3g}" for ms in (one.ours_ms, one.other_ms))
        shown.add_row(one.name, *times, f"{one.ratio:.2f}", f"{sign} {one.target:g}", _met(one.met))
    return shown


def memory_table(peaks: Sequence[Peak]) -> Table:
    """Return the peaks of memory as a table."""
    shown = _table("Peak memory of a worker in MB above an empty one", "short", "long", "limit")
    for one in peaks:
        shown.add_row(one.name, f"{one.short_mb:.0f}", f"{one.long_mb:.0f}", f"≤ {one.limit_mb:g}", _met(one.met))
    return shown


def _table(title: str, *columns: str) -> Table:
    """Return an empty table whose first column gives way where a terminal is narrow."""
    shown = Table(title=title)
    shown.add_column("what", overflow="fold")
    for column in columns:
        shown.add_column(column, justify="right", no_wrap=True)
    shown.add_column("met", no_wrap=True)
    return shown


def _met(met: bool) -> str:
    return "[green]yes[/]" if met else "[red]NO[/]"


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmarks; return the exit code."""
    names = sorted(path.stem.removeprefix("bench_") for path in FOLDER.glob("bench_*.py"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=names, help="run this module (may be given again)")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    given = parser.parse_args(arguments)
    console = Console()
    lines: list[Ratio | Peak] = []
    failed: list[str] = []
    for name in given.only or names:
        start = time.perf_counter()
        try:
            lines += importlib.import_module(f"bench_{name}").run()
        except Exception:  # one broken benchmark must not hide the others' figures
            failed.append(name)
            traceback.print_exc()
        console.print(f"bench {name}: {time.perf_counter() - start:.0f} s", style="dim", highlight=False)
    ratios = [one for one in lines if isinstance(one, Ratio)]
    peaks = [one for one in lines if isinstance(one, Peak)]
    if ratios:
        console.print(table(ratios))
    if peaks:
        console.print(memory_table(peaks))
    console.print(machine() + "; " + ", ".join(f"{name} {number}" for name, number in versions().items()), highlight=False)
    missed = [one.name for one in lines if not one.met]
    console.print(
        f"{len(lines) - len(missed)} of {len(lines)} targets met" + (f"; failed to run: {', '.join(failed)}" if failed else "")
    )
    if given.json:
        found = {"ratios": ratios, "memory": peaks}
        rows = {name: [{**asdict(one), "met": one.met} for one in group] for name, group in found.items()}
        report = {"machine": machine(), "versions": versions(), "failed": failed, **rows}
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 1 if missed or failed else 0


if __name__ == "__main__":
    sys.exit(main())
