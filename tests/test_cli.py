"""The command line: its options are frozen, its exit codes mean something, its errors are one line."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from omniprep import __version__
from omniprep.cli import app
from omniprep.shards.manifest import Manifest
from tests.prepare_builders import chat, write_media, write_recipe, write_rows

COMMANDS = (
    *("prepare", "retry", "plan", "verify", "diff", "inspect", "encode", "schema"),
    *("bench loader", "export energon", "export omni", "train thinker"),
)
OPTIONS = {
    "prepare": {
        *("--out", "--workers", "--executor", "--address", "--limit"),
        *("--update", "--overwrite", "--media-cache", "--json"),
    },
    "retry": {"--workers", "--executor", "--address", "--timeout-s", "--memory-bytes", "--inputs", "--json"},
    "plan": {"--workers", "--executor", "--address", "--limit", "--json"},
    "verify": {"--against", "--limit", "--inputs", "--json"},
    "inspect": {"--rejected"},
    "diff": {"--key", "--match", "--limit", "--json"},
    "encode": {
        "--out",
        "--rope-mode",
        "--reference-fps",
        "--add-generation-prompt",
        "--no-add-generation-prompt",
        "--system-prompt",
        "--text-policy",
        "--resize",
        "--max-tokens",
        "--format",
        "--media-root",
        "--json",
    },
    "schema": {"--out"},
    "bench loader": {
        *("--num-workers", "--num-threads", "--max-tokens", "--batching", "--num-batches", "--consumer-tokens-per-s"),
        *("--compare", "--json"),
    },
    "export energon": set(),
    "export omni": {"--into", "--out"},
    "train thinker": {
        *("--set", "--dry-run", "--overwrite", "--ray-workers", "--gpus", "--no-gpus", "--address", "--json"),
    },
}


def run(*arguments: object, code: int = 0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output + str(result.exception)
    return result


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    write_media(tmp_path / "data")
    rows = [chat(0), chat(1, {"audio": "a.wav"}), "{", chat(3, {"image": "i.png"}), chat(4, {"image": "missing.png"})]
    return write_recipe(tmp_path, rows, encode={"max_tokens": 50})


def test_options_do_not_change_silently() -> None:
    import typer

    commands = leaves(typer.main.get_command(app))
    assert set(commands) == set(COMMANDS)
    for name, command in commands.items():
        found = {text for option in command.params for text in (*option.opts, *option.secondary_opts) if text.startswith("--")}
        assert found - {"--help"} == OPTIONS[name], name


def leaves(group: Any, prefix: str = "") -> dict[str, Any]:
    """Return the commands of a group and of the groups in it, by the words that call them."""
    if not hasattr(group, "commands"):
        return {prefix.strip(): group}
    found = (leaves(command, f"{prefix} {name}") for name, command in group.commands.items())
    return {name: command for part in found for name, command in part.items()}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command: str) -> None:
    assert re.search(rf"Example: omniprep {command} \S", run(*command.split(), "--help").output)


def test_version() -> None:
    assert run("--version").output == f"omniprep {__version__}\n"


def test_prepare_verify_inspect(recipe: Path, tmp_path: Path) -> None:
    result = run("prepare", recipe)
    assert "2 records in 1 shards" in result.output
    assert "rejected: 3 (media_missing 1, schema_invalid 1, too_many_tokens 1)" in result.output
    assert run("verify", tmp_path / "out").output.endswith("2 records in 1 shards: all is as it must be\n")
    assert "chat-00000003" in run("inspect", tmp_path / "out").output
    assert "answer 3" in run("inspect", tmp_path / "out", "id-3").output


def test_prepare_as_json_is_the_manifest(recipe: Path, tmp_path: Path) -> None:
    result = run("prepare", recipe, "--json", "--out", tmp_path / "elsewhere", "--limit", 1)
    assert Manifest.model_validate_json(result.stdout).num_rows == 1
    assert (tmp_path / "elsewhere" / "manifest.json").is_file()


@pytest.mark.reference
@pytest.mark.filterwarnings("ignore")
def test_verify_against_transformers_stamps_the_manifest(recipe: Path, tmp_path: Path) -> None:
    run("prepare", recipe)
    found = json.loads(run("verify", tmp_path / "out", "--against", "transformers", "--limit", 2, "--json").stdout)
    assert found["findings"] == []
    assert "2 of 2 compared records are equal" in found["parity"]
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["parity"] == found["parity"]
    assert run("verify", tmp_path / "out").exit_code == 0
    assert json.loads(run("prepare", recipe, "--json").stdout)["parity"] == found["parity"]


def test_against_needs_to_know_where_the_recipe_was(recipe: Path, tmp_path: Path) -> None:
    run("prepare", recipe)
    (tmp_path / "out" / "receipts" / "place.json").unlink()
    result = run("verify", tmp_path / "out", "--against", "transformers", code=2)
    assert "name the folder of its recipe with --inputs" in result.stderr


def test_findings_give_exit_code_1(recipe: Path, tmp_path: Path) -> None:
    run("prepare", recipe)
    (tmp_path / "out" / "train-chat-00000.parquet").unlink()
    assert "train-chat-00000.parquet: missing" in run("verify", tmp_path / "out", code=1).stdout
    found = json.loads(run("verify", tmp_path / "out", "--json", code=1).stdout)
    assert found["findings"][0]["shard"] == "train-chat-00000.parquet"


def test_nothing_stored_gives_exit_code_1(tmp_path: Path) -> None:
    assert "no record was stored: all 2 were rejected" in run("prepare", write_recipe(tmp_path, ["{", "{"]), code=1).stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["prepare", "nowhere.yaml"], 2, "nowhere.yaml: cannot be read: No such file or directory"),
        (["verify", "nowhere"], 2, "nowhere: manifest.json is missing, so this is no dataset"),
        (["diff", "nowhere", "nowhere"], 2, "nowhere: manifest.json is missing, so this is no dataset"),
        (["inspect", "nowhere"], 2, "nowhere: manifest.json is missing, so this is no dataset"),
        (["retry", "nowhere"], 2, "nowhere: manifest.json is missing, so this is no dataset"),
        (["inspect", "nowhere", "--rejected"], 2, "nowhere: no such folder; name the folder of a dataset"),
        (["verify", "now\x1b[2Jhere"], 2, "now\\x1b[2Jhere: manifest.json is missing"),
        (["schema", "nothing.json"], 2, "no schema 'nothing.json'; there are conversation.json"),
        (["encode", "nowhere.jsonl", "--out", "x"], 2, "no file matches 'nowhere.jsonl'"),
        (["bench", "loader", "nowhere"], 2, "nowhere: manifest.json is missing, so this is no dataset"),
        (["bench", "loader", "nowhere", "--num-workers", "0,x"], 2, "--num-workers: expected numbers of 0 to 256"),
        (["export", "energon", "nowhere"], 2, "nowhere: manifest.json is missing, so this is no dataset"),
    ],
)
def test_a_users_mistake_is_one_line(arguments: list[str], code: int, message: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*arguments, code=code)
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_an_unfinished_dataset_is_wrong_use_and_a_damaged_one_a_finding(recipe: Path, tmp_path: Path) -> None:
    run("prepare", recipe)
    manifest = tmp_path / "out" / "manifest.json"
    whole = manifest.read_bytes()
    for command in (["verify"], ["inspect"], ["retry"], ["diff", str(tmp_path / "out")]):
        manifest.unlink(missing_ok=True)
        assert "is missing, so this is an unfinished dataset" in run(*command, tmp_path / "out", code=2).stderr
        manifest.write_bytes(whole[:-10])
        assert "manifest.json: not readable as JSON" in run(*command, tmp_path / "out", code=1).stderr


HOSTILE = "\x1b[2J \x9b1m \x7f \u202e"
"""Clears the screen, makes text bold in another way, deletes, turns the direction."""
ESCAPED = r"\x1b[2J \x9b1m \x7f \u202e"


def test_no_text_from_data_steers_the_terminal(tmp_path: Path) -> None:
    media = f"none{HOSTILE}.png"
    rows = [{**chat(0, id=HOSTILE)}, chat(1, {"image": media}), {**chat(2), "meta": {"a": HOSTILE}}]
    rows[2]["messages"][0]["content"][0]["text"] = f"{HOSTILE}, nbsp\xa0, joiner\u200d."  # type: ignore[call-overload]
    recipe = write_recipe(tmp_path, rows)
    out = tmp_path / "out"
    lines = run("prepare", recipe).stdout
    lines += run("inspect", out).stdout + run("inspect", out, "--rejected").stdout + run("inspect", out, "chat-00000001").stdout
    text = run("inspect", out, "chat-00000002").stdout
    encoded = run("encode", tmp_path / "data" / "chat.jsonl", "--out", tmp_path / "npz", code=1)
    told = lines + text + encoded.output + run("plan", recipe).stdout
    assert [char for char in told if not char.isprintable() and char not in "\n\xa0\u200d"] == []
    assert f"{ESCAPED}, nbsp\xa0, joiner\u200d." in text, "what is part of a text stays"
    assert f"none{ESCAPED}.png" in lines
    assert f"none{ESCAPED}.png" in encoded.stderr
    assert ESCAPED in run("inspect", out).stdout


def test_json_is_ascii_and_tells_the_text_as_it_is(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [chat(0, {"image": "none\u202e\U0001f3ac.png"})])
    told = run("encode", rows, "--out", tmp_path / "npz", "--json", code=1).stdout
    assert told.isascii()
    assert "none\\u202e\U0001f3ac.png" in json.loads(told)["detail"], "details are escaped where they are made"
    assert json.loads(told)["place"] == "rows.jsonl:1"


def test_wrong_options_give_exit_code_2(recipe: Path) -> None:
    run("prepare", recipe, "--wrokers", 2, code=2)
    run("prepare", recipe, "--workers", 0, code=2)


def test_plan_agrees_with_what_is_made(recipe: Path, tmp_path: Path) -> None:
    planned = json.loads(run("plan", recipe, "--json").stdout)["totals"]
    assert not (tmp_path / "out").exists()
    assert planned["rejects"] == {"media_missing": 1, "schema_invalid": 1}
    assert (planned["num_rows"], planned["num_probed"], planned["num_over_length"]) == (5, 3, 1)
    path = write_recipe(tmp_path, [chat(0), chat(1, {"audio": "a.wav"}), chat(3, {"image": "i.png"})])
    planned = json.loads(run("plan", path, "--json").stdout)["totals"]
    made = json.loads(run("prepare", path, "--json").stdout)["totals"]
    for name in ("num_tokens", "num_mel_frames", "num_patches", "audio_s"):
        assert planned[name] == made[name], name
    assert planned["longest"]["place"] == "chat: chat.jsonl:2"


def test_plan_shows_lengths_and_advice(recipe: Path) -> None:
    output = run("plan", recipe).output
    assert "0+ tokens         3" in output
    assert "run.rows_per_partition:" in output
    assert "rejected: 1 media_missing" in output


def test_encode_writes_npz_and_tells_what_it_cannot(tmp_path: Path) -> None:
    import numpy as np

    file = write_rows(tmp_path / "rows.jsonl", [chat(0), "{"])
    result = run("encode", file, "--out", tmp_path / "npz", code=1)
    assert "rows.jsonl:2: schema_invalid" in result.stderr
    with np.load(tmp_path / "npz" / "id-0.npz") as arrays:
        assert arrays["input_ids"].ndim == arrays["labels"].ndim
    assert json.loads(run("encode", file, "--out", tmp_path / "npz", "--json", code=1).stdout.splitlines()[0])["key"] == "id-0"


@pytest.mark.filterwarnings("ignore:unclosed file .*tar:ResourceWarning")  # webdataset's, where a reader stops in a tar
def test_bench_loader_shows_a_table_and_ratios(recipe: Path, tmp_path: Path) -> None:
    run("prepare", recipe)
    output = run("bench", "loader", tmp_path / "out", "--num-workers", "0", "--num-threads", 1, "--compare").stdout
    for loader in ("omniprep", "omniprep records", "webdataset", "datasets"):
        assert re.search(rf"│ {loader} +│", output), loader
    assert re.search(r"omniprep records / webdataset, .*x the samples/s, [\d.]+x the samples per CPU-second", output)
    assert "they do not shuffle, blend, pack" in output


def test_bench_loader_as_json(recipe: Path, tmp_path: Path) -> None:
    run("prepare", recipe)
    options = ("--num-workers", "0", "--batching", "single", "--num-batches", 1, "--consumer-tokens-per-s", 1e6, "--json")
    found = json.loads(run("bench", "loader", tmp_path / "out", *options).stdout)
    assert found["consumer_tokens_per_s"] == 1e6
    assert found["plan"]["batching"] == "single"
    assert [(one["loader"], one["num_batches"], one["num_samples"]) for one in found["runs"]] == [("omniprep", 1, 1)]
    assert found["runs"][0]["samples_per_s"] == pytest.approx(1 / found["runs"][0]["wall_s"])


def test_bench_loader_tells_what_does_not_fit_and_what_is_not_there(recipe: Path, tmp_path: Path) -> None:
    run("prepare", recipe)
    out = tmp_path / "out"
    for workers in ("0", "2"):
        told = run("bench", "loader", out, "--num-workers", workers, "--max-tokens", 1, code=2).stderr
        assert re.fullmatch(r"error: .* tokens > max_tokens=1 .*\n", told)
    (out / "train-chat-00000.tar").unlink()
    told = run("bench", "loader", out, "--num-workers", "2", code=1).stderr
    assert re.fullmatch(r"error: .*train-chat-00000\.tar: is missing.*\n", told)


def test_export_energon_is_seen_and_may_be_repeated(recipe: Path, tmp_path: Path) -> None:
    from omniprep.stream.energon import energon_is_current

    run("prepare", recipe)
    for _ in range(2):
        told = run("export", "energon", tmp_path / "out").stdout
        assert told == f"{tmp_path / 'out'}: Megatron-Energon can open it now; records: train 2\n"
        assert energon_is_current(tmp_path / "out")


def test_schema_prints_and_writes(tmp_path: Path) -> None:
    names = run("schema").stdout.split()
    assert "conversation.json" in names
    assert json.loads(run("schema", "conversation.json").stdout)["$id"] == "conversation.json"
    run("schema", "--out", tmp_path / "schemas")
    assert sorted(path.name for path in (tmp_path / "schemas").iterdir()) == sorted(names)


def test_a_bug_keeps_its_traceback_and_a_pipe_may_close(recipe: Path) -> None:
    closed = f"{sys.executable} -m omniprep schema conversation.json | head -c 1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", closed], capture_output=True, text=True, check=False)
    assert done.stdout == "{"
    assert "Traceback" not in done.stderr
