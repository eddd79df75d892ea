"""`omniprep inspect`: one sample as a person reads it: text with its loss mask, segments with positions, timing.

Everything is shown from what is stored, not from what was meant: ids are decoded, positions are read from the rows.
"""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from omniprep.profile import IGNORE_INDEX, QWEN2_5_OMNI, ModelProfile
from omniprep.shards.manifest import Manifest
from omniprep.shards.quarantine import read_quarantine
from omniprep.storage.folder import Place, as_folder
from omniprep.tokens.vocab import TextTokenizer
from omniprep.types import EncodedSample, EncodedVision, Layout, Rejection, Segment

_MAX_SHOWN = 20
_MAX_ROW_SHOWN = 4000
_KIND_STYLES = {"audio": "magenta", "image": "cyan", "video": "blue", "control": "yellow", "text": ""}


def dataset_summary(folder: Place, manifest: Manifest, rows: Sequence[dict[str, object]]) -> RenderableType:
    """Return the overview of a dataset: what is in it, and the first keys to look at."""
    facts = Table.grid(padding=(0, 2))
    totals = manifest.totals
    facts.add_row(
        "records",
        f"{totals.num_records:,} in {len(manifest.shards)} shards, {sum(manifest.rejects.values()):,} in the quarantine",
    )
    facts.add_row("tokens", f"{totals.num_tokens:,}, {totals.num_supervised:,} supervised")
    facts.add_row("media", f"{totals.audio_s:,.1f} s of audio, {totals.video_s:,.1f} s of video, {totals.num_patches:,} patches")
    facts.add_row("rope_mode", manifest.rope_mode)
    for reason, count in sorted(manifest.rejects.items()):
        facts.add_row("rejected", f"{count:,} {reason}")
    keys = Table(title="first records", title_justify="left", box=None, pad_edge=False)
    columns = ("key", "id", "split", "num_tokens", "num_supervised", "num_mel_frames", "num_patches")
    for column in columns:
        keys.add_column(column, justify="left" if column in ("key", "id", "split") else "right")
    for row in rows:
        keys.add_row(*(str(row.get(column, "")) for column in columns))
    place = as_folder(folder).place
    hint = Text(f"\nomniprep inspect {place} KEY shows one record.")
    return Group(Panel(facts, title=place, title_align="left"), keys, *_rejected_lines(folder, manifest), hint)


def _rejected_lines(folder: Place, manifest: Manifest) -> list[RenderableType]:
    """Return the first rejections in words, so that nobody needs another program to learn what is wrong with a row."""
    if not manifest.quarantine:
        return []
    lines = [Text("\nfirst rejected records", style="italic")]
    for item in itertools.islice(_rejections(folder, manifest), _MAX_SHOWN):
        lines.append(Text.assemble((f"{item.key}  {item.place}: ", "bold"), (item.reason, "red"), f": {item.detail}"))
    return list(lines)


def _rejections(folder: Place, manifest: Manifest) -> Iterator[Rejection]:
    for info in manifest.quarantine:
        for rejected in read_quarantine(as_folder(folder), info.name):
            yield rejected.rejection


def find_rejection(folder: Place, manifest: Manifest, key: str) -> Rejection | None:
    """Return the rejected record with this key, or None."""
    return next((item for item in _rejections(folder, manifest) if item.key == key), None)


def rejection_view(item: Rejection) -> RenderableType:
    """Return why a record was rejected, and its row."""
    facts = Table.grid(padding=(0, 2))
    for name in ("key", "source", "place", "stage", "reason", "detail", "probe"):
        facts.add_row(name, str(getattr(item, name)))
    row = item.record.decode("utf-8", "backslashreplace")
    shown = row if len(row) <= _MAX_ROW_SHOWN else f"{row[:_MAX_ROW_SHOWN]}… ({len(row):,} characters)"
    return Group(Panel(facts, title="rejected", title_align="left"), Panel(Text(shown), title="row", title_align="left"))


def sample_view(sample: EncodedSample, tokenizer: TextTokenizer, profile: ModelProfile = QWEN2_5_OMNI) -> RenderableType:
    """Return everything about one sample."""
    parts: list[RenderableType] = [_heading(sample)]
    for name, layout in sample.layouts.items():
        parts.append(Panel(painted_text(layout, tokenizer), title=f"{name}: text, supervised in green", title_align="left"))
        parts.append(_segment_table(name, layout, sample))
    for index, item in enumerate(sample.vision):
        if item.timing is not None:
            parts.append(_timing_table(index, item, next(iter(sample.layouts.values())), profile))
    return Group(*parts)


