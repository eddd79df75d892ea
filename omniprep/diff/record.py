"""One record of two datasets: what differs between them, down to the first token.

Two stored records are compared by what is read back from their members, not by the members' bytes: that tells a new
label from a moved position, and a file's new name from new sound.
"""

import difflib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from omniprep.errors import DatasetError, printable
from omniprep.inspect import find_rejection
from omniprep.profile import IGNORE_INDEX
from omniprep.receipts import differences
from omniprep.shards.index import read_index_table
from omniprep.shards.manifest import Manifest, Stored
from omniprep.shards.members import from_members, read_facts
from omniprep.shards.reader import ShardReader
from omniprep.storage.folder import Folder
from omniprep.tokens.vocab import TextTokenizer
from omniprep.types import EncodedSample, Layout, Rejection

Part = Literal["tokens", "labels", "positions", "mel", "frames", "provenance"]
PARTS: tuple[Part, ...] = ("tokens", "labels", "positions", "mel", "frames", "provenance")
"""What two records with one key may differ in. `provenance` is all that is told of a record but not trained on: source,
row, id, split, file names, timing, `meta`."""

_LAID_OUT = ("segments",)  # follows from the tokens
_TEXT_IN_JSON = ("audio", "vision", "meta")
_CONTEXT_LINES = 2


@dataclass(frozen=True, kw_only=True)
class StoredRecord:
    """A record of a shard: its sample, and what its `json` member says of where it came from."""

    shard: str
    sample: EncodedSample
    facts: Mapping[str, Any]


class RecordDiff(Stored):
    """What differs in one record. Lines are for a person."""

    key: str
    state_a: str
    """Where it is in A: "stored in train-00000.tar", "rejected: media_missing: …" or "not there"."""
    state_b: str
    parts: tuple[Part, ...]
    """In what two stored records differ."""
    text: tuple[str, ...]
    """A unified diff of the decoded segments; supervised lines start with `»`."""
    arrays: tuple[str, ...]
    """The first place at which ids, labels, positions, mel or frames differ."""
    facts: tuple[str, ...]
    """Differences of the provenance."""

    @property
    def equal(self) -> bool:
        """Return whether there is nothing to tell."""
        return not self.parts and self.state_a.split(":")[0] == self.state_b.split(":")[0]


def read_record(folder: Folder, manifest: Manifest, shard: int, number: int) -> StoredRecord:
    """Return record `number` of a shard of the manifest. Raises `DatasetError`."""
    name = manifest.shards[shard].name
    with ShardReader(folder, name) as reader:
        members = reader.read_members(number)
    try:
        return StoredRecord(shard=name, sample=from_members(members), facts=_plain_facts(read_facts(members)))
    except DatasetError as error:
        raise DatasetError(f"{folder.place}: {name}: record {number}: {error}") from None


def find_record(folder: Folder, manifest: Manifest, key: str) -> StoredRecord | Rejection | None:
    """Return the record with this key (or the first with this id), the rejection of this key, or None."""
    by_id: tuple[int, int] | None = None
    for shard, info in enumerate(manifest.shards):
        table = read_index_table(folder, info.index_name, ("key", "id"))
        number = table["key"].index(key).as_py()
        if number >= 0:
            return read_record(folder, manifest, shard, number)
        if by_id is None and (number := table["id"].index(key).as_py()) >= 0:
            by_id = shard, number
    return read_record(folder, manifest, *by_id) if by_id is not None else find_rejection(folder, manifest, key)


