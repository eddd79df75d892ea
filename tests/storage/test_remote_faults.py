"""What an S3 server and the network may do to reads, writes and commits, with a proxy in between that does it."""

import hashlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from omniprep.storage import fsspec_store
from omniprep.storage.folder import Conflict, StorageError, open_folder
from omniprep.storage.remote import FIRST_AHEAD_BYTES, DeniedError, RemoteFolder, read_url
from omniprep.storage.s3 import PART_BYTES
from tests.s3_server import S3, Request

MIB = 1 << 20
HANG_S = 25
"""What is waited for in vain takes longer: thirty seconds by default, and a request that hangs here a minute."""
BIG = b"".join(hashlib.sha256(k.to_bytes(4, "big")).digest() for k in range(20 * MIB // 32))  # three parts


def is_put(request: Request) -> bool:
    return request.method == "PUT"


def is_get(request: Request) -> bool:
    return request.method == "GET"


def is_any(request: Request) -> bool:
    return True


def is_part(request: Request) -> bool:
    return "partNumber=" in request.query


def is_complete(request: Request) -> bool:
    return request.method == "POST" and "uploadId=" in request.query


def test_a_range_is_all_that_is_sent(s3: S3) -> None:
    s3.put("a", BIG)
    reader = open_folder(s3.url).open_random("a")
    assert reader.pread(1000, 15 * MIB) == BIG[15 * MIB : 15 * MIB + 1000]
    assert [(request.method, request.range, request.num_bytes_out) for request in s3.requests] == [
        ("HEAD", "", 0),
        ("GET", f"bytes={15 * MIB}-{15 * MIB + 999}", 1000),
    ]


def test_reading_to_the_end_asks_for_more_and_more_and_for_each_byte_once(s3: S3) -> None:
    s3.put("a", BIG)
    with open_folder(s3.url).open("a") as file:
        lines = b"".join(file)
    assert lines == BIG
    sizes = [request.num_bytes_out for request in s3.seen("GET")]
    assert sum(sizes) == len(BIG)
    assert sizes[:3] == [FIRST_AHEAD_BYTES, 2 * FIRST_AHEAD_BYTES, 4 * FIRST_AHEAD_BYTES]
    assert len(sizes) == 7


def test_a_jump_fetches_little(s3: S3) -> None:
    s3.put("a", BIG)
    with open_folder(s3.url).open("a") as file:
        file.seek(-8, os.SEEK_END)
        assert file.read() == BIG[-8:]
        file.seek(10 * MIB)
        assert file.read(100) == BIG[10 * MIB : 10 * MIB + 100]
    assert [request.num_bytes_out for request in s3.seen("GET")] == [8, FIRST_AHEAD_BYTES]


def test_a_large_file_goes_up_in_parts_and_appears_when_complete(s3: S3) -> None:
    seen_early: list[list[str]] = []
    s3.fail(lambda request: is_complete(request) and bool(seen_early.append(s3.keys())), times=1)
    assert open_folder(s3.url).write("a", BIG) == hashlib.sha256(BIG).hexdigest()
    assert [request.num_bytes_in for request in s3.requests if is_part(request)] == [
        PART_BYTES,
        PART_BYTES,
        len(BIG) - 2 * PART_BYTES,
    ]
    assert seen_early == [[]]
    assert s3.get("a") == BIG
    assert s3.num_unfinished_uploads() == 0


def test_a_small_file_is_one_request(s3: S3) -> None:
    open_folder(s3.url).write("a", b"small")
    assert [request.method for request in s3.requests] == ["PUT"]


def test_of_a_large_file_only_the_part_that_failed_is_sent_again(s3: S3) -> None:
    s3.fail(is_part, skip=1, times=2, status=500)
    open_folder(s3.url).write("a", BIG)
    numbers = [request.query.partition("partNumber=")[2][0] for request in s3.requests if is_part(request)]
    assert numbers == ["1", "2", "2", "2", "3"]
    assert s3.get("a") == BIG


def test_an_upload_that_fails_for_good_leaves_no_object_and_no_parts(s3: S3) -> None:
    s3.fail(is_part, skip=1, times=99, status=503, code="SlowDown")
    with pytest.raises(StorageError, match=r"/a: \[Errno 16\] injected, 2 times in a row"):
        RemoteFolder(s3.url, attempts=2).write("a", BIG)
    assert s3.keys() == []
    assert s3.num_unfinished_uploads() == 0


def test_an_upload_whose_last_answer_is_lost_was_done(s3: S3) -> None:
    s3.fail(is_complete, "lost")
    open_folder(s3.url).write("a", BIG)
    assert s3.get("a") == BIG
    assert s3.num_unfinished_uploads() == 0


KILLED = """
import sys
from omniprep.storage.folder import open_folder
with open_folder(sys.argv[1]).create("a") as file:
    file.write(b"x" * (20 << 20))
    file.publish()
"""


def test_a_process_killed_in_an_upload_leaves_no_object_and_no_temporary_file(s3: S3, tmp_path: Path) -> None:
    s3.fail(is_part, "hang", skip=1)
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", KILLED, s3.url], env=environment) as process:
        wait_for(lambda: sum(is_part(request) for request in s3.requests) == 2)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert s3.keys() == []
    assert list(tmp_path.iterdir()) == []
    open_folder(s3.url).write("a", BIG)  # what was left of the first does not stand in the way
    assert s3.get("a") == BIG


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("replace", [False, True], ids=["nothing there yet", "replacing one"])
def test_of_two_commits_at_one_moment_exactly_one_wins(s3: S3, replace: bool) -> None:
    folder = open_folder(s3.url)
    if replace:
        folder.write("manifest.json", b"before")
    version = folder.version("manifest.json")
    # Both have seen that nothing has changed before either writes.
    both_have_looked = threading.Barrier(2, timeout=120)
    s3.fail(lambda request: is_put(request) and both_have_looked.wait() < 0, times=1)
    outcomes: dict[bytes, str] = {}

    def commit(data: bytes) -> None:
        try:
            folder.write_if("manifest.json", data, version)
            outcomes[data] = "won"
        except Conflict:
            outcomes[data] = "conflict"

    writers = [threading.Thread(target=commit, args=(data,)) for data in (b"one", b"two")]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert sorted(outcomes.values()) == ["conflict", "won"]
    assert outcomes[s3.get("manifest.json")] == "won"


@pytest.mark.parametrize("replace", [False, True], ids=["nothing there yet", "replacing one"])
def test_a_commit_whose_answer_is_lost_is_no_conflict_with_itself(s3: S3, replace: bool) -> None:
    folder = open_folder(s3.url)
    if replace:
        folder.write("manifest.json", b"before")
    version = folder.version("manifest.json")
    s3.fail(is_put, "lost")
    folder.write_if("manifest.json", b"after", version)
    assert s3.get("manifest.json") == b"after"


def test_a_commit_whose_answer_is_lost_and_that_is_overwritten_is_a_conflict(s3: S3) -> None:
    folder = open_folder(s3.url)
    s3.fail(is_put, "lost")
    # A second builder replaces it before the first asks again.
    s3.fail(lambda request: request.method == "HEAD" and bool(s3.keys()) and s3.put("manifest.json", b"other") is not None)
    with pytest.raises(Conflict, match="was written by somebody else meanwhile"):
        folder.write_if("manifest.json", b"mine", None)
    assert s3.get("manifest.json") == b"other"


def test_a_connection_reset_in_the_middle_of_a_body_costs_one_more_range(s3: S3) -> None:
    s3.put("a", BIG)
    s3.fail(is_get, "reset", skip=2)
    with open_folder(s3.url).open("a") as file:
        assert b"".join(iter(lambda: file.read(MIB // 8), b"")) == BIG
    ranges = [request.range for request in s3.seen("GET")]
    assert ranges[2] == ranges[3]
    assert len(ranges) == len(set(ranges)) + 1


@pytest.mark.parametrize(
    "use",
    [
        lambda folder: folder.read("a"),
        lambda folder: folder.open("a").read(),
        lambda folder: folder.open_random("a").pread(3, 0),
        lambda folder: folder.size("a"),
        lambda folder: folder.version("a"),
        lambda folder: folder.files(),
        lambda folder: folder.exists(),
        lambda folder: folder.write("b", b"content"),
        lambda folder: folder.write("b", BIG),
        lambda folder: folder.write_if("b", b"content", None),
        lambda folder: folder.remove("a"),
    ],
    ids=["read", "open", "pread", "size", "version", "files", "exists", "write", "write parts", "write_if", "remove"],
)
class TestEveryOperation:
    def test_survives_500s_and_throttling(self, s3: S3, use: Callable[[Any], Any]) -> None:
        s3.put("a", b"content")
        s3.fail(is_any, times=1, status=500)
        s3.fail(is_any, times=1, status=503, code="SlowDown")
        use(open_folder(s3.url))
        assert [request.status for request in s3.requests[:2]] == [500, 503]

    def test_ends_when_the_store_never_answers(self, s3: S3, use: Callable[[Any], Any]) -> None:
        s3.put("a", b"content")
        s3.fail(is_any, "hang", times=99)
        start = time.monotonic()
        with pytest.raises(StorageError, match=r"2 times in a row; the store does not answer as it should"):
            use(RemoteFolder(s3.url, timeout_s=0.3, attempts=2))
        assert time.monotonic() - start < HANG_S

    def test_is_refused_with_one_line_and_not_tried_again(self, s3: S3, use: Callable[[Any], Any]) -> None:
        s3.put("a", b"content")
        s3.fail(is_any, times=99, status=403, code="AccessDenied")
        with pytest.raises(DeniedError) as caught:
            use(open_folder(s3.url))
        assert len(s3.requests) == 1
        assert "\n" not in str(caught.value)
        assert str(caught.value).startswith(s3.url)
        assert str(caught.value).endswith("check the credentials and what they may do there")


def test_names_that_a_listing_does_not_show_yet_are_read_and_replaced(s3: S3) -> None:
    folder = open_folder(s3.url)
    folder.write("set/a", b"content")
    s3.unlisted.add("set/a")
    assert folder.files() == {}
    assert (folder.size("set/a"), folder.read("set/a"), folder.open("set/a").read()) == (7, b"content", b"content")
    with pytest.raises(Conflict):
        folder.write_if("set/a", b"other", None)
    folder.write_if("set/a", b"other", folder.version("set/a"))
    assert folder.read("set/a") == b"other"
    folder.remove("set/a")
    assert folder.size("set/a") is None


def test_nothing_is_remembered_between_two_questions(s3: S3) -> None:
    folder = open_folder(s3.url)
    assert (folder.size("a"), folder.files()) == (None, {})
    s3.put("a", b"1")
    assert (folder.size("a"), folder.files()) == (1, {"a": 1})
    s3.put("a", b"22")
    assert (folder.size("a"), folder.files(), folder.read("a")) == (2, {"a": 2}, b"22")


def test_a_file_that_changes_while_it_is_read_is_a_conflict(s3: S3) -> None:
    s3.put("a", BIG)
    reader = open_folder(s3.url).open_random("a")
    assert reader.pread(4, 0) == BIG[:4]
    s3.put("a", BIG[::-1])
    with pytest.raises(Conflict):
        reader.pread(4, 4)


def test_a_bucket_that_is_not_there_is_told(s3: S3) -> None:
    folder = open_folder("s3://no-such-bucket/set")
    assert (folder.size("a"), folder.exists(), folder.files()) == (None, False, {})
    with pytest.raises(
        StorageError, match=r"no-such-bucket/set/a: no such file \(The specified bucket does not exist\); make the bucket"
    ):
        folder.write("a", b"1")


def test_without_credentials_it_says_so(s3: S3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(DeniedError, match="NoCredentialsError: Unable to locate credentials; check the credentials"):
        RemoteFolder(s3.url, timeout_s=3.5).read("a")  # a time-out of its own: no client that has credentials already


def test_an_endpoint_where_nobody_listens_is_told(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StorageError, match=r"s3://.*/a: .*127.0.0.1:9.*, 2 times in a row"):
        RemoteFolder(s3.url, timeout_s=2.5, attempts=2).read("a")


def read_in_a_child(folder: Any, results: Any) -> None:
    results.put(folder.read("a"))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_child_process_reads_on_its_own(s3: S3, method: str) -> None:
    folder = open_folder(s3.url)
    folder.write("a", b"content")  # the parent's connections and event loop are there when it forks
    context: Any = multiprocessing.get_context(method)
    results = context.Queue()
    for _ in range(3 if method == "fork" else 1):
        child = context.Process(target=read_in_a_child, args=(folder, results))
        child.start()
        assert results.get(timeout=200) == b"content"
        child.join()
        start = time.monotonic()
        assert folder.read("a") == b"content"
        assert time.monotonic() - start < HANG_S  # a connection that the child took with it would cost a time-out


CONFIGURED = "import sys; from omniprep.storage.folder import open_folder; print(open_folder(sys.argv[1]).read('a'))"


@pytest.mark.parametrize("way", ["environment", "file"])
def test_fsspecs_own_configuration_is_heeded(s3: S3, tmp_path: Path, way: str) -> None:
    s3.put("a", b"content")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    if way == "environment":
        options = {"ENDPOINT_URL": s3.endpoint, "KEY": "k", "SECRET": "s", "CONFIG_KWARGS": '{"read_timeout": 9}'}
        environment |= {f"FSSPEC_S3_{name}": value for name, value in options.items()}
    else:
        (tmp_path / "conf.json").write_text(json.dumps({"s3": {"endpoint_url": s3.endpoint, "key": "k", "secret": "s"}}))
        environment["FSSPEC_CONFIG_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", CONFIGURED, s3.url], env=environment, capture_output=True, text=True, check=True, timeout=200
    )
    assert done.stdout == "b'content'\n"


def test_a_store_that_sends_a_byte_now_and_then_is_given_up(s3: S3) -> None:
    """It is never silent, so no time-out of a connection ends it."""
    s3.put("a", bytes(1000))
    reader = RemoteFolder(s3.url, timeout_s=0.8, attempts=4).open_random("a")  # enough for a good answer on a busy machine
    s3.fail(is_get, "dribble", times=99)
    for read in (lambda: reader.pread(1000, 0), lambda: read_url(f"{s3.endpoint}/{s3.bucket}/a", max_bytes=1000, timeout_s=0.4)):
        start = time.monotonic()
        with pytest.raises(StorageError, match=r"no answer in time, \d times in a row"):
            read()
        assert time.monotonic() - start < HANG_S


def test_a_store_that_takes_no_bytes_is_given_up(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fsspec_store, "MIN_BYTES_PER_S", 5_000_000)
    s3.fail(is_put, "deaf", times=99)
    start = time.monotonic()
    with pytest.raises(StorageError, match="2 times in a row"):
        RemoteFolder(s3.url, timeout_s=0.4, attempts=2).write("a", bytes(5_000_000))
    assert 2 * (0.4 + 1) <= time.monotonic() - start < HANG_S


class TestReadUrl:
    """By HTTP too: the same server answers plain requests."""

    @pytest.fixture(params=["s3", "http", "memory"])
    def url(self, request: pytest.FixtureRequest, s3: S3) -> str:
        import fsspec

        if request.param == "memory":
            with fsspec.open(f"memory://{s3.bucket}/a", "wb") as file:
                file.write(b"content")
            return f"memory://{s3.bucket}/a"
        s3.put("a", b"content")
        return f"{s3.url if request.param == 's3' else f'{s3.endpoint}/{s3.bucket}'}/a"

    def test_gives_at_most_one_byte_more_than_allowed(self, url: str) -> None:
        assert read_url(url, max_bytes=7)[0] == b"content"
        assert read_url(url, max_bytes=3)[0] == b"cont"

    def test_gives_the_etag_where_there_is_one(self, url: str, s3: S3) -> None:
        digest = hashlib.md5(b"content").hexdigest()
        assert read_url(url, max_bytes=9)[1] == ("" if url.startswith("memory") else f'"{digest}"')
        assert len(s3.requests) == (0 if url.startswith("memory") else 1)

    def test_tells_what_is_not_there(self, url: str) -> None:
        with pytest.raises(FileNotFoundError):
            read_url(f"{url}x", max_bytes=9)

    def test_reads_an_empty_file(self, s3: S3) -> None:
        s3.put("a", b"")
        assert read_url(f"{s3.url}/a", max_bytes=9)[0] == b""
        assert read_url(f"{s3.endpoint}/{s3.bucket}/a", max_bytes=9)[0] == b""

    def test_tries_again_and_gives_up(self, s3: S3) -> None:
        url = f"{s3.endpoint}/{s3.bucket}/a"
        s3.put("a", b"content")
        s3.fail(is_any, "reset")
        s3.fail(is_any, status=503, times=2)
        assert read_url(url, max_bytes=9)[0] == b"content"
        s3.fail(is_any, status=403, times=9)
        with pytest.raises(PermissionError):
            read_url(url, max_bytes=9)
        assert len(s3.requests) == 5

    def test_asks_before_it_follows_a_redirection(self, s3: S3) -> None:
        s3.put("b", b"content")
        s3.fail(lambda request: request.key.endswith("/a"), status=302, headers={"Location": f"/{s3.bucket}/b"}, times=9)
        url = f"{s3.endpoint}/{s3.bucket}/a"
        asked: list[str] = []
        assert read_url(url, max_bytes=9, allowed=lambda target: not asked.append(target))[0] == b"content"
        assert asked == [f"{s3.endpoint}/{s3.bucket}/b"]
        assert read_url(url, max_bytes=9)[0] == b"content"
        with pytest.raises(PermissionError, match=r"redirected to http://127.0.0.1:.*/b, which is not allowed"):
            read_url(url, max_bytes=9, allowed=lambda target: False)

    def test_does_not_run_in_circles(self, s3: S3) -> None:
        s3.fail(is_any, status=302, headers={"Location": f"/{s3.bucket}/a"}, times=99)
        with pytest.raises(StorageError, match="more than 10 redirections"):
            read_url(f"{s3.endpoint}/{s3.bucket}/a", max_bytes=9)
