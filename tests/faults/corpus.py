"""Sixty records of every kind in two sources, some of them bad: small enough to be built again for every fault."""

import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from tests.prepare_builders import chat, write_rows

NUM_LINES, NUM_TABLE_ROWS = 40, 20
BAD_LINES = {
    9: '{"id": "broken", "messages": [',
    23: chat(23, {"image": "media/none.png"}),
    31: chat(31, {"audio": "media/noise.wav"}),
}


@dataclass(frozen=True)
class Corpus:
    """A recipe with its inputs."""

    folder: Path

    @property
    def recipe(self) -> Path:
        return self.folder / "recipe.yaml"

    @property
    def lines(self) -> Path:
        return self.folder / "data" / "chat.jsonl"

    @property
    def media(self) -> Path:
        return self.folder / "data" / "media"

    def num_rows(self) -> int:
        """Count the rows that are there now, without OmniPrep."""
        table = self.folder / "data" / "photos.parquet"
        lines = sum(1 for line in self.lines.read_bytes().splitlines() if line.strip())
        return lines + (pq.read_metadata(table).num_rows if table.exists() else 0)

    def copy(self, folder: Path) -> "Corpus":
        """Return a copy that a test may change."""
        shutil.copytree(self.folder, folder, ignore=shutil.ignore_patterns("out*"))
        return Corpus(folder)


def lines_of(num_lines: int) -> list[object]:
    """Return rows: texts, and a picture, a sound or a film for some; each has a file of its own."""
    rows: list[object] = []
    for number in range(num_lines):
        kind, name = {1: ("image", "jpg"), 2: ("audio", "wav"), 4: ("video", "mp4") if number < 15 else ("image", "jpg")}.get(
            number % 5, ("", "")
        )
        rows.append(chat(number, *([{kind: f"media/{number:04d}.{name}"}] if kind else [])))
    return rows


def write_media_of(rows: list[object], folder: Path, originals: dict[str, Path]) -> None:
    """Give every medium that the rows name a copy of a real one."""
    folder.mkdir(parents=True, exist_ok=True)
    for row in rows:
        for part in row["messages"][0]["content"][1:] if isinstance(row, dict) else ():
            ((_, name),) = [(key, value) for key, value in part.items() if key != "type"]
            shutil.copyfile(originals[Path(name).suffix], folder / Path(name).name)


def originals_of(samples: Path, ffmpeg: str, folder: Path) -> dict[str, Path]:
    """Return a real photo, real speech cut to a second and a short film of moving pictures with sound, by suffix."""
    folder.mkdir(parents=True, exist_ok=True)
    data = samples / "llamafactory" / "data" / "mllm_demo_data"
    film, speech = folder / "film.mp4", folder / "speech.wav"
    cut = ["-i", str(data / "4.mp4"), "-t", "1", "-vf", "scale=128:-2", "-pix_fmt", "yuv420p", str(film)]
    subprocess.run([ffmpeg, "-v", "error", "-y", *cut], check=True)
    subprocess.run([ffmpeg, "-v", "error", "-y", "-i", str(data / "2.wav"), "-t", "1", str(speech)], check=True)
    return {".jpg": data / "3.jpg", ".wav": speech, ".mp4": film}


def write_corpus(folder: Path, samples: Path, ffmpeg: str) -> Corpus:
    """Write the corpus; 12 partitions of 5 rows."""
    corpus = Corpus(folder)
    originals = originals_of(samples, ffmpeg, folder / "originals")
    rows = lines_of(NUM_LINES)
    write_media_of(rows, corpus.media, originals)
    (corpus.media / "noise.wav").write_bytes(b"not a sound")
    write_rows(corpus.lines, [BAD_LINES.get(number, row) for number, row in enumerate(rows)])
    photo = originals[".jpg"].read_bytes()
    messages = [
        [
            {"role": "user", "content": [{"type": "image", "image": {"bytes": b"no photo" if number == 7 else photo}}]},
            {"role": "assistant", "content": [{"type": "text", "text": f"photo {number}", "image": None}]},
        ]
        for number in range(NUM_TABLE_ROWS)
    ]
    pq.write_table(pa.table({"messages": messages}), folder / "data" / "photos.parquet", row_group_size=5)
    write_recipe(corpus)
    return corpus


def write_recipe(corpus: Corpus, *, sources: list[dict] | None = None, run: dict | None = None, **settings: object) -> None:
    """Write the recipe. The guard is on: that is the default."""
    values = {
        "output": str(corpus.folder / "out"),
        "sources": sources
        or [
            {"name": "chat", "kind": "jsonl", "path": "data/chat.jsonl"},
            {"name": "photos", "kind": "parquet", "path": "data/photos.parquet"},
        ],
        "splits": {"val": 0.2},
        "encode": {"image": {"resize": "fast"}, "video": {"resize": "fast"}},
        **settings,
        "run": {"rows_per_partition": 5, **(run or {})},
    }
    corpus.recipe.write_text(yaml.safe_dump(values), encoding="utf-8")


def row_with(corpus: Corpus, name: str) -> int:
    """Return the number of the line that names a medium."""
    return next(number for number, line in enumerate(corpus.lines.read_text().splitlines()) if f'"media/{name}"' in line)


def rewrite_line(corpus: Corpus, number: int, row: object) -> None:
    """Exchange one line."""
    lines = corpus.lines.read_text().splitlines()
    lines[number] = json.dumps(row)
    corpus.lines.write_text("\n".join(lines) + "\n")
