"""Sound of any file to mono float32 at the model's rate.

Read (soundfile or PyAV), cut, mean of the channels, soxr HQ: the arithmetic of `librosa.load(sr=16000, offset=, duration=)`,
bit for bit for the formats that soundfile reads. Everything streams in blocks (soxr's streaming mode gives the bits of its
one-shot mode), so only the result grows with the file.

Times are on the file's own time line as a player shows it: presentation time minus the container's start time. A cut
[start_s, end_s) is on that line, and `AudioClip.start_s` says where the first kept sample is, so a track that begins 0.5 s
after its video has `start_s=0.5`. Within a track samples are counted, as the reference does; only a cut that starts
more than 10 s into an MP4 or Matroska track is sought by time stamp (Matroska's are milliseconds, so it may be off by one).
Where an MP4's or Matroska's time stamps jump ahead by over 0.1 s, silence fills the pause, so that what follows stays in time.

A video's sound keeps the decoder's precision; the reference reads it through a 16-bit pipe, which differs by up to 2^-16.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from omniprep.config import Config
from omniprep.errors import Reason, RejectSample
from omniprep.media.sound_tracks import MAX_SAMPLE_RATE_HZ, MIN_SAMPLE_RATE_HZ, AudioInfo, SoundTrack, open_sound_track
from omniprep.profile import QWEN2_5_OMNI, ModelProfile
from omniprep.types import AudioClip, Float32Array, MediaFile

__all__ = ["AudioConfig", "AudioInfo", "decode_audio", "probe_audio", "resample"]

MAX_AMPLITUDE = 1e15
"""Float files keep their scale, but beyond this the power spectrum leaves float32."""

ResampleBackend = Literal["soxr", "torchaudio"]


class AudioConfig(Config):
    """How sound is decoded."""

    backend: ResampleBackend = "soxr"
    """`soxr` (HQ) is the canon. `torchaudio` needs the torch extra and holds the whole clip at the file's own rate."""
    device: str = "cpu"
    """Where `torchaudio` computes the mel: "cpu", "cuda", "cuda:1"; soxr knows the CPU only."""
    max_seconds: float = Field(default=QWEN2_5_OMNI.max_audio_s, ge=1)
    on_too_long: Literal["error", "split", "truncate"] = "error"
    """A clip over `max_seconds` is rejected, becomes consecutive clips, or loses its end (which is recorded)."""
    max_source_seconds: float = Field(default=6 * 3600, ge=1)
    """Longest sound that `split` and `truncate` take: all that is split is in memory at once, 230 MB an hour."""
    max_channels: int = Field(default=64, ge=1)
    """Files of more channels are rejected."""

    @model_validator(mode="after")
    def _soxr_has_no_device(self) -> "AudioConfig":
        if self.device != "cpu" and self.backend != "torchaudio":
            raise ValueError(f"device {self.device!r} needs backend: torchaudio")
        return self


DEFAULT_AUDIO_CONFIG = AudioConfig()


def probe_audio(
    media: MediaFile, profile: ModelProfile = QWEN2_5_OMNI, *, config: AudioConfig = DEFAULT_AUDIO_CONFIG
) -> AudioInfo:
    """Return what the headers say, without decoding. Raises `RejectSample` as `decode_audio` does for the same headers."""
    with open_sound_track(media, profile) as track:
        _check_info(media, track.info, config)
        if track.num_samples == 0:
            raise _no_samples(media, None)
        return track.info


