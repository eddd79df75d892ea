"""One dataset of good records and every kind of bad one: each bad row is told in one line, and nothing else is lost.

The same corpus goes through `prepare` in this process and through the command line in another.
"""

import json
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import yaml

from omniprep.prepare import prepare
from omniprep.recipe import load_recipe
from omniprep.shards.quarantine import read_quarantine
from omniprep.shards.reader import index_rows
from omniprep.storage.folder import open_folder
from omniprep.types import Rejection
from omniprep.verify import verify
from tests.prepare_builders import chat, tree

MAX_TOKENS = 2000


@dataclass(frozen=True)
class Case:
    """A row and what must become of it. `reason` is empty for a good row; `told` must all stand in the detail."""

    name: str
    row: object
    reason: str = ""
    told: tuple[str, ...] = ()

    @property
    def line(self) -> bytes:
        return self.row if isinstance(self.row, bytes) else json.dumps(self.row).encode()


def ask(number: int, *parts: dict, **more: object) -> dict:
    return chat(number, *parts, **more)


IN_PART = "messages.0.content.1"


def media_case(name: str, part: dict, reason: str, *told: str) -> Case:
    """A chat with one medium; the detail must name the part and the file."""
    value = next(value for key, value in part.items() if key in ("image", "audio", "video"))
    file = value if isinstance(value, str) else value[-1]
    return Case(name, ask(0, part, id=name), reason, (IN_PART, file, *told) if reason else ())


def cases() -> list[Case]:
    user = {"role": "user", "content": "q"}
    answer = {"role": "assistant", "content": "a"}
    good = [
        Case("text", ask(0, id="text")),
        media_case("1-pixel image", {"image": "one.png"}, ""),
        media_case("good image", {"image": "good.jpg"}, ""),
        media_case("good sound", {"audio": "good.wav"}, ""),
        media_case("good video", {"video": "good.mp4"}, ""),
        media_case("silent video", {"video": "silent.mp4"}, ""),
        Case("literal control token", ask(0, {"text": "a forged <|im_end|>"}, id="literal control token")),
        Case("twin", ask(0, id="twin")),
        Case("twin again", ask(1, id="twin")),
        Case(
            "marks",
            {"conversations": [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "!"}], "images": ["good.jpg"]},
        ),
    ]
    media = [
        media_case("missing image", {"image": "no.png"}, "media_missing"),
        media_case("missing sound", {"audio": "no.wav"}, "media_missing"),
        media_case("missing video", {"video": "no.mp4"}, "media_missing"),
        *(
            media_case(f"empty {kind}", {kind: f"empty.{suffix}"}, "media_empty")
            for kind, suffix in (("image", "png"), ("audio", "wav"), ("video", "mp4"))
        ),
        media_case("cut jpeg", {"image": "cut.jpg"}, "media_truncated"),
        media_case("cut png", {"image": "cut.png"}, "media_truncated"),
        media_case("cut wav", {"audio": "cut.wav"}, "media_truncated"),
        media_case("cut mp4", {"video": "cut.mp4"}, "media_truncated"),
        media_case("mp4 without its index", {"video": "headless.mp4"}, "media_truncated"),
        media_case("jpeg as mp4", {"video": "jpeg.mp4"}, "media_corrupt"),
        media_case("mp4 as jpg", {"image": "mp4.jpg"}, "media_corrupt"),
        media_case("text as wav", {"audio": "text.wav"}, "media_corrupt"),
        media_case("text as mp4", {"video": "text.mp4"}, "media_corrupt"),
        media_case("zero-length sound", {"audio": "zero.wav"}, "media_empty"),
        media_case("two mel frames", {"audio": "short.wav"}, "audio_too_short", "320 samples"),
        media_case("NaN in a float wav", {"audio": "nan.wav"}, "audio_not_finite"),
        media_case("1:300 image", {"image": "long.png"}, "image_aspect", "200"),
        media_case("one-frame video", {"video": "still.mp4"}, "video_too_short", "1"),
        media_case("sound asked of a silent video", {"video": "silent.mp4", "audio_in_video": "on"}, "media_no_stream"),
        media_case("sound of a silent video", {"audio": "silent.mp4"}, "media_no_stream"),
        media_case("a cut beyond the end", {"audio": "good.wav", "audio_start": 100}, "media_range", "100"),
        media_case("a video cut beyond the end", {"video": "good.mp4", "video_start": 100}, "media_range", "100"),
        media_case("a path outside the roots", {"image": "../outside.png"}, "media_forbidden", "media.roots"),
        media_case("an absolute path", {"image": "/etc/passwd"}, "media_forbidden", "media.roots"),
        media_case("a URL", {"image": "https://example.org/a.png"}, "media_forbidden", "media.allow_urls"),
        media_case("frames that differ in size", {"video": ["good.jpg", "one.png"], "sample_fps": 1}, "media_corrupt"),
    ]
    rows = [
        Case("empty object", {}, "schema_invalid", ("no keys",)),
        Case("a list", ["a"], "schema_invalid", ("expected a JSON object, got list",)),
        Case("null", None, "schema_invalid", ("expected a JSON object, got NoneType",)),
        Case("no messages", {"messages": []}, "schema_invalid", ("messages", "at least one")),
        Case(
            "content is a number",
            {"messages": [{"role": "user", "content": 5}]},
            "schema_invalid",
            ("messages.0.content", "got 5"),
        ),
        Case("unknown key", {"messages": [user, answer], "sauce": 1}, "schema_invalid", ("sauce", "unknown key")),
        Case(
            "unknown role",
            {"messages": [{"role": "robot", "content": "x"}]},
            "role_unknown",
            ("messages.0.role", "'robot'", "assistant"),
        ),
        Case("a split that is a path", {"messages": [user, answer], "split": "../x"}, "schema_invalid", ("split", "../x")),
        Case("a split that no file name holds", {"messages": [user, answer], "split": "x" * 300}, "schema_invalid", ("split",)),
        Case(
            "too few marks",
            {
                "conversations": [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "!"}],
                "images": ["good.jpg"] * 2,
            },
            "placeholder_mismatch",
            ("<image>", "1", "2"),
        ),
        Case(
            "NaN",
            b'{"messages": [{"role": "user", "content": [{"type": "audio", "audio": "good.wav", "audio_start": NaN}]}]}',
            "schema_invalid",
            ("NaN",),
        ),
        Case("not JSON", b"{'messages': []}", "schema_invalid", ("not valid JSON", "character")),
        Case("cut line", b'{"messages": [{"role": "us', "schema_invalid", ("not valid JSON", "character")),
        Case("not UTF-8", b'{"text": "caf\xe9"}', "schema_invalid", ("not valid UTF-8", "0xe9")),
        Case("nothing supervised", {"messages": [user]}, "nothing_supervised", ("loss: true",)),
        Case("too long", ask(0, {"text": "word " * MAX_TOKENS}, id="too long"), "too_many_tokens", (f"max_tokens={MAX_TOKENS}",)),
        Case("another kind", {"prompt": "p", "chosen": "c", "rejected": "r"}, "schema_invalid", ("kind",)),
    ]
    # Good and bad take turns, so that every bad row has good neighbours in its partition.
    bad = [*media, *rows]
    mixed: list[Case] = []
    for number, case in enumerate(bad):
        mixed += [case, Case(f"good {number}", ask(number))]
    return [*good, *mixed]


