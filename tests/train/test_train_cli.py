"""`omniprep train thinker`: it can be stopped and killed, wrong use is one line, and a dry run says what would happen.

The processes that are stopped and killed, some of them under torchrun, take about 2 minutes on a core.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from omniprep.cli import app
from omniprep.profile import QWEN2_5_OMNI
from omniprep.shards.manifest import canonical_sha256

pytestmark = pytest.mark.reference
torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from tests.train.runs import PHASE, STEPS, assert_same_run, column, lines, values, weights  # noqa: E402

LAYOUTS = Path(__file__).parents[2] / "omniprep" / "train" / "layouts"


def written(folder: Path, place: str, **changes: Any) -> Path:
    """Write a recipe whose output is `folder`."""
    path = folder / "recipe.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(values(folder, place, **changes)))
    return path


def command(path: Path, *options: str, num_ranks: int = 1) -> list[str]:
    python = [sys.executable, "-m"]
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks), "-m"] if num_ranks > 1 else []
    return [*python, *launcher, "omniprep", "train", "thinker", str(path), *options]


@contextmanager
def started(path: Path, *options: str, num_ranks: int = 1) -> Iterator[subprocess.Popen[bytes]]:
    """Start the command, what it tells goes to `told.txt` beside the recipe; at the end nothing of it is left."""
    with (path.parent / "told.txt").open("wb") as told:
        process = subprocess.Popen(command(path, *options, num_ranks=num_ranks), stdout=told, stderr=subprocess.STDOUT)
    ranks: list[int] = []
    try:
        yield process
    finally:
        if process.poll() is None:
            ranks = children_of(process.pid)
            process.kill()
            process.wait()
        for rank in ranks:  # torchrun's are in sessions of their own
            with suppress(ProcessLookupError):
                os.kill(rank, signal.SIGKILL)


def wait_for(condition: Callable[[], object], process: subprocess.Popen[bytes]) -> None:
    due_s = time.monotonic() + 90
    while not condition():
        assert process.poll() is None, "it ended before"
        assert time.monotonic() < due_s
        time.sleep(0.02)


def steps(folder: Path) -> list[float]:
    return column(folder, "step")


def test_sigterm_ends_a_run_after_its_step_and_the_same_command_goes_on(whole: Path, mixed: str, tmp_path: Path) -> None:
    path = written(tmp_path, mixed, steps=STEPS)
    with started(path) as process:
        wait_for(lambda: steps(tmp_path)[1:], process)
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)
    told = (tmp_path / "told.txt").read_text()
    last = steps(tmp_path)[-1]
    assert process.returncode == 143, told
    assert f"stopped after step {last}, which is saved; the same command, without --overwrite, goes on from there" in told
    assert "Traceback" not in told
    done = subprocess.run(command(path), capture_output=True, text=True, check=True)
    assert re.fullmatch(
        rf"{PHASE}: {STEPS} steps, validation loss \d+\.\d{{4}}; the model is in {tmp_path}/.*/model\n", done.stdout
    )
    # Nothing but the run's own lines: no bars of libraries, no warnings.
    assert all(line.startswith(f"{PHASE}: step ") for line in done.stderr.splitlines()), done.stderr
    assert_same_run(tmp_path, whole, rel=1e-6)


def test_kill_9_loses_nothing_that_was_saved(whole: Path, mixed: str, tmp_path: Path) -> None:
    path = written(tmp_path, mixed, steps=STEPS, checkpoints={"every_steps": 2})
    with started(path) as process:
        wait_for(lambda: steps(tmp_path)[2:], process)
        process.kill()
    assert not (tmp_path / PHASE / "result.json").exists()
    subprocess.run(command(path), capture_output=True, check=True)
    assert [line["step"] for line in lines(tmp_path, kind="run")] == [0, 2]
    assert_same_run(tmp_path, whole, rel=1e-6)
    ours, theirs = weights(tmp_path), weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def children_of(pid: int) -> list[int]:
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False)
    return [int(word) for word in listed.stdout.split()]


def rank_of(pid: int) -> str | None:
    variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next((value[5:].decode() for value in variables if value.startswith(b"RANK=")), None)


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds ranks by /proc")
def test_under_torchrun_a_lost_rank_ends_the_run_and_the_checkpoint_is_kept(mixed: str, tmp_path: Path) -> None:
    path = written(tmp_path, mixed, steps=500, checkpoints={"every_steps": 1}, watch={"evaluate_every": None})
    with started(path, num_ranks=2) as process:
        wait_for(lambda: steps(tmp_path)[1:], process)
        (lost,) = [pid for pid in children_of(process.pid) if rank_of(pid) == "1"]
        os.kill(lost, signal.SIGKILL)
        process.wait(timeout=60)
    told = (tmp_path / "told.txt").read_text()
    assert process.returncode == 1
    assert "rank      : 1" in told
    assert "exitcode  : -9" in told
    assert steps(tmp_path)[-1] < 500
    assert list((tmp_path / PHASE / "checkpoints").glob("step-????????"))


def run(*arguments: object, code: int = 0) -> Any:
    result = CliRunner().invoke(app, ["train", "thinker", *map(str, arguments)], env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


def refused(*arguments: object) -> str:
    """Return the one line that is told of a mistake."""
    result = run(*arguments, code=2)
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return str(line)


def restamped(place: str, folder: Path, **changes: Any) -> str:
    """Return a copy of a dataset whose manifest says something else."""
    folder.mkdir()
    for file in Path(place).iterdir():
        if file.is_file():
            (folder / file.name).symlink_to(file)
    told = json.loads((folder / "manifest.json").read_text())
    del told["sha256"]
    told |= changes
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").write_text(json.dumps({**told, "sha256": canonical_sha256(told)}))
    return str(folder)


WRONG_VALUES = {
    "data.plan.max_tokens=200000": r"data\.plan\.max_tokens: 200000 > 32768, the model's max_position_embeddings; lower it",
    "data.plan.max_tokens=150": r"\(even-\d+\): 1\d\d tokens > max_tokens=150 \(so are .*\); raise max_tokens, or set",
    "data.validation_split=dev": r"data\.validation_split: no dataset has a split 'dev', they have train, val; name one of them",
    "data.split=dev": r"no samples in split 'dev'; it has 'train', 'val'",
    "data.plan.max_token=8": r"recipe\.yaml: data\.plan\.max_token: .*",
    "model.checkpoint=nowhere/model": r"model\.checkpoint: nowhere/model: expected 'tiny', a folder with a config\.json",
    "objective=dpo": r"objective 'dpo' learns from preferences \(`kind: preference` in its recipe\), this dataset holds seq",
    "data.datasets=[nowhere]": r"nowhere: .*",
    "data.rope_mode=reference": r"rope_mode: data\.rope_mode says 'reference', the datasets have positions of 'aligned'; prepare",
    "phases.1.steps=2": r"--set phases\.1\.steps: expected a number below 1 in place of '1'",
    "phases.0.train=[head, tail]": r"phases\.0\.train\.1: .*",
    "phases.0.epochs=1": r"expected one of `epochs` and `steps`",
    "phases": r"--set phases: expected PATH=VALUE, for example data\.plan\.max_tokens=4096",
    "seed=[1": r"--set seed=\[1: not a YAML value: ",
    "watch.trackers=[paper]": r"watch\.trackers\.0: .*",
}


@pytest.mark.parametrize("change", WRONG_VALUES)
def test_wrong_values_are_told_in_a_line(change: str, mixed: str, tmp_path: Path) -> None:
    path = written(tmp_path, mixed)
    assert re.search(WRONG_VALUES[change], refused(path, "--set", change))
    assert list(tmp_path.iterdir()) == [path]


WRONG_DATA: dict[str, tuple[dict[str, Any], str]] = {
    "profile": ({"profile": "other"}, "made for the profile 'other', the model is 'qwen2.5-omni'; prepare it anew"),
    "codec": ({"codec": "mimi"}, "holds speech codes of the codec 'mimi', which a Thinker does not read"),
    "kind": (
        {"kind": "preference"},
        "learns from conversations or documents, this dataset holds preferences",
    ),
}


@pytest.mark.parametrize("what", WRONG_DATA)
def test_data_of_another_kind_are_refused(what: str, mixed: str, tmp_path: Path) -> None:
    changes, said = WRONG_DATA[what]
    place = restamped(mixed, tmp_path / "data", **changes)
    assert said in refused(written(tmp_path, place))


def test_data_without_a_supervised_token_are_refused(mixed: str, tmp_path: Path) -> None:
    splits = json.loads((Path(mixed) / "manifest.json").read_text())["by_split"]
    silent = {**splits, "train": {**splits["train"], "num_supervised": 0}}
    place = restamped(mixed, tmp_path / "data", by_split=silent)
    said = refused(written(tmp_path, place))
    assert re.search(r"none of the [\d,]+ tokens of split 'train' is supervised, so there is nothing to learn", said)


def test_positions_of_two_kinds_are_refused(mixed: str, tmp_path: Path) -> None:
    other = restamped(mixed, tmp_path / "data", rope_mode="reference")
    said = refused(written(tmp_path, mixed), "--set", f"data.datasets=[{mixed}, {other}]")
    assert f"positions of one kind (encode.rope_mode); got {mixed}: aligned, {other}: reference" in said


def test_positions_other_than_the_checkpoints_are_refused(whole: Path, mixed: str, tmp_path: Path) -> None:
    model = whole / PHASE / "model"
    other = restamped(mixed, tmp_path / "data", rope_mode="reference")
    path = written(tmp_path, other, model={"checkpoint": str(model)})
    assert f"{model}/omniprep.json says 'aligned', the datasets have positions of 'reference'" in refused(path, "--dry-run")
    run(path, "--dry-run", "--set", "data.rope_mode=reference")


def test_steps_that_cannot_be_shared_out_are_refused(mixed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "0")
    said = refused(written(tmp_path, mixed), "--dry-run")
    assert "global_batch_size=2 cannot be shared out evenly to world_size=4 ranks; set it to a multiple of 4" in said


def test_a_recipe_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("- output: here\n")
    assert "expected a mapping with `output`, `data` and `phases`, got list" in refused(tmp_path / "recipe.yaml")
    assert "missing.yaml" in refused(tmp_path / "missing.yaml")


def test_a_loss_that_is_no_number_is_told_and_nothing_is_lost(mixed: str, tmp_path: Path) -> None:
    path = written(tmp_path, mixed, steps=4, checkpoints={"every_steps": 1})
    rate = "phases.0.optimizer.learning_rate=1.0e+30"
    result = run(path, "--set", rate, code=1)
    (said,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert re.match(r"error: step \d: the loss is not a number in a row with (even|odd)-\d+.* Nothing was updated", said)
    assert "Traceback" not in result.stderr
    assert (tmp_path / PHASE / "checkpoints" / "step-00000001" / "progress.json").exists()


def test_a_dry_run_says_what_would_be_trained(mixed: str, tmp_path: Path) -> None:
    path = written(tmp_path, mixed, phases=[{"name": "one", "train": ["head"], "epochs": 2}])
    found = json.loads(run(path, "--dry-run", "--json").stdout)
    (phase,) = found["phases"]
    assert (phase["name"], phase["trains"], phase["num_steps"]) == ("one", ["head"], 2 * phase["steps_an_epoch"])
    totals = json.loads((Path(mixed) / "manifest.json").read_text())["by_split"]["train"]
    assert phase["tokens_an_epoch"] == totals["num_tokens"]
    assert phase["num_trained"] == found["parameters"]["head"] == 64 * QWEN2_5_OMNI.vocab_size  # as wide as its hidden states
    shown = run(path, "--dry-run").stdout
    assert f"one: {phase['num_steps']} steps of " in shown
    assert "memory of one GPU, heaviest row (an H200 has 141 GB)" in shown
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("layout", "billions"), [("qwen2_5_omni_3b", 4.7), ("qwen2_5_omni_7b", 8.9)])
def test_a_dry_run_of_the_released_sizes_loads_no_weights(layout: str, billions: float, mixed: str, tmp_path: Path) -> None:
    path = written(tmp_path, mixed, model={"checkpoint": str(LAYOUTS / layout), "from_scratch": True})
    found = json.loads(run(path, "--dry-run", "--json").stdout)
    assert sum(found["parameters"].values()) / 1e9 == pytest.approx(billions, abs=0.1)
