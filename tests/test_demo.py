"""The demo's records: real, honest, native; its recipes read them; the whole way to a falling loss."""

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from rich.console import Console

from omniprep.recipe import load_recipe
from omniprep.records import Conversation, VideoPart, parse_record

ROOT = Path(__file__).parents[1]


def load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def rows(path: Path) -> Iterator[dict[str, object]]:
    yield from map(json.loads, path.read_text(encoding="utf-8").splitlines())


@pytest.mark.parametrize("name", ["demo", "demo_align", "demo_dpo"])
def test_recipes_are_valid_and_name_only_fetched_or_made_files(name: str) -> None:
    recipe = load_recipe(ROOT / "pipelines" / f"{name}.yaml").located()
    assert recipe.output.startswith("build/demo/")
    for source in recipe.sources:
        for path in source.path:
            assert Path(path).resolve().is_relative_to(ROOT / "build"), path


@pytest.mark.media
def test_made_records_are_native_and_name_media_that_exist(samples: Path, tmp_path: Path) -> None:
    counts = load_script("make_demo_data").make_demo_data(samples, tmp_path)
    assert counts == {"film": 73, "speech": 15, "photos": 9, "dialogues": 200}
    ids = set()
    for name in counts:
        for row in rows(tmp_path / f"{name}.jsonl"):
            record = parse_record(row)
            assert isinstance(record, Conversation)
            assert record.messages[-1].role == "assistant"
            ids.add(record.id)
            for message in record.messages:
                for part in message.content:
                    media = getattr(part, part.type)
                    if part.type != "text":
                        assert (samples / media).is_file(), media
                    if isinstance(part, VideoPart):
                        assert part.video_end is not None and part.video_start is not None
                        assert part.video_end - part.video_start == 6.0
    assert len(ids) == sum(counts.values())


@pytest.mark.media
def test_made_records_are_the_same_every_time(samples: Path, tmp_path: Path) -> None:
    script = load_script("make_demo_data")
    for run in ("a", "b"):
        script.make_demo_data(samples, tmp_path / run)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


@pytest.mark.reference
@pytest.mark.parametrize("path", sorted((ROOT / "pipelines").glob("train_*.yaml")), ids=lambda path: path.stem)
def test_training_recipes_are_valid_and_learn_from_what_the_demo_makes(path: Path) -> None:
    from omniprep.train.recipe import load_train_recipe

    recipe = load_train_recipe(path)
    assert recipe.output == f"build/train/{path.stem.removeprefix('train_')}"
    made = {load_recipe(ROOT / "pipelines" / f"{name}.yaml").output for name in ("demo", "demo_align", "demo_dpo")}
    assert set(recipe.data.datasets) <= made
    assert recipe.model.checkpoint == "tiny"


@pytest.mark.media
@pytest.mark.reference
def test_from_the_recipe_to_a_falling_loss(samples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    from omniprep.prepare import prepare
    from omniprep.train.recipe import load_train_recipe
    from omniprep.train.thinker import train

    demo = load_script("demo")
    load_script("make_demo_data").make_demo_data(samples, tmp_path / "build" / "demo" / "data")
    (tmp_path / "build" / "samples").symlink_to(samples, target_is_directory=True)
    (tmp_path / "pipelines").mkdir()
    recipe_file = tmp_path / "pipelines" / "demo.yaml"
    recipe_file.write_text((ROOT / "pipelines" / "demo.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    recipe = load_recipe(recipe_file, limit=3, output=str(tmp_path / "out"), executor="serial")
    manifest = prepare(recipe)
    assert manifest.num_rows == manifest.totals.num_records == 3 * len(recipe.sources)
    assert set(manifest.by_modality) == {"text", "audio", "image", "video", "video_with_sound"}
    torch.set_num_threads(1)
    changes = {
        "output": str(tmp_path / "run"),
        "data.datasets": [str(tmp_path / "out")],
        "data.validation_split": None,
        "phases.0.steps": 8,
        "watch.log_every": 1,
        "samples": {"prompts": 2, "max_new_tokens": 3},
    }
    train(load_train_recipe(ROOT / "pipelines" / "train_demo.yaml", changes=changes))
    log = tmp_path / "run" / "words" / "log.jsonl"
    losses = demo.losses_of(log)
    assert losses[-1] < losses[0] - 0.2
    demo.show_training(Console(width=200), log)
    shown = capsys.readouterr().out
    assert f"{losses[0]:.2f}" in shown and f"{losses[-1]:.2f}" in shown
    assert shown.count("asked") == shown.count("answered") == 2


def test_a_failing_step_stops_the_demo(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    demo = load_script("demo")
    monkeypatch.setattr(demo, "STEPS", (("one", "python -c 'raise SystemExit(3)'"), ("two", "python -c 'print(\"never\")'")))
    assert demo.main() == 3
    out = capsys.readouterr().out
    assert "step 1 failed with exit code 3" in out
    assert "2/2" not in out
