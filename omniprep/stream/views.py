"""A dataset for two libraries that people have pipelines in: as an `IterableDataset` of HF `datasets`, and as a Ray `Dataset`.

Both give a row a record, with arrays as they are stored:

```
key, source   str
tokens        int32 (5, T): input_ids, labels (unshifted), t, h, w    (of preferences: chosen and rejected)
mel           float16 or float32 (128, F), all sounds one after another
frames        bytes, all pictures one after another
json          str, what is where in them
```

Records are found through the index, so any range of them can be read by anybody: neither library is bound to whole shards.
Order, blend and packing are theirs, not those of a plan. A record that cannot be read is left out and reported, and too many
of them end the run, as everywhere.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from omniprep.profile import QWEN2_5_OMNI
from omniprep.shards.members import NUM_TOKEN_ROWS, SEQUENCES
from omniprep.storage.folder import Place
from omniprep.stream.catalog import Catalog, read_catalog
from omniprep.stream.reader import RecordReader
from omniprep.stream.record import Record
from omniprep.stream.shard_cache import ShardCache

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa
    import ray.data

NUM_RANGES = 960
"""Pieces that HF `datasets` shares out between nodes and workers: a number that most numbers of nodes divide. (Where one does
not, every node reads everything and drops what is not its own.)"""
BLOCK_BYTES = 64 << 20
"""Of records in a block of Ray's, about: half of what it takes for a good size, for they are large to begin with."""

Range = tuple[int, int]
"""Samples [start, stop) of a catalog."""


def hf_dataset(
    place: Place, *, split: str = "train", cache: ShardCache | None = None, max_corrupt: int = 10
) -> "datasets.IterableDataset":
    """Return a split as an `IterableDataset` of HF `datasets`.

    `split_dataset_by_node`, `shuffle`, `DataLoader` workers and `state_dict` work as they do there. A shuffle buffer holds whole
    records; the order of the 960 pieces, which `shuffle` changes too, costs nothing. A resumed run reads no record twice.
    `cache` is for a dataset at a URL: without one, every record is a request. Raises what `read_catalog` raises.
    """
    import datasets

    catalog = read_catalog(place, split=split)
    numbers = datasets.IterableDataset.from_generator(
        _numbers,
        gen_kwargs={"ranges": cut(len(catalog), NUM_RANGES)},
        features=datasets.Features({"sample": datasets.Value("int64")}),
    )
    # Numbers are generated and records mapped to them: HF resumes by generating anew what was generated already.
    return numbers.map(
        _Rows(catalog, cache=cache, max_corrupt=max_corrupt),
        batched=True,  # so that a record can be left out
        batch_size=1,
        remove_columns=["sample"],
        features=_features(catalog),
    )


def ray_dataset(
    place: Place, *, split: str = "train", cache: ShardCache | None = None, max_corrupt: int = 10
) -> "ray.data.Dataset":
    """Return a split as a Ray `Dataset`; records are read in Ray's workers, which must see `place`.

    `max_corrupt` holds for each read task. `cache` is for a dataset at a URL; each node has a folder of that name, which its
    workers share. Starts Ray if nothing has. Raises what `read_catalog` raises.
    """
    import ray.data

    catalog = read_catalog(place, split=split)
    return ray.data.read_datasource(_datasource(catalog, cache=cache, max_corrupt=max_corrupt))


