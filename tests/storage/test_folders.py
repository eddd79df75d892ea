"""The contract of `Folder`, the same on a disk, in memory and on S3."""

import hashlib
import io
import pickle
import uuid
from pathlib import Path

import pytest

from omniprep.storage.folder import Conflict, Folder, StorageError, open_folder


@pytest.fixture(params=["local", "memory", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    match request.param:
        case "local":
            return open_folder(str(tmp_path / "set"))
        case "memory":
            return open_folder(f"memory://{uuid.uuid4().hex}/set")
        case _:
            return open_folder(f"{request.getfixturevalue('s3').url}/below/set")


def test_a_file_is_read_as_it_was_written(folder: Folder) -> None:
    data = bytes(range(256)) * 5000
    assert folder.write("receipts/ä b#1?.json", data) == hashlib.sha256(data).hexdigest()
    assert folder.read("receipts/ä b#1?.json") == data
    assert folder.size("receipts/ä b#1?.json") == len(data)
    with folder.open("receipts/ä b#1?.json") as file:
        assert file.read() == data


def test_an_empty_file_is_a_file(folder: Folder) -> None:
    folder.write("empty", b"")
    assert (folder.size("empty"), folder.read("empty")) == (0, b"")
    with folder.open("empty") as file:
        assert file.read() == b""
    assert folder.open_random("empty").pread(10, 0) == b""


def test_what_is_absent_is_told_so(folder: Folder) -> None:
    assert folder.size("none") is None
    assert folder.version("none") is None
    for read in (folder.read, folder.open, folder.open_random):
        with pytest.raises(FileNotFoundError):
            read("none")
    folder.remove("none")


def test_a_folder_is_there_when_a_file_is(folder: Folder) -> None:
    assert not folder.exists()
    folder.write("a", b"1")
    assert folder.exists()


def test_files_are_listed_by_name_below_a_folder(folder: Folder) -> None:
    assert folder.files() == {}
    for name in ("b", "receipts/2", "receipts/1", "receipts-old/1"):
        folder.write(name, name.encode())
    assert list(folder.files().items()) == [("b", 1), ("receipts-old/1", 14), ("receipts/1", 10), ("receipts/2", 10)]
    assert folder.files("receipts") == {"receipts/1": 10, "receipts/2": 10}
    assert folder.files("none") == {}


def test_an_open_file_seeks(folder: Folder) -> None:
    data = hashlib.sha256(b"").digest() * 60_000  # 1.9 MB: several ranges
    folder.write("a", data)
    with folder.open("a") as file:
        reference = io.BytesIO(data)
        for offset, whence, num_bytes in [
            (1_000_000, 0, 7),
            (5, 1, 300_000),
            (-9, 2, 100),
            (0, 0, 3),
            (700_000, 0, -1),
            (2_000_000, 0, 5),
            (-20, 1, 4),
        ]:
            assert file.seek(offset, whence) == reference.seek(offset, whence)
            assert file.read(num_bytes) == reference.read(num_bytes)
            assert file.tell() == reference.tell()


def test_a_random_reader_reads_anywhere(folder: Folder) -> None:
    data = bytes(range(100))
    folder.write("a", data)
    reader = folder.open_random("a")
    assert reader.num_bytes == 100
    assert [reader.pread(5, 90), reader.pread(5, 0), reader.pread(50, 90), reader.pread(5, 100), reader.pread(5, 200)] == [
        data[90:95],
        data[:5],
        data[90:],
        b"",
        b"",
    ]
    reader.close()


def test_a_file_that_is_not_published_is_not_there(folder: Folder) -> None:
    with folder.create("a") as file:
        file.write(b"half")
        assert folder.size("a") is None
    assert folder.size("a") is None
    assert folder.files() == {}
    assert folder.partials() == []


def test_an_error_while_writing_leaves_the_old_file(folder: Folder) -> None:
    folder.write("a", b"old")
    with pytest.raises(RuntimeError), folder.create("a") as file:
        file.write(b"new")
        raise RuntimeError
    assert folder.read("a") == b"old"
    assert folder.files() == {"a": 3}


def test_of_two_writers_the_last_to_publish_wins_whole(folder: Folder) -> None:
    with folder.create("a") as first, folder.create("a") as second:
        first.write(b"1" * 10)
        second.write(b"2" * 20)
        second.publish()
        assert folder.read("a") == b"2" * 20
        first.publish()
    assert folder.read("a") == b"1" * 10
    assert folder.files() == {"a": 10}


def test_a_version_changes_with_the_content_alone(folder: Folder) -> None:
    folder.write("a", b"1")
    first = folder.version("a")
    folder.write("a", b"2")
    second = folder.version("a")
    folder.write("a", b"1")
    assert None not in (first, second)
    assert folder.version("a") == first != second


def test_a_conditional_write_needs_the_version_that_was_seen(folder: Folder) -> None:
    folder.write_if("manifest.json", b"1", None)
    with pytest.raises(Conflict, match=r"manifest\.json: was written by somebody else meanwhile"):
        folder.write_if("manifest.json", b"2", None)
    version = folder.version("manifest.json")
    folder.write_if("manifest.json", b"3", version)
    with pytest.raises(Conflict):
        folder.write_if("manifest.json", b"4", version)
    folder.remove("manifest.json")
    with pytest.raises(Conflict):
        folder.write_if("manifest.json", b"5", version)
    assert folder.size("manifest.json") is None


def test_the_names_of_files_are_made_durable(folder: Folder) -> None:
    """What that means on a disk is in `tests/test_power_cut.py`; an object store has nothing to do."""
    folder.write("quarantine/_blobs/a", b"1")
    folder.write("b", b"2", synced=False)
    folder.sync(["quarantine/_blobs/a", "b"])
    folder.sync([])
    assert folder.files() == {"b": 1, "quarantine/_blobs/a": 1}


def test_a_removed_file_is_gone(folder: Folder) -> None:
    folder.write("a", b"1")
    folder.remove("a")
    assert folder.size("a") is None
    assert folder.files() == {}


def test_a_folder_pickles(folder: Folder) -> None:
    folder.write("a", b"1")
    assert pickle.loads(pickle.dumps(folder)).read("a") == b"1"


def test_an_unknown_kind_of_url_is_one_line() -> None:
    with pytest.raises(StorageError, match=r"^nosuch://a/b: Protocol not known: nosuch; use one of fsspec's"):
        open_folder("nosuch://a").read("b")


def test_nothing_is_sent_to_a_web_server() -> None:
    with pytest.raises(StorageError, match=r"files are only read from http\(s\); choose a folder, or an object store"):
        open_folder("http://127.0.0.1:9").write("a.json", b"{}")
