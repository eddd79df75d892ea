"""The one call of a training step: from the inputs of a batch to the loss of every supervised token.

FSDP gathers and frees weights around the forward call of what it wraps, so the loss, and with it the head, is computed
inside that call, and one call is all that there is in a step. The ranks of a step must also agree on which weights get
gradients, or their sums over ranks do not fit together: a rank whose batch has no sound, no picture, or nothing to learn
gives zeros for the weights it did not use.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from omniprep.errors import ConfigError
from omniprep.profile import IGNORE_INDEX
from omniprep.train.attention import document_borders, uses_varlen
from omniprep.train.loss import token_losses

_NOT_THE_MODELS = {"labels", "use_cache"}
"""Inputs of a batch that are not passed on: the loss is made here, and a cache would let packed documents see each other."""


class TrainableThinker(nn.Module):  # type: ignore[misc]  # torch is untyped here
    """A Thinker whose call returns the losses of the supervised tokens. Give it to FSDP as the root."""

    def __init__(self, thinker: Any, *, loss_chunk_tokens: int = 1024) -> None:
        """`loss_chunk_tokens` is how many tokens have logits at the same time."""
        super().__init__()
        self.thinker = thinker
        self.loss_chunk_tokens = loss_chunk_tokens

    def forward(self, inputs: Mapping[str, Any], shift_labels: Tensor) -> Tensor:
        """Return (n_supervised,) float32 negative log-likelihoods, in the order of `shift_labels != -100`.

        `sum().backward()` works for any batch and gives every trainable parameter a gradient, if need be of zeros: also
        those of a tower that no input went through, and all of them if no token is supervised.
        """
        check_inputs(inputs)
        given = {name: value for name, value in inputs.items() if name not in _NOT_THE_MODELS}
        if uses_varlen(self.thinker) and "cu_seq_lens_q" not in given:
            given |= document_borders(inputs["position_ids"])
        hidden = self.thinker.model(**given, use_cache=False).last_hidden_state
        supervised = shift_labels != IGNORE_INDEX
        losses = token_losses(
            hidden[supervised], self.thinker.lm_head, shift_labels[supervised], chunk_tokens=self.loss_chunk_tokens
        )
        return losses + nothing_of(self._unused(inputs)).to(losses)

    def _unused(self, inputs: Mapping[str, Any]) -> Iterator[nn.Parameter]:
        """Yield the trainable parameters of the towers that these inputs do not go through."""
        towers = {
            self.thinker.model.audio_tower: ("input_features",),
            self.thinker.model.visual: ("pixel_values", "pixel_values_videos"),
        }
        for tower, names in towers.items():
            if all(inputs.get(name) is None for name in names):
                yield from (parameter for parameter in tower.parameters() if parameter.requires_grad)


def nothing_of(parameters: Iterator[nn.Parameter]) -> Tensor:
    """Return a 0 whose gradient with respect to each of the parameters is zeros, whatever their values are."""
    empty = [parameter.flatten()[:0].sum() for parameter in parameters]
    return torch.stack(empty).sum() if empty else torch.zeros(())


def check_inputs(inputs: Mapping[str, Any]) -> None:
    """Raise `ConfigError` if documents of a packed row would see each other, by the shapes alone: no value is fetched.

    `stream.guard.check_packed` looks at the values as well.
    """
    positions = inputs.get("position_ids")
    if positions is None or positions.ndim != 3 or positions.shape[0] != 4:
        found = "none" if positions is None else f"{tuple(positions.shape)}"
        raise ConfigError(
            f"position_ids: expected (4, B, L), got {found}; without a first row that begins anew at each document, the model "
            "takes a row for one document; give it batches of OmniPrep's stream"
        )
    mask, ids = inputs.get("attention_mask"), inputs["input_ids"]
    if mask is not None and mask.shape != ids.shape:
        raise ConfigError(f"attention_mask: expected {tuple(ids.shape)} like input_ids, got {tuple(mask.shape)}")
