"""Checkpoints: absent or complete, equal on any number of ranks, and the old ones stay until the new one is there."""

import hashlib
import json
import os
import random
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

pytestmark = pytest.mark.reference
torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import numpy as np  # noqa: E402

from omniprep.errors import ConfigError  # noqa: E402
from omniprep.storage.folder import StorageError  # noqa: E402
from omniprep.train.checkpoint import Checkpoints, CheckpointSettings, read_saved_step  # noqa: E402
from omniprep.train.parallel import ParallelSettings, World, all_sum, clip_gradients, shard, world  # noqa: E402
from tests.train.rank_work import batch_of, full, trainable  # noqa: E402
from tests.train.ranks import RankFailed, outcomes_of, run_ranks  # noqa: E402

ROOT = Path(__file__).parents[2]


@pytest.fixture
def here() -> Iterator[World]:
    torch.set_num_threads(1)
    with world(device="cpu") as alone:
        yield alone


def small(value: float = 0.0, *, width: int = 4) -> tuple[Any, Any]:
    """Return a model whose weights are all `value`, and its optimizer after a step that did not move them."""
    model = torch.nn.Sequential(torch.nn.Linear(4, width), torch.nn.Linear(width, 2))
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, value)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    return model, optimizer


def save(checkpoints: Checkpoints, step: int, *, metric: float | None = None, **progress: Any) -> None:
    model, optimizer = small(float(step))
    checkpoints.save(step, model=model, optimizer=optimizer, progress={"step": step, **progress}, metric=metric)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# One process


def test_everything_comes_back(tmp_path: Path, here: World) -> None:
    checkpoints = Checkpoints(tmp_path, CheckpointSettings(), here)
    assert checkpoints.latest() is None
    model, optimizer = small(2.0)
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    checkpoints.save(7, model=model, optimizer=optimizer, progress={"stream": {"bin": 3}, "seed": 5}, metric=0.25)
    drawn = random.random(), np.random.random(), torch.rand(2).tolist()
    newest = checkpoints.latest()
    assert newest == tmp_path / "step-00000007" == checkpoints.best()
    other, other_optimizer = small(9.0)
    other_optimizer.param_groups[0]["lr"] = 0.5
    assert checkpoints.load(newest, model=other, optimizer=other_optimizer) == {"stream": {"bin": 3}, "seed": 5}
    assert (random.random(), np.random.random(), torch.rand(2).tolist()) == drawn
    for mine, theirs in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        for name, value in optimizer.state[theirs].items():
            assert torch.equal(other_optimizer.state[mine][name], value), name
    assert other_optimizer.param_groups[0]["lr"] == 0.5, "hyperparameters are the recipe's"
    assert read_saved_step(newest).metric == 0.25


def test_an_optimizer_before_its_first_step_stays_one(tmp_path: Path, here: World) -> None:
    checkpoints = Checkpoints(tmp_path, CheckpointSettings(), here)
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    checkpoints.save(0, model=model, optimizer=optimizer, progress={})
    checkpoints.load(tmp_path / "step-00000000", model=model, optimizer=optimizer)
    assert not optimizer.state


def test_moments_that_a_checkpoint_lacks_start_from_nothing(tmp_path: Path, here: World) -> None:
    checkpoints = Checkpoints(tmp_path, CheckpointSettings(), here)
    model, _ = small(1.0)
    first = torch.optim.AdamW(model[0].parameters(), lr=0.1)
    model(torch.ones(1, 4)).sum().backward()
    first.step()
    checkpoints.save(1, model=model, optimizer=first, progress={})
    both = torch.optim.AdamW(model.parameters(), lr=0.1)
    checkpoints.load(tmp_path / "step-00000001", model=model, optimizer=both)
    assert both.state[model[0].weight]["step"] == 1
    assert both.state[model[1].weight]["step"] == 0
    assert not both.state[model[1].weight]["exp_avg_sq"].any()


def test_the_last_and_the_best_are_kept(tmp_path: Path, here: World) -> None:
    checkpoints = Checkpoints(tmp_path, CheckpointSettings(keep_last=2), here)
    for step, metric in enumerate((3.0, 1.0, 2.0, None, float("nan"), 1.5), start=1):
        save(checkpoints, step, metric=metric)
    assert names(tmp_path) == ["step-00000002", "step-00000005", "step-00000006"]
    assert checkpoints.best() == tmp_path / "step-00000002"
    save(Checkpoints(tmp_path, CheckpointSettings(keep_last=1, keep_best=False), here), 7)
    assert names(tmp_path) == ["step-00000007"]


