"""What is in a quarantine, at a glance: counts, and details grouped so that ten thousand alike are one line.

```
messages.0.content.1: a/0017.png: no such file (looked in /data)  ─┐
messages.2.content.0: b/0391.png: no such file (looked in /data)  ─┴─>  messages.N.content.N: FILE: no such file (looked in FILE)
```

Details are read in batches, without the records themselves, and at most `_MAX_GROUPS` of them are told apart, so memory
does not grow with the quarantine. Works on a build that was stopped too: that is when one looks.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from omniprep.errors import DatasetError, NoDatasetError, printable
from omniprep.shards.manifest import Stored
from omniprep.shards.quarantine import QUARANTINE_FOLDER
from omniprep.storage.folder import Folder, open_folder

_MAX_GROUPS = 10_000
_MAX_PATTERN = 160
_BATCH_ROWS = 8192
_COLUMNS = ("key", "source", "place", "stage", "reason", "detail", "retryable")

_QUOTED = re.compile(r"""b?'(?:[^'\\]|\\.)*'|b?"(?:[^"\\]|\\.)*\"""")
_PLACE = re.compile(r"[a-z_]+(?:\.[a-z_]+)*\.\d+(?:\.(?:[a-z_]+|\d+))*|[a-z_]+")
"""Where in a record: messages.0.content.1"""
_FILE = re.compile(r".*(?:[/\\]\S*|\.[A-Za-z0-9]{2,5})")
_PATH = re.compile(r"""[^\s:,;()'"`]*/[^\s:,;()'"`]*""")
_NUMBER = re.compile(r"(?<![\w.-])[-+]?\d[\d,.x]*(?:e[-+]?\d+)?(?<![,.])")


class DetailGroup(Stored):
    """Rejections that say the same but for names and numbers."""

    count: int
    reason: str
    pattern: str
    """Their detail with FILE for names and paths, N for numbers and … for quoted text."""
    key: str
    """The first of them."""
    place: str
    detail: str


class QuarantineReport(Stored):
    """What is in a quarantine."""

    place: str
    num_records: int
    num_retryable: int
    """Those whose cause lay outside the record and may be gone."""
    by_reason: dict[str, int]
    by_stage: dict[str, int]
    by_source: dict[str, int]
    groups: tuple[DetailGroup, ...]
    """The largest, first."""
    num_groups: int
    num_ungrouped: int
    """Records in none of the groups, for there were too many different details to keep."""


@dataclass
class _Tally:
    by_reason: Counter[str] = field(default_factory=Counter)
    by_stage: Counter[str] = field(default_factory=Counter)
    by_source: Counter[str] = field(default_factory=Counter)
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    first: dict[tuple[str, str], tuple[str, str, str]] = field(default_factory=dict)
    num_retryable: int = 0
    num_ungrouped: int = 0

    def add(self, columns: dict[str, list[Any]]) -> None:
        """Count a batch of rejections."""
        for name, counter in (("reason", self.by_reason), ("stage", self.by_stage), ("source", self.by_source)):
            counter.update(columns[name])
        self.num_retryable += sum(columns["retryable"])
        rows = zip(*(columns[name] for name in ("reason", "detail", "key", "place")), strict=True)
        for reason, detail, key, place in rows:
            group = reason, pattern_of(detail)
            if group in self.first:
                self.counts[group] += 1
            elif len(self.first) < _MAX_GROUPS:
                self.first[group] = key, place, detail
                self.counts[group] = 1
            else:
                self.num_ungrouped += 1


