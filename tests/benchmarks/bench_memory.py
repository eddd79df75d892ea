"""Peak memory of a worker on long media: a whole record, from the row to the shard, above an empty worker.

An empty worker is a process that has imported the same modules and stored one record of 6 s of the same kind with the same
settings. Every figure is that of a fresh process: the kernel's peak of its resident memory (`VmHWM`) less what was
resident before the record (`VmRSS`). (`getrusage` would not do: a child inherits its parent's peak.)

The files are 1080p film with sound, one minute and one hour. Frames are the default choice: 120 of the minute and, by the
model's limit, 768 of the hour; sound is cut to the model's 300 s.
"""

import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import corpus
from ratios import Peak

from omniprep.run.ray import WORKER_ENVIRONMENT

LIMIT_MB = 600.0
MINUTES = (1, 60)

Sound = Literal["sound", "silent"]


def _resident_mb(field: Literal["VmRSS", "VmHWM"]) -> float:
    """Return a field of this process's memory in MB, as Linux counts it."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    kibibytes = next(int(line.split()[1]) for line in lines if line.startswith(field))
    return kibibytes * 1024 / 1e6


def _record(path: Path, sound: str) -> corpus.Record:
    video = {"type": "video", "video": str(path), "audio_in_video": "on" if sound == "sound" else "off"}
    return corpus.record("What happens?", "A scene of an animated film.", video)


def peak_mb(path: Path, resize: Literal["fast", "exact"], sound: Sound) -> float:
    """Return the peak of this process's memory while it stores one video, above what it had before."""
    from bench_pipeline import Ours

    short = Path(corpus.film((360,))[0]["messages"][1]["content"][0]["video"])
    with tempfile.TemporaryDirectory() as folder:
        worker = Ours(folder, resize, audio={"on_too_long": "truncate"})
        worker([_record(short, sound)])
        before = _resident_mb("VmRSS")
        worker([_record(path, sound)])
        worker.close()
    return _resident_mb("VmHWM") - before


def run() -> list[Peak]:
    """Return the peaks of both resize modes, with sound and without."""
    files = [corpus.long_film(minutes) for minutes in MINUTES]
    modes = [("fast", "sound"), ("fast", "silent"), ("exact", "sound")]
    jobs = [(path, *mode) for mode in modes for path in files]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:  # memory does not mind the company, as times would
        peaks = list(pool.map(_in_a_fresh_process, jobs))
    return [
        Peak(
            name=f"1080p film with sound, {resize} resize" if sound == "sound" else f"1080p film, {resize} resize, sound off",
            short_mb=short_mb,
            long_mb=long_mb,
            limit_mb=LIMIT_MB,
        )
        for (resize, sound), short_mb, long_mb in zip(modes, peaks[::2], peaks[1::2], strict=True)
    ]


def _in_a_fresh_process(job: tuple[Path, str, str]) -> float:
    """Run `peak_mb` in a process with the environment of OmniPrep's workers: one thread."""
    command = [sys.executable, __file__, *map(str, job)]
    environment = os.environ | WORKER_ENVIRONMENT
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return float(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    print(peak_mb(Path(sys.argv[1]), sys.argv[2], sys.argv[3]))  # type: ignore[arg-type]
