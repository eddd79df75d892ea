"""The cache: exact bytes, one download for all, never more than its bound, nothing removed that is in use."""

import hashlib
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from omniprep.errors import ConfigError, DatasetError
from omniprep.shards.manifest import ShardInfo, Totals
from omniprep.storage.folder import as_folder
from omniprep.storage.remote import RemoteFolder
from omniprep.stream.catalog import Catalog, read_catalog
from omniprep.stream.reader import RecordReader
from omniprep.stream.shard_cache import ShardCache
from tests.s3_server import S3, s3
from tests.stream.stored import SAMPLES, assert_same, stored

__all__ = ["s3"]

SIZE = 300_000
ALL = [(0, number) for number in range(len(SAMPLES))]


def shards(s3: S3, num_shards: int) -> list[ShardInfo]:
    """Put files into the store that the cache takes for shards: it does not look inside."""
    found = []
    for number in range(num_shards):
        data = hashlib.shake_128(bytes([number])).digest(SIZE)
        name = f"train-x-{number:05d}.tar"
        s3.put(f"out/{name}", data)
        found.append(
            ShardInfo(
                name=name,
                split="train",
                source="x",
                partition=number,
                num_bytes=SIZE,
                sha256=hashlib.sha256(data).hexdigest(),
                index_sha256="",
                totals=Totals(),
                modalities={},
            )
        )
    return found


def content(descriptor: int) -> str:
    return hashlib.sha256(os.pread(descriptor, 2 * SIZE, 0)).hexdigest()


def complete(folder: Path) -> set[str]:
    """Return the sha256 of the complete copies."""
    return {path.stem for path in folder.glob("*.tar")}


