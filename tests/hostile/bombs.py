"""Files that promise, or unfold to, far more than they are: each a few kB to a few MB, made to cost gigabytes or hours."""

import io
import struct
import subprocess
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Bomb:
    """A file, the part that names it, and the outcomes that are right."""

    name: str
    part: dict[str, object]
    data: bytes
    expected: tuple[str, ...]


# Pictures ------------------------------------------------------------------------------------------------------------------


def png(width: int, height: int, *, bits: int = 8, color: int = 0, chunks: bytes = b"", rows: int = 0) -> bytes:
    """Return a PNG of any claimed size, with `rows` rows of zeros."""
    channels = {0: 1, 2: 3, 3: 1, 6: 4}[color]
    row = bytes(1 + (width * bits * channels + 7) // 8) if rows else b""
    packer = zlib.compressobj(9)
    body = b"".join(packer.compress(row) for _ in range(rows)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunks + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def picture(form: str, size: tuple[int, int] = (64, 48), **options: object) -> bytes:
    from PIL import Image

    data = io.BytesIO()
    Image.new("RGB", size, (200, 30, 30)).save(data, form, **options)
    return data.getvalue()


def bmp(width: int, height: int, bits: int = 24) -> bytes:
    return (
        b"BM"
        + struct.pack("<IHHI", 1 << 20, 0, 0, 54)
        + struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, 0, 0, 0, 0, 0, 0)
    )


def gif(width: int, height: int, num_frames: int) -> bytes:
    frame = b"\x2c" + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\x00"
    head = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    return head + frame * num_frames + b"\x3b"


def webp_canvas(width: int, height: int) -> bytes:
    """Return an animated WebP of a huge canvas around a small picture."""
    inner = picture("WEBP", (16, 16))[12:]
    size = [(value - 1).to_bytes(3, "little") for value in (width, height)]
    extended = b"VP8X" + struct.pack("<I", 10) + b"\x02\0\0\0" + size[0] + size[1]
    animation = b"ANIM" + struct.pack("<I", 6) + bytes(6)
    frame = bytes(6) + (15).to_bytes(3, "little") * 2 + (100).to_bytes(3, "little") + b"\0" + inner
    body = b"WEBP" + extended + animation + b"ANMF" + struct.pack("<I", len(frame)) + frame
    return b"RIFF" + struct.pack("<I", len(body)) + body


def tiff(entries: list[tuple[int, int, int, int]], payload: bytes = b"") -> bytes:
    """Return a TIFF (or the body of an EXIF block) of one directory; entries are (tag, type, count, value)."""
    directory = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *entry) for entry in entries) + bytes(4)
    return b"II*\0" + struct.pack("<I", 8) + directory + payload


def tiff_of(width: int, height: int) -> bytes:
    return tiff(
        [
            (256, 4, 1, width),
            (257, 4, 1, height),
            (258, 3, 1, 8),
            (259, 3, 1, 1),
            (262, 3, 1, 1),
            (273, 4, 1, 8),
            (277, 3, 1, 1),
            (278, 4, 1, height),
            (279, 4, 1, width * height & 0xFFFFFFFF),
        ]
    )


def overlapping_tags(num_tags: int, num_bytes: int) -> bytes:
    """Return a directory whose tags all name the same bytes: read one by one they are `num_tags * num_bytes`."""
    entries = [(0x4000 + k, 7, num_bytes, 8) for k in range(num_tags)]
    return tiff([(0x0112, 3, 1, 6), *entries], bytes(num_bytes))


def tiff_pages(num_pages: int) -> bytes:
    """Return a TIFF of many directories, each naming the next; the last names the first."""
    pages = []
    size = 2 + 9 * 12 + 4
    for k in range(num_pages):
        entries = tiff_of(16, 16)[8 : 8 + size - 4]
        pages.append(entries + struct.pack("<I", 8 + size * ((k + 1) % num_pages)))
    return b"II*\0" + struct.pack("<I", 8) + b"".join(pages) + bytes(256)


