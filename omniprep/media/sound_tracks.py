"""The sound of one file as a stream of mono blocks at its own sample rate, from soundfile, PyAV or NumPy.

soundfile reads what libsndfile knows (wav, flac, ogg, mp3, aiff…) and is exact and cheapest; PyAV reads the rest, above all
the track of a video. Which one tries first is decided by the file's first bytes; PyAV is the second try for everything.
Nothing is held but one block, so an hour costs no more than a second.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from omniprep.errors import Reason, RejectSample
from omniprep.media.arrays import load_array
from omniprep.media.containers import SAFE_DEMUXERS, audio_opener, is_whole_mpeg_audio, num_missing_bytes
from omniprep.profile import ModelProfile
from omniprep.types import Float32Array, MediaFile

BLOCK_SAMPLES = 1 << 17
"""Samples of one channel in a block: 0.5 MB a channel, 2.7 s at 48 kHz."""
MAX_BLOCK_VALUES = BLOCK_SAMPLES * 8
"""Values of all channels in a block."""
MIN_SAMPLE_RATE_HZ, MAX_SAMPLE_RATE_HZ = 1000, 1_000_000
"""Sampled more slowly a few bytes would become hours; no converter samples sound more quickly."""
_NO_LENGTH = 1 << 62
"""libsndfile's length of a file that does not say how long it is is a little under 2^63."""
SEEK_FROM_S = 10.0
"""Cuts that start later are sought; earlier ones are decoded from the beginning, which counts samples exactly."""
SEEK_LEAD_S = 1.0
"""How much is decoded and dropped before a cut that was sought: codecs need some packets to settle (Opus 80 ms)."""
SHORTFALL_S = 0.25
"""How much a file may end before what its header says. Headers round to packets, and some count the encoder's delay."""
GAP_S = 0.1
"""Time stamps this far ahead of the samples are a pause in the sound; less is rounding (1 ms in Matroska) or jitter."""
_SEEKABLE_DEMUXERS = ("mov", "matroska")
_EXACT_DEMUXERS = ("mov", "avi", "wav", "w64", "aiff", "caf", "au", "flac")
"""Demuxers whose stream durations come from the header, not from a guess by bit rate."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AudioInfo:
    """What the headers say about a file's sound."""

    duration_s: float | None
    """Length of the sound, None if the file does not say; an estimate in formats without a table (mp3, aac)."""
    sample_rate_hz: int
    num_channels: int
    codec: str
    """Name by the library that reads it: `pcm_16`, `aac`."""
    container: str
    start_s: float
    """Time of the first sample on the file's time line (presentation time minus the container's start time)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SoundTrack:
    """An opened track. `read` gives its samples [first, stop) as mono float32 blocks; stop None means until the end."""

    info: AudioInfo
    num_samples: int | None
    """Length in samples of `sample_rate_hz` as promised by the header, None where that is missing or a guess."""
    decoder: str
    read: Callable[[int, int | None], Iterator[Float32Array]]


@contextmanager
def open_sound_track(media: MediaFile, profile: ModelProfile) -> Iterator[SoundTrack]:
    """Open the file's (best) audio track.

    Raises `RejectSample`: MEDIA_MISSING, MEDIA_UNREADABLE, MEDIA_EMPTY, MEDIA_TRUNCATED, MEDIA_NO_STREAM, MEDIA_CORRUPT.
    """
    opener = _check_file(media)
    if opener == "npy":
        yield _npy_track(media, profile)
        return
    sound_file = _try_soundfile(media) if opener == "soundfile" else None
    if sound_file is not None:
        with sound_file:
            yield _soundfile_track(sound_file, media.name)
        return
    with _open_container(media) as container:
        yield _pyav_track(container, media.name)


def _check_file(media: MediaFile) -> str:
    """Return who opens the file. Raises `RejectSample` where it is absent, empty or cut off."""
    try:
        with media.open() as file:
            head = file.read(16)
            missing = num_missing_bytes(file) if head else 0
            opener = audio_opener(head)
            if opener == "soundfile" and head[:1] in (b"\xff", b"I"):
                file.seek(0)
                opener = "soundfile" if is_whole_mpeg_audio(file) else "pyav"
    except FileNotFoundError:
        raise RejectSample(Reason.MEDIA_MISSING, f"{media.name}: no such file") from None
    except OSError as error:
        raise RejectSample(Reason.MEDIA_UNREADABLE, f"{media.name}: cannot be read: {error.strerror or error}") from None
    if not head:
        raise RejectSample(Reason.MEDIA_EMPTY, f"{media.name}: the file has 0 bytes; expected sound")
    if missing > 0:
        raise RejectSample(
            Reason.MEDIA_TRUNCATED,
            f"{media.name}: the file ends {missing} bytes before its headers say; copy or download it again",
        )
    return opener


def mix_to_mono(samples: Float32Array) -> Float32Array:
    """Return the mean of the channels of (n, channels) samples, with the rounding of `numpy.mean`.

    >>> mix_to_mono(np.array([[1.0, 3.0], [0.0, -1.0]], np.float32)).tolist()
    [2.0, -0.5]
    """
    num_channels = samples.shape[1]
    if num_channels == 1:
        return samples[:, 0]
    with np.errstate(all="ignore"):  # float files may hold infinities of both signs; the finished clip is checked
        if num_channels == 2:  # 20 times faster than a mean over pairs, and the same
            mono: Float32Array = (samples[:, 0] + samples[:, 1]) * np.float32(0.5)
        else:
            mono = samples.mean(axis=1, dtype=np.float32)
    return mono


PCM_16_SCALE = np.float32(2.0**-15)


# soundfile ----------------------------------------------------------------------------------------------------------------


def _try_soundfile(media: MediaFile) -> Any | None:
    """Return an open `soundfile.SoundFile`, or None if libsndfile does not take the file."""
    import soundfile

    try:
        return soundfile.SoundFile(str(media.path) if media.path is not None else media.open())
    except (soundfile.SoundFileError, TypeError):  # TypeError: a name ending in .raw is never looked into
        return None


def _soundfile_track(sound_file: Any, name: str) -> SoundTrack:
    import soundfile

    num_samples, rate = int(sound_file.frames), int(sound_file.samplerate)
    has_length = num_samples < _NO_LENGTH
    # Without a Xing header an MP3's length is a guess by bit rate.
    is_guess = not has_length or sound_file.format in ("MP3", "MPEG")
    block_samples = min(BLOCK_SAMPLES, max(1, MAX_BLOCK_VALUES // int(sound_file.channels)))
    # The same values as libsndfile's own conversion, which goes sample by sample: a third of the time.
    dtype = "int16" if sound_file.subtype == "PCM_16" else "float32"

    def read(first: int, stop: int | None) -> Iterator[Float32Array]:
        last = num_samples if stop is None else min(stop, num_samples)
        position = min(first, num_samples)
        try:
            if position:
                sound_file.seek(position)
            while position < last:
                block = sound_file.read(min(block_samples, last - position), dtype=dtype, always_2d=True)
                if not len(block):
                    break
                position += len(block)
                yield mix_to_mono(block if dtype == "float32" else np.multiply(block, PCM_16_SCALE, dtype=np.float32))
        except soundfile.SoundFileError as error:
            raise _corrupt(name, error) from None
        if position < last and not is_guess:
            raise _cut_off(name, position / rate, num_samples / rate)

    info = AudioInfo(
        duration_s=num_samples / rate if has_length else None,
        sample_rate_hz=rate,
        num_channels=int(sound_file.channels),
        codec=sound_file.subtype.lower(),
        container=sound_file.format.lower(),
        start_s=0.0,
    )
    return SoundTrack(info=info, num_samples=None if is_guess else num_samples, decoder="soundfile", read=read)


# PyAV ---------------------------------------------------------------------------------------------------------------------


@contextmanager
def _open_container(media: MediaFile) -> Iterator[Any]:
    import av

    source: str | IO[bytes] = f"file:{media.path}" if media.path is not None else media.open()
    try:
        container = av.open(source, metadata_errors="ignore", options={"format_whitelist": SAFE_DEMUXERS})
    except av.ArgumentError:  # what libavformat says of a demuxer that is not on the list
        raise RejectSample(
            Reason.MEDIA_CORRUPT, f"{media.name}: expected sound or a video, got another kind of file (a picture, a play list)"
        ) from None
    except (av.FFmpegError, ValueError) as error:
        raise _corrupt(media.name, error) from None
    with container:
        yield container


def _pyav_track(container: Any, name: str) -> SoundTrack:
    import av

    stream = container.streams.best("audio")
    if stream is None:
        if container.streams.audio:
            raise RejectSample(Reason.MEDIA_CORRUPT, f"{name}: its sound cannot be decoded; is the file damaged?")
        kinds = ", ".join(sorted({other.type for other in container.streams})) or "no"
        raise RejectSample(Reason.MEDIA_NO_STREAM, f"{name}: expected an audio stream, the file has {kinds} streams only")
    for other in container.streams:
        if other is not stream:
            other.discard = av.stream.Discard.all  # pictures are not even read where the format allows it
    if stream.codec_context is None:
        raise RejectSample(Reason.MEDIA_CORRUPT, f"{name}: no decoder for its sound; convert it, for example to FLAC")
    rate, num_channels = int(stream.codec_context.sample_rate or 0), int(stream.codec_context.channels or 0)
    if not rate or not num_channels:
        raise RejectSample(Reason.MEDIA_CORRUPT, f"{name}: {stream.codec_context.name} stream without sample rate or channels")
    origin_s = (container.start_time or 0) / av.time_base
    first_pts_s = float(stream.start_time * stream.time_base) if stream.start_time is not None else origin_s
    start_s = round(first_pts_s - origin_s, 6)  # the container's start is in microseconds
    exact = container.format.name.split(",")[0] in _EXACT_DEMUXERS
    duration_s = None
    if stream.duration:
        duration_s = float(stream.duration * stream.time_base)
    elif container.duration:  # Matroska: the end of the last stream, counted from time stamp 0
        duration_s = max(container.duration / av.time_base - first_pts_s, 0.0)
    num_samples = round(duration_s * rate) if exact and stream.duration and duration_s else None
    info = AudioInfo(
        duration_s=duration_s,
        sample_rate_hz=rate,
        num_channels=num_channels,
        codec=stream.codec_context.name,
        container=container.format.name.split(",")[0],
        start_s=start_s,
    )

    def read(first: int, stop: int | None) -> Iterator[Float32Array]:
        return _read_pyav(container, stream, name, info=info, promised=num_samples, first=first, stop=stop)

    return SoundTrack(info=info, num_samples=num_samples, decoder="pyav", read=read)


def _read_pyav(
    container: Any, stream: Any, name: str, *, info: AudioInfo, promised: int | None, first: int, stop: int | None
) -> Iterator[Float32Array]:
    block: list[npt.NDArray[Any]] = []
    num_in_block, end = 0, 0
    for position, samples in _placed_samples(container, stream, name, info=info, first=first):
        end = position + len(samples)
        if promised is not None and position < promised < end:
            end = promised  # a track's last packet is padded to full length; the header says where sound ends
        done = stop is not None and end >= stop
        last = stop if stop is not None and done else end
        if last > first:
            block.append(samples[max(first - position, 0) : last - position])
            num_in_block += len(block[-1])
        if block and (num_in_block >= BLOCK_SAMPLES or done):
            yield _float_mono(block)
            block, num_in_block = [], 0
        if done:
            return
    if block:
        yield _float_mono(block)
    end_s = end / info.sample_rate_hz
    if promised is not None and promised / info.sample_rate_hz - end_s > SHORTFALL_S:
        raise _cut_off(name, end_s, promised / info.sample_rate_hz)


def _placed_samples(
    container: Any, stream: Any, name: str, *, info: AudioInfo, first: int
) -> Iterator[tuple[int, npt.NDArray[Any]]]:
    """Yield (position of the first sample in the track, (n, channels) samples) from sample `first` or before it.

    Samples are counted; where time stamps jump ahead of the count (a pause in a recording), silence keeps the rest in time.
    """
    position = _seek(container, stream, info, first)
    for frame in _frames(container, stream, name):
        if frame.sample_rate != info.sample_rate_hz or frame.layout.nb_channels != info.num_channels:
            raise RejectSample(
                Reason.MEDIA_CORRUPT,
                f"{name}: sound changes from {info.sample_rate_hz} Hz, {info.num_channels} channels to {frame.sample_rate} Hz, "
                f"{frame.layout.nb_channels} channels in the middle; re-encode the file",
            )
        samples = _samples(frame)
        stamped = _stamped_position(stream, info, frame)
        if position is None:  # after seeking, time stamps alone say where the first frame belongs
            position = stamped or 0
        if stamped is not None and stamped - position > GAP_S * info.sample_rate_hz:
            for start in range(position, stamped, BLOCK_SAMPLES):
                yield (
                    start,
                    np.full(
                        (min(BLOCK_SAMPLES, stamped - start), samples.shape[1]),
                        128 if samples.dtype == np.uint8 else 0,
                        samples.dtype,
                    ),
                )
            position = stamped
        yield position, samples
        position += len(samples)


def _seek(container: Any, stream: Any, info: AudioInfo, first: int) -> int | None:
    """Go to shortly before sample `first`; return the position of the next sample, None if only time stamps can say it."""
    if first <= SEEK_FROM_S * info.sample_rate_hz or info.container not in _SEEKABLE_DEMUXERS or stream.start_time is None:
        return 0
    target_s = first / info.sample_rate_hz - SEEK_LEAD_S
    container.seek(stream.start_time + int(target_s / stream.time_base), stream=stream)
    return None


def _stamped_position(stream: Any, info: AudioInfo, frame: Any) -> int | None:
    """Return the sample at which a frame starts by its time stamp, None where the format's stamps are not to be trusted."""
    if frame.pts is None or stream.start_time is None or info.container not in _SEEKABLE_DEMUXERS:
        return None
    return round(float((frame.pts - stream.start_time) * stream.time_base) * info.sample_rate_hz)


