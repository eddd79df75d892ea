"""Input records: what a user writes, checked once.

A `Conversation` is the message list that transformers and qwen_omni_utils accept; a `Preference` is TRL's
prompt/chosen/rejected; a `Document` is a run of parts for pretraining. `sources/formats.py` turns other formats into
these, `parse_record` checks a native one. The JSON Schemas in `schemas/` are generated from this file.
"""

import builtins
from collections.abc import Mapping
from pathlib import PurePath
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, TypeAdapter, ValidationError, model_validator

from omniprep.errors import Reason, RejectSample

ROLES = ("system", "user", "assistant", "tool")


class RecordModel(BaseModel):
    """Base of every input record: immutable, and an unknown key is an error rather than a silent no-op."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class MediaBlob(RecordModel):
    """Undecoded media as Parquet and HF `datasets` carry it; `bytes` wins over `path`."""

    path: str | None = None
    bytes: builtins.bytes | None = None

    @model_validator(mode="after")
    def _has_one(self) -> "MediaBlob":
        if self.path is None and self.bytes is None:
            raise ValueError("expected `path` or `bytes`, both are null")
        return self


MediaRef = Annotated[str, Field(min_length=1)] | MediaBlob
"""A path or fsspec URL under a declared media root, or the bytes themselves."""


class TextPart(RecordModel):
    """A run of text. `loss` overrides the message's supervision for this part."""

    type: Literal["text"] = "text"
    text: str
    loss: bool | None = None


class ImagePart(RecordModel):
    """A still picture. Of an animated file the first frame is used."""

    type: Literal["image"] = "image"
    image: MediaRef
    min_pixels: int | None = Field(default=None, gt=0)
    max_pixels: int | None = Field(default=None, gt=0)
    resized_height: int | None = Field(default=None, gt=0)
    resized_width: int | None = Field(default=None, gt=0)


class AudioPart(RecordModel):
    """Sound, optionally the cut [audio_start, audio_end) in seconds."""

    type: Literal["audio"] = "audio"
    audio: MediaRef
    audio_start: float | None = Field(default=None, ge=0)
    audio_end: float | None = Field(default=None, gt=0)


class VideoPart(RecordModel):
    """A video file, or frames made ready (a list of image files, or one `.npy` of uint8 (n,H,W,3)) with `sample_fps`."""

    type: Literal["video"] = "video"
    video: MediaRef | tuple[MediaRef, ...]
    video_start: float | None = Field(default=None, ge=0)
    video_end: float | None = Field(default=None, gt=0)
    fps: float | None = Field(default=None, gt=0)
    nframes: int | None = Field(default=None, gt=0)
    min_frames: int | None = Field(default=None, gt=0)
    max_frames: int | None = Field(default=None, gt=0)
    min_pixels: int | None = Field(default=None, gt=0)
    max_pixels: int | None = Field(default=None, gt=0)
    total_pixels: int | None = Field(default=None, gt=0)
    resized_height: int | None = Field(default=None, gt=0)
    resized_width: int | None = Field(default=None, gt=0)
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


def _part_kind(value: object) -> str | None:
    """Return a part's kind by its `type` or, as in the reference's chat template, by the key that it has."""
    if isinstance(value, RecordModel):
        return str(getattr(value, "type", ""))
    if not isinstance(value, Mapping):
        return None
    kind = value.get("type")
    if kind is not None:
        return str(kind).removesuffix("_url")
    return next((part for key, part in _PART_BY_KEY.items() if key in value), None)


Part = Annotated[
    Annotated[TextPart, Tag("text")]
    | Annotated[ImagePart, Tag("image")]
    | Annotated[AudioPart, Tag("audio")]
    | Annotated[VideoPart, Tag("video")],
    Discriminator(
        _part_kind,
        custom_error_type="part_kind",
        custom_error_message="expected a part with one of the keys text, image, audio, video",
    ),
]
MediaPart = ImagePart | AudioPart | VideoPart


