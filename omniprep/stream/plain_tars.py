"""Records of tars that have OmniPrep's members but neither index nor manifest: filtered, merged or packed again by other tools.

They are read from front to back, and that is what is lost against a dataset: lengths are not known before a record is read,
so there is no plan, no exact blend, no even filling of steps over ranks; a position in training is no number, so a resume
starts again at the first tar; shuffling reaches no further than its buffer; and damage is noticed only where a header, a
size or `json` gives it away, because nobody knows what the bytes should have been.
"""

import tarfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from omniprep.errors import DatasetError
from omniprep.shards.members import (
    FRAMES,
    MEL,
    SEQUENCES,
    MemberFormat,
    SampleKind,
    npy_header,
    read_facts,
    sequence_member,
)
from omniprep.sources.webdataset import split_name
from omniprep.storage.folder import open_folder
from omniprep.stream.corrupt import Corrupt, CorruptLog
from omniprep.stream.record import MemberPlaces, Record, view_record

MAX_RECORD_BYTES = 2 << 30
_ALIGNMENT = 64
_FLOAT32 = npy_header("<f4", (1,))[: len(b"\x93NUMPY\x01\x00v\x00{'descr': '<f4'")]

_Members = dict[str, bytes]


def read_plain_tars(
    tars: Sequence[Path | str], *, shuffle_buffer: int = 0, seed: int = 0, max_corrupt: int = 10
) -> Iterator[Record]:
    """Yield the records of tars (paths or URLs, plain or compressed by gzip, bzip2 or xz) in this order, each in its own bytes.

    With a `shuffle_buffer` of n, tars come in an order drawn from `seed`, and each record is drawn from n that wait. Members
    that are not OmniPrep's are ignored. A record that cannot be used is left out and reported, and so is the rest of a tar
    that is cut. Raises `DatasetError` if these are more than `max_corrupt`, or if a tar is missing or holds no record at all.
    """
    rng = np.random.default_rng(seed)
    corrupt = CorruptLog(max_corrupt=max_corrupt)
    order = rng.permutation(len(tars)).tolist() if shuffle_buffer else range(len(tars))
    records = (record for number in order for record in _read_tar(str(tars[number]), corrupt))
    return _shuffled(records, shuffle_buffer, rng) if shuffle_buffer > 1 else records


def _shuffled(records: Iterable[Record], size: int, rng: np.random.Generator) -> Iterator[Record]:
    waiting: list[Record] = []
    for record in records:
        if len(waiting) < size:
            waiting.append(record)
            continue
        at = int(rng.integers(size))
        drawn, waiting[at] = waiting[at], record
        yield drawn
    yield from (waiting[at] for at in rng.permutation(len(waiting)).tolist())


def _read_tar(place: str, corrupt: CorruptLog) -> Iterator[Record]:
    num_groups = 0
    for key, members, damage in _groups(place):
        if damage and not num_groups:
            raise DatasetError(f"{place}: {damage}")
        num_groups += 1
        record, why = (None, damage) if damage else _record_or_why(members)
        if record is None:
            corrupt.add(Corrupt(key, place, why))
        else:
            yield record
    if not num_groups:
        raise DatasetError(f"{place}: holds no records; expected members such as KEY.json and KEY.tokens.npy")


def _groups(place: str) -> Iterator[tuple[str, _Members, str]]:
    """Yield key, members and "" of each record; last, where the tar is damaged, what is wrong."""
    key, members, num_bytes = "", _Members(), 0
    folder, _, name = place.rpartition("/")
    try:
        with open_folder(folder or ".").open(name) as file, tarfile.open(fileobj=file, mode="r|*") as archive:
            for info in archive:
                archive.members = []  # type: ignore[attr-defined]  # tarfile keeps every header that it has seen
                if not info.isfile():
                    continue
                stem, member = split_name(info.name)
                if stem != key:
                    if members:
                        yield key, members, ""
                    key, members, num_bytes = stem, _Members(), 0
                num_bytes += max(info.size, 0)
                if num_bytes > MAX_RECORD_BYTES:
                    raise tarfile.ReadError(f"a record of {num_bytes} bytes, expected at most {MAX_RECORD_BYTES}")
                data: Any = archive.extractfile(info)
                members[member] = data.read()
    except FileNotFoundError:
        raise DatasetError(f"{place}: no such file") from None
    except (tarfile.TarError, EOFError, zlib.error, OSError, ValueError) as error:
        yield key, {}, f"the tar is damaged: {' '.join(str(error).split()):.200}; what follows is lost"
        return
    if members:
        yield key, members, ""


def _record_or_why(members: _Members) -> tuple[Record | None, str]:
    """Return a record, or why there is none."""
    try:
        return _record(members), ""
    except DatasetError as error:
        return None, str(error)


def _record(members: _Members) -> Record:
    facts = read_facts(members)
    form = _form(members)
    lacking = [name for name in form.names if name not in members]
    if lacking:
        raise DatasetError(f"{', '.join(lacking)}: member is missing")
    spans, end = [], 0
    for name in form.names:
        spans.append((end, len(members[name])))
        end += len(members[name]) + -len(members[name]) % _ALIGNMENT
    buffer = np.zeros(end, np.uint8).data
    for name, (start, size) in zip(form.names, spans, strict=True):
        buffer[start : start + size] = members[name]
    source = facts.get("source")
    record = view_record(buffer, spans, places=MemberPlaces(form), key=str(facts.get("key")), source=str(source))
    record.parse()
    return record


def _form(members: Mapping[str, bytes]) -> MemberFormat:
    """Return the format that a record's members have."""
    kind: SampleKind = "preference" if sequence_member(SEQUENCES["preference"][0]) in members else "sequence"
    return MemberFormat(
        kind=kind,
        frame_format="raw" if FRAMES["raw"] in members else "jpeg",
        mel_dtype="float32" if members.get(MEL, b"").startswith(_FLOAT32) else "float16",
    )
