"""Sound of every kind of file: equal to librosa where soundfile reads, in the right place in time where PyAV does."""

import json
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from omniprep.errors import Reason, RejectSample
from omniprep.media.audio import AudioConfig, decode_audio, probe_audio, resample
from omniprep.media.sound_tracks import BLOCK_SAMPLES, mix_to_mono
from omniprep.types import Float32Array, MediaFile

RATE = 16_000
RunFfmpeg = Callable[..., bytes]
ENCODERS = (
    *("a.m4a aac", "a.mp4 aac", "a.mkv aac", "a.mka libopus", "a.webm libvorbis", "a.wma wmav2", "a.mov pcm_s24le"),
    *("a.avi libmp3lame", "a.ts aac", "a.aac aac", "a.flv libmp3lame", "a.m4a alac", "a.wv wavpack", "a.ac3 ac3"),
)


def tone(rate: int, seconds: float, channels: int = 1) -> Float32Array:
    """(n, channels) of a tone with a rising loudness, a little different in each channel."""
    time_s = np.arange(int(rate * seconds)) / rate
    waves = [(0.1 + 0.2 * time_s / seconds) * np.sin(2 * np.pi * (440 + 40 * channel) * time_s) for channel in range(channels)]
    return np.stack(waves, axis=1).astype(np.float32)


def clicks(rate: int, seconds: float, every_s: float = 1.0) -> Float32Array:
    """(n,) with a 5 ms burst at 0, 1, 2… seconds, the burst at k seconds having 400 + 200 k Hz."""
    wave = np.zeros(int(rate * seconds), np.float32)
    for second in range(int(seconds / every_s)):
        start = int(second * every_s * rate)
        time_s = np.arange(int(0.005 * rate)) / rate
        wave[start : start + len(time_s)] = 0.8 * np.sin(2 * np.pi * (400 + 200 * second) * time_s)
    return wave


@pytest.fixture(scope="session")
def run_ffmpeg(ffmpeg: str) -> RunFfmpeg:
    """Return a function that runs ffmpeg with its arguments and returns what it writes to its standard output."""
    return lambda *arguments: (
        subprocess.run([ffmpeg, "-v", "error", "-y", *map(str, arguments)], check=True, capture_output=True).stdout
    )


def media(path: Path) -> MediaFile:
    return MediaFile(name=path.name, path=path)


def one(path: Path, start_s: float | None = None, end_s: float | None = None) -> Float32Array:
    (clip,) = decode_audio(media(path), start_s=start_s, end_s=end_s)
    return clip.waveform


# What soundfile reads ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "subtype"),
    [("a.wav", subtype) for subtype in ("PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ALAW", "ULAW", "IMA_ADPCM")]
    + [("a.flac", "PCM_16"), ("a.flac", "PCM_24"), ("a.aiff", "PCM_16"), ("a.aiff", "FLOAT"), ("a.au", "PCM_16")]
    + [("a.caf", "PCM_16"), ("a.w64", "PCM_16"), ("a.ogg", "VORBIS"), ("a.mp3", "MPEG_LAYER_III")],
)
@pytest.mark.parametrize(("rate", "channels"), [(16_000, 1), (44_100, 2)])
def test_the_same_bits_as_librosa(tmp_path: Path, name: str, subtype: str, rate: int, channels: int) -> None:
    import librosa

    path = tmp_path / name
    soundfile.write(path, tone(rate, 1.37, channels), rate, subtype=subtype)
    np.testing.assert_array_equal(one(path), librosa.load(path, sr=RATE)[0])
    expected = librosa.load(path, sr=RATE, offset=0.3137, duration=0.8071 - 0.3137)[0]
    np.testing.assert_array_equal(one(path, 0.3137, 0.8071), expected)
    (clip,) = decode_audio(media(path))
    assert (clip.source_sample_rate_hz, clip.source_channels, clip.decoder) == (rate, channels, "soundfile")


