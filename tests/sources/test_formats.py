"""Rows in the shapes that other trainers publish become the records that they mean."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omniprep.errors import Reason, RejectSample
from omniprep.records import Conversation, Document, Preference, Record, parse_record
from omniprep.sources.formats import Columns, detect, to_record
from omniprep.sources.formats_chat import Tags
from omniprep.sources.jsonl import JsonlSource


def same(row: dict[str, Any], native: dict[str, Any], **options: Any) -> None:
    assert to_record(row, **options) == parse_record(native)


def reject(row: object, **options: Any) -> tuple[Reason, str]:
    with pytest.raises(RejectSample) as caught:
        to_record(row, **options)
    return caught.value.reason, caught.value.detail


def user(*content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content[0] if len(content) == 1 and isinstance(content[0], str) else list(content)}


def assistant(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


CALL = {"name": "add", "arguments": {"a": 1}}
CALL_TEXT = '{"name": "add", "arguments": {"a": 1}}'


class TestLlamaFactory:
    def test_marks_take_the_media_in_order_over_all_turns(self) -> None:
        same(
            {
                "messages": [user("<image>Who?"), assistant("They."), user("What?<image>"), assistant("Ball.")],
                "images": ["1.jpg", "2.jpg"],
            },
            {
                "messages": [
                    user({"image": "1.jpg"}, {"text": "Who?"}),
                    assistant("They."),
                    user({"text": "What?"}, {"image": "2.jpg"}),
                    assistant("Ball."),
                ]
            },
        )

    def test_a_video_beside_its_sound_is_silent_and_the_sound_stands_alone(self) -> None:
        same(
            {"messages": [user("<video><audio>What?"), assistant("A.")], "videos": ["4.mp4"], "audios": ["4.mp3"]},
            {
                "messages": [
                    user({"video": "4.mp4", "audio_in_video": "off"}, {"audio": "4.mp3"}, {"text": "What?"}),
                    assistant("A."),
                ]
            },
        )

    def test_use_audio_in_video_makes_the_sound_the_track(self) -> None:
        same(
            {
                "messages": [user("<video><video>and <audio><audio>What?<audio>"), assistant("A.")],
                "videos": ["1.mp4", ["a.png", "b.png"]],
                "audios": ["1.mp3", "2.mp3", "3.mp3"],
            },
            {
                "messages": [
                    user(
                        {"video": "1.mp4", "audio_in_video": "on", "audio_track": "1.mp3"},
                        {"video": ["a.png", "b.png"], "audio_in_video": "on", "audio_track": "2.mp3"},
                        {"text": "and "},
                        {"text": "What?"},
                        {"audio": "3.mp3"},
                    ),
                    assistant("A."),
                ]
            },
            use_audio_in_video=True,
        )

    def test_use_audio_in_video_needs_a_sound_after_each_video(self) -> None:
        row = {"messages": [user("<audio><video>What?")], "videos": ["4.mp4"], "audios": ["4.mp3"]}
        reason, detail = reject(row, use_audio_in_video=True)
        assert reason is Reason.PLACEHOLDER_MISMATCH
        assert detail == "message 0: expected an <audio> mark after each <video> (use_audio_in_video is on)"

    def test_a_video_without_sounds_in_the_row_may_use_its_own_track(self) -> None:
        same(
            {"conversations": [{"from": "human", "value": "<video>"}, {"from": "gpt", "value": "A."}], "videos": "1.mp4"},
            {"messages": [user({"video": "1.mp4"}), assistant("A.")]},
            use_audio_in_video=True,
        )

    def test_tool_turns_and_tools_as_text(self) -> None:
        same(
            {
                "conversations": [
                    {"from": "human", "value": "1+1?"},
                    {"from": "function_call", "value": CALL_TEXT},
                    {"from": "observation", "value": "2"},
                    {"from": "gpt", "value": "Two."},
                ],
                "system": "Be brief.",
                "tools": '[{"name": "add", "parameters": {}}]',
            },
            {
                "messages": [
                    {"role": "system", "content": "Be brief."},
                    user("1+1?"),
                    assistant("", tool_calls=[CALL]),
                    {"role": "tool", "content": "2"},
                    assistant("Two."),
                ],
                "tools": [{"type": "function", "function": {"name": "add", "parameters": {}}}],
            },
        )

    def test_thought_before_a_call_is_its_text_and_parallel_calls_are_one_turn(self) -> None:
        same(
            {
                "conversations": [
                    {"from": "human", "value": "?"},
                    {"from": "function_call", "value": f"<think>hm</think>[{CALL_TEXT}]"},
                ]
            },
            {"messages": [user("?"), assistant("<think>hm</think>", tool_calls=[CALL])]},
        )
        same(
            {"messages": [user("?"), assistant("Wait."), {"role": "tool_call", "content": CALL_TEXT}]},
            {"messages": [user("?"), assistant("Wait.", tool_calls=[CALL])]},
        )

    def test_the_rows_own_system_turn_wins_over_the_column(self) -> None:
        same(
            {"conversations": [{"from": "system", "value": "own"}, {"from": "human", "value": "?"}], "system": "column"},
            {"messages": [{"role": "system", "content": "own"}, user("?")]},
        )

    def test_preference(self) -> None:
        same(
            {
                "conversations": [{"from": "human", "value": "<image>?"}],
                "chosen": {"from": "gpt", "value": "good"},
                "rejected": {"from": "gpt", "value": "bad"},
                "images": ["1.png"],
            },
            {"prompt": [user({"image": "1.png"}, {"text": "?"})], "chosen": "good", "rejected": "bad"},
        )

    def test_alpaca_with_input_system_and_history(self) -> None:
        same(
            {"instruction": "Add", "input": "1 1", "output": "2", "system": "S", "history": [["q", "a"]]},
            {"messages": [{"role": "system", "content": "S"}, user("q"), assistant("a"), user("Add\n1 1"), assistant("2")]},
        )
        same({"instruction": "Hi", "input": "", "output": "Ho"}, {"messages": [user("Hi"), assistant("Ho")]})
        same({"instruction": "Hi", "chosen": "a", "rejected": "b"}, {"prompt": "Hi", "chosen": "a", "rejected": "b"})

    def test_columns_and_tags_of_dataset_info(self) -> None:
        same(
            {"dialog": [{"who": "U", "says": "<image>"}, {"who": "A", "says": "yes"}], "pics": ["1.png"], "key": 4},
            {"messages": [user({"image": "1.png"}), assistant("yes")], "id": "4"},
            columns=Columns(messages="dialog", images="pics", id="key"),
            tags=Tags(role_tag="who", content_tag="says", user_tag="U", assistant_tag="A"),
        )
        same(
            {"q": "Add", "x": "1", "a": "2", "output": "not this"},
            {"messages": [user("Add\n1"), assistant("2")]},
            columns=Columns(prompt="q", query="x", response="a"),
        )
        same({"content": "Once"}, {"text": "Once"}, columns=Columns(text="content"))

    @pytest.mark.parametrize(
        "row", [{"messages": [user("?"), assistant("!")], "label": True}, {"instruction": "?", "output": "!", "kto_tag": False}]
    )
    def test_kto_rows_are_refused_with_a_way_out(self, row: dict[str, Any]) -> None:
        reason, detail = reject(row)
        assert reason is Reason.SCHEMA_INVALID
        assert detail.startswith("a KTO row (one answer with a true or false label) is not supported; give pairs")


class TestSwift:
    def test_query_response_history(self) -> None:
        same(
            {"system": "S", "query": "q2", "response": "a2", "history": [["q1", "a1"]]},
            {"messages": [{"role": "system", "content": "S"}, user("q1"), assistant("a1"), user("q2"), assistant("a2")]},
        )

    def test_media_without_marks_go_in_front_of_the_first_user_turn(self) -> None:
        same(
            {"query": "?", "response": "!", "images": ["1.png", "2.png"], "audios": ["a.wav"]},
            {"messages": [user({"image": "1.png"}, {"image": "2.png"}, {"audio": "a.wav"}, {"text": "?"}), assistant("!")]},
        )

    @pytest.mark.parametrize(
        "rejected",
        [{"rejected_response": "no"}, {"rejected_messages": [user("<image>?"), assistant("no")]}],
    )
    def test_a_rejected_answer_makes_a_preference(self, rejected: dict[str, Any]) -> None:
        same(
            {"messages": [user("<image>?"), assistant("yes")], "images": [{"bytes": b"x", "path": None}], **rejected},
            {"prompt": [user({"image": {"bytes": b"x"}}, {"text": "?"})], "chosen": "yes", "rejected": "no"},
        )

    def test_tool_roles_and_loss_of_a_message(self) -> None:
        same(
            {
                "messages": [
                    user("?"),
                    {"role": "tool_call", "content": CALL_TEXT},
                    {"role": "tool_call", "content": CALL_TEXT},
                    {"role": "tool_response", "content": "2"},
                    {**assistant("Two."), "loss": False},
                ]
            },
            {
                "messages": [
                    user("?"),
                    assistant("", tool_calls=[CALL, CALL]),
                    {"role": "tool", "content": "2"},
                    assistant("Two.", loss=False),
                ]
            },
        )

    def test_grounding_is_refused(self) -> None:
        row = {"messages": [user("<bbox>")], "images": ["a"], "objects": {"bbox": [[1, 2]]}}
        assert reject(row) == (Reason.SCHEMA_INVALID, "column `objects` (ms-swift) is not supported; remove it or the row")


PAIR = {"chosen": [user("?"), assistant("good")], "rejected": [user("?"), assistant("bad")]}
WANTED = {"prompt": "?", "chosen": "good", "rejected": "bad"}


class TestTrl:
    def test_explicit_and_implicit_prompts_mean_the_same(self) -> None:
        same(WANTED, WANTED)
        same(PAIR, WANTED)
        same({"prompt": [user("?")], "chosen": [assistant("good")], "rejected": [assistant("bad")]}, WANTED)

    def test_implicit_prompt_of_strings_is_what_they_share(self) -> None:
        same(
            {"chosen": "The sky is blue.", "rejected": "The sky is green."},
            {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."},
        )

    def test_images_fill_empty_parts_or_go_in_front(self) -> None:
        wanted = {"prompt": [user({"image": "1.png"}, {"text": "?"})], "chosen": "good", "rejected": "bad"}
        same({**WANTED, "images": ["1.png"]}, wanted)
        same({**WANTED, "image": "1.png"}, wanted)
        parts = [{"type": "image"}, {"type": "text", "text": "?"}]
        same({**WANTED, "prompt": [user(*parts)], "images": ["1.png"]}, wanted)

    def test_answers_without_a_shared_prompt_are_refused(self) -> None:
        assert "first 0 are the same" in reject({"chosen": [assistant("a")], "rejected": [assistant("b")]})[1]
        assert "first 2 are the same" in reject({"chosen": PAIR["chosen"], "rejected": PAIR["chosen"]})[1]
        assert "do not start with the same text" in reject({"chosen": "a", "rejected": "b"})[1]
        assert reject({"prompt": "?", "chosen": "a"}, format="trl")[1].startswith("rejected: missing")


class TestText:
    def test_text_is_a_document_with_its_media_at_the_marks_or_in_front(self) -> None:
        same({"text": "Once <image>"}, {"text": "Once <image>"})
        same({"text": "a<image>b", "images": ["1.png"]}, {"parts": [{"text": "a"}, {"image": "1.png"}, {"text": "b"}]})
        same(
            {"text": "hello", "audio": {"path": "a.wav", "bytes": b"x"}},
            {"parts": [{"audio": {"path": "a.wav", "bytes": b"x"}}, {"text": "hello"}]},
        )

    @pytest.mark.parametrize("answer", ["response", "completion", "output"])
    def test_prompt_and_answer_are_a_conversation(self, answer: str) -> None:
        same({"prompt": "?", answer: "!"}, {"messages": [user("?"), assistant("!")]})

    def test_only_the_completion_is_supervised(self) -> None:
        same(
            {"prompt": [user("1"), assistant("2"), user("3")], "completion": [assistant("4")]},
            {"messages": [user("1"), assistant("2", loss=False), user("3"), assistant("4")]},
        )

    def test_a_prompt_alone_is_enough_for_encoding(self) -> None:
        same({"prompt": "?"}, {"messages": [user("?")]})


class TestMarks:
    @pytest.mark.parametrize(
        ("text", "images", "detail"),
        [
            ("<image><image>", ["1.png"], "expected as many <image> marks as entries in `images`; got 2 and 1"),
            ("none", ["1.png"], "expected as many <image> marks as entries in `images`; got 0 and 1"),
            ("<image>", [], "expected as many <image> marks as entries in `images`; got 1 and 0"),
        ],
    )
    def test_counts_must_agree(self, text: str, images: list[str], detail: str) -> None:
        assert reject({"messages": [user(text)], "images": images}) == (Reason.PLACEHOLDER_MISMATCH, detail)

    def test_without_its_column_a_mark_is_text(self) -> None:
        same(
            {"messages": [user("The <video> tag, <image>, <Image>, <image >")], "images": ["1.png"], "videos": None},
            {"messages": [user({"text": "The <video> tag, "}, {"image": "1.png"}, {"text": ", <Image>, <image >"})]},
        )
        same({"messages": [user("The <image> tag")]}, {"messages": [user("The <image> tag")]})

    @given(st.lists(st.sampled_from(["<image>", "<audio>", "<video>", "text ", "<", "image>"]), max_size=12), st.booleans())
    def test_text_and_media_survive_in_order(self, pieces: list[str], paired: bool) -> None:
        text = "".join(pieces)
        names = {kind: [f"{kind}{k}" for k in range(text.count(f"<{kind}>"))] for kind in ("image", "audio", "video")}
        row = {"messages": [user("q"), user(text)], **{f"{kind}s": names[kind] for kind in names if names[kind]}}
        try:
            record = to_record(row, "sharegpt", use_audio_in_video=paired)
        except RejectSample as error:
            assert paired and error.reason is Reason.PLACEHOLDER_MISMATCH
            return
        assert isinstance(record, Conversation)
        shown, seen = "", {kind: [] for kind in names}  # type: ignore[var-annotated]
        for part in record.messages[1].content:
            if part.type == "text":
                shown += part.text
                continue
            shown += f"<{part.type}>"
            seen[part.type].append(getattr(part, part.type))
            if part.type == "video" and part.audio_track is not None:
                seen["audio"].append(part.audio_track)
        assert {kind: sorted(seen[kind]) for kind in seen} == {kind: sorted(names[kind]) for kind in names}
        assert seen["image"] == names["image"]
        assert seen["video"] == names["video"]
        if not any(part.type == "video" and part.audio_track for part in record.messages[1].content):
            assert shown == text


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"messages": [user("?")]}, "messages"),
        ({"messages": [user("?")], "images": None}, "messages"),
        ({"messages": [user("?")], "tools": [{"name": "f"}]}, "messages"),
        ({"messages": [user("?")], "tools": "[]"}, "sharegpt"),
        ({"messages": [{"role": "observation", "content": "?"}]}, "sharegpt"),
        ({"messages": [{"from": "human", "value": "?"}]}, "sharegpt"),
        ({"messages": [user("?")], "rejected_response": "no"}, "swift"),
        ({"conversations": []}, "sharegpt"),
        ({"query": "?"}, "swift"),
        ({"instruction": "?", "chosen": "a", "rejected": "b"}, "alpaca"),
        ({"prompt": "?", "chosen": "a", "rejected": "b"}, "trl"),
        ({"prompt": "?", "chosen": None, "completion": "a"}, "text"),
        ({"parts": []}, "messages"),
        ({"text": "?"}, "text"),
    ],
)
def test_auto_decides_by_the_keys_that_are_not_null(row: dict[str, Any], kind: str) -> None:
    assert detect(row) == kind


def test_a_row_of_no_format_is_told_what_is_known() -> None:
    reason, detail = reject({"caption": "x", "url": "y"})
    assert reason is Reason.SCHEMA_INVALID
    assert "got caption, url; name others with `columns`" in detail
    assert reject([1]) == (Reason.SCHEMA_INVALID, "expected a JSON object, got list")


@pytest.mark.parametrize(
    ("row", "reason", "detail"),
    [
        ({"conversations": [{"from": "robot", "value": "?"}]}, Reason.ROLE_UNKNOWN, "conversations.0: expected one of the roles"),
        ({"conversations": [{"value": "?"}]}, Reason.ROLE_UNKNOWN, "conversations.0: expected one of the roles"),
        ({"conversations": "?"}, Reason.SCHEMA_INVALID, "conversations: expected a list of messages, got '?'"),
        ({"conversations": ["?"]}, Reason.SCHEMA_INVALID, "conversations.0: expected an object, got '?'"),
        ({"conversations": []}, Reason.SCHEMA_INVALID, "messages: expected at least one entry"),
        (
            {"conversations": [{"from": "human", "value": 5}]},
            Reason.SCHEMA_INVALID,
            "messages.0.content: expected a string or a list; got 5",
        ),
        (
            {"conversations": [{"from": "human", "value": "?"}, {"from": "function_call", "value": "add(1)"}]},
            Reason.SCHEMA_INVALID,
            "conversations.1: expected a tool call as JSON text, got 'add(1)'",
        ),
        (
            {"conversations": [{"from": "human", "value": "?"}], "tools": "add"},
            Reason.SCHEMA_INVALID,
            "tools: expected JSON text, got 'add'",
        ),
        (
            {"conversations": [{"from": "human", "value": "?"}], "tools": "[5]"},
            Reason.SCHEMA_INVALID,
            "tools.0: expected an object, got 5",
        ),
        (
            {"conversations": [{"from": "human", "value": "?"}], "tools": ["{"]},
            Reason.SCHEMA_INVALID,
            "tools.0: expected JSON text, got '{'",
        ),
        (
            {"query": True, "images": ["a.png"]},
            Reason.SCHEMA_INVALID,
            "messages.0.content: expected a string or a list; got True",
        ),
        (
            {"messages": [{"role": "assistant", "content": "", "tool_calls": -1}], "images": []},
            Reason.SCHEMA_INVALID,
            "messages.0.tool_calls: expected a list; got -1",
        ),
        (
            {"messages": [user({"type": [], "image": "a"})], "images": []},
            Reason.SCHEMA_INVALID,
            "messages.0.content.0: expected a part with one of the keys",
        ),
        ({"query": "?", "history": [["q"]]}, Reason.SCHEMA_INVALID, "history.0: expected [question, answer], got ['q']"),
        ({"instruction": 5}, Reason.SCHEMA_INVALID, "expected text in `instruction` or `input`"),
        ({"text": 5}, Reason.SCHEMA_INVALID, "text: expected a string, got 5"),
        (
            {"messages": [user("?")], "rejected_response": "no"},
            Reason.SCHEMA_INVALID,
            "`rejected_response` needs a last assistant message",
        ),
        ({"messages": [user("?")], "chosen": "a", "images": []}, Reason.SCHEMA_INVALID, "rejected: missing; a preference needs"),
    ],
)
def test_what_cannot_be_converted_is_told_with_its_place(row: dict[str, Any], reason: Reason, detail: str) -> None:
    given, text = reject(row)
    assert given is reason
    assert text.startswith(detail)
    assert "\n" not in text


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 2)
    | st.sampled_from(["", "<image>", "a", '{"name": "f"}', "[]", "user", "gpt", "tool_call"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["role", "from", "content", "value", "type", "image", "text", "tool_calls", "function", "name", "weight"]
            ),
            inner,
        )
    ),
    max_leaves=10,
)
COLUMNS = [
    "messages",
    "conversations",
    "query",
    "response",
    "history",
    "instruction",
    "input",
    "output",
    "prompt",
    "completion",
    "chosen",
]
COLUMNS += [
    "rejected",
    "rejected_response",
    "rejected_messages",
    "images",
    "videos",
    "audios",
    "image",
    "text",
    "parts",
    "system",
    "tools",
]
COLUMNS += ["label", "meta", "id", "split"]
FORMATS = ["auto", "messages", "sharegpt", "swift", "trl", "alpaca", "text"]


@settings(max_examples=300)
@given(
    row=st.dictionaries(st.sampled_from(COLUMNS), json_values, max_size=5), kind=st.sampled_from(FORMATS), paired=st.booleans()
)
def test_any_json_in_any_format_is_a_record_or_a_one_line_rejection(row: dict[str, Any], kind: Any, paired: bool) -> None:
    try:
        to_record(row, kind, use_audio_in_video=paired, meta_columns=("output",))
    except RejectSample as error:
        assert "\n" not in error.detail


def test_id_split_meta_and_chosen_columns_are_kept() -> None:
    record = to_record(
        {"instruction": "?", "output": "!", "id": 3, "split": "test", "source": "web", "score": 0.5},
        meta_columns=("source", "none"),
    )
    assert (record.id, record.split, record.meta) == ("3", "test", {"source": "web"})
    native = to_record({"messages": [user("?")], "source": "web", "meta": {"a": 1}}, meta_columns=("source",))
    assert native.meta == {"source": "web", "a": 1}
    assert reject({"messages": [user("?")], "source": "web"}) == (Reason.SCHEMA_INVALID, "source: unknown key")


@pytest.mark.media
@pytest.mark.parametrize(
    ("name", "kind", "num_rows"),
    [
        ("mllm_demo.json", Conversation, 6),
        ("mllm_audio_demo.json", Conversation, 3),
        ("mllm_video_demo.json", Conversation, 3),
        ("mllm_video_audio_demo.json", Conversation, 3),
        ("dpo_en_demo.json", Preference, 300),
        ("dpo_zh_demo.json", Preference, 300),
        ("alpaca_en_demo.json", Conversation, 999),
        ("glaive_toolcall_en_demo.json", Conversation, 300),
        ("glaive_toolcall_zh_demo.json", Conversation, 300),
        ("c4_demo.jsonl", Document, 300),
    ],
)
def test_every_row_of_llama_factorys_own_files_converts(samples: Path, name: str, kind: type[Record], num_rows: int) -> None:
    path = samples / "llamafactory" / "data" / name
    if not path.is_file():
        pytest.skip(f"{name} is not among the samples")
    source = JsonlSource(name="s", path=str(path), use_audio_in_video=True)
    records = [source.to_record(row.value) for part in source.partitions(rows_per_partition=64) for row in source.read(part)]
    assert len(records) == num_rows
    assert all(isinstance(record, kind) for record in records)
