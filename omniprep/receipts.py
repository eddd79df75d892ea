"""Receipts: what a finished partition made, and of what. They make a build resumable; the manifest is their sum.

```
OUT/receipts/recipe.json                 the recipe that the folder was claimed for, and how its sources are cut
OUT/receipts/place.json                  where its inputs lay, on the machine that built it
OUT/receipts/chat-00003.json             the receipt of a partition: written last, so what it names is there
OUT/receipts/chat-00003.inputs.parquet   the files that it read, with size, time and sha256
```

A receipt counts while all that it was written for is the same: the rows, the media that they name, the recipe as far as it
concerns their source, the version of OmniPrep; and while its files are there. Whatever in the folder no receipt names is
left over from a build that was killed, and is swept away.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from omniprep.errors import ConfigError
from omniprep.shards.index import parquet_bytes
from omniprep.shards.manifest import MANIFEST_NAME, QuarantineInfo, ShardInfo, Stored
from omniprep.shards.quarantine import BLOBS_FOLDER, QUARANTINE_FOLDER, blob_name
from omniprep.shards.writer import partition_stem
from omniprep.sources.media_facts import MediaFact
from omniprep.storage.folder import Conflict, Folder, StorageError

RECEIPTS_FOLDER = "receipts"
RECIPE_NAME = f"{RECEIPTS_FOLDER}/recipe.json"
_PLACE_NAME = f"{RECEIPTS_FOLDER}/place.json"
_LOCK_NAME = f"{RECEIPTS_FOLDER}/lock"

ClaimMode = Literal["continue", "update", "overwrite"]
"""What to do with a folder that was built from another recipe: refuse it; keep what the change does not touch; delete all."""


class Receipt(Stored):
    """What one partition made and for which inputs."""

    source: str
    partition: int
    """Position in its source."""
    partition_sha256: str
    """Digest of the partition as it was planned: names, row ranges, checksums."""
    rows_sha256: str
    """Digest of the rows as they were read, media inside them included."""
    media_sha256: str
    """Digest of the media files that the rows name, by content."""
    recipe_sha256: str
    omniprep: str
    libraries: dict[str, str]
    tokenizer_sha256: str
    num_rows: int
    rejects: dict[str, int]
    shards: tuple[ShardInfo, ...]
    quarantine: QuarantineInfo | None = None
    num_retryable: int = 0
    """Rejected records whose cause lies outside them: an object store that did not answer."""
    num_retries: int = 0
    """How often its rejected records were tried again with some success."""

    @property
    def stem(self) -> str:
        """Return what its files are named by."""
        return partition_stem(self.source, self.partition)

    @property
    def num_stored(self) -> int:
        """Return how many records are in its shards."""
        return sum(shard.totals.num_records for shard in self.shards)

    @property
    def num_rejected(self) -> int:
        """Return how many records are in its quarantine file."""
        return self.quarantine.num_records if self.quarantine is not None else 0

    @property
    def files(self) -> dict[str, int | None]:
        """Return the files that it names, with their sizes where it knows them."""
        named: dict[str, int | None] = {}
        for shard in self.shards:
            named |= {shard.name: shard.num_bytes, shard.index_name: None}
        if self.quarantine is not None:
            named[f"{QUARANTINE_FOLDER}/{self.quarantine.name}"] = None
            named |= {blob_name(blob): None for blob in self.quarantine.blobs}
        return named


def receipt_name(stem: str) -> str:
    """Return the name of a partition's receipt."""
    return f"{RECEIPTS_FOLDER}/{stem}.json"


def inputs_name(stem: str) -> str:
    """Return the name of the list of what a partition read."""
    return f"{RECEIPTS_FOLDER}/{stem}.inputs.parquet"


def write_receipt(folder: Folder, receipt: Receipt) -> None:
    """Write a receipt: from here on the partition is finished.

    What it names is made durable first. Its own name is not: a receipt that a crash of the machine takes costs its partition
    a second time, and sealing makes sure of all of them at once.
    """
    folder.sync(receipt.files)
    text = json.dumps(receipt.model_dump(mode="json"), indent=1, sort_keys=True) + "\n"
    folder.write(receipt_name(receipt.stem), text.encode("ascii"))


