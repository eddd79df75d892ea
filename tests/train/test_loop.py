"""A step divides once by what is counted over everything, and what is no number changes nothing."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from omniprep.stream.batch import pack
from tests.train.batches import MIX, batch_of

pytestmark = pytest.mark.reference
torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from omniprep.stream.dataset import to_torch  # noqa: E402
from omniprep.train.checkpoint import Checkpoints, CheckpointSettings  # noqa: E402
from omniprep.train.dpo import DpoSettings  # noqa: E402
from omniprep.train.loop import Looped, Stopped, TrainingError, read_steps, to_device, train_loop  # noqa: E402
from omniprep.train.objective import NextToken, Objective, PairPreference  # noqa: E402
from omniprep.train.optimizer import OptimizerSettings, make_optimizer  # noqa: E402
from omniprep.train.parallel import World, world  # noqa: E402
from omniprep.train.progress_log import RunLog, WatchSettings, read_log  # noqa: E402
from omniprep.train.signals import StopRequest  # noqa: E402
from tests.train.rank_work import ALL, trainable  # noqa: E402
from tests.train.ranks import run_ranks  # noqa: E402

SETTINGS = OptimizerSettings(learning_rate=3e-3, schedule="constant")
NOTHING = to_torch(pack([], pad_to=8))
"""A row without a document, as a rank gets it when a step has too few."""


class Stream:
    """Given batches in given epochs; a step has `per_step` of them."""

    def __init__(self, epochs: Sequence[Sequence[dict[str, Any]]], *, per_step: int = 1) -> None:
        self.plan = SimpleNamespace(config=SimpleNamespace(global_batch_size=per_step))
        self._epochs = iter(epochs)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return ({**batch, "state": {"number": number}} for number, batch in enumerate(next(self._epochs)))


def looped(batches: Sequence[dict[str, Any]], *, per_step: int = 1, names: Sequence[str] = ALL, **changes: Any) -> Looped:
    """Return a phase over these batches, with the same tiny model each time."""
    model = trainable(names=names)
    found = Looped(
        model=model,
        optimizer=make_optimizer(model.parameters(), SETTINGS),
        objective=NextToken(),
        stream=Stream([batches], per_step=per_step),  # type: ignore[arg-type]
        num_steps=len(batches) // per_step,
        settings=SETTINGS,
        flops=lambda batch: 1.0,
        validate=None,
        sample=None,
        evaluate_every=None,
        sample_every=None,
        checkpoint_every=None,
    )
    return replace(found, **changes)


def loop(work: Looped, folder: Path, *, stop: StopRequest | None = None, **progress: Any) -> list[dict[str, Any]]:
    """Run a loop to its end and return the lines of its log."""
    torch.set_num_threads(1)
    settings = WatchSettings(log_every=1)
    with world(device="cpu") as here, RunLog(folder=folder, settings=settings, num_steps=work.num_steps, shown="none") as log:
        checkpoints = Checkpoints(folder / "checkpoints", CheckpointSettings(), here)
        train_loop(
            work, world=here, log=log, checkpoints=checkpoints, progress={"step": 0, **progress}, stop=stop or StopRequest()
        )
    return read_log(folder / "log.jsonl", kind="step")


def weights(work: Looped) -> dict[str, Any]:
    return {name: value.detach().clone() for name, value in work.model.named_parameters()}


def changed(work: Looped, before: dict[str, Any]) -> set[str]:
    return {name for name, value in work.model.named_parameters() if not torch.equal(value, before[name])}


def assert_same(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    """Check every value that does not depend on the clock or on how rows are filled."""
    names = {name for line in theirs for name in line if name == "grad_norm" or name.startswith(("loss", "margin", "reward"))}
    assert {"loss", "grad_norm", "loss/modality/text", "loss/source/test"} <= names
    for name in names:
        assert [line[name] for line in ours] == pytest.approx([line[name] for line in theirs], rel=1e-5, abs=1e-6), name


CONVERSATIONS = ("text", "audio", "image", "film", "mixed")


def test_micro_batches_are_one_batch(tmp_path: Path) -> None:
    one = loop(looped([batch_of(*CONVERSATIONS)] * 3), tmp_path / "one")
    apart = [batch_of("mixed"), batch_of("text", "audio"), NOTHING, batch_of("film", "image")]
    accumulated = loop(looped(apart * 3, per_step=4), tmp_path / "accumulated")
    assert len(one) == len(accumulated) == 3
    assert_same(accumulated, one)


class Even:
    """A reference that finds every answer equally likely."""

    def __call__(self, batch: Any) -> Any:
        return torch.full((len(batch["documents"]),), -40.0)


def test_micro_batches_of_pairs_are_one_batch(tmp_path: Path) -> None:
    objective: Objective = PairPreference(DpoSettings(nll_weight=0.2), Even())
    one = loop(looped([batch_of("media pair", "text pair")] * 3, objective=objective), tmp_path / "one")
    apart = [batch_of("text pair"), NOTHING, batch_of("media pair")]
    accumulated = loop(looped(apart * 3, per_step=3, objective=objective), tmp_path / "accumulated")
    assert_same(accumulated, one)
    assert one[-1]["margin"] > one[0]["margin"]


def test_a_loss_that_is_no_number_changes_nothing_and_names_step_and_records(tmp_path: Path) -> None:
    work = looped([batch_of("text"), batch_of("audio"), batch_of("image")], checkpoint_every=1)
    seen: list[dict[str, Any]] = []

    class Poisoned(NextToken):
        def loss(self, losses: Any, batch: Any, tally: Any) -> Any:
            if batch["keys"] == ["audio"]:
                seen.append(weights(work))
                return super().loss(losses * float("nan"), batch, tally)
            return super().loss(losses, batch, tally)

    with pytest.raises(TrainingError, match=r"^step 2: the loss is not a number in a row with audio\. Nothing was updated"):
        loop(replace(work, objective=Poisoned()), tmp_path)
    assert not changed(work, seen[0])
    assert [line["step"] for line in read_log(tmp_path / "log.jsonl", kind="step")] == [1]
    with world(device="cpu") as here:
        checkpoints = Checkpoints(tmp_path / "checkpoints", CheckpointSettings(), here)
        other = looped([batch_of("text")])
        newest = checkpoints.latest()
        assert newest is not None
        assert checkpoints.load(newest, model=other.model, optimizer=other.optimizer)["step"] == 1
    assert not changed(other, seen[0])


def test_a_frozen_weight_that_is_no_number_is_noticed_although_no_gradient_is(tmp_path: Path) -> None:
    work = looped([batch_of("text")], names=["audio_adapter"])
    with torch.no_grad():
        work.model.thinker.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(TrainingError, match="step 1: the loss is not a number in a row with text"):
        loop(work, tmp_path)
    assert not work.optimizer.state


def test_a_gradient_that_is_no_number_is_told(tmp_path: Path) -> None:
    work = looped([batch_of("text")])
    work.model.thinker.lm_head.weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(TrainingError, match="step 1: the gradient is not a number"):
        loop(work, tmp_path)


def test_a_step_without_a_supervised_token_updates_nothing(tmp_path: Path) -> None:
    work = looped([NOTHING, NOTHING], per_step=2, settings=OptimizerSettings(learning_rate=1.0, weight_decay=0.5))
    before = weights(work)
    (line,) = loop(work, tmp_path)
    assert line["grad_norm"] == 0.0
    assert "loss" not in line
    assert not changed(work, before)
    assert not work.optimizer.state


def test_a_stop_ends_the_run_after_its_step_and_the_validation_is_made_up_for(tmp_path: Path) -> None:
    stop = StopRequest()
    measured: list[int] = []

    def validate() -> dict[str, float]:
        measured.append(1)
        return {"loss": 7.0}

    class Asked(NextToken):
        def count(self, batch: Any) -> int:
            stop.signal = 15
            return super().count(batch)

    batches = [batch_of("text"), batch_of("audio")]
    work = looped(batches, objective=Asked(), validate=validate, evaluate_every=1)
    with pytest.raises(Stopped, match="stopped after step 1, which is saved"):
        loop(work, tmp_path, stop=stop)
    assert not measured
    (saved,) = (tmp_path / "checkpoints").iterdir()
    assert saved.name == "step-00000001"
    # At the last step as well: nothing is left but to measure, and no step is taken again.
    done = looped([], validate=validate, num_steps=1)
    assert loop(done, tmp_path / "again", step=1, to_measure=True, validation={"loss": 9.0}) == []
    assert len(measured) == 1


def test_epochs_follow_one_another_and_the_last_is_left_in_its_middle() -> None:
    batches = [batch_of(name) for name in ("text", "audio", "image")]
    work = replace(looped(batches), stream=Stream([batches[1:], batches, batches]), num_steps=6)  # type: ignore[arg-type]
    with world(device="cpu") as here:
        steps = list(read_steps(work, first=1, world=here))
    assert [step.number for step in steps] == [2, 3, 4, 5, 6]
    assert [step.batches[0]["keys"] for step in steps] == [["audio"], ["image"], ["text"], ["audio"], ["image"]]


def wait_of_rank(here: World) -> float:
    """Return what is logged as the wait for data of a step for which rank 1 waited longest."""
    from omniprep.train.loop import _most

    return _most([0.25 if here.rank else 0.125, 0.0], here)[0]


def test_the_wait_for_data_is_that_of_the_slowest_rank() -> None:
    assert run_ranks(wait_of_rank, 2) == [0.25, 0.25]


def test_tensors_of_a_batch_move_and_the_rest_stays() -> None:
    batch = batch_of(*MIX)
    moved = to_device(batch, torch.device("meta"))
    assert {value.device.type for value in moved["inputs"].values() if isinstance(value, torch.Tensor)} == {"meta"}
    assert moved["shift_labels"].device.type == moved["cu_seqlens"].device.type == "meta"
    assert moved["documents"] is batch["documents"]
    assert batch["shift_labels"].device.type == "cpu"
