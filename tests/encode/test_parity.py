"""`rope_mode: reference` against the installed transformers, on random conversations that mix every kind of part."""

import io
from functools import cache
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from omniprep.encode.model_inputs import model_inputs
from omniprep.encode.thinker import EncodeConfig, ThinkerEncoder
from omniprep.media.video import VideoConfig
from omniprep.records import Conversation, MediaBlob, parse_record
from omniprep.reference import Reference, ReferenceInput, render_chatml
from omniprep.tokens.vocab import TokenizerConfig, load_tokenizer
from omniprep.types import MediaFile

pytestmark = pytest.mark.reference

VIDEO_SIZES = [(280, 364), (308, 336), (224, 448), (448, 224), (112, 896), (392, 420)]
TEXTS = st.one_of(
    st.sampled_from(["Hello, world!", "\n\nWas ist das?", "你好。\n", "  ", "12345", "<|box_end", "a\r\nb"]), st.text(max_size=30)
)


@cache
def encoder() -> ThinkerEncoder:
    return ThinkerEncoder(EncodeConfig(rope_mode="reference", frame_format="raw", video=VideoConfig(resize="exact")))


@cache
def reference(max_audio_s: int) -> Reference:
    pytest.importorskip("torch")
    return Reference(load_tokenizer(TokenizerConfig()), max_audio_s=max_audio_s)