def write_media(folder: Path, ffmpeg: str) -> None:
    import soundfile
    from PIL import Image

    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)

    def picture(name: str, height: int, width: int) -> None:
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(folder / name)

    def film(name: str, *options: str, seconds: float = 2, sound: bool = False) -> None:
        inputs = ["-f", "lavfi", "-i", f"testsrc=s=160x120:r=10:d={seconds}"]
        inputs += ["-f", "lavfi", "-i", f"sine=d={seconds}"] if sound else []
        subprocess.run([ffmpeg, "-v", "error", *inputs, "-pix_fmt", "yuv420p", *options, str(folder / name)], check=True)

    picture("good.jpg", 60, 90)
    picture("big.png", 120, 120)
    picture("one.png", 1, 1)
    picture("long.png", 2, 600)
    picture("../outside.png", 8, 8)
    film("good.mp4", sound=True)
    film("fast.mp4", "-movflags", "+faststart", sound=True)
    film("silent.mp4")
    film("still.mp4", "-frames:v", "1")
    noise = rng.normal(0, 0.1, 16_000).astype(np.float32)
    soundfile.write(folder / "good.wav", noise, 16_000)
    soundfile.write(folder / "zero.wav", noise[:0], 16_000)
    soundfile.write(folder / "short.wav", noise[:320], 16_000)
    noise[100] = np.nan
    soundfile.write(folder / "nan.wav", noise, 16_000, subtype="FLOAT")

    def half(name: str, of: str) -> None:
        data = (folder / of).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2])

    half("cut.jpg", "good.jpg")
    half("cut.png", "big.png")
    half("cut.wav", "good.wav")
    half("cut.mp4", "fast.mp4")
    half("headless.mp4", "good.mp4")
    for suffix in ("png", "wav", "mp4"):
        (folder / f"empty.{suffix}").touch()
    (folder / "jpeg.mp4").write_bytes((folder / "good.jpg").read_bytes())
    (folder / "mp4.jpg").write_bytes((folder / "good.mp4").read_bytes())
    for name in ("text.wav", "text.mp4"):
        (folder / name).write_text("Dear diary, " * 100)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, ffmpeg: str) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_media(folder / "data", ffmpeg)
    (folder / "data" / "rows.jsonl").write_bytes(b"\n".join(case.line for case in cases()) + b"\n")
    values = {
        "output": str(folder / "out"),
        "sources": [{"name": "rows", "kind": "jsonl", "path": "data/rows.jsonl"}],
        "encode": {"max_tokens": MAX_TOKENS},
        "run": {"rows_per_partition": 30, "executor": "serial", "max_reject_rate": 1.0},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    return folder


def rejections(folder: Path) -> dict[int, Rejection]:
    files = sorted((folder / "quarantine").glob("*.parquet"))
    out = open_folder(str(folder))
    return {item.rejection.row: item.rejection for path in files for item in read_quarantine(out, path.name)}


def expected_counts() -> dict[str, int]:
    return dict(sorted(Counter(case.reason for case in cases() if case.reason).items()))


@pytest.fixture(scope="module")
def prepared(corpus: Path) -> Path:
    manifest = prepare(load_recipe(corpus / "recipe.yaml"))
    assert manifest.rejects == expected_counts()
    assert manifest.num_rows == len(cases()) == manifest.totals.num_records + sum(manifest.rejects.values())
    return corpus / "out"


@pytest.mark.parametrize("number", range(len(cases())), ids=[case.name for case in cases()])
def test_a_row_has_its_fate(prepared: Path, number: int) -> None:
    case = cases()[number]
    found = rejections(prepared).get(number)
    if not case.reason:
        assert found is None
        return
    assert found is not None
    assert (found.reason, found.place) == (case.reason, f"rows.jsonl:{number + 1}"), found.detail
    assert found.detail.isprintable(), "one line"
    assert len(found.detail) < 500
    for told in case.told:
        assert told in found.detail, found.detail
    assert str(prepared.parent) not in found.detail
    assert found.record == case.line.strip()


def test_good_rows_are_all_there_and_the_dataset_is_sound(prepared: Path) -> None:
    good = [number for number, case in enumerate(cases()) if not case.reason]
    assert [row["row"] for row in index_rows(prepared)] == good
    assert list(verify(prepared)) == []


def test_the_same_corpus_in_another_place_gives_the_same_bytes(corpus: Path, prepared: Path, tmp_path: Path) -> None:
    """Reasons that quote a path of this machine would make the quarantine another one on the next."""
    place = tmp_path / "of another" / "machine"
    shutil.copytree(corpus / "data", place / "data")
    shutil.copy(corpus / "outside.png", place)
    shutil.copy(corpus / "recipe.yaml", place)
    prepare(load_recipe(place / "recipe.yaml", output=str(place / "out")))
    assert tree(place / "out") == tree(prepared)


def test_the_command_line_tells_it_without_noise(corpus: Path, prepared: Path) -> None:
    """Decoders write to the standard error behind Python's back; a user must see OmniPrep's lines only."""
    command = [sys.executable, "-m", "omniprep", "prepare", "recipe.yaml", "--out", "cli"]
    done = subprocess.run(command, cwd=corpus, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    num_bad = sum(expected_counts().values())
    for line in done.stderr.splitlines():
        assert line.startswith("prepare: "), done.stderr
    first, splits, rejected = done.stdout.splitlines()
    assert first.startswith(f"cli: {len(cases()) - num_bad} records in ")
    assert splits == f"splits: train {len(cases()) - num_bad}"
    assert rejected.startswith(f"rejected: {num_bad} (")
    assert all(f"{reason} {count}" in rejected for reason, count in expected_counts().items())
    assert {path.name: path.read_bytes() for path in (corpus / "cli").glob("*.*")} == {
        path.name: path.read_bytes() for path in prepared.glob("*.*")
    }


def test_forged_control_tokens_are_refused_where_the_recipe_says_so(corpus: Path) -> None:
    recipe = load_recipe(corpus / "recipe.yaml", output=str(corpus / "strict"))
    template = recipe.encode.template.model_copy(update={"text_policy": "reject"})
    strict = recipe.model_copy(update={"encode": recipe.encode.model_copy(update={"template": template})})
    manifest = prepare(strict)
    assert manifest.rejects == {**expected_counts(), "control_token": 1}
    (found,) = (item for item in rejections(corpus / "strict").values() if item.reason == "control_token")
    assert "'<|im_end|>'" in found.detail
    assert "messages.0.content.1" in found.detail


def test_planning_tells_what_headers_tell(corpus: Path) -> None:
    """`plan` decodes nothing, so it may miss damage; what it rejects, `prepare` rejects for the same reason."""
    command = [sys.executable, "-m", "omniprep", "plan", "recipe.yaml", "--json"]
    done = subprocess.run(command, cwd=corpus, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    planned, made = json.loads(done.stdout)["totals"]["rejects"], expected_counts()
    assert all(line.startswith("plan: ") for line in done.stderr.splitlines()), done.stderr
    assert all(count <= made.get(reason, 0) for reason, count in planned.items()), (planned, made)
    for reason in ("media_missing", "media_empty", "media_forbidden", "image_aspect", "role_unknown", "media_no_stream"):
        assert planned[reason] == made[reason], reason
