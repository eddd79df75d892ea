"""What a run tells while it trains: a line of JSON for each logged step, always; trackers and a progress bar besides.

```
log.jsonl   {"kind": "run",   "step": 0, …}       each start or resume, with what it runs on
            {"kind": "step",  "step": 10, "loss": 2.31, "tokens_per_s": 10932.4, …}
            {"kind": "validation", "step": 500, "loss": 2.02, …}
```

A run that is resumed at step 500 drops what it had logged behind step 500: those steps are taken again, and the file is
then that of a run that never stopped.
"""

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from pydantic import Field

from omniprep.config import Config
from omniprep.errors import printable
from omniprep.run.progress import in_time
from omniprep.train.trackers import Tracker, TrackerName, open_tracker

LOG_NAME = "log.jsonl"


class WatchSettings(Config):
    """What is told of a run, and how often."""

    log_every: int = Field(default=10, ge=1)
    """Steps from one line of the log to the next."""
    trackers: tuple[TrackerName, ...] = ()
    """Besides `log.jsonl`, which is always written."""
    project: str = Field(default="omniprep", min_length=1)
    """Under which the trackers file the run."""
    evaluate_every: int | None = Field(default=None, ge=1)
    """Steps from one validation to the next; there is one at the end in any case. Null: only at the end."""
    num_eval_batches: int | None = Field(default=None, ge=1)
    """Batches of a validation, over all ranks; null for the whole split."""
    sample_every: int | None = Field(default=None, ge=1)
    """Steps from one round of sample answers to the next. Null: only at the end."""


@dataclass(frozen=True, kw_only=True)
class StepWork:
    """What one optimizer step did and took, over all ranks."""

    num_tokens: int
    """Tokens of documents, without padding."""
    num_places: int
    """Places that the model computed: tokens and padding."""
    seconds: float
    """Wall time of the step, with its wait for data."""
    wait_s: float
    """Of that, how long the slowest rank waited for its batches."""
    flops: float = 0.0
    """Of all ranks, by `flops.training_flops`."""


@dataclass
class _Window:
    """Sums since the last logged line."""

    num_steps: int = 0
    num_tokens: int = 0
    num_places: int = 0
    seconds: float = 0.0
    wait_s: float = 0.0
    flops: float = 0.0

    def add(self, work: StepWork) -> None:
        self.num_steps += 1
        self.num_tokens += work.num_tokens
        self.num_places += work.num_places
        self.seconds += work.seconds
        self.wait_s += work.wait_s
        self.flops += work.flops

    def rates(self, peak_flops: float | None) -> dict[str, float]:
        """Return the rates of the steps together; `mfu` only where it is known what the devices could do."""
        seconds = max(self.seconds, 1e-9)
        rates = {
            "step_s": seconds / max(self.num_steps, 1),
            "tokens_per_s": self.num_tokens / seconds,
            "wait_share": min(self.wait_s / seconds, 1.0),
            "padding_share": 1 - self.num_tokens / self.num_places if self.num_places else 0.0,
            "tflops_per_s": self.flops / seconds / 1e12,
        }
        return rates | ({"mfu": self.flops / seconds / peak_flops} if peak_flops else {})


