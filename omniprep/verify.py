"""`omniprep verify`: prove that a dataset is what its manifest says, byte by byte and record by record.

Digests tell that something changed; the rest tells where: every record is read through the index, taken apart and
checked against the rules that its layout must obey (`verify_sample.py`). At last every shard is read once more as plain
`webdataset` reads it.
"""

import contextlib
import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from omniprep.errors import DatasetError
from omniprep.profile import QWEN2_5_OMNI, ModelProfile
from omniprep.receipts import RECEIPTS_FOLDER
from omniprep.shards.index import content_sha256, describe_sample, read_index_table
from omniprep.shards.manifest import MANIFEST_NAME, Manifest, ShardInfo, Totals, add_up, read_manifest, totals_of
from omniprep.shards.members import from_members
from omniprep.shards.quarantine import QUARANTINE_FOLDER, blob_name, read_quarantine
from omniprep.shards.reader import ShardReader
from omniprep.shards.writer import BLOCK_BYTES, tar_header
from omniprep.storage.folder import Folder, Place, as_folder, sha256_of
from omniprep.stream.energon import ENERGON_FOLDER, ENERGON_SUFFIX, energon_is_current
from omniprep.types import Int64Array
from omniprep.verify_sample import check_sample

_REFERENCES = "reference-"
"""Begins the names of what a trainer stores beside the shards: log-probabilities of its reference model."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something that is not as it must be."""

    message: str
    shard: str = ""
    key: str = ""
    member: str = ""

    def __str__(self) -> str:
        place = ": ".join(part for part in (self.shard, self.key, self.member) if part)
        return f"{place}: {self.message}" if place else self.message


def verify(place: Place, *, profile: ModelProfile = QWEN2_5_OMNI) -> Iterator[Finding]:
    """Yield everything that is wrong with a dataset. Raises `DatasetError` if it has no readable manifest."""
    folder = as_folder(place)
    manifest = read_manifest(folder)
    present = folder.files()
    yield from _check_files(folder, manifest, present)
    there = [shard for shard in manifest.shards if shard.name in present and shard.index_name in present]
    for shard in there:
        yield from _check_shard(folder, manifest, shard, profile)
    yield from _check_keys(folder, there)
    yield from _check_totals(manifest)
    yield from _check_quarantine(folder, manifest)


def _check_files(folder: Folder, manifest: Manifest, present: Mapping[str, int]) -> Iterator[Finding]:
    """Compare the files in the folder with those that the manifest names: presence, size, digest."""
    expected = {shard.name: shard.sha256 for shard in manifest.shards}
    expected |= {shard.index_name: shard.index_sha256 for shard in manifest.shards}
    expected |= {f"{QUARANTINE_FOLDER}/{info.name}": info.sha256 for info in manifest.quarantine}
    expected |= {blob_name(blob): blob for info in manifest.quarantine for blob in info.blobs}
    sizes = {shard.name: shard.num_bytes for shard in manifest.shards}
    for name in sorted(expected):
        if name not in present:
            yield Finding(shard=name, message="missing, though the manifest names it")
            continue
        if name in sizes and present[name] != sizes[name]:
            yield Finding(shard=name, message=f"expected {sizes[name]} bytes, got {present[name]}")
        elif (found := sha256_of(folder, name)) != expected[name]:
            yield Finding(shard=name, message=f"expected sha256 {expected[name][:16]}…, got {found[:16]}…: its bytes changed")
    for name in folder.partials():
        yield Finding(shard=name, message="half-written file of a build that was killed; run the same `omniprep prepare`")
    if energon_is_current(folder) is False:
        yield Finding(
            shard=ENERGON_FOLDER, message="describes an older state of the dataset; run `omniprep export energon` again"
        )
    exported = {f"{shard.name}{ENERGON_SUFFIX}" for shard in manifest.shards}
    for name in sorted(set(present) - set(expected) - exported - {MANIFEST_NAME}):
        if not name.startswith((f"{RECEIPTS_FOLDER}/", f"{ENERGON_FOLDER}/", _REFERENCES)):
            yield Finding(shard=name, message="not in the manifest; remove it, for readers that glob would read it")


