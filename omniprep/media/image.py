"""Still pictures: probe the header, decide the size, decode to RGB, resize.

Differences to `qwen_omni_utils.fetch_image`, all on purpose: the EXIF orientation is applied, every kind of transparency
(not only RGBA) is put on white, and deep grey is scaled to 8 bits rather than clipped. Any other RGB or RGBA picture comes
out bit for bit as there with `resize: exact`: Pillow's bicubic on uint8.

`resize: fast` differs only for a JPEG that is reduced by more than two: the decoder then skips the finest DCT coefficients,
down to twice the size wanted or more, before the same bicubic.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
from pydantic import Field

from omniprep.config import Config
from omniprep.errors import Reason, RejectSample
from omniprep.features.patches import fit_pixels
from omniprep.media.resize import resize_frame
from omniprep.profile import QWEN2_5_OMNI, ModelProfile
from omniprep.records import ImagePart
from omniprep.types import MediaFile, ResizeMode, Uint8Array

_TURNED = (5, 6, 7, 8)
"""EXIF orientations that exchange width and height."""
_ORIENTATION_TAG = 0x0112
_PILLOW_LIMIT = 178_956_970
"""Pillow itself refuses pictures above this."""
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "JPEG2000", "PPM", "QOI", "TGA", "SGI", "PCX")
"""Formats that Pillow may recognise: pictures proper. EPS would start Ghostscript, an icon holds another picture of any size."""
_MAX_SIDE_PX = 1_000_000
"""Decoders keep a table of rows: a picture one pixel wide costs them ten times its pixels."""
_JPEG_SCAN = b"\xff\xda"
_MAX_JPEG_SCANS = 100
"""Each scan of a progressive JPEG is a pass over the whole picture; encoders write about ten, and 200 kB can hold 20,000."""


class ImageConfig(Config):
    """How pictures become frames. A record's own `min_pixels` and `max_pixels` win; None means the model profile's limit."""

    resize: ResizeMode = "exact"
    min_pixels: int | None = Field(default=None, gt=0)
    max_pixels: int | None = Field(default=None, gt=0)
    max_source_pixels: int = Field(default=100_000_000, gt=0, le=_PILLOW_LIMIT)
    """Pictures that claim more pixels are rejected before they are decoded: 3 bytes of memory a pixel, and more on the way."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageInfo:
    """What a picture's header says."""

    width: int
    """Pixels as shown, after the EXIF orientation."""
    height: int
    mode: str
    """Pillow's mode of the first frame: "RGB", "P", "CMYK", ..."""
    format: str
    """"JPEG", "PNG", ..."""
    orientation: int = 1
    """EXIF orientation, 1 to 8."""


def probe_image(media: MediaFile, *, max_source_pixels: int = _PILLOW_LIMIT) -> ImageInfo:
    """Return what the header says, without decoding.

    Raises `RejectSample`: `MEDIA_EMPTY`, `MEDIA_MISSING`, `MEDIA_UNREADABLE`, `MEDIA_CORRUPT`, `IMAGE_TOO_LARGE`.
    """
    return _probe(_read(media), media.name, max_source_pixels)


def image_size(info: ImageInfo, part: ImagePart, config: ImageConfig, profile: ModelProfile = QWEN2_5_OMNI) -> tuple[int, int]:
    """Return the (height, width) in pixels that a picture is resized to.

    `resized_height` and `resized_width` count only together and under the profile's limits, as in the reference. Raises
    `RejectSample` (`IMAGE_ASPECT`, `MEDIA_RANGE`).
    """
    limits = profile.image_limits
    if part.resized_height is not None and part.resized_width is not None:
        height, width = part.resized_height, part.resized_width
        return fit_pixels(height, width, min_pixels=limits.min_pixels, max_pixels=limits.max_pixels, profile=profile)
    return fit_pixels(
        info.height,
        info.width,
        min_pixels=part.min_pixels or config.min_pixels or limits.min_pixels,
        max_pixels=part.max_pixels or config.max_pixels or limits.max_pixels,
        profile=profile,
    )


def decode_image(media: MediaFile, *, part: ImagePart, config: ImageConfig, profile: ModelProfile = QWEN2_5_OMNI) -> Uint8Array:
    """Return a picture upright, on white, resized: (height, width, 3) uint8 RGB.

    Of an animation the first frame is taken. Raises `RejectSample` as `probe_image` and `image_size` do, and `MEDIA_TRUNCATED`.
    """
    data = _read(media)
    info = _probe(data, media.name, config.max_source_pixels)
    try:
        height, width = image_size(info, part, config, profile)
    except RejectSample as error:
        raise error.at(media.name) from None
    least = None
    if config.resize == "fast":
        least = (2 * height, 2 * width) if info.orientation not in _TURNED else (2 * width, 2 * height)
    pixels = _decode(data, info, media.name, least)
    return resize_frame(pixels, height=height, width=width, mode=config.resize, kind="image")


def load_rgb(media: MediaFile, *, max_source_pixels: int = _PILLOW_LIMIT) -> Uint8Array:
    """Return a picture upright, on white, at its own size: (H, W, 3) uint8 RGB. Raises as `decode_image` does."""
    data = _read(media)
    return _decode(data, _probe(data, media.name, max_source_pixels), media.name, None)


def _read(media: MediaFile) -> bytes:
    try:
        with media.open() as file:
            data = file.read()
    except FileNotFoundError:
        raise RejectSample(Reason.MEDIA_MISSING, f"{media.name}: no such file") from None
    except OSError as error:
        raise RejectSample(Reason.MEDIA_UNREADABLE, f"{media.name}: {error.strerror}", retryable=True) from None
    if not data:
        raise RejectSample(Reason.MEDIA_EMPTY, f"{media.name}: the file has no bytes")
    return data


