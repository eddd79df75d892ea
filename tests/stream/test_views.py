"""The views for HF `datasets` and Ray Data hold every record of a split once, with the arrays of the shards."""

import json
import logging
import pickle
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from omniprep.errors import ConfigError, DatasetError
from omniprep.shards.manifest import read_manifest
from omniprep.shards.members import MemberFormat, load_npy
from omniprep.shards.reader import ShardReader
from omniprep.stream import views
from omniprep.stream.catalog import read_catalog
from omniprep.stream.shard_cache import ShardCache
from omniprep.stream.views import cut, hf_dataset, ray_dataset
from tests.benchmarks.stream_corpus import write_dataset
from tests.s3_server import S3, s3
from tests.shards.builders import media_sample, preference_sample, text_sample

__all__ = ["s3"]

NUM_SAMPLES = 22


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """22 records in several shards of `train`, and some in another split."""
    folder = tmp_path_factory.mktemp("views") / "out"
    write_dataset(folder, samples(), max_shard_bytes=60_000)
    return folder


def samples() -> Iterator[Any]:
    for number in range(NUM_SAMPLES + 3):
        make = media_sample if number % 3 else text_sample
        yield make(f"chat-{number:08d}", split="train" if number < NUM_SAMPLES else "val")


def stored(folder: Path, split: str = "train") -> dict[str, dict[str, bytes]]:
    """Return the members of each record, by key, in the order of the shards."""
    found = {}
    for shard in read_manifest(folder).shards:
        if shard.split == split:
            with ShardReader(folder, shard.name) as reader:
                found |= {row["key"]: reader.read_members(at) for at, row in enumerate(reader.rows)}
    return found


def assert_stored(rows: Iterable[Mapping[str, Any]], folder: Path, split: str = "train") -> None:
    """Check that rows are the records of a split, each once, in any order."""
    rows = list(rows)
    expected = stored(folder, split)
    assert sorted(row["key"] for row in rows) == sorted(expected)
    for row in rows:
        members = expected[row["key"]]
        for name in ("tokens", "chosen", "rejected", "mel"):
            if f"{name}.npy" in members:
                array = load_npy(members, f"{name}.npy")
                np.testing.assert_array_equal(row[name], array, strict=True)
        assert row["frames"] == members["frames.mjpg"]
        assert json.loads(row["json"]) == json.loads(members["json"])
        assert row["source"] == json.loads(members["json"])["source"]


