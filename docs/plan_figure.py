"""Draw `images/plan.svg` from a plan that `make_plan` makes: `python docs/plan_figure.py`.

Three small datasets are blended 4 : 2 : 1, packed into bins of 1,000 tokens, and shared out to two ranks in steps of four
bins. Every box is a sample, as wide as it has tokens.
"""

import hashlib
from collections.abc import Iterable
from itertools import chain, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from omniprep.shards.manifest import ShardInfo, Totals
from omniprep.shards.members import MemberFormat
from omniprep.stream.blend import Share, blend
from omniprep.stream.catalog import Catalog
from omniprep.stream.order import pass_order
from omniprep.stream.plan import Blended, PlanConfig, make_plan

OUT = Path(__file__).parent / "images" / "plan.svg"
CONFIG = PlanConfig(max_tokens=1_000, global_batch_size=4, window_samples=8, seed=3)
NUM_RANKS = 2
LEFT, WIDTH = 118, 1_000
LANE, BOX = 26, 20
SMALL = 'font-size="11" fill="#666"'


class Small(NamedTuple):
    """A dataset of the example."""

    name: str
    colour: str
    weight: float
    shard_size: int
    lengths: tuple[int, ...]


DATASETS = (
    Small("chat", "#5b7db1", 4, 4, (210, 330, 150, 280, 190, 240, 300, 170, 260, 220, 360, 180, 310, 230, 200, 270)),
    Small("speech", "#d08a3e", 2, 3, (420, 350, 510, 380, 460, 330, 480, 400)),
    Small("film", "#6a9a58", 1, 2, (820, 690, 760, 870)),
)


def catalog_of(small: Small) -> Catalog:
    """Return the catalog that a dataset of such samples would have."""
    starts = [*range(0, len(small.lengths), small.shard_size), len(small.lengths)]
    shards = tuple(
        ShardInfo(
            name=f"train-{small.name}-{number:05d}.tar",
            split="train",
            source=small.name,
            partition=number,
            num_bytes=0,
            sha256="",
            index_sha256="",
            totals=Totals(num_records=stop - start),
            modalities={},
        )
        for number, (start, stop) in enumerate(pairwise(starts))
    )
    lengths = np.array(small.lengths, np.int32)
    return Catalog(
        place=small.name,
        split="train",
        kind="sequence",
        member_format=MemberFormat(kind="sequence"),
        shards=shards,
        starts=np.array(starts),
        num_tokens=lengths,
        longest=lengths,
        num_mel_frames=np.zeros_like(lengths),
        num_patches=np.zeros_like(lengths),
        digest=hashlib.sha256(small.name.encode()).hexdigest(),
    )


CATALOGS = tuple(catalog_of(small) for small in DATASETS)


def order_of(dataset: int) -> list[int]:
    """Return a dataset's samples in the shuffled order of the epoch."""
    return pass_order(CATALOGS[dataset], seed=CONFIG.seed, epoch=0, number=0, window=CONFIG.window_samples).tolist()


def blended_order() -> list[tuple[int, int]]:
    """Return the (dataset, sample) of the blend, before it is packed."""
    shares = [
        Share(
            len(small.lengths),
            len(small.lengths),
            small.weight,
            lambda _, own=number: (np.array(order_of(own)), np.ones(len(DATASETS[own].lengths), np.int64)),  # type: ignore[misc]
        )
        for number, small in enumerate(DATASETS)
    ]
    made = blend(shares)
    return list(zip(made.dataset_of.tolist(), made.sample_of.tolist(), strict=True))


def boxes(samples: Iterable[tuple[int, int]], *, left: float, top: float, scale: float) -> list[str]:
    """Return samples drawn side by side."""
    out, x = [], left
    for dataset, sample in samples:
        small = DATASETS[dataset]
        width = small.lengths[sample] * scale
        out.append(f'<rect x="{x:.1f}" y="{top}" width="{width - 1:.1f}" height="{BOX}" rx="2" fill="{small.colour}"/>')
        out.append(
            f'<text x="{x + width / 2:.1f}" y="{top + 14}" font-size="10" fill="#fff" text-anchor="middle">{sample}</text>'
        )
        x += width
    return out


def title(top: int, name: str, note: str) -> list[str]:
    """Return the heading of a stage."""
    return [f'<text x="16" y="{top}" font-weight="bold">{name}</text>', f'<text x="{LEFT}" y="{top}" {SMALL}>{note}</text>']


