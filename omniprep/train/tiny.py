"""A Thinker small enough for tests, the demo and a first try of a recipe on a CPU: `model: {checkpoint: tiny}`.

It is transformers' own `Qwen2_5OmniThinkerForConditionalGeneration` with the released layout (token ids, mel bins, patches,
TMRoPE sections in the released proportions) and small widths, about 20 M parameters, nearly all of them the embedding and
the head.
"""

from typing import Any

import torch

from omniprep.profile import QWEN2_5_OMNI, ModelProfile

_HIDDEN = 64
_HEAD_DIM = 16
_MROPE_SECTION = [2, 3, 3]
"""Rotary pairs of the temporal, height and width ids: [16, 24, 24] of the released model, for a head of 16 instead of 128."""


def tiny_thinker(profile: ModelProfile = QWEN2_5_OMNI, *, seed: int = 0) -> Any:
    """Return a randomly initialised Thinker of transformers with small widths and the profile's token ids and features."""
    from transformers import Qwen2_5OmniThinkerConfig, Qwen2_5OmniThinkerForConditionalGeneration

    special = profile.special
    config = Qwen2_5OmniThinkerConfig(
        audio_config={
            "num_mel_bins": profile.num_mel_bins,
            "encoder_layers": 2,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 2 * _HIDDEN,
            "d_model": _HIDDEN,
            "output_dim": _HIDDEN,
        },
        vision_config={
            "depth": 2,
            "hidden_size": _HIDDEN,
            "intermediate_size": 2 * _HIDDEN,
            "num_heads": 4,
            "patch_size": profile.patch_size,
            "spatial_merge_size": profile.merge_size,
            "temporal_patch_size": profile.temporal_patch_size,
            "fullatt_block_indexes": [1],
            "out_hidden_size": _HIDDEN,
        },
        text_config={
            "vocab_size": profile.vocab_size,
            "hidden_size": _HIDDEN,
            "intermediate_size": 2 * _HIDDEN,
            "num_hidden_layers": 2,
            "num_attention_heads": _HIDDEN // _HEAD_DIM,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": _MROPE_SECTION},
            "tie_word_embeddings": False,
        },
        audio_token_index=special.audio,
        image_token_index=special.image,
        video_token_index=special.video,
        audio_start_token_id=special.audio_bos,
        audio_end_token_id=special.audio_eos,
        position_id_per_seconds=profile.position_id_per_second,
        seconds_per_chunk=int(profile.seconds_per_chunk),
        # The class has no default for these two; the released configuration file supplies them.
        vision_start_token_id=special.vision_bos,
        vision_end_token_id=special.vision_eos,
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    return Qwen2_5OmniThinkerForConditionalGeneration(config).train()