def painted_text(layout: Layout, tokenizer: TextTokenizer) -> Text:
    """Return the decoded text: supervised tokens green, others dim, media as one mark a segment."""
    text = Text()
    for segment in layout.segments:
        ids = layout.input_ids[segment.start : segment.stop]
        if segment.kind in ("text", "control"):
            for supervised, run in _runs(layout, segment):
                decoded = tokenizer.full.decode(run, skip_special_tokens=False)
                text.append(decoded, style="bold green" if supervised else "yellow" if segment.kind == "control" else "dim")
        else:
            text.append(f"[{segment.kind} {segment.item}: {len(ids)} tokens]", style=f"bold {_KIND_STYLES[segment.kind]}")
    return text


def _runs(layout: Layout, segment: Segment) -> Iterator[tuple[bool, list[int]]]:
    """Yield (supervised, ids) runs by the labels themselves, not by what the segment says."""
    ids = layout.input_ids[segment.start : segment.stop]
    supervised = layout.labels[segment.start : segment.stop] != IGNORE_INDEX
    edges = [0, *(np.flatnonzero(np.diff(supervised)) + 1).tolist(), len(ids)]
    for first, last in itertools.pairwise(edges):
        if first < last:
            yield bool(supervised[first]), ids[first:last].tolist()


def _heading(sample: EncodedSample) -> RenderableType:
    facts = Table.grid(padding=(0, 2))
    facts.add_row("key", f"{sample.key}  (id {sample.id})" if sample.id else sample.key)
    facts.add_row("from", f"source {sample.source!r}, row {sample.row}; split {sample.split}")
    facts.add_row("rope_mode", sample.rope_mode)
    for name, layout in sample.layouts.items():
        facts.add_row(name, f"{layout.num_tokens:,} tokens, {layout.num_supervised:,} supervised, last id {_last_id(layout)}")
    for index, audio in enumerate(sample.audio):
        cut = f", cut from {audio.truncated_from_s:.2f} s" if audio.truncated_from_s is not None else ""
        facts.add_row(
            f"audio {index}",
            f"{audio.source}: {audio.num_mel_frames} mel frames, starts at {audio.start_s:.3f} s, by {audio.decoder}{cut}",
        )
    for index, item in enumerate(sample.vision):
        stored = sum(len(frame) for frame in item.frames)
        facts.add_row(
            f"{item.kind} {index}",
            f"{item.source}: {len(item.frames)} frame(s) of {item.width}x{item.height}, grid {item.grid_thw}, "
            f"{stored:,} bytes {item.frame_format}",
        )
    return Panel(facts, title="sample", title_align="left")


def _last_id(layout: Layout) -> int:
    return int(layout.position_ids.max()) if layout.num_tokens else -1


def _segment_table(name: str, layout: Layout, sample: EncodedSample) -> Table:
    table = Table(title=f"{name}: segments", title_justify="left", box=None, pad_edge=False)
    for column in ("tokens", "kind", "item", "loss", "temporal ids", "height ids", "width ids"):
        table.add_column(column)
    for segment in layout.segments:
        span = slice(segment.start, segment.stop)
        rows = [layout.position_ids[row, span] for row in range(3)]
        table.add_row(
            f"{segment.start}-{segment.stop - 1}",
            Text(segment.kind, style=_KIND_STYLES[segment.kind]),
            "" if segment.item < 0 else f"{segment.item} from token {segment.offset}",
            Text("yes", style="green") if (layout.labels[span] != IGNORE_INDEX).any() else "",
            *(f"{int(row.min())}-{int(row.max())}" for row in rows),
        )
    return table


def _timing_table(index: int, item: EncodedVision, layout: Layout, profile: ModelProfile) -> Table:
    """Return a video's timing contract beside the ids that its grid steps got."""
    timing = item.timing
    assert timing is not None
    sound = "" if timing.audio_start_s is None else f", sound from {timing.audio_start_s:.3f} s"
    title = (
        f"video {index}: timing ({timing.decoder}; file {timing.source_fps:.3f} fps, {timing.num_source_frames} frames; "
        f"sampled {timing.sample_fps:.3f} fps{sound})"
    )
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for column in ("grid step", "frames", "time s", "temporal id", "ids from the first step", "true"):
        table.add_column(column, justify="right")
    spans = [segment for segment in layout.segments if segment.kind == "video" and segment.item == index]
    ids = np.concatenate([layout.position_ids[0, span.start : span.stop] for span in spans]) if spans else np.zeros(0, np.int32)
    per_step = profile.num_vision_tokens(item.grid_thw) // item.grid_thw[0]
    for step in range(item.grid_thw[0]):
        first = step * profile.temporal_patch_size
        frames = timing.frame_indices[first : first + profile.temporal_patch_size]
        time = timing.frame_times_s[first]
        true = (time - timing.frame_times_s[0]) * profile.position_id_per_second
        shown = int(ids[step * per_step]) if len(ids) else -1
        table.add_row(
            str(step),
            " ".join(map(str, frames)),
            f"{time:.3f}",
            str(shown),
            str(shown - int(ids[0]) if len(ids) else -1),
            f"{true:.2f}",
        )
    return table
