"""Two-second chunks: the order of a video's and its sound track's tokens.

Each stream is a list of ticks (temporal ids from the block's start), never decreasing, one per token. `interleave` is
the rule of `rope_mode: aligned`; `reference_chunk_edges` is the reference's own loop
(`Qwen2_5OmniProcessor.get_chunked_index`), which closes at most one chunk per token.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

Ticks = npt.NDArray[np.int64] | npt.NDArray[np.float64]


def interleave(streams: Sequence[Ticks], *, ticks_per_chunk: int) -> list[tuple[int, int, int]]:
    """Return (stream, first token, end token) in chunk order; within a chunk the streams come as given.

    Chunk k holds the tokens whose tick lies in [k, k + 1) * ticks_per_chunk.

    >>> interleave([np.array([0, 0, 50, 50]), np.arange(60)], ticks_per_chunk=50)
    [(0, 0, 2), (1, 0, 50), (0, 2, 4), (1, 50, 60)]
    """
    num_chunks = 1 + max((int(ticks[-1]) // ticks_per_chunk for ticks in streams if len(ticks)), default=0)
    borders = np.arange(num_chunks + 1) * ticks_per_chunk
    edges = [np.searchsorted(ticks, borders).tolist() for ticks in streams]
    return list(_merge(edges))


def reference_interleave(streams: Sequence[Ticks], *, ticks_per_chunk: int) -> list[tuple[int, int, int]]:
    """Return the same for the reference's chunks; empty chunks are kept out.

    >>> reference_interleave([np.array([0, 0, 100, 100]), np.arange(60)], ticks_per_chunk=50)
    [(0, 0, 2), (1, 0, 50), (0, 2, 3), (1, 50, 60), (0, 3, 4)]
    """
    return list(_merge([reference_chunk_edges(ticks, ticks_per_chunk=ticks_per_chunk) for ticks in streams]))


def reference_chunk_edges(ticks: Ticks, *, ticks_per_chunk: int) -> list[int]:
    """Return the edges of the reference's chunks: 0, then one cut per chunk, then the number of tokens.

    The loop compares each token with the end of the current chunk and then moves on to the next token, so cut k lies at
    the first tick of chunk k, or one token after cut k - 1 where that comes later.
    """
    if len(ticks) == 0:
        return [0, 0]
    chunks = np.arange(1, int(ticks[-1] // ticks_per_chunk) + 1)
    first = np.searchsorted(ticks, chunks * ticks_per_chunk)
    cuts = chunks + np.maximum.accumulate(first - chunks) if len(chunks) else first
    return [0, *cuts[cuts < len(ticks)].tolist(), len(ticks)]


def _merge(edges: Sequence[Sequence[int]]) -> Iterator[tuple[int, int, int]]:
    for chunk in range(max(len(cuts) for cuts in edges) - 1):
        for stream, cuts in enumerate(edges):
            if chunk + 1 < len(cuts) and cuts[chunk] < cuts[chunk + 1]:
                yield stream, cuts[chunk], cuts[chunk + 1]
