"""LoRA: small trained matrices beside the frozen projections of the language model, and of nothing else.

The towers have projections of the same names (`q_proj`, ...), so layers are chosen by their whole path. The adapters are
put into the Thinker itself: it stays transformers' class, and what calls its parts need not know of them.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pydantic import Field
from torch import Tensor

from omniprep.config import Config
from omniprep.errors import ConfigError

_ADAPTER = "default"
_LAYERS = r"model\.language_model\.layers\.\d+\.(self_attn|mlp)\."


class LoraSettings(Config):
    """Adapters of the language model's layers."""

    rank: int = Field(default=16, ge=1)
    alpha: float = Field(default=32, gt=0)
    """The adapters' output is multiplied by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: tuple[str, ...] = Field(
        default=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), min_length=1
    )
    """Projections in each layer of the language model."""


def add_lora(thinker: Any, settings: LoraSettings) -> Any:
    """Return the Thinker with adapters in it, which change nothing yet; only they are left to be trained.

    Raises `ConfigError` for a projection that its layers do not have, or if it has adapters already.
    """
    from peft import LoraConfig, inject_adapter_in_model

    if has_lora(thinker):
        raise ConfigError("lora: the Thinker has adapters already; add them once")
    layer = thinker.model.language_model.layers[0]
    known = sorted({name for part in (layer.self_attn, layer.mlp) for name, _ in part.named_children() if name.endswith("_proj")})
    unknown = sorted(set(settings.targets).difference(known))
    if unknown:
        raise ConfigError(f"lora.targets: no {', '.join(unknown)} in a layer of the language model; it has {', '.join(known)}")
    alpha: Any = settings.alpha  # annotated as int by peft, which only divides it
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=alpha,
        lora_dropout=settings.dropout,
        target_modules=f"{_LAYERS}({'|'.join(map(re.escape, settings.targets))})",
    )
    return inject_adapter_in_model(config, thinker)


def has_lora(thinker: Any) -> bool:
    """Return whether `add_lora` was called on it."""
    return next(_adapted(thinker), None) is not None


def is_adapter(parameter_name: str) -> bool:
    """Return whether a parameter belongs to an adapter.

    >>> is_adapter("model.language_model.layers.0.mlp.up_proj.lora_A.default.weight")
    True
    """
    return ".lora_" in parameter_name


@contextmanager
def adapters_off(thinker: Any) -> Iterator[None]:
    """Compute without the adapters: the model that the training began with. Raises `ConfigError` if there are none."""
    layers = [layer for _, layer in _adapted(thinker)]
    if not layers:
        raise ConfigError("adapter_off: the model has no adapters; set model.lora, or take another reference")
    # peft's own switch also sets requires_grad of the adapters, which must not change once they are sharded.
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def merged(thinker: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights that compute without adapters what those of `state` compute with them. `state` is not changed."""
    scaling = {name: float(layer.scaling[_ADAPTER]) for name, layer in _adapted(thinker)}
    weights = {name.replace(".base_layer.", "."): tensor for name, tensor in state.items() if not is_adapter(name)}
    for name, scale in scaling.items():
        down, up = (state[f"{name}.{side}.{_ADAPTER}.weight"] for side in ("lora_A", "lora_B"))
        weight = weights[f"{name}.weight"]
        weights[f"{name}.weight"] = (weight.float() + scale * (up.float() @ down.float())).to(weight.dtype)
    return weights


def _adapted(thinker: Any) -> Iterator[tuple[str, Any]]:
    """Yield (name, layer) of each projection that has an adapter, by the names of `state_dict`."""
    from peft.tuners.lora import LoraLayer

    for name, module in thinker.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module
