"""The media parts of a record, one at a time: found, decoded, resized, turned into features.

Sounds and pictures are encoded at once. A video is opened first (its sound encoded, its frames only counted) and
encoded later, because how many frames it gets may depend on the tokens that everything else takes.

With a `MediaCache` each step asks it first: what it has is neither probed nor decoded. The bytes are the same either way.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

from pydantic import Field

from omniprep.config import Config
from omniprep.encode.media_cache import FRAMES, READY, SOUNDS, VIDEO, Form, MediaCache, StoredFrames, library_versions
from omniprep.errors import Reason, RejectSample
from omniprep.features.mel import log_mel, log_mel_torchaudio
from omniprep.media.audio import AudioConfig, decode_audio
from omniprep.media.frames import encode_frame
from omniprep.media.image import ImageConfig, decode_image
from omniprep.media.ready_frames import ReadyFrames, plan_ready_frames, probe_ready_frames, read_ready_frames
from omniprep.media.video import VideoConfig, VideoPlan, plan_video, read_frames
from omniprep.media.video_probe import VideoInfo, probe_video
from omniprep.profile import QWEN2_5_OMNI, ModelProfile
from omniprep.records import AudioPart, ImagePart, MediaBlob, VideoPart
from omniprep.tokens.layout import AudioRun, TrackRun, VideoRun
from omniprep.types import AudioClip, EncodedAudio, EncodedVision, Float32Array, FrameFormat, MediaFile, Uint8Array

Resolve = Callable[[str | MediaBlob], MediaFile]
"""Finds the media that a record names, or raises `RejectSample`."""

ComputeMel = Callable[[Float32Array, ModelProfile], Float32Array]
"""(N,) waveform to (128, F) log-mel."""

Value = TypeVar("Value")

_SOUND_LIBRARIES = ("av", "librosa", "numpy", "scipy", "soundfile", "soxr")
_PICTURE_LIBRARIES = ("numpy", "pillow", "simplejpeg")
_VIDEO_LIBRARIES = ("av", "decord", "numpy", "pillow", "simplejpeg")
_TORCH_LIBRARIES = ("torch", "torchaudio", "torchvision")
"""Libraries whose version may show in what is cached; torch's only where the settings use them."""


class MediaSettings(Config):
    """How media become features."""

    audio: AudioConfig = AudioConfig()
    image: ImageConfig = ImageConfig()
    video: VideoConfig = VideoConfig()
    frame_format: FrameFormat = "jpeg"
    """`jpeg`, or `raw` for lossless frames at about ten times the size."""
    jpeg_quality: int = Field(default=95, ge=1, le=100)


@dataclass(frozen=True, kw_only=True)
class OpenVideo:
    """A video whose length and sound are known and whose frames are not chosen yet."""

    part: VideoPart
    files: tuple[MediaFile, ...]
    info: VideoInfo | ReadyFrames
    track: EncodedAudio | None
    place: str = ""
    """Where it stands in the record."""

    @property
    def duration_s(self) -> float:
        """Return the length, of the cut if it is one, by which videos of one record share a token budget."""
        if isinstance(self.info, ReadyFrames):
            return 1.0
        stop_s = min(self.part.video_end or math.inf, self.info.duration_s)
        return max(0.0, stop_s - (self.part.video_start or 0.0))

    def close(self) -> None:
        """Close the file: PyAV's objects refer to each other, so that it would stay open until the next garbage collection."""
        if isinstance(self.info, VideoInfo) and self.info.opened is not None:
            self.info.opened[0].close()


