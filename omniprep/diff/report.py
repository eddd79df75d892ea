"""What a comparison of two datasets says, as values and as text."""

import heapq
from collections import Counter
from collections.abc import Iterable, Iterator

from pydantic import Field, computed_field

from omniprep.diff.record import Part
from omniprep.diff.rows import Match
from omniprep.errors import printable
from omniprep.shards.manifest import Stored, Totals

_MAX_LINES = 20
"""Lines of differences between recipes or versions that are shown; `--json` has all."""


class Example(Stored):
    """One record of a group."""

    key: str
    what: str = ""


class Group(Stored):
    """Records to which the same happened."""

    count: int = 0
    by: dict[str, int] = Field(default_factory=dict)
    """The count by split, by reason, or by what differs."""
    examples: tuple[Example, ...] = ()
    """Those with the first keys."""

    def merged(self, other: "Group", *, limit: int) -> "Group":
        """Return the group of both, with at most `limit` examples.

        >>> Group(count=2, by={"train": 2}).merged(Group(count=1, by={"val": 1}), limit=5).by
        {'train': 2, 'val': 1}
        """
        return Group(
            count=self.count + other.count,
            by=dict(sorted((Counter(self.by) + Counter(other.by)).items())),
            examples=tuple(heapq.nsmallest(limit, [*self.examples, *other.examples], key=lambda example: example.key)),
        )


class Groups(Stored):
    """What happened to records. A record may be in several: moved to another split and changed."""

    removed: Group = Group()
    """In A, and neither its key (or id) nor its content is in B."""
    added: Group = Group()
    changed: Group = Group()
    """In both, with other content. `by` says which sizes changed with it."""
    moved: Group = Group()
    """In both, in another split."""
    renamed: Group = Group()
    """In both, under another key: found by its content, or by its id if that was asked for."""
    relabelled: Group = Group()
    """The same key, content and split, but another id, source or row, or a `json` member of another size."""
    newly_rejected: Group = Group()
    newly_accepted: Group = Group()
    other_reason: Group = Group()
    """Rejected in both, for another reason."""

    def merged(self, other: "Groups", *, limit: int) -> "Groups":
        """Return the groups of both."""
        names = Groups.model_fields
        return Groups(**{name: getattr(self, name).merged(getattr(other, name), limit=limit) for name in names})


class ShardCounts(Stored):
    """Shards, compared by the digest of their bytes."""

    identical: int = 0
    renamed: int = 0
    """Same bytes under another name."""
    rewritten: int = 0
    """Other bytes under the same name."""
    only_a: int = 0
    only_b: int = 0


class Sampled(Stored):
    """Records whose members were read and compared."""

    num_records: int = 0
    parts: dict[Part, int] = Field(default_factory=dict)
    """How many of them differ in tokens, labels, positions, mel, frames, provenance."""


class DatasetDiff(Stored):
    """What changed from dataset A to dataset B."""

    a: str
    b: str
    match: Match
    """What makes a record of A and one of B the same: the key, the record's own id, or the content."""
    recipe: tuple[str, ...]
    versions: tuple[str, ...]
    """Of OmniPrep and of libraries, and the settings that the manifest states beside the recipe."""
    totals: dict[str, tuple[Totals, Totals]]
    """Before and after, for `all` and for each `split …` and `source …`."""
    rejects: dict[str, tuple[int, int]]
    """Rejected records by reason, before and after."""
    rejected_and_gone: int
    """Rejected in A, and not in B at all."""
    rejected_and_new: int
    """Rejected in B, and not in A at all."""
    shards: ShardCounts
    num_same: int
    """Records in both with the same content, wherever they lie."""
    groups: Groups
    columns: dict[str, int]
    """Of the records in both: how many differ in a column of the index or in the size of a member."""
    sampled_changed: Sampled
    sampled_same: Sampled
    """Records of rewritten shards whose index rows agree: of these only the provenance can differ."""

    @computed_field  # type: ignore[prop-decorator]
    @property
    def equal(self) -> bool:
        """Nothing differs but how rejections are worded, which names the folders that media were looked for in."""
        shards_differ = any(count for name, count in self.shards if name != "identical")
        records_differ = any(group.count for _, group in self.groups) or self.rejected_and_gone or self.rejected_and_new
        return not (self.recipe or self.versions or shards_differ or records_differ)


