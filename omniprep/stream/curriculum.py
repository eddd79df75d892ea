"""A curriculum: stages of training, each with its own settings and datasets, as one row of epochs.

Short documents first and long ones later, or other datasets: an epoch's number says which stage it belongs to, so that a
position in training stays an epoch and a step.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from omniprep.errors import ConfigError
from omniprep.stream.plan import Blended, Plan, PlanConfig, make_plan


@dataclass(frozen=True, kw_only=True)
class Stage:
    """So many epochs over the same datasets with the same settings."""

    config: PlanConfig
    datasets: Sequence[Blended]
    num_epochs: int = 1

    def __post_init__(self) -> None:
        if self.num_epochs < 1:
            raise ConfigError(f"a stage of a curriculum: expected num_epochs of at least 1, got {self.num_epochs}")


@dataclass(frozen=True)
class Curriculum:
    """Stages in the order of training."""

    stages: tuple[Stage, ...]

    @property
    def num_epochs(self) -> int:
        """Return the epochs of all stages together."""
        return sum(stage.num_epochs for stage in self.stages)

    def stage_of(self, epoch: int) -> int:
        """Return the number of the stage that an epoch, counted from 0 over all stages, belongs to."""
        first = 0
        for number, stage in enumerate(self.stages):
            first += stage.num_epochs
            if 0 <= epoch < first:
                return number
        raise ConfigError(f"epoch {epoch}: the curriculum has {self.num_epochs}, from 0 on; add a stage or epochs to one")

    def plan(self, epoch: int) -> Plan:
        """Return the plan of an epoch, counted from 0 over all stages."""
        stage = self.stages[self.stage_of(epoch)]
        return make_plan(stage.datasets, stage.config, epoch=epoch)
