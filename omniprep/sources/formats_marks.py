"""The marks `<image>`, `<video>`, `<audio>` in text, replaced by the media that a row lists beside it."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from omniprep.errors import Reason, RejectSample
from omniprep.records import OBJECT

MEDIA_COLUMNS = {"images": "image", "videos": "video", "audios": "audio"}
_MARK = re.compile(r"<(image|video|audio)>")


@dataclass(frozen=True, kw_only=True, slots=True)
class MediaColumns:
    """The media of a row, by kind, in the order of their marks. A kind whose column is absent is not a key."""

    items: Mapping[str, tuple[Any, ...]]
    paired: bool
    """Each video takes the sound after it as its track."""

    @classmethod
    def of(cls, row: Mapping[str, Any], *, paired: bool) -> "MediaColumns":
        """Return the media columns of a row; one entry need not be in a list, and a video may be a list of frames."""
        items = {}
        for column, kind in MEDIA_COLUMNS.items():
            value = row.get(column)
            if value is not None:
                items[kind] = tuple(value) if isinstance(value, (list, tuple)) else (value,)
        return cls(items=items, paired=paired and "video" in items and "audio" in items)


def place_media(messages: list[dict[str, Any]], media: MediaColumns, *, unmarked_in_front: bool) -> list[dict[str, Any]]:
    """Return the messages with every mark of a listed kind replaced by its medium, in order of appearance.

    A content list may have parts such as `{"type": "image"}` without their medium: they count as marks; its text parts
    are literal. System turns are literal. `unmarked_in_front`: media of a kind without any mark go in front of the first
    user turn. Raises `RejectSample(PLACEHOLDER_MISMATCH)` with both numbers.
    """
    if not media.items:
        return messages
    marks = _count_marks(messages, media)
    in_front: list[dict[str, Any]] = []
    queues: dict[str, Iterator[Any]] = {}
    for kind, given in media.items.items():
        if unmarked_in_front and given and not marks[kind]:
            in_front.extend(_part(kind, value, media) for value in given)
        elif marks[kind] != len(given):
            raise RejectSample(
                Reason.PLACEHOLDER_MISMATCH,
                f"expected as many <{kind}> marks as entries in `{kind}s`; got {marks[kind]} and {len(given)}",
            )
        queues[kind] = iter(given)
    placed = [_placed(message, f"message {number}", queues, media) for number, message in enumerate(messages)]
    return _in_front(placed, in_front) if in_front else placed


def _count_marks(messages: list[dict[str, Any]], media: MediaColumns) -> Counter[str]:
    marks: Counter[str] = Counter()
    for message in messages:
        content = message.get("content")
        if message.get("role") == "system":
            continue
        if isinstance(content, str):
            marks.update(_MARK.findall(content))
        elif isinstance(content, (list, tuple)):
            marks.update(part["type"] for part in content if _is_empty_part(part, media))
    return marks


def _is_empty_part(part: object, media: MediaColumns) -> bool:
    kind = part.get("type") if isinstance(part, OBJECT) else None
    return isinstance(kind, str) and kind in media.items and kind not in part  # type: ignore[operator]


def _placed(message: dict[str, Any], where: str, queues: Mapping[str, Iterator[Any]], media: MediaColumns) -> dict[str, Any]:
    content = message.get("content")
    if message.get("role") == "system":
        return message
    if isinstance(content, str):
        pieces = _MARK.split(content)  # text, kind, text, kind, ..., text
        if len(pieces) == 1:
            return message
        parts = list(_parts(pieces, queues, media))
        return {**message, "content": _pair(parts, where) if media.paired else parts}
    if isinstance(content, (list, tuple)):
        filled = [
            {**_part(part["type"], next(queues[part["type"]]), media), **part} if _is_empty_part(part, media) else part
            for part in content
        ]
        return {**message, "content": filled}
    return message


def _parts(pieces: Sequence[str], queues: Mapping[str, Iterator[Any]], media: MediaColumns) -> Iterator[dict[str, Any]]:
    text = pieces[0]
    for kind, after in zip(pieces[1::2], pieces[2::2], strict=True):
        if kind not in queues:
            text += f"<{kind}>{after}"
            continue
        if text:
            yield {"type": "text", "text": text}
        yield _part(kind, next(queues[kind]), media)
        text = after
    if text:
        yield {"type": "text", "text": text}


def _part(kind: str, value: Any, media: MediaColumns) -> dict[str, Any]:
    part = {"type": kind, **value} if isinstance(value, OBJECT) and kind in value else {"type": kind, kind: value}
    if kind == "video" and "audio" in media.items:
        # The row lists its sounds itself: a track inside the file is not wanted a second time.
        part.setdefault("audio_in_video", "on" if media.paired else "off")
    return part


def _pair(parts: list[dict[str, Any]], where: str) -> list[dict[str, Any]]:
    """Give each video the first sound after it that is not yet taken, as LLaMA-Factory pairs them."""
    taken: set[int] = set()
    for number, part in enumerate(parts):
        if part["type"] != "video":
            continue
        sound = next((k for k in range(number, len(parts)) if parts[k]["type"] == "audio" and k not in taken), None)
        if sound is None:
            raise RejectSample(
                Reason.PLACEHOLDER_MISMATCH, f"{where}: expected an <audio> mark after each <video> (use_audio_in_video is on)"
            )
        taken.add(sound)
        parts[number] = {**part, "audio_track": parts[sound]["audio"]}
    return [part for number, part in enumerate(parts) if number not in taken]


def _in_front(messages: list[dict[str, Any]], parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    first = next((k for k, message in enumerate(messages) if message.get("role") == "user"), None)
    if first is None:
        raise RejectSample(Reason.PLACEHOLDER_MISMATCH, f"{len(parts)} media without marks, and no user message to put them in")
    content = messages[first]["content"]
    if not isinstance(content, (str, list, tuple)):
        return messages  # not a message: the record's own check says what it should be
    rest = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
    return [*messages[:first], {**messages[first], "content": [*parts, *rest]}, *messages[first + 1 :]]
