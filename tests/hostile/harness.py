"""Runs rows through the encoder in a child process that may crash, hang or fill the memory, and says what became of each.

python -m tests.hostile.harness ROWS
"""

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

ROOT = Path(__file__).parents[2]
CHILD = Path(__file__).with_name("encode_rows.py")
START_LIMIT_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a row: `encoded`, a `Reason`, or what must never be: `bug: ...`, `crash: ...`, `hang`."""

    number: int
    outcome: str
    detail: str = ""
    seconds: float = 0.0
    peak_mb: int = 0

    @property
    def is_fault(self) -> bool:
        """Return whether neither a sample nor a reason came of it."""
        return self.outcome.startswith(("bug", "crash", "hang"))


def run_rows(rows: Path, *, limit_s: float = 20.0, memory_mb: int = 6000) -> list[Outcome]:
    """Return the outcome of every row. A row that takes over `limit_s` is killed with its child, and a new child goes on."""
    num_rows = len(rows.read_bytes().splitlines())
    outcomes: list[Outcome] = []
    while len(outcomes) < num_rows:
        outcomes += _run_child(rows, len(outcomes), limit_s, memory_mb)
    return outcomes


def _run_child(rows: Path, first: int, limit_s: float, memory_mb: int) -> list[Outcome]:
    """Return the outcomes from row `first` up to the end, or to the row that ended the child."""
    outcomes: list[Outcome] = []
    open_row, wait_s = None, START_LIMIT_S
    arguments = [sys.executable, "-X", "faulthandler", str(CHILD), str(rows), str(first), str(memory_mb)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with (
        tempfile.TemporaryFile() as said,
        subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=said, text=True, env=environment) as child,
    ):
        assert child.stdout is not None
        lines: queue.Queue[str] = queue.Queue()
        reader = threading.Thread(target=_read_lines, args=(child.stdout, lines), daemon=True)
        reader.start()
        try:
            while line := lines.get(timeout=wait_s):
                if line.startswith("start "):
                    open_row, wait_s = int(line.split()[1]), limit_s
                else:
                    outcomes.append(Outcome(**json.loads(line)))
                    open_row = None
            code = child.wait()
        except queue.Empty:
            child.kill()
            code = None
        reader.join()
        said.seek(0)
        last_words = said.read()[-1500:].decode(errors="replace")
    if code is None and open_row is not None:
        outcomes.append(Outcome(number=open_row, outcome="hang", detail=f"over {wait_s} s", seconds=wait_s))
    elif open_row is not None:
        outcomes.append(Outcome(number=open_row, outcome=f"crash: {code}", detail=last_words))
    elif code != 0:
        raise AssertionError(f"the child ended with {code} between two rows: {last_words}")
    return outcomes


def _read_lines(stream: IO[str], lines: "queue.Queue[str]") -> None:
    for line in stream:
        lines.put(line)
    lines.put("")


def table(names: Iterable[str], outcomes: Iterable[Outcome]) -> str:
    """Return kind x outcome as text; `names` are the rows' ids, which start with the kind."""
    counts = Counter((name.split("/")[0], outcome.outcome) for name, outcome in zip(names, outcomes, strict=True))
    columns = sorted({outcome for _, outcome in counts}, key=lambda text: (text != "encoded", text))
    kinds = sorted({kind for kind, _ in counts})
    width = max(map(len, kinds), default=0)
    lines = [" " * width + "".join(f"  {column}" for column in columns)]
    for kind in [*kinds, "all"]:
        cells = (sum(n for (k, o), n in counts.items() if kind in (k, "all") and o == column) for column in columns)
        texts = (f"  {cell or '':>{len(column)}}" for cell, column in zip(cells, columns, strict=True))
        lines.append(kind.ljust(width) + "".join(texts))
    return "\n".join(lines)


def main() -> None:
    """Print the table and every fault."""
    rows = Path(sys.argv[1])
    names = [json.loads(line)["id"] for line in rows.read_bytes().splitlines()]
    outcomes = run_rows(rows)
    print(table(names, outcomes))
    for outcome in outcomes:
        if outcome.is_fault or outcome.seconds > 3:
            print(names[outcome.number], outcome.outcome, f"{outcome.seconds:.1f} s", outcome.detail[-900:])
    print(
        f"slowest {max(o.seconds for o in outcomes):.2f} s; all {sum(o.seconds for o in outcomes):.1f} s; "
        f"peak {max(o.peak_mb for o in outcomes)} MB"
    )


if __name__ == "__main__":
    main()
