"""The reference as its README says: `process_mm_info` -> `Qwen2_5OmniProcessor` -> `get_rope_index`, in one thread."""

import logging
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("FORCE_QWENVL_VIDEO_READER", "decord")  # what the README advises

Padding = Literal["max_length", "longest"]

# What the checkpoint's template writes for these records, so that rendering costs what it costs.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message.role != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message.role }}\n"
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_bos|><|IMAGE|><|vision_eos|>"
    "{% elif part.type == 'audio' %}<|audio_bos|><|AUDIO|><|audio_eos|>"
    "{% elif part.type == 'video' %}<|vision_bos|><|VIDEO|><|vision_eos|>"
    "{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
)


class _TrueLength:
    """A feature extractor that pads to the longest clip, whatever the processor asks for: the patch users make."""

    def __init__(self, extractor: Any) -> None:
        self._extractor = extractor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._extractor, name)

    def __call__(self, audio: Any, **options: Any) -> Any:
        return self._extractor(audio, **{**options, "padding": "longest"})


class ReadmePath:
    """The path, built once. `padding="longest"` is the patched one."""

    def __init__(self, padding: Padding = "max_length") -> None:
        warnings.filterwarnings("ignore")
        logging.disable(logging.WARNING)
        import imageio_ffmpeg
        import torch
        from qwen_omni_utils import process_mm_info

        from omniprep.reference import Reference
        from omniprep.tokens.vocab import TokenizerConfig, load_tokenizer

        torch.set_num_threads(1)
        torch.set_grad_enabled(False)
        # The loader of the sound of videos (audioread) calls an `ffmpeg` on PATH.
        tools = Path(tempfile.mkdtemp())
        (tools / "ffmpeg").symlink_to(imageio_ffmpeg.get_ffmpeg_exe())
        os.environ["PATH"] = f"{tools}{os.pathsep}{os.environ['PATH']}"
        reference = Reference(load_tokenizer(TokenizerConfig()))
        self.processor, self.rope = reference.processor, reference._rope
        self.processor.chat_template = CHAT_TEMPLATE
        if padding == "longest":
            self.processor.feature_extractor = _TrueLength(self.processor.feature_extractor)
        self._load = process_mm_info

    def __call__(self, record: dict[str, Any]) -> tuple[Any, Any]:
        """Return the processor's outputs and `position_ids` (3, 1, L) of one conversation."""
        messages = record["messages"]
        with_sound = any(part["type"] == "video" for message in messages for part in message["content"])
        text = self.processor.apply_chat_template(messages, add_generation_prompt=False, tokenize=False)
        audio, images, videos = self._load(messages, use_audio_in_video=with_sound)
        arguments: dict[str, Any] = {"text": [text], "return_tensors": "pt"}
        arguments |= {name: value for name, value in (("audio", audio), ("images", images), ("videos", videos)) if value}
        if with_sound:
            arguments |= {"load_audio_from_video": True, "audio_from_video_indices": list(range(len(videos)))}
        outputs = self.processor(**arguments)
        lengths = outputs["feature_attention_mask"].sum(-1) if "feature_attention_mask" in outputs else None
        seconds = outputs.get("video_second_per_grid")
        positions, _ = self.rope.get_rope_index(
            outputs["input_ids"],
            outputs.get("image_grid_thw"),
            outputs.get("video_grid_thw"),
            outputs["attention_mask"],
            with_sound,
            lengths,
            seconds,
        )
        return outputs, positions
