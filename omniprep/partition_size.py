"""How many rows make a good partition: enough to be worth a task, few enough to lose little when it is killed.

The answer shows in the dataset's bytes, so it depends on the rows alone: costs are a fixed table, not measured here and
now, and the result moves in steps of 1, 2 and 5, so that one record more does not change it.
"""

from collections.abc import Sequence

from omniprep.encode.estimate import Estimate

TARGET_S = 60.0
"""Work that is lost at most when a worker is killed."""
TARGET_BYTES = 256 << 20
"""A shard that object stores and readers like."""
MAX_ROWS = 100_000

# Seconds on one core of a server of 2024, from `make bench`: close enough to tell film from text.
_S_PER_RECORD = 2e-4
_S_PER_TOKEN = 2e-6
_S_PER_MEL_FRAME = 4e-6
_S_PER_PATCH = 6e-6
_S_PER_VIDEO_S = 0.03
"""For the frames that are decoded and not kept."""


def choose_rows_per_partition(estimates: Sequence[Estimate], *, num_rows: int) -> int:
    """Return rows per partition from what a few of `num_rows` rows will cost.

    >>> choose_rows_per_partition([Estimate(num_tokens=500, stored_bytes=10_000)], num_rows=1_000_000)
    20000
    >>> choose_rows_per_partition([Estimate(num_tokens=20_000, num_patches=80_000, video_s=60.0)], num_rows=1000)
    20
    """
    if not estimates:
        return min(max(num_rows, 1), 1000)
    seconds = sum(map(work_s, estimates)) / len(estimates)
    stored = sum(estimate.stored_bytes for estimate in estimates) / len(estimates)
    return round_down(min(TARGET_S / seconds, TARGET_BYTES / max(stored, 1.0), MAX_ROWS))


def work_s(estimate: Estimate) -> float:
    """Return about how long a record takes on one core."""
    return (
        _S_PER_RECORD
        + _S_PER_TOKEN * estimate.num_tokens
        + _S_PER_MEL_FRAME * estimate.num_mel_frames
        + _S_PER_PATCH * estimate.num_patches
        + _S_PER_VIDEO_S * estimate.video_s
    )


def round_down(rows: float) -> int:
    """Return the largest of 1, 2, 5, 10, 20, 50, ... that is not above `rows`, at least 1.

    >>> [round_down(rows) for rows in (0.3, 1.9, 7, 49, 1999)]
    [1, 1, 5, 20, 1000]
    """
    best = step = 1
    while step <= rows:
        best = max(factor * step for factor in (1, 2, 5) if factor * step <= rows)
        step *= 10
    return best
