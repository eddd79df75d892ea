"""A finished dataset of which one file is anything: what is read is a sample, or an error that says which file is damaged."""

import json
import tempfile
from functools import cache
from pathlib import Path

from omniprep.errors import DatasetError
from omniprep.receipts import read_claim, read_receipt
from omniprep.shards.manifest import MANIFEST_NAME, canonical_sha256, read_manifest
from omniprep.shards.members import from_members
from omniprep.shards.quarantine import read_quarantine
from omniprep.shards.reader import ShardReader, iter_samples
from omniprep.storage.folder import StorageError, open_folder


@cache
def dataset() -> tuple[Path, dict[str, bytes]]:
    """Return a small dataset's folder, and its files."""
    from omniprep.prepare import prepare
    from tests.prepare_builders import chat, recipe, write_media

    folder = Path(tempfile.mkdtemp())
    write_media(folder / "data")
    rows: list[object] = [chat(0, {"type": "image", "image": "i.png"}, {"type": "audio", "audio": "a.wav"}), chat(1), {"bad": 1}]
    prepare(recipe(folder, rows))
    out = folder / "out"
    return out, {path.relative_to(out).as_posix(): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def _targets() -> list[str]:
    names = [name for name in dataset()[1] if name.endswith((".json", ".tar", ".parquet"))]
    return [*names, "member json", "sealed manifest"]


def seeds() -> list[bytes]:
    """Return each file of the dataset, after the byte that names it."""
    out, files = dataset()
    with ShardReader(str(out), _shard()) as reader:
        facts = reader.read_members(0)["json"]
    given = {**files, "member json": facts, "sealed manifest": files[MANIFEST_NAME]}
    return [bytes([k]) + given[name][:60_000] for k, name in enumerate(_targets())]


def _shard() -> str:
    return next(name for name in dataset()[1] if name.endswith(".tar"))


def one(data: bytes) -> None:
    """Read the dataset with one file replaced: the first byte says which."""
    out, files = dataset()
    names = _targets()
    name, content = names[(data[:1] or b"\0")[0] % len(names)], data[1:]
    try:
        if name == "member json":
            with ShardReader(str(out), _shard()) as reader:
                from_members({**reader.read_members(0), "json": content})
            return
        if name == "sealed manifest":
            name, content = MANIFEST_NAME, _sealed(content)
        (out / name).write_bytes(content)
        _read_all(out, name)
    except (DatasetError, StorageError) as error:
        assert str(error)
    finally:
        if name in files:
            (out / name).write_bytes(files[name])


def _sealed(content: bytes) -> bytes:
    """Return a manifest with a digest that fits, so that what is behind that check is reached."""
    try:
        values = json.loads(content)
        values.pop("sha256", None)
        return json.dumps({**values, "sha256": canonical_sha256(values)}).encode()
    except (ValueError, AttributeError, RecursionError):
        return content


def _read_all(out: Path, name: str) -> None:
    folder = open_folder(str(out))
    if name.startswith("quarantine/") and name.endswith(".parquet"):
        list(read_quarantine(folder, name.removeprefix("quarantine/")))
    elif name.startswith("receipts/"):
        read_claim(folder)
        read_receipt(folder, Path(name).stem)
    else:
        read_manifest(str(out))
        for _ in iter_samples(str(out)):
            pass
