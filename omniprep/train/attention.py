"""Attention inside each document, by its borders: nothing is computed between documents, and no mask of L x L is made.

transformers asks a table of functions for its attention. The one that is put there, `flash_varlen`, takes the borders of
documents (`cu_seq_lens_q`), as the language model gets them from `TrainableThinker`, and those of windows, frames and sound
chunks, as the towers make them: they take their path of one call a layer because "flash" is in the name. On CUDA in half
precision it is torch's own kernel; anywhere else, torch's scaled dot product of one document after another.

With `sdpa`, transformers' default, a packed row of 32,768 tokens has a mask of 1 GB and no fast kernel takes it.
The kernel's path was written by torch's documentation and has not been run here: there was no GPU.
"""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

AttentionName = Literal["sdpa", "varlen"]

_REGISTERED = "flash_varlen"
_NAMES: dict[AttentionName, str] = {"sdpa": "sdpa", "varlen": _REGISTERED}


def use_attention(thinker: Any, name: AttentionName) -> None:
    """Let the language model and both towers of a Thinker use this attention from now on.

    `varlen` is for training on rows that are packed, or padded at their end; to generate with a cache, change to `sdpa`.
    """
    from transformers import AttentionInterface, PreTrainedModel

    AttentionInterface.register(_REGISTERED, varlen_attention)
    # `set_attn_implementation` takes any name with "flash" in it for a package to import; what reads it is the config.
    for module in thinker.modules():
        if isinstance(module, PreTrainedModel):
            module.config._attn_implementation = _NAMES[name]


def uses_varlen(thinker: Any) -> bool:
    """Return whether the language model needs the borders of documents."""
    return bool(thinker.model.language_model.config._attn_implementation == _REGISTERED)


def document_borders(position_ids: Tensor) -> dict[str, Any]:
    """Return what `varlen` needs to know of rows one after another: the borders of their documents, and the longest.

    `position_ids` (4, B, L): the first row is 0 where a document begins. On a GPU this waits for the values.
    """
    places = position_ids[0].flatten()
    starts = torch.nonzero(places == 0).flatten()
    borders = torch.cat([starts, starts.new_tensor([places.numel()])]).to(torch.int32)
    longest = int(borders.diff().max())
    return {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders, "max_length_q": longest, "max_length_k": longest}


def varlen_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Return (B, L, heads, D) attention of (B, heads, L, D), each token seeing its own document, in transformers' form.

    The rows are one after another for the borders. An `attention_mask` is not looked at: padding stands at the end of rows,
    where what is before it does not see it.
    """
    if cu_seq_lens_q is None or max_length_q is None:
        raise ValueError(f"{_REGISTERED}: no borders of documents in the call; only TrainableThinker gives them, else use sdpa")
    if dropout:
        raise ValueError(f"{_REGISTERED}: {dropout = }, its kernel has none; set the configuration's attention_dropout to 0")
    batch, _, length, _ = query.shape
    causal = bool(module.is_causal if is_causal is None else is_causal)
    query, key, value = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value))
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16):
        mixed = _by_kernel(query, key, value, borders=cu_seq_lens_q, longest=max_length_q, scaling=scaling, causal=causal)
    else:
        mixed = _one_by_one(query, key, value, borders=cu_seq_lens_q, scaling=scaling, causal=causal)
    return mixed.unflatten(0, (batch, length)), None


def _by_kernel(
    query: Tensor, key: Tensor, value: Tensor, *, borders: Tensor, longest: int, scaling: float | None, causal: bool
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    borders = borders.to(query.device, torch.int32)
    mixed: Tensor = varlen_attn(
        query,
        key,
        value,
        borders,
        borders,
        longest,
        longest,
        scale=scaling,
        window_size=(-1, 0) if causal else (-1, -1),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return mixed


def _one_by_one(query: Tensor, key: Tensor, value: Tensor, *, borders: Tensor, scaling: float | None, causal: bool) -> Tensor:
    """Return the same, exactly, from (tokens, heads, D)."""
    lengths = borders.diff().tolist()
    grouped = query.shape[1] != key.shape[1]
    mixed = []
    for document in zip(*(tensor.split(lengths) for tensor in (query, key, value)), strict=True):
        one_query, one_key, one_value = (tensor.transpose(0, 1).unsqueeze(0) for tensor in document)
        one = F.scaled_dot_product_attention(one_query, one_key, one_value, is_causal=causal, scale=scaling, enable_gqa=grouped)
        mixed.append(one.squeeze(0).transpose(0, 1))
    return torch.cat(mixed)
