"""One phase of a training run: its model, data and objective put together, the loop, and what it leaves behind."""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from omniprep import __version__
from omniprep.errors import ConfigError
from omniprep.profile import ModelProfile
from omniprep.receipts import differences
from omniprep.shards.manifest import Manifest
from omniprep.storage.local import LocalFolder
from omniprep.stream.dataset import StreamingDataset
from omniprep.stream.plan import PlanConfig
from omniprep.train.attention import use_attention
from omniprep.train.checkpoint import Checkpoints, read_saved_step
from omniprep.train.checks import check_context, rope_mode_of, write_card
from omniprep.train.evaluate import validator
from omniprep.train.export import copy_processor, full_state, write_thinker
from omniprep.train.flops import batch_lengths, device_name, peak_flops, training_flops
from omniprep.train.forward import TrainableThinker
from omniprep.train.generate import sampler
from omniprep.train.loop import Looped, to_device, train_loop
from omniprep.train.lora import is_adapter
from omniprep.train.model import TINY, ModelSettings, config_of, load_thinker, parameters_of, train_only
from omniprep.train.objective import NextToken, Objective, PairPreference, StreamBatch
from omniprep.train.optimizer import OptimizerSettings, make_optimizer
from omniprep.train.parallel import World, on_main, shard
from omniprep.train.progress_log import RunLog
from omniprep.train.recipe import Phase, TrainRecipe
from omniprep.train.reference import open_reference
from omniprep.train.signals import StopRequest

