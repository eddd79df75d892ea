"""What the ranks of a test do. Batches, as arrays, come from the test; the model is made anew on each rank, by a seed."""

import copy
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch

from omniprep.stream.batch import Batch, pack
from omniprep.train.forward import TrainableThinker
from omniprep.train.lora import LoraSettings, add_lora
from omniprep.train.model import train_only
from omniprep.train.parallel import ParallelSettings, World, all_sum, clip_gradients, shard
from omniprep.train.tiny import tiny_thinker
from tests.stream.model_records import record

Inputs = tuple[dict[str, Any], torch.Tensor]
ALL = ("audio_encoder", "audio_adapter", "vision_encoder", "vision_adapter", "language_model", "head")


def inputs_of(batch: Batch) -> Inputs:
    """Return what a step gives to the model."""
    arrays = batch.model_inputs()
    inputs = {name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for name, value in arrays.items()}
    return inputs, torch.from_numpy(batch.shift_labels)


def batch_of(*names: str) -> Inputs:
    """Return one packed row of made records; of none, a row in which nothing is supervised."""
    return inputs_of(pack([record(name) for name in names], pad_to=None if names else 8))


@cache
def _thinker(seed: int) -> Any:
    return tiny_thinker(seed=seed)  # the random numbers of so large a vocabulary take a second


def trainable(seed: int = 3, *, names: Sequence[Any] = ALL, dtype: torch.dtype = torch.float32) -> TrainableThinker:
    """Return a tiny Thinker in which the named modules train; `dtype` is of what does not."""
    thinker = copy.deepcopy(_thinker(seed))
    torch.manual_seed(seed)
    if "lora" in names:
        add_lora(thinker, LoraSettings(rank=2))
        for name, parameter in thinker.named_parameters():
            if "lora_B" in name:  # which are zeros, and would leave the others without a gradient
                torch.nn.init.constant_(parameter, 0.01)
    train_only(thinker, [name for name in names if name in ALL])
    if "layers" in names:
        thinker.model.language_model.layers.requires_grad_(True)
    for parameter in thinker.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return TrainableThinker(thinker)


def full(tensor: Any) -> torch.Tensor:
    """Return a whole tensor on every rank."""
    whole: torch.Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole.detach()


class Gradients(NamedTuple):
    """The loss of a step and its gradients."""

    loss: float
    num_targets: float
    norm: float
    by_name: Mapping[str, torch.Tensor]


def gradients(model: Any, batches: Sequence[Inputs], world: World) -> Gradients:
    """Return the sums over these batches and all ranks, divided by all targets."""
    num_targets = all_sum([sum(float((labels != -100).sum()) for _, labels in batches)], world)[0]
    loss = 0.0
    for inputs, labels in batches:
        part = model(inputs, labels).sum() / num_targets
        part.backward()
        loss += part.item()
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    assert all(value.grad is not None for value in trained.values()), "FSDP leaves out what has no gradient on a rank"
    return Gradients(
        all_sum([loss], world)[0],
        num_targets,
        clip_gradients(trained.values(), None, world),
        {name: full(value.grad).clone() for name, value in trained.items()},
    )


ALONE = World(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))


class Compared(NamedTuple):
    """A step on all ranks beside the same step in one process that knows nothing of ranks."""

    loss: float
    loss_alone: float
    norm: float
    norm_alone: float
    worst_gradient: float
    """Largest difference of an entry, as a share of the largest entry of that parameter's gradient or of 1e-3 of the norm."""


def compare(
    world: World, per_rank: Sequence[Sequence[str]], settings: ParallelSettings, dtype: torch.dtype, names: Sequence[Any]
) -> Compared | None:
    """Take a step with a batch on each rank, and, on the main rank, with all of them in one process."""
    model = shard(trainable(names=names, dtype=dtype), settings, world)
    ours = gradients(model, [batch_of(*per_rank[world.rank])], world)
    if not world.is_main:
        return None
    alone = gradients(trainable(names=names, dtype=dtype), [batch_of(*names) for names in per_rank], ALONE)
    assert ours.by_name.keys() == alone.by_name.keys()
    assert ours.num_targets == alone.num_targets
    worst = max(
        float((ours.by_name[name] - value).abs().max() / max(float(value.abs().max()), 1e-3 * alone.norm))
        for name, value in alone.by_name.items()
    )
    return Compared(ours.loss, alone.loss, ours.norm, alone.norm, worst)


def compare_all(world: World, cases: Mapping[str, Mapping[str, Any]]) -> dict[str, Compared | None]:
    """Return each case's comparison: one start of the processes for all of them."""
    defaults: dict[str, Any] = {"settings": ParallelSettings(), "dtype": torch.float32, "names": ALL}
    return {name: compare(world, **{**defaults, **case}) for name, case in cases.items()}
