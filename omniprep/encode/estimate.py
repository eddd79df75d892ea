"""What a record will cost, from headers alone: nothing is decoded."""

from contextlib import closing
from dataclasses import dataclass

from omniprep.encode.media_items import MediaEncoder, MediaSettings, OpenVideo, Resolve, check_track_is_there, counts_as_silence
from omniprep.errors import Reason, RejectSample
from omniprep.media.audio import probe_audio
from omniprep.media.image import image_size, probe_image
from omniprep.media.ready_frames import probe_ready_frames
from omniprep.media.sound_tracks import AudioInfo
from omniprep.media.video_probe import VideoInfo, probe_video
from omniprep.profile import ModelProfile
from omniprep.records import AudioPart, ImagePart, MediaPart, VideoPart
from omniprep.types import MediaFile

_STORED_BYTES_PER_PIXEL = {"jpeg": 0.3, "raw": 3.0}
"""JPEG at quality 95 of photos and film takes 0.2 to 0.4 bytes a pixel."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """Size of a record or of a part of it."""

    num_tokens: int = 0
    num_mel_frames: int = 0
    num_patches: int = 0
    num_frames: int = 0
    audio_s: float = 0.0
    video_s: float = 0.0
    stored_bytes: int = 0

    def __add__(self, other: "Estimate") -> "Estimate":
        return Estimate(
            num_tokens=self.num_tokens + other.num_tokens,
            num_mel_frames=self.num_mel_frames + other.num_mel_frames,
            num_patches=self.num_patches + other.num_patches,
            num_frames=self.num_frames + other.num_frames,
            audio_s=self.audio_s + other.audio_s,
            video_s=self.video_s + other.video_s,
            stored_bytes=self.stored_bytes + other.stored_bytes,
        )


def estimate_text(num_tokens: int) -> Estimate:
    """Return the size of text tokens: five int32 rows."""
    return Estimate(num_tokens=num_tokens, stored_bytes=20 * num_tokens)


def estimate_media(part: MediaPart, resolve: Resolve, encoder: MediaEncoder, *, max_tokens: int | None) -> Estimate:
    """Return the size of a media part. `max_tokens` is what a video's frames may take in the modes that use a budget."""
    settings, profile = encoder.settings, encoder.profile
    match part:
        case AudioPart():
            media = resolve(part.audio)
            return _sound(probe_audio(media), part.audio_start, part.audio_end, settings=settings, profile=profile)
        case ImagePart():
            media = resolve(part.image)
            height, width = image_size(probe_image(media), part, settings.image, profile)
            return _vision(profile.grid_thw(1, height, width), 1, settings=settings, profile=profile)
        case VideoPart():
            return _video(part, resolve, encoder, max_tokens=max_tokens)


def _sound(
    info: AudioInfo, start_s: float | None, end_s: float | None, *, settings: MediaSettings, profile: ModelProfile
) -> Estimate:
    length = info.duration_s or 0.0
    seconds = max(0.0, min(length, end_s if end_s is not None else length) - (start_s or 0.0))
    limit = settings.audio.max_seconds
    if seconds > limit and settings.audio.on_too_long == "error":
        detail = f"{seconds:.1f} s > audio.max_seconds={limit:g}; cut it with audio_start and audio_end, or set audio.on_too_long"
        raise RejectSample(Reason.AUDIO_TOO_LONG, detail)
    if settings.audio.on_too_long == "truncate":
        seconds = min(seconds, limit)
    num_mel_frames = profile.num_mel_frames(round(seconds * profile.sample_rate_hz))
    num_tokens = profile.num_audio_tokens(num_mel_frames) + 2
    stored = 20 * num_tokens + 2 * profile.num_mel_bins * num_mel_frames
    return Estimate(num_tokens=num_tokens, num_mel_frames=num_mel_frames, audio_s=seconds, stored_bytes=stored)


def _vision(grid_thw: tuple[int, int, int], num_frames: int, *, settings: MediaSettings, profile: ModelProfile) -> Estimate:
    steps, height, width = grid_thw
    pixels = num_frames * height * width * profile.patch_size**2
    num_tokens = profile.num_vision_tokens(grid_thw) + 2
    return Estimate(
        num_tokens=num_tokens,
        num_patches=steps * height * width,
        num_frames=num_frames,
        stored_bytes=20 * num_tokens + int(pixels * _STORED_BYTES_PER_PIXEL[settings.frame_format]),
    )


def _video(part: VideoPart, resolve: Resolve, encoder: MediaEncoder, *, max_tokens: int | None) -> Estimate:
    settings, profile = encoder.settings, encoder.profile
    files: tuple[MediaFile, ...] = tuple(resolve(ref) for ref in (part.video if isinstance(part.video, tuple) else (part.video,)))
    info = probe_ready_frames(files) if part.frames_ready else probe_video(files[0])
    with closing(OpenVideo(part=part, files=files, info=info, track=None)) as video:
        has_audio = isinstance(info, VideoInfo) and info.has_audio
        check_track_is_there(part, files[0], has_audio=has_audio)
        sound = resolve(part.audio_track) if part.audio_track is not None else files[0] if has_audio else None
        track = Estimate()
        if sound is not None and part.audio_in_video != "off":
            try:
                track = _sound(probe_audio(sound), part.video_start, part.video_end, settings=settings, profile=profile)
            except RejectSample as error:
                if not counts_as_silence(part, error):
                    raise
        plan = encoder.plan(video, max_tokens=None if max_tokens is None else max(0, max_tokens - track.num_tokens))
    frames = _vision(plan.grid_thw, len(plan.times_s), settings=settings, profile=profile)
    return frames + track + Estimate(video_s=plan.times_s[-1] - plan.times_s[0])