def read_receipt(folder: Folder, stem: str) -> Receipt | None:
    """Return the receipt of a partition, or None if there is none that can be read."""
    try:
        return Receipt.model_validate_json(folder.read(receipt_name(stem)))
    except (OSError, ValidationError):
        return None


def files_are_there(folder: Folder, receipt: Receipt) -> bool:
    """Return whether every file that a receipt names is there, with the size that it states."""
    sizes = ((folder.size(name), expected) for name, expected in receipt.files.items())
    return all(size is not None and expected in (None, size) for size, expected in sizes)


_INPUT_COLUMNS = {"location": "string", "name": "string", "num_bytes": "int64", "stamp": "string", "sha256": "string"}


def write_inputs(folder: Folder, stem: str, facts: Iterable[MediaFact]) -> None:
    """Write what a partition read, each file once. It differs between machines, so no digest covers it.

    It is not synced: a list that a crash of the machine cut is not known, and its partition is done again.
    """
    import pyarrow as pa

    known = sorted({(fact.location, fact.name): fact for fact in facts}.items())
    rows = [{column: getattr(fact, column) for column in _INPUT_COLUMNS} for _, fact in known]
    schema = pa.schema([pa.field(name, pa.type_for_alias(kind), nullable=False) for name, kind in _INPUT_COLUMNS.items()])
    folder.write(inputs_name(stem), parquet_bytes(pa.Table.from_pylist(rows, schema=schema)), synced=False)


def read_inputs(folder: Folder, stem: str) -> list[MediaFact] | None:
    """Return what a partition read, or None if that is not known any more."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows = pq.ParquetFile(pa.BufferReader(folder.read(inputs_name(stem)))).read(use_threads=False).to_pylist()
        return [MediaFact(**row) for row in rows]
    except (OSError, pa.ArrowException, TypeError, ValueError):  # ValueError: text that is no UTF-8
        return None


# A partition's stem ends with its number; a shard's begins with the split, and `-01` counts further shards.
_SHARD = re.compile(r"[A-Za-z0-9_]+-[A-Za-z0-9_-]+-[0-9]{5,7}(-[0-9]{2,4})?\.(tar|parquet)")
_OF_A_PARTITION = re.compile(
    rf"({RECEIPTS_FOLDER}/[A-Za-z0-9_-]+-[0-9]{{5,7}}\.(json|inputs\.parquet)"
    rf"|{QUARANTINE_FOLDER}/[A-Za-z0-9_-]+-[0-9]{{5,7}}(-r[0-9]+)?\.parquet"
    rf"|{QUARANTINE_FOLDER}/{BLOBS_FOLDER}/[0-9a-f]{{64}})"
)


def is_output(name: str) -> bool:
    """Return whether a file's name is one that a partition's files have; a user's `backup-20260101.tar` is none.

    >>> is_output("train-chat-00003-01.tar"), is_output("receipts/chat-00003.json"), is_output("receipts/recipe.json")
    (True, True, False)
    """
    return _SHARD.fullmatch(name) is not None or _OF_A_PARTITION.fullmatch(name) is not None


def sweep(folder: Folder, receipts: Iterable[Receipt]) -> None:
    """Remove every output that none of the receipts names: the receipts first, so that nothing half removed counts.

    Not even after a crash of the machine: where receipts go, they are gone for good before their files are written over.
    """
    kept = set[str]()
    for receipt in receipts:
        kept |= {*receipt.files, receipt_name(receipt.stem), inputs_name(receipt.stem)}
    strays = [name for name in folder.files() if is_output(name) and name not in kept]
    first = [name for name in strays if name.startswith(f"{RECEIPTS_FOLDER}/")]
    for name in first:
        folder.remove(name)
    folder.sync(first)
    for name in sorted({*strays} - {*first}):
        folder.remove(name)


class Claim(Stored):
    """What `receipts/recipe.json` holds."""

    recipe: dict[str, Any]
    """The recipe's identity."""
    rows_per_partition: dict[str, int] = Field(default_factory=dict)
    """By source, where the recipe says `auto`: chosen once, for another size would make other shards."""


