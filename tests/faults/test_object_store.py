"""Output and sources in S3 (moto, behind a proxy with faults): the objects are those of an undisturbed build on a disk."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from omniprep.storage.folder import open_folder
from tests.faults.builds import files_of, line_of_error, prepare, rerun, wait_until
from tests.faults.corpus import Corpus, lines_of, originals_of, write_media_of, write_recipe
from tests.prepare_builders import write_rows
from tests.s3_server import S3, Request, s3

__all__ = ["s3"]
pytestmark = [pytest.mark.media, pytest.mark.filterwarnings("ignore")]
Concerns = Callable[[Request], bool]
IMPATIENT = {"FSSPEC_S3": json.dumps({"config_kwargs": {"read_timeout": 2, "retries": {"total_max_attempts": 1}}})}
"""A hang is given up after two seconds, not after thirty."""


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory, samples: Path, ffmpeg: str) -> tuple[Corpus, dict[str, str]]:
    """Return a corpus of 20 records whose second shard is sent in several parts, and its build on a disk."""
    corpus = Corpus(tmp_path_factory.mktemp("local"))
    rows = lines_of(20)
    rows[6:9] = [rows[1]] * 3
    write_media_of(rows, corpus.media, originals_of(samples, ffmpeg, corpus.folder / "originals"))
    write_rows(corpus.lines, [*rows, "{"])
    large = {"min_pixels": 1400 * 1400, "max_pixels": 1500 * 1500}
    write_recipe(
        corpus,
        sources=[{"name": "chat", "kind": "jsonl", "path": "data/chat.jsonl"}],
        splits={},
        encode={"image": {"resize": "fast", **large}, "video": {"resize": "fast"}, "frame_format": "raw"},
        run={"rows_per_partition": 7},
    )
    rerun(corpus.recipe, corpus.folder / "out")
    sizes = {path.name: path.stat().st_size for path in (corpus.folder / "out").glob("*.tar")}
    assert max(sizes.values()) > 16 << 20, "three parts"
    return corpus, files_of(open_folder(str(corpus.folder / "out")))


def is_put_of(end: str) -> Concerns:
    return lambda request: request.method == "PUT" and request.key.endswith(end)


def is_part(number: int) -> Concerns:
    return lambda request: request.method == "PUT" and f"partNumber={number}" in request.query


def check(survived, s3: S3, corpus: Corpus, expected: dict[str, str], out: str) -> None:
    s3.faults.clear()
    s3.unlisted.clear()
    assert files_of(open_folder(out)) == expected
    survived(out, num_rows=corpus.num_rows())


@pytest.mark.fault("an object store that answers 500, throttles, hangs, resets, loses answers")
def test_a_store_with_bad_days(local, s3: S3, begin, survived) -> None:
    corpus, expected = local
    out = f"{s3.url}/out"
    faults = [
        s3.fail(is_put_of("chat-00000.tar"), status=500, times=2),
        s3.fail(is_put_of("chat-00001.parquet"), status=503, code="SlowDown", times=3),
        s3.fail(is_part(2), "hang"),
        s3.fail(is_part(1), "lost"),
        s3.fail(is_put_of("receipts/chat-00001.json"), "lost"),
        s3.fail(lambda request: request.method == "HEAD", status=500, times=2),
        s3.fail(lambda request: request.method == "GET" and "list-type" in request.query, "reset"),
        s3.fail(is_put_of("manifest.json"), "lost"),
    ]
    run = begin(prepare(corpus.recipe, out), IMPATIENT)
    assert run.wait() == 0, run.told()
    assert [fault.kind for fault in faults if fault.times > 0] == [], "each of them struck"
    assert s3.num_unfinished_uploads() == 0
    check(survived, s3, corpus, expected, out)


@pytest.mark.fault("an object store that is down")
def test_a_store_that_never_answers_well(local, s3: S3, begin, survived) -> None:
    corpus, expected = local
    out = f"{s3.url}/out"
    s3.fail(is_put_of("chat-00001.parquet"), status=503, code="SlowDown", times=float("inf"))
    run = begin(prepare(corpus.recipe, out))
    assert run.wait() == 1, run.told()
    assert "chat-00001.parquet" in line_of_error(run.told())
    assert "out/manifest.json" not in s3.keys()  # noqa: SIM118
    s3.faults.clear()
    run = begin(prepare(corpus.recipe, out))
    assert run.wait() == 0
    assert "1 of 3 partitions are finished already" in run.told()
    check(survived, s3, corpus, expected, out)


@pytest.mark.fault("kill -9 of the driver in the middle of an upload")
def test_killed_in_an_upload(local, s3: S3, begin, survived) -> None:
    corpus, expected = local
    out = f"{s3.url}/out"
    s3.fail(is_part(2), "hang")
    run = begin(prepare(corpus.recipe, out))
    wait_until(lambda: any(is_part(2)(request) for request in s3.requests))
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    assert s3.num_unfinished_uploads() == 1
    assert "out/manifest.json" not in s3.keys()  # noqa: SIM118
    rerun(corpus.recipe, out)
    check(survived, s3, corpus, expected, out)


@pytest.mark.fault("two builds at once in one bucket")
def test_two_builds_at_once(local, s3: S3, begin, survived) -> None:
    corpus, expected = local
    out = f"{s3.url}/out"
    runs = [begin(prepare(corpus.recipe, out)) for _ in range(2)]
    codes = sorted(run.wait() for run in runs)
    assert codes in ([0, 0], [0, 1]), [run.told() for run in runs]
    for run in runs:
        if run.process.returncode:
            line = line_of_error(run.told())
            assert "another build sealed it meanwhile" in line or "was another build writing there" in line
    check(survived, s3, corpus, expected, out)


@pytest.mark.fault("a listing that lags behind")
def test_a_listing_that_lags(local, s3: S3, begin, survived) -> None:
    """A second build finds what is finished although no listing shows it, and does nothing again."""
    corpus, expected = local
    out = f"{s3.url}/out"
    s3.unlisted.update(f"out/{name}" for name in expected)
    assert begin(prepare(corpus.recipe, out)).wait() == 0
    s3.requests.clear()
    run = begin(prepare(corpus.recipe, out))
    assert run.wait() == 0
    assert "3 of 3 partitions are finished already" in run.told()
    assert not [request.key for request in s3.seen("PUT") if request.key.endswith(".tar")]
    check(survived, s3, corpus, expected, out)


@pytest.mark.fault("a source and its media in an object store that fails now and then")
def test_sources_and_media_at_urls(local, s3: S3, begin, survived, tmp_path: Path) -> None:
    corpus, _ = local
    for path in (corpus.folder / "data").rglob("*.*"):
        s3.put(path.relative_to(corpus.folder).as_posix(), path.read_bytes())
    remote = Corpus(tmp_path / "remote")
    remote.lines.parent.mkdir(parents=True)
    remote.lines.write_bytes(corpus.lines.read_bytes())
    write_recipe(remote, sources=[{"name": "chat", "kind": "jsonl", "path": f"{s3.url}/data/chat.jsonl"}], splits={})
    rerun(remote.recipe, tmp_path / "undisturbed")
    expected = files_of(open_folder(str(tmp_path / "undisturbed")))

    def is_get(end: str) -> Concerns:
        return lambda request: request.method == "GET" and request.key.endswith(end)

    s3.fail(is_get(".jpg"), status=503, code="SlowDown", times=3)
    s3.fail(is_get(".wav"), "reset", times=2)
    s3.fail(is_get("chat.jsonl"), status=500, times=2)
    s3.fail(is_get(".mp4"), "hang")
    run = begin(prepare(remote.recipe, tmp_path / "out"), IMPATIENT)
    assert run.wait() == 0, run.told()
    assert [fault.kind for fault in s3.faults if fault.times > 0] == []
    assert files_of(open_folder(str(tmp_path / "out"))) == expected
    survived(tmp_path / "out", num_rows=remote.num_rows())
