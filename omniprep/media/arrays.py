"""Arrays that come as `.npy` files: the header is judged before anything is allocated, and nothing is ever unpickled."""

import math
import warnings
from io import BytesIO
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from omniprep.errors import Reason, RejectSample
from omniprep.types import MediaFile

NPY_MAGIC = b"\x93NUMPY"
_MAX_HEADER_BYTES = 10_000
"""What NumPy itself takes for safe to parse. Headers of plain arrays have 118 bytes."""


def load_array(media: MediaFile) -> npt.NDArray[Any]:
    """Return the array of a `.npy`: mapped from a file, or a view of the bytes in memory.

    Raises `RejectSample`: `MEDIA_CORRUPT` for what is no plain array, `MEDIA_TRUNCATED` if fewer values follow than the
    header promises, `MEDIA_UNREADABLE`.
    """
    try:
        with media.open() as file:
            head = file.read(_MAX_HEADER_BYTES + 12)
        shape, is_fortran, dtype, offset = _parse_header(head, media.name)
        num_values, num_bytes = math.prod(shape), media.num_bytes
        if num_values * dtype.itemsize > num_bytes - offset:
            raise RejectSample(
                Reason.MEDIA_TRUNCATED,
                f"{media.name}: the .npy promises {shape} of {dtype}, {num_values * dtype.itemsize} bytes; "
                f"{num_bytes - offset} follow its header",
            )
        order: Literal["C", "F"] = "F" if is_fortran else "C"
        array: npt.NDArray[Any]
        if media.path is not None and num_values:
            array = np.memmap(media.path, dtype, mode="r", offset=offset, shape=shape, order=order)
        else:
            array = np.frombuffer(media.data or b"", dtype, num_values, offset if num_values else 0).reshape(shape, order=order)
    except OSError as error:
        raise RejectSample(Reason.MEDIA_UNREADABLE, f"{media.name}: cannot be read: {error.strerror or error}") from None
    return array


def _parse_header(head: bytes, name: str) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    """Return (shape, column-major, dtype, offset of the values)."""
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    stream = BytesIO(head)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of headers that Python 2 wrote
            shape, is_fortran, dtype = readers[np.lib.format.read_magic(stream)](stream, _MAX_HEADER_BYTES)
    except Exception as error:  # the header is a Python literal: parsing a damaged one fails in a dozen ways
        message = " ".join(str(error).split())[:120] or type(error).__name__
        raise RejectSample(Reason.MEDIA_CORRUPT, f"{name}: not a readable .npy: {message}") from None
    if dtype.hasobject or dtype.names is not None or dtype.subdtype is not None or not dtype.itemsize:
        raise RejectSample(Reason.MEDIA_CORRUPT, f"{name}: expected a .npy of plain numbers, got {dtype!s:.80}; convert it")
    if any(length < 0 for length in shape) or len(shape) > 8:
        raise RejectSample(Reason.MEDIA_CORRUPT, f"{name}: the .npy has the shape {shape!s:.80}")
    return tuple(map(int, shape)), bool(is_fortran), dtype, stream.tell()  # int: NumPy lets True through
