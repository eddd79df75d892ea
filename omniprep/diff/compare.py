"""`omniprep diff A B`: what changed between two datasets.

Shards with the same bytes are told by their digests and never opened. Of the others the indices are joined (`rows.py`),
first by key, then what is left by content; that settles for every record whether it is new, gone, moved, renamed or
changed, and how its sizes changed. What an index cannot tell (which array changed, or only a file's name) is read from
the members of a sample: the records with the smallest digests, so that the same datasets always give the same sample.
"""

import heapq
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from omniprep.diff.record import PARTS, Part, RecordDiff, compare_found, differing_parts, find_record, read_record
from omniprep.diff.report import DatasetDiff, Example, Group, Groups, Sampled, ShardCounts
from omniprep.diff.rows import BUCKET_ROWS, BYTES_OF, NAME, Buckets, Joined, Match, join, name_column, read_rows, with_name
from omniprep.errors import ConfigError, DatasetError
from omniprep.receipts import differences
from omniprep.shards.manifest import Manifest, QuarantineInfo, ShardInfo, Totals, read_manifest
from omniprep.shards.quarantine import QUARANTINE_FOLDER
from omniprep.storage.folder import Folder, open_folder

if TYPE_CHECKING:
    import pyarrow as pa

_NUM_SAMPLED = 24

_FACTS = ("id", "source", "row", f"{BYTES_OF}json")
_SIZES = {
    "tokens": ("num_tokens", "num_supervised"),
    "mel": ("num_mel_frames", "num_audio_items", "audio_s", f"{BYTES_OF}mel.npy"),
    "frames": ("num_patches", "num_images", "num_videos", "video_s", f"{BYTES_OF}frames.mjpg", f"{BYTES_OF}frames.npy"),
}
"""Columns by what of a record they measure."""
_NOT_COMPARED = ("key", "content", NAME, "shard", "number")
_STATED = (
    "format",
    "omniprep",
    "profile",
    "kind",
    "rope_mode",
    "frame_format",
    "mel_dtype",
    "members",
    "tokenizer_sha256",
    "codec",
)

Place = tuple[int, int]
"""Number of a shard in the manifest, number of a record in the shard."""


@dataclass(frozen=True)
class Dataset:
    """A finished dataset: where it is and what it is."""

    folder: Folder
    manifest: Manifest

    @classmethod
    def open(cls, place: str) -> "Dataset":
        """Open the dataset at a path or URL. Raises `NoDatasetError` if there is none, `DatasetError` if it is damaged."""
        folder = open_folder(place)
        return cls(folder, read_manifest(folder))


@dataclass
class _Findings:
    """What was found so far."""

    limit: int
    num_sampled: int
    groups: Groups = field(default_factory=Groups)
    num_same: int = 0
    columns: Counter[str] = field(default_factory=Counter)
    changed: list[tuple[str, Place, Place]] = field(default_factory=list)
    """A sample: (digest, where in A, where in B) with the smallest digests."""
    same: list[tuple[str, Place, Place]] = field(default_factory=list)

    def add(self, **groups: Group) -> None:
        """Add records to groups."""
        self.groups = self.groups.merged(Groups(**groups), limit=self.limit)


