"""What every test may ask for: the fetched samples, an ffmpeg, single-threaded libraries, and repeatable hypothesis runs."""

import os
import signal
from pathlib import Path

# Before numpy is imported: threads of a maths library would fight those of the other test worker.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS", "RAYON_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import hypothesis  # noqa: E402
import pytest  # noqa: E402

# A shell that starts the tests in the background has them ignore Ctrl-C, and with them each program whose Ctrl-C they test.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Here and not beside the tests it belongs to: with xdist the process that prints does not load their conftest.py.
from tests.faults.report import pytest_terminal_summary  # noqa: E402, F401

ROOT = Path(__file__).parents[1]

# They are run as a program (`make bench`), with their own folder on the path.
collect_ignore = ["benchmarks"]

# A slow machine must not fail a property (no deadline), and a run must find what the last one found (derandomize).
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=1000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.hookimpl(tryfirst=True)  # before xdist looks at the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the tests that start Ray on one xdist worker: two clusters at once on two cores time out."""
    for item in items:
        if item.get_closest_marker("ray"):
            item.add_marker(pytest.mark.xdist_group("ray"))


@pytest.fixture(scope="session")
def samples() -> Path:
    """Return the folder that `make samples` fills; skip where it was not run."""
    folder = Path(os.environ.get("OMNIPREP_SAMPLES", ROOT / "build" / "samples"))
    if not (folder / "llamafactory" / "data").is_dir():
        pytest.skip(f"no sample media in {folder}: run `make samples`, or set OMNIPREP_SAMPLES to a folder made by it")
    return folder


@pytest.fixture(scope="session")
def ffmpeg() -> str:
    """Return the path of a static ffmpeg, for tests that make their own media."""
    import imageio_ffmpeg

    return str(imageio_ffmpeg.get_ffmpeg_exe())