@contextmanager
def _rejecting(name: str) -> Iterator[None]:
    """Turn Pillow's many errors into a rejection, and keep its warnings to itself."""
    from PIL import Image, UnidentifiedImageError

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except UnidentifiedImageError:
            raise RejectSample(Reason.MEDIA_CORRUPT, f"{name}: not a picture of a known format") from None
        except Image.DecompressionBombError as error:
            raise RejectSample(Reason.IMAGE_TOO_LARGE, f"{name}: {error}") from None
        except RejectSample:
            raise
        except Exception as error:  # Pillow's plugins let struct, zlib, index and syntax errors of damaged files through
            message = " ".join(str(error).split()) or type(error).__name__
            truncated = isinstance(error, EOFError) or "truncated" in message.lower()
            reason = Reason.MEDIA_TRUNCATED if truncated else Reason.MEDIA_CORRUPT
            raise RejectSample(reason, f"{name}: the picture cannot be decoded: {message}; fetch or save it again") from None


def _probe(data: bytes, name: str, max_source_pixels: int) -> ImageInfo:
    from PIL import Image

    with _rejecting(name), Image.open(BytesIO(data), formats=_FORMATS) as picture:
        width, height = picture.size
        if max(width, height) > _MAX_SIDE_PX:
            raise RejectSample(
                Reason.IMAGE_TOO_LARGE, f"{name}: {width}x{height}: expected sides of at most {_MAX_SIDE_PX} pixels"
            )
        num_scans = data.count(_JPEG_SCAN) if picture.format in ("JPEG", "MPO") else 0
        if num_scans > _MAX_JPEG_SCANS:
            raise RejectSample(Reason.MEDIA_CORRUPT, f"{name}: a JPEG of {num_scans} scans, expected at most {_MAX_JPEG_SCANS}")
        if width * height > max_source_pixels:
            raise RejectSample(
                Reason.IMAGE_TOO_LARGE,
                f"{name}: {width}x{height} = {width * height} pixels > max_source_pixels={max_source_pixels}; "
                "reduce the picture or raise the limit",
            )
        orientation = picture.getexif().get(_ORIENTATION_TAG, 1)
        # Pillow turns TIFFs itself, and reports their size as shown.
        orientation = orientation if orientation in range(1, 9) and picture.format != "TIFF" else 1
        if orientation in _TURNED:
            width, height = height, width
        return ImageInfo(width=width, height=height, mode=picture.mode, format=picture.format or "", orientation=orientation)


def _decode(data: bytes, info: ImageInfo, name: str, least: tuple[int, int] | None) -> Uint8Array:
    """Return (H, W, 3) uint8; `least` is the (height, width) in the file's orientation that a JPEG may be reduced to."""
    from PIL import Image

    pixels = None
    if info.format == "JPEG" and info.mode == "RGB":
        pixels = _decode_jpeg(data, least)
    if pixels is None:
        with _rejecting(name), Image.open(BytesIO(data), formats=_FORMATS) as picture:
            picture.load()
            pixels = _to_rgb(picture, name)
    return np.ascontiguousarray(_upright(pixels, info.orientation))


def _decode_jpeg(data: bytes, least: tuple[int, int] | None) -> Uint8Array | None:
    """Return the pixels that Pillow's libjpeg gives too, or None where this decoder finds fault and Pillow must say with what."""
    import simplejpeg

    height, width = least or (0, 0)
    try:
        pixels: Uint8Array = simplejpeg.decode_jpeg(
            data, colorspace="RGB", fastdct=False, fastupsample=False, min_height=height, min_width=width, min_factor=2
        )
    except ValueError:
        return None
    return pixels


def _to_rgb(picture: Any, name: str) -> Uint8Array:
    """Return a Pillow picture of any mode as (H, W, 3) uint8: transparency on white, deep grey scaled."""
    from PIL import Image

    mode = picture.mode
    if mode.startswith("I") or mode == "F":
        grey = _grey_to_bytes(np.asarray(picture), name)
        return np.repeat(grey[..., None], 3, axis=2)
    if mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        with_alpha = picture.convert("RGBA")
        white = Image.new("RGB", picture.size, (255, 255, 255))
        white.paste(with_alpha, mask=with_alpha.getchannel("A"))
        return np.asarray(white)
    return np.asarray(picture.convert("RGB"))


def _grey_to_bytes(grey: "np.ndarray[Any, Any]", name: str) -> Uint8Array:
    """Return (H, W) grey of 16 or 32 bits or floats as uint8.

    Integers within 0..65535 are taken as 16 bits (255 is white at 65535), floats within 0..1 as shares of white and
    within 0..255 as levels; any other range is spread from its least to its largest value.
    """
    if not np.isfinite(grey).all():
        raise RejectSample(
            Reason.MEDIA_CORRUPT, f"{name}: the picture holds values that are not finite; save it again as 8 or 16 bits"
        )
    low, high = float(grey.min()), float(grey.max())
    levels = grey.astype(np.float64)
    if grey.dtype.kind in "iu" and low >= 0 and high <= 65535:
        levels = levels / 257
    elif grey.dtype.kind == "f" and low >= 0 and high <= 1:
        levels = levels * 255
    elif low < 0 or high > 255:
        levels = (levels - low) * (255 / ((high - low) or 1))
    pixels: Uint8Array = np.rint(levels).astype(np.uint8)
    return pixels


def _upright(pixels: Uint8Array, orientation: int) -> Uint8Array:
    """Apply an EXIF orientation to (H, W, 3)."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels
