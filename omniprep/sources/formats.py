"""Rows of other trainers' formats, as records.

`auto` decides by a row's keys, the first that fits:

* `messages` with `rejected_response` or `rejected_messages`: swift
* `messages` with a column (`images`, `chosen`, `system`...) or role (`observation`...) that is not native: sharegpt
* `messages`: messages, the native format, in which an unknown key is an error
* `conversations`: sharegpt; `query`: swift; `instruction`: alpaca; `chosen` with `rejected`: trl
* `parts`: messages (a native document); `prompt`: text (a conversation); `text`: text (a document)

sharegpt, swift and alpaca rows with two answers, and trl rows, become preferences.

A null column counts as absent. In sharegpt, swift, alpaca, trl and text, the exact marks `<image>`, `<video>` and
`<audio>` in user and assistant turns stand for the entries of `images`, `videos` and `audios`, in order; without that
column a mark is ordinary text. As many marks as media are needed. swift, trl and text rows without any mark of a kind get
their media in front of the first user turn, as those trainers do.
"""

from collections.abc import Mapping
from typing import Any, Literal

from omniprep.config import Config
from omniprep.errors import Reason, RejectSample
from omniprep.records import OBJECT, Record, parse_record
from omniprep.sources.formats_chat import CALL_ROLES, RESULT_ROLES, Tags, chat_messages, tool_list
from omniprep.sources.formats_marks import MEDIA_COLUMNS, MediaColumns, place_media

Format = Literal["auto", "messages", "sharegpt", "swift", "trl", "alpaca", "text"]

_FOREIGN_ROLES = CALL_ROLES | (RESULT_ROLES - {"tool"}) | {"human", "gpt", "bot"}
_FORMAT_BY_KEYS: tuple[tuple[frozenset[str], str], ...] = (
    (frozenset({"conversations"}), "sharegpt"),
    (frozenset({"query"}), "swift"),
    (frozenset({"instruction"}), "alpaca"),
    (frozenset({"chosen", "rejected"}), "trl"),
    (frozenset({"parts"}), "messages"),
    (frozenset({"prompt"}), "text"),
    (frozenset({"text"}), "text"),
)
_SINGULAR = {"image": "images", "video": "videos", "audio": "audios"}
_SHAREGPT_COLUMNS = {*MEDIA_COLUMNS, *_SINGULAR, "chosen", "rejected", "system", "kto_tag", "label"}


class Columns(Config):
    """Where a row's columns are, under LLaMA-Factory's names for them; None: under the usual name."""

    prompt: str | None = None
    """Usual name `prompt` for the formats trl and text, `query` for swift, else `instruction`."""
    query: str | None = None
    """Usual name `input` (alpaca: added to the prompt on a new line); for the format swift `query`."""
    response: str | None = None
    """Usual names `response`, `completion`, `output`."""
    history: str | None = None
    messages: str | None = None
    """Usual names `messages`, `conversations`."""
    system: str | None = None
    tools: str | None = None
    images: str | None = None
    videos: str | None = None
    audios: str | None = None
    chosen: str | None = None
    rejected: str | None = None
    kto_tag: str | None = None
    id: str | None = None
    text: str | None = None


_DEFAULT_COLUMNS = Columns()
_DEFAULT_TAGS = Tags()


