"""The training loop: one phase from its first or next step to its last.

```
stream ── micro-batches of a step ──> count ── all ranks ──> total
                                        └──> forward, loss / total, backward ──> clip, update ──> log, validate, checkpoint
```

Every sum is over all ranks and micro-batches and is divided once. Gradients are summed over ranks after each micro-batch:
that costs more exchanges than summing once a step, but no rank ever holds gradients of the whole model. All ranks do the
same at every step: what depends on one of them (a signal, a wrong number) is told to the others before any acts on it.
"""

import math
import signal
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from omniprep.errors import OmniPrepError
from omniprep.stream.dataset import StreamingDataset
from omniprep.train.checkpoint import Checkpoints
from omniprep.train.objective import Objective, StreamBatch
from omniprep.train.optimizer import OptimizerSettings, learning_rate_at, set_learning_rate
from omniprep.train.parallel import World, all_sum, clip_gradients
from omniprep.train.progress_log import RunLog, StepWork
from omniprep.train.signals import StopRequest
from omniprep.train.tally import Tally


class TrainingError(OmniPrepError):
    """Training cannot go on; checkpoints are kept."""


class Stopped(OmniPrepError):
    """A signal ended a phase; it was saved before."""

    def __init__(self, step: int, number: int) -> None:
        super().__init__(f"stopped after step {step}, which is saved; the same command, without --overwrite, goes on from there")
        self.step, self.signal = step, number

    def __reduce__(self) -> tuple[type["Stopped"], tuple[int, int]]:
        return type(self), (self.step, self.signal)


@dataclass(frozen=True, kw_only=True)
class Looped:
    """What a phase trains, and on what. Built by `phase.py`."""

    model: nn.Module
    """A `TrainableThinker`, sharded if there are several ranks."""
    optimizer: torch.optim.Optimizer
    objective: Objective
    stream: StreamingDataset
    num_steps: int
    settings: OptimizerSettings
    flops: Callable[[StreamBatch], float]
    validate: Callable[[], dict[str, float]] | None
    """Means over the validation split."""
    sample: Callable[[], list[dict[str, Any]]] | None
    """Answers to fixed prompts."""
    evaluate_every: int | None
    sample_every: int | None
    checkpoint_every: int | None


@dataclass(frozen=True, kw_only=True)
class ReadStep:
    """The batches of a step on this rank, on the CPU."""

    number: int
    """Counted from 1."""
    batches: Sequence[StreamBatch]
    start_s: float
    """When it was begun to read them."""
    wait_s: float


def train_loop(
    looped: Looped, *, world: World, log: RunLog, checkpoints: Checkpoints, progress: Mapping[str, Any], stop: StopRequest
) -> dict[str, float]:
    """Take the steps that are left and return the last validation's means.

    `progress` is what the loaded checkpoint says (`step`, and `stream`, which was loaded into the stream before), or
    `{"step": 0}` with what else is to be kept. Raises `TrainingError` for a loss that is no number, `Stopped` on a signal.
    """
    tally, validation = Tally(), dict(progress.get("validation", {}))
    if progress.get("to_measure"):
        validation = _measure(looped, int(progress["step"]), log) or validation
    with closing(read_steps(looped, first=int(progress["step"]), world=world)) as steps:
        for read in steps:
            step = read.number
            norm, work, is_asked_to_stop = _take_step(looped, read, tally=tally, world=world, stop=stop)
            rate = learning_rate_at(step - 1, num_steps=looped.num_steps, settings=looped.settings)
            values = {"grad_norm": norm, "learning_rate": rate}
            if log.is_due(step):
                values |= tally.over_ranks(world).means()
                tally = Tally()
            log.step(step, values, work)
            # Who asks a process to stop may not wait for a validation: it is made up for when the run goes on.
            measured = {} if is_asked_to_stop else _measure(looped, step, log)
            validation = measured or validation
            if is_asked_to_stop or _is_due(step, looped.checkpoint_every, looped):
                state = {
                    **progress,
                    "step": step,
                    "stream": read.batches[-1]["state"],
                    "validation": {name: value for name, value in validation.items() if math.isfinite(value)},
                    "to_measure": is_asked_to_stop,
                }
                metric = measured.get("loss")
                checkpoints.save(step, model=looped.model, optimizer=looped.optimizer, progress=state, metric=metric)
            if is_asked_to_stop:
                checkpoints.wait()
                raise Stopped(step, stop.signal or signal.SIGTERM)
    checkpoints.wait()
    return validation