def _frames(container: Any, stream: Any, name: str) -> Iterator[Any]:
    """Decode the stream. A damaged packet with good ones on both sides rejects the file.

    Before the first good one, players skip them too; after the last, the file is cut off and its length tells.
    """
    import av

    started, damage = False, None
    try:
        for packet in container.demux(stream):
            try:
                frames = packet.decode()
            except av.InvalidDataError as error:
                damage = error if started else None
                continue
            for frame in frames:
                if damage is not None:
                    raise _corrupt(name, damage)
                started = True
                yield frame
    except av.FFmpegError as error:
        raise _corrupt(name, error) from None


_SCALE = {"u1": 1 / 128, "i2": 1 / 32768, "i4": 1 / 2147483648}


def _samples(frame: Any) -> npt.NDArray[Any]:
    """Return a frame's samples as (n, channels) in the decoder's own type."""
    samples: npt.NDArray[Any] = frame.to_ndarray()
    return samples.T if frame.format.is_planar else samples.reshape(-1, frame.layout.nb_channels)


def _float_mono(block: list[npt.NDArray[Any]]) -> Float32Array:
    samples = np.concatenate(block)
    kind = samples.dtype.str[1:]
    if kind == "u1":
        samples = samples.astype(np.int16) - 128
    floats = samples.astype(np.float32, copy=False)
    if kind in _SCALE:
        floats = floats * np.float32(_SCALE[kind])
    return mix_to_mono(floats)


