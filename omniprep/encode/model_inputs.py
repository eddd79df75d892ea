"""An encoded sample as the model's own arguments: names and dtypes of transformers' Thinker and its processor."""

from collections.abc import Sequence
from itertools import accumulate
from math import prod

import numpy as np
import numpy.typing as npt

from omniprep.features.patches import num_patch_columns, patchify
from omniprep.media.frames import decode_frames
from omniprep.profile import QWEN2_5_OMNI, ModelProfile
from omniprep.types import EncodedSample, EncodedVision, Float32Array


def model_inputs(
    sample: EncodedSample, layout_name: str = "tokens", profile: ModelProfile = QWEN2_5_OMNI
) -> dict[str, npt.NDArray[np.generic]]:
    """Return one sample without a batch axis; keys of absent modalities are left out, as the processor does.

    `input_ids`, `labels`, `attention_mask` (L,) int64 · `position_ids` (3, L) int64 · `input_features` (n_audio, 128,
    F_max) float32 at the longest true length, `feature_attention_mask` (n_audio, F_max) int32 · `pixel_values`,
    `pixel_values_videos` (patches, 1176) float32 · `image_grid_thw`, `video_grid_thw` (n, 3) int64 ·
    `video_second_per_grid` (n_videos,) float32. Labels are not shifted: the model's own loss shifts.
    """
    layout = sample.layouts[layout_name]
    inputs: dict[str, npt.NDArray[np.generic]] = {
        "input_ids": layout.input_ids.astype(np.int64),
        "labels": layout.labels.astype(np.int64),
        "attention_mask": np.ones(layout.num_tokens, np.int64),
        "position_ids": layout.position_ids.astype(np.int64),
    }
    if sample.audio:
        inputs["input_features"], inputs["feature_attention_mask"] = pad_mel([item.mel for item in sample.audio])
    images = [item for item in sample.vision if item.kind == "image"]
    videos = [item for item in sample.vision if item.kind == "video"]
    if images:
        inputs["pixel_values"] = _pixels(images, profile)
        inputs["image_grid_thw"] = np.array([item.grid_thw for item in images], np.int64)
    if videos:
        inputs["pixel_values_videos"] = _pixels(videos, profile)
        inputs["video_grid_thw"] = np.array([item.grid_thw for item in videos], np.int64)
        inputs["video_second_per_grid"] = np.array([item.second_per_grid for item in videos], np.float32)
    return inputs


def pad_mel(
    items: Sequence[npt.NDArray[np.floating]],
) -> tuple[Float32Array, npt.NDArray[np.int32]]:
    """Return `input_features` (n, bins, F_max) float32, zero behind each item's end, and `feature_attention_mask` (n, F_max).

    `items` are (bins, F) log-mels; there is at least one.

    >>> features, mask = pad_mel([np.ones((128, 3), np.float16), np.ones((128, 1), np.float16)])
    >>> features.shape, mask.tolist()
    ((2, 128, 3), [[1, 1, 1], [1, 0, 0]])
    """
    longest = max(item.shape[1] for item in items)
    features = np.zeros((len(items), items[0].shape[0], longest), np.float32)
    mask = np.zeros((len(items), longest), np.int32)
    for index, item in enumerate(items):
        features[index, :, : item.shape[1]] = item
        mask[index, : item.shape[1]] = 1
    return features, mask


def _pixels(items: Sequence[EncodedVision], profile: ModelProfile) -> Float32Array:
    counts = [prod(item.grid_thw) for item in items]
    rows = np.empty((sum(counts), num_patch_columns(profile)), np.float32)
    for item, start, count in zip(items, accumulate(counts, initial=0), counts, strict=False):
        frames = decode_frames(item.frames, item.frame_format, height=item.height, width=item.width)
        patchify(frames, profile, out=rows[start : start + count])
    return rows