def diff(
    a: str, b: str, *, match: Match = "key", limit: int = 10, num_sampled: int = _NUM_SAMPLED, bucket_rows: int = BUCKET_ROWS
) -> DatasetDiff:
    """Compare two datasets, folders or URLs; each group names at most `limit` records.

    `match` says what makes two records the same: `key` (source and row), the record's own `id` (for rows that moved in
    their file), or `content`. The members of `num_sampled` records are read, of those that changed and of those that
    seem not to have. `bucket_rows` bounds the memory. Raises `ConfigError` if there is no dataset, `DatasetError` if one
    is damaged.
    """
    sides = Dataset.open(a), Dataset.open(b)
    before, after = (side.manifest for side in sides)
    shards, todo = _compare_shards(before.shards, after.shards)
    found = _Findings(limit=limit, num_sampled=num_sampled)
    num_rows = [sum(shard.totals.num_records for _, shard in side) for side in todo]
    found.num_same = before.totals.num_records - num_rows[0]
    rejected = _read_rejections(sides)
    with (
        Buckets(max(num_rows), by=name_column(match), bucket_rows=bucket_rows) as matched,
        Buckets(max(num_rows), by="content", bucket_rows=bucket_rows) as unmatched,
    ):
        for number, side in enumerate(sides):
            names = [(position, shard.index_name) for position, shard in todo[number]]
            for table in read_rows(side.folder, names, side.manifest.members):
                matched.add(number, with_name(table, match))
        for left, right in matched.pairs():
            pairs = join(left, right, name_column(match))
            _compare_pairs(pairs, found)
            unmatched.add(0, pairs.only_a())
            unmatched.add(1, pairs.only_b())
        for left, right in unmatched.pairs():
            # Of several records with one content, those with the first keys are paired.
            pairs = join(left.sort_by("key"), right.sort_by("key"), "content")
            _compare_pairs(pairs, found)
            removed = _take_rejected(pairs.only_a(), rejected[1], "newly_rejected", found)
            added = _take_rejected(pairs.only_b(), rejected[0], "newly_accepted", found)
            found.add(removed=_alone(removed, limit), added=_alone(added, limit))
    num_rejected_in_both = _compare_rejections(*rejected, found)
    return DatasetDiff(
        a=a,
        b=b,
        match=match,
        recipe=tuple(differences(_sources_by_name(before.recipe), _sources_by_name(after.recipe))),
        versions=tuple(differences(_stated(before), _stated(after))),
        totals=_totals(before, after),
        rejects=_rejects(before, after),
        rejected_and_gone=rejected[0].num_rows - num_rejected_in_both - found.groups.newly_accepted.count,
        rejected_and_new=rejected[1].num_rows - num_rejected_in_both - found.groups.newly_rejected.count,
        shards=shards,
        num_same=found.num_same,
        groups=_with_details(found.groups, sides),
        columns=dict(sorted(found.columns.items())),
        sampled_changed=_read_sample(sides, found.changed),
        sampled_same=_read_sample(sides, found.same),
    )


def diff_record(a: str, b: str, key: str) -> RecordDiff:
    """Compare what two datasets have under one key (or id). Raises `ConfigError` if neither has it."""
    from omniprep.tokens.vocab import TokenizerConfig, load_tokenizer

    found = [find_record(side.folder, side.manifest, key) for side in (Dataset.open(a), Dataset.open(b))]
    if found == [None, None]:
        raise ConfigError(f"neither {a} nor {b} has a record with the key or id {key!r}, stored or rejected")
    return compare_found(found[0], found[1], load_tokenizer(TokenizerConfig()), key=key)


Todo = list[tuple[int, ShardInfo]]


def _compare_shards(a: Sequence[ShardInfo], b: Sequence[ShardInfo]) -> tuple[ShardCounts, tuple[Todo, Todo]]:
    """Return the counts, and the shards of each side that the other has not, with their numbers."""
    digests_a, digests_b = ({shard.sha256: shard.name for shard in side} for side in (a, b))
    names_a, names_b = ({shard.name for shard in side} for side in (a, b))
    todo_a = [(number, shard) for number, shard in enumerate(a) if shard.sha256 not in digests_b]
    todo_b = [(number, shard) for number, shard in enumerate(b) if shard.sha256 not in digests_a]
    same = [digest for digest in digests_a if digest in digests_b]
    identical = sum(digests_a[digest] == digests_b[digest] for digest in same)
    counts = ShardCounts(
        identical=identical,
        renamed=len(same) - identical,
        rewritten=sum(shard.name in names_b for _, shard in todo_a),
        only_a=sum(shard.name not in names_b for _, shard in todo_a),
        only_b=sum(shard.name not in names_a for _, shard in todo_b),
    )
    return counts, (todo_a, todo_b)


def _compare_pairs(pairs: Joined, found: _Findings) -> None:
    """Add what differs between records that both datasets have."""
    columns = [name for name in pairs.a.column_names if name in pairs.b.column_names and name not in _NOT_COMPARED]
    differ = {name: pairs.differ(name) for name in columns}
    other_key, other_content = pairs.differ("key"), pairs.differ("content")
    found.columns.update({name: int(mask.sum()) for name, mask in differ.items() if mask.any()})
    relabelled = _any(differ, _FACTS) & ~(other_key | other_content | differ["split"])
    found.num_same += int((~other_content).sum())
    found.add(
        changed=_group(pairs, other_content, found.limit, differ, by=_kinds(differ)),
        moved=_group(pairs, differ["split"], found.limit, {"split": differ["split"]}, by=_changes(pairs, "split")),
        renamed=_group(pairs, other_key, found.limit, {"key": other_key}),
        relabelled=_group(pairs, relabelled, found.limit, {name: differ[name] for name in _FACTS}),
    )
    unsettled = ~other_content & ~_any(differ, columns)
    found.changed = _smallest(pairs, other_content, found.changed, num_sampled=found.num_sampled)
    found.same = _smallest(pairs, unsettled, found.same, num_sampled=found.num_sampled)


