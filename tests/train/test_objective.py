"""What objectives count, what they sum, and what they tell by document; means over ranks are those of all together."""

import math
from itertools import pairwise
from typing import Any

import pytest

from omniprep.stream.batch import pack
from tests.train.batches import batch_of

pytestmark = pytest.mark.reference
torch = pytest.importorskip("torch")

from omniprep.stream.dataset import to_torch  # noqa: E402
from omniprep.train.dpo import DpoSettings  # noqa: E402
from omniprep.train.objective import NextToken, PairPreference  # noqa: E402
from omniprep.train.parallel import World  # noqa: E402
from omniprep.train.tally import Tally  # noqa: E402
from tests.train.rank_work import ALONE  # noqa: E402
from tests.train.ranks import run_ranks  # noqa: E402


def some_losses(batch: Any) -> Any:
    return torch.arange(1, batch["num_supervised"] + 1, dtype=torch.float32, requires_grad=True)


def test_the_next_token_counts_tokens_and_tells_means_by_modality_and_source() -> None:
    batch = batch_of("text", "audio", "text")
    losses, tally, objective = some_losses(batch), Tally(), NextToken()
    assert objective.count(batch) == batch["num_supervised"] == len(losses)
    assert float(objective.loss(losses, batch, tally).detach()) == float(losses.detach().sum())
    told = tally.means()
    num_text = batch_of("text")["num_supervised"]
    num_audio = batch_of("audio")["num_supervised"]
    values = losses.detach()
    audio = values[num_text : num_text + num_audio]
    text = torch.cat([values[:num_text], values[num_text + num_audio :]])
    assert told == {
        "loss": pytest.approx(float(values.mean())),
        "loss/modality/audio": pytest.approx(float(audio.mean())),
        "loss/modality/text": pytest.approx(float(text.mean())),
        "loss/source/test": pytest.approx(float(values.mean())),
    }


def test_a_pair_counts_once_and_tells_its_margin() -> None:
    batch = batch_of("text pair", "media pair")
    reference = torch.tensor([-10.0, -3.0, -8.0, -2.0])
    objective, tally = PairPreference(DpoSettings(beta=0.5), lambda _: reference), Tally()
    losses = some_losses(batch)
    found = objective.loss(losses, batch, tally)
    # By hand: log-probabilities are minus the sums of each answer's losses, in the order chosen, rejected.
    counts = [sum(1 for _ in group) for group in split(batch)]
    sums = [float(part.sum()) for part in losses.detach().split(counts)]
    rewards = [0.5 * (-loss - there) for loss, there in zip(sums, reference.tolist(), strict=True)]
    margins = [rewards[0] - rewards[1], rewards[2] - rewards[3]]
    assert objective.count(batch) == 2
    assert float(found.detach()) == pytest.approx(sum(math.log1p(math.exp(-margin)) for margin in margins), rel=1e-5)
    told = tally.means()
    assert told["margin"] == pytest.approx(sum(margins) / 2, rel=1e-5)
    assert told["reward/chosen"] == pytest.approx((rewards[0] + rewards[2]) / 2, rel=1e-5)
    assert told["accuracy"] == sum(margin > 0 for margin in margins) / 2
    assert told["tokens/rejected"] == (counts[1] + counts[3]) / 2


def split(batch: Any) -> list[list[int]]:
    """Return the supervised places of each document of a packed row."""
    borders = batch["cu_seqlens"].tolist()
    labels = batch["shift_labels"][0].tolist()
    return [[place for place in range(start, stop) if labels[place] != -100] for start, stop in pairwise(borders)]


@pytest.mark.parametrize("objective", [NextToken(), PairPreference(DpoSettings(), lambda _: torch.zeros(0))])
def test_a_row_of_nothing_counts_nothing_and_can_be_gone_back_through(objective: Any) -> None:
    batch, tally = to_torch(pack([], pad_to=8)), Tally()
    losses = torch.zeros(0, requires_grad=True)
    assert objective.count(batch) == 0
    objective.loss(losses, batch, tally).backward()
    assert losses.grad is not None
    assert tally.means() == {}


def told_on(here: World) -> dict[str, float]:
    tally = Tally()
    tally.add("loss", 6.0 if here.rank else 1.0, weight=3 if here.rank else 1)
    if here.rank:
        tally.add("loss/modality/video", 2.0, weight=4)
    return tally.over_ranks(here).means()


def test_means_over_ranks_are_of_all_together_whatever_each_has_seen() -> None:
    both = {"loss": 7.0 / 4, "loss/modality/video": 0.5}
    assert run_ranks(told_on, 2) == [both, both]
    assert told_on(ALONE) == {"loss": 1.0}