def to_record(
    value: object,
    format: Format = "auto",
    *,
    columns: Columns = _DEFAULT_COLUMNS,
    tags: Tags = _DEFAULT_TAGS,
    use_audio_in_video: bool = False,
    meta_columns: tuple[str, ...] = (),
) -> Record:
    """Return a row as a record.

    With `use_audio_in_video`, in rows that list videos and audios each `<video>` takes the `<audio>` after it as its sound
    track (LLaMA-Factory's option of the same name); without it such videos are silent and the sounds stand alone.
    Raises `RejectSample`: `SCHEMA_INVALID`, `ROLE_UNKNOWN` or `PLACEHOLDER_MISMATCH`.

    >>> to_record({"instruction": "Hi", "output": "Hello"}).messages[1].content[0].text
    'Hello'
    """
    if not isinstance(value, OBJECT):
        raise RejectSample(Reason.SCHEMA_INVALID, f"expected a JSON object, got {type(value).__name__}")
    meta = {name: value[name] for name in meta_columns if value.get(name) is not None}
    row = _renamed(value, format, columns) if columns.model_fields_set else value
    kind = detect(row) if format == "auto" else format
    if kind == "messages":
        native: Mapping[str, Any] = row
        if meta_columns:
            native = {key: item for key, item in row.items() if key not in meta}
            given = native.get("meta")
            native = {**native, "meta": {**meta, **given} if isinstance(given, OBJECT) else given or meta}
        return parse_record(native)
    _refuse_unsupported(row, kind)
    record = _convert(row, kind, tags, use_audio_in_video)
    for key in ("id", "split"):
        if isinstance(row.get(key), (str, int)):
            record[key] = row[key]
    given_meta = row.get("meta")
    if meta or isinstance(given_meta, OBJECT):
        record["meta"] = {**meta, **(given_meta if isinstance(given_meta, OBJECT) else {})}
    return parse_record(record)


def detect(row: Mapping[str, Any]) -> str:
    """Return the format of a row by its keys (and, for `messages`, its roles). Raises `RejectSample` if none fits.

    >>> detect({"messages": [{"role": "user", "content": "<image>"}], "images": ["a.png"]})
    'sharegpt'
    """
    keys = {key for key, item in row.items() if item is not None}
    if "messages" in keys:
        return _detect_messages(row, keys)
    found = next((kind for needed, kind in _FORMAT_BY_KEYS if needed <= keys), None)
    if found is None:
        shown = ", ".join(sorted(map(str, keys))[:8]) or "no keys"
        raise RejectSample(
            Reason.SCHEMA_INVALID,
            "no known format: expected one of the keys messages, conversations, query, instruction, chosen with rejected, "
            f"parts, prompt, text; got {shown}; name others with `columns`",
        )
    return found


def _detect_messages(row: Mapping[str, Any], keys: set[str]) -> str:
    if keys & {"rejected_response", "rejected_messages"}:
        return "swift"
    if keys & _SHAREGPT_COLUMNS or isinstance(row.get("tools"), str):
        return "sharegpt"
    messages = row["messages"]
    if isinstance(messages, (list, tuple)):
        for message in messages:
            if isinstance(message, OBJECT) and ("from" in message or _is_foreign(message.get("role"))):
                return "sharegpt"
    return "messages"


def _is_foreign(role: object) -> bool:
    return isinstance(role, str) and role in _FOREIGN_ROLES


_PROMPT_COLUMN = {"trl": "prompt", "text": "prompt", "swift": "query"}


def _renamed(row: Mapping[str, Any], format: Format, columns: Columns) -> dict[str, Any]:
    """Return the row with the named columns under the names that the converters read."""
    usual = {"prompt": _PROMPT_COLUMN.get(format, "instruction"), "query": "query" if format == "swift" else "input"}
    names = {name: given for name, given in columns if given is not None}
    moved = {usual.get(name, name): row.get(given) for name, given in names.items()}
    return {**{key: item for key, item in row.items() if key not in names.values()}, **moved}


def _refuse_unsupported(row: Mapping[str, Any], kind: str) -> None:
    if row.get("kto_tag") is not None or (isinstance(row.get("label"), bool) and "text" not in row):
        raise RejectSample(
            Reason.SCHEMA_INVALID,
            "a KTO row (one answer with a true or false label) is not supported; give pairs (chosen, rejected), or the "
            "rows labelled true without `label`",
        )
    for key in ("objects", "rejected_images", "rejected_videos", "rejected_audios"):
        if row.get(key) and kind in ("sharegpt", "swift"):
            raise RejectSample(Reason.SCHEMA_INVALID, f"column `{key}` (ms-swift) is not supported; remove it or the row")


def _response(row: Mapping[str, Any]) -> Any:
    return next((row[key] for key in ("response", "completion", "output") if row.get(key) is not None), None)


