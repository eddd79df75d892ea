"""Input records: what a user writes, checked once.

A `Conversation` is the message list that transformers and qwen_omni_utils accept; a `Preference` is TRL's
prompt/chosen/rejected; a `Document` is a run of parts for pretraining. `sources/formats.py` turns other formats into
these, `parse_record` checks a native one. The JSON Schemas in `schemas/` are generated from this file.
"""

import builtins
import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic_core import ErrorDetails

from omniprep.errors import Reason, RejectSample

ROLES = ("system", "user", "assistant", "tool")
OBJECT = (dict, Mapping)
"""What is a JSON object. `dict` is named, and first, because asking an abstract class takes ten times as long."""

MAX_MESSAGES = 10_000
MAX_PARTS = 20_000
MAX_MEDIA = 1_000
MAX_FRAMES = 10_000
MAX_TOOLS = 10_000
"""Most messages, parts (of all messages), media parts, ready frames of one video, and tools or tool calls of one record. A record
of one of these takes about a second; the longest sequence a model takes has far fewer."""
MAX_MIN_PIXELS = 1 << 26
"""A small picture is enlarged to `min_pixels`, whatever that costs."""
MAX_NUMBER = 1 << 53
"""Whole numbers up to here are exact as floats, which the arithmetic of sizes uses."""


class RecordModel(BaseModel):
    """Base of every input record: immutable, and an unknown key is an error rather than a silent no-op."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class MediaBlob(RecordModel):
    """Undecoded media as Parquet and HF `datasets` carry it; `bytes` wins over `path`."""

    path: str | None = None
    bytes: builtins.bytes | None = Field(default=None, strict=True)

    @model_validator(mode="after")
    def _has_one(self) -> "MediaBlob":
        if self.path is None and self.bytes is None:
            raise ValueError("expected `path` or `bytes`, both are null")
        return self


MediaRef = Annotated[str, Field(min_length=1, strict=True)] | MediaBlob
"""A path or fsspec URL under a declared media root, a base64 `data:` URI, or the bytes themselves."""


class TextPart(RecordModel):
    """A run of text. `loss` overrides the message's supervision for this part."""

    type: Literal["text"] = "text"
    text: str
    loss: bool | None = None


class ImagePart(RecordModel):
    """A still picture. Of an animated file the first frame is used."""

    type: Literal["image"] = "image"
    image: MediaRef
    min_pixels: int | None = Field(default=None, gt=0, le=MAX_MIN_PIXELS)
    max_pixels: int | None = Field(default=None, gt=0, le=MAX_NUMBER)
    resized_height: int | None = Field(default=None, gt=0, le=MAX_NUMBER)
    resized_width: int | None = Field(default=None, gt=0, le=MAX_NUMBER)


class AudioPart(RecordModel):
    """Sound, optionally the cut [audio_start, audio_end) in seconds."""

    type: Literal["audio"] = "audio"
    audio: MediaRef
    audio_start: float | None = Field(default=None, ge=0)
    audio_end: float | None = Field(default=None, gt=0)


class VideoPart(RecordModel):
    """A video file, or frames made ready (a list of image files, or one `.npy` of uint8 (n,H,W,3)) with `sample_fps`."""

    type: Literal["video"] = "video"
    video: MediaRef | Annotated[tuple[MediaRef, ...], Field(min_length=1)]
    video_start: float | None = Field(default=None, ge=0)
    video_end: float | None = Field(default=None, gt=0)
    fps: float | None = Field(default=None, gt=0)
    nframes: int | None = Field(default=None, gt=0, le=MAX_NUMBER)
    min_frames: int | None = Field(default=None, gt=0, le=MAX_NUMBER)
    max_frames: int | None = Field(default=None, gt=0, le=MAX_NUMBER)
    min_pixels: int | None = Field(default=None, gt=0, le=MAX_MIN_PIXELS)
    max_pixels: int | None = Field(default=None, gt=0, le=MAX_NUMBER)
    total_pixels: int | None = Field(default=None, gt=0, le=MAX_NUMBER)
    resized_height: int | None = Field(default=None, gt=0, le=MAX_NUMBER)
    resized_width: int | None = Field(default=None, gt=0, le=MAX_NUMBER)
    audio_in_video: Literal["auto", "on", "off"] = "auto"
    """`auto`: the sound track is used when there is one; `on`: its absence is an error; `off`: it is ignored."""
    sample_fps: float | None = Field(default=None, gt=0)
    """Rate of frames made ready, in frames per second."""
    audio_track: MediaRef | None = None
    """Sound that belongs to the video but lies in another file; it starts with the video's first frame."""

    @property
    def frames_ready(self) -> bool:
        """Return whether the frames are given rather than decoded from a video file."""
        if isinstance(self.video, tuple):
            return True
        path = self.video if isinstance(self.video, str) else self.video.path
        return path is not None and PurePath(path).suffix.lower() == ".npy"

    @model_validator(mode="after")
    def _keys_fit_together(self) -> "VideoPart":
        if self.fps is not None and self.nframes is not None:
            raise ValueError("give `fps` or `nframes`, not both")
        if not self.frames_ready and self.sample_fps is not None:
            raise ValueError("`sample_fps` belongs to frames made ready (a list of images or an .npy), not to a video file")
        return self


