"""Whole runs: what must not matter does not, stopping and going on changes nothing, and every stage learns."""

from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.reference
torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from tests.train.runs import assert_same_run, column, lines, recipe, train, weights  # noqa: E402

STEPS = 8


@pytest.fixture(scope="module")
def whole(mixed: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run in one process that never stopped: two epochs, all parameters."""
    output = tmp_path_factory.mktemp("whole")
    assert train(recipe(output, mixed, steps=STEPS)) == ["done"]
    return output


def test_losses_go_down_and_every_step_is_logged_once(whole: Path) -> None:
    losses = column(whole, "loss")
    assert column(whole, "step") == list(range(1, STEPS + 1))
    assert losses[-1] < losses[0] - 1
    print(losses, column(whole,"step_s"), lines(whole)[0], lines(whole, kind="validation"))


def test_two_ranks_are_one_process(whole: Path, mixed: str, tmp_path: Path) -> None:
    assert train(recipe(tmp_path, mixed, steps=STEPS), num_ranks=2) == ["done", "done"]
    assert_same_run(tmp_path, whole, rel=1e-5)


def test_a_run_that_stops_goes_on_as_if_it_had_not(whole: Path, mixed: str, tmp_path: Path) -> None:
    again = recipe(tmp_path, mixed, steps=STEPS)
    # Step 3 is one to validate after: that is made up for.
    assert train(again, stop_in=3) == ["stopped after step 3, which is saved; the same command goes on from there"]
    assert column(tmp_path, "step") == [1, 2, 3]
    assert column(tmp_path, "step", kind="validation") == []
    assert train(again) == ["done"]
    assert_same_run(tmp_path, whole, rel=1e-6)
    ours, theirs = weights(tmp_path), weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
