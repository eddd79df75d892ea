"""Bad sound gets its reason, its name and a cause in one line; libraries stay silent; nothing is passed that is not whole."""

import io
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from omniprep.errors import Reason, RejectSample
from omniprep.media.audio import AudioConfig, decode_audio, probe_audio
from omniprep.media.containers import num_missing_bytes
from omniprep.types import Float32Array, MediaFile

RATE = 16_000


def wave(seconds: float = 2.0, rate: int = RATE) -> Float32Array:
    return (0.3 * np.sin(2 * np.pi * 440 * np.arange(int(rate * seconds)) / rate)).astype(np.float32)


def wav_bytes(samples: np.ndarray, subtype: str = "PCM_16", kind: str = "WAV") -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, RATE, format=kind, subtype=subtype)
    return buffer.getvalue()


def rejected(data: bytes, start_s: float | None = None, end_s: float | None = None) -> RejectSample:
    with pytest.raises(RejectSample) as caught:
        decode_audio(MediaFile(name="rec/1.bin", data=data), start_s=start_s, end_s=end_s)
    assert caught.value.detail.startswith("rec/1.bin: ")
    assert "\n" not in caught.value.detail
    return caught.value


@pytest.fixture(scope="session")
def encoded(tmp_path_factory: pytest.TempPathFactory, ffmpeg: str) -> Callable[[str], bytes]:
    """Return a function from a file name to the bytes of 4 s of sound in that container, made once."""
    folder, made = tmp_path_factory.mktemp("encoded"), dict[str, bytes]()
    soundfile.write(folder / "in.wav", wave(4.0, 44_100), 44_100)

    def make(name: str, *options: str) -> bytes:
        if name not in made:
            command = [ffmpeg, "-v", "error", "-y", "-i", "in.wav", *options, name]
            subprocess.run(command, check=True, cwd=folder)
            made[name] = (folder / name).read_bytes()
        return made[name]

    return make


@pytest.mark.parametrize("call", [decode_audio, probe_audio])
def test_files_that_are_not_there(tmp_path: Path, call: Callable[[MediaFile], object]) -> None:
    for path, reason in ((tmp_path / "no.wav", Reason.MEDIA_MISSING), (tmp_path, Reason.MEDIA_UNREADABLE)):
        with pytest.raises(RejectSample) as caught:
            call(MediaFile(name="a.wav", path=path))
        assert caught.value.reason is reason
        assert str(tmp_path) not in caught.value.detail


@pytest.mark.parametrize("call", [decode_audio, probe_audio])
def test_a_file_without_bytes_or_samples_is_empty(call: Callable[[MediaFile], object]) -> None:
    for data in (b"", wav_bytes(wave(0.0)), npy_bytes(wave(0.0))):
        with pytest.raises(RejectSample, match="media_empty"):
            call(MediaFile(name="a.wav", data=data))


