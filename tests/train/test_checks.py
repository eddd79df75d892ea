"""What an export says of itself, and which data and models belong together. Whole commands are in `test_train_cli`."""

import json
from pathlib import Path

import pytest

from omniprep.errors import ConfigError
from omniprep.shards.manifest import read_manifest

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from omniprep.train.checks import check_context, check_rope_mode, read_card, rope_mode_of, write_card  # noqa: E402
from omniprep.train.recipe import DataSettings  # noqa: E402


def test_a_card_says_what_was_trained_on(mixed: str, tmp_path: Path) -> None:
    manifest = read_manifest(mixed)
    write_card(tmp_path, rope_mode="aligned", profile="qwen2.5-omni", steps=7, datasets=[manifest])
    card = read_card(str(tmp_path))
    assert card is not None
    assert (card["rope_mode"], card["steps"], card["profile"]) == ("aligned", 7, "qwen2.5-omni")
    assert card["datasets"] == [{"recipe_sha256": manifest.recipe_sha256, "records": 40}]


@pytest.mark.parametrize("text", [None, "{", "7"])
def test_what_has_no_card_says_nothing(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "omniprep.json").write_text(text)
    assert read_card(str(tmp_path)) is None


def test_positions_are_those_of_the_checkpoint_unless_the_recipe_says_others(mixed: str, tmp_path: Path) -> None:
    manifests = {mixed: read_manifest(mixed)}
    assert rope_mode_of(manifests) == "aligned"
    data = DataSettings(datasets={mixed: None})
    check_rope_mode(str(tmp_path), data, manifests)
    (tmp_path / "omniprep.json").write_text(json.dumps({"rope_mode": "reference"}))
    with pytest.raises(ConfigError, match=r"omniprep\.json says 'reference', .* set data\.rope_mode: aligned to train on these"):
        check_rope_mode(str(tmp_path), data, manifests)
    check_rope_mode(str(tmp_path), data.model_copy(update={"rope_mode": "aligned"}), manifests)


def test_rows_may_be_as_long_as_the_model_has_positions_and_no_longer() -> None:
    config = transformers.Qwen2_5OmniThinkerConfig(text_config={"max_position_embeddings": 512})
    check_context(config, 512)
    with pytest.raises(ConfigError, match="513 > 512"):
        check_context(config, 513)
