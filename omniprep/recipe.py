"""The recipe: everything that decides what a dataset holds, in one YAML file.

```yaml
output: build/sft              # relative to the folder you run the command in
sources:                       # paths in them: relative to the recipe's own folder
  - {name: chat, kind: jsonl, path: data/chat.jsonl}
encode: {rope_mode: aligned, max_tokens: 32768}
```
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from omniprep.config import Config, parse_config, read_yaml
from omniprep.encode.thinker import EncodeConfig
from omniprep.errors import ConfigError
from omniprep.shards.manifest import canonical_sha256
from omniprep.shards.members import MelDtype, MemberFormat, SampleKind
from omniprep.shards.writer import safe_name
from omniprep.sources.base import below
from omniprep.sources.media_store import MediaConfig
from omniprep.sources.source import Source

Executor = Literal["ray", "serial"]


class ShardConfig(Config):
    """What the shards look like."""

    max_shard_bytes: int = Field(default=1 << 30, gt=0)
    """A partition's shard is cut before it passes this; a single larger record still gets a shard of its own."""
    mel_dtype: MelDtype = "float16"
    """float16 halves the size; its rounding is under 1e-3 of a log-mel unit."""


class GuardConfig(Config):
    """Records are decoded and encoded in a process of its own, which is killed when one record hangs or eats memory."""

    enabled: bool = True
    """`false` encodes in the worker itself, for a debugger: a crash of a decoder then takes the worker with it."""
    timeout_s: float = Field(default=300.0, gt=0)
    """Longest time for one record."""
    memory_bytes: int = Field(default=4 << 30, ge=64 << 20)
    """Most memory that one record may take, above what an idle process holds."""


class RunConfig(Config):
    """How the work is cut and run. Only `rows_per_partition` shows in the dataset."""

    rows_per_partition: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Rows in one unit of work; each yields its own shards. Decides the shards' bytes, unlike the rest here. `auto`
    looks at the headers of a few rows of each source: about a minute of work, and shards of at most about 256 MB."""
    executor: Executor = "ray"
    workers: int | None = Field(default=None, ge=1)
    """Partitions at a time; default: one a CPU."""
    address: str | None = None
    """Ray cluster to join; default: Ray in this process."""
    max_retries: int = Field(default=3, ge=0)
    """How often a partition is tried again after its worker died."""
    max_reject_rate: float | None = Field(default=None, ge=0, le=1)
    """Stop, as soon as it is certain that a larger share of all rows is rejected. Default: a half, once 100 were."""
    guard: GuardConfig = GuardConfig()
    media_cache: str | None = None
    """Folder or URL that keeps encoded media by their content and settings: a later build, whose text, template or
    tokenizer differ, then decodes nothing again. It takes as much room as the dataset; safe to delete at any time."""
    check_media: bool = True
    """Look (at size and time) whether the media files of finished partitions have changed; changed ones are done again."""
    memory_bytes_per_worker: int | None = Field(default=None, ge=128 << 20)
    """What Ray reserves for each partition: no machine runs more at a time than its memory holds."""
    num_gpus: float = Field(default=0.0, ge=0)
    """GPUs, or a part of one, for each worker; default: a quarter of one where `audio.device` is a GPU."""
    metrics_port: int | None = Field(default=None, ge=1, le=65535)
    """Port at which a local run's metrics can be scraped by Prometheus; a cluster has its own."""


