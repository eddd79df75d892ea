"""Resizing one frame.

`exact` gives the reference's pixels: Pillow's bicubic on uint8 for images, and for videos what
`torchvision.transforms.functional.resize(..., BICUBIC, antialias=True)` gives on uint8, which is torch's float32 kernel,
rounded. `fast` needs no torch: frames of video files are resized by swscale (bicubic) inside the decoder, in one step with
the colour conversion (`video_decord.py`, `video_pyav.py`), all others by Pillow on uint8.

Against `exact`, on film, 720p to 560x1008 and 360p to 364x644 (10 frames each):

| | ms a frame, 720p / 360p | values that differ | by more than one level | mean difference | largest |
|---|---|---|---|---|---|
| torchvision's call (the reference) | 28-33 / 5.4 | 0 | 0 | 0 | 0 |
| `exact` here | 15 / 4 | 0 | 0 | 0 | 0 |
| `fast`, swscale inside PyAV | 2.6 / 0.9 | 70-76 % | 21-29 % | 1.0-1.2 | 75 |
| `fast`, swscale inside decord | within decoding | 77-81 % | 33-48 % | 1.3-1.8 | 43 |
| `fast`, Pillow | 10.7 / 3.1 | 16-17 % | under 0.002 % | 0.16 | 4 |

swscale's differences lie at coloured edges: it scales the half-size colour planes smoothly, where the reference first repeats
each of their values in a 2x2 square.
"""

from functools import cache
from importlib.util import find_spec
from typing import Any, Literal

import numpy as np

from omniprep.errors import ConfigError
from omniprep.types import ResizeMode, Uint8Array

_STRIP_ROWS = 128
"""Rows that the exact resize turns at a time; the intermediate picture of an 8K frame would otherwise take 400 MB."""


def resize_frame(frame: Uint8Array, *, height: int, width: int, mode: ResizeMode, kind: Literal["image", "video"]) -> Uint8Array:
    """Return `frame` (H, W, 3) uint8 as (height, width, 3) uint8, contiguous; unchanged if it has that size.

    Raises `ConfigError` for the exact resize of a video without torch.
    """
    if frame.shape[:2] == (height, width):
        return np.ascontiguousarray(frame)
    if kind == "image":
        return _resize_pillow(frame, height, width)
    return _resize_float(frame, height, width) if mode == "exact" else _resize_pillow(frame, height, width)


def require_exact_resize() -> None:
    """Raise `ConfigError` if `resize: exact` cannot be done for videos in this installation."""
    if not _has_torch():
        raise ConfigError(
            "video.resize: `exact` computes the reference's pixels with torch, which is not installed; "
            "install `omniprep[torch]` or set `video.resize: fast`"
        )


@cache
def _has_torch() -> bool:
    return find_spec("torch") is not None


@cache
def _torch() -> Any:
    require_exact_resize()
    import torch

    return torch


def _resize_pillow(frame: Uint8Array, height: int, width: int) -> Uint8Array:
    from PIL import Image

    picture = Image.fromarray(np.ascontiguousarray(frame)).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(picture)


def _tensor(frame: Uint8Array) -> Any:
    # torch warns about read-only memory although nothing writes to it here.
    writable = frame if frame.flags.writeable else frame.copy()
    return _torch().from_numpy(np.ascontiguousarray(writable))


def _resize_float(frame: Uint8Array, height: int, width: int) -> Uint8Array:
    """Return torch's float32 bicubic, horizontal pass first, each pass run along the outer dimension.

    torch's kernel is separable and runs along a row pixel by pixel, but down a column with whole rows at a time. Turning
    the picture so that both passes run down columns multiplies and adds the same numbers in the same order (equal bit for
    bit, tested) at half the time.
    """
    torch = _torch()
    source_height, source_width, _ = frame.shape
    with torch.inference_mode():
        rows = _tensor(frame)
        if source_width != width:
            rows = torch.cat([_narrow(strip, width) for strip in rows.split(_STRIP_ROWS)])
        rows = rows.reshape(1, 1, source_height, width * 3).float()
        if source_height != height:
            rows = _rows_to(rows, height)
        resized: Uint8Array = rows.round_().clamp_(0, 255).to(torch.uint8).view(height, width, 3).numpy()
        return resized


def _narrow(strip: Any, width: int) -> Any:
    """Resize (R, W, 3) uint8 to (R, width, 3) float32."""
    num_rows, source_width, _ = strip.shape
    turned = strip.permute(1, 0, 2).reshape(1, 1, source_width, num_rows * 3).float()
    return _rows_to(turned, width).view(width, num_rows, 3).permute(1, 0, 2)


def _rows_to(rows: Any, num_rows: int) -> Any:
    """Resize (1, 1, R, C) float32 to (1, 1, num_rows, C)."""
    return _torch().nn.functional.interpolate(rows, size=(num_rows, rows.shape[-1]), mode="bicubic", antialias=True)
