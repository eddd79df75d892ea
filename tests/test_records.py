"""A record is checked once; what is wrong with it is told in one line that names the place."""

import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omniprep.errors import Reason, RejectSample
from omniprep.records import (
    AudioPart,
    Conversation,
    Document,
    ImagePart,
    MediaBlob,
    Preference,
    TextPart,
    VideoPart,
    parse_record,
)


def turn(content: Any, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content, **more}]}


def reject(row: object) -> RejectSample:
    with pytest.raises(RejectSample) as caught:
        parse_record(row)
    return caught.value


def part_of(part: dict[str, Any]) -> Any:
    record = parse_record(turn([part]))
    assert isinstance(record, Conversation)
    return record.messages[0].content[0]


@pytest.mark.parametrize(
    ("row", "detail"),
    [
        (5, "expected a JSON object, got int"),
        ({}, "expected one of the keys messages, prompt, parts, text; got no keys"),
        ({"foo": 1}, "expected one of the keys messages, prompt, parts, text; got foo"),
        ({"messages": 5}, "messages: expected a list; got 5"),
        ({"messages": []}, "messages: expected at least one entry"),
        ({"messages": [5]}, "messages.0: expected an object; got 5"),
        ({"messages": [{"content": "x"}]}, "messages.0.role: this key is missing"),
        ({"messages": [{"role": "user"}]}, "messages.0.content: this key is missing"),
        (turn(5), "messages.0.content: expected a string or a list; got 5"),
        (turn([5]), "messages.0.content.0: expected an object; got 5"),
        (
            turn([{"foo": 1}]),
            "messages.0.content.0: expected a part with one of the keys text, image, audio, video; got {'foo': 1}",
        ),
        (turn([{"text": 5}]), "messages.0.content.0.text: expected a string; got 5"),
        (turn([{"type": "image"}]), "messages.0.content.0.image: this key is missing"),
        (turn([{"image": 12}]), "messages.0.content.0.image: expected a string or an object; got 12"),
        (turn([{"image": ""}]), "messages.0.content.0.image: expected a string that is not empty"),
        (turn([{"image": {}}]), "messages.0.content.0.image: expected `path` or `bytes`, both are null"),
        (turn([{"image": {"url": "x"}}]), "messages.0.content.0.image.url: unknown key"),
        (turn([{"image": {"bytes": "x"}}]), "messages.0.content.0.image.bytes: expected bytes; got 'x'"),
        (turn([{"image": b"raw"}]), "messages.0.content.0.image: expected a string or an object; got b'raw'"),
        (turn([{"image": "a", "Foo-Bar": 1}]), "messages.0.content.0.Foo-Bar: unknown key"),
        (turn([{"video": []}]), "messages.0.content.0.video: expected at least one entry"),
        (turn([{"video": ["a", 5]}]), "messages.0.content.0.video.1: expected a string or an object; got 5"),
        (turn([{"video": "a", "fps": -1}]), "messages.0.content.0.fps: expected a value greater than 0; got -1"),
        (turn([{"video": "a", "fps": "fast"}]), "messages.0.content.0.fps: expected a number; got 'fast'"),
        (turn([{"video": "a", "nframes": 2.5}]), "messages.0.content.0.nframes: expected a whole number; got 2.5"),
        (turn([{"video": "a", "fps": 2, "nframes": 3}]), "messages.0.content.0: give `fps` or `nframes`, not both"),
        (
            turn([{"video": "a", "sample_fps": 2}]),
            "messages.0.content.0: `sample_fps` belongs to frames made ready (a list of images or an .npy), not to a video file",
        ),
        (
            turn([{"video": "a", "audio_in_video": "yes"}]),
            "messages.0.content.0.audio_in_video: expected 'auto', 'on' or 'off'; got 'yes'",
        ),
        (
            turn([{"audio": "a", "audio_start": float("nan")}]),
            "messages.0.content.0.audio_start: expected a finite number; got nan",
        ),
        (
            turn("x", tool_calls=[{"name": "f"}]),
            "messages.0: `tool_calls` belong to an assistant message, not to role 'user'",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": 5}]}]},
            "messages.0.tool_calls.0.function.arguments: expected an object or a string; got 5",
        ),
        ({**turn("x"), "foo": 1}, "foo: unknown key"),
        ({**turn("x"), "meta": 5}, "meta: expected an object; got 5"),
        ({"prompt": "a", "chosen": "b"}, "rejected: this key is missing"),
        ({"prompt": 5, "chosen": "b", "rejected": "c"}, "prompt: expected a string or a list; got 5"),
        (
            {"prompt": "a", "chosen": [{"role": "assistant", "content": [{"image": "a"}]}], "rejected": "c"},
            "record: `chosen` holds media; media belong to `prompt`, which both answers share",
        ),
        ({"text": 5}, "parts.0.text: expected a string; got 5"),
        (
            {**turn([{"image": 3}]), "foo": 3, "bar": 4},
            "messages.0.content.0.image: expected a string or an object; got 3 (and 2 more)",
        ),
    ],
)
def test_what_is_wrong_is_told_in_one_line_with_its_place(row: object, detail: str) -> None:
    error = reject(row)
    assert (error.reason, error.detail) == (Reason.SCHEMA_INVALID, detail)


