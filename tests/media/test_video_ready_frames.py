"""Frames made ready: a list of pictures or one array give the same video."""

import numpy as np
import pytest
from PIL import Image

from omniprep.errors import Reason, RejectSample
from omniprep.media.ready_frames import plan_ready_frames, probe_ready_frames, read_ready_frames
from omniprep.media.video import VideoConfig
from omniprep.records import VideoPart
from omniprep.types import MediaFile

CONFIG = VideoConfig(resize="fast")


def array_of(num_frames, height=120, width=160):
    return np.random.default_rng(0).integers(0, 256, (num_frames, height, width, 3), dtype=np.uint8)


def npy(folder, array, name="frames.npy"):
    np.save(folder / name, array)
    return [MediaFile(name=name, path=folder / name)]


def pngs(folder, array):
    files = []
    for index, frame in enumerate(array):
        path = folder / f"{index}.png"
        Image.fromarray(frame).save(path)
        files.append(MediaFile(name=path.name, path=path))
    return files


def part(**keys):
    return VideoPart(video=("a.png",), **keys)


def plan_of(files, part, config=CONFIG):
    return plan_ready_frames(files[0], probe_ready_frames(files), part, config)


def read(files, plan, config=CONFIG):
    return read_ready_frames(files, probe_ready_frames(files), plan, config)


@pytest.mark.parametrize("num_frames", [1, 2, 3, 5])
def test_pictures_and_arrays_give_the_same_frames(tmp_path, num_frames):
    array = array_of(num_frames)
    outputs, plans, decoders = [], [], []
    for files in (npy(tmp_path, array), pngs(tmp_path, array)):
        plan = plan_of(files, part(sample_fps=4.0))
        frames = read(files, plan)
        decoders.append(frames.decoder)
        outputs.append(np.stack(list(frames)))
        plans.append(plan)
    np.testing.assert_array_equal(*outputs)
    assert decoders == ["npy", "images"]
    for plan in plans:
        assert plan.times_s == tuple(index / 4 for index in range(num_frames))
        assert plan.indices == tuple(range(num_frames))
        assert plan.grid_thw == ((num_frames + 1) // 2, plan.height // 14, plan.width // 14)
        assert plan.timing.source_fps == plan.timing.sample_fps == 4.0
    assert outputs[0].shape == (num_frames, plans[0].height, plans[0].width, 3)


def test_the_rate_is_the_models_unless_it_is_given(tmp_path):
    assert plan_of(npy(tmp_path, array_of(2)), part()).sample_fps == 2.0


@pytest.mark.reference
def test_exact_frames_equal_the_references_resize(tmp_path):
    import torch
    from qwen_omni_utils.v2_5 import vision_process
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.functional import resize

    array, config = array_of(4, 300, 200), VideoConfig(resize="exact")
    files = npy(tmp_path, array)
    plan = plan_of(files, part(), config)
    size = vision_process.smart_resize(300, 200, factor=28, min_pixels=128 * 784, max_pixels=768 * 784)
    assert (plan.height, plan.width) == size
    expected = resize(torch.from_numpy(array).permute(0, 3, 1, 2), list(size), InterpolationMode.BICUBIC, antialias=True)
    np.testing.assert_array_equal(np.stack(list(read(files, plan, config))), expected.permute(0, 2, 3, 1).numpy())


def test_an_array_in_memory_is_read_too(tmp_path):
    path = npy(tmp_path, array_of(2))[0].path
    files = [MediaFile(name="frames.npy", data=path.read_bytes())]
    plan = plan_of(files, part())
    assert len(list(read(files, plan))) == 2


@pytest.mark.parametrize(
    ("array", "reason", "message"),
    [
        (np.zeros((2, 30, 30, 3), np.float32), Reason.MEDIA_CORRUPT, r"expected uint8 \(n, H, W, 3\), got float32"),
        (np.zeros((2, 30, 30), np.uint8), Reason.MEDIA_CORRUPT, r"got uint8 \(2, 30, 30\)"),
        (np.zeros((0, 30, 30, 3), np.uint8), Reason.MEDIA_EMPTY, "at least one frame"),
    ],
)
def test_arrays_of_another_kind_are_refused(tmp_path, array, reason, message):
    with pytest.raises(RejectSample, match=message) as error:
        plan_of(npy(tmp_path, array), part())
    assert error.value.reason is reason


def test_a_cut_array_is_truncated(tmp_path):
    path = npy(tmp_path, array_of(3))[0].path
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(RejectSample, match=r"frames\.npy") as error:
        plan_of([MediaFile(name="frames.npy", path=path)], part())
    assert error.value.reason is Reason.MEDIA_TRUNCATED


def test_frames_of_two_sizes_are_refused(tmp_path):
    files = pngs(tmp_path, array_of(2))
    Image.new("RGB", (50, 50)).save(files[1].path)
    with pytest.raises(RejectSample, match=r"1\.png: expected 160x120 as the first frame has, got 50x50"):
        plan_of(files, part())


def test_no_frames_are_empty():
    with pytest.raises(RejectSample) as error:
        probe_ready_frames([])
    assert error.value.reason is Reason.MEDIA_EMPTY


def test_keys_that_choose_frames_of_a_file_are_refused(tmp_path):
    with pytest.raises(RejectSample, match="nframes choose frames of a video file"):
        plan_of(npy(tmp_path, array_of(4)), part(nframes=2))
