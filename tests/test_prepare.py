"""Preparing: nothing is lost, the same inputs give the same bytes, and a build that was stopped goes on."""

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from omniprep import prepare as module
from omniprep import prepare_partition as partition_module
from omniprep.errors import ConfigError, DatasetError
from omniprep.prepare import plan_jobs, prepare, retry
from omniprep.prepare_partition import Worker, choose_split, prepare_partition, retry_partition
from omniprep.recipe import Recipe, load_recipe
from omniprep.shards.manifest import read_manifest
from omniprep.shards.reader import find_sample, index_rows, iter_samples
from omniprep.storage.local import LocalFolder, LocalWriter
from omniprep.verify import verify
from tests.prepare_builders import chat, recipe, tree, write_media, write_recipe, write_rows

ROOT = Path(__file__).parents[1]
TEXT = [chat(number) for number in range(10)]
RUN: dict[str, object] = {"executor": "serial", "guard": {"enabled": False}}


def test_every_kind_of_record_arrives(tmp_path: Path, ffmpeg: str) -> None:
    write_media(tmp_path / "data", ffmpeg)
    rows = [
        chat(0),
        chat(1, {"audio": "a.wav"}),
        chat(2, {"image": "i.png"}),
        chat(3, {"video": "v.mp4"}),
        chat(4, {"video": "silent.mp4"}),
        chat(5, {"video": "v.mp4", "audio_in_video": "off"}, {"audio": "a.wav"}, {"image": "i.png"}),
        {"parts": [{"text": "before"}, {"image": "i.png"}, {"text": "after"}]},
    ]
    manifest = prepare(recipe(tmp_path, rows))
    assert list(verify(tmp_path / "out")) == []
    assert (manifest.num_rows, manifest.totals.num_records, manifest.rejects) == (7, 7, {})
    counts = {name: totals.num_records for name, totals in manifest.by_modality.items()}
    assert counts == {"text": 1, "audio": 2, "image": 3, "video": 3, "video_with_sound": 1}
    assert [row["key"] for row in index_rows(tmp_path / "out")] == [f"chat-{number:08d}" for number in range(7)]
    with_sound = find_sample(tmp_path / "out", "id-3")
    assert (with_sound.key, with_sound.row, with_sound.source, with_sound.vision[0].audio_index) == (
        "chat-00000003",
        3,
        "chat",
        0,
    )


def test_every_row_is_in_a_shard_or_in_the_quarantine(tmp_path: Path) -> None:
    write_media(tmp_path / "data")
    rows = [
        chat(0),
        '{"messages": ',
        chat(2, {"image": "missing.png"}),
        {"messages": [{"role": "robot", "content": "x"}]},
        chat(4, {"image": "empty.png"}),
        {"messages": [{"role": "user", "content": "nothing to learn"}]},
        chat(6, {"image": "../../etc/passwd"}),
        {"prompt": "p", "chosen": "c", "rejected": "r"},
        "[1, 2]",
        chat(9),
    ]
    manifest = prepare(recipe(tmp_path, rows))
    assert (manifest.num_rows, manifest.totals.num_records) == (10, 2)
    found = [row for info in manifest.quarantine for row in pq.read_table(tmp_path / "out/quarantine" / info.name).to_pylist()]
    assert [(row["row"], row["place"], row["stage"], row["reason"]) for row in found] == [
        (1, "chat.jsonl:2", "read", "schema_invalid"),
        (2, "chat.jsonl:3", "encode", "media_missing"),
        (3, "chat.jsonl:4", "parse", "role_unknown"),
        (4, "chat.jsonl:5", "encode", "media_empty"),
        (5, "chat.jsonl:6", "encode", "nothing_supervised"),
        (6, "chat.jsonl:7", "encode", "media_forbidden"),
        (7, "chat.jsonl:8", "encode", "schema_invalid"),
        (8, "chat.jsonl:9", "parse", "schema_invalid"),
    ]
    assert found[0]["record"] == b'{"messages":'
    assert json.loads(found[1]["record"]) == rows[2]
    assert "\n" not in "".join(row["detail"] for row in found)
    assert list(verify(tmp_path / "out")) == []


