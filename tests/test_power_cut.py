"""What a disk may forget when the power goes: a finished partition never, an unfinished one as a whole."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from omniprep.prepare import prepare, retry
from omniprep.receipts import inputs_name, read_inputs, read_receipt, write_inputs
from omniprep.sources.media_facts import MediaFact
from omniprep.storage.folder import open_folder
from tests.prepare_builders import chat, last_write, recipe, tree, write_media

STEM = "chat-00000"


class Disk:
    """Notes in order what is asked of the file system below a folder: `sync NAME`, `rename NAME`, `remove NAME`."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self._folder = folder
        self.calls: list[str] = []
        self._note(patch, "fsync", lambda descriptor: f"sync {self._name(Path(f'/proc/self/fd/{descriptor}').readlink())}")
        self._note(patch, "replace", lambda old, new: f"rename {self._name(new)}")
        self._note(patch, "unlink", lambda path: f"remove {self._name(path)}" if Path(path).exists() else "")

    def _note(self, patch: pytest.MonkeyPatch, function: str, describe: Callable[..., str]) -> None:
        real: Callable[..., Any] = getattr(os, function)

        def noting(*arguments: Any) -> Any:
            self.calls += filter(None, [describe(*arguments)])
            return real(*arguments)

        patch.setattr(os, function, noting)

    def _name(self, path: str | Path) -> str:
        """Return a path as its name in the folder, without what makes a partial name."""
        name = Path(path).relative_to(self._folder).as_posix()
        return name if not name.endswith(".partial") else name.rsplit(".", 2)[0]

    def during_partition(self) -> list[str]:
        """Return the calls from the first shard's sync on to the renaming of the receipt."""
        done = self.calls.index(f"rename receipts/{STEM}.json")
        start = next(k for k, call in enumerate(self.calls) if call.startswith("sync") and ".tar" in call)
        return self.calls[start : done + 1]


@pytest.fixture
def build(tmp_path: Path) -> Path:
    """Return the folder of a recipe of one partition: two splits, and a record that is rejected."""
    write_media(tmp_path / "data")
    rows = [
        chat(0),
        chat(1, {"type": "image", "image": "i.png"}),
        chat(2, {"type": "image", "image": "none.png"}),
        chat(3, split="val"),
        chat(4),
    ]
    recipe(tmp_path, rows)
    return tmp_path


def run(folder: Path) -> None:
    from omniprep.recipe import load_recipe

    prepare(load_recipe(folder / "recipe.yaml", output=str(folder / "out"), rows_per_partition=5))


def folders_of(name: str) -> list[str]:
    return [parent.as_posix() for parent in Path(name).parents]


def receipt_files(folder: Path) -> list[str]:
    receipt = read_receipt(open_folder(str(folder / "out")), STEM)
    assert receipt is not None
    return list(receipt.files)


def check_order(calls: list[str], named: list[str]) -> None:
    """Check that all that a receipt names is on the disk, bytes and name, when the receipt itself may be."""
    assert calls[-1] == f"rename receipts/{STEM}.json"
    assert calls[-2] == f"sync receipts/{STEM}.json"
    assert len(named) >= 5
    for name in named:
        renamed = calls.index(f"rename {name}")
        assert f"sync {name}" in calls[:renamed], name
        for folder in folders_of(name):
            assert f"sync {folder}" in calls[renamed:], (name, folder)


def test_a_receipt_comes_after_all_that_it_names(build: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(build / "out", patch)
        run(build)
    named = receipt_files(build)
    calls = disk.during_partition()
    check_order(calls, named)
    # Two shards with an index each, the quarantine, its folder and theirs, the receipt.
    syncs = [call for call in calls if call.startswith("sync ")]
    assert len(syncs) == 5 + 2 + 1
    assert f"rename {inputs_name(STEM)}" in calls
    assert f"sync {inputs_name(STEM)}" not in calls


def test_the_manifest_comes_after_the_names_of_the_receipts_and_is_durable(build: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(build / "out", patch)
        run(build)
    after = disk.calls[disk.calls.index(f"rename receipts/{STEM}.json") :]
    assert after[1:] == ["sync .", "sync receipts", "sync manifest.json", "rename manifest.json", "sync ."]


def test_an_old_receipt_is_gone_before_what_it_names_is_written_over(build: Path) -> None:
    run(build)
    (build / "data" / "i.png").unlink()
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(build / "out", patch)
        run(build)
    gone = disk.calls.index(f"remove receipts/{STEM}.json")
    written = next(k for k, call in enumerate(disk.calls) if call.startswith("rename train-"))
    assert "sync receipts" in disk.calls[gone:written]
    check_order(disk.during_partition(), receipt_files(build))


def test_the_list_of_inputs_follows_a_retried_receipt(build: Path) -> None:
    """Were it the other way round, the old receipt could stand beside the new list, and `prepare` would see no change."""
    run(build)
    (build / "data" / "none.png").write_bytes((build / "data" / "i.png").read_bytes())
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(build / "out", patch)
        retry(str(build / "out"))
    calls = disk.calls
    receipt, inputs = calls.index(f"rename receipts/{STEM}.json"), calls.index(f"rename {inputs_name(STEM)}")
    assert "sync receipts" in calls[receipt:inputs]


def facts(count: int) -> list[MediaFact]:
    return [
        MediaFact(location=f"/data/{k:03d}.png", name=f"{k:03d}.png", num_bytes=k, stamp=str(k), sha256=f"{k:064x}")
        for k in range(count)
    ]


def test_a_torn_list_of_inputs_is_not_known(tmp_path: Path) -> None:
    folder = open_folder(str(tmp_path))
    write_inputs(folder, STEM, facts(200))
    path = tmp_path / inputs_name(STEM)
    whole = path.read_bytes()
    assert read_inputs(folder, STEM) == facts(200)
    for num_bytes in {*range(0, len(whole), 41), *range(len(whole) - 12, len(whole))}:
        path.write_bytes(whole[:num_bytes])
        assert read_inputs(folder, STEM) is None, num_bytes


def test_no_input_is_lost_from_a_list_with_blocks_that_never_reached_the_disk(tmp_path: Path) -> None:
    folder = open_folder(str(tmp_path))
    write_inputs(folder, STEM, facts(200))
    path = tmp_path / inputs_name(STEM)
    whole = path.read_bytes()
    for size in (16, 128, 512, 4096):
        for start in range(0, len(whole), max(size // 2, 32)):
            path.write_bytes(whole[:start] + bytes(min(size, len(whole) - start)) + whole[start + size :])
            found = read_inputs(folder, STEM)
            assert found is None or len(found) == 200, (start, size)


@pytest.mark.parametrize("num_bytes", [0, 700])
def test_a_partition_whose_list_of_inputs_is_torn_is_done_again(build: Path, num_bytes: int) -> None:
    run(build)
    before = tree(build / "out")
    path = build / "out" / inputs_name(STEM)
    path.write_bytes(path.read_bytes()[:num_bytes])
    receipt = build / "out" / "receipts" / f"{STEM}.json"
    made = last_write(receipt)
    run(build)
    assert last_write(receipt) != made
    assert tree(build / "out") == before
    assert json.loads(receipt.read_text())["num_rows"] == 5