def decode_audio(
    media: MediaFile,
    *,
    start_s: float | None = None,
    end_s: float | None = None,
    config: AudioConfig = DEFAULT_AUDIO_CONFIG,
    profile: ModelProfile = QWEN2_5_OMNI,
    may_split: bool = True,
) -> tuple[AudioClip, ...]:
    """Return the sound in [start_s, end_s) as one clip, or as several consecutive ones where the config says `split`.

    An end beyond the file's end keeps what is there. `may_split=False` is for a video's track, which cannot be several
    items. Raises `RejectSample`: as `open_sound_track`; MEDIA_RANGE for a cut outside the file; MEDIA_OVER_LIMIT,
    AUDIO_TOO_LONG, AUDIO_TOO_SHORT (no token would come of it), AUDIO_NOT_FINITE.
    """
    limit = round(config.max_seconds * profile.sample_rate_hz)
    most = max(limit, round(config.max_source_seconds * profile.sample_rate_hz))
    with open_sound_track(media, profile) as track:
        info = track.info
        _check_info(media, info, config)
        cut = _cut(track, start_s, end_s, media.name)
        splits = config.on_too_long == "split" and may_split
        if config.on_too_long != "truncate" and not splits:
            _reject_by_header(media, cut, info, config)
        keep = (most if splits else limit) + 1
        blocks = _Counted(track.read(cut.first, cut.stop))
        waveform = resample(iter(blocks), info.sample_rate_hz, profile.sample_rate_hz, max_samples=keep, backend=config.backend)
        first_s = info.start_s + cut.first / info.sample_rate_hz
        truncated_from_s = None
        if splits and len(waveform) > most:
            raise _far_too_long(media, config)
        if not splits and len(waveform) > limit:
            if config.on_too_long != "truncate":
                raise _too_long(media, f"over {config.max_seconds:g} s", config)
            waveform = waveform[:limit]
            truncated_from_s = _whole_length_s(media, cut, blocks, info, config)
    _check_waveform(media, waveform, cut, profile)
    edges = _split_edges(len(waveform), limit, profile) if splits else [0, len(waveform)]
    return tuple(
        AudioClip(
            waveform=waveform[start:stop],
            start_s=first_s + start / profile.sample_rate_hz,
            source_sample_rate_hz=info.sample_rate_hz,
            source_channels=info.num_channels,
            decoder=track.decoder,
            truncated_from_s=truncated_from_s,
        )
        for start, stop in itertools.pairwise(edges)
    )


def resample(
    blocks: Iterator[Float32Array],
    rate_in: int,
    rate_out: int,
    *,
    max_samples: int | None = None,
    backend: ResampleBackend = "soxr",
) -> Float32Array:
    """Return mono blocks resampled as one waveform of ceil(n * rate_out / rate_in) samples, the length that librosa gives.

    Reading stops as soon as `max_samples` are there; the result may then be a little longer.

    torchaudio (Hann-windowed sinc, width 6, roll-off 0.99, its default) passes less above 7 kHz than soxr HQ; see
    `log_mel_torchaudio` for the measured difference.
    """
    if backend == "torchaudio":
        return _resample_torchaudio(list(blocks), rate_in, rate_out)
    head = list(itertools.islice(blocks, 2))
    if len(head) < 2:
        return _resample_block(head[0] if head else np.empty(0, np.float32), rate_in, rate_out)
    # A bytearray grows in place, where a list of blocks would double its size when joined.
    output, num_in, stop = bytearray(), 0, math.inf if max_samples is None else 4 * max_samples
    stream = None if rate_in == rate_out else _soxr_stream(rate_in, rate_out)
    for block in itertools.chain(head, blocks):
        num_in += len(block)
        samples = np.ascontiguousarray(block)
        output += (samples if stream is None else stream.resample_chunk(samples)).data
        if len(output) >= stop:
            return np.frombuffer(output, np.float32)
    if stream is not None:
        output += stream.resample_chunk(np.empty(0, np.float32), last=True).data
    return _fix_length(np.frombuffer(output, np.float32), num_in, rate_in, rate_out)


def _soxr_stream(rate_in: int, rate_out: int) -> Any:
    import soxr

    return soxr.ResampleStream(rate_in, rate_out, 1, dtype="float32", quality="soxr_hq")