@settings(max_examples=40, deadline=None)
@given(
    rate=st.sampled_from([8_000, 11_025, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000, 96_000]),
    channels=st.integers(1, 8),
    num_samples=st.integers(5_000, 30_000),
    start=st.floats(0, 0.02),
    length=st.floats(0.022, 0.5),
)
def test_the_same_bits_as_librosa_for_every_rate_and_cut(
    tmp_path_factory: pytest.TempPathFactory, rate: int, channels: int, num_samples: int, start: float, length: float
) -> None:
    import librosa

    path = tmp_path_factory.mktemp("cut") / "a.wav"
    samples = np.random.default_rng(num_samples).uniform(-1, 1, (num_samples, channels))
    soundfile.write(path, samples, rate)
    end = start + length
    expected = librosa.load(path, sr=RATE, offset=start, duration=end - start)[0]
    np.testing.assert_array_equal(one(path, start, end), expected)


def test_several_blocks_give_the_bits_of_one(tmp_path: Path) -> None:
    import librosa

    path = tmp_path / "a.wav"
    soundfile.write(path, np.random.default_rng(0).uniform(-1, 1, (3 * BLOCK_SAMPLES + 17, 2)), 44_100)
    np.testing.assert_array_equal(one(path), librosa.load(path, sr=RATE)[0])


@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100])
def test_blocks_of_any_size_resample_alike(rate: int) -> None:
    wave = tone(rate, 2.0)[:, 0]
    whole = resample(iter([wave]), rate, RATE)
    for size in (1_000, 7_777):
        blocks = (wave[start : start + size] for start in range(0, len(wave), size))
        np.testing.assert_array_equal(resample(blocks, rate, RATE), whole)
    assert len(resample(iter([wave[:0]]), rate, RATE)) == len(resample(iter([]), rate, RATE)) == 0


@pytest.mark.parametrize("channels", range(1, 13))
def test_mono_is_the_mean_bit_for_bit(channels: int) -> None:
    samples = np.random.default_rng(0).uniform(-1, 1, (5_000, channels)).astype(np.float32)
    np.testing.assert_array_equal(mix_to_mono(samples), np.mean(samples.T, axis=0))


def test_bytes_read_as_the_file_does(tmp_path: Path) -> None:
    path = tmp_path / "a.flac"
    soundfile.write(path, tone(22_050, 1.0), 22_050)
    (clip,) = decode_audio(MediaFile(name="blob", data=path.read_bytes()))
    np.testing.assert_array_equal(clip.waveform, one(path))


@pytest.mark.parametrize("name", ["a.jpg", "a.mp4", "a.raw", "noextension", "a.npy"])
def test_extensions_are_not_believed(tmp_path: Path, name: str) -> None:
    soundfile.write(tmp_path / "a.wav", tone(RATE, 0.5), RATE)
    right = one(tmp_path / "a.wav")
    np.testing.assert_array_equal(one((tmp_path / "a.wav").rename(tmp_path / name)), right)


def test_names_that_look_like_urls_are_files(tmp_path: Path, run_ffmpeg: RunFfmpeg) -> None:
    soundfile.write(tmp_path / "a.wav", tone(RATE, 0.5), RATE)
    run_ffmpeg("-i", tmp_path / "a.wav", tmp_path / "a.m4a")
    path = (tmp_path / "a.m4a").rename(tmp_path / "http:x %d?y=1#z.m4a")
    assert len(one(path)) == RATE // 2