def keys(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    return [row["key"] for row in rows]


def damage(folder: Path, key: str) -> None:
    """Overwrite the header of a record's tokens."""
    for shard in read_manifest(folder).shards:
        with ShardReader(folder, shard.name) as reader:
            names = list(reader.member_names)
            found = [row["member_offsets"][names.index("tokens.npy")] for row in reader.rows if row["key"] == key]
        for offset in found:
            with (folder / shard.name).open("r+b") as file:
                file.seek(offset)
                file.write(b"XXXXXX")


def test_the_hf_view_holds_every_record_once_in_the_order_of_the_shards(dataset: Path) -> None:
    view = hf_dataset(dataset)
    assert_stored(view, dataset)
    assert keys(view) == list(stored(dataset))
    assert list(view.features) == ["key", "source", "tokens", "mel", "frames", "json"]
    assert_stored(hf_dataset(dataset, split="val"), dataset, "val")


def test_preferences_have_both_sequences(tmp_path: Path) -> None:
    pairs = [preference_sample(f"dpo-{number:08d}") for number in range(3)]
    write_dataset(tmp_path, pairs, form=MemberFormat(kind="preference", mel_dtype="float32"))
    view = hf_dataset(tmp_path)
    assert_stored(view, tmp_path)
    assert list(view.features) == ["key", "source", "chosen", "rejected", "mel", "frames", "json"]


@pytest.mark.parametrize("world_size", [2, 3, 11, 22])
def test_hf_nodes_share_the_records_out(dataset: Path, world_size: int) -> None:
    from datasets.distributed import split_dataset_by_node

    parts = [keys(split_dataset_by_node(hf_dataset(dataset), rank, world_size)) for rank in range(world_size)]
    assert sorted(key for part in parts for key in part) == sorted(stored(dataset))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_hf_shuffle_changes_the_order_with_its_seed_and_nothing_else(dataset: Path) -> None:
    view = hf_dataset(dataset)
    one, two = (view.shuffle(seed=seed, buffer_size=5) for seed in (1, 2))
    assert_stored(one, dataset)
    assert keys(one) == keys(view.shuffle(seed=1, buffer_size=5))
    assert len({tuple(keys(each)) for each in (view, one, two)}) == 3


@pytest.mark.parametrize("num_read", [0, 1, 7, NUM_SAMPLES])
def test_an_hf_state_goes_on_after_the_last_record_and_reads_none_twice(
    dataset: Path, num_read: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    view = hf_dataset(dataset)
    rows = iter(view)
    before = keys(next(rows) for _ in range(num_read))
    state = pickle.loads(pickle.dumps(view.state_dict()))

    read: list[int] = []
    columns = views._columns

    def counted(reader: Any, numbers: list[int], **options: Any) -> Any:
        read.extend(numbers)
        return columns(reader, numbers, **options)

    monkeypatch.setattr(views, "_columns", counted)
    resumed = hf_dataset(dataset)
    resumed.load_state_dict(state)
    after = keys(resumed)
    assert before + after == list(stored(dataset))
    # HF maps the last record before the state again to find its place.
    assert len(read) <= len(after) + 1


def test_a_torch_data_loader_reads_the_hf_view_in_workers(dataset: Path) -> None:
    from torch.utils.data import DataLoader

    loader = DataLoader(hf_dataset(dataset), batch_size=None, num_workers=2, multiprocessing_context="spawn")
    assert_stored(loader, dataset)


def test_hf_formats_make_tensors(dataset: Path) -> None:
    import torch

    row = next(iter(hf_dataset(dataset).with_format("torch")))
    assert row["tokens"].dtype == torch.int64
    assert row["tokens"].shape == (5, load_npy(stored(dataset)[row["key"]], "tokens.npy").shape[1])


def test_a_damaged_record_is_left_out_of_the_hf_view_and_too_many_end_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_dataset(tmp_path, samples(), max_shard_bytes=60_000)
    damage(tmp_path, "chat-00000004")
    with caplog.at_level(logging.WARNING):
        found = keys(hf_dataset(tmp_path))
    assert sorted(found) == sorted(set(stored(tmp_path)) - {"chat-00000004"})
    assert "chat-00000004" in caplog.text
    with pytest.raises(DatasetError, match="max_corrupt=0"):
        list(hf_dataset(tmp_path, max_corrupt=0))


def test_a_split_that_is_not_there_is_told(dataset: Path) -> None:
    with pytest.raises(ConfigError, match="no samples in split 'test'; it has 'train', 'val'"):
        hf_dataset(dataset, split="test")
    with pytest.raises(ConfigError, match="no samples in split 'test'"):
        ray_dataset(dataset, split="test")


@pytest.mark.parametrize(("num_samples", "num_ranges"), [(1, 960), (959, 960), (960, 960), (10_000, 960), (7, 3)])
def test_ranges_cover_all_samples_evenly(num_samples: int, num_ranges: int) -> None:
    ranges = cut(num_samples, num_ranges)
    assert [sample for start, stop in ranges for sample in range(start, stop)] == list(range(num_samples))
    assert len(ranges) == min(num_samples, num_ranges)
    sizes = {stop - start for start, stop in ranges}
    assert max(sizes) - min(sizes) <= 1


def test_hf_reads_the_tars_without_omniprep(dataset: Path, tmp_path: Path) -> None:
    from datasets import load_dataset

    tars = [str(path) for path in sorted(dataset.glob("train-*.tar"))]
    expected = stored(dataset)
    rows = list(load_dataset("webdataset", data_files={"train": tars}, split="train", streaming=True, cache_dir=str(tmp_path)))
    assert sorted(row["__key__"] for row in rows) == sorted(expected)
    for row in rows:
        members = expected[row["__key__"]]
        for name in ("tokens.npy", "mel.npy"):
            array = load_npy(members, name)
            np.testing.assert_array_equal(np.asarray(row[name], array.dtype).reshape(array.shape), array)
        assert row["json"] == json.loads(members["json"])
        assert row["frames.mjpg"] == members["frames.mjpg"]


@pytest.mark.parametrize("piece", [(0, 1), (3, 4), (5, 17), (0, NUM_SAMPLES), (NUM_SAMPLES - 1, NUM_SAMPLES)])
def test_a_part_of_a_catalog_names_the_same_records(dataset: Path, piece: tuple[int, int]) -> None:
    catalog = read_catalog(dataset)
    part, (start, stop) = views._part(catalog, piece)
    assert stop - start == piece[1] - piece[0]
    for sample in range(*piece):
        shard, record = catalog.locate(sample)
        part_shard, part_record = part.locate(sample - piece[0] + start)
        assert (part.shards[part_shard], part_record) == (catalog.shards[shard], record)
        assert part.num_tokens[sample - piece[0] + start] == catalog.num_tokens[sample]


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore")
def test_the_ray_view_holds_every_record_once(dataset: Path) -> None:
    import ray

    ray.init("local", num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    try:
        view = ray_dataset(dataset)
        rows = view.take_all()
        assert_stored(rows, dataset)
        assert view.columns() == ["key", "source", "tokens", "mel", "frames", "json"]
        lengths = view.map(lambda row: {"key": row["key"], "num_tokens": row["tokens"].shape[1]}).take_all()
        assert {row["key"]: row["num_tokens"] for row in lengths} == {row["key"]: row["tokens"].shape[1] for row in rows}
        assert ray_dataset(dataset, split="val").count() == 3
        assert_stored(ray_dataset(dataset).random_shuffle(seed=1).iter_rows(), dataset)
    finally:
        ray.shutdown()


@pytest.mark.filterwarnings("ignore")
def test_blocks_of_the_ray_view_are_bounded(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    catalog = read_catalog(dataset)
    part, piece = views._part(catalog, (2, 20))
    assert len(part.shards) < len(catalog.shards)
    monkeypatch.setattr(views, "BLOCK_BYTES", 60_000)
    blocks = list(views._blocks(part, piece, cache=None, max_corrupt=0))
    assert len(blocks) > 5
    assert sum(block.num_rows for block in blocks) == 18
    assert [key for block in blocks for key in block["key"].to_pylist()] == list(stored(dataset))[2:20]


@pytest.fixture
def remote(dataset: Path, s3: S3) -> str:
    """The same dataset in a store."""
    for path in dataset.iterdir():
        s3.put(f"views/{path.name}", path.read_bytes())
    return f"{s3.url}/views"


def test_the_hf_view_of_a_remote_dataset_reads_through_the_cache(dataset: Path, remote: str, s3: S3, tmp_path: Path) -> None:
    view = hf_dataset(remote, cache=ShardCache(tmp_path, max_bytes=10 << 20))
    for _ in range(2):
        assert_stored(view, dataset)
    num_shards = len(read_catalog(dataset).shards)
    assert num_shards > 1
    assert len(list(tmp_path.glob("*.tar"))) == num_shards
    assert len(s3.seen("HEAD", ".tar")) == num_shards, "each is fetched once"


@pytest.mark.filterwarnings("ignore")
def test_the_ray_view_of_a_remote_dataset_fetches_the_shards_of_its_task(
    dataset: Path, remote: str, s3: S3, tmp_path: Path
) -> None:
    part, piece = views._part(read_catalog(remote), (2, 20))
    cache = pickle.loads(pickle.dumps(ShardCache(tmp_path, max_bytes=10 << 20)))
    (block,) = views._blocks(part, piece, cache=cache, max_corrupt=0)
    assert block["key"].to_pylist() == list(stored(dataset))[2:20]
    assert {path.name for path in tmp_path.glob("*.tar")} == {f"{shard.sha256}.tar" for shard in part.shards}
