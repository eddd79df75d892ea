"""A whole run in the workers of Ray Train takes the steps that it takes in one process."""

from pathlib import Path

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.reference, pytest.mark.filterwarnings("ignore")]
pytest.importorskip("torch")

from omniprep.train.on_ray import train_in_ray  # noqa: E402
from tests.train.runs import assert_same_run, recipe, train  # noqa: E402


def test_two_workers_take_the_same_steps_as_one_process(mixed: str, tmp_path: Path) -> None:
    plain, on_ray = (recipe(tmp_path / name, mixed, steps=3) for name in ("plain", "ray"))
    train(plain)
    results = train_in_ray(on_ray, num_workers=2, use_gpu=False)
    assert_same_run(tmp_path / "ray", tmp_path / "plain", rel=1e-5)
    assert [result["steps"] for result in results] == [3]
    assert (Path(results[0]["model"]) / "model.safetensors").is_file()
