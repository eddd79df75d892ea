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

from omniprep.profile import IGNORE_INDEX


def token_losses(hidden: Tensor, head: nn.Module, targets: Tensor, *, chunk_tokens: int) -> Tensor:
    """Return (N,) float32 negative log-likelihoods of `targets` (N,), given `hidden` (N, H) and the output head, a `Linear`.

    Logits of 32,768 tokens over 152,064 words are 20 GB in float32, so they are made `chunk_tokens` rows at a time, and made
    again for the gradients rather than kept. The head takes part even if N is 0.
    """
    if chunk_tokens < 1:
        raise ValueError(f"{chunk_tokens = } < 1")
    losses: Tensor = _ChunkedLosses.apply(hidden, head.weight, targets, chunk_tokens)
    return losses


class _ChunkedLosses(torch.autograd.Function):  # type: ignore[misc]
    """Cross-entropy of a linear head, whose gradient over all chunks is summed in float32, whatever the head computes in."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk_tokens: int) -> Tensor:
        """Return the losses; of the logits only the logarithm of the sum of their exponentials is kept."""
        sums = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        losses = torch.empty_like(sums)
        for start in range(0, len(hidden), chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            logits = F.linear(hidden[rows], weight).float()
            sums[rows] = logits.logsumexp(-1)
            losses[rows] = sums[rows] - logits.gather(1, targets[rows, None])[:, 0]
        ctx.save_for_backward(hidden, weight, targets, sums)
        ctx.chunk_tokens = chunk_tokens
        return losses

    @staticmethod
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        """Return the gradients: of the logits they are softmax - one-hot, times that of the loss."""
        hidden, weight, targets, sums = ctx.saved_tensors
        of_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        of_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for start in range(0, len(hidden), ctx.chunk_tokens):
            rows = slice(start, start + ctx.chunk_tokens)
            of_logits = F.linear(hidden[rows], weight).float().sub_(sums[rows, None]).exp_()
            of_logits.scatter_add_(1, targets[rows, None], of_logits.new_full((len(of_logits), 1), -1.0))
            of_logits = of_logits.mul_(grad_losses[rows, None]).to(weight.dtype)
            if of_hidden is not None:
                of_hidden[rows] = of_logits @ weight
            if of_weight is not None:
                of_weight += of_logits.T @ hidden[rows]
        return of_hidden, None if of_weight is None else of_weight.to(weight.dtype), None, None


def documents_of(batch: Mapping[str, Any]) -> Tensor:
    """Return (n_supervised,) the number in `batch["documents"]` of each supervised token, in the order of the losses."""
    rows, columns = torch.nonzero(batch["shift_labels"] != IGNORE_INDEX, as_tuple=True)
    if batch["inputs"].get("attention_mask") is not None:  # padded: a row is a document
        return rows
    return torch.searchsorted(batch["cu_seqlens"].to(columns.device, torch.int64), columns, right=True) - 1


def document_sums(losses: Tensor, documents: Tensor, num_documents: int) -> Tensor:
    """Return (num_documents,) the sum of each document's losses; 0 for one without a supervised token."""
    return losses.new_zeros(num_documents).index_add(0, documents.to(losses.device), losses)
