"""What a record's media were, what is noticed when they change, and what is read to notice it."""

import contextlib
import hashlib
import json
import os
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path

import fsspec
import pytest

from omniprep.errors import Reason, RejectSample
from omniprep.records import MediaBlob
from omniprep.sources import media_facts
from omniprep.sources.media_facts import ABSENT, MediaFact, MediaLedger, changed, media_sha256
from omniprep.sources.media_store import MediaConfig, MediaStore
from omniprep.types import MediaFile

STORE = MediaStore(MediaConfig())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a.png").write_bytes(b"picture")
    (tmp_path / "b.wav").write_bytes(b"sound")
    return tmp_path


@pytest.fixture
def num_reads(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Count the files that are read for their digest."""
    read: list[str] = []
    real = media_facts._file_sha256
    monkeypatch.setattr(media_facts, "_file_sha256", lambda path: read.append(path) or real(path))
    media_facts._kept_sha256.cache_clear()
    return lambda: len(read)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def fact_of(name: str, base: Path | str, store: MediaStore = STORE) -> MediaFact:
    ledger = MediaLedger(store.resolve)
    with contextlib.suppress(RejectSample):
        ledger.resolve(name, base=str(base))
    (fact,) = ledger.facts
    return fact


def replace_content(path: Path, data: bytes, *, later_ns: int = 1_000_000_000) -> None:
    """Write and date the file later, as a clock too coarse for the test would not."""
    stamp = path.stat().st_mtime_ns + later_ns
    path.write_bytes(data)
    os.utime(path, ns=(stamp, stamp))


def test_media_used_are_noted_once_and_get_their_digest(folder: Path) -> None:
    ledger = MediaLedger(STORE.resolve)
    for name in ("a.png", "b.wav", "a.png"):
        media = ledger.resolve(name, base=str(folder))
        assert media.sha256 == sha256((folder / name).read_bytes())
        assert media.stamp == str((folder / name).stat().st_mtime_ns)
    assert [fact.name for fact in ledger.facts] == ["a.png", "b.wav"]
    fact = ledger.facts[0]
    assert (fact.location, fact.num_bytes, fact.sha256) == (str(folder / "a.png"), 7, sha256(b"picture"))
    assert pickle.loads(pickle.dumps(ledger.facts)) == ledger.facts


@pytest.mark.parametrize("name", ["a.png", "sub/../a.png", "~/a.png", "file:///{}/a%2Epng", "{}/a.png"])
def test_the_place_is_the_one_that_the_store_reads(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "sub").mkdir()
    monkeypatch.setenv("HOME", str(folder))
    fact = fact_of(name.replace("{}", str(folder)), folder)
    assert Path(fact.location).samefile(folder / "a.png")
    assert not changed(fact)


def test_a_relative_base_is_where_the_process_stands(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    assert fact_of("a.png", folder.name).location == str(folder / "a.png")


def test_one_film_cut_into_many_records_is_read_once(folder: Path, num_reads: Callable[[], int]) -> None:
    for _ in range(50):
        MediaLedger(STORE.resolve).resolve("a.png", base=str(folder))
    assert num_reads() == 1
    replace_content(folder / "a.png", b"another")
    assert fact_of("a.png", folder).sha256 == sha256(b"another")
    assert num_reads() == 2


def test_what_is_as_it_was_is_not_read(folder: Path, num_reads: Callable[[], int]) -> None:
    fact = fact_of("a.png", folder)
    before = num_reads()
    assert not changed(fact)
    assert num_reads() == before


def test_a_touched_file_is_read_and_found_unchanged(folder: Path, num_reads: Callable[[], int]) -> None:
    fact = fact_of("a.png", folder)
    replace_content(folder / "a.png", b"picture")
    assert not changed(fact)
    assert num_reads() == 2


@pytest.mark.parametrize("data", [b"another", b"a longer one"])
def test_other_bytes_are_noticed(folder: Path, data: bytes) -> None:
    fact = fact_of("a.png", folder)
    replace_content(folder / "a.png", data)
    assert changed(fact)


def test_other_bytes_under_the_old_time_are_noticed_only_by_reading(folder: Path) -> None:
    fact = fact_of("a.png", folder)
    replace_content(folder / "a.png", b"another", later_ns=0)
    assert not changed(fact)
    assert changed(fact, content=True)


def test_a_file_that_is_gone_is_noticed(folder: Path) -> None:
    fact = fact_of("a.png", folder)
    (folder / "a.png").unlink()
    assert changed(fact)
    (folder / "a.png").mkdir()
    assert changed(fact)


def test_a_link_that_leads_elsewhere_is_noticed(folder: Path) -> None:
    (folder / "link").symlink_to("a.png")
    fact = fact_of("link", folder)
    assert not changed(fact)
    (folder / "link").unlink()
    (folder / "link").symlink_to("b.wav")
    assert changed(fact)


def test_a_missing_file_is_noted_and_noticed_when_it_comes(folder: Path) -> None:
    fact = fact_of("c.png", folder)
    assert (fact.location, fact.num_bytes, fact.stamp, fact.sha256) == (str(folder / "c.png"), ABSENT, "", "")
    assert not changed(fact)
    (folder / "c.png").write_bytes(b"")
    assert changed(fact)


def test_an_empty_file_is_noted_and_noticed_when_it_is_filled(folder: Path) -> None:
    (folder / "empty.png").touch()
    fact = fact_of("empty.png", folder)
    assert (fact.num_bytes, fact.sha256) == (0, "")
    assert not changed(fact)
    replace_content(folder / "empty.png", b"picture")
    assert changed(fact)


def test_what_is_no_file_or_may_not_be_read_is_not_read(folder: Path, num_reads: Callable[[], int]) -> None:
    os.mkfifo(folder / "pipe")
    outside = folder.parent / "outside.png"
    outside.write_bytes(b"not for us")
    facts = [fact_of(name, folder) for name in ("pipe", "../outside.png", ".")]
    assert [changed(fact) for fact in facts] == [False, False, False]
    assert [changed(fact, content=True) for fact in facts] == [False, False, False]
    assert [fact.sha256 for fact in facts] == ["", "", ""]
    replace_content(outside, b"something else")
    assert changed(facts[1])
    assert num_reads() == 0


@pytest.mark.parametrize("name", ["", "a\0b", "half a character \ud800", "x" * 5000])
def test_what_can_be_no_path_is_not_noted(folder: Path, name: str) -> None:
    ledger = MediaLedger(STORE.resolve)
    with pytest.raises(RejectSample):
        ledger.resolve(name, base=str(folder))
    assert ledger.facts == ()


def test_media_inside_rows_are_not_noted_and_read_only_for_a_cache(folder: Path) -> None:
    blob, uri = MediaBlob(bytes=b"bytes", path="a.png"), "data:text/plain;base64,Ynl0ZXM="
    for hash_rows, digest in ((False, ""), (True, sha256(b"bytes"))):
        ledger = MediaLedger(STORE.resolve, hash_rows=hash_rows)
        assert [ledger.resolve(ref, base=str(folder)).sha256 for ref in (blob, uri)] == [digest, digest]
        with pytest.raises(RejectSample):
            ledger.resolve("data:no comma", base=str(folder))
        with pytest.raises(RejectSample):
            ledger.resolve(MediaBlob(bytes=b"", path="a.png"), base=str(folder))
        assert ledger.facts == ()


def test_a_path_beside_rows_is_a_file(folder: Path) -> None:
    ledger = MediaLedger(STORE.resolve)
    ledger.resolve(MediaBlob(bytes=None, path="a.png"), base=str(folder))
    assert [fact.location for fact in ledger.facts] == [str(folder / "a.png")]


def test_urls_are_noted_and_asked_only_for_their_content() -> None:
    root = "memory://media_facts"
    with fsspec.open(f"{root}/a.png", "wb") as file:
        file.write(b"picture")
    store = MediaStore(MediaConfig(roots=(root,)))
    facts = [fact_of(f"{root}/a.png", "/", store), fact_of("a.png", root, store), fact_of(f"{root}/none.png", "/", store)]
    assert [fact.location for fact in facts] == [f"{root}/a.png", f"{root}/a.png", f"{root}/none.png"]
    assert [fact.sha256 for fact in facts] == [sha256(b"picture"), sha256(b"picture"), ""]
    assert facts[2].num_bytes == ABSENT
    fetch = partial(store.resolve, base=root)
    assert [changed(fact, content=True, fetch=fetch) for fact in facts] == [False, False, False]
    for name in ("a.png", "none.png"):
        with fsspec.open(f"{root}/{name}", "wb") as file:
            file.write(b"another")
    assert [changed(fact) for fact in facts] == [False, False, False]
    assert [changed(fact, content=True, fetch=fetch) for fact in facts] == [True, True, True]


def test_a_url_fetched_into_a_file_is_noted_as_the_url(folder: Path) -> None:
    def fetch(ref: str, *, base: str) -> MediaFile:
        return MediaFile(name=ref, path=folder / "a.png", stamp='"etag"')

    ledger = MediaLedger(fetch)
    ledger.resolve("https://example.org/x.png", base="/")
    (fact,) = ledger.facts
    assert (fact.location, fact.stamp, fact.num_bytes) == ("https://example.org/x.png", '"etag"', 7)
    assert fact.sha256 == sha256(b"picture")


def test_a_file_that_vanishes_before_it_is_read_is_a_rejection_and_noted(folder: Path) -> None:
    def resolve(ref: str, *, base: str) -> MediaFile:
        return MediaFile(name=ref, path=folder / "gone.png")

    ledger = MediaLedger(resolve)
    with pytest.raises(RejectSample) as error:
        ledger.resolve("gone.png", base=str(folder))
    assert (error.value.reason, error.value.retryable) == (Reason.MEDIA_UNREADABLE, True)
    assert [fact.num_bytes for fact in ledger.facts] == [ABSENT]


def test_the_digest_is_of_names_and_contents_in_any_order(folder: Path) -> None:
    facts = [fact_of(name, folder) for name in ("a.png", "b.wav", "c.png")]
    digest = media_sha256(facts)
    assert media_sha256([*reversed(facts), facts[0]]) == digest
    assert media_sha256(facts[:2]) != digest
    replace_content(folder / "a.png", b"picture")
    assert media_sha256([fact_of(fact.name, folder) for fact in facts]) == digest
    replace_content(folder / "a.png", b"another")
    assert media_sha256([fact_of(fact.name, folder) for fact in facts]) != digest


def test_a_name_cannot_be_made_to_look_like_two() -> None:
    def fact(name: str, digest: str) -> MediaFact:
        return MediaFact(location=f"/{name}", name=name, num_bytes=1, stamp="", sha256=digest)

    one = fact(json.dumps(["a", "00"]), "11")
    assert media_sha256([one]) != media_sha256([fact("a", "00"), fact("", "11")])
