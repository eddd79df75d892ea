"""JSON Schemas of what users write and read, made from the pydantic models.

`schemas/` in the repository holds what `write_schemas` writes; a test fails when they differ. The models read some
shorter spellings before they check (`"content": "text"`); those are added here, so a file that a schema accepts is
accepted by `parse_record`.
"""

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from omniprep.recipe import Recipe
from omniprep.records import Conversation, Document, Preference
from omniprep.shards.manifest import Manifest

JsonSchema = dict[str, Any]

MODELS: tuple[tuple[str, type[BaseModel]], ...] = (
    ("conversation.json", Conversation),
    ("preference.json", Preference),
    ("document.json", Document),
    ("recipe.json", Recipe),
    ("manifest.json", Manifest),
)
"""(file name, model) of every schema; add a line to publish another model."""


def schemas() -> dict[str, JsonSchema]:
    """Return every JSON Schema (draft 2020-12) by file name."""
    found = {}
    for name, model in MODELS:
        schema = _with_spellings(model.model_json_schema())
        found[name] = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": name, **schema}
    return found


def write_schemas(folder: Path) -> list[Path]:
    """Write every schema into `folder` and return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, schema in schemas().items():
        path = folder / name
        path.write_text(dump_schema(schema), encoding="utf-8")
        written.append(path)
    return written


def dump_schema(schema: JsonSchema) -> str:
    """Return a schema as the text of its file."""
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def _with_spellings(schema: JsonSchema) -> JsonSchema:
    """Add the spellings that the models' `before` validators rewrite."""
    models = {**schema.get("$defs", {}), schema.get("title", ""): schema}
    if "Message" in models:
        _add_choice(models["Message"], "content", {"type": "string"})
        models["Message"]["required"].remove("content")
        models["Message"]["anyOf"] = [{"required": ["content"]}, {"required": ["tool_calls"]}]
    if "ToolCall" in models:
        _allow_bare_call(models["ToolCall"])
    if "MediaBlob" in models:  # JSON has no bytes: they come in Parquet, HF `datasets` and tars
        models["MediaBlob"]["properties"].pop("bytes")
        models["MediaBlob"]["required"] = ["path"]
    if "Preference" in models:
        for key in ("prompt", "chosen", "rejected"):
            _add_choice(models["Preference"], key, {"type": "string"}, {"$ref": "#/$defs/Message"})
    if "Document" in models:
        models["Document"]["properties"]["text"] = {"type": "string", "description": "Short for one text part."}
        models["Document"]["required"].remove("parts")
        models["Document"]["oneOf"] = [{"required": ["parts"]}, {"required": ["text"]}]
    for name in models.keys() & {"Conversation", "Preference", "Document"}:
        _add_choice(models[name], "id", {"type": "integer"})
    for name in models.keys() & {"JsonlSource", "ParquetSource", "WebDatasetSource"}:
        _add_choice(models[name], "path", {"type": "string"})
    for name in models.keys() & {"ImagePart", "AudioPart", "VideoPart"}:
        _add_part_spellings(models[name])
    return schema


def _add_choice(model: JsonSchema, key: str, *choices: JsonSchema) -> None:
    given = dict(model["properties"][key])
    shown = {word: given.pop(word) for word in ("title", "description", "default") if word in given}
    present = given["anyOf"] if set(given) == {"anyOf"} else [given]
    model["properties"][key] = {**shown, "anyOf": [*choices, *present]}


def _allow_bare_call(tool_call: JsonSchema) -> None:
    """Let `{"name", "arguments"}` stand for `{"function": {"name", "arguments"}}`."""
    call = {key: tool_call.pop(key) for key in ("properties", "required", "additionalProperties", "type")}
    tool_call["anyOf"] = [call, {"$ref": "#/$defs/FunctionCall"}]


def _add_part_spellings(part: JsonSchema) -> None:
    """Let `{"type": "image", "url": ...}` and `{"image_url": {"url": ...}}` stand for `{"image": ...}`."""
    kind = part["properties"]["type"]["const"]
    part["properties"]["type"] = {**part["properties"]["type"], "enum": [kind, f"{kind}_url"]}
    part["properties"]["type"].pop("const")
    medium = part["properties"][kind]
    wrapped = {"type": "object", "properties": {"url": {"type": "string", "minLength": 1}}, "required": ["url"]}
    plain = {word: item for word, item in medium.items() if word not in ("title", "description")}
    short = {**plain, "description": f"Short for `{kind}`."}
    part["properties"] |= {f"{kind}_url": {"anyOf": [plain, wrapped], "description": f"As OpenAI writes `{kind}`."}}
    part["properties"] |= {"url": short, "path": short}
    part["required"].remove(kind)
    part["oneOf"] = [
        {"required": [kind]},
        {"required": [f"{kind}_url"]},
        {"required": ["type", "url"]},
        {"required": ["type", "path"]},
    ]