def _check_shard(folder: Folder, manifest: Manifest, shard: ShardInfo, profile: ModelProfile) -> Iterator[Finding]:
    try:
        reader = ShardReader(folder, shard.name)
    except DatasetError as error:
        yield Finding(shard=shard.name, message=str(error))
        return
    with reader:
        if reader.member_names != manifest.members:
            message = f"expected members {', '.join(manifest.members)}; got {', '.join(reader.member_names)}"
            yield Finding(shard=shard.index_name, message=message)
        end = 0
        for number, row in enumerate(reader.rows):
            key = row["key"]
            if row["offset"] != end:
                yield Finding(shard=shard.name, key=key, message=f"index: expected the record at byte {end}, got {row['offset']}")
            end = row["offset"] + row["size"]
            yield from _check_record(reader, number, shard, manifest, profile)
        if end + 2 * BLOCK_BYTES != shard.num_bytes:
            message = f"index: its records end at byte {end}, the tar has {shard.num_bytes}"
            yield Finding(shard=shard.name, message=message)
        totals = totals_of(reader.rows)
        if totals != shard.totals:
            yield Finding(shard=shard.name, message=f"manifest: totals are {_differing(shard.totals, totals)}")
        yield from _check_plain_reader(reader)


def _check_keys(folder: Folder, shards: Sequence[ShardInfo]) -> Iterator[Finding]:
    """Check that no key occurs twice, by eight bytes a record: the text of a million keys would take ten times that."""
    hashes: list[Int64Array] = []
    for shard in shards:
        with contextlib.suppress(DatasetError):  # told of already
            hashes.append(_hashed_keys(folder, shard)[1])
    if not hashes:
        return
    values, counts = np.unique(np.concatenate(hashes), return_counts=True)
    twice = values[counts > 1]
    if not len(twice):
        return
    seen: dict[str, str] = {}
    for shard in shards:
        with contextlib.suppress(DatasetError):
            keys, hashed = _hashed_keys(folder, shard)
            for number in np.flatnonzero(np.isin(hashed, twice)).tolist():
                key = keys[number]
                if key in seen:
                    yield Finding(shard=shard.name, key=key, message=f"key is in {seen[key]} too; keys must be unique")
                seen[key] = shard.name


def _hashed_keys(folder: Folder, shard: ShardInfo) -> tuple[list[str], Int64Array]:
    keys = read_index_table(folder, shard.index_name, ("key",))["key"].to_pylist()
    digests = b"".join(hashlib.blake2b(key.encode(), digest_size=8).digest() for key in keys)
    return keys, np.frombuffer(digests, np.int64)


def _check_plain_reader(reader: ShardReader) -> Iterator[Finding]:
    """Read a shard as `webdataset` does, without our index, and compare what it finds with what the index says."""
    from webdataset.tariterators import group_by_keys, tar_file_expander

    shard = reader.name
    with reader.folder.open(shard) as stream:
        try:
            found = group_by_keys(tar_file_expander([{"url": shard, "stream": stream}]))
            for row, sample in itertools.zip_longest(reader.rows, found):
                key = None if sample is None else sample["__key__"]
                if row is None or key != row["key"]:
                    yield Finding(shard=shard, message=f"webdataset reads the key {key}, the index says {row and row['key']}")
                    return
                sizes = [len(sample.get(name, b"")) for name in reader.member_names]
                if sizes != list(row["member_sizes"]):
                    yield Finding(shard=shard, key=key, message=f"webdataset reads members of {sizes} bytes")
        except Exception as error:  # whatever it does with damaged bytes, it does not read the shard
            yield Finding(shard=shard, message=f"webdataset cannot read it: {' '.join(str(error).split())}")