def _resample_block(block: Float32Array, rate_in: int, rate_out: int) -> Float32Array:
    """Resample a waveform that is one block: soxr's one-shot mode is quicker than its stream for a second of sound."""
    if rate_in == rate_out or not len(block):
        return np.ascontiguousarray(block)
    import soxr

    return _fix_length(soxr.resample(block, rate_in, rate_out, quality="soxr_hq"), len(block), rate_in, rate_out)


def _fix_length(waveform: Float32Array, num_in: int, rate_in: int, rate_out: int) -> Float32Array:
    """Return librosa's length, with its floating-point ratio and its zeros: soxr rounds to the nearest sample."""
    num_out = math.ceil(num_in * (rate_out / rate_in))
    return waveform[:num_out] if len(waveform) >= num_out else np.pad(waveform, (0, num_out - len(waveform)))


def _resample_torchaudio(blocks: list[Float32Array], rate_in: int, rate_out: int) -> Float32Array:
    if not blocks:
        return np.empty(0, np.float32)
    import torch
    import torchaudio

    waveform = torch.from_numpy(np.concatenate(blocks))
    resampled: Float32Array = torchaudio.functional.resample(waveform, rate_in, rate_out).numpy()
    return resampled


class _Counted:
    """Blocks, with a count of the samples that went by."""

    def __init__(self, blocks: Iterator[Float32Array]) -> None:
        self.blocks = blocks
        self.num_samples = 0

    def __iter__(self) -> Iterator[Float32Array]:
        for block in self.blocks:
            self.num_samples += len(block)
            yield block


@dataclass(frozen=True, kw_only=True, slots=True)
class _Cut:
    """Samples [first, stop) of a track."""

    first: int
    stop: int | None
    num_promised: int | None
    """How many that will be by the header, None if it does not say."""
    is_whole: bool


def _cut(track: SoundTrack, start_s: float | None, end_s: float | None, name: str) -> _Cut:
    """Return the cut in samples of the track, with the reference's rounding: int(offset * rate), int(duration * rate)."""
    start, rate, track_start = start_s or 0.0, track.info.sample_rate_hz, track.info.start_s
    if start < 0 or (end_s is not None and end_s <= start):
        raise RejectSample(Reason.MEDIA_RANGE, f"{name}: expected 0 <= start < end, got the cut [{start:g} s, {end_s:g} s)")
    if end_s is not None and end_s <= track_start:
        raise RejectSample(
            Reason.MEDIA_RANGE, f"{name}: the cut [{start:g} s, {end_s:g} s) ends before the sound starts at {track_start:g} s"
        )
    lead = max(start - track_start, 0.0)
    first = int(lead * rate)
    stop = None if end_s is None else first + int((end_s - max(start, track_start)) * rate)
    if track.num_samples is not None and first >= track.num_samples > 0:
        raise _beyond_end(name, start, track_start + track.num_samples / rate)
    ends = [end for end in (stop, track.num_samples) if end is not None]
    promised = min(ends) - first if track.num_samples is not None else None
    return _Cut(first=first, stop=stop, num_promised=promised, is_whole=first == 0 and stop is None)


def _reject_by_header(media: MediaFile, cut: _Cut, info: AudioInfo, config: AudioConfig) -> None:
    rate = info.sample_rate_hz
    if cut.num_promised is not None and cut.num_promised > config.max_seconds * rate:
        raise _too_long(media, f"{cut.num_promised / rate:.3f} s", config)


def _too_long(media: MediaFile, length: str, config: AudioConfig) -> RejectSample:
    if config.on_too_long == "split":
        advice = "this sound belongs to a video, which is one item; cut the video, raise max_seconds or set audio_in_video to off"
    else:
        advice = "cut it with a start and end, raise max_seconds, or set on_too_long to split or truncate"
    return RejectSample(
        Reason.AUDIO_TOO_LONG, f"{media.name}: {length} of sound, the limit is max_seconds={config.max_seconds:g}; {advice}"
    )


