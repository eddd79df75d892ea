"""Frames of a bin to patch rows: distance to the fastest JPEG decoder alone, what patches cost, and what `pack` adds.

Decoders, on the same files, each as its own documentation shows it: simplejpeg (plain, and with the inexact fast options),
Pillow, torchvision and, where it is installed, OpenCV. Frames are film at 560x1008 and 364x644, as OmniPrep stores them.
"""

import io
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import stream_corpus
from bench_vision import make_clip, stored_frames
from ratios import Ratio, measure

from omniprep.features.patches import num_patch_columns, patchify
from omniprep.media.frames import decode_frame
from omniprep.media.video import VideoConfig, plan_video, probe_video
from omniprep.records import VideoPart
from omniprep.shards.members import to_members
from omniprep.stream.batch import pack
from omniprep.stream.decode import Picture, PictureDecoder
from omniprep.stream.record import Record, VisionItem
from omniprep.types import EncodedSample, Uint8Array

Decode = Callable[[bytes], Any]


class Film(NamedTuple):
    """Stored frames of one clip."""

    frames: list[bytes]
    height: int
    width: int


def make_films() -> list[Film]:
    """Return two clips of 6 s, as `prepare` would store them."""
    films = []
    with tempfile.TemporaryDirectory() as folder:
        for size in ((640, 360), (1280, 720)):
            media = make_clip(Path(folder), *size)
            plan = plan_video(media, probe_video(media), VideoPart(video="clip"), VideoConfig())
            films.append(Film(stored_frames(media, VideoConfig()), plan.height, plan.width))
    return films


def make_pictures(films: list[Film]) -> tuple[list[Picture], int]:
    """Return the films as pictures of one record, and how many patch rows they make."""
    pictures: list[Picture] = []
    first_row = 0
    for film in films:
        sizes = [len(frame) for frame in film.frames]
        offsets = np.cumsum([0, *sizes[:-1]]).tolist()
        grid = (-(-len(film.frames) // 2), film.height // 14, film.width // 14)
        item = VisionItem("video", grid, film.height, film.width, tuple(offsets), tuple(sizes), None, 1.0)
        frames = memoryview(b"".join(film.frames))
        record = Record("k", "s", {}, np.empty((128, 0), np.float16), frames, memoryview(b""), "jpeg", ((), (item,)))
        pictures.append(Picture(0, record, item, first_row))
        first_row += pictures[-1].num_rows
    return pictures, first_row


def decoders() -> dict[str, Decode]:
    """Return every JPEG decoder that is installed, by name: bytes in, an array or tensor of RGB pixels out."""
    import simplejpeg
    import torch
    from PIL import Image
    from torchvision.io import ImageReadMode, decode_jpeg

    torch.set_num_threads(1)
    found: dict[str, Decode] = {
        "simplejpeg": lambda data: simplejpeg.decode_jpeg(data, colorspace="RGB"),
        "simplejpeg, inexact": lambda data: simplejpeg.decode_jpeg(data, colorspace="RGB", fastdct=True, fastupsample=True),
        "Pillow": lambda data: np.asarray(Image.open(io.BytesIO(data)).convert("RGB")),
        "torchvision": lambda data: decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB),
    }
    try:
        import cv2
    except ImportError:
        return found
    cv2.setNumThreads(1)
    return found | {"OpenCV": lambda data: cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)}


def decode_all(decode: Decode, files: list[bytes]) -> None:
    for data in files:
        decode(data)


def decode_lines(films: list[Film]) -> tuple[list[Ratio], Decode]:
    """Return ours against each decoder, the nearest first, and the fastest decoder."""
    kept = np.empty(max(film.height * film.width * 3 for film in films), np.uint8)
    files = [frame for film in films for frame in film.frames]

    def ours() -> None:
        for film in films:
            for frame in film.frames:
                decode_frame(frame, "jpeg", height=film.height, width=film.width, out=kept)

    found = decoders()
    lines = {
        name: measure(
            f"JPEG frames into a kept buffer vs {name} alone",
            ours=ours,
            other=lambda decode=decode: decode_all(decode, files),  # type: ignore[misc]
            target=1.2,
            at_least=False,
            pairs=5,
        )
        for name, decode in found.items()
    }
    fastest = min(lines, key=lambda name: lines[name].other_ms)
    return sorted(lines.values(), key=lambda line: -line.ratio), found[fastest]


