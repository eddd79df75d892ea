"""Prompts that a model in training answers: records up to where their last answer begins, as the model's own arguments."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from omniprep.config import parse_config
from omniprep.encode.model_inputs import model_inputs
from omniprep.encode.thinker import EncodeConfig, ThinkerEncoder
from omniprep.errors import ConfigError, RejectSample
from omniprep.profile import IGNORE_INDEX, QWEN2_5_OMNI, ModelProfile
from omniprep.records import Conversation, TextPart, parse_record
from omniprep.shards.manifest import Manifest
from omniprep.shards.reader import ShardReader, index_rows
from omniprep.sources.base import below
from omniprep.sources.jsonl import JsonlSource
from omniprep.sources.media_store import MediaConfig, MediaStore
from omniprep.storage.folder import Place
from omniprep.tokens.vocab import TextTokenizer
from omniprep.types import EncodedSample, Layout


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What a model answers."""

    key: str
    inputs: Mapping[str, npt.NDArray[np.generic]]
    """As `model_inputs` makes them, without labels."""
    question: str
    """The prompt's text, a mark for each medium in it."""
    expected: str
    """The answer that the record has, if it has one."""


def encoder_of(manifest: Manifest, profile: ModelProfile = QWEN2_5_OMNI) -> ThinkerEncoder:
    """Return the encoder that a dataset was made with."""
    config = parse_config(EncodeConfig, manifest.recipe["encode"], place="the dataset's recipe: encode")
    if config.tokenizer.path is not None:
        path = below(Path(manifest.recipe["folder"]), config.tokenizer.path)
        config = config.model_copy(update={"tokenizer": config.tokenizer.model_copy(update={"path": path})})
    return ThinkerEncoder(config, profile)


def prompts_from_file(path: Path, encoder: ThinkerEncoder, *, media_roots: Sequence[str] = ()) -> list[Prompt]:
    """Return the prompts of a JSONL file of native records; a conversation's last answer is what is expected.

    Media lie in the file's folder or in `media_roots`. Raises `ConfigError` that names the row which cannot be used.
    """
    source = parse_config(JsonlSource, {"name": "prompts", "path": str(path)}, place="samples.prompts")
    store = MediaStore(MediaConfig(roots=tuple(media_roots)))
    prompts = []
    for partition in source.partitions(rows_per_partition=1 << 20):
        for row in source.read(partition):
            try:
                if row.error is not None:
                    raise row.error
                resolve = partial(store.resolve, base=row.base)
                prompts.append(_encoded(row.value, encoder, resolve=resolve, key=f"{path.name}:{row.index + 1}"))
            except RejectSample as error:
                raise ConfigError(f"samples.prompts: {row.place}: {error}") from None
    if not prompts:
        raise ConfigError(f"samples.prompts: {path}: has no rows; expected one conversation a line")
    return prompts


def prompts_from_records(
    places: Sequence[Place], tokenizer: TextTokenizer, *, split: str, num_records: int, profile: ModelProfile = QWEN2_5_OMNI
) -> list[Prompt]:
    """Return prompts of finished datasets: of each the shortest records of every mix of modalities in turn.

    Raises `ConfigError` if the split has no supervised record.
    """
    chosen = [[(place, row) for row in _rows(place, split, num_records)] for place in places]
    in_turn = [found for turn in zip_longest(*chosen) for found in turn if found is not None][:num_records]
    if not in_turn:
        raise ConfigError(f"samples.prompts: no supervised record in split {split!r}; name a JSONL file of prompts instead")
    prompts = []
    for place, row in in_turn:
        with ShardReader(place, row["shard"]) as reader:
            number = next(number for number, other in enumerate(reader.rows) if other["key"] == row["key"])
            prompts.append(prompt_of(reader.read(number), tokenizer, profile=profile))
    return prompts


def prompt_of(sample: EncodedSample, tokenizer: TextTokenizer, *, profile: ModelProfile = QWEN2_5_OMNI) -> Prompt:
    """Return an encoded record up to its last supervised run, which is what is expected; of a preference, the chosen answer.

    A text that is supervised from its first token on is cut in its middle.
    """
    layout = sample.layouts["chosen" if "chosen" in sample.layouts else "tokens"]
    start, stop = _last_answer(layout)
    expected = tokenizer.full.decode(layout.input_ids[start:stop].tolist(), skip_special_tokens=True)
    return _prompt(_cut(sample, layout, start), tokenizer, expected=expected.strip(), profile=profile)


