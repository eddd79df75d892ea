"""One dataset with two Ray workers and with one, in wall time: the whole of `prepare`, on a Ray that is already up.

What cannot be parallel is in it (planning, receipts, the manifest); starting Ray (a few seconds, once a run) is not. It
is the best of three runs on both sides: two workers need two free cores, and company on them only ever adds time.
"""

import json
import random
import tempfile
import time
from pathlib import Path

import corpus
from ratios import Ratio

from omniprep.config import parse_config
from omniprep.prepare import prepare
from omniprep.recipe import Recipe
from omniprep.run.ray_cluster import RayOptions, session

COPIES = {"film": 24, "speech": 200, "text": 16}
"""How often each small corpus is repeated, so that each takes about the same time and all together about 15 s."""
NUM_PARTITIONS = 30
PAIRS = 3


def _recipe(folder: Path) -> Recipe:
    rows = {"film": corpus.film(), "speech": corpus.speech(), "text": corpus.dialogues()}
    lines = [json.dumps(record) + "\n" for name, records in rows.items() for record in records * COPIES[name]]
    random.Random(0).shuffle(lines)  # partitions that take about the same time, as shuffled corpora give
    (folder / "mixed.jsonl").write_text("".join(lines), encoding="utf-8")
    values = {
        "output": str(folder / "out"),
        "folder": str(folder),
        "sources": [{"name": "mixed", "kind": "jsonl", "path": "mixed.jsonl"}],
        "media": {"roots": [str(corpus.CACHE)]},
        "run": {"rows_per_partition": -(-len(lines) // NUM_PARTITIONS)},
    }
    return parse_config(Recipe, values, place="bench_ray")


def run() -> list[Ratio]:
    """Return the speed-up of the second worker."""
    walls: dict[int, list[float]] = {2: [], 1: []}
    with tempfile.TemporaryDirectory() as name, session(RayOptions(num_workers=2)):
        recipe = _recipe(Path(name))
        _wall_s(recipe, 2)  # both workers import, build their encoder and read the corpus once
        for _ in range(PAIRS):
            for workers, times in walls.items():
                times.append(_wall_s(recipe, workers))
    one_s, two_s = min(walls[1]), min(walls[2])
    return [
        Ratio(
            name="prepare with 2 Ray workers vs 1 (wall time, best of 3)",
            ours_ms=two_s * 1e3,
            other_ms=one_s * 1e3,
            ratio=one_s / two_s,
            target=1.8,
            at_least=True,
        )
    ]


def _wall_s(recipe: Recipe, workers: int) -> float:
    changed = recipe.model_copy(update={"run": recipe.run.model_copy(update={"workers": workers})})
    start = time.perf_counter()
    manifest = prepare(changed, overwrite=True)
    wall = time.perf_counter() - start
    assert manifest.num_rows == manifest.totals.num_records, manifest.rejects
    return wall
