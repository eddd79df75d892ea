"""The base of every setting, and how a YAML file becomes one.

A setting's class stands next to the code that it configures (`media/audio.py: AudioConfig`); `prepare.py: Recipe` puts
them together. They are frozen and closed: a misspelt key stops the run with its path.
"""

from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from omniprep.errors import ConfigError


class Config(BaseModel):
    """Base of settings: immutable, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


ConfigT = TypeVar("ConfigT", bound=Config)


def parse_config(kind: type[ConfigT], values: object, *, place: str) -> ConfigT:
    """Return `values` as a `kind`. Raises `ConfigError` with every wrong key, its path and what was expected."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        lines = []
        for item in error.errors(include_url=False):
            if item["type"] == "too_short" and item["input"]:
                continue  # a list whose entries are wrong is also called too short: not a mistake of its own
            path = ".".join(str(step) for step in item["loc"]) or "(top level)"
            shown = "" if item["type"] in ("missing", "extra_forbidden") else f"; got {item['input']!r:.80}"
            lines.append(f"{place}: {path}: {item['msg'].removeprefix('Value error, ')}{shown}")
        raise ConfigError("\n".join(lines)) from None


def read_yaml(path: Path) -> Any:
    """Return the plain values of a YAML file. Raises `ConfigError` if it is missing or not YAML."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
