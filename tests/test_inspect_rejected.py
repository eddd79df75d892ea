"""What was rejected is told by the command line itself, whatever brackets names and ids hold."""

from pathlib import Path

from typer.testing import CliRunner

from omniprep.cli import app
from omniprep.prepare import prepare
from tests.prepare_builders import chat, recipe


def shown(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["inspect", *map(str, arguments)], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output + str(result.exception)
    return result.output


def test_rejected_records_are_shown_with_their_reason(tmp_path: Path) -> None:
    prepare(recipe(tmp_path, [chat(0), '{"messages": ', chat(2, {"image": "[/none].png"})]))
    overview = shown(tmp_path / "out")
    assert "chat-00000001  chat.jsonl:2: schema_invalid: not valid JSON" in overview
    assert "messages.0.content.1: [/none].png: no such file" in overview
    one = shown(tmp_path / "out", "chat-00000002")
    assert "media_missing" in one
    assert '"answer 2"' in one


def test_brackets_are_no_markup(tmp_path: Path) -> None:
    prepare(recipe(tmp_path, [{**chat(0), "id": "[/bold] [red]x"}]))
    assert "[/bold] [red]x" in shown(tmp_path / "out")
    assert "(id [/bold] [red]x)" in shown(tmp_path / "out", "chat-00000000")
