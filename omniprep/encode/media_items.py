"""The media parts of a record, one at a time: found, decoded, resized, turned into features.

Each function returns the encoded items and the layout run that will hold their tokens. Sounds and pictures are encoded
at once; a video is opened first (its track encoded, its frames only counted), because how many frames it gets may
depend on the tokens that everything else takes.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from omniprep.config import Config
from omniprep.errors import Reason, RejectSample
from omniprep.features.mel import log_mel, log_mel_torchaudio
from omniprep.media.audio import AudioConfig, decode_audio
from omniprep.media.frames import encode_frame
from omniprep.media.image import ImageConfig, decode_image
from omniprep.media.ready_frames import plan_ready_frames, read_ready_frames
from omniprep.media.video import VideoConfig, VideoPlan, plan_video, read_frames
from omniprep.media.video_probe import VideoInfo, probe_video
from omniprep.profile import ModelProfile
from omniprep.records import AudioPart, ImagePart, MediaBlob, VideoPart
from omniprep.tokens.layout import AudioRun, TrackRun, VideoRun
from omniprep.types import AudioClip, EncodedAudio, EncodedVision, FrameFormat, MediaFile, RopeMode

Resolve = Callable[[str | MediaBlob], MediaFile]
"""Finds the media that a record names, or raises `RejectSample`."""


class MediaSettings(Config):
    """How media become features."""

    audio: AudioConfig = AudioConfig()
    image: ImageConfig = ImageConfig()
    video: VideoConfig = VideoConfig()
    frame_format: FrameFormat = "jpeg"
    """`jpeg`, or `raw` for lossless frames at about ten times the size."""
    jpeg_quality: int = 95


def encode_clip(clip: AudioClip, *, source: str, settings: MediaSettings, profile: ModelProfile) -> EncodedAudio:
    """Return the features of one decoded clip."""
    compute = log_mel_torchaudio if settings.audio.backend == "torchaudio" else log_mel
    return EncodedAudio(
        mel=compute(clip.waveform, profile),
        num_samples=len(clip.waveform),
        source=source,
        start_s=clip.start_s,
        decoder=clip.decoder,
        truncated_from_s=clip.truncated_from_s,
    )


def encode_audio(part: AudioPart, resolve: Resolve, *, settings: MediaSettings, profile: ModelProfile) -> list[EncodedAudio]:
    """Return the item of a sound; several where `audio.on_too_long: split` cut it."""
    media = resolve(part.audio)
    clips = decode_audio(media, start_s=part.audio_start, end_s=part.audio_end, config=settings.audio, profile=profile)
    return [encode_clip(clip, source=media.name, settings=settings, profile=profile) for clip in clips]


def audio_run(audio: EncodedAudio, item: int, profile: ModelProfile) -> AudioRun:
    """Return the run of a standalone sound."""
    return AudioRun(num_tokens=profile.num_audio_tokens(audio.num_mel_frames), item=item)


def encode_image(part: ImagePart, resolve: Resolve, *, settings: MediaSettings, profile: ModelProfile) -> EncodedVision:
    """Return the item of a picture."""
    media = resolve(part.image)
    frame = decode_image(media, part=part, config=settings.image, profile=profile)
    height, width = frame.shape[:2]
    return EncodedVision(
        kind="image",
        grid_thw=profile.grid_thw(1, height, width),
        frames=(encode_frame(frame, settings.frame_format, settings.jpeg_quality),),
        frame_format=settings.frame_format,
        height=height,
        width=width,
        source=media.name,
    )


@dataclass(frozen=True, kw_only=True)
class OpenVideo:
    """A video whose length and sound are known and whose frames are not chosen yet."""

    part: VideoPart
    files: tuple[MediaFile, ...]
    info: VideoInfo | None
    """None for frames made ready."""
    track: EncodedAudio | None

    @property
    def duration_s(self) -> float:
        """Return the length by which videos of one record share a token budget."""
        return self.info.duration_s if self.info is not None else 1.0


def open_video(part: VideoPart, resolve: Resolve, *, settings: MediaSettings, profile: ModelProfile) -> OpenVideo:
    """Find a video, measure it and encode its sound if that is used."""
    if part.frames_ready:
        refs = part.video if isinstance(part.video, tuple) else (part.video,)
        files = tuple(resolve(ref) for ref in refs)
        return OpenVideo(part=part, files=files, info=None, track=_ready_track(part, resolve, settings=settings, profile=profile))
    assert not isinstance(part.video, tuple)
    media = resolve(part.video)
    info = probe_video(media)
    return OpenVideo(
        part=part, files=(media,), info=info, track=_file_track(part, media, info, settings=settings, profile=profile)
    )


def _ready_track(part: VideoPart, resolve: Resolve, *, settings: MediaSettings, profile: ModelProfile) -> EncodedAudio | None:
    if part.audio_in_video == "off":
        return None
    if part.audio_track is None:
        if part.audio_in_video == "on":
            raise RejectSample(Reason.MEDIA_NO_STREAM, '"audio_in_video": "on" but the frames made ready have no `audio_track`')
        return None
    media = resolve(part.audio_track)
    (clip,) = decode_audio(media, config=settings.audio, profile=profile, may_split=False)
    return encode_clip(clip, source=media.name, settings=settings, profile=profile)


def _file_track(
    part: VideoPart, media: MediaFile, info: VideoInfo, *, settings: MediaSettings, profile: ModelProfile
) -> EncodedAudio | None:
    """Return the sound of a video file. A track too short for one token counts as silence under `auto`."""
    if part.audio_in_video == "off":
        return None
    if not info.has_audio:
        if part.audio_in_video == "on":
            raise RejectSample(Reason.MEDIA_NO_STREAM, f'{media.name}: "audio_in_video": "on" but the file has no sound track')
        return None
    try:
        (clip,) = decode_audio(
            media, start_s=part.video_start, end_s=part.video_end, config=settings.audio, profile=profile, may_split=False
        )
    except RejectSample as error:
        outside = error.reason in (Reason.AUDIO_TOO_SHORT, Reason.MEDIA_EMPTY, Reason.MEDIA_RANGE)
        if part.audio_in_video == "auto" and outside:
            return None
        raise
    return encode_clip(clip, source=media.name, settings=settings, profile=profile)


def plan_open_video(
    video: OpenVideo, *, settings: MediaSettings, profile: ModelProfile, max_tokens: int | None = None
) -> VideoPlan:
    """Choose the frames and their size; `max_tokens` is the share of the token budget for the modes that use one."""
    if video.info is None:
        return plan_ready_frames(video.files, video.part, settings.video, profile)
    return plan_video(video.files[0], video.info, video.part, settings.video, profile, max_tokens=max_tokens)


def encode_video(video: OpenVideo, plan: VideoPlan, run: VideoRun, *, settings: MediaSettings) -> EncodedVision:
    """Read, resize and store the chosen frames, one at a time."""
    if video.info is None:
        frames = read_ready_frames(video.files, plan, settings.video)
    else:
        frames = read_frames(video.files[0], plan, settings.video)
    return EncodedVision(
        kind="video",
        grid_thw=plan.grid_thw,
        frames=tuple(encode_frame(frame, settings.frame_format, settings.jpeg_quality) for frame in frames),
        frame_format=settings.frame_format,
        height=plan.height,
        width=plan.width,
        source=video.files[0].name,
        timing=replace(plan.timing, audio_start_s=video.track.start_s if video.track is not None else None),
        audio_index=run.track.item if run.track is not None else None,
        second_per_grid=run.second_per_grid,
    )


def video_run(
    video: OpenVideo,
    plan: VideoPlan,
    *,
    item: int,
    track_item: int,
    rope_mode: RopeMode,
    reference_fps: float,
    profile: ModelProfile,
) -> VideoRun:
    """Return the run of a video from its timing contract."""
    track = None
    if video.track is not None:
        num_tokens = profile.num_audio_tokens(video.track.num_mel_frames)
        track = TrackRun(num_tokens=num_tokens, start_s=video.track.start_s, item=track_item)
    fps = plan.sample_fps
    if rope_mode == "reference" and video.info is not None:
        fps = reference_fps  # its processor is told one rate for a whole call, and never the one that was sampled
    return VideoRun(
        grid_thw=plan.grid_thw,
        grid_times_s=tuple(plan.times_s[:: profile.temporal_patch_size]),
        second_per_grid=profile.temporal_patch_size / fps,
        item=item,
        track=track,
    )
