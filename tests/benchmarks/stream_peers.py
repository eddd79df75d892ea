"""One epoch of a loader in a process of its own: `stream_peers.py make|read NAME --data OUT --copy FOLDER [--workers N]`.

`make` stores the samples of the dataset OUT once more in a peer's own format. `read` hands every sample to a consumer as
arrays: tokens int32 (5, L), mel float16 (128, F), frames as bytes; it prints what it saw and what that took as JSON. Run it
with an interpreter that has the loader. Every loader shuffles, as it does in training.
"""

import argparse
import json
import os
import resource
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"

import numpy as np  # noqa: E402

CHUNK_BYTES = 200 << 20
"""Of a shard, the same for every format."""
BUFFER_SAMPLES = 1_000
"""Of a shuffle buffer, where a loader has one."""


class Item(NamedTuple):
    """What a loader hands over: numpy arrays, or torch tensors where they come from a worker process."""

    tokens: Any
    mel: Any
    frames: Any


@dataclass(frozen=True)
class Where:
    """Where the dataset and a peer's copy of it are."""

    data: Path
    copy: Path
    workers: int = 0

    @property
    def tars(self) -> list[str]:
        return sorted(map(str, self.data.glob("train-*.tar")))


def read_omniprep(where: Where) -> Iterator[Item]:
    from omniprep.stream.catalog import read_catalog
    from omniprep.stream.plan import Blended, PlanConfig, make_plan
    from omniprep.stream.reader import RecordReader

    catalog = read_catalog(str(where.data))
    plan = make_plan([Blended(catalog=catalog)], PlanConfig(max_tokens=16_384))
    reader = RecordReader([catalog])
    bins = (plan.samples_of(number) for number in range(plan.num_bins))
    if not where.workers:
        for samples in bins:
            with reader.read_bin(samples) as records:
                yield from (Item(record.tokens["tokens"], record.mel, record.frames) for record in records)
        return
    with ThreadPoolExecutor(where.workers) as pool:
        ahead = [pool.submit(reader.read_bin, samples) for samples in islice(bins, 2 * where.workers)]
        while ahead:
            with ahead.pop(0).result() as records:
                ahead += [pool.submit(reader.read_bin, samples) for samples in islice(bins, 1)]
                yield from (Item(record.tokens["tokens"], record.mel, record.frames) for record in records)


def read_webdataset(where: Where) -> Iterator[Item]:
    import webdataset

    arrays = ["tokens.npy", "mel.npy"]
    dataset = webdataset.WebDataset(where.tars, shardshuffle=100, empty_check=False).shuffle(BUFFER_SAMPLES)
    dataset = dataset.decode(only=arrays).map(_from_members)
    yield from map(_item, _loaded(dataset, where.workers))


def read_datasets(where: Where) -> Iterator[Item]:
    import datasets

    datasets.disable_progress_bars()
    dataset = datasets.load_dataset("webdataset", data_files={"train": where.tars}, split="train", streaming=True)
    dataset = dataset.shuffle(seed=1, buffer_size=BUFFER_SAMPLES).remove_columns(["json", "__key__", "__url__"])
    yield from map(
        _item, _loaded(dataset.map(_from_members, remove_columns=["tokens.npy", "mel.npy", "frames.mjpg"]), where.workers)
    )


def read_litdata(where: Where) -> Iterator[Item]:
    import litdata

    dataset = litdata.StreamingDataset(str(where.copy), shuffle=True)
    if where.workers:
        loader = litdata.StreamingDataLoader(dataset, batch_size=8, num_workers=where.workers, collate_fn=_picklable)
        for batch in loader:
            yield from map(_item, batch)
    else:
        yield from map(_item, dataset)


def read_mosaicml(where: Where) -> Iterator[Item]:
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()
    yield from map(_item, _loaded(StreamingDataset(local=str(where.copy), shuffle=True, batch_size=1), where.workers))


def make_litdata(where: Where) -> None:
    import litdata

    numbers = list(range(len(_Stored(where.data))))
    stored = _Stored(where.data)
    litdata.optimize(fn=stored, inputs=numbers, output_dir=str(where.copy), chunk_bytes=CHUNK_BYTES, num_workers=1)