class Case:
    """The media of a random conversation, and what the README path of the reference would hand to the processor."""

    def __init__(self, rng: np.random.Generator, fps: float) -> None:
        self.rng = rng
        self.fps = fps
        self.files: dict[str, bytes] = {}
        self.audio: list[np.ndarray] = []
        self.audio_from_video: list[int | None] = []
        self.images: list[np.ndarray] = []
        self.videos: list[np.ndarray] = []

    def resolve(self, ref: str | MediaBlob) -> MediaFile:
        assert isinstance(ref, str)
        return MediaFile(name=ref, data=self.files[ref])

    def add_file(self, suffix: str, data: bytes) -> str:
        name = f"{len(self.files)}{suffix}"
        self.files[name] = data
        return name

    def add_sound(self, seconds: float, rate: int, channels: int, video: int | None) -> str:
        import librosa

        envelope = np.abs(np.sin(np.linspace(0, 9, round(seconds * rate))))[:, None]
        wave = (0.3 * envelope * self.rng.standard_normal((len(envelope), channels))).astype(np.float32)
        buffer = io.BytesIO()
        soundfile.write(buffer, wave, rate, format="WAV", subtype="PCM_16")
        self.audio.append(librosa.load(io.BytesIO(buffer.getvalue()), sr=16_000)[0])
        self.audio_from_video.append(video)
        return self.add_file(".wav", buffer.getvalue())

    def add_image(self, height: int, width: int) -> str:
        from qwen_omni_utils.v2_5.vision_process import fetch_image

        small = Image.fromarray(self.rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        picture = small.resize((width, height), Image.Resampling.BILINEAR)
        self.images.append(np.asarray(fetch_image({"image": picture})))
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        return self.add_file(".png", buffer.getvalue())

    def add_frames(self, num_frames: int, height: int, width: int) -> str:
        frames = self.rng.integers(0, 256, (num_frames, height, width, 3), dtype=np.uint8)
        self.videos.append(frames)
        buffer = io.BytesIO()
        np.save(buffer, frames)
        return self.add_file(".npy", buffer.getvalue())


@st.composite
def part(draw: st.DrawFn, case: Case, kinds: list[str], with_sound: bool) -> dict[str, Any]:
    seconds = st.floats(0.03, 9.0)
    match draw(st.sampled_from(kinds)):
        case "text":
            return {"type": "text", "text": draw(TEXTS)}
        case "audio":
            rate = draw(st.sampled_from([8_000, 16_000, 22_050, 44_100, 48_000]))
            return {"type": "audio", "audio": case.add_sound(draw(seconds), rate, draw(st.integers(1, 2)), None)}
        case "image":
            return {"type": "image", "image": case.add_image(draw(st.integers(14, 500)), draw(st.integers(14, 500)))}
        case _:
            video = {"type": "video", "sample_fps": case.fps}
            video["video"] = case.add_frames(draw(st.integers(2, 9)), *draw(st.sampled_from(VIDEO_SIZES)))
            if with_sound:
                video["audio_track"] = case.add_sound(draw(seconds), 16_000, 1, len(case.videos) - 1)
            return video


@st.composite
def conversations(draw: st.DrawFn) -> tuple[Case, Conversation, bool]:
    case = Case(rng=np.random.default_rng(draw(st.integers(0, 2**32))), fps=draw(st.one_of(st.just(2.0), st.floats(0.4, 12.0))))
    with_sound = draw(st.booleans())
    kinds = draw(st.lists(st.sampled_from(["audio", "image", "video"]), min_size=1, max_size=3, unique=True))
    messages = [{"role": "system", "content": draw(TEXTS)}] if draw(st.booleans()) else []
    for index in range(draw(st.integers(1, 3))):
        media_left = 3 - len(case.files)
        parts = [
            draw(part(case, ["text", *kinds] if media_left > 0 else ["text"], with_sound)) for _ in range(draw(st.integers(1, 3)))
        ]
        messages.append({"role": ("user", "assistant")[index % 2], "content": parts})
    if with_sound and draw(st.booleans()):
        messages.append({"role": "user", "content": [draw(part(case, ["video"], False))]})
    record = parse_record({"messages": messages})
    assert isinstance(record, Conversation)
    return case, record, draw(st.booleans())


def check_mel(ours: np.ndarray, theirs: np.ndarray, waveform: np.ndarray) -> None:
    """Within 1e-4 of the reference, or, where its float32 spectrum is itself further off than ours, within 5e-5 of float64.

    80 dB below a clip's loudest band, a float32 FFT rounds by up to 1e-4. Sounds resampled from 8 kHz reach that.
    """
    if np.abs(ours - theirs).max() > 1e-4:
        true = mel_in_float64(waveform)
        assert np.abs(ours - true).max() <= 5e-5 < np.abs(theirs - true).max()


def mel_in_float64(waveform: np.ndarray) -> np.ndarray:
    num_frames = -(-len(waveform) // 160)
    padded = np.zeros((num_frames + 2) * 160 + 1400)
    padded[200 : 200 + len(waveform)] = waveform
    padded[:200] = padded[400:200:-1]
    windows = np.lib.stride_tricks.sliding_window_view(padded, 400)[::160][: num_frames + 2] * np.hanning(401)[:-1]
    power = np.abs(np.fft.rfft(windows)) ** 2
    filters = reference(30).processor.feature_extractor.mel_filters.astype(np.float64)
    bands = np.log10(np.maximum(power @ filters, 1e-10))
    return (np.maximum(bands, bands.max() - 8)[:num_frames].T + 4) / 4


def check(case: Case, record: Conversation, prompt: bool, max_audio_s: int) -> None:
    sample = encoder().encode(record, key="k", resolve=case.resolve, add_generation_prompt=prompt)
    ours = model_inputs(sample)
    theirs = reference(max_audio_s)(
        ReferenceInput(
            text=render_chatml(record.messages, add_generation_prompt=prompt),
            audio=case.audio,
            images=case.images,
            videos=case.videos,
            audio_from_video=case.audio_from_video,
            fps=case.fps,
        )
    )
    assert set(ours) - {"labels"} == set(theirs)
    for name, expected in theirs.items():
        assert ours[name].dtype == expected.dtype, name
        if name in ("input_features", "feature_attention_mask"):
            continue
        assert ours[name].shape == expected.shape, name
        if name.startswith("pixel_values"):
            assert np.abs(ours[name] - expected).max() <= 1e-5, name
        else:
            np.testing.assert_array_equal(ours[name], expected, err_msg=name)
    for index in range(len(case.audio)):
        frames = int(theirs["feature_attention_mask"][index].sum())
        assert ours["feature_attention_mask"][index].sum() == frames
        check_mel(ours["input_features"][index, :, :frames], theirs["input_features"][index, :, :frames], case.audio[index])


@settings(max_examples=500)
@given(conversations())
def test_a_random_conversation_equals_the_processor_and_get_rope_index(drawn: tuple[Case, Conversation, bool]) -> None:
    check(*drawn, max_audio_s=30)


@settings(max_examples=15)
@given(conversations())
def test_the_same_with_the_references_full_padding(drawn: tuple[Case, Conversation, bool]) -> None:
    check(*drawn, max_audio_s=300)
