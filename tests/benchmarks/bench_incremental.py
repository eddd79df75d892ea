"""What a second build costs: the demo corpus many times over, then with 1 % more records, then with another system prompt.

Every copy has media of its own: sounds and pictures differ by a few bytes after their end, film clips by a shifted cut, so
no copy finds another's encoded media in the cache. Wall time of the whole of `prepare` with two workers, on a Ray that is
already up; what starting a process and Ray takes, once a run, is not in it.
"""

import json
import shutil
import struct
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from ratios import Ratio

from omniprep.config import parse_config
from omniprep.prepare import prepare
from omniprep.recipe import Recipe
from omniprep.run.ray_cluster import RayOptions, session
from omniprep.shards.manifest import Manifest

ROOT = Path(__file__).parents[2]
COPIES = 20
ADDED_EVERY = 5
"""Of one more copy every fifth row is added: 1 % of twenty copies. What a second build takes whatever is added (the last
partition of each source is done again) is a second or two, so the share falls with the number of copies."""


def run() -> list[Ratio]:
    """Return the time of both second builds as a share of the first."""
    with tempfile.TemporaryDirectory() as name, session(RayOptions(num_workers=2)):
        folder = Path(name)
        corpus = DemoCorpus(folder)
        for copy in range(COPIES):
            corpus.add(copy)
        _build(corpus.recipe(output="warm-up", limit=2))  # both workers import and build their encoder once
        full_s, full = _build(corpus.recipe())
        corpus.add(COPIES, every=ADDED_EVERY)
        added_s, added = _build(corpus.recipe())
        share = (added.num_rows - full.num_rows) / full.num_rows
        text_s, text = _build(corpus.recipe(system_prompt="You answer in one friendly sentence."))
        assert text.num_rows == added.num_rows
    more = f"prepare again with {share:.1%} more records ({full.num_rows:,} before), of the full time"
    return [
        _share(more, added_s, full_s, 0.03),
        _share("prepare again with another system prompt, of the full time", text_s, full_s, 0.10),
    ]


def _share(name: str, ours_s: float, full_s: float, target: float) -> Ratio:
    return Ratio(name=name, ours_ms=ours_s * 1e3, other_ms=full_s * 1e3, ratio=ours_s / full_s, target=target, at_least=False)


def _build(recipe: Recipe) -> tuple[float, Manifest]:
    start = time.perf_counter()
    manifest = prepare(recipe, mode="update")
    return time.perf_counter() - start, manifest


class DemoCorpus:
    """The sources of `pipelines/demo.yaml`, written again with media of their own for each copy."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._recipe: dict[str, Any] = yaml.safe_load((ROOT / "pipelines" / "demo.yaml").read_text(encoding="utf-8"))

    def add(self, copy: int, *, every: int = 1) -> None:
        """Append a copy's rows, or every so many of them, to the files of all sources."""
        for source in self._recipe["sources"]:
            path = (ROOT / "pipelines" / source["path"]).resolve()
            media = (ROOT / "pipelines" / source["media_root"]).resolve() if "media_root" in source else path.parent
            with (self._folder / f"{source['name']}.jsonl").open("a", encoding="utf-8") as file:
                for row in read_rows(path)[: source.get("limit")][::every]:
                    file.write(json.dumps(self._copied(row, media, copy)) + "\n")

    def recipe(self, *, output: str = "out", limit: int | None = None, system_prompt: str | None = None) -> Recipe:
        """Return the demo's recipe over what was added so far."""
        sources = [
            {**source, "path": f"{source['name']}.jsonl", "media_root": "media", "limit": limit}
            for source in self._recipe["sources"]
        ]
        values = {
            **self._recipe,
            "output": str(self._folder / output),
            "folder": str(self._folder),
            "sources": sources,
            "encode": {**self._recipe["encode"], "template": {"system_prompt": system_prompt}},
            "run": {**self._recipe["run"], "media_cache": str(self._folder / "cache")},
        }
        return parse_config(Recipe, values, place="bench_incremental")

    def _copied(self, value: Any, media: Path, copy: int) -> Any:
        """Return a row with its media replaced by this copy's; cuts of the long film are shifted by a frame a copy."""
        if isinstance(value, str) and len(value) < 200 and (media / value).is_file():
            return str(self._stamped(media / value, copy))
        if isinstance(value, list):
            return [self._copied(item, media, copy) for item in value]
        if isinstance(value, dict):
            copied = {key: self._copied(item, media, copy) for key, item in value.items()}
            shifted = {key: copied[key] + copy / 24 for key in ("video_start", "video_end") if copied.get(key) is not None}
            return {**copied, **shifted}
        return value

    def _stamped(self, path: Path, copy: int) -> Path:
        shared = path.stat().st_size > 4 << 20
        target = self._folder / "media" / ("shared" if shared else str(copy)) / path.name
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            if shared:
                shutil.copyfile(path, target)
            else:
                target.write_bytes(stamped(path.read_bytes(), path.suffix, copy))
        return target


def read_rows(path: Path) -> list[Any]:
    """Return the rows of a JSON array or of JSON lines."""
    text = path.read_text(encoding="utf-8")
    rows: list[Any] = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines()]
    return rows


def stamped(data: bytes, suffix: str, copy: int) -> bytes:
    """Return a media file with a note that every reader skips."""
    note = f"copy {copy}".encode().ljust(16)
    match suffix:
        case ".mp4":
            return data + struct.pack(">I4s", 8 + len(note), b"free") + note
        case ".wav" | ".avi":
            return data[:4] + struct.pack("<I", len(data) + len(note)) + data[8:] + struct.pack("<4sI", b"JUNK", len(note)) + note
        case ".mp3":
            return data + b"TAG" + note.ljust(125, b"\0")
        case _:
            return data + note


if __name__ == "__main__":
    for ratio in run():
        print(ratio)
