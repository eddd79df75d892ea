"""Records of every kind of media, encoded from small files made here, as the reader of shards would give them."""

import io
from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
import soundfile
from PIL import Image

from omniprep.encode.model_inputs import model_inputs
from omniprep.encode.thinker import EncodeConfig, ThinkerEncoder
from omniprep.records import MediaBlob, parse_record
from omniprep.shards.members import MelDtype, MemberFormat, from_members, to_members
from omniprep.stream.record import Record
from omniprep.types import EncodedSample, FrameFormat, MediaFile

SMALL = {"min_pixels": 4 * 28 * 28, "max_pixels": 20 * 28 * 28}


def sound(seconds: float, seed: int) -> bytes:
    wave = 0.3 * np.random.default_rng(seed).standard_normal(round(seconds * 16_000)).astype(np.float32)
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, 16_000, format="WAV", subtype="PCM_16")
    return buffer.getvalue()


def picture(height: int, width: int, seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def clip(num_frames: int, seed: int) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.random.default_rng(seed).integers(0, 256, (num_frames, 84, 112, 3), dtype=np.uint8))
    return buffer.getvalue()


FILES = {
    "a.wav": sound(0.73, 1),
    "b.wav": sound(2.31, 2),
    "track.wav": sound(2.6, 3),
    "a.png": picture(112, 84, 4),
    "b.png": picture(56, 140, 5),
    "a.npy": clip(5, 6),
    "b.npy": clip(4, 7),
}
AUDIO = [{"type": "audio", "audio": name} for name in ("a.wav", "b.wav")]
IMAGES = [{"type": "image", "image": name, **SMALL} for name in ("a.png", "b.png")]
VIDEO = {"type": "video", "video": "a.npy", "sample_fps": 2.0, **SMALL}
VIDEO_WITH_SOUND = {"type": "video", "video": "b.npy", "sample_fps": 1.6, "audio_track": "track.wav", **SMALL}


def ask(*parts: dict[str, Any], answer: str = "Two lines, and a full stop.") -> dict[str, Any]:
    content = [*parts, {"type": "text", "text": "What is it?"}]
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]}


def prefer(*parts: dict[str, Any]) -> dict[str, Any]:
    prompt = [{"role": "user", "content": [*parts, {"type": "text", "text": "Which?"}]}]
    return {"prompt": prompt, "chosen": "The first, since it is there.", "rejected": "None."}


ROWS: dict[str, dict[str, Any]] = {
    "text": ask(),
    "dialogue": {"messages": [*ask()["messages"], *ask(answer="Four, as before.")["messages"]]},
    "audio": ask(AUDIO[0]),
    "sounds": ask(AUDIO[1], {"type": "text", "text": "or"}, AUDIO[0]),
    "image": ask(IMAGES[0]),
    "video": ask(VIDEO),
    "film": ask(VIDEO_WITH_SOUND),
    # Images before and after videos: the model takes all images and all videos of a row by themselves.
    "mixed": ask(IMAGES[0], VIDEO, AUDIO[1], VIDEO_WITH_SOUND, IMAGES[1], AUDIO[0]),
    # For pretraining: supervised from its first token on.
    "document": {"parts": [{"type": "text", "text": "It rains. "}, IMAGES[1], {"type": "text", "text": "It has stopped."}]},
    "text pair": prefer(),
    "media pair": prefer(IMAGES[1], VIDEO_WITH_SOUND, AUDIO[0]),
}
NAMES = tuple(ROWS)


@cache
def encoder() -> ThinkerEncoder:
    return ThinkerEncoder(EncodeConfig())


def encode(row: Mapping[str, Any], key: str, files: Mapping[str, bytes] | None = None) -> EncodedSample:
    def resolve(ref: str | MediaBlob) -> MediaFile:
        assert isinstance(ref, str)
        return MediaFile(name=ref, data=(files or FILES)[ref])

    return encoder().encode(parse_record(row), key=key, resolve=resolve)


def stored(
    sample: EncodedSample, *, mel_dtype: MelDtype = "float16", frame_format: FrameFormat = "jpeg"
) -> tuple[Record, EncodedSample]:
    """Return a sample as the stream reads it, and as `ShardReader` reads it: what was lost in storing is lost in both."""
    kind = "sequence" if "tokens" in sample.layouts else "preference"
    members = to_members(sample, MemberFormat(kind=kind, mel_dtype=mel_dtype, frame_format=frame_format))
    arrays = {name.removesuffix(".npy"): np.load(io.BytesIO(data)) for name, data in members.items() if name.endswith(".npy")}
    frames = members["frames.mjpg"] if frame_format == "jpeg" else arrays["frames"].tobytes()
    record = Record(
        key=sample.key,
        source="test",
        tokens={name: arrays[name] for name in sample.layouts},
        mel=arrays["mel"],
        frames=memoryview(frames),
        json=memoryview(members["json"]),
        frame_format=frame_format,
    )
    return record, from_members(members)


@cache
def both(name: str, mel_dtype: MelDtype = "float16") -> tuple[Record, EncodedSample]:
    return stored(encode(ROWS[name], name), mel_dtype=mel_dtype)


def record(name: str) -> Record:
    return both(name)[0]


def alone(name: str) -> dict[str, dict[str, np.ndarray]]:
    """Return the inputs of each of a record's sequences by itself, by the code that knows nothing of batches."""
    sample = both(name)[1]
    return {sequence: model_inputs(sample, sequence) for sequence in sample.layouts}
