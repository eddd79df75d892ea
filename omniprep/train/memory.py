"""What a training step needs of a device's memory, by arithmetic: known before the first weight is loaded.

What is kept all the time (weights, gradients, optimizer) is exact. What lives during a step is counted from what the layers
of transformers' Thinker keep for their gradients, tensor by tensor; the allocator's fragments, the kernels' workspaces and
the CUDA context (together a few GB) come on top. Layers are counted at the heaviest row that the caps of the plan let in.

    kept        weights 4 B, gradients 4 B, AdamW's two moments 8 B of each parameter that learns; weights of frozen ones
    copies      gathered and in bfloat16: of the layers in work, and of all that is in no decoder layer, with its gradients
    saved       the input of every layer with activation checkpointing, else all that its backward pass asks for
    one layer   with activation checkpointing, what the layer in work asks for; and its gradients
    logits      of one chunk of supervised tokens
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from omniprep.train.lora import LoraSettings
from omniprep.train.model import ModuleName, parameters_of

H200_BYTES = 141 * 10**9
"""Memory of an NVIDIA H200 by its data sheet."""

_FLOAT32 = 4
_MOMENTS = 8
"""Bytes that AdamW keeps of a parameter, both float32."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """The row of a step that needs most memory, on one device."""

    num_tokens: int
    num_patches: int
    """Of images and videos: four a token."""
    num_mel_frames: int
    """Four a token of sound."""
    num_supervised: int

    @classmethod
    def heaviest(cls, max_tokens: int, *, max_patches: int | None = None, max_mel_frames: int | None = None) -> "Load":
        """Return what bounds every row that a plan with these caps makes: all supervised, all video and all sound at once.

        >>> Load.heaviest(8192, max_mel_frames=9000).num_patches
        32768
        """
        most = 4 * max_tokens
        return cls(
            num_tokens=max_tokens,
            num_patches=min(most, max_patches or most),
            num_mel_frames=min(most, max_mel_frames or most),
            num_supervised=max_tokens,
        )


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes on each device, by what needs them."""

    parameters: dict[ModuleName, int]
    """How many each part of the model has, without LoRA's."""
    num_trained: int
    """Parameters that learn, over all devices."""
    parts: dict[str, int]

    @property
    def num_parameters(self) -> int:
        """Return the parameters of the model, without LoRA's."""
        return sum(self.parameters.values())

    @property
    def total(self) -> int:
        """Return the bytes of all parts."""
        return sum(self.parts.values())

    def fits(self, device_bytes: int) -> bool:
        """Return whether a device can hold it, with 5 % left for what is not counted."""
        return self.total <= 0.95 * device_bytes

    def describe(self) -> str:
        """Return a line for each part, and the sum."""
        lines = [f"{name:<30}{size / 1e9:>8.1f} GB" for name, size in self.parts.items()]
        return "\n".join([*lines, f"{'together, on each device':<30}{self.total / 1e9:>8.1f} GB"])


def plan_memory(
    config: Any,
    load: Load,
    *,
    trains: Collection[ModuleName],
    lora: LoraSettings | None = None,
    bf16: bool = True,
    activation_checkpointing: bool = True,
    reshard_after_forward: bool = True,
    loss_chunk_tokens: int = 1024,
    world_size: int = 1,
    num_references: int = 0,
) -> MemoryPlan:
    """Return what a step of a Thinker with this configuration needs on each of `world_size` devices.

    Frozen weights are held as they compute. `num_references` is how many frozen copies of the whole model stand beside it, as
    DPO has one.
    """
    parameters = count_parameters(config)
    whole = [name for name in parameters if name in trains and not (lora and name == "language_model")]
    learning = sum(parameters[name] for name in whole)
    frozen = sum(parameters.values()) - learning
    learning += num_lora_parameters(config, lora) if lora and "language_model" in trains else 0
    widths = _Widths(compute=2 if bf16 else _FLOAT32, layers_kept=not activation_checkpointing)
    activations = _activations(config, load, trains=trains, widths=widths, chunk=loss_chunk_tokens)
    copies = _copies(config, parameters, trains=whole, reshard=reshard_after_forward, num_references=num_references)
    if world_size == 1 and not bf16:
        copies = 0  # nothing is gathered: the weights themselves compute
    held = frozen + num_references * sum(parameters.values())
    parts = {
        "trained weights": learning * _FLOAT32 // world_size,
        "frozen weights": held * widths.compute // world_size,
        "gradients": learning * _FLOAT32 // world_size,
        "optimizer": learning * _MOMENTS // world_size,
        "copies to compute with": copies * widths.compute,
        "batch": load.num_patches * _patch_size(config) * _FLOAT32 + load.num_mel_frames * config.audio_config.num_mel_bins * 4,
        **activations,
    }
    return MemoryPlan(parameters=parameters, num_trained=learning, parts=parts)


