"""`omniprep train thinker`: the phases of a recipe, one after another, each from a model to a better one.

```
OUT/PHASE/
  log.jsonl       a line for every logged step, validation and sample answer
  checkpoints/    what a stopped run goes on from
  model/          the result, for plain transformers; `omniprep.json` in it says what data it has seen
  result.json     written last: the phase is done
```
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from omniprep.errors import ConfigError
from omniprep.profile import QWEN2_5_OMNI, ModelProfile
from omniprep.train.checks import check_rope_mode, read_datasets
from omniprep.train.loop import TrainingError
from omniprep.train.parallel import World, on_main, release_memory, world
from omniprep.train.phase import CHECKPOINTS_NAME, MODEL_NAME, RESULT_NAME, PhaseRun, Result
from omniprep.train.progress_log import LOG_NAME
from omniprep.train.recipe import TrainRecipe
from omniprep.train.signals import stop_request
from omniprep.train.trackers import check_trackers


def train(recipe: TrainRecipe, *, overwrite: bool = False, profile: ModelProfile = QWEN2_5_OMNI) -> list[Result]:
    """Train every phase that is not done yet and return what each came to. All ranks call it.

    A phase that was begun goes on from its last checkpoint. Raises `ConfigError` for data, models and settings that do not
    fit together, `TrainingError` if the loss is no number, the memory is used up or another rank is gone, `Stopped` when a
    signal has ended it.
    """
    output = Path(recipe.output)
    with world() as here, stop_request() as stop, _quiet_libraries(), _plain_failures(here):
        check_trackers(recipe.watch.trackers)
        manifests = read_datasets(recipe, profile)
        check_rope_mode(recipe.model.checkpoint, recipe.data, manifests)
        if overwrite and not int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")):  # it restarts the same command
            on_main(partial(_remove_earlier, output, recipe), here)
        start, results = recipe.model, []
        for phase in recipe.phases:
            folder = output / phase.name
            result = on_main(partial(_finished, folder, recipe.sha256_of(phase)), here)
            if result is None:
                result = PhaseRun(
                    recipe=recipe,
                    phase=phase,
                    start=start,
                    folder=folder,
                    manifests=manifests,
                    profile=profile,
                    world=here,
                ).train(stop)
                release_memory()
            results.append(result)
            # The next phase starts from what this one has made; with adapters, from their sum with the base.
            start = recipe.model.model_copy(update={"checkpoint": str(folder / MODEL_NAME), "from_scratch": False})
        return results


def _remove_earlier(output: Path, recipe: TrainRecipe) -> None:
    """Delete what runs have left in the phases' folders; nothing else that may lie in `output`."""
    for phase in recipe.phases:
        folder = output / phase.name
        # First, so that a half-deleted phase is never taken for one that is done.
        (folder / RESULT_NAME).unlink(missing_ok=True)
        for name in (CHECKPOINTS_NAME, MODEL_NAME):
            if (folder / name).exists():
                shutil.rmtree(folder / name)
        (folder / LOG_NAME).unlink(missing_ok=True)


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Keep progress bars of loading and saving weights out of the log of the run."""
    from transformers.utils import logging

    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()


@contextmanager
def _plain_failures(here: World) -> Iterator[None]:
    """Say in a line what ended this rank if it is the machine or another rank, not a bug."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"rank {here.rank}: out of memory: {' '.join(str(error).split())[:200]} Checkpoints are kept. Lower "
            "data.plan.max_tokens, max_patches or max_mel_frames, or set parallel.activation_checkpointing: true (see --dry-run)"
        ) from error
    except RuntimeError as error:
        if not here.is_distributed or not _is_lost_rank(error):
            raise
        raise TrainingError(
            f"rank {here.rank}: another rank is gone ({' '.join(str(error).split())[:200]}); it has said why, if it could. "
            "Checkpoints are kept, the same command goes on from the last one"
        ) from error


def _is_lost_rank(error: RuntimeError) -> bool:
    """Return whether an exchange with another rank failed; gloo has no type for it."""
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error)


def describe_result(result: Mapping[str, Any]) -> str:
    """Return one line about a phase that is done."""
    loss = result["validation"].get("loss")
    told = f", validation loss {loss:.4f}" if loss is not None else ""
    return f"{result['phase']}: {result['steps']} steps{told}; the model is in {result['model']}"


def _finished(folder: Path, recipe_sha256: str) -> Result | None:
    """Return the result of a phase that is done. Raises `ConfigError` if it was another recipe's."""
    try:
        result: Result = json.loads((folder / RESULT_NAME).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        raise ConfigError(f"{folder / RESULT_NAME}: damaged; delete it to train this phase from its last checkpoint") from None
    if result["recipe_sha256"] != recipe_sha256:
        raise ConfigError(f"{folder}: is done, with another recipe; name another `output`, or begin anew with --overwrite")
    return result
