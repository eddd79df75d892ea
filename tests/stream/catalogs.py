"""Catalogs without a dataset: only lengths, as a plan needs them."""

import hashlib
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from omniprep.shards.manifest import ShardInfo, Totals
from omniprep.shards.members import MemberFormat, SampleKind
from omniprep.stream.catalog import Catalog


def catalog(
    lengths: Sequence[int],
    *,
    mel_frames: Sequence[int] | None = None,
    patches: Sequence[int] | None = None,
    shard_size: int = 7,
    name: str = "set",
    kind: SampleKind = "sequence",
    longest: Sequence[int] | None = None,
) -> Catalog:
    num_samples = len(lengths)
    starts = [*range(0, num_samples, shard_size), num_samples]
    totals = [Totals(num_records=stop - start) for start, stop in pairwise(starts)]
    shards = tuple(
        ShardInfo(
            name=f"train-{name}-{number:05d}.tar",
            split="train",
            source=name,
            partition=number,
            num_bytes=0,
            sha256="",
            index_sha256="",
            totals=one,
            modalities={},
        )
        for number, one in enumerate(totals)
    )
    zeros = [0] * num_samples
    columns = [np.array(one, np.int32) for one in (lengths, longest or lengths, mel_frames or zeros, patches or zeros)]
    return Catalog(
        place=f"build/{name}",
        split="train",
        kind=kind,
        member_format=MemberFormat(kind=kind),
        shards=shards,
        starts=np.array(starts),
        num_tokens=columns[0],
        longest=columns[1],
        num_mel_frames=columns[2],
        num_patches=columns[3],
        digest=hashlib.sha256(f"{name} {shard_size} {[column.tolist() for column in columns]}".encode()).hexdigest(),
    )


def uneven(num_samples: int, *, seed: int = 0, low: int = 200, high: int = 4000) -> list[int]:
    """Return lengths of which short ones are as frequent as long ones, octave by octave."""
    logs = np.random.default_rng(seed).uniform(np.log(low), np.log(high), num_samples)
    return np.exp(logs).astype(int).tolist()