def stored_and_ordered(top: int) -> list[str]:
    """Return the datasets as they are stored, by shard, and in the order of the epoch."""
    scale, middle = 0.096, 556
    out = [
        *title(top, "catalogs", "samples as stored, shard by shard"),
        f'<text x="{middle}" y="{top}"><tspan font-weight="bold">order</tspan>'
        f'<tspan {SMALL} dx="12">shards shuffled, then samples in windows of {CONFIG.window_samples}</tspan></text>',
    ]
    for number, (small, catalog) in enumerate(zip(DATASETS, CATALOGS, strict=True)):
        y = top + 12 + number * LANE
        out.append(f'<text x="16" y="{y + 15}">{small.name} × {small.weight:g}</text>')
        x = float(LEFT)
        for start, stop in pairwise(catalog.starts.tolist()):
            out += boxes([(number, sample) for sample in range(start, stop)], left=x, top=y, scale=scale)
            x += sum(small.lengths[start:stop]) * scale + 5
        out += boxes([(number, sample) for sample in order_of(number)], left=middle, top=y, scale=scale)
    return out


def blended(top: int) -> list[str]:
    """Return the blend."""
    samples = blended_order()
    scale = (WIDTH - LEFT - 30) / sum(DATASETS[dataset].lengths[sample] for dataset, sample in samples)
    shown = " : ".join(f"{small.weight:g}" for small in DATASETS)
    note = f"one order of all samples; {shown} by samples at every point of it, not only at the end"
    return [*title(top, "blend", note), *boxes(samples, left=LEFT, top=top + 12, scale=scale)]


def steps(top: int) -> list[str]:
    """Return the bins of every step, by rank."""
    plan = make_plan(
        [Blended(catalog=catalog, weight=small.weight) for small, catalog in zip(DATASETS, CATALOGS, strict=True)], CONFIG
    )
    drawn = [plan.samples_of(number) for number in range(plan.num_bins)]
    if sorted(chain(*drawn)) != sorted(blended_order()):
        raise AssertionError("the plan does not hold the samples of the blend that is drawn above it")
    each = CONFIG.global_batch_size // NUM_RANKS
    step_width = (WIDTH - LEFT - 30) / plan.num_steps
    bin_width = (step_width - 24) / each
    room = f"{CONFIG.max_tokens:,} tokens"
    out = [
        *title(
            top,
            "bins",
            f"samples packed into rows of at most {room}: {plan.num_bins} bins, {plan.fill:.0%} full (white: what stays empty)",
        ),
        *title(top + 20, "steps", f"{CONFIG.global_batch_size} bins of similar cost are one optimizer step; steps are shuffled"),
        *title(top + 40, "ranks", f"each of {NUM_RANKS} takes {each} bins of every step, the costs balanced"),
    ]
    for step in range(plan.num_steps):
        x = LEFT + step * step_width
        frame = f'x="{x:.1f}" y="{top + 58}" width="{step_width - 8:.1f}" height="{30 + NUM_RANKS * (BOX + 12)}" rx="4"'
        out.append(f'<rect {frame} fill="#eee"/>')
        out.append(f'<text x="{x + 8:.1f}" y="{top + 75}" {SMALL}>step {step}</text>')
        for rank in range(NUM_RANKS):
            y = top + 84 + rank * (BOX + 12)
            if step == 0:
                out.append(f'<text x="16" y="{y + 14}">rank {rank}</text>')
            for place, number in enumerate(plan.bins_of(step, rank=rank, world_size=NUM_RANKS)):
                left = x + 6 + place * (bin_width + 4)
                size = f'width="{bin_width:.1f}" height="{BOX + 4}"'
                out.append(f'<rect x="{left:.1f}" y="{y - 2}" {size} rx="3" fill="#fff" stroke="#777"/>')
                scale = (bin_width - 3) / CONFIG.max_tokens
                out += boxes(plan.samples_of(number), left=left + 2, top=y, scale=scale)
    return out


def figure() -> str:
    """Return the figure as SVG."""
    height = 372
    rows = [*stored_and_ordered(26), *blended(140), *steps(206)]
    background = f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'font-family="sans-serif" font-size="13" fill="#333">{background}\n' + "\n".join(rows) + "\n</svg>\n"
    )


if __name__ == "__main__":
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(figure(), encoding="utf-8")
