"""Memory of a trainer that streams: whole batches of 8,192 tokens, pictures decoded, epoch after epoch.

The highest resident memory of each of twelve epochs of 600 samples of 340 KB, in a process of its own, above what it had
before the first batch. Two figures are told, that of the first four epochs and that of the others, which must not be above
it by more than one batch and its buffer take.
"""

import json
import subprocess
import sys
from pathlib import Path

import stream_corpus
from ratios import Peak

NUM_SAMPLES = 600
NUM_EPOCHS = 12
BATCH_MB = 60.0
"""The largest batches here: 8 frames are 45 MB as patch rows. How many are made ahead when one is taken is chance."""


def run() -> list[Peak]:
    """Return the memory of the first epochs and of the later ones."""
    folder = stream_corpus.dataset(NUM_SAMPLES)
    ended = subprocess.run([sys.executable, __file__, str(folder)], capture_output=True, text=True, check=True)
    epochs: list[float] = json.loads(ended.stdout)
    first, later = max(epochs[:4]), max(epochs[4:])
    print(f"peak of each epoch, MB above the start: {', '.join(f'{value:.0f}' for value in epochs)}")
    return [Peak(name="stream: 4 epochs, the next 8", short_mb=first, long_mb=later, limit_mb=first + BATCH_MB)]


def read(folder: str) -> list[float]:
    """Return the highest memory of this process in each epoch, above that before the first, in MB."""
    from omniprep.stream.dataset import StreamingDataset
    from omniprep.stream.plan import PlanConfig

    dataset = StreamingDataset(folder, PlanConfig(global_batch_size=4))
    assert len(dataset) > 0
    before = _resident_mb()
    found = []
    for _ in range(NUM_EPOCHS):
        seen = [(len(batch["keys"]), _resident_mb()) for batch in dataset]
        assert sum(num_documents for num_documents, _ in seen) == NUM_SAMPLES
        found.append(max(resident_mb for _, resident_mb in seen) - before)
    return found


def _resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * 4096 / 1e6


if __name__ == "__main__":
    print(json.dumps(read(sys.argv[1])))
