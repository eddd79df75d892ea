"""How a resized frame is stored: JPEG, or raw bytes where the recipe asks for lossless.

JPEG keeps the colour planes at full resolution (4:4:4): frames are small, text and edges in colour matter, and against
4:2:0 it costs about a fifth more time.
"""

from collections.abc import Iterable

import numpy as np

from omniprep.errors import DatasetError
from omniprep.types import FrameFormat, Uint8Array


def encode_frame(frame: Uint8Array, frame_format: FrameFormat, quality: int) -> bytes:
    """Return a (H, W, 3) uint8 RGB frame as a JPEG file of `quality` 1..100, or as its raw bytes."""
    contiguous = np.ascontiguousarray(frame)
    if frame_format == "raw":
        return contiguous.tobytes()
    import simplejpeg

    data: bytes = simplejpeg.encode_jpeg(contiguous, quality=quality, colorspace="RGB", colorsubsampling="444", fastdct=False)
    return data


def decode_frame(
    data: bytes | memoryview, frame_format: FrameFormat, *, height: int, width: int, out: Uint8Array | None = None
) -> Uint8Array:
    """Return the (height, width, 3) uint8 RGB frame that `encode_frame` stored.

    A JPEG is decoded into `out` if that is given, a C-ordered array of at least as many bytes; raw pixels are a view of `data`.
    Raises `DatasetError` if the bytes are not a frame of that size.
    """
    if frame_format == "raw":
        if len(data) != height * width * 3:
            raise DatasetError(f"raw frame: expected {height}x{width}x3 = {height * width * 3} bytes, got {len(data)}")
        return np.frombuffer(data, np.uint8).reshape(height, width, 3)
    import simplejpeg

    try:
        frame: Uint8Array = simplejpeg.decode_jpeg(data, colorspace="RGB", fastdct=False, fastupsample=False, buffer=out)
    except ValueError as error:
        raise DatasetError(f"JPEG frame of {len(data)} bytes cannot be decoded: {error}") from None
    if frame.shape != (height, width, 3):
        raise DatasetError(f"JPEG frame: expected {(height, width, 3)}, got {frame.shape}")
    return frame


def decode_frames(frames: Iterable[bytes], frame_format: FrameFormat, *, height: int, width: int) -> Uint8Array:
    """Return all frames of an item as (n, height, width, 3) uint8. Raises as `decode_frame` does."""
    return np.stack([decode_frame(data, frame_format, height=height, width=width) for data in frames])
