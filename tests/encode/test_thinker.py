"""The encoder on every kind of record: what is supervised, what is cut, what is refused and where that is said."""

import io
import wave
from collections.abc import Callable
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from omniprep.encode.thinker import EncodeConfig, ThinkerEncoder
from omniprep.errors import Reason, RejectSample
from omniprep.media.audio import AudioConfig
from omniprep.media.video import VideoConfig
from omniprep.profile import QWEN2_5_OMNI
from omniprep.records import MediaBlob, parse_record
from omniprep.types import EncodedSample, MediaFile

SPECIAL = QWEN2_5_OMNI.special


def wav(seconds: float, rate: int = 16_000) -> bytes:
    samples = (9000 * np.sin(np.arange(round(seconds * rate)) / 7)).astype("<i2")
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setparams((1, 2, rate, 0, "NONE", ""))
        file.writeframes(samples.tobytes())
    return buffer.getvalue()


def png(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (200, 30, 90)).save(buffer, "PNG")
    return buffer.getvalue()


def mp4(seconds: int, sound_s: float, rate: int = 10) -> bytes:
    """A real file: H.264 and AAC."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        video = container.add_stream("libx264", rate=rate)
        video.width, video.height, video.pix_fmt = 320, 240, "yuv420p"
        audio = container.add_stream("aac", rate=16_000, layout="mono") if sound_s else None
        for index in range(seconds * rate):
            picture = np.full((240, 320, 3), index % 256, np.uint8)
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(video.encode())
        if audio is not None:
            samples = (0.2 * np.sin(np.arange(round(sound_s * 16_000)) / 9)).astype(np.float32)
            for start in range(0, len(samples), 1024):
                frame = av.AudioFrame.from_ndarray(samples[None, start : start + 1024], format="fltp", layout="mono")
                frame.sample_rate, frame.pts = 16_000, start
                container.mux(audio.encode(frame))
            container.mux(audio.encode())
    return buffer.getvalue()


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    frames = io.BytesIO()
    np.save(frames, np.random.default_rng(0).integers(0, 256, (6, 280, 364, 3), dtype=np.uint8))
    return {
        "a.wav": wav(1.0),
        "long.wav": wav(7.0),
        "tiny.wav": wav(0.01),
        "i.png": png(280, 140),
        "v.mp4": mp4(6, 6.0),
        "silent.mp4": mp4(4, 0),
        "blip.mp4": mp4(4, 0.01),
        "f.npy": frames.getvalue(),
        "garbage.mp4": b"not a film at all",
    }


@pytest.fixture
def encode(files: dict[str, bytes]) -> Callable[..., EncodedSample]:
    def run(record: dict[str, Any], **config: Any) -> EncodedSample:
        encoder = ThinkerEncoder(EncodeConfig(**config))
        return encoder.encode(parse_record(record), key="k", resolve=resolver(files))

    return run


def resolver(files: dict[str, bytes]) -> Callable[[str | MediaBlob], MediaFile]:
    def resolve(ref: str | MediaBlob) -> MediaFile:
        assert isinstance(ref, str)
        return MediaFile(name=ref, data=files[ref])

    return resolve


def chat(*parts: Any, answer: str = "Yes.") -> dict[str, Any]:
    return {"id": "x", "messages": [{"role": "user", "content": list(parts)}, {"role": "assistant", "content": answer}]}


def kinds(sample: EncodedSample, name: str = "tokens") -> list[str]:
    return [segment.kind for segment in sample.layouts[name].segments]


def test_every_kind_of_part_in_one_record(encode: Callable[..., EncodedSample]) -> None:
    sample = encode(chat({"audio": "a.wav"}, {"image": "i.png"}, {"video": "v.mp4"}, {"text": "Well?"}))
    layout = sample.layouts["tokens"]
    assert [audio.source for audio in sample.audio] == ["a.wav", "v.mp4"]
    assert [item.kind for item in sample.vision] == ["image", "video"]
    video = sample.vision[1]
    assert (video.audio_index, video.timing is not None) == (1, True)
    counts = {token: int(np.count_nonzero(layout.input_ids == token)) for token in (SPECIAL.audio, SPECIAL.image, SPECIAL.video)}
    assert counts[SPECIAL.audio] == sum(QWEN2_5_OMNI.num_audio_tokens(audio.num_mel_frames) for audio in sample.audio)
    assert counts[SPECIAL.image] == QWEN2_5_OMNI.num_vision_tokens(sample.vision[0].grid_thw)
    assert counts[SPECIAL.video] == QWEN2_5_OMNI.num_vision_tokens(video.grid_thw)
    assert layout.labels[layout.labels != -100].tolist()[-1] == SPECIAL.im_end


@pytest.mark.parametrize(("choice", "sounds"), [("auto", 1), ("on", 1), ("off", 0)])
def test_the_sound_of_a_video_is_a_choice_per_video(encode: Callable[..., EncodedSample], choice: str, sounds: int) -> None:
    assert len(encode(chat({"video": "v.mp4", "audio_in_video": choice})).audio) == sounds


@pytest.mark.parametrize("name", ["silent.mp4", "blip.mp4"])
def test_a_video_without_usable_sound(encode: Callable[..., EncodedSample], name: str) -> None:
    sample = encode(chat({"video": name}))
    assert (sample.audio, sample.vision[0].audio_index) == ((), None)
    assert "audio" not in kinds(sample)
    with pytest.raises(RejectSample, match=r"messages\.0\.content\.0: "):
        encode(chat({"video": name, "audio_in_video": "on"}))


def test_frames_made_ready_with_their_sound(encode: Callable[..., EncodedSample]) -> None:
    sample = encode(chat({"video": "f.npy", "sample_fps": 4.0, "audio_track": "a.wav"}))
    timing = sample.vision[0].timing
    assert timing is not None
    assert timing.frame_times_s == tuple(index / 4 for index in range(6))
    assert (timing.audio_start_s, sample.vision[0].second_per_grid) == (0.0, 0.5)
    ids = sample.layouts["tokens"].position_ids[0]
    of_video = ids[sample.layouts["tokens"].input_ids == SPECIAL.video]
    assert sorted(set((of_video - of_video[0]).tolist())) == [0, 12, 25]


def test_a_separate_sound_replaces_the_files_own(encode: Callable[..., EncodedSample]) -> None:
    sample = encode(chat({"video": "v.mp4", "audio_track": "a.wav"}))
    assert [audio.source for audio in sample.audio] == ["a.wav"]
    assert sample.audio[0].num_samples == 16_000


def test_a_cut_keeps_true_times(encode: Callable[..., EncodedSample]) -> None:
    sample = encode(chat({"video": "v.mp4", "video_start": 2.0, "video_end": 5.0}))
    timing = sample.vision[0].timing
    assert timing is not None
    assert min(timing.frame_times_s) >= 1.95
    assert max(timing.frame_times_s) <= 5.05
    assert timing.audio_start_s == pytest.approx(2.0, abs=0.05)
    assert sample.audio[0].num_samples == pytest.approx(48_000, abs=1100)


def test_long_audio_is_split_into_items_that_follow_each_other(encode: Callable[..., EncodedSample]) -> None:
    config = {"audio": AudioConfig(max_seconds=3.0, on_too_long="split")}
    sample = encode(chat({"audio": "long.wav"}), **config)
    assert [audio.num_samples for audio in sample.audio] == [48_000, 48_000, 16_000]
    assert np.count_nonzero(sample.layouts["tokens"].input_ids == SPECIAL.audio_bos) == 3
    with pytest.raises(RejectSample) as caught:
        encode(chat({"video": "v.mp4"}), **config)
    assert caught.value.reason is Reason.AUDIO_TOO_LONG


PREFERENCE = {
    "prompt": [
        {"role": "user", "content": [{"image": "i.png"}, {"text": "What is it?"}]},
        {"role": "assistant", "content": "A thing."},
        {"role": "user", "content": "More?"},
    ],
    "chosen": [{"role": "assistant", "content": "A red field."}],
    "rejected": [{"role": "assistant", "content": "No idea, sorry, none at all."}],
}


def test_a_preference_is_one_prompt_and_two_tails(encode: Callable[..., EncodedSample]) -> None:
    sample = encode(PREFERENCE)
    chosen, rejected = sample.layouts["chosen"], sample.layouts["rejected"]
    assert len(sample.vision) == 1
    first = int(np.flatnonzero(chosen.labels != -100)[0])
    for row in (chosen.input_ids, rejected.input_ids):
        assert row[:first].tolist() == chosen.input_ids[:first].tolist()
    np.testing.assert_array_equal(chosen.position_ids[:, :first], rejected.position_ids[:, :first])
    text = ThinkerEncoder(EncodeConfig()).tokenizer.full.decode
    answers = [text(layout.labels[layout.labels != -100].tolist(), skip_special_tokens=False) for layout in (chosen, rejected)]
    assert answers == ["A red field.<|im_end|>", "No idea, sorry, none at all.<|im_end|>"]


def test_a_preference_too_long_loses_only_the_end_of_an_answer(encode: Callable[..., EncodedSample]) -> None:
    whole = encode(PREFERENCE)
    limit = whole.layouts["rejected"].num_tokens - 4
    with pytest.raises(RejectSample, match=f"{limit + 4} tokens > max_tokens={limit}"):
        encode(PREFERENCE, max_tokens=limit)
    cut = encode(PREFERENCE, max_tokens=limit, on_overflow="truncate_text")
    assert cut.layouts["chosen"].num_tokens == min(limit, whole.layouts["chosen"].num_tokens)
    assert cut.layouts["rejected"].input_ids.tolist() == whole.layouts["rejected"].input_ids[:limit].tolist()
    with pytest.raises(RejectSample, match=r"nothing supervised is left|media cannot be cut"):
        encode(PREFERENCE, max_tokens=30, on_overflow="truncate_text")


def test_a_document_is_supervised_by_part(encode: Callable[..., EncodedSample]) -> None:
    sample = encode({"parts": [{"text": "Caption: ", "loss": False}, {"image": "i.png"}, {"text": "a red field"}]})
    layout = sample.layouts["tokens"]
    assert layout.input_ids[-1] == layout.labels[-1] == SPECIAL.endoftext
    assert kinds(sample) == ["text", "control", "image", "control", "text"]
    assert layout.labels[0] == -100


@settings(max_examples=60)
@given(limit=st.integers(20, 600))
def test_truncation_never_cuts_through_media(limit: int) -> None:
    record = parse_record(
        {
            "messages": [
                {"role": "user", "content": "hello " * 20},
                {"role": "assistant", "content": "one two three"},
                {"role": "user", "content": [{"image": "i.png"}, {"audio": "a.wav"}]},
                {"role": "assistant", "content": "four five six " * 30},
            ]
        }
    )
    files = {"i.png": png(280, 140), "a.wav": wav(1.0)}
    whole = ThinkerEncoder(EncodeConfig()).encode(record, key="k", resolve=resolver(files)).layouts["tokens"]
    encoder = ThinkerEncoder(EncodeConfig(max_tokens=limit, on_overflow="truncate_text"))
    try:
        sample = encoder.encode(record, key="k", resolve=resolver(files))
    except RejectSample as error:
        assert error.reason is Reason.TOO_MANY_TOKENS
        assert (whole.labels[:limit] == -100).all()
        return
    layout = sample.layouts["tokens"]
    assert layout.num_tokens <= limit
    np.testing.assert_array_equal(layout.input_ids, whole.input_ids[: layout.num_tokens])
    np.testing.assert_array_equal(layout.position_ids, whole.position_ids[:, : layout.num_tokens])
    for opening, closing in ((SPECIAL.audio_bos, SPECIAL.audio_eos), (SPECIAL.vision_bos, SPECIAL.vision_eos)):
        assert (layout.input_ids == opening).sum() == (layout.input_ids == closing).sum()
    assert len(sample.audio) == (layout.input_ids == SPECIAL.audio_bos).sum()
    assert len(sample.vision) == (layout.input_ids == SPECIAL.vision_bos).sum()
    if layout.num_tokens < limit:
        rest = whole.input_ids[layout.num_tokens :]
        assert len(rest) == 0 or rest[0] in (SPECIAL.audio_bos, SPECIAL.vision_bos)


def test_the_budget_mode_fills_what_the_record_leaves(encode: Callable[..., EncodedSample]) -> None:
    used = []
    for limit in (600, 1500, 4000):
        sample = encode(chat({"video": "v.mp4"}, {"video": "silent.mp4"}), max_tokens=limit, video=VideoConfig(frames="budget"))
        assert sample.num_tokens <= limit
        used.append(len(sample.vision[0].frames))
    assert used == sorted(used)
    assert used[0] < used[-1]


def test_videos_share_the_budget_by_the_length_of_their_cuts(encode: Callable[..., EncodedSample]) -> None:
    cut = {"video": "v.mp4", "video_start": 1.0, "video_end": 3.0, "audio_in_video": "off"}
    config = VideoConfig(frames="budget", min_pixels=28 * 28 * 130)
    sample = encode(chat(cut, {"video": "silent.mp4", "video_end": 2.0}), max_tokens=2500, video=config)
    one, two = (len(item.frames) for item in sample.vision)
    assert one == two < 20  # files of 6 s and 4 s, cuts of 2 s each, and not room for all frames


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        ({"video": "garbage.mp4"}, Reason.MEDIA_CORRUPT),
        ({"audio": "tiny.wav"}, Reason.AUDIO_TOO_SHORT),
        ({"audio": "i.png"}, Reason.MEDIA_CORRUPT),
    ],
)
def test_a_rejection_names_the_place_the_file_and_the_reason(
    encode: Callable[..., EncodedSample], part: Any, reason: Reason
) -> None:
    with pytest.raises(RejectSample) as caught:
        encode(chat({"text": "see"}, part))
    assert caught.value.reason is reason
    (name,) = part.values()
    assert caught.value.detail.startswith(f"messages.0.content.1: {name}: ")
    assert "\n" not in caught.value.detail


def test_a_forged_control_token_is_rejected_on_wish(encode: Callable[..., EncodedSample]) -> None:
    record = chat({"text": "hi <|im_end|>"})
    assert np.count_nonzero(encode(record).layouts["tokens"].input_ids == SPECIAL.im_end) == 3  # system, user, assistant
    with pytest.raises(RejectSample, match="control token"):
        encode(record, template={"text_policy": "reject"})


@pytest.mark.parametrize(
    "record",
    [
        chat({"text": "only text"}),
        chat({"audio": "a.wav"}, {"image": "i.png"}, {"text": "?"}),
        chat({"video": "v.mp4"}, {"video": "silent.mp4"}),
        chat({"video": "f.npy", "sample_fps": 4.0, "audio_track": "a.wav"}),
        PREFERENCE,
    ],
)
def test_the_estimate_from_headers_is_the_size(files: dict[str, bytes], record: dict[str, Any]) -> None:
    encoder = ThinkerEncoder(EncodeConfig())
    sample = encoder.encode(parse_record(record), key="k", resolve=resolver(files))
    estimate = encoder.estimate(parse_record(record), resolve=resolver(files))
    # A compressed track's header may be off by its coder's padding: one AAC frame is two tokens.
    assert estimate.num_tokens == pytest.approx(sample.num_tokens, abs=4)
    assert estimate.num_mel_frames == pytest.approx(sum(audio.num_mel_frames for audio in sample.audio), abs=16)
    assert estimate.num_patches == sum(int(np.prod(item.grid_thw)) for item in sample.vision)
    assert estimate.num_frames == sum(len(item.frames) for item in sample.vision)


def test_the_torchaudio_backend_makes_the_same_layout(encode: Callable[..., EncodedSample]) -> None:
    pytest.importorskip("torchaudio")
    one, other = (encode(chat({"audio": "a.wav"}), audio={"backend": backend}) for backend in ("soxr", "torchaudio"))
    np.testing.assert_array_equal(one.layouts["tokens"].position_ids, other.layouts["tokens"].position_ids)
    assert 0 < np.abs(one.audio[0].mel - other.audio[0].mel).max() < 1e-4
    with pytest.raises(ValueError, match="needs backend: torchaudio"):
        AudioConfig(device="cuda")


def test_a_text_cut_to_nothing_does_not_count_as_supervised(encode: Callable[..., EncodedSample]) -> None:
    parts = [{"text": "one two three", "loss": False}, {"image": "i.png"}, {"text": "four"}]
    whole = encode({"parts": parts})
    size = whole.num_tokens - 2  # all but the last part and the closing token
    with pytest.raises(RejectSample, match="nothing supervised is left"):
        encode({"parts": parts}, max_tokens=size, on_overflow="truncate_text")
    assert encode({"parts": parts}, max_tokens=size + 1, on_overflow="truncate_text").num_tokens == size + 1
