"""Pictures of every mode and format become upright RGB on white, or a clear rejection."""

from io import BytesIO

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from omniprep.errors import Reason, RejectSample
from omniprep.media.image import ImageConfig, decode_image, image_size, load_rgb, probe_image
from omniprep.records import ImagePart
from omniprep.types import MediaFile

PART = ImagePart(image="x")
EXACT, FAST = ImageConfig(resize="exact"), ImageConfig(resize="fast")


def picture(width=90, height=60, seed=0):
    small = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def saved(image, image_format, **options):
    buffer = BytesIO()
    image.save(buffer, image_format, **options)
    return MediaFile(name=f"picture.{image_format.lower()}", data=buffer.getvalue())


def reason_of(media, part=PART, config=EXACT):
    with pytest.raises(RejectSample) as error:
        decode_image(media, part=part, config=config)
    assert media.name in error.value.detail
    assert "\n" not in error.value.detail
    return error.value.reason


@pytest.mark.reference
@pytest.mark.parametrize(
    ("mode", "image_format", "options"),
    [
        ("RGB", "JPEG", {"quality": 90}),
        ("RGB", "JPEG", {"quality": 80, "subsampling": 0, "progressive": True}),
        ("RGB", "PNG", {}),
        ("RGBA", "PNG", {}),
        ("RGB", "WEBP", {"lossless": True}),
        ("RGBA", "WEBP", {"lossless": True}),
        ("RGB", "BMP", {}),
        ("RGB", "TIFF", {}),
        ("L", "JPEG", {}),
        ("L", "PNG", {}),
        ("1", "PNG", {}),
        ("P", "PNG", {}),
        ("P", "GIF", {}),
        ("CMYK", "JPEG", {}),
        ("CMYK", "TIFF", {}),
    ],
)
@pytest.mark.parametrize(
    "keys", [{}, {"max_pixels": 20_000}, {"min_pixels": 90_000}, {"resized_height": 50, "resized_width": 120}]
)
def test_exact_pixels_equal_qwen_omni_utils(tmp_path, mode, image_format, options, keys):
    from qwen_omni_utils.v2_5.vision_process import fetch_image

    image = picture(201, 143)
    if mode == "RGBA":
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    else:
        image = image.convert(mode)
    path = tmp_path / "picture"
    image.save(path, image_format, **options)
    with Image.open(path) as stored:
        expected = np.asarray(fetch_image({"image": stored} | keys))
    ours = decode_image(MediaFile(name="picture", path=path), part=ImagePart(image="x", **keys), config=EXACT)
    assert ours.dtype == np.uint8
    np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied_once(orientation, image_format):
    exif = Image.Exif()
    exif[0x0112] = orientation
    media = saved(picture(), image_format, exif=exif)
    with Image.open(BytesIO(media.data)) as stored:
        stored.load()
        expected = np.asarray(ImageOps.exif_transpose(stored).convert("RGB"))
    np.testing.assert_array_equal(load_rgb(media), expected)
    info = probe_image(media)
    assert (info.height, info.width) == expected.shape[:2]
    assert (info.height > info.width) == (orientation >= 5)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_see_through_pixels_are_white(mode):
    if mode == "P":
        image = Image.new("P", (40, 40), 0)
        image.putpalette([0, 0, 0, 250, 10, 20])
        image.paste(1, (0, 0, 20, 40))
        media = saved(image, "PNG", transparency=0)
    elif mode == "RGB":  # a colour declared transparent
        image = Image.new("RGB", (40, 40), (0, 0, 0))
        image.paste((250, 10, 20), (0, 0, 20, 40))
        media = saved(image, "PNG", transparency=(0, 0, 0))
    else:
        image = Image.new("RGBA", (40, 40), (0, 0, 0, 0))
        image.paste((250, 10, 20, 255), (0, 0, 20, 40))
        media = saved(image.convert(mode), "PNG")
    pixels = load_rgb(media)
    assert pixels[20, 30].tolist() == [255, 255, 255]
    assert pixels[20, 5].tolist() != [255, 255, 255]