def test_media_inside_a_rejected_row_are_kept_once(tmp_path: Path) -> None:
    import pyarrow as pa

    (tmp_path / "data").mkdir()
    bad = {"role": "user", "content": [{"type": "image", "image": {"bytes": b"not a picture", "path": None}}]}
    table = pa.table({"messages": [[bad, {"role": "assistant", "content": [{"type": "text", "image": None}]}]] * 2})
    pq.write_table(table, tmp_path / "data" / "rows.parquet")
    source = {"name": "rows", "kind": "parquet", "path": "data/rows.parquet"}
    manifest = prepare(recipe(tmp_path, [], sources=[source]))
    (info,) = manifest.quarantine
    assert info.num_records == 2
    assert len(info.blobs) == 1
    assert (tmp_path / "out/quarantine/_blobs" / info.blobs[0]).read_bytes() == b"not a picture"
    assert list(verify(tmp_path / "out")) == []


def test_preferences_have_their_own_members(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "chosen": "good answer", "rejected": "bad"}, chat(1)]
    manifest = prepare(recipe(tmp_path, rows, kind="preference"))
    assert manifest.members == ("chosen.npy", "frames.mjpg", "json", "mel.npy", "rejected.npy")
    assert (manifest.totals.num_records, manifest.rejects) == (1, {"schema_invalid": 1})
    assert list(verify(tmp_path / "out")) == []
    (sample,) = iter_samples(tmp_path / "out")
    assert list(sample.layouts) == ["chosen", "rejected"]


def test_two_records_with_one_id_are_both_kept_in_one_split(tmp_path: Path) -> None:
    rows = [{**chat(0), "id": f"twin-{number % 20}"} for number in range(40)]
    prepare(recipe(tmp_path, rows, splits={"val": 0.5}))
    found = list(index_rows(tmp_path / "out"))
    assert len({row["key"] for row in found}) == 40
    splits: dict[str, set[str]] = {}
    for row in found:
        splits.setdefault(row["id"], set()).add(row["split"])
    assert all(len(of_id) == 1 for of_id in splits.values())
    assert {name for of_id in splits.values() for name in of_id} == {"train", "val"}


def test_a_records_own_split_wins_over_its_sources(tmp_path: Path) -> None:
    source = {"name": "chat", "kind": "jsonl", "path": "data/chat.jsonl", "split": "test"}
    prepare(recipe(tmp_path, [chat(0), chat(1, split="dev")], sources=[source], splits={"val": 1.0}))
    assert {row["id"]: row["split"] for row in index_rows(tmp_path / "out")} == {"id-0": "test", "id-1": "dev"}


def test_split_shares_are_met(tmp_path: Path) -> None:
    made = recipe(tmp_path, TEXT, splits={"val": 0.1, "test": 0.2})
    drawn = [choose_split(f"id-{number}", made) for number in range(5000)]
    assert abs(drawn.count("val") / 5000 - 0.1) < 0.02
    assert abs(drawn.count("test") / 5000 - 0.2) < 0.02


def test_a_second_run_does_nothing_and_changes_nothing(tmp_path: Path, monkeypatch) -> None:
    made = recipe(tmp_path, TEXT)
    first = prepare(made)
    before = tree(tmp_path / "out")
    monkeypatch.setattr(module, "prepare_partition", lambda *_: pytest.fail("a finished partition was done again"))
    assert prepare(made) == first
    assert tree(tmp_path / "out") == before


@pytest.mark.parametrize(
    "victim", ["train-chat-00001.tar", "train-chat-00001.parquet", "receipts/chat-00001.json", "manifest.json"]
)
def test_a_lost_file_is_made_again(tmp_path: Path, victim: str) -> None:
    made = recipe(tmp_path, TEXT)
    prepare(made)
    before = tree(tmp_path / "out")
    (tmp_path / "out" / victim).unlink()
    prepare(made)
    assert tree(tmp_path / "out") == before


def test_changed_rows_redo_their_partition_only(tmp_path: Path) -> None:
    prepare(recipe(tmp_path, TEXT))
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tar")}
    rows = [*TEXT[:9], chat(99)]
    manifest = prepare(recipe(tmp_path, rows))
    fresh = {path.name for path in (tmp_path / "out").glob("*.tar") if path.stat().st_mtime_ns != times[path.name]}
    assert fresh == {"train-chat-00002.tar"}
    assert manifest.totals.num_records == 10
    assert find_sample(tmp_path / "out", "id-99").row == 9
    assert list(verify(tmp_path / "out")) == []


