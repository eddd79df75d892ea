"""The training recipe: what a run trains on which data, in one YAML file.

```yaml
output: build/train/sft                 # relative to the folder you run the command in, as datasets are
model: {checkpoint: Qwen/Qwen2.5-Omni-7B}
data:
  datasets: {build/thinker_sft: 1.0}    # finished datasets and their weights
  plan: {max_tokens: 8192, global_batch_size: 8}
phases:
  - {name: all, train: [language_model, head, audio_adapter, vision_adapter], epochs: 1}
```

A phase is a run of its own, with its own folder, optimizer and schedule; it starts from the weights that the phase before
it has exported.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from omniprep.config import Config, parse_config, read_yaml
from omniprep.errors import ConfigError
from omniprep.shards.manifest import canonical_sha256
from omniprep.stream.plan import PlanConfig
from omniprep.train.checkpoint import CheckpointSettings
from omniprep.train.dpo import DpoSettings
from omniprep.train.generate import SampleSettings
from omniprep.train.model import ModelSettings, ModuleName
from omniprep.train.optimizer import OptimizerSettings
from omniprep.train.parallel import ParallelSettings
from omniprep.train.progress_log import WatchSettings
from omniprep.types import RopeMode


class DataSettings(Config):
    """What is trained on."""

    datasets: dict[str, float | None] = Field(min_length=1)
    """Folders or URLs of finished datasets, and their weights; without weights (a list, or null) every sample comes once an
    epoch."""
    plan: PlanConfig = PlanConfig()
    """How samples become packed rows, and how many of those a step has over all ranks and micro-batches."""
    split: str = "train"
    validation_split: str | None = "val"
    """Split of the same datasets that the validation loss is measured on; null for none."""
    num_threads: int = Field(default=2, ge=0)
    """Threads of each rank that read and decode ahead."""
    max_corrupt: int = Field(default=10, ge=0)
    """Damaged records of an epoch that are left out and reported before the run stops."""
    rope_mode: RopeMode | None = None
    """The positions that the checkpoint was made for, refused where a dataset has others. Default: what an OmniPrep export
    says of itself; of any other checkpoint, that of the datasets."""

    @field_validator("datasets", mode="before")
    @classmethod
    def _names_alone_have_no_weights(cls, value: object) -> object:
        if isinstance(value, str):
            value = [value]
        return dict.fromkeys(value) if isinstance(value, list) and all(isinstance(item, str) for item in value) else value

    @model_validator(mode="after")
    def _all_or_none_have_weights(self) -> "DataSettings":
        without = [place for place, weight in self.datasets.items() if weight is None]
        if without and len(without) < len(self.datasets):
            raise ValueError(f"expected a weight for each dataset or for none; missing for {', '.join(without)}")
        return self

    @property
    def weighted(self) -> list[str] | dict[str, float]:
        """Return the datasets with their weights, or alone if they have none."""
        weights = {place: weight for place, weight in self.datasets.items() if weight is not None}
        return weights or list(self.datasets)


class Phase(Config):
    """A stretch of training with one set of trained modules."""

    name: str = Field(default="train", pattern=r"^[A-Za-z0-9_-]+$")
    """Also the name of its folder in `output`."""
    train: tuple[ModuleName, ...] = Field(min_length=1)
    """Modules whose parameters learn; all others are frozen. With LoRA, `language_model` stands for its adapters."""
    epochs: int | None = Field(default=None, ge=1)
    steps: int | None = Field(default=None, ge=1)
    """One of `epochs` and `steps` is given."""
    optimizer: OptimizerSettings = OptimizerSettings()

    @model_validator(mode="after")
    def _one_length(self) -> "Phase":
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("expected one of `epochs` and `steps`")
        return self


class TrainRecipe(Config):
    """A training run."""

    output: str = Field(min_length=1)
    """Folder of the run: a folder for each phase with its checkpoints, log, and exported model."""
    seed: int = Field(default=0, ge=0)
    """Of random weights and of what is sampled. The order of the data has its own, in `data.plan`."""
    model: ModelSettings = ModelSettings()
    data: DataSettings
    objective: Literal["next_token", "dpo"] = "next_token"
    """`next_token`: cross-entropy of the supervised tokens. `dpo`: preferences, settings in `dpo`."""
    dpo: DpoSettings = DpoSettings()
    phases: tuple[Phase, ...] = Field(min_length=1)
    parallel: ParallelSettings = ParallelSettings()
    checkpoints: CheckpointSettings = CheckpointSettings()
    watch: WatchSettings = WatchSettings()
    samples: SampleSettings | None = None
    """Prompts that are answered now and then, to read."""

    @model_validator(mode="after")
    def _phases_differ(self) -> "TrainRecipe":
        names = [phase.name for phase in self.phases]
        if len(set(names)) < len(names):
            raise ValueError(f"names of phases must differ, for their folders are named by them; got {', '.join(names)}")
        return self

    def identity(self, phase: Phase) -> dict[str, Any]:
        """Return, as plain values, what decides a phase's losses: a run may go on only where these are the same."""
        values = self.model_dump(mode="json", include={"seed", "model", "data", "objective", "dpo"})
        values["data"] = {name: value for name, value in values["data"].items() if name not in _HOW_IT_IS_READ}
        return {**values, "phase": phase.model_dump(mode="json", exclude={"name"})}

    def sha256_of(self, phase: Phase) -> str:
        """Return the digest of `identity`."""
        return canonical_sha256(self.identity(phase))


_HOW_IT_IS_READ = {"num_threads", "max_corrupt", "validation_split"}


def load_train_recipe(path: Path, *, changes: Mapping[str, Any] | None = None) -> TrainRecipe:
    """Return the recipe of a YAML file; `changes` are values by dotted path, as `parse_change` makes them.

    Raises `ConfigError` with every mistake.
    """
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping with `output`, `data` and `phases`, got {type(values).__name__}")
    for name, value in (changes or {}).items():
        _put(values, name, value)
    return parse_config(TrainRecipe, values, place=str(path))


def parse_change(text: str) -> tuple[str, Any]:
    """Return path and value of what a command line changes in a recipe; values are YAML.

    >>> parse_change("data.plan.max_tokens=4096")
    ('data.plan.max_tokens', 4096)
    """
    import yaml

    name, equals, value = text.partition("=")
    if not equals or not name:
        raise ConfigError(f"--set {text}: expected PATH=VALUE, for example data.plan.max_tokens=4096")
    try:
        return name, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {text}: not a YAML value: {' '.join(str(error).split())}") from None


def _put(values: Any, name: str, value: Any) -> None:
    """Set a value in nested mappings and lists. What is not there yet is made; wrong names are found by the recipe's check."""
    *path, last = name.split(".")
    for step in path:
        if isinstance(values, list):
            values = values[_index(step, values, name)]
        else:
            if not isinstance(values.get(step), dict | list):
                values[step] = {}
            values = values[step]
    if isinstance(values, list):
        values[_index(last, values, name)] = value
    else:
        values[last] = value


def _index(step: str, values: list[Any], name: str) -> int:
    if not step.isdecimal() or int(step) >= len(values):
        raise ConfigError(f"--set {name}: expected a number below {len(values)} in place of {step!r}")
    return int(step)
