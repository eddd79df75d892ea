"""Pictures and videos: distance to the libraries alone, speed against the reference's steps."""

import subprocess
import tempfile
from pathlib import Path

import numpy as np
from ratios import Ratio, measure

from omniprep.features.patches import patchify
from omniprep.media.frames import encode_frame
from omniprep.media.video import VideoConfig, VideoPlan, plan_video, probe_video, read_frames
from omniprep.media.video_decord import open_decord, read_decord
from omniprep.records import VideoPart
from omniprep.types import MediaFile

QUALITY = 90
PART = VideoPart(video="clip")
H264 = ["-c:v", "libx264", "-preset", "veryfast", "-crf", "23", "-pix_fmt", "yuv420p"]


def make_clip(folder: Path, width: int, height: int) -> MediaFile:
    """Make 6 s of a moving fractal with grain and sound: about as many bits a frame as film."""
    import imageio_ffmpeg

    path = folder / f"{height}.mp4"
    picture = f"mandelbrot=size={width}x{height}:rate=24:end_scale=0.02,noise=alls=6:allf=t"
    inputs = ["-f", "lavfi", "-i", picture, "-f", "lavfi", "-i", "sine=frequency=300:sample_rate=44100"]
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *inputs, "-t", "6", *H264, "-c:a", "aac", str(path)]
    subprocess.run(command, check=True)
    return MediaFile(name=path.name, path=path)


def stored_frames(media: MediaFile, config: VideoConfig) -> list[bytes]:
    """Return what is stored of a video: the whole way."""
    plan = plan_video(media, probe_video(media), PART, config)
    return [encode_frame(frame, "jpeg", QUALITY) for frame in read_frames(media, plan, config)]


def decode_alone(media: MediaFile, plan: VideoPlan) -> np.ndarray:
    """Return the chosen frames by PyAV's plain loop, which is quicker than decord's `get_batch`."""
    import av

    wanted = set(plan.indices)
    with av.open(str(media.path)) as container:
        container.streams.video[0].thread_type = "NONE"
        frames = enumerate(container.decode(video=0))
        return np.stack([frame.to_ndarray(format="rgb24") for index, frame in frames if index in wanted])


def resize_alone(frames: np.ndarray, plan: VideoPlan, mode: str) -> np.ndarray:
    """Return frames resized by torchvision: the reference's call (`exact`), or the quicker uint8 kernel (`fast`)."""
    import torch
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.functional import resize as resize_float
    from torchvision.transforms.v2.functional import resize as resize_uint8

    planes = torch.from_numpy(frames).permute(0, 3, 1, 2)
    size = [plan.height, plan.width]
    if mode == "exact":
        resized = resize_float(planes.contiguous(), size, InterpolationMode.BICUBIC, antialias=True)
    else:
        resized = resize_uint8(planes, size, InterpolationMode.BICUBIC, antialias=True)
    return np.ascontiguousarray(resized.permute(0, 2, 3, 1).numpy())


def jpeg_alone(frames: np.ndarray) -> list[bytes]:
    import simplejpeg

    return [simplejpeg.encode_jpeg(frame, quality=QUALITY) for frame in frames]


def video_ratio(media: MediaFile, mode: str) -> Ratio:
    """Return video file to stored frames against decoder, resize and JPEG encoder, each alone."""
    config = VideoConfig(resize=mode)
    plan = plan_video(media, probe_video(media), PART, config)

    def alone() -> None:
        jpeg_alone(resize_alone(decode_alone(media, plan), plan, mode))

    return measure(
        f"video file to stored frames, {mode}, {media.name} vs decoder + resize + JPEG alone",
        ours=lambda: stored_frames(media, config),
        other=alone,
        target=1.2,
        at_least=False,
        pairs=5,
    )


def decoder_ratio(media: MediaFile) -> Ratio:
    """Return reading the chosen frames, unresized, with `decoder: auto` against decord's own reader."""
    from omniprep.media.video_pyav import read_pyav

    info = probe_video(media)
    indices = plan_video(media, info, PART, VideoConfig()).indices
    return measure(
        f"chosen frames of {media.name}: selective decoding vs decord",
        ours=lambda: list(read_pyav(media, probe_video(media), indices)),
        other=lambda: list(read_decord(open_decord(media, info), media, indices)),
        target=1.0,
        at_least=True,
        pairs=5,
    )


def patch_ratio() -> Ratio:
    """Return patchify against the reference's video processor on 10 frames of 560x1008."""
    import torch
    from transformers import Qwen2VLVideoProcessor

    frames = np.random.default_rng(0).integers(0, 256, (10, 560, 1008, 3), dtype=np.uint8)
    processor, planes = Qwen2VLVideoProcessor(), torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous()
    size = {"shortest_edge": 100_352, "longest_edge": 602_112}
    return measure(
        "patches of 10 frames 560x1008 vs the reference's video processor",
        ours=lambda: patchify(frames),
        other=lambda: processor(videos=[planes], do_sample_frames=False, size=size, return_tensors="pt"),
        target=1.0,
        at_least=True,
        pairs=5,
    )


def run() -> list[Ratio]:
    """Return the lines of the benchmark table."""
    with tempfile.TemporaryDirectory() as folder:
        clips = [make_clip(Path(folder), 640, 360), make_clip(Path(folder), 1280, 720)]
        lines = [video_ratio(clip, mode) for mode in ("fast", "exact") for clip in clips]
        return [*lines, *(decoder_ratio(clip) for clip in clips), patch_ratio()]
