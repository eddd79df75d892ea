"""Operations counted from lengths are those that torch counts while the model runs."""

from typing import Any

import numpy as np
import pytest

from omniprep.stream.batch import pack, pad
from tests.stream.model_records import record

pytestmark = pytest.mark.reference
torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from omniprep.train.flops import (  # noqa: E402
    BatchLengths,
    batch_lengths,
    forward_flops,
    mfu,
    peak_flops,
    training_flops,
)
from omniprep.train.lora import LoraSettings, add_lora  # noqa: E402
from omniprep.train.model import parameters_of, train_only  # noqa: E402
from omniprep.train.tiny import tiny_thinker  # noqa: E402
from tests.train.batches import MIX, batch_of  # noqa: E402
from tests.train.tiny_inputs import IMAGE_GRID, SPECIAL, VIDEO_GRID, make_inputs, num_targets, supervised_loss  # noqa: E402

ALL = ("audio_encoder", "audio_adapter", "vision_encoder", "vision_adapter", "language_model", "head")
TOWERS = ALL[:4]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def eager_thinker() -> Any:
    """Return a Thinker whose attention is made of matrix products, which torch counts; all of them, the unseen half too."""
    thinker = tiny_thinker(seed=1)
    thinker.set_attn_implementation("eager")
    return thinker


def lengths_of(inputs: Any, *, grids: Any = (IMAGE_GRID, VIDEO_GRID)) -> BatchLengths:
    frames = inputs["feature_attention_mask"].sum(-1)
    return BatchLengths(
        documents=(inputs["input_ids"].size,),
        num_supervised=num_targets(inputs),
        mel_frames=tuple(int(count) for count in frames),
        grids=grids,
    )


def even_inputs() -> Any:
    """Return inputs whose sound fills its 2-second chunks: the reference computes a shorter chunk as long as the longest."""
    inputs = make_inputs()
    special_ids = inputs["input_ids"]
    start = int(np.flatnonzero(special_ids == SPECIAL.audio)[0])
    num_old = int((special_ids == SPECIAL.audio).sum())
    ids = np.concatenate([special_ids[:start], np.full(100, SPECIAL.audio), special_ids[start + num_old :]])
    labels = np.concatenate([inputs["labels"][:start], np.full(100, -100), inputs["labels"][start + num_old :]])
    return {
        **inputs,
        "input_ids": ids,
        "labels": labels,
        "attention_mask": np.ones_like(ids),
        "position_ids": np.tile(np.arange(ids.size), (3, 1)),
        "input_features": np.random.default_rng(0).standard_normal((1, 128, 400)).astype(np.float32),
        "feature_attention_mask": np.ones((1, 400), np.int32),
    }


