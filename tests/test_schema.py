"""`schemas/` is what the models say, and says what `parse_record` accepts."""

from pathlib import Path
from typing import Any

import pytest

from omniprep.config import read_yaml
from omniprep.errors import RejectSample
from omniprep.records import parse_record
from omniprep.schema import dump_schema, schemas, write_schemas

FOLDER = Path(__file__).parent.parent / "schemas"

TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def turn(content: Any, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content, **more}]}


ACCEPTED = [
    ("conversation", {"messages": TURNS}),
    ("conversation", {"id": 7, "split": "test", "meta": {"a": [1]}, "messages": TURNS, "tools": [{"name": "f"}]}),
    ("conversation", turn([{"type": "image", "image": "a.png"}, {"text": "What?"}])),
    ("conversation", turn([{"image_url": {"url": "a.png"}}, {"type": "image_url", "image_url": "a.png"}])),
    ("conversation", turn([{"type": "audio", "path": "a.wav"}, {"type": "video", "url": "a.mp4"}])),
    ("conversation", turn([{"audio": "a.wav", "audio_start": 0.5, "audio_end": 1}])),
    ("conversation", turn([{"video": "a.mp4", "fps": 1.5, "audio_in_video": "on", "audio_track": {"path": "a.wav"}}])),
    ("conversation", turn([{"video": ["1.png", "2.png"], "sample_fps": 2}], loss=True)),
    ("conversation", {"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"x": 1}}]}]}),
    ("conversation", {"messages": [{"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}]}),
    ("conversation", {"messages": [{"role": "tool", "content": "3", "name": "f", "tool_call_id": "c1"}]}),
    ("preference", {"prompt": "Hi", "chosen": "Hello", "rejected": "No"}),
    ("preference", {"prompt": TURNS[:1], "chosen": TURNS[1], "rejected": TURNS[1:]}),
    ("document", {"text": "Once"}),
    ("document", {"parts": [{"image": "a.png"}, {"text": "Once", "loss": False}]}),
]
REFUSED = [
    ("conversation", {"messages": []}),
    ("conversation", {"messages": TURNS, "extra": 1}),
    ("conversation", {"messages": [{"role": "robot", "content": "x"}]}),
    ("conversation", {"messages": [{"role": "user"}]}),
    ("conversation", turn([{"image": "a.png", "image_url": "a.png"}])),
    ("conversation", turn([{"image": ""}])),
    ("conversation", turn([{"image": {"bytes": "abc"}}])),
    ("conversation", turn([{"video": []}])),
    ("conversation", turn([{"video": "a.mp4", "fps": 0}])),
    ("conversation", turn([{"video": "a.mp4", "audio_in_video": "maybe"}])),
    ("conversation", turn([{"audio": "a.wav", "text": "both"}])),
    ("conversation", {"messages": [{"role": "assistant", "tool_calls": [{"arguments": {}}]}]}),
    ("conversation", {"messages": TURNS, "split": "a b"}),
    ("preference", {"prompt": "Hi", "chosen": "Hello"}),
    ("preference", {"prompt": 5, "chosen": "Hello", "rejected": "No"}),
    ("document", {"parts": []}),
    ("document", {"text": 5}),
]


def test_the_files_in_the_repository_are_up_to_date() -> None:
    committed = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.glob("*.json")}
    assert committed == {name: dump_schema(schema) for name, schema in schemas().items()}, (
        "run `omniprep schema --out schemas` and commit"
    )


def test_write_schemas_writes_what_schemas_returns(tmp_path: Path) -> None:
    files = write_schemas(tmp_path / "new")
    assert {path.name: path.read_text(encoding="utf-8") for path in files} == {n: dump_schema(s) for n, s in schemas().items()}


@pytest.mark.parametrize(("name", "row"), ACCEPTED)
def test_schema_and_parser_accept_the_same_rows(name: str, row: dict[str, Any]) -> None:
    parse_record(row)
    pytest.importorskip("jsonschema").Draft202012Validator(schemas()[f"{name}.json"]).validate(row)


@pytest.mark.parametrize(("name", "row"), REFUSED)
def test_schema_and_parser_refuse_the_same_rows(name: str, row: dict[str, Any]) -> None:
    with pytest.raises(RejectSample):
        parse_record(row)
    assert not pytest.importorskip("jsonschema").Draft202012Validator(schemas()[f"{name}.json"]).is_valid(row)


RECIPES = [path for path in sorted((FOLDER.parent / "pipelines").glob("*.yaml")) if not path.stem.startswith("train_")]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_the_recipes_that_we_ship_fit_their_schema(recipe: Path) -> None:
    validator = pytest.importorskip("jsonschema").Draft202012Validator(schemas()["recipe.json"])
    validator.validate(read_yaml(recipe))
    assert not validator.is_valid({**read_yaml(recipe), "outputt": "x"})


def test_every_model_of_a_schema_is_described() -> None:
    for name, schema in schemas().items():
        for title, model in {schema["title"]: schema, **schema["$defs"]}.items():
            assert model.get("description"), f"{name}: {title} has no description"
