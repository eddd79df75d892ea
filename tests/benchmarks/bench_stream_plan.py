"""The plan of an epoch of a million samples: how long it takes, and how full its bins are.

The indices are written to disk by the code that writes real ones, 2,857 rows in each of 350 shards, once, and kept in
`build/bench` (a minute). Lengths are those of a mix of dialogues, speech, pictures and film. To resume is to read them all
and to plan the epoch anew: the step at which to go on costs nothing more.
"""

import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from corpus import CACHE
from ratios import Ratio
from stream_corpus import manifest_of

from omniprep.shards.index import index_bytes
from omniprep.shards.manifest import MANIFEST_NAME, ShardInfo, manifest_bytes, totals_of
from omniprep.shards.members import MemberFormat
from omniprep.stream.catalog import read_catalog
from omniprep.stream.plan import Blended, Plan, PlanConfig, make_plan

NUM_SAMPLES = 1_000_000
ROWS_A_SHARD = 2_857
FORM = MemberFormat()
CAPS = {"max_mel_frames": 30_000, "max_patches": 32_768}
PLAN_LIMIT_MS, RESUME_LIMIT_MS = 5_000.0, 1_000.0


def run() -> list[Ratio]:
    """Return the times against their limits; print how full the bins are."""
    folder = dataset()
    blended = [Blended(catalog=read_catalog(folder))]
    made = {
        "packed to 8,192": plan_of(folder),
        "under caps on mel frames and patches": plan_of(folder, **CAPS),
        "packed to 32,768": plan_of(folder, max_tokens=32_768),
        "padded": plan_of(folder, batching="padded"),
    }
    for name, plan in made.items():
        print(f"{name}: {plan.num_samples:,} samples in {plan.num_bins:,} bins, {plan.fill:.2%} of the room used")
    config = PlanConfig(global_batch_size=64)
    saved = make_plan(blended, config).state(1_000)

    def resume() -> None:
        plan = make_plan([Blended(catalog=read_catalog(folder))], config)
        plan.bins_of(plan.check_state(saved), rank=3, world_size=8)

    return [
        against_limit("plan 1,000,000 samples (other: 5 s)", lambda: make_plan(blended, config), PLAN_LIMIT_MS),
        against_limit("resume: catalog, plan, step (other: 1 s)", resume, RESUME_LIMIT_MS),
    ]


def against_limit(name: str, work: Callable[[], object], limit_ms: float) -> Ratio:
    """Return the median CPU time of five rounds, after one to warm up, as a part of its limit."""
    work()
    cpu, wall = [], []
    for _ in range(5):
        start = time.process_time(), time.perf_counter()
        work()
        cpu.append((time.process_time() - start[0]) * 1e3)
        wall.append((time.perf_counter() - start[1]) * 1e3)
    ours = float(np.median(cpu))
    print(f"{name}: {ours:,.0f} ms of CPU, {np.median(wall):,.0f} ms by the clock (median of 5)")
    return Ratio(name=name, ours_ms=ours, other_ms=limit_ms, ratio=ours / limit_ms, target=1.0, at_least=False)


def plan_of(folder: Path, **settings: Any) -> Plan:
    """Return the plan of the dataset's first epoch."""
    return make_plan([Blended(catalog=read_catalog(folder))], PlanConfig(**settings))


def lengths(num_samples: int, rng: np.random.Generator) -> dict[str, Any]:
    """Return tokens, mel frames and patches: half dialogues, a quarter speech, then pictures, then film with sound."""
    kind = rng.choice(4, num_samples, p=[0.5, 0.25, 0.15, 0.1])
    text = np.clip(rng.lognormal(np.log(350), 0.8, num_samples), 30, 6_000)
    text = np.where(kind == 0, text, rng.uniform(40, 300, num_samples))
    seconds = np.select([kind == 1, kind == 3], [rng.uniform(2, 30, num_samples), rng.uniform(4, 40, num_samples)], 0)
    pictures = np.select([kind == 2, kind == 3], [rng.uniform(256, 1_500, num_samples), 150 * seconds], 0).astype(int)
    return {
        "num_tokens": np.minimum(text + 25 * seconds + pictures, 8_192).astype(int),
        "num_mel_frames": (100 * seconds).astype(int),
        "num_patches": 4 * pictures,
    }


def dataset() -> Path:
    """Return the folder of a dataset of which only the indices and the manifest exist."""
    folder = CACHE / f"plan-{NUM_SAMPLES}"
    if (folder / MANIFEST_NAME).exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    starts = range(0, NUM_SAMPLES, ROWS_A_SHARD)
    shards = tuple(
        write_index(folder, number, start, min(ROWS_A_SHARD, NUM_SAMPLES - start), rng) for number, start in enumerate(starts)
    )
    (folder / MANIFEST_NAME).write_bytes(manifest_bytes(manifest_of(shards, FORM)))
    return folder


def write_index(folder: Path, number: int, start: int, num_rows: int, rng: np.random.Generator) -> ShardInfo:
    """Write the index of one shard and return what the manifest says of it."""
    columns = {name: column.tolist() for name, column in lengths(num_rows, rng).items()}
    rows = []
    offset = 0
    for place in range(num_rows):
        own = {name: column[place] for name, column in columns.items()}
        sizes = [100 * own["num_patches"], 700, 128 + 256 * own["num_mel_frames"], 128 + 20 * own["num_tokens"]]
        places = [offset + 512, offset + sizes[0] + 1_024, offset + sum(sizes[:2]) + 2_048, offset + sum(sizes[:3]) + 4_096]
        rows.append(
            {
                **own,
                "key": f"mix-{start + place:08d}",
                "id": f"user-{start + place}",
                "source": "mix",
                "row": start + place,
                "split": "train",
                "offset": offset,
                "size": sum(sizes) + 4_608,
                "member_offsets": places,
                "member_sizes": sizes,
                "num_supervised": own["num_tokens"] // 3,
                "num_audio_items": int(own["num_mel_frames"] > 0),
                "num_images": int(own["num_patches"] > 0),
                "num_videos": 0,
                "audio_s": own["num_mel_frames"] / 100,
                "video_s": 0.0,
                "has_audio": own["num_mel_frames"] > 0,
                "has_image": own["num_patches"] > 0,
                "has_video": False,
                "has_video_with_sound": False,
                "content_sha256": rng.bytes(32).hex(),
            }
        )
        offset += sum(sizes) + 4_608
    name = f"train-mix-{number:05d}"
    data = index_bytes(rows, members=FORM.names)
    (folder / f"{name}.parquet").write_bytes(data)
    return ShardInfo(
        name=f"{name}.tar",
        split="train",
        source="mix",
        partition=number,
        num_bytes=offset,
        sha256=hashlib.sha256(name.encode()).hexdigest(),
        index_sha256=hashlib.sha256(data).hexdigest(),
        totals=totals_of(rows),
        modalities={},
    )