_PART_BY_KEY = {
    "image": "image",
    "image_url": "image",
    "audio": "audio",
    "audio_url": "audio",
    "video": "video",
    "video_url": "video",
    "text": "text",
}


Part = Annotated[TextPart | ImagePart | AudioPart | VideoPart, Field(discriminator="type")]
MediaPart = ImagePart | AudioPart | VideoPart


def _canonical_part(part: object) -> object:
    """Give a part its `type` and rewrite the accepted spellings (`image_url`, `url`, `path`) to the canonical key.

    As in the reference's chat template, a part without `type` is what its key says.
    """
    if not isinstance(part, OBJECT):
        return part
    given = part.get("type")
    if given == "text" and "text" in part:  # most are
        return part
    kind = next((name for key, name in _PART_BY_KEY.items() if key in part), None) if given is None else str(given)
    if kind is None:
        return part
    kind = kind.removesuffix("_url")
    if kind in part or kind not in _PART_BY_KEY:
        return part if given == kind else {**part, "type": kind}
    spellings = (f"{kind}_url", "url", "path")
    value = next((part[key] for key in spellings if key in part), None)
    if isinstance(value, OBJECT) and "url" in value:  # OpenAI: {"image_url": {"url": ...}}
        value = value["url"]
    rest = {key: item for key, item in part.items() if key not in spellings}
    return {**rest, "type": kind} | ({kind: value} if value is not None else {})


class FunctionCall(RecordModel):
    """Name and arguments of one tool call; `arguments` is an object or its JSON text."""

    name: str
    arguments: dict[str, Any] | str = Field(default_factory=dict)


class ToolCall(RecordModel):
    """One tool call of an assistant message, in OpenAI's form or as the bare function call."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall

    @model_validator(mode="before")
    @classmethod
    def _accept_bare_call(cls, value: object) -> object:
        if isinstance(value, OBJECT) and "function" not in value and "name" in value:
            return {"function": dict(value)}
        return value


class Message(RecordModel):
    """One turn. `loss` overrides the default supervision (assistant turns only)."""

    role: Literal["system", "user", "assistant", "tool"]
    content: tuple[Part, ...]
    tool_calls: tuple[ToolCall, ...] = ()
    loss: bool | None = None
    name: str | None = None
    tool_call_id: str | None = None
    """Accepted because OpenAI's tool messages have it; ChatML does not show it."""

    @model_validator(mode="before")
    @classmethod
    def _accept_plain_content(cls, value: object) -> object:
        # One callback a message, not two: checks that need only plain values are made here as well.
        if not isinstance(value, OBJECT):
            return value
        content = value.get("content")
        if value.get("tool_calls"):
            if value.get("role") in ("system", "user", "tool"):
                raise ValueError(f"`tool_calls` belong to an assistant message, not to role {value['role']!r}")
            content = () if content is None else content
        if type(content) is str:
            return {**value, "content": ({"type": "text", "text": content},)}
        if isinstance(content, (list, tuple)):
            return {**value, "content": tuple(map(_canonical_part, content))}
        return value


class RecordBase(RecordModel):
    """What every kind of record may carry besides its content."""

    id: str | None = None
    split: str | None = Field(default=None, pattern=r"^[A-Za-z0-9_]{1,64}$")
    meta: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _accept_number_as_id(cls, value: object) -> object:
        if isinstance(value, OBJECT) and type(value.get("id")) is int:
            return {**value, "id": str(value["id"])}
        return value


