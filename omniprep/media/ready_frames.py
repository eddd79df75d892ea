"""Videos that come as frames made ready: a list of image files, or one `.npy` of uint8 (n, H, W, 3), memory-mapped."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from omniprep.errors import Reason, RejectSample
from omniprep.media.arrays import NPY_MAGIC, load_array
from omniprep.media.image import load_rgb, probe_image
from omniprep.media.resize import require_exact_resize
from omniprep.media.sampling import video_size
from omniprep.media.video import VideoConfig, VideoFrames, VideoPlan, request_of, resized
from omniprep.media.video_probe import MAX_TIME_S
from omniprep.profile import QWEN2_5_OMNI, ModelProfile
from omniprep.records import MAX_FRAMES, VideoPart
from omniprep.types import MediaFile, Uint8Array


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadyFrames:
    """What the headers of frames made ready say."""

    num_frames: int
    height: int
    width: int
    decoder: Literal["images", "npy"]


def probe_ready_frames(files: Sequence[MediaFile]) -> ReadyFrames:
    """Return how many frames there are and their size, without decoding one.

    Raises `RejectSample`: `MEDIA_CORRUPT`, `MEDIA_EMPTY`, ... as `probe_image` does.
    """
    if not files:
        raise RejectSample(Reason.MEDIA_EMPTY, "expected at least one frame, got an empty list")
    if _is_array(files):
        num_frames, height, width = _map_array(files[0]).shape[:3]
        return ReadyFrames(num_frames=num_frames, height=height, width=width, decoder="npy")
    sizes = [(info.height, info.width) for info in map(probe_image, files)]
    for file, size in zip(files, sizes, strict=True):
        if size != sizes[0]:
            raise RejectSample(
                Reason.MEDIA_CORRUPT,
                f"{file.name}: expected {sizes[0][1]}x{sizes[0][0]} as the first frame has, got {size[1]}x{size[0]}; "
                "frames of one video have one size",
            )
    return ReadyFrames(num_frames=len(files), height=sizes[0][0], width=sizes[0][1], decoder="images")


def plan_ready_frames(
    media: MediaFile, ready: ReadyFrames, part: VideoPart, config: VideoConfig, profile: ModelProfile = QWEN2_5_OMNI
) -> VideoPlan:
    """Plan a video of frames made ready: all of them, `part.sample_fps` (default: the profile's rate) apart, from time 0.

    The size follows the rule of video files; it counts the repeated frame that an odd number is completed with, as the
    reference does, but that frame is not stored. `media` is the first file, for messages. Raises `RejectSample`
    (`MEDIA_RANGE`, `IMAGE_ASPECT`).
    """
    if config.resize == "exact":
        require_exact_resize()
    _reject_keys_for_files(part, media)
    num_frames = ready.num_frames
    padded = -(-num_frames // profile.temporal_patch_size) * profile.temporal_patch_size
    new_height, new_width = video_size(ready.height, ready.width, padded, request_of(part, config, profile), profile)
    sample_fps = part.sample_fps or profile.video_fps
    if num_frames > MAX_FRAMES or num_frames / sample_fps > MAX_TIME_S:
        raise RejectSample(
            Reason.MEDIA_OVER_LIMIT,
            f"{media.name}: {num_frames} frames, {num_frames / sample_fps:g} s; expected at most {MAX_FRAMES}, {MAX_TIME_S:g} s",
        )
    return VideoPlan(
        indices=tuple(range(num_frames)),
        times_s=tuple(index / sample_fps for index in range(num_frames)),
        height=new_height,
        width=new_width,
        grid_thw=profile.grid_thw(num_frames, new_height, new_width),
        sample_fps=sample_fps,
        source_fps=sample_fps,
        num_source_frames=num_frames,
    )


def read_ready_frames(files: Sequence[MediaFile], ready: ReadyFrames, plan: VideoPlan, config: VideoConfig) -> VideoFrames:
    """Return the frames in order, resized."""
    if ready.decoder == "npy":
        # Mapped anew for each frame: pages of a long mapping that were read once would stay in memory.
        frames: Iterator[Uint8Array] = (np.array(_map_array(files[0])[index]) for index in plan.indices)
    else:
        frames = (load_rgb(file) for file in files)
    return VideoFrames(ready.decoder, resized(frames, plan, config))


def _reject_keys_for_files(part: VideoPart, media: MediaFile) -> None:
    given = [key for key in ("video_start", "video_end", "fps", "nframes") if getattr(part, key) is not None]
    if given:
        raise RejectSample(
            Reason.MEDIA_RANGE,
            f"{media.name}: {', '.join(given)} choose frames of a video file; frames made ready are all used, drop the key",
        )


def _is_array(files: Sequence[MediaFile]) -> bool:
    if len(files) != 1:
        return False
    try:
        with files[0].open() as file:
            return file.read(len(NPY_MAGIC)) == NPY_MAGIC
    except OSError:
        return False  # probing the image says what is wrong with the file


def _map_array(file: MediaFile) -> Uint8Array:
    """Return the array of a `.npy` file without reading it whole; checks shape, dtype and length."""
    array = load_array(file)
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3:
        raise RejectSample(
            Reason.MEDIA_CORRUPT, f"{file.name}: expected uint8 (n, H, W, 3), got {array.dtype} {array.shape}; convert it"
        )
    if 0 in array.shape:
        raise RejectSample(Reason.MEDIA_EMPTY, f"{file.name}: expected at least one frame, got shape {array.shape}")
    frames: Uint8Array = array
    return frames