def _any(differ: Mapping[str, npt.NDArray[np.bool_]], columns: Iterable[str]) -> npt.NDArray[np.bool_]:
    masks = [differ[name] for name in columns if name in differ]
    return np.asarray(np.logical_or.reduce(masks), np.bool_)


def _kinds(differ: Mapping[str, npt.NDArray[np.bool_]]) -> npt.NDArray[np.str_]:
    """Return in words, for every pair, which sizes changed."""
    masks = {kind: _any(differ, columns) for kind, columns in _SIZES.items()}
    code = sum((mask.astype(np.int64) << bit for bit, mask in enumerate(masks.values())), np.int64(0))
    words = [" and ".join(kind for bit, kind in enumerate(masks) if number >> bit & 1) for number in range(1 << len(masks))]
    said = np.array([f"sizes of {word}" if word else "same sizes" for word in words])
    return np.asarray(said[code])


def _changes(pairs: Joined, column: str) -> npt.NDArray[np.object_]:
    """Return a column's change in words, for every pair."""
    import pyarrow.compute as pc

    left, right = pairs.a[column].take(pairs.in_a), pairs.b[column].take(pairs.in_b)
    return np.asarray(pc.binary_join_element_wise(left, right, " -> ").to_numpy(zero_copy_only=False), np.object_)


def _group(
    pairs: Joined,
    chosen: npt.NDArray[np.bool_],
    limit: int,
    differ: Mapping[str, npt.NDArray[np.bool_]],
    *,
    by: npt.NDArray[Any] | None = None,
) -> Group:
    """Return the chosen pairs as a group; an example says what changed in the columns of `differ`."""
    rows = np.flatnonzero(chosen)
    if not len(rows):
        return Group()
    first = pairs.smallest("key", rows, limit)
    values = {name: pairs.values(name, first) for name in differ}
    keys = [key for key, _ in pairs.values("key", first)]
    examples = [
        Example(key=key, what=", ".join(_change(name, *values[name][at]) for name in differ if differ[name][row]))
        for at, (row, key) in enumerate(zip(first.tolist(), keys, strict=True))
    ]
    counted = Counter(by[rows].tolist()) if by is not None else Counter()
    return Group(count=len(rows), by=dict(sorted(counted.items())), examples=tuple(examples))


def _change(name: str, before: object, after: object) -> str:
    return f"{name} {before} -> {after}"


def _alone(table: "pa.Table", limit: int) -> Group:
    """Return records that one dataset alone has as a group, by split."""
    import pyarrow.compute as pc

    if not table.num_rows:
        return Group()
    examples = table.select(["key", "split", "num_tokens"]).take(pc.bottom_k_unstable(table["key"], limit)).to_pylist()
    return Group(
        count=table.num_rows,
        by=_value_counts(table["split"]),
        examples=tuple(
            Example(key=row["key"], what=f"split {row['split']}, {row['num_tokens']:,} tokens")
            for row in sorted(examples, key=lambda row: row["key"])
        ),
    )


def _value_counts(column: "pa.ChunkedArray") -> dict[str, int]:
    counts = {row["values"]: row["counts"] for row in column.value_counts().to_pylist()}
    return dict(sorted(counts.items()))


def _smallest(
    pairs: Joined, chosen: npt.NDArray[np.bool_], sample: list[tuple[str, Place, Place]], *, num_sampled: int
) -> list[tuple[str, Place, Place]]:
    """Return the sample with the chosen pairs considered."""
    rows = pairs.smallest("content", np.flatnonzero(chosen), num_sampled)
    columns = [pairs.values(name, rows) for name in ("content", "shard", "number")]
    new = [(digest[0], (shard[0], number[0]), (shard[1], number[1])) for digest, shard, number in zip(*columns, strict=True)]
    return heapq.nsmallest(num_sampled, [*sample, *new])


def _read_sample(sides: tuple[Dataset, Dataset], sample: Sequence[tuple[str, Place, Place]]) -> Sampled:
    """Read both members of the sampled pairs and count in what they differ."""
    parts: Counter[Part] = Counter()
    for _, *places in sorted(sample, key=lambda one: one[1:]):
        records = [read_record(side.folder, side.manifest, *place) for side, place in zip(sides, places, strict=True)]
        parts.update(differing_parts(records[0], records[1]))
    return Sampled(num_records=len(sample), parts={part: parts[part] for part in PARTS if parts[part]})


def _read_rejections(sides: tuple[Dataset, Dataset]) -> tuple["pa.Table", "pa.Table"]:
    """Return key and reason of what each side rejected, without the files that both have."""
    listed = [{info.sha256: info for info in side.manifest.quarantine} for side in sides]
    tables = [
        _concat([_read_quarantine(side, info, ("key", "reason")) for digest, info in own.items() if digest not in other])
        for side, own, other in zip(sides, listed, reversed(listed), strict=True)
    ]
    return tables[0], tables[1]


