"""Model inputs of one record with every kind of media, and the plainest training there is, for tests of other things."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

from omniprep.profile import IGNORE_INDEX, QWEN2_5_OMNI

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


def supervised_loss(model: Any, inputs: Any) -> Any:
    """Return the cross-entropy summed over a record's supervised tokens, a scalar tensor; only their rows go through the head."""
    tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in inputs.items()}
    targets = tensors.pop("labels")[1:]
    for name, axis in (("input_ids", 0), ("attention_mask", 0), ("position_ids", 1)):
        tensors[name] = tensors[name].unsqueeze(axis)  # a batch of one
    hidden = model.model(**tensors, use_cache=False).last_hidden_state[0, :-1]
    supervised = targets != IGNORE_INDEX
    return F.cross_entropy(model.lm_head(hidden[supervised]), targets[supervised], reduction="sum")


def num_targets(inputs: Any) -> int:
    """Return how many tokens of a record are predicted: a supervised first token has nothing before it."""
    return int(np.count_nonzero(inputs["labels"][1:] != IGNORE_INDEX))


def train_steps(model: Any, batch: Sequence[Any], *, steps: int, learning_rate: float = 3e-3) -> list[float]:
    """Take AdamW steps on one fixed batch and return the loss of each before its update."""
    total, losses = sum(map(num_targets, batch)), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        parts = [supervised_loss(model, inputs) / total for inputs in batch]
        sum(parts).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(sum(parts).detach()))
    return losses