def _canonical_part(part: object) -> object:
    """Rewrite the accepted spellings of a media part (`image_url`, `url`, `path`) to the canonical key."""
    if not isinstance(part, Mapping):
        return part
    kind = _part_kind(part)
    if kind == "text" or kind not in _PART_BY_KEY or kind in part:
        if kind is not None and part.get("type", kind) != kind:
            return {**part, "type": kind}
        return part
    rest = {key: value for key, value in part.items() if key not in (f"{kind}_url", "url", "path")}
    given = next((part[key] for key in (f"{kind}_url", "url", "path") if key in part), None)
    if isinstance(given, Mapping) and "url" in given:  # OpenAI style: {"image_url": {"url": ...}}
        given = given["url"]
    return {**rest, "type": kind} | ({kind: given} if given is not None else {})


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
        if isinstance(value, Mapping) and "function" not in value and "name" in value:
            return {"function": dict(value)}
        return value


class Message(RecordModel):
    """One turn. `loss` overrides the default supervision (assistant turns only)."""

    role: Literal["system", "user", "assistant", "tool"]
    content: tuple[Part, ...]
    tool_calls: tuple[ToolCall, ...] = ()
    loss: bool | None = None
    name: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _accept_plain_content(cls, value: object) -> object:
        if not isinstance(value, Mapping):
            return value
        content = value.get("content")
        if isinstance(content, str):
            return {**value, "content": ({"text": content},)}
        if content is None and value.get("tool_calls"):
            return {**value, "content": ()}
        if isinstance(content, (list, tuple)):
            return {**value, "content": tuple(_canonical_part(part) for part in content)}
        return value

    @model_validator(mode="after")
    def _only_assistants_call_tools(self) -> "Message":
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"`tool_calls` belong to an assistant message, not to role {self.role!r}")
        return self


class RecordBase(RecordModel):
    """What every kind of record may carry besides its content."""

    id: str | None = None
    split: str | None = Field(default=None, pattern=r"^[A-Za-z0-9_]+$")
    meta: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _accept_number_as_id(cls, value: object) -> object:
        if isinstance(value, Mapping) and type(value.get("id")) is int:
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
        if not isinstance(value, Mapping):
            return value
        roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
        plain: dict[str, object] = {}
        for key, role in roles.items():
            given = value.get(key)
            if isinstance(given, str):
                plain[key] = ({"role": role, "content": given},)
            elif isinstance(given, Mapping):
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
        if not isinstance(value, Mapping):
            return value
        if "text" in value and "parts" not in value:
            rest = {key: item for key, item in value.items() if key != "text"}
            return {**rest, "parts": ({"text": value["text"]},)}
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
    if not isinstance(row, Mapping):
        raise RejectSample(Reason.SCHEMA_INVALID, f"expected a JSON object, got {type(row).__name__}")
    adapter = next((adapter for key, adapter in _ADAPTERS.items() if key in row), None)
    if adapter is None:
        keys = ", ".join(map(str, list(row)[:8])) or "no keys"
        raise RejectSample(Reason.SCHEMA_INVALID, f"expected one of the keys messages, prompt, parts, text; got {keys}")
    try:
        record: Record = adapter.validate_python(row)
    except ValidationError as error:
        raise _rejection(error) from None
    return record


def _rejection(error: ValidationError) -> RejectSample:
    first = error.errors(include_url=False)[0]
    place = ".".join(str(step) for step in first["loc"])
    if first["loc"] and first["loc"][-1] == "role" and first["type"] == "literal_error":
        return RejectSample(Reason.ROLE_UNKNOWN, f"{place}: expected one of {', '.join(ROLES)}; got {first['input']!r:.80}")
    message = first["msg"].removeprefix("Value error, ")
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    shown = f"; got {first['input']!r:.80}" if first["type"] not in ("value_error", "extra_forbidden", "missing") else ""
    return RejectSample(Reason.SCHEMA_INVALID, f"{place or 'record'}: {message}{shown}{more}")