# NumPy --------------------------------------------------------------------------------------------------------------------


def _npy_track(media: MediaFile, profile: ModelProfile) -> SoundTrack:
    """A `.npy` holds (N,) samples at the model's rate, as the reference takes arrays: float, or int16 of full scale 32768."""
    array = load_array(media)
    if array.ndim != 1 or array.dtype not in (np.float32, np.float64, np.int16):
        raise RejectSample(
            Reason.MEDIA_CORRUPT,
            f"{media.name}: expected a mono .npy of shape (N,) of float32, float64 or int16 at {profile.sample_rate_hz} Hz, "
            f"got shape {array.shape} of {array.dtype}",
        )

    def read(first: int, stop: int | None) -> Iterator[Float32Array]:
        last = len(array) if stop is None else min(stop, len(array))
        for start in range(min(first, last), last, BLOCK_SAMPLES):
            yield _float_mono([array[start : min(start + BLOCK_SAMPLES, last), None]])

    info = AudioInfo(
        duration_s=len(array) / profile.sample_rate_hz,
        sample_rate_hz=profile.sample_rate_hz,
        num_channels=1,
        codec=str(array.dtype),
        container="npy",
        start_s=0.0,
    )
    return SoundTrack(info=info, num_samples=len(array), decoder="npy", read=read)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def _corrupt(name: str, error: BaseException) -> RejectSample:
    text = getattr(error, "strerror", None) or _one_line(error)  # strerror leaves out the path on this machine
    return RejectSample(Reason.MEDIA_CORRUPT, f"{name}: cannot be decoded as sound: {text}; re-encode the file or check it")


def _cut_off(name: str, got_s: float, promised_s: float) -> RejectSample:
    return RejectSample(
        Reason.MEDIA_TRUNCATED,
        f"{name}: {got_s:.2f} s of sound could be decoded, its header promises {promised_s:.2f} s; copy or download it again",
    )
