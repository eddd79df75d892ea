"""The tiny Thinker learns from model inputs, agrees with transformers' own loss, and refuses inputs that do not fit."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from omniprep.errors import ConfigError
from omniprep.profile import IGNORE_INDEX, QWEN2_5_OMNI

pytestmark = [pytest.mark.reference]
torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from omniprep.train.tiny import choose_rows, num_targets, supervised_loss, tiny_thinker, train_steps  # noqa: E402

Inputs = dict[str, npt.NDArray[np.generic]]
SPECIAL = QWEN2_5_OMNI.special
NUM_MEL_FRAMES = 203
IMAGE_GRID = (1, 8, 12)
VIDEO_GRID = (3, 8, 8)


def make_inputs(seed: int = 0) -> Inputs:
    """Return one record with a sound, an image and a video, and 30 supervised tokens at its end."""
    rng = np.random.default_rng(seed)
    profile = QWEN2_5_OMNI
    ids = np.concatenate(
        [
            rng.integers(0, 1000, 10),
            [SPECIAL.audio_bos, *[SPECIAL.audio] * profile.num_audio_tokens(NUM_MEL_FRAMES), SPECIAL.audio_eos],
            [SPECIAL.vision_bos, *[SPECIAL.image] * profile.num_vision_tokens(IMAGE_GRID), SPECIAL.vision_eos],
            [SPECIAL.vision_bos, *[SPECIAL.video] * profile.num_vision_tokens(VIDEO_GRID), SPECIAL.vision_eos],
            rng.integers(0, 1000, 30),
        ]
    ).astype(np.int64)
    labels = np.full_like(ids, IGNORE_INDEX)
    labels[-30:] = ids[-30:]
    patch = 3 * profile.temporal_patch_size * profile.patch_size**2
    return {
        "input_ids": ids,
        "labels": labels,
        "attention_mask": np.ones_like(ids),
        "position_ids": np.tile(np.arange(ids.size), (3, 1)),
        "input_features": rng.standard_normal((1, profile.num_mel_bins, NUM_MEL_FRAMES)).astype(np.float32),
        "feature_attention_mask": np.ones((1, NUM_MEL_FRAMES), np.int32),
        "pixel_values": rng.standard_normal((np.prod(IMAGE_GRID), patch)).astype(np.float32),
        "image_grid_thw": np.array([IMAGE_GRID]),
        "pixel_values_videos": rng.standard_normal((np.prod(VIDEO_GRID), patch)).astype(np.float32),
        "video_grid_thw": np.array([VIDEO_GRID]),
        "video_second_per_grid": np.array([1.0], np.float32),
    }


def test_loss_falls_and_starts_at_chance() -> None:
    losses = [step.loss for step in train_steps(tiny_thinker(), [make_inputs(0), make_inputs(1)], steps=8)]
    assert losses[0] == pytest.approx(np.log(QWEN2_5_OMNI.vocab_size), abs=0.2)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 1.0


def test_loss_is_the_models_own() -> None:
    model, inputs = tiny_thinker(seed=3), make_inputs(2)
    tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
    for name, axis in (("input_ids", 0), ("labels", 0), ("attention_mask", 0), ("position_ids", 1)):
        tensors[name] = tensors[name].unsqueeze(axis)
    with torch.no_grad():
        expected = model(**tensors, use_cache=False).loss.item()
        ours = supervised_loss(model, inputs).item() / num_targets(inputs)
    assert ours == pytest.approx(expected, rel=1e-5)


def test_every_input_reaches_the_loss() -> None:
    model, inputs = tiny_thinker(seed=1), make_inputs(0)
    with torch.no_grad():
        base = supervised_loss(model, inputs).item()
        for name in ("position_ids", "input_features", "pixel_values", "pixel_values_videos"):
            assert supervised_loss(model, {**inputs, name: inputs[name] * 3}).item() != base, name
        other_ids = np.concatenate([[1001], inputs["input_ids"][1:]])
        assert supervised_loss(model, {**inputs, "input_ids": other_ids}).item() != base


def test_a_wrong_number_of_placeholders_stops_it() -> None:
    model, inputs = tiny_thinker(), make_inputs()
    ids = inputs["input_ids"].copy()
    ids[np.flatnonzero(ids == SPECIAL.image)[0]] = 5
    with pytest.raises(ValueError, match=r"[Ii]mage"):
        supervised_loss(model, {**inputs, "input_ids": ids})


def test_nothing_to_learn_is_an_error() -> None:
    inputs = make_inputs()
    inputs["labels"] = np.full_like(inputs["labels"], IGNORE_INDEX)
    with pytest.raises(ConfigError, match="nothing to learn"):
        next(train_steps(tiny_thinker(), [inputs], steps=1))


def test_rows_are_chosen_over_all_mixes_of_modalities() -> None:
    flags = dict.fromkeys(("has_audio", "has_image", "has_video", "has_video_with_sound"), False)
    rows = [{**flags, "key": f"t{n}", "num_tokens": n, "num_supervised": n} for n in range(5)]
    rows += [{**flags, "has_image": True, "key": f"i{n}", "num_tokens": 100 + n, "num_supervised": 1} for n in range(2)]
    assert [row["key"] for row in choose_rows(rows, num_samples=4)] == ["t1", "i0", "t2", "i1"]
    assert [row["key"] for row in choose_rows(rows, num_samples=99)] == ["t1", "i0", "t2", "i1", "t3", "t4"]


def test_a_folder_that_is_no_dataset_is_bad_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from omniprep.train.tiny import main

    assert main([str(tmp_path)]) == 2
    assert "error:" in capsys.readouterr().err
