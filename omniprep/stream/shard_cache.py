"""Whole shards of a store on a local disk: fetched once for all processes of a machine, and never more than `max_bytes` of them.

```
<folder>/cache.lock            held while room is made: the only moment at which sizes are added up
<folder>/<sha256>.tar          a complete copy, checked; whoever reads from it holds a shared lock on it meanwhile
<folder>/<sha256>.tar.partial  being fetched, by the process that holds an exclusive lock on it; as large as it will be
```

Locks are those of the kernel on the files themselves, so they end with the process that holds them, however it ends. A copy
is removed only by somebody who got it exclusively: never while it is read. What was not read for longest goes first.

Nobody holds a copy between two reads: a reader that waits for its trainer, which waits for another reader, which waits for
room, would wait for ever. A cache that is too small costs repeated downloads, but everybody gets on.
"""

import fcntl
import hashlib
import os
import time
from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Condition, Thread

from omniprep.errors import ConfigError, DatasetError, OmniPrepError
from omniprep.shards.manifest import ShardInfo
from omniprep.storage.folder import Folder, StorageError

_PIECE_BYTES = 8 << 20
_ATTEMPTS = 3
"""Downloads of one shard before what arrives is taken for what lies there."""
_POLL_S = 0.05
_PARTIAL = ".partial"
_USE_NS = 100_000_000
"""How exactly the last use of a copy is known: writing it down at every read would cost more than the read."""