def count_parameters(config: Any) -> dict[ModuleName, int]:
    """Return how many parameters each part has. Nothing is allocated."""
    import torch
    from transformers import Qwen2_5OmniThinkerForConditionalGeneration

    with torch.device("meta"):
        thinker = Qwen2_5OmniThinkerForConditionalGeneration(config)
    return {name: sum(one.numel() for one in found) for name, found in parameters_of(thinker).items()}


def num_lora_parameters(config: Any, lora: LoraSettings) -> int:
    """Return how many parameters the adapters of the language model have."""
    text = config.text_config
    queries, keys = _head_widths(text)
    sides = {
        "q_proj": text.hidden_size + queries,
        "k_proj": text.hidden_size + keys,
        "v_proj": text.hidden_size + keys,
        "o_proj": queries + text.hidden_size,
        **dict.fromkeys(("gate_proj", "up_proj", "down_proj"), text.hidden_size + text.intermediate_size),
    }
    return int(text.num_hidden_layers * lora.rank * sum(sides[name] for name in lora.targets))


@dataclass(frozen=True, kw_only=True)
class _Widths:
    """Bytes of a computed number, and whether a layer keeps all that its backward pass asks for."""

    compute: int
    layers_kept: bool


def _activations(config: Any, load: Load, *, trains: Collection[ModuleName], widths: _Widths, chunk: int) -> dict[str, int]:
    """Return what lives between the passes, and in the layer and the chunk of logits that are in work."""
    text, audio, vision = config.text_config, config.audio_config, config.vision_config
    c = widths.compute
    stacks = {
        "language model": (load.num_tokens, text.num_hidden_layers, c * text.hidden_size, text_layer_bytes(text, c)),
        "vision tower": (load.num_patches, vision.depth, c * vision.hidden_size, vision_layer_bytes(vision, c)),
        "audio tower": (load.num_mel_frames // 2, audio.encoder_layers, c * audio.d_model, audio_layer_bytes(audio, c)),
    }
    learns = {"vision tower": "vision_encoder" in trains, "audio tower": "audio_encoder" in trains}
    learns["language model"] = bool(set(trains) - {"head"})
    saved = {
        f"saved by the {name}": int(places * layers * (whole if widths.layers_kept else entry)) if learns[name] else 0
        for name, (places, layers, entry, whole) in stacks.items()
    }
    # In work, one at a time: all that the layer keeps, and the gradients of its widest part.
    in_work = max(int(places * whole * 1.5) for places, _, _, whole in stacks.values())
    rows = min(chunk, load.num_supervised)
    logits = rows * text.vocab_size * (2 * c + 3 * _FLOAT32)  # of the head and as float32, softmax, and both gradients
    ends = load.num_tokens * text.hidden_size * (3 * c + 2 * _FLOAT32)  # embeddings, last norm, supervised rows
    return {**saved, "one layer": in_work, "logits": logits, "embeddings and last norm": ends}


def text_layer_bytes(text: Any, width: int) -> int:
    """Return what a decoder layer keeps of each token for its backward pass, with attention that keeps no scores."""
    queries, keys = _head_widths(text)
    norms = 2 * text.hidden_size * (_FLOAT32 + 2 * width)  # what came as float32, divided, and times the weight
    return int(norms + 2 * (queries + keys) * width + 4 * text.intermediate_size * width)


def vision_layer_bytes(vision: Any, width: int) -> int:
    """Return what a layer of the vision tower keeps of each patch."""
    norms = 2 * vision.hidden_size * (_FLOAT32 + 2 * width)
    return int(norms + 5 * vision.hidden_size * width + 4 * vision.intermediate_size * width)


def audio_layer_bytes(audio: Any, width: int) -> int:
    """Return what a layer of the audio tower keeps of each of its places, two mel frames each."""
    return int(9 * audio.d_model * width + 2 * audio.encoder_ffn_dim * width)


def _copies(
    config: Any, parameters: dict[ModuleName, int], *, trains: Collection[ModuleName], reshard: bool, num_references: int
) -> int:
    """Return how many gathered numbers there are at a time: weights of all that is in no decoder layer, with the gradients of
    what learns there, and of two layers or all.
    """
    text = config.text_config
    embeddings = text.vocab_size * text.hidden_size
    layers = parameters["language_model"] - embeddings
    outside = {**parameters, "language_model": embeddings}
    gathered = sum(outside.values()) + (2 * layers // text.num_hidden_layers if reshard else layers)
    return int(gathered * (1 + num_references) + sum(outside[name] for name in trains))


def _head_widths(text: Any) -> tuple[int, int]:
    head_dim = int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    return text.num_attention_heads * head_dim, text.num_key_value_heads * head_dim


def _patch_size(config: Any) -> int:
    vision = config.vision_config
    return int(vision.in_channels * vision.temporal_patch_size * vision.patch_size**2)
