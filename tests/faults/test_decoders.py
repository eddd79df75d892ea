"""Media that hang, crash or flood their decoder, in builds as a user starts them: each costs its record, and `retry` mends it.

Some decoders are made to fail (`broken_decoders/`); the pipe, the socket and the endless device are real.
"""

import os
import shutil
import socket
import time
from pathlib import Path

import pytest

from omniprep.prepare import prepare as build
from omniprep.recipe import load_recipe
from omniprep.storage.folder import open_folder
from tests.faults.builds import Decoders, members, omniprep, on_each_executor, prepare, rejected_rows
from tests.faults.corpus import Corpus, lines_of, originals_of, write_media_of, write_recipe
from tests.prepare_builders import chat, tree, write_rows

pytestmark = pytest.mark.media
TIMEOUT_S = 6.0
"""Long for a healthy record of a second, and for one that eats its memory, on a machine that is busy."""
MADE_TO_FAIL = {
    "0001.jpg": ("segfault", "crashed"),
    "0002.wav": ("abort", "crashed"),
    "0006.jpg": ("hang in C", "timed_out"),
    "0011.jpg": ("hang in Python", "timed_out"),
    "0012.wav": ("eat memory", "out_of_memory"),
    "0016.jpg": ("exit", "crashed"),
    "0024.jpg": ("become a pipe", "media_empty"),
}
REAL = {"0019.jpg": "media_unreadable", "0021.jpg": "media_unreadable", "0022.wav": "media_forbidden"}
"""A named pipe, a socket, and a link to a device without end."""
EXPECTED = {int(name[:4]): reason for name, (_, reason) in MADE_TO_FAIL.items()} | {int(n[:4]): r for n, r in REAL.items()}


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory, samples: Path, ffmpeg: str) -> tuple[Corpus, dict[str, bytes]]:
    """Return a corpus of 30 good records, and the members that an undisturbed build makes of it."""
    corpus = Corpus(tmp_path_factory.mktemp("healthy"))
    rows = lines_of(30)
    write_media_of(rows, corpus.media, originals_of(samples, ffmpeg, corpus.folder / "originals"))
    write_rows(corpus.lines, rows)
    write_recipe(
        corpus,
        sources=[{"name": "chat", "kind": "jsonl", "path": "data/chat.jsonl"}],
        run={"guard": {"timeout_s": TIMEOUT_S, "memory_bytes": 300 << 20}},
    )
    assert build(load_recipe(corpus.recipe, output=str(corpus.folder / "out"), executor="serial")).rejects == {}
    return corpus, members(corpus.folder / "out")


def harm(corpus: Corpus) -> socket.socket:
    """Put things that are no files where media were."""
    for name in REAL:
        (corpus.media / name).unlink()
    os.mkfifo(corpus.media / "0019.jpg")
    (corpus.media / "0022.wav").symlink_to("/dev/zero")
    listener = socket.socket(socket.AF_UNIX)
    here = Path.cwd()
    os.chdir(corpus.media)  # a socket's whole path may have a hundred characters
    try:
        listener.bind("0021.jpg")
    finally:
        os.chdir(here)
    return listener


def keys_of(rows: set[int]) -> set[str]:
    return {f"chat-{row:08d}" for row in rows}


@pytest.mark.fault("a decoder crashes, hangs, exits, eats memory; a medium is a pipe, a socket, a device")
@on_each_executor
def test_each_costs_its_record_and_retry_brings_it_in(
    healthy, decoders, begin, survived, tmp_path: Path, how: tuple[str, ...]
) -> None:
    corpus, expected = healthy[0].copy(tmp_path / "own"), healthy[1]
    out = tmp_path / "out"
    listener = harm(corpus)
    decoders.fail({name: action for name, (action, _) in MADE_TO_FAIL.items()})
    run = begin(prepare(corpus.recipe, out, *how), decoders.environment)
    assert run.wait() == 0, run.told()
    assert "Traceback" not in run.told()
    listener.close()
    quarantine = {row["row"]: row for row in rejected_rows(open_folder(str(out)))}
    assert {number: row["reason"] for number, row in quarantine.items()} == EXPECTED
    assert not any(row["retryable"] for row in quarantine.values()), "the cause is in the record, not in a network"
    assert f"no result within {TIMEOUT_S:g} s" in quarantine[6]["detail"]
    assert "SIGSEGV" in quarantine[1]["detail"]
    lost = keys_of(set(EXPECTED))
    assert members(out) == {name: data for name, data in expected.items() if name.partition(".")[0] not in lost}

    shards = {name: digest for name, digest in tree(out).items() if name.startswith("train")}
    for name in [*MADE_TO_FAIL, *REAL]:
        (corpus.media / name).unlink()
        shutil.copyfile(healthy[0].media / name, corpus.media / name)
    mended = begin(omniprep("retry", out, "--executor", "serial"))
    assert mended.wait() == 0, mended.told()
    assert f"{len(EXPECTED)} of {len(EXPECTED)} rejected records are in the shards now" in mended.told()
    assert shards.items() < tree(out).items(), "finished shards are not touched"
    assert members(out) == expected
    survived(out, num_rows=corpus.num_rows())


@pytest.mark.fault("one record in a hundred crashes its decoder")
def test_crashes_do_not_slow_the_rest(healthy, decoders: Decoders, survived, tmp_path: Path, monkeypatch) -> None:
    corpus = Corpus(tmp_path / "own")
    num_rows = 1000
    shutil.copytree(healthy[0].media, corpus.media)
    names = sorted(path.name for path in healthy[0].media.glob("*.jpg"))
    rows: list[object] = [chat(number, {"image": f"media/{names[number % len(names)]}"}) for number in range(num_rows)]
    for number in range(50, num_rows, 100):
        shutil.copyfile(corpus.media / names[0], corpus.media / f"bad-{number}.jpg")
        rows[number] = chat(number, {"image": f"media/bad-{number}.jpg"})
    write_rows(corpus.lines, rows)
    write_recipe(
        corpus,
        sources=[{"name": "chat", "kind": "jsonl", "path": "data/chat.jsonl"}],
        run={"rows_per_partition": 250, "executor": "serial"},
    )
    for name, value in decoders.environment.items():
        monkeypatch.setenv(name, value)
    seconds = []
    for plan in ({}, {f"bad-{number}.jpg": "segfault" for number in range(50, num_rows, 100)}):
        decoders.fail(plan)
        out = tmp_path / f"out-{len(plan)}"
        start = time.monotonic()
        manifest = build(load_recipe(corpus.recipe, output=str(out)))
        seconds.append(time.monotonic() - start)
        assert manifest.rejects == ({"crashed": len(plan)} if plan else {})
    ratio = seconds[0] / seconds[1]
    assert ratio > 0.2, f"{seconds[0]:.1f} s without crashes, {seconds[1]:.1f} s with them"
    survived(out, num_rows=num_rows, more=f"; {ratio:.2f} of the speed without crashes")
