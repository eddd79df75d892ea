"""Packed and padded batches hold what each document alone holds, in the order and with the borders that the model needs."""

import pickle
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omniprep.profile import IGNORE_INDEX, QWEN2_5_OMNI
from omniprep.stream.batch import Batch, pack, pad
from omniprep.stream.decode import DamagedRecord
from omniprep.stream.record import Record
from tests.stream.model_records import NAMES, alone, both, record

MIXES = st.lists(st.sampled_from(NAMES), min_size=1, max_size=5)
MEDIA = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw", "video_second_per_grid")
AUDIO = QWEN2_5_OMNI.special.audio


def documents_alone(names: list[str]) -> list[dict[str, np.ndarray]]:
    return [inputs for name in names for inputs in alone(name).values()]


def check_media(batch: Batch, expected: list[dict[str, np.ndarray]]) -> None:
    inputs = batch.model_inputs()
    for name in MEDIA:
        parts = [document[name] for document in expected if name in document]
        assert (name in inputs) == bool(parts), name
        if parts:
            np.testing.assert_array_equal(inputs[name], np.concatenate(parts), err_msg=name)
            assert inputs[name].dtype == parts[0].dtype
    sounds = [
        features[:, : mask.sum()]
        for document in expected
        if "input_features" in document
        for features, mask in zip(document["input_features"], document["feature_attention_mask"], strict=True)
    ]
    assert ("input_features" in inputs) == bool(sounds) == (batch.mel is not None)
    if sounds:
        np.testing.assert_array_equal(batch.mel, np.concatenate(sounds, axis=1))
        assert batch.audio_feature_lengths.tolist() == [sound.shape[1] for sound in sounds]
        assert inputs["input_features"].dtype == np.float32
        assert inputs["feature_attention_mask"].dtype == np.int32
        for padded, mask, sound in zip(inputs["input_features"], inputs["feature_attention_mask"], sounds, strict=True):
            np.testing.assert_array_equal(padded[:, : sound.shape[1]], sound)
            assert not padded[:, sound.shape[1] :].any()
            assert mask.tolist() == [1] * sound.shape[1] + [0] * (padded.shape[1] - sound.shape[1])


def check_document(batch: Batch, expected: dict[str, np.ndarray], row: int, start: int) -> None:
    stop = start + len(expected["input_ids"])
    place = (row, slice(start, stop))
    np.testing.assert_array_equal(batch.input_ids[place], expected["input_ids"])
    np.testing.assert_array_equal(batch.labels[place][1:], expected["labels"][1:])
    assert batch.labels[row, start] == IGNORE_INDEX
    np.testing.assert_array_equal(batch.shift_labels[place][:-1], expected["labels"][1:])
    assert batch.shift_labels[row, stop - 1] == IGNORE_INDEX
    np.testing.assert_array_equal(batch.position_ids[0][place], np.arange(stop - start))
    np.testing.assert_array_equal(batch.position_ids[1:, row, start:stop], expected["position_ids"])


def check_padding(batch: Batch, row: int, start: int) -> None:
    assert (batch.input_ids[row, start:] == QWEN2_5_OMNI.special.endoftext).all()
    assert (batch.labels[row, start:] == IGNORE_INDEX).all()
    assert (batch.shift_labels[row, start:] == IGNORE_INDEX).all()


@settings(max_examples=40)
@given(names=MIXES, room=st.none() | st.integers(0, 40))
def test_a_packed_row_is_its_documents_one_after_another(names: list[str], room: int | None) -> None:
    expected = documents_alone(names)
    lengths = [len(document["input_ids"]) for document in expected]
    total = sum(lengths)
    batch = pack([record(name) for name in names], pad_to=None if room is None else total + room)
    assert batch.input_ids.shape == (1, total + (room or 0))
    assert batch.position_ids.shape == (4, *batch.input_ids.shape)
    assert batch.attention_mask is None and batch.is_packed
    tail = [total + room] if room else []
    assert batch.cu_seqlens.tolist() == [0, *np.cumsum(lengths).tolist(), *tail]
    assert batch.cu_seqlens.dtype == np.int32
    assert batch.max_seqlen == max(*lengths, room or 0)
    for document, start in zip(expected, batch.cu_seqlens.tolist(), strict=False):
        check_document(batch, document, 0, start)
    check_padding(batch, 0, total)
    if room:
        np.testing.assert_array_equal(batch.position_ids[0, 0, total:], np.arange(room))
    check_media(batch, expected)
    assert batch.document_lengths.tolist() == lengths
    assert batch.num_tokens == total
    assert batch.num_supervised == sum(np.count_nonzero(document["labels"][1:] != IGNORE_INDEX) for document in expected)
    # So a trainer that counts labels (`num_items_in_batch`) counts the same.
    assert batch.num_supervised == np.count_nonzero(batch.labels != IGNORE_INDEX)
    assert "attention_mask" not in batch.model_inputs() and batch.model_inputs()["use_cache"] is False


@settings(max_examples=40)
@given(names=MIXES, room=st.none() | st.integers(0, 40))
def test_a_padded_batch_has_a_row_for_each_document(names: list[str], room: int | None) -> None:
    expected = documents_alone(names)
    lengths = [len(document["input_ids"]) for document in expected]
    batch = pad([record(name) for name in names], pad_to=None if room is None else max(lengths) + room)
    assert batch.input_ids.shape == (len(expected), max(lengths) + (room or 0))
    assert batch.attention_mask.sum(axis=1).tolist() == lengths and not batch.is_packed
    for row, document in enumerate(expected):
        check_document(batch, document, row, 0)
        check_padding(batch, row, lengths[row])
        assert not batch.attention_mask[row, lengths[row] :].any()
    check_media(batch, expected)
    assert batch.cu_seqlens.tolist() == [0, *np.cumsum(lengths).tolist()]
    np.testing.assert_array_equal(batch.model_inputs()["attention_mask"], batch.attention_mask)


