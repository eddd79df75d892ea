"""The plan of an epoch: which samples make which bin, and which bins which step. A function of what it is made of, no state.

```
catalogs ── order ──> passes ── blend ──> samples ── pack ──> bins ── group ──> steps
(lengths)   shards, then   by weight      under max_tokens    of similar cost,
            windows                       and caps            shared out over ranks
```

A position in training is an epoch and a step. To resume is to make the plan again, which takes about as long as reading the
catalogs, and to go on from there, with any number of ranks and workers: neither is part of the plan. Nor is anything that
differs between machines: what decides an order are whole numbers and single roundings, no sums of fractions.

The blend is exact at every prefix of the samples. Packing and grouping then move a sample by no more than a packing window
(about 128 bins) and a stretch of 32 steps (of 128 bins at least).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import Field

from omniprep.config import Config
from omniprep.errors import ConfigError
from omniprep.shards.manifest import canonical_sha256
from omniprep.shards.members import SEQUENCES
from omniprep.stream.blend import Blend, Share, blend
from omniprep.stream.catalog import Catalog
from omniprep.stream.order import MAX_WINDOW, pass_order, ranges
from omniprep.stream.packing import Bins, bucket, one_each, pack
from omniprep.stream.steps import COST_OF_MEL_FRAME, COST_OF_PATCH, COST_OF_SQUARE, COST_OF_TOKEN, share_out, step_order
from omniprep.types import Float64Array, Int32Array, Int64Array

PLAN_VERSION = 1
"""Counts up when the same settings give another plan."""

_MAX_DATASETS = np.iinfo(np.int16).max
_MAX_LIMIT = (1 << 31) - 1


class PlanConfig(Config):
    """How an epoch is planned."""

    max_tokens: int = Field(default=8192, ge=1, le=_MAX_LIMIT)
    """Tokens of a bin at most; of a padded batch with its padding."""
    max_mel_frames: int | None = Field(default=None, ge=1, le=_MAX_LIMIT)
    """Mel frames of a bin at most: what bounds the audio encoder's memory. 100 a second."""
    max_patches: int | None = Field(default=None, ge=1, le=_MAX_LIMIT)
    """Vision patches of a bin at most: four a token."""
    batching: Literal["packed", "padded", "single"] = "packed"
    """`packed` documents one after another in one row; `padded` a batch of samples of similar length; `single` one sample."""
    global_batch_size: int = Field(default=1, ge=1, le=32_768)
    """Bins of a step, over all ranks and micro-batches."""
    seed: int = 0
    shuffle: bool = True
    """Off: samples in the order of the datasets, bins in the order of their first samples."""
    window_samples: int = Field(default=16_384, ge=1, le=MAX_WINDOW)
    """Consecutive samples, of several shards, that are shuffled among each other."""
    blend_by: Literal["samples", "tokens"] = "samples"
    """What the weights are shares of."""
    stopping_strategy: Literal["first_exhausted", "all_exhausted"] = "first_exhausted"
    """With weights: an epoch ends with the first dataset that is used up, or when all were (others are taken again)."""
    overlong: Literal["error", "skip"] = "error"
    """What to do about a sample that fits into no bin."""


