"""The reference, as installed: transformers' `Qwen2_5OmniProcessor` and `get_rope_index`, without a hub and without weights.

`verify --against transformers` and the parity tests compare with it. It needs the extra `omniprep[torch]`. The
processor's settings are those of the released checkpoint, taken from `profile.py`.
"""

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from omniprep.errors import ConfigError
from omniprep.profile import QWEN2_5_OMNI, ModelProfile
from omniprep.records import Message, Part, TextPart
from omniprep.tokens.vocab import TextTokenizer
from omniprep.types import Float32Array, Uint8Array

PLACEHOLDERS = {
    "audio": "<|audio_bos|><|AUDIO|><|audio_eos|>",
    "image": "<|vision_bos|><|IMAGE|><|vision_eos|>",
    "video": "<|vision_bos|><|VIDEO|><|vision_eos|>",
}
"""What the reference's chat template writes for a medium."""


@dataclass(frozen=True, kw_only=True)
class ReferenceInput:
    """What one call of the processor gets."""

    text: str
    audio: Sequence[Float32Array] = ()
    """16 kHz waveforms in text order, those of videos included."""
    images: Sequence[Uint8Array] = ()
    """(H, W, 3) each."""
    videos: Sequence[Uint8Array] = ()
    """(n, H, W, 3) each."""
    audio_from_video: Sequence[int | None] = ()
    """For each audio the video that it belongs to, or None."""
    fps: float = QWEN2_5_OMNI.video_fps
    options: dict[str, Any] = field(default_factory=dict)


def render_chatml(
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = False,
    system_prompt: str | None = None,
    add_vision_id: bool = False,
    add_audio_id: bool = False,
) -> str:
    """Return the string that the reference's chat template gives, with one placeholder a medium.

    Written apart from `tokens/template.py` on purpose: the two are compared. Tools are not part of that template.
    """
    text = ""
    parts = _PartRenderer(add_vision_id=add_vision_id, add_audio_id=add_audio_id)
    if messages[0].role != "system":
        text += (
            f"<|im_start|>system\n{QWEN2_5_OMNI.default_system_prompt if system_prompt is None else system_prompt}<|im_end|>\n"
        )
    for message in messages:
        text += f"<|im_start|>{message.role}\n{parts.render(message.content)}<|im_end|>\n"
    return text + ("<|im_start|>assistant\n" if add_generation_prompt else "")


def render_document(parts: Sequence[Part], *, add_vision_id: bool = False, add_audio_id: bool = False) -> str:
    """Return a document's text with one placeholder a medium; the reference has no template for it."""
    return _PartRenderer(add_vision_id=add_vision_id, add_audio_id=add_audio_id).render(parts) + "<|endoftext|>"


class _PartRenderer:
    """Writes parts, counting media over the whole text as the reference's template does."""

    def __init__(self, *, add_vision_id: bool, add_audio_id: bool) -> None:
        self._names = {"image": "Picture", "video": "Video"} if add_vision_id else {}
        self._names |= {"audio": "Audio"} if add_audio_id else {}
        self._counts: Counter[str] = Counter()

    def render(self, parts: Sequence[Part]) -> str:
        return "".join(part.text if isinstance(part, TextPart) else self._medium(part.type) for part in parts)

    def _medium(self, kind: str) -> str:
        self._counts[kind] += 1
        named = f"{self._names[kind]} {self._counts[kind]}: " if kind in self._names else ""
        return named + PLACEHOLDERS[kind]


