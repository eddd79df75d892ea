"""Records are views of bytes: equal to what was stored, and an error names the member that is not what it should be."""

import json
from collections.abc import Callable

import numpy as np
import pytest

from omniprep.errors import DatasetError
from omniprep.shards.members import MemberFormat, npy_header, to_members
from omniprep.stream.buffers import KeptBuffers
from omniprep.stream.record import MemberPlaces, Record, view_record
from omniprep.types import EncodedSample
from tests.shards.builders import media_sample, preference_sample, text_sample
from tests.stream.stored import assert_same

JPEG = MemberFormat()


def view(members: dict[str, bytes], form: MemberFormat = JPEG, *, key: str, source: str = "mix") -> Record:
    spans, buffer = [], b""
    for name in form.names:
        spans.append((len(buffer), len(members[name])))
        buffer += members[name] + bytes(-len(members[name]) % 512)
    return view_record(memoryview(bytearray(buffer)), spans, places=MemberPlaces(form), key=key, source=source)


@pytest.mark.parametrize(
    ("sample", "form"),
    [
        (media_sample(), JPEG),
        (media_sample(), MemberFormat(mel_dtype="float32")),
        (text_sample(), JPEG),
        (text_sample(), MemberFormat(frame_format="raw")),
        (preference_sample(), MemberFormat(kind="preference")),
    ],
    ids=["media", "float32 mel", "text", "raw frames", "preference"],
)
def test_a_record_is_what_was_stored(sample: EncodedSample, form: MemberFormat) -> None:
    record = view(to_members(sample, form), form, key=sample.key, source=sample.source)
    assert_same(record, sample)
    assert record.mel.dtype == np.dtype(form.mel_dtype)
    assert record.num_tokens == sample.num_tokens
    assert record.frame_format == form.frame_format
    assert json.loads(bytes(record.json))["key"] == sample.key


def test_arrays_are_views_and_copy_nothing() -> None:
    members = to_members(media_sample())
    buffer = bytearray(b"".join(members.values()))
    spans, at = [], 0
    for name in JPEG.names:
        spans.append((at, len(members[name])))
        at += len(members[name])
    record = view_record(memoryview(buffer), spans, places=MemberPlaces(JPEG), key="mix-00000001", source="mix")
    before = int(record.tokens["tokens"][4, -1])
    buffer[-4:] = (before + 1).to_bytes(4, "little")
    assert record.tokens["tokens"][4, -1] == before + 1


def test_json_in_another_order_is_read_as_well() -> None:
    sample = media_sample()
    members = to_members(sample)
    facts = json.loads(members["json"])
    members["json"] = json.dumps(dict(sorted(facts.items())), indent=1).encode()
    assert_same(view(members, key=sample.key), sample)


def with_facts(change: Callable[[dict], object]) -> Callable[[dict[str, bytes]], object]:
    def damage(members: dict[str, bytes]) -> None:
        facts = json.loads(members["json"])
        change(facts)
        members["json"] = json.dumps(facts, separators=(",", ":")).encode()

    return damage


def with_item(kind: str, name: str, value: object) -> Callable[[dict[str, bytes]], object]:
    def change(facts: dict) -> None:
        items = json.loads(facts[kind])
        items[0][name] = value
        facts[kind] = json.dumps(items)

    return with_facts(change)


DAMAGES: dict[str, tuple[Callable[[dict[str, bytes]], object], str]] = {
    "tokens of another type": (
        lambda m: m.update({"tokens.npy": m["tokens.npy"].replace(b"<i4", b"<f4")}),
        "tokens.npy: expected",
    ),
    "tokens cut": (lambda m: m.update({"tokens.npy": m["tokens.npy"][:-4]}), "tokens.npy: expected"),
    "tokens of four rows": (
        lambda m: m.update({"tokens.npy": npy_header("<i4", (4, 10)) + bytes(160)}),
        "tokens.npy: expected 288 bytes of .*'shape': \\(5, 8\\)",
    ),
    "tokens shorter than a header": (lambda m: m.update({"tokens.npy": b"\x93NUMPY"}), "tokens.npy: expected 128 bytes"),
    "an empty member": (lambda m: m.update({"mel.npy": b""}), "mel.npy: expected 128 bytes"),
    "mel of another type": (lambda m: m.update({"mel.npy": m["mel.npy"].replace(b"<f2", b"<i2")}), "mel.npy: expected"),
    "mel of pickles": (
        lambda m: m.update({"mel.npy": b"\x93NUMPY\x01\x00v\x00{'descr': '|O'" + bytes(1000)}),
        "mel.npy: expected",
    ),
    "json cut": (lambda m: m.update({"json": m["json"][:-30]}), "json: does not describe"),
    "json of zeros": (lambda m: m.update({"json": bytes(len(m["json"]))}), "json: does not describe"),
    "json of another record": (with_facts(lambda facts: facts.update(key="mix-2")), "expected format 1 and key 'mix-00000001'"),
    "json of another format": (with_facts(lambda facts: facts.update(format=2)), "expected format 1"),
    "json without sounds": (with_facts(lambda facts: facts.pop("audio")), "json: .*audio"),
    "json that is a list": (lambda m: m.update({"json": b"[1]"}), "json: does not describe"),
    "sound that is a number": (with_facts(lambda facts: facts.update(audio="3")), "json: does not describe"),
    "sound beyond the mel": (with_item("audio", "num_mel_frames", 10_000), "a sound at mel frames"),
    "sound before the mel": (with_item("audio", "mel_offset", -1), "a sound at mel frames"),
    "frame beyond the frames": (with_item("vision", "frame_sizes", [1 << 40]), "a frame at bytes"),
    "frame before the frames": (with_item("vision", "frame_offsets", [-1]), "a frame at bytes"),
    "more offsets than sizes": (with_item("vision", "frame_offsets", [0, 1]), "json: does not describe"),
    "a picture of an unknown kind": (with_item("vision", "kind", "hologram"), "hologram"),
    "a grid of two numbers": (with_item("vision", "grid_thw", [1, 2]), "json: does not describe"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_an_error_that_names_the_member(name: str) -> None:
    damage, expected = DAMAGES[name]
    members = to_members(media_sample())
    damage(members)
    with pytest.raises(DatasetError, match=expected):
        view(members, key="mix-00000001").parse()


def test_a_kept_buffer_is_used_again_once_nobody_looks_at_it() -> None:
    buffers = KeptBuffers(max_bytes=4 << 20)
    buffer = buffers.take(1000)
    address = id(buffer)
    array = np.frombuffer(memoryview(buffer), np.uint8)
    array[:] = 7
    buffers.give_back(buffer)
    del buffer
    other = buffers.take(1000)
    assert id(other) != address
    assert (array == 7).all()
    del array
    assert id(buffers.take(1000)) == address


def test_kept_buffers_are_bounded() -> None:
    buffers = KeptBuffers(max_bytes=4 << 20)
    taken = [buffers.take(3 << 20) for _ in range(5)]
    assert all(len(buffer) == 4 << 20 for buffer in taken)
    for buffer in taken:
        buffers.give_back(buffer)
    assert buffers.num_bytes == 4 << 20
    assert len(buffers.take(5 << 20)) == 8 << 20