_TITLES = {
    "removed": "only in A",
    "added": "only in B",
    "changed": "with other content",
    "moved": "moved to another split",
    "renamed": "under another key",
    "relabelled": "with the same content from elsewhere (id, source, row, file names)",
    "newly_rejected": "stored in A, rejected in B",
    "newly_accepted": "rejected in A, stored in B",
    "other_reason": "rejected in both, for another reason",
}


def describe(found: DatasetDiff) -> str:
    """Return a comparison as a person reads it."""
    if found.equal:
        return f"{found.a} and {found.b} are equal: {found.num_same:,} records, {found.shards.identical:,} shards"
    lines = [f"A {found.a}", f"B {found.b}"]
    lines += _listed("recipe", found.recipe)
    lines += _listed("versions and settings", found.versions)
    lines += ["totals", *(f"  {line}" for line in _total_lines(found))]
    shards = {name.replace("_", " ").replace(" a", " A").replace(" b", " B"): n for name, n in found.shards if n}
    lines.append(f"shards: {', '.join(f'{count:,} {name}' for name, count in shards.items()) or 'none'}")
    lines.append(f"records: {found.num_same:,} with the same content")
    for name, group in found.groups:
        if group.count:
            lines += _group_lines(_TITLES[name], group)
    if found.rejected_and_gone or found.rejected_and_new:
        lines.append(f"  {found.rejected_and_gone:,} rejected in A and gone, {found.rejected_and_new:,} rejected in B and new")
    if found.columns:
        lines += ["columns that differ in records of both", *(f"  {name}: {count:,}" for name, count in found.columns.items())]
    lines += _sample_lines("records with other content", found.sampled_changed)
    lines += _sample_lines("records with the same content in rewritten shards", found.sampled_same)
    return "\n".join(map(printable, lines))


def _listed(title: str, lines: tuple[str, ...]) -> Iterator[str]:
    if lines:
        yield f"{title}: {len(lines):,} difference{'s' if len(lines) > 1 else ''}"
        yield from (f"  {line}" for line in lines[:_MAX_LINES])
        if len(lines) > _MAX_LINES:
            yield f"  and {len(lines) - _MAX_LINES:,} more"


def _total_lines(found: DatasetDiff) -> Iterator[str]:
    for name, (before, after) in found.totals.items():
        if name == "all" or before != after:
            changes = [
                f"{field.removeprefix('num_')} {_number(a)} -> {_number(b)}"
                if a != b
                else f"{field.removeprefix('num_')} {_number(a)}"
                for (field, a), (_, b) in zip(before, after, strict=True)
                if a or b
            ]
            yield f"{name}: {', '.join(changes) or 'nothing'}"
    for reason, (before_count, after_count) in found.rejects.items():
        if before_count != after_count:
            yield f"rejected, {reason}: {before_count:,} -> {after_count:,}"


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.1f}"


def _group_lines(title: str, group: Group) -> Iterator[str]:
    by = f": {_counts(group.by.items())}" if group.by else ""
    yield f"  {group.count:,} {title}{by}"
    yield from (f"    {example.key}{f'  {example.what}' if example.what else ''}" for example in group.examples)
    if 0 < len(group.examples) < group.count:
        yield f"    and {group.count - len(group.examples):,} more"


def _sample_lines(title: str, sampled: Sampled) -> Iterator[str]:
    if sampled.num_records:
        yield f"of {sampled.num_records:,} {title}, read and compared: {_counts(sampled.parts.items()) or 'nothing differs'}"


def _counts(counts: Iterable[tuple[str, int]]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts)
