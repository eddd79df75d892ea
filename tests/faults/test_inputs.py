"""Inputs change: while a build runs it stops with a clear line, between two builds what they touch is done again and no more."""

import json
import os
from pathlib import Path

import pytest

from omniprep.shards.manifest import Manifest
from tests.faults.builds import finished, line_of_error, prepare, rerun
from tests.faults.corpus import Corpus, row_with, write_recipe
from tests.prepare_builders import chat, last_write, tree

pytestmark = pytest.mark.media
GATE = "0012.wav"


@pytest.fixture
def own(undisturbed, tmp_path: Path) -> Corpus:
    """Return a copy of the corpus that the test may change, with its lines alone."""
    corpus = undisturbed.corpus.copy(tmp_path / "own")
    (corpus.folder / "data" / "photos.parquet").unlink()
    write_recipe(corpus, sources=[{"name": "chat", "kind": "jsonl", "path": "data/chat.jsonl"}])
    return corpus


def fresh(corpus: Corpus, folder: Path) -> dict[str, str]:
    """Return what an undisturbed build makes of the inputs as they are now."""
    rerun(corpus.recipe, folder / "fresh")
    return tree(folder / "fresh")


def written(out: Path) -> dict[str, tuple[int, int]]:
    """Return what changes when a partition is done again, by partition."""
    return {path.stem: last_write(path) for path in out.glob("receipts/chat-*.json")}


def rerun_and_see(corpus: Corpus, out: Path) -> tuple[Manifest, list[str]]:
    """Run the same command again; return the manifest and the partitions that were done again."""
    before = written(out)
    manifest = rerun(corpus.recipe, out)
    return manifest, sorted(name for name, write in written(out).items() if write != before.get(name))


@pytest.mark.fault("rows are appended while the build runs")
def test_rows_appended_while_it_runs(own: Corpus, decoders, begin, survived, tmp_path: Path) -> None:
    out = tmp_path / "out"
    decoders.fail({GATE: "gate"})
    run = begin(prepare(own.recipe, out), decoders.environment)
    decoders.wait_at(GATE)
    with own.lines.open("a") as lines:
        lines.writelines(f"{json.dumps(chat(number))}\n" for number in (40, 41))
    decoders.open_gate()
    assert run.wait() == 2, run.told()
    assert "bytes when planned, has" in line_of_error(run.told())
    assert "run again" in line_of_error(run.told())
    before = written(out)
    assert len(before) == 3
    manifest, redone = rerun_and_see(own, out)
    assert manifest.num_rows == own.num_rows() == 42
    assert not set(redone) & set(before), "what was finished is kept"
    survived(out, num_rows=42, expected=fresh(own, tmp_path))


@pytest.mark.fault("a source file is cut while the build runs")
@pytest.mark.parametrize("mended", [True, False], ids=["then restored", "and stays so"])
def test_a_source_cut_while_it_runs(own: Corpus, decoders, begin, survived, tmp_path: Path, mended: bool) -> None:
    out = tmp_path / "out"
    decoders.fail({GATE: "gate"})
    run = begin(prepare(own.recipe, out), decoders.environment)
    decoders.wait_at(GATE)
    whole = own.lines.read_bytes()
    os.truncate(own.lines, len(whole) // 2)
    decoders.open_gate()
    assert run.wait() == 2, run.told()
    assert f"{own.lines}: had {len(whole)} bytes when planned, has {len(whole) // 2} now; run again" in line_of_error(run.told())
    assert finished(out) == 3
    if mended:
        own.lines.write_bytes(whole)
    rerun(own.recipe, out)
    num_rows = own.num_rows()
    assert num_rows == 40 if mended else 15 < num_rows < 30
    survived(out, num_rows=num_rows, expected=fresh(own, tmp_path))


@pytest.mark.fault("a medium is replaced, deleted or mended between two builds")
def test_media_that_change_between_builds(own: Corpus, survived, tmp_path: Path) -> None:
    out = tmp_path / "out"
    rerun(own.recipe, out)
    photo = own.media / "0021.jpg"
    kept = photo.read_bytes()

    photo.write_bytes((own.folder / "originals" / "film.mp4").read_bytes())  # replaced by what is no photo
    assert row_with(own, "0021.jpg") == 21
    manifest, redone = rerun_and_see(own, out)
    assert (manifest.rejects["media_corrupt"], redone) == (2, ["chat-00004"])

    photo.unlink()
    manifest, redone = rerun_and_see(own, out)
    assert (manifest.rejects["media_missing"], redone) == (2, ["chat-00004"])

    photo.write_bytes(kept)
    manifest, redone = rerun_and_see(own, out)
    assert (manifest.rejects["media_missing"], redone) == (1, ["chat-00004"])
    survived(out, num_rows=40, expected=fresh(own, tmp_path))


@pytest.mark.fault("a medium changes under the same size and time")
def test_what_a_rerun_cannot_see(own: Corpus, survived, tmp_path: Path) -> None:
    """Size and time are what is looked at, as make does. A new time, here as `touch` gives it, has the content read."""
    out = tmp_path / "out"
    rerun(own.recipe, out)
    sound = own.media / "0002.wav"
    status = sound.stat()
    data = bytearray(sound.read_bytes())
    data[5000:6000] = bytes(1000)
    sound.write_bytes(data)
    os.utime(sound, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert rerun_and_see(own, out)[1] == [], "a documented limit"
    sound.touch()
    assert rerun_and_see(own, out)[1] == ["chat-00000"]
    survived(out, num_rows=40, expected=fresh(own, tmp_path))


@pytest.mark.fault("a clock that is wrong: files from the future, or older than what was made of them")
def test_clocks_do_not_matter(own: Corpus, survived, tmp_path: Path) -> None:
    """Times are compared with what they were, never with each other or with the clock: a skew costs at most a digest."""
    out = tmp_path / "out"
    for number, path in enumerate(sorted(own.media.iterdir())):
        os.utime(path, (0, 4_000_000_000 if number % 2 else 1))
    rerun(own.recipe, out)
    for path in own.media.iterdir():
        os.utime(path, (0, 2_000_000_000))
    assert rerun_and_see(own, out)[1] == [], "the content is what it was"
    survived(out, num_rows=40, expected=fresh(own, tmp_path))
