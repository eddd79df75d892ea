"""Hostile rows: too much of something, absurd numbers, deep nesting, control characters. A reason each, at a bounded cost."""

import json
import tracemalloc
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from omniprep.config import read_yaml
from omniprep.encode.thinker import EncodeConfig, ThinkerEncoder
from omniprep.errors import ConfigError, Reason, RejectSample
from omniprep.records import MAX_FRAMES, MAX_MEDIA, MAX_MESSAGES, MAX_PARTS, MAX_TOOLS
from omniprep.sources.formats import to_record
from omniprep.sources.jsonl import parse_json
from omniprep.sources.media_store import MediaConfig, MediaStore

USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
CALL = {"function": {"name": "f", "arguments": {}}}


@pytest.fixture(scope="module")
def encoder() -> ThinkerEncoder:
    return ThinkerEncoder(EncodeConfig())


def asked(*parts: object) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(parts)}, ANSWER]}


def deep(levels: int) -> object:
    value: object = "x"
    for _ in range(levels):
        value = {"a": value}
    return value


def picture(**keys: object) -> dict[str, Any]:
    return asked({"type": "image", "image": "a.png", **keys})


def frames(**keys: object) -> dict[str, Any]:
    return asked({"type": "video", "video": ["a.png"] * 4, **keys})


def call(text: str) -> dict[str, Any]:
    return {"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": text}]}


def tools(text: str) -> dict[str, Any]:
    return {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "tools": text}


