"""One process or many: the process group, how a model is spread over it, and sums over its ranks.

The same code runs on one CPU, on N processes of one machine (gloo), on one GPU and on N nodes (`torchrun`). A process that
runs alone is a group of one, so nothing else in this folder asks how many there are.

The layout is FSDP2's: every decoder layer of the language model is a unit of its own; the towers, the embeddings and the
head are in the root's. That the towers are in the root is not a matter of size: a unit gathers its parameters when it is
called, and a rank whose batch has no video does not call the vision tower. Ranks would then wait in different collectives,
for ever. The root gathers once, whatever the batch holds.

Gradients are summed over ranks, never averaged: the loss is already divided by the supervised tokens of all of them.
"""

import gc
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from pydantic import Field
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from omniprep.config import Config
from omniprep.errors import ConfigError, OmniPrepError
from omniprep.storage.folder import StorageError

Answer = TypeVar("Answer")

_ENVIRONMENT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun and Ray Train set for each process."""
_BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}
"""Beside NCCL, gloo: counts and checkpoints' plans are exchanged without waiting for the GPU."""


class ParallelSettings(Config):
    """How the model is spread over devices and what is traded for memory."""

    bf16: bool | None = None
    """Compute in bfloat16 over float32 weights and sums; None: on CUDA."""
    activation_checkpointing: bool = False
    """Keep only the input of every layer, of the towers too, and compute the rest again in the backward pass."""
    compile: bool = False
    """Compile every decoder layer; the first steps take minutes."""
    attention: Literal["auto", "sdpa", "varlen"] = "auto"
    """`varlen` is told where documents end and never builds an L x L mask; `sdpa` is transformers' default. auto: `varlen`."""
    loss_chunk_tokens: int = Field(default=1024, ge=1)
    """Rows of logits that are alive at a time."""
    reshard_after_forward: bool = True
    """Let go of a layer's gathered weights between its forward and its backward pass; False: faster, and more memory."""

    def computes_in_bf16(self, device: torch.device) -> bool:
        """Return whether matrices are multiplied in bfloat16 on this device."""
        return device.type == "cuda" if self.bf16 is None else self.bf16

    @property
    def chosen_attention(self) -> Literal["sdpa", "varlen"]:
        """Return which attention runs."""
        return "varlen" if self.attention == "auto" else self.attention


@dataclass(frozen=True, kw_only=True)
class World:
    """This process among all that train together."""

    rank: int
    world_size: int
    local_rank: int
    """Its number on its machine, which is its GPU's."""
    device: torch.device

    @property
    def is_distributed(self) -> bool:
        """Return whether there are others."""
        return self.world_size > 1

    @property
    def is_main(self) -> bool:
        """Return whether this is the one that prints and decides."""
        return self.rank == 0