def test_preferences_stay_side_by_side_and_share_what_was_decoded() -> None:
    batch = pack([record("text"), record("media pair"), record("text pair")])
    assert [document.sequence for document in batch.documents] == ["tokens", "chosen", "rejected", "chosen", "rejected"]
    assert batch.pairs.tolist() == [[1, 2], [3, 4]]
    assert batch.keys == ("text", "media pair", "media pair", "text pair", "text pair")
    assert batch.sources == ("test",) * 5
    assert batch.video_grid_thw.shape[0] == 2 and batch.audio_feature_lengths.shape[0] == 4
    half = batch.pixel_values.shape[0] // 2
    np.testing.assert_array_equal(batch.pixel_values[:half], batch.pixel_values[half:])
    assert pack([record("text")]).pairs.shape == (0, 2)


def test_a_pair_of_which_one_sequence_has_no_media_gives_them_to_the_other_alone() -> None:
    pair = record("media pair")
    cut = replace(pair, tokens={**pair.tokens, "rejected": record("text pair").tokens["rejected"]})
    batch = pack([cut])
    assert batch.image_grid_thw.shape[0] == 1
    assert batch.audio_feature_lengths.tolist() == [item.num_mel_frames for item in pair.audio]


@pytest.mark.parametrize("make", [pack, pad])
@pytest.mark.parametrize("pad_to", [None, 32])
def test_no_records_make_a_batch_that_teaches_nothing(make, pad_to: int | None) -> None:
    batch = make([], pad_to=pad_to)
    assert batch.documents == () and batch.num_tokens == batch.num_supervised == 0
    assert batch.input_ids.shape == (1, pad_to or 1)
    check_padding(batch, 0, 0)
    assert batch.attention_mask is None or batch.attention_mask.sum() == 1
    assert set(batch.model_inputs()) <= {"input_ids", "labels", "position_ids", "use_cache", "attention_mask"}
    assert batch.pairs.shape == (0, 2) and batch.document_lengths.shape == (0,)


def test_a_batch_keeps_its_values_when_the_buffer_of_its_records_is_used_again() -> None:
    source = record("mixed")
    room = bytearray(bytes(source.frames))
    mel, tokens = source.mel.copy(), source.tokens["tokens"].copy()
    batch = pack([replace(source, tokens={"tokens": tokens}, mel=mel, frames=memoryview(room))])
    mel[:], tokens[:], room[:] = 0, 0, bytes(len(room))
    check_document(batch, alone("mixed")["tokens"], 0, 0)
    check_media(batch, documents_alone(["mixed"]))


def test_mel_is_float32_if_any_record_stores_it_so() -> None:
    exact, coarse = both("audio", "float32")[0], record("audio")
    assert pack([coarse]).mel.dtype == np.float16
    batch = pack([coarse, exact])
    assert batch.mel.dtype == np.float32
    np.testing.assert_array_equal(batch.mel[:, coarse.mel.shape[1] :], exact.mel)


def test_arguments_of_varlen_kernels_are_the_borders() -> None:
    batch = pack([record("text"), record("audio")], pad_to=200)
    inputs = batch.model_inputs(varlen=True)
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        np.testing.assert_array_equal(inputs[name], batch.cu_seqlens)
    assert inputs["max_length_q"] == inputs["max_length_k"] == batch.max_seqlen
    with pytest.raises(ValueError, match="pack it"):
        pad([record("text")]).model_inputs(varlen=True)


@pytest.mark.parametrize("make", [pack, pad])
def test_more_tokens_than_the_row_takes_are_refused_with_both_numbers(make) -> None:
    with pytest.raises(ValueError, match=r"tokens > pad_to = 8"):
        make([record("text")], pad_to=8)


def damaged(**changes) -> Record:
    source = record("mixed")
    return replace(source, **({"items": None} | changes))


def without_a_token() -> Record:
    tokens = record("mixed").tokens["tokens"].copy()
    tokens[0, np.flatnonzero(tokens[0] == AUDIO)[0]] = 5
    return damaged(tokens={"tokens": tokens})


BAD = {
    "no tokens": (damaged(tokens={"tokens": np.empty((5, 0), np.int32)}), "no tokens"),
    "a placeholder too few": (without_a_token(), r"tokens are \(\d+, \d+, \d+\), its media make"),
    "media of another record": (damaged(items=record("audio").items or (record("audio").audio, ())), "its media make"),
    "json that is none": (damaged(json=memoryview(b"{")), "json"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_record_whose_parts_do_not_belong_together_is_named_by_number_and_key(name: str) -> None:
    bad, why = BAD[name]
    with pytest.raises(DamagedRecord, match=why) as error:
        pack([record("text"), bad, record("text")])
    assert (error.value.number, error.value.key) == (1, "mixed")
    again = pickle.loads(pickle.dumps(error.value))
    assert (str(again), again.number, again.key) == (str(error.value), 1, "mixed")


def test_a_batch_crosses_a_process_border() -> None:
    batch = pack([record("mixed"), record("media pair")])
    again = pickle.loads(pickle.dumps(batch))
    assert again.documents == batch.documents
    np.testing.assert_array_equal(again.pixel_values_videos, batch.pixel_values_videos)


def test_batches_need_no_torch() -> None:
    code = (
        "import sys, omniprep.stream.batch, omniprep.stream.guard; print([n for n in ('torch', 'PIL', 'av') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
