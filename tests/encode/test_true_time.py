"""`rope_mode: aligned` on real files whose time is not simple: the ids against presentation times read by other code."""

import subprocess
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from omniprep.encode.thinker import EncodeConfig, ThinkerEncoder
from omniprep.profile import QWEN2_5_OMNI
from omniprep.records import MediaBlob, parse_record
from omniprep.types import EncodedSample, MediaFile

PICTURE = ["-f", "lavfi", "-i", "testsrc2=size=320x240:rate=24:duration=9"]
H264 = ["-c:v", "libx264", "-preset", "ultrafast", "-pix_fmt", "yuv420p"]


def tone(seconds: float) -> list[str]:
    return ["-f", "lavfi", "-i", f"sine=frequency=330:sample_rate=44100:duration={seconds}"]


FILES: dict[str, tuple[str, list[str], dict[str, Any]]] = {
    "constant": ("mp4", [*PICTURE, *tone(9), *H264, "-c:a", "aac"], {}),
    "variable rate": (
        "mkv",
        [
            *PICTURE,
            *tone(9),
            "-vf",
            "setpts='if(lt(N,90),N/24/TB,(90/24+(N-90)/8)/TB)'",
            "-fps_mode",
            "vfr",
            *H264,
            "-c:a",
            "flac",
        ],
        {},
    ),
    "sound later": ("mkv", [*PICTURE, "-itsoffset", "0.7", *tone(8), *H264, "-c:a", "flac"], {}),
    "picture later": ("mkv", ["-itsoffset", "1.3", *PICTURE, *tone(9), *H264, "-c:a", "flac"], {}),
    "sound shorter": ("mp4", [*PICTURE, *tone(2.5), *H264, "-c:a", "aac"], {}),
    "sound longer": ("mp4", [*PICTURE, *tone(14), *H264, "-c:a", "aac"], {}),
    "frames capped": ("mp4", [*PICTURE, *tone(9), *H264, "-c:a", "aac"], {"max_frames": 4}),
    "many frames": ("mp4", [*PICTURE, *tone(9), *H264, "-c:a", "aac"], {"fps": 12.0}),
    "cut": ("mp4", [*PICTURE, *tone(9), *H264, "-c:a", "aac"], {"video_start": 2.2, "video_end": 7.1}),
    "start far from zero": ("ts", [*PICTURE, *tone(9), *H264, "-c:a", "aac", "-output_ts_offset", "40"], {}),
}


@pytest.fixture(params=FILES, scope="module")
def case(request: pytest.FixtureRequest, ffmpeg: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, EncodedSample]:
    suffix, arguments, keys = FILES[request.param]
    path = tmp_path_factory.mktemp("time") / f"clip.{suffix}"
    subprocess.run([ffmpeg, "-v", "error", *arguments, str(path)], check=True)
    record = parse_record(
        {"messages": [{"role": "user", "content": [{"video": "clip", "audio_in_video": "on", **keys}, {"text": "?"}]}]}
    )

    def resolve(ref: str | MediaBlob) -> MediaFile:
        return MediaFile(name="clip", path=path)

    return path, ThinkerEncoder(EncodeConfig()).encode(record, key="k", resolve=resolve)


def presentation_times(path: Path) -> tuple[np.ndarray, float]:
    """Decode the whole file and return (times of all pictures, time of the first sound), from the container's start."""
    with av.open(str(path)) as container:
        origin = (container.start_time or 0) / av.time_base
        pictures = [float(frame.pts * frame.time_base) for frame in container.decode(video=0)]
    with av.open(str(path)) as container:
        sound = next(frame for frame in container.decode(audio=0))
        return np.array(pictures) - origin, float(sound.pts * sound.time_base) - origin


def test_ids_are_the_presentation_times_of_the_file(case: tuple[Path, EncodedSample]) -> None:
    path, sample = case
    pictures, sound = presentation_times(path)
    (video,) = sample.vision
    timing, layout = video.timing, sample.layouts["tokens"]
    assert timing is not None
    assert timing.audio_start_s is not None
    cut = timing.frame_times_s[0] > 2
    np.testing.assert_allclose(timing.frame_times_s, pictures[list(timing.frame_indices)], atol=2e-3)
    assert timing.audio_start_s == pytest.approx(2.2 if cut else sound, abs=0.025)

    zero = min(timing.frame_times_s[0], timing.audio_start_s)
    base = int(layout.position_ids[0, np.flatnonzero(layout.input_ids == QWEN2_5_OMNI.special.audio_bos)[0]]) + 1
    per_step = QWEN2_5_OMNI.num_vision_tokens(video.grid_thw) // video.grid_thw[0]
    of_video = layout.position_ids[0, layout.input_ids == QWEN2_5_OMNI.special.video][::per_step] - base
    of_audio = layout.position_ids[0, layout.input_ids == QWEN2_5_OMNI.special.audio] - base
    true_video = 25 * (pictures[list(timing.frame_indices)][::2] - zero)
    assert np.abs(of_video - true_video).max() <= 0.5 + 0.05  # 2 ms of time-stamp rounding is 0.05 id
    true_audio = np.arange(len(of_audio)) + 25 * (timing.audio_start_s - zero)
    assert np.abs(of_audio - true_audio).max() <= 0.5 + 1e-6
    assert layout.position_ids[:, -1].min() == layout.position_ids.max(), "text goes on after everything in the block"
