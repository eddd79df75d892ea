"""Small prepared datasets of every kind of media that the trainer's tests read: real files, encoded by the real build."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from omniprep.prepare import prepare
from omniprep.recipe import load_recipe
from tests.prepare_builders import write_media, write_rows

ENCODE = {
    "image": {"min_pixels": 3136, "max_pixels": 28 * 28 * 16},
    "video": {"min_pixels": 3136, "max_pixels": 28 * 28 * 16, "max_frames": 6},
}
"""Pictures of 16 tokens at most: a step of the tiny model takes as long as its tokens are many."""


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def chat(number: int, *parts: Mapping[str, Any], answer: str) -> dict[str, Any]:
    content = [*parts, text(f"What is number {number}?")]
    return {"id": f"id-{number}", "messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]}


def prefer(number: int, *parts: Mapping[str, Any]) -> dict[str, Any]:
    prompt = [{"role": "user", "content": [*parts, text(f"Which of {number}?")]}]
    return {"id": f"id-{number}", "prompt": prompt, "chosen": f"The first of {number}, for it is there.", "rejected": "None."}


MEDIA: tuple[tuple[dict[str, Any], ...], ...] = (
    (),
    ({"type": "audio", "audio": "a.wav"},),
    ({"type": "image", "image": "i.png"},),
    ({"type": "video", "video": "v.mp4", "audio_track": "v.mp4"},),
    ({"type": "video", "video": "silent.mp4"}, {"type": "audio", "audio": "a.wav"}),
)


def build(folder: Path, sources: Mapping[str, list[dict[str, Any]]], **settings: Any) -> str:
    """Prepare native records, a source for each name; return the place of the dataset."""
    for name, rows in sources.items():
        write_rows(folder / f"{name}.jsonl", rows)
    values = {
        "output": str(folder / "out"),
        "sources": [
            {"name": name, "kind": "jsonl", "path": str(folder / f"{name}.jsonl"), "media_root": str(folder.parent / "media")}
            for name in sources
        ],
        "encode": ENCODE,
        "run": {"rows_per_partition": 64, "executor": "serial", "guard": {"enabled": False}},
        **settings,
    }
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(values), encoding="utf-8")
    prepare(load_recipe(recipe))
    assert not list((folder / "out" / "quarantine").glob("*")), "every record is to be in the dataset"
    return str(folder / "out")


@pytest.fixture(scope="session")
def media(tmp_path_factory: pytest.TempPathFactory, ffmpeg: str) -> Path:
    """Return a folder beside which datasets are built, with the media that their records name."""
    root = tmp_path_factory.mktemp("train")
    write_media(root / "media", ffmpeg)
    return root


@pytest.fixture(scope="session")
def mixed(media: Path) -> str:
    """Conversations with text, sound, pictures, and video with and without sound: 36 to train on, some for validation."""
    rows = [
        chat(number, *MEDIA[number % len(MEDIA)], answer=f"It is {number}, as it was. " * (1 + number % 3))
        for number in range(40)
    ]
    return build(media / "mixed", {"even": rows[0::2], "odd": rows[1::2]}, splits={"val": 0.15})


@pytest.fixture(scope="session")
def pairs(media: Path) -> str:
    """Preferences about text, sound, pictures and video with sound."""
    rows = [prefer(number, *MEDIA[number % 4]) for number in range(16)]
    return build(media / "pairs", {"pairs": rows}, kind="preference", splits={"val": 0.2})


@pytest.fixture(scope="session")
def whole(mixed: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run in one process that never stopped: more than an epoch, all parameters."""
    from tests.train.runs import STEPS, recipe, train

    output = tmp_path_factory.mktemp("whole")
    assert train(recipe(output, mixed, steps=STEPS)) == ["done"]
    return output