@pytest.mark.parametrize("role", ["robot", "", 5, None, ["user"]])
def test_an_unknown_role_has_its_own_reason(role: object) -> None:
    error = reject({"messages": [{"role": "user", "content": "x"}, {"role": role, "content": "x"}]})
    expected = f"messages.1.role: expected one of system, user, assistant, tool; got {role!r}"
    assert (error.reason, error.detail) == (Reason.ROLE_UNKNOWN, expected)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["messages", "role", "content", "text", "image", "video", "type", "parts", "x"]), inner)
    ),
    max_leaves=12,
)


@given(row=st.dictionaries(st.sampled_from(["messages", "prompt", "chosen", "rejected", "text", "parts", "id"]), json_values))
def test_any_json_is_a_record_or_a_one_line_rejection(row: dict[str, Any]) -> None:
    try:
        parse_record(row)
    except RejectSample as error:
        assert error.reason in (Reason.SCHEMA_INVALID, Reason.ROLE_UNKNOWN)
        assert "\n" not in error.detail
        assert not any(word in error.detail for word in ("Input should", "_type", "tuple", "MediaBlob", "constrained"))


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ({"text": "a"}, TextPart(text="a")),
        ({"image": "a.png"}, ImagePart(image="a.png")),
        ({"type": "image", "image": "a.png", "text": None}, ImagePart(image="a.png")),
        ({"type": "image_url", "image_url": {"url": "a.png"}}, ImagePart(image="a.png")),
        ({"image_url": "a.png", "max_pixels": 9}, ImagePart(image="a.png", max_pixels=9)),
        ({"type": "audio", "url": "a.wav"}, AudioPart(audio="a.wav")),
        ({"type": "video", "path": "a.mp4"}, VideoPart(video="a.mp4")),
        ({"audio": {"path": None, "bytes": b"x"}}, AudioPart(audio=MediaBlob(bytes=b"x"))),
        ({"video": ["1.png", "2.png"], "sample_fps": 2}, VideoPart(video=("1.png", "2.png"), sample_fps=2.0)),
        ({"video": "a.mp4", "audio_track": "a.mp3"}, VideoPart(video="a.mp4", audio_track="a.mp3")),
    ],
)
def test_every_spelling_of_a_part_gives_the_same_part(part: dict[str, Any], expected: object) -> None:
    assert part_of(part) == expected


@pytest.mark.parametrize(
    ("video", "ready"),
    [("a.mp4", False), ("a.NPY", True), (["a.png"], True), ({"path": "a.npy"}, True), ({"bytes": b"x"}, False)],
)
def test_frames_made_ready_are_a_list_or_an_npy(video: object, ready: bool) -> None:
    assert part_of({"video": video}).frames_ready is ready


def test_plain_text_is_short_for_one_message_or_part() -> None:
    preference = parse_record({"prompt": "a", "chosen": "b", "rejected": {"role": "assistant", "content": "c"}})
    assert isinstance(preference, Preference)
    assert [m[0].role for m in (preference.prompt, preference.chosen, preference.rejected)] == ["user", "assistant", "assistant"]
    assert parse_record({"text": "a"}) == Document(parts=(TextPart(text="a"),))


def test_null_keys_of_a_table_are_absent_but_meta_is_kept_whole() -> None:
    row = {
        "messages": [{"role": "user", "content": [{"text": "a", "image": None, "audio": None}], "loss": None}],
        "tools": None,
        "meta": {"kept": None},
    }
    record = parse_record(row)
    assert isinstance(record, Conversation)
    assert record.messages[0].content == (TextPart(text="a"),)
    assert record.meta == {"kept": None}


def test_a_whole_number_is_an_id() -> None:
    assert parse_record({"id": 7, "text": "a"}).id == "7"


def test_records_and_rejections_cross_process_borders() -> None:
    record = parse_record(turn([{"image": "a.png"}, {"text": "b"}]))
    assert pickle.loads(pickle.dumps(record)) == record
    error = reject(5).at("a.jsonl:3")
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.reason, copy.detail, copy.retryable) == (error.reason, error.detail, error.retryable)


def test_records_cannot_be_changed() -> None:
    record = parse_record({"text": "a"})
    with pytest.raises(ValueError, match="frozen"):
        record.id = "b"  # type: ignore[misc]
