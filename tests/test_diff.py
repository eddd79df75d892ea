"""`omniprep diff`: every kind of change is told, none is made up, and memory is bounded."""

import copy
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from omniprep.diff import DatasetDiff, describe, describe_record, diff, diff_record
from omniprep.errors import ConfigError, DatasetError
from omniprep.prepare import prepare
from tests.diff_builders import Row, by_key, write_dataset
from tests.prepare_builders import chat, recipe, write_media

SOUND, PICTURE = {"type": "audio", "audio": "a.wav"}, {"type": "image", "image": "i.png"}
GROUPS = (
    "removed",
    "added",
    "changed",
    "moved",
    "renamed",
    "relabelled",
    "newly_rejected",
    "newly_accepted",
    "other_reason",
)


def build(folder: Path, rows: list[Any], **settings: object) -> str:
    write_media(folder / "data")
    prepare(recipe(folder, rows, **settings))
    return str(folder / "out")


def rows_of_a() -> list[Any]:
    rows: list[Any] = [chat(number) for number in range(9)]
    rows += [chat(9, {"type": "image", "image": "none.png"}), '{"messages": ', chat(11, SOUND), chat(12, PICTURE), chat(13)]
    return rows


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build(tmp_path_factory.mktemp("a"), rows_of_a())


def changed_to(before: str, folder: Path, change: dict[int, Any], **settings: object) -> DatasetDiff:
    """Compare A with a dataset in which some rows are other ones."""
    rows = copy.deepcopy(rows_of_a())
    for number, row in change.items():
        rows[number : number + 1] = [row]
    return diff(before, build(folder, rows, **settings))


def counts(found: DatasetDiff) -> dict[str, int]:
    return {name: group.count for name, group in found.groups if group.count}


def test_one_recipe_on_the_same_rows_gives_equal_datasets(before: str, tmp_path: Path) -> None:
    found = changed_to(before, tmp_path, {})
    assert found.equal
    assert (found.num_same, found.shards.identical, counts(found)) == (12, 4, {})
    assert "are equal: 12 records, 4 shards" in describe(found)


@pytest.mark.parametrize(
    ("number", "row", "group", "what"),
    [
        (2, {**chat(2), "split": "val"}, "moved", "split train -> val"),
        (3, chat(33), "changed", ""),
        (4, {**chat(4), "id": "x"}, "relabelled", "id id-4 -> x"),
        (5, {"messages": [{"role": "odd", "content": "x"}]}, "newly_rejected", "role_unknown: messages.0.role"),
        (9, chat(9, PICTURE), "newly_accepted", "media_missing: messages.0.content.1: none.png: no such file"),
        (10, {"messages": [{"role": "odd", "content": "x"}]}, "other_reason", "reason schema_invalid -> role_unknown"),
    ],
)
def test_one_changed_row_is_told_as_what_it_is(before: str, tmp_path: Path, number: int, row: Any, group: str, what: str) -> None:
    found = changed_to(before, tmp_path, {number: row})
    assert counts(found) == {group: 1}
    assert not found.equal
    (example,) = getattr(found.groups, group).examples
    assert example.key == f"chat-{number:08d}"
    assert example.what.startswith(what) or what in example.what
    assert example.what in describe(found)


def test_rows_at_the_end_are_added_and_removed(before: str, tmp_path: Path) -> None:
    longer = build(tmp_path, [*rows_of_a(), chat(14), {**chat(15), "split": "val"}])
    there, back = diff(before, longer), diff(longer, before)
    assert counts(there) == {"added": 2} and there.groups.added.by == {"train": 1, "val": 1}
    assert counts(back) == {"removed": 2}
    assert there.totals["split val"][1].num_records == 1
    assert (there.shards.only_b, back.shards.only_a) == (1, 1), "the shard of the val split; the last one of train is rewritten"


def test_a_row_put_in_front_renames_the_others(before: str, tmp_path: Path) -> None:
    shifted = build(tmp_path, [chat(99), *rows_of_a()])
    keys = diff(before, shifted)
    assert keys.groups.changed.count, "by key, row 1 of B is compared with row 1 of A"
    for match in ("id", "content"):
        found = diff(before, shifted, match=match)
        assert (found.groups.added.count, found.groups.renamed.count, found.num_same) == (1, 12, 12), match
        assert "changed" not in counts(found)


def test_a_renamed_source_is_found_by_content(before: str, tmp_path: Path) -> None:
    sources = [{"name": "talk", "kind": "jsonl", "path": "data/chat.jsonl"}]
    found = diff(before, build(tmp_path, rows_of_a(), sources=sources))
    assert counts(found) == {"renamed": 12}
    assert found.groups.renamed.examples[0].what == "key chat-00000000 -> talk-00000000"
    assert (found.rejected_and_gone, found.rejected_and_new) == (2, 2)
    assert [line for line in found.recipe if "chat" in line] and found.totals["source talk"][1].num_records == 12


