"""Checkpoints: absent or complete, whatever happens while they are written.

```
checkpoints/
  step-00000500/         complete: it got this name last, when every rank's bytes were on the disk
    progress.json        step, metric, number of ranks, and what the trainer wants to know again
    .metadata __0_0.distcp __1_0.distcp …   torch.distributed.checkpoint: weights, optimizer, random numbers
  step-00001000.tmp/     being written, or left by a process that was killed; removed by the next save
```

Weights and optimizer state are named by parameter and cut as each rank holds them; they are read on any number of ranks.
Hyperparameters of the optimizer (learning rate, decay) are not among them: the recipe says what they are now.

A checkpoint holds pickled values, as all of torch's do: load your own.
"""

import json
import math
import re
import shutil
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from pydantic import Field
from torch import Tensor, nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from omniprep.config import Config
from omniprep.errors import ConfigError, OmniPrepError
from omniprep.storage.folder import StorageError
from omniprep.storage.local import LocalFolder
from omniprep.train import rng_state
from omniprep.train.parallel import World

FORMAT = 1
_PROGRESS = "progress.json"
_TEMPORARY = ".tmp"
_NAME = re.compile(r"step-(\d{8,})(?:-(\d+))?")


class CheckpointSettings(Config):
    """When checkpoints are written and which are kept."""

    every_steps: int | None = Field(default=500, ge=1)
    """None: only at the end."""
    keep_last: int = Field(default=2, ge=1)
    """The disk needs room for one more: an old one goes when the new one is complete."""
    keep_best: bool = True
    """Keep the one of the lowest validation loss beside the last ones: of those at whose step there was a validation, so let
    `watch.evaluate_every` divide `every_steps`."""
    asynchronous: bool = False
    """Copy to memory and write while training goes on; takes as much memory of the machine as the checkpoint has bytes."""
    save_frozen: bool = True
    """Write frozen parameters as well. Without them, with LoRA or a frozen model, a checkpoint is much smaller, and they are
    what the run starts with."""


@dataclass(frozen=True, kw_only=True)
class SavedStep:
    """A complete checkpoint."""

    path: Path
    step: int
    attempt: int
    """Above 0 where a step was saved again; the highest is the one that counts."""
    metric: float | None
    """Lower is better."""
    progress: dict[str, Any]
    num_ranks: int