def _convert(row: Mapping[str, Any], kind: str, tags: Tags, paired: bool) -> dict[str, Any]:
    media = MediaColumns.of({**{_SINGULAR[key]: row[key] for key in _SINGULAR if key in row}, **row}, paired=paired)
    match kind:
        case "sharegpt" | "swift" | "alpaca":
            return _from_turns(row, kind, tags, media)
        case "trl":
            return _from_trl(row, tags, media)
        case "text" if row.get("prompt") is not None:
            return _from_prompt(row, tags, media)
        case "text":
            return _from_text(row, media)
        case _:
            raise AssertionError(kind)


def _from_turns(row: Mapping[str, Any], kind: str, tags: Tags, media: MediaColumns) -> dict[str, Any]:
    """Convert sharegpt, swift and alpaca rows: turns, then perhaps two answers."""
    if kind == "alpaca":
        turns = _alpaca_turns(row)
    else:
        turns = _given_turns(row, tags)
    turns = _with_system(turns, row.get("system"))
    answers = _answers(row, turns, tags)
    if answers is not None:
        turns, chosen, rejected = answers
        record: dict[str, Any] = {"prompt": turns, "chosen": chosen, "rejected": rejected}
    else:
        record = {"messages": turns}
    where = "prompt" if answers is not None else "messages"
    record[where] = place_media(turns, media, unmarked_in_front=kind == "swift")
    return _with_tools(record, row)


def _given_turns(row: Mapping[str, Any], tags: Tags) -> list[dict[str, Any]]:
    """Return `messages` or `conversations`, or ms-swift's `history`, `query` and `response`."""
    for key in ("messages", "conversations"):
        if row.get(key) is not None:
            return chat_messages(row[key], tags, place=key)
    if row.get("query") is None:
        raise RejectSample(Reason.SCHEMA_INVALID, "expected `messages`, `conversations` or `query`")
    turns = [*_history(row), {"role": "user", "content": row["query"]}]
    answer = _response(row)
    return turns if answer is None else [*turns, {"role": "assistant", "content": answer}]


def _alpaca_turns(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    asked = [row[key] for key in ("instruction", "input") if row.get(key)]
    if not asked or not all(isinstance(text, str) for text in asked):
        raise RejectSample(Reason.SCHEMA_INVALID, "expected text in `instruction` or `input`")
    turns = [*_history(row), {"role": "user", "content": "\n".join(asked)}]
    answer = _response(row)
    if answer is not None and row.get("chosen") is None:
        turns.append({"role": "assistant", "content": answer})
    return turns


def _history(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    turns: list[dict[str, Any]] = []
    history = row.get("history") or ()
    if not isinstance(history, (list, tuple)):
        raise RejectSample(Reason.SCHEMA_INVALID, f"history: expected a list of [question, answer], got {history!r:.80}")
    for number, pair in enumerate(history):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise RejectSample(Reason.SCHEMA_INVALID, f"history.{number}: expected [question, answer], got {pair!r:.80}")
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return turns


def _with_system(turns: list[dict[str, Any]], system: object) -> list[dict[str, Any]]:
    """Put a `system` column in front; a system turn of the row's own wins, as in LLaMA-Factory."""
    if not system or (turns and turns[0].get("role") == "system"):
        return turns
    return [{"role": "system", "content": system}, *turns]


Turns = list[dict[str, Any]]


def _answers(row: Mapping[str, Any], turns: Turns, tags: Tags) -> tuple[Turns, Turns, Turns] | None:
    """Return (prompt, chosen, rejected) of a preference, or None for an ordinary row."""
    if row.get("rejected_messages") is not None:
        rejected = chat_messages(row["rejected_messages"], tags, place="rejected_messages")
        shared = _num_shared(turns, rejected)
        return turns[:shared], turns[shared:], rejected[shared:]
    if row.get("rejected_response") is not None:
        if not turns or turns[-1]["role"] != "assistant":
            raise RejectSample(Reason.SCHEMA_INVALID, "`rejected_response` needs a last assistant message to be preferred to it")
        return turns[:-1], turns[-1:], _answer(row["rejected_response"], tags, "rejected_response")
    if row.get("chosen") is not None or row.get("rejected") is not None:
        for key in ("chosen", "rejected"):
            if row.get(key) is None:
                raise RejectSample(Reason.SCHEMA_INVALID, f"{key}: missing; a preference needs `chosen` and `rejected`")
        return turns, _answer(row["chosen"], tags, "chosen"), _answer(row["rejected"], tags, "rejected")
    return None


def _answer(value: object, tags: Tags, place: str) -> Turns:
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}]
    return chat_messages([value] if isinstance(value, OBJECT) else value, tags, place=place)


