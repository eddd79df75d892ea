"""`verify --against transformers` finds what digests cannot: a dataset that agrees with itself and is wrong."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from omniprep.prepare import prepare
from omniprep.shards.manifest import add_up, read_manifest, write_manifest
from omniprep.shards.reader import iter_samples
from omniprep.shards.writer import PartitionWriter, to_record
from omniprep.storage.folder import open_folder
from omniprep.types import EncodedSample, Layout, Segment
from omniprep.verify import verify
from omniprep.verify_reference import Parity, verify_against_transformers
from tests.prepare_builders import chat, recipe, write_media

pytestmark = [pytest.mark.reference, pytest.mark.filterwarnings("ignore")]

LONG = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a long answer " * 200}]}
ROWS = [
    chat(0, {"audio": "a.wav"}),
    chat(1, {"image": "i.png"}, {"image": "i.png"}),
    chat(2, {"video": "v.mp4"}),
    chat(3, {"video": "silent.mp4"}),
    {"parts": [{"text": "before"}, {"image": "i.png"}, {"text": "between"}, {"audio": "a.wav"}]},
    LONG,
]
PAIR = [{"prompt": [{"role": "user", "content": [{"image": "i.png"}, {"text": "?"}]}], "chosen": "yes", "rejected": "no"}]


def compare(folder: Path, rows: list, **settings: object) -> Parity:
    prepare(recipe(folder, rows, **settings))
    assert list(verify(folder / "out")) == []
    return verify_against_transformers(folder / "out", limit=None, inputs=None)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory, ffmpeg: str) -> Path:
    folder = tmp_path_factory.mktemp("against")
    write_media(folder / "data", ffmpeg)
    found = compare(folder, ROWS, shards={"mel_dtype": "float32"})
    assert (found.findings, found.skipped, len(found.comparisons)) == ([], {}, len(ROWS))
    return folder


@pytest.mark.parametrize(
    ("settings", "rows"),
    [
        ({"encode": {"template": {"add_vision_id": True, "add_audio_id": True}}}, ROWS),
        ({"encode": {"template": {"system_prompt": ""}}}, ROWS[:2]),
        ({"encode": {"max_tokens": 300, "on_overflow": "truncate_text"}}, [LONG, *ROWS[:2]]),
        ({"encode": {"rope_mode": "reference", "frame_format": "raw"}}, ROWS),
        ({"kind": "preference"}, PAIR),
    ],
    ids=["numbered media", "no system prompt", "text cut off", "reference", "preferences"],
)
def test_every_recipe_that_is_right_is_found_equal(sound: Path, tmp_path: Path, settings: dict, rows: list) -> None:
    shutil.copytree(sound / "data", tmp_path / "data")
    found = compare(tmp_path, rows, **settings)
    assert (found.findings, found.skipped, len(found.comparisons)) == ([], {}, len(rows))


def rewritten(sound: Path, folder: Path, number: int, change: Callable[[list[EncodedSample]], EncodedSample]) -> Path:
    """Return a copy of the dataset in which one sample is another, with digests, index and sums that fit it."""
    out = Path(shutil.copytree(sound / "out", folder / "out"))
    manifest = read_manifest(out)
    samples = list(iter_samples(out))
    samples[number] = change(samples)
    shards = []
    for shard in manifest.shards:
        writer = PartitionWriter(
            open_folder(str(out)),
            source=shard.source,
            partition=shard.partition,
            form=manifest.member_format,
            max_shard_bytes=1 << 30,
        )
        for sample in samples:
            if sample.row // 4 == shard.partition:
                writer.add(to_record(sample, manifest.member_format))
        shards += writer.close()
    changes = {
        "shards": tuple(shards),
        "totals": add_up(("", shard.totals) for shard in shards)[""],
        "by_split": add_up((shard.split, shard.totals) for shard in shards),
        "by_source": add_up((shard.source, shard.totals) for shard in shards),
        "by_modality": add_up(pair for shard in shards for pair in shard.modalities.items()),
    }
    write_manifest(out, manifest.model_copy(update=changes))
    return out


def with_layout(sample: EncodedSample, **changes: object) -> EncodedSample:
    return replace(sample, layouts={"tokens": replace(sample.layouts["tokens"], **changes)})


def supervised_off(layout: Layout, segment: Segment) -> Layout:
    labels = layout.labels.copy()
    labels[segment.start : segment.stop] = -100
    segments = tuple(one._replace(supervised=False) if one == segment else one for one in layout.segments)
    return replace(layout, labels=labels, segments=segments)


def flipped_label(samples: list[EncodedSample]) -> EncodedSample:
    labels = samples[0].layouts["tokens"].labels.copy()
    labels[np.flatnonzero(labels != -100)[0]] = -100
    return with_layout(samples[0], labels=labels)


def answer_not_supervised(samples: list[EncodedSample]) -> EncodedSample:
    layout = samples[0].layouts["tokens"]
    segment = next(segment for segment in layout.segments if segment.supervised)
    return replace(samples[0], layouts={"tokens": supervised_off(layout, segment)})


def shifted_position(samples: list[EncodedSample]) -> EncodedSample:
    positions = samples[0].layouts["tokens"].position_ids.copy()
    positions[:, 5:] += 1
    return with_layout(samples[0], position_ids=positions)


def late_video(samples: list[EncodedSample]) -> EncodedSample:
    """Every frame of the last grid step one id later: no rule of a layout forbids it."""
    layout = samples[3].layouts["tokens"]
    positions = layout.position_ids.copy()
    video = next(segment for segment in layout.segments if segment.kind == "video")
    inside = positions[:, video.start : video.stop]
    inside[0, inside[0] == inside[0].max()] += 1
    positions[:, video.stop :] += 1
    return with_layout(samples[3], position_ids=positions)


def swapped_segments(samples: list[EncodedSample]) -> EncodedSample:
    """The sound of the first two seconds before its frames."""
    layout = samples[2].layouts["tokens"]
    number = next(number for number, segment in enumerate(layout.segments) if segment.kind == "video")
    video, audio = layout.segments[number : number + 2]
    order = np.r_[: video.start, audio.start : audio.stop, video.start : video.stop, audio.stop : layout.num_tokens]
    length = audio.stop - audio.start
    moved = (
        audio._replace(start=video.start, stop=video.start + length),
        video._replace(start=video.start + length, stop=audio.stop),
    )
    return with_layout(
        samples[2],
        input_ids=layout.input_ids[order],
        labels=layout.labels[order],
        position_ids=layout.position_ids[:, order],
        segments=(*layout.segments[:number], *moved, *layout.segments[number + 2 :]),
    )


def frames_of_another(samples: list[EncodedSample]) -> EncodedSample:
    one, other = samples[2].vision[0], samples[3].vision[0]
    return replace(samples[2], vision=(replace(one, frames=other.frames[::-1]),))


def wrong_grid(samples: list[EncodedSample]) -> EncodedSample:
    item = samples[1].vision[0]
    steps, height, width = item.grid_thw
    return replace(samples[1], vision=(replace(item, grid_thw=(steps, width, height)), *samples[1].vision[1:]))


def wrong_rate(samples: list[EncodedSample]) -> EncodedSample:
    return replace(samples[3], vision=(replace(samples[3].vision[0], second_per_grid=2.0),))


def late_sound(samples: list[EncodedSample]) -> EncodedSample:
    return replace(samples[2], audio=(replace(samples[2].audio[0], start_s=0.5),))


def sound_of_nothing(samples: list[EncodedSample]) -> EncodedSample:
    item = samples[0].audio[0]
    return replace(samples[0], audio=(replace(item, mel=np.full_like(item.mel, -1.5)),))


@pytest.mark.parametrize(
    ("number", "change", "by_rules", "message"),
    [
        (0, flipped_label, True, "tokens.labels"),
        (0, answer_not_supervised, False, "tokens.labels"),
        (0, shifted_position, True, "tokens.position_ids"),
        (3, late_video, False, "tokens.position_ids"),
        (2, swapped_segments, False, "tokens.input_ids"),
        (2, frames_of_another, False, "video 0: frames"),
        (1, wrong_grid, True, "image 0: grid_thw"),
        (3, wrong_rate, False, "video 0: second_per_grid"),
        (2, late_sound, False, "audio 0: start_s"),
        (0, sound_of_nothing, False, "audio 0: mel"),
    ],
    ids=lambda value: value.__name__ if callable(value) else None,
)
def test_a_wrong_sample_is_found(
    sound: Path, tmp_path: Path, number: int, change: Callable, by_rules: bool, message: str
) -> None:
    out = rewritten(sound, tmp_path, number, change)
    assert bool(list(verify(out))) == by_rules
    found = verify_against_transformers(out, limit=None, inputs=sound).findings
    assert [(item.key, message in item.message) for item in found] == [(f"chat-{number:08d}", True)], found
    assert read_manifest(out).parity == read_manifest(sound / "out").parity