def read_claim(folder: Folder) -> Claim | None:
    """Return what a folder was claimed for, or None if it was not."""
    try:
        return Claim.model_validate_json(folder.read(RECIPE_NAME))
    except (OSError, ValidationError):
        return None


def write_claim(folder: Folder, claim: Claim) -> None:
    """Write what a folder is claimed for."""
    folder.write(RECIPE_NAME, _claim_bytes(claim))
    folder.sync([RECIPE_NAME])


def _claim_bytes(claim: Claim) -> bytes:
    return (json.dumps(claim.model_dump(mode="json"), indent=1, sort_keys=True) + "\n").encode("ascii")


@contextmanager
def open_build(folder: Folder, identity: Mapping[str, Any], *, mode: ClaimMode, inputs_folder: Path = Path()) -> Iterator[Claim]:
    """Hold a build's folder: made, locked against a second build, of this very recipe, without half-written files.

    Raises `ConfigError` if another build runs there, if it holds something else, or was built from another recipe and
    `mode` is `continue`.
    """
    # Asked again once it is not empty: a build that begins at this moment puts its lock or its claim there first.
    if not _is_ours(folder) and not folder.is_empty() and not _is_ours(folder):
        raise ConfigError(f"output {folder.place}: holds files that OmniPrep did not write; choose another output or empty it")
    with ExitStack() as stack:
        try:
            stack.enter_context(folder.locked(_LOCK_NAME))
        except Conflict:
            raise ConfigError(f"output {folder.place}: another `omniprep` is writing there; wait for it") from None
        except (StorageError, OSError) as error:
            reason = (error.strerror if isinstance(error, OSError) else None) or error
            raise ConfigError(f"output {folder.place}: cannot be made or written: {reason}; choose another output") from None
        claim = _claim(folder, json.loads(json.dumps(identity)), mode=mode)
        place = json.dumps({"inputs_folder": str(inputs_folder.absolute())}) + "\n"
        folder.write(_PLACE_NAME, place.encode("ascii"))
        folder.remove_partials()
        try:
            yield claim
        finally:
            folder.remove_partials()


def _is_ours(folder: Folder) -> bool:
    return read_claim(folder) is not None or folder.size(_LOCK_NAME) is not None


def _claim(folder: Folder, identity: dict[str, Any], *, mode: ClaimMode) -> Claim:
    version = folder.version(RECIPE_NAME)  # first: a claim that changes after this look is a conflict below
    before = read_claim(folder)
    if before is not None and before.recipe != identity and mode == "continue":
        listed = differences(before.recipe, identity)
        shown = "; ".join(listed[:6]) + (f"; and {len(listed) - 6} more" if len(listed) > 6 else "")
        raise ConfigError(
            f"output {folder.place}: was built from another recipe ({shown}); choose another output, use --update to do again "
            "only what the change touches, or --overwrite to delete it and build anew"
        )
    if mode == "overwrite":
        folder.remove(MANIFEST_NAME)  # first, so that what is left is never taken for complete
        sweep(folder, ())
    sizes = before.rows_per_partition if before is not None and mode != "overwrite" else {}
    claim = Claim(recipe=identity, rows_per_partition=sizes)
    if before != claim:
        try:
            folder.write_if(RECIPE_NAME, _claim_bytes(claim), version)
        except Conflict:  # there was no lock, and another build claimed it at this moment: see for what
            return _claim(folder, identity, mode=mode)
        folder.sync([RECIPE_NAME])
    return claim


def read_inputs_folder(folder: Folder) -> Path:
    """Return the folder that the recipe's relative paths started from when the dataset was last built, on that machine.

    It is not part of the dataset, which is the same wherever its inputs lay. Raises `ConfigError` if it is not known.
    """
    try:
        return Path(json.loads(folder.read(_PLACE_NAME))["inputs_folder"])
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(
            f"{folder.place}: it is not known where its inputs were; name the folder of its recipe with --inputs"
        ) from None


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
