"""What a training step computes, from the lengths of its documents and media: the numerator of MFU.

Multiplications and additions of matrices, two operations a pair; everything else is below a percent. Attention counts what
is seen: the causal half of each document by itself, the windows of the vision tower, the 2-second chunks of the audio
tower. Padding, recomputed activations and unsupervised rows of the head count nowhere, so that waste lowers MFU.

A backward pass costs as much as the forward pass for the gradients of the inputs, and as much again for those of the
weights:

    module                           weights    attention
    learns                           3 x        3 x
    frozen, gradients pass through   2 x        3 x
    frozen, nothing behind it        1 x        1 x
    the head, if it learns alone     2 x        -

An adapter begins with a norm that learns with it, and so is passed through to its beginning; of an encoder's first layer
the gradient of the input is not needed, but counted (below a percent of the tower).
"""

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from omniprep.profile import IGNORE_INDEX

Grid = tuple[int, int, int]
"""Temporal, vertical and horizontal patches of an image or video."""


@dataclass(frozen=True, kw_only=True)
class BatchLengths:
    """What decides how much a batch computes."""

    documents: tuple[int, ...]
    """Tokens of each document."""
    num_supervised: int
    """Rows that pass through the head."""
    mel_frames: tuple[int, ...] = ()
    """Of each audio item."""
    grids: tuple[Grid, ...] = ()
    """Of each image and video."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """Floating point operations of one forward pass of a module."""

    weights: float
    attention: float = 0.0

    @property
    def total(self) -> float:
        """Return both together."""
        return self.weights + self.attention


def batch_lengths(batch: Mapping[str, Any]) -> BatchLengths:
    """Return the lengths of a batch of `StreamingDataset`."""
    inputs = batch["inputs"]
    mask = inputs.get("feature_attention_mask")
    grids = [inputs[name] for name in ("image_grid_thw", "video_grid_thw") if inputs.get(name) is not None]
    return BatchLengths(
        documents=tuple(document.num_tokens for document in batch["documents"]),
        num_supervised=int((batch["shift_labels"] != IGNORE_INDEX).sum()),
        mel_frames=() if mask is None else tuple(int(frames) for frames in mask.sum(-1).tolist()),
        grids=tuple((int(t), int(h), int(w)) for grid in grids for t, h, w in grid.tolist()),
    )


def forward_flops(config: Any, lengths: BatchLengths) -> dict[str, Work]:
    """Return what a forward pass computes, by module (`model.ModuleName`). `config` is the Thinker's, of transformers."""
    return {
        **_audio(config.audio_config, lengths.mel_frames),
        **_vision(config.vision_config, lengths.grids),
        "language_model": _language_model(config.text_config, lengths.documents),
        "head": Work(weights=2.0 * lengths.num_supervised * config.text_config.hidden_size * config.text_config.vocab_size),
    }


def training_flops(config: Any, lengths: BatchLengths, *, trains: Collection[str], num_lora_parameters: int = 0) -> float:
    """Return what a forward and a backward pass of a batch compute, where `trains` names the modules that learn.

    With LoRA, give the number of the adapters' parameters: the language model's own weights are frozen then.
    """
    parts = forward_flops(config, lengths)
    frozen_llm = num_lora_parameters > 0
    learns = {name for name in trains if not (frozen_llm and name == "language_model")}
    towers = {name for name in learns if name.startswith(("audio", "vision"))}
    reaches_llm = bool(towers) or "language_model" in trains
    passes = {"head": reaches_llm, "language_model": reaches_llm}
    for tower in ("audio", "vision"):
        passes[f"{tower}_encoder"] = f"{tower}_encoder" in learns
        passes[f"{tower}_adapter"] = not learns.isdisjoint({f"{tower}_encoder", f"{tower}_adapter"})
    total = sum(_with_backward(parts[name], name in learns, passes[name]) for name in parts)
    return total + 3 * 2.0 * num_lora_parameters * sum(lengths.documents)


def _with_backward(work: Work, learns: bool, passes: bool) -> float:
    """Return forward and backward of a module: for its weights if it learns, for its inputs if gradients pass through."""
    return work.weights * (1 + learns + passes) + work.attention * (3 if learns or passes else 1)


