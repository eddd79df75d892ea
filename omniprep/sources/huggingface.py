"""Hugging Face `datasets`: a folder of `save_to_disk`, or anything `load_dataset` takes.

Rows are taken as Arrow, so Audio, Image and Video features are never decoded here: they come as `{bytes, path}`.
"""

import json
import logging
import zlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Self

from omniprep.errors import ConfigError
from omniprep.sources.base import SourceBase, below, plain_row
from omniprep.sources.files import one_line
from omniprep.sources.partitions import InputFile, Partition, Row, Unit, cut

_BATCH_ROWS = 32


class HuggingFaceSource(SourceBase):
    """Rows of a dataset on disk or of the hub, memory-mapped."""

    kind: Literal["huggingface"] = "huggingface"
    path: str
    """Folder of `save_to_disk`, local folder, name of a builder ("imagefolder", "json") or hub id."""
    config_name: str | None = None
    dataset_split: str = "train"
    """Which split of the dataset to read, slices as in `datasets` allowed ("train[:10%]")."""
    data_files: tuple[str, ...] | None = None
    data_dir: str | None = None
    revision: str | None = None

    def partitions(self, *, rows_per_partition: int) -> list[Partition]:
        """Return slices of `rows_per_partition` rows, the same on every call. Raises `ConfigError`."""
        dataset = _load(self)
        name = f"{Path(self.path).name}:{self.dataset_split}"
        # What `datasets` keeps of other content lies under another path; so does that of another revision.
        kept = str(dataset.cache_files[0]["filename"]) if dataset.cache_files else self.path
        file = InputFile(path=kept, name=name, num_bytes=int(dataset.data.nbytes))
        checksum = zlib.crc32(str(dataset._fingerprint).encode()) if _is_saved(self.path) else zlib.crc32(self.revision_key)
        units = (
            Unit(file, 0, row, row, min(rows_per_partition, len(dataset) - row), checksum)
            for row in range(0, len(dataset), max(rows_per_partition, 1))
        )
        return cut(units, source=self.name, rows_per_partition=rows_per_partition, limit=self.limit)

    @property
    def revision_key(self) -> bytes:
        """Return what else decides the rows of a `load_dataset` call: its fingerprint is not the same on every machine."""
        return repr((self.config_name, self.data_files, self.data_dir, self.revision)).encode()

    def read(self, partition: Partition) -> Iterator[Row]:
        """Yield the partition's rows, in order."""
        dataset = _load(self)
        json_columns = [name for name, feature in dataset.features.items() if type(feature).__name__ == "Json"]
        arrow = dataset.with_format("arrow")
        base = self._base_of(self._some_file())
        index = partition.first_row
        for piece in partition.slices:
            for start in range(piece.row, piece.row + piece.num_rows, _BATCH_ROWS):
                table = arrow[start : min(start + _BATCH_ROWS, piece.row + piece.num_rows)]
                for number, value in enumerate(table.to_pylist(), start=start):
                    parsed = {key: json.loads(v) if key in json_columns and isinstance(v, str) else v for key, v in value.items()}
                    yield Row(index=index, place=f"{piece.name}[{number}]", value=plain_row(parsed), base=base)
                    index += 1

    def bases(self, partition: Partition) -> set[str]:
        """Return the folder that relative media paths start from."""
        return {self._base_of(self._some_file())}

    def _some_file(self) -> str:
        """Return a path in the folder that media paths are relative to: the dataset's, its data files', or the hub's cache."""
        if Path(self.path).exists():
            return str(Path(self.path) / "data")
        if self.data_files:
            return self.data_files[0]
        if self.data_dir:
            return str(Path(self.data_dir) / "data")
        import datasets

        return str(Path(datasets.config.HF_CACHE_HOME) / "data")

    def below(self, folder: Path) -> Self:
        """Return the source with relative paths placed below `folder`; a `path` that is no folder there is a name."""
        changes: dict[str, Any] = {"path": below(folder, self.path)} if (folder / self.path).exists() else {}
        if self.data_files is not None:
            changes["data_files"] = tuple(below(folder, path) for path in self.data_files)
        for key in ("media_root", "data_dir"):
            if getattr(self, key) is not None:
                changes[key] = below(folder, getattr(self, key))
        return self.model_copy(update=changes)


def _is_saved(path: str) -> bool:
    return any((Path(path) / name).is_file() for name in ("state.json", "dataset_dict.json"))


@lru_cache(maxsize=2)
def _load(source: HuggingFaceSource) -> Any:
    """Return the memory-mapped `datasets.Dataset` of a source. Raises `ConfigError` with what `datasets` says."""
    import datasets

    place = f"source {source.name!r}: dataset {source.path!r}"
    datasets.disable_progress_bars()
    for name in ("datasets", "huggingface_hub"):  # what they warn of while they try again is in the error at the end
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        if not _is_saved(source.path):
            return datasets.load_dataset(
                source.path,
                source.config_name,
                data_files=list(source.data_files) if source.data_files is not None else None,
                data_dir=source.data_dir,
                revision=source.revision,
                split=source.dataset_split,
            )
        saved = datasets.load_from_disk(source.path)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise ConfigError(f"{place} cannot be loaded: {one_line(error)}") from None
    if isinstance(saved, datasets.Dataset):
        return saved
    if source.dataset_split not in saved:
        raise ConfigError(f"{place} has the splits {', '.join(saved)}; got dataset_split={source.dataset_split!r}")
    return saved[source.dataset_split]