def test_deep_grey_is_scaled_not_clipped():
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    expected = np.arange(256).reshape(16, 16)
    for image_format in ("PNG", "TIFF"):
        pixels = load_rgb(saved(Image.fromarray(ramp), image_format))
        assert np.abs(pixels[..., 0].astype(int) - expected).max() <= 1
        np.testing.assert_array_equal(pixels[..., 0], pixels[..., 2])


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0.0, 0.5, 1.0]], np.float32), [0, 128, 255]),
        (np.array([[0.0, 100.0, 255.0]], np.float32), [0, 100, 255]),
        (np.array([[-1.0, 0.0, 1.0]], np.float32), [0, 128, 255]),
        (np.array([[0, 65535, 257]], np.int32), [0, 255, 1]),
        (np.array([[0, 1_000_000, 500_000]], np.int32), [0, 255, 128]),
        (np.array([[300.0, 300.0, 300.0]], np.float32), [0, 0, 0]),
    ],
)
def test_float_and_wide_grey_are_spread(values, expected):
    pixels = load_rgb(saved(Image.fromarray(values), "TIFF"))
    assert pixels[0, :, 1].tolist() == pytest.approx(expected, abs=1)


def test_deep_colour_keeps_its_brightness():
    """A 16-bit RGB PNG, written by hand because Pillow cannot."""
    import struct
    import zlib

    levels = np.array([[[65535, 32768, 0]] * 4] * 4, ">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in levels)

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    assert load_rgb(MediaFile(name="deep.png", data=data))[0, 0].tolist() == [255, 128, 0]


@pytest.mark.parametrize("image_format", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_frame_is_taken(image_format):
    red, blue = Image.new("RGB", (40, 40), (255, 0, 0)), Image.new("RGB", (40, 40), (0, 0, 255))
    options = {"lossless": True} if image_format == "WEBP" else {}
    media = saved(red, image_format, save_all=True, append_images=[blue], duration=100, **options)
    assert load_rgb(media)[20, 20].tolist() == [255, 0, 0]


def test_one_pixel_becomes_the_least_size():
    pixels = decode_image(saved(Image.new("RGB", (1, 1), (9, 8, 7)), "PNG"), part=PART, config=EXACT)
    assert pixels.shape == (56, 56, 3)  # min_pixels of the profile: 4 x 28 x 28
    assert pixels[30, 30].tolist() == [9, 8, 7]
    small = decode_image(saved(Image.new("RGB", (1, 1)), "PNG"), part=ImagePart(image="x", min_pixels=784), config=EXACT)
    assert small.shape == (28, 28, 3)


def test_a_picture_of_1_to_300_is_refused_and_1_to_200_is_not():
    assert reason_of(saved(Image.new("RGB", (300, 1)), "PNG")) is Reason.IMAGE_ASPECT
    assert decode_image(saved(Image.new("RGB", (2, 400)), "PNG"), part=PART, config=EXACT).shape[1] == 28


def test_a_bomb_is_refused_by_its_header():
    media = saved(Image.new("L", (400, 300)), "PNG")
    config = ImageConfig(max_source_pixels=100_000)
    with pytest.raises(RejectSample, match=r"400x300 = 120000 pixels > max_source_pixels=100000") as error:
        decode_image(media, part=PART, config=config)
    assert error.value.reason is Reason.IMAGE_TOO_LARGE
    header = bytearray(media.data)
    header[16:24] = (60_000).to_bytes(4, "big") * 2  # 3.6 gigapixels claimed in 200 bytes
    import zlib

    header[29:33] = zlib.crc32(bytes(header[12:29])).to_bytes(4, "big")
    assert reason_of(MediaFile(name="bomb.png", data=bytes(header))) is Reason.IMAGE_TOO_LARGE


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
def test_half_a_file_is_truncated_or_corrupt(image_format):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8))
    whole = saved(noise, image_format)
    reason = reason_of(MediaFile(name="half", data=whole.data[: len(whole.data) // 2]))
    assert reason in {Reason.MEDIA_TRUNCATED, Reason.MEDIA_CORRUPT}
    if image_format in {"JPEG", "PNG", "BMP"}:
        assert reason is Reason.MEDIA_TRUNCATED


@pytest.mark.parametrize("data", [b"hello, this is text", b"\x00" * 4000, b"RIFF\x10\x00\x00\x00WAVEfmt ", b"\xff\xd8\xff\xe0"])
def test_what_is_no_picture_is_corrupt(data):
    assert reason_of(MediaFile(name="odd.jpg", data=data)) in {Reason.MEDIA_CORRUPT, Reason.MEDIA_TRUNCATED}


def test_empty_and_missing_files_are_told_apart(tmp_path):
    assert reason_of(MediaFile(name="a.png", data=b"")) is Reason.MEDIA_EMPTY
    assert reason_of(MediaFile(name="b.png", path=tmp_path / "b.png")) is Reason.MEDIA_MISSING
    assert reason_of(MediaFile(name="c.png", path=tmp_path)) is Reason.MEDIA_UNREADABLE


def test_a_wrong_extension_does_not_matter(tmp_path):
    path = tmp_path / "really_a_png.jpg"
    picture().save(path, "PNG")
    assert probe_image(MediaFile(name=path.name, path=path)).format == "PNG"


@settings(max_examples=30)
@given(
    cut=st.integers(0, 3000),
    flips=st.lists(st.integers(0, 3000), max_size=4),
    image_format=st.sampled_from(["JPEG", "PNG", "GIF"]),
)
def test_damage_gives_a_picture_or_a_rejection_never_another_error(cut, flips, image_format):
    data = bytearray(saved(picture(64, 48, seed=5), image_format).data)
    for place in flips:
        data[place % len(data)] ^= 0x55
    media = MediaFile(name="damaged", data=bytes(data[: max(1, len(data) - cut % 50)]))
    try:
        pixels = decode_image(media, part=PART, config=EXACT)
    except RejectSample:
        return
    assert pixels.shape[2] == 3


@pytest.mark.parametrize(("quality", "subsampling"), [(95, 0), (90, 2), (60, 2), (75, 1)])
def test_the_quick_jpeg_decoder_equals_pillow(quality, subsampling):
    media = saved(picture(333, 217, seed=2), "JPEG", quality=quality, subsampling=subsampling)
    with Image.open(BytesIO(media.data)) as stored:
        np.testing.assert_array_equal(load_rgb(media), np.asarray(stored))


def test_fast_equals_exact_unless_a_jpeg_shrinks_much():
    media = saved(picture(900, 700, seed=3), "JPEG", quality=92)
    same = [decode_image(media, part=PART, config=config) for config in (EXACT, FAST)]
    np.testing.assert_array_equal(*same)
    part = ImagePart(image="x", max_pixels=40_000)
    exact, fast = (decode_image(media, part=part, config=config).astype(int) for config in (EXACT, FAST))
    assert exact.shape == fast.shape
    assert 0 < np.abs(exact - fast).mean() < 1.5


def test_fast_keeps_turned_pictures_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    media = saved(picture(1200, 500, seed=4), "JPEG", exif=exif, quality=95)
    part = ImagePart(image="x", max_pixels=30_000)
    exact, fast = (decode_image(media, part=part, config=config).astype(int) for config in (EXACT, FAST))
    assert fast.shape == exact.shape
    assert fast.shape[0] > fast.shape[1]
    assert np.abs(exact - fast).mean() < 1.5


def test_the_records_keys_win_over_the_recipes():
    info = probe_image(saved(picture(1000, 1000), "PNG"))
    config = ImageConfig(max_pixels=100_000)
    assert np.prod(image_size(info, PART, config)) <= 100_000
    assert np.prod(image_size(info, ImagePart(image="x", max_pixels=400_000), config)) > 300_000
