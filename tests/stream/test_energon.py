"""The files that Megatron-Energon wants: against the tars themselves, against what Energon writes, and read by Energon.

What needs Energon is skipped where it is not installed: `pip install -e '.[energon]'`.
"""

import hashlib
import importlib.util
import json
import re
import shutil
import sqlite3
import subprocess
import sys
import tarfile
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import yaml

from omniprep.errors import DatasetError
from omniprep.shards.manifest import read_manifest
from omniprep.shards.members import MemberFormat, load_npy
from omniprep.shards.reader import ShardReader
from omniprep.stream import energon
from omniprep.stream.energon import energon_is_current, export_energon
from omniprep.verify import verify
from tests.benchmarks.stream_corpus import write_dataset
from tests.s3_server import S3, s3  # noqa: F401
from tests.shards.builders import media_sample, preference_sample, text_sample

needs_energon = pytest.mark.skipif(
    importlib.util.find_spec("megatron") is None or importlib.util.find_spec("megatron.energon") is None,
    reason="megatron-energon is not installed: pip install -e '.[energon]'",
)
SPLITS = ("train", "train", "val", "held_out")


def write(folder: Path | str, num_samples: int = 13) -> Path | str:
    samples = [
        (media_sample if number % 3 else text_sample)(f"chat-{number:08d}", split=SPLITS[number % 4])
        for number in range(num_samples)
    ]
    write_dataset(folder, samples, max_shard_bytes=60_000)
    return folder


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return Path(write(tmp_path / "out"))


def database(folder: Path) -> tuple[list[tuple], list[tuple]]:
    """Return the samples and the parts, with the names of their shards in place of numbers."""
    names = list(json.loads((folder / ".nv-meta" / ".info.json").read_bytes())["shard_counts"])
    with closing(sqlite3.connect(folder / ".nv-meta" / "index.sqlite")) as connection:
        tables = [connection.execute(f"SELECT * FROM {name}").fetchall() for name in ("samples", "sample_parts")]
    samples, parts = (sorted((names[row[0]], *row[1:]) for row in table) for table in tables)
    return samples, parts


def walk(path: Path) -> list[tuple[str, list[tuple[str, int, int, int]]]]:
    """Return key and members (name, offset of the header, offset and size of the data) of each record of a tar."""
    records: dict[str, list[tuple[str, int, int, int]]] = {}
    with tarfile.open(path) as tar:
        for member in tar:
            key, name = member.name.split(".", 1)
            records.setdefault(key, []).append((name, member.offset, member.offset_data, member.size))
    return list(records.items())


def test_offsets_and_parts_are_those_of_the_tars(dataset: Path) -> None:
    export_energon(dataset)
    samples, parts = database(dataset)
    found_samples, found_parts, num_shards = [], [], 0
    for path in sorted(dataset.glob("*.tar")):
        offsets = np.fromfile(f"{path}.idx", "<u8").tolist()
        records = walk(path)
        assert offsets[:-1] == [members[0][1] for _, members in records]
        assert offsets[-1] == path.stat().st_size - 1024  # two empty blocks end a tar
        for row, (key, members) in enumerate(records):
            found_samples.append((path.name, key, row, offsets[row], offsets[row + 1] - offsets[row]))
            found_parts += [(path.name, row, name, offset, size) for name, _, offset, size in members]
        num_shards += 1
    assert num_shards > 4
    assert samples == sorted(found_samples)
    assert parts == sorted(found_parts)
    assert len(samples) == 13


def test_splits_are_those_of_the_manifest_and_the_ones_that_tools_ask_for(dataset: Path) -> None:
    export_energon(dataset)
    splits = yaml.safe_load((dataset / ".nv-meta" / "split.yaml").read_text())["split_parts"]
    shards = read_manifest(dataset).shards
    assert splits == {name: [s.name for s in shards if s.split == name] for name in ("train", "val", "test", "held_out")}
    assert splits["test"] == []
    assert splits["held_out"]
    counts = json.loads((dataset / ".nv-meta" / ".info.json").read_bytes())["shard_counts"]
    assert counts == {shard.name: shard.totals.num_records for shard in shards}


