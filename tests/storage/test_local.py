"""What only a disk has: partial names, a full disk, permissions, a lock."""

import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from omniprep.storage.folder import Conflict, StorageError
from omniprep.storage.local import LocalFolder


def all_files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_a_file_has_a_partial_name_of_its_own_until_it_is_published(tmp_path: Path) -> None:
    folder = LocalFolder(str(tmp_path))
    with folder.create("x/a.tar") as first, folder.create("x/a.tar") as second:
        names = all_files(tmp_path)
        assert len(names) == 2
        assert all(name.startswith("x/a.tar.") and name.endswith(".partial") for name in names)
        assert folder.partials() == names
        assert folder.files() == {}
        first.write(b"1")
        first.publish()
        assert all_files(tmp_path)[0] == "x/a.tar"
        second.write(b"22")
        second.publish()
    assert all_files(tmp_path) == ["x/a.tar"]
    assert folder.read("x/a.tar") == b"22"


KILLED = """
import os, signal, sys
from omniprep.storage.local import LocalFolder
with LocalFolder(sys.argv[1]).create("a") as file:
    file.write(b"x" * 3_000_000)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_writer_leaves_is_found_and_removed(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    assert done.returncode == -signal.SIGKILL
    folder = LocalFolder(str(tmp_path))
    assert (folder.size("a"), folder.files()) == (None, {})
    assert len(folder.partials()) == 1
    folder.remove_partials()
    assert all_files(tmp_path) == []


def test_writers_of_one_name_at_one_moment_never_mix(tmp_path: Path) -> None:
    folder = LocalFolder(str(tmp_path))
    contents = [bytes([k]) * 200_000 for k in range(8)]
    ready = threading.Barrier(len(contents))

    def write(content: bytes) -> None:
        ready.wait(120)
        with folder.create("a") as file:
            for start in range(0, len(content), 1000):
                file.write(content[start : start + 1000])
            file.publish()

    writers = [threading.Thread(target=write, args=(content,)) for content in contents]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert folder.read("a") in contents
    assert all_files(tmp_path) == ["a"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], capture_output=True, check=False)
    if mount.returncode != 0:
        pytest.skip("only root may mount a small file system")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def fill(folder: LocalFolder) -> None:
    with folder.create("big") as file:
        for _ in range(64):
            file.write(bytes(1 << 16))
        file.publish()


def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(small_disk: Path) -> None:
    folder = LocalFolder(str(small_disk))
    folder.write("kept", b"content")
    with pytest.raises(
        StorageError, match=r"big: No space left on device; free some space and run the same command again: what is"
    ):
        fill(folder)
    assert all_files(small_disk) == ["kept"]
    folder.write("next", bytes(1 << 20))  # the space is free again


def test_a_limit_on_file_sizes_is_one_line(tmp_path: Path) -> None:
    previous = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, previous[1]))
    try:
        with pytest.raises(StorageError, match=r"big: File too large; raise the limit on file sizes \(ulimit -f\) or lower"):
            fill(LocalFolder(str(tmp_path)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, previous)
        signal.signal(signal.SIGXFSZ, handler)
    assert all_files(tmp_path) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_is_one_line(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StorageError, match="a: Permission denied; grant permission and run the same command again"):
        LocalFolder(str(tmp_path)).write("a", b"1")


def test_a_file_where_a_folder_should_be_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1")
    folder = LocalFolder(str(tmp_path))
    with pytest.raises(StorageError, match=r"a/b: (File exists|Not a directory); mend that and run the same command again"):
        folder.write("a/b", b"2")
    assert (folder.size("a/b"), folder.version("a/b")) == (None, None)


def hold(folder: LocalFolder, held: Any, release: Any) -> None:
    with folder.locked(".lock"):
        held.set()
        release.wait(120)


def test_a_lock_keeps_another_process_out_and_ends_with_its_holder(tmp_path: Path) -> None:
    folder = LocalFolder(str(tmp_path / "set"))
    context = multiprocessing.get_context("spawn")
    held, release = context.Event(), context.Event()
    holder = context.Process(target=hold, args=(folder, held, release))
    holder.start()
    assert held.wait(120)
    with (
        pytest.raises(Conflict, match="/set: another `omniprep` is writing there; wait for it"),
        folder.locked(".lock"),
    ):
        pass
    assert holder.pid is not None
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    with folder.locked(".lock"):
        folder.write("a", b"1")
    with folder.locked(".lock"):
        pass


def test_a_version_is_the_digest_of_the_content(tmp_path: Path) -> None:
    folder = LocalFolder(str(tmp_path))
    assert folder.write("a", b"1") == folder.version("a")
