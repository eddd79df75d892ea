"""Whole training runs of a few steps, in this process or on several ranks, and what their logs say."""

import signal
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from omniprep.train import loop, thinker
from omniprep.train.loop import Stopped
from omniprep.train.parallel import World
from omniprep.train.progress_log import read_log
from omniprep.train.recipe import TrainRecipe
from tests.train.ranks import run_ranks

ALL = ("audio_encoder", "audio_adapter", "vision_encoder", "vision_adapter", "language_model", "head")
PHASE = "some"
STEPS = 6
"""Of the run that others are compared with: more than an epoch."""


def values(output: Path, place: str, *, steps: int = 4, **changes: Any) -> dict[str, Any]:
    """Return a recipe of one phase; `changes` are of its parts, or whole parts."""
    parts: dict[str, Any] = {
        "output": str(output),
        "data": {"datasets": [place], "plan": {"max_tokens": 400, "global_batch_size": 2, "seed": 1}, "num_threads": 1},
        "phases": [{"name": PHASE, "train": list(ALL), "steps": steps, "optimizer": {"learning_rate": 3e-3}}],
        "watch": {"log_every": 1, "evaluate_every": 3},
        "checkpoints": {"every_steps": None},
    }
    for name, change in changes.items():
        parts[name] = {**parts[name], **change} if isinstance(parts.get(name), dict) and isinstance(change, dict) else change
    return parts


def recipe(output: Path, place: str, **changes: Any) -> TrainRecipe:
    return TrainRecipe.model_validate(values(output, place, **changes))


def train(wanted: TrainRecipe, *, num_ranks: int = 1, stop_in: int | None = None) -> list[str]:
    """Train on so many ranks; the last of them is asked to stop while step `stop_in` is taken. Return what each rank says."""
    if num_ranks > 1:
        return run_ranks(train_rank, num_ranks, wanted, stop_in)
    torch.set_num_threads(1)
    return [_trained(wanted, stop_in=stop_in)]


def train_rank(world: World, wanted: TrainRecipe, stop_in: int | None) -> str:
    return _trained(wanted, stop_in=stop_in if world.rank == world.world_size - 1 else None)


def _trained(wanted: TrainRecipe, *, stop_in: int | None) -> str:
    with pytest.MonkeyPatch.context() as patch:
        if stop_in is not None:
            take_step = loop._take_step

            def take(looped: Any, read: loop.ReadStep, **more: Any) -> Any:
                if read.number == stop_in:
                    signal.raise_signal(signal.SIGTERM)
                return take_step(looped, read, **more)

            patch.setattr(loop, "_take_step", take)
        try:
            thinker.train(wanted)
        except Stopped as stopped:
            return str(stopped)
    return "done"


def lines(output: Path, *, kind: str = "step", phase: str = PHASE) -> list[dict[str, Any]]:
    return read_log(output / phase / "log.jsonl", kind=kind)


def column(output: Path, name: str, *, kind: str = "step", phase: str = PHASE) -> list[float]:
    return [line[name] for line in lines(output, kind=kind, phase=phase)]


def assert_same_run(ours: Path, theirs: Path, *, rel: float, names: Sequence[str] = ("loss", "grad_norm")) -> None:
    """Check that two runs took the same steps, each once, with the same values, and measured the same."""
    for kind, wanted in (("step", names), ("validation", ("loss",))):
        assert column(ours, "step", kind=kind) == column(theirs, "step", kind=kind)
        for name in wanted:
            assert column(ours, name, kind=kind) == pytest.approx(column(theirs, name, kind=kind), rel=rel), (kind, name)


def weights(output: Path, *, phase: str = PHASE) -> dict[str, torch.Tensor]:
    """Return the exported weights of a phase."""
    from safetensors.torch import load_file

    parts: Iterable[Path] = sorted((output / phase / "model").glob("*.safetensors"))
    return {name: tensor for part in parts for name, tensor in load_file(part).items()}
