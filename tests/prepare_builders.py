"""A small corpus on disk: every kind of record, and records that must be rejected."""

import hashlib
import json
import subprocess
from pathlib import Path

import numpy as np
import yaml

from omniprep.recipe import Recipe, load_recipe


def chat(number: int, *parts: dict, **more: object) -> dict:
    content = [{"type": "text", "text": f"question {number}"}, *parts]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": f"answer {number}"}]
    return {"id": f"id-{number}", "messages": messages, **more}


def write_rows(path: Path, rows: list[object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return path


def write_media(folder: Path, ffmpeg: str | None = None) -> None:
    import soundfile
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    soundfile.write(folder / "a.wav", rng.normal(0, 0.1, 24_000).astype(np.float32), 16_000)
    Image.fromarray(rng.integers(0, 256, (60, 90, 3), np.uint8)).save(folder / "i.png")
    (folder / "empty.png").touch()
    if ffmpeg is not None:
        inputs = ["-f", "lavfi", "-i", "testsrc=s=160x120:r=10:d=3", "-f", "lavfi", "-i", "sine=d=3"]
        subprocess.run([ffmpeg, "-v", "error", *inputs, "-pix_fmt", "yuv420p", str(folder / "v.mp4")], check=True)
        subprocess.run([ffmpeg, "-v", "error", *inputs[:4], "-pix_fmt", "yuv420p", str(folder / "silent.mp4")], check=True)


def write_recipe(folder: Path, rows: list[object], **settings: object) -> Path:
    write_rows(folder / "data" / "chat.jsonl", rows)
    values = {
        "output": str(folder / "out"),
        "sources": [{"name": "chat", "kind": "jsonl", "path": "data/chat.jsonl"}],
        "run": {"rows_per_partition": 4, "executor": "serial", "guard": {"enabled": False}},
        **settings,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def recipe(folder: Path, rows: list[object], *, output: str | None = None, **settings: object) -> Recipe:
    return load_recipe(write_recipe(folder, rows, **settings), output=output)


def tree(folder: Path) -> dict[str, str]:
    """Return the digest of every file that belongs to the dataset."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        # Where the recipe lay and when its inputs were written may differ.
        if path.is_file() and path.name != "place.json" and not path.name.endswith(".inputs.parquet")
    }


def last_write(path: Path) -> tuple[int, int]:
    """Return what differs after a file was written anew: the number of a deleted file's inode is given out again."""
    status = path.stat()
    return status.st_ino, status.st_mtime_ns
