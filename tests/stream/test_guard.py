"""Each call that the guard refuses does leak in the real model, and the ones it accepts do not."""

from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from omniprep.errors import ConfigError
from omniprep.profile import IGNORE_INDEX
from omniprep.stream.batch import pack
from omniprep.stream.guard import check_packed, prepare_model_for_packing
from tests.stream.model_records import alone, record

NAMES = ["text", "audio", "dialogue"]
LEAK = 1e-2
TOLERANCE = 1e-5


def good_inputs(**changes: Any) -> dict[str, Any]:
    """Return a right call, with some arguments changed, or left out by None."""
    inputs = pack([record(name) for name in NAMES]).model_inputs() | changes
    return {name: value for name, value in inputs.items() if value is not None}


def one_row_of_places() -> np.ndarray:
    """Return positions whose first row goes on over the borders."""
    positions = good_inputs()["position_ids"].copy()
    positions[0] = np.arange(positions.shape[2])
    return positions


def ones() -> np.ndarray:
    return np.ones_like(good_inputs()["input_ids"])


LEAKS: dict[str, tuple[dict[str, Any], str]] = {
    "three rows": ({"position_ids": good_inputs()["position_ids"][1:]}, r"expected \(4, B, L\), got \(3, 1, \d+\)"),
    "a mask of ones": ({"attention_mask": ones()}, "attention_mask: expected none"),
    "a mask of ones, boolean": ({"attention_mask": ones().astype(bool)}, "attention_mask: expected none"),
    "use_cache left out": ({"use_cache": None}, "use_cache: expected False for a packed row, got it left to its default"),
    "use_cache on": ({"use_cache": True}, "got it True"),
    "borders that the model will not find": ({"position_ids": one_row_of_places()}, "cu_seqlens: .* documents begin and end at"),
}


@cache
def model() -> Any:
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from omniprep.train.tiny import tiny_thinker

    torch.set_num_threads(1)
    return tiny_thinker(seed=7).eval()


def error_of(inputs: dict[str, Any]) -> float:
    """Return how far the last document's hidden states are from what they are alone."""
    import torch

    def last_hidden(call: dict[str, Any]) -> Any:
        tensors = {name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for name, value in call.items()}
        tensors.pop("labels", None)
        with torch.no_grad():
            return model().model(**tensors).last_hidden_state[0]

    (expected,) = (last_hidden(pack([record(NAMES[-1])]).model_inputs()),)
    assert len(expected) == len(alone(NAMES[-1])["tokens"]["input_ids"])
    return float((last_hidden(inputs)[-len(expected) :] - expected).abs().max())


def borders() -> np.ndarray:
    return pack([record(name) for name in NAMES]).cu_seqlens


@pytest.mark.reference
@pytest.mark.parametrize("name", LEAKS)
def test_a_call_that_leaks_is_refused(name: str) -> None:
    changes, message = LEAKS[name]
    inputs = good_inputs(**changes)
    assert error_of(inputs) > LEAK
    with pytest.raises(ConfigError, match=message):
        check_packed(inputs, cu_seqlens=borders())


@pytest.mark.reference
def test_the_right_call_is_accepted_and_does_not_leak() -> None:
    inputs = good_inputs()
    check_packed(inputs, cu_seqlens=borders())
    check_packed(inputs, model=model())
    assert error_of(inputs) <= TOLERANCE


@pytest.mark.reference
def test_the_cache_is_off_only_where_the_text_configuration_says_so() -> None:
    """What trainers set, `model.config.use_cache`, does not reach the text model: the leak is real until it is prepared."""
    thinker, inputs = model(), good_inputs(use_cache=None)
    text, before = thinker.config.text_config, thinker.config.text_config.use_cache
    try:
        thinker.config.use_cache = False
        assert error_of(inputs) > LEAK
        with pytest.raises(ConfigError, match="left to its default"):
            check_packed(inputs, model=thinker)
        prepare_model_for_packing(thinker)
        assert text.use_cache is False
        assert error_of(inputs) <= TOLERANCE
        check_packed(inputs, model=thinker)
        check_packed(inputs, model=SimpleNamespace(module=thinker))  # as DistributedDataParallel wraps it
        with pytest.raises(ConfigError, match="left to its default"):
            check_packed(inputs)
    finally:
        text.use_cache = before
        del thinker.config.use_cache


@pytest.mark.reference
def test_a_label_at_the_first_token_of_a_document_teaches_across_the_border() -> None:
    import torch

    inputs = good_inputs()
    start = int(borders()[1])
    labels = inputs["labels"].copy()
    labels[0, start] = inputs["input_ids"][0, start]

    def loss(labels: np.ndarray) -> float:
        call = {**inputs, "labels": labels, "num_items_in_batch": 1}
        tensors = {name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for name, value in call.items()}
        with torch.no_grad():
            return float(model()(**tensors).loss)

    assert loss(labels) - loss(inputs["labels"]) > 1.0
    with pytest.raises(ConfigError, match=f"labels: expected {IGNORE_INDEX} at the first token .* token {start} of row 0"):
        check_packed({**inputs, "labels": labels})


def test_a_label_at_the_first_token_of_a_row_teaches_nothing_and_is_accepted() -> None:
    labels = good_inputs()["labels"].copy()
    labels[0, 0] = 7
    check_packed(good_inputs(labels=labels))


def test_shifted_labels_end_with_their_document() -> None:
    batch = pack([record(name) for name in NAMES])
    inputs = batch.model_inputs() | {"shift_labels": batch.shift_labels}
    check_packed(inputs)
    once_over_the_row = np.full_like(batch.labels, IGNORE_INDEX)
    once_over_the_row[:, :-1] = batch.input_ids[:, 1:]
    with pytest.raises(ConfigError, match=f"shift_labels: .* last token .* token {int(borders()[1]) - 1} of row 0"):
        check_packed({**inputs, "shift_labels": once_over_the_row})


def wrong_places() -> np.ndarray:
    positions = good_inputs()["position_ids"].copy()
    positions[0, 0, 3] = 9
    return positions


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "no positions": ({"position_ids": None}, "position_ids: .* got none"),
    "a place that neither follows nor begins": ({"position_ids": wrong_places()}, "got 9 at token 3 of row 0"),
    "a cache": ({"past_key_values": object()}, "past_key_values: expected none"),
    "borders of other documents": ({"cu_seq_lens_q": np.array([0, 5])}, r"cu_seq_lens_q: \[0, 5\], but"),
    "a maximum that is too small": ({"max_length_k": 3}, "max_length_k: 3, but the longest document has 53 tokens"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_calls_that_cannot_be_right_are_refused(name: str) -> None:
    changes, message = OTHERS[name]
    with pytest.raises(ConfigError, match=message):
        check_packed(good_inputs(**changes))


def test_tensors_are_checked_as_arrays_are() -> None:
    torch = pytest.importorskip("torch")
    inputs = {name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for name, value in good_inputs().items()}
    check_packed(inputs, cu_seqlens=torch.from_numpy(borders()))
    with pytest.raises(ConfigError, match="got 9 at token 3"):
        check_packed({**inputs, "position_ids": torch.from_numpy(wrong_places())})


def test_a_mask_that_was_made_by_hand_is_the_callers_own_matter() -> None:
    check_packed(good_inputs(attention_mask={"full_attention": None}))
    check_packed(good_inputs(attention_mask=np.zeros((1, 1, 4, 4))))
