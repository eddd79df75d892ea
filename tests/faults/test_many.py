"""Builds in which very much is wrong: a hopeless one ends early, and of thousands of damaged media all are accounted for.

`OMNIPREP_FAULT_MUTANTS=20000 pytest tests/faults/test_many.py -s` tries more mutants and prints the table.
"""

import os
import time
from collections import Counter
from pathlib import Path

import pytest
import yaml

from omniprep.storage.folder import open_folder
from tests.faults.builds import line_of_error, members, prepare, rejected_rows
from tests.faults.corpus import Corpus, write_recipe
from tests.hostile.mutants import write_corpus
from tests.prepare_builders import chat, write_rows

NUM_MUTANTS = int(os.environ.get("OMNIPREP_FAULT_MUTANTS", "2000"))
NUM_HOPELESS = 5000


@pytest.mark.fault("a hopeless build: every record is rejected")
def test_a_hopeless_build_ends_early(begin, survived, tmp_path: Path) -> None:
    corpus = Corpus(tmp_path / "own")
    rows = [chat(number, {"image": f"media/{number}.png"}) for number in range(NUM_HOPELESS)]
    write_rows(corpus.lines, rows)
    sources = [{"name": "chat", "kind": "jsonl", "path": "data/chat.jsonl"}]
    write_recipe(corpus, sources=sources, run={"rows_per_partition": 100, "max_reject_rate": 0.05})
    run = begin(prepare(corpus.recipe, tmp_path / "out"))
    assert run.wait() == 1
    told = line_of_error(run.told())
    num_done = len(rejected_rows(open_folder(str(tmp_path / "out"))))
    assert f"{num_done} of {NUM_HOPELESS} records are rejected (media_missing: {num_done})" in told
    assert "run.max_reject_rate=0.05" in told
    assert num_done == 300, "the first partition with which more than 5 % are certain"
    assert not (tmp_path / "out" / "manifest.json").exists()

    write_recipe(corpus, sources=sources, run={"rows_per_partition": 100, "max_reject_rate": 1.0})
    run = begin(prepare(corpus.recipe, tmp_path / "out"))
    assert run.wait() == 1, run.told()
    assert "3 of 50 partitions are finished already" in run.told()
    assert line_of_error(run.told()) == f"error: no record was stored: all {NUM_HOPELESS} were rejected"
    survived(tmp_path / "out", num_rows=NUM_HOPELESS, more=f"; was stopped after {num_done}, then let through")


@pytest.mark.fault("thousands of damaged media")
@pytest.mark.media
@pytest.mark.ray
def test_mutants(begin, survived, tmp_path: Path, samples: Path) -> None:
    rows = write_corpus(tmp_path / "own", NUM_MUTANTS, 0, samples=samples)
    recipe = tmp_path / "own" / "recipe.yaml"
    values = {
        "output": str(tmp_path / "out"),
        "sources": [{"name": "mutants", "kind": "jsonl", "path": rows.name}],
        "run": {"rows_per_partition": 100, "max_reject_rate": 1.0, "guard": {"timeout_s": 20.0}},
    }
    recipe.write_text(yaml.safe_dump(values))
    start = time.monotonic()
    run = begin(prepare(recipe, tmp_path / "out", "--workers", "2"))
    assert run.process.wait(timeout=max(300.0, NUM_MUTANTS / 4)) == 0, run.told()
    seconds = time.monotonic() - start
    assert "Traceback" not in run.told()
    reasons = Counter(row["reason"] for row in rejected_rows(open_folder(str(tmp_path / "out"))))
    stored = sum(name.endswith(".json") for name in members(tmp_path / "out"))
    print("\n".join(f"{count:6d}  {reason}" for reason, count in [("(stored)", stored), *reasons.most_common()]))
    assert stored > NUM_MUTANTS // 10
    assert len(reasons) > 5
    table = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common())
    survived(tmp_path / "out", num_rows=NUM_MUTANTS, more=f"; {table}; {seconds:.0f} s")