class ShardCache:
    """Local copies of shards. Safe for threads and for several processes; it pickles as its settings.

    Best is room for all shards that the readers of a machine have in their shuffle windows, and those fetched ahead.
    """

    def __init__(self, folder: Path | str, *, max_bytes: int, num_ahead: int = 2, timeout_s: float = 3600.0) -> None:
        """`num_ahead` shards are fetched ahead of those that are read; `timeout_s` is for waiting on other processes."""
        if max_bytes < 1 or num_ahead < 0 or timeout_s <= 0:
            raise ValueError(f"{max_bytes = }, {num_ahead = }, {timeout_s = }: expected positive numbers")
        self._folder = Path(folder)
        self._max_bytes, self._num_ahead, self._timeout_s = max_bytes, num_ahead, timeout_s
        self._start_anew()

    def _start_anew(self) -> None:
        self._process = os.getpid()
        self._changed = Condition()
        self._wanted: Iterator[tuple[Folder, ShardInfo]] | None = None
        """What is to be fetched ahead, in order."""
        self._opened: set[str] = set()
        """sha256 of what has been opened since that was said."""
        self._ahead: set[str] = set()
        """sha256 of what is fetched ahead, or just being so, and not opened yet."""
        self._thread: Thread | None = None

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (self._folder, self._max_bytes, self._num_ahead, self._timeout_s)

    @property
    def num_bytes(self) -> int:
        """Return the bytes of all copies, complete or not."""
        return sum(size for _, size, _ in self._copies())

    def open(self, folder: Folder, shard: ShardInfo) -> int:
        """Return a descriptor of a complete copy, fetched if there is none. The copy stays until it is closed: close it soon.

        Raises `DatasetError` if the shard is missing or damaged where it comes from, `StorageError` if that does not answer or
        the disk is full, `ConfigError` if the cache is too small for it.
        """
        self._check_process()
        if shard.sha256 not in self._opened or shard.sha256 in self._ahead:
            with self._changed:
                self._opened.add(shard.sha256)
                self._ahead.discard(shard.sha256)
                self._changed.notify_all()
        descriptor = _claim(self._copy(shard), shard.num_bytes)
        if descriptor is not None:
            return descriptor
        deadline = time.monotonic() + self._timeout_s
        while (descriptor := self._obtain(folder, shard, deadline)) is None:
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"{self._folder}: no room for {shard.name} ({shard.num_bytes} bytes) in {self._timeout_s:.0f} s: all of "
                    f"max_bytes={self._max_bytes} is in use; raise it, or run fewer processes with this cache"
                )
            time.sleep(_POLL_S)
        return descriptor

    def prefetch(self, shards: Iterable[tuple[Folder, ShardInfo]]) -> None:
        """Fetch shards ahead, in this order, in a thread: `num_ahead` of them, the next as soon as one of these is opened.

        They are asked for one by one, in that thread. What was asked for before is forgotten. Errors of fetching are left for
        `open` to meet again.
        """
        if self._num_ahead:
            self._want(iter(shards))

    def close(self) -> None:
        """Stop fetching ahead. A shard on its way still comes in, for others."""
        self._want(None)

    def _want(self, shards: Iterator[tuple[Folder, ShardInfo]] | None) -> None:
        self._check_process()
        with self._changed:
            self._wanted = shards
            self._ahead.clear()
            self._opened.clear()
            self._changed.notify_all()
            if shards is not None and (self._thread is None or not self._thread.is_alive()):
                self._thread = Thread(target=self._fetch_ahead, name="omniprep-prefetch", daemon=True)
                self._thread.start()

    def _check_process(self) -> None:
        if self._process != os.getpid():  # a fork has no thread, and perhaps a lock that the thread held
            self._start_anew()

    def _fetch_ahead(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._wanted is None or len(self._ahead) < self._num_ahead)
                wanted = self._wanted
                if wanted is None:
                    self._thread = None
                    return
            found = next(wanted, None)  # not while others wait for the lock: it may take a while to know what comes next
            with self._changed:
                if wanted is not self._wanted:
                    continue
                if found is None:
                    self._wanted = None
                    continue
                folder, shard = found
                if shard.sha256 in self._opened:
                    continue
                self._ahead.add(shard.sha256)
            with suppress(OmniPrepError, OSError):
                self._fetch_one(folder, shard)

    def _fetch_one(self, folder: Folder, shard: ShardInfo) -> None:
        while shard.sha256 in self._ahead:
            descriptor = self._obtain(folder, shard, time.monotonic() + self._timeout_s, keep=self._ahead)
            if descriptor is not None:
                return os.close(descriptor)
            with self._changed:
                self._changed.wait(10 * _POLL_S)

    def _copy(self, shard: ShardInfo) -> Path:
        return self._folder / f"{shard.sha256}.tar"

    def _obtain(self, folder: Folder, shard: ShardInfo, deadline: float, *, keep: Container[str] = ()) -> int | None:
        """Return a locked descriptor of a complete copy, or None if there is no room for it; `keep` are not removed for it."""
        path = self._copy(shard)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            while True:
                descriptor = _claim(path, shard.num_bytes)
                if descriptor is not None:
                    return descriptor
                with self._partial(path.with_name(path.name + _PARTIAL), deadline) as partial:
                    if path.exists():  # somebody else has fetched it meanwhile
                        continue
                    if not self._make_room(partial, shard, keep):
                        return None
                    _download(folder, shard, partial)
                    path.with_name(path.name + _PARTIAL).rename(path)
                    fcntl.flock(partial, fcntl.LOCK_SH)  # so that it can be claimed before it is let go
                    if (descriptor := _claim(path, shard.num_bytes)) is not None:
                        return descriptor
        except OSError as error:
            told = f"{error.strerror or error}: free some space, grant permission, or choose another folder for the cache"
            raise StorageError(f"{self._folder}: {told}") from None

    @contextmanager
    def _partial(self, path: Path, deadline: float) -> Iterator[int]:
        """Hold a partial file exclusively. What is not renamed in the meantime is removed."""
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                if _lock(descriptor, deadline, path):
                    try:
                        yield descriptor
                    finally:
                        if _is_at(path, descriptor):
                            path.unlink()
                    return
            finally:
                os.close(descriptor)

    def _make_room(self, partial: int, shard: ShardInfo, keep: Container[str]) -> bool:
        """Remove copies until a shard fits, and take its place at once; return False if what is in use leaves none."""
        if shard.num_bytes > self._max_bytes:
            raise ConfigError(
                f"{self._folder}: {shard.name} has {shard.num_bytes} bytes, more than max_bytes={self._max_bytes} of the cache; "
                "raise that to several shards"
            )
        descriptor = os.open(self._folder / "cache.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            os.ftruncate(partial, 0)
            # What is fetched ahead was not read for long, and will be soon.
            copies = sorted(self._copies(), key=lambda copy: (_sha256_of(copy[2]) in self._ahead, copy))
            excess = sum(size for _, size, _ in copies) + shard.num_bytes - self._max_bytes
            for _, size, path in copies:
                if excess <= 0:
                    break
                if size and _sha256_of(path) not in keep and _remove_unused(path):
                    excess -= size
            if excess > 0:
                return False
            os.ftruncate(partial, shard.num_bytes)
            return True
        finally:
            os.close(descriptor)

    def _copies(self) -> list[tuple[int, int, Path]]:
        """Return last use, size and path of all copies."""
        found = []
        for path in self._folder.glob("*.tar*"):
            with suppress(FileNotFoundError):
                stat = path.stat()
                found.append((stat.st_mtime_ns, stat.st_size, path))
        return found


def _rebuild(folder: Path, max_bytes: int, num_ahead: int, timeout_s: float) -> ShardCache:
    return ShardCache(folder, max_bytes=max_bytes, num_ahead=num_ahead, timeout_s=timeout_s)


def _sha256_of(path: Path) -> str:
    return path.name.partition(".")[0]


def _claim(path: Path, num_bytes: int) -> int | None:
    """Return a descriptor of a complete copy with a shared lock, or None if there is none."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    fcntl.flock(descriptor, fcntl.LOCK_SH)  # exclusive ones are held for moments only
    stat = os.fstat(descriptor)
    if stat.st_nlink and stat.st_size == num_bytes:
        now = time.time_ns()
        if not 0 <= now - stat.st_mtime_ns < _USE_NS:
            os.utime(descriptor, ns=(now, now))
        return descriptor
    os.close(descriptor)
    if stat.st_nlink:  # not what we wrote: cut by hand, or by a file system that lost it
        path.unlink(missing_ok=True)
    return None


def _remove_unused(path: Path) -> bool:
    """Remove a copy unless somebody has it locked; return whether it is gone."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_at(path, descriptor):
            path.unlink()
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


def _is_at(path: Path, descriptor: int) -> bool:
    """Return whether an open file is the one that a path names."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _lock(descriptor: int, deadline: float, path: Path) -> bool:
    """Lock a file exclusively, or return False if it is not at its path any more: who fetched it has it in use now.

    Waits in short steps: a wait in the kernel could not be ended with Ctrl-C from a thread.
    """
    while _is_at(path, descriptor):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return _is_at(path, descriptor)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise StorageError(
                    f"{path}: another process has been fetching this for too long; end it, then try again"
                ) from None
            time.sleep(_POLL_S)
    return False


def _download(folder: Folder, shard: ShardInfo, descriptor: int) -> None:
    """Fetch a shard into an open file, and check that it is the one of the manifest."""
    place = f"{folder.place}/{shard.name}"
    for _ in range(_ATTEMPTS):
        os.lseek(descriptor, 0, os.SEEK_SET)
        digest = hashlib.sha256()
        num_bytes = 0
        try:
            source = folder.open(shard.name)
        except FileNotFoundError:
            raise DatasetError(f"{place}: is missing, though the manifest names it; copy it there, or build it again") from None
        with source, open(descriptor, "wb", closefd=False) as file:
            while num_bytes <= shard.num_bytes and (piece := source.read(_PIECE_BYTES)):
                num_bytes += len(piece)
                digest.update(piece)
                file.write(piece)
            file.flush()
        if num_bytes == shard.num_bytes and digest.hexdigest() == shard.sha256:
            os.fsync(descriptor)  # a name that outlasts a crash must not outlast its bytes
            return
    raise DatasetError(
        f"{place}: expected {shard.num_bytes} bytes with sha256 {shard.sha256:.12}…, got {num_bytes} with "
        f"{digest.hexdigest():.12}…, {_ATTEMPTS} times; it was changed or damaged after the build: copy or build it again"
    )
