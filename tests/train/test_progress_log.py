"""The log of a run: one line of valid JSON for each logged step, the same lines whether it stopped in between or not."""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omniprep.config import parse_config
from omniprep.errors import ConfigError
from omniprep.train.progress_log import LOG_NAME, RunLog, StepWork, WatchSettings, drop_lines_after, read_log

WORK = StepWork(num_tokens=900, num_places=1000, seconds=0.5, wait_s=0.005, flops=3e12)
EVERY = WatchSettings(log_every=1)


def take(folder: Path, first: int, last: int, *, num_steps: int = 10, settings: WatchSettings = EVERY, **options: Any) -> None:
    with RunLog(folder, settings, num_steps=num_steps, start_step=first, shown="none", **options) as log:
        for step in range(first + 1, last + 1):
            log.step(step, {"loss": 10.0 / step}, WORK)
            if step % 4 == 0:
                log.event("validation", step, {"loss": 20.0 / step})


def told(folder: Path) -> list[dict[str, Any]]:
    """Return what was logged of steps, without the clock."""
    lines = read_log(folder / LOG_NAME)
    return [{name: value for name, value in line.items() if name != "time"} for line in lines if line["kind"] != "run"]


def test_every_so_many_steps_a_line_and_the_first_and_last(tmp_path: Path) -> None:
    take(tmp_path, 0, 10, settings=WatchSettings(log_every=4))
    assert [line["step"] for line in read_log(tmp_path / LOG_NAME, kind="step")] == [1, 4, 8, 10]
    assert [line["step"] for line in read_log(tmp_path / LOG_NAME, kind="validation")] == [4, 8]


def test_rates_are_over_all_steps_since_the_last_line(tmp_path: Path) -> None:
    settings = WatchSettings(log_every=2)
    with RunLog(tmp_path, settings, num_steps=4, start_step=0, peak_flops=12e12, shown="none") as log:
        for step in (1, 2, 3, 4):
            slow = StepWork(num_tokens=300, num_places=400, seconds=1.5, wait_s=0.6, flops=9e12)
            log.step(step, {"loss": 1.0}, slow if step == 3 else WORK)
    first, _, last = read_log(tmp_path / LOG_NAME, kind="step")
    assert (first["step_s"], first["tokens_per_s"], first["mfu"]) == (0.5, 1800.0, 0.5)
    assert first["wait_share"] == pytest.approx(0.01)
    assert first["padding_share"] == pytest.approx(0.1)
    assert last["step_s"] == 1.0
    assert last["tokens_per_s"] == pytest.approx(1200 / 2)
    assert last["wait_share"] == pytest.approx(0.605 / 2)
    assert last["padding_share"] == pytest.approx(1 - 1200 / 1400)
    assert (last["tflops_per_s"], last["mfu"]) == (6.0, 0.5)


@given(stopped=st.integers(1, 9), saved=st.integers(0, 9), torn=st.booleans())
def test_a_run_that_stopped_has_the_log_of_one_that_never_did(
    tmp_path_factory: pytest.TempPathFactory, stopped: int, saved: int, torn: bool
) -> None:
    whole, parts = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("parts")
    take(whole, 0, 10)
    take(parts, 0, stopped)
    if torn:
        with (parts / LOG_NAME).open("a", encoding="utf-8") as file:
            file.write('{"kind": "step", "st')
    take(parts, min(saved, stopped), 10)
    assert told(parts) == told(whole)
    starts = [line["step"] for line in read_log(parts / LOG_NAME, kind="run")]
    assert starts == [0, min(saved, stopped)]


def test_a_crash_while_lines_are_dropped_leaves_the_old_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    take(tmp_path, 0, 5)
    before = (tmp_path / LOG_NAME).read_bytes()

    def crash(self: Path, target: Path) -> Path:
        raise OSError("power cut")

    monkeypatch.setattr(Path, "replace", crash)
    with pytest.raises(OSError, match="power cut"):
        drop_lines_after(tmp_path / LOG_NAME, 2)
    assert (tmp_path / LOG_NAME).read_bytes() == before


def test_a_line_is_there_as_soon_as_its_step_is_done(tmp_path: Path) -> None:
    with RunLog(tmp_path, EVERY, num_steps=2, shown="none", facts={"device": "cpu"}) as log:
        log.step(1, {"loss": 3.0}, WORK)
        start, line = read_log(log.path)
        assert (start["kind"], start["device"]) == ("run", "cpu")
        assert (line["kind"], line["step"], line["loss"]) == ("step", 1, 3.0)


