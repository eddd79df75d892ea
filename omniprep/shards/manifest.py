"""`manifest.json`: what a finished dataset is, sealed last. No manifest, no dataset."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from omniprep.errors import DatasetError, NoDatasetError
from omniprep.shards.index import modalities
from omniprep.shards.members import FORMAT_VERSION, MelDtype, MemberFormat, SampleKind
from omniprep.storage.folder import Place, as_folder
from omniprep.types import FrameFormat, RopeMode

MANIFEST_NAME = "manifest.json"


class Stored(BaseModel):
    """Base of what a manifest or receipt holds: immutable, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Totals(Stored):
    """Sums over records. Times are seconds at the rate that was stored."""

    num_records: int = 0
    num_tokens: int = 0
    num_supervised: int = 0
    num_mel_frames: int = 0
    num_patches: int = 0
    audio_s: float = 0.0
    video_s: float = 0.0

    def __add__(self, other: "Totals") -> "Totals":
        return Totals(**{name: getattr(self, name) + getattr(other, name) for name in Totals.model_fields})


class ShardInfo(Stored):
    """One shard and its index, as they were written."""

    name: str
    """File name of the tar."""
    split: str
    source: str
    partition: int
    """Position in its source."""
    num_bytes: int
    sha256: str
    index_sha256: str
    totals: Totals
    modalities: dict[str, Totals]

    @property
    def index_name(self) -> str:
        """Return the file name of the index."""
        return f"{self.name.removesuffix('.tar')}.parquet"


class QuarantineInfo(Stored):
    """One file of rejected records."""

    name: str
    """File name in `quarantine/`."""
    source: str
    partition: int
    num_records: int
    sha256: str
    blobs: tuple[str, ...] = ()
    """sha256 of the media under `quarantine/_blobs/`."""


class Manifest(Stored):
    """Everything that a reader must know of a dataset."""

    format: int = FORMAT_VERSION
    omniprep: str
    libraries: dict[str, str]
    profile: str
    kind: SampleKind
    rope_mode: RopeMode
    frame_format: FrameFormat
    mel_dtype: MelDtype
    members: tuple[str, ...]
    """Names of the members that every record has, in order."""
    tokenizer_sha256: str
    codec: str = ""
    recipe: dict[str, Any]
    recipe_sha256: str
    shards: tuple[ShardInfo, ...]
    quarantine: tuple[QuarantineInfo, ...]
    totals: Totals
    by_split: dict[str, Totals]
    by_source: dict[str, Totals]
    by_modality: dict[str, Totals]
    """A record counts for each modality it has, so these overlap; `text` is records without media."""
    num_rows: int = Field(ge=0)
    """Records that came in: those in shards and those in the quarantine."""
    rejects: dict[str, int]
    """Rejected records per reason."""
    rejects_by_source: dict[str, int]
    parity: str = ""
    """Stamp of the last `verify --against`, empty if there was none."""

    @property
    def member_format(self) -> MemberFormat:
        """Return what the records of this dataset have in common."""
        return MemberFormat(kind=self.kind, frame_format=self.frame_format, mel_dtype=self.mel_dtype)


def totals_of(rows: Iterable[Mapping[str, Any]]) -> Totals:
    """Return the totals of index rows."""
    sums: dict[str, Any] = dict.fromkeys(Totals.model_fields, 0)
    counted = [name for name in sums if name != "num_records"]
    for row in rows:
        sums["num_records"] += 1
        for name in counted:
            sums[name] += row[name]
    return Totals(**sums)


def add_up(values: Iterable[tuple[str, Totals]]) -> dict[str, Totals]:
    """Return the sums of totals by name, names sorted.

    >>> add_up([("b", Totals(num_records=1)), ("a", Totals()), ("b", Totals(num_records=2))])["b"].num_records
    3
    """
    sums: dict[str, Totals] = {}
    for name, totals in values:
        sums[name] = sums.get(name, Totals()) + totals
    return dict(sorted(sums.items()))


def totals_by_modality(rows: Iterable[Mapping[str, Any]]) -> dict[str, Totals]:
    """Return the totals of index rows by modality."""
    rows_of: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        for name in modalities(row):
            rows_of.setdefault(name, []).append(row)
    return {name: totals_of(found) for name, found in sorted(rows_of.items())}


def write_manifest(folder: Place, manifest: Manifest) -> None:
    """Seal a dataset: write `manifest.json` with a digest of its own content."""
    folder = as_folder(folder)
    folder.write(MANIFEST_NAME, manifest_bytes(manifest))
    folder.sync([MANIFEST_NAME])


def manifest_bytes(manifest: Manifest) -> bytes:
    """Return the manifest's file: JSON with sorted keys and, as `sha256`, the digest of all other keys."""
    values = manifest.model_dump(mode="json")
    return (json.dumps({**values, "sha256": canonical_sha256(values)}, indent=1, sort_keys=True) + "\n").encode("ascii")


def read_manifest(folder: Place) -> Manifest:
    """Return a dataset's manifest. Raises `DatasetError` if it was edited or is of another format, `NoDatasetError` if absent."""
    folder = as_folder(folder)
    path = f"{folder.place}/{MANIFEST_NAME}"
    try:
        values = json.loads(folder.read(MANIFEST_NAME))
    except FileNotFoundError:
        started = folder.size("receipts/recipe.json") is not None
        what = "an unfinished dataset; run the same `omniprep prepare` again" if started else "no dataset"
        raise NoDatasetError(f"{folder.place}: {MANIFEST_NAME} is missing, so this is {what}") from None
    except NotADirectoryError:
        detail = "expected the folder of a dataset, got a file; name the folder that it is in"
        raise NoDatasetError(f"{folder.place}: {detail}") from None
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(values, dict):
        raise DatasetError(f"{path}: expected a JSON object, got {type(values).__name__}")
    if values.get("format") != FORMAT_VERSION:
        raise DatasetError(f"{path}: expected format {FORMAT_VERSION}, got {values.get('format')!r}")
    stamped = values.pop("sha256", None)
    if stamped != canonical_sha256(values):
        raise DatasetError(f"{path}: its content does not match its own sha256: it was edited or damaged after it was sealed")
    try:
        return Manifest.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(step) for step in first["loc"])
        raise DatasetError(f"{path}: {place}: {first['msg']}") from None


def canonical_sha256(values: object) -> str:
    """Return the sha256 of plain values: of their JSON with sorted keys and no spaces.

    >>> canonical_sha256({"b": 1, "a": 2}) == canonical_sha256({"a": 2, "b": 1})
    True
    """
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()
