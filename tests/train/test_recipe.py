"""Training recipes: closed, changed from the command line by paths, and known again by what decides the losses."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from omniprep.errors import ConfigError

pytest.importorskip("torch")

from omniprep.train.recipe import TrainRecipe, load_train_recipe, parse_change

VALUES: dict[str, Any] = {
    "output": "out",
    "data": {"datasets": {"a": 1.0, "b": 2.0}, "plan": {"max_tokens": 64}},
    "phases": [{"name": "one", "train": ["head"], "steps": 2}, {"name": "two", "train": ["head"], "epochs": 1}],
}
PIPELINES = sorted((Path(__file__).parents[2] / "pipelines").glob("train_*.yaml"))


def loaded(folder: Path, *changes: str, **more: Any) -> TrainRecipe:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(VALUES | more))
    return load_train_recipe(path, changes=dict(map(parse_change, changes)))


@pytest.mark.parametrize("path", PIPELINES, ids=lambda path: path.stem)
def test_the_recipes_that_are_shipped_are_read(path: Path) -> None:
    assert load_train_recipe(path).output == f"build/train/{path.stem.removeprefix('train_')}"


def test_changes_reach_into_what_is_there_and_what_is_not(tmp_path: Path) -> None:
    changes = ("data.plan.max_tokens=32", "phases.1.optimizer.betas=[0.8, 0.9]", "model.lora.rank=2", "watch.log_every=3")
    found = loaded(tmp_path, *changes)
    assert found.data.plan.max_tokens == 32
    assert found.phases[1].optimizer.betas == (0.8, 0.9)
    assert found.model.lora is not None
    assert found.model.lora.rank == 2
    assert found.watch.log_every == 3
    assert found.data.datasets == {"a": 1.0, "b": 2.0}


@pytest.mark.parametrize(
    ("datasets", "weighted"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ({"a": None}, ["a"]), ({"a": 0.5, "b": 2}, {"a": 0.5, "b": 2.0})],
)
def test_datasets_have_weights_or_none(datasets: Any, weighted: Any, tmp_path: Path) -> None:
    assert loaded(tmp_path, data={"datasets": datasets}).data.weighted == weighted


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "some weights": (
        {"data": {"datasets": {"a": 1.0, "b": None}}},
        "expected a weight for each dataset or for none; missing for b",
    ),
    "no dataset": ({"data": {"datasets": []}}, r"data\.datasets: "),
    "no phase": ({"phases": []}, r"phases: "),
    "nothing trains": ({"phases": [{"train": [], "steps": 1}]}, r"phases\.0\.train: "),
    "no length": ({"phases": [{"train": ["head"]}]}, "expected one of `epochs` and `steps`"),
    "a name that is a path": ({"phases": [{"name": "../x", "train": ["head"], "steps": 1}]}, r"phases\.0\.name: "),
    "one name twice": ({"phases": [VALUES["phases"][0]] * 2}, "names of phases must differ, .*; got one, one"),
    "a typo": ({"modle": {}}, "modle: "),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_recipes_are_refused_with_their_place(what: str, tmp_path: Path) -> None:
    more, said = WRONG[what]
    with pytest.raises(ConfigError, match=said):
        loaded(tmp_path, **more)


@pytest.mark.parametrize(
    ("change", "is_another"),
    [
        ("seed=1", True),
        ("data.plan.seed=1", True),
        ("data.datasets=[a]", True),
        ("phases.0.steps=3", True),
        ("phases.0.optimizer.learning_rate=1", True),
        ("model.lora.rank=2", True),
        ("dpo.beta=0.2", True),
        ("phases.1.epochs=2", False),
        ("phases.0.name=other", False),
        ("output=elsewhere", False),
        ("data.num_threads=7", False),
        ("data.validation_split=dev", False),
        ("parallel.attention=sdpa", False),
        ("parallel.activation_checkpointing=true", False),
        ("checkpoints.every_steps=3", False),
        ("watch.log_every=3", False),
    ],
)
def test_a_run_is_another_where_its_losses_would_be(change: str, is_another: bool, tmp_path: Path) -> None:
    one, other = loaded(tmp_path), loaded(tmp_path, change)
    assert (one.sha256_of(one.phases[0]) != other.sha256_of(other.phases[0])) is is_another