class Conversation(RecordBase):
    """A dialogue, rendered in ChatML."""

    messages: tuple[Message, ...] = Field(min_length=1)
    tools: tuple[dict[str, Any], ...] | None = None


class Preference(RecordBase):
    """One prompt with two answers; both share the prompt's media."""

    prompt: tuple[Message, ...] = Field(min_length=1)
    chosen: tuple[Message, ...] = Field(min_length=1)
    rejected: tuple[Message, ...] = Field(min_length=1)
    tools: tuple[dict[str, Any], ...] | None = None

    @model_validator(mode="before")
    @classmethod
    def _accept_plain_text(cls, value: object) -> object:
        """Take a string for a one-message list, and a single message for a list of it."""
        if not isinstance(value, OBJECT):
            return value
        roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
        plain: dict[str, object] = {}
        for key, role in roles.items():
            given = value.get(key)
            if isinstance(given, str):
                plain[key] = ({"role": role, "content": given},)
            elif isinstance(given, OBJECT):
                plain[key] = (given,)
        return {**value, **plain}

    @model_validator(mode="after")
    def _answers_are_text(self) -> "Preference":
        for key in ("chosen", "rejected"):
            for message in getattr(self, key):
                if any(not isinstance(part, TextPart) for part in message.content):
                    raise ValueError(f"`{key}` holds media; media belong to `prompt`, which both answers share")
        return self


