"""The base of every setting, and how a YAML file becomes one.

A setting's class stands next to the code that it configures (`media/audio.py: AudioConfig`); `prepare.py: Recipe` puts
them together. They are frozen and closed: a misspelt key stops the run with its path.
"""

from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from omniprep.errors import ConfigError, printable


class Config(BaseModel):
    """Base of settings: immutable, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


MAX_YAML_BYTES = 4 << 20
MAX_YAML_VALUES = 1_000_000

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
    """Return the plain values of a YAML file. Raises `ConfigError` if it is missing or not plain YAML.

    Plain: no tags that make objects, no key twice, and no aliases of aliases that stand for a billion values.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_YAML_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    if len(data) > MAX_YAML_BYTES:
        raise ConfigError(f"{path}: larger than {MAX_YAML_BYTES >> 20} MiB; is it a recipe?")
    try:
        loader = _PlainLoader(data.decode("utf-8"))
        node = loader.get_single_node()
        if _num_values(node, {}) > MAX_YAML_VALUES:
            raise ConfigError(f"{path}: over {MAX_YAML_VALUES} values when its aliases (`*name`) are written out")
        return loader.construct_document(node) if node is not None else None
    except (yaml.YAMLError, ValueError, LookupError, TypeError, RecursionError) as error:  # of numbers and dates that are none
        raise ConfigError(printable(f"{path}: not valid YAML: {' '.join(str(error).split()):.500}")) from None


class _PlainLoader(yaml.SafeLoader):
    """YAML as a recipe needs it: plain values, no key twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if len(set(keys)) < len(keys):
            twice = next(key for key in keys if keys.count(key) > 1)
            raise yaml.constructor.ConstructorError(None, None, f"key {twice!r:.80} twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _num_values(node: yaml.Node | None, known: dict[int, int | None]) -> int:
    """Return how many values a node stands for, aliases written out. Raises `ValueError` for one that holds itself."""
    if id(node) not in known:
        known[id(node)] = None
        children = node.value if isinstance(node, (yaml.SequenceNode, yaml.MappingNode)) else ()
        flat = (item for child in children for item in (child if isinstance(child, tuple) else (child,)))
        known[id(node)] = 1 + sum(_num_values(item, known) for item in flat)
    count = known[id(node)]
    if count is None:
        raise ValueError("an alias that holds itself")
    return count