def wait_for(condition: Callable[[], object], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def store(s3: S3) -> RemoteFolder:
    folder = as_folder(s3.url + "/out")
    assert isinstance(folder, RemoteFolder)
    return folder


def test_a_copy_is_exact_and_fetched_once(s3: S3, store: RemoteFolder, tmp_path: Path) -> None:
    (shard,) = shards(s3, 1)
    cache = ShardCache(tmp_path / "cache", max_bytes=2 * SIZE)
    for again in (cache, cache, pickle.loads(pickle.dumps(cache)), ShardCache(tmp_path / "cache", max_bytes=2 * SIZE)):
        descriptor = again.open(store, shard)
        assert content(descriptor) == shard.sha256
        os.close(descriptor)
    assert len(s3.seen("HEAD", ".tar")) == 1
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == [f"{shard.sha256}.tar", "cache.lock"]


def test_the_bound_holds_and_what_was_not_used_for_longest_goes_first(s3: S3, store: RemoteFolder, tmp_path: Path) -> None:
    one, two, three = shards(s3, 3)
    cache = ShardCache(tmp_path, max_bytes=2 * SIZE + 1)
    for shard in (one, two, one, three):
        time.sleep(0.12)  # the last use is known to a tenth of a second
        os.close(cache.open(store, shard))
        assert cache.num_bytes <= 2 * SIZE + 1
    assert {path.stem for path in tmp_path.glob("*.tar")} == {one.sha256, three.sha256}


def test_what_is_in_use_stays(s3: S3, store: RemoteFolder, tmp_path: Path) -> None:
    one, two, three = shards(s3, 3)
    cache = ShardCache(tmp_path, max_bytes=2 * SIZE, timeout_s=0.2)
    other = ShardCache(tmp_path, max_bytes=2 * SIZE)
    used = [cache.open(store, one), other.open(store, two)]
    with pytest.raises(ConfigError, match=r"no room for train-x-00002.tar.*max_bytes=600000"):
        cache.open(store, three)
    assert [content(descriptor) for descriptor in used] == [one.sha256, two.sha256]
    waiting = threading.Timer(0.3, os.close, [used[0]])
    waiting.start()
    descriptor = other.open(store, three)
    waiting.join()
    assert content(descriptor) == three.sha256
    assert not (tmp_path / f"{one.sha256}.tar").exists()
    os.close(used[1])
    os.close(descriptor)


def test_a_shard_larger_than_the_cache_is_a_mistake_of_the_settings(s3: S3, store: RemoteFolder, tmp_path: Path) -> None:
    (shard,) = shards(s3, 1)
    with pytest.raises(ConfigError, match=f"has {SIZE} bytes, more than max_bytes=1000"):
        ShardCache(tmp_path, max_bytes=1000).open(store, shard)
    with pytest.raises(ValueError, match="max_bytes"):
        ShardCache(tmp_path, max_bytes=0)


def test_a_download_that_is_damaged_on_the_way_is_repeated(s3: S3, store: RemoteFolder, tmp_path: Path) -> None:
    (shard,) = shards(s3, 1)
    (other,) = shards(s3, 2)[1:]
    right, wrong = s3.get(f"out/{shard.name}"), s3.get(f"out/{other.name}")
    s3.put(f"out/{shard.name}", wrong)

    def mend() -> None:
        wait_for(lambda: s3.seen("GET", shard.name))
        s3.put(f"out/{shard.name}", right)

    # The first answer is held back until it has been asked for, so that a second try meets the mended file.
    s3.fail(lambda request: request.method == "HEAD" and s3.seen("GET", shard.name) != [], "slow", seconds=0.5)
    thread = threading.Thread(target=mend)
    thread.start()
    descriptor = ShardCache(tmp_path, max_bytes=SIZE).open(store, shard)
    thread.join()
    assert content(descriptor) == shard.sha256
    os.close(descriptor)


@pytest.mark.parametrize("kind", ["other bytes", "cut", "longer"])
def test_a_shard_that_is_damaged_in_the_store_is_told(s3: S3, store: RemoteFolder, tmp_path: Path, kind: str) -> None:
    (shard,) = shards(s3, 1)
    data = s3.get(f"out/{shard.name}")
    s3.put(f"out/{shard.name}", {"other bytes": data[:-1] + b"?", "cut": data[:-1], "longer": data + b"?"}[kind])
    with pytest.raises(DatasetError, match=rf"{shard.name}: expected {SIZE} bytes with sha256 .*, 3 times"):
        ShardCache(tmp_path, max_bytes=SIZE).open(store, shard)
    assert [path.name for path in tmp_path.iterdir()] == ["cache.lock"]
    s3.client.delete_object(Bucket=s3.bucket, Key=f"out/{shard.name}")
    with pytest.raises(DatasetError, match="is missing"):
        ShardCache(tmp_path, max_bytes=SIZE).open(store, shard)


def test_what_a_killed_process_left_is_fetched_anew(s3: S3, store: RemoteFolder, tmp_path: Path) -> None:
    one, two = shards(s3, 2)
    (tmp_path / f"{one.sha256}.tar.partial").write_bytes(b"?" * SIZE)
    (tmp_path / f"{two.sha256}.tar").write_bytes(b"?" * 10)  # a name that outlived its bytes
    cache = ShardCache(tmp_path, max_bytes=SIZE)
    for shard in (two, one):
        descriptor = cache.open(store, shard)
        assert content(descriptor) == shard.sha256
        os.close(descriptor)


PROCESS = """
import hashlib, json, os, sys
from omniprep.shards.manifest import ShardInfo
from omniprep.storage.folder import as_folder
from omniprep.stream.shard_cache import ShardCache

place, folder, max_bytes, *shards = sys.argv[1:]
cache = ShardCache(folder, max_bytes=int(max_bytes))
print("ready", flush=True)
sys.stdin.readline()
for _ in range(2):
    for text in shards:
        shard = ShardInfo.model_validate_json(text)
        descriptor = cache.open(as_folder(place), shard)
        assert cache.num_bytes <= int(max_bytes)
        assert hashlib.sha256(os.pread(descriptor, 1 << 20, 0)).hexdigest() == shard.sha256
        os.close(descriptor)
"""


def together(store: RemoteFolder, folder: Path, orders: list[list[ShardInfo]], *, max_bytes: int) -> None:
    """Open shards in several processes at once."""
    commands = [
        [sys.executable, "-c", PROCESS, store.place, str(folder), str(max_bytes), *(shard.model_dump_json() for shard in order)]
        for order in orders
    ]
    processes = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for command in commands
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    for process in processes:
        _, told = process.communicate(timeout=120)
        assert process.returncode == 0, told


def test_two_processes_share_one_download(s3: S3, store: RemoteFolder, tmp_path: Path) -> None:
    found = shards(s3, 1)
    s3.fail(lambda request: request.method == "GET" and request.key.endswith(".tar"), "slow", seconds=1.0)
    together(store, tmp_path, [found, found], max_bytes=SIZE)
    assert len(s3.seen("HEAD", ".tar")) == 1


def test_processes_that_need_more_than_there_is_room_for_take_turns(s3: S3, store: RemoteFolder, tmp_path: Path) -> None:
    found = shards(s3, 4)
    together(store, tmp_path, [found, found[::-1], found[2:] + found[:2]], max_bytes=3 * SIZE)
    assert ShardCache(tmp_path, max_bytes=1).num_bytes <= 3 * SIZE


def test_shards_are_fetched_ahead_in_order_and_not_too_many(s3: S3, store: RemoteFolder, tmp_path: Path) -> None:
    found = shards(s3, 5)
    cache = ShardCache(tmp_path, max_bytes=5 * SIZE, num_ahead=2)
    cache.prefetch([(store, shard) for shard in found])
    wait_for(lambda: len(complete(tmp_path)) == 2)
    time.sleep(0.2)
    assert complete(tmp_path) == {shard.sha256 for shard in found[:2]}
    for number, shard in enumerate(found):
        descriptor = cache.open(store, shard)
        assert content(descriptor) == shard.sha256
        os.close(descriptor)
        wait_for(lambda number=number: len(complete(tmp_path)) == min(number + 3, 5))
    assert len(s3.seen("HEAD", ".tar")) == 5
    cache.close()


def test_shards_ahead_are_asked_for_one_by_one(s3: S3, store: RemoteFolder, tmp_path: Path) -> None:
    found = shards(s3, 5)
    asked: list[str] = []

    def wanted() -> Iterator[tuple[RemoteFolder, ShardInfo]]:
        for shard in found:
            asked.append(shard.sha256)
            yield store, shard

    cache = ShardCache(tmp_path, max_bytes=5 * SIZE, num_ahead=1)
    cache.prefetch(wanted())
    wait_for(lambda: len(complete(tmp_path)) == 1)
    time.sleep(0.1)
    assert asked == [found[0].sha256]
    os.close(cache.open(store, found[1]))  # before it is its turn: it is not fetched again
    os.close(cache.open(store, found[0]))
    wait_for(lambda: len(complete(tmp_path)) == 3)
    assert asked == [shard.sha256 for shard in found[:3]]
    assert len(s3.seen("HEAD", ".tar")) == 3
    cache.close()
    wait_for(lambda: cache._thread is None)


def test_what_is_fetched_ahead_stays_until_it_is_read_if_there_is_other_room(s3: S3, store: RemoteFolder, tmp_path: Path) -> None:
    one, two, three = shards(s3, 3)
    cache = ShardCache(tmp_path, max_bytes=2 * SIZE, num_ahead=2)
    cache.prefetch([(store, one), (store, two), (store, three)])
    wait_for(lambda: complete(tmp_path) == {one.sha256, two.sha256})
    os.close(cache.open(store, one))
    wait_for(lambda: complete(tmp_path) == {two.sha256, three.sha256})
    os.close(cache.open(store, one))  # again: now it takes the room of what is not yet read
    assert len(complete(tmp_path)) == 2
    assert cache.num_bytes <= 2 * SIZE
    cache.close()


def test_what_is_not_wanted_any_more_is_not_fetched(s3: S3, store: RemoteFolder, tmp_path: Path) -> None:
    one, two, three = shards(s3, 3)
    cache = ShardCache(tmp_path, max_bytes=3 * SIZE, num_ahead=1)
    cache.prefetch([(store, one), (store, two)])
    wait_for(lambda: complete(tmp_path) == {one.sha256})
    cache.prefetch([(store, three)])
    wait_for(lambda: complete(tmp_path) == {one.sha256, three.sha256})
    cache.close()
    wait_for(lambda: cache._thread is None)
    assert complete(tmp_path) == {one.sha256, three.sha256}


def test_readers_that_wait_for_each_other_do_not_wait_for_room(s3: S3, catalog: Catalog, tmp_path: Path) -> None:
    bound = max(shard.num_bytes for shard in catalog.shards) + 1000
    readers = [RecordReader([catalog], cache=ShardCache(tmp_path, max_bytes=bound, timeout_s=5)) for _ in range(2)]
    for reader in readers:
        reader.prefetch(dict.fromkeys(reader.shard_of(*one) for one in ALL))
    for number, sample in enumerate(SAMPLES):  # one reads, the other holds what it has read last
        assert_same(readers[number % 2].read(0, number), sample)
        assert readers[0]._cache.num_bytes <= bound
    for reader in readers:
        reader._cache.close()


def test_a_fork_begins_with_an_idle_cache(s3: S3, store: RemoteFolder, tmp_path: Path) -> None:
    found = shards(s3, 3)
    cache = ShardCache(tmp_path, max_bytes=3 * SIZE)
    with cache._changed:  # as if its thread held the lock at that moment
        cache._wanted = iter([(store, shard) for shard in found])
        process = multiprocessing.get_context("fork").Process(target=cache.close)
        process.start()
        process.join(10)
    assert process.exitcode == 0


def test_an_error_while_fetching_ahead_is_told_by_open(s3: S3, store: RemoteFolder, tmp_path: Path) -> None:
    one, two = shards(s3, 2)
    s3.put(f"out/{one.name}", b"damaged")
    cache = ShardCache(tmp_path, max_bytes=2 * SIZE)
    cache.prefetch([(store, one), (store, two)])
    wait_for(lambda: complete(tmp_path) == {two.sha256})
    with pytest.raises(DatasetError, match="7 with"):
        cache.open(store, one)
    cache.close()


@pytest.fixture
def catalog(s3: S3) -> Catalog:
    stored(s3.url + "/data")
    return read_catalog(s3.url + "/data")


def test_a_reader_reads_through_the_cache(s3: S3, catalog: Catalog, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, max_bytes=1 << 20)
    reader = RecordReader([catalog], cache=cache)
    reader.prefetch(dict.fromkeys(reader.shard_of(*one) for one in ALL))
    for _ in range(2):
        with reader.read_bin(ALL) as records:
            for record, sample in zip(records, SAMPLES, strict=True):
                assert_same(record, sample)
    assert len(s3.seen("HEAD", ".tar")) == len(catalog.shards)
    cache.close()


def test_a_reader_gets_on_with_a_cache_for_a_single_shard(s3: S3, catalog: Catalog, tmp_path: Path) -> None:
    bound = max(shard.num_bytes for shard in catalog.shards) + 1000
    cache = ShardCache(tmp_path, max_bytes=bound, timeout_s=5)
    reader = RecordReader([catalog], cache=cache)
    for number, sample in enumerate(SAMPLES):
        assert_same(reader.read(0, number), sample)
        assert cache.num_bytes <= bound
    with reader.read_bin(ALL) as records:
        assert len(records) == len(SAMPLES)
    assert cache.num_bytes <= bound