def test_the_same_dataset_gives_the_same_bytes(dataset: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(dataset, copy)
    for folder in (dataset, copy):
        export_energon(folder)
    for path in dataset.rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (copy / path.relative_to(dataset)).read_bytes(), path


def test_verify_takes_the_files_for_what_they_are(dataset: Path) -> None:
    export_energon(dataset)
    assert list(verify(dataset)) == []


def test_an_export_of_another_state_is_told_and_made_anew(dataset: Path) -> None:
    assert energon_is_current(dataset) is None
    export_energon(dataset)
    assert energon_is_current(dataset)
    mine = dataset / ".nv-meta" / "dataset.yaml"
    mine.write_text(mine.read_text() + "subflavors: {from: me}\n")
    for path in dataset.glob("*.tar"):
        path.unlink()
    write(dataset, 3)
    assert energon_is_current(dataset) is False
    assert "describes an older state" in "".join(map(str, verify(dataset)))
    export_energon(dataset)
    assert energon_is_current(dataset)
    assert {path.name for path in dataset.glob("*.idx")} == {f"{path.name}.idx" for path in dataset.glob("*.tar")}
    assert "from: me" in mine.read_text()
    assert len(database(dataset)[0]) == 3


def test_an_export_that_is_cut_short_is_none_at_all(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export_energon(dataset)

    def no_space(*_: object) -> None:
        raise OSError("no space")

    monkeypatch.setattr(energon, "_copy", no_space)
    with pytest.raises(OSError, match="no space"):
        export_energon(dataset)
    assert not (dataset / ".nv-meta" / ".info.json").exists()
    assert energon_is_current(dataset) is None


def test_a_damaged_index_is_one_clear_line(dataset: Path) -> None:
    shards = read_manifest(dataset).shards
    other = next(shard for shard in shards if shard.totals.num_records != shards[0].totals.num_records)
    shutil.copy(dataset / other.index_name, dataset / shards[0].index_name)
    with pytest.raises(DatasetError, match=re.escape(f"{shards[0].index_name}: expected {shards[0].totals.num_records} records")):
        export_energon(dataset)


def test_two_shards_with_one_key_are_refused(dataset: Path) -> None:
    one, two = [shard for shard in read_manifest(dataset).shards if shard.totals.num_records == 1][:2]
    shutil.copy(dataset / one.index_name, dataset / two.index_name)
    with pytest.raises(DatasetError, match="a key of it stands in another shard too; `omniprep verify"):
        export_energon(dataset)


def test_an_object_store_gets_the_same_files(s3: S3, dataset: Path) -> None:  # noqa: F811
    write(s3.url)
    export_energon(s3.url)
    export_energon(dataset)
    assert energon_is_current(s3.url)
    assert list(verify(s3.url)) == []
    for path in [*dataset.glob("*.idx"), *(dataset / ".nv-meta").iterdir()]:
        assert s3.get(path.relative_to(dataset).as_posix()) == path.read_bytes()


@needs_energon
@pytest.mark.filterwarnings("ignore")
def test_energon_writes_the_same(dataset: Path, tmp_path: Path) -> None:
    from megatron.energon.epathlib import EPath
    from megatron.energon.flavors import BaseWebdatasetFactory
    from megatron.energon.tools.lint import check_index

    export_energon(dataset)
    theirs = tmp_path / "theirs"
    shutil.copytree(dataset, theirs, ignore=shutil.ignore_patterns(".nv-meta", "*.idx"))
    shards = [shard.name for shard in read_manifest(dataset).shards]
    splits = [(name, f"{name}-.*") for name in ("train", "val", "test", "held_out")]
    BaseWebdatasetFactory.prepare_dataset(theirs, shards, split_parts_ratio=None, split_parts_patterns=splits, workers=1)
    assert database(dataset) == database(theirs)
    for name in shards:
        assert (dataset / f"{name}.idx").read_bytes() == (theirs / f"{name}.idx").read_bytes()
    counts = [json.loads((folder / ".nv-meta" / ".info.json").read_bytes())["shard_counts"] for folder in (dataset, theirs)]
    assert counts[0] == counts[1]
    assert check_index(EPath(dataset))


@needs_energon
@pytest.mark.parametrize("num_workers", [0, 2])
def test_energon_reads_every_record_of_a_split_once(dataset: Path, num_workers: int) -> None:
    export_energon(dataset)
    expected = {}
    for shard in read_manifest(dataset).shards:
        if shard.split == "train":
            with ShardReader(dataset, shard.name) as reader:
                expected |= {row["key"]: reader.read_members(at) for at, row in enumerate(reader.rows)}
    command = [sys.executable, str(Path(__file__).with_name("read_energon.py")), str(dataset), "train", str(num_workers)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert sorted(sample["key"] for sample in found) == sorted(expected)
    assert len(found) == 7
    for sample in found:
        members = expected[sample["key"]]
        tokens, mel = load_npy(members, "tokens.npy"), load_npy(members, "mel.npy")
        assert sample["tokens"] == ["int32", tokens.tolist()]
        assert sample["mel"] == ["float16", [128, mel.shape[1]], hashlib.sha256(mel.tobytes()).hexdigest()]
        assert sample["frames"] == hashlib.sha256(members["frames.mjpg"]).hexdigest()
        assert sample["facts"] == json.loads(members["json"])


def test_a_dataset_of_preferences_names_its_own_members(tmp_path: Path) -> None:
    write_dataset(tmp_path, [preference_sample()], form=MemberFormat(kind="preference"))
    export_energon(tmp_path)
    _, parts = database(tmp_path)
    assert [part[2] for part in parts] == ["chosen.npy", "frames.mjpg", "json", "mel.npy", "rejected.npy"]
