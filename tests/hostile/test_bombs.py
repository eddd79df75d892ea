"""Decompression bombs, absurd sizes, rates, counts and times: the right reason, in bounded time and memory."""

import json

import pytest

from tests.hostile.bombs import Bomb, write_bombs
from tests.hostile.harness import Outcome, run_rows

ROW_LIMIT_S = 60.0
PEAK_LIMIT_MB = 1600
"""The largest is a picture at the default `max_source_pixels`; everything else stays far below."""


@pytest.fixture(scope="module")
def bombs(tmp_path_factory: pytest.TempPathFactory, ffmpeg: str) -> tuple[list[Bomb], list[Outcome]]:
    folder = tmp_path_factory.mktemp("bombs")
    made = write_bombs(folder, ffmpeg)
    rows = [json.dumps({"id": bomb.name, "messages": [{"role": "user", "content": [bomb.part]}]}) for bomb in made]
    (folder / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return made, run_rows(folder / "rows.jsonl", limit_s=ROW_LIMIT_S, memory_mb=12_000)


def test_every_bomb_ends_as_it_must_in_bounded_time_and_memory(bombs: tuple[list[Bomb], list[Outcome]]) -> None:
    wrong = []
    for bomb, outcome in zip(*bombs, strict=True):
        cost = f"{outcome.seconds:6.2f} s {outcome.peak_mb:5} MB"
        print(f"{bomb.name:40} {len(bomb.data) >> 10:6} KiB  {outcome.outcome:18} {cost}  {outcome.detail:.160}")
        if outcome.outcome not in bomb.expected or outcome.peak_mb > PEAK_LIMIT_MB or outcome.seconds > 10:
            wrong.append((bomb.name, outcome))
    assert not wrong
