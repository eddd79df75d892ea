"""Bins: which samples share one packed row, or one padded batch, under caps on tokens, mel frames and patches.

Samples are packed inside windows of consecutive ones, so that a plan stays close to the blended order. First-fit decreasing,
the longest sample of a window first into the first bin that has room, leaves about one bin of a window partly empty: with
128 bins a window, over 99 % of the room is used. All windows are packed at once: a step of the loop places the k-th longest
sample of every window, in a table (windows, bins) of the room that is left.

S is the number of samples, D of the things that are limited (tokens, then perhaps mel frames and patches), W of windows.
"""

from typing import NamedTuple

import numpy as np

from omniprep.types import Float64Array, Int32Array, Int64Array

_BINS_A_WINDOW = 128
_PLACE_BITS = 15
_MAX_WINDOW = 1 << _PLACE_BITS
"""Samples in a window, at most: each is a step of the loop."""
_SCORE_BITS = 40


class Bins(NamedTuple):
    """Samples by bin."""

    order: Int64Array
    """(S,) the samples, bin after bin; inside a bin they keep the order they came in."""
    starts: Int64Array
    """(B + 1,) where each of the B bins starts in `order`; the last is S."""


def one_each(num_samples: int) -> Bins:
    """Return bins of one sample."""
    return Bins(np.arange(num_samples), np.arange(num_samples + 1))


def pack(needs: Int32Array, room: Int32Array) -> Bins:
    """Return bins whose samples together take no more than `room`, (D,): first-fit decreasing.

    `needs` is (D, S), what each sample takes, none more than `room`.
    """
    table = _by_window(needs, room)
    _, num_windows, size = table.shape
    ranks = _descending((table / room[:, None, None]).max(0))
    rows = np.arange(num_windows)
    empty = np.repeat(room[:, None, None], num_windows, axis=1)
    left = empty.copy()
    bins = np.empty((num_windows, size), np.int64)
    for places in ranks.T:
        need = table[:, rows, places]
        chosen = _first_with_room(left, need)
        left[:, rows, chosen] -= need
        bins[rows, places] = chosen
        if chosen.max() == left.shape[2] - 1:  # keep one empty bin more than the window with most bins has opened
            left = np.concatenate([left, empty], axis=2)
    return _bins(bins, num_samples=needs.shape[1])


def bucket(needs: Int32Array, room: Int32Array) -> Bins:
    """Return bins of samples of similar length, for padded batches: each counts as many tokens as the longest of its bin.

    `needs` and `room` are as in `pack`, tokens first. A window's samples are sorted by tokens and cut where a bin is full.
    """
    table = _by_window(needs, room)
    num_limits, num_windows, size = table.shape
    ranks = _descending(table[0] / room[0])
    rows = np.arange(num_windows)
    longest, count = np.zeros((2, num_windows), np.int64)
    used = np.zeros((num_limits, num_windows), np.int64)
    current = np.zeros(num_windows, np.int64)
    bins = np.empty((num_windows, size), np.int64)
    for places in ranks.T:
        need = table[:, rows, places]
        fits = (used[1:] + need[1:] <= room[1:, None]).all(0) & ((count + 1) * longest <= room[0])
        current += ~fits
        # The first of a bin is its longest, for they come in descending order.
        longest = np.where(fits & (count > 0), longest, need[0])
        count = np.where(fits, count + 1, 1)
        used = np.where(fits, used + need, need)
        bins[rows, places] = current
    return _bins(bins, num_samples=needs.shape[1])


def _by_window(needs: Int32Array, room: Int32Array) -> Int32Array:
    """Return `needs` as (D, W, samples of a window): about as many as fill 128 bins; zeros fill the last windows up."""
    num_limits, num_samples = needs.shape
    num_bins = float((needs.sum(1, dtype=np.int64) / room).max())
    num_windows = max(1, round(num_bins / _BINS_A_WINDOW), -(-num_samples // _MAX_WINDOW))
    size = -(-num_samples // num_windows)
    table = np.zeros((num_limits, num_windows * size), np.int32)
    table[:, :num_samples] = needs
    return table.reshape(num_limits, num_windows, size)


def _descending(scores: Float64Array) -> Int64Array:
    """Return, by window, the places of scores in 0..1 from the highest to the lowest; equal ones in their order.

    >>> _descending(np.array([[0.1, 0.5, 0.5]])).tolist()
    [[1, 2, 0]]
    """
    keys = ((1.0 - scores) * (1 << _SCORE_BITS)).astype(np.int64) << _PLACE_BITS
    keys |= np.arange(scores.shape[1])
    keys.sort(axis=1)  # twice as quick as `argsort`, and no two are equal
    return keys & (_MAX_WINDOW - 1)


def _first_with_room(left: Int32Array, need: Int32Array) -> Int64Array:
    """Return (W,) the first bin of every window with room for what is needed, (D, W), of what is left, (D, W, bins)."""
    fits = left[0] >= need[0][:, None]
    for own_left, own_need in zip(left[1:], need[1:], strict=True):
        fits &= own_left >= own_need[:, None]
    first: Int64Array = fits.argmax(1)
    return first


def _bins(bins: Int64Array, *, num_samples: int) -> Bins:
    """Return the samples by bin, given the bin of each in its window, (W, samples of a window)."""
    num_windows, size = bins.shape
    keys = (bins << _PLACE_BITS) | np.arange(size)
    keys.sort(axis=1)
    first = np.arange(num_windows)[:, None]
    order = ((keys & (_MAX_WINDOW - 1)) + first * size).reshape(-1)
    bin_of = ((keys >> _PLACE_BITS) + first * _MAX_WINDOW).reshape(-1)
    if len(order) > num_samples:  # what filled the last windows up
        real = order < num_samples
        order, bin_of = order[real], bin_of[real]
    cuts = np.flatnonzero(np.diff(bin_of)) + 1
    return Bins(order, np.concatenate([[0], cuts, [num_samples]]).astype(np.int64))
