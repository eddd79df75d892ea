"""The catalog states what a dataset's samples are, and notices when an index is not the shard's."""

import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from omniprep.errors import ConfigError, DatasetError
from omniprep.prepare import prepare
from omniprep.shards.reader import iter_samples
from omniprep.stream.catalog import Catalog, read_catalog
from tests.prepare_builders import chat, recipe, write_media

ROWS = [chat(0), chat(1, {"audio": "a.wav"}), *[chat(number) for number in range(2, 6)], chat(6, {"image": "i.png"})]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("catalog")
    write_media(folder / "data")
    rows = [*ROWS, {**chat(7), "split": "val"}, chat(8)]
    prepare(recipe(folder, rows))
    return folder / "out"


def rewrite_index(folder: Path, change) -> None:
    path = sorted(folder.glob("train-*.parquet"))[0]
    table = pq.read_table(path)
    pq.write_table(change(table), path)


def replaced(table: pa.Table, name: str, values: object) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, values)


@pytest.fixture
def damaged(dataset: Path, tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(dataset, tmp_path / "out"))


def test_its_columns_are_what_the_samples_are(dataset: Path) -> None:
    catalog = read_catalog(dataset)
    samples = list(iter_samples(dataset, split="train"))
    assert len(catalog) == len(samples) == 8
    assert len(catalog.shards) == 3, "the rows of three partitions"
    assert catalog.num_tokens.tolist() == [sample.num_tokens for sample in samples]
    assert catalog.longest is catalog.num_tokens
    assert catalog.num_mel_frames.tolist() == [sum(item.num_mel_frames for item in sample.audio) for sample in samples]
    patches = [sum(int(np.prod(item.grid_thw)) for item in sample.vision) for sample in samples]
    assert catalog.num_patches.tolist() == patches
    assert (max(patches), catalog.num_mel_frames.max()) > (0, 0), "there are media in them"


def test_a_sample_is_found_in_its_shard(dataset: Path) -> None:
    catalog = read_catalog(dataset)
    keys = [sample.key for sample in iter_samples(dataset, split="train")]
    assert [catalog.key_of(number) for number in range(len(catalog))] == keys
    places = [catalog.locate(number) for number in range(len(catalog))]
    assert [shard for shard, _ in places] == sorted(shard for shard, _ in places)
    assert [record for _, record in places][:5] == [0, 1, 2, 3, 0]
    assert catalog.describe(4) == f"{dataset}: {catalog.shards[1].name}, record 0"
    for outside in (-1, 8):
        with pytest.raises(IndexError, match="there are 8"):
            catalog.locate(outside)


def test_preferences_count_both_sequences_and_their_media_twice(tmp_path: Path) -> None:
    write_media(tmp_path / "data")
    prompt = [{"role": "user", "content": [{"type": "text", "text": "Hi"}, {"image": "i.png"}, {"audio": "a.wav"}]}]
    rows = [{"prompt": prompt, "chosen": "Hello", "rejected": "No, and this is why: " * 4}]
    prepare(recipe(tmp_path, rows, kind="preference"))
    catalog = read_catalog(tmp_path / "out")
    (sample,) = iter_samples(tmp_path / "out")
    lengths = [layout.num_tokens for layout in sample.layouts.values()]
    assert catalog.kind == "preference"
    assert catalog.num_tokens.tolist() == [sum(lengths)]
    assert catalog.longest.tolist() == [max(lengths)]
    assert lengths[0] != lengths[1]
    assert catalog.num_mel_frames.tolist() == [2 * sample.audio[0].num_mel_frames]
    assert catalog.num_patches.tolist() == [2 * int(np.prod(sample.vision[0].grid_thw))]


def test_a_split_that_is_not_there_is_named_with_those_that_are(dataset: Path) -> None:
    assert len(read_catalog(dataset, split="val")) == 1
    with pytest.raises(ConfigError, match=r"no samples in split 'test'; it has 'train', 'val'"):
        read_catalog(dataset, split="test")


def test_its_digest_is_that_of_what_is_in_the_dataset_wherever_it_lies(dataset: Path, damaged: Path) -> None:
    assert read_catalog(damaged).digest == read_catalog(dataset).digest
    assert read_catalog(damaged, split="val").digest != read_catalog(dataset).digest
    longer = pa.array([9] * 4, pa.int32())
    rewrite_index(damaged, lambda table: replaced(table, "num_tokens", longer))
    assert read_catalog(damaged).digest != read_catalog(dataset).digest, "an index that was changed shows"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table.slice(1), "expected 4 rows as the manifest says, got 3"),
        (lambda table: replaced(table, "num_tokens", pa.array([1, 2, 3, 4], pa.int64())), "num_tokens holds other values"),
        (lambda table: replaced(table, "num_patches", pa.array([1, None, 3, 4], pa.int32())), "num_patches holds other values"),
        (lambda table: replaced(table, "num_mel_frames", pa.array([0, 0, -3, 0], pa.int32())), "a length is negative"),
        (lambda table: replaced(table, "num_tokens", pa.array([1, 0, 3, 4], pa.int32())), "a sample has no tokens"),
    ],
)
def test_a_damaged_index_is_noticed(damaged: Path, change, message: str) -> None:
    rewrite_index(damaged, change)
    with pytest.raises(DatasetError, match=message):
        read_catalog(damaged)


def test_it_can_be_sent_to_a_worker(dataset: Path) -> None:
    catalog = read_catalog(dataset)
    copy: Catalog = pickle.loads(pickle.dumps(catalog))
    assert copy.digest == catalog.digest
    assert copy.num_tokens.tolist() == catalog.num_tokens.tolist()
