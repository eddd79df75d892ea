"""Receipts: what a finished partition made. They make a build resumable; the manifest is their sum.

A receipt counts while the recipe, the partition's inputs and the version of OmniPrep are those that it was written for
and its files are there. A build that was killed leaves `.partial` files and files without a receipt; both are removed.
"""

import fcntl
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from omniprep import __version__
from omniprep.errors import ConfigError
from omniprep.shards.files import remove_partials, write_file
from omniprep.shards.manifest import MANIFEST_NAME, QuarantineInfo, ShardInfo, Stored
from omniprep.shards.quarantine import BLOBS_FOLDER, QUARANTINE_FOLDER

RECEIPTS_FOLDER = "receipts"
_RECIPE_NAME = "recipe.json"
_PLACE_NAME = "place.json"
_LOCK_NAME = "lock"


class Receipt(Stored):
    """What one partition made and for which inputs."""

    partition: int
    """Number in the recipe, over all sources."""
    source: str
    partition_sha256: str
    recipe_sha256: str
    omniprep: str
    libraries: dict[str, str]
    tokenizer_sha256: str
    num_rows: int
    rejects: dict[str, int]
    shards: tuple[ShardInfo, ...]
    quarantine: QuarantineInfo | None = None

    @property
    def num_stored(self) -> int:
        """Return how many records are in its shards."""
        return sum(shard.totals.num_records for shard in self.shards)

    @property
    def num_rejected(self) -> int:
        """Return how many records are in its quarantine file."""
        return self.quarantine.num_records if self.quarantine is not None else 0


def receipt_path(folder: Path, partition: int) -> Path:
    """Return where a partition's receipt lies."""
    return folder / RECEIPTS_FOLDER / f"{partition:05d}.json"


def write_receipt(folder: Path, receipt: Receipt) -> None:
    """Write a receipt: from here on the partition is finished."""
    text = json.dumps(receipt.model_dump(mode="json"), indent=1, sort_keys=True) + "\n"
    write_file(receipt_path(folder, receipt.partition), text.encode("ascii"))


def read_receipt(folder: Path, partition: int, *, partition_sha256: str, recipe_sha256: str) -> Receipt | None:
    """Return the receipt of a partition if it still counts, else None."""
    try:
        receipt = Receipt.model_validate_json(receipt_path(folder, partition).read_bytes())
    except (OSError, ValidationError):
        return None
    wanted = (partition, partition_sha256, recipe_sha256, __version__)
    found = (receipt.partition, receipt.partition_sha256, receipt.recipe_sha256, receipt.omniprep)
    return receipt if found == wanted and _files_are_there(folder, receipt) else None


def _files_are_there(folder: Path, receipt: Receipt) -> bool:
    tars = all(_size(folder / shard.name) == shard.num_bytes for shard in receipt.shards)
    indices = all(_size(folder / shard.index_name) > 0 for shard in receipt.shards)
    rejected = receipt.quarantine
    if rejected is None:
        return tars and indices
    quarantine = folder / QUARANTINE_FOLDER
    blobs = all((quarantine / BLOBS_FOLDER / blob).is_file() for blob in rejected.blobs)
    return tars and indices and blobs and (quarantine / rejected.name).is_file()


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


def remove_outputs(folder: Path, partition: int) -> None:
    """Remove all that an earlier try of a partition left: its receipt first, then its shards and quarantine file."""
    receipt_path(folder, partition).unlink(missing_ok=True)
    for suffix in ("tar", "parquet"):
        for pattern in (f"*-{partition:05d}.{suffix}", f"*-{partition:05d}-[0-9][0-9]*.{suffix}"):
            for path in folder.glob(pattern):
                if _belongs_to(path.stem, partition):
                    path.unlink()
    (folder / QUARANTINE_FOLDER / f"{partition:05d}.parquet").unlink(missing_ok=True)


def _belongs_to(stem: str, partition: int) -> bool:
    """Return whether a shard's name is `SPLIT-PARTITION` or `SPLIT-PARTITION-NUMBER`; split names hold no `-`.

    >>> _belongs_to("train-00003-02", 3), _belongs_to("train-00003-02", 2), _belongs_to("train-00002", 2)
    (True, False, True)
    """
    return stem.split("-")[1:2] == [f"{partition:05d}"]


_SHARD_STEM = re.compile(r"[A-Za-z0-9_]+-([0-9]{5,7})(-[0-9]{2,})?")


def _shards(folder: Path) -> dict[Path, int]:
    """Return the tars and indices in a dataset's folder with their partition; a user's `backup-20260101.tar` is not one."""
    files = sorted([*folder.glob("*.tar"), *folder.glob("*.parquet")])
    return {path: int(match[1]) for path in files if (match := _SHARD_STEM.fullmatch(path.stem)) is not None}


