"""What the fault tests look with sees what it must: files that are half written, and files that are not what they become."""

from pathlib import Path

import pytest

from tests.faults.builds import Watch, wait_until, watching
from tests.prepare_builders import tree


def wait_for_looks(watch: Watch, number: int) -> None:
    first = watch.num_looks + 1  # the look under way may have passed already
    wait_until(lambda: watch.num_looks > first + number)


@pytest.mark.parametrize("half", [b'{"a": ', b'{"a": 1}'], ids=["does not read", "reads, but is not the end"])
def test_a_file_that_is_half_written_is_seen(tmp_path: Path, half: bytes) -> None:
    with watching(tmp_path) as watch:
        (tmp_path / "manifest.json").write_bytes(half)
        wait_for_looks(watch, 5)
        (tmp_path / "manifest.json").write_bytes(b'{"a": 1, "b": 2}')
        wait_for_looks(watch, 1)
    with pytest.raises(AssertionError):
        watch.check(tree(tmp_path))


def test_a_file_that_is_whole_at_once_is_fine(tmp_path: Path) -> None:
    with watching(tmp_path) as watch:
        (tmp_path / "new").write_bytes(b"{}")
        (tmp_path / "new").rename(tmp_path / "manifest.json")
        wait_for_looks(watch, 5)
    watch.check(tree(tmp_path))
