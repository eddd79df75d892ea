"""What every source has in common."""

import datetime
from pathlib import Path
from typing import Any, Self

from pydantic import Field, field_validator

from omniprep.config import Config
from omniprep.records import Record
from omniprep.sources.files import is_url, parent_of
from omniprep.sources.formats import Columns, Format, to_record
from omniprep.sources.formats_chat import Tags
from omniprep.sources.partitions import Partition


class SourceBase(Config):
    """Options of every source: its name, which rows, and how a row becomes a record."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.\-]+$")
    """Name in the recipe: part of record keys, provenance and reports."""
    format: Format = "auto"
    """How rows are written; `auto` decides by each row's keys (`formats.detect`)."""
    columns: Columns = Columns()
    """Columns under other names, as in LLaMA-Factory's `dataset_info.json`."""
    tags: Tags = Tags()
    """Keys and role names of messages, as in LLaMA-Factory's `dataset_info.json`."""
    use_audio_in_video: bool = False
    """For rows that list videos and audios: pair each `<video>` with the `<audio>` after it, as its sound track."""
    meta_columns: tuple[str, ...] = ()
    """Columns kept in the record's `meta`; other columns that a format does not know are ignored."""
    media_root: str | None = None
    """Folder or URL for relative media paths, and a declared media root; default: the folder of the data file."""
    split: str | None = Field(default=None, pattern=r"^[A-Za-z0-9_]{1,64}$")
    """Split for records that do not name their own."""
    limit: int | None = Field(default=None, ge=1)
    """Use only the first rows."""

    def to_record(self, value: object) -> Record:
        """Return a row's value as a record. Raises `RejectSample`."""
        return to_record(
            value,
            self.format,
            columns=self.columns,
            tags=self.tags,
            use_audio_in_video=self.use_audio_in_video,
            meta_columns=self.meta_columns,
        )

    def bases(self, partition: Partition) -> set[str]:
        """Return the folders or URLs that relative media paths of a partition's rows start from."""
        return {self._base_of(piece.path) for piece in partition.slices}

    def _base_of(self, path: str) -> str:
        return parent_of(path) if self.media_root is None else _absolute(self.media_root)


class FilesSource(SourceBase):
    """A source that reads files."""

    path: tuple[str, ...] = Field(min_length=1)
    """Paths, fsspec URLs or globs, one or several; a glob's matches are sorted."""

    @field_validator("path", mode="before")
    @classmethod
    def _accept_one_path(cls, value: object) -> object:
        return (str(value),) if isinstance(value, (str, Path)) else value

    def below(self, folder: Path) -> Self:
        """Return the source with its relative paths, `media_root` included, placed below `folder`."""
        changes: dict[str, Any] = {"path": tuple(below(folder, path) for path in self.path)}
        if self.media_root is not None:
            changes["media_root"] = below(folder, self.media_root)
        return self.model_copy(update=changes)


def below(folder: Path, path: str) -> str:
    """Return `path` placed below `folder` if it is relative.

    >>> below(Path("/data"), "a.jsonl"), below(Path("/data"), "s3://b/a.jsonl")
    ('/data/a.jsonl', 's3://b/a.jsonl')
    """
    return path if is_url(path) else str(folder / Path(path).expanduser())


def _absolute(path: str) -> str:
    return path if is_url(path) else str(Path(path).expanduser().absolute())


def plain_row(value: object) -> Any:
    """Return an Arrow value as a JSON parser would give it.

    Keys that are null are left out: Arrow gives every struct the keys of all rows. Bare bytes become
    `{"bytes": ...}`, the struct that Parquet and HF `datasets` use for media. Dates become ISO 8601 text.

    >>> plain_row({"image": b"x", "text": None, "parts": [{"type": "text", "image": None}]})
    {'image': {'bytes': b'x'}, 'parts': [{'type': 'text'}]}
    """
    match value:
        case dict():
            return {
                key: item if key == "bytes" and isinstance(item, bytes) else plain_row(item)
                for key, item in value.items()
                if item is not None
            }
        case list():
            return [plain_row(item) for item in value]
        case bytes():
            return {"bytes": value}
        case datetime.date() | datetime.time():
            return value.isoformat()
        case _:
            return value