def jpeg_of_scans(num_scans: int, side: int) -> bytes:
    """Return a progressive JPEG with many scans of nearly nothing, each of which costs a pass over all coefficients."""
    data = picture("JPEG", (side, side), progressive=True, quality=20)
    start = data.rindex(b"\xff\xda")
    return data[:start] + data[start:-2] * num_scans + b"\xff\xd9"


def pictures() -> list[Bomb]:
    text = b"Comment\0\0" + zlib.compress(bytes(200 << 20), 9)
    profile = b"icc\0\0" + zlib.compress(bytes(200 << 20), 9)
    exif = overlapping_tags(3000, 4 << 20)
    corrupt, too_large = ("media_corrupt",), ("image_too_large",)
    not_whole = ("media_corrupt", "media_truncated")
    files: dict[str, tuple[bytes, tuple[str, ...]]] = {
        "2.5 gigapixels.png": (png(50_000, 50_000), too_large),
        "1 x 2000000000.png": (png(1, 2_000_000_000), too_large),
        "1 x 50000000.png": (png(1, 50_000_000), too_large),
        "100 megapixels of one bit.png": (png(10_000, 10_000, bits=1, rows=10_000), ("encoded",)),
        "25 megapixels with alpha.png": (png(5_000, 5_000, color=6, rows=5_000), ("encoded",)),
        "zTXt.png": (png(8, 8, chunks=chunk(b"zTXt", text), rows=8), ("encoded", *corrupt)),
        "iCCP.png": (png(8, 8, chunks=chunk(b"iCCP", profile), rows=8), ("encoded", *corrupt)),
        "eXIf.png": (png(8, 8, chunks=chunk(b"eXIf", exif), rows=8), ("encoded", *corrupt)),
        "many chunks.png": (png(8, 8, chunks=chunk(b"tEXt", b"a\0b") * 200_000, rows=8), ("encoded", *corrupt)),
        "a million frames.gif": (gif(8, 8, 1_000_000), ("encoded",)),
        "65535 x 65535.gif": (gif(65_535, 65_535, 1), too_large),
        "16383 x 16383.webp": (webp_canvas(16_383, 16_383), (*too_large, *corrupt)),
        "16777216 x 16777216.webp": (webp_canvas(1 << 24, 1 << 24), (*too_large, *corrupt)),
        "2147483647 x 1.bmp": (bmp(2_147_483_647, 1), (*too_large, "image_aspect")),
        "2147483647 x 2147483647.bmp": (bmp(2_147_483_647, 2_147_483_647), too_large),
        "-2147483648.bmp": (bmp(100, -2_147_483_648), too_large),
        "4294967295 x 4294967295.tif": (tiff_of(0xFFFFFFFF, 0xFFFFFFFF), (*too_large, *corrupt)),
        "overlapping tags.tif": (overlapping_tags(3000, 4 << 20), corrupt),
        "pages in a circle.tif": (tiff_pages(20_000), ("encoded", *not_whole)),
        "100000 x 100000.ppm": (b"P6 100000 100000 255\n", too_large),
        "digits.ppm": (b"P6 " + b"9" * 1_000_000 + b" 1 255\n", (*too_large, *corrupt)),
        "scans.jpg": (jpeg_of_scans(3000, 4000), corrupt),
        "two sizes.jpg": (two_sizes(), not_whole),
        "65500 x 65500.jpg": (resized_jpeg(65_500, 65_500), too_large),
        "ghostscript.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n{} loop\n", corrupt),
        "icon of a picture.ico": (icon(), corrupt),
        "fits.fits": (b"SIMPLE  =                    T".ljust(2880), corrupt),
    }
    return [Bomb(name, {"type": "image", "image": name}, *facts) for name, facts in files.items()]


def two_sizes() -> bytes:
    """Return a JPEG that states its size twice."""
    data = picture("JPEG", (64, 64))
    start = data.index(b"\xff\xc0")
    frame = data[start : start + 2 + int.from_bytes(data[start + 2 : start + 4], "big")]
    return data[:start] + frame[:5] + struct.pack(">HH", 9000, 9000) + frame[9:] + data[start:]


