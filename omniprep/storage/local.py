"""A folder on a disk (or a shared file system): files are written under a partial name, synced, then renamed.

That a name is in its folder is another thing that a disk forgets in a power cut unless that folder is synced. Each sync waits
for the disk, so this one is left to `LocalFolder.sync`, once for many files.
"""

import errno
import fcntl
import hashlib
import os
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import BinaryIO, Self

from omniprep.storage.folder import Conflict, FileWriter, RandomReader, StorageError

PARTIAL_SUFFIX = ".partial"
_BUFFER_BYTES = 1 << 20


@dataclass(frozen=True)
class LocalFolder:
    """Files below a local folder."""

    place: str

    @property
    def path(self) -> Path:
        """Return the folder."""
        return Path(self.place)

    def exists(self) -> bool:
        """Return whether the folder is there."""
        return self.path.is_dir()

    def is_empty(self) -> bool:
        """Return whether no file lies in it."""
        return not any(path.is_file() for path in self.path.rglob("*"))

    def read(self, name: str) -> bytes:
        """Return a whole file."""
        with _explained(self.path / name):
            return (self.path / name).read_bytes()

    def open(self, name: str) -> BinaryIO:
        """Open a file for reading from its start."""
        with _explained(self.path / name):
            return (self.path / name).open("rb")

    def open_random(self, name: str) -> RandomReader:
        """Open a file for reading anywhere."""
        with _explained(self.path / name):
            return LocalReader(self.path / name)

    def size(self, name: str) -> int | None:
        """Return a file's size in bytes, or None if it is absent."""
        try:
            with _explained(self.path / name):
                return (self.path / name).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return None

    def files(self, under: str = "") -> dict[str, int]:
        """Return the names and sizes of all complete files below `under`, sorted by name."""
        found = (path for path in (self.path / under).rglob("*") if path.suffix != PARTIAL_SUFFIX and path.is_file())
        return dict(sorted((path.relative_to(self.path).as_posix(), path.stat().st_size) for path in found))

    def write(self, name: str, data: bytes, *, synced: bool = True) -> str:
        """Write a whole file, absent or complete, and return its sha256."""
        with self.create(name) as file:
            file.write(data)
            file.publish(synced=synced)
        return hashlib.sha256(data).hexdigest()

    def create(self, name: str) -> FileWriter:
        """Start a file that is written piece by piece."""
        return LocalWriter(self.path / name)

    def sync(self, names: Iterable[str]) -> None:
        """Sync the folders that these files are in, up to this one."""
        for folder in sorted({folder for parent in {*map(_parent, names)} for folder in (parent, *parent.parents)}):
            with _explained(self.path / folder):
                _sync_folder(self.path / folder)

    def remove(self, name: str) -> None:
        """Remove a file; one that is not there is no error."""
        with _explained(self.path / name):
            (self.path / name).unlink(missing_ok=True)

    def version(self, name: str) -> str | None:
        """Return the sha256 of a file, or None if it is absent."""
        try:
            with _explained(self.path / name), (self.path / name).open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def write_if(self, name: str, data: bytes, version: str | None) -> None:
        """Write a file if it is still of `version`. `locked` is what keeps others out in between."""
        if self.version(name) != version:
            raise Conflict(f"{self.path / name}: was written by somebody else meanwhile")
        self.write(name, data)
        self.sync([name])

    def partials(self) -> list[str]:
        """Return the names of half-written files."""
        return sorted(path.relative_to(self.path).as_posix() for path in self.path.rglob(f"*{PARTIAL_SUFFIX}"))

    def remove_partials(self) -> None:
        """Remove half-written files."""
        for name in self.partials():
            self.remove(name)

    @contextmanager
    def locked(self, name: str) -> Iterator[None]:
        """Hold an advisory lock on a file in the folder; it ends with the process, however that ends."""
        path = self.path / name
        with _explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = path.open("w")
        with handle as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise Conflict(f"{self.place}: another `omniprep` is writing there; wait for it") from None
            yield


class LocalReader:
    """A file read by `pread`: no shared position, so threads may use one."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.num_bytes = os.fstat(self._descriptor).st_size

    def pread(self, num_bytes: int, offset: int) -> bytes:
        """Return up to `num_bytes` bytes from `offset` on."""
        return os.pread(self._descriptor, num_bytes, offset)

    def close(self) -> None:
        """Close the file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class LocalWriter:
    """A file under a partial name until `publish`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        # Random: two workers, perhaps of two machines, may write the same file when a partition is tried again while its
        # first worker still runs. They never write into each other's bytes; the last rename wins with equal content.
        self._partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}{PARTIAL_SUFFIX}")
        with _explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._partial.open("wb", buffering=_BUFFER_BYTES)

    def write(self, data: bytes | memoryview) -> object:
        """Append bytes."""
        with _explained(self._path):
            return self._file.write(data)

    def publish(self, *, synced: bool = True) -> None:
        """Sync the file and give it its name."""
        with _explained(self._path):
            self._file.flush()
            if synced:
                os.fsync(self._file.fileno())
            self._file.close()
            self._partial.replace(self._path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        with suppress(OSError):  # what is still in the buffer does not fit on a full disk, and nobody wants it
            self._file.close()
        self._partial.unlink(missing_ok=True)


def _parent(name: str) -> PurePosixPath:
    return PurePosixPath(name.rpartition("/")[0])


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_ADVICE = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "raise the quota or free some space",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f) or lower `shards.max_shard_bytes`",
    errno.EACCES: "grant permission",
    errno.EROFS: "mount it for writing",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
}


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn the errors of a disk into one line with advice; a missing file stays `FileNotFoundError`."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        advice = _ADVICE.get(error.errno or 0, "mend that")
        raise StorageError(
            f"{path}: {error.strerror or error}; {advice} and run the same command again: what is finished is kept"
        ) from None