class Reference:
    """The processor and the position function. Building it takes about two seconds."""

    def __init__(
        self, tokenizer: TextTokenizer, *, profile: ModelProfile = QWEN2_5_OMNI, max_audio_s: float | None = None
    ) -> None:
        """`max_audio_s` shortens the extractor's padding from its 300 s: the valid region stays the same, at less cost."""
        try:
            import torch
            import transformers
        except ImportError as error:
            raise ConfigError(f"comparing with transformers needs the extra: pip install 'omniprep[torch]' ({error})") from None
        transformers.logging.set_verbosity_error()
        self.version = transformers.__version__
        self._torch = torch
        self._profile = profile
        self.processor = _build_processor(tokenizer, profile, max_audio_s or profile.max_audio_s)
        self._rope = _build_rope(profile)

    def __call__(self, given: ReferenceInput) -> dict[str, npt.NDArray[Any]]:
        """Return the processor's outputs and `position_ids` (3, L), without the batch axis."""
        torch = self._torch
        arguments: dict[str, Any] = {"text": [given.text], "return_tensors": "pt", **given.options}
        if given.audio:
            arguments["audio"] = list(given.audio)
        if given.images:
            arguments["images"] = [torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))) for image in given.images]
        if given.videos:
            videos = [torch.from_numpy(np.ascontiguousarray(video.transpose(0, 3, 1, 2))) for video in given.videos]
            arguments |= {"videos": videos, "fps": given.fps}
        interleaved = any(video is not None for video in given.audio_from_video)
        if interleaved:
            arguments |= {"load_audio_from_video": True, "audio_from_video_indices": list(given.audio_from_video)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations inside transformers are not the caller's
            outputs = self.processor(**arguments)
        lengths = outputs["feature_attention_mask"].sum(-1) if "feature_attention_mask" in outputs else None
        seconds = outputs.get("video_second_per_grid")
        positions, _ = self._rope.get_rope_index(
            outputs["input_ids"],
            outputs.get("image_grid_thw"),
            outputs.get("video_grid_thw"),
            outputs["attention_mask"],
            interleaved,
            lengths,
            torch.as_tensor(seconds) if seconds is not None else None,
        )
        arrays = {name: np.asarray(value) for name, value in outputs.items()}
        for name in ("input_ids", "attention_mask"):
            arrays[name] = arrays[name][0]
        return arrays | {"position_ids": positions[:, 0].numpy()}


def _build_processor(tokenizer: TextTokenizer, profile: ModelProfile, max_audio_s: float) -> Any:
    from transformers import (
        PreTrainedTokenizerFast,
        Qwen2_5OmniProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
        WhisperFeatureExtractor,
    )

    limits = {"shortest_edge": profile.image_limits.min_pixels, "longest_edge": profile.image_limits.max_pixels}
    vision = {
        "size": limits,
        "patch_size": profile.patch_size,
        "merge_size": profile.merge_size,
        "temporal_patch_size": profile.temporal_patch_size,
        "image_mean": list(profile.image_mean),
        "image_std": list(profile.image_std),
    }
    names = {"image": "<|IMAGE|>", "audio": "<|AUDIO|>", "video": "<|VIDEO|>"}
    special = {f"{name}_token": token for name, token in names.items()}
    for name in ("vision_bos", "vision_eos", "audio_bos", "audio_eos"):
        special[f"{name}_token"] = f"<|{name}|>"
    return Qwen2_5OmniProcessor(
        image_processor=Qwen2VLImageProcessor(**vision),
        video_processor=Qwen2VLVideoProcessor(**vision),
        feature_extractor=WhisperFeatureExtractor(
            feature_size=profile.num_mel_bins,
            sampling_rate=profile.sample_rate_hz,
            hop_length=profile.mel_hop,
            chunk_length=int(max_audio_s),
            n_fft=profile.mel_window,
            return_attention_mask=True,
        ),
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=tokenizer.full,
            eos_token="<|im_end|>",
            pad_token="<|endoftext|>",
            clean_up_tokenization_spaces=False,
            extra_special_tokens=special,
        ),
        chat_template="{{ messages }}",  # never used: `render_chatml` writes the text
    )


def _build_rope(profile: ModelProfile) -> Any:
    """Return an object with `get_rope_index` as the model has it; the method reads only the configuration."""
    from transformers.models.qwen2_5_omni.configuration_qwen2_5_omni import Qwen2_5OmniThinkerConfig
    from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2_5OmniPreTrainedModelForConditionalGeneration as Model

    class Rope:
        config = Qwen2_5OmniThinkerConfig(vision_start_token_id=profile.special.vision_bos)
        spatial_merge_size = profile.merge_size
        get_rope_index = Model.get_rope_index
        get_chunked_index = Model.get_chunked_index
        get_llm_pos_ids_for_vision = Model.get_llm_pos_ids_for_vision

    return Rope()
