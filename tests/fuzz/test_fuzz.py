"""Every parser under any input: a value or a documented error. Hypothesis makes inputs by their grammar, atheris by coverage."""

import importlib.util
import json
import random
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omniprep.tokens.encode_text import encode_pieces
from omniprep.tokens.template import TextPiece
from omniprep.tokens.vocab import TokenizerConfig, load_tokenizer
from tests.fuzz import atheris_run, fuzz_containers, fuzz_media_probe, fuzz_records, fuzz_shard_reader
from tests.hostile.mutants import MUTATIONS
from tests.hostile.tars import END, binary, extended, header, member

NUM_MUTATED = 300

KEYS = st.sampled_from(
    [
        "id",
        "split",
        "meta",
        "messages",
        "role",
        "content",
        "type",
        "text",
        "image",
        "audio",
        "video",
        "images",
        "videos",
        "audios",
        "conversations",
        "from",
        "value",
        "prompt",
        "chosen",
        "rejected",
        "query",
        "response",
        "history",
        "instruction",
        "input",
        "output",
        "parts",
        "tools",
        "tool_calls",
        "function",
        "name",
        "arguments",
        "loss",
        "url",
        "path",
        "bytes",
        "image_url",
        "fps",
        "nframes",
        "min_pixels",
        "max_pixels",
        "video_start",
        "audio_end",
        "sample_fps",
        "audio_track",
        "system",
        "label",
        "kto_tag",
    ]
)
WORDS = st.sampled_from("user assistant system tool human gpt function_call image video audio text <image> a.npy".split())  # noqa: SIM905
NUMBERS_OF_JSON = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
SCALARS = st.none() | st.booleans() | NUMBERS_OF_JSON | WORDS | st.text(max_size=8)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS | st.text(max_size=4), inner, max_size=5),
    max_leaves=25,
)
TURN = {"role": VALUES, "from": WORDS, "content": VALUES, "value": VALUES, "tool_calls": VALUES}
TURNS = st.lists(st.fixed_dictionaries({}, optional=TURN))
ROWS = (
    st.dictionaries(KEYS, VALUES, max_size=6)
    | st.fixed_dictionaries({"messages": TURNS})
    | st.fixed_dictionaries({"conversations": TURNS, "images": VALUES})
)


@settings(max_examples=400)
@given(st.integers(0, 6), ROWS)
def test_any_row_is_a_record_or_rejected(kind: int, row: dict[str, Any]) -> None:
    fuzz_records.one(bytes([kind]) + json.dumps(row).encode())


@given(st.binary(max_size=200))
def test_any_line_is_a_record_or_rejected(data: bytes) -> None:
    fuzz_records.one(b"\0" + data)


@given(VALUES | st.fixed_dictionaries({"output": SCALARS, "sources": VALUES, "encode": VALUES, "media": VALUES}))
def test_any_recipe_is_read_or_told(values: Any) -> None:
    import yaml

    fuzz_records.one(b"\xff" + yaml.safe_dump(values).encode())


@given(st.text(alphabet="abc:-[]{}&*!|>%@`'\"#, \n\t0123~?", max_size=60))
def test_any_yaml_text_is_read_or_told(text: str) -> None:
    fuzz_records.one(b"\xff" + text.encode())


NUMBERS = st.sampled_from([-1, -(1 << 40), 0, 1, 511, 512, 513, 1 << 33, 1 << 62]) | st.integers(0, 2000)
FACT_NAMES = st.sampled_from([b"path", b"size", b"mtime", b"GNU.sparse.map", b"GNU.sparse.size", b"a"])
FACTS = st.lists(st.tuples(FACT_NAMES, st.binary(max_size=8)), max_size=3)
NAMES = st.binary(min_size=1, max_size=12).map(lambda name: name + b".json")


def odd_member(number: int, kind: bytes) -> bytes:
    return header(b"1.json", kind=kind, size_field=binary(number))


BLOCKS = st.one_of(
    st.builds(member, NAMES, st.binary(max_size=600)),
    st.builds(odd_member, NUMBERS, st.binary(min_size=1, max_size=1)),
    st.builds(lambda facts, kind: extended(*facts, kind=kind), FACTS, st.sampled_from([b"x", b"g", b"X"])),
    st.binary(min_size=512, max_size=512),
)


@settings(max_examples=200)
@given(st.lists(BLOCKS, max_size=6), st.integers(0, 1400))
def test_any_tar_gives_the_same_rows_for_any_partition(blocks: list[bytes], cut: int) -> None:
    data = b"".join(blocks) + END
    fuzz_containers.one(b"\x01" + data[: len(data) - cut])


@given(st.text(max_size=60), st.sampled_from(["literal", "allow", "reject"]))
def test_any_text_is_tokens(text: str, policy: Any) -> None:
    from omniprep.errors import Reason, RejectSample

    tokenizer = load_tokenizer(TokenizerConfig())
    try:
        runs = encode_pieces([TextPiece(text=text, supervised=True, place="text")], tokenizer, policy)
    except RejectSample as error:
        assert (error.reason, policy) == (Reason.CONTROL_TOKEN, "reject")
    else:
        assert runs or not text


@pytest.mark.parametrize("module", [fuzz_records, fuzz_containers, fuzz_media_probe, fuzz_shard_reader], ids=atheris_run.TARGETS)
def test_mutated_seeds_of_each_target(module: Any) -> None:
    """The same inputs in every run, without atheris: each seed as it is, and blind mutations of it behind its first byte."""
    seeds = module.seeds()
    for data in seeds:
        module.one(data)
    rng = random.Random(0)
    for _ in range(NUM_MUTATED):
        data = rng.choice(seeds)
        mutation = rng.choice(MUTATIONS)
        module.one(data[:1] + mutation(bytearray(data[1:]), rng.choice(seeds), rng) if len(data) > 1 else data)


@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris is not installed (Linux, Python below 3.14)")
@pytest.mark.parametrize("target", atheris_run.TARGETS)
def test_a_short_guided_run(target: str, tmp_path: Path) -> None:
    count, trouble = atheris_run.run(target, 2, tmp_path)
    assert not trouble
    assert count > 20


@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris is not installed (Linux, Python below 3.14)")
def test_a_failing_input_is_reported_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A target that fails on a seed: the run says so, with the traceback, and the input lies beside the corpus."""
    broken = tmp_path / "broken"
    (broken / "tests" / "fuzz").mkdir(parents=True)
    for path in ("tests/fuzz/atheris_run.py",):
        (broken / path).write_bytes((Path(atheris_run.__file__).parents[2] / path).read_bytes())
    (broken / "tests" / "fuzz" / "fuzz_broken.py").write_text(
        "def seeds():\n    return [b'boom']\ndef one(data):\n    assert data != b'boom', 'found it'\n"
    )
    monkeypatch.setattr(atheris_run, "ROOT", broken)
    monkeypatch.setattr(atheris_run, "import_module", lambda name: _Seeds if "broken" in name else import_module(name))
    _, trouble = atheris_run.run("broken", 2, tmp_path / "found")
    assert "found it" in trouble
    assert [path.read_bytes() for path in (tmp_path / "found" / "broken").glob("crash-*")] == [b"boom"]


class _Seeds:
    @staticmethod
    def seeds() -> list[bytes]:
        return [b"boom"]
