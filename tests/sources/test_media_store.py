"""A record's words reach only files in declared roots, and never a pipe, a device or another host."""

import base64
import os
import pickle
import socket
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omniprep.errors import Reason, RejectSample
from omniprep.records import MediaBlob
from omniprep.sources.media_store import MediaConfig, MediaStore

STORE = MediaStore(MediaConfig())


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Return a data folder with media, next to a secret that records must not reach."""
    folder = tmp_path / "data"
    (folder / "sub").mkdir(parents=True)
    (folder / "a b%20.png").write_bytes(b"space")
    (folder / "a.png").write_bytes(b"picture")
    (folder / "12:30.wav").write_bytes(b"sound")
    (folder / "empty.png").touch()
    (folder / "link.png").symlink_to(folder / "a.png")
    (tmp_path / "secret.png").write_bytes(b"secret")
    (tmp_path / "data-other").mkdir()
    (tmp_path / "data-other" / "a.png").write_bytes(b"secret")
    (folder / "out.png").symlink_to(tmp_path / "secret.png")
    (folder / "out").symlink_to(tmp_path)
    (folder / "loop.png").symlink_to(folder / "loop.png")
    (folder / "gone.png").symlink_to(folder / "nothing.png")
    return folder


def reason(ref: str | MediaBlob, base: Path | str, store: MediaStore = STORE) -> Reason:
    with pytest.raises(RejectSample) as caught:
        store.resolve(ref, base=str(base))
    assert "\n" not in caught.value.detail
    assert len(caught.value.detail) < 1000
    return caught.value.reason


@pytest.mark.parametrize(
    ("ref", "content"),
    [
        ("a.png", b"picture"),
        ("./sub/../a.png", b"picture"),
        ("link.png", b"picture"),
        ("12:30.wav", b"sound"),
        ("a b%20.png", b"space"),
        ("{root}/a.png", b"picture"),
        ("file://{root}/a.png", b"picture"),
        ("file://localhost{root}/a%20b%2520.png", b"space"),
    ],
)
def test_what_lies_in_the_folder_is_found(root: Path, ref: str, content: bytes) -> None:
    ref = ref.format(root=root)
    media = STORE.resolve(ref, base=str(root))
    assert media.path is not None
    assert (media.path.read_bytes(), media.name) == (content, ref)
    assert media.path == Path(os.path.realpath(media.path))


@pytest.mark.parametrize(
    ("ref", "expected"),
    [
        ("../secret.png", Reason.MEDIA_FORBIDDEN),
        ("../data-other/a.png", Reason.MEDIA_FORBIDDEN),
        ("sub/../../secret.png", Reason.MEDIA_FORBIDDEN),
        ("out.png", Reason.MEDIA_FORBIDDEN),
        ("out/secret.png", Reason.MEDIA_FORBIDDEN),
        ("out/data/../secret.png", Reason.MEDIA_FORBIDDEN),
        ("/etc/passwd", Reason.MEDIA_FORBIDDEN),
        ("/no/such/file", Reason.MEDIA_FORBIDDEN),
        ("/proc/self/environ", Reason.MEDIA_FORBIDDEN),
        ("/dev/zero", Reason.MEDIA_FORBIDDEN),
        ("~/x.png", Reason.MEDIA_FORBIDDEN),
        ("file:///etc/passwd", Reason.MEDIA_FORBIDDEN),
        ("file:/etc/passwd", Reason.MEDIA_FORBIDDEN),
        ("file://host/{root}/a.png", Reason.MEDIA_FORBIDDEN),
        ("FILE:///etc/passwd", Reason.MEDIA_FORBIDDEN),
        ("file://{root}/%2e%2e/secret.png", Reason.MEDIA_FORBIDDEN),
        ("pipe:0", Reason.MEDIA_FORBIDDEN),
        ("concat:a.png|/etc/passwd", Reason.MEDIA_FORBIDDEN),
        ("http://127.0.0.1:1/a.png", Reason.MEDIA_FORBIDDEN),
        ("s3://bucket/a.png", Reason.MEDIA_FORBIDDEN),
        ("simplecache::file:///etc/passwd", Reason.MEDIA_FORBIDDEN),
        ("zip://a::file:///etc/passwd", Reason.MEDIA_FORBIDDEN),
        ("memory://a.png", Reason.MEDIA_FORBIDDEN),
        ("a.png\0.txt", Reason.MEDIA_FORBIDDEN),
        ("", Reason.MEDIA_FORBIDDEN),
        ("nothing.png", Reason.MEDIA_MISSING),
        ("gone.png", Reason.MEDIA_MISSING),
        ("a.png/x", Reason.MEDIA_UNREADABLE),
        ("loop.png", Reason.MEDIA_UNREADABLE),
        ("x" * 5000, Reason.MEDIA_UNREADABLE),
        ("sub", Reason.MEDIA_UNREADABLE),
        (".", Reason.MEDIA_UNREADABLE),
        ("empty.png", Reason.MEDIA_EMPTY),
    ],
)
def test_everything_else_is_refused_with_its_reason(root: Path, ref: str, expected: Reason) -> None:
    assert reason(ref.format(root=root), root) is expected


@pytest.mark.parametrize(
    ("ref", "media_root", "told"),
    [
        ("none.png", "data", "none.png: no such file (looked in data)"),
        ("none.png", "data/../data", "none.png: no such file (looked in data/../data)"),
        ("none.png", "", "none.png: no such file (looked in .)"),
        (
            "../x.png",
            "data",
            "../x.png: lies outside the media roots (data, more, {other}); add its folder to `media.roots` if it",
        ),
        ("out.png", "data", "out.png: leads to secret.png, outside the media roots (data, more, {other}); add its folder"),
        ("out", "data", "out: leads to ., outside the media roots (data, more, {other}); add its folder"),
        ("abroad.png", "data", "abroad.png: leads to {other}-x.png, outside the media roots (data, more, {other}); add"),
        ("a.png/x", "data", "a.png/x: Not a directory"),
        ("loop.png", "data", "loop.png: expected a file, got a link that leads back to itself"),
    ],
)
@pytest.mark.parametrize("is_link", [False, True], ids=["plain", "behind a link"])
def test_paths_are_told_as_the_recipe_writes_them(
    root: Path, tmp_path_factory: pytest.TempPathFactory, ref: str, media_root: str, told: str, is_link: bool
) -> None:
    other = tmp_path_factory.mktemp("other")
    (root / "abroad.png").symlink_to(f"{other}-x.png")
    top = root.parent
    if is_link:
        top = other / "alias"
        top.symlink_to(root.parent)
    store = MediaStore(MediaConfig(roots=(f"{top}/more", str(other))), folder=str(top))
    with pytest.raises(RejectSample) as caught:
        store.resolve(ref, base=f"{top}/{media_root}".rstrip("/"))
    assert caught.value.detail.startswith(told.format(other=other))


def test_pipes_and_sockets_are_refused_unopened(root: Path) -> None:
    os.mkfifo(root / "pipe.wav")  # opening it would wait for a writer for ever
    assert reason("pipe.wav", root) is Reason.MEDIA_UNREADABLE
    with socket.socket(socket.AF_UNIX) as server, pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)  # a socket's path may have about 100 characters
        server.bind("socket.wav")
        assert reason("socket.wav", root) is Reason.MEDIA_UNREADABLE


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="no devices")
def test_a_device_in_a_root_is_refused() -> None:
    assert reason("zero", "/dev") is Reason.MEDIA_UNREADABLE


def test_declared_roots_open_other_folders(root: Path) -> None:
    store = MediaStore(MediaConfig(roots=(str(root.parent / "data-other"),)))
    assert store.resolve(str(root.parent / "data-other" / "a.png"), base=str(root)).num_bytes == 6
    assert reason("../secret.png", root, store) is Reason.MEDIA_FORBIDDEN
    everything = MediaStore(MediaConfig(), roots=("/",))
    assert everything.resolve("../secret.png", base=str(root)).num_bytes == 6


def test_a_root_may_be_a_link_itself(root: Path) -> None:
    link = root.parent / "alias"
    link.symlink_to(root)
    assert STORE.resolve("a.png", base=str(link)).path == Path(os.path.realpath(root)) / "a.png"


@given(steps=st.lists(st.sampled_from(["..", ".", "sub", "out", "data", "a.png", "secret.png", "link.png", "", "/"]), max_size=7))
def test_no_path_leads_out(tmp_path_factory: pytest.TempPathFactory, steps: list[str]) -> None:
    top = tmp_path_factory.getbasetemp() / "leads_out"
    if not top.exists():
        (top / "data" / "sub").mkdir(parents=True)
        (top / "data" / "a.png").write_bytes(b"picture")
        (top / "secret.png").write_bytes(b"secret")
        (top / "data" / "out").symlink_to(top)
    try:
        media = STORE.resolve("/".join(steps), base=str(top / "data"))
    except RejectSample:
        return
    assert media.path is not None
    assert media.path.read_bytes() == b"picture"


def test_bytes_in_the_row_pass_through_and_win_over_the_path(root: Path) -> None:
    media = STORE.resolve(MediaBlob(path="/etc/passwd", bytes=b"x"), base=str(root))
    assert (media.name, media.data, media.path) == ("/etc/passwd", b"x", None)
    assert STORE.resolve(MediaBlob(bytes=b"x"), base=str(root)).name == "bytes in the row"
    assert STORE.resolve(MediaBlob(path="a.png"), base=str(root)).path == root / "a.png"
    assert reason(MediaBlob(path="a.png", bytes=b""), root) is Reason.MEDIA_EMPTY
    assert reason(MediaBlob(path="/etc/passwd"), root) is Reason.MEDIA_FORBIDDEN


def test_data_uris_are_decoded_within_the_limit(root: Path) -> None:
    text = base64.b64encode(b"picture").decode()
    media = STORE.resolve(f"data:image/png;base64,{text}", base=str(root))
    assert (media.data, media.name) == (b"picture", "data:image/png;base64,...")
    assert STORE.resolve("data:,a%20b", base=str(root)).data == b"a b"
    small = MediaStore(MediaConfig(max_bytes=6))
    assert reason(f"data:image/png;base64,{text}", root, small) is Reason.MEDIA_UNREADABLE
    assert reason(f"data:image/png;base64,{text * 100}", root, small) is Reason.MEDIA_UNREADABLE
    assert reason("data:image/png;base64,?!", root) is Reason.MEDIA_UNREADABLE
    assert reason("data:image/png;base64", root) is Reason.MEDIA_UNREADABLE
    assert reason("data:image/png;base64,", root) is Reason.MEDIA_EMPTY


def test_urls_are_fetched_only_where_allowed_and_within_the_limit(root: Path) -> None:
    import fsspec

    for name, content in (("in/a.png", b"picture"), ("in/empty.png", b""), ("out/a.png", b"secret")):
        with fsspec.open(f"memory://{name}", "wb") as handle:
            handle.write(content)
    by_scheme = MediaStore(MediaConfig(allow_urls=("memory",)))
    by_address = MediaStore(MediaConfig(allow_urls=("memory://in",)))
    for store in (by_scheme, by_address, MediaStore(MediaConfig(roots=("memory://in",)))):
        assert store.resolve("memory://in/a.png", base=str(root)).data == b"picture"
    assert by_scheme.resolve("memory://out/a.png", base=str(root)).data == b"secret"
    assert reason("memory://out/a.png", root, by_address) is Reason.MEDIA_FORBIDDEN
    assert reason("memory://in/../out/a.png", root, by_address) is Reason.MEDIA_FORBIDDEN
    assert reason("memory://in/%2e%2e/out/a.png", root, by_address) is Reason.MEDIA_FORBIDDEN
    assert reason("memory://inside/a.png", root, by_address) is Reason.MEDIA_FORBIDDEN
    assert reason("memory://in/none.png", root, by_scheme) is Reason.MEDIA_MISSING
    assert reason("memory://in/empty.png", root, by_scheme) is Reason.MEDIA_EMPTY
    assert (
        reason("memory://in/a.png", root, MediaStore(MediaConfig(allow_urls=("memory",), max_bytes=6))) is Reason.MEDIA_UNREADABLE
    )
    assert reason("nosuch://in/a.png", root, MediaStore(MediaConfig(allow_urls=("nosuch",)))) is Reason.MEDIA_UNREADABLE


def test_relative_names_in_remote_files_stay_below_their_folder(root: Path) -> None:
    import fsspec

    with fsspec.open("memory://remote/media/a.png", "wb") as handle:
        handle.write(b"picture")
    assert STORE.resolve("media/a.png", base="memory://remote").data == b"picture"
    assert reason("../a.png", "memory://remote/media") is Reason.MEDIA_FORBIDDEN
    assert reason(str(root / "a.png"), "memory://remote") is Reason.MEDIA_MISSING
    assert reason(f"file://{root}/a.png", "memory://remote") is Reason.MEDIA_FORBIDDEN


def test_folders_at_urls_may_have_spaces_and_be_archives(root: Path) -> None:
    import fsspec

    fsspec.filesystem("memory").pipe("/far away/a b.png", b"picture")
    assert STORE.resolve("a b.png", base="memory://far away").data == b"picture"
    for name in ("../a.png", "?/../../a.png", "#/../../a.png"):
        assert reason(name, "memory://far away") is Reason.MEDIA_FORBIDDEN, name
    for base in ("zip://chat.jsonl::s3://bucket", "https://example.org/a b"):
        assert reason("a.png", base) is Reason.MEDIA_FORBIDDEN, base
        assert reason("https://example.org/a.png", base) is Reason.MEDIA_FORBIDDEN, base


def test_http_is_fetched_where_allowed(root: Path) -> None:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(root))) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        store = MediaStore(MediaConfig(allow_urls=(address,), timeout_s=10))
        try:
            assert store.resolve(f"{address}/a.png", base=str(root)).data == b"picture"
            assert reason(f"{address}/none.png", root, store) is Reason.MEDIA_MISSING
            assert reason(f"{address}/empty.png", root, store) is Reason.MEDIA_EMPTY
        finally:
            server.shutdown()


def test_a_failed_fetch_may_be_tried_again(root: Path) -> None:
    store = MediaStore(MediaConfig(allow_urls=("http://127.0.0.1:1",), timeout_s=2))
    with pytest.raises(RejectSample) as caught:
        store.resolve("http://127.0.0.1:1/a.png", base=str(root))
    assert (caught.value.reason, caught.value.retryable) == (Reason.MEDIA_UNREADABLE, True)


def test_a_store_travels_to_workers(root: Path) -> None:
    store = pickle.loads(pickle.dumps(MediaStore(MediaConfig(roots=(str(root),)))))
    assert store.resolve(str(root / "a.png"), base="/nowhere").num_bytes == 7
