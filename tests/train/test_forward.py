"""One call gives every document the losses it has alone, and every trained weight a gradient, whatever the batch holds."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omniprep.errors import ConfigError
from omniprep.profile import IGNORE_INDEX
from omniprep.stream.batch import pack, pad
from tests.stream.model_records import NAMES, alone
from tests.train.batches import batch_of

pytestmark = pytest.mark.reference
torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from omniprep.train import forward  # noqa: E402
from omniprep.train.forward import TrainableThinker, nothing_of  # noqa: E402
from omniprep.train.loss import document_sums, documents_of, token_losses  # noqa: E402
from omniprep.train.model import ModelSettings, load_thinker, parameters_of, train_only  # noqa: E402

TOLERANCE = 1e-5
ALL = ("audio_encoder", "audio_adapter", "vision_encoder", "vision_adapter", "language_model", "head")
TOWERS = ALL[:4]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def shared() -> Any:
    torch.set_num_threads(1)
    return TrainableThinker(load_thinker(ModelSettings(), seed=11), loss_chunk_tokens=7)


@pytest.fixture
def model(shared: Any) -> Any:
    train_only(shared.thinker, ALL)
    shared.zero_grad()
    return shared


def call(model: Any, batch: dict[str, Any]) -> Any:
    return model(batch["inputs"], batch["shift_labels"])


def losses_alone(model: Any, name: str) -> list[float]:
    """Return the summed loss of each document of a record, by transformers' own loss of the document by itself."""
    sums = []
    for inputs in alone(name).values():
        given = {key: torch.from_numpy(np.ascontiguousarray(value)) for key, value in inputs.items()}
        for key, axis in (("input_ids", 0), ("attention_mask", 0), ("position_ids", 1), ("labels", 0)):
            given[key] = given[key].unsqueeze(axis)
        with torch.no_grad():
            loss = model.thinker(**given, use_cache=False).loss
        sums.append(float(loss) * int((given["labels"][:, 1:] != IGNORE_INDEX).sum()))
    return sums


@settings(max_examples=12)
@given(names=st.lists(st.sampled_from(NAMES), min_size=1, max_size=3), make=st.sampled_from([pack, pad]))
def test_each_document_has_the_loss_that_transformers_gives_it_alone(shared: Any, names: list[str], make: Any) -> None:
    batch = batch_of(*names, make=make)
    with torch.no_grad():
        losses = call(shared, batch)
    assert losses.dtype == torch.float32
    sums = document_sums(losses, documents_of(batch), len(batch["documents"])).tolist()
    assert sums == pytest.approx([loss for name in names for loss in losses_alone(shared, name)], rel=TOLERANCE)


def test_the_order_of_the_losses_is_that_of_the_labels(model: Any) -> None:
    batch = batch_of("dialogue", "audio")
    inputs = {name: value for name, value in batch["inputs"].items() if name != "labels"}
    with torch.no_grad():
        chances = model.thinker(**inputs).logits[0].log_softmax(-1)
        losses = call(model, batch)
    places = (batch["shift_labels"][0] != IGNORE_INDEX).nonzero().flatten().tolist()
    expected = [-float(chances[place, batch["shift_labels"][0, place]]) for place in places]
    assert losses.tolist() == pytest.approx(expected, abs=TOLERANCE)


def test_gradients_of_a_packed_row_are_the_sum_of_its_documents(model: Any) -> None:
    names = ("mixed", "text", "sounds")

    def gradient(batches: list[Any]) -> dict[str, Any]:
        model.zero_grad()
        for batch in batches:
            call(model, batch).sum().backward()
        parts = parameters_of(model.thinker)
        return {part: torch.cat([p.grad.flatten() for p in own if p.requires_grad]) for part, own in parts.items()}

    together, apart = gradient([batch_of(*names)]), gradient([batch_of(name) for name in names])
    for part, value in together.items():
        assert value.norm() > 0
        assert (value - apart[part]).norm() < TOLERANCE * value.norm(), part


@pytest.mark.parametrize(
    ("names", "unused"),
    [
        (("text",), TOWERS),
        (("audio",), TOWERS[2:]),
        (("image",), TOWERS[:2]),
        (("video",), TOWERS[:2]),
        (("mixed",), ()),
        ((), ALL),
    ],
    ids=["text", "audio", "image", "video", "all", "nothing"],
)
def test_every_trained_weight_gets_a_gradient_of_zeros_where_it_was_not_used(
    model: Any, names: tuple[str, ...], unused: tuple[str, ...]
) -> None:
    losses = call(model, batch_of(*names))
    losses.sum().backward()
    for part, parameters in parameters_of(model.thinker).items():
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        assert all(parameter.grad is not None and parameter.grad.shape == parameter.shape for parameter in trained), part
        assert any(bool(parameter.grad.any()) for parameter in trained) == (part not in unused), part
    assert bool(losses.numel()) == bool(names)


@pytest.mark.parametrize("names", [("text",), ("film", "image"), ()], ids=["text", "media", "nothing"])
def test_the_encoders_alone_are_trained_through_a_frozen_language_model(model: Any, names: tuple[str, ...]) -> None:
    train_only(model.thinker, TOWERS)
    call(model, batch_of(*names)).sum().backward()
    for part, parameters in parameters_of(model.thinker).items():
        if part in TOWERS:
            used = [bool(parameter.grad.any()) for parameter in parameters if parameter.requires_grad]
            assert any(used) == ("film" in names), part
        else:
            assert all(parameter.grad is None for parameter in parameters), part


def test_a_weight_that_is_not_used_does_not_spoil_the_losses() -> None:
    broken = torch.nn.Parameter(torch.tensor([[torch.inf, torch.nan]]))
    half = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    nothing = nothing_of(iter([broken, half]))
    assert nothing.item() == 0
    nothing.backward()
    assert broken.grad.tolist() == [[0, 0]]
    assert half.grad.tolist() == [0, 0, 0]


def test_only_supervised_rows_go_through_the_head(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, rows = batch_of("mixed", "text"), []

    def watched(hidden: Any, head: Any, targets: Any, *, chunk_tokens: int) -> Any:
        rows.append((len(hidden), chunk_tokens))
        return token_losses(hidden, head, targets, chunk_tokens=chunk_tokens)

    monkeypatch.setattr(forward, "token_losses", watched)
    call(model, batch)
    assert rows == [(batch["num_supervised"], model.loss_chunk_tokens)]


def test_a_cache_is_never_made_even_if_the_batch_asks_for_one(model: Any) -> None:
    batch = batch_of("text", "audio")
    with torch.no_grad():
        expected = call(model, batch)
        asked = model({**batch["inputs"], "use_cache": True}, batch["shift_labels"])
    assert torch.equal(expected, asked)


@pytest.mark.parametrize("rows", [3, None])
def test_positions_with_which_documents_would_see_each_other_are_refused(model: Any, rows: int | None) -> None:
    inputs = dict(batch_of("text", "audio")["inputs"])
    inputs["position_ids"] = None if rows is None else inputs["position_ids"][-rows:]
    with pytest.raises(ConfigError, match=r"position_ids: expected \(4, B, L\), got (none|\(3, 1, \d+\))"):
        model(inputs, batch_of("text", "audio")["shift_labels"])


def test_a_mask_of_another_shape_is_refused(model: Any) -> None:
    batch = batch_of("text", make=pad)
    inputs = {**batch["inputs"], "attention_mask": batch["inputs"]["attention_mask"][:, :-1]}
    with pytest.raises(ConfigError, match=r"attention_mask: expected \(1, \d+\) like input_ids"):
        model(inputs, batch["shift_labels"])
