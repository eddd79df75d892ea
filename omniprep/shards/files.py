"""Files that are absent or complete: written under a partial name, synced, then renamed."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

PARTIAL_SUFFIX = ".partial"


def partial_path(path: Path) -> Path:
    """Return the name under which `path` is written until it is complete.

    It holds the process id: two processes that write the same file (a task that was retried while its first worker
    still ran) then never write into each other's bytes, and the last rename wins with equal content.
    """
    return path.with_name(f"{path.name}.{os.getpid()}{PARTIAL_SUFFIX}")


def publish(partial: Path, path: Path) -> None:
    """Rename a complete, synced file to its final name, durably."""
    partial.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, data: bytes) -> str:
    """Write a whole file so that it is absent or complete, and return its sha256."""
    partial = partial_path(path)
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        publish(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return hashlib.sha256(data).hexdigest()


def remove_partials(folder: Path) -> int:
    """Remove what a killed build left half written under `folder`, and return how many files that were."""
    partials = list(find_partials(folder))
    for path in partials:
        path.unlink(missing_ok=True)
    return len(partials)


def find_partials(folder: Path) -> Iterator[Path]:
    """Yield the half-written files under `folder`."""
    yield from sorted(folder.rglob(f"*{PARTIAL_SUFFIX}"))


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file, reading it in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
