"""How long a trainer waits for its data: of the wall time of its steps, the share that it waits, with one reading thread.

The whole trainer with the tiny Thinker on speech, film, photos and dialogues, all parameters learning. A step of so small a
model is the hardest case for what reads: a larger one gives it more time. The first step is left out, for it waits for the
first batch to be read; so does each epoch's first, and there is one epoch here.
"""

import json
import tempfile
from pathlib import Path

import corpus
from ratios import Ratio

from omniprep.config import parse_config
from omniprep.prepare import prepare
from omniprep.recipe import Recipe
from omniprep.train.progress_log import LOG_NAME, read_log
from omniprep.train.recipe import TrainRecipe
from omniprep.train.thinker import train

COPIES = {"film": 12, "speech": 4, "photos": 2, "dialogues": 1}
"""How often each small corpus is repeated, so that every row of the plan has media in it."""
MAX_TOKENS = 4096
ALL = ["audio_encoder", "audio_adapter", "vision_encoder", "vision_adapter", "language_model", "head"]


def _dataset(folder: Path) -> Path:
    rows = {
        "film": corpus.film(),
        "speech": corpus.speech(),
        "photos": corpus.photos(),
        "dialogues": [one for one in corpus.dialogues(60) if len(json.dumps(one)) < 6_000],
    }
    lines = [json.dumps(record) + "\n" for name, records in rows.items() for record in records * COPIES[name]]
    (folder / "mixed.jsonl").write_text("".join(lines), encoding="utf-8")
    values = {
        "output": str(folder / "data"),
        "folder": str(folder),
        "sources": [{"name": "mixed", "kind": "jsonl", "path": "mixed.jsonl"}],
        "media": {"roots": [str(corpus.CACHE)]},
        "encode": {"max_tokens": MAX_TOKENS, "video": {"max_pixels": 100_352}, "image": {"max_pixels": 200_704}},
        "run": {"executor": "serial"},
    }
    manifest = prepare(parse_config(Recipe, values, place="bench_train"))
    assert manifest.num_rows == manifest.totals.num_records, manifest.rejects
    return folder / "data"


def run() -> list[Ratio]:
    """Return the share of waiting."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = {"datasets": [str(_dataset(folder))], "num_threads": 1, "validation_split": None}
        values = {
            "output": str(folder / "run"),
            "data": {**data, "plan": {"max_tokens": MAX_TOKENS, "global_batch_size": 1}},
            "phases": [{"name": "all", "train": ALL, "epochs": 1}],
            "checkpoints": {"every_steps": None},
            "watch": {"log_every": 1},
        }
        train(parse_config(TrainRecipe, values, place="bench_train"))
        steps = read_log(folder / "run" / "all" / LOG_NAME, kind="step")[1:]
    assert len(steps) >= 8, len(steps)
    step_s = sum(step["step_s"] for step in steps)
    wait_s = sum(step["step_s"] * step["wait_share"] for step in steps)
    return [
        Ratio(
            name="waiting for data in a training step of a tiny Thinker, one thread reads (wall time)",
            ours_ms=wait_s * 1e3 / len(steps),
            other_ms=step_s * 1e3 / len(steps),
            ratio=wait_s / step_s,
            target=0.01,
            at_least=False,
        )
    ]
