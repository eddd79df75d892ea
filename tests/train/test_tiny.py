"""The tiny Thinker learns from model inputs, agrees with transformers' own loss, and refuses inputs that do not fit."""

import numpy as np
import pytest

from omniprep.profile import QWEN2_5_OMNI

pytestmark = [pytest.mark.reference]
torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from omniprep.train.tiny import tiny_thinker  # noqa: E402
from tests.train.tiny_inputs import SPECIAL, make_inputs, num_targets, supervised_loss, train_steps  # noqa: E402


def test_loss_falls_and_starts_at_chance() -> None:
    losses = train_steps(tiny_thinker(), [make_inputs(0), make_inputs(1)], steps=8)
    assert losses[0] == pytest.approx(np.log(QWEN2_5_OMNI.vocab_size), abs=0.2)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 1.0


def test_loss_is_the_models_own() -> None:
    model, inputs = tiny_thinker(seed=3), make_inputs(2)
    tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
    for name, axis in (("input_ids", 0), ("labels", 0), ("attention_mask", 0), ("position_ids", 1)):
        tensors[name] = tensors[name].unsqueeze(axis)
    with torch.no_grad():
        expected = model(**tensors, use_cache=False).loss.item()
        ours = supervised_loss(model, inputs).item() / num_targets(inputs)
    assert ours == pytest.approx(expected, rel=1e-5)


def test_every_input_reaches_the_loss() -> None:
    model, inputs = tiny_thinker(seed=1), make_inputs(0)
    with torch.no_grad():
        base = supervised_loss(model, inputs).item()
        for name in ("position_ids", "input_features", "pixel_values", "pixel_values_videos"):
            assert supervised_loss(model, {**inputs, name: inputs[name] * 3}).item() != base, name
        other_ids = np.concatenate([[1001], inputs["input_ids"][1:]])
        assert supervised_loss(model, {**inputs, "input_ids": other_ids}).item() != base


def test_a_wrong_number_of_placeholders_stops_it() -> None:
    model, inputs = tiny_thinker(), make_inputs()
    ids = inputs["input_ids"].copy()
    ids[np.flatnonzero(ids == SPECIAL.image)[0]] = 5
    with pytest.raises(ValueError, match=r"[Ii]mage"):
        supervised_loss(model, {**inputs, "input_ids": ids})
