"""The loss of preferences: its formula, its gradient, and that pairs of the real model are learnt by it."""

import math
from functools import cache
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omniprep.config import parse_config
from omniprep.errors import ConfigError
from tests.train.batches import batch_of

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from omniprep.train.dpo import DpoSettings, DpoTerms, dpo_terms  # noqa: E402
from omniprep.train.forward import TrainableThinker  # noqa: E402
from omniprep.train.loss import document_sums, documents_of  # noqa: E402
from omniprep.train.model import ModelSettings, load_thinker  # noqa: E402
from omniprep.train.reference import FrozenCopy, log_probabilities  # noqa: E402


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


log_prob = st.floats(-60, -0.1)
tokens = st.integers(1, 40)
SETTINGS = st.builds(
    DpoSettings,
    beta=st.floats(0.01, 1.0),
    length_normalized=st.booleans(),
    nll_weight=st.sampled_from([0.0, 0.1, 1.0]),
    label_smoothing=st.sampled_from([0.0, 0.1, 0.4]),
)
PAIR = st.tuples(log_prob, log_prob, log_prob, log_prob, tokens, tokens)


def terms(pair: tuple[float, ...], settings: DpoSettings, *, requires_grad: bool = False) -> tuple[DpoTerms, list[Any]]:
    given = [torch.tensor([value], dtype=torch.float64, requires_grad=requires_grad) for value in pair[:4]]
    counts = {"chosen_tokens": torch.tensor([pair[4]]), "rejected_tokens": torch.tensor([pair[5]])}
    return dpo_terms(*given, settings=settings, **counts), given


@given(pair=PAIR, settings=SETTINGS)
def test_the_loss_is_the_published_formula(pair: tuple[float, ...], settings: DpoSettings) -> None:
    chosen, rejected, ref_chosen, ref_rejected, num_chosen, num_rejected = pair
    by = (num_chosen, num_rejected) if settings.length_normalized else (1, 1)
    rewards = settings.beta * (chosen - ref_chosen) / by[0], settings.beta * (rejected - ref_rejected) / by[1]
    margin = rewards[0] - rewards[1]
    # -log(1 / (1 + exp(-x))), of the margin and, for pairs labelled the wrong way round, of its opposite.
    expected = (1 - settings.label_smoothing) * math.log1p(math.exp(-margin))
    expected += settings.label_smoothing * math.log1p(math.exp(margin))
    expected += settings.nll_weight * -chosen / num_chosen
    found, _ = terms(pair, settings)
    assert found.loss.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert (found.chosen_reward.item(), found.rejected_reward.item()) == pytest.approx(rewards)
    assert found.margin.item() == pytest.approx(margin, abs=1e-9)
    assert found.correct.item() == float(margin > 0)


@given(pair=PAIR, settings=SETTINGS)
def test_the_chosen_answer_is_raised_and_the_rejected_one_lowered(pair: tuple[float, ...], settings: DpoSettings) -> None:
    found, (chosen, rejected, *_) = terms(pair, settings, requires_grad=True)
    found.loss.sum().backward()
    plain = settings.model_copy(update={"label_smoothing": 0.0})
    sure, (sure_chosen, sure_rejected, *_) = terms(pair, plain, requires_grad=True)
    sure.loss.sum().backward()
    assert sure_chosen.grad.item() < 0 < sure_rejected.grad.item()  # less of the loss: chosen up, rejected down
    for told in (found.chosen_reward, found.rejected_reward, found.margin, found.correct):
        assert not told.requires_grad
    slopes = [settings.beta / (count if settings.length_normalized else 1) for count in pair[4:]]
    doubt = 1 / (1 + math.exp(-found.margin.item())) - (1 - settings.label_smoothing)
    assert chosen.grad.item() == pytest.approx(slopes[0] * doubt - settings.nll_weight / pair[4], abs=1e-9)
    assert rejected.grad.item() == pytest.approx(-slopes[1] * doubt, abs=1e-9)


def test_a_model_that_is_its_reference_is_undecided() -> None:
    found, _ = terms((-3.0, -4.0, -3.0, -4.0, 2, 2), DpoSettings())
    assert found.loss.item() == pytest.approx(math.log(2))
    assert (found.margin.item(), found.correct.item()) == (0, 0)


def test_settings_out_of_range_are_refused() -> None:
    wrong = {"beta": 0, "nll_weight": -0.1, "label_smoothing": 0.5, "reference": "ema", "lambda": 1}
    for name, value in wrong.items():
        with pytest.raises(ConfigError, match=name):
            parse_config(DpoSettings, {name: value}, place="recipe.yaml")


@cache
def learn(settings: DpoSettings, *, steps: int = 8) -> list[DpoTerms]:
    """Train on two pairs, one of them with media, and return the terms of every step: 5 s."""
    model = TrainableThinker(load_thinker(ModelSettings(), seed=2))
    reference = FrozenCopy(TrainableThinker(load_thinker(ModelSettings(), seed=2)))
    batch = batch_of("text pair", "media pair")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    documents, number = documents_of(batch), len(batch["documents"])
    counts = torch.bincount(documents)
    fixed = reference(batch)
    history = []
    for _ in range(steps):
        values = -document_sums(model(batch["inputs"], batch["shift_labels"]), documents, number)
        parts = (values[0::2], values[1::2], fixed[0::2], fixed[1::2])
        found = dpo_terms(*parts, settings=settings, chosen_tokens=counts[0::2], rejected_tokens=counts[1::2])
        found.loss.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(found)
    assert torch.equal(reference(batch), fixed)
    return history


def test_the_margin_of_two_pairs_rises_and_the_loss_falls() -> None:
    history = learn(DpoSettings())
    first, last = history[0], history[-1]
    assert first.margin.tolist() == [0, 0]
    assert first.loss.tolist() == pytest.approx([math.log(2)] * 2)
    assert last.correct.tolist() == [1, 1]
    assert last.margin.min() > 0.1
    means = [float(step.margin.mean()) for step in history]
    assert means == sorted(means)
    assert last.loss.mean() < first.loss.mean() - 0.05


def test_the_nll_term_raises_the_chosen_answer_itself() -> None:
    without, with_term = (learn(settings)[-1] for settings in (DpoSettings(), DpoSettings(nll_weight=1.0)))
    assert with_term.chosen_reward.mean() > without.chosen_reward.mean()
    assert with_term.chosen_reward.min() > 0


def test_log_probabilities_are_those_of_the_answers_and_have_no_gradient() -> None:
    model = TrainableThinker(load_thinker(ModelSettings(), seed=2))
    batch = batch_of("text pair", "media pair")
    found = log_probabilities(model, batch)
    assert not found.requires_grad
    expected = -document_sums(model(batch["inputs"], batch["shift_labels"]), documents_of(batch), 4)
    assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-6)
    assert len(found) == len(batch["documents"]) == 4
    assert log_probabilities(model, batch_of()).shape == (0,)