# What PyAV reads -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoder", ENCODERS)
def test_every_container_gives_the_samples_that_ffmpeg_gives(tmp_path: Path, run_ffmpeg: RunFfmpeg, encoder: str) -> None:
    name, codec = encoder.split()
    rate, path = 48_000 if codec == "libopus" else 44_100, tmp_path / name
    soundfile.write(tmp_path / "in.wav", tone(rate, 2.5, 2), rate)
    run_ffmpeg("-i", tmp_path / "in.wav", "-c:a", codec, *(["-strict", "-2"] if codec == "wavpack" else []), path)
    # Its arithmetic mean of the channels, as float32 and at the file's rate.
    raw = run_ffmpeg("-i", path, "-f", "f32le", "-af", "pan=mono|c0=0.5*c0+0.5*c1", "-")
    expected = resample(iter([np.frombuffer(raw, np.float32)]), rate, RATE)
    (clip,) = decode_audio(media(path))
    assert clip.decoder == "pyav"
    assert clip.waveform.dtype == np.float32
    assert abs(len(clip.waveform) - len(expected)) <= 1
    num = min(len(clip.waveform), len(expected)) - 100  # the resampler's edge sees the other length
    np.testing.assert_allclose(clip.waveform[:num], expected[:num], atol=2e-4)
    info = probe_audio(media(path))
    assert (info.sample_rate_hz, info.num_channels) == (rate, 2)
    assert info.duration_s == pytest.approx(2.5, abs=0.15)


def video_with_clicks(run_ffmpeg: RunFfmpeg, folder: Path, name: str, *options: object, seconds: float = 4) -> Path:
    """A video whose clicks are at whole seconds of the sound's own time; `options` go between the inputs and the output."""
    soundfile.write(folder / "in.wav", clicks(48_000, seconds), 48_000)
    codec = () if name.endswith("webm") else ("-c:v", "libx264")
    picture = ("-f", "lavfi", "-i", f"testsrc=size=64x48:rate=25:duration={seconds}")
    run_ffmpeg(*picture, *options, "-i", folder / "in.wav", *codec, folder / name)
    return folder / name


def onset_s(waveform: Float32Array) -> float:
    return float(np.flatnonzero(np.abs(waveform) > 0.2)[0]) / RATE


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.mov", "a.webm"])
@pytest.mark.parametrize("offset", [0.0, 0.5, 1.25])
def test_a_track_that_starts_late_has_its_true_start(tmp_path: Path, run_ffmpeg: RunFfmpeg, name: str, offset: float) -> None:
    path = video_with_clicks(run_ffmpeg, tmp_path, name, "-itsoffset", offset)
    (clip,) = decode_audio(media(path))
    assert clip.start_s + onset_s(clip.waveform) == pytest.approx(offset, abs=0.003)
    assert clip.start_s == pytest.approx(offset, abs=0.06)  # the encoder's delay may be kept as sound before the start
    assert probe_audio(media(path)).start_s == clip.start_s


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_a_file_whose_time_stamps_start_late_begins_at_0(tmp_path: Path, run_ffmpeg: RunFfmpeg, name: str) -> None:
    whole = video_with_clicks(run_ffmpeg, tmp_path, f"whole_{name}")
    path = tmp_path / name
    run_ffmpeg("-i", whole, "-c", "copy", "-output_ts_offset", 5, path)
    (clip,) = decode_audio(media(path))
    assert clip.start_s == pytest.approx(0.0, abs=0.03)
    assert clip.start_s + onset_s(clip.waveform) == pytest.approx(0.0, abs=0.03)
    assert onset_s(one(path, 1.5)) == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("name", ["a.mkv", "a.mp4"])
def test_a_pause_in_the_track_keeps_the_rest_in_time(tmp_path: Path, run_ffmpeg: RunFfmpeg, name: str) -> None:
    soundfile.write(tmp_path / "in.wav", clicks(48_000, 5.0), 48_000)
    path = tmp_path / name
    run_ffmpeg("-i", tmp_path / "in.wav", "-af", "aselect='not(between(t,1.5,3.5))'", "-c:a", "aac", path)
    wave = one(path)
    assert len(wave) == pytest.approx(5 * RATE, abs=0.05 * RATE)
    loud = np.flatnonzero(np.abs(wave) > 0.2) / RATE
    assert {round(time_s) for time_s in loud} == {0, 1, 4}  # those at 2 and 3 s were cut out
    assert np.all(np.abs(loud - np.round(loud)) < 0.03)
    assert onset_s(one(path, 3.75)) == pytest.approx(0.25, abs=0.03)


