"""What a training run would be, before a weight is loaded: parameters, memory of a device, steps, tokens."""

import math
import os
from typing import Any

from pydantic import BaseModel
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from omniprep.profile import QWEN2_5_OMNI, ModelProfile
from omniprep.stream.dataset import StreamingDataset
from omniprep.stream.plan import Plan
from omniprep.train.checks import check_context, check_rope_mode, read_datasets
from omniprep.train.memory import H200_BYTES, Load, MemoryPlan, plan_memory
from omniprep.train.model import config_of
from omniprep.train.phase import count_steps
from omniprep.train.recipe import Phase, TrainRecipe


class DryPhase(BaseModel):
    """What one phase would be."""

    name: str
    trains: tuple[str, ...]
    num_trained: int
    """Parameters that learn, with LoRA's."""
    num_steps: int
    steps_an_epoch: int
    tokens_an_epoch: int
    tokens_a_step: float
    fill: float
    """Which share of all places of rows holds tokens."""
    memory_bytes: dict[str, int]
    """Of each device on CUDA, at the heaviest row that the plan allows."""

    @property
    def total_bytes(self) -> int:
        """Return the bytes of all parts."""
        return sum(self.memory_bytes.values())


class DryRun(BaseModel):
    """What a recipe would train."""

    checkpoint: str
    parameters: dict[str, int]
    """By module, without LoRA's."""
    world_size: int
    phases: tuple[DryPhase, ...]


def dry_run(recipe: TrainRecipe, *, profile: ModelProfile = QWEN2_5_OMNI) -> DryRun:
    """Return what a recipe would train; datasets are opened, of the model only its configuration is.

    The number of devices is that of torchrun's environment, else 1. Raises `ConfigError` as the run would.
    """
    manifests = read_datasets(recipe, profile)
    check_rope_mode(recipe.model.checkpoint, recipe.data, manifests)
    config = config_of(recipe.model, profile=profile)
    check_context(config, recipe.data.plan.max_tokens)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    stream = StreamingDataset(
        recipe.data.weighted, recipe.data.plan, split=recipe.data.split, rank=0, world_size=world_size, profile=profile
    )
    len(stream)  # says what is wrong if a step cannot be shared out to the ranks
    plan = stream.plan
    phases, memory = [], None
    for phase in recipe.phases:
        memory = _memory(recipe, phase, config, world_size)
        phases.append(_phase(phase, plan, memory, num_steps=count_steps(stream, phase)))
    assert memory is not None
    parameters = {str(name): number for name, number in memory.parameters.items()}
    return DryRun(checkpoint=recipe.model.checkpoint, parameters=parameters, world_size=world_size, phases=tuple(phases))


def _phase(phase: Phase, plan: Plan, memory: MemoryPlan, *, num_steps: int) -> DryPhase:
    places = plan.num_bins * plan.config.max_tokens
    return DryPhase(
        name=phase.name,
        trains=phase.train,
        num_trained=memory.num_trained,
        num_steps=num_steps,
        steps_an_epoch=plan.num_steps,
        tokens_an_epoch=plan.num_tokens,
        tokens_a_step=plan.num_tokens / max(plan.num_steps, 1),
        fill=plan.num_tokens / places if places else math.nan,
        memory_bytes=memory.parts,
    )


def _memory(recipe: TrainRecipe, phase: Phase, config: Any, world_size: int) -> MemoryPlan:
    plan, parallel = recipe.data.plan, recipe.parallel
    load = Load.heaviest(plan.max_tokens, max_patches=plan.max_patches, max_mel_frames=plan.max_mel_frames)
    return plan_memory(
        config,
        load,
        trains=phase.train,
        lora=recipe.model.lora,
        bf16=parallel.bf16 is not False,
        activation_checkpointing=parallel.activation_checkpointing,
        reshard_after_forward=parallel.reshard_after_forward,
        loss_chunk_tokens=parallel.loss_chunk_tokens,
        world_size=world_size,
        num_references=int(recipe.objective == "dpo" and recipe.dpo.reference == "copy"),
    )


def describe_dry_run(found: DryRun) -> RenderableType:
    """Return tables for a person."""
    model = Table()
    for name in ("module", "parameters"):
        model.add_column(name, justify="left" if name == "module" else "right")
    for name, number in found.parameters.items():
        model.add_row(name, f"{number:,}")
    # Lines of their own: the title of a table is broken at the table's width.
    devices = "one GPU" if found.world_size == 1 else f"each of {found.world_size} GPUs"
    heading = Text(f"memory of {devices}, heaviest row (an H200 has {H200_BYTES / 1e9:.0f} GB)")
    parts: list[RenderableType] = [Text(f"{found.checkpoint}: {sum(found.parameters.values()):,} parameters"), model]
    for phase in found.phases:
        parts += [Text(_told(phase)), heading, _memory_table(phase)]
    return Group(*parts)


def _told(phase: DryPhase) -> str:
    return (
        f"\n{phase.name}: {phase.num_steps:,} steps of {phase.tokens_a_step:,.0f} tokens; {phase.num_trained:,} parameters learn "
        f"({', '.join(phase.trains)})\nan epoch: {phase.steps_an_epoch:,} steps, {phase.tokens_an_epoch:,} tokens, rows "
        f"{phase.fill:.1%} full"
    )


def _memory_table(phase: DryPhase) -> Table:
    table = Table()
    table.add_column("what")
    table.add_column("GB", justify="right")
    for name, size in phase.memory_bytes.items():
        table.add_row(name, f"{size / 1e9:.2f}")
    table.add_row("together", f"{phase.total_bytes / 1e9:.2f}", style="bold")
    return table
