"""A second build does what changed and nothing else."""

import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from omniprep import prepare as module
from omniprep import seal
from omniprep.encode import media_items
from omniprep.errors import ConfigError, DatasetError
from omniprep.prepare import plan_jobs, prepare
from omniprep.prepare_partition import prepare_partition
from omniprep.probe import choose_rows
from omniprep.receipts import Claim, is_output, read_claim
from omniprep.shards.reader import iter_samples
from omniprep.sources import huggingface
from omniprep.storage.folder import open_folder
from omniprep.verify import verify
from tests.prepare_builders import chat, recipe, tree, write_media, write_recipe, write_rows
from tests.s3_server import S3, s3

__all__ = ["s3"]

TEXT = [chat(number) for number in range(10)]
RUN = {"rows_per_partition": 4, "executor": "serial", "guard": {"enabled": False}}
ONE = {"name": "one", "kind": "jsonl", "path": "data/chat.jsonl"}
TWO = {"name": "two", "kind": "jsonl", "path": "data/two.jsonl"}


@pytest.fixture
def done_again(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the partitions that are done from now on; the test may clear it."""
    stems: list[str] = []

    def noted(worker, job):
        stems.append(job.stem)
        return prepare_partition(worker, job)

    monkeypatch.setattr(module, "prepare_partition", noted)
    return stems


def test_an_update_touches_only_the_source_whose_options_changed(tmp_path: Path, done_again: list[str]) -> None:
    write_rows(tmp_path / "data/two.jsonl", TEXT[:3])
    prepare(recipe(tmp_path, TEXT, sources=[ONE, TWO]))
    done_again.clear()
    changed = recipe(tmp_path, TEXT, sources=[ONE, {**TWO, "split": "val"}])
    with pytest.raises(ConfigError, match=r"another recipe \(sources\.1\.split: null -> \"val\"\).*--update"):
        prepare(changed)
    manifest = prepare(changed, mode="update")
    assert done_again == ["two-00000"]
    assert sorted(manifest.by_split) == ["train", "val"]
    assert manifest.recipe["sources"][1]["split"] == "val"
    assert list(verify(tmp_path / "out")) == []


def test_a_new_source_and_more_rows_leave_the_rest_as_it_is(tmp_path: Path, done_again: list[str]) -> None:
    write_rows(tmp_path / "data/two.jsonl", TEXT[:3])
    prepare(recipe(tmp_path, TEXT, sources=[ONE]))
    done_again.clear()
    prepare(recipe(tmp_path, TEXT, sources=[TWO, ONE]), mode="update")
    assert done_again == ["two-00000"], "the new one, although it comes first"
    done_again.clear()
    prepare(recipe(tmp_path, [*TEXT, *TEXT], sources=[TWO, ONE]))
    assert done_again == ["one-00002", "one-00003", "one-00004"], "the last partition was not full"
    shutil.rmtree(tmp_path / "other", ignore_errors=True)
    prepare(recipe(tmp_path, [*TEXT, *TEXT], sources=[TWO, ONE], output=str(tmp_path / "other")))
    assert tree(tmp_path / "other") == tree(tmp_path / "out"), "the bytes of a build from nothing"


def test_a_source_that_is_gone_takes_its_files_along(tmp_path: Path) -> None:
    write_rows(tmp_path / "data/two.jsonl", [*TEXT[:3], "{"])
    prepare(recipe(tmp_path, TEXT, sources=[ONE, TWO]))
    mine = tmp_path / "out" / "backup-20260101.tar"
    mine.write_bytes(b"a user's own")
    manifest = prepare(recipe(tmp_path, TEXT, sources=[ONE]), mode="update")
    assert manifest.rejects == {}
    assert {path.name for path in (tmp_path / "out").rglob("*two*")} == set()
    assert mine.exists()
    assert [str(found).split(":")[0] for found in verify(tmp_path / "out")] == ["backup-20260101.tar"]


def test_limits_and_paths_choose_rows_and_do_not_change_them(tmp_path: Path, done_again: list[str]) -> None:
    prepare(recipe(tmp_path, TEXT, sources=[{**ONE, "limit": 8}]))
    done_again.clear()
    write_rows(tmp_path / "data/chats.jsonl", TEXT[:2])
    more = {**ONE, "path": ["data/chat.jsonl", "data/chats.jsonl"]}
    assert prepare(recipe(tmp_path, TEXT, sources=[more]), mode="update").num_rows == 12
    assert done_again == ["one-00002"]


def test_only_partitions_that_name_a_changed_file_are_done_again(tmp_path: Path, done_again: list[str]) -> None:
    write_media(tmp_path / "data")
    shutil.copy(tmp_path / "data/i.png", tmp_path / "data/j.png")
    rows = [*TEXT[:4], chat(4, {"image": "i.png"}), *TEXT[5:8], chat(8, {"image": "j.png"})]
    made = recipe(tmp_path, rows)
    first = prepare(made)
    done_again.clear()
    os.utime(tmp_path / "data/i.png")
    assert prepare(made) == first
    assert done_again == [], "another time, the same content"
    write_media(tmp_path / "data")
    assert prepare(made) == first
    assert done_again == [], "written again with the same bytes"
    from PIL import Image

    Image.new("RGB", (90, 60), "red").save(tmp_path / "data/i.png")
    changed = prepare(made)
    assert done_again == ["chat-00001"]
    assert changed != first
    done_again.clear()
    (tmp_path / "data/j.png").unlink()
    assert prepare(made).rejects == {"media_missing": 1}
    assert done_again == ["chat-00002"]
    done_again.clear()
    Image.new("RGB", (90, 60), "blue").save(tmp_path / "data/i.png")
    unchecked = recipe(tmp_path, rows, run={**RUN, "check_media": False})
    prepare(unchecked)
    assert done_again == []


def test_rows_inside_a_container_are_compared_by_content_when_its_time_changed(tmp_path: Path, done_again: list[str]) -> None:
    table = pa.table({"messages": [row["messages"][1:] for row in TEXT], "prompt": ["a" * 50] * 10})
    path = tmp_path / "data" / "rows.parquet"
    source = {"name": "rows", "kind": "parquet", "path": "data/rows.parquet"}
    made = recipe(tmp_path, TEXT, sources=[source])
    pq.write_table(table, path, compression="none", use_dictionary=False, write_statistics=False, row_group_size=4)
    first = prepare(made)
    done_again.clear()
    os.utime(path)
    assert prepare(made) == first
    assert done_again == []
    data = path.read_bytes()
    at = data.index(b"answer 9")
    path.write_bytes(data[:at] + b"ANSWER 9" + data[at + 8 :])  # the footer, and so the plan, stays as it was
    assert prepare(made).num_rows == first.num_rows
    assert done_again == ["rows-00002"]


def test_an_unusable_file_that_was_mended_is_noticed(tmp_path: Path, done_again: list[str]) -> None:
    write_media(tmp_path / "data")
    made = recipe(tmp_path, [*TEXT[:4], chat(4, {"image": "empty.png"})])
    assert prepare(made).rejects == {"media_empty": 1}
    shutil.copy(tmp_path / "data/i.png", tmp_path / "data/empty.png")
    done_again.clear()
    assert prepare(made).rejects == {}
    assert done_again == ["chat-00001"]


def test_equal_rows_in_another_folder_name_other_media(tmp_path: Path, done_again: list[str]) -> None:
    rows = [*TEXT[:4], chat(4, {"image": "i.png"})]
    output = str(tmp_path / "out")
    write_media(tmp_path / "a/data")
    prepare(recipe(tmp_path / "a", rows, output=output))
    write_media(tmp_path / "b/data")
    from PIL import Image

    Image.new("RGB", (90, 60), "red").save(tmp_path / "b/data/i.png")
    done_again.clear()
    moved = prepare(recipe(tmp_path / "b", rows, output=output))
    assert done_again == ["chat-00001"], "the rows of text are the same wherever they lie"
    assert moved == prepare(recipe(tmp_path / "b", rows))


def test_other_content_of_a_file_that_datasets_loads_is_noticed(tmp_path: Path, done_again: list[str], monkeypatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "kept"))
    source = {"name": "rows", "kind": "huggingface", "path": "json", "data_files": ["data/chat.jsonl"]}
    rows = [{"messages": chat(number)["messages"][1:], "prompt": "a"} for number in range(6)]
    first = prepare(recipe(tmp_path, rows, sources=[source]))
    huggingface._load.cache_clear()
    done_again.clear()
    assert prepare(recipe(tmp_path, rows, sources=[source])) == first
    assert done_again == []
    rows[5]["messages"][0]["content"] = "ANSWER 5"
    huggingface._load.cache_clear()  # as a new process has it
    prepare(recipe(tmp_path, rows, sources=[source]))
    assert done_again == ["rows-00001"]


@pytest.mark.parametrize("change", [{"sources": [ONE]}, {"sources": [{**ONE, "limit": 4}, TWO]}])
def test_a_manifest_never_names_what_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict) -> None:
    write_rows(tmp_path / "data/two.jsonl", TEXT[:3])
    prepare(recipe(tmp_path, TEXT, sources=[ONE, TWO]))
    smaller = recipe(tmp_path, TEXT, **change)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(seal, "_add_up", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        prepare(smaller, mode="update")
    assert list(verify(tmp_path / "out")) == [], "there was nothing to do but to seal: until then the old manifest holds"
    assert prepare(smaller).num_rows < 13
    assert list(verify(tmp_path / "out")) == []


def test_a_build_never_reads_what_it_wrote(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a", "b"]}), write_rows(tmp_path / "data/chat.jsonl", TEXT).with_name("a.parquet"))
    source = {"name": "rows", "kind": "parquet", "path": "data/**/*.parquet"}
    made = recipe(tmp_path, TEXT, sources=[source], output=str(tmp_path / "data/out"))
    assert prepare(made).num_rows == 2
    with pytest.raises(ConfigError, match=r"\.parquet: matched by a source's path, but it lies in the output .*data/out; choose"):
        prepare(made)
    cached = recipe(tmp_path, TEXT, run={**RUN, "media_cache": str(tmp_path / "out/cache")})
    with pytest.raises(ConfigError, match=r"run\.media_cache .*/out/cache: lies in the output"):
        prepare(cached)


def test_a_cache_that_cannot_be_written_is_told_of_and_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    assert prepare(recipe(tmp_path, TEXT, run={**RUN, "media_cache": str(tmp_path / "file/cache")})).num_rows == 10
    assert [record.getMessage().split(": ")[:2] for record in caplog.records] == [
        ["run.media_cache", "nothing new is kept there"]
    ]
    caplog.clear()
    prepare(recipe(tmp_path, TEXT, run={**RUN, "media_cache": str(tmp_path / "cache")}))
    assert caplog.records == []
    assert list((tmp_path / "cache").iterdir()) == []


def test_large_rows_that_are_all_rejected_make_small_partitions(tmp_path: Path) -> None:
    run = {"executor": "serial", "guard": {"enabled": False}}
    small = recipe(tmp_path / "small", ["{"] * 50, run=run).located()
    large = recipe(tmp_path / "large", ["{" + "x" * 10_000_000] * 5, run=run).located()
    assert choose_rows(small, 0) == 1000
    assert choose_rows(large, 0) == 20


def test_rows_at_a_url_are_compared_by_content_when_its_etag_changed(tmp_path: Path, s3: S3, done_again: list[str]) -> None:
    def put(answer: str) -> None:
        """Write a tar whose headers, all that planning reads, do not depend on what the rows say."""
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w") as archive:
            for number in range(6):
                row = {"text": answer if number == 5 else "same"}
                data = json.dumps(row).encode()
                info = tarfile.TarInfo(f"{number}.json")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
        s3.put("data/rows.tar", file.getvalue())

    made = recipe(tmp_path, TEXT, sources=[{"name": "rows", "kind": "webdataset", "path": f"{s3.url}/data/rows.tar"}])
    put("that")
    first = prepare(made)
    done_again.clear()
    assert prepare(made) == first
    assert done_again == []
    put("this")
    assert prepare(made) != first
    assert done_again == ["rows-00001"]


def test_a_size_chosen_once_stays(tmp_path: Path) -> None:
    auto = {"executor": "serial", "guard": {"enabled": False}}
    made = recipe(tmp_path, TEXT * 30, run=auto)
    prepare(made)
    claim = read_claim(open_folder(made.output))
    assert claim is not None and list(claim.rows_per_partition) == ["chat"]
    jobs = plan_jobs(made.located(), claim)
    write_rows(tmp_path / "data/chat.jsonl", TEXT * 300)
    assert plan_jobs(made.located(), claim)[0] == jobs[0] if len(jobs) > 1 else True
    assert {job.rows_per_partition for job in plan_jobs(made.located(), Claim(recipe={}, rows_per_partition={"chat": 7}))} == {7}


def test_a_change_of_text_decodes_no_media_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_media(tmp_path / "data")
    rows = [chat(0, {"image": "i.png"}), chat(1, {"audio": "a.wav"}), *TEXT[2:]]
    run = {**RUN, "media_cache": str(tmp_path / "cache")}
    prepare(recipe(tmp_path, rows, run=run))
    plain = recipe(tmp_path, rows, output=str(tmp_path / "plain"), encode={"template": {"system_prompt": "Be kind."}})
    prepare(plain)
    for name in ("decode_image", "decode_audio"):
        monkeypatch.setattr(media_items, name, lambda *_args, **_more: pytest.fail("a medium was decoded again"))
    kind = recipe(tmp_path, rows, run=run, encode={"template": {"system_prompt": "Be kind."}})
    prepare(kind, mode="update")
    assert tree(tmp_path / "plain") == tree(tmp_path / "out"), "with a cache and without: the same bytes"
    assert any("Be kind" in json.dumps(row) for row in [kind.identity()])
    assert len(list(iter_samples(tmp_path / "out"))) == 10


def test_a_hopeless_run_stops_as_soon_as_that_is_certain(tmp_path: Path, done_again: list[str]) -> None:
    rows = ["{"] * 400
    made = recipe(tmp_path, rows, run={**RUN, "rows_per_partition": 20, "max_reject_rate": 0.1})
    with pytest.raises(DatasetError, match=r"60 of 400 records are rejected \(schema_invalid: 60\), more than .*=0\.1; stopped"):
        prepare(made)
    assert len(done_again) == 3
    default = recipe(tmp_path, rows, run={**RUN, "rows_per_partition": 20})
    with pytest.raises(DatasetError, match=r"220 of 400 records are rejected"):
        prepare(default)
    assert prepare(recipe(tmp_path, rows, run={**RUN, "rows_per_partition": 20, "max_reject_rate": 1.0})).num_rows == 400


def test_names_of_outputs() -> None:
    for name in ("train-chat-00003.tar", "a_b-x-y-00003-01.parquet", "quarantine/chat-00003-r2.parquet", "receipts/c-12345.json"):
        assert is_output(name), name
    for name in (
        "manifest.json",
        "train-00003.tar",
        "notes.parquet",
        "receipts/lock",
        "receipts/hotel.json",
        "x/train-c-00003.tar",
    ):
        assert not is_output(name), name


def test_the_recipe_file_is_where_it_was(tmp_path: Path) -> None:
    """`prepare` must not write beside the recipe."""
    path = write_recipe(tmp_path, TEXT)
    before = sorted(tmp_path.iterdir())
    prepare(recipe(tmp_path, TEXT))
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "out"])
    assert path.exists()


def test_nothing_is_sealed_whose_files_are_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def thieving(worker, job):
        receipt = prepare_partition(worker, job)
        if job.partition.index == 2:
            (tmp_path / "out" / "train-chat-00000.tar").unlink()
        return receipt

    monkeypatch.setattr(module, "prepare_partition", thieving)
    made = recipe(tmp_path, TEXT)
    with pytest.raises(DatasetError, match=r"files of 1 finished partitions are gone \(chat-00000\).*run the same command again"):
        prepare(made)
    monkeypatch.undo()
    assert prepare(made).num_rows == 10
    assert list(verify(tmp_path / "out")) == []


def test_a_stopped_build_asks_again_for_what_a_network_did_not_give(tmp_path: Path, done_again: list[str], monkeypatch) -> None:
    from omniprep.errors import Reason, RejectSample
    from omniprep.sources.media_store import MediaStore

    write_media(tmp_path / "data")
    rows = [chat(0, {"image": "i.png"}), *TEXT[1:]]

    def down(*_args: object, **_more: object) -> None:
        raise RejectSample(Reason.MEDIA_UNREADABLE, "no answer", retryable=True)

    made = recipe(tmp_path, rows, run={**RUN, "max_reject_rate": 0.05})
    with monkeypatch.context() as patch:
        patch.setattr(MediaStore, "resolve", down)
        with pytest.raises(DatasetError, match="1 of 10 records are rejected"):
            prepare(made)
    done_again.clear()
    assert prepare(made).rejects == {}
    assert "chat-00000" in done_again


def test_a_trial_with_a_limit_does_not_decide_the_size_of_partitions(tmp_path: Path) -> None:
    auto = {"executor": "serial", "guard": {"enabled": False}}
    prepare(recipe(tmp_path, TEXT * 100, run=auto, sources=[{**ONE, "limit": 1}]))
    whole = recipe(tmp_path, TEXT * 100, run=auto, sources=[ONE])
    prepare(whole, mode="update")
    chosen = read_claim(open_folder(whole.output))
    prepare(recipe(tmp_path, TEXT * 100, run=auto, sources=[ONE], output=str(tmp_path / "fresh")))
    assert chosen is not None and chosen == read_claim(open_folder(str(tmp_path / "fresh")))
