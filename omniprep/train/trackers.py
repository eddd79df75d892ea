"""TensorBoard, trackio and Weights & Biases, behind one small interface. Each is an option and a package of its own."""

import math
from collections.abc import Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Protocol

from omniprep.errors import ConfigError

TrackerName = Literal["tensorboard", "trackio", "wandb"]


class Tracker(Protocol):
    """Keeps numbers of a run."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Keep the numbers of a step."""

    def close(self) -> None:
        """Write what is left."""


def check_trackers(names: Iterable[TrackerName]) -> None:
    """Raise `ConfigError` for a tracker that is not installed: on every rank, and before anything takes long."""
    for name in names:
        _installed(name)


def open_tracker(
    name: TrackerName, folder: Path, *, project: str, run: str, facts: Mapping[str, Any], first_step: int = 0
) -> Tracker:
    """Return a tracker whose files, where it has any, lie in `folder`. Steps from `first_step` on are told anew.

    Raises `ConfigError` with the command that installs it if it is not.
    """
    if name == "tensorboard":
        return _TensorBoard(folder / "tensorboard", first_step)
    return _Hosted(_installed(name), folder, project=project, run=run, facts=facts)


def _installed(package: TrackerName) -> Any:
    try:
        return import_module(package)
    except ImportError as error:
        detail = f"watch.trackers: {package} is not installed ({error}); install it with `pip install {package}` or leave it out"
        raise ConfigError(detail) from None


class _TensorBoard:
    """Event files."""

    def __init__(self, folder: Path, first_step: int) -> None:
        _installed("tensorboard")
        self._writer = import_module("torch.utils.tensorboard").SummaryWriter(str(folder), purge_step=first_step)

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Hosted:
    """trackio and wandb, whose interfaces are the same as far as this goes."""

    def __init__(self, library: Any, folder: Path, *, project: str, run: str, facts: Mapping[str, Any]) -> None:
        self._library = library
        # trackio has one place for all runs. Whether a run of wandb is gone on with, WANDB_RUN_ID and WANDB_RESUME say.
        where = {"dir": str(folder)} if library.__name__ == "wandb" else {}
        library.init(project=project, name=run, config=dict(facts), **where)

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._library.log({name: value for name, value in values.items() if math.isfinite(value)}, step=step)

    def close(self) -> None:
        self._library.finish()
