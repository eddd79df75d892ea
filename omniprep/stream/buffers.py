"""Buffers that are filled again and again: every fresh page would cost a fault first.

A buffer is taken, filled, looked at through views and given back. It is used again only when no view of it is left, so no
array ever changes under its owner; whoever keeps one costs the next bin a new buffer, and nothing else.
"""

import threading

_MIN_BYTES = 1 << 20


class KeptBuffers:
    """Buffers that wait to be used again, `max_bytes` of them at most. Safe for threads."""

    def __init__(self, *, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._kept: list[bytearray] = []
        self._lock = threading.Lock()

    @property
    def num_bytes(self) -> int:
        """Return the bytes that wait."""
        with self._lock:
            return sum(map(len, self._kept))

    def take(self, num_bytes: int) -> bytearray:
        """Return a buffer of at least `num_bytes`, with anything in it."""
        with self._lock:
            fitting = [at for at, buffer in enumerate(self._kept) if len(buffer) >= num_bytes and _is_unseen(buffer)]
            if fitting:
                return self._kept.pop(min(fitting, key=lambda at: len(self._kept[at])))
        # Sizes of bins vary: with powers of two the same few buffers do for all of them.
        return bytearray(1 << (max(num_bytes, _MIN_BYTES) - 1).bit_length())

    def give_back(self, buffer: bytearray) -> None:
        """Keep a buffer for another use. Those given back first are let go where there are too many."""
        with self._lock:
            self._kept.append(buffer)
            while sum(map(len, self._kept)) > self._max_bytes:
                self._kept.pop(0)


def _is_unseen(buffer: bytearray) -> bool:
    """Return whether no view of a buffer is left: a bytearray does not change its length while there is one."""
    try:
        buffer.pop()
    except BufferError:
        return False
    buffer.append(0)
    return True