class MediaEncoder:
    """Encodes media parts by one set of settings.

    `compute_mel` replaces the backend that the settings name; it cannot be had with a cache, which would not know it.
    """

    def __init__(
        self,
        settings: MediaSettings,
        profile: ModelProfile = QWEN2_5_OMNI,
        compute_mel: ComputeMel | None = None,
        cache: MediaCache | None = None,
    ) -> None:
        if compute_mel is not None and cache is not None:
            raise ValueError("expected compute_mel or cache, got both: an entry would not tell whose mel it holds")
        self.settings = settings
        self.profile = profile
        audio = settings.audio
        backend = partial(log_mel_torchaudio, device=audio.device) if audio.backend == "torchaudio" else log_mel
        self._compute_mel: ComputeMel = compute_mel or backend
        self._cache = cache
        self._asked = _Asked(settings, profile)

    def audio(self, part: AudioPart, resolve: Resolve) -> list[EncodedAudio]:
        """Return the item of a sound; several where `audio.on_too_long: split` cut it."""
        return list(self._sounds(resolve(part.audio), part.audio_start, part.audio_end))

    def audio_run(self, audio: EncodedAudio, item: int) -> AudioRun:
        """Return the run of a standalone sound."""
        return AudioRun(num_tokens=self.profile.num_audio_tokens(audio.num_mel_frames), item=item)

    def image(self, part: ImagePart, resolve: Resolve) -> EncodedVision:
        """Return the item of a picture."""
        media = resolve(part.image)
        stored = self._kept(FRAMES, (media,), lambda: self._asked.picture(part), lambda: self._decode_picture(media, part))
        return EncodedVision(
            kind="image",
            grid_thw=self.profile.grid_thw(1, stored.height, stored.width),
            frames=stored.frames,
            frame_format=self.settings.frame_format,
            height=stored.height,
            width=stored.width,
            source=media.name,
        )

    def open_video(self, part: VideoPart, resolve: Resolve) -> OpenVideo:
        """Find a video, measure it and encode its sound if that is used."""
        if part.frames_ready:
            files = tuple(resolve(ref) for ref in (part.video if isinstance(part.video, tuple) else (part.video,)))
            check_track_is_there(part, files[0], has_audio=False)
            ready = self._kept(READY, files, self._asked.ready_frames, lambda: probe_ready_frames(files))
            return OpenVideo(part=part, files=files, info=ready, track=self._track(part, None, resolve))
        assert not isinstance(part.video, tuple)
        media = resolve(part.video)
        info = self._kept(VIDEO, (media,), self._asked.video, lambda: probe_video(media))
        video = OpenVideo(part=part, files=(media,), info=info, track=None)
        try:
            check_track_is_there(part, media, has_audio=info.has_audio)
            return replace(video, track=self._track(part, media if info.has_audio else None, resolve))
        except RejectSample:
            video.close()
            raise

    def plan(self, video: OpenVideo, *, max_tokens: int | None = None) -> VideoPlan:
        """Choose the frames and their size; `max_tokens` is the share of the token budget for the modes that use one."""
        if isinstance(video.info, ReadyFrames):
            return plan_ready_frames(video.files[0], video.info, video.part, self.settings.video, self.profile)
        return plan_video(video.files[0], video.info, video.part, self.settings.video, self.profile, max_tokens=max_tokens)

    def video_run(self, video: OpenVideo, plan: VideoPlan, *, item: int, track_item: int, claimed_fps: float | None) -> VideoRun:
        """Return the run of a video from its timing contract. `claimed_fps` overrides the rate sampled from a file."""
        track = None
        if video.track is not None:
            num_tokens = self.profile.num_audio_tokens(video.track.num_mel_frames)
            track = TrackRun(num_tokens=num_tokens, start_s=video.track.start_s, item=track_item)
        fps = claimed_fps if claimed_fps is not None and isinstance(video.info, VideoInfo) else plan.sample_fps
        return VideoRun(
            grid_thw=plan.grid_thw,
            grid_times_s=tuple(plan.times_s[:: self.profile.temporal_patch_size]),
            second_per_grid=self.profile.temporal_patch_size / fps,
            item=item,
            track=track,
        )

    def video(self, video: OpenVideo, plan: VideoPlan, run: VideoRun) -> EncodedVision:
        """Read, resize and store the chosen frames, one at a time."""
        stored = self._kept(FRAMES, video.files, lambda: self._asked.frames(plan), lambda: self._read_frames(video, plan))
        audio_start_s = video.track.start_s if video.track is not None else None
        return EncodedVision(
            kind="video",
            grid_thw=plan.grid_thw,
            frames=stored.frames,
            frame_format=self.settings.frame_format,
            height=stored.height,
            width=stored.width,
            source=video.files[0].name,
            timing=replace(plan.timing, decoder=stored.decoder, audio_start_s=audio_start_s),
            audio_index=run.track.item if run.track is not None else None,
            second_per_grid=run.second_per_grid,
        )

    def _kept(
        self, form: Form[Value], files: Sequence[MediaFile], asked: Callable[[], dict[str, Any]], make: Callable[[], Value]
    ) -> Value:
        return make() if self._cache is None else self._cache.kept(form, files, asked(), make)

    def _sounds(self, media: MediaFile, start_s: float | None, end_s: float | None) -> tuple[EncodedAudio, ...]:
        def decode() -> tuple[EncodedAudio, ...]:
            clips = decode_audio(media, start_s=start_s, end_s=end_s, config=self.settings.audio, profile=self.profile)
            return tuple(map(self._clip, clips))

        return self._kept_sounds(media, lambda: self._asked.sound(start_s, end_s), decode)

    def _kept_sounds(
        self, media: MediaFile, asked: Callable[[], dict[str, Any]], decode: Callable[[], tuple[EncodedAudio, ...]]
    ) -> tuple[EncodedAudio, ...]:
        form = SOUNDS[self._cache.mel_dtype if self._cache is not None else "float32"]
        return tuple(replace(item, source=media.name) for item in self._kept(form, (media,), asked, decode))

    def _decode_picture(self, media: MediaFile, part: ImagePart) -> StoredFrames:
        frame = decode_image(media, part=part, config=self.settings.image, profile=self.profile)
        height, width = frame.shape[:2]
        return StoredFrames(frames=(self._encode_frame(frame),), height=height, width=width)

    def _read_frames(self, video: OpenVideo, plan: VideoPlan) -> StoredFrames:
        if isinstance(video.info, ReadyFrames):
            frames = read_ready_frames(video.files, video.info, plan, self.settings.video)
        else:
            frames = read_frames(video.files[0], plan, self.settings.video)
        stored = tuple(map(self._encode_frame, frames))
        return StoredFrames(frames=stored, height=plan.height, width=plan.width, decoder=frames.decoder)

    def _encode_frame(self, frame: Uint8Array) -> bytes:
        return encode_frame(frame, self.settings.frame_format, self.settings.jpeg_quality)

    def _clip(self, clip: AudioClip) -> EncodedAudio:
        return EncodedAudio(
            mel=self._compute_mel(clip.waveform, self.profile),
            num_samples=len(clip.waveform),
            source="",
            start_s=clip.start_s,
            decoder=clip.decoder,
            truncated_from_s=clip.truncated_from_s,
        )

    def _track(self, part: VideoPart, media: MediaFile | None, resolve: Resolve) -> EncodedAudio | None:
        """Return a video's sound: the file given as `audio_track`, or the track of the video file itself.

        Both are on the video's time line and cut as it is. A track too short for one token counts as silence under
        `auto`. `media` is None where the video has no sound of its own.
        """
        if part.audio_in_video == "off":
            return None
        sound = resolve(part.audio_track) if part.audio_track is not None else media
        if sound is None:
            return None
        tracks = self._kept_sounds(sound, lambda: self._asked.track(part), lambda: self._decode_track(sound, part))
        return tracks[0] if tracks else None

    def _decode_track(self, sound: MediaFile, part: VideoPart) -> tuple[EncodedAudio, ...]:
        """Return the one item of a track, none where it counts as silence."""
        config, start_s, end_s = self.settings.audio, part.video_start, part.video_end
        try:
            (clip,) = decode_audio(sound, start_s=start_s, end_s=end_s, config=config, profile=self.profile, may_split=False)
        except RejectSample as error:
            if counts_as_silence(part, error):
                return ()
            raise
        return (self._clip(clip),)