def test_what_json_cannot_write_keeps_its_name(tmp_path: Path) -> None:
    with RunLog(tmp_path, EVERY, num_steps=1, shown="none", facts={"path": Path("x"), "list": [float("inf")]}) as log:
        log.step(1, {"loss": float("nan"), "grad_norm": float("-inf")}, WORK)
    start, line = (json.loads(text, parse_constant=pytest.fail) for text in log.path.read_text().splitlines())
    assert (line["loss"], line["grad_norm"]) == ("nan", "-inf")
    assert (start["path"], start["list"]) == ("x", ["inf"])


def test_only_the_main_rank_writes(tmp_path: Path) -> None:
    take(tmp_path / "other", 0, 10, is_main=False, settings=WatchSettings(log_every=1, trackers=("wandb",)))
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("name", ["tensorboard", "trackio", "wandb"])
def test_a_tracker_that_is_not_installed_is_said_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    settings = parse_config(WatchSettings, {"trackers": [name]}, place="watch")
    with pytest.raises(ConfigError, match=rf"{name} is not installed .*`pip install {name}`"):
        RunLog(tmp_path, settings, num_steps=1, shown="none").__enter__()


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_a_hosted_tracker_gets_the_numbers_and_is_closed_when_the_run_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    calls: list[tuple[str, Any]] = []
    module = ModuleType(name)
    vars(module).update(
        init=lambda **given: calls.append(("init", given)),
        log=lambda values, step: calls.append(("log", (step, values))),
        finish=lambda: calls.append(("finish", None)),
    )
    monkeypatch.setitem(sys.modules, name, module)
    settings = WatchSettings(log_every=1, trackers=(name,), project="mine")
    log = RunLog(tmp_path, settings, num_steps=3, title="sft", shown="none", facts={"world_size": 2})
    with pytest.raises(RuntimeError, match="broken"), log:
        log.step(1, {"loss": float("nan"), "grad_norm": 2.0}, WORK)
        log.event("validation", 1, {"loss": 4.0})
        log.event("sample", 1, {"answer": "words", "num_tokens": 3})
        raise RuntimeError("broken")
    (first, given), (second, (step, values)), (third, validation), last = calls
    assert (first, given["project"], given["name"], given["config"]) == ("init", "mine", "sft", {"world_size": 2})
    assert given.get("dir") == (str(tmp_path) if name == "wandb" else None)
    assert (second, step, values["grad_norm"]) == ("log", 1, 2.0)
    assert "loss" not in values
    assert (third, validation) == ("log", (1, {"validation/loss": 4.0}))
    assert last == ("finish", None)


def test_tensorboard_gets_event_files(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = WatchSettings(log_every=1, trackers=("tensorboard",))
    take(tmp_path, 0, 4, settings=settings)
    take(tmp_path, 2, 5, settings=settings)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        (step, pytest.approx(10.0 / step)) for step in range(1, 6)
    ]
    assert [event.step for event in events.Scalars("validation/loss")] == [4]


def test_without_a_terminal_there_are_plain_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunLog(tmp_path, WatchSettings(log_every=2), num_steps=4, title="sft", peak_flops=60e12) as log:
        for step in (1, 2, 3, 4):
            log.step(step, {"loss": 2.5, "margin": 0.25}, WORK)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        f"sft: step {step}/4, loss 2.5000, margin 0.2500, 1,800 tokens/s, 1.0% waiting for data, MFU 10.0%{left}"
        for step, left in ((1, ", 2 s left"), (2, ", 1 s left"), (4, ""))
    ]


def test_a_bar_goes_on_where_the_run_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunLog(tmp_path, EVERY, num_steps=4, start_step=2, title="sft", shown="bar") as log:
        log.step(3, {"loss": 2.5}, WORK)
    told = capsys.readouterr().err
    assert "3/4" in told
    assert "loss 2.5000" in told


def test_settings_are_checked() -> None:
    for wrong in ({"log_every": 0}, {"trackers": ["neptune"]}, {"evaluate_every": 0}, {"evry": 1}):
        with pytest.raises(ConfigError, match="watch"):
            parse_config(WatchSettings, wrong, place="watch")
