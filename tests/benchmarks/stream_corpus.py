"""A dataset to stream from: samples made without any encoder, stored by OmniPrep's own writer, sealed with a manifest.

Of 5,000 samples, 340 KB each on average: text of 200 to 4,000 tokens (log-uniform), 60 % with 2 to 30 s of sound, 20 % with
a video of 8 frames. The values mean nothing; sizes, members and their descriptions are what a build would write. Sample i
is the same on every machine, but for the JPEG bytes, which are those of the installed Pillow.
"""

import atexit
import functools
import io
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from omniprep.profile import QWEN2_5_OMNI
from omniprep.shards.manifest import Manifest, ShardInfo, Totals, add_up, write_manifest
from omniprep.shards.members import MemberFormat
from omniprep.shards.writer import PartitionWriter, to_record
from omniprep.storage.folder import as_folder
from omniprep.types import EncodedAudio, EncodedSample, EncodedVision, Layout, Segment, SegmentKind, VideoTiming

NUM_SAMPLES = 5_000
HEIGHT, WIDTH, NUM_FRAMES = 364, 644, 8
"""640x360, as the model's grid rounds it."""
_NUM_JPEGS = 64


@functools.cache
def dataset(num_samples: int = NUM_SAMPLES) -> Path:
    """Return the folder of the dataset, 1.7 GB; it is made once a process and removed when that ends."""
    folder = Path(tempfile.mkdtemp(prefix="omniprep-stream-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    write_dataset(folder, samples(num_samples))
    return folder


def write_dataset(
    folder: Path | str,
    samples: Iterable[EncodedSample],
    *,
    form: MemberFormat | None = None,
    max_shard_bytes: int = 200 << 20,
) -> Manifest:
    """Store samples as a finished dataset: a partition for each source, shards of at most `max_shard_bytes`."""
    form = form or MemberFormat()
    place = as_folder(folder)
    writers: dict[str, PartitionWriter] = {}
    for sample in samples:
        if sample.source not in writers:
            writers[sample.source] = PartitionWriter(
                place, source=sample.source, partition=0, form=form, max_shard_bytes=max_shard_bytes
            )
        writers[sample.source].add(to_record(sample, form))
    found = [shard for _, writer in sorted(writers.items()) for shard in writer.close()]
    # The first shard of a partition has no number in its name: so sorted, sample i of the catalog is the i-th of its source.
    shards = tuple(sorted(found, key=lambda shard: (shard.source, len(shard.name), shard.name)))
    manifest = manifest_of(shards, form)
    write_manifest(place, manifest)
    return manifest


def manifest_of(shards: tuple[ShardInfo, ...], form: MemberFormat) -> Manifest:
    """Return the manifest of a dataset of these shards that no recipe made."""
    totals = add_up(("", shard.totals) for shard in shards).get("", Totals())
    return Manifest(
        omniprep="0",
        libraries={},
        profile=QWEN2_5_OMNI.name,
        kind=form.kind,
        rope_mode="aligned",
        frame_format=form.frame_format,
        mel_dtype=form.mel_dtype,
        members=form.names,
        tokenizer_sha256="",
        recipe={},
        recipe_sha256="",
        shards=shards,
        quarantine=(),
        totals=totals,
        by_split=add_up((shard.split, shard.totals) for shard in shards),
        by_source=add_up((shard.source, shard.totals) for shard in shards),
        by_modality=add_up(pair for shard in shards for pair in shard.modalities.items()),
        num_rows=totals.num_records,
        rejects={},
        rejects_by_source={},
    )


def samples(num_samples: int) -> Iterator[EncodedSample]:
    """Yield the first samples of the corpus."""
    return map(sample, range(num_samples))


def sample(number: int) -> EncodedSample:
    """Return one sample of the corpus."""
    draw = np.random.default_rng([5, number])
    length = int(200 * 20 ** draw.random())
    audio: tuple[EncodedAudio, ...] = ()
    vision: tuple[EncodedVision, ...] = ()
    blocks: list[tuple[SegmentKind, int]] = []
    if draw.random() < 0.6:
        num_samples = int(draw.integers(2 * 16_000, 30 * 16_000))
        audio = (_sound(num_samples, int(draw.integers(1 << 20))),)
        blocks.append(("audio", QWEN2_5_OMNI.num_audio_tokens(audio[0].num_mel_frames)))
    if draw.random() < 0.2:
        vision = (_video([int(k) for k in draw.integers(0, _NUM_JPEGS, NUM_FRAMES)]),)
        blocks.append(("video", QWEN2_5_OMNI.num_vision_tokens(vision[0].grid_thw)))
    return EncodedSample(
        key=f"bench-{number:08d}",
        layouts={"tokens": _layout(length, blocks, int(draw.integers(1 << 19)))},
        audio=audio,
        vision=vision,
        source="bench",
        row=number,
    )


def _layout(length: int, blocks: list[tuple[SegmentKind, int]], start: int) -> Layout:
    """Return a question about media and its answer, of `length` tokens or as many as the media need."""
    text = max(length - sum(count for _, count in blocks), 32)
    parts: list[tuple[SegmentKind, int, bool]] = [("control", 3, False), ("text", text // 4, False)]
    for kind, count in blocks:
        parts += [("control", 1, False), (kind, count, False), ("control", 1, False)]
    parts += [("control", 5, False), ("text", text - text // 4 - 10, True), ("control", 2, True)]
    segments: list[Segment] = []
    ids = _ids()[start : start + sum(count for _, count, _ in parts)].copy()
    labels = np.full(len(ids), -100, np.int32)
    special = {"audio": QWEN2_5_OMNI.special.audio, "video": QWEN2_5_OMNI.special.video}
    at = 0
    for kind, count, supervised in parts:
        stop = at + count
        if kind in special:
            ids[at:stop] = special[kind]
        if supervised:
            labels[at:stop] = ids[at:stop]
        segments.append(Segment(kind, at, stop, supervised, 0 if kind in special else -1))
        at = stop
    positions = np.tile(np.arange(at, dtype=np.int32), (3, 1))
    return Layout(input_ids=ids, labels=labels, position_ids=positions, segments=tuple(segments))


def _sound(num_samples: int, start: int) -> EncodedAudio:
    num_frames = QWEN2_5_OMNI.num_mel_frames(num_samples)
    mel = _noise()[start : start + 128 * num_frames].reshape(128, num_frames)
    return EncodedAudio(mel=mel, num_samples=num_samples, source="a.wav", decoder="soundfile")  # type: ignore[arg-type]


def _video(jpegs: list[int]) -> EncodedVision:
    return EncodedVision(
        kind="video",
        grid_thw=QWEN2_5_OMNI.grid_thw(NUM_FRAMES, HEIGHT, WIDTH),
        frames=tuple(_jpegs()[k] for k in jpegs),
        frame_format="jpeg",
        height=HEIGHT,
        width=WIDTH,
        source="v.mp4",
        second_per_grid=1.0,
        timing=VideoTiming(
            source_fps=25.0,
            num_source_frames=100,
            frame_indices=tuple(range(0, 96, 12)),
            frame_times_s=tuple(k * 0.48 for k in range(NUM_FRAMES)),
            sample_fps=2.0,
            decoder="decord",
        ),
    )


@functools.cache
def _ids() -> npt.NDArray[np.int32]:
    return np.random.default_rng(6).integers(0, 151_643, 1 << 20, dtype=np.int32)


@functools.cache
def _noise() -> npt.NDArray[np.float16]:
    return np.random.default_rng(5).standard_normal((1 << 20) + 128 * 3001, dtype=np.float32).astype(np.float16)


@functools.cache
def _jpegs() -> tuple[bytes, ...]:
    """Return pictures that are smooth over eight pixels, as film is."""
    from PIL import Image

    draw = np.random.default_rng(1)
    found = []
    for _ in range(_NUM_JPEGS):
        coarse = Image.fromarray(draw.integers(0, 255, (HEIGHT // 8, WIDTH // 8, 3), dtype=np.uint8))
        sink = io.BytesIO()
        coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC).save(sink, "JPEG", quality=85)
        found.append(sink.getvalue())
    return tuple(found)
