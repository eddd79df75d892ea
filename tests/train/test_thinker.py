"""Whole runs: what must not matter does not, stopping and going on changes nothing, phases follow one another.

Runs of a few steps of a model with 152,000 words, some on two processes: about 3 minutes on a core.
"""

import errno
import json
from pathlib import Path
from typing import Any

import pytest

from omniprep.errors import ConfigError
from omniprep.storage.folder import StorageError
from tests.stream.model_records import alone

pytestmark = pytest.mark.reference
torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from omniprep.train import thinker  # noqa: E402
from omniprep.train.parallel import World  # noqa: E402
from tests.train.ranks import RankFailed, outcomes_of  # noqa: E402
from tests.train.runs import PHASE, STEPS, assert_same_run, column, lines, recipe, train, weights  # noqa: E402


def test_losses_go_down_and_every_step_is_logged_once(whole: Path) -> None:
    losses = column(whole, "loss")
    assert column(whole, "step") == list(range(1, STEPS + 1))
    assert losses[-1] < losses[0] - 1
    assert column(whole, "step", kind="validation") == [3, 6]
    (first, last) = lines(whole, kind="validation")
    assert last["loss"] < first["loss"]
    for kind in ("modality/text", "modality/image", "modality/audio+video", "source/even", "source/odd"):
        assert 9 < last[f"loss/{kind}"] < 12
    result = json.loads((whole / PHASE / "result.json").read_text())
    assert (result["steps"], result["validation"]["loss"]) == (STEPS, last["loss"])


def test_two_ranks_are_one_process_also_when_it_stops_and_goes_on_with_one(whole: Path, mixed: str, tmp_path: Path) -> None:
    again = recipe(tmp_path, mixed, steps=STEPS)
    said = "stopped after step {}, which is saved; the same command, without --overwrite, goes on from there"
    assert train(again, num_ranks=2, stop_in=2) == [said.format(2)] * 2
    # Step 3 is one to validate after: that is made up for, by two ranks.
    assert train(again, stop_in=3) == [said.format(3)]
    assert column(tmp_path, "step", kind="validation") == []
    assert train(again, num_ranks=2) == ["done", "done"]
    assert_same_run(tmp_path, whole, rel=1e-5)


def test_a_run_that_stops_goes_on_as_if_it_had_not(whole: Path, mixed: str, tmp_path: Path) -> None:
    again = recipe(tmp_path, mixed, steps=STEPS, checkpoints={"asynchronous": True})
    train(again, stop_in=3)
    assert column(tmp_path, "step") == [1, 2, 3]
    assert train(again, stop_in=STEPS)[0].startswith(f"stopped after step {STEPS}")
    assert not (tmp_path / PHASE / "result.json").exists()
    assert train(again) == ["done"]
    assert_same_run(tmp_path, whole, rel=1e-6)
    ours, theirs = weights(tmp_path), weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_an_export_that_was_killed_is_made_again(
    whole: Path, mixed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = recipe(tmp_path, mixed, steps=1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("omniprep.train.phase.write_thinker", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        thinker.train(short)
    (result,) = thinker.train(short)
    assert (result["steps"], column(tmp_path, "step")) == (1, [1])
    assert [result["validation"]["loss"]] == column(tmp_path, "loss", kind="validation")
    assert (tmp_path / PHASE / "model" / "config.json").exists()


def test_a_disk_that_is_full_when_the_model_is_written_costs_no_step(
    mixed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "model.safetensors")

    short = recipe(tmp_path, mixed, steps=1)
    with monkeypatch.context() as patch:
        patch.setattr("omniprep.train.phase.write_thinker", full)
        with pytest.raises(StorageError, match=r"model\.safetensors: No space left on device; mend that and run"):
            thinker.train(short)
    assert [result["steps"] for result in thinker.train(short)] == [1]
    assert column(tmp_path, "step") == [1]


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"data": {"num_threads": 0}}, id="threads"),
        pytest.param({"watch": {"evaluate_every": None}, "data": {"validation_split": None}}, id="validation"),
        pytest.param({"parallel": {"attention": "sdpa", "loss_chunk_tokens": 7}}, id="attention-and-chunks"),
        pytest.param({"parallel": {"activation_checkpointing": True}}, id="activations"),
    ],
)
def test_what_must_not_matter_does_not(changes: dict[str, Any], whole: Path, mixed: str, tmp_path: Path) -> None:
    train(recipe(tmp_path, mixed, steps=2, **changes))
    for name in ("loss", "grad_norm"):
        assert column(tmp_path, name) == pytest.approx(column(whole, name)[:2], rel=1e-5)


