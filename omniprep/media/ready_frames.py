"""Videos that come as frames made ready: a list of image files, or one `.npy` of uint8 (n, H, W, 3), memory-mapped."""

from collections.abc import Iterator, Sequence

import numpy as np

from omniprep.errors import Reason, RejectSample
from omniprep.media.image import load_rgb, probe_image
from omniprep.media.resize import require_exact_resize, resize_frame
from omniprep.media.sampling import video_size
from omniprep.media.video import VideoConfig, VideoPlan, request_of
from omniprep.profile import QWEN2_5_OMNI, ModelProfile
from omniprep.records import VideoPart
from omniprep.types import MediaFile, Uint8Array

_NPY_MAGIC = b"\x93NUMPY"


def plan_ready_frames(
    files: Sequence[MediaFile], part: VideoPart, config: VideoConfig, profile: ModelProfile = QWEN2_5_OMNI
) -> VideoPlan:
    """Plan a video of frames made ready: all of them, `part.sample_fps` (default: the profile's rate) apart, from time 0.

    The size follows the rule of video files; it counts the repeated frame that an odd number is completed with, as the
    reference does, but that frame is not stored. Raises `RejectSample` (`MEDIA_CORRUPT`, `MEDIA_EMPTY`, `MEDIA_RANGE`, ...).
    """
    if config.resize == "exact":
        require_exact_resize()
    _reject_keys_for_files(part, files)
    is_array = _is_array(files)
    if is_array:
        num_frames, height, width = _map_array(files[0]).shape[:3]
    else:
        sizes = [(info.height, info.width) for info in map(probe_image, files)]
        num_frames, (height, width) = len(files), sizes[0]
        for file, size in zip(files, sizes, strict=True):
            if size != sizes[0]:
                raise RejectSample(
                    Reason.MEDIA_CORRUPT,
                    f"{file.name}: expected {sizes[0][1]}x{sizes[0][0]} as the first frame has, got {size[1]}x{size[0]}; "
                    "frames of one video have one size",
                )
    padded = -(-num_frames // profile.temporal_patch_size) * profile.temporal_patch_size
    new_height, new_width = video_size(height, width, padded, request_of(part, config, profile), profile)
    sample_fps = part.sample_fps or profile.video_fps
    return VideoPlan(
        indices=tuple(range(num_frames)),
        times_s=tuple(index / sample_fps for index in range(num_frames)),
        height=new_height,
        width=new_width,
        grid_thw=profile.grid_thw(num_frames, new_height, new_width),
        sample_fps=sample_fps,
        source_fps=sample_fps,
        num_source_frames=num_frames,
        decoder="npy" if is_array else "images",
    )


def read_ready_frames(files: Sequence[MediaFile], plan: VideoPlan, config: VideoConfig) -> Iterator[Uint8Array]:
    """Yield the frames in order, resized, (height, width, 3) uint8; one at a time in memory."""
    if plan.decoder == "npy":
        # Mapped anew for each frame: pages of a long mapping that were read once would stay in memory.
        frames: Iterator[Uint8Array] = (np.array(_map_array(files[0])[index]) for index in plan.indices)
    else:
        frames = (load_rgb(file) for file in files)
    for frame in frames:
        yield resize_frame(frame, height=plan.height, width=plan.width, mode=config.resize, kind="video")


def _reject_keys_for_files(part: VideoPart, files: Sequence[MediaFile]) -> None:
    if not files:
        raise RejectSample(Reason.MEDIA_EMPTY, "expected at least one frame, got an empty list")
    given = [key for key in ("video_start", "video_end", "fps", "nframes") if getattr(part, key) is not None]
    if given:
        raise RejectSample(
            Reason.MEDIA_RANGE,
            f"{files[0].name}: {', '.join(given)} choose frames of a video file; frames made ready are all used, drop the key",
        )


def _is_array(files: Sequence[MediaFile]) -> bool:
    if len(files) != 1:
        return False
    try:
        with files[0].open() as file:
            return file.read(len(_NPY_MAGIC)) == _NPY_MAGIC
    except OSError:
        return False  # probing the image says what is wrong with the file


def _map_array(file: MediaFile) -> Uint8Array:
    """Return the array of a `.npy` file without reading it whole; checks shape, dtype and length."""
    try:
        if file.path is not None:
            array = np.load(file.path, mmap_mode="r", allow_pickle=False)
        else:
            with file.open() as stream:
                array = np.load(stream, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise RejectSample(
            Reason.MEDIA_TRUNCATED, f"{file.name}: the array cannot be read: {' '.join(str(error).split())}"
        ) from None
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3:
        raise RejectSample(
            Reason.MEDIA_CORRUPT, f"{file.name}: expected uint8 (n, H, W, 3), got {array.dtype} {array.shape}; convert it"
        )
    if 0 in array.shape:
        raise RejectSample(Reason.MEDIA_EMPTY, f"{file.name}: expected at least one frame, got shape {array.shape}")
    frames: Uint8Array = array
    return frames
