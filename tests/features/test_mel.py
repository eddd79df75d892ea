"""The mel features against the installed reference extractor, and the laws that they keep."""

from functools import lru_cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omniprep.errors import ConfigError
from omniprep.features import mel as mel_module
from omniprep.features.mel import FRAMES_PER_BLOCK, log_mel, log_mel_torchaudio, mel_filters
from omniprep.profile import QWEN2_5_OMNI
from omniprep.types import Float32Array

RATE, HOP, MAX_SAMPLES = 16_000, 160, 4_800_000
TOLERANCE = 1e-4


@lru_cache
def extractor() -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.WhisperFeatureExtractor(
        feature_size=128, sampling_rate=RATE, hop_length=HOP, chunk_length=300, n_fft=400, padding_value=0.0, dither=0.0
    )


def reference(waveform: Float32Array, padded_samples: int = MAX_SAMPLES) -> Float32Array:
    """The valid columns, with the call of Qwen2_5OmniProcessor; a shorter padding gives the same ones (tested below)."""
    out = extractor()(
        [waveform],
        sampling_rate=RATE,
        padding="max_length",
        max_length=padded_samples,
        return_attention_mask=True,
        return_tensors="np",
    )
    features: Float32Array = out["input_features"][0][:, : int(out["attention_mask"][0].sum())]
    return features


def sound(kind: str, num_samples: int, seed: int = 0) -> Float32Array:
    """Make one of the kinds of input that try different parts of the rule."""
    rng = np.random.default_rng(seed)
    time_s = np.arange(num_samples) / RATE
    if kind == "noise":
        wave = rng.standard_normal(num_samples) * 0.1
    elif kind == "whisper":  # all below the floor of 1e-10
        wave = rng.standard_normal(num_samples) * 1e-8
    elif kind == "speech":  # voiced harmonics with a moving pitch, syllables and pauses
        phase = 2 * np.pi * np.cumsum(120 + 40 * np.sin(2 * np.pi * 0.7 * time_s)) / RATE
        voice = sum(np.sin(harmonic * phase) / harmonic**1.2 for harmonic in range(1, 40))
        wave = 0.1 * voice * np.clip(np.sin(2 * np.pi * 3 * time_s), 0, None) + 1e-4 * rng.standard_normal(num_samples)
    elif kind == "click_at_end":
        wave = np.zeros(num_samples)
        wave[-1] = 0.9
    elif kind == "click_at_start":
        wave = np.zeros(num_samples)
        wave[0] = 0.9
    elif kind == "full_scale_square":
        wave = np.sign(np.sin(2 * np.pi * 441 * time_s))
    else:
        wave = np.zeros(num_samples)
    return wave.astype(np.float32)


KINDS = ("noise", "whisper", "speech", "click_at_end", "click_at_start", "full_scale_square", "silence")


