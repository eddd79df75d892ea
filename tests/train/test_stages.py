"""Each stage learns from real media: a row with text, a picture, sound, and video with and without sound.

The steps of a stage see the same row again, so their losses can be compared: about a second a step.
"""

from pathlib import Path
from typing import Any

import pytest
import yaml

from omniprep.prepare import prepare
from omniprep.recipe import load_recipe
from tests.train.conftest import ENCODE

pytestmark = [pytest.mark.reference, pytest.mark.media]
torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from tests.train.runs import ALL, PHASE, lines, recipe, train  # noqa: E402

FILES = {
    "image": "mllm_demo.json",
    "audio": "mllm_audio_demo.json",
    "video": "mllm_video_demo.json",
    "film": "mllm_video_audio_demo.json",
    "text": "alpaca_en_demo.json",
}


@pytest.fixture(scope="session")
def real(samples: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """One conversation with each kind of media."""
    folder = tmp_path_factory.mktemp("real")
    data = samples / "llamafactory" / "data"
    forms = {"text": {"format": "alpaca"}, "film": {"format": "sharegpt", "use_audio_in_video": True}}
    sources = [
        {"name": name, "kind": "jsonl", "path": str(data / file), "limit": 1, **forms.get(name, {"format": "sharegpt"})}
        for name, file in FILES.items()
    ]
    values = {
        "output": str(folder / "out"),
        "sources": sources,
        "encode": ENCODE,
        "run": {"executor": "serial", "guard": {"enabled": False}},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    prepare(load_recipe(folder / "recipe.yaml"))
    return str(folder / "out")


STAGES: dict[str, tuple[tuple[str, ...], float, dict[str, Any]]] = {
    "adapters": (("audio_adapter", "vision_adapter"), 3e-2, {}),
    "encoders": (("audio_adapter", "vision_adapter", "audio_encoder", "vision_encoder"), 1e-2, {}),
    "full": (ALL, 3e-3, {}),
    "lora": (("language_model",), 2e-2, {"model": {"checkpoint": "tiny", "lora": {"rank": 8}}}),
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_lowers_the_loss_of_every_kind_of_media(stage: str, real: str, tmp_path: Path) -> None:
    trains, rate, more = STAGES[stage]
    phase = {"name": PHASE, "train": list(trains), "steps": 5, "optimizer": {"learning_rate": rate, "schedule": "constant"}}
    data = {"datasets": [real], "plan": {"max_tokens": 4096}, "validation_split": None}
    train(recipe(tmp_path, real, phases=[phase], data=data, **more))
    first, last = lines(tmp_path)[0], lines(tmp_path)[-1]
    kinds = {name for name in first if name.startswith("loss/source/")}
    assert kinds == {f"loss/source/{name}" for name in FILES}
    for name in kinds:
        if name == "loss/source/text" and "language_model" not in trains:
            assert last[name] == first[name]  # what is before the language model is not in the way of text
        else:
            assert last[name] < first[name] - 0.05, name