def test_a_step_that_is_saved_again_replaces_the_first_only_when_it_is_complete(tmp_path: Path, here: World) -> None:
    checkpoints = Checkpoints(tmp_path, CheckpointSettings(keep_last=3), here)
    save(checkpoints, 4, metric=0.1, attempt="first")
    save(checkpoints, 4, metric=0.2, attempt="second")
    assert names(tmp_path) == ["step-00000004-1"]
    model, optimizer = small()
    newest = checkpoints.latest()
    assert newest is not None
    assert checkpoints.load(newest, model=model, optimizer=optimizer)["attempt"] == "second"


def test_saving_in_the_background_writes_what_was_there_when_it_was_asked_for(tmp_path: Path, here: World) -> None:
    written = {}
    for asynchronous in (False, True):
        checkpoints = Checkpoints(tmp_path / str(asynchronous), CheckpointSettings(asynchronous=asynchronous), here)
        model, optimizer = small(3.0)
        torch.manual_seed(0)
        checkpoints.save(5, model=model, optimizer=optimizer, progress={"step": 5})
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(-1.0)
                optimizer.state[parameter]["exp_avg"].fill_(-1.0)
        checkpoints.wait()
        newest = checkpoints.latest()
        assert newest is not None
        written[asynchronous] = {path.name: path.read_bytes() for path in newest.iterdir() if path.name != ".metadata"}
        other, other_optimizer = small()
        checkpoints.load(newest, model=other, optimizer=other_optimizer)
        assert all(bool((parameter == 3.0).all()) for parameter in other.parameters())
    assert written[True] == written[False]


def test_frozen_parameters_can_be_left_out(tmp_path: Path, here: World) -> None:
    sizes = {}
    for save_frozen in (True, False):
        model, optimizer = small(2.0, width=1000)
        model[0].requires_grad_(False)
        optimizer = torch.optim.AdamW(model[1].parameters(), lr=0.0)
        checkpoints = Checkpoints(tmp_path / str(save_frozen), CheckpointSettings(save_frozen=save_frozen), here)
        checkpoints.save(1, model=model, optimizer=optimizer, progress={})
        newest = checkpoints.latest()
        assert newest is not None
        sizes[save_frozen] = sum(path.stat().st_size for path in newest.iterdir())
        other, _ = small(9.0, width=1000)
        other[0].requires_grad_(False)
        checkpoints.load(newest, model=other, optimizer=optimizer)
        assert bool((other[1].weight == 2.0).all())
        assert bool((other[0].weight == (2.0 if save_frozen else 9.0)).all())
    assert sizes[True] - sizes[False] > 4 * 4 * 1000
    other[0].requires_grad_(True)
    with pytest.raises(ConfigError, match=r"lacks 2 that train, has 0 .* \(first: 0\.bias\)"):
        checkpoints.load(newest, model=other, optimizer=optimizer)


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path, here: World) -> None:
    checkpoints = Checkpoints(tmp_path, CheckpointSettings(), here)
    save(checkpoints, 1)
    model, optimizer = small(width=8)
    with pytest.raises(ConfigError, match="and 3 in another shape"):
        checkpoints.load(tmp_path / "step-00000001", model=model, optimizer=optimizer)
    with pytest.raises(ConfigError, match="has 2 that the model has not"):
        checkpoints.load(tmp_path / "step-00000001", model=small()[0][:1], optimizer=optimizer)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: cut(folder / "__0_0.distcp"), "cannot be read"),
        (lambda folder: (folder / "__0_0.distcp").unlink(), "cannot be read: .*No such file"),
        (lambda folder: cut(folder / ".metadata"), "damaged"),
        (lambda folder: (folder / "progress.json").unlink(), "not a complete checkpoint"),
        (lambda folder: cut(folder / "progress.json"), "not a complete checkpoint"),
    ],
)
def test_a_damaged_checkpoint_is_an_error_that_names_it(
    tmp_path: Path, here: World, damage: Callable[[Path], Any], message: str
) -> None:
    checkpoints = Checkpoints(tmp_path, CheckpointSettings(), here)
    save(checkpoints, 1)
    damage(tmp_path / "step-00000001")
    model, optimizer = small()
    with pytest.raises(StorageError, match=message) as raised:
        checkpoints.load(tmp_path / "step-00000001", model=model, optimizer=optimizer)
    assert "step-00000001" in str(raised.value)


