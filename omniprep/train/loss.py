"""Cross-entropy of the supervised tokens, each by itself, and the sums of them over documents.

The losses are kept apart because several sums are taken of them: over all (the training loss), over each document (the
log-probability that preferences are learnt from), over sources and kinds of media (what the log shows). None is divided
here: by how many tokens of the whole step, over all ranks, is the caller's to know.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

from omniprep.profile import IGNORE_INDEX


def token_losses(hidden: Tensor, head: nn.Module, targets: Tensor, *, chunk_tokens: int) -> Tensor:
    """Return (N,) float32 negative log-likelihoods of `targets` (N,), given `hidden` (N, H) and the output head.

    Logits of 32,768 tokens over 152,064 words are 20 GB in float32, so they are made `chunk_tokens` rows at a time, and made
    again for the gradients rather than kept. The head takes part even if N is 0.
    """
    if chunk_tokens < 1:
        raise ValueError(f"{chunk_tokens = } < 1")
    losses = [
        checkpoint(_chunk_losses, head, rows, wanted, use_reentrant=False)
        for rows, wanted in zip(hidden.split(chunk_tokens), targets.split(chunk_tokens), strict=True)
    ]
    return torch.cat(losses)


def _chunk_losses(head: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(head(hidden).float(), targets, reduction="none")


def documents_of(batch: Mapping[str, Any]) -> Tensor:
    """Return (n_supervised,) the number in `batch["documents"]` of each supervised token, in the order of the losses."""
    rows, columns = torch.nonzero(batch["shift_labels"] != IGNORE_INDEX, as_tuple=True)
    if batch["inputs"].get("attention_mask") is not None:  # padded: a row is a document
        return rows
    return torch.searchsorted(batch["cu_seqlens"].to(columns.device, torch.int64), columns, right=True) - 1


def document_sums(losses: Tensor, documents: Tensor, num_documents: int) -> Tensor:
    """Return (num_documents,) the sum of each document's losses; 0 for one without a supervised token."""
    return losses.new_zeros(num_documents).index_add(0, documents.to(losses.device), losses)