def _check_record(
    reader: ShardReader, number: int, shard: ShardInfo, manifest: Manifest, profile: ModelProfile
) -> Iterator[Finding]:
    row = reader.rows[number]
    key = row["key"]
    try:
        members = reader.read_members(number)
        yield from _check_headers(reader, number, shard.name)
        if content_sha256(members) != row["content_sha256"]:
            yield Finding(shard=shard.name, key=key, message="content hash differs from the index: its tensors changed")
        sample = from_members(members)
    except DatasetError as error:
        text = str(error).removeprefix(f"{shard.name}: {key}: ")
        member, _, message = text.partition(": ")
        known = member in reader.member_names
        yield Finding(shard=shard.name, key=key, member=member if known else "", message=message if known else text)
        return
    for name, value in describe_sample(sample, profile).items():
        if row[name] != value:
            yield Finding(shard=shard.name, key=key, message=f"index: {name} is {row[name]!r}, the record says {value!r}")
    for name, expected, got in (
        ("split", shard.split, sample.split),
        ("source", shard.source, sample.source),
        ("rope_mode", manifest.rope_mode, sample.rope_mode),
    ):
        if expected != got:
            yield Finding(shard=shard.name, key=key, member="json", message=f"{name}: expected {expected!r}, got {got!r}")
    for member, message in check_sample(sample, manifest.member_format, profile):
        yield Finding(shard=shard.name, key=key, member=member, message=message)


def _check_headers(reader: ShardReader, number: int, name: str) -> Iterator[Finding]:
    """Compare the tar headers with the index: other readers go by them."""
    row = reader.rows[number]
    for member, offset, size in zip(reader.member_names, row["member_offsets"], row["member_sizes"], strict=True):
        expected = tar_header(f"{row['key']}.{member}", size)
        if reader.pread(BLOCK_BYTES, offset - BLOCK_BYTES) != expected:
            yield Finding(shard=name, key=row["key"], member=member, message="tar header is not what the index says")


def _check_totals(manifest: Manifest) -> Iterator[Finding]:
    """Check that the manifest's sums are those of its shards, and that no record is unaccounted for."""
    shards = manifest.shards
    sums = add_up(("", shard.totals) for shard in shards).get("", Totals())
    for name, expected, got in (
        ("totals", sums, manifest.totals),
        ("by_split", add_up((shard.split, shard.totals) for shard in shards), manifest.by_split),
        ("by_source", add_up((shard.source, shard.totals) for shard in shards), manifest.by_source),
        ("by_modality", add_up(pair for shard in shards for pair in shard.modalities.items()), manifest.by_modality),
    ):
        if expected != got:
            yield Finding(shard=MANIFEST_NAME, message=f"{name} is not the sum over the shards")
    num_rejected = sum(info.num_records for info in manifest.quarantine)
    if sums.num_records + num_rejected != manifest.num_rows:
        message = f"{manifest.num_rows} rows came in, but {sums.num_records} are in shards and {num_rejected} in the quarantine"
        yield Finding(shard=MANIFEST_NAME, message=message)
    if sum(manifest.rejects.values()) != num_rejected:
        message = f"rejects add up to {sum(manifest.rejects.values())}, the quarantine holds {num_rejected}"
        yield Finding(shard=MANIFEST_NAME, message=message)


def _check_quarantine(folder: Folder, manifest: Manifest) -> Iterator[Finding]:
    for info in manifest.quarantine:
        if folder.size(f"{QUARANTINE_FOLDER}/{info.name}") is not None:
            try:
                count = sum(1 for _ in read_quarantine(folder, info.name))
            except DatasetError as error:
                yield Finding(shard=f"{QUARANTINE_FOLDER}/{info.name}", message=str(error))
                continue
            if count != info.num_records:
                message = f"expected {info.num_records} records, got {count}"
                yield Finding(shard=f"{QUARANTINE_FOLDER}/{info.name}", message=message)


def _differing(before: Totals, now: Totals) -> str:
    pairs = ((name, getattr(before, name), getattr(now, name)) for name in Totals.model_fields)
    return ", ".join(f"{name} {a}, the index says {b}" for name, a, b in pairs if a != b)