def test_an_edit_list_that_hides_the_start_is_kept(tmp_path: Path, run_ffmpeg: RunFfmpeg) -> None:
    path = video_with_clicks(run_ffmpeg, tmp_path, "a.mp4")
    cut = tmp_path / "cut.mp4"
    run_ffmpeg("-ss", 1.3, "-i", path, "-c", "copy", cut)  # the packets before 1.3 s stay in the file, the edit list skips them
    (clip,) = decode_audio(media(cut))
    raw = run_ffmpeg("-i", cut, "-map", "0:a", "-f", "f32le", "-ac", 1, "-ar", 48_000, "-")
    assert len(clip.waveform) == -(-len(raw) // 4 // 3)
    assert clip.start_s + onset_s(clip.waveform) == pytest.approx(0.7, abs=0.003)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi", "a.flac", "a.ogg"])
@pytest.mark.parametrize(("start", "end"), [(0.5, 2.25), (13.3, 15.81), (25.0, None), (None, 1.0), (29.0, 99.0)])
def test_a_cut_is_a_slice_of_the_whole(
    tmp_path_factory: pytest.TempPathFactory, run_ffmpeg: RunFfmpeg, name: str, start: float | None, end: float | None
) -> None:
    path = _long_file(tmp_path_factory, run_ffmpeg, name)
    whole, part = one(path), one(path, start, end)
    first, last = int((start or 0) * RATE), min(len(whole), int((end or 99) * RATE))
    assert abs(len(part) - (last - first)) <= 1
    num = min(len(part), last - first) - 200
    # A cut in Matroska is placed to a millisecond, so look for the best shift of up to one.
    shifts = range(-16, 17) if name == "a.mkv" else range(1)
    errors = [np.abs(part[200:num] - whole[first + shift + 200 : first + shift + num]).max() for shift in shifts]
    assert min(errors) < 2e-3
    (clip,) = decode_audio(media(path), start_s=start, end_s=end)
    assert clip.start_s == pytest.approx(start or 0.0, abs=1e-4)


_LONG: dict[str, Path] = {}


def _long_file(factory: pytest.TempPathFactory, run_ffmpeg: RunFfmpeg, name: str) -> Path:
    if name not in _LONG:
        folder = factory.mktemp("long")
        noise = np.random.default_rng(0).standard_normal(RATE * 30).astype(np.float32)
        soundfile.write(folder / "in.wav", np.convolve(noise, np.ones(16) / 64, "same"), RATE)
        run_ffmpeg("-i", folder / "in.wav", folder / name)
        _LONG[name] = folder / name
    return _LONG[name]


# Limits --------------------------------------------------------------------------------------------------------------------


def test_too_long_is_rejected_from_the_header_with_advice(tmp_path: Path) -> None:
    path = tmp_path / "long.wav"
    soundfile.write(path, tone(RATE, 3.0), RATE)
    with pytest.raises(RejectSample) as caught:
        decode_audio(media(path), config=AudioConfig(max_seconds=2.5))
    assert caught.value.reason is Reason.AUDIO_TOO_LONG
    for fact in ("long.wav", "3.000 s", "max_seconds=2.5", "on_too_long", "split"):
        assert fact in caught.value.detail
    (clip,) = decode_audio(media(path), end_s=2.5, config=AudioConfig(max_seconds=2.5))
    assert len(clip.waveform) == 2.5 * RATE


def test_exactly_the_limit_is_not_too_long(tmp_path: Path) -> None:
    for rate in (RATE, 44_100, 48_000):
        soundfile.write(tmp_path / "a.wav", tone(rate, 3.0), rate)
        (clip,) = decode_audio(media(tmp_path / "a.wav"), config=AudioConfig(max_seconds=3.0))
        assert len(clip.waveform) == 3 * RATE
        with pytest.raises(RejectSample, match="audio_too_long"):
            decode_audio(media(tmp_path / "a.wav"), config=AudioConfig(max_seconds=2.9999))


@pytest.mark.parametrize("name", ["a.wav", "a.mp3", "a.mkv", "a.aac"])
def test_truncate_records_the_length_that_was(tmp_path: Path, run_ffmpeg: RunFfmpeg, name: str) -> None:
    soundfile.write(tmp_path / "in.wav", tone(44_100, 20.0), 44_100)
    run_ffmpeg("-i", tmp_path / "in.wav", "-ar", 44_100, tmp_path / f"out_{name}")
    path = tmp_path / f"out_{name}"
    config = AudioConfig(max_seconds=5, on_too_long="truncate")
    (clip,) = decode_audio(media(path), config=config)
    assert len(clip.waveform) == 5 * RATE
    assert clip.truncated_from_s == pytest.approx(20.0, abs=0.06)
    np.testing.assert_allclose(clip.waveform[:-200], one(path)[: 5 * RATE - 200], atol=1e-6)
    (clip,) = decode_audio(media(path), start_s=12, config=config)
    assert clip.truncated_from_s == pytest.approx(8.0, abs=0.06)
    (clip,) = decode_audio(media(path), start_s=12, end_s=16, config=config)
    assert clip.truncated_from_s is None


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(num_samples=st.one_of(st.integers(2_000, 60_000), st.integers(-3, 340)), limit=st.integers(RATE, RATE + 999))
def test_split_clips_join_to_the_whole(tmp_path: Path, num_samples: int, limit: int) -> None:
    num_samples += 2 * limit if num_samples < 2_000 else 0  # just above a multiple of the limit
    path = tmp_path / "a.wav"
    soundfile.write(path, np.random.default_rng(0).uniform(-1, 1, num_samples), RATE)
    clips = decode_audio(media(path), config=AudioConfig(max_seconds=limit / RATE, on_too_long="split"))
    np.testing.assert_array_equal(np.concatenate([clip.waveform for clip in clips]), one(path))
    assert all(320 < len(clip.waveform) <= limit for clip in clips)
    ends = [clip.start_s + len(clip.waveform) / RATE for clip in clips]
    assert [clip.start_s for clip in clips] == pytest.approx([0.0, *ends[:-1]])


def test_the_sound_of_a_video_is_not_split(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    soundfile.write(path, tone(RATE, 3.0), RATE)
    config = AudioConfig(max_seconds=2, on_too_long="split")
    with pytest.raises(RejectSample, match=r"belongs to a video.*audio_in_video"):
        decode_audio(media(path), config=config, may_split=False)
    assert len(decode_audio(media(path), config=config)) == 2


def test_memory_holds_the_result_and_a_block_only(tmp_path: Path) -> None:
    path, seconds = tmp_path / "a.wav", 120
    soundfile.write(path, np.tile(tone(48_000, 10.0, 2), (seconds // 10, 1)), 48_000)
    one(path, 0, 1)  # imports
    tracemalloc.start()
    try:
        result = one(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    blocks = 6 * 4 * 2 * BLOCK_SAMPLES
    assert result.nbytes == seconds * RATE * 4
    assert peak < 1.3 * result.nbytes + blocks < seconds * 48_000 * 4


def test_a_long_file_is_decoded_up_to_the_limit_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.mp3"  # its length is a guess, so the header alone does not decide
    soundfile.write(path, np.tile(tone(RATE, 10.0), (12, 1)), RATE)
    read: list[int] = []
    original = soundfile.SoundFile.read

    def counting(self: soundfile.SoundFile, frames: int, **options: object) -> object:
        read.append(frames)
        return original(self, frames, **options)

    monkeypatch.setattr(soundfile.SoundFile, "read", counting)
    with pytest.raises(RejectSample, match="over 10 s of sound"):
        decode_audio(media(path), config=AudioConfig(max_seconds=10))
    assert sum(read) < 60 * RATE


# The second backend --------------------------------------------------------------------------------------------------------


@pytest.mark.reference
def test_torchaudio_resampler_differs_little_below_its_roll_off() -> None:
    pytest.importorskip("torchaudio")
    time_s = np.arange(44_100 * 3) / 44_100
    harmonics = np.arange(1, 43)[:, None]  # up to 6 kHz
    wave = (0.1 * np.sin(2 * np.pi * 140 * harmonics * time_s) / harmonics).sum(axis=0).astype(np.float32)
    ours = resample(iter([wave]), 44_100, RATE)
    theirs = resample(iter([wave[:50_000], wave[50_000:]]), 44_100, RATE, backend="torchaudio")
    assert ours.shape == theirs.shape
    assert 0 < np.abs(ours - theirs)[500:-500].max() < 2e-3


@pytest.mark.reference
def test_torchaudio_backend_is_taken_where_it_is_asked_for(tmp_path: Path) -> None:
    pytest.importorskip("torchaudio")
    soundfile.write(tmp_path / "a.wav", tone(44_100, 1.0), 44_100)
    (clip,) = decode_audio(media(tmp_path / "a.wav"), config=AudioConfig(backend="torchaudio"))
    expected = one(tmp_path / "a.wav")
    assert clip.waveform.shape == expected.shape
    assert 0 < np.abs(clip.waveform - expected).max() < 0.02


# The reference's own loader ------------------------------------------------------------------------------------------------


_LOAD = """
import json, sys
import numpy as np
from qwen_omni_utils.v2_5.audio_process import process_audio_info

part, output = json.loads(sys.argv[1]), sys.argv[2]
(wave,) = process_audio_info([{"role": "user", "content": [part]}], part["type"] == "video")
np.save(output, wave)
"""


def loaded_by_reference(part: dict[str, object], output: Path) -> Float32Array:
    """Return what qwen_omni_utils makes of one part; in a process of its own, because audioread leaves its pipes open."""
    pytest.importorskip("qwen_omni_utils")
    subprocess.run([sys.executable, "-W", "ignore", "-c", _LOAD, json.dumps(part), output], check=True, capture_output=True)
    wave: Float32Array = np.load(output)
    return wave


@pytest.mark.reference
def test_a_file_equals_the_references_loader(tmp_path: Path) -> None:
    path = tmp_path / "a.flac"
    soundfile.write(path, tone(44_100, 2.0, 2), 44_100)
    part: dict[str, object] = {"type": "audio", "audio": str(path), "audio_start": 0.31, "audio_end": 1.77}
    np.testing.assert_array_equal(one(path, 0.31, 1.77), loaded_by_reference(part, tmp_path / "reference.npy"))


@pytest.mark.reference
def test_the_sound_of_a_video_equals_the_references_but_for_its_16_bits(
    tmp_path: Path, run_ffmpeg: RunFfmpeg, ffmpeg: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ffmpeg").symlink_to(ffmpeg)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")  # the reference runs the ffmpeg that it finds
    soundfile.write(tmp_path / "in.wav", tone(44_100, 4.0, 2), 44_100)
    path = tmp_path / "a.mp4"
    run_ffmpeg("-f", "lavfi", "-i", "testsrc=size=64x48:duration=4", "-i", tmp_path / "in.wav", path)
    part: dict[str, object] = {"type": "video", "video": str(path), "video_start": 1.5, "video_end": 3.25}
    expected = loaded_by_reference(part, tmp_path / "reference.npy")
    wave = one(path, 1.5, 3.25)
    assert len(wave) == len(expected)
    assert np.abs(wave - expected).max() < 2**-14