def _num_shared(first: Turns, second: Turns) -> int:
    pairs = zip(first, second, strict=False)
    return next((number for number, (one, other) in enumerate(pairs) if one != other), min(len(first), len(second)))


def _from_trl(row: Mapping[str, Any], tags: Tags, media: MediaColumns) -> dict[str, Any]:
    """Convert a TRL preference; without `prompt` the two answers start with it, as in TRL's `extract_prompt`."""
    for key in ("chosen", "rejected"):
        if row.get(key) is None:
            raise RejectSample(Reason.SCHEMA_INVALID, f"{key}: missing; a preference needs `chosen` and `rejected`")
    given = [row["chosen"], row["rejected"]]
    if row.get("prompt") is not None:
        prompt = _prompt_turns(row["prompt"], tags)
        chosen, rejected = (_answer(value, tags, key) for key, value in zip(("chosen", "rejected"), given, strict=True))
    elif all(isinstance(value, str) for value in given):
        shared = _shared_text(*given)
        if not shared.strip():
            raise RejectSample(Reason.SCHEMA_INVALID, "no `prompt`, and `chosen` and `rejected` do not start with the same text")
        prompt = [{"role": "user", "content": shared}]
        chosen, rejected = ([{"role": "assistant", "content": value[len(shared) :]}] for value in given)
    else:
        one, other = (_answer(value, tags, key) for key, value in zip(("chosen", "rejected"), given, strict=True))
        number = _num_shared(one, other)
        if number == 0 or number in (len(one), len(other)):
            raise RejectSample(
                Reason.SCHEMA_INVALID,
                f"no `prompt`, and of {len(one)} chosen and {len(other)} rejected messages the first {number} are the same: "
                "expected a shared prompt and then two different answers",
            )
        prompt, chosen, rejected = one[:number], one[number:], other[number:]
    prompt = _with_system(prompt, row.get("system"))
    prompt = place_media(prompt, media, unmarked_in_front=True)
    return _with_tools({"prompt": prompt, "chosen": chosen, "rejected": rejected}, row)


def _shared_text(first: str, second: str) -> str:
    length = next((k for k, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second)))
    return first[: length - 1] if length and first[length - 1] == " " else first[:length]


def _prompt_turns(value: object, tags: Tags) -> Turns:
    return [{"role": "user", "content": value}] if isinstance(value, str) else chat_messages(value, tags, place="prompt")


def _from_prompt(row: Mapping[str, Any], tags: Tags, media: MediaColumns) -> dict[str, Any]:
    """Convert prompt with response or completion; as in TRL only the completion is supervised."""
    prompt = [
        {**turn, "loss": False} if turn["role"] == "assistant" and "loss" not in turn else turn
        for turn in _prompt_turns(row["prompt"], tags)
    ]
    answer = _response(row)
    turns = prompt if answer is None else [*prompt, *_answer(answer, tags, "completion")]
    turns = _with_system(turns, row.get("system"))
    return _with_tools({"messages": place_media(turns, media, unmarked_in_front=True)}, row)


def _from_text(row: Mapping[str, Any], media: MediaColumns) -> dict[str, Any]:
    """Convert a text, with its media where the marks are or in front of it, to a document."""
    if not isinstance(row.get("text"), str):
        raise RejectSample(Reason.SCHEMA_INVALID, f"text: expected a string, got {row.get('text')!r:.80}")
    (turn,) = place_media([{"role": "user", "content": row["text"]}], media, unmarked_in_front=True)
    content = turn["content"]
    return {"parts": [{"text": content}] if isinstance(content, str) else content}


def _with_tools(record: dict[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    tools = tool_list(row.get("tools"))
    return {**record, "tools": tools} if tools else record
