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
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omniprep.errors import ConfigError
from omniprep.profile import QWEN2_5_OMNI, ModelProfile
from omniprep.train.checks import check_rope_mode, read_datasets
from omniprep.train.parallel import barrier, world
from omniprep.train.phase import MODEL_NAME, RESULT_NAME, PhaseRun, Result
from omniprep.train.recipe import TrainRecipe
from omniprep.train.signals import stop_request


def train(recipe: TrainRecipe, *, overwrite: bool = False, profile: ModelProfile = QWEN2_5_OMNI) -> list[Result]:
    """Train every phase that is not done yet and return what each came to. All ranks call it.

    A phase that was begun goes on from its last checkpoint. Raises `ConfigError` for data, models and settings that do not
    fit together, `TrainingError` if the loss is no number, `Stopped` when a signal has ended it.
    """
    output = Path(recipe.output)
    with world() as here, stop_request() as stop:
        manifests = read_datasets(recipe, profile)
        check_rope_mode(recipe.model.checkpoint, recipe.data, manifests)
        if overwrite:
            if here.is_main:
                shutil.rmtree(output, ignore_errors=True)
            barrier(here)
        start, results = recipe.model, []
        for phase in recipe.phases:
            folder = output / phase.name
            result = _finished(folder, recipe.sha256_of(phase))
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
            results.append(result)
            # The next phase starts from what this one has made; with adapters, from their sum with the base.
            start = recipe.model.model_copy(update={"checkpoint": str(folder / MODEL_NAME), "from_scratch": False})
        return results


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
