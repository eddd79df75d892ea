"""A build that is killed in the middle, at any moment, ends with the very bytes of one that was not."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.prepare_builders import chat, tree, write_media, write_recipe


def command(recipe: Path, out: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "omniprep", "prepare", str(recipe), "--out", str(out), *more]


def corpus(folder: Path) -> Path:
    write_media(folder / "data")
    rows: list[object] = [chat(number, *([{"audio": "a.wav"}] if number % 3 == 0 else [])) for number in range(300)]
    rows[7] = "{"
    rows[150] = chat(150, {"image": "missing.png"})
    return write_recipe(folder, rows, run={"rows_per_partition": 3}, splits={"val": 0.2})


def stop_when(process: subprocess.Popen, out: Path, num_receipts: int, number: int) -> None:
    """Send a signal to the driver, and to nothing else, once so many partitions are finished."""
    deadline = time.monotonic() + 60
    while len(list((out / "receipts").glob("chat-*.json"))) < num_receipts:
        assert process.poll() is None, "it ended before it could be stopped"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(process.pid, number)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> tuple[Path, dict[str, str]]:
    folder = tmp_path_factory.mktemp("undisturbed")
    recipe = corpus(folder)
    subprocess.run(command(recipe, folder / "out", "--executor", "serial"), check=True, capture_output=True)
    return recipe, tree(folder / "out")


def check_resumes(recipe: Path, out: Path, expected: dict[str, str], *more: str) -> None:
    assert not (out / "manifest.json").exists()
    assert 0 < len(list((out / "receipts").glob("chat-*.json"))) < 100
    done = subprocess.run(command(recipe, out, *more), check=True, capture_output=True, text=True)
    assert "of 100 partitions are finished already" in done.stderr
    assert tree(out) == expected


def test_killed_twice(undisturbed, tmp_path: Path) -> None:
    recipe, expected = undisturbed
    out = tmp_path / "out"
    for num_receipts in (5, 60):
        process = subprocess.Popen(
            command(recipe, out, "--executor", "serial"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        stop_when(process, out, num_receipts, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    (out / "train-chat-00000.tar.12345.partial").write_bytes(b"half of a shard")
    check_resumes(recipe, out, expected, "--executor", "serial")


def test_interrupted(undisturbed, tmp_path: Path) -> None:
    recipe, expected = undisturbed
    out = tmp_path / "out"
    process = subprocess.Popen(
        command(recipe, out, "--executor", "serial"), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    stop_when(process, out, 10, signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted; finished partitions are kept" in told
    assert "Traceback" not in told
    assert list(out.rglob("*.partial")) == []
    check_resumes(recipe, out, expected, "--executor", "serial")


@pytest.mark.ray
def test_killed_with_two_ray_workers_and_resumed_with_one_gives_the_bytes_of_serial(undisturbed, tmp_path: Path) -> None:
    recipe, expected = undisturbed
    out = tmp_path / "killed"
    process = subprocess.Popen(command(recipe, out, "--workers", "2"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    stop_when(process, out, 10, signal.SIGKILL)
    process.wait()
    check_resumes(recipe, out, expected, "--workers", "1")


@pytest.mark.ray
def test_ray_interrupted(undisturbed, tmp_path: Path) -> None:
    recipe, expected = undisturbed
    out = tmp_path / "out"
    process = subprocess.Popen(
        command(recipe, out, "--workers", "2"), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    stop_when(process, out, 10, signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted; finished partitions are kept" in told
    check_resumes(recipe, out, expected, "--executor", "serial")
