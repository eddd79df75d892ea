"""The arithmetic of memory: exact for what is kept, and for what layers keep, as torch saves it."""

from pathlib import Path
from typing import Any

import pytest

import omniprep.train

pytestmark = pytest.mark.reference
torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from omniprep.train.lora import LoraSettings, add_lora  # noqa: E402
from omniprep.train.memory import (  # noqa: E402
    H200_BYTES,
    Load,
    audio_layer_bytes,
    count_parameters,
    num_lora_parameters,
    plan_memory,
    text_layer_bytes,
    vision_layer_bytes,
)
from omniprep.train.model import load_config, parameters_of  # noqa: E402
from omniprep.train.tiny import tiny_thinker  # noqa: E402

LAYOUTS = Path(omniprep.train.__file__).parent / "layouts"
ALL = ("audio_encoder", "audio_adapter", "vision_encoder", "vision_adapter", "language_model", "head")
LONG = Load.heaviest(32_768)
PLACES = 256


def config_of(size: str) -> Any:
    return load_config(str(LAYOUTS / f"qwen2_5_omni_{size}"))


def test_parameters_are_those_of_the_released_models() -> None:
    assert sum(count_parameters(config_of("7b")).values()) == 8_931_813_888
    assert sum(count_parameters(config_of("3b")).values()) == 4_703_464_448
    tiny = tiny_thinker()
    assert count_parameters(tiny.config) == {name: sum(one.numel() for one in part) for name, part in parameters_of(tiny).items()}


@pytest.mark.parametrize("lora", [LoraSettings(), LoraSettings(rank=3, targets=("q_proj", "v_proj", "down_proj"))])
def test_adapters_are_counted_as_they_are_made(lora: LoraSettings) -> None:
    thinker = add_lora(tiny_thinker(), lora)
    made = sum(parameter.numel() for name, parameter in thinker.named_parameters() if ".lora_" in name)
    assert num_lora_parameters(thinker.config, lora) == made


def saved_bytes(run: Any, given: list[Any]) -> int:
    """Return the bytes that autograd keeps of a call, without parameters and what came from outside."""
    known = {one.untyped_storage().data_ptr() for one in given}
    kept: dict[int, int] = {}

    def keep(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = run()
    del result
    return sum(kept.values())


@pytest.mark.parametrize("width", [2, 4])
def test_layers_keep_what_torch_saves(width: int) -> None:
    torch.set_num_threads(1)
    dtype = {2: torch.bfloat16, 4: torch.float32}[width]
    thinker = tiny_thinker().to(dtype)
    text, visual, audio = thinker.model.language_model, thinker.model.visual, thinker.model.audio_tower
    states = torch.randn(PLACES, 64, dtype=dtype, requires_grad=True)
    rope = text.rotary_emb(states[None], torch.arange(PLACES).expand(3, 1, -1))
    angles = (torch.randn(PLACES, 16, dtype=dtype), torch.randn(PLACES, 16, dtype=dtype))
    borders = torch.tensor([0, PLACES])
    given = [*thinker.parameters(), *rope, *angles]
    found = {
        "text": saved_bytes(lambda: text.layers[0](states[None] + 0, position_embeddings=rope, attention_mask=None), given),
        "vision": saved_bytes(lambda: visual.blocks[0](states + 0, cu_seqlens=borders, position_embeddings=angles), given),
        "audio": saved_bytes(lambda: audio.layers[0](states + 0, cu_seqlens=borders), given),
    }
    config = thinker.config
    counted = {
        "text": PLACES * text_layer_bytes(config.text_config, width),
        "vision": PLACES * vision_layer_bytes(config.vision_config, width),
        "audio": PLACES * audio_layer_bytes(config.audio_config, width),
    }
    assert counted == pytest.approx(found, rel=0.06)  # sums and angles a place, which at these widths are not nothing


def test_long_rows_fit_one_h200_as_they_are_said_to() -> None:
    full = {size: plan_memory(config_of(size), LONG, trains=ALL) for size in ("3b", "7b")}
    assert full["3b"].fits(H200_BYTES)
    assert not full["7b"].fits(H200_BYTES)
    assert sum(full["7b"].parts[name] for name in ("trained weights", "gradients", "optimizer")) == 16 * 8_931_813_888
    assert plan_memory(config_of("7b"), LONG, trains=("language_model",), lora=LoraSettings()).fits(H200_BYTES)
    assert plan_memory(config_of("7b"), LONG, trains=ALL[:4]).fits(H200_BYTES)
    assert plan_memory(config_of("7b"), LONG, trains=ALL, world_size=8).fits(H200_BYTES)


def test_each_setting_saves_what_it_is_there_for() -> None:
    config = config_of("7b")
    whole = plan_memory(config, LONG, trains=ALL)
    kept = plan_memory(config, LONG, trains=ALL, activation_checkpointing=False)
    assert kept.parts["saved by the language model"] > 10 * whole.parts["saved by the language model"]
    assert plan_memory(config, LONG, trains=ALL, loss_chunk_tokens=256).parts["logits"] * 4 == whole.parts["logits"]
    four = plan_memory(config, LONG, trains=ALL, world_size=4)
    assert four.parts["optimizer"] * 4 == whole.parts["optimizer"]
    assert four.parts["copies to compute with"] == whole.parts["copies to compute with"]
    head_only = plan_memory(config, LONG, trains=("head",))
    assert head_only.parts["saved by the language model"] == head_only.parts["saved by the vision tower"] == 0
    assert plan_memory(config, Load.heaviest(32_768, max_patches=8192), trains=ALL).total < whole.total
    with_reference = plan_memory(config, LONG, trains=ALL, num_references=1)
    assert with_reference.parts["frozen weights"] == 2 * whole.num_parameters
    on_cpu = plan_memory(tiny_thinker().config, Load.heaviest(512), trains=ALL, bf16=False)
    assert on_cpu.parts["copies to compute with"] == 0


def test_the_table_adds_up() -> None:
    plan = plan_memory(config_of("3b"), LONG, trains=ALL)
    *lines, total = plan.describe().splitlines()
    sizes = [float(line.split()[-2]) for line in lines]
    assert float(total.split()[-2]) == pytest.approx(sum(sizes), abs=0.05 * len(sizes))
    assert f"{plan.total / 1e9:.1f} GB" in total
