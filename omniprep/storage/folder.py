"""A dataset's folder: files that are absent or complete, under names like `train-chat-00000.tar` or `receipts/chat-00000.json`.

Everything that OmniPrep writes goes through a `Folder`, so that a local disk and an object store give the same promises:

- a file has its final name only when it is complete, and its bytes outlast a crash of the machine;
- its name does so from the next `sync` on: asked for once for all files of a partition, not for each;
- nothing is decided by listing: a reader asks for the names that a receipt or the manifest states;
- a file that two builds might both write is committed on condition (`write_if`).
"""

import hashlib
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Protocol, Self

from omniprep.errors import OmniPrepError


class StorageError(OmniPrepError):
    """A folder cannot be read or written: the disk is full, permission is missing, the store does not answer.

    What was finished is kept; the message says what to do before the same command is run again.
    """


class Conflict(OmniPrepError):
    """A file is not the one that it was: somebody else wrote it meanwhile."""


class FileWriter(Protocol):
    """A file being written. As a context manager it leaves nothing behind unless `publish` was called."""

    def write(self, data: bytes | memoryview) -> object:
        """Append bytes."""

    def publish(self, *, synced: bool = True) -> None:
        """Give the file its final name, complete.

        Without `synced` its bytes may still be on their way to the disk, and a crash of the machine may leave it empty or
        cut: for what can be made again, and is known to be damaged when it is read.
        """

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


class RandomReader(Protocol):
    """An open file that is read anywhere."""

    num_bytes: int

    def pread(self, num_bytes: int, offset: int) -> bytes:
        """Return up to `num_bytes` bytes from `offset` on; fewer only at the end of the file."""

    def close(self) -> None:
        """Release it."""


class Folder(Protocol):
    """Files below one folder. Names are relative, with `/`. Holds settings only: it pickles."""

    @property
    def place(self) -> str:
        """Return its path or URL, for messages; `open_folder` takes it."""

    def exists(self) -> bool:
        """Return whether the folder is there (an object store: whether any file lies below it)."""

    def is_empty(self) -> bool:
        """Return whether no file lies in it, at any depth (or there is no such folder)."""

    def read(self, name: str) -> bytes:
        """Return a whole file. Raises `FileNotFoundError`, `StorageError`."""

    def open(self, name: str) -> BinaryIO:
        """Open a file for reading from its start, buffered; it seeks. Raises `FileNotFoundError`, `StorageError`."""

    def open_random(self, name: str) -> RandomReader:
        """Open a file for reading anywhere. Raises `FileNotFoundError`, `StorageError`."""

    def size(self, name: str) -> int | None:
        """Return a file's size in bytes, or None if it is absent."""

    def files(self, under: str = "") -> dict[str, int]:
        """Return the names and sizes of all complete files below `under`, sorted by name. For cleaning and reports only."""

    def write(self, name: str, data: bytes, *, synced: bool = True) -> str:
        """Write a whole file, absent or complete, and return its sha256; `synced` as in `publish`. Raises `StorageError`."""

    def create(self, name: str) -> FileWriter:
        """Start a file that is written piece by piece."""

    def sync(self, names: Iterable[str]) -> None:
        """Make it outlast a crash of the machine that these files were written or removed: what `publish` leaves open."""

    def remove(self, name: str) -> None:
        """Remove a file; one that is not there is no error."""

    def version(self, name: str) -> str | None:
        """Return what changes when the file's content does (an ETag, a digest), or None if it is absent."""

    def write_if(self, name: str, data: bytes, version: str | None) -> None:
        """Write a file, with all that `sync` does, if it is still of `version` (None: still absent). Raises `Conflict`."""

    def partials(self) -> list[str]:
        """Return the names of half-written files that a killed build left."""

    def remove_partials(self) -> None:
        """Remove what a killed build left half written."""

    def locked(self, name: str) -> AbstractContextManager[None]:
        """Hold the folder against a second build, where that can be had. Raises `Conflict` if one runs."""


def open_folder(place: str) -> Folder:
    """Return the folder at a local path or fsspec URL.

    >>> open_folder("build/sft").place
    'build/sft'
    """
    from omniprep.storage.local import LocalFolder
    from omniprep.storage.remote import RemoteFolder, is_url

    return RemoteFolder(place) if is_url(place) else LocalFolder(place)


Place = Folder | Path | str
"""A folder, or where one is: public functions take any of these."""


def as_folder(place: Place) -> Folder:
    """Return `place` if it is a folder already, else the folder there."""
    return open_folder(str(place)) if isinstance(place, (str, Path)) else place


def sha256_of(folder: Folder, name: str) -> str:
    """Return the sha256 of a file, reading it in pieces."""
    with folder.open(name) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
