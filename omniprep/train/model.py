"""The Thinker that is trained: where its weights come from, which of them learn, and how it is written.

```
audio_encoder    model.audio_tower without its end     ─┐
audio_adapter    model.audio_tower.{ln_post, proj}      ├─►  language_model  ─►  head
vision_encoder   model.visual without its end           │    model.language_model    lm_head
vision_adapter   model.visual.merger                   ─┘    (embeddings included)
```

Parts are found through the modules, never by names in files: transformers has other names in memory than in checkpoints.
"""

from collections.abc import Collection, Iterator
from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn

from omniprep.config import Config
from omniprep.errors import ConfigError
from omniprep.profile import QWEN2_5_OMNI, ModelProfile
from omniprep.train.export import save_thinker
from omniprep.train.lora import LoraSettings, add_lora, has_lora, is_adapter
from omniprep.train.tiny import tiny_thinker

__all__ = [
    "LoraSettings",
    "ModelSettings",
    "ModuleName",
    "add_lora",
    "config_of",
    "load_config",
    "load_thinker",
    "modules_of",
    "parameters_of",
    "save_thinker",
    "train_only",
]

ModuleName = Literal["audio_encoder", "audio_adapter", "vision_encoder", "vision_adapter", "language_model", "head"]

TINY = "tiny"
_OMNI, _THINKER = "qwen2_5_omni", "qwen2_5_omni_thinker"
"""Model types that a checkpoint's configuration may have: a whole Omni model, or its Thinker alone."""


class ModelSettings(Config):
    """Which model is trained."""

    checkpoint: str = TINY
    """`tiny`, a folder, or a hub id: of a released Omni model, whose Thinker is taken, or of a saved Thinker."""
    from_scratch: bool = False
    """Take only the checkpoint's configuration; weights are random, by the run's seed."""
    lora: LoraSettings | None = None
    """Train adapters of the language model in its place."""
    learning_rate_scale: float = Field(default=1.0, gt=0)
    """Multiplies the learning rates of the recipe: a small random model takes larger ones than a released checkpoint, and a
    recipe is to fit both."""


def load_thinker(
    settings: ModelSettings, *, profile: ModelProfile = QWEN2_5_OMNI, seed: int = 0, keep_dtype: bool = False
) -> Any:
    """Return transformers' `Qwen2_5OmniThinkerForConditionalGeneration` on the CPU, with adapters if they are set.

    It is in float32, or with `keep_dtype` as the checkpoint stores it: bfloat16 takes half the memory of each rank's process.
    `seed` decides the random weights; the random state of the process is left alone. Raises `ConfigError` if there is no
    such checkpoint, if it is of another model or incomplete, or if it was made for other data than `profile` describes.
    """
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        thinker = _load(settings, profile, seed, dtype="auto" if keep_dtype else torch.float32)
        if settings.lora is not None:
            thinker = add_lora(thinker, settings.lora)
    _frozen_always(thinker).requires_grad_(False)
    return thinker.train()


def config_of(settings: ModelSettings, *, profile: ModelProfile = QWEN2_5_OMNI) -> Any:
    """Return the configuration of the Thinker that `load_thinker` would load, with its errors; no weight is read."""
    if settings.checkpoint == TINY:
        with torch.device("meta"):
            return tiny_thinker(profile).config
    config = load_config(settings.checkpoint)
    _check_profile(config, profile, settings.checkpoint)
    return config


def load_config(checkpoint: str) -> Any:
    """Return the configuration of a checkpoint's Thinker. Raises `ConfigError`."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(checkpoint)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"model.checkpoint: {checkpoint}: expected {TINY!r}, a folder with a config.json, or a hub id; {reason:.300}"
        ) from None
    if config.model_type == _OMNI:
        return config.thinker_config
    if config.model_type != _THINKER:
        raise ConfigError(
            f"model.checkpoint: {checkpoint}: expected a model of type {_OMNI} or {_THINKER}, got {config.model_type!r}"
        )
    return config


def modules_of(thinker: Any) -> dict[ModuleName, tuple[nn.Module, ...]]:
    """Return the modules of each part; together they hold every parameter once."""
    tower, visual = thinker.model.audio_tower, thinker.model.visual
    return {
        "audio_encoder": tuple(_children(tower, without=("ln_post", "proj"))),
        "audio_adapter": (tower.ln_post, tower.proj),
        "vision_encoder": tuple(_children(visual, without=("merger",))),
        "vision_adapter": (visual.merger,),
        "language_model": (thinker.model.language_model,),
        "head": (thinker.lm_head,),
    }


def parameters_of(thinker: Any) -> dict[ModuleName, tuple[nn.Parameter, ...]]:
    """Return the parameters of each part, those of adapters included; a head that shares the embeddings' has none."""
    seen: set[nn.Parameter] = set()
    parts: dict[ModuleName, tuple[nn.Parameter, ...]] = {}
    for name, modules in modules_of(thinker).items():
        own = [parameter for module in modules for parameter in module.parameters() if parameter not in seen]
        seen.update(own)
        parts[name] = tuple(own)
    return parts


