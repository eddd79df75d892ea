"""Processes are killed in the middle of a partition: rerunning the same command gives the bytes of an undisturbed build.

A gate in a decoder (`broken_decoders/`) holds the build at a certain record, so that each is killed where it is meant to be.
"""

import os
import signal
from pathlib import Path

import pytest
from typer.testing import CliRunner

from omniprep.cli import app
from omniprep.storage.folder import open_folder
from tests.faults.builds import (
    finished,
    is_running,
    members,
    omniprep,
    on_each_executor,
    parent_of,
    prepare,
    rejected_rows,
    rerun,
    wait_until,
    watching,
)
from tests.prepare_builders import tree

pytestmark = pytest.mark.media
GATE, LATER_GATE = "0012.wav", "0036.jpg"
"""Media of the third and the eighth of twelve partitions, neither of them the first of its process."""


@pytest.mark.fault("kill -9 of the process that decodes")
def test_the_decoding_process_is_killed(undisturbed, decoders, begin, survived, tmp_path: Path) -> None:
    decoders.fail({GATE: "gate"})
    with watching(tmp_path / "out") as watch:
        run = begin(prepare(undisturbed.corpus.recipe, tmp_path / "out"), decoders.environment)
        os.kill(decoders.wait_at(GATE), signal.SIGKILL)
        decoders.open_gate()
        assert run.wait() == 0, run.told()
    watch.check(undisturbed.files)
    survived(tmp_path / "out", num_rows=undisturbed.corpus.num_rows(), expected=undisturbed.files)


@pytest.mark.fault("kill -9 of the nursery that the decoding processes are forked from")
def test_the_nursery_is_killed(undisturbed, decoders, begin, survived, tmp_path: Path) -> None:
    decoders.fail({GATE: "gate"})
    with watching(tmp_path / "out") as watch:
        run = begin(prepare(undisturbed.corpus.recipe, tmp_path / "out"), decoders.environment)
        child = decoders.wait_at(GATE)
        os.kill(parent_of(child), signal.SIGKILL)
        wait_until(lambda: not is_running(child))
        decoders.open_gate()
        assert run.wait() == 0, run.told()
    watch.check(undisturbed.files)
    survived(tmp_path / "out", num_rows=undisturbed.corpus.num_rows(), expected=undisturbed.files)


RAY_ABORTED = "An unexpected system state has occurred. You have likely discovered a bug in Ray"


def killed_at(gate: str, undisturbed, decoders, begin, out: Path, *how: str, number: int = signal.SIGKILL) -> None:
    """Start a build and send its driver a signal while a record is decoded; nothing of it may live on."""
    decoders.fail({gate: "gate"})
    run = begin(prepare(undisturbed.corpus.recipe, out, *how), decoders.environment)
    child = decoders.wait_at(gate)
    family = [child, nursery := parent_of(child), parent_of(nursery)]
    if number == signal.SIGINT:
        run.interrupt()
    else:
        os.kill(run.pid, number)
    code = run.wait()
    # Ray may abort by itself when a task ends in the moment in which its driver leaves: a check of its own fails, in
    # `TaskManager::CompletePendingTask` (seen once in many runs of 2.60). All but the exit code must hold then, too.
    aborted_by_ray = number == signal.SIGINT and code == 1 and RAY_ABORTED in run.told()
    # 128 + 2 and 128 + 15, as shells say it, are for those that cleaned up.
    assert aborted_by_ray or code == (-number if number == signal.SIGKILL else 128 + number), run.told()
    if number != signal.SIGKILL and not aborted_by_ray:
        word = "interrupted" if number == signal.SIGINT else "terminated"
        assert run.told().splitlines()[-1].startswith(f"{word}; finished partitions are kept in {out}. The same command")
        assert "Traceback" not in run.told()
        assert "***" not in run.told(), "a stack of Ray"
        assert list(out.rglob("*.partial")) == []
    wait_until(lambda: not any(map(is_running, family)))
    assert not (out / "manifest.json").exists()
    assert 0 < finished(out) < 12