class Checkpoints:
    """The checkpoints of a run. All ranks make one, in a `world()`, and call `save`, `load`, `latest` and `best` together."""

    def __init__(self, folder: Path, settings: CheckpointSettings, world: World) -> None:
        self.folder = folder
        self._settings = settings
        self._world = world
        # Of its own: what is written in the background must not come between the exchanges of the training steps.
        self._group = dist.new_group(backend="gloo")
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(self, step: int, *, model: nn.Module, optimizer: Any, progress: dict[str, Any], metric: float | None = None) -> None:
        """Write the state after `step` steps. Older checkpoints are removed only when it is complete.

        `progress` is what JSON can hold; the main rank's is written. `metric` is what `keep_best` goes by. Raises
        `StorageError` if it cannot be written; the ones before stay. Asynchronous: the error comes with the next call.
        """
        self.wait()
        text = json.dumps(
            {
                "format": FORMAT,
                "step": step,
                "metric": metric if metric is not None and math.isfinite(metric) else None,
                "num_ranks": self._world.world_size,
                "progress": progress,
            },
            indent=2,
            allow_nan=False,
        )
        state = self._state(model, optimizer)
        if not self._settings.asynchronous:
            self._write(step, state, text)
            return
        stager = DefaultStager(StagingOptions(False, False, False, False))
        self._pending = self._writer.submit(self._write, step, stager.stage(state), text)

    def wait(self) -> None:
        """Wait for what is written in the background. Raises what went wrong there."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def latest(self) -> Path | None:
        """Return the newest complete checkpoint; what the main rank sees counts for all."""
        self.wait()
        return self._agreed(lambda: _newest(self._complete()))

    def best(self) -> Path | None:
        """Return the complete checkpoint of the lowest metric; what the main rank sees counts for all."""
        self.wait()
        return self._agreed(lambda: _best(self._complete()))

    def load(self, path: Path, *, model: nn.Module, optimizer: Any | None = None) -> dict[str, Any]:
        """Put a checkpoint's state into the model, the optimizer and the random numbers; return its `progress`.

        On as many ranks as saved it, each rank's random numbers go on where they were; on another number they are left
        as they are. Raises `ConfigError` if the checkpoint is of another model, `StorageError` if it is damaged.
        """
        self.wait()
        saved = read_saved_step(path)
        sizes = _sizes(path)
        template: dict[str, Any] = {"model": _wanted_weights(model, sizes, path)}
        rng_key = f"rng.{self._world.rank}"
        if saved.num_ranks == self._world.world_size and rng_key in sizes:
            template["rng"] = {str(self._world.rank): ""}
        optimizer_state: dict[str, Any] | None = None
        if optimizer is not None and any(key.startswith("optimizer.") for key in sizes):
            optimizer.zero_grad(set_to_none=True)  # with gradients, the state would not be there to be filled
            optimizer_state = get_optimizer_state_dict(model, optimizer)
            template["optimizer"] = _wanted_moments(optimizer_state["state"], sizes)
        try:
            dcp.load(template, storage_reader=dcp.FileSystemReader(path), process_group=self._group)
        except (dcp.CheckpointException, OSError) as error:
            raise StorageError(f"{path}: cannot be read: {_cause(error)}; load an older checkpoint") from error
        options = StateDictOptions(strict=False)  # what it lacks is frozen; that was checked
        set_model_state_dict(model, template["model"], options=options)
        if optimizer is not None and optimizer_state is not None:
            set_optimizer_state_dict(model, optimizer, optimizer_state)
        if "rng" in template:
            rng_state.restore(template["rng"][str(self._world.rank)], self._world.device)
        return saved.progress

    def _state(self, model: nn.Module, optimizer: Any) -> dict[str, Any]:
        """Return what is saved, as each rank holds it; nothing is copied."""
        weights = get_model_state_dict(model)
        if not self._settings.save_frozen:
            held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
            frozen = {name for name, value in model.named_parameters() if not value.requires_grad and id(value) not in held}
            weights = {name: value for name, value in weights.items() if name not in frozen}
        rng = {str(self._world.rank): rng_state.capture(self._world.device)}
        state: dict[str, Any] = {"model": weights, "rng": rng}
        if optimizer.state:  # before the first step there is none, and asking for it would make some
            state["optimizer"] = get_optimizer_state_dict(model, optimizer)["state"]
        return state

    def _write(self, step: int, state: dict[str, Any], progress: str) -> None:
        """Write everything under a temporary name, then give it its own, then remove what is not kept."""
        temporary = self.folder / f"step-{step:08d}{_TEMPORARY}"
        try:
            self._on_main(lambda: self._clear(temporary))
            metadata = dcp.save(state, storage_writer=dcp.FileSystemWriter(temporary), process_group=self._group)
            self._on_main(lambda: self._finish(temporary, step, progress, metadata))
        except (dcp.CheckpointException, OSError, StorageError) as error:
            self._on_main(lambda: shutil.rmtree(temporary, ignore_errors=True))
            raise StorageError(
                f"{self.folder}: the checkpoint of step {step} could not be written: {_cause(error)}; "
                "earlier ones are kept; mend that and run the same command again"
            ) from error

    def _clear(self, temporary: Path) -> None:
        """Make an empty folder to write into, and remove those that killed processes have left."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob(f"step-*{_TEMPORARY}"):
            shutil.rmtree(left)
        temporary.mkdir()

    def _finish(self, temporary: Path, step: int, progress: str, metadata: Any) -> None:
        """Make a written checkpoint a complete one: all is on the disk before it has its name."""
        files = {info.relative_path for info in metadata.storage_data.values()}
        missing = sorted(name for name in files if not (temporary / name).is_file())
        if missing:
            raise StorageError(
                f"{temporary} has no {missing[0]}, which another rank has written: expected a folder that all nodes share"
            )
        LocalFolder(str(temporary)).write(_PROGRESS, progress.encode())
        LocalFolder(str(temporary)).sync([_PROGRESS])
        earlier = [saved.attempt for saved in self._complete() if saved.step == step]
        # A step that was saved before gets a second folder: at no time is there none of it.
        name = f"step-{step:08d}" + (f"-{max(earlier) + 1}" if earlier else "")
        temporary.rename(self.folder / name)
        LocalFolder(str(self.folder)).sync([name])
        self._prune()

    def _prune(self) -> None:
        complete = sorted(self._complete(), key=_age, reverse=True)
        newest_of_step = {saved.step: saved for saved in reversed(complete)}
        kept = {saved.path for saved in sorted(newest_of_step.values(), key=_age)[-self._settings.keep_last :]}
        if self._settings.keep_best and (best := _best(newest_of_step.values())) is not None:
            kept.add(best)
        for saved in complete:
            if saved.path not in kept:
                # Under a temporary name first: half of it must not look like a checkpoint.
                doomed = saved.path.with_name(saved.path.name + _TEMPORARY)
                saved.path.rename(doomed)
                shutil.rmtree(doomed)

    def _complete(self) -> list[SavedStep]:
        found = self.folder.iterdir() if self.folder.is_dir() else ()
        return [read_saved_step(path) for path in found if _NAME.fullmatch(path.name) and path.is_dir()]

    def _agreed(self, ask: Callable[[], Path | None]) -> Path | None:
        answer: list[Path | None] = [None]

        def look() -> None:
            answer[0] = ask()

        self._on_main(look)
        if self._world.is_distributed:
            dist.broadcast_object_list(answer, src=0, group=self._group)
        return answer[0]

    def _on_main(self, action: Callable[[], Any]) -> None:
        """Do something on the main rank while the others wait; an error there is raised on all."""
        failed: list[Exception | None] = [None]
        if self._world.is_main:
            try:
                action()
            except (OSError, OmniPrepError) as error:
                failed[0] = error
        if self._world.is_distributed:
            dist.broadcast_object_list(failed, src=0, group=self._group)
        if failed[0] is not None:
            raise failed[0]