class _Asked:
    """What the entries of a cache depend on besides the files: for each kind its own settings and libraries, none else's."""

    def __init__(self, settings: MediaSettings, profile: ModelProfile) -> None:
        model = {"profile": profile.name, "profile_sha256": hashlib.sha256(repr(profile).encode()).hexdigest()}
        is_jpeg = settings.frame_format == "jpeg"
        stored = {"frame_format": settings.frame_format, "jpeg_quality": settings.jpeg_quality if is_jpeg else None}
        for_sound = _TORCH_LIBRARIES if settings.audio.backend == "torchaudio" else ()
        for_video = _TORCH_LIBRARIES if settings.video.resize == "exact" else ()
        self._sound = {
            **model,
            "settings": settings.audio.model_dump(mode="json"),
            "libraries": library_versions(*_SOUND_LIBRARIES, *for_sound),
        }
        self._picture = {
            **model,
            **stored,
            "settings": settings.image.model_dump(mode="json"),
            "libraries": library_versions(*_PICTURE_LIBRARIES),
        }
        self._frames = {
            **stored,
            "resize": settings.video.resize,
            "decoder": settings.video.decoder,
            "libraries": library_versions(*_VIDEO_LIBRARIES, *for_video),
        }

    def sound(self, start_s: float | None, end_s: float | None) -> dict[str, Any]:
        """Return what a standalone sound depends on."""
        return {**self._sound, "start_s": start_s, "end_s": end_s, "is_track": False}

    def track(self, part: VideoPart) -> dict[str, Any]:
        """Return what a video's track depends on."""
        may_be_silent = part.audio_in_video == "auto"
        cut = {"start_s": part.video_start, "end_s": part.video_end}
        return {**self._sound, **cut, "is_track": True, "may_be_silent": may_be_silent}

    def picture(self, part: ImagePart) -> dict[str, Any]:
        """Return what a picture depends on."""
        return {**self._picture, "part": part.model_dump(mode="json", exclude={"type", "image"})}

    def video(self) -> dict[str, Any]:
        """Return what the facts of a video file depend on."""
        return {"libraries": library_versions("av", "numpy")}

    def ready_frames(self) -> dict[str, Any]:
        """Return what the facts of frames made ready depend on."""
        return {"libraries": library_versions("numpy", "pillow")}

    def frames(self, plan: VideoPlan) -> dict[str, Any]:
        """Return what the frames of a video depend on: which they are and how large, however that was chosen."""
        return {**self._frames, "indices": plan.indices, "height": plan.height, "width": plan.width}


def check_track_is_there(part: VideoPart, media: MediaFile, *, has_audio: bool) -> None:
    """Raise `RejectSample` (`MEDIA_NO_STREAM`) if the record asks for a sound that neither the file nor the record has."""
    if part.audio_in_video == "on" and part.audio_track is None and not has_audio:
        raise RejectSample(
            Reason.MEDIA_NO_STREAM,
            f'{media.name}: "audio_in_video" is "on", but it has no sound track and the record names no `audio_track`; '
            "say `auto` or `off`, or name one",
        )


def counts_as_silence(part: VideoPart, error: RejectSample) -> bool:
    """Return whether a sound track that cannot be used leaves a silent video: one without a token's worth, under `auto`."""
    too_little = error.reason in (Reason.AUDIO_TOO_SHORT, Reason.MEDIA_EMPTY, Reason.MEDIA_RANGE)
    return part.audio_in_video == "auto" and too_little
