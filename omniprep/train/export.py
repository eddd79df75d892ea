"""A trained Thinker as a folder that plain transformers opens, with the names of the released weights.

The weights that a run trains may lie in pieces on many ranks, with adapters beside them and wrapped for checkpointing;
what is written is whole, merged and plain. The model in memory stays as it is.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omniprep.train.lora import has_lora, is_adapter, merged


def save_thinker(thinker: Any, folder: Path, *, merge_lora: bool = True, dtype: torch.dtype | None = None) -> None:
    """Write a Thinker in the layout of `save_pretrained`, for `Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained`.

    With adapters, their sum with the base is written, or with `merge_lora=False` the base alone. `dtype` is that of the
    file, by default that in memory: float32 for what was trained. Every rank of a sharded model calls it; the first writes.
    """
    state = full_state(thinker)
    if not _is_main():
        return
    if has_lora(thinker):
        state = merged(thinker, state) if merge_lora else merged(thinker, _without_adapters(state))
    if dtype is not None:
        state = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    # A plain model of the same shape without memory: only it knows the names of its saved weights.
    with torch.device("meta"):
        plain = type(thinker)(thinker.config)
    plain.generation_config = thinker.generation_config
    plain.config.dtype = state["lm_head.weight"].dtype
    folder.mkdir(parents=True, exist_ok=True)
    plain.save_pretrained(folder, state_dict=state)


def full_state(thinker: Any) -> dict[str, Tensor]:
    """Return all weights by name, whole and on the CPU, on the first rank; every rank of a sharded model calls it."""
    state = {}
    for name, value in thinker.state_dict().items():
        tensor = value.full_tensor() if hasattr(value, "full_tensor") else value
        if _is_main():
            state[name] = tensor.detach().cpu()
    return state


def _without_adapters(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return weights in which the adapters add nothing."""
    return {name: torch.zeros_like(tensor) if is_adapter(name) else tensor for name, tensor in state.items()}


def _is_main() -> bool:
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
