"""Pickled values on a pipe, each with its length in front.

Large bytes and arrays are written from where they lie and read into where they stay: pickling hands them over whole, and
unpickling reads them from the pipe itself. A value of 1 MB is copied twice, into the pipe and out of it.
"""

import os
import pickle
import struct
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

_LENGTH = struct.Struct("<Q")
_MAX_PIECES = 1000
"""Of one system call; Linux takes 1024."""
_READ_BYTES = 1 << 16
"""One read from the pipe may bring several small values; a larger value is read on its own."""

Frame = list[bytes | bytearray | memoryview]
"""A value ready to be written, in pieces."""


class PipeClosed(Exception):
    """The other end of the pipe is closed: its process has ended."""


def to_frame(value: object) -> Frame:
    """Return a value's pickle with its length in front. Raises what pickling raises."""
    pieces: list[Any] = []
    pickle.Pickler(SimpleNamespace(write=pieces.append), protocol=5).dump(value)
    flat: Frame = [piece.raw() if isinstance(piece, pickle.PickleBuffer) else piece for piece in pieces]
    return [_LENGTH.pack(sum(map(len, flat))), *flat]


def num_bytes_of(frame: Frame) -> int:
    """Return how many bytes a frame takes on the pipe."""
    return sum(map(len, frame))


def write_frames(fd: int, frames: Sequence[Frame]) -> None:
    """Write frames to a pipe; waits while it is full. Raises `PipeClosed`."""
    pieces = [memoryview(piece) for frame in frames for piece in frame]
    first = 0
    try:
        while first < len(pieces):
            num_written = os.writev(fd, pieces[first : first + _MAX_PIECES])
            while first < len(pieces) and num_written >= len(pieces[first]):
                num_written -= len(pieces[first])
                first += 1
            if num_written:
                pieces[first] = pieces[first][num_written:]
    except (BrokenPipeError, ConnectionResetError):
        raise PipeClosed from None


class FrameReader:
    """Reads what `write_frames` wrote; `wait` is called before each read and returns once it would not block, or raises.

    Has the methods of a file that `pickle.Unpickler` asks for.
    """

    def __init__(self, fd: int, wait: Callable[[], None] = lambda: None) -> None:
        self._fd = fd
        self._wait = wait
        self._ahead = memoryview(b"")

    def read_value(self) -> Any:
        """Return the next value. Raises `PipeClosed`, and what unpickling raises."""
        num_bytes = self._read_length()
        if num_bytes <= _READ_BYTES:
            return pickle.loads(self.read(num_bytes))
        return pickle.Unpickler(self).load()

    def read_pickle(self) -> bytes | bytearray:
        """Return the pickle of the next value."""
        return self._take(self._read_length())

    def read(self, size: int) -> bytes:
        """Return exactly `size` bytes."""
        return bytes(self._take(size))

    def readinto(self, target: Any) -> int:
        """Fill `target` and return its size."""
        view = memoryview(target).cast("B")
        filled = 0
        while filled < len(view):
            if not self._ahead and len(view) - filled >= _READ_BYTES:
                num_bytes = self._read_some(view[filled:])
            else:
                if not self._ahead:
                    self._read_ahead()
                num_bytes = min(len(self._ahead), len(view) - filled)
                view[filled : filled + num_bytes] = self._ahead[:num_bytes]
                self._ahead = self._ahead[num_bytes:]
            filled += num_bytes
        return filled

    def readline(self) -> bytes:
        """Refuse: no pickle of protocol 5 has lines, but the unpickler wants to see the method."""
        raise NotImplementedError

    def _read_length(self) -> int:
        (num_bytes,) = _LENGTH.unpack(self.read(_LENGTH.size))
        return int(num_bytes)

    def _take(self, size: int) -> bytes | bytearray:
        if size <= len(self._ahead):
            taken, self._ahead = self._ahead[:size], self._ahead[size:]
            return bytes(taken)
        whole = bytearray(size)
        self.readinto(whole)
        return whole

    def _read_ahead(self) -> None:
        ahead = bytearray(_READ_BYTES)
        self._ahead = memoryview(ahead)[: self._read_some(ahead)]

    def _read_some(self, target: bytearray | memoryview) -> int:
        self._wait()
        try:
            num_bytes = os.readv(self._fd, [target])
        except ConnectionResetError:
            num_bytes = 0
        if not num_bytes:
            raise PipeClosed
        return num_bytes
