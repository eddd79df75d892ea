"""How many rows a partition gets when the recipe leaves it to us: `rows_per_partition: auto`.

A partition should take about a minute (less, and starting it shows; more, and a lost worker loses much) and store about
256 MB (a shard that streams well). The number decides which records share a shard, and so the dataset's bytes: it is a
function of the records alone. What they cost is therefore a fixed table, not a measurement, and neither the machine nor
the number of workers has a say. Results are steps (1, 2, 5, 10, 20, ...), so that a few more records do not change them.
"""

import math
from collections.abc import Sequence

from omniprep.encode.estimate import Estimate

TARGET_S = 60.0
TARGET_BYTES = 256_000_000
MAX_ROWS = 100_000
NUM_PARTITIONS_WANTED = 20
"""Small datasets are cut into about so many, as long as each is still worth it, so that there is work for several workers."""
WORTH_S = 2.0

SECONDS_PER_ROW = 1e-4
SECONDS_PER_TOKEN = 1.3e-6
SECONDS_PER_MEL_FRAME = 5.2e-6
SECONDS_PER_PATCH = 6e-6
SECONDS_PER_VIDEO_S = 0.02
"""Of one core of a recent server, measured with the records of the benchmarks, whole records with the fast resize:
dialogues, speech clips, photos, and 360p and 720p film with sound. Rough by design: twice too much or too little is one step."""

Costs = Estimate


def seconds_of(estimate: Costs) -> float:
    """Return about how long a core works on a record.

    >>> round(seconds_of(Costs(num_tokens=1000)), 4)
    0.0014
    """
    return (
        SECONDS_PER_ROW
        + SECONDS_PER_TOKEN * estimate.num_tokens
        + SECONDS_PER_MEL_FRAME * estimate.num_mel_frames
        + SECONDS_PER_PATCH * estimate.num_patches
        + SECONDS_PER_VIDEO_S * estimate.video_s
    )


def choose_rows_per_partition(estimates: Sequence[Costs], *, num_rows: int) -> int:
    """Return how many rows a partition gets, given what some of the rows cost and how many there are.

    `estimates` are of a sample of the rows that represents them all; without any, rows count as text of 1000 tokens.
    """
    probed = estimates or [Costs(num_tokens=1000, stored_bytes=20_000)]
    row_s = math.fsum(seconds_of(estimate) for estimate in probed) / len(probed)
    row_bytes = max(1.0, sum(estimate.stored_bytes for estimate in probed) / len(probed))
    largest = min(TARGET_S / row_s, TARGET_BYTES / row_bytes)
    enough = max(WORTH_S / row_s, num_rows / NUM_PARTITIONS_WANTED)
    return step_below(min(largest, enough, MAX_ROWS))


def step_below(rows: float) -> int:
    """Return the largest of 1, 2, 5, 10, 20, 50, ... that is not above `rows`; at least 1.

    >>> [step_below(rows) for rows in (0.3, 1, 4.9, 5, 99, 100_000)]
    [1, 1, 2, 5, 50, 100000]
    """
    step = 1
    while True:
        for factor in (1, 2, 5):
            if factor * step > rows:
                return _before(factor, step)
        step *= 10


def _before(factor: int, step: int) -> int:
    return {1: step // 2, 2: step, 5: 2 * step}[factor] or 1
