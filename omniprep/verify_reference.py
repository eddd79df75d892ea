"""`omniprep verify --against transformers`: samples made again from their sources, beside the installed reference.

For each chosen record two things are shown. *Stored* equals *made again*: the row is read from its source, encoded with
the manifest's recipe, and compared with the shard. *Ours* equals *theirs*: the same record, laid out in
`rope_mode: reference`, goes through transformers' processor and `get_rope_index` with the same waveforms and frames,
and everything is compared: ids, positions, grids and masks bit for bit, mel and pixels within their tolerance.

A dataset in `rope_mode: aligned` is proven by the two together: its own positions against a fresh layout, and the code
that laid it out against the reference wherever the reference has an answer.
"""

import importlib.metadata
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from omniprep.config import parse_config
from omniprep.encode.model_inputs import model_inputs
from omniprep.encode.thinker import ThinkerEncoder
from omniprep.errors import DatasetError, Reason, RejectSample
from omniprep.features.mel import log_mel
from omniprep.media.frames import decode_frames
from omniprep.profile import ModelProfile
from omniprep.receipts import read_inputs_folder
from omniprep.recipe import Recipe
from omniprep.records import AudioPart, Conversation, Document, Message, Preference, Record, TextPart
from omniprep.reference import Reference, ReferenceInput, render_chatml, render_document
from omniprep.shards.manifest import read_manifest, write_manifest
from omniprep.shards.reader import ShardReader
from omniprep.sources.media_store import MediaStore
from omniprep.sources.partitions import Partition, Row
from omniprep.sources.source import Source
from omniprep.storage.folder import Place, as_folder
from omniprep.tokens.vocab import ADDED_TOKENS
from omniprep.types import EncodedAudio, EncodedSample, EncodedVision, Float32Array
from omniprep.verify import Finding

