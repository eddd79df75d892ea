"""Reading 5,000 samples of 340 KB in bins, in a shuffled order: against the bare reads, and against `webdataset`.

The floor is one `preadv` for each member with an array (tokens, mel, frames) into a ring of 64 MB that is kept, and arrays as
views of it: nothing is looked up, checked or described. webdataset runs in this process, with a shuffle
buffer of 1,000. All hand every sample over as arrays and bytes, pictures still as JPEG; what was read is counted and compared.
The files are in the page cache.
"""

import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import stream_corpus
import webdataset
from ratios import Ratio, measure

from omniprep.shards.reader import index_rows
from omniprep.stream.catalog import read_catalog
from omniprep.stream.reader import RecordReader

NUM_IN_A_BIN = 6
"""Samples of 1,400 tokens that fit into 8,192."""
SHUFFLE_BUFFER = 1_000
RING_BYTES = 64 << 20
HEADER_BYTES = 128


class Member(NamedTuple):
    """Where the data of an array lie."""

    descriptor: int
    kind: str
    offset: int
    size: int


def run(num_samples: int = stream_corpus.NUM_SAMPLES, *, pairs: int = 5) -> list[Ratio]:
    """Return the distance to the floor and the speed-up over webdataset."""
    folder = stream_corpus.dataset(num_samples)
    catalog = read_catalog(folder)
    order = np.random.default_rng(0).permutation(num_samples).tolist()
    reader = RecordReader([catalog])
    bins = [[(0, sample) for sample in order[at : at + NUM_IN_A_BIN]] for at in range(0, num_samples, NUM_IN_A_BIN)]
    members = _members(str(folder))
    ring = bytearray(RING_BYTES)
    shards = [str(folder / shard.name) for shard in catalog.shards]

    def ours() -> int:
        num_tokens = 0
        for one in bins:
            with reader.read_bin(one) as records:
                num_tokens += sum(record.tokens["tokens"].shape[1] for record in records)
        return num_tokens

    def floor() -> int:
        return sum(arrays["tokens.npy"].shape[1] for arrays in _bare([members[sample] for sample in order], ring))

    def theirs() -> int:
        dataset = webdataset.WebDataset(shards, shardshuffle=100, empty_check=False).shuffle(SHUFFLE_BUFFER).decode()
        return sum(sample["tokens.npy"].shape[1] for sample in dataset)

    total = int(catalog.num_tokens.sum())
    for side in (ours, floor, theirs):
        _check(side, total)
    found = [
        measure(
            "read samples of 340 KB: bare pread and views", ours=ours, other=floor, target=2.0, at_least=False, pairs=2 * pairs
        ),
        measure("read samples of 340 KB: webdataset", ours=ours, other=theirs, target=6.0, at_least=True, pairs=pairs),
    ]
    for descriptor in {member.descriptor for sample in members for member in sample}:
        os.close(descriptor)
    return found


def _check(side: Callable[[], int], expected: int) -> None:
    got = side()
    if got != expected:
        raise AssertionError(f"{side.__name__} read {got} of {expected} tokens")


def _members(folder: str) -> list[list[Member]]:
    """Return, for each sample, where its arrays are; those without data are left out."""
    descriptors: dict[str, int] = {}
    found = []
    for row in index_rows(folder):
        name = row["shard"]
        if name not in descriptors:
            descriptors[name] = os.open(f"{folder}/{name}", os.O_RDONLY)
        kinds = ("frames.mjpg", "json", "mel.npy", "tokens.npy")
        spans = zip(kinds, row["member_offsets"], row["member_sizes"], strict=True)
        empty = {"frames.mjpg": 0, "mel.npy": HEADER_BYTES, "tokens.npy": -1}
        found.append(
            [Member(descriptors[name], kind, offset, size) for kind, offset, size in spans if size > empty.get(kind, size)]
        )
    return found


def _bare(samples: list[list[Member]], ring: bytearray) -> Iterator[dict[str, np.ndarray]]:
    view, at = memoryview(ring), 0
    for sample in samples:
        arrays = {}
        for descriptor, kind, offset, size in sample:
            if at + size > RING_BYTES:
                at = 0
            piece = view[at : at + size]
            os.preadv(descriptor, [piece], offset)
            at += -(-size // 64) * 64
            if kind == "tokens.npy":
                arrays[kind] = np.frombuffer(piece, np.int32, offset=HEADER_BYTES).reshape(5, -1)
            elif kind == "mel.npy":
                arrays[kind] = np.frombuffer(piece, np.float16, offset=HEADER_BYTES).reshape(128, -1)
            else:
                arrays[kind] = np.frombuffer(piece, np.uint8)
        yield arrays