@pytest.mark.parametrize(
    "data",
    [
        b"\x00" * 1000,
        b"RIFF",
        b"hello, this is text " * 99,
        b"\x89PNG\r\n\x1a\n" + bytes(99),
        b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n/etc/passwd\n#EXT-X-ENDLIST\n",
        b"ffconcat version 1.0\nfile other.wav\n",
        b"ID3\x04" + bytes(200),
        b"OggS" + bytes(range(17, 217)) * 15,
        b"fLaC" + bytes(range(17, 217)) * 15,
        b"\xff\xfb" + bytes(3000),
        b"\x93NUMPY\x01\x00v\x00" + b"x" * 200,
    ],
    ids=lambda data: repr(data[:8]),
)
def test_what_is_not_sound_is_corrupt(data: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    for name, size in (("path", len(data)), ("half", len(data) // 2)):
        assert rejected(data[:size]).reason is Reason.MEDIA_CORRUPT, name
    assert capfd.readouterr() == ("", "")


def test_a_picture_and_a_silent_video_have_no_stream(tmp_path: Path, ffmpeg: str, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "silent.mp4"
    subprocess.run([ffmpeg, "-v", "error", "-f", "lavfi", "-i", "testsrc=size=64x48:duration=1", path], check=True)
    error = rejected(path.read_bytes())
    assert error.reason is Reason.MEDIA_NO_STREAM
    assert "video streams only" in error.detail
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["a.mp4", "a.m4a", "a.mkv", "a.avi", "a.aiff", "a.wav", "a.mov"])
@pytest.mark.parametrize("share", [0.5, 0.95])
def test_a_cut_off_file_is_truncated(
    encoded: Callable[..., bytes], capfd: pytest.CaptureFixture[str], name: str, share: float
) -> None:
    data = encoded(name)
    assert len(decode_audio(MediaFile(name=name, data=data))[0].waveform) >= 4 * RATE
    assert rejected(data[: int(len(data) * share)]).reason is Reason.MEDIA_TRUNCATED
    assert capfd.readouterr() == ("", "")


def test_a_cut_off_stream_inside_whole_boxes_is_truncated(encoded: Callable[..., bytes]) -> None:
    data = encoded("fast.mp4", "-movflags", "+faststart")
    start = data.index(b"mdat") - 4
    half = 8 + (len(data) - start - 8) // 2
    error = rejected(data[:start] + struct.pack(">I4s", half, b"mdat") + data[start + 8 : start + half])
    assert error.reason is Reason.MEDIA_TRUNCATED
    assert "its header promises 4.00 s" in error.detail


@settings(max_examples=60)
@given(cut=st.integers(1, 100), name=st.sampled_from(["a.mp4", "a.mkv", "a.wav", "a.aiff", "a.avi"]))
def test_missing_bytes_are_counted(encoded: Callable[..., bytes], cut: int, name: str) -> None:
    data = encoded(name)
    assert num_missing_bytes(io.BytesIO(data)) == 0
    size = len(data) - 1 - (len(data) - 4_096) * cut // 101
    missing = num_missing_bytes(io.BytesIO(data[:size]))
    assert 0 < missing <= len(data) - size
    if name in ("a.mkv", "a.wav", "a.aiff"):  # one box holds all of the sound
        assert missing == len(data) - size


def test_sizes_left_open_by_a_streaming_writer_promise_nothing() -> None:
    data = bytearray(wav_bytes(wave()))
    place = data.index(b"data") + 4
    for size in (0xFFFFFFFF, 0x7FFFFFFF):
        data[place : place + 4] = struct.pack("<I", size)
        assert num_missing_bytes(io.BytesIO(data)) == 0
        (clip,) = decode_audio(MediaFile(name="a.wav", data=bytes(data)))
        assert len(clip.waveform) == 2 * RATE


def test_damage_in_the_middle_is_not_passed(encoded: Callable[..., bytes], capfd: pytest.CaptureFixture[str]) -> None:
    for name in ("a.flac", "a.mp4", "cut off"):
        data = bytearray(encoded(name if name != "cut off" else "a.flac"))
        middle = len(data) // 2
        if name == "cut off":  # FLAC has no box around its frames: libFLAC loses its place either way
            del data[middle:]
        data[middle : middle + 4_000] = (
            b"" if name == "cut off" else np.random.default_rng(0).integers(0, 256, 4_000, np.uint8).tobytes()
        )
        assert rejected(bytes(data)).reason in (Reason.MEDIA_CORRUPT, Reason.MEDIA_TRUNCATED), name
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("damage", ["none", "junk", "hole", "cut", "before", "after"])
def test_a_damaged_mp3_is_read_in_silence(encoded: Callable[..., bytes], capfd: pytest.CaptureFixture[str], damage: str) -> None:
    data = encoded("a.mp3")
    middle, junk = len(data) // 2, np.random.default_rng(0).integers(0, 256, 900, np.uint8).tobytes()
    data = {
        "none": data,
        "junk": data[:middle] + junk + data[middle + 900 :],
        "hole": data[:middle] + data[middle + 1_000 :],
        "cut": data[: middle + 7],
        "before": junk + data,
        "after": data + junk,
    }[damage]
    try:
        (clip,) = decode_audio(MediaFile(name="a.mp3", data=data))
    except RejectSample as error:
        assert damage != "none"
        assert error.reason is Reason.MEDIA_CORRUPT
    else:
        assert clip.decoder == ("soundfile" if damage == "none" else "pyav")
        assert len(clip.waveform) > 1.9 * RATE
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30])
def test_samples_that_are_not_finite(value: float) -> None:
    samples = np.stack([wave(), wave()], axis=1)
    samples[7_000] = value, -value
    samples[9_000, 0] = value
    for data in (wav_bytes(samples, "FLOAT"), wav_bytes(samples[:, 0], "FLOAT"), npy_bytes(samples[:, 0])):
        assert rejected(data).reason is Reason.AUDIO_NOT_FINITE
    decode_audio(MediaFile(name="a.wav", data=wav_bytes(samples, "FLOAT")), end_s=0.4)


def test_float_files_keep_their_scale() -> None:
    (clip,) = decode_audio(MediaFile(name="a.wav", data=wav_bytes(wave() * 30, "FLOAT")))
    assert np.abs(clip.waveform).max() == pytest.approx(9.0, abs=0.01)


@pytest.mark.parametrize("num_samples", [1, 160, 320])
def test_no_token_is_too_short(num_samples: int) -> None:
    error = rejected(wav_bytes(wave()[:num_samples]))
    assert error.reason is Reason.AUDIO_TOO_SHORT
    assert f"{num_samples} samples" in error.detail
    assert len(decode_audio(MediaFile(name="a", data=wav_bytes(wave()[:321])))[0].waveform) == 321


@pytest.mark.parametrize(
    "cut", [(2.0, None), (5.0, 6.0), (1.0, 1.0), (1.5, 1.0), (-1.0, 1.0), (0.5, 0.50001)], ids=lambda cut: f"{cut[0]}-{cut[1]}"
)
@pytest.mark.parametrize("name", ["a.wav", "a.mkv", "a.mp3", "a.npy"])
def test_cuts_outside_the_sound(encoded: Callable[..., bytes], name: str, cut: tuple[float, float | None]) -> None:
    data = npy_bytes(wave()) if name == "a.npy" else encoded(f"two_{name}", "-t", "2")
    start = cut[0] + 0.2 if cut[1] is None else cut[0]  # an encoder may have padded the end
    error = rejected(data, start_s=start, end_s=cut[1])
    assert error.reason is Reason.MEDIA_RANGE


def npy_bytes(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def test_arrays_are_taken_as_they_are(tmp_path: Path) -> None:
    samples = np.random.default_rng(0).uniform(-1, 1, 3 * RATE).astype(np.float32)
    np.save(tmp_path / "a.npy", samples)
    (clip,) = decode_audio(MediaFile(name="a", path=tmp_path / "a.npy"))
    np.testing.assert_array_equal(clip.waveform, samples)
    (clip,) = decode_audio(MediaFile(name="a", path=tmp_path / "a.npy"), start_s=0.5, end_s=1.25)
    np.testing.assert_array_equal(clip.waveform, samples[8_000:20_000])
    assert (clip.start_s, clip.source_sample_rate_hz) == (0.5, RATE)
    whole_numbers = (samples * 32_000).astype(np.int16)
    (clip,) = decode_audio(MediaFile(name="a", data=npy_bytes(whole_numbers)))
    np.testing.assert_array_equal(clip.waveform, whole_numbers.astype(np.float32) / 32_768)


@pytest.mark.parametrize("array", [np.zeros((2, 9_000), np.float32), np.zeros(9_000, np.int64), np.array(1.0)])
def test_other_arrays_are_refused(array: np.ndarray) -> None:
    assert "expected a mono .npy of shape (N,)" in rejected(npy_bytes(array)).detail


def test_arrays_that_are_cut_off_or_hold_code_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.npy").write_bytes(npy_bytes(wave())[:-5_000])
    with pytest.raises(RejectSample, match="media_truncated"):
        decode_audio(MediaFile(name="a", path=tmp_path / "a.npy"))
    assert rejected(npy_bytes(wave())[:-5_000]).reason is Reason.MEDIA_TRUNCATED
    assert rejected(npy_bytes(np.array([print], dtype=object))).reason is Reason.MEDIA_CORRUPT


def test_config_is_closed() -> None:
    with pytest.raises(ValueError, match="Extra inputs"):
        AudioConfig.model_validate({"max_second": 3})
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        AudioConfig(max_seconds=0)