def _language_model(text: Any, documents: Sequence[int]) -> Work:
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    queries, keys = text.num_attention_heads * head_dim, text.num_key_value_heads * head_dim
    per_token = text.hidden_size * (2 * queries + 2 * keys + 3 * text.intermediate_size)
    seen = sum(tokens * (tokens + 1) / 2 for tokens in documents)
    return Work(
        weights=2.0 * text.num_hidden_layers * per_token * sum(documents),
        attention=4.0 * text.num_hidden_layers * queries * seen,
    )


def _audio(audio: Any, mel_frames: Sequence[int]) -> dict[str, Work]:
    """Two convolutions, the second of which halves; layers that see a chunk; pooling halves again, and the adapter."""
    width, chunk = audio.d_model, 2 * audio.n_window
    chunks = [min(chunk, frames - start) for frames in mel_frames for start in range(0, frames, chunk)]
    places = [math.ceil(frames / 2) for frames in chunks]
    convolutions = 3 * width * (audio.num_mel_bins * sum(chunks) + width * sum(places))
    per_place = 4 * width**2 + 2 * width * audio.encoder_ffn_dim
    num_tokens = sum(math.ceil(frames / 2) // 2 for frames in mel_frames)
    return {
        "audio_encoder": Work(
            weights=2.0 * (convolutions + audio.encoder_layers * per_place * sum(places)),
            attention=4.0 * audio.encoder_layers * width * sum(count**2 for count in places),
        ),
        "audio_adapter": Work(weights=2.0 * num_tokens * width * audio.output_dim),
    }


def _vision(vision: Any, grids: Sequence[Grid]) -> dict[str, Work]:
    """Patches, layers that see a window and a few that see a whole frame, and the adapter over 2 x 2 patches."""
    width, merge = vision.hidden_size, vision.spatial_merge_size
    patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    num_patches = sum(t * h * w for t, h, w in grids)
    per_patch = patch * width + vision.depth * (4 * width**2 + 3 * width * vision.intermediate_size)
    num_full = sum(1 for layer in vision.fullatt_block_indexes if layer < vision.depth)
    window = vision.window_size // vision.patch_size // merge * merge
    seen = sum(
        t * (num_full * (h * w) ** 2 + (vision.depth - num_full) * _squares(h, window) * _squares(w, window)) for t, h, w in grids
    )
    merged = width * merge**2
    return {
        "vision_encoder": Work(weights=2.0 * num_patches * per_patch, attention=4.0 * width * seen),
        "vision_adapter": Work(weights=2.0 * (num_patches // merge**2) * merged * (merged + vision.out_hidden_size)),
    }


def _squares(side: int, window: int) -> int:
    """Return the sum of squares of the parts that a side is cut into.

    >>> _squares(20, 8)
    144
    """
    return side // window * window**2 + (side % window) ** 2


_PEAKS: tuple[tuple[str, float], ...] = (
    (r"\bB200\b", 2250e12),
    (r"\bH200 NVL\b", 835.5e12),
    (r"\bH200\b", 989.5e12),
    (r"\bH100 NVL\b", 835.5e12),
    (r"\bH100 PCIe\b", 756.5e12),
    (r"\bH100\b", 989.5e12),
    (r"\bA100\b", 312e12),
)
"""Dense bf16 operations a second by device name, the first that fits. NVIDIA's data sheets (A100, H100, H200, HGX B200); all
but the A100's give the rate with sparsity, which is twice that."""


def peak_flops(device_name: str) -> float | None:
    """Return the dense bf16 operations that a device does in a second by its data sheet, None if it is not known.

    >>> peak_flops("NVIDIA H200"), peak_flops("NVIDIA GH200 480GB"), peak_flops("cpu")
    (989500000000000.0, None, None)
    """
    if " MIG " in device_name:  # a part of a device
        return None
    return next((peak for pattern, peak in _PEAKS if re.search(pattern, device_name)), None)


def device_name(device: Any) -> str:
    """Return the name of a torch device as its driver gives it, or its type."""
    if device.type != "cuda":
        return str(device.type)
    import torch

    return str(torch.cuda.get_device_name(device))


def mfu(flops: float, seconds: float, device: str, *, num_devices: int = 1) -> float | None:
    """Return which share of what the devices can do was done, None if their peak is not known.

    >>> mfu(989.5e12, 2.0, "NVIDIA H200")
    0.5
    """
    peak = peak_flops(device)
    return None if peak is None else flops / (seconds * peak * num_devices)
