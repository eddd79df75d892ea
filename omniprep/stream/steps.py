"""Steps: which bins are trained on together, and which rank takes which of them.

All ranks wait for the slowest, so bins of similar cost go into one step; and inside a step the costliest bin goes to the rank
that has least so far. The order of bins and steps knows nothing of ranks: it stays what it is when their number changes.
"""

import heapq
from collections.abc import Sequence

import numpy as np

from omniprep.rng import rng_for
from omniprep.stream.order import MAX_WINDOW, shuffled_in_windows
from omniprep.types import Int64Array

# Multiplications in a forward pass, those of one token with the weights of the 7B Thinker being 1: 28 layers of width 3584 and
# the head have 7.07 billion weights, either encoder 0.63 billion. A trainer that freezes a part, or trains another size, has
# other costs, but bins that are equal by these are nearly so by its own.
_WEIGHTS = 7.07e9
COST_OF_TOKEN = 1.0
COST_OF_SQUARE = 28 * 3584 / _WEIGHTS
"""Of a document's length squared: half of all pairs attend to each other, a multiplication each for the score and the value."""
COST_OF_MEL_FRAME = 0.63e9 / 2 / _WEIGHTS
"""Two frames are one position of the audio encoder."""
COST_OF_PATCH = 0.63e9 / _WEIGHTS

_STEPS_SORTED = 32
_MIN_BINS_SORTED = 128


def step_order(costs: Int64Array, *, size: int, key: str, seed: int) -> Int64Array:
    """Return (B,) the bins in an order in which every `size` neighbours, a step, cost much the same.

    Bins are drawn from stretches of 32 steps: sorted by cost, cut into steps, the steps shuffled. What is left over at the
    end, fewer than `size` bins, is drawn first, so that it is like the rest.
    """
    bits = rng_for(key, seed=seed, stage="steps").bit_generator
    stretch = min(size * max(_STEPS_SORTED, -(-_MIN_BINS_SORTED // size)), MAX_WINDOW // size * size)
    order = shuffled_in_windows(bits.random_raw(len(costs)), window=stretch)
    num_steps = len(costs) // size
    full, rest = order[: num_steps * size], order[num_steps * size :]
    full = full[np.lexsort((costs[full], np.arange(len(full)) // stretch))]
    steps = shuffled_in_windows(bits.random_raw(num_steps), window=stretch // size)
    return np.concatenate([full.reshape(num_steps, size)[steps].reshape(-1), rest])


def share_out(costs: Sequence[int], *, num_ranks: int) -> list[list[int]]:
    """Return, by rank, the places of the bins that it takes: the same number each, of nearly the same cost.

    The costliest first, each to the rank with the least so far that still takes one.

    >>> share_out([1, 5, 4, 2], num_ranks=2)
    [[0, 1], [2, 3]]
    """
    each = len(costs) // num_ranks
    taken: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [(0, rank) for rank in range(num_ranks)]
    for place in sorted(range(len(costs)), key=lambda place: -costs[place]):
        load, rank = heapq.heappop(loads)
        taken[rank].append(place)
        if len(taken[rank]) < each:
            heapq.heappush(loads, (load + costs[place], rank))
    return [sorted(places) for places in taken]
