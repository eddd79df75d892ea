"""What the fault tests look with sees what it must: files that are half written, and files that are not what they become."""

import time
from pathlib import Path

import pytest

from tests.faults.builds import watching
from tests.prepare_builders import tree


@pytest.mark.parametrize("half", [b'{"a": ', b'{"a": 1}'], ids=["does not read", "reads, but is not the end"])
def test_a_file_that_is_half_written_is_seen(tmp_path: Path, half: bytes) -> None:
    with watching(tmp_path) as watch:
        (tmp_path / "manifest.json").write_bytes(half)
        time.sleep(0.3)
        (tmp_path / "manifest.json").write_bytes(b'{"a": 1, "b": 2}')
        time.sleep(0.1)
    with pytest.raises(AssertionError):
        watch.check(tree(tmp_path))


def test_a_file_that_is_whole_at_once_is_fine(tmp_path: Path) -> None:
    with watching(tmp_path) as watch:
        (tmp_path / "new").write_bytes(b"{}")
        (tmp_path / "new").rename(tmp_path / "manifest.json")
        time.sleep(0.3)
    watch.check(tree(tmp_path))
