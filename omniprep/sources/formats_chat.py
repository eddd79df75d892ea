"""Turns of LLaMA-Factory, ms-swift, OpenAI and TRL, as native messages.

Tool calls that are messages of their own (`function_call`, `tool_call`: JSON text of one call or a list) become
`tool_calls` of an assistant message: the one before, if there is one, because ChatML shows them as one turn.
"""

import json
from collections.abc import Mapping
from typing import Any

from omniprep.config import Config
from omniprep.errors import Reason, RejectSample
from omniprep.records import OBJECT

CALL_ROLES = frozenset({"function_call", "tool_call"})
RESULT_ROLES = frozenset({"tool", "tool_response", "observation", "function"})
_ROLE_OF = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "system": "system",
    **dict.fromkeys(RESULT_ROLES, "tool"),
    **dict.fromkeys(CALL_ROLES, "call"),
}


class Tags(Config):
    """Keys of a message and names of its roles; None: the usual ones of all formats are understood."""

    role_tag: str | None = None
    """Usual: `role` or `from`."""
    content_tag: str | None = None
    """Usual: `content` or `value`."""
    user_tag: str | None = None
    """Usual: `user` or `human`."""
    assistant_tag: str | None = None
    """Usual: `assistant`, `gpt` or `bot`."""
    observation_tag: str | None = None
    """A tool's result; usual: `tool`, `tool_response`, `observation` or `function`."""
    function_tag: str | None = None
    """A tool call; usual: `function_call` or `tool_call`."""
    system_tag: str | None = None
    """Usual: `system`."""

    def roles(self) -> Mapping[str, str]:
        """Return the role of every role name."""
        named = {
            self.user_tag: "user",
            self.assistant_tag: "assistant",
            self.observation_tag: "tool",
            self.function_tag: "call",
            self.system_tag: "system",
        }
        return {**_ROLE_OF, **{tag: role for tag, role in named.items() if tag is not None}}


def chat_messages(value: object, tags: Tags, *, place: str) -> list[dict[str, Any]]:
    """Return turns as native messages, content untouched. Raises `RejectSample` with the turn's place."""
    if not isinstance(value, (list, tuple)):
        raise RejectSample(Reason.SCHEMA_INVALID, f"{place}: expected a list of messages, got {value!r:.80}")
    roles = tags.roles() if tags.model_fields_set else _ROLE_OF
    messages: list[dict[str, Any]] = []
    for number, turn in enumerate(value):
        where = f"{place}.{number}"
        if not isinstance(turn, OBJECT):
            raise RejectSample(Reason.SCHEMA_INVALID, f"{where}: expected an object, got {turn!r:.80}")
        name = _first(turn, tags.role_tag, "role", "from")
        role = roles.get(name) if isinstance(name, str) else None
        content = _first(turn, tags.content_tag, "content", "value")
        if role is None:
            known = ", ".join(sorted(roles))
            raise RejectSample(Reason.ROLE_UNKNOWN, f"{where}: expected one of the roles {known}; got {name!r:.80}")
        if role == "call":
            _add_calls(messages, content, where)
        else:
            messages.append(_message(turn, role, content))
    return messages


def _message(turn: Mapping[str, Any], role: str, content: object) -> dict[str, Any]:
    message: dict[str, Any] = {"role": role, "content": "" if content is None else content}
    if turn.get("tool_calls"):
        calls = turn["tool_calls"]
        message["tool_calls"] = [_call(call) for call in calls] if isinstance(calls, (list, tuple)) else calls
    if isinstance(turn.get("loss"), bool):
        message["loss"] = turn["loss"]
    elif turn.get("weight") == 0:  # OpenAI's fine-tuning files
        message["loss"] = False
    if role == "tool" and isinstance(turn.get("name"), str):
        message["name"] = turn["name"]
    return message


def _first(turn: Mapping[str, Any], named: str | None, *usual: str) -> Any:
    if named is not None:
        return turn.get(named)
    return next((turn[key] for key in usual if turn.get(key) is not None), None)


def _call(call: object) -> object:
    """Keep of an OpenAI call what the native format knows."""
    if not isinstance(call, OBJECT):
        return call
    function = call.get("function", call)
    if not isinstance(function, OBJECT):
        return call
    known = {key: function[key] for key in ("name", "arguments") if function.get(key) is not None}
    return {"function": known} | ({"id": call["id"]} if isinstance(call.get("id"), str) else {})


def _add_calls(messages: list[dict[str, Any]], content: object, where: str) -> None:
    """Append tool calls to the assistant message before, or as one. A `<think>...</think>` in front is its text."""
    thought = ""
    text = content
    if isinstance(text, str) and text.lstrip().startswith("<think>") and "</think>" in text:
        cut = text.index("</think>") + len("</think>")
        thought, text = text[:cut], text[cut:]
    try:
        calls = _loads(text) if isinstance(text, str) else text
    except (ValueError, RecursionError):
        raise RejectSample(Reason.SCHEMA_INVALID, f"{where}: expected a tool call as JSON text, got {content!r:.80}") from None
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(call, OBJECT) and ("name" in call or "function" in call) for call in calls):
        raise RejectSample(
            Reason.SCHEMA_INVALID, f"{where}: expected tool calls with `name` and `arguments`, got {content!r:.80}"
        )
    calls = [_call(call) for call in calls]
    if messages and messages[-1]["role"] == "assistant" and not thought:
        messages[-1]["tool_calls"] = [*messages[-1].get("tool_calls", ()), *calls]
    else:
        messages.append({"role": "assistant", "content": thought, "tool_calls": calls})


def _loads(text: str) -> Any:
    """Return the value of JSON text. Raises `ValueError` also for NaN and for half a surrogate pair, which no tokenizer takes."""
    value = json.loads(text, parse_constant=_no_constant)
    if "\\u" in text:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    return value


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def tool_list(tools: object) -> list[dict[str, Any]]:
    """Return tool descriptions as OpenAI's `{"type": "function", "function": ...}`; they may come as JSON text.

    >>> tool_list('[{"name": "add", "parameters": {}}]')
    [{'type': 'function', 'function': {'name': 'add', 'parameters': {}}}]
    """
    if tools is None or tools == "":
        return []
    given = _json_if_text(tools, "tools")
    given = given if isinstance(given, (list, tuple)) else [given]
    found = []
    for number, item in enumerate(given):
        tool = _json_if_text(item, f"tools.{number}")  # in Arrow tables: a list of JSON texts
        if not isinstance(tool, OBJECT):
            raise RejectSample(Reason.SCHEMA_INVALID, f"tools.{number}: expected an object, got {item!r:.80}")
        found.append(dict(tool) if "function" in tool else {"type": "function", "function": dict(tool)})
    return found


def _json_if_text(value: object, place: str) -> Any:
    try:
        return _loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        raise RejectSample(Reason.SCHEMA_INVALID, f"{place}: expected JSON text, got {value!r:.80}") from None
