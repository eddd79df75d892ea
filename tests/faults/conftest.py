"""What every fault is tried on: one corpus, its undisturbed build, and the count of its records afterwards."""

import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from omniprep.verify import verify
from tests.faults.builds import Decoders, Run, count, prepare, start
from tests.faults.corpus import Corpus, write_corpus
from tests.faults.report import PROPERTY, row
from tests.prepare_builders import tree


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "fault(name): a fault of the table in docs/faults.md that the test shows")


@dataclass(frozen=True)
class Undisturbed:
    """A corpus, and what comes of it if nothing happens."""

    corpus: Corpus
    out: Path
    files: dict[str, str]


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, samples: Path, ffmpeg: str) -> Undisturbed:
    folder = tmp_path_factory.mktemp("corpus")
    corpus = write_corpus(folder, samples, ffmpeg)
    subprocess.run(prepare(corpus.recipe, folder / "out"), check=True, capture_output=True)
    assert list(verify(folder / "out")) == []
    files = tree(folder / "out")
    assert sum(name.startswith("receipts/") for name in files) == 12 + 2, "12 partitions, the recipe and the lock"
    return Undisturbed(corpus, folder / "out", files)


@pytest.fixture
def decoders(tmp_path: Path) -> Decoders:
    return Decoders(folder=tmp_path / "decoders")


@pytest.fixture
def begin(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """Return a function that starts a command; what is left of its process group at the end is killed."""
    runs: list[Run] = []

    def begin(command: list[str], environment: dict[str, str] | None = None) -> Run:
        runs.append(start(command, tmp_path, environment))
        return runs[-1]

    yield begin
    for run in runs:
        run.end()


@pytest.fixture
def survived(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Return a function that proves a dataset whole and accounts for every record that came in."""
    fault = request.node.get_closest_marker("fault").args[0]
    variant = request.node.callspec.id if hasattr(request.node, "callspec") else ""

    def check(out: object, *, num_rows: int, expected: dict[str, str] | None = None, more: str = "") -> None:
        assert list(verify(str(out))) == []
        if expected is not None:
            assert tree(Path(str(out))) == expected
        num_stored, num_rejected = count(out)
        assert num_rows == num_stored + num_rejected
        text = row(f"{fault} [{variant}]" if variant else fault, num_rows, num_stored, num_rejected) + more
        print(text)
        request.node.user_properties.append((PROPERTY, text))

    return check