@contextmanager
def world(*, timeout_s: float = 1800.0, device: Literal["auto", "cpu", "cuda"] = "auto") -> Iterator[World]:
    """Join the process group that the environment describes, or be one alone; leave it at the end.

    A group that exists already (Ray Train makes one) is used and left as it is. `timeout_s` is how long a rank waits for
    the others in one exchange before it gives up. Raises `ConfigError` if the environment describes half a group.
    """
    if dist.is_initialized():
        if "cpu" not in dist.get_backend_config():
            raise ConfigError(
                f"the process group has the backend {dist.get_backend_config()}, which exchanges nothing between CPUs; "
                f'make it with backend="{_BACKENDS["cuda"]}"'
            )
        environment = {"LOCAL_RANK": "0", **os.environ, "RANK": str(dist.get_rank()), "WORLD_SIZE": str(dist.get_world_size())}
        yield _place({**dict.fromkeys(_ENVIRONMENT, ""), **environment}, device)
        return
    here = _place(os.environ, device)
    if here.device.type == "cuda":
        torch.cuda.set_device(here.device)
    options: dict[str, Any] = {"backend": _BACKENDS[here.device.type], "timeout": timedelta(seconds=timeout_s)}
    if "RANK" not in os.environ:
        options |= {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group(**options)
    try:
        yield here
    except BaseException:
        # With others, NCCL's end may wait for what they do in a collective that this rank will not join, and the error would
        # never be told. The process ends anyway.
        if not here.is_distributed:
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def _place(environment: Mapping[str, str], device: Literal["auto", "cpu", "cuda"]) -> World:
    """Return this process's place as torchrun's variables tell it. Raises `ConfigError`."""
    numbers = _numbers(environment)
    kind = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cpu":
        return World(device=torch.device("cpu"), **numbers)
    num_devices = torch.cuda.device_count()
    if numbers["local_rank"] >= num_devices:
        raise ConfigError(
            f"LOCAL_RANK={numbers['local_rank']}, but this machine shows {num_devices} GPU(s); "
            f"start at most {num_devices} processes on it (torchrun --nproc-per-node)"
        )
    return World(device=torch.device("cuda", numbers["local_rank"]), **numbers)


def _numbers(environment: Mapping[str, str]) -> dict[str, int]:
    missing = [name for name in _ENVIRONMENT if name not in environment]
    if len(missing) == len(_ENVIRONMENT) or ("RANK" in missing and "WORLD_SIZE" in missing):
        return {"rank": 0, "world_size": 1, "local_rank": 0}
    if missing:
        raise ConfigError(
            f"the environment describes half a process group: {', '.join(missing)} not set; "
            "start with torchrun, or unset RANK and WORLD_SIZE to train in one process"
        )
    numbers = {}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        if not environment[name].isdecimal():
            raise ConfigError(f"{name}={environment[name]!r:.40}: expected a whole number; start with torchrun")
        numbers[name.lower()] = int(environment[name])
    if numbers["rank"] >= numbers["world_size"]:
        raise ConfigError(f"RANK={numbers['rank']} is not below WORLD_SIZE={numbers['world_size']}; start with torchrun")
    return numbers


def shard(model: nn.Module, settings: ParallelSettings, world: World) -> nn.Module:
    """Put a model, a `TrainableThinker` or a frozen reference, on this world's devices; returns the same object.

    What trains becomes float32; what is frozen keeps its type. One CPU process that computes in float32 is left unwrapped;
    on a GPU even one process is wrapped, for FSDP is what keeps float32 weights beside the bfloat16 that computes. All
    calls must go through `model(...)` itself. What trains is settled before this, and optimizers are made after it.
    """
    if settings.activation_checkpointing:
        _checkpoint_activations(model)
    layers = decoder_layers(model)
    if settings.compile:
        for layer in layers:
            layer.compile(dynamic=True)
    bf16 = settings.computes_in_bf16(world.device)
    if not world.is_distributed and world.device.type == "cpu" and not bf16:
        _to_float32(model)
        return model
    if world.is_distributed:
        _go_back_through_every_layer(model)
    mesh = init_device_mesh(world.device.type, (world.world_size,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if bf16 else MixedPrecisionPolicy()
    for layer in layers:
        _to_float32(layer)  # one after another: the whole model in float32 need not fit into a process
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=settings.reshard_after_forward)
    _to_float32(model)
    # The root's weights are needed again as soon as the backward pass begins.
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for unit in model.modules():
        if isinstance(unit, FSDPModule):
            unit.set_gradient_divide_factor(1.0)
            # Else the factor is multiplied inside the collective, which gloo cannot do; times 1 there is nothing to do.
            unit.set_force_sum_reduction_for_comms(True)
    return model


def _to_float32(module: nn.Module) -> None:
    """Store what trains in float32: updates are smaller than bfloat16 can add to a weight."""
    for parameter in module.parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """Return the language model's layers in order, wherever adapters and wrappers have put them."""
    from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2_5OmniDecoderLayer

    return [module for module in model.modules() if isinstance(module, Qwen2_5OmniDecoderLayer)]


def _thinker_of(model: nn.Module) -> Any:
    """Return transformers' model inside, whose first module it is."""
    from transformers import PreTrainedModel

    return next(module for module in model.modules() if isinstance(module, PreTrainedModel))


def _checkpoint_activations(model: nn.Module) -> None:
    """Turn on what transformers' layers, decoder and towers, have for it; the modules keep their names."""
    thinker = _thinker_of(model)
    thinker.activation_checkpointing_enable({"use_reentrant": False})
    # That is for the reentrant kind; here it would only make gradients for frozen embeddings.
    thinker.disable_input_require_grads()


def _go_back_through_every_layer(model: nn.Module) -> None:
    """Let every rank's backward pass go through the same layers, whether its batch has media or not.

    Where a tower trains under frozen embeddings, the layers' input needs a gradient if media went into it, and else not. A
    rank without media would leave out layers whose weights the others gather together in the backward pass, or sum up
    gradients in another order: both wait for ever.
    """
    thinker = _thinker_of(model)
    towers = (thinker.model.audio_tower, thinker.model.visual)
    if any(parameter.requires_grad for tower in towers for parameter in tower.parameters()):
        thinker.enable_input_require_grads()


def all_sum(values: Sequence[float] | Tensor, world: World) -> Any:
    """Return the sums over all ranks in float64: a list for a list, a tensor for a tensor. All ranks give as many values.

    Plain numbers do not touch the GPU: nothing waits for it.
    """
    if isinstance(values, Tensor):
        total = values.detach().to(torch.float64, copy=True)
        if world.is_distributed:
            dist.all_reduce(total)
        return total
    return all_sum(torch.tensor(values, dtype=torch.float64), world).tolist()


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float | None, world: World) -> float:
    """Scale gradients down to a global norm of `max_norm`, or leave them with None; return the norm that they had.

    The norm is over all ranks' shards. It is not finite where a gradient is not; nothing is scaled then that could be saved.
    """
    with_gradient = [parameter for parameter in parameters if parameter.grad is not None]
    if not with_gradient:
        return 0.0
    squares = torch.stack([_sum_of_squares(parameter.grad) for parameter in with_gradient]).sum()
    norm = all_sum(squares, world).sqrt()
    if max_norm is not None:
        nn.utils.clip_grads_with_norm_(with_gradient, max_norm, norm)
    return float(norm)


def _sum_of_squares(gradient: Tensor) -> Tensor:
    """Return the sum over this rank's part of a gradient, in float64.

    Row by row: in float32 alone, the norm of an embedding is off in its sixth digit, by another amount for each way to cut it.
    """
    part = gradient.to_local() if hasattr(gradient, "to_local") else gradient
    rows = torch.linalg.vector_norm(part, dim=-1) if part.ndim else part
    return rows.double().square().sum()


def release_memory() -> None:
    """Give back the memory of models that nobody uses any more: FSDP's modules refer to each other, so they linger."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def on_main(action: Callable[[], Answer], world: World) -> Answer:
    """Do something on the main rank and return its answer on all of them, so that all see the same; its errors are raised on all.

    What the disk refuses is a `StorageError`.
    """
    told: list[Any] = [None, None]
    if world.is_main:
        try:
            told[0] = action()
        except OmniPrepError as error:
            told[1] = error
        except (OSError, SafetensorError) as error:
            where, why = getattr(error, "filename", None), getattr(error, "strerror", None)
            told[1] = StorageError(f"{where or 'the disk'}: {why or error}; mend that and run the same command again")
    if world.is_distributed:
        dist.broadcast_object_list(told, src=0)
    if told[1] is not None:
        raise told[1]
    answer: Answer = told[0]
    return answer