def test_another_format_is_refused(tmp_path: Path, here: World) -> None:
    save(Checkpoints(tmp_path, CheckpointSettings(), here), 1)
    progress = tmp_path / "step-00000001" / "progress.json"
    progress.write_text(json.dumps({**json.loads(progress.read_text()), "format": 2}))
    with pytest.raises(ConfigError, match="format 2; this version reads format 1"):
        read_saved_step(progress.parent)


def test_settings_that_keep_nothing_are_refused() -> None:
    with pytest.raises(ValidationError):
        CheckpointSettings(keep_last=0)


# What goes wrong


def save_beyond_a_limit(here: World, folder: Path, asynchronous: bool) -> list[str]:
    """Save step 1, then step 2 on a disk that takes files of no more than 20,000 bytes."""
    checkpoints = Checkpoints(folder, CheckpointSettings(asynchronous=asynchronous, keep_last=1), here)
    save(checkpoints, 1)
    checkpoints.wait()
    model, optimizer = small(2.0, width=10_000)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    messages = []
    try:
        checkpoints.save(2, model=model, optimizer=optimizer, progress={})
        checkpoints.wait()
    except StorageError as error:
        messages.append(str(error))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    newest = checkpoints.latest()
    assert newest == folder / "step-00000001", newest
    assert not list(folder.glob("*.tmp"))
    small_model, small_optimizer = small()
    assert checkpoints.load(newest, model=small_model, optimizer=small_optimizer)["step"] == 1
    save(checkpoints, 3)
    checkpoints.wait()
    assert names(folder) == ["step-00000003"]
    return messages


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_save_that_does_not_fit_leaves_the_one_before(tmp_path: Path, num_ranks: int, asynchronous: bool) -> None:
    for messages in run_ranks(save_beyond_a_limit, num_ranks, tmp_path / "c", asynchronous):
        (message,) = messages
        assert "the checkpoint of step 2 could not be written" in message
        assert "earlier ones are kept" in message