@pytest.mark.parametrize(
    ("row", "number", "parts"),
    [
        (
            {**chat(1), "messages": [*chat(1)["messages"], {"role": "user", "content": "more"}]},
            1,
            ("tokens", "labels", "positions"),
        ),
        ({**chat(1), "meta": {"from": "elsewhere"}}, 1, ("provenance",)),
        (chat(11, {"type": "audio", "audio": "b.wav"}), 11, ("mel", "provenance")),
        (chat(12, {"type": "image", "image": "j.png"}), 12, ("frames", "provenance")),
    ],
    ids=["text", "meta", "sound", "picture"],
)
def test_the_members_tell_what_changed(before: str, tmp_path: Path, row: Any, number: int, parts: tuple[str, ...]) -> None:
    data = tmp_path / "data"
    write_media(data)
    rng = np.random.default_rng(1)
    soundfile.write(data / "b.wav", rng.normal(0, 0.1, 24_000).astype(np.float32), 16_000)
    from PIL import Image

    Image.fromarray(rng.integers(0, 256, (60, 90, 3), np.uint8)).save(data / "j.png")
    found = changed_to(before, tmp_path, {number: row})
    sampled = found.sampled_same if parts == ("provenance",) and not found.groups.relabelled.count else found.sampled_changed
    record = diff_record(before, found.b, f"chat-{number:08d}")
    assert record.parts == parts
    if found.groups.changed.count:
        assert sampled.num_records == 1 and tuple(sampled.parts) == parts


def test_a_masked_answer_changes_labels_alone(tmp_path: Path) -> None:
    plain, masked = chat(0), chat(0)
    plain["messages"] += [{"role": "user", "content": "and?"}, {"role": "assistant", "content": "no"}]
    masked["messages"] = [
        *masked["messages"][:1],
        {"role": "assistant", "content": "answer 0", "loss": False},
        *plain["messages"][2:],
    ]
    a, b = build(tmp_path / "a", [plain]), build(tmp_path / "b", [masked])
    found = diff(a, b)
    assert found.groups.changed.by == {"sizes of tokens": 1}, "fewer supervised tokens"
    assert found.sampled_changed.parts == {"labels": 1}
    text = describe_record(diff_record(a, b, "chat-00000000"))
    assert "-» answer 0" in text and "+  answer 0" in text and "labels: token" in text


def test_the_way_of_counting_positions_is_seen(tmp_path: Path, ffmpeg: str) -> None:
    outputs = []
    for mode in ("aligned", "reference"):
        write_media(tmp_path / mode / "data", ffmpeg)
        video = {"type": "video", "video": "v.mp4", "fps": 3.0}
        prepare(recipe(tmp_path / mode, [chat(0, video), chat(1)], encode={"rope_mode": mode}))
        outputs.append(str(tmp_path / mode / "out"))
    found = diff(*outputs)
    assert found.groups.changed.count == 1 and found.sampled_changed.parts["positions"] == 1
    assert 'rope_mode: "aligned" -> "reference"' in found.versions
    assert "positions: token" in describe_record(diff_record(*outputs, "chat-00000000"))


def test_one_record_is_found_by_key_id_and_in_the_quarantine(before: str, tmp_path: Path) -> None:
    rows = rows_of_a()
    rows[1] = chat(1, {"type": "image", "image": "none.png"})
    other = build(tmp_path, rows)
    assert diff_record(before, other, "id-2").parts == ()
    assert diff_record(before, other, "chat-00000002").equal
    rejected = diff_record(before, other, "chat-00000001")
    assert rejected.state_a.startswith("stored: train-chat-00000.tar") and rejected.state_b.startswith(
        "rejected: media_missing: chat.jsonl:2:"
    )
    assert not rejected.equal and "not there" in describe_record(diff_record(before, build(tmp_path / "one", [chat(0)]), "id-13"))
    with pytest.raises(ConfigError, match=r"neither .* has a record with the key or id 'nobody'"):
        diff_record(before, other, "nobody")


def test_what_a_record_says_cannot_command_a_terminal(tmp_path: Path) -> None:
    a, b = (
        build(tmp_path / name, [{**chat(0, {"type": "text", "text": f"\x1b[2J{name}"}), "id": f"\x1b]0;{name}"}]) for name in "ab"
    )
    shown = describe(diff(a, b)) + describe_record(diff_record(a, b, "chat-00000000"))
    assert "\x1b" not in shown and "\\x1b[2Jb" in shown and "\\x1b]0;b" in shown


