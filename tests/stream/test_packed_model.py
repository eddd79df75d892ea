"""The model itself: a packed row gives every document the logits and the loss that it has alone."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omniprep.encode.model_inputs import model_inputs
from omniprep.profile import IGNORE_INDEX
from omniprep.stream.batch import Batch, pack, pad
from omniprep.stream.guard import check_packed
from omniprep.types import EncodedSample
from tests.stream.model_records import NAMES, SMALL, alone, ask, both, encode, prefer, record, stored

pytestmark = pytest.mark.reference
torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from omniprep.train.tiny import tiny_thinker  # noqa: E402

TOLERANCE = 1e-5


@cache
def model() -> Any:
    # So small a model gains nothing from threads, and on a busy machine their waiting for each other costs it 20-fold.
    torch.set_num_threads(1)
    return tiny_thinker(seed=7).eval()


def tensors(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for name, value in inputs.items()}


def call(inputs: Mapping[str, Any]) -> Any:
    with torch.no_grad():
        return model()(**tensors(inputs))


def hidden_alone(inputs: Mapping[str, np.ndarray]) -> Any:
    """Return the last hidden states of one document called by itself, as a user of transformers would: three rows and a mask."""
    batched = tensors(inputs)
    for name, axis in (("input_ids", 0), ("attention_mask", 0), ("position_ids", 1)):
        batched[name] = batched[name].unsqueeze(axis)
    del batched["labels"]
    with torch.no_grad():
        return model().model(**batched, use_cache=False).last_hidden_state[0]


@cache
def known(name: str) -> list[tuple[Any, Any]]:
    """Return (hidden states, labels) of each document of a record, alone."""
    return [(hidden_alone(inputs), torch.from_numpy(inputs["labels"])) for inputs in alone(name).values()]


def loss_sum(logits: Any, targets: Any) -> Any:
    supervised = targets != IGNORE_INDEX
    return torch.nn.functional.cross_entropy(logits[supervised].double(), targets[supervised], reduction="sum")


def check(batch: Batch, documents: list[tuple[Any, Any]]) -> None:
    """Compare logits place by place, and three ways to the loss: the model's own, `shift_labels`, the documents' sum."""
    output = call(batch.model_inputs())
    assert torch.isfinite(output.logits).all()
    expected = torch.zeros((), dtype=torch.float64)
    for number, (hidden, labels) in enumerate(documents):
        row, start = (0, int(batch.cu_seqlens[number])) if batch.is_packed else (number, 0)
        with torch.no_grad():
            logits = model().lm_head(hidden)
        error = (output.logits[row, start : start + len(hidden)] - logits).abs().max().item()
        assert error <= TOLERANCE, (number, batch.keys, error)
        expected += loss_sum(logits[:-1], labels[1:])
    ours = loss_sum(output.logits.flatten(0, 1), torch.from_numpy(batch.shift_labels).flatten())
    assert ours.item() == pytest.approx(expected.item(), rel=1e-6)
    assert output.loss.item() * batch.num_supervised == pytest.approx(expected.item(), rel=1e-5)


# Few and short: logits over 150,000 words for a row of 500 tokens are 300 MB, and take half a second.
MIXES = st.lists(st.sampled_from(NAMES), min_size=1, max_size=3)


@settings(max_examples=15)
@given(names=MIXES, room=st.sampled_from([None, 0, 1, 17]))
def test_a_packed_row_gives_each_document_the_logits_it_has_alone(names: list[str], room: int | None) -> None:
    documents = [document for name in names for document in known(name)]
    total = sum(len(labels) for _, labels in documents)
    batch = pack([record(name) for name in names], pad_to=None if room is None else total + room)
    check_packed(batch.model_inputs(varlen=True), model=model(), cu_seqlens=batch.cu_seqlens)
    check(batch, documents)


@settings(max_examples=8)
@given(names=MIXES, room=st.sampled_from([None, 9]))
def test_a_padded_batch_gives_each_document_the_logits_it_has_alone(names: list[str], room: int | None) -> None:
    documents = [document for name in names for document in known(name)]
    longest = max(len(labels) for _, labels in documents)
    check(pad([record(name) for name in names], pad_to=None if room is None else longest + room), documents)


@pytest.mark.media
def test_real_media_packed_and_padded(samples: Path) -> None:
    data = samples / "llamafactory" / "data" / "mllm_demo_data"
    files = {name: (data / name).read_bytes() for name in ("1.mp4", "2.wav", "1.jpg", "3.jpg")}
    film = {"type": "video", "video": "1.mp4", "fps": 1.0, "max_frames": 4, **SMALL}
    pictures = [{"type": "image", "image": name, **SMALL} for name in ("1.jpg", "3.jpg")]
    rows = [
        ask(pictures[0]),
        ask({"type": "audio", "audio": "2.wav"}),
        ask(film, pictures[1]),
        prefer(pictures[1]),
        ask({**film, "audio_in_video": "off"}),
    ]
    loaded = [stored(encode(row, str(number), files)) for number, row in enumerate(rows)]
    documents = [document for _, sample in loaded for document in documents_of(sample)]
    for make in (pack, pad):
        check(make([one for one, _ in loaded]), documents)


def documents_of(sample: EncodedSample) -> list[tuple[Any, Any]]:
    inputs = [model_inputs(sample, sequence) for sequence in sample.layouts]
    return [(hidden_alone(one), torch.from_numpy(one["labels"])) for one in inputs]


@pytest.mark.parametrize("make", [pack, pad])
def test_a_rank_without_a_bin_takes_part_and_adds_nothing(make: Any) -> None:
    batch = make([], pad_to=5)
    output = call({**batch.model_inputs(), "num_items_in_batch": 11})
    assert torch.isfinite(output.logits).all()
    assert output.loss.item() == 0.0


def test_the_towers_take_the_true_length_mel_and_give_what_they_give_for_the_padded_one() -> None:
    batch = pack([record("sounds"), record("film"), record("audio")])
    padded, mask = batch.padded_features()
    tower = model().model.audio_tower
    lengths = torch.from_numpy(batch.audio_feature_lengths)
    with torch.no_grad():
        expected = model().model.get_audio_features(torch.from_numpy(padded), torch.from_numpy(mask)).last_hidden_state
        after_convolution, _ = tower._get_feat_extract_output_lengths(lengths)
        mel = torch.from_numpy(batch.mel.astype(np.float32))
        direct = tower(mel, feature_lens=lengths, aftercnn_lens=after_convolution).last_hidden_state
    assert torch.equal(direct, expected)


def test_borders_for_varlen_kernels_change_nothing_for_others() -> None:
    batch = pack([record("text"), record("audio")])
    assert torch.equal(call(batch.model_inputs(varlen=True)).logits, call(batch.model_inputs()).logits)


def test_gradients_of_a_packed_row_are_those_of_its_documents() -> None:
    names = ["mixed", "text", "audio"]
    thinker = tiny_thinker(seed=3)
    watched = [thinker.model.audio_tower.conv1.weight, thinker.model.visual.patch_embed.proj.weight, thinker.lm_head.weight]

    def gradients(batches: list[Batch]) -> list[Any]:
        thinker.zero_grad()
        total = sum(batch.num_supervised for batch in batches)
        for batch in batches:
            thinker(**tensors(batch.model_inputs()), num_items_in_batch=total).loss.backward()
        return [weight.grad.clone() for weight in watched]

    together = gradients([pack([record(name) for name in names])])
    apart = gradients([pack([record(name)]) for name in names])
    for one, other in zip(together, apart, strict=True):
        assert one.abs().max() > 0
        assert (one - other).norm() / other.norm() < 1e-4


def test_the_alone_side_of_these_tests_uses_every_input() -> None:
    inputs = dict(alone("mixed")["tokens"])
    base = hidden_alone(inputs)
    for name in ("position_ids", "input_features", "pixel_values", "pixel_values_videos"):
        moved = (hidden_alone({**inputs, name: inputs[name] * 2}) - base).abs().max().item()
        assert moved > 100 * TOLERANCE, (name, moved)
    assert both("mixed")[1].vision[1].timing is not None
