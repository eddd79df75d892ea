"""Rows in every format: any bytes are a record, or rejected in one printable line; any recipe is values, or a `ConfigError`."""

import json
import tempfile
from pathlib import Path

from omniprep.config import parse_config, read_yaml
from omniprep.errors import ConfigError, RejectSample
from omniprep.recipe import Recipe
from omniprep.sources.formats import to_record
from omniprep.sources.jsonl import parse_json

FORMATS = ("auto", "messages", "sharegpt", "swift", "trl", "alpaca", "text")
_RECIPE = Path(tempfile.mkdtemp()) / "recipe.yaml"


def seeds() -> list[bytes]:
    """Return rows of every format, and a recipe."""
    part = {"type": "video", "video": "a.mp4", "fps": 2.0, "min_pixels": 100, "audio_in_video": "on"}
    call = {"id": "c", "function": {"name": "f", "arguments": {"a": 1}}}
    rows: list[object] = [
        {"id": 1, "split": "val", "messages": [{"role": "user", "content": [part, {"text": "?"}]}], "meta": {"a": [1]}},
        {"messages": [{"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": "1"}], "tools": []},
        {"conversations": [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "!"}], "images": ["a.png"]},
        {"conversations": [{"from": "function_call", "value": '{"name": "f", "arguments": {}}'}], "tools": '[{"name": "f"}]'},
        {"query": "a", "response": "b", "history": [["c", "d"]], "rejected_response": "e"},
        {"instruction": "a", "input": "b", "output": "c"},
        {"prompt": "a", "chosen": [{"role": "assistant", "content": "b"}], "rejected": "c"},
        {"chosen": "a b", "rejected": "a c"},
        {"text": "<audio> a", "audios": [{"path": "a.wav", "bytes": None}]},
        {"parts": [{"type": "image_url", "image_url": {"url": "data:,x"}}, {"text": "a", "loss": False}]},
    ]
    recipe = b"output: a\nsources:\n- {name: a, kind: jsonl, path: a.jsonl}\nencode: {max_tokens: 9}\nmedia: {roots: [/a]}\n"
    return [bytes([k % len(FORMATS)]) + json.dumps(row).encode() for k, row in enumerate(rows)] + [b"\xff" + recipe]


def one(data: bytes) -> None:
    """Parse one input: the first byte chooses the format."""
    kind, text = data[:1] or b"\0", data[1:]
    try:
        if kind == b"\xff":
            _RECIPE.write_bytes(text)
            parse_config(Recipe, read_yaml(_RECIPE), place="recipe.yaml")
            return
        value, error = parse_json(text)
        if error is None:
            to_record(value, FORMATS[kind[0] % len(FORMATS)])  # type: ignore[arg-type]
    except ConfigError as error:
        assert str(error).strip()
    except RejectSample as error:
        assert error.detail.isprintable()
        assert len(error.detail) < 5000