def test_fewer_rows_leave_nothing_of_the_old_partitions(tmp_path: Path) -> None:
    prepare(recipe(tmp_path, TEXT))
    prepare(recipe(tmp_path, TEXT[:4]))
    assert [path.name for path in (tmp_path / "out").glob("*.tar")] == ["train-chat-00000.tar"]
    assert list(verify(tmp_path / "out")) == []


def test_another_recipe_is_refused_and_overwrites_on_request(tmp_path: Path) -> None:
    prepare(recipe(tmp_path, TEXT))
    other = recipe(tmp_path, TEXT, encode={"max_tokens": 8000})
    with pytest.raises(ConfigError, match=r"another recipe \(encode.max_tokens: null -> 8000\).*--overwrite"):
        prepare(other)
    assert list(verify(tmp_path / "out")) == []
    assert prepare(other, mode="overwrite").recipe["encode"]["max_tokens"] == 8000
    assert list(verify(tmp_path / "out")) == []


def test_workers_and_places_are_no_part_of_the_recipes_identity(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one = recipe(tmp_path / "a", TEXT)
    two = recipe(tmp_path / "b", TEXT, run={"rows_per_partition": 4, "workers": 3, "max_reject_rate": 0.5, "executor": "ray"})
    assert one.sha256 == two.sha256
    prepare(one)
    prepare(two.model_copy(update={"run": one.run}))
    assert tree(tmp_path / "a/out") == tree(tmp_path / "b/out")


def test_a_foreign_folder_is_never_touched(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    for mode in ("continue", "update", "overwrite"):
        with pytest.raises(ConfigError, match="holds files that OmniPrep did not write"):
            prepare(recipe(tmp_path, TEXT), mode=mode)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_a_second_build_at_the_same_time_is_refused(tmp_path: Path) -> None:
    from omniprep.receipts import open_build
    from omniprep.storage.folder import open_folder

    made = recipe(tmp_path, TEXT)
    with (
        open_build(open_folder(str(tmp_path / "out")), made.identity(), mode="continue"),
        pytest.raises(ConfigError, match="another `omniprep"),
    ):
        prepare(made)


def test_retry_stores_what_works_now_and_leaves_finished_shards_alone(tmp_path: Path) -> None:
    rows = [*TEXT[:5], chat(5, {"image": "i.png"}), chat(6, {"image": "never.png"}), *TEXT[6:]]
    made = recipe(tmp_path, rows)
    before = prepare(made)
    assert before.rejects == {"media_missing": 2}
    files = tree(tmp_path / "out")
    assert retry(made.output) == before
    assert tree(tmp_path / "out") == files
    write_media(tmp_path / "data")
    after = retry(made.output)
    assert (after.rejects, after.num_rows, after.totals.num_records) == ({"media_missing": 1}, len(rows), len(rows) - 1)
    shards = {name: digest for name, digest in files.items() if name.startswith("train")}
    assert shards.items() < tree(tmp_path / "out").items()
    assert {shard.name for shard in after.shards} - shards.keys() == {"train-chat-00001-01.tar"}
    assert {row["key"] for row in index_rows(tmp_path / "out")} >= {"chat-00000005"}
    assert list(verify(tmp_path / "out")) == []
    files = tree(tmp_path / "out")
    assert retry(made.output) == after, "nothing more works: nothing changes"
    assert tree(tmp_path / "out") == files


class Killed(BaseException):
    """What no code catches."""


@pytest.mark.parametrize("again", ["retry", "prepare"])
def test_retry_may_be_killed_between_any_two_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: str) -> None:
    rows = [*TEXT[:5], chat(5, {"image": "i.png"}), chat(6, {"image": "never.png"}), chat(7, {"audio": "a.wav"}), *TEXT[8:]]
    made = recipe(tmp_path, rows)
    prepare(made)
    shutil.copytree(tmp_path / "out", tmp_path / "built", symlinks=True)
    write_media(tmp_path / "data")
    num_left = None

    def count(function):
        def counted(*arguments, **options):
            nonlocal num_left
            num_left = num_left and num_left - 1
            if num_left == 0:
                raise Killed
            return function(*arguments, **options)

        return counted

    monkeypatch.setattr(LocalWriter, "publish", count(LocalWriter.publish))
    monkeypatch.setattr(LocalFolder, "remove", count(LocalFolder.remove))
    for number in range(1, 100):
        num_left = number
        try:
            retry(made.output, run=RUN)
        except Killed:
            num_left = None
            assert not any("missing" in str(found) for found in verify(tmp_path / "out")), number
            result = retry(made.output, run=RUN) if again == "retry" else prepare(made)
            assert result.rejects == {"media_missing": 1}, number
            assert {row["key"] for row in index_rows(tmp_path / "out")} == {f"chat-{k:08d}" for k in range(10) if k != 6}, number
            assert list(verify(tmp_path / "out")) == [], number
        else:
            break
        shutil.rmtree(tmp_path / "out")
        shutil.copytree(tmp_path / "built", tmp_path / "out", symlinks=True)
    assert number > 8


def test_retry_is_not_stopped_by_the_rate_and_may_be_done_twice(tmp_path: Path) -> None:
    rows = [chat(number, {"image": f"{number}.png"}) for number in range(120)]
    run = {"rows_per_partition": 60, "executor": "serial", "guard": {"enabled": False}, "max_reject_rate": 1.0}
    made = recipe(tmp_path, rows, run=run)
    prepare(made)
    write_media(tmp_path / "data")
    for number in range(5):
        shutil.copy(tmp_path / "data/i.png", tmp_path / f"data/{number}.png")
    assert retry(made.output, run=RUN).rejects == {"media_missing": 115}
    for number in range(5, 60):
        shutil.copy(tmp_path / "data/i.png", tmp_path / f"data/{number}.png")
    retry(made.output, run=RUN)
    worker = Worker(made.anchored())
    done = plan_jobs(worker.located)[0]
    assert retry_partition(worker, done).num_rejected == 0, "as Ray does it when the answer was lost with its node"


def test_retry_of_a_build_whose_recipe_is_unknown_here_says_so(tmp_path: Path) -> None:
    made = recipe(tmp_path, TEXT)
    prepare(made)
    path = tmp_path / "out/receipts/recipe.json"
    path.write_text(path.read_text().replace('"seed"', '"sead"'))
    with pytest.raises(ConfigError, match="recipe of the build: sead: Extra inputs are not permitted"):
        retry(made.output)


def test_retry_asks_where_the_inputs_are_now(tmp_path: Path) -> None:
    made = recipe(tmp_path / "a", TEXT)
    prepare(made)
    (tmp_path / "a/data").rename(tmp_path / "data")
    with pytest.raises(ConfigError, match=r"no file matches .*; .*; it was built in .*/a: .* name the folder with --inputs"):
        retry(made.output)
    assert retry(made.output, inputs=tmp_path).num_rows == 10


def test_retry_wants_a_finished_build_of_the_same_rows(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no dataset of `omniprep prepare`"):
        retry(str(tmp_path / "out"))
    made = recipe(tmp_path, [*TEXT, chat(10, {"image": "i.png"})])
    prepare(made)
    write_rows(tmp_path / "data" / "chat.jsonl", [chat(77), *TEXT])
    with pytest.raises(ConfigError, match="their rows have changed; run `omniprep prepare`"):
        retry(made.output)


def test_media_that_appear_later_are_found_by_a_second_run(tmp_path: Path) -> None:
    made = recipe(tmp_path, [*TEXT[:5], chat(5, {"image": "i.png"})])
    assert prepare(made).rejects == {"media_missing": 1}
    write_media(tmp_path / "data")
    first = (tmp_path / "out" / "train-chat-00000.tar").stat().st_mtime_ns
    assert prepare(made).rejects == {}
    assert (tmp_path / "out" / "train-chat-00000.tar").stat().st_mtime_ns == first, "only the partition that names them"
    assert list(verify(tmp_path / "out")) == []


def test_added_rows_leave_finished_partitions_alone(tmp_path: Path) -> None:
    prepare(recipe(tmp_path, TEXT[:8]))
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tar")}
    assert prepare(recipe(tmp_path, TEXT)).num_rows == 10
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in times} == times


def test_a_split_for_every_record_does_not_use_up_the_files(tmp_path: Path) -> None:
    rows = [chat(number, split=f"s{number % 50}") for number in range(150)]
    manifest = prepare(recipe(tmp_path, rows, run={"rows_per_partition": 200, "executor": "serial"}))
    assert {name: part.num_records for name, part in manifest.by_split.items()} == {f"s{number}": 3 for number in range(50)}
    assert list(verify(tmp_path / "out")) == []


def test_too_many_rejects_are_not_sealed_but_kept(tmp_path: Path) -> None:
    rows = [*TEXT, "{", "{"]
    run = {"rows_per_partition": 4, "executor": "serial"}
    with pytest.raises(
        DatasetError, match=r"2 of 12 records are rejected \(schema_invalid: 2\), more than run.max_reject_rate=0.1"
    ):
        prepare(recipe(tmp_path, rows, run={**run, "max_reject_rate": 0.1}))
    with pytest.raises(DatasetError, match="unfinished dataset"):
        read_manifest(tmp_path / "out")
    assert prepare(recipe(tmp_path, rows, run={**run, "max_reject_rate": 0.2})).totals.num_records == 10


def test_a_lost_record_is_not_sealed(tmp_path: Path, monkeypatch) -> None:
    def losing(worker, job):
        receipt = prepare_partition(worker, job)
        return receipt.model_copy(update={"num_rows": receipt.num_rows - 1}) if job.partition.index == 1 else receipt

    monkeypatch.setattr(module, "prepare_partition", losing)
    with pytest.raises(DatasetError, match=r"partition chat-00001: 4 rows planned, 3 read, 4 stored, 0 rejected; not sealed"):
        prepare(recipe(tmp_path, TEXT))


def test_a_bug_stops_the_run_and_says_at_which_row(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(partition_module, "RowEncoder", lambda *_: lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError) as caught:
        prepare(recipe(tmp_path, TEXT))
    assert caught.value.__notes__ == ["while preparing row chat.jsonl:1 of source 'chat'"]
    assert list((tmp_path / "out").glob("*.partial")) == []


def test_partitions_are_functions_of_their_own_rows(tmp_path: Path) -> None:
    worker = Worker(recipe(tmp_path, TEXT).anchored())
    (tmp_path / "out" / "receipts").mkdir(parents=True)
    jobs = plan_jobs(worker.located)
    alone = prepare_partition(worker, jobs[1])
    for job in reversed(jobs):
        prepare_partition(worker, job)
    assert prepare_partition(Worker(worker.recipe), jobs[1]) == alone


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sauces": []}, "sauces: Extra inputs are not permitted"),
        ({"seed": -1}, "seed: Input should be greater than or equal to 0; got -1"),
        ({"splits": {"val": 1.5}}, r"splits: expected names .* shares in \(0, 1\]; wrong: val"),
        ({"splits": {"val": 0.6, "test": 0.6}}, "splits: shares add up to 1.2 > 1"),
        ({"encode": {"rope_mode": "tilted"}}, "encode.rope_mode: .*'aligned' or 'reference'"),
        ({"sources": [{"name": "a", "kind": "jsonl", "path": "x"}] * 2}, "source names must differ.*given twice: a"),
        ({"sources": [{"name": "a", "kind": "jsonl", "path": "nothing-*.jsonl"}]}, "no file matches"),
        ({"run": {"workers": 0}}, "run.workers: .*greater than or equal to 1"),
        ({"encode": {"jpeg_quality": 101}}, "encode.jpeg_quality: .*less than or equal to 100; got 101"),
        ({"encode": {"max_tokens": 0}}, "encode.max_tokens: .*greater than or equal to 1; got 0"),
        ({"encode": {"reference_fps": 0}}, "encode.reference_fps: .*greater than 0; got 0"),
        (
            {"sources": [{"name": "a b", "kind": "jsonl", "path": "x"}]},
            r"^[^\n]*sources.0.jsonl.name: String should match[^\n]*$",
        ),
    ],
)
def test_a_wrong_recipe_is_told_before_anything_is_made(tmp_path: Path, change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prepare(recipe(tmp_path, TEXT, **change))
    assert not (tmp_path / "out").exists()


def test_a_limit_on_the_command_line_bounds_every_source(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, TEXT)
    assert [source.limit for source in load_recipe(path, limit=3).sources] == [3]
    assert prepare(load_recipe(path, limit=3)).num_rows == 3


RECIPES = [path for path in sorted((ROOT / "pipelines").glob("*.yaml")) if not path.stem.startswith("train_")]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_in_pipelines_is_valid(path: Path) -> None:
    loaded = load_recipe(path)
    assert Recipe.model_validate(yaml.safe_load(path.read_text(encoding="utf-8"))).sha256 == loaded.sha256
    assert path.read_text(encoding="utf-8").startswith("#"), "a recipe says what it is for"
