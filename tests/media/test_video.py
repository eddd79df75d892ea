"""Video files of many kinds: right frames at right times, whichever decoder; and clear rejections."""

import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from omniprep.errors import ConfigError, Reason, RejectSample
from omniprep.media.video import VideoConfig, plan_video, probe_video, read_frames
from omniprep.media.video_decord import held_bytes, open_decord, read_decord
from omniprep.media.video_pyav import read_pyav
from omniprep.records import VideoPart
from omniprep.types import MediaFile

PART = VideoPart(video="x")
PICTURE = ["-f", "lavfi", "-i", "testsrc2=size=192x144:rate=25:duration=4"]
SOUND = ["-f", "lavfi", "-i", "sine=frequency=440:duration=4"]
H264 = ["-c:v", "libx264", "-preset", "veryfast", "-pix_fmt", "yuv420p"]
B_FRAMES = [*PICTURE, *SOUND, *H264, "-bf", "3", "-g", "30", "-c:a", "aac"]


@pytest.fixture(scope="session")
def make(ffmpeg, tmp_path_factory):
    """Return a function that runs ffmpeg once for each file name and gives the file."""
    folder = tmp_path_factory.mktemp("videos")

    def run(name, *arguments):
        path = folder / name
        if not path.exists():
            subprocess.run([ffmpeg, "-v", "error", "-y", *map(str, arguments), path], check=True, timeout=60)
        return MediaFile(name=name, path=path)

    return run


@pytest.fixture(scope="session")
def plain(make):
    return make("plain.mp4", *B_FRAMES)


def copy_of(make, plain, name, *before, after=()):
    return make(name, *before, "-i", plain.path, "-c", "copy", *after)


def all_frames(media, info):
    return np.stack(list(read_pyav(media, info, range(info.num_frames))))