def resized_jpeg(width: int, height: int) -> bytes:
    data = picture("JPEG", (64, 64))
    start = data.index(b"\xff\xc0") + 5
    return data[:start] + struct.pack(">HH", height, width) + data[start + 4 :]


def icon() -> bytes:
    inner = png(13_000, 13_000)
    return struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(inner), 22) + inner


# Sounds --------------------------------------------------------------------------------------------------------------------


def wav(rate: int, channels: int, data: bytes, *, stated: int | None = None, bits: int = 16, tag: int = 1) -> bytes:
    align = channels * bits // 8
    form = struct.pack("<HHIIHH", tag, channels & 0xFFFF, rate & 0xFFFFFFFF, rate * align & 0xFFFFFFFF, align & 0xFFFF, bits)
    size = len(data) if stated is None else stated
    body = b"WAVEfmt " + struct.pack("<I", len(form)) + form + b"data" + struct.pack("<I", size & 0xFFFFFFFF) + data
    return b"RIFF" + struct.pack("<I", len(body) if stated is None else stated & 0xFFFFFFFF) + body


def flac_of_silence(seconds: int, *, hide_length: bool = False) -> bytes:
    """Return a FLAC of silence at 16 kHz: a second is about 60 bytes."""
    import soundfile

    data = io.BytesIO()
    with soundfile.SoundFile(data, "w", 16_000, 1, "PCM_16", format="FLAC") as file:
        block = np.zeros(16_000 * 60, np.int16)
        for _ in range(seconds // 60):
            file.write(block)
    flac = bytearray(data.getvalue())
    if hide_length:  # 36 bits at bit 108 of STREAMINFO, which starts at byte 8
        flac[8 + 13] &= 0xF0
        flac[8 + 14 : 8 + 18] = bytes(4)
    return bytes(flac)


def sounds(ffmpeg: str, folder: Path) -> list[Bomb]:
    pcm = (np.sin(np.arange(32_000) / 20) * 9000).astype("<i2").tobytes()
    too_long, over = ("audio_too_long",), ("media_over_limit",)
    corrupt = ("media_corrupt",)
    files: dict[str, tuple[bytes, tuple[str, ...]]] = {
        "65535 channels.wav": (wav(16_000, 65_535, bytes(1 << 20)), (*over, *corrupt)),
        "1024 channels.wav": (wav(16_000, 1024, bytes(64 << 20)), over),
        "1 Hz.wav": (wav(1, 1, pcm), (*over, *too_long)),
        "1 Hz, short.wav": (wav(1, 1, pcm[:400]), over),
        "4 GHz.wav": (wav(4_000_000_000, 1, pcm), (*over, *corrupt)),
        "0 Hz.wav": (wav(0, 1, pcm), corrupt),
        "0 channels.wav": (wav(16_000, 0, pcm), corrupt),
        "streamed size.wav": (wav(16_000, 1, pcm, stated=0xFFFFFFFF), ("encoded",)),
        "years.flac": (flac_of_silence(60 * 60 * 10), too_long),
        "years, length unknown.flac": (flac_of_silence(60 * 60 * 10, hide_length=True), too_long),
        "years.m4a": (stretched(ffmpeg, folder, "m4a"), (*too_long, "media_truncated", *corrupt, "encoded")),
        "pause of a year.mkv": (paused(ffmpeg, folder), (*too_long, "encoded", *corrupt)),
        "zeros.mp3": (bytes(4 << 20), corrupt),
        "only tags.mp3": (b"ID3\x04\0\0\x7f\x7f\x7f\x7f" + bytes(1 << 20), (*corrupt, "media_empty", "media_truncated")),
        "playlist.mp3": (b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:1/x.ts\n", corrupt),
        "concat.wav": (b"ffconcat version 1.0\nfile /etc/passwd\n", corrupt),
        "session.sdp": (b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nm=audio 9 RTP/AVP 0\nc=IN IP4 127.0.0.1\n", corrupt),
    }
    return [Bomb(name, {"type": "audio", "audio": name}, *facts) for name, facts in files.items()]


def made(ffmpeg: str, folder: Path, name: str, *options: str) -> bytearray:
    path = folder / name
    if not path.exists():
        subprocess.run([ffmpeg, "-v", "error", *options, "-threads", "1", str(path)], check=True)
    return bytearray(path.read_bytes())


def stretched(ffmpeg: str, folder: Path, suffix: str) -> bytes:
    """Return an MP4 sound whose sample table says that each packet lasts hours."""
    data = made(ffmpeg, folder, f"tone.{suffix}", "-f", "lavfi", "-i", "sine=d=2:sample_rate=16000", "-c:a", "aac")
    at = data.index(b"stts") + 12
    data[at + 4 : at + 8] = (1 << 30).to_bytes(4, "big")
    return bytes(data)


def paused(ffmpeg: str, folder: Path) -> bytes:
    """Return a Matroska sound whose clusters after the first are stamped far into the future."""
    data = made(
        ffmpeg,
        folder,
        "tone.mkv",
        "-f",
        "lavfi",
        "-i",
        "sine=d=12:sample_rate=16000",
        "-c:a",
        "libvorbis",
        "-cluster_time_limit",
        "2000",
    )
    clusters = [k for k in range(len(data) - 12) if data[k : k + 4] == b"\x1f\x43\xb6\x75"]
    for start in clusters[1:]:
        at = data.index(b"\xe7", start)
        width = data[at + 1] & 0x0F
        data[at + 2 : at + 2 + width] = b"\x7f" + b"\xff" * (width - 1)
    return bytes(data)


# Films ---------------------------------------------------------------------------------------------------------------------


def films(ffmpeg: str, folder: Path) -> list[Bomb]:
    picture_in = ["-f", "lavfi", "-i", "testsrc=s=96x64:r=8:d=1"]
    mp4 = made(ffmpeg, folder, "film.mp4", *picture_in, "-c:v", "libx264", "-pix_fmt", "yuv420p")
    mjpeg = made(ffmpeg, folder, "film.avi", *picture_in, "-c:v", "mjpeg", "-pix_fmt", "yuvj420p")
    mkv = made(ffmpeg, folder, "film.mkv", *picture_in, "-c:v", "libx264", "-pix_fmt", "yuv420p")

    def edited(data: bytearray, tag: bytes, offset: int, value: bytes) -> bytes:
        at = data.index(tag) + offset
        return bytes(data[:at] + value + data[at + len(value) :])

    def many_packets(num_packets: int) -> bytes:
        """Return an AVI whose frames are a byte each."""
        head, tail = bytes(mjpeg[: mjpeg.index(b"movi") + 4]), b"00dc\x01\0\0\0\0\0" * num_packets
        grown = edited(bytearray(head), b"movi", -4, struct.pack("<I", 4 + len(tail)))
        return grown[:4] + struct.pack("<I", len(grown) + len(tail) - 8) + grown[8:] + tail

    stts = mp4.index(b"stts") + 12
    over, corrupt = ("media_over_limit",), ("media_corrupt",)
    not_whole = (*corrupt, "media_truncated", "media_empty", "media_range", "video_too_short")
    files: dict[str, tuple[bytes, tuple[str, ...]]] = {
        "years a frame.mp4": (bytes(mp4[: stts + 4]) + b"\x7f\xff\xff\xff" + bytes(mp4[stts + 8 :]), (*over, *not_whole)),
        "no time a frame.mp4": (bytes(mp4[: stts + 4]) + bytes(4) + bytes(mp4[stts + 8 :]), ("encoded", *not_whole)),
        "1 tick a second.mp4": (edited(mp4, b"mdhd", 16, struct.pack(">I", 1)), ("encoded", *over, *not_whole)),
        "4 GHz ticks.mp4": (edited(mp4, b"mdhd", 16, b"\xff\xff\xff\xff"), ("encoded", *over, *not_whole)),
        "four milliard frames.mp4": (edited(mp4, b"stsz", 8, struct.pack(">II", 1, 0xFFFFFFFF)), not_whole),
        "four milliard chunks.mp4": (edited(mp4, b"stco", 8, b"\xff\xff\xff\xff"), ("encoded", *not_whole)),
        "a huge box.mp4": (edited(mp4, b"moov", -4, struct.pack(">I", 0x7FFFFFFF)), ("encoded", *not_whole)),
        "10 million packets.avi": (many_packets(10_000_000), (*over, *not_whole)),
        "fps of a milliard.avi": (edited(mjpeg, b"strh", 28, struct.pack("<II", 1, 1_000_000_000)), ("encoded", *not_whole)),
        "fps of nothing.avi": (edited(mjpeg, b"strh", 28, struct.pack("<II", 0xFFFFFFFF, 1)), ("encoded", *over, *not_whole)),
        "fps of 0 by 0.avi": (edited(mjpeg, b"strh", 28, bytes(8)), ("encoded", *not_whole)),
        "65535 x 65535 in its frames.avi": (resized_frames(bytes(mjpeg), 65_500), (*over, *not_whole)),
        "20000 x 20000 in its frames.avi": (resized_frames(bytes(mjpeg), 20_000), (*over, *not_whole)),
        "stamps of half of all time.mkv": (stamped(bytes(mkv)), ("encoded", *over, *not_whole)),
        "playlist.mp4": (b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", corrupt),
        "h264 of 8400 x 8400.h264": (huge_h264(ffmpeg, folder), (*over, *not_whole)),
        "gif of 65535 x 65535.gif": (gif(65_535, 65_535, 3), (*over, *not_whole)),
        "a million frames.gif": (gif(8, 8, 1_000_000), ("encoded", *over, *not_whole)),
    }
    return [Bomb(f"film {name}", {"type": "video", "video": f"film {name}"}, *facts) for name, facts in files.items()]


def resized_frames(data: bytes, side: int) -> bytes:
    """Return a film of JPEG frames that each claim another size than the container."""
    parts = data.split(b"\xff\xc0\x00\x11\x08")
    return parts[0] + b"".join(b"\xff\xc0\x00\x11\x08" + struct.pack(">HH", side, side) + part[4:] for part in parts[1:])


def stamped(data: bytes) -> bytes:
    out = bytearray(data)
    at = out.index(b"\xe7", out.index(b"\x1f\x43\xb6\x75"))
    width = out[at + 1] & 0x0F
    # A wider number would move everything: the cluster's time is as large as its bytes allow, and the scale is too.
    out[at + 2 : at + 2 + width] = b"\xff" * width
    scale = out.find(b"\x2a\xd7\xb1")
    size = out[scale + 3] & 0x0F
    out[scale + 4 : scale + 4 + size] = b"\x7f" + b"\xff" * (size - 1)
    return bytes(out)


def huge_h264(ffmpeg: str, folder: Path) -> bytes:
    """Return a few kB of H.264 that decode to frames of 8400 x 8400."""
    options = [
        "-f",
        "lavfi",
        "-i",
        "color=s=8400x8400:r=2:d=1",
        "-c:v",
        "libx264",
        "-preset",
        "ultrafast",
        "-pix_fmt",
        "yuv420p",
    ]
    return bytes(made(ffmpeg, folder, "huge.h264", *options))


def write_bombs(folder: Path, ffmpeg: str) -> list[Bomb]:
    """Write every bomb into `folder`."""
    (folder / "seeds").mkdir(parents=True, exist_ok=True)
    makers: tuple[Callable[[], list[Bomb]], ...] = (
        pictures,
        lambda: sounds(ffmpeg, folder / "seeds"),
        lambda: films(ffmpeg, folder / "seeds"),
    )
    bombs = [bomb for make in makers for bomb in make()]
    for bomb in bombs:
        (folder / bomb.name).write_bytes(bomb.data)
    return bombs