@dataclass(frozen=True, kw_only=True)
class Blended:
    """A dataset of a plan."""

    catalog: Catalog
    weight: float | None = None
    """Its share in relation to the others'. None for all datasets: every sample exactly once an epoch."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """One epoch: S samples in B bins. Arrays are not to be written to."""

    datasets: tuple[Blended, ...]
    config: PlanConfig
    epoch: int
    made_of: dict[str, Any]
    """What the plan is a function of, short: plain values, `digest` over them."""
    digest: str
    dataset_of: npt.NDArray[np.int16]
    """(S,) bin after bin."""
    sample_of: Int64Array
    """(S,) in its dataset's catalog."""
    bin_starts: Int64Array
    """(B + 1,) where each bin starts."""
    costs: Int64Array
    """(B,) about what each bin costs, in tokens."""
    num_tokens: int
    num_overlong: tuple[int, ...]
    """Samples that were left out as they fit into no bin, by dataset."""

    @property
    def num_samples(self) -> int:
        """Return S."""
        return len(self.sample_of)

    @property
    def num_bins(self) -> int:
        """Return B."""
        return len(self.bin_starts) - 1

    @property
    def num_steps(self) -> int:
        """Return the number of steps; the last may lack bins."""
        return -(-self.num_bins // self.config.global_batch_size)

    @property
    def fill(self) -> float:
        """Return how much of the room for tokens is used, in 0..1."""
        return self.num_tokens / (self.num_bins * self.config.max_tokens)

    def samples_of(self, number: int) -> list[tuple[int, int]]:
        """Return the (dataset, sample) of a bin, in the order of its documents; of bin -1, an empty one, none."""
        if number == -1:
            return []
        if not 0 <= number < self.num_bins:
            raise IndexError(f"bin {number}: the plan has {self.num_bins}")
        span = slice(self.bin_starts[number], self.bin_starts[number + 1])
        return list(zip(self.dataset_of[span].tolist(), self.sample_of[span].tolist(), strict=True))

    def bins_of(self, step: int, *, rank: int = 0, world_size: int = 1) -> list[int]:
        """Return the bins that a rank takes in a step: the same number for each rank, -1 for those the last step lacks.

        Raises `ConfigError` if a step cannot be shared out evenly.
        """
        if not 0 <= rank < world_size:
            raise ConfigError(f"expected 0 <= rank < world_size, got {rank=}, {world_size=}")
        size = self.config.global_batch_size
        if size % world_size:
            more = -(-size // world_size) * world_size
            raise ConfigError(
                f"global_batch_size={size} cannot be shared out evenly to world_size={world_size} ranks; "
                f"set it to a multiple of {world_size} ({more}), or train on another number of ranks"
            )
        if not 0 <= step < self.num_steps:
            raise IndexError(f"step {step}: epoch {self.epoch} has {self.num_steps}")
        bins = range(step * size, min((step + 1) * size, self.num_bins))
        missing = size - len(bins)
        if world_size == 1:
            return [*bins, *[-1] * missing]
        costs = [*self.costs[bins.start : bins.stop].tolist(), *[0] * missing]
        return [bins[place] if place < len(bins) else -1 for place in share_out(costs, num_ranks=world_size)[rank]]

    def state(self, step: int) -> dict[str, Any]:
        """Return the position before `step` as plain values, to be kept in a checkpoint: `check_state` takes it back."""
        return {"epoch": self.epoch, "step": step, "plan": self.digest, "made_of": self.made_of}

    def check_state(self, state: Mapping[str, Any]) -> int:
        """Return the step at which to go on. Raises `ConfigError` if the state is of another plan, and says what differs."""
        missing = [name for name in ("epoch", "step", "plan") if name not in state]
        if missing:
            raise ConfigError(f"not the state of a stream: lacks {', '.join(missing)}")
        if state["plan"] != self.digest:
            found = _differences(state.get("made_of", {}), self.made_of)
            shown = "; ".join(found[:5]) + (f"; and {len(found) - 5} more" if len(found) > 5 else "")
            raise ConfigError(
                f"the state is of another plan than this one ({shown or 'it does not say how they differ'}); "
                "resume with the settings and datasets that it was saved with, or begin an epoch without it"
            )
        step = state["step"]
        if not isinstance(step, int) or not 0 <= step <= self.num_steps:
            raise ConfigError(f"state: expected a step of 0 to {self.num_steps}, got {step!r}")
        return step


def make_plan(datasets: Sequence[Blended], config: PlanConfig, *, epoch: int = 0) -> Plan:
    """Return the plan of an epoch. Raises `ConfigError` if the datasets do not go together or a sample fits into no bin."""
    _check_datasets(datasets)
    measured = [_measure(dataset.catalog, config) for dataset in datasets]
    fitting = [_fitting(one.catalog, sizes, config) for one, sizes in zip(datasets, measured, strict=True)]
    shares = [_share(one, fits, config, epoch=epoch) for one, fits in zip(datasets, fitting, strict=True)]
    blended = blend(shares, until_all=config.stopping_strategy == "all_exhausted")
    sizes = _gather(measured, blended)
    bins = _make_bins(sizes.needs, config)
    costs = _bin_costs(sizes, bins, config)
    chosen = _bin_order(bins, costs, datasets, config, epoch=epoch)
    order = bins.order[ranges(bins.starts, chosen)]
    made_of = _made_of(datasets, config, epoch=epoch)
    return Plan(
        datasets=tuple(datasets),
        config=config,
        epoch=epoch,
        made_of=made_of,
        digest=_digest(made_of),
        dataset_of=blended.dataset_of[order],
        sample_of=blended.sample_of[order],
        bin_starts=np.concatenate([[0], np.cumsum(np.diff(bins.starts)[chosen])]),
        costs=costs[chosen],
        num_tokens=int(sizes.num_tokens.sum(dtype=np.int64)),
        num_overlong=tuple(int(np.count_nonzero(~fits)) for fits in fitting),
    )


class _Sizes(NamedTuple):
    """What is known of S samples before they are put into bins."""

    num_tokens: Int32Array
    """(S,)"""
    needs: Int32Array
    """(D, S) what each takes of what is limited: tokens (with padding), then what `_limits` names."""
    text_costs: Int64Array
    """(S,) of its tokens, or of its rows where they are padded."""
    media_costs: Int64Array
    """(S,)"""


def _limits(config: PlanConfig) -> dict[str, int]:
    """Return what is limited, and how much of it a bin may hold."""
    limits = {name: getattr(config, name) for name in ("max_tokens", "max_mel_frames", "max_patches")}
    return {name: limit for name, limit in limits.items() if limit is not None}


def _measure(catalog: Catalog, config: PlanConfig) -> _Sizes:
    tokens, longest = catalog.num_tokens, catalog.longest.astype(np.float64)
    others = tokens - longest
    if config.batching == "padded":
        num_rows = len(SEQUENCES[catalog.kind])
        tokens, others = num_rows * catalog.longest, (num_rows - 1) * longest
    by_limit = {"max_tokens": tokens, "max_mel_frames": catalog.num_mel_frames, "max_patches": catalog.num_patches}
    return _Sizes(
        num_tokens=catalog.num_tokens,
        needs=np.stack([by_limit[name] for name in _limits(config)]),
        text_costs=_whole(COST_OF_TOKEN * tokens + COST_OF_SQUARE * (longest**2 + others**2)),
        media_costs=_whole(COST_OF_MEL_FRAME * catalog.num_mel_frames + COST_OF_PATCH * catalog.num_patches),
    )


def _whole(costs: Float64Array) -> Int64Array:
    """Return costs as whole tokens: sums of whole numbers are the same on every machine, and so is what they sort."""
    return np.rint(costs).astype(np.int64)


def _fitting(catalog: Catalog, sizes: _Sizes, config: PlanConfig) -> npt.NDArray[np.bool_]:
    """Return (N,) which samples fit into a bin of their own. Raises `ConfigError` about those that do not unless told to skip."""
    limits = _limits(config)
    over = sizes.needs > np.array(list(limits.values()))[:, None]
    fits: npt.NDArray[np.bool_] = ~np.logical_or.reduce(over)
    num_over = int(np.count_nonzero(~fits))
    if num_over and config.overlong == "error":
        sample = int(fits.argmin())
        which = int(over[:, sample].argmax())
        limit = list(limits)[which]
        shown = f"{limit.removeprefix('max_').replace('_', ' ')} > {limit}={limits[limit]}"
        more = f" (so are {num_over - 1:,} more of {len(catalog):,} samples)" if num_over > 1 else ""
        raise ConfigError(
            f"{catalog.describe(sample)} ({catalog.key_of(sample)}): {sizes.needs[which, sample]} {shown}{more}; "
            f"raise {limit}, or set overlong to 'skip' to train without what is too long"
        )
    if num_over == len(catalog):
        raise ConfigError(f"{catalog.place}: every sample of split {catalog.split!r} is too long for a bin; raise the limits")
    return fits


def _share(dataset: Blended, fits: npt.NDArray[np.bool_], config: PlanConfig, *, epoch: int) -> Share:
    catalog = dataset.catalog
    counts = catalog.num_tokens.astype(np.int64) if config.blend_by == "tokens" else np.ones(len(catalog), np.int64)

    def pass_of(number: int) -> tuple[Int64Array, Int64Array]:
        order = np.arange(len(catalog))
        if config.shuffle:
            order = pass_order(catalog, seed=config.seed, epoch=epoch, number=number, window=config.window_samples)
        if not fits.all():
            order = order[fits[order]]
        return order, counts[order]

    return Share(int(np.count_nonzero(fits)), int(counts[fits].sum()), dataset.weight, pass_of)


def _gather(measured: Sequence[_Sizes], blended: Blend) -> _Sizes:
    """Return the sizes of the samples in blended order."""
    if len(measured) == 1:
        places = blended.sample_of
    else:
        firsts = np.cumsum([0, *(len(sizes.num_tokens) for sizes in measured[:-1])])
        places = firsts[blended.dataset_of] + blended.sample_of
    columns = (np.concatenate(column, axis=-1) for column in zip(*measured, strict=True))
    return _Sizes(*(column[..., places] for column in columns))


def _make_bins(needs: Int32Array, config: PlanConfig) -> Bins:
    room = np.array(list(_limits(config).values()), np.int32)
    match config.batching:
        case "packed":
            return pack(needs, room)
        case "padded":
            return bucket(needs, room)
        case "single":
            return one_each(needs.shape[1])


def _bin_costs(sizes: _Sizes, bins: Bins, config: PlanConfig) -> Int64Array:
    """Return (B,) what the bins cost; in a padded batch every sample costs as much as the longest."""
    firsts = bins.starts[:-1]
    text = sizes.text_costs[bins.order]
    if config.batching == "padded":
        text_costs = np.maximum.reduceat(text, firsts) * np.diff(bins.starts)
    else:
        text_costs = np.add.reduceat(text, firsts)
    return text_costs + np.add.reduceat(sizes.media_costs[bins.order], firsts)


def _bin_order(bins: Bins, costs: Int64Array, datasets: Sequence[Blended], config: PlanConfig, *, epoch: int) -> Int64Array:
    if not config.shuffle:
        return np.argsort(bins.order[bins.starts[:-1]], kind="stable")
    key = "/".join([*(dataset.catalog.digest for dataset in datasets), str(epoch)])
    return step_order(costs, size=config.global_batch_size, key=key, seed=config.seed)


def _check_datasets(datasets: Sequence[Blended]) -> None:
    if not 1 <= len(datasets) <= _MAX_DATASETS:
        raise ConfigError(f"datasets: expected 1 to {_MAX_DATASETS}, got {len(datasets)}")
    kinds = {dataset.catalog.kind: dataset.catalog.place for dataset in datasets}
    if len(kinds) > 1:
        shown = ", ".join(f"{kind} in {place}" for kind, place in sorted(kinds.items()))
        raise ConfigError(f"datasets: expected all of one kind, got {shown}; train on them one after the other")
    weights = [dataset.weight for dataset in datasets]
    if None in weights and set(weights) != {None}:
        raise ConfigError(f"datasets: expected a weight for each or for none, got {weights}")
    for number, weight in enumerate(weights):
        if weight is not None and not 0 < weight < np.inf:
            raise ConfigError(f"datasets.{number}.weight: expected a number above 0, got {weight}; leave the dataset out instead")


def _made_of(datasets: Sequence[Blended], config: PlanConfig, *, epoch: int) -> dict[str, Any]:
    return {
        "version": PLAN_VERSION,
        "epoch": epoch,
        "config": config.model_dump(mode="json"),
        "datasets": [
            {
                "place": one.catalog.place,
                "split": one.catalog.split,
                "num_samples": len(one.catalog),
                "digest": one.catalog.digest,
                "weight": one.weight,
            }
            for one in datasets
        ],
    }


def _digest(made_of: Mapping[str, Any]) -> str:
    """Return the sha256 of what a plan is made of, wherever the datasets lie."""
    datasets = [{name: value for name, value in one.items() if name != "place"} for one in made_of["datasets"]]
    return canonical_sha256({**made_of, "datasets": datasets})


def _differences(before: Any, now: Any, path: str = "") -> list[str]:
    """Return what differs between two trees of plain values.

    >>> _differences({"config": {"seed": 1}, "epoch": 0}, {"config": {"seed": 2}, "epoch": 0})
    ['config.seed: 1 in the state, 2 here']
    """
    trees = [dict(enumerate(tree)) if isinstance(tree, list) else tree for tree in (before, now)]
    if not all(isinstance(tree, dict) for tree in trees):
        return [] if before == now else [f"{path}: {before!r:.80} in the state, {now!r:.80} here"]
    old, new = trees
    inner = ((name, old.get(name, "nothing"), new.get(name, "nothing")) for name in {**old, **new})
    return [line for name, a, b in inner for line in _differences(a, b, f"{path}.{name}".removeprefix("."))]
