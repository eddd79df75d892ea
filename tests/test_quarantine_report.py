"""The quarantine as others see it: opened by common tools as it lies there, and summed up without their help."""

import json
from pathlib import Path
from typing import Any

import pytest

from omniprep import quarantine_report
from omniprep.errors import DatasetError
from omniprep.prepare import prepare
from omniprep.quarantine_report import describe, pattern_of, summarize
from tests.prepare_builders import chat, recipe, write_media

NUM_MISSING, NUM_ODD = 40, 3


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a dataset with three kinds of rejections, one of media that came inside its row."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tmp_path_factory.mktemp("rejected")
    write_media(folder / "data")
    rows: list[Any] = [chat(number, {"type": "image", "image": f"shots {number}/{number}.png"}) for number in range(NUM_MISSING)]
    rows += [{"messages": [{"role": f"r{number}", "content": "x"}]} for number in range(NUM_ODD)]
    rows += [chat(number) for number in range(5)]
    messages = [{"role": "user", "content": "<image>x"}, {"role": "assistant", "content": "y"}]
    pq.write_table(pa.table({"messages": [messages], "images": [[b"not a picture"]]}), folder / "data" / "inside.parquet")
    sources = [
        {"name": "chat", "kind": "jsonl", "path": "data/chat.jsonl"},
        {"name": "inside", "kind": "parquet", "path": "data/inside.parquet"},
    ]
    prepare(recipe(folder, rows, sources=sources))
    return folder / "out"


def test_counts_and_details_are_summed_up(dataset: Path) -> None:
    report = summarize(str(dataset))
    assert report.num_records == NUM_MISSING + NUM_ODD + 1
    assert report.by_reason == {"media_missing": NUM_MISSING, "role_unknown": NUM_ODD, "media_corrupt": 1}
    assert report.by_stage == {"encode": NUM_MISSING + 1, "parse": NUM_ODD}
    assert report.by_source == {"chat": NUM_MISSING + NUM_ODD, "inside": 1}
    assert [group.count for group in report.groups] == [NUM_MISSING, NUM_ODD, 1]
    largest = report.groups[0]
    assert largest.pattern == "messages.N.content.N: FILE: no such file (looked in data)"
    assert (largest.key, largest.place) == ("chat-00000000", "chat.jsonl:1")


def test_the_text_names_one_of_each(dataset: Path) -> None:
    text = describe(summarize(str(dataset), top=2))
    assert f"{NUM_MISSING}  media_missing  messages.N.content.N: FILE: no such file" in text
    assert "such as chat-00000000 (chat.jsonl:1): messages.0.content.1: shots 0/0.png: no such file" in text
    assert text.endswith("and 1 with other details")


def test_an_unfinished_build_can_be_looked_at(dataset: Path, tmp_path: Path) -> None:
    import shutil

    stopped = tmp_path / "stopped"
    shutil.copytree(dataset, stopped)
    (stopped / "manifest.json").unlink()
    sealed, seen = summarize(str(dataset)), summarize(str(stopped))
    assert seen.model_copy(update={"place": sealed.place}) == sealed


def test_memory_is_bounded_however_many_details_there_are(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quarantine_report, "_MAX_GROUPS", 1)
    monkeypatch.setattr(quarantine_report, "_BATCH_ROWS", 3)
    report = summarize(str(dataset))
    assert (report.num_groups, report.num_ungrouped, report.num_records) == (1, NUM_ODD + 1, NUM_MISSING + NUM_ODD + 1)
    assert f"and {NUM_ODD + 1} with other details" in describe(report)


def test_nothing_rejected_and_nothing_there(tmp_path: Path) -> None:
    prepare(recipe(tmp_path, [chat(0)]))
    assert describe(summarize(str(tmp_path / "out"))).endswith("nothing was rejected")
    with pytest.raises(DatasetError, match="no such folder"):
        summarize(str(tmp_path / "none"))


def test_a_damaged_file_is_named(dataset: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(dataset, copy)
    first = min((copy / "quarantine").glob("*.parquet"))
    first.write_bytes(b"PAR1 no")
    with pytest.raises(DatasetError, match=f"{first.name}: not a readable quarantine file"):
        summarize(str(copy))
    first.unlink()
    with pytest.raises(DatasetError, match=f"{first.name} is missing, though the manifest names it"):
        summarize(str(copy))


def test_details_do_not_command_the_terminal(tmp_path: Path) -> None:
    prepare(recipe(tmp_path, [{"messages": [{"role": "\x1b[2J", "content": "x"}]}]))
    assert "\x1b" not in describe(summarize(str(tmp_path / "out")))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (
            "messages.0.content.1: a/1.png: no such file (looked in /data)",
            "messages.12.content.3: b c/7.jpeg: no such file (looked in /x)",
        ),
        ("https://host/a?x=1: HTTP 404", "https://other/b.png: HTTP 404"),
        ("tokens: none of 12 tokens is supervised", "tokens: none of 1,024 tokens is supervised"),
        ("v.mp4: got 640x3 (width x height); crop", "clips/w.mkv: got 1920x1 (width x height); crop"),
        ("starts with b'\\x89PNG\\r\\n'", "starts with b'RIFF\\'s'"),
    ],
)
def test_details_alike_are_one_group(one: str, other: str) -> None:
    assert pattern_of(one) == pattern_of(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("a.png: no such file", "a.png: the file has no bytes"),
        ("messages.0.role: expected text", "messages.0.content: expected text"),
        ("not valid UTF-8 at byte 3", "not valid UTF-16 at byte 3"),
        ("transcode it, for example to H.264", "transcode it, for example to H.265"),
    ],
)
def test_details_of_different_kinds_stay_apart(one: str, other: str) -> None:
    assert pattern_of(one) != pattern_of(other)


def test_arrow_pandas_and_datasets_open_it_in_one_line(dataset: Path, tmp_path: Path) -> None:
    import pandas
    import pyarrow.dataset
    from datasets import load_dataset

    folder = str(dataset / "quarantine")
    table = pyarrow.dataset.dataset(folder).to_table()
    frame = pandas.read_parquet(folder)
    hub = load_dataset(folder, split="train", cache_dir=str(tmp_path))
    expected = [f"chat-{number:08d}" for number in range(NUM_MISSING + NUM_ODD)] + ["inside-00000000"]
    assert table["key"].to_pylist() == list(frame["key"]) == list(hub["key"]) == expected
    assert json.loads(hub[0]["record"])["id"] == json.loads(frame["record"].iloc[0])["id"] == "id-0"
    assert frame.groupby("reason").size().to_dict() == {"media_corrupt": 1, "media_missing": NUM_MISSING, "role_unknown": NUM_ODD}
    assert [len(blobs) for blobs in frame["blobs"]][-2:] == [0, 1], "the picture that came inside its row is kept beside"
