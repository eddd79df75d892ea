"""Every constant of the model that data must agree with, once.

Values of the released Qwen2.5-Omni-7B processor and model configuration (transformers 5.23,
`models/qwen2_5_omni`). Nothing else in OmniPrep writes these numbers down.
"""

import math
from dataclasses import dataclass, field

IGNORE_INDEX = -100
"""Label of a token that is not supervised, as in `torch.nn.CrossEntropyLoss`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SpecialTokens:
    """Ids of the control tokens that a rendered sample uses."""

    endoftext: int = 151643
    im_start: int = 151644
    im_end: int = 151645
    audio: int = 151646
    audio_bos: int = 151647
    audio_eos: int = 151648
    vision_bos: int = 151652
    vision_eos: int = 151653
    image: int = 151655
    video: int = 151656
    tool_call: int = 151657
    tool_call_end: int = 151658


@dataclass(frozen=True, kw_only=True, slots=True)
class PixelLimits:
    """Inclusive limits of `height * width` after resizing."""

    min_pixels: int
    max_pixels: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelProfile:
    """What a Qwen2.5-Omni style Thinker expects of its data."""

    name: str
    special: SpecialTokens = field(default_factory=SpecialTokens)
    vocab_size: int
    """Number of tokens with a text form, added tokens included."""

    # Audio: WhisperFeatureExtractor and the audio tower.
    sample_rate_hz: int
    mel_window: int
    """Samples in one STFT window (25 ms)."""
    mel_hop: int
    """Samples between two windows (10 ms)."""
    num_mel_bins: int
    max_audio_s: float
    """Longest clip that the reference extractor takes; it cuts the rest without a word."""

    # Vision: Qwen2VLImageProcessor, Qwen2VLVideoProcessor and qwen_omni_utils.
    patch_size: int
    merge_size: int
    temporal_patch_size: int
    max_aspect_ratio: int
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    image_limits: PixelLimits
    video_limits: PixelLimits
    video_total_pixels: int
    """Budget of pixels over all frames of one video."""
    video_fps: float
    min_video_frames: int
    max_video_frames: int

    # TMRoPE.
    position_id_per_second: int
    seconds_per_chunk: float

    default_system_prompt: str

    @property
    def resize_factor(self) -> int:
        """Return the pixels that one token spans in each direction; sides are multiples of it."""
        return self.patch_size * self.merge_size

    @property
    def mel_frames_per_second(self) -> int:
        """Return the mel frame rate.

        >>> QWEN2_5_OMNI.mel_frames_per_second
        100
        """
        return self.sample_rate_hz // self.mel_hop

    @property
    def position_ids_per_chunk(self) -> int:
        """Return the temporal ids in one interleaving chunk.

        >>> QWEN2_5_OMNI.position_ids_per_chunk
        50
        """
        return int(self.position_id_per_second * self.seconds_per_chunk)

    def num_mel_frames(self, num_samples: int) -> int:
        """Return the valid mel frames of a clip of `num_samples` at `sample_rate_hz` (reference: sample mask [::hop]).

        >>> QWEN2_5_OMNI.num_mel_frames(16_000), QWEN2_5_OMNI.num_mel_frames(161)
        (100, 2)
        """
        return -(-num_samples // self.mel_hop)

    def num_audio_tokens(self, num_mel_frames: int) -> int:
        """Return the tokens of an audio item: a convolution halves rounding up, pooling halves rounding down.

        >>> [QWEN2_5_OMNI.num_audio_tokens(frames) for frames in (2, 3, 100, 103, 30_000)]
        [0, 1, 25, 26, 7500]
        """
        return math.ceil(num_mel_frames / 2) // 2

    def num_vision_tokens(self, grid_thw: tuple[int, int, int]) -> int:
        """Return the tokens of an image or video from its grid in patches.

        >>> QWEN2_5_OMNI.num_vision_tokens((2, 4, 6))
        12
        """
        return math.prod(grid_thw) // self.merge_size**2

    def grid_thw(self, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Return (temporal, vertical, horizontal) patches; an odd last frame is repeated, an image is one grid step.

        >>> QWEN2_5_OMNI.grid_thw(3, 280, 364)
        (2, 20, 26)
        """
        return (-(-num_frames // self.temporal_patch_size), height // self.patch_size, width // self.patch_size)


QWEN2_5_OMNI = ModelProfile(
    name="qwen2.5-omni",
    vocab_size=151_665,
    sample_rate_hz=16_000,
    mel_window=400,
    mel_hop=160,
    num_mel_bins=128,
    max_audio_s=300.0,
    patch_size=14,
    merge_size=2,
    temporal_patch_size=2,
    max_aspect_ratio=200,
    image_mean=(0.48145466, 0.4578275, 0.40821073),
    image_std=(0.26862954, 0.26130258, 0.27577711),
    image_limits=PixelLimits(min_pixels=4 * 28 * 28, max_pixels=16_384 * 28 * 28),
    video_limits=PixelLimits(min_pixels=128 * 28 * 28, max_pixels=768 * 28 * 28),
    video_total_pixels=int(128_000 * 28 * 28 * 0.9),
    video_fps=2.0,
    min_video_frames=4,
    max_video_frames=768,
    position_id_per_second=25,
    seconds_per_chunk=2.0,
    default_system_prompt="You are a helpful assistant.",
)