def _far_too_long(media: MediaFile, config: AudioConfig) -> RejectSample:
    return RejectSample(
        Reason.AUDIO_TOO_LONG,
        f"{media.name}: over max_source_seconds={config.max_source_seconds:g} of sound; cut the file, or raise the limit",
    )


def _check_info(media: MediaFile, info: AudioInfo, config: AudioConfig) -> None:
    """Refuse what would cost far more memory or time than the file's size lets expect."""
    if info.num_channels > config.max_channels:
        raise RejectSample(
            Reason.MEDIA_OVER_LIMIT, f"{media.name}: {info.num_channels} channels of sound > max_channels={config.max_channels}"
        )
    if not MIN_SAMPLE_RATE_HZ <= info.sample_rate_hz <= MAX_SAMPLE_RATE_HZ:
        raise RejectSample(
            Reason.MEDIA_OVER_LIMIT,
            f"{media.name}: a sample rate of {info.sample_rate_hz} Hz, expected {MIN_SAMPLE_RATE_HZ} to {MAX_SAMPLE_RATE_HZ}",
        )


def _whole_length_s(media: MediaFile, cut: _Cut, blocks: _Counted, info: AudioInfo, config: AudioConfig) -> float:
    """Return the length before truncation: by the header if it is sure, else by reading on to the end."""
    if cut.num_promised is not None:
        return cut.num_promised / info.sample_rate_hz
    for _ in blocks:
        if blocks.num_samples > config.max_source_seconds * info.sample_rate_hz:
            raise _far_too_long(media, config)
    return blocks.num_samples / info.sample_rate_hz


def _check_waveform(media: MediaFile, waveform: Float32Array, cut: _Cut, profile: ModelProfile) -> None:
    if not len(waveform):
        raise _no_samples(media, cut)
    peak = max(float(waveform.max()), -float(waveform.min()))
    if not peak <= MAX_AMPLITUDE:
        got = f"a peak of {peak:g}" if np.isfinite(peak) else "NaN or infinity"
        raise RejectSample(Reason.AUDIO_NOT_FINITE, f"{media.name}: expected finite samples (full scale is 1), got {got}")
    if profile.num_audio_tokens(profile.num_mel_frames(len(waveform))) == 0:
        raise RejectSample(
            Reason.AUDIO_TOO_SHORT,
            f"{media.name}: {len(waveform)} samples at {profile.sample_rate_hz} Hz are no audio token; "
            f"expected more than {2 * profile.mel_hop} samples",
        )


def _no_samples(media: MediaFile, cut: _Cut | None) -> RejectSample:
    if cut is None or cut.is_whole:
        return RejectSample(Reason.MEDIA_EMPTY, f"{media.name}: the file holds no sample of sound")
    return RejectSample(Reason.MEDIA_RANGE, f"{media.name}: the cut holds no sample of sound; the file ends before it")


def _beyond_end(name: str, start_s: float, end_s: float) -> RejectSample:
    return RejectSample(Reason.MEDIA_RANGE, f"{name}: the cut starts at {start_s:g} s, the sound ends at {end_s:g} s")


def _split_edges(num_samples: int, limit: int, profile: ModelProfile) -> list[int]:
    """Return the edges of consecutive clips of `limit` samples; the one before a too short last clip gives it a second.

    >>> _split_edges(1_000_000, 480_000, QWEN2_5_OMNI), _split_edges(480_000 + 10, 480_000, QWEN2_5_OMNI)
    ([0, 480000, 960000, 1000000], [0, 464000, 480010])
    """
    edges = [*range(0, num_samples, limit), num_samples]
    last = edges[-1] - edges[-2]
    if len(edges) > 2 and profile.num_audio_tokens(profile.num_mel_frames(last)) == 0:
        edges[-2] -= min(profile.sample_rate_hz, limit // 2)
    return edges
