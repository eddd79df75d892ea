"""Videos: probe, plan which frames at which size, read them resized one by one.

```
probe_video ──> VideoInfo ──plan_video──> VideoPlan (indices, true times, size) ──read_frames──> decoder, frames
```

A plan is arithmetic on the facts of a file: no decoder is opened for it, and facts that were stored do as well as fresh ones.

`decoder: auto` takes decord, and PyAV where decord cannot do what is asked:

- files that it reads wrong: AV1, 10 bits, edit lists, MPEG-TS, GIF, several streams (`VideoInfo.decord_problem`);
- files too long for it: it runs ahead of its reader (768 frames of an hour of 1080p at full size: 457 MB; PyAV: 96 MB), and
  nothing limits by how much, so a file that would not fit in a worker whole is not given to it (`held_bytes`);
- leaving frames out: it decodes all, PyAV only those that a kept one refers to. Where under a quarter is kept, that halves
  the time (6 s of 720p, 12 of 144 frames: 112 ms instead of 213 ms).

The choice depends on the file and the settings alone, never on load, and is recorded. Full-size frames of the two are
equal bit for bit for 8-bit H.264, HEVC and VP9 (full and limited range, BT.601 and BT.709 tags, rotation; tested).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import Field

from omniprep.config import Config
from omniprep.errors import ConfigError, Reason, RejectSample
from omniprep.media import sampling
from omniprep.media.resize import require_exact_resize, resize_frame
from omniprep.media.sampling import FrameRequest
from omniprep.media.video_decord import held_bytes, open_decord, read_decord
from omniprep.media.video_probe import VideoInfo, probe_video
from omniprep.media.video_pyav import read_pyav
from omniprep.profile import QWEN2_5_OMNI, ModelProfile
from omniprep.records import VideoPart
from omniprep.types import Int64Array, MediaFile, ResizeMode, Uint8Array, VideoTiming

__all__ = [
    "FrameRequest",
    "VideoConfig",
    "VideoFrames",
    "VideoInfo",
    "VideoPlan",
    "plan_video",
    "probe_video",
    "read_frames",
    "request_of",
]


class VideoConfig(Config):
    """How videos become frames. A record's own keys (`fps`, `max_pixels`, ...) win; None means the model profile's value."""

    resize: ResizeMode = "fast"
    frames: Literal["reference", "budget", "adaptive"] = "reference"
    """`reference`: qwen_omni_utils' choice. `budget`: the highest rate whose tokens fit `max_tokens`, up to `fps` if given
    or the file's own rate. `adaptive`: as many as `reference`, or as fit `max_tokens`, more where the picture changes."""
    fps: float | None = Field(default=None, gt=0)
    min_frames: int | None = Field(default=None, gt=0)
    max_frames: int | None = Field(default=None, ge=2)
    min_pixels: int | None = Field(default=None, gt=0)
    max_pixels: int | None = Field(default=None, gt=0)
    total_pixels: int | None = Field(default=None, gt=0)
    max_tokens: int | None = Field(default=None, gt=0)
    """Tokens that one video may take, for `budget` and `adaptive`."""
    decoder: Literal["auto", "decord", "pyav"] = "auto"


_MIN_SHARE_FOR_DECORD = 0.25
_MAX_HELD_BYTES = 384 << 20
"""Above this PyAV reads the file: a worker stays small whatever the video. 9 s of 720p resized by decord, 6 s at full size."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class VideoPlan:
    """Which frames of a video are read, when they are shown, and how large they become. n is the number of frames."""

    indices: tuple[int, ...]
    """(n,) into the file's frames in presentation order."""
    times_s: tuple[float, ...]
    """(n,) presentation times on the file's time line."""
    height: int
    """Pixels after resizing."""
    width: int
    grid_thw: tuple[int, int, int]
    sample_fps: float
    source_fps: float
    num_source_frames: int
    info: VideoInfo | None = None
    """None for frames made ready."""

    @property
    def timing(self) -> VideoTiming:
        """Return the timing contract, without sound and decoder; whoever knows them sets `audio_start_s` and `decoder`."""
        return VideoTiming(
            source_fps=self.source_fps,
            num_source_frames=self.num_source_frames,
            frame_indices=self.indices,
            frame_times_s=self.times_s,
            sample_fps=self.sample_fps,
        )


