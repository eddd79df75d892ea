"""`omniprep train thinker` in the workers of Ray Train: the same run as under torchrun."""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from omniprep.errors import ConfigError
from omniprep.run.ray_train import RayTrainOptions, train_on_ray
from omniprep.train.phase import RESULT_NAME, Result
from omniprep.train.recipe import TrainRecipe
from omniprep.train.thinker import train


@dataclass(frozen=True, kw_only=True)
class _Task:
    """What a worker is told."""

    recipe: TrainRecipe
    folder: str
    """Where the command was typed: relative paths of the recipe start there."""


def train_in_ray(
    recipe: TrainRecipe, *, num_workers: int, use_gpu: bool | None = None, address: str | None = None, overwrite: bool = False
) -> list[Result]:
    """Train a recipe in so many workers of Ray and return what each phase came to.

    `use_gpu` gives each worker one; by default on a cluster, and here if there is any. All machines share the folder in which
    the command runs. Raises as `thinker.train` does, and `TrainingLost`.
    """
    output = Path(recipe.output)
    if overwrite:  # here, for Ray has its notes in it while workers run
        shutil.rmtree(output, ignore_errors=True)
    if use_gpu is None:
        use_gpu = address is not None or torch.cuda.is_available()
    task = _Task(recipe=recipe, folder=str(Path.cwd()))
    options = RayTrainOptions(num_workers=num_workers, folder=output / "ray", use_gpu=use_gpu, address=address)
    train_on_ray(_train, task, options)
    return [json.loads((output / phase.name / RESULT_NAME).read_text(encoding="utf-8")) for phase in recipe.phases]


def _train(task: _Task) -> None:
    try:
        os.chdir(task.folder)
    except OSError as error:
        raise ConfigError(
            f"{task.folder}: not on this machine ({error.strerror}); run the command in a folder that all machines share"
        ) from None
    train(task.recipe)