def test_lines_that_are_seldom_logged_have_the_means_of_all_steps_between(whole: Path, mixed: str, tmp_path: Path) -> None:
    train(recipe(tmp_path, mixed, steps=3, watch={"log_every": 3, "evaluate_every": 2}))
    assert column(tmp_path, "step") == [1, 3]
    first, last = lines(tmp_path)
    each = lines(whole)[:3]
    assert first["loss"] == pytest.approx(each[0]["loss"], rel=1e-6)
    assert min(each[1]["loss"], each[2]["loss"]) < last["loss"] < max(each[1]["loss"], each[2]["loss"])


DPO = {"objective": "dpo", "checkpoints": {"every_steps": None, "save_frozen": False}}
LORA = {"checkpoint": "tiny", "lora": {"rank": 4, "targets": ["q_proj", "up_proj"]}}
PREFERENCES: dict[str, dict[str, Any]] = {
    "copy": {"dpo": {"reference": "copy", "nll_weight": 0.1}},
    "adapter_off": {"dpo": {"reference": "adapter_off"}, "model": LORA},
    "stored": {"dpo": {"reference": "stored"}, "model": LORA},
}


def preference_recipe(output: Path, pairs: str, kind: str) -> Any:
    phase = {"name": PHASE, "train": ["language_model"], "steps": 6, "optimizer": {"learning_rate": 2e-2}}
    return recipe(output, pairs, phases=[phase], watch={"evaluate_every": 3}, **DPO, **PREFERENCES[kind])


@pytest.mark.parametrize("kind", PREFERENCES)
def test_preferences_raise_the_margin_and_two_ranks_are_one_process(kind: str, pairs: str, tmp_path: Path) -> None:
    train(preference_recipe(tmp_path / "one", pairs, kind))
    ours, theirs = tmp_path / "two", tmp_path / "one"
    train(preference_recipe(ours, pairs, kind), num_ranks=2)
    assert_same_run(ours, theirs, rel=1e-5, names=("grad_norm", "log_prob/chosen", "log_prob/rejected"))
    assert column(ours, "margin") == pytest.approx(column(theirs, "margin"), abs=1e-4)
    margins, losses = column(theirs, "margin"), column(theirs, "loss")
    assert margins[0] == pytest.approx(0.0, abs=1e-4)  # the model is its own reference
    assert margins[-1] > 0.02
    assert losses[-1] < losses[0]
    assert column(theirs, "margin", kind="validation")[-1] > 0.01


def phase(name: str, *trains: str, steps: int = 2, rate: float = 3e-3) -> dict[str, Any]:
    return {"name": name, "train": list(trains), "steps": steps, "optimizer": {"learning_rate": rate, "schedule": "constant"}}


ADAPTERS, ENCODERS = ("audio_adapter", "vision_adapter"), ("audio_encoder", "vision_encoder")


def part_of(name: str) -> str:
    """Return which part of the model an exported weight belongs to."""
    if name.startswith("audio_tower."):
        return "audio_adapter" if name.split(".")[1] in ("proj", "ln_post") else "audio_encoder"
    if name.startswith("visual."):
        return "vision_adapter" if name.split(".")[1] == "merger" else "vision_encoder"
    return "head" if name.startswith("lm_head.") else "language_model"


def changed_parts(ours: dict[str, Any], theirs: dict[str, Any]) -> set[str]:
    assert ours.keys() == theirs.keys()
    return {part_of(name) for name in ours if not torch.equal(ours[name], theirs[name])}


