"""Small datasets on the disk for the tests of reading, and what must come out of them."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from omniprep.shards.manifest import Manifest
from omniprep.shards.members import MemberFormat
from omniprep.stream.record import Record
from omniprep.types import EncodedSample
from tests.benchmarks.stream_corpus import write_dataset
from tests.shards.builders import media_sample, preference_sample, text_sample

SAMPLES = tuple(
    replace(media_sample() if row % 3 == 1 else text_sample(length=5 + row), key=f"mix-{row:08d}", source="mix", row=row)
    for row in range(14)
)
PREFERENCES = tuple(preference_sample(f"dpo-{row:08d}") for row in range(4))


def stored(
    folder: Path | str,
    samples: tuple[EncodedSample, ...] = SAMPLES,
    *,
    form: MemberFormat | None = None,
    max_shard_bytes: int = 80_000,
) -> Manifest:
    """Write samples as a dataset, in several shards."""
    return write_dataset(folder, samples, form=form, max_shard_bytes=max_shard_bytes)


def assert_same(record: Record, sample: EncodedSample) -> None:
    """Check everything that a record says of a sample."""
    assert (record.key, record.source) == (sample.key, sample.source)
    assert list(record.tokens) == list(sample.layouts)
    for name, layout in sample.layouts.items():
        expected = np.stack([layout.input_ids, layout.labels, *layout.position_ids])
        np.testing.assert_array_equal(record.tokens[name], expected)
        assert record.tokens[name].dtype == np.int32
    assert len(record.audio) == len(sample.audio)
    for item, audio in zip(record.audio, sample.audio, strict=True):
        stop = item.mel_offset + item.num_mel_frames
        np.testing.assert_array_equal(record.mel[:, item.mel_offset : stop].astype(np.float32), audio.mel)
        assert item.num_samples == audio.num_samples
    assert record.mel.shape == (128, sum(audio.num_mel_frames for audio in sample.audio))
    assert len(record.vision) == len(sample.vision)
    for item, vision in zip(record.vision, sample.vision, strict=True):
        spans = zip(item.frame_offsets, item.frame_sizes, strict=True)
        assert tuple(bytes(record.frames[start : start + size]) for start, size in spans) == vision.frames
        facts = (item.kind, item.grid_thw, item.height, item.width, item.audio_index, item.second_per_grid)
        assert facts == (vision.kind, vision.grid_thw, vision.height, vision.width, vision.audio_index, vision.second_per_grid)
