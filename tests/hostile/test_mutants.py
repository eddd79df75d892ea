"""Broken media of every kind go through the encoder: each is encoded or rejected with a reason. None crashes or hangs it.

`OMNIPREP_MUTANTS=20000 OMNIPREP_MUTANT_SEED=7 pytest tests/hostile/test_mutants.py -s` tries more and prints the table.
"""

import json
import os
from pathlib import Path

import pytest

from tests.hostile.harness import run_rows, table
from tests.hostile.mutants import make_seeds, write_corpus

NUM_MUTANTS = int(os.environ.get("OMNIPREP_MUTANTS", "2200"))
SEED = int(os.environ.get("OMNIPREP_MUTANT_SEED", "0"))
ROW_LIMIT_S = 20.0
PEAK_LIMIT_MB = 1500


@pytest.mark.media
def test_every_mutant_is_encoded_or_rejected_with_a_reason(tmp_path: Path, samples: Path) -> None:
    rows = write_corpus(tmp_path, NUM_MUTANTS, SEED, samples=samples)
    names = [json.loads(line)["id"] for line in rows.read_bytes().splitlines()]
    outcomes = run_rows(rows, limit_s=ROW_LIMIT_S)
    print(table(names, outcomes))
    print(f"slowest {max(o.seconds for o in outcomes):.2f} s, peak {max(o.peak_mb for o in outcomes)} MB")
    assert [outcome.number for outcome in outcomes] == list(range(NUM_MUTANTS))
    assert [(names[o.number], o.outcome, o.detail) for o in outcomes if o.is_fault] == []
    assert max(o.peak_mb for o in outcomes) < PEAK_LIMIT_MB
    # Neither side may be empty: a corpus in which all is refused at the door would prove nothing.
    assert sum(o.outcome == "encoded" for o in outcomes) > NUM_MUTANTS // 10
    assert len({o.outcome for o in outcomes}) > 5


@pytest.mark.media
def test_the_files_that_are_mutated_decode_themselves(tmp_path: Path, samples: Path) -> None:
    seeds = make_seeds(tmp_path / "seeds", samples)
    (tmp_path / "media").mkdir()
    lines = []
    for seed in seeds:
        (tmp_path / "media" / seed.name).write_bytes(seed.data)
        part = {"type": seed.kind, seed.kind: f"media/{seed.name}"}
        lines.append(json.dumps({"id": seed.name, "messages": [{"role": "user", "content": [part]}]}))
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    outcomes = run_rows(tmp_path / "rows.jsonl")
    assert [(seeds[o.number].name, o.detail) for o in outcomes if o.outcome != "encoded"] == []


def test_the_same_seed_gives_the_same_corpus(tmp_path: Path) -> None:
    first = write_corpus(tmp_path / "a", 60, 3)
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "seeds").rename(tmp_path / "b" / "seeds")  # encoders need not be repeatable
    second = write_corpus(tmp_path / "b", 60, 3)
    assert first.read_bytes() == second.read_bytes()
    for path in sorted((tmp_path / "a" / "media").iterdir()):
        assert path.read_bytes() == (tmp_path / "b" / "media" / path.name).read_bytes()


def test_the_harness_tells_a_hang_and_a_crash_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child = tmp_path / "child.py"
    child.write_text(
        "import sys, os, time, json\n"
        "for n in range(int(sys.argv[2]), 4):\n"
        "    print(f'start {n}', flush=True)\n"
        "    time.sleep(60) if n == 1 else os.abort() if n == 2 else None\n"
        "    print(json.dumps({'number': n, 'outcome': 'encoded'}), flush=True)\n"
    )
    monkeypatch.setattr("tests.hostile.harness.CHILD", child)
    (tmp_path / "rows.jsonl").write_text("{}\n" * 4)
    outcomes = run_rows(tmp_path / "rows.jsonl", limit_s=1.0)
    assert [o.outcome for o in outcomes] == ["encoded", "hang", "crash: -6", "encoded"]
    assert [o.is_fault for o in outcomes] == [False, True, True, False]