def test_phases_follow_one_another_and_train_what_they_name(mixed: str, tmp_path: Path) -> None:
    phases = [phase("adapters", *ADAPTERS), phase("encoders", *ADAPTERS, *ENCODERS), phase("lora", "language_model")]
    aligned = recipe(tmp_path, mixed, phases=phases[:2])
    results = thinker.train(aligned)
    assert [result["phase"] for result in results] == ["adapters", "encoders"]
    start = thinker_weights(aligned.seed, tmp_path / "start")
    first, second = (weights(tmp_path, phase=name) for name in ("adapters", "encoders"))
    assert changed_parts(first, start) == set(ADAPTERS)
    assert changed_parts(second, first) == {*ADAPTERS, *ENCODERS}
    # It begins where the first has ended: the loss on the same data goes on falling.
    assert column(tmp_path, "loss", kind="validation", phase="encoders")[-1] < results[0]["validation"]["loss"]

    # Phases that are done are left alone, and a third may be added behind them.
    steps = lines(tmp_path, phase="adapters")
    longer = recipe(tmp_path, mixed, phases=phases)
    assert [result["finished"] for result in thinker.train(longer)[:2]] == [result["finished"] for result in results]
    assert lines(tmp_path, phase="adapters") == steps
    assert changed_parts(weights(tmp_path, phase="lora"), second) == {"language_model"}


def thinker_weights(seed: int, folder: Path) -> dict[str, Any]:
    """Return the exported weights of the model that a run with this seed starts from."""
    from omniprep.train.model import ModelSettings, load_thinker, save_thinker

    save_thinker(load_thinker(ModelSettings(), seed=seed), folder / PHASE / "model")
    return weights(folder)


def test_the_exported_model_loads_in_plain_transformers_and_answers(whole: Path) -> None:
    from transformers import Qwen2_5OmniThinkerForConditionalGeneration

    plain, report = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(whole / PHASE / "model", output_loading_info=True)
    assert not report["missing_keys"]
    inputs = {name: torch.from_numpy(value) for name, value in alone("audio")["tokens"].items() if name != "labels"}
    prompt = {name: inputs[name][None] for name in ("input_ids", "attention_mask")}
    media = {name: inputs[name] for name in ("input_features", "feature_attention_mask")}
    answer = plain.eval().generate(**prompt, **media, max_new_tokens=3, do_sample=False)
    assert answer.shape[1] == prompt["input_ids"].shape[1] + 3


def test_overwrite_begins_anew_and_deletes_nothing_but_the_run(mixed: str, tmp_path: Path) -> None:
    (tmp_path / PHASE).mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    train(recipe(tmp_path, mixed, steps=1))
    again = recipe(tmp_path, mixed, steps=1, seed=1)
    with pytest.raises(ConfigError, match="is done, with another recipe; name another `output`, or begin anew with --overwrite"):
        thinker.train(again)
    first = column(tmp_path, "loss")
    (result,) = thinker.train(again, overwrite=True)
    assert result["recipe_sha256"] == again.sha256_of(again.phases[0])
    assert len(column(tmp_path, "loss")) == 1
    assert column(tmp_path, "loss") != first
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_run_of_another_recipe_is_refused_with_what_differs(mixed: str, tmp_path: Path) -> None:
    train(recipe(tmp_path, mixed, steps=3), stop_in=1)
    other = recipe(tmp_path, mixed, steps=4, seed=1, watch={"log_every": 2})
    with pytest.raises(ConfigError) as caught:
        thinker.train(other)
    assert "step-00000001: was made with another recipe (phase.steps: 3 -> 4; seed: 0 -> 1), so its losses" in str(caught.value)
    # How it is watched does not matter.
    assert train(recipe(tmp_path, mixed, steps=3, watch={"log_every": 2})) == ["done"]


def dying_rank(here: World, wanted: Any) -> str:
    """Train; rank 1 is killed while step 2 is taken. Return what rank 0 says."""
    import os

    from omniprep.train import loop

    take_step = loop._take_step

    def take(looped: Any, read: Any, **more: Any) -> Any:
        if read.number == 2 and here.rank == 1:
            os._exit(9)
        return take_step(looped, read, **more)

    loop._take_step = take
    try:
        thinker.train(wanted)
    except loop.TrainingError as error:
        return str(error)
    return "nothing was noticed"


def test_a_rank_that_dies_ends_the_others_and_the_checkpoint_is_kept(mixed: str, tmp_path: Path) -> None:
    wanted = recipe(tmp_path, mixed, steps=3, watch={"evaluate_every": None}, checkpoints={"every_steps": 1})
    said, died = outcomes_of(dying_rank, 2, wanted)
    assert isinstance(died, RankFailed)
    assert str(said).startswith("rank 0: another rank is gone (")
    assert str(said).endswith("Checkpoints are kept, the same command goes on from the last one")
    assert [path.name for path in (tmp_path / PHASE / "checkpoints").iterdir()] == ["step-00000001"]
    train(wanted)
    assert column(tmp_path, "step") == [1, 2, 3]