RESULT_NAME, MODEL_NAME, CHECKPOINTS_NAME = "result.json", "model", "checkpoints"
Result = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class PhaseRun:
    """One phase of a recipe on this rank; all ranks do the same with theirs."""

    recipe: TrainRecipe
    phase: Phase
    start: ModelSettings
    folder: Path
    manifests: Mapping[str, Manifest]
    profile: ModelProfile
    world: World

    def train(self, stop: StopRequest) -> Result:
        """Take the steps that are left, write the model, and return what it came to."""
        recipe, phase, world = self.recipe, self.phase, self.world
        # Data first: what is wrong with them is told before minutes of loading weights.
        stream, num_steps = self.training_stream()
        held_out = self.held_out()
        checkpoints = Checkpoints(self.folder / CHECKPOINTS_NAME, recipe.checkpoints, world)
        latest = checkpoints.latest()
        self.check_same_recipe(latest)
        torch.manual_seed(recipe.seed + world.rank)
        model = self.model()
        settings = self.optimizer_settings()
        optimizer = make_optimizer(model.parameters(), settings)
        objective = self.objective(model)
        looped = Looped(
            model=model,
            optimizer=optimizer,
            objective=objective,
            stream=stream,
            num_steps=num_steps,
            settings=settings,
            flops=self.flops(model),
            validate=None if held_out is None else validator(model, objective, held_out, world),
            sample=self.sampler(model),
            evaluate_every=recipe.watch.evaluate_every,
            sample_every=recipe.watch.sample_every,
            checkpoint_every=recipe.checkpoints.every_steps,
        )
        progress: dict[str, Any] = self.beginning()
        if latest is not None:
            progress = checkpoints.load(latest, model=model, optimizer=optimizer)
            stream.load_state_dict(progress["stream"])
        peak = peak_flops(device_name(world.device))
        log = RunLog(
            folder=self.folder,
            settings=recipe.watch,
            num_steps=num_steps,
            start_step=int(progress["step"]),
            title=phase.name,
            is_main=world.is_main,
            peak_flops=None if peak is None else peak * world.world_size,
            facts=self.facts(model.thinker, num_steps),
        )
        with log:
            validation = train_loop(looped, world=world, log=log, checkpoints=checkpoints, progress=progress, stop=stop)
        return self.finish(model.thinker, num_steps, validation)

    def training_stream(self) -> tuple[StreamingDataset, int]:
        """Return what is trained on, and how many steps of it. Raises `ConfigError` for a plan that has no place here."""
        data = self.recipe.data
        stream = self.stream(data.weighted, data.plan, split=data.split)
        len(stream)  # says what is wrong if a step cannot be shared out to the ranks
        return stream, count_steps(stream, self.phase)

    def optimizer_settings(self) -> OptimizerSettings:
        """Return the phase's settings at the scale of its model."""
        settings = self.phase.optimizer
        return settings.model_copy(update={"learning_rate": settings.learning_rate * self.start.learning_rate_scale})

    def flops(self, model: TrainableThinker) -> Callable[[StreamBatch], float]:
        """Return what tells the operations of a batch."""
        config, trains = model.thinker.config, self.phase.train
        num_lora = sum(one.numel() for name, one in model.named_parameters() if is_adapter(name))
        return lambda batch: training_flops(config, batch_lengths(batch), trains=trains, num_lora_parameters=num_lora)

    def model(self) -> TrainableThinker:
        """Return the model of this phase, frozen, sharded and ready to be called."""
        check_context(config_of(self.start, profile=self.profile), self.recipe.data.plan.max_tokens)
        thinker = self.loaded()
        train_only(thinker, self.phase.train)
        return self.placed(thinker, learns=True)

    def loaded(self) -> Any:
        """Return the Thinker that this phase starts from."""
        return load_thinker(self.start, profile=self.profile, seed=self.recipe.seed, keep_dtype=self.in_bf16)

    def placed(self, thinker: Any, *, learns: bool) -> TrainableThinker:
        """Return a Thinker, wrapped and spread over the ranks; weights that do not learn are kept as they compute."""
        parallel = self.recipe.parallel
        use_attention(thinker, parallel.chosen_attention)
        if not learns:
            thinker.requires_grad_(False)
        if self.in_bf16:
            _keep_frozen_in(thinker, torch.bfloat16)
        model = TrainableThinker(thinker, loss_chunk_tokens=parallel.loss_chunk_tokens)
        shard(model, parallel, self.world)
        return model

    def stream(
        self, datasets: list[str] | dict[str, float], plan: PlanConfig, *, split: str, max_batches: int | None = None
    ) -> StreamingDataset:
        """Return this rank's batches of a split, from their beginning."""
        data = self.recipe.data
        return StreamingDataset(
            datasets,
            plan,
            split=split,
            max_batches=max_batches,
            rank=self.world.rank,
            world_size=self.world.world_size,
            num_threads=data.num_threads,
            max_corrupt=data.max_corrupt,
            profile=self.profile,
        )

    def held_out(self) -> StreamingDataset | None:
        """Return the validation split in a fixed order, None if there is to be none. Raises `ConfigError` where it is missing."""
        split, num_batches = self.recipe.data.validation_split, self.recipe.watch.num_eval_batches
        if split is None:
            return None
        places = [place for place, manifest in self.manifests.items() if split in manifest.by_split]
        if not places:
            known = sorted({name for manifest in self.manifests.values() for name in manifest.by_split})
            raise ConfigError(
                f"data.validation_split: no dataset has a split {split!r}, they have {', '.join(known)}; name one of them, "
                "prepare with `splits: {val: 0.01}`, or set it to null"
            )
        size = self.world.world_size
        plan = self.recipe.data.plan.model_copy(update={"global_batch_size": size, "shuffle": False})
        return self.stream(places, plan, split=split, max_batches=None if num_batches is None else -(-num_batches // size))

    def sampler(self, model: TrainableThinker) -> Callable[[], list[dict[str, Any]]] | None:
        """Return what lets the model answer the recipe's prompts, None if there are none."""
        settings = self.recipe.samples
        if settings is None:
            return None
        split = self.recipe.data.validation_split or self.recipe.data.split
        return sampler(model, settings, self.manifests, split=split, profile=self.profile)

    def objective(self, model: TrainableThinker) -> Objective:
        """Return what is minimised; the reference of DPO is the model that this phase starts from."""
        if self.recipe.objective == "next_token":
            return NextToken()

        def frozen_copy() -> TrainableThinker:
            return self.placed(self.loaded(), learns=False)

        def read(place: str, split: str) -> Iterator[StreamBatch]:
            # Every pair once: no weights, and whole, unlike the epoch of a blend.
            plan = self.recipe.data.plan.model_copy(update={"global_batch_size": self.world.world_size, "shuffle": False})
            rank, world_size = self.world.rank, self.world.world_size
            stream = StreamingDataset([place], plan, split=split, rank=rank, world_size=world_size, profile=self.profile)
            return (to_device(batch, self.world.device) for batch in stream)

        splits = [split for split in (self.recipe.data.split, self.recipe.data.validation_split) if split is not None]
        parts = [(place, split) for place, manifest in self.manifests.items() for split in splits if split in manifest.by_split]
        reference = open_reference(self.recipe.dpo, model=model, frozen_copy=frozen_copy, parts=parts, read=read)
        return PairPreference(self.recipe.dpo, reference)

    def beginning(self) -> dict[str, Any]:
        """Return the progress of a run that has not begun: what its checkpoints will say of the recipe."""
        return {"step": 0, "recipe_sha256": self.recipe.sha256_of(self.phase), "recipe": self.recipe.identity(self.phase)}

    def check_same_recipe(self, checkpoint: Path | None) -> None:
        """Raise `ConfigError` if a checkpoint was made with a recipe of other losses."""
        if checkpoint is None:
            return
        progress = read_saved_step(checkpoint).progress
        if progress["recipe_sha256"] != self.recipe.sha256_of(self.phase):
            listed = differences(progress["recipe"], self.recipe.identity(self.phase))
            shown = "; ".join(listed[:6]) + (f"; and {len(listed) - 6} more" if len(listed) > 6 else "")
            raise ConfigError(
                f"{checkpoint}: was made with another recipe ({shown}), so its losses would not go on; restore that, name "
                "another `output`, or begin anew with --overwrite"
            )

    def facts(self, thinker: Any, num_steps: int) -> dict[str, Any]:
        """Return what the log says of the run itself."""
        parameters = parameters_of(thinker)
        return {
            "phase": self.phase.name,
            "num_steps": num_steps,
            "parameters": {name: sum(one.numel() for one in parts) for name, parts in parameters.items()},
            "trained": {name: sum(one.numel() for one in parts if one.requires_grad) for name, parts in parameters.items()},
            "world_size": self.world.world_size,
            "device": device_name(self.world.device),
            "recipe_sha256": self.recipe.sha256_of(self.phase),
            "versions": {"omniprep": __version__, **{name: version(name) for name in ("torch", "transformers")}},
        }

    def finish(self, thinker: Any, num_steps: int, validation: Mapping[str, float]) -> Result:
        """Write the model, and last what says that the phase is done."""
        folder = self.folder / MODEL_NAME
        state = full_state(thinker)
        result = {
            "phase": self.phase.name,
            "steps": num_steps,
            "validation": dict(validation),
            "model": str(folder),
            "recipe_sha256": self.recipe.sha256_of(self.phase),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }

        def write() -> Result:
            write_thinker(thinker, state, folder, dtype=torch.bfloat16 if self.in_bf16 else torch.float32)
            if self.start.checkpoint != TINY:
                copy_processor(self.start.checkpoint, folder)
            mode = rope_mode_of(self.manifests)
            write_card(folder, rope_mode=mode, profile=self.profile.name, steps=num_steps, datasets=self.manifests.values())
            place = LocalFolder(str(self.folder))
            place.write(RESULT_NAME, (json.dumps(result, indent=1) + "\n").encode())
            place.sync([RESULT_NAME])
            return result

        return on_main(write, self.world)

    @property
    def in_bf16(self) -> bool:
        """Return whether matrices are multiplied in bfloat16."""
        return self.recipe.parallel.computes_in_bf16(self.world.device)


def count_steps(stream: StreamingDataset, phase: Phase) -> int:
    """Return how many steps a phase has: those it says, or those of all its epochs, which may differ by a few."""
    if phase.steps is not None:
        return phase.steps
    total = 0
    for epoch in range(phase.epochs or 0):
        stream.set_epoch(epoch)
        total += stream.plan.num_steps
    stream.set_epoch(0)
    return total


def _keep_frozen_in(thinker: nn.Module, dtype: torch.dtype) -> None:
    for parameter in thinker.parameters():
        if not parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