def _concat(tables: "list[pa.Table]") -> "pa.Table":
    import pyarrow as pa

    empty = pa.table({"key": pa.array([], pa.string()), "reason": pa.array([], pa.string())})
    return pa.concat_tables([empty, *tables], promote_options="default")


def _read_quarantine(side: Dataset, info: QuarantineInfo, columns: Sequence[str]) -> "pa.Table":
    import pyarrow as pa
    import pyarrow.parquet as pq

    name = f"{QUARANTINE_FOLDER}/{info.name}"
    try:
        with side.folder.open(name) as file:
            return pq.ParquetFile(file).read(columns=list(columns), use_threads=False).replace_schema_metadata(None)
    except FileNotFoundError:
        raise DatasetError(
            f"{side.folder.place}: {name} is missing, though the manifest names it; see `omniprep verify`"
        ) from None
    except (OSError, pa.ArrowException) as error:
        message = " ".join(str(error).split())
        raise DatasetError(f"{side.folder.place}: {name}: not a readable quarantine file: {message}") from None


def _take_rejected(only: "pa.Table", rejected: "pa.Table", group: str, found: _Findings) -> "pa.Table":
    """Put the records of one side that the other rejected into a group, and return the others."""
    pairs = join(only, rejected, "key")
    if len(pairs.in_a):
        found.add(**{group: _rejected_group(pairs, found.limit)})
    return pairs.only_a()


def _rejected_group(pairs: Joined, limit: int) -> Group:
    rows = pairs.smallest("key", np.arange(len(pairs.in_a)), limit)
    keys, reasons = pairs.a["key"].take(pairs.in_a[rows]), pairs.b["reason"].take(pairs.in_b[rows])
    return Group(
        count=len(pairs.in_a),
        by=_value_counts(pairs.b["reason"].take(pairs.in_b)),
        examples=tuple(Example(key=key, what=reason) for key, reason in zip(keys.to_pylist(), reasons.to_pylist(), strict=True)),
    )


def _compare_rejections(a: "pa.Table", b: "pa.Table", found: _Findings) -> int:
    """Add what both rejected for other reasons, and return how many both rejected (files of equal bytes aside)."""
    pairs = join(a, b, "key")
    other = pairs.differ("reason")
    found.add(other_reason=_group(pairs, other, found.limit, {"reason": other}, by=_changes(pairs, "reason")))
    return len(pairs.in_a)


def _with_details(groups: Groups, sides: tuple[Dataset, Dataset]) -> Groups:
    """Return the groups, with the details of the rejections that they show."""
    changed = {}
    for name, side in (("newly_rejected", sides[1]), ("newly_accepted", sides[0])):
        group: Group = getattr(groups, name)
        details = _details(side, {example.key for example in group.examples})
        shown = tuple(Example(key=one.key, what=f"{one.what}: {details[one.key]}") for one in group.examples)
        changed[name] = group.model_copy(update={"examples": shown})
    return groups.model_copy(update=changed)


def _details(side: Dataset, keys: set[str]) -> dict[str, str]:
    import pyarrow as pa
    import pyarrow.compute as pc

    found: dict[str, str] = {}
    for info in side.manifest.quarantine:
        if len(found) < len(keys):
            table = _read_quarantine(side, info, ("key", "detail"))
            chosen = table.filter(pc.is_in(table["key"], value_set=pa.array(sorted(keys))))
            found |= dict(zip(chosen["key"].to_pylist(), chosen["detail"].to_pylist(), strict=True))
    return found


def _sources_by_name(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe whose sources are told apart by name: one more in front does not shift the others."""
    return {**recipe, "sources": {source["name"]: source for source in recipe.get("sources", ())}}


def _stated(manifest: Manifest) -> dict[str, Any]:
    values = manifest.model_dump(mode="json")
    return {**{name: values[name] for name in _STATED}, "libraries": values["libraries"]}


def _totals(a: Manifest, b: Manifest) -> dict[str, tuple[Totals, Totals]]:
    """Return totals before and after: of all, of each split and of each source."""
    found = {"all": (a.totals, b.totals)}
    for title, before, after in (("split", a.by_split, b.by_split), ("source", a.by_source, b.by_source)):
        for name in sorted({**before, **after}):
            found[f"{title} {name}"] = before.get(name, Totals()), after.get(name, Totals())
    return found


def _rejects(a: Manifest, b: Manifest) -> dict[str, tuple[int, int]]:
    return {reason: (a.rejects.get(reason, 0), b.rejects.get(reason, 0)) for reason in sorted({**a.rejects, **b.rejects})}
