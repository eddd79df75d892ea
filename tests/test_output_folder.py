"""The folder of a dataset: what is not OmniPrep's is neither deleted nor written into."""

from pathlib import Path

import pytest

from omniprep.errors import ConfigError, DatasetError
from omniprep.prepare import prepare
from omniprep.shards.manifest import read_manifest
from tests.prepare_builders import chat, recipe

ROWS = [chat(number) for number in range(6)]


@pytest.mark.parametrize("mode", ["continue", "overwrite"])
def test_a_folder_with_receipts_of_its_own_is_somebody_elses(tmp_path: Path, mode: str) -> None:
    (tmp_path / "out" / "receipts").mkdir(parents=True)
    files = [tmp_path / "out" / "holiday.tar", tmp_path / "out" / "receipts" / "hotel.json"]
    for file in files:
        file.write_text("mine")
    with pytest.raises(ConfigError, match="holds files that OmniPrep did not write"):
        prepare(recipe(tmp_path, ROWS), mode=mode)
    assert [file.read_text() for file in files] == ["mine", "mine"]


def test_a_build_killed_before_its_first_file_goes_on(tmp_path: Path) -> None:
    (tmp_path / "out" / "receipts").mkdir(parents=True)
    assert prepare(recipe(tmp_path, ROWS)).num_rows == 6


def test_files_beside_the_shards_survive_every_build(tmp_path: Path) -> None:
    prepare(recipe(tmp_path, ROWS))
    files = [tmp_path / "out" / name for name in ("notes.parquet", "backup-20260101.tar", "eval-7.tar")]
    for file in files:
        file.write_text("mine")
    prepare(recipe(tmp_path, ROWS[:2]))
    assert sorted(path.name for path in (tmp_path / "out").glob("train*.tar")) == ["train-chat-00000.tar"]
    prepare(recipe(tmp_path, ROWS[:2], seed=1), mode="overwrite")
    assert [file.read_text() for file in files] == ["mine"] * 3


def test_an_output_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"output .*file/out: cannot be made or written: Not a directory"):
        prepare(recipe(tmp_path, ROWS, output=str(tmp_path / "file" / "out")))


def test_a_file_is_no_dataset(tmp_path: Path) -> None:
    prepare(recipe(tmp_path, ROWS))
    with pytest.raises(DatasetError, match="expected the folder of a dataset, got a file"):
        read_manifest(tmp_path / "out" / "manifest.json")


def test_the_hint_about_relative_paths_is_given_for_relative_paths_only(tmp_path: Path) -> None:
    source = {"name": "a", "kind": "jsonl", "path": "none-*.jsonl"}
    with pytest.raises(ConfigError, match=r"no file matches '/.*none-\*.jsonl'; check the path$"):
        prepare(recipe(tmp_path, ROWS, sources=[source]))
