"""AdamW and its learning rate, which is a function of the step: there is no scheduler whose state could be lost."""

import math
from collections.abc import Iterable
from typing import Literal

import torch
from pydantic import Field

from omniprep.config import Config


class OptimizerSettings(Config):
    """How parameters are updated."""

    learning_rate: float = Field(default=1e-5, gt=0)
    """At its highest, after the warm-up."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """How it falls from there to the last step."""
    min_learning_rate_ratio: float = Field(default=0.1, ge=0, le=1)
    """Its last value, as a share of the highest."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps in which it rises in a line from 0."""
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    """Of matrices; norms and biases never decay."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Longer gradients, over all parameters and ranks, are shortened to this."""


def learning_rate_at(step: int, *, num_steps: int, settings: OptimizerSettings) -> float:
    """Return the learning rate of a step, counted from 0.

    >>> settings = OptimizerSettings(learning_rate=1.0, warmup_steps=2, min_learning_rate_ratio=0.5, schedule="linear")
    >>> [learning_rate_at(step, num_steps=5, settings=settings) for step in range(5)]
    [0.5, 1.0, 1.0, 0.75, 0.5]
    """
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    done = (step - settings.warmup_steps) / max(1, num_steps - 1 - settings.warmup_steps)
    low = settings.min_learning_rate_ratio
    match settings.schedule:
        case "constant":
            share = 1.0
        case "linear":
            share = 1 - (1 - low) * min(done, 1.0)
        case "cosine":
            share = low + (1 - low) * (1 + math.cos(math.pi * min(done, 1.0))) / 2
    return settings.learning_rate * share


def make_optimizer(parameters: Iterable[torch.nn.Parameter], settings: OptimizerSettings) -> torch.optim.AdamW:
    """Return AdamW over the parameters that require gradients; those of fewer than two dimensions do not decay."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    groups = [
        {"params": [one for one in trained if one.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [one for one in trained if one.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=settings.learning_rate,
        betas=settings.betas,
        eps=settings.eps,
        fused=all(one.is_cuda for one in trained),
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Let the next update use this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = value
