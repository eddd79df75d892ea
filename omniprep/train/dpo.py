"""Direct preference optimisation: raise the chosen answer over the rejected one, by more than a reference model does.

With log-probabilities of whole answers, π of the trained model and ρ of the reference:

    reward = β (log π − log ρ)        margin = reward of the chosen − reward of the rejected
    loss   = −log σ(margin)           (−log σ(margin) (1 − ε) − log σ(−margin) ε with label smoothing ε)

(Rafailov et al. 2023, arXiv:2305.18290; smoothing: Mitchell 2023, a note on conservative DPO.) The loss may fall while both
answers become less likely, the chosen one merely more slowly: the terms are returned apart to be watched, and `nll_weight`
adds the chosen answer's own cross-entropy per token, which stops it.
"""

from dataclasses import dataclass
from typing import Literal

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from omniprep.config import Config


class DpoSettings(Config):
    """The loss of preferences."""

    beta: float = Field(default=0.1, gt=0)
    """How strongly a departure from the reference counts as a preference."""
    length_normalized: bool = False
    """Compare log-probabilities per token of the answer: a longer answer is then not a smaller number."""
    nll_weight: float = Field(default=0.0, ge=0)
    """Weight of the chosen answer's cross-entropy per token, added to the loss."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Share of the pairs that are taken to be labelled the wrong way round."""
    reference: Literal["copy", "adapter_off", "stored"] = "copy"
    """A frozen second model; the trained one without its LoRA adapters; or values computed once and stored with the data."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DpoTerms:
    """What P pairs come to, each tensor (P,). Only `loss` has a gradient."""

    loss: Tensor
    chosen_reward: Tensor
    rejected_reward: Tensor
    margin: Tensor
    """The chosen reward minus the rejected one."""
    correct: Tensor
    """Whether the margin is positive, as 0 or 1."""


def dpo_terms(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    *,
    settings: DpoSettings,
    chosen_tokens: Tensor,
    rejected_tokens: Tensor,
) -> DpoTerms:
    """Return the terms of P pairs from (P,) log-probabilities of whole answers and their numbers of supervised tokens."""
    chosen_ratio, rejected_ratio = chosen - ref_chosen, rejected - ref_rejected
    if settings.length_normalized:
        chosen_ratio, rejected_ratio = chosen_ratio / chosen_tokens, rejected_ratio / rejected_tokens
    chosen_reward, rejected_reward = settings.beta * chosen_ratio, settings.beta * rejected_ratio
    margin = chosen_reward - rejected_reward
    loss = -F.logsigmoid(margin)
    if settings.label_smoothing:
        loss = (1 - settings.label_smoothing) * loss - settings.label_smoothing * F.logsigmoid(-margin)
    if settings.nll_weight:
        loss = loss - settings.nll_weight * chosen / chosen_tokens
    return DpoTerms(
        loss=loss,
        chosen_reward=chosen_reward.detach(),
        rejected_reward=rejected_reward.detach(),
        margin=margin.detach(),
        correct=(margin.detach() > 0).to(margin.dtype),
    )
