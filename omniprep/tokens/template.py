"""ChatML: a conversation becomes pieces of text, control tokens and media places, each with its supervision.

The rendering is the reference's chat template, written as pieces instead of a string: nothing is searched or replaced
afterwards. The loss mask is written in the same step: an assistant turn's content and its `<|im_end|>` are supervised,
headers, other roles and media places are not; `loss` of a message or of a text part overrides this.

Tools follow Qwen2.5's own template (the Omni template has none): signatures in the system turn, calls as
`<tool_call>` blocks, results as `<tool_response>` blocks in a user turn.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, final

from omniprep.config import Config
from omniprep.profile import QWEN2_5_OMNI, ModelProfile
from omniprep.records import ROLES, Document, MediaPart, Message, Part, TextPart, ToolCall
from omniprep.tokens.vocab import TextPolicy


class TemplateConfig(Config):
    """How conversations are rendered."""

    system_prompt: str | None = None
    """Used when a conversation does not begin with a system turn; null: the model's default."""
    text_policy: TextPolicy = "literal"
    """What a control token's string in user text becomes: ordinary text, a rejection, or (`allow`) that control token."""
    add_vision_id: bool = False
    """Write "Picture 1: ", "Video 1: " before the media, as the reference's template can."""
    add_audio_id: bool = False


@final
class TextPiece(NamedTuple):
    """Text to encode. `constant` marks strings of the template itself, which are never user text.

    A tuple, for there is one for every part of every message: a frozen data class takes three times as long to make.
    """

    text: str
    supervised: bool = False
    constant: bool = False
    place: str = ""
    """Where it stands in the record, if a part of a message is what it is."""


@final
@dataclass(frozen=True, slots=True)
class ControlPiece:
    """One control token."""

    token_id: int
    supervised: bool = False


@final
@dataclass(frozen=True, slots=True)
class MediaPiece:
    """A media part; its tokens come from the layout."""

    part: MediaPart
    place: str = ""
    """Where it stands in the record: `messages.0.content.1`."""


Piece = TextPiece | ControlPiece | MediaPiece


class _MediaCount:
    """Counts media over a conversation for "Picture n: "."""

    def __init__(self, config: TemplateConfig) -> None:
        self._wanted = {"image": config.add_vision_id, "video": config.add_vision_id, "audio": config.add_audio_id}
        self._names = {"image": "Picture", "video": "Video", "audio": "Audio"}
        self._counts = {"image": 0, "video": 0, "audio": 0}

    def prefix(self, kind: str) -> str:
        self._counts[kind] += 1
        return f"{self._names[kind]} {self._counts[kind]}: " if self._wanted[kind] else ""