def cut(num_samples: int, num_ranges: int) -> list[Range]:
    """Return the ranges, `num_ranges` at most and none empty, that samples are cut into; their sizes differ by one at most.

    >>> cut(10, 4)
    [(0, 2), (2, 5), (5, 7), (7, 10)]
    """
    num_ranges = min(num_samples, num_ranges)
    edges = [num_samples * number // num_ranges for number in range(num_ranges + 1)]
    return list(itertools.pairwise(edges))


def _numbers(ranges: Sequence[Range]) -> Iterator[dict[str, int]]:
    for start, stop in ranges:
        for sample in range(start, stop):
            yield {"sample": sample}


class _Rows:
    """Reads records as HF rows. Pickles: each process opens the shards for itself."""

    def __init__(self, catalog: Catalog, *, cache: ShardCache | None, max_corrupt: int) -> None:
        self._reader, self._names = RecordReader([catalog], cache=cache, max_corrupt=max_corrupt), _names(catalog)

    def __call__(self, batch: dict[str, list[int]]) -> dict[str, list[Any]]:
        return _columns(self._reader, batch["sample"], names=self._names)


def _names(catalog: Catalog) -> tuple[str, ...]:
    return ("key", "source", *SEQUENCES[catalog.kind], "mel", "frames", "json")


def _features(catalog: Catalog) -> "datasets.Features":
    from datasets import Array2D, Features, Value

    tokens = Array2D(shape=(NUM_TOKEN_ROWS, None), dtype="int32")
    mel = Array2D(shape=(QWEN2_5_OMNI.num_mel_bins, None), dtype=catalog.member_format.mel_dtype)
    types = {"key": Value("string"), "source": Value("string"), "mel": mel, "frames": Value("binary"), "json": Value("string")}
    return Features({name: types.get(name, tokens) for name in _names(catalog)})


def _columns(reader: RecordReader, samples: Sequence[int], *, names: Sequence[str]) -> dict[str, list[Any]]:
    with reader.read_bin([(0, sample) for sample in samples]) as records:
        rows = [_row(record) for record in records]
    return {name: [row[name] for row in rows] for name in names}


def _row(record: Record) -> dict[str, Any]:
    """Return a record's values, copied out of the buffer that it was read into."""
    return {
        "key": record.key,
        "source": record.source,
        **{name: tokens.copy() for name, tokens in record.tokens.items()},
        "mel": record.mel.copy(),
        "frames": bytes(record.frames),
        "json": str(record.json, "utf-8"),
    }


def _datasource(catalog: Catalog, *, cache: ShardCache | None, max_corrupt: int) -> Any:
    """Return what Ray reads a catalog by. (A function, for the class needs Ray to be defined.)"""
    from ray.data.block import BlockMetadata
    from ray.data.datasource import Datasource, ReadTask

    class _OmniPrep(Datasource):  # type: ignore[misc]
        def get_name(self) -> str:
            return "OmniPrep"

        def estimate_inmemory_data_size(self) -> int:
            return sum(shard.num_bytes for shard in catalog.shards)

        def get_read_tasks(self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None) -> list[Any]:
            num_bytes = self.estimate_inmemory_data_size() // len(catalog)
            return [
                ReadTask(
                    partial(_blocks, *_part(catalog, piece), cache=cache, max_corrupt=max_corrupt),
                    BlockMetadata(
                        num_rows=None,  # known of a range, but a record that cannot be read is left out
                        size_bytes=num_bytes * (piece[1] - piece[0]),
                        input_files=None,
                        exec_stats=None,
                    ),
                    per_task_row_limit=per_task_row_limit,
                )
                for piece in cut(len(catalog), parallelism)
            ]

    return _OmniPrep()


def _part(catalog: Catalog, piece: Range) -> tuple[Catalog, Range]:
    """Return a catalog of only those shards that a range lies in, and the range there: what a task is sent stays small."""
    first, last = (catalog.locate(sample)[0] for sample in (piece[0], piece[1] - 1))
    starts = catalog.starts[first : last + 2]
    base, end = int(starts[0]), int(starts[-1])
    columns = {name: getattr(catalog, name)[base:end] for name in ("num_tokens", "longest", "num_mel_frames", "num_patches")}
    part = replace(catalog, shards=catalog.shards[first : last + 1], starts=starts - base, **columns)
    return part, (piece[0] - base, piece[1] - base)


def _blocks(catalog: Catalog, piece: Range, *, cache: ShardCache | None, max_corrupt: int) -> Iterator["pa.Table"]:
    """Yield a range of records in blocks of about `BLOCK_BYTES`; `catalog` has only the shards that it lies in."""
    from ray.data.block import BlockAccessor

    mean_bytes = sum(shard.num_bytes for shard in catalog.shards) / len(catalog)
    num_blocks = math.ceil((piece[1] - piece[0]) * mean_bytes / BLOCK_BYTES)
    reader = RecordReader([catalog], cache=cache, max_corrupt=max_corrupt)
    try:
        reader.prefetch((0, number) for number in range(len(catalog.shards)))
        for start, stop in cut(piece[1] - piece[0], num_blocks):
            samples = range(piece[0] + start, piece[0] + stop)
            columns = _columns(reader, samples, names=_names(catalog))
            if columns["key"]:
                yield BlockAccessor.batch_to_arrow_block({name: _column(values) for name, values in columns.items()})
    finally:
        reader.close()


def _column(values: list[Any]) -> Any:
    """Return values as an array of objects: arrays among them differ in shape."""
    column = np.empty(len(values), object)
    column[:] = values
    return column