def row_lines(films: list[Film], fastest: Decode) -> list[Ratio]:
    """Return what the way from JPEG to rows adds to its two halves, and the second half against the plain way."""
    pictures, num_rows = make_pictures(films)
    rows = np.empty((num_rows, num_patch_columns()), np.float32)
    stacks = [
        np.stack([decode_frame(frame, "jpeg", height=film.height, width=film.width) for frame in film.frames]) for film in films
    ]
    decoder = PictureDecoder()

    def patches_alone() -> None:
        for picture, stack in zip(pictures, stacks, strict=True):
            patchify(stack, out=rows[picture.first_row :][: picture.num_rows])

    def alone() -> None:
        for film in films:
            decode_all(fastest, film.frames)
        patches_alone()

    return [
        measure(
            "JPEG frames to patch rows vs the fastest decoder and patches alone",
            ours=lambda: decoder.decode(pictures, rows),
            other=alone,
            target=1.2,
            at_least=False,
            pairs=5,
        ),
        measure(
            "patch rows of decoded frames vs moving all bytes first, then normalising",
            ours=patches_alone,
            other=lambda: [move_then_normalise(stack) for stack in stacks],
            target=1.0,
            at_least=True,
            pairs=5,
        ),
    ]


def move_then_normalise(frames: Uint8Array) -> np.ndarray:
    """Return patch rows the plain way: one transposed copy of all bytes, then floats."""
    num_frames, height, width, _ = frames.shape
    blocks = frames.reshape(num_frames // 2, 2, height // 28, 2, 14, width // 28, 2, 14, 3)
    pixels = blocks.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(-1, num_patch_columns())
    mean = np.repeat(np.float32([0.48145466, 0.4578275, 0.40821073]) * 255, 392)
    std = np.repeat(np.float32([0.26862954, 0.26130258, 0.27577711]) * 255, 392)
    return (pixels.astype(np.float32) - mean) / std


def record_of(sample: EncodedSample) -> Record:
    """Return a sample as the stream reads it."""
    members = to_members(sample)
    arrays = {name: np.load(io.BytesIO(members[f"{name}.npy"])) for name in ("tokens", "mel")}
    views = memoryview(members["frames.mjpg"]), memoryview(members["json"])
    return Record(sample.key, sample.source, {"tokens": arrays["tokens"]}, arrays["mel"], *views, "jpeg")


def pack_line(fastest: Decode) -> Ratio:
    """Return packing 24 samples of the corpus, four to a bin, against decoding their frames and making patches alone."""
    records = [record_of(stream_corpus.sample(number)) for number in range(24)]
    bins = [records[start : start + 4] for start in range(0, len(records), 4)]
    files = [
        bytes(record.frames[offset : offset + size])
        for record in records
        for item in record.vision
        for offset, size in zip(item.frame_offsets, item.frame_sizes, strict=True)
    ]
    stack = np.stack([np.asarray(fastest(data)) for data in files])
    if stack.shape[1] == 3:
        stack = stack.transpose(0, 2, 3, 1)
    stack = np.ascontiguousarray(stack)
    decoder = PictureDecoder()

    def alone() -> None:
        decode_all(fastest, files)
        patchify(stack)

    return measure(
        f"packed batches of 24 samples ({len(files)} frames, {sum(record.mel.shape[1] for record in records)} mel frames) "
        "vs decoder and patches alone",
        ours=lambda: [pack(one, decoder=decoder) for one in bins],
        other=alone,
        target=1.3,
        at_least=False,
        pairs=5,
    )


def run() -> list[Ratio]:
    """Return the lines of the benchmark table."""
    films = make_films()
    lines, fastest = decode_lines(films)
    return [*lines, *row_lines(films, fastest), pack_line(fastest)]