@dataclass(frozen=True, slots=True)
class VideoFrames:
    """The planned frames of a video, to be gone through once: (height, width, 3) uint8, resized, one in memory at a time."""

    decoder: str
    """"decord", "pyav", "images" or "npy"."""
    frames: Iterator[Uint8Array]

    def __iter__(self) -> Iterator[Uint8Array]:
        return self.frames


def request_of(part: VideoPart, config: VideoConfig, profile: ModelProfile = QWEN2_5_OMNI) -> FrameRequest:
    """Return what is asked of a video: the part's keys over the config's over the profile's."""
    return FrameRequest(
        nframes=part.nframes,
        fps=part.fps or config.fps or profile.video_fps,
        min_frames=part.min_frames or config.min_frames or profile.min_video_frames,
        max_frames=part.max_frames or config.max_frames,
        min_pixels=part.min_pixels or config.min_pixels or profile.video_limits.min_pixels,
        max_pixels=part.max_pixels or config.max_pixels,
        total_pixels=part.total_pixels or config.total_pixels or profile.video_total_pixels,
        resized_height=part.resized_height,
        resized_width=part.resized_width,
    )


def plan_video(
    media: MediaFile,
    info: VideoInfo,
    part: VideoPart,
    config: VideoConfig,
    profile: ModelProfile = QWEN2_5_OMNI,
    *,
    max_tokens: int | None = None,
) -> VideoPlan:
    """Choose frames and size of a video file.

    `max_tokens` bounds the video's tokens in the `budget` and `adaptive` choices, together with `config.max_tokens`.
    Cuts are taken by frame number where the file has a constant rate (the reference's arithmetic), by time elsewhere.
    Raises `RejectSample` (`MEDIA_RANGE`, `VIDEO_TOO_SHORT`, `IMAGE_ASPECT`, `TOO_MANY_TOKENS`), `ConfigError`.
    """
    if config.resize == "exact":
        require_exact_resize()
    limits = [limit for limit in (max_tokens, config.max_tokens) if limit is not None]
    try:
        indices, height, width, clip_frames = _choose(info, part, config, profile, min(limits, default=None))
    except RejectSample as error:
        raise error.at(media.name) from None
    return VideoPlan(
        indices=tuple(indices.tolist()),
        times_s=tuple(info.frame_times_s[indices].tolist()),
        height=height,
        width=width,
        grid_thw=profile.grid_thw(len(indices), height, width),
        sample_fps=len(indices) / clip_frames * info.source_fps,
        source_fps=info.source_fps,
        num_source_frames=info.num_frames,
        info=info,
    )


def _choose(
    info: VideoInfo, part: VideoPart, config: VideoConfig, profile: ModelProfile, max_tokens: int | None
) -> tuple[Int64Array, int, int, int]:
    """Return (indices, height, width, number of frames in the cut)."""
    if info.constant_rate:
        first, last = sampling.clip_range(info.num_frames, info.source_fps, part.video_start, part.video_end)
    else:
        first, last = sampling.clip_range_by_time(info.frame_times_s, part.video_start, part.video_end)
    clip_frames = last - first + 1
    request = request_of(part, config, profile)
    budget = max_tokens if config.frames != "reference" and part.nframes is None else None
    if config.frames == "budget" and part.nframes is None:
        if budget is None:
            raise ConfigError(
                "video.frames: `budget` needs a number of tokens; set `video.max_tokens` or the recipe's `max_tokens`"
            )
        asked_fps = part.fps or config.fps or info.source_fps
        request = replace(request, fps=min(asked_fps, info.source_fps))
    count = sampling.reference_num_frames(clip_frames, info.source_fps, request, profile)
    count, (height, width) = _fit_tokens(count, info, request, profile, budget)
    if config.frames == "adaptive":
        activity = sampling.packet_activity(info.packet_bytes, info.keyframes, info.source_fps)
        indices = sampling.spread_by_activity(info.frame_times_s, activity, first, last, count)
    else:
        indices = sampling.spread_evenly(first, last, count)
    return indices, height, width, clip_frames


