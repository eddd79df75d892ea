"""Members: what goes in comes out, and every record looks alike."""

import json
from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from omniprep.errors import DatasetError, RejectSample
from omniprep.shards.members import MemberFormat, from_members, npy_header, read_facts, to_members
from tests.shards.builders import assert_equal, media_sample, preference_sample, text_sample


@pytest.mark.parametrize(
    ("sample", "form"),
    [
        (text_sample(), MemberFormat()),
        (media_sample(), MemberFormat()),
        (media_sample(), MemberFormat(mel_dtype="float32")),
        (preference_sample(), MemberFormat(kind="preference")),
    ],
    ids=["text", "media", "float32 mel", "preference"],
)
def test_round_trip(sample, form) -> None:
    members = to_members(sample, form)
    assert tuple(members) == form.names
    assert_equal(from_members(members), sample)


def test_round_trip_of_raw_frames() -> None:
    sample = media_sample()
    vision = tuple(
        replace(
            item, frame_format="raw", frames=tuple(bytes([n]) * (item.height * item.width * 3) for n in range(len(item.frames)))
        )
        for item in sample.vision
    )
    sample = replace(sample, vision=vision)
    members = to_members(sample, MemberFormat(frame_format="raw"))
    assert tuple(members) == ("frames.npy", "json", "mel.npy", "tokens.npy")
    assert np.load(BytesIO(members["frames.npy"])).dtype == np.uint8
    assert_equal(from_members(members), sample)


def test_mel_is_stored_as_float16_within_half_a_step() -> None:
    sample = media_sample()
    exact = tuple(replace(item, mel=item.mel + np.float32(1e-4)) for item in sample.audio)
    back = from_members(to_members(replace(sample, audio=exact)))
    for item, stored in zip(exact, back.audio, strict=True):
        np.testing.assert_array_equal(stored.mel, item.mel.astype(np.float16).astype(np.float32))


def shape_of(value: object) -> object:
    """Reduce plain values to their types; a list to the set of its elements' shapes."""
    if isinstance(value, dict):
        return {key: shape_of(item) for key, item in value.items()}
    if isinstance(value, list):
        return [shape_of(value[0])] if value else "EMPTY"
    return type(value).__name__


def test_every_record_has_the_same_keys_with_the_same_types() -> None:
    shapes = [shape_of(json.loads(to_members(sample)["json"])) for sample in (text_sample(), media_sample())]
    assert shapes[0] == shapes[1]
    assert "NoneType" not in str(shapes[0])
    assert "EMPTY" not in str(shapes[0])


def test_empty_media_are_members_of_width_zero() -> None:
    members = to_members(text_sample())
    assert members["frames.mjpg"] == b""
    assert np.load(BytesIO(members["mel.npy"])).shape == (128, 0)


@given(shape=st.one_of(st.tuples(st.integers(0, 10**12)), st.tuples(st.integers(0, 9), st.integers(0, 10**7))))
def test_npy_header_is_numpys(shape: tuple[int, ...]) -> None:
    sink = BytesIO()
    np.lib.format.write_array_header_1_0(sink, {"descr": "<i4", "fortran_order": False, "shape": shape})
    assert npy_header("<i4", shape) == sink.getvalue()


def test_a_record_of_the_other_kind_is_rejected() -> None:
    with pytest.raises(RejectSample, match=r"expected a record of kind 'sequence' \(tokens\), got chosen, rejected"):
        to_members(preference_sample())


def test_meta_that_is_not_json_is_rejected() -> None:
    with pytest.raises(RejectSample, match="meta: cannot be stored as JSON"):
        to_members(text_sample(meta={"score": float("nan")}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens.npy": None}, "tokens.npy: member is missing"),
        ({"tokens.npy": b"junk"}, "tokens.npy: not a .npy array"),
        ({"frames.mjpg": b""}, "frames end at byte"),
        ({"frames.mjpg": None}, "frames.mjpg: member is missing"),
        ({"json": None}, "json: 'json' is missing"),
        ({"json": b"{"}, "json: not valid JSON"),
        ({"json": b'{"format": 99}'}, "expected format 1, got 99"),
    ],
)
def test_damaged_members_name_themselves(change: dict[str, bytes | None], message: str) -> None:
    members = {name: data for name, data in {**to_members(media_sample()), **change}.items() if data is not None}
    with pytest.raises(DatasetError, match=message):
        from_members(members)


def test_json_is_ascii_whatever_the_text() -> None:
    sample = text_sample(meta={"lone": "\ud800", "zh": "中"})
    data = to_members(sample)["json"]
    assert data.isascii()
    assert from_members(to_members(sample)).meta == sample.meta
    assert read_facts({"json": data})["key"] == sample.key