LARGE, INVALID, RANGE, OVER = Reason.RECORD_TOO_LARGE, Reason.SCHEMA_INVALID, Reason.MEDIA_RANGE, Reason.MEDIA_OVER_LIMIT
ROWS: dict[str, tuple[dict[str, Any], Reason | None]] = {
    "messages": ({"messages": [USER, ANSWER] * 200_000}, LARGE),
    "turns of sharegpt": ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}] * 100_000}, LARGE),
    "prompt": ({"prompt": [USER] * (MAX_MESSAGES + 1), "chosen": "a", "rejected": "b"}, LARGE),
    "parts": (asked(*[{"type": "text", "text": "a"}] * 200_000), LARGE),
    "parts of many messages": ({"messages": [{"role": "user", "content": [{"text": "a"}] * 30}] * (MAX_PARTS // 20)}, LARGE),
    "parts of a document": ({"parts": [{"text": "a"}] * (MAX_PARTS + 1)}, LARGE),
    "images": (asked(*[{"type": "image", "image": "a.png"}] * (MAX_MEDIA + 1)), LARGE),
    "images by marks": ({"text": "<image>" * 100_000, "images": ["a.png"] * 100_000}, LARGE),
    "frames": (asked({"type": "video", "video": ["a.png"] * (MAX_FRAMES + 1)}), LARGE),
    "tools": ({"messages": [USER, ANSWER], "tools": [{"function": {}}] * (MAX_TOOLS + 1)}, LARGE),
    "tool calls": ({"messages": [USER, {**ANSWER, "tool_calls": [CALL] * (MAX_TOOLS + 1)}]}, LARGE),
    "unknown keys": ({"messages": [USER], **{f"k{k}": 1 for k in range(50_000)}}, INVALID),
    "deep content": ({"messages": [{"role": "user", "content": deep(900)}]}, INVALID),
    "deep tool call": (call("[" * 100_000), INVALID),
    "deep tools": (tools("[" * 100_000), INVALID),
    "a tool call of digits": (call("9" * 100_000), INVALID),
    "tools of digits": (tools("9" * 100_000), INVALID),
    "NaN in a tool call": (call('{"name": "f", "arguments": {"a": NaN}}'), INVALID),
    "half a surrogate in tools": (tools('[{"name": "\\ud800"}]'), INVALID),
    "half a surrogate in a tool call": (call('{"name": "\\udfff", "arguments": {}}'), INVALID),
    "control characters in text": (
        {"id": "a\0\x1b[2J", "messages": [{"role": "user", "content": "a\0\x1b]0;x\x07\u202e"}, ANSWER]},
        None,
    ),
    "an escape as role": ({"messages": [{"role": "\x1b[2J", "content": "a"}]}, Reason.ROLE_UNKNOWN),
    "an escape as key": ({"messages": [USER], "\x1b[2J\n": 1}, INVALID),
    "an escape as split": ({"messages": [USER], "split": "\x1b[2J"}, INVALID),
    "min_pixels of a terapixel": (picture(min_pixels=10**12, max_pixels=10**12), INVALID),
    "min_pixels of 300 digits": (picture(min_pixels=10**300, max_pixels=10**300), INVALID),
    "max_pixels without end": (picture(max_pixels=1 << 53), None),
    "resized_height of 300 digits": (picture(resized_height=10**300, resized_width=10**300), INVALID),
    "resized_height of a milliard": (picture(resized_height=10**9, resized_width=10**9), None),
    "resized to a line": (picture(resized_height=10**9, resized_width=1), Reason.IMAGE_ASPECT),
    "nframes of 300 digits": (asked({"type": "video", "video": "a.mp4", "nframes": 10**300}), INVALID),
    "frames an age apart": (frames(sample_fps=1e-300), OVER),
    "frames of no time": (frames(sample_fps=1e300), None),
    "fps of a video of frames": (frames(fps=1e300), RANGE),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_hostile_row_is_encoded_or_rejected_with_its_reason(name: str, encoder: ThinkerEncoder, tmp_path: Path) -> None:
    row, expected = ROWS[name]
    Image.fromarray(np.full((40, 60, 3), 90, np.uint8)).save(tmp_path / "a.png")
    resolve = partial(MediaStore(MediaConfig()).resolve, base=str(tmp_path))
    value, error = parse_json(json.dumps(row).encode())
    assert error is None
    try:
        sample = encoder.encode(to_record(value), key="k", resolve=resolve)
    except RejectSample as reject:
        assert reject.reason is expected, reject
        assert reject.detail.isprintable()
        assert len(reject.detail) < 2000
    else:
        assert expected is None
        positions = sample.layouts["tokens"].position_ids
        assert positions.min() >= 0


def test_a_large_record_is_refused_before_anything_is_built_of_it() -> None:
    row = {"messages": [USER, ANSWER] * 500_000}
    tracemalloc.start()
    with pytest.raises(RejectSample, match="1000000 messages"):
        to_record(row)
    peak_mb = tracemalloc.get_traced_memory()[1] >> 20
    tracemalloc.stop()
    assert peak_mb < 20


def test_a_record_at_the_limits_is_taken() -> None:
    record = to_record({"messages": [USER, ANSWER] * (MAX_MESSAGES // 2)})
    assert len(record.messages) == MAX_MESSAGES  # type: ignore[union-attr]
    assert len(to_record({"parts": [{"text": "a"}] * MAX_PARTS}).parts) == MAX_PARTS  # type: ignore[union-attr]


LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{k}: &a{k} [*a{k - 1}, *a{k - 1}]\n" for k in range(1, 40))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (LAUGHS, "aliases"),
        ("a: &a [*a]\n", "alias that holds itself"),
        ("a: &a {b: {c: *a}}\n", "alias that holds itself"),
        ("output: a\noutput: b\n", "twice"),
        ("sources:\n- {name: a, name: b}\n", "twice"),
        ("? [a, b]\n: 1\n", "not valid YAML"),
        ("!!python/object/apply:os.system ['true']\n", "not valid YAML"),
        ("!!python/name:os.system\n", "not valid YAML"),
        ("[" * 5000, "not valid YAML"),
        ("x: " + "a" * (5 << 20), "larger than"),
        ("x: " + "9" * 10_000, "not valid YAML"),
        ("x: 2020-13-45\n", "not valid YAML"),
        ("a: b: c", "not valid YAML"),
        ("\x00", "not valid YAML"),
        ("x: \x1b[2J", "not valid YAML"),
    ],
)
def test_a_hostile_recipe_is_told_in_one_line(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_yaml(path)
    assert told in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000


def test_a_recipe_that_is_no_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"x: caf\xe9")
    for path in (tmp_path, tmp_path / "none.yaml", tmp_path / "latin.yaml", tmp_path / ("x" * 300)):
        with pytest.raises(ConfigError):
            read_yaml(path)


def test_an_alias_may_be_used(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("base: &base {x: 1}\nb: {<<: *base, y: 2}\nc: *base\n")
    assert read_yaml(tmp_path / "a.yaml") == {"base": {"x": 1}, "b": {"x": 1, "y": 2}, "c": {"x": 1}}
    (tmp_path / "empty.yaml").write_text("")
    assert read_yaml(tmp_path / "empty.yaml") is None