def _fit_tokens(
    count: int, info: VideoInfo, request: FrameRequest, profile: ModelProfile, budget: int | None
) -> tuple[int, tuple[int, int]]:
    """Return (frame count, (height, width)): fewer frames first, and smaller ones only below `min_frames`."""

    def size_of(frames: int) -> tuple[int, int]:
        return sampling.video_size(info.height, info.width, frames, request, profile)

    if budget is None:
        return count, size_of(count)
    floor = min(count, -(-request.min_frames // profile.temporal_patch_size) * profile.temporal_patch_size)
    count = sampling.budget_num_frames(count, floor, budget, size_of, profile)
    while sampling.video_tokens(count, size_of(count), profile) > budget:
        smaller = _smaller_frames(count, budget, request, profile)
        if smaller is not None:
            size = sampling.video_size(info.height, info.width, count, smaller, profile)
            if sampling.video_tokens(count, size, profile) <= budget:
                return count, size
        if count <= profile.temporal_patch_size:
            need = sampling.video_tokens(count, size_of(count), profile)
            raise RejectSample(
                Reason.TOO_MANY_TOKENS,
                f"{count} frames of the least size take {need} tokens > {budget}; raise max_tokens or lower min_pixels",
            )
        count -= profile.temporal_patch_size
    return count, size_of(count)


def _smaller_frames(count: int, budget: int, request: FrameRequest, profile: ModelProfile) -> FrameRequest | None:
    """Return the request with the pixels that the budget leaves each frame, or None if that is below `min_pixels`."""
    grids = -(-count // profile.temporal_patch_size)
    max_pixels = budget // grids * profile.resize_factor**2
    if max_pixels < request.min_pixels:
        return None
    return replace(request, max_pixels=min(max_pixels, request.max_pixels or max_pixels), resized_height=None, resized_width=None)


def _size_in_decoder(info: VideoInfo, config: VideoConfig, height: int, width: int) -> tuple[int, int] | None:
    """Return the size that the decoder resizes to itself, in one step with the colour conversion; None for full size."""
    return (height, width) if config.resize == "fast" and not info.rotation else None


def _choose_decoder(
    media: MediaFile, info: VideoInfo, config: VideoConfig, size: tuple[int, int] | None, *, num_kept: int
) -> tuple[str, Any]:
    """Return the decoder's name and decord's open reader, if it is decord."""
    too_large = held_bytes(info, size) > _MAX_HELD_BYTES
    sparse = num_kept < _MIN_SHARE_FOR_DECORD * info.num_frames
    if config.decoder == "pyav" or (config.decoder == "auto" and (info.decord_problem or too_large or sparse)):
        return "pyav", None
    reader = open_decord(media, info, size=size) if not info.decord_problem else None
    if reader is not None:
        return "decord", reader
    if config.decoder == "decord":
        raise RejectSample(
            Reason.MEDIA_CORRUPT,
            f"{media.name}: decord does not read this file right ({info.decord_problem or 'it counts other frames'}); "
            "set `video.decoder: auto`",
        )
    return "pyav", None


def read_frames(media: MediaFile, plan: VideoPlan, config: VideoConfig) -> VideoFrames:
    """Choose the decoder and return it with the planned frames, in order, resized.

    Raises `RejectSample` (`MEDIA_CORRUPT`) if `config.decoder` cannot take the file, and from the frames for one that
    cannot be decoded.
    """
    info = plan.info
    if info is None:
        raise ValueError(f"{media.name}: a plan of frames made ready; read it with read_ready_frames")
    size = _size_in_decoder(info, config, plan.height, plan.width)
    decoder, reader = _choose_decoder(media, info, config, size, num_kept=len(plan.indices))
    if reader is not None:
        frames = read_decord(reader, media, plan.indices)
    elif config.resize == "fast":
        frames = read_pyav(media, info, plan.indices, size=(plan.height, plan.width))
    else:
        frames = read_pyav(media, info, plan.indices)
    return VideoFrames(decoder, resized(frames, plan, config))


def resized(frames: Iterator[Uint8Array], plan: VideoPlan, config: VideoConfig) -> Iterator[Uint8Array]:
    """Yield frames at the planned size."""
    for frame in frames:
        yield resize_frame(frame, height=plan.height, width=plan.width, mode=config.resize, kind="video")