def _encoded(value: object, encoder: ThinkerEncoder, *, resolve: Any, key: str) -> Prompt:
    record = parse_record(value)
    key = record.id or key
    if not isinstance(record, Conversation):
        return prompt_of(encoder.encode(record, key=key, resolve=resolve), encoder.tokenizer, profile=encoder.profile)
    expected = ""
    if record.messages[-1].role == "assistant" and len(record.messages) > 1:
        expected = "".join(part.text for part in record.messages[-1].content if isinstance(part, TextPart))
        record = record.model_copy(update={"messages": record.messages[:-1]})
    sample = encoder.encode(record, key=key, resolve=resolve, add_generation_prompt=True)
    return _prompt(sample, encoder.tokenizer, expected=expected, profile=encoder.profile)


def _prompt(sample: EncodedSample, tokenizer: TextTokenizer, *, expected: str, profile: ModelProfile) -> Prompt:
    inputs = model_inputs(sample, profile=profile)
    del inputs["labels"]
    question = _shown(sample.layouts["tokens"], tokenizer)
    return Prompt(key=sample.key, inputs=inputs, question=question, expected=expected)


def _last_answer(layout: Layout) -> tuple[int, int]:
    """Return where the last run of supervised tokens starts and stops."""
    supervised = np.flatnonzero(layout.labels != IGNORE_INDEX)
    if not supervised.size:
        return layout.num_tokens, layout.num_tokens
    stop = int(supervised[-1]) + 1
    gaps = np.flatnonzero(np.diff(supervised) > 1)
    start = int(supervised[gaps[-1] + 1 if gaps.size else 0])
    return (start, stop) if start > 1 else (max(stop // 2, 1), stop)


def _cut(sample: EncodedSample, layout: Layout, stop: int) -> EncodedSample:
    """Return a sample that ends before token `stop`, with the media that stand before it."""
    segments = tuple(segment._replace(stop=min(segment.stop, stop)) for segment in layout.segments if segment.start < stop)
    num_audio = max((segment.item + 1 for segment in segments if segment.kind == "audio"), default=0)
    num_vision = max((segment.item + 1 for segment in segments if segment.kind in ("image", "video")), default=0)
    before = Layout(
        input_ids=layout.input_ids[:stop],
        labels=layout.labels[:stop],
        position_ids=layout.position_ids[:, :stop],
        segments=segments,
    )
    return replace(sample, layouts={"tokens": before}, audio=sample.audio[:num_audio], vision=sample.vision[:num_vision])


def _shown(layout: Layout, tokenizer: TextTokenizer) -> str:
    """Return the text of a layout, with one mark for each medium."""
    text = ""
    for segment in layout.segments:
        if segment.kind in ("text", "control"):
            ids = layout.input_ids[segment.start : segment.stop].tolist()
            text += tokenizer.full.decode(ids, skip_special_tokens=False)
        elif segment.offset == 0:
            text += f"[{segment.kind}]"
    return text


def choose_rows(rows: Sequence[Mapping[str, Any]], *, num_samples: int) -> list[Mapping[str, Any]]:
    """Return up to `num_samples` index rows, the shortest of every mix of modalities in turn.

    >>> text = {"has_audio": False, "has_image": False, "has_video": False, "has_video_with_sound": False, "num_supervised": 1}
    >>> rows = [{**text, "key": "a", "num_tokens": 9}, {**text, "key": "b", "num_tokens": 5}]
    >>> rows += [{**text, "key": "c", "num_tokens": 99, "has_audio": True}]
    >>> [row["key"] for row in choose_rows(rows, num_samples=2)]
    ['b', 'c']
    """
    mixes: dict[tuple[bool, ...], list[Mapping[str, Any]]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: (row["num_tokens"], row["key"])):
        if row["num_supervised"]:
            mixes[tuple(row[f"has_{name}"] for name in ("audio", "image", "video", "video_with_sound"))].append(row)
    in_turn = chain.from_iterable(zip_longest(*(mixes[mix] for mix in sorted(mixes))))
    return [row for row in in_turn if row is not None][:num_samples]


def _rows(place: Place, split: str, num_records: int) -> list[Mapping[str, Any]]:
    return choose_rows([row for row in index_rows(place) if row["split"] == split], num_samples=num_records)