def remove_later_partitions(folder: Path, num_partitions: int) -> None:
    """Remove what belongs to partitions that the recipe's inputs no longer have."""
    for path in sorted((folder / RECEIPTS_FOLDER).glob("[0-9]*.json")):
        if path.stem.isdecimal() and int(path.stem) >= num_partitions:
            remove_outputs(folder, int(path.stem))
    for number in sorted(set(_shards(folder).values())):
        if number >= num_partitions:
            remove_outputs(folder, number)


def remove_unused_blobs(folder: Path, used: set[str]) -> None:
    """Remove quarantined media that no receipt names any more."""
    for path in (folder / QUARANTINE_FOLDER / BLOBS_FOLDER).glob("*"):
        if path.name not in used:
            path.unlink()


@contextmanager
def open_build(folder: Path, identity: Mapping[str, Any], *, overwrite: bool, inputs_folder: Path = Path()) -> Iterator[None]:
    """Hold a build's folder: made, locked against a second build, of this very recipe, without half-written files.

    Raises `ConfigError` if another build runs there, if it holds something else, or was built from another recipe and
    `overwrite` is not set.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output {folder}: expected a folder, found a file; choose another output")
    # The lock is the first file of a build: a folder that merely has a `receipts` of its own is somebody else's.
    mine = any((folder / RECEIPTS_FOLDER / name).is_file() for name in (_LOCK_NAME, _RECIPE_NAME))
    try:
        if folder.is_dir() and not mine and any(path.name != RECEIPTS_FOLDER or any(path.iterdir()) for path in folder.iterdir()):
            raise ConfigError(f"output {folder}: holds files that OmniPrep did not write; choose another output or empty it")
        (folder / RECEIPTS_FOLDER).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output {folder}: cannot be made or written: {error.strerror}; choose another output") from None
    with (folder / RECEIPTS_FOLDER / _LOCK_NAME).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(f"output {folder}: another `omniprep prepare` is writing there; wait for it") from None
        _claim(folder, identity, overwrite=overwrite)
        place = json.dumps({"inputs_folder": str(inputs_folder.absolute())}) + "\n"
        write_file(folder / RECEIPTS_FOLDER / _PLACE_NAME, place.encode("ascii"))
        remove_partials(folder)
        try:
            yield
        finally:
            remove_partials(folder)


def read_inputs_folder(folder: Path) -> Path:
    """Return the folder that the recipe's relative paths started from when the dataset was last built, on that machine.

    It is not part of the dataset, which is the same wherever its inputs lay. Raises `ConfigError` if it is not known.
    """
    try:
        return Path(json.loads((folder / RECEIPTS_FOLDER / _PLACE_NAME).read_bytes())["inputs_folder"])
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(
            f"{folder}: it is not known where its inputs were; name the folder of its recipe with --inputs"
        ) from None


def _claim(folder: Path, identity: Mapping[str, Any], *, overwrite: bool) -> None:
    path = folder / RECEIPTS_FOLDER / _RECIPE_NAME
    text = json.dumps(identity, indent=1, sort_keys=True) + "\n"
    try:
        before = json.loads(path.read_bytes())
    except (OSError, ValueError):
        before = None
    if before is not None and before != json.loads(text) and not overwrite:
        listed = differences(before, json.loads(text))
        shown = "; ".join(listed[:6]) + (f"; and {len(listed) - 6} more" if len(listed) > 6 else "")
        raise ConfigError(
            f"output {folder}: was built from another recipe ({shown}); "
            "choose another output, or use --overwrite to delete it and build anew"
        )
    if overwrite:
        _clear(folder)
    write_file(path, text.encode("ascii"))


def _clear(folder: Path) -> None:
    """Remove a whole dataset: the manifest first, so that it is never taken for complete."""
    (folder / MANIFEST_NAME).unlink(missing_ok=True)
    for path in [*_shards(folder), *(folder / RECEIPTS_FOLDER).glob("*.json")]:
        path.unlink()
    shutil.rmtree(folder / QUARANTINE_FOLDER, ignore_errors=True)


def differences(before: object, now: object, place: str = "") -> list[str]:
    """Return every value that differs between two plain values, with its path.

    >>> differences({"a": {"b": 1}, "c": [1]}, {"a": {"b": 2}, "c": [1, 3]})
    ['a.b: 1 -> 2', 'c.1: (nothing) -> 3']
    """
    if isinstance(before, dict) and isinstance(now, dict):
        pairs: dict[str, tuple[object, object]] = {
            str(key): (before.get(key, _NOTHING), now.get(key, _NOTHING)) for key in sorted({**before, **now})
        }
    elif isinstance(before, list) and isinstance(now, list):
        longest = range(max(len(before), len(now)))
        pairs = {str(k): tuple(v[k] if k < len(v) else _NOTHING for v in (before, now)) for k in longest}  # type: ignore[misc]
    else:
        return [] if before == now else [f"{place}: {_shown(before)} -> {_shown(now)}"]
    return [line for key, (a, b) in pairs.items() for line in differences(a, b, f"{place}.{key}" if place else key)]


_NOTHING = object()


def _shown(value: object) -> str:
    return "(nothing)" if value is _NOTHING else f"{json.dumps(value):.60}"