class ChatTemplate:
    """Renders messages into pieces."""

    def __init__(self, config: TemplateConfig, profile: ModelProfile = QWEN2_5_OMNI) -> None:
        self.config = config
        self.profile = profile
        start, end = profile.special.im_start, profile.special.im_end
        self._openings: dict[str, tuple[Piece, ...]] = {
            role: (ControlPiece(start), TextPiece(f"{role}\n", constant=True)) for role in ROLES
        }
        self._closings: dict[bool, tuple[Piece, ...]] = {
            supervised: (ControlPiece(end, supervised), TextPiece("\n", constant=True)) for supervised in (False, True)
        }

    def conversation(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        place: str = "messages",
    ) -> list[Piece]:
        """Return the pieces of a dialogue; a system turn is put first if there is none. `place` is the messages' own key."""
        count = _MediaCount(self.config)
        pieces: list[Piece] = []
        done = 0
        if tools or messages[0].role != "system":
            given = messages[0] if messages[0].role == "system" else None
            done = 0 if given is None else 1
            pieces += self._system_turn(given, tools or (), count, place)
        pieces += self._turns(messages, count, place, first=done)
        if add_generation_prompt:
            pieces += self._openings["assistant"]
        return pieces

    def reply(self, messages: Sequence[Message], *, place: str = "messages") -> list[Piece]:
        """Return the pieces of the turns that answer a prompt (a preference's chosen or rejected side)."""
        return self._turns(messages, _MediaCount(self.config), place, first=0)

    def document(self, document: Document) -> list[Piece]:
        """Return the pieces of a document: its parts without turns, closed by `<|endoftext|>`, which is supervised."""
        content = self._content(document.parts, True, _MediaCount(self.config), "parts")
        return [*content, ControlPiece(self.profile.special.endoftext, True)]

    def _system_turn(
        self, given: Message | None, tools: Sequence[dict[str, Any]], count: _MediaCount, place: str
    ) -> Iterator[Piece]:
        supervised = bool(given.loss) if given is not None else False
        yield from self._openings["system"]
        if given is not None:
            yield from self._content(given.content, supervised, count, f"{place}.0.content")
        elif self.config.system_prompt is None:
            yield TextPiece(self.profile.default_system_prompt, constant=True)
        elif self.config.system_prompt:
            yield TextPiece(self.config.system_prompt)
        if tools:
            yield from self._tool_signatures(tools, supervised)
        yield from self._closings[supervised]

    def _turns(self, messages: Sequence[Message], count: _MediaCount, where: str, *, first: int) -> list[Piece]:
        pieces: list[Piece] = []
        for index, message in enumerate(messages[first:], first):
            place = f"{where}.{index}.content"
            if message.role == "tool":
                opens = index == first or messages[index - 1].role != "tool"
                closes = index + 1 == len(messages) or messages[index + 1].role != "tool"
                pieces += self._tool_response(message, count, place, opens=opens, closes=closes)
                continue
            supervised = message.role == "assistant" if message.loss is None else message.loss
            pieces += self._openings[message.role]
            pieces += self._content(message.content, supervised, count, place)
            for number, call in enumerate(message.tool_calls):
                pieces += self._tool_call(call, supervised, newline=number > 0 or bool(message.content))
            pieces += self._closings[supervised]
        return pieces

    def _content(self, parts: Sequence[Part], supervised: bool, count: _MediaCount, place: str) -> list[Piece]:
        pieces: list[Piece] = []
        for index, part in enumerate(parts):
            if isinstance(part, TextPart):
                if part.text:
                    on = supervised if part.loss is None else part.loss
                    pieces.append(TextPiece(part.text, on, False, f"{place}.{index}"))
                continue
            prefix = count.prefix(part.type)
            if prefix:
                pieces.append(TextPiece(prefix, supervised))
            pieces.append(MediaPiece(part, f"{place}.{index}"))
        return pieces

    def _tool_signatures(self, tools: Sequence[dict[str, Any]], supervised: bool) -> Iterator[Piece]:
        special = self.profile.special
        yield TextPiece(
            "\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
            "You are provided with function signatures within <tools></tools> XML tags:\n<tools>",
            supervised,
        )
        for tool in tools:
            yield TextPiece("\n" + _json(tool), supervised)
        yield TextPiece(
            "\n</tools>\n\nFor each function call, return a json object with function name and arguments within ", supervised
        )
        yield ControlPiece(special.tool_call, supervised)
        yield ControlPiece(special.tool_call_end, supervised)
        yield TextPiece(" XML tags:\n", supervised)
        yield ControlPiece(special.tool_call, supervised)
        yield TextPiece('\n{"name": <function-name>, "arguments": <args-json-object>}\n', supervised)
        yield ControlPiece(special.tool_call_end, supervised)

    def _tool_call(self, call: ToolCall, supervised: bool, *, newline: bool) -> Iterator[Piece]:
        special = self.profile.special
        arguments = call.function.arguments
        text = arguments if isinstance(arguments, str) else _json(arguments)
        if newline:
            yield TextPiece("\n", supervised)
        yield ControlPiece(special.tool_call, supervised)
        yield TextPiece(f'\n{{"name": {_json(call.function.name)}, "arguments": {text}}}\n', supervised)
        yield ControlPiece(special.tool_call_end, supervised)

    def _tool_response(self, message: Message, count: _MediaCount, place: str, *, opens: bool, closes: bool) -> Iterator[Piece]:
        supervised = bool(message.loss)
        if opens:
            yield ControlPiece(self.profile.special.im_start)
            yield TextPiece("user", constant=True)
        yield TextPiece("\n<tool_response>\n", supervised)
        yield from self._content(message.content, supervised, count, place)
        yield TextPiece("\n</tool_response>", supervised)
        if closes:
            yield from self._closings[supervised]


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
