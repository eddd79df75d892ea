"""What a step makes smaller: the cross-entropy of supervised tokens, or the DPO loss of pairs.

An objective says what a batch counts for, so that a step divides once, by the count over all its micro-batches and ranks
(`docs/training.md`), and what of a forward call is divided by that.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from omniprep.train.dpo import DpoSettings, dpo_terms
from omniprep.train.loss import document_sums, documents_of
from omniprep.train.tally import Tally

if TYPE_CHECKING:
    from omniprep.train.reference import Reference

StreamBatch = Mapping[str, Any]
"""What `StreamingDataset` yields, its tensors on the model's device."""


class Objective(Protocol):
    """What is minimised, and told."""

    def count(self, batch: StreamBatch) -> int:
        """Return what the batch counts for in the mean of a step."""

    def loss(self, losses: Tensor, batch: StreamBatch, tally: Tally) -> Tensor:
        """Return the batch's part of the step's sum, a scalar; put what is to be told into the tally.

        `losses` (n_supervised,) are the negative log-likelihoods of the batch's supervised tokens.
        """


class NextToken:
    """Cross-entropy, in nats: the mean over all supervised tokens of a step."""

    def count(self, batch: StreamBatch) -> int:
        """Return the supervised tokens."""
        return int(batch["num_supervised"])

    def loss(self, losses: Tensor, batch: StreamBatch, tally: Tally) -> Tensor:
        """Return the sum of the losses."""
        documents = documents_of(batch)
        number = len(batch["documents"])
        totals = document_sums(losses.detach(), documents, number).tolist()
        tally.add_by_document("loss", batch["documents"], totals, _counts(documents, number).tolist())
        return losses.sum()


class PairPreference:
    """Direct preference optimisation (Rafailov et al. 2023, eq. 7), the mean over all pairs of a step."""

    def __init__(self, settings: DpoSettings, reference: "Reference") -> None:
        self.settings = settings
        self._reference = reference

    def count(self, batch: StreamBatch) -> int:
        """Return the pairs."""
        return len(batch["documents"]) // 2

    def loss(self, losses: Tensor, batch: StreamBatch, tally: Tally) -> Tensor:
        """Return the sum of the pairs' losses; tell rewards, margin and how often the chosen one is ahead."""
        reference = self._reference(batch)  # before anything else: on every rank, even without pairs
        documents, number = documents_of(batch), len(batch["documents"])
        if not number:
            return losses.sum()
        log_probs = -document_sums(losses, documents, number)
        counts = _counts(documents, number)
        terms = dpo_terms(
            log_probs[0::2],
            log_probs[1::2],
            reference[0::2],
            reference[1::2],
            settings=self.settings,
            chosen_tokens=counts[0::2],
            rejected_tokens=counts[1::2],
        )
        ones = [1.0] * (number // 2)
        chosen = batch["documents"][0::2]
        tally.add_by_document("loss", chosen, terms.loss.detach().tolist(), ones)
        tally.add_by_document("margin", chosen, terms.margin.tolist(), ones)
        told = {
            "accuracy": terms.correct,
            "reward/chosen": terms.chosen_reward,
            "reward/rejected": terms.rejected_reward,
            "log_prob/chosen": log_probs[0::2],
            "log_prob/rejected": log_probs[1::2],
            "tokens/chosen": counts[0::2],
            "tokens/rejected": counts[1::2],
        }
        for name, values in told.items():
            tally.add(name, float(values.detach().sum()), weight=number // 2)
        return terms.loss.sum()


def _counts(documents: Tensor, number: int) -> Tensor:
    return torch.bincount(documents, minlength=number)