def by_plain_decoding(media):
    """Return (times on the file's line, frames) by PyAV's simplest use: decode everything, convert everything."""
    import av

    with av.open(str(media.path)) as container:
        start = (container.start_time or 0) / 1e6
        frames = [(frame.time - start, frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    return np.array([time for time, _ in frames]), np.stack([frame for _, frame in frames])


def variable_rate(make, suffix):
    """50 frames at 25 a second, then 50 at 12.5 a second."""
    stamps = "setpts='if(lt(N,50),N/25,2.001+(N-50)*2/25)/TB'"
    source = make("vfr.mp4", *PICTURE, "-vf", stamps, "-fps_mode", "vfr", *H264)
    return source if suffix == "mp4" else make(f"vfr.{suffix}", "-i", source.path, "-c", "copy")


FILES = {
    "no_b_frames.mp4": [*PICTURE, *H264, "-bf", "0"],
    "b_frames.mp4": B_FRAMES,
    "odd.mp4": ["-f", "lavfi", "-i", "testsrc2=size=193x145:rate=30000/1001:duration=2", *H264[:-1], "yuv444p"],
    "hevc.mp4": [*PICTURE, "-c:v", "libx265", "-preset", "ultrafast", "-x265-params", "log-level=none", "-pix_fmt", "yuv420p"],
    "vp9.webm": [*PICTURE, "-c:v", "libvpx-vp9", "-deadline", "realtime", "-cpu-used", "8", "-pix_fmt", "yuv420p"],
    "full_range.mp4": [
        *PICTURE,
        "-vf",
        "scale=out_range=pc:out_color_matrix=bt709",
        *H264,
        "-color_range",
        "pc",
        "-colorspace",
        "bt709",
    ],
    "bt709.mp4": [*PICTURE, "-vf", "scale=out_color_matrix=bt709", *H264, "-colorspace", "bt709"],
}
FOR_PYAV_ONLY = {
    "ten_bit.mp4": [
        *PICTURE,
        "-c:v",
        "libx265",
        "-preset",
        "ultrafast",
        "-x265-params",
        "log-level=none",
        "-pix_fmt",
        "yuv420p10le",
    ],
    "av1.mp4": [*PICTURE, "-c:v", "libsvtav1", "-preset", "12"],
    "transport.ts": [*PICTURE, "-c:v", "mpeg2video"],
    "animation.gif": [*PICTURE],
    "old.avi": [*PICTURE, "-c:v", "msmpeg4v2"],
}


@pytest.mark.parametrize("name", FILES)
def test_decord_and_pyav_give_equal_frames(make, name):
    media = make(name, *FILES[name])
    info = probe_video(media)
    assert info.decord_problem == ""
    chosen = sorted({0, 1, 7, 8, 31, info.num_frames // 2, info.num_frames - 2, info.num_frames - 1})
    frames = np.stack(list(read_pyav(media, info, chosen)))
    reader = open_decord(media, info)
    assert reader is not None
    np.testing.assert_array_equal(np.stack(list(read_decord(reader, media, chosen))), frames)
    assert frames.shape[1:] == (info.height, info.width, 3)


@pytest.mark.parametrize("name", [*FILES, *FOR_PYAV_ONLY])
def test_leaving_out_frames_changes_none_that_are_kept(make, name):
    media = make(name, *(FILES | FOR_PYAV_ONLY)[name])
    info = probe_video(media)
    times, expected = by_plain_decoding(media)
    assert info.num_frames == len(expected)
    np.testing.assert_allclose(info.frame_times_s, times, atol=1e-6)
    for chosen in (range(0, info.num_frames, 9), [info.num_frames - 1], [5, 6, info.num_frames - 3]):
        np.testing.assert_array_equal(np.stack(list(read_pyav(media, info, list(chosen)))), expected[list(chosen)])


@pytest.mark.parametrize("name", FOR_PYAV_ONLY)
def test_what_decord_gets_wrong_goes_to_pyav(make, name):
    media = make(name, *FOR_PYAV_ONLY[name])
    info = probe_video(media)
    plan = plan_video(media, info, VideoPart(video="x", fps=20), VideoConfig(resize="fast"))
    frames = read_frames(media, plan, VideoConfig(resize="fast"))
    assert info.decord_problem
    assert frames.decoder == "pyav"
    assert len(list(frames)) == len(plan.indices)


@pytest.mark.parametrize("resize", ["exact", "fast"])
def test_auto_takes_decord_unless_it_would_decode_or_hold_too_much(plain, resize, monkeypatch):
    if resize == "exact":
        pytest.importorskip("torch")
    info = probe_video(plain)
    config = VideoConfig(resize=resize)
    sparse = plan_video(plain, info, VideoPart(video="x", fps=2), config)
    assert read_frames(plain, sparse, config).decoder == "pyav"  # few frames are kept
    part = VideoPart(video="x", fps=12)
    plan = plan_video(plain, info, part, config)
    large = read_frames(plain, plan, config)
    assert large.decoder == "decord"
    size = (plan.height, plan.width) if resize == "fast" else None
    monkeypatch.setattr("omniprep.media.video._MAX_HELD_BYTES", held_bytes(info, size) - 1)
    small = read_frames(plain, plan, config)
    assert small.decoder == "pyav"
    pairs = zip(large, small, strict=True)
    differences = [np.abs(one.astype(int) - other).mean() for one, other in pairs]
    assert max(differences) == 0 if resize == "exact" else max(differences) < 4


def test_decord_is_counted_on_to_hold_the_whole_file(plain):
    info = probe_video(plain)
    assert held_bytes(info, None) == info.num_frames * info.height * info.width * 3
    assert held_bytes(info, (28, 56)) == info.num_frames * 28 * 56 * 3


@pytest.mark.parametrize("turn", [0, 90, 180, 270])
@pytest.mark.parametrize("resize", ["exact", "fast"])
def test_both_decoders_give_upright_frames(make, plain, turn, resize):
    if resize == "exact":
        pytest.importorskip("torch")
    media = copy_of(make, plain, f"turned{turn}.mp4", "-display_rotation", turn)
    info = probe_video(media)
    assert (info.width, info.height) == ((192, 144) if turn % 180 == 0 else (144, 192))
    upright = np.rot90(np.stack(list(read_pyav(plain, probe_video(plain), [40]))), info.rotation // 90, axes=(1, 2))
    np.testing.assert_array_equal(next(read_pyav(media, info, [40])), upright[0])
    outputs = []
    for decoder in ("decord", "pyav"):
        config = VideoConfig(resize=resize, decoder=decoder)
        plan = plan_video(media, info, PART, config)
        frames = read_frames(media, plan, config)
        assert frames.decoder == decoder
        outputs.append(np.stack(list(frames)))
        assert outputs[-1].shape[1:] == (plan.height, plan.width, 3)
    difference = np.abs(outputs[0].astype(int) - outputs[1])
    if resize == "exact":
        assert difference.max() == 0
    else:  # swscale against Pillow, on a pattern of pure colours with sharp edges
        assert difference.mean() < 8


def test_variable_rate_keeps_true_times(make):
    expected = np.array([i / 25 if i < 50 else 2 + (i - 50) / 12.5 for i in range(100)])
    for suffix in ("mp4", "mkv"):
        media = variable_rate(make, suffix)
        info = probe_video(media)
        assert not info.constant_rate
        np.testing.assert_allclose(info.frame_times_s, expected, atol=6e-4)  # Matroska counts in milliseconds
        plan = plan_video(media, info, VideoPart(video="x", video_start=1.0, video_end=3.0), VideoConfig())
        assert plan.indices[0] == 25
        assert plan.indices[-1] == 62
        assert plan.timing.frame_times_s == tuple(info.frame_times_s[list(plan.indices)])


def test_milliseconds_of_matroska_are_not_a_variable_rate(make):
    rate = make("film.mkv", "-f", "lavfi", "-i", "testsrc2=size=192x144:rate=24000/1001:duration=4", *H264)
    info = probe_video(rate)
    assert info.constant_rate
    assert info.source_fps == pytest.approx(24000 / 1001)


def test_an_edit_list_hides_its_frames(make, plain):
    media = copy_of(make, plain, "edited.mp4", "-ss", "1.5")
    info = probe_video(media)
    assert "edit list" in info.decord_problem
    whole = all_frames(plain, probe_video(plain))
    shown = all_frames(media, info)
    first = int(np.flatnonzero([np.array_equal(frame, shown[0]) for frame in whole])[0])
    assert first == pytest.approx(1.5 * 25, abs=1)  # the key frame before it, at 1.2 s, is not shown
    np.testing.assert_array_equal(shown, whole[first : first + len(shown)])
    assert info.frame_times_s[0] == pytest.approx(0, abs=0.03)


def test_frames_that_lean_on_what_was_cut_off_are_not_counted(make):
    """An open group of pictures, cut at its key frame: its leading frames cannot be decoded."""
    options = ["-c:v", "libx265", "-preset", "fast", "-x265-params", "open-gop=1:keyint=20:log-level=none"]
    whole = make("open.mkv", *PICTURE, *options)
    media = copy_of(make, whole, "open_cut.mkv", "-ss", "1.7")
    info = probe_video(media)
    times, expected = by_plain_decoding(media)
    assert info.num_frames == len(expected)
    np.testing.assert_allclose(info.frame_times_s, times, atol=1e-6)
    np.testing.assert_array_equal(all_frames(media, info), expected)


def test_cover_art_is_not_the_video(make, plain):
    cover = make("cover.png", "-i", plain.path, "-frames:v", "1", "-vf", "scale=64:64")
    both = ["-i", plain.path, "-i", cover.path, "-map", "0", "-map", "1", "-c", "copy", "-disposition:v:1", "attached_pic"]
    info = probe_video(make("with_cover.mp4", *both))
    assert (info.width, info.num_frames) == (192, 100)
    assert "several video streams" in info.decord_problem


def test_fragments_and_raw_streams_are_read(make, plain):
    fragmented = copy_of(make, plain, "fragments.mp4", after=["-movflags", "frag_keyframe+empty_moov"])
    raw = copy_of(make, plain, "raw.h264", after=["-an"])
    _, expected = by_plain_decoding(plain)
    for media in (fragmented, raw):
        info = probe_video(media)
        assert info.num_frames == 100
        np.testing.assert_array_equal(np.stack(list(read_pyav(media, info, [0, 11, 99]))), expected[[0, 11, 99]])
    assert probe_video(raw).frame_pts is None


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_times_count_from_the_start_of_the_file(make, plain, suffix):
    media = copy_of(make, plain, f"late.{suffix}", after=["-output_ts_offset", "5"])
    info = probe_video(media)
    assert info.frame_times_s[0] == pytest.approx(0, abs=0.03)  # MP4: the sound's priming comes first
    assert info.audio_start_s == pytest.approx(0, abs=0.03)
    np.testing.assert_allclose(np.diff(info.frame_times_s), 0.04, atol=1.1e-3)


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_tracks_that_start_apart_keep_their_distance(make, plain, suffix):
    two = ["-i", plain.path, "-itsoffset", "0.5", "-i", plain.path, "-c", "copy"]
    sound_late = probe_video(make(f"sound_late.{suffix}", *two, "-map", "0:v", "-map", "1:a"))
    assert sound_late.audio_start_s == pytest.approx(0.5, abs=0.03)  # less the encoder's priming in MP4
    assert sound_late.frame_times_s[0] == 0
    picture_late = probe_video(make(f"picture_late.{suffix}", *two, "-map", "1:v", "-map", "0:a"))
    assert picture_late.audio_start_s == pytest.approx(0, abs=0.03)
    assert picture_late.frame_times_s[0] == pytest.approx(0.5, abs=0.03)
    assert not picture_late.constant_rate or picture_late.frame_times_s[0] < 0.02


def test_a_file_without_sound_says_so(make):
    info = probe_video(make("no_b_frames.mp4", *FILES["no_b_frames.mp4"]))
    assert (info.has_audio, info.audio_start_s) == (False, None)


@pytest.mark.reference
@pytest.mark.parametrize(
    "keys", [{}, {"nframes": 6}, {"fps": 7.0, "max_pixels": 150_000}, {"video_start": 1.0, "video_end": 3.1}]
)
@pytest.mark.parametrize("decoder", ["decord", "pyav"])
def test_exact_frames_equal_qwen_omni_utils(plain, keys, decoder, monkeypatch, capsys):
    from qwen_omni_utils.v2_5 import vision_process

    monkeypatch.setattr(vision_process, "get_video_reader_backend", lambda: "decord")
    expected, metadata_fps = vision_process.fetch_video({"video": str(plain.path)} | keys, return_video_sample_fps=True)
    part, config = VideoPart(video="x", **keys), VideoConfig(resize="exact", decoder=decoder)
    plan = plan_video(plain, probe_video(plain), part, config)
    frames = np.stack(list(read_frames(plain, plan, config)))
    np.testing.assert_array_equal(frames, expected.permute(0, 2, 3, 1).numpy())
    assert plan.sample_fps == pytest.approx(metadata_fps, rel=1e-12)
    assert plan.grid_thw == (len(frames) // 2, frames.shape[1] // 14, frames.shape[2] // 14)


def test_bytes_give_the_same_frames_as_the_path(plain):
    in_memory = MediaFile(name="bytes", data=plain.path.read_bytes())
    for decoder in ("decord", "pyav"):
        config = VideoConfig(decoder=decoder)
        outputs = []
        for media in (plain, in_memory):
            plan = plan_video(media, probe_video(media), PART, config)
            outputs.append(np.stack(list(read_frames(media, plan, config))))
        np.testing.assert_array_equal(*outputs)


def test_a_plan_can_be_read_twice(plain):
    config = VideoConfig()
    plan = plan_video(plain, probe_video(plain), PART, config)
    np.testing.assert_array_equal(list(read_frames(plain, plan, config)), list(read_frames(plain, plan, config)))


def test_seeking_far_gives_the_same_frames(make):
    media = make("long.mp4", "-f", "lavfi", "-i", "testsrc2=size=96x64:rate=25:duration=60", *H264, "-bf", "3", "-g", "25")
    info = probe_video(media)
    chosen = list(range(3, info.num_frames, 190))
    _, expected = by_plain_decoding(media)
    np.testing.assert_array_equal(np.stack(list(read_pyav(media, info, chosen))), expected[chosen])


@pytest.mark.parametrize("frames", ["budget", "adaptive"])
@pytest.mark.parametrize("max_tokens", [300, 700, 2000])
def test_videos_keep_to_their_tokens(plain, frames, max_tokens):
    config = VideoConfig(frames=frames, min_pixels=28 * 28 * 40)
    plan = plan_video(plain, probe_video(plain), PART, config, max_tokens=max_tokens)
    tokens = np.prod(plan.grid_thw) // 4
    assert tokens <= max_tokens
    assert len(plan.indices) % 2 == 0
    assert plan.indices[0] == 0
    assert plan.indices[-1] == 99
    if frames == "budget" and max_tokens == 2000:
        assert tokens > 0.9 * max_tokens
        assert plan.sample_fps > 2


def test_budget_keeps_to_a_rate_that_is_asked_for(plain):
    plan = plan_video(plain, probe_video(plain), VideoPart(video="x", fps=2.0), VideoConfig(frames="budget"), max_tokens=30_000)
    assert len(plan.indices) == 8


def test_budget_without_a_number_is_a_mistake_in_the_recipe(plain):
    with pytest.raises(ConfigError, match=r"video\.max_tokens"):
        plan_video(plain, probe_video(plain), PART, VideoConfig(frames="budget"))


def test_a_budget_below_two_least_frames_is_refused(plain):
    with pytest.raises(RejectSample, match=r"raise max_tokens or lower min_pixels") as error:
        plan_video(plain, probe_video(plain), PART, VideoConfig(frames="budget"), max_tokens=50)
    assert error.value.reason is Reason.TOO_MANY_TOKENS


def test_adaptive_follows_motion_in_a_real_file(make):
    """Still for 3 s, moving for 2 s, still for 3 s."""
    still = "color=gray:size=192x144:rate=25:duration=8"
    moving = "testsrc2=size=192x144:rate=25:duration=8"
    graph = "[0][1]overlay=enable='between(t,3,5)'"
    media = make("bursts.mp4", "-f", "lavfi", "-i", still, "-f", "lavfi", "-i", moving, "-filter_complex", graph, *H264)
    config = VideoConfig(frames="adaptive")
    times = np.array(plan_video(media, probe_video(media), PART, config).times_s)
    assert ((times >= 2.8) & (times <= 5.2)).sum() >= 8  # an even spread of 16 frames puts 5 there


def bad(make, plain, tmp_path, kind):
    path = tmp_path / f"{kind}.mp4"
    if kind == "truncated":
        whole = copy_of(make, plain, "index_first.mp4", after=["-movflags", "+faststart"]).path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
    elif kind == "index_cut_off":
        path.write_bytes(plain.path.read_bytes()[:20_000])
    elif kind == "truncated_mkv":
        whole = copy_of(make, plain, "whole.mkv").path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
    elif kind == "picture":
        Image.new("RGB", (64, 64)).save(path, "JPEG")
    elif kind == "text":
        path.write_text("not a video at all\n" * 100)
    elif kind == "playlist":
        path.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\n{plain.path}\n#EXT-X-ENDLIST\n")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "sound_only":
        return make("sound.mp4", *SOUND, "-c:a", "aac")
    return MediaFile(name=path.name, path=path)


@pytest.mark.parametrize(
    ("kind", "reason", "message"),
    [
        ("truncated", Reason.MEDIA_TRUNCATED, "of 100 frames"),
        ("index_cut_off", Reason.MEDIA_TRUNCATED, "without a readable index"),
        ("truncated_mkv", Reason.MEDIA_TRUNCATED, "of 100 frames"),
        ("picture", Reason.MEDIA_CORRUPT, "got a picture"),
        ("text", Reason.MEDIA_CORRUPT, "not a video file"),
        ("playlist", Reason.MEDIA_CORRUPT, "not a video file"),
        ("empty", Reason.MEDIA_EMPTY, "no bytes"),
        ("missing", Reason.MEDIA_MISSING, "no such file"),
        ("sound_only", Reason.MEDIA_NO_STREAM, "found only: audio"),
    ],
)
def test_bad_files_give_one_clear_line(make, plain, tmp_path, kind, reason, message, capfd):
    media = bad(make, plain, tmp_path, kind)
    with pytest.raises(RejectSample, match=message) as error:
        probe_video(media)
    assert error.value.reason is reason
    assert error.value.detail.count(media.name) == 1
    assert "\n" not in error.value.detail
    assert capfd.readouterr().err == ""


def test_a_folder_is_unreadable(tmp_path):
    with pytest.raises(RejectSample):
        probe_video(MediaFile(name="folder", path=tmp_path))


def test_one_frame_is_refused_with_advice(make):
    media = make("single.mp4", *PICTURE, "-frames:v", "1", *H264)
    with pytest.raises(RejectSample, match="image part") as error:
        plan_video(media, probe_video(media), PART, VideoConfig())
    assert error.value.reason is Reason.VIDEO_TOO_SHORT
    assert error.value.detail.startswith("single.mp4: ")


def test_a_cut_past_the_end_is_refused(plain):
    with pytest.raises(RejectSample, match=r"4\.000 s") as error:
        plan_video(plain, probe_video(plain), VideoPart(video="x", video_start=9.0), VideoConfig())
    assert error.value.reason is Reason.MEDIA_RANGE


def test_decord_by_force_says_why_it_is_wrong(make):
    media = make("ten_bit.mp4", *FOR_PYAV_ONLY["ten_bit.mp4"])
    config = VideoConfig(decoder="decord")
    info = probe_video(media)
    plan = plan_video(media, info, PART, config)
    with pytest.raises(RejectSample, match=r"pixel format yuv420p10le"):
        read_frames(media, plan, config)


def test_facts_without_the_open_file_give_the_same_frames(make):
    """Facts from a cache come without a container: it is opened again, and key frames are sought in it all the same."""
    media = make("long.mp4", "-f", "lavfi", "-i", "testsrc2=size=96x64:rate=25:duration=60", *H264, "-bf", "3", "-g", "25")
    for kind in (media, copy_of(make, media, "long.mkv"), copy_of(make, media, "long.ts")):
        info = probe_video(kind)
        chosen = list(range(3, info.num_frames, 190))
        fresh = np.stack(list(read_pyav(kind, info, chosen)))
        np.testing.assert_array_equal(np.stack(list(read_pyav(kind, replace(info, opened=None), chosen))), fresh)


def test_paths_that_look_like_protocols_are_files(plain, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    odd = Path("concat:a|b.mp4")
    odd.write_bytes(plain.path.read_bytes())
    assert probe_video(MediaFile(name="odd", path=odd)).num_frames == 100
