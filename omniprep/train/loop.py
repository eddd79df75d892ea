"""The training loop: one phase from its first or next step to its last.

```
stream ── micro-batches of a step ──> count ── all ranks ──> total
                                        └──> forward, loss / total, backward ──> clip, update ──> log, validate, checkpoint
```

Every sum is over all ranks and micro-batches and is divided once. All ranks do the same at every step: what depends on
one of them (a signal, a wrong number) is told to the others before any acts on it.
"""

import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import nn

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
        super().__init__(f"stopped after step {step}, which is saved; the same command goes on from there")
        self.signal = number


@dataclass(frozen=True, kw_only=True)
class Looped:
    """What a phase trains, and on what. Built by `thinker.py`."""

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


def train_loop(
    looped: Looped, *, world: World, log: RunLog, checkpoints: Checkpoints, progress: Mapping[str, Any], stop: StopRequest
) -> dict[str, float]:
    """Take the steps that are left and return the last validation's means.

    `progress` is what the loaded checkpoint says (`step`, and `stream`, which was loaded into the stream before), or
    `{"step": 0}` with what else is to be kept. Raises `TrainingError` for a loss that is no number, `Stopped` on a signal.
    """
    tally = Tally()
    validation: dict[str, float] = {}
    first = int(progress["step"])
    for step, batches, wait_s, start_s in read_steps(looped, first=first, world=world):
        counts = [sum(looped.objective.count(batch) for batch in batches), wait_s, stop.signal is not None]
        total, waited_s, num_signals = all_sum(counts, world)
        norm = _take_step(looped, step, batches, total=total, tally=tally, world=world)
        work = _work(
            batches, looped.flops, world=world, seconds=time.perf_counter() - start_s, wait_s=waited_s / world.world_size
        )
        rate = learning_rate_at(step - 1, num_steps=looped.num_steps, settings=looped.settings)
        values = {"grad_norm": norm, "learning_rate": rate}
        if log.is_due(step):
            values |= tally.over_ranks(world).means()
            tally = Tally()
        log.step(step, values, work)
        state = {**progress, "step": step, "stream": batches[-1]["state"]}
        is_last = step == looped.num_steps
        if looped.validate and (is_last or _is_due(step, looped.evaluate_every)):
            validation = looped.validate()
            log.event("validation", step, validation)
        if looped.sample and (is_last or _is_due(step, looped.sample_every)):
            for answer in looped.sample():
                log.event("sample", step, answer)
        if num_signals or is_last or _is_due(step, looped.checkpoint_every):
            checkpoints.save(
                step,
                model=looped.model,
                optimizer=looped.optimizer,
                progress=state,
                metric=validation.get("loss") if looped.validate and _is_fresh(step, looped) else None,
            )
        if num_signals and not is_last:
            checkpoints.wait()
            raise Stopped(step, stop.signal or signal.SIGTERM)
    checkpoints.wait()
    return validation


def read_steps(looped: Looped, *, first: int, world: World) -> Iterator[tuple[int, list[StreamBatch], float, float]]:
    """Yield each step's number from `first + 1` on, its batches on the device, how long they were waited for, and its start.

    Epochs follow one another; a position that was loaded into the stream is where the first begins.
    """
    per_step = looped.stream.plan.config.global_batch_size // world.world_size
    step = first
    while step < looped.num_steps:
        epoch = iter(looped.stream)
        while step < looped.num_steps:
            start_s = time.perf_counter()
            batches = [to_device(batch, world.device) for batch in islice(epoch, per_step)]
            if not batches:
                break
            step += 1
            yield step, batches, time.perf_counter() - start_s, start_s


def to_device(batch: Mapping[str, Any], device: torch.device) -> StreamBatch:
    """Return a batch with its tensors on a device."""
    if device.type == "cpu":
        return batch
    inputs = {name: _moved(value, device) for name, value in batch["inputs"].items()}
    return {**{name: _moved(value, device) for name, value in batch.items()}, "inputs": inputs}


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value


def _take_step(looped: Looped, step: int, batches: list[StreamBatch], *, total: float, tally: Tally, world: World) -> float:
    """Forward, backward, update; return the norm of the gradient before it was clipped. Without a target nothing is updated."""
    wrong: list[str] = []
    for batch in batches:
        losses = looped.model(batch["inputs"], batch["shift_labels"])
        loss = looped.objective.loss(losses, batch, tally)
        if not math.isfinite(float(loss.detach())):
            wrong += batch["keys"]
        (loss / max(total, 1.0)).backward()
    norm = clip_gradients(looped.model.parameters(), looped.settings.max_grad_norm, world)
    if not math.isfinite(norm):
        raise TrainingError(_diverged(step, wrong, world))
    set_learning_rate(looped.optimizer, learning_rate_at(step - 1, num_steps=looped.num_steps, settings=looped.settings))
    if total:
        looped.optimizer.step()
    looped.optimizer.zero_grad(set_to_none=True)
    return norm


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


def _work(
    batches: list[StreamBatch], flops: Callable[[StreamBatch], float], *, world: World, seconds: float, wait_s: float
) -> StepWork:
    num_tokens = sum(document.num_tokens for batch in batches for document in batch["documents"])
    num_places = sum(batch["shift_labels"].numel() for batch in batches)
    sums = all_sum([num_tokens, num_places, sum(map(flops, batches))], world)
    return StepWork(num_tokens=int(sums[0]), num_places=int(sums[1]), seconds=seconds, wait_s=wait_s, flops=sums[2])


def _is_due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _is_fresh(step: int, looped: Looped) -> bool:
    """Return whether the validation's means are those of this step."""
    return step == looped.num_steps or _is_due(step, looped.evaluate_every)