def train_only(thinker: Any, names: Collection[ModuleName]) -> None:
    """Let the named parts learn and freeze the others. With adapters, `language_model` means them and not their base.

    Raises `ConfigError` if the head and the embeddings are the same weights and only one of the two is to learn.
    """
    only_adapters = has_lora(thinker)
    is_tied = thinker.lm_head.weight is thinker.model.language_model.embed_tokens.weight
    if is_tied and ("head" in names) != ("language_model" in names and not only_adapters):
        raise ConfigError(
            "phases.train: the head of this model shares its weights with the embeddings, so `head` and `language_model` learn "
            f"together or not at all{', and with adapters not at all: leave `head` out' if only_adapters else ''}"
        )
    for part, modules in modules_of(thinker).items():
        for module in modules:
            for name, parameter in module.named_parameters():
                base_of_adapter = part == "language_model" and only_adapters and not is_adapter(f".{name}")
                parameter.requires_grad_(part in names and not base_of_adapter)
    _frozen_always(thinker).requires_grad_(False)


def _load(settings: ModelSettings, profile: ModelProfile, seed: int, *, dtype: Any) -> Any:
    from safetensors import SafetensorError
    from transformers import Qwen2_5OmniThinkerForConditionalGeneration

    if settings.checkpoint == TINY:
        return tiny_thinker(profile, seed=seed)
    config = config_of(settings, profile=profile)
    if settings.from_scratch:
        return Qwen2_5OmniThinkerForConditionalGeneration(config)
    try:
        thinker, report = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(
            settings.checkpoint, config=config, dtype=dtype, output_loading_info=True
        )
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"model.checkpoint: {settings.checkpoint}: its weights cannot be read: {reason:.300}") from None
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ConfigError(
            f"model.checkpoint: {settings.checkpoint}: {len(missing)} weights of the Thinker are missing, the first is "
            f"{missing[0]}; it would learn from random ones. Download it again, or set from_scratch: true"
        )
    return thinker


def _check_profile(config: Any, profile: ModelProfile, checkpoint: str) -> None:
    """Raise `ConfigError` if a configuration states other ids or features than the profile that data are made by."""
    special, audio, vision = profile.special, config.audio_config, config.vision_config
    pairs = {
        "audio_token_index": (config.audio_token_index, special.audio),
        "image_token_index": (config.image_token_index, special.image),
        "video_token_index": (config.video_token_index, special.video),
        "audio_start_token_id": (config.audio_start_token_id, special.audio_bos),
        "audio_end_token_id": (config.audio_end_token_id, special.audio_eos),
        "vision_start_token_id": (getattr(config, "vision_start_token_id", special.vision_bos), special.vision_bos),
        "vision_end_token_id": (getattr(config, "vision_end_token_id", special.vision_eos), special.vision_eos),
        "position_id_per_seconds": (config.position_id_per_seconds, profile.position_id_per_second),
        "seconds_per_chunk": (config.seconds_per_chunk, profile.seconds_per_chunk),
        "audio_config.num_mel_bins": (audio.num_mel_bins, profile.num_mel_bins),
        "vision_config.patch_size": (vision.patch_size, profile.patch_size),
        "vision_config.temporal_patch_size": (vision.temporal_patch_size, profile.temporal_patch_size),
        "vision_config.spatial_merge_size": (vision.spatial_merge_size, profile.merge_size),
    }
    wrong = [f"{name} is {found}, the data need {wanted}" for name, (found, wanted) in pairs.items() if found != wanted]
    if config.text_config.vocab_size < profile.vocab_size:
        wrong.append(f"text_config.vocab_size is {config.text_config.vocab_size}, the data need {profile.vocab_size}")
    if wrong:
        raise ConfigError(f"model.checkpoint: {checkpoint}: not a model for data of profile {profile.name}: {'; '.join(wrong)}")


def _children(module: nn.Module, *, without: Collection[str]) -> Iterator[nn.Module]:
    return (child for name, child in module.named_children() if name not in without)


def _frozen_always(thinker: Any) -> nn.Module:
    """Return what no input goes through: trained, it has no optimizer state that a checkpoint could be read back into."""
    return thinker.model.audio_tower.audio_bos_eos_token