def test_a_process_killed_at_any_moment_of_a_save_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    """Takes 20 s: two dozen processes are killed, each before another operation on a file."""
    command = [sys.executable, "-W", "error", str(ROOT / "tests" / "train" / "killed_saves.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [line.split() for line in done.stdout.splitlines()]
    assert rows[-1][1:] == ["lived", "2"]
    found = [int(step) for _, fate, step in rows if fate == "killed"]
    assert found == sorted(found), "once the new one is there, it stays"
    assert found.count(1) >= 10, "killed before the new one is complete"
    assert found.count(2) >= 3, "killed while the old one is removed"


def die_in_the_second_save(here: World, folder: Path) -> None:
    """Kill rank 1 while it writes step 2."""
    checkpoints = Checkpoints(folder, CheckpointSettings(keep_last=1), here)
    save(checkpoints, 1)
    if here.rank == 1:
        sys.addaudithook(lambda event, given: os._exit(9) if event == "open" and ".distcp" in str(given[0]) else None)
    save(checkpoints, 2)


def newest_step(here: World, folder: Path) -> int:
    checkpoints = Checkpoints(folder, CheckpointSettings(keep_last=1), here)
    newest = checkpoints.latest()
    assert newest is not None
    model, optimizer = small()
    step = int(checkpoints.load(newest, model=model, optimizer=optimizer)["step"])
    assert bool((model[0].weight == step).all())
    return step


def test_a_rank_killed_in_a_save_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    survivor, dead = outcomes_of(die_in_the_second_save, 2, tmp_path / "c")
    assert isinstance(survivor, RankFailed)
    assert isinstance(dead, RankFailed)
    assert run_ranks(newest_step, 2, tmp_path / "c") == [1, 1]


# Ranks


def train(here: World, folder: Path, *, first: int, last: int, asynchronous: bool) -> tuple[list[float], str]:
    """Go on from the newest checkpoint to step `last`, save, and return the losses and a digest of all that was saved."""
    model = shard(trainable(seed=first + 1), ParallelSettings(), here)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    checkpoints = Checkpoints(folder, CheckpointSettings(keep_last=1, asynchronous=asynchronous), here)
    newest = checkpoints.latest()
    assert (newest is None) == (first == 0)
    if newest is not None:
        assert checkpoints.load(newest, model=model, optimizer=optimizer) == {"step": first}
    rows = [batch_of("text", "audio"), batch_of("image", "film")]
    total = sum(int((labels != -100).sum()) for _, labels in rows)
    losses = []
    for _ in range(first, last):
        parts = [model(*row).sum() / total for row in rows[here.rank :: here.world_size]]
        for part in parts:
            part.backward()
        clip_gradients(model.parameters(), 1.0, here)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(all_sum([sum(part.item() for part in parts)], here)[0])
    checkpoints.save(last, model=model, optimizer=optimizer, progress={"step": last})
    checkpoints.wait()
    return losses, digest(model, optimizer)


def digest(model: Any, optimizer: Any) -> str:
    found = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        state = optimizer.state.get(parameter, {})
        for part in (parameter, *(state[key] for key in sorted(state))):
            found.update(name.encode() + full(part).contiguous().numpy().tobytes())
    return found.hexdigest()


def reload(here: World, folder: Path, step: int) -> str:
    """Load a checkpoint into a model and an optimizer that know nothing of it, and return the digest of what came."""
    model = shard(trainable(seed=99), ParallelSettings(), here)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    checkpoints = Checkpoints(folder, CheckpointSettings(keep_last=1), here)
    checkpoints.load(folder / f"step-{step:08d}", model=model, optimizer=optimizer)
    return digest(model, optimizer)


def save_and_load_adapters(here: World, folder: Path) -> tuple[str, str, str]:
    """Train adapters for a step and save only them; return digests of what was saved, what was there, and what came."""
    checkpoints = Checkpoints(folder, CheckpointSettings(save_frozen=False), here)
    found = []
    for is_saving in (True, False):
        model = shard(trainable(names=("lora", "language_model")), ParallelSettings(), here)
        optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=1e-2)
        if is_saving:
            model(*batch_of("text")).mean().backward()
            optimizer.step()
            checkpoints.save(1, model=model, optimizer=optimizer, progress={})
        else:
            found.append(digest(model, optimizer))
            checkpoints.load(folder / "step-00000001", model=model, optimizer=optimizer)
        found.append(digest(model, optimizer))
    return found[0], found[1], found[2]


def test_adapters_alone_are_a_small_checkpoint_of_sharded_ranks(tmp_path: Path) -> None:
    for saved, before, loaded in run_ranks(save_and_load_adapters, 2, tmp_path / "c"):
        assert saved == loaded != before
    assert sum(path.stat().st_size for path in (tmp_path / "c").rglob("*") if path.is_file()) < 1_000_000


def many_steps(here: World, folder: Path, spans: list[tuple[int, int, bool]]) -> list[tuple[list[float], str]]:
    return [train(here, folder, first=first, last=last, asynchronous=background) for first, last, background in spans]


def test_two_ranks_then_one_then_two_continue_as_if_nothing_had_happened(tmp_path: Path) -> None:
    """Takes half a minute: processes of torch start five times, and a checkpoint of the vocabulary's size is 240 MB."""
    folder = tmp_path / "c"
    ((uninterrupted, _),) = run_ranks(many_steps, 1, tmp_path / "whole", [(0, 6, False)])[0]
    losses = []
    for num_ranks, span in ((2, (0, 2, False)), (1, (2, 4, False)), (2, (4, 6, True))):
        outcomes = run_ranks(many_steps, num_ranks, folder, [span])
        assert all(outcome == outcomes[0] for outcome in outcomes)
        ((found, saved),) = outcomes[0]
        losses += found
        if span[1] in (2, 6):
            assert run_ranks(reload, 3 - num_ranks, folder, span[1])[0] == saved, "on another number of ranks, bit by bit"
    assert losses == pytest.approx(uninterrupted, rel=1e-5)
    assert uninterrupted[-1] < uninterrupted[0] - 1
