"""Attention by borders of documents gives what transformers' own gives, in the language model and in both towers."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omniprep.stream.batch import pack, pad
from tests.stream.model_records import SMALL, ask, encode, prefer, stored
from tests.train.batches import MIX, batch_of

pytestmark = pytest.mark.reference
torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from omniprep.stream.dataset import to_torch  # noqa: E402
from omniprep.train.attention import document_borders, use_attention, uses_varlen, varlen_attention  # noqa: E402
from omniprep.train.forward import TrainableThinker  # noqa: E402
from omniprep.train.model import ModelSettings, load_thinker, parameters_of  # noqa: E402

TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model() -> Any:
    return TrainableThinker(load_thinker(ModelSettings(), seed=5))


def losses_and_gradients(model: Any, batch: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    model.zero_grad()
    losses = model(batch["inputs"], batch["shift_labels"])
    losses.sum().backward()
    parts = parameters_of(model.thinker)
    return losses.detach(), {
        part: torch.cat([weight.grad.flatten() for weight in weights if weight.requires_grad]) for part, weights in parts.items()
    }


@pytest.mark.parametrize("make", [pack, pad])
def test_varlen_is_sdpa_in_losses_and_gradients_of_all_parts(model: Any, make: Any) -> None:
    batch = batch_of(*MIX, make=make)
    results = {}
    for name in ("sdpa", "varlen"):
        use_attention(model.thinker, name)
        results[name] = losses_and_gradients(model, batch)
    use_attention(model.thinker, "sdpa")
    (losses, gradients), (ours, our_gradients) = results["sdpa"], results["varlen"]
    assert (losses - ours).abs().max() < TOLERANCE
    for part, gradient in gradients.items():
        assert gradient.norm() > 0
        assert (gradient - our_gradients[part]).norm() < TOLERANCE * gradient.norm(), part


def test_varlen_is_what_runs_and_makes_no_mask(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from omniprep.train import attention

    calls: list[tuple[str, int, Any]] = []

    def spy(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **options: Any) -> Any:
        calls.append((type(module).__name__, len(options["cu_seq_lens_q"]) - 1, attention_mask))
        return varlen_attention(module, query, key, value, attention_mask, **options)

    monkeypatch.setattr(attention, "varlen_attention", spy)
    use_attention(model.thinker, "varlen")
    batch = batch_of("mixed", "text")
    model(batch["inputs"], batch["shift_labels"])
    assert uses_varlen(model.thinker)
    use_attention(model.thinker, "sdpa")
    model(batch["inputs"], batch["shift_labels"])
    assert {name for name, _, _ in calls} == {"Qwen2_5OmniAttention", "Qwen2_5OmniAudioAttention", "Qwen2_5OmniVisionAttention"}
    assert all(mask is None for _, _, mask in calls)
    assert [borders for name, borders, _ in calls if name == "Qwen2_5OmniAttention"] == [2, 2]  # a layer each, two documents
    assert len(calls) == 2 + 2 + 2 * 2  # layers; images and videos go through their tower apart


lengths = st.lists(st.integers(1, 7), min_size=1, max_size=5)


@given(lengths=lengths, causal=st.booleans(), grouped=st.booleans(), seed=st.integers(0, 99))
def test_each_document_has_the_attention_that_it_has_alone(lengths: list[int], causal: bool, grouped: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (
        torch.randn(1, heads, sum(lengths), 8, generator=generator, dtype=torch.float64)
        for heads in (4, *((2, 2) if grouped else (4, 4)))
    )
    borders = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    mixed, _ = varlen_attention(
        None, query, key, value, None, scaling=0.3, is_causal=causal, cu_seq_lens_q=borders, max_length_q=max(lengths)
    )
    start = 0
    for length in lengths:
        part = slice(start, start + length)
        repeated = [tensor[:, :, part].repeat_interleave(2 if grouped else 1, dim=1) for tensor in (key, value)]
        scores = 0.3 * query[:, :, part] @ repeated[0].transpose(-1, -2)
        if causal:
            scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
        expected = (scores.softmax(-1) @ repeated[1]).transpose(1, 2)
        assert (mixed[:, part] - expected).abs().max() < 1e-12
        start += length


@given(lengths=lengths)
def test_borders_are_those_that_the_batch_states(lengths: list[int]) -> None:
    places = torch.cat([torch.arange(length) for length in lengths])[None]
    found = document_borders(places.expand(4, 1, -1))
    assert found["cu_seq_lens_q"].tolist() == torch.tensor([0, *lengths]).cumsum(0).tolist()
    assert (found["max_length_q"], found["max_length_k"]) == (max(lengths), max(lengths))


def test_a_padded_row_is_one_document_to_its_end() -> None:
    batch = batch_of("text", "audio", make=pad)
    length = batch["inputs"]["input_ids"].shape[1]
    assert document_borders(batch["inputs"]["position_ids"])["cu_seq_lens_q"].tolist() == [0, length, 2 * length]


def test_a_call_without_borders_and_dropout_are_refused(model: Any) -> None:
    tensor = torch.zeros(1, 1, 2, 4)
    with pytest.raises(ValueError, match="no borders"):
        varlen_attention(None, tensor, tensor, tensor, None)
    with pytest.raises(ValueError, match="dropout"):
        varlen_attention(None, tensor, tensor, tensor, None, dropout=0.1, cu_seq_lens_q=torch.tensor([0, 2]), max_length_q=2)


@pytest.mark.media
def test_varlen_is_sdpa_on_real_media(model: Any, samples: Path) -> None:
    data = samples / "llamafactory" / "data" / "mllm_demo_data"
    files = {name: (data / name).read_bytes() for name in ("1.mp4", "2.wav", "1.jpg")}
    film = {"type": "video", "video": "1.mp4", "fps": 1.0, "max_frames": 4, **SMALL}
    rows = [ask(film), ask({"type": "audio", "audio": "2.wav"}), prefer({"type": "image", "image": "1.jpg", **SMALL})]
    batch = to_torch(pack([stored(encode(row, str(number), files))[0] for number, row in enumerate(rows)]))
    losses = {}
    for name in ("sdpa", "varlen"):
        use_attention(model.thinker, name)
        with torch.no_grad():
            losses[name] = model(batch["inputs"], batch["shift_labels"])
    use_attention(model.thinker, "sdpa")
    assert len(losses["sdpa"]) == batch["num_supervised"] > 20
    assert (losses["sdpa"] - losses["varlen"]).abs().max() < TOLERANCE
