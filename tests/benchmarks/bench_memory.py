"""Peak memory of a worker on long media: a whole record, above a worker that has its encoder and did one short record.

The hour of 1080p is ten seconds repeated; its sound is cut to the model's 300 s. Frames are the default choice (768).
"""

import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import corpus
from bench_vision import make_hour
from ratios import Ratio

MINUTES = (10, 60)
TARGET_MB = 600.0


def peak_mb(path: Path) -> float:
    """Return how far the peak of this process rises over what an empty worker has, in MB."""
    from bench_pipeline import Ours

    from omniprep.encode.thinker import EncodeConfig, ThinkerEncoder

    with tempfile.TemporaryDirectory() as folder:
        worker = Ours(folder)
        worker(corpus.film((360,)))  # loads the decoders
        worker.encoder = ThinkerEncoder(EncodeConfig.model_validate({"audio": {"on_too_long": "truncate"}}))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        worker([corpus.record("What happens?", "Much.", {"type": "video", "video": str(path)})])
        worker.close()
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def run() -> list[Ratio]:
    """Return the peak of an hour, and how much it is above that of ten minutes."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        hour = make_hour(folder)
        import imageio_ffmpeg

        part = folder / "part.mp4"
        cut = [
            imageio_ffmpeg.get_ffmpeg_exe(),
            "-v",
            "error",
            "-i",
            str(hour),
            "-t",
            str(60 * MINUTES[0]),
            "-c",
            "copy",
            str(part),
        ]
        subprocess.run(cut, check=True)
        short, long = (_in_a_process(path) for path in (part, hour))
    return [
        _line("peak MB of an hour of 1080p above an empty worker", long, 0.0, long, TARGET_MB),
        _line("peak MB of an hour of 1080p vs of 10 minutes", long, short, long / short, 1.2),
    ]


def _line(name: str, ours: float, other: float, ratio: float, target: float) -> Ratio:
    return Ratio(name=name, ours_ms=ours, other_ms=other, ratio=ratio, target=target, at_least=False)


def _in_a_process(path: Path) -> float:
    done = subprocess.run([sys.executable, __file__, str(path)], check=True, capture_output=True, text=True)
    return float(json.loads(done.stdout.splitlines()[-1]))


if __name__ == "__main__":
    print(json.dumps(peak_mb(Path(sys.argv[1]))))
