"""Small encoded samples, made without any encoder but with everything that must agree about them."""

from io import BytesIO

import numpy as np
from PIL import Image

from omniprep.profile import QWEN2_5_OMNI
from omniprep.types import EncodedAudio, EncodedSample, EncodedVision, Layout, Segment, SegmentKind, VideoTiming

SPECIAL = QWEN2_5_OMNI.special
PLACEHOLDER: dict[SegmentKind, int] = {"audio": SPECIAL.audio, "image": SPECIAL.image, "video": SPECIAL.video}


def jpeg(height: int = 28, width: int = 28, seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    sink = BytesIO()
    Image.fromarray(pixels).save(sink, "JPEG", quality=90)
    return sink.getvalue()


def audio_item(num_samples: int = 16_000, seed: int = 0) -> EncodedAudio:
    frames = QWEN2_5_OMNI.num_mel_frames(num_samples)
    mel = np.random.default_rng(seed).normal(size=(128, frames)).astype(np.float16).astype(np.float32)
    return EncodedAudio(mel=mel, num_samples=num_samples, source=f"a{seed}.wav", start_s=0.25, decoder="soundfile")


def image_item(height: int = 28, width: int = 56, seed: int = 0) -> EncodedVision:
    return EncodedVision(
        kind="image",
        grid_thw=QWEN2_5_OMNI.grid_thw(1, height, width),
        frames=(jpeg(height, width, seed),),
        frame_format="jpeg",
        height=height,
        width=width,
        source="i.png",
    )


def video_item(num_frames: int = 4, height: int = 28, width: int = 28) -> EncodedVision:
    return EncodedVision(
        kind="video",
        grid_thw=QWEN2_5_OMNI.grid_thw(num_frames, height, width),
        frames=tuple(jpeg(height, width, seed) for seed in range(num_frames)),
        frame_format="jpeg",
        height=height,
        width=width,
        source="v.mp4",
        second_per_grid=0.8,
        timing=VideoTiming(
            source_fps=25.0,
            num_source_frames=100,
            frame_indices=tuple(range(0, 10 * num_frames, 10)),
            frame_times_s=tuple(0.4 * number for number in range(num_frames)),
            sample_fps=2.5,
            audio_start_s=None,
            decoder="decord",
        ),
    )


def layout(blocks: list[tuple[SegmentKind, int, int, bool]]) -> Layout:
    """Return a layout of (kind, tokens, item, supervised) blocks with plain increasing positions."""
    segments, ids, labels = [], [], []
    for kind, count, item, supervised in blocks:
        start = len(ids)
        block = [PLACEHOLDER.get(kind, 0) or 1000 + start + number for number in range(count)]
        ids += block
        labels += block if supervised else [-100] * count
        segments.append(Segment(kind=kind, start=start, stop=len(ids), supervised=supervised, item=item))
    positions = np.tile(np.arange(len(ids), dtype=np.int32), (3, 1))
    return Layout(
        input_ids=np.array(ids, np.int32), labels=np.array(labels, np.int32), position_ids=positions, segments=tuple(segments)
    )


def text_sample(key: str = "chat-00000000", length: int = 5, **changes: object) -> EncodedSample:
    tokens = layout([("text", length, -1, False), ("text", 3, -1, True)])
    return EncodedSample(key=key, layouts={"tokens": tokens}, source="chat", row=0, **changes)  # type: ignore[arg-type]


def media_sample(key: str = "mix-00000001", **changes: object) -> EncodedSample:
    """Two sounds, an image and a silent video between text."""
    audio = (audio_item(16_000), audio_item(4_000, seed=1))
    vision = (image_item(), video_item())
    tokens = layout(
        [
            ("text", 3, -1, False),
            ("audio", QWEN2_5_OMNI.num_audio_tokens(audio[0].num_mel_frames), 0, False),
            ("image", QWEN2_5_OMNI.num_vision_tokens(vision[0].grid_thw), 0, False),
            ("control", 1, -1, False),
            ("video", QWEN2_5_OMNI.num_vision_tokens(vision[1].grid_thw), 1, False),
            ("audio", QWEN2_5_OMNI.num_audio_tokens(audio[1].num_mel_frames), 1, False),
            ("text", 4, -1, True),
        ]
    )
    values = {"source": "mix", "row": 1, "meta": {"lang": "中文", "n": [1, None]}, "id": "user.id/1", **changes}
    return EncodedSample(key=key, layouts={"tokens": tokens}, audio=audio, vision=vision, **values)  # type: ignore[arg-type]


def preference_sample(key: str = "dpo-00000000") -> EncodedSample:
    chosen = layout([("text", 4, -1, False), ("image", 2, 0, False), ("text", 3, -1, True)])
    rejected = layout([("text", 4, -1, False), ("image", 2, 0, False), ("text", 6, -1, True)])
    return EncodedSample(key=key, layouts={"chosen": chosen, "rejected": rejected}, vision=(image_item(),), source="dpo", row=0)


def assert_equal(a: EncodedSample, b: EncodedSample) -> None:
    for name in ("key", "id", "rope_mode", "source", "row", "split", "meta", "vision"):
        assert getattr(a, name) == getattr(b, name), name
    assert list(a.layouts) == list(b.layouts)
    for name, left in a.layouts.items():
        right = b.layouts[name]
        np.testing.assert_array_equal(left.input_ids, right.input_ids)
        np.testing.assert_array_equal(left.labels, right.labels)
        np.testing.assert_array_equal(left.position_ids, right.position_ids)
        assert left.segments == right.segments
    assert len(a.audio) == len(b.audio)
    for one, two in zip(a.audio, b.audio, strict=True):
        np.testing.assert_array_equal(one.mel, two.mel)
        assert (one.num_samples, one.source, one.start_s, one.decoder, one.truncated_from_s) == (
            two.num_samples,
            two.source,
            two.start_s,
            two.decoder,
            two.truncated_from_s,
        )