def counted(thinker: Any, run: Any) -> dict[str, dict[str, int]]:
    """Return torch's counts by module: of attention's two products (`bmm`), and of all else."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        run()
    counts = {}
    for name, found in counter.get_flop_counts().items():
        by_kind = {str(operation): int(count) for operation, count in found.items()}
        attention = by_kind.pop("aten.bmm", 0)
        counts[name] = {"attention": attention, "weights": sum(by_kind.values())}
    return counts


def test_a_forward_pass_is_what_torch_counts_module_by_module() -> None:
    thinker, inputs = eager_thinker(), even_inputs()
    with torch.no_grad():
        counts = counted(thinker, lambda: supervised_loss(thinker, inputs))
    lengths = lengths_of(inputs)
    ours = forward_flops(thinker.config, lengths)
    for part, name in {
        "audio_adapter": "audio_tower.proj",
        "vision_adapter": "visual.merger",
        "head": "Linear",
    }.items():
        full = next(found for module, found in counts.items() if module.endswith(name))
        assert ours[part].weights == full["weights"]
    for tower, module in {"audio": "audio_tower", "vision": "visual"}.items():
        full = next(found for name, found in counts.items() if name.endswith(module))
        assert ours[f"{tower}_encoder"].weights + ours[f"{tower}_adapter"].weights == full["weights"]
        assert ours[f"{tower}_encoder"].attention == full["attention"]
    llm = next(found for name, found in counts.items() if name.endswith("language_model"))
    assert ours["language_model"].weights == llm["weights"]
    (tokens,) = lengths.documents
    # Eager attention computes the half that nothing sees as well.
    assert ours["language_model"].attention == pytest.approx(llm["attention"] * (tokens + 1) / (2 * tokens))


@pytest.mark.parametrize(
    "trains", [ALL, TOWERS, ("audio_adapter", "vision_adapter"), ("language_model", "head"), ("head",), ("vision_encoder",)]
)
def test_a_backward_pass_is_counted_by_what_learns(trains: tuple[str, ...]) -> None:
    thinker, inputs = eager_thinker(), even_inputs()
    train_only(thinker, trains)
    counts = counted(thinker, lambda: supervised_loss(thinker, inputs).backward())["Global"]
    lengths = lengths_of(inputs)
    ours = training_flops(thinker.config, lengths, trains=trains)
    forward = forward_flops(thinker.config, lengths)
    (tokens,) = lengths.documents
    # Eager attention computes the half that nothing sees as well, as often as it is computed at all.
    times = 3 if set(trains) - {"head"} else 1
    unseen = times * forward["language_model"].attention * (2 * tokens / (tokens + 1) - 1)
    # Of the first layers of a tower, the gradient of the input is not needed; the table takes them as any other.
    first = {"audio": 2.0 * 3 * 128 * 64 * 400, "vision": 2.0 * 1176 * 64 * (8 * 12 + 3 * 8 * 8)}
    not_needed = sum(count for tower, count in first.items() if f"{tower}_encoder" in trains)
    assert ours + unseen - not_needed == pytest.approx(sum(counts.values()), rel=0.005)


def test_adapters_of_lora_cost_what_they_are() -> None:
    thinker, inputs = eager_thinker(), even_inputs()
    thinker = add_lora(thinker, LoraSettings(rank=4))
    train_only(thinker, ("language_model",))
    num_lora = sum(one.numel() for one in parameters_of(thinker)["language_model"] if one.requires_grad)
    counts = counted(thinker, lambda: supervised_loss(thinker, inputs).backward())["Global"]
    lengths = lengths_of(inputs)
    ours = training_flops(thinker.config, lengths, trains=("language_model",), num_lora_parameters=num_lora)
    (tokens,) = lengths.documents
    unseen = 3 * forward_flops(thinker.config, lengths)["language_model"].attention * (2 * tokens / (tokens + 1) - 1)
    assert ours + unseen == pytest.approx(sum(counts.values()), rel=0.01)


@pytest.mark.parametrize("make", [pack, pad])
def test_lengths_of_a_batch_are_those_of_its_documents(make: Any) -> None:
    batch = batch_of(*MIX, make=make)
    lengths = batch_lengths(batch)
    whole = make([record(name) for name in MIX])
    assert lengths.documents == tuple(whole.document_lengths.tolist())
    assert lengths.num_supervised == whole.num_supervised == int((batch["shift_labels"] != -100).sum())
    assert lengths.mel_frames == tuple(whole.audio_feature_lengths.tolist())
    assert sum(t * h * w for t, h, w in lengths.grids) == len(whole.pixel_values) + len(whole.pixel_values_videos)


def test_packed_documents_cost_what_they_cost_alone() -> None:
    config = tiny_thinker().config
    together = forward_flops(config, batch_lengths(batch_of(*MIX)))
    alone = [forward_flops(config, batch_lengths(batch_of(name))) for name in MIX]
    for part in ALL:
        assert together[part].total == pytest.approx(sum(parts[part].total for parts in alone))
    padded = pack([record(name) for name in MIX], pad_to=5000)
    from omniprep.stream.dataset import to_torch

    assert batch_lengths(to_torch(padded)) == batch_lengths(batch_of(*MIX))


def test_a_share_of_a_known_device_only() -> None:
    assert mfu(989.5e12 * 4, 2.0, "NVIDIA H100 80GB HBM3", num_devices=4) == 0.5
    assert mfu(1e12, 1.0, "cpu") is None
    assert peak_flops("NVIDIA H200 MIG 1g.18gb") is None
    assert peak_flops("NVIDIA H200 NVL") == peak_flops("NVIDIA H100 NVL") == 835.5e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