def read_saved_step(path: Path) -> SavedStep:
    """Return what a checkpoint says of itself. Raises `StorageError` if it is not one."""
    name = _NAME.fullmatch(path.name)
    try:
        told = json.loads((path / _PROGRESS).read_bytes())
        if told["format"] != FORMAT:
            raise ConfigError(f"{path}: a checkpoint of format {told['format']}; this version reads format {FORMAT}")
        return SavedStep(
            path=path,
            step=told["step"],
            attempt=int(name[2] or 0) if name else 0,
            metric=told["metric"],
            progress=told["progress"],
            num_ranks=told["num_ranks"],
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StorageError(f"{path}: not a complete checkpoint ({type(error).__name__}: {error}); name another") from None


def _age(saved: SavedStep) -> tuple[int, int]:
    return saved.step, saved.attempt


def _newest(complete: Collection[SavedStep]) -> Path | None:
    return max(complete, key=_age).path if complete else None


def _best(complete: Collection[SavedStep]) -> Path | None:
    measured = [(saved.metric, -saved.step, saved.path) for saved in complete if saved.metric is not None]
    return min(measured)[2] if measured else None


def _sizes(path: Path) -> dict[str, tuple[int, ...] | None]:
    """Return the names of all that a checkpoint holds, and the shape of what is a tensor."""
    try:
        metadata = dcp.FileSystemReader(path).read_metadata()
    except Exception as error:  # whatever unpickling damaged bytes may raise
        raise StorageError(f"{path}: damaged ({type(error).__name__}: {error}); load an older checkpoint") from error
    return {name: tuple(entry.size) if hasattr(entry, "size") else None for name, entry in metadata.state_dict_metadata.items()}


def _wanted_weights(model: nn.Module, sizes: dict[str, tuple[int, ...] | None], path: Path) -> dict[str, Any]:
    """Return the model's tensors that a checkpoint holds. Raises `ConfigError` if it is of another model."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    weights = get_model_state_dict(model)
    wanted = {name: value for name, value in weights.items() if f"model.{name}" in sizes}
    lacking = sorted(name for name in weights.keys() - wanted.keys() if name in trained)
    unknown = sorted(key for key in sizes if key.startswith("model.") and key.removeprefix("model.") not in weights)
    other = sorted(name for name, value in wanted.items() if sizes[f"model.{name}"] != tuple(value.shape))
    if lacking or unknown or other:
        first = (lacking or [key.removeprefix("model.") for key in unknown] or other)[0]
        raise ConfigError(
            f"{path}: a checkpoint of another model: of its parameters it lacks {len(lacking)} that train, has "
            f"{len(unknown)} that the model has not, and {len(other)} in another shape (first: {first}); "
            "use the recipe that it was made with, or another output folder"
        )
    return wanted


def _wanted_moments(state: dict[str, Any], sizes: dict[str, tuple[int, ...] | None]) -> dict[str, Any]:
    """Return the optimizer state that a checkpoint holds; what it has none of starts from nothing."""
    wanted: dict[str, Any] = {}
    for name, entries in state.items():
        for key, value in entries.items():
            if f"optimizer.{name}.{key}" in sizes:
                wanted.setdefault(name, {})[key] = value
            elif isinstance(value, Tensor):
                value.zero_()  # the count of steps, which began to count when the state was made
    return wanted


def _cause(error: BaseException) -> str:
    """Return the first thing that went wrong, in one line."""
    if isinstance(error, dcp.CheckpointException):
        first = min(error.failures.items())
        return f"rank {first[0]}: {_cause(first[1][0])}"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split())[:300] or type(error).__name__