def test_a_damaged_dataset_is_told_in_one_line(before: str, tmp_path: Path) -> None:
    other = Path(build(tmp_path, [chat(99), *rows_of_a()]))
    index = other / "train-chat-00001.parquet"
    index.write_bytes(b"no")
    with pytest.raises(DatasetError, match=rf"{index.name}: not a readable Parquet file: .*see `omniprep verify`"):
        diff(before, str(other))
    index.unlink()
    with pytest.raises(DatasetError, match=rf"{index.name}: .*No such file .*see `omniprep verify`"):
        diff(before, str(other))
    with pytest.raises(ConfigError, match="no dataset"):
        diff(before, str(tmp_path / "data"))


def test_datasets_at_urls_are_compared(before: str, tmp_path: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    url = f"memory://{tmp_path.name}/out"
    memory.put(build(tmp_path, [*rows_of_a(), chat(14)]), url, recursive=True)
    try:
        found = diff(before, url)
        assert counts(found) == {"added": 1} and found.sampled_same.num_records == 2
        assert diff_record(before, url, "chat-00000011").parts == ()
    finally:
        memory.rm(url, recursive=True)


def test_the_exit_code_says_whether_they_differ(before: str, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from omniprep.cli import app

    longer = build(tmp_path, [*rows_of_a(), chat(14)])

    def code(*arguments: str) -> int:
        result = CliRunner().invoke(app, ["diff", *arguments])
        assert result.exception is None or isinstance(result.exception, SystemExit)
        return result.exit_code

    assert (code(before, before), code(before, before, "--key", "id-2"), code(before, longer, "--key", "id-2")) == (0, 0, 0)
    assert (code(before, longer), code(before, longer, "--json"), code(before, longer, "--key", "id-14")) == (1, 1, 1)
    assert (code(before, str(tmp_path / "none")), code(before, longer, "--key", "nobody"), code(before)) == (2, 2, 2)


def test_the_comparison_is_plain_json(before: str, tmp_path: Path) -> None:
    found = changed_to(before, tmp_path, {3: chat(33), 5: "{"})
    values = json.loads(found.model_dump_json())
    assert values["groups"]["changed"]["count"] == 1 and values["equal"] is False
    assert values["groups"]["newly_rejected"]["examples"][0]["key"] == "chat-00000005"


ROWS = st.lists(
    st.builds(
        Row,
        key=st.sampled_from([f"chat-{number:08d}" for number in range(24)]),
        content=st.sampled_from("abcdef"),
        id=st.sampled_from(["", "x", "y"]),
        split=st.sampled_from(["train", "val"]),
        json_bytes=st.sampled_from([400, 401]),
    ),
    max_size=20,
    unique_by=lambda row: row.key,
)


@given(a=ROWS, b=ROWS, bucket_rows=st.sampled_from([1, 3, 1000]))
@settings(max_examples=60)
def test_the_join_agrees_with_a_row_by_row_comparison(a: list[Row], b: list[Row], bucket_rows: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        places = [write_dataset(Path(folder) / name, rows) for name, rows in (("a", a), ("b", b))]
        found = diff(*places, num_sampled=0, bucket_rows=bucket_rows)
    assert counts(found) | ({"num_same": found.num_same} if found.num_same else {}) == by_key(a, b)
    assert found.equal == (a == b)


@given(a=ROWS, b=ROWS, match=st.sampled_from(["id", "content"]))
@settings(max_examples=40)
def test_every_record_is_accounted_for_however_they_are_matched(a: list[Row], b: list[Row], match: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        places = [write_dataset(Path(folder) / name, rows) for name, rows in (("a", a), ("b", b))]
        found = diff(*places, num_sampled=0, match=match, bucket_rows=4)
    in_both = found.num_same + found.groups.changed.count
    assert found.groups.removed.count + in_both == len(a)
    assert found.groups.added.count + in_both == len(b)
    if match == "content":
        assert not found.groups.changed.count
        shared = sum(min(sum(row.content == one for row in side) for side in (a, b)) for one in "abcdef")
        assert found.num_same == shared


def test_examples_are_bounded_and_the_first_by_key(tmp_path: Path) -> None:
    rows = [Row(key=f"chat-{number:08d}", content=str(number)) for number in range(50)]
    places = [write_dataset(tmp_path / "a", rows), write_dataset(tmp_path / "b", [])]
    found = diff(*places, num_sampled=0, bucket_rows=7, limit=3).groups.removed
    assert found.count == 50 and [example.key for example in found.examples] == [row.key for row in rows[:3]]


def test_buckets_leave_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    rows = [Row(key=f"chat-{number:08d}", content=str(number)) for number in range(50)]
    other = [Row(key=row.key, content=row.content + "x") for row in rows]
    places = [write_dataset(tmp_path / "a", rows), write_dataset(tmp_path / "b", other)]
    assert diff(*places, num_sampled=0, bucket_rows=7).groups.changed.count == 50
    assert not list((tmp_path / "tmp").iterdir())