@pytest.mark.reference
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_samples", [1, 160, 201, 8_000, 124_243])
def test_equal_to_the_300_s_reference(kind: str, num_samples: int) -> None:
    waveform = sound(kind, num_samples)
    expected = reference(waveform)
    assert log_mel(waveform).shape == expected.shape
    np.testing.assert_allclose(log_mel(waveform), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.reference
@pytest.mark.parametrize("num_samples", [MAX_SAMPLES, MAX_SAMPLES - 1, MAX_SAMPLES - 160, MAX_SAMPLES - 201])
def test_equal_at_the_very_limit_where_the_reference_reflects_the_end(num_samples: int) -> None:
    waveform = np.zeros(num_samples, np.float32)
    waveform[-RATE:] = sound("speech", RATE)
    np.testing.assert_allclose(log_mel(waveform), reference(waveform), atol=TOLERANCE, rtol=0)


@pytest.mark.reference
@settings(max_examples=150, deadline=None)
@given(num_samples=st.integers(1, 1_000), kind=st.sampled_from(KINDS), seed=st.integers(0, 9))
def test_equal_for_every_short_length(num_samples: int, kind: str, seed: int) -> None:
    waveform = sound(kind, num_samples, seed)
    expected = reference(waveform, num_samples + 1_600)
    assert log_mel(waveform).shape == expected.shape
    np.testing.assert_allclose(log_mel(waveform), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.reference
@settings(max_examples=40, deadline=None)
@given(
    num_samples=st.integers(1_000, 200_000),
    kind=st.sampled_from(KINDS),
    gain=st.sampled_from([1e-6, 1e-3, 1.0, 30.0]),
)
def test_equal_for_every_length_and_loudness(num_samples: int, kind: str, gain: float) -> None:
    waveform = sound(kind, num_samples) * np.float32(gain)
    np.testing.assert_allclose(log_mel(waveform), reference(waveform, num_samples + 1_600), atol=TOLERANCE, rtol=0)


@pytest.mark.reference
def test_shorter_padding_of_the_reference_changes_nothing_valid() -> None:
    for kind in KINDS:
        waveform = sound(kind, 5_003)
        np.testing.assert_allclose(reference(waveform, 6_603), reference(waveform), atol=1e-6, rtol=0)


@pytest.mark.reference
def test_filters_are_those_of_transformers() -> None:
    expected = np.asarray(extractor().mel_filters, np.float64)
    np.testing.assert_allclose(mel_filters(), expected, atol=1e-9, rtol=1e-5)


def test_frames_past_the_end_take_part_in_the_maximum() -> None:
    waveform = sound("click_at_end", 8_000)
    without = (np.maximum(np.log10(np.maximum(power(waveform), 1e-10)), np.log10(power(waveform).max()) - 8) + 4) / 4
    assert np.abs(log_mel(waveform) - without).max() > 0.1


def power(waveform: Float32Array) -> np.ndarray:
    """Mel power of the valid frames alone, in float64 and without blocks."""
    padded = np.concatenate([waveform[1:201][::-1], waveform, np.zeros(400, np.float32)]).astype(np.float64)
    frames = np.lib.stride_tricks.sliding_window_view(padded, 400)[::HOP][: QWEN2_5_OMNI.num_mel_frames(len(waveform))]
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400)
    return (np.abs(np.fft.rfft(frames * window)) ** 2 @ mel_filters().astype(np.float64)).T


def test_silence_is_minus_one_and_a_half_everywhere() -> None:
    features = log_mel(np.zeros(RATE, np.float32))
    assert features.shape == (128, 100)
    assert features.dtype == np.float32
    assert np.all(features == np.float32(-1.5))


@settings(max_examples=30, deadline=None)
@given(num_frames=st.integers(1, 4 * FRAMES_PER_BLOCK), rest=st.integers(0, HOP - 1), size=st.sampled_from([1, 7, 96, 1_000]))
def test_blocks_do_not_show(num_frames: int, rest: int, size: int) -> None:
    waveform = sound("noise", num_frames * HOP - rest)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mel_module, "FRAMES_PER_BLOCK", size)
        other = log_mel(waveform)
    # A BLAS rounds differently for another number of rows, in the last bits of a sum.
    np.testing.assert_allclose(log_mel(waveform), other, atol=5e-6, rtol=0)


@settings(max_examples=30, deadline=None)
@given(num_samples=st.integers(1, 30_000))
def test_number_of_columns_is_the_profiles(num_samples: int) -> None:
    assert log_mel(sound("noise", num_samples)).shape == (128, QWEN2_5_OMNI.num_mel_frames(num_samples))


@pytest.mark.reference
def test_clips_longer_than_300_s_equal_the_reference_without_its_silent_cut() -> None:
    waveform = np.concatenate([np.zeros(MAX_SAMPLES, np.float32), sound("speech", RATE * 2)])
    expected = extractor()(
        [waveform], sampling_rate=RATE, padding="max_length", truncation=False, return_tensors="np"
    ).input_features[0]
    assert log_mel(waveform).shape == expected.shape == (128, 30_200)
    np.testing.assert_allclose(log_mel(waveform), expected, atol=TOLERANCE, rtol=0)


def test_input_is_left_alone_and_may_be_read_only_or_strided() -> None:
    waveform = sound("noise", 8_000)
    waveform.setflags(write=False)
    double = np.repeat(waveform, 2)
    np.testing.assert_array_equal(log_mel(double[::2]), log_mel(waveform))


@pytest.mark.parametrize("shape", [(0,), (2, 100), ()])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="mono waveform of shape"):
        log_mel(np.zeros(shape, np.float32))


@pytest.mark.reference
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_samples", [1, 150, 201, 8_000, 124_243])
def test_torchaudio_backend_agrees(kind: str, num_samples: int) -> None:
    pytest.importorskip("torchaudio")
    waveform = sound(kind, num_samples)
    np.testing.assert_allclose(log_mel_torchaudio(waveform), log_mel(waveform), atol=TOLERANCE, rtol=0)


@pytest.mark.reference
def test_a_device_that_is_not_there_is_a_config_error() -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    with pytest.raises(ConfigError, match="no CUDA device"):
        log_mel_torchaudio(sound("noise", 8_000), device="cuda")


@pytest.mark.gpu
def test_torchaudio_backend_agrees_on_cuda() -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    waveform = sound("speech", 124_243)
    np.testing.assert_allclose(log_mel_torchaudio(waveform, device="cuda"), log_mel(waveform), atol=TOLERANCE, rtol=0)
