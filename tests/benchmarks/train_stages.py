"""Train every stage on the demo's data and print one table: `python tests/benchmarks/train_stages.py [--only STAGE] [--keep]`.

By hand, for it takes some ten minutes, after `make demo`. Each stage is a recipe `pipelines/train_STAGE.yaml`, run by the
command that a user types; the tables are made of the `log.jsonl` that it leaves. `--keep` takes runs that are there.
"""

import argparse
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from run import machine, versions

from omniprep.train.progress_log import LOG_NAME, read_log
from omniprep.train.recipe import Phase, TrainRecipe, load_train_recipe

ROOT = Path(__file__).parents[2]
STAGES = ("align", "pretrain_8k", "pretrain_32k", "sft", "dpo")
HEAD = ("stage", "what learns", "steps", "tokens of a step", "loss", "validation loss", "tokens/s", "waiting for data")
PREFERENCES = ("loss", "margin", "accuracy", "reward/chosen", "reward/rejected")

Lines = list[dict[str, Any]]


def recipe_path(stage: str) -> str:
    """Return a stage's recipe as a user names it."""
    return f"pipelines/train_{stage}.yaml"


def train(stage: str) -> None:
    """Run a stage's recipe from its beginning; end with its exit code if it fails, for it has said why."""
    command = [sys.executable, "-m", "omniprep", "train", "thinker", recipe_path(stage), "--overwrite"]
    if code := subprocess.run(command, cwd=ROOT, check=False).returncode:
        sys.exit(code)


def logged(recipe: TrainRecipe, phase: Phase) -> tuple[Lines, Lines]:
    """Return the steps and the validations of a phase, in order."""
    path = ROOT / recipe.output / phase.name / LOG_NAME
    return read_log(path, kind="step"), read_log(path, kind="validation")


def stage_rows(stage: str, recipe: TrainRecipe) -> Iterable[Sequence[str]]:
    """Yield a row for each phase of a stage."""
    for phase in recipe.phases:
        steps, checks = logged(recipe, phase)
        later = steps[1:]  # the first step waits for the first batches
        yield (
            stage if len(recipe.phases) == 1 else f"{stage}, {phase.name}",
            ", ".join(phase.train).replace("_", " "),
            str(steps[-1]["step"]),
            f"{recipe.data.plan.global_batch_size * recipe.data.plan.max_tokens:,}",
            _from_to(steps, "loss"),
            _from_to(checks, "loss"),
            f"{statistics.median(step['tokens_per_s'] for step in later):,.0f}",
            f"{statistics.median(step['wait_share'] for step in later):.2%}",
        )


def preference_rows(recipe: TrainRecipe) -> Iterable[Sequence[str]]:
    """Yield a row for each number that tells what was learnt from pairs."""
    steps, checks = logged(recipe, recipe.phases[-1])
    for name in PREFERENCES:
        yield (name, f"{steps[0][name]:.3f}", f"{steps[-1][name]:.3f}", f"{checks[-1][name]:.3f}")


def _from_to(lines: Lines, name: str) -> str:
    ends = [lines[0], lines[-1]] if len(lines) > 1 else lines
    return " → ".join(f"{line[name]:.3f}" for line in ends)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def main() -> None:
    """Train what is asked for and print what it came to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=STAGES, help="this stage (may be given again)")
    parser.add_argument("--keep", action="store_true", help="do not train: read the logs of earlier runs")
    given = parser.parse_args()
    stages = given.only or STAGES
    recipes = {stage: load_train_recipe(ROOT / recipe_path(stage)) for stage in stages}
    for stage in () if given.keep else stages:
        train(stage)
    print(table(HEAD, (row for stage, recipe in recipes.items() for row in stage_rows(stage, recipe))))
    for stage, recipe in recipes.items():
        if recipe.objective == "dpo":
            print(f"\n{table((stage, 'first step', 'last step', 'validation at the end'), preference_rows(recipe))}")
    print(f"\n{machine()}; " + ", ".join(f"{name} {number}" for name, number in versions().items()))


if __name__ == "__main__":
    main()