class Recipe(Config):
    """A dataset: where records come from and how they become shards."""

    output: str = Field(min_length=1)
    """Folder of the dataset, relative to the folder in which the command runs."""
    folder: str = "."
    """Folder that relative paths of `sources`, `media.roots` and the tokenizer start from; from a file: the file's own."""
    seed: int = Field(default=0, ge=0)
    kind: SampleKind = "sequence"
    """`sequence`: conversations and documents; `preference`: one prompt with two answers. They have other members."""
    sources: tuple[Source, ...] = Field(min_length=1)
    encode: EncodeConfig = EncodeConfig()
    media: MediaConfig = MediaConfig()
    splits: dict[str, float] = Field(default_factory=dict)
    """Share of the records of each further split (`val: 0.01`); the rest is `train`. A record's own split wins."""
    require_supervised: bool = True
    """Reject records without a single supervised token."""
    shards: ShardConfig = ShardConfig()
    run: RunConfig = RunConfig()

    @field_validator("splits")
    @classmethod
    def _splits_are_shares(cls, value: dict[str, float]) -> dict[str, float]:
        bad = [name for name, share in value.items() if not name.replace("_", "").isalnum() or not 0 < share <= 1]
        if bad:
            raise ValueError(f"expected names of letters, digits and _ with shares in (0, 1]; wrong: {', '.join(bad)}")
        if sum(value.values()) > 1:
            raise ValueError(f"shares add up to {sum(value.values()):g} > 1")
        return value

    @model_validator(mode="after")
    def _source_names_differ(self) -> "Recipe":
        names = [safe_name(source.name) for source in self.sources]
        twice = sorted({source.name for source in self.sources if names.count(safe_name(source.name)) > 1})
        if twice:
            raise ValueError(f"source names must differ, for keys are made of them; given twice: {', '.join(twice)}")
        return self

    @property
    def member_format(self) -> MemberFormat:
        """Return what the dataset's records have in common."""
        return MemberFormat(kind=self.kind, frame_format=self.encode.frame_format, mel_dtype=self.shards.mel_dtype)

    def identity(self) -> dict[str, Any]:
        """Return, as plain values, what decides the dataset's bytes: the recipe without places and without how it is run."""
        values = self.model_dump(mode="json", exclude={"output", "folder", "run"})
        return {**values, "run": {"rows_per_partition": self.run.rows_per_partition}}

    def sha256_of(self, source: Source) -> str:
        """Return the digest of what decides the records of one source, but for which rows it has.

        Other sources, and the paths and limit that choose its rows, are left out: receipts state the rows themselves.
        """
        values = self.model_dump(mode="json", exclude={"output", "folder", "run", "sources"})
        own = source.model_dump(mode="json", exclude={"path", "limit", "data_files", "data_dir"})
        return canonical_sha256({**values, "source": own})

    @property
    def sha256(self) -> str:
        """Return the digest of `identity`."""
        return canonical_sha256(self.identity())

    def anchored(self) -> "Recipe":
        """Return the recipe with `output`, `folder` and the cache absolute, for worker processes that run elsewhere."""
        here, cache = Path.cwd(), self.run.media_cache
        run = self.run if cache is None else self.run.model_copy(update={"media_cache": below(here, cache)})
        folder = str(Path(self.folder).absolute())
        return self.model_copy(update={"output": below(here, self.output), "folder": folder, "run": run})

    def located(self) -> "Recipe":
        """Return the recipe with the relative paths of its inputs placed below `folder`; its digest is another one."""
        folder = Path(self.folder)
        tokenizer = self.encode.tokenizer
        if tokenizer.path is not None:
            tokenizer = tokenizer.model_copy(update={"path": below(folder, tokenizer.path)})
        roots = tuple(below(folder, root) for root in self.media.roots)
        return self.model_copy(
            update={
                "sources": tuple(source.below(folder) for source in self.sources),
                "media": self.media.model_copy(update={"roots": roots}),
                "encode": self.encode.model_copy(update={"tokenizer": tokenizer}),
            }
        )


def load_recipe(path: Path, *, limit: int | None = None, output: str | None = None, **run: object) -> Recipe:
    """Return the recipe of a YAML file, with what the command line says instead where that is not None.

    `limit` bounds the rows of every source; `run` are fields of `RunConfig`. Raises `ConfigError` with every mistake.
    """
    values = read_yaml(path)
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path}: expected a mapping with `output` and `sources`, got {type(values).__name__}")
    recipe = parse_config(Recipe, {"folder": str(path.absolute().parent), **values}, place=str(path))
    changes: dict[str, Any] = {"output": output} if output is not None else {}
    if limit is not None:
        limits = (limit if source.limit is None else min(limit, source.limit) for source in recipe.sources)
        changes["sources"] = tuple(
            source.model_copy(update={"limit": at_most}) for source, at_most in zip(recipe.sources, limits, strict=True)
        )
    given = {name: value for name, value in run.items() if value is not None}
    changes["run"] = parse_config(RunConfig, {**recipe.run.model_dump(), **given}, place="command line: run")
    return recipe.model_copy(update=changes)