MEL_TOLERANCE = 1e-4
"""Between float32 spectra of two libraries (values span 2)."""
STORED_MEL_TOLERANCE = {"float32": 0.0, "float16": 1e-3}
PIXEL_TOLERANCE = 1e-5


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What was found for one record."""

    key: str
    divergence: str = ""
    """The first difference, or empty."""
    skipped: str = ""
    """Why the reference has no answer for this record, or empty."""
    mel_error: float = 0.0
    pixel_error: float = 0.0


_ROWS_READ = 1000
"""Rows are found by their number in the source, so any way to cut it serves."""


def compare_with_reference(folder: Place, recipe_folder: Path, *, limit: int | None = 16) -> Iterator[Comparison]:
    """Yield a comparison for `limit` records spread evenly over the dataset, or for all.

    `recipe_folder` is where the recipe's relative paths start. Raises `DatasetError` if a source no longer holds a row.
    """
    manifest = read_manifest(folder)
    values = {**manifest.recipe, "output": as_folder(folder).place, "folder": str(recipe_folder)}
    recipe = parse_config(Recipe, values, place="recipe in the manifest").located()
    places = [(shard.name, number) for shard in manifest.shards for number in range(shard.totals.num_records)]
    parts = {source.name: (source, source.partitions(rows_per_partition=_ROWS_READ)) for source in recipe.sources}
    side = _Sides(recipe, stored_tolerance=STORED_MEL_TOLERANCE[manifest.mel_dtype])
    # Shard by shard: a shard holds rows of one partition, so one reading of the source serves all of them.
    for name, chosen in itertools.groupby(_spread(places, limit), key=lambda place: place[0]):
        with ShardReader(folder, name) as reader:
            numbers = [number for _, number in chosen]
            source, partitions = parts[reader.rows[numbers[0]]["source"]]
            rows = _read_rows(source, partitions, {reader.rows[number]["row"] for number in numbers})
            for number in numbers:
                stored = reader.read(number)
                row = rows.get(stored.row)
                if row is None:
                    changed = f"source {stored.source!r} no longer holds row {stored.row}; was its file changed?"
                    raise DatasetError(f"{stored.key}: {changed}")
                yield side.compare(stored, row)


@dataclass(frozen=True, kw_only=True)
class Parity:
    """What the comparison of a dataset with the reference found."""

    comparisons: tuple[Comparison, ...]
    version: str
    """Of transformers."""

    @property
    def findings(self) -> list[Finding]:
        """Return the divergences."""
        return [Finding(key=item.key, message=item.divergence) for item in self.comparisons if item.divergence]

    @property
    def skipped(self) -> dict[str, int]:
        """Return how many records the reference has no answer for, by reason."""
        return dict(Counter(item.skipped for item in self.comparisons if item.skipped))

    def __str__(self) -> str:
        compared = [item for item in self.comparisons if not item.skipped]
        mel_error = max((item.mel_error for item in compared), default=0.0)
        pixel_error = max((item.pixel_error for item in compared), default=0.0)
        return (
            f"transformers {self.version}: {len(compared) - len(self.findings)} of {len(compared)} compared records are equal "
            f"(mel within {mel_error:.1e}, pixels within {pixel_error:.1e})"
        )


def verify_against_transformers(place: Place, *, limit: int | None = None, inputs: Path | None = None) -> Parity:
    """Compare `limit` records spread evenly over a dataset, or all, and put the result into the manifest if all are equal.

    `inputs` is the folder that the recipe's relative paths start from, if it is no longer where `prepare` found it.
    """
    folder = as_folder(place)
    comparisons = tuple(compare_with_reference(folder, inputs or read_inputs_folder(folder), limit=limit))
    parity = Parity(comparisons=comparisons, version=importlib.metadata.version("transformers"))
    if not parity.findings and any(not item.skipped for item in comparisons):
        write_manifest(folder, read_manifest(folder).model_copy(update={"parity": str(parity)}))
    return parity


def _spread(places: Sequence[Any], limit: int | None) -> list[Any]:
    if limit is None or limit >= len(places):
        return list(places)
    return [places[int(index * len(places) / limit)] for index in range(limit)]


def _read_rows(source: Source, partitions: Sequence[Partition], numbers: set[int]) -> dict[int, Row]:
    """Read the rows with these numbers of a source again."""
    found: dict[int, Row] = {}
    for part in partitions:
        if not numbers.isdisjoint(range(part.first_row, part.first_row + part.num_rows)):
            found |= {row.index: row for row in source.read(part) if row.index in numbers}
    return found


class _Sides:
    """The three ways to one record: stored, made again, and the reference's."""

    def __init__(self, recipe: Recipe, *, stored_tolerance: float) -> None:
        self._recipe = recipe
        self._stored_tolerance = stored_tolerance
        self._waveforms: list[Float32Array] = []
        self._sources = {source.name: source for source in recipe.sources}
        self._store = MediaStore(recipe.media)
        self._again = ThinkerEncoder(recipe.encode)
        changes = {"rope_mode": "reference", "frame_format": "raw"}
        self._ours = ThinkerEncoder(recipe.encode.model_copy(update=changes), compute_mel=self._keep_waveform)
        self._theirs = Reference(self._ours.tokenizer)

    def _keep_waveform(self, waveform: Float32Array, profile: ModelProfile) -> Float32Array:
        self._waveforms.append(waveform)
        return log_mel(waveform, profile)

    def compare(self, stored: EncodedSample, row: Row) -> Comparison:
        source = self._sources[stored.source]
        resolve = partial(self._store.resolve, base=row.base)
        try:
            record = source.to_record(row.value)
            again = self._again.encode(record, key=stored.key, resolve=resolve)
        except RejectSample as error:
            return Comparison(key=stored.key, divergence=f"cannot be made again: {error}")
        difference = _stored_difference(stored, again, self._stored_tolerance)
        if difference:
            return Comparison(key=stored.key, divergence=f"stored differs from made again: {difference}")
        self._waveforms.clear()
        try:
            ours = self._ours.encode(record, key=stored.key, resolve=resolve)
        except RejectSample as error:
            if error.reason is Reason.REFERENCE_UNDEFINED:
                return Comparison(key=stored.key, skipped=error.detail)
            return Comparison(key=stored.key, divergence=f"cannot be made again: {error}")
        return self._compare_with_transformers(record, ours)

    def _compare_with_transformers(self, record: Record, ours: EncodedSample) -> Comparison:
        reason = self._why_not_comparable(record, ours)
        if reason:
            return Comparison(key=ours.key, skipped=reason)
        mel_error = pixel_error = 0.0
        for name in ours.layouts:
            mine = model_inputs(ours, name)
            theirs = self._cut(self._theirs(self._reference_input(record, name, ours)), mine)
            difference = first_difference(mine, theirs)
            if difference:
                return Comparison(key=ours.key, divergence=f"{name}: {difference}")
            mel_error = max(mel_error, _mel_error(mine, theirs))
            pixel_error = max(pixel_error, _pixel_error(mine, theirs))
        return Comparison(key=ours.key, mel_error=mel_error, pixel_error=pixel_error)

    def _cut(self, theirs: dict[str, npt.NDArray[Any]], mine: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """Cut off the reference's text where the recipe had ours cut: no token's id or position depends on later ones."""
        limit = self._recipe.encode.max_tokens
        if self._recipe.encode.on_overflow != "truncate_text" or limit is None or mine["input_ids"].shape[-1] != limit:
            return theirs
        by_token = ("input_ids", "attention_mask", "position_ids")
        return {name: array[..., :limit] if name in by_token else array for name, array in theirs.items()}

    def _why_not_comparable(self, record: Record, ours: EncodedSample) -> str:
        messages = _messages(record, "chosen")
        texts = [part.text for message in messages for part in message.content if isinstance(part, TextPart)]
        if getattr(record, "tools", None) or any(message.role == "tool" or message.tool_calls for message in messages):
            return "tools: the reference's chat template has none"
        if self._recipe.encode.template.text_policy != "allow" and any(
            token in text for text in texts for token, _ in ADDED_TOKENS
        ):
            return "text holds a control token's string, which the reference would take for the token"
        parts = [part for message in messages for part in message.content]
        num_sounds = sum(isinstance(part, AudioPart) for part in parts) + sum(
            item.audio_index is not None for item in ours.vision
        )
        num_pictures = sum(not isinstance(part, (TextPart, AudioPart)) for part in parts)
        if len(ours.audio) != num_sounds or len(ours.vision) != num_pictures:
            return "audio was split, or media were left out to fit max_tokens"
        if len({item.second_per_grid for item in ours.vision if item.kind == "video"}) > 1:
            return "videos of several rates: the reference takes one rate for all"
        return ""

    def _reference_input(self, record: Record, name: str, ours: EncodedSample) -> ReferenceInput:
        template = self._recipe.encode.template
        numbered = {"add_vision_id": template.add_vision_id, "add_audio_id": template.add_audio_id}
        if isinstance(record, Document):
            text = render_document(record.parts, **numbered)
        else:
            text = render_chatml(_messages(record, name), system_prompt=template.system_prompt, **numbered)
        stacks = [decode_frames(item.frames, "raw", height=item.height, width=item.width) for item in ours.vision]
        videos = [index for index, item in enumerate(ours.vision) if item.kind == "video"]
        video_of_audio = {ours.vision[index].audio_index: number for number, index in enumerate(videos)}
        rates = [2 / ours.vision[index].second_per_grid for index in videos]
        return ReferenceInput(
            text=text,
            audio=list(self._waveforms),
            images=[stack[0] for stack, item in zip(stacks, ours.vision, strict=True) if item.kind == "image"],
            videos=[stacks[index] for index in videos],
            audio_from_video=[video_of_audio.get(index) for index in range(len(ours.audio))],
            fps=rates[0] if rates else self._recipe.encode.reference_fps,
            options={"images_kwargs": {"do_resize": False}, "videos_kwargs": {"do_resize": False}},
        )


def _messages(record: Record, name: str) -> Sequence[Message]:
    match record:
        case Conversation():
            return record.messages
        case Preference():
            return (*record.prompt, *(record.rejected if name == "rejected" else record.chosen))
        case Document():
            return (Message.model_construct(role="user", content=record.parts, tool_calls=()),)


def _stored_difference(stored: EncodedSample, again: EncodedSample, mel_tolerance: float) -> str:
    """Return where a stored sample differs from the same record encoded again, or an empty string."""
    for name, layout in stored.layouts.items():
        for field in ("input_ids", "labels", "position_ids"):
            difference = _array_difference(f"{name}.{field}", getattr(layout, field), getattr(again.layouts[name], field))
            if difference:
                return difference
        if layout.segments != again.layouts[name].segments:
            return f"{name}: segments"
    return _media_difference(stored, again, mel_tolerance)


def _media_difference(stored: EncodedSample, again: EncodedSample, mel_tolerance: float) -> str:
    if len(stored.audio) != len(again.audio) or len(stored.vision) != len(again.vision):
        return f"{len(stored.audio)} sounds and {len(stored.vision)} pictures, now {len(again.audio)} and {len(again.vision)}"
    for index, (one, other) in enumerate(zip(stored.audio, again.audio, strict=True)):
        if one.mel.shape != other.mel.shape or np.abs(one.mel - other.mel).max(initial=0.0) > mel_tolerance:
            return f"audio {index}: mel"
        if fact := _first_other_fact(one, other, besides="mel"):
            return f"audio {index}: {fact}"
    for index, (kept, made) in enumerate(zip(stored.vision, again.vision, strict=True)):
        if kept.frames != made.frames:
            return f"{kept.kind} {index}: frames"
        if fact := _first_other_fact(kept, made, besides="frames"):
            return f"{kept.kind} {index}: {fact}"
    return ""


def _first_other_fact(stored: EncodedAudio | EncodedVision, again: EncodedAudio | EncodedVision, *, besides: str) -> str:
    """Return the first field in which two items differ (grid, timing contract, where a sound starts), or an empty string."""
    for field in fields(stored):
        one, other = getattr(stored, field.name), getattr(again, field.name)
        if field.name != besides and one != other:
            return f"{field.name} is {one!r:.120}, now {other!r:.120}"
    return ""


def first_difference(ours: Mapping[str, npt.NDArray[Any]], theirs: Mapping[str, npt.NDArray[Any]]) -> str:
    """Return the first difference between two sets of model inputs in words, or an empty string."""
    missing = sorted(set(theirs) ^ (set(ours) - {"labels"}))
    if missing:
        return f"{missing[0]}: only one side has it"
    for name in ("input_ids", "attention_mask", "position_ids", "image_grid_thw", "video_grid_thw", "video_second_per_grid"):
        if name in theirs:
            difference = _array_difference(name, ours[name], theirs[name])
            if difference:
                return difference
    if _mel_error(ours, theirs) > MEL_TOLERANCE:
        return f"input_features: differ by {_mel_error(ours, theirs):.1e} > {MEL_TOLERANCE:g}"
    for name in ("pixel_values", "pixel_values_videos"):
        if name in theirs and ours[name].shape != theirs[name].shape:
            return f"{name}: shape {ours[name].shape}, transformers {theirs[name].shape}"
    if _pixel_error(ours, theirs) > PIXEL_TOLERANCE:
        return f"pixels: differ by {_pixel_error(ours, theirs):.1e} > {PIXEL_TOLERANCE:g}"
    return ""


def _array_difference(name: str, ours: npt.NDArray[Any], theirs: npt.NDArray[Any]) -> str:
    if ours.shape != theirs.shape:
        return f"{name}: shape {ours.shape}, expected {theirs.shape}"
    places = np.argwhere(ours != theirs)
    if not len(places):
        return ""
    at = tuple(int(index) for index in places[0])
    return f"{name}: first difference at {list(at)}: {ours[at]}, expected {theirs[at]} ({len(places)} differ)"


def _mel_error(ours: Mapping[str, npt.NDArray[Any]], theirs: Mapping[str, npt.NDArray[Any]]) -> float:
    """Return the largest difference in the valid regions; infinite if those disagree."""
    if "input_features" not in theirs:
        return 0.0
    worst = 0.0
    for index, mask in enumerate(theirs["feature_attention_mask"]):
        frames = int(mask.sum())
        if int(ours["feature_attention_mask"][index].sum()) != frames:
            return float("inf")
        difference = ours["input_features"][index, :, :frames] - theirs["input_features"][index, :, :frames]
        worst = max(worst, float(np.abs(difference).max(initial=0.0)))
    return worst


def _pixel_error(ours: Mapping[str, npt.NDArray[Any]], theirs: Mapping[str, npt.NDArray[Any]]) -> float:
    names = [name for name in ("pixel_values", "pixel_values_videos") if name in theirs]
    return max((float(np.abs(ours[name] - theirs[name]).max(initial=0.0)) for name in names), default=0.0)