def summarize(place: str, *, top: int = 20) -> QuarantineReport:
    """Return what is in the quarantine of the dataset or unfinished build at a path or URL.

    The `top` largest groups of details are kept. Raises `DatasetError` if there is no dataset or a file is damaged.
    """
    folder = open_folder(place)
    if not folder.exists():
        raise NoDatasetError(f"{place}: no such folder; name the folder of a dataset")
    tally = _Tally()
    for name in _files(folder):
        for columns in _batches(folder, name):
            tally.add(columns)
    groups = [
        DetailGroup(count=count, reason=reason, pattern=pattern, key=key, place=where, detail=detail)
        for (reason, pattern), count in tally.counts.most_common(top)
        for key, where, detail in (tally.first[reason, pattern],)
    ]
    return QuarantineReport(
        place=place,
        num_records=tally.by_reason.total(),
        num_retryable=tally.num_retryable,
        by_reason=dict(tally.by_reason.most_common()),
        by_stage=dict(tally.by_stage.most_common()),
        by_source=dict(tally.by_source.most_common()),
        groups=tuple(groups),
        num_groups=len(tally.first),
        num_ungrouped=tally.num_ungrouped,
    )


def pattern_of(detail: str) -> str:
    """Return a detail without what differs from record to record.

    >>> pattern_of("messages.0.content.1: a b/17.png: no such file (looked in /data/x)")
    'messages.N.content.N: FILE: no such file (looked in FILE)'
    >>> pattern_of("33012 tokens > max_tokens=32768; raise max_tokens")
    'N tokens > max_tokens=N; raise max_tokens'
    >>> pattern_of("messages.2.role: expected one of system, user; got 'odd'")
    'messages.N.role: expected one of system, user; got …'
    """
    pieces = _QUOTED.sub("…", detail).split(": ")
    return ": ".join(_pattern_of_piece(piece, last=piece is pieces[-1]) for piece in pieces)[:_MAX_PATTERN]


def _pattern_of_piece(piece: str, *, last: bool) -> str:
    if _PLACE.fullmatch(piece):
        return ".".join("N" if step.isdecimal() else step for step in piece.split("."))
    if not last and _FILE.fullmatch(piece):
        return "FILE"
    return _NUMBER.sub("N", _PATH.sub("FILE", piece))


def describe(report: QuarantineReport) -> str:
    """Return the report as a person reads it."""
    if not report.num_records:
        return f"{report.place}: nothing was rejected"
    retryable = f", {report.num_retryable:,} of them for a cause that may be gone" if report.num_retryable else ""
    lines = [f"{report.place}: {report.num_records:,} rejected records{retryable}"]
    for title, counts in (("reason", report.by_reason), ("stage", report.by_stage), ("source", report.by_source)):
        lines.append(f"  by {title}: {', '.join(f'{name} {count:,}' for name, count in counts.items())}")
    width = len(f"{report.groups[0].count:,}") if report.groups else 0
    for group in report.groups:
        lines.append(f"{group.count:>{width},}  {group.reason}  {group.pattern}")
        lines.append(f"{'':{width}}  such as {group.key} ({group.place}): {group.detail}")
    num_shown = sum(group.count for group in report.groups)
    if num_shown < report.num_records:
        lines.append(f"and {report.num_records - num_shown:,} with other details")
    return "\n".join(map(printable, lines))


def _files(folder: Folder) -> Iterator[str]:
    """Yield the quarantine's files: those that the manifest names, or of an unfinished build those that are there."""
    from omniprep.shards.manifest import MANIFEST_NAME, read_manifest

    if folder.size(MANIFEST_NAME) is not None:
        yield from (f"{QUARANTINE_FOLDER}/{info.name}" for info in read_manifest(folder).quarantine)
    else:
        yield from (name for name in folder.files(QUARANTINE_FOLDER) if name.endswith(".parquet"))


def _batches(folder: Folder, name: str) -> Iterator[dict[str, list[Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with folder.open(name) as file:
            for batch in pq.ParquetFile(file).iter_batches(_BATCH_ROWS, columns=list(_COLUMNS), use_threads=False):
                yield batch.to_pydict()
    except FileNotFoundError:
        raise DatasetError(f"{folder.place}: {name} is missing, though the manifest names it; see `omniprep verify`") from None
    except (OSError, pa.ArrowException) as error:
        raise DatasetError(f"{folder.place}: {name}: not a readable quarantine file: {' '.join(str(error).split())}") from None
