"""The trainer's process group inside Ray Train: two workers on this machine's CPUs. Starting Ray takes most of the time."""

import os
from pathlib import Path

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.reference, pytest.mark.filterwarnings("ignore")]
torch = pytest.importorskip("torch")

from omniprep.errors import ConfigError  # noqa: E402
from omniprep.run.ray_train import RayTrainOptions, TrainingLost, train_on_ray  # noqa: E402
from omniprep.train.checkpoint import Checkpoints, CheckpointSettings  # noqa: E402
from omniprep.train.parallel import all_sum, world  # noqa: E402


def train(folder: Path) -> None:
    """Do what a run does: sum over ranks, resume, save; rank 1 dies the first time that it has saved step 1."""
    with world(device="cpu") as here:
        checkpoints = Checkpoints(folder / "checkpoints", CheckpointSettings(), here)
        model = torch.nn.Linear(2, 2)
        optimizer = torch.optim.AdamW(model.parameters())
        newest = checkpoints.latest()
        step = 0 if newest is None else int(checkpoints.load(newest, model=model, optimizer=optimizer)["step"])
        while step < 2:
            step += 1
            (total,) = all_sum([here.rank + 1], here)
            checkpoints.save(step, model=model, optimizer=optimizer, progress={"step": step})
            (folder / f"step-{step}-rank-{here.rank}").write_text(f"{here.world_size} {total}")
            if step == here.rank == 1 and (folder / "die").exists():
                (folder / "die").unlink()
                os._exit(9)


def refuse(message: str) -> None:
    raise ConfigError(message)


def fail(message: str) -> None:
    raise ZeroDivisionError(message)


@pytest.fixture(scope="module")
def cluster():
    """Start one Ray for the tests that ask for it; the launcher uses a Ray that is there."""
    import ray

    ray.init(address="local", num_cpus=1, include_dashboard=False, object_store_memory=80 << 20, log_to_driver=False)
    yield
    ray.shutdown()


def test_a_cluster_that_does_not_answer_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--address 127\.0\.0\.1:1: no Ray cluster answers there"):
        train_on_ray(refuse, "", RayTrainOptions(num_workers=1, folder=tmp_path, address="127.0.0.1:1"))


def test_workers_form_a_group_and_start_again_from_the_checkpoint_when_one_dies(tmp_path: Path) -> None:
    (tmp_path / "die").touch()
    train_on_ray(train, tmp_path, RayTrainOptions(num_workers=2, folder=tmp_path, max_restarts=1))
    assert not (tmp_path / "die").exists()
    written = {path.name: path.read_text() for path in tmp_path.glob("step-*")}
    assert written == {f"step-{step}-rank-{rank}": "2 3.0" for step in (1, 2) for rank in (0, 1)}
    assert (tmp_path / "checkpoints" / "step-00000002" / "progress.json").exists()

    import ray

    assert not ray.is_initialized(), "a Ray that the launcher has started is stopped by it"


@pytest.mark.usefixtures("cluster")
def test_a_mistake_in_the_recipe_comes_back_as_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^recipe: no such model$"):
        train_on_ray(refuse, "recipe: no such model", RayTrainOptions(num_workers=1, folder=tmp_path))


@pytest.mark.usefixtures("cluster")
def test_a_bug_ends_the_run_with_its_type_and_message(tmp_path: Path) -> None:
    with pytest.raises(TrainingLost, match=r"ZeroDivisionError: .*nothing to divide"):
        train_on_ray(fail, "nothing to divide", RayTrainOptions(num_workers=1, folder=tmp_path))