@dataclass
class RunLog:
    """The log of a run or of a phase. Only the main rank's writes; on the others every call does nothing.

    ```text
    with RunLog(folder, settings, num_steps=1000, start_step=500, is_main=world.is_main) as log:
        for step in range(501, 1001):
            ...
            log.step(step, {"loss": loss, "lr": lr}, work)
    ```
    """

    folder: Path
    settings: WatchSettings
    num_steps: int
    """The last step's number: steps count from 1."""
    start_step: int = 0
    """How many steps are done already."""
    title: str = "train"
    is_main: bool = True
    peak_flops: float | None = None
    """What all devices together can do in a second (`flops.peak_flops`), for `mfu`."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Written in the `run` line, and the trackers' configuration."""
    shown: Literal["auto", "bar", "lines", "none"] = "auto"
    """`auto`: a bar in a terminal, plain lines otherwise."""

    def __enter__(self) -> Self:
        """Open the log; drop lines of steps that are taken again. Raises `ConfigError` for a tracker that is not installed."""
        self._window = _Window()
        self._done_s: float = 0.0
        self._last: dict[str, float] = {}
        self._trackers: list[Tracker] = []
        with ExitStack() as stack:
            if self.is_main:
                self.folder.mkdir(parents=True, exist_ok=True)
                for name in self.settings.trackers:
                    tracker = open_tracker(
                        name,
                        self.folder,
                        project=self.settings.project,
                        run=self.title,
                        facts=self.facts,
                        first_step=self.start_step + 1,
                    )
                    self._trackers.append(tracker)
                    stack.callback(tracker.close)
                drop_lines_after(self.path, self.start_step)
                self._file = stack.enter_context(self.path.open("a", encoding="utf-8"))
                self._show = stack.enter_context(_display(self.shown, self.title, self.num_steps, self.start_step))
                self._write("run", self.start_step, self.facts)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._stack.__exit__(kind, error, traceback)

    @property
    def path(self) -> Path:
        """Return the file that the lines go to."""
        return self.folder / LOG_NAME

    def is_due(self, step: int) -> bool:
        """Return whether this step is logged: every `log_every`-th, the first of this start, and the last."""
        return step % self.settings.log_every == 0 or step in (self.start_step + 1, self.num_steps)

    def step(self, step: int, values: Mapping[str, float], work: StepWork) -> None:
        """Take a finished step: `values` are its loss, rate, gradient norm…; rates are of all steps since the last line."""
        if not self.is_main:
            return
        self._window.add(work)
        self._done_s += work.seconds
        rates = self._window.rates(self.peak_flops)
        self._last = {**rates, **values}
        if self.is_due(step):
            self._window = _Window()
            self._write("step", step, self._last)
            self._track("", step, self._last)
        self._show(step, self._describe(step), self.is_due(step))

    def event(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Write a line of another kind: a validation's means, a sample answer. If all are numbers, trackers get `kind/name`."""
        if not self.is_main:
            return
        self._write(kind, step, values)
        if all(isinstance(value, int | float) for value in values.values()):
            self._track(f"{kind}/", step, values)

    def _write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        line = {"kind": kind, "step": step, "time": round(time.time(), 3), **values}
        self._file.write(json.dumps(_finite(line), ensure_ascii=False, allow_nan=False, default=str) + "\n")
        self._file.flush()

    def _track(self, prefix: str, step: int, values: Mapping[str, float]) -> None:
        for tracker in self._trackers:
            tracker.log({f"{prefix}{name}": value for name, value in values.items()}, step)

    def _describe(self, step: int) -> str:
        left_s = self._done_s / max(step - self.start_step, 1) * (self.num_steps - step)
        return describe_step(self._last) + (f", {in_time(left_s)} left" if left_s else "")


def describe_step(values: Mapping[str, float]) -> str:
    """Return a step's numbers in words.

    >>> describe_step({"loss": 2.3456, "tokens_per_s": 10932.4, "wait_share": 0.004, "mfu": 0.412})
    'loss 2.3456, 10,932 tokens/s, 0.4% waiting for data, MFU 41.2%'
    """
    words = [f"{name} {values[name]:.4f}" for name in ("loss", "margin") if name in values]
    words.append(f"{values['tokens_per_s']:,.0f} tokens/s")
    words.append(f"{values['wait_share']:.1%} waiting for data")
    if "mfu" in values:
        words.append(f"MFU {values['mfu']:.1%}")
    return ", ".join(words)


def read_log(path: Path, *, kind: str | None = None) -> list[dict[str, Any]]:
    """Return the lines of a log in order, of one kind if asked. A last line that a crash cut off is left out."""
    lines: list[dict[str, Any]] = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return [line for line in lines if kind in (None, line["kind"])]


def drop_lines_after(path: Path, step: int) -> None:
    """Take the lines behind a step out of a log, and one that a crash cut off; the file is the old or the new one."""
    if not path.exists():
        return
    kept = [line for line in read_log(path) if line["step"] <= step]
    partial = path.with_suffix(".tmp")
    with partial.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in kept)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _finite(value: Any) -> Any:
    """Return a value as JSON has it: numbers that it has no way to write become their names."""
    match value:
        case float() if not math.isfinite(value):
            return str(value)
        case Mapping():
            return {str(name): _finite(item) for name, item in value.items()}
        case list() | tuple():
            return [_finite(item) for item in value]
    return value


@contextmanager
def _display(shown: str, title: str, num_steps: int, start_step: int) -> "Iterator[Any]":
    """Yield what shows a step on stderr: (number, words, whether it is a logged one)."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    console = Console(stderr=True)
    title = printable(title)
    if shown == "none":
        yield lambda step, words, is_due: None
    elif shown == "lines" or (shown == "auto" and not console.is_terminal):
        yield (
            lambda step, words, is_due: (
                console.print(f"{title}: step {step}/{num_steps}, {words}", highlight=False, markup=False, soft_wrap=True)
                if is_due
                else None
            )
        )
    else:
        columns = (TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[words]}"))
        with Progress(*columns, console=console) as bars:
            task = bars.add_task(title, total=num_steps, completed=start_step, words="")
            yield lambda step, words, is_due: bars.update(task, completed=step, words=words)