@pytest.mark.fault("kill -9 of the driver, twice at different points")
@on_each_executor
def test_the_driver_is_killed_twice(undisturbed, decoders, begin, survived, tmp_path: Path, how) -> None:
    out = tmp_path / "out"
    with watching(out) as watch:
        killed_at(GATE, undisturbed, decoders, begin, out, *how)
        before = finished(out)
        killed_at(LATER_GATE, undisturbed, decoders, begin, out)
        assert finished(out) > before
        (out / "train-chat-00000.tar.12345.partial").write_bytes(b"half of a shard")
        run = begin(prepare(undisturbed.corpus.recipe, out))
        assert run.wait() == 0, run.told()
    watch.check(undisturbed.files)
    assert "of 12 partitions are finished already" in run.told()
    survived(out, num_rows=undisturbed.corpus.num_rows(), expected=undisturbed.files)


def stopped_and_rerun(undisturbed, decoders, begin, out: Path, *how: str, number: int) -> None:
    with watching(out) as watch:
        killed_at(GATE, undisturbed, decoders, begin, out, *how, number=number)
        rerun(undisturbed.corpus.recipe, out)
    watch.check(undisturbed.files)


@pytest.mark.fault("SIGTERM to the driver")
@on_each_executor
def test_the_driver_is_terminated(undisturbed, decoders, begin, survived, tmp_path: Path, how) -> None:
    out = tmp_path / "out"
    stopped_and_rerun(undisturbed, decoders, begin, out, *how, number=signal.SIGTERM)
    survived(out, num_rows=undisturbed.corpus.num_rows(), expected=undisturbed.files)


def test_a_termination_that_comes_back_as_an_interrupt_is_told_as_one(undisturbed, tmp_path: Path, monkeypatch) -> None:
    """As Ray does it with whatever a handler raises inside one of its calls."""

    def interrupted(*_: object, **__: object) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
        except BaseException:
            raise KeyboardInterrupt from None

    monkeypatch.setattr("omniprep.prepare.prepare", interrupted)
    result = CliRunner().invoke(app, ["prepare", str(undisturbed.corpus.recipe), "--out", str(tmp_path / "out")])
    assert (result.exit_code, result.stderr[:12]) == (143, "terminated; ")


@pytest.mark.fault("Ctrl-C in a terminal: SIGINT to every process of the group")
@on_each_executor
def test_interrupted_in_a_terminal(undisturbed, decoders, begin, survived, tmp_path: Path, how) -> None:
    out = tmp_path / "out"
    stopped_and_rerun(undisturbed, decoders, begin, out, *how, number=signal.SIGINT)
    survived(out, num_rows=undisturbed.corpus.num_rows(), expected=undisturbed.files)


@pytest.mark.fault("kill -9 of the decoding process again and again at one record")
def test_a_record_whose_process_is_always_killed(undisturbed, decoders, begin, survived, tmp_path: Path) -> None:
    """It cannot be told from a decoder that crashes: the record is quarantined, and `retry` brings it in."""
    out = tmp_path / "out"
    decoders.fail({GATE: "gate"})
    run = begin(prepare(undisturbed.corpus.recipe, out), decoders.environment)
    for _ in range(2):
        child = decoders.wait_at(GATE)
        (decoders.folder / f"at-{GATE}").unlink()  # before the next process can leave its own
        os.kill(child, signal.SIGKILL)
    assert run.wait() == 0, run.told()
    (row,) = [row for row in rejected_rows(open_folder(str(out))) if row["reason"] == "crashed"]
    assert row["row"] == 12
    assert "killed by signal 9 (SIGKILL); the machine may be short of memory" in row["detail"]
    finished_shards = {name: digest for name, digest in tree(out).items() if name.endswith(".tar")}
    decoders.fail({})
    assert begin(omniprep("retry", out, "--executor", "serial")).wait() == 1, "four bad records stay"
    assert finished_shards.items() < tree(out).items()
    assert members(out) == members(undisturbed.out)
    survived(out, num_rows=undisturbed.corpus.num_rows())