def read_steps(looped: Looped, *, first: int, world: World) -> Generator[ReadStep, None, None]:
    """Yield the steps from `first + 1` on; what they hold stays on the CPU, where the next ones are made meanwhile.

    Epochs follow one another; a position that was loaded into the stream is where the first begins.
    """
    per_step = looped.stream.plan.config.global_batch_size // world.world_size
    step = first
    while step < looped.num_steps:
        epoch = iter(looped.stream)
        while step < looped.num_steps:
            start_s = time.perf_counter()
            batches = list(islice(epoch, per_step))
            if not batches:
                break
            step += 1
            yield ReadStep(number=step, batches=batches, start_s=start_s, wait_s=time.perf_counter() - start_s)


def to_device(batch: Mapping[str, Any], device: torch.device) -> StreamBatch:
    """Return a batch with its tensors on a device."""
    if device.type == "cpu":
        return batch
    inputs = {name: _moved(value, device) for name, value in batch["inputs"].items()}
    return {**{name: _moved(value, device) for name, value in batch.items()}, "inputs": inputs}


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value


def _take_step(looped: Looped, read: ReadStep, *, tally: Tally, world: World, stop: StopRequest) -> tuple[float, StepWork, bool]:
    """Forward, backward, update; without a target nothing is updated.

    Returns the norm of the gradient before it was clipped, what was done, and whether any rank was asked to stop.
    """
    total, num_tokens, num_places, flops = all_sum(_amounts(looped, read.batches), world)
    sums: list[tuple[StreamBatch, Tensor]] = []
    for batch in read.batches:
        here = to_device(batch, world.device)  # one after another: a device holds one micro-batch
        loss = looped.objective.loss(looped.model(here["inputs"], here["shift_labels"]), here, tally)
        (loss / max(total, 1.0)).backward()
        sums.append((batch, loss.detach()))
    norm = clip_gradients(looped.model.parameters(), looped.settings.max_grad_norm, world)
    wrong = [key for batch, loss in sums if not math.isfinite(float(loss)) for key in batch["keys"]]
    wait_s, is_asked_to_stop, is_wrong = _most([read.wait_s, stop.signal is not None, bool(wrong)], world)
    if is_wrong or not math.isfinite(norm):
        raise TrainingError(_diverged(read.number, wrong, world))
    if total:
        rate = learning_rate_at(read.number - 1, num_steps=looped.num_steps, settings=looped.settings)
        set_learning_rate(looped.optimizer, rate)
        looped.optimizer.step()
    looped.optimizer.zero_grad(set_to_none=True)
    work = StepWork(
        num_tokens=int(num_tokens),
        num_places=int(num_places),
        seconds=time.perf_counter() - read.start_s,
        wait_s=wait_s,
        flops=flops,
    )
    return norm, work, bool(is_asked_to_stop)


def _amounts(looped: Looped, batches: Sequence[StreamBatch]) -> list[float]:
    """Return what this rank adds to the step: what is divided by, tokens, places in rows, operations."""
    return [
        sum(looped.objective.count(batch) for batch in batches),
        sum(document.num_tokens for batch in batches for document in batch["documents"]),
        sum(batch["shift_labels"].numel() for batch in batches),
        sum(map(looped.flops, batches)),
    ]


def _most(values: Sequence[float], world: World) -> list[float]:
    """Return the highest of each value over all ranks."""
    highest = torch.tensor(values, dtype=torch.float64)
    if world.is_distributed:
        torch.distributed.all_reduce(highest, torch.distributed.ReduceOp.MAX)
    return [float(value) for value in highest]


def _diverged(step: int, wrong: list[str], world: World) -> str:
    parts: list[list[str]] = [wrong] * world.world_size
    if world.is_distributed:
        torch.distributed.all_gather_object(parts, wrong)
    keys = sorted({key for part in parts for key in part})
    where = f"the loss is not a number in a row with {', '.join(keys)[:500]}" if keys else "the gradient is not a number"
    return (
        f"step {step}: {where}. Nothing was updated, and checkpoints are as they were. Lower optimizer.learning_rate or raise "
        "optimizer.warmup_steps; if it is always the same records, look at them (omniprep inspect) and leave them out"
    )


def _measure(looped: Looped, step: int, log: RunLog) -> dict[str, float]:
    """Validate and let the model answer its prompts if this step is one for it; return the means, none where it is not."""
    means: dict[str, float] = {}
    if looped.validate and _is_due(step, looped.evaluate_every, looped):
        means = looped.validate()
        log.event("validation", step, means)
    if looped.sample and _is_due(step, looped.sample_every, looped):
        for answer in looped.sample():
            log.event("sample", step, answer)
    return means


def _is_due(step: int, every: int | None, looped: Looped) -> bool:
    return step == looped.num_steps or (every is not None and step % every == 0)