def make_mosaicml(where: Where) -> None:
    from streaming import MDSWriter

    columns = {"tokens": "ndarray:int32", "mel": "ndarray:float16", "frames": "bytes"}
    stored = _Stored(where.data)
    with MDSWriter(out=str(where.copy), columns=columns, size_limit=CHUNK_BYTES) as writer:
        for number in range(len(stored)):
            writer.write(stored(number))


READ: dict[str, Callable[[Where], Iterator[Item]]] = {
    "omniprep": read_omniprep,
    "webdataset": read_webdataset,
    "datasets": read_datasets,
    "litdata": read_litdata,
    "mosaicml-streaming": read_mosaicml,
}
MAKE: dict[str, Callable[[Where], None]] = {"litdata": make_litdata, "mosaicml-streaming": make_mosaicml}


class _Stored:
    """The samples of a dataset by number, as a peer stores them. Pickles: a copy opens the shards anew."""

    def __init__(self, place: Path) -> None:
        from omniprep.shards.manifest import read_manifest

        self._place = place
        self._spans = [(shard.name, at) for shard in read_manifest(place).shards for at in range(shard.totals.num_records)]
        self._reader: Any = None

    def __len__(self) -> int:
        return len(self._spans)

    def __call__(self, number: int) -> dict[str, Any]:
        from omniprep.shards.members import load_npy
        from omniprep.shards.reader import ShardReader

        name, at = self._spans[number]
        if self._reader is None or self._reader.name != name:
            self._reader = ShardReader(self._place, name)
        members = self._reader.read_members(at)
        mel = load_npy(members, "mel.npy")
        # Neither format takes an array without values.
        stored = mel if mel.size else np.zeros((1, 1), mel.dtype)
        return {"tokens": load_npy(members, "tokens.npy"), "mel": stored, "frames": members["frames.mjpg"]}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_reader": None}


def _loaded(dataset: Any, workers: int) -> Any:
    """Return a dataset as its users read it: as it is, or through torch's workers, a sample at a time."""
    if not workers:
        return dataset
    from torch.utils.data import DataLoader

    return DataLoader(dataset, batch_size=None, num_workers=workers)


def _picklable(batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a batch that can leave its worker: LitData's bytes are memoryviews."""
    return [{**row, "frames": bytes(row["frames"])} for row in batch]


def _from_members(row: dict[str, Any]) -> dict[str, Any]:
    # HF `datasets` gives an array as a list of its rows.
    return {"tokens": np.asarray(row["tokens.npy"]), "mel": np.asarray(row["mel.npy"]), "frames": row["frames.mjpg"]}


def _item(row: dict[str, Any]) -> Item:
    mel = row["mel"]
    return Item(row["tokens"], mel if mel.shape[0] > 1 else np.zeros((128, 0), np.float16), row["frames"])


def epoch(read: Callable[[Where], Iterator[Item]], where: Where) -> dict[str, Any]:
    """Return what a consumer saw of an epoch and what that took; the opening of the dataset is in it."""
    seen = {"samples": 0, "tokens": 0, "bytes": 0, "last_ids": 0}
    cpu, start = _cpu_s(), time.perf_counter()
    items = read(where)
    for tokens, mel, frames in items:
        seen["samples"] += 1
        seen["tokens"] += tokens.shape[1]
        seen["bytes"] += tokens.nbytes + mel.nbytes + len(frames)
        seen["last_ids"] += int(tokens[0, -1])
        del tokens, mel, frames  # what is still looked at cannot be filled anew
    del items
    return {"seen": seen, "wall_s": time.perf_counter() - start, "cpu_s": _cpu_s() - cpu}


def _cpu_s() -> float:
    """Return the CPU time of this process and of those of its workers that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("make", "read"))
    parser.add_argument("name", choices=sorted(READ))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--copy", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=1, help="what the best of them took is printed")
    given = parser.parse_args()
    where = Where(given.data, given.copy, given.workers)
    warnings.filterwarnings("ignore")
    if given.action == "make":
        MAKE[given.name](where)
    else:
        print(json.dumps(min((epoch(READ[given.name], where) for _ in range(given.epochs)), key=lambda one: one["wall_s"])))


if __name__ == "__main__":
    main()