def differing_parts(a: StoredRecord, b: StoredRecord) -> tuple[Part, ...]:
    """Return in what two records differ, in the order of `PARTS`."""
    found: set[Part] = set()
    names = [name for name in a.sample.layouts if name in b.sample.layouts]
    if len(names) < max(len(a.sample.layouts), len(b.sample.layouts)):
        found.add("tokens")
    for name in names:
        ours, theirs = a.sample.layouts[name], b.sample.layouts[name]
        found |= {part for part, one, other in _rows(ours, theirs) if not np.array_equal(one, other)}
    mels = [[item.mel for item in record.sample.audio] for record in (a, b)]
    if len(mels[0]) != len(mels[1]) or not all(np.array_equal(one, other) for one, other in zip(*mels, strict=True)):
        found.add("mel")
    if [item.frames for item in a.sample.vision] != [item.frames for item in b.sample.vision]:
        found.add("frames")
    if fact_differences(a, b):
        found.add("provenance")
    return tuple(part for part in PARTS if part in found)


def fact_differences(a: StoredRecord, b: StoredRecord) -> list[str]:
    """Return what differs in the provenance of two records, with its place in the `json` member."""
    return differences(dict(a.facts), dict(b.facts))


def compare_record(a: StoredRecord, b: StoredRecord, tokenizer: TextTokenizer, *, key: str) -> RecordDiff:
    """Return everything that differs between two stored records."""
    return RecordDiff(
        key=key,
        state_a=_state(a),
        state_b=_state(b),
        parts=differing_parts(a, b),
        text=tuple(_text_difference(a.sample, b.sample, tokenizer)),
        arrays=tuple([*_layout_differences(a.sample, b.sample), *_media_differences(a.sample, b.sample)]),
        facts=tuple(fact_differences(a, b)),
    )


def compare_found(
    a: StoredRecord | Rejection | None, b: StoredRecord | Rejection | None, tokenizer: TextTokenizer, *, key: str
) -> RecordDiff:
    """Return what differs between what two datasets have under one key, be it stored, rejected or nothing."""
    if isinstance(a, StoredRecord) and isinstance(b, StoredRecord):
        return compare_record(a, b, tokenizer, key=key)
    return RecordDiff(key=key, state_a=_state(a), state_b=_state(b), parts=(), text=(), arrays=(), facts=())


def describe_record(found: RecordDiff) -> str:
    """Return the differences of a record as a person reads them."""
    lines = [f"{found.key}", f"  A: {found.state_a}", f"  B: {found.state_b}"]
    if "stored" in found.state_a and "stored" in found.state_b:
        lines.append(f"  differs in: {', '.join(found.parts) or 'nothing'}")
    for title, rows in (("text", found.text), ("first differences", found.arrays), ("provenance", found.facts)):
        if rows:
            lines += ["", title, *(f"  {row}" for row in rows)]
    return "\n".join(map(printable, lines))


def _state(found: StoredRecord | Rejection | None) -> str:
    match found:
        case None:
            return "not there"
        case Rejection():
            return f"rejected: {found.reason}: {found.place}: {found.detail}"
        case StoredRecord():
            return f"stored: {found.shard}, split {found.sample.split}, {found.sample.num_tokens:,} tokens"


def _rows(a: Layout, b: Layout) -> list[tuple[Part, npt.NDArray[np.int32], npt.NDArray[np.int32]]]:
    return [
        ("tokens", a.input_ids, b.input_ids),
        ("labels", a.labels, b.labels),
        ("positions", a.position_ids, b.position_ids),
    ]