class Document(RecordBase):
    """Interleaved parts for pretraining, rendered without turns. Text is supervised unless its part says `loss: false`."""

    parts: tuple[Part, ...] = Field(min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _accept_plain_text(cls, value: object) -> object:
        if not isinstance(value, OBJECT):
            return value
        if "text" in value and "parts" not in value:
            rest = {key: item for key, item in value.items() if key != "text"}
            return {**rest, "parts": ({"type": "text", "text": value["text"]},)}
        if isinstance(value.get("parts"), (list, tuple)):
            return {**value, "parts": tuple(_canonical_part(part) for part in value["parts"])}
        return value


Record = Conversation | Preference | Document

_ADAPTERS: dict[str, TypeAdapter[Any]] = {
    "messages": TypeAdapter(Conversation),
    "prompt": TypeAdapter(Preference),
    "parts": TypeAdapter(Document),
    "text": TypeAdapter(Document),
}


def parse_record(row: object) -> Record:
    """Check a native row and return it typed.

    Raises `RejectSample` (`SCHEMA_INVALID` or `ROLE_UNKNOWN`) that names the place in the record, what was expected
    and what came.
    """
    if not isinstance(row, OBJECT):
        raise RejectSample(Reason.SCHEMA_INVALID, f"expected a JSON object, got {type(row).__name__}")
    adapter = next((adapter for key, adapter in _ADAPTERS.items() if key in row), None)
    if adapter is None:
        keys = ", ".join(map(str, list(row)[:8])) or "no keys"
        raise RejectSample(Reason.SCHEMA_INVALID, f"expected one of the keys messages, prompt, parts, text; got {keys}")
    _refuse_too_large(row)
    record: Record
    try:
        record = adapter.validate_python(row)
    except ValidationError as error:
        try:  # exports of tables give every object the keys of all: what is null was not written
            record = adapter.validate_python(_without_nulls(row))
        except ValidationError:
            raise _rejection(error) from None
        except RecursionError:
            raise RejectSample(Reason.SCHEMA_INVALID, "nested too deeply") from None
    return record


def _refuse_too_large(row: Mapping[str, Any]) -> None:
    """Count before anything is built of it. Raises `RejectSample` (`RECORD_TOO_LARGE`)."""
    lists = [row[key] for key in ("messages", "prompt", "chosen", "rejected") if isinstance(row.get(key), (list, tuple))]
    num_messages = sum(map(len, lists))
    _limit("messages", num_messages, MAX_MESSAGES)
    messages = [message for turns in lists for message in turns if isinstance(message, OBJECT)]
    contents = [message.get("content") for message in messages]
    parts = [part for given in (row.get("parts"), *contents) if isinstance(given, (list, tuple)) for part in given]
    _limit("parts", len(parts), MAX_PARTS)
    media = [part for part in parts if isinstance(part, OBJECT) and "text" not in part]
    _limit("media", len(media), MAX_MEDIA)
    _limit("frames of one video", max((_num_items(part.get("video")) for part in media), default=0), MAX_FRAMES)
    calls = [message["tool_calls"] for message in messages if "tool_calls" in message]
    _limit("tools and tool calls", sum(map(_num_items, (row.get("tools"), *calls))), MAX_TOOLS)


def _num_items(value: object) -> int:
    return len(value) if isinstance(value, (list, tuple)) else 0


def _limit(what: str, count: int, largest: int) -> None:
    if count > largest:
        raise RejectSample(Reason.RECORD_TOO_LARGE, f"{count} {what} in one record, expected at most {largest}; split it")


def _without_nulls(value: object) -> object:
    if isinstance(value, OBJECT):
        return {key: item if key == "meta" else _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, (list, tuple)) else value


_EXPECTED = {
    "string_type": "a string",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "tuple_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
    "bytes_type": "bytes",
}
"""What a pydantic error type asks for, in the words of JSON."""
_FIELD = re.compile(r"[a-z_]+$")
_TAKES_TEXT = ("content", "prompt", "chosen", "rejected")


def _rejection(error: ValidationError) -> RejectSample:
    """Word the first fault. One fault may be several pydantic errors: one for each branch of a union."""
    faults: dict[tuple[str | int, ...], list[ErrorDetails]] = {}
    for detail in error.errors(include_url=False):
        if detail["type"] == "too_short" and detail["input"]:
            continue  # a list whose entries are wrong is also called too short: not a fault of its own
        faults.setdefault(_without_branches(detail)[1], []).append(detail)
    branches = next(iter(faults.values()))
    places = [_without_branches(detail)[0] for detail in branches]
    deepest = max(places, key=len)
    told = [detail for detail, place in zip(branches, places, strict=True) if place == deepest]
    told = [detail for detail in told if detail["type"] not in _EXPECTED] or told
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    place = ".".join(map(str, deepest)) or "record"
    if deepest and deepest[-1] == "role" and told[0]["type"] == "literal_error":
        return RejectSample(
            Reason.ROLE_UNKNOWN, f"{place}: expected one of {', '.join(ROLES)}; got {told[0]['input']!r:.80}{more}"
        )
    return RejectSample(Reason.SCHEMA_INVALID, f"{place}: {_wording(told, deepest)}{more}")


def _without_branches(detail: ErrorDetails) -> tuple[tuple[str | int, ...], tuple[str | int, ...]]:
    """Return where an error is, without the names of union branches, and the same up to the first union."""
    place: list[str | int] = []
    union: tuple[str | int, ...] | None = None
    steps = detail["loc"]
    for number, step in enumerate(steps):
        is_tag = number > 1 and step in _PART_BY_KEY and steps[number - 2] in ("content", "parts")
        is_key = number == len(steps) - 1 and detail["type"] in ("extra_forbidden", "missing")
        if is_tag and isinstance(steps[number - 1], int):
            continue
        if isinstance(step, str) and not is_key and (step == "str" or not _FIELD.match(step)):
            union = tuple(place) if union is None else union
            continue
        place.append(step)
    return tuple(place), tuple(place) if union is None else union


def _wording(told: list[ErrorDetails], place: tuple[str | int, ...]) -> str:
    first = told[0]
    fixed = {
        "missing": "this key is missing",
        "extra_forbidden": "unknown key",
        "too_short": "expected at least one entry",
        "string_too_short": "expected a string that is not empty",
        "value_error": first["msg"].removeprefix("Value error, "),
    }
    if first["type"] in fixed:
        return fixed[first["type"]]
    if first["type"] in ("union_tag_invalid", "union_tag_not_found"):
        expected = "expected a part with one of the keys text, image, audio, video"
    elif first["type"] in _EXPECTED:
        wanted = dict.fromkeys(_EXPECTED[detail["type"]] for detail in told)
        if place and place[-1] in _TAKES_TEXT:
            wanted = dict.fromkeys(["a string", *wanted])
        expected = f"expected {' or '.join(wanted)}"
    elif first["type"] == "literal_error":
        expected = f"expected {first['ctx']['expected']}"
    else:
        expected = (
            first["msg"].replace("Input should be a finite", "expected a finite").replace("Input should be", "expected a value")
        )
    return f"{expected}; got {first['input']!r:.80}"