def _plain_facts(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `json` member without what follows from the tokens, its JSON texts read."""
    plain = {name: value for name, value in facts.items() if name not in _LAID_OUT}
    return {**plain, **{name: json.loads(plain[name]) for name in _TEXT_IN_JSON}}


def _text_difference(a: EncodedSample, b: EncodedSample, tokenizer: TextTokenizer) -> Iterator[str]:
    for name in dict.fromkeys([*a.layouts, *b.layouts]):
        ours, theirs = (list(_shown_lines(one, name, tokenizer)) for one in (a, b))
        yield from difflib.unified_diff(ours, theirs, f"A {name}", f"B {name}", n=_CONTEXT_LINES, lineterm="")


def _shown_lines(sample: EncodedSample, name: str, tokenizer: TextTokenizer) -> Iterator[str]:
    """Yield a sequence's text, line by line and a line for each medium; `»` before what is supervised."""
    layout = sample.layouts.get(name)
    for segment in layout.segments if layout is not None else ():
        assert layout is not None
        ids = layout.input_ids[segment.start : segment.stop]
        supervised = bool((layout.labels[segment.start : segment.stop] != IGNORE_INDEX).any())
        if segment.kind in ("text", "control"):
            text = tokenizer.full.decode(ids.tolist(), skip_special_tokens=False)
        else:
            text = f"[{segment.kind} {segment.item}: {len(ids)} tokens]"
        # `splitlines` would also cut at characters that a terminal does not treat as a line's end.
        yield from (f"{'»' if supervised else ' '} {line}" for line in text.rstrip("\n").split("\n"))


def _layout_differences(a: EncodedSample, b: EncodedSample) -> Iterator[str]:
    for name in dict.fromkeys([*a.layouts, *b.layouts]):
        if name not in a.layouts or name not in b.layouts:
            yield f"{name}: only in {'A' if name in a.layouts else 'B'}"
            continue
        for part, ours, theirs in _rows(a.layouts[name], b.layouts[name]):
            if not np.array_equal(ours, theirs):
                yield f"{name}: {part}: {_first_difference(ours, theirs)}"


def _first_difference(a: npt.NDArray[np.int32], b: npt.NDArray[np.int32]) -> str:
    """Return the first token at which two rows (T,) or position ids (3, T) differ.

    >>> _first_difference(np.array([1, 2, 3], np.int32), np.array([1, 5], np.int32))
    'token 1: 2 -> 5; 3 -> 2 tokens'
    """
    num_common = min(a.shape[-1], b.shape[-1])
    lengths = "" if a.shape == b.shape else f"{a.shape[-1]} -> {b.shape[-1]} tokens"
    unequal = (a[..., :num_common] != b[..., :num_common]).reshape(-1, num_common).any(axis=0)
    if not unequal.any():
        return f"equal up to token {num_common - 1}; {lengths}"
    at = int(np.argmax(unequal))
    first = f"token {at}: {_value(a[..., at])} -> {_value(b[..., at])}"
    return f"{first}; {lengths}" if lengths else f"{first}; {int(unequal.sum())} of {num_common} tokens differ"


def _value(value: npt.NDArray[np.int32]) -> str:
    return str(int(value)) if value.ndim == 0 else f"({', '.join(map(str, value.tolist()))})"


def _media_differences(a: EncodedSample, b: EncodedSample) -> Iterator[str]:
    if len(a.audio) != len(b.audio) or len(a.vision) != len(b.vision):
        yield f"media: {len(a.audio)} sounds, {len(a.vision)} pictures or videos -> {len(b.audio)}, {len(b.vision)}"
        return
    for index, (sound, other) in enumerate(zip(a.audio, b.audio, strict=True)):
        if sound.mel.shape != other.mel.shape:
            yield f"audio {index}: {sound.num_mel_frames} -> {other.num_mel_frames} mel frames"
        elif not np.array_equal(sound.mel, other.mel):
            unequal = sound.mel != other.mel
            most = float(np.abs(sound.mel - other.mel).max())
            frames = np.flatnonzero(unequal.any(axis=0))
            yield f"audio {index}: mel frame {frames[0]} is the first of {len(frames)} that differ, by at most {most:.3g}"
    for index, (item, partner) in enumerate(zip(a.vision, b.vision, strict=True)):
        if item.grid_thw != partner.grid_thw:
            yield f"{item.kind} {index}: grid {item.grid_thw} -> {partner.grid_thw}"
        elif item.frames != partner.frames:
            changed = [number for number, (one, two) in enumerate(zip(item.frames, partner.frames, strict=False)) if one != two]
            first = f"frame {changed[0]} is the first of {len(changed)} that differ" if changed else "frames added at the end"
            yield f"{item.kind} {index}: {first} ({len(item.frames)} -> {len(partner.frames)} frames)"
