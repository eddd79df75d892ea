import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omniprep.errors import ConfigError, Reason, RejectSample
from omniprep.profile import QWEN2_5_OMNI, SpecialTokens
from omniprep.tokens import vocab
from omniprep.tokens.vocab import ADDED_TOKENS, NUM_REGULAR_TOKENS, TextTokenizer, TokenizerConfig, load_tokenizer

CASES = json.loads((Path(__file__).parents[1] / "golden" / "tokenizer_cases.json").read_text(encoding="utf-8"))
ADDED = [text for text, _ in ADDED_TOKENS]


def test_ids_of_golden_texts(tokenizer: TextTokenizer) -> None:
    wrong = [case["text"] for case in CASES if tokenizer.full.encode(case["text"], add_special_tokens=False).ids != case["ids"]]
    assert len(CASES) > 200
    assert wrong == []


def test_regular_tokenizer_agrees_with_golden_texts_without_control_tokens(tokenizer: TextTokenizer) -> None:
    plain = [case for case in CASES if not any(token in case["text"] for token in ADDED)]
    assert len(plain) > 100
    assert tokenizer.encode_texts([case["text"] for case in plain], policy="literal") == [case["ids"] for case in plain]


def by_tokenizers(tokenizer: TextTokenizer, texts: list[str]) -> list[list[int]]:
    return [encoding.ids for encoding in tokenizer.regular.encode_batch(texts, add_special_tokens=False)]


def test_both_ways_to_run_the_bpe_agree_on_every_character(tokenizer: TextTokenizer) -> None:
    """Each character after a letter, a space and an apostrophe, and before a combining mark.

    Of the planes beyond the second, which hold rare ideographs and nothing, every 64th: all of them agree and take 10 s.
    """
    codes = [*range(0xD800), *range(0xE000, 0x20000), *range(0x20000, 0x110000, 64), *range(0xE0000, 0xE0200)]
    characters = list(map(chr, codes))
    blocks = [characters[start : start + 256] for start in range(0, len(characters), 256)]
    texts = ["".join(f"a{one} {one}'{one}\u0301\n" for one in block) for block in blocks]
    assert tokenizer.encode_texts(texts, policy="literal") == by_tokenizers(tokenizer, texts)


ODD = [
    "'S",
    "'ll ",
    "ſ",
    "e\u0301",
    "\u1100\u1161",
    "  ",
    "\r\n",
    " \n \n",
    "\u00a0",
    "\u3000",
    "<|im_end|>",
    "１",
    "٣",
    "🙂\u200d",
    "!!\n",
]


@given(st.lists(st.one_of(st.sampled_from(ODD), st.text(max_size=6)), max_size=12).map("".join))
def test_both_ways_to_run_the_bpe_agree_on_any_text(text: str) -> None:
    tokenizer = load_tokenizer(TokenizerConfig())
    assert tokenizer.encode_texts([text], policy="literal") == by_tokenizers(tokenizer, [text])


@given(st.lists(st.one_of(st.sampled_from(ODD), st.text(max_size=6)), max_size=12).map("".join))
def test_both_ways_to_run_the_bpe_agree_on_where_tokens_are(text: str) -> None:
    tokenizer = load_tokenizer(TokenizerConfig())
    encoding = tokenizer.regular.encode(text, add_special_tokens=False)
    assert tokenizer.encode_with_offsets(text, policy="literal") == (encoding.ids, encoding.offsets)


@pytest.mark.parametrize("unit", [" ", "\n", "a", "!", "\u0301", " \n"])
def test_a_million_equal_characters_are_encoded(tokenizer: TextTokenizer, unit: str) -> None:
    for length in (vocab._MAX_FAST_CHARACTERS, 1_000_000):
        texts = [unit * (length // len(unit)), "after"]
        assert tokenizer.encode_texts(texts, policy="literal") == by_tokenizers(tokenizer, texts)


def test_added_tokens_have_the_released_ids(tokenizer: TextTokenizer) -> None:
    assert [tokenizer.full.token_to_id(token) for token in ADDED] == list(range(NUM_REGULAR_TOKENS, QWEN2_5_OMNI.vocab_size))
    names = {
        "im_start": "<|im_start|>",
        "im_end": "<|im_end|>",
        "audio": "<|AUDIO|>",
        "image": "<|IMAGE|>",
        "video": "<|VIDEO|>",
        "audio_bos": "<|audio_bos|>",
        "audio_eos": "<|audio_eos|>",
        "vision_bos": "<|vision_bos|>",
        "vision_eos": "<|vision_eos|>",
        "endoftext": "<|endoftext|>",
        "tool_call": "<tool_call>",
        "tool_call_end": "</tool_call>",
    }
    special = SpecialTokens()
    assert {name: tokenizer.full.token_to_id(token) for name, token in names.items()} == {
        name: getattr(special, name) for name in names
    }


@pytest.mark.parametrize("token", ADDED)
def test_no_text_becomes_a_control_token(tokenizer: TextTokenizer, token: str) -> None:
    text = f"before {token} after{token}{token}"
    (ids,) = tokenizer.encode_texts([text], policy="literal")
    assert max(ids) < NUM_REGULAR_TOKENS
    assert tokenizer.regular.decode(ids, skip_special_tokens=False) == text
    with pytest.raises(RejectSample, match="control token") as caught:
        tokenizer.encode_texts(["fine", text], policy="reject")
    assert caught.value.reason is Reason.CONTROL_TOKEN
    (ids,) = tokenizer.encode_texts([text], policy="allow")
    assert ids.count(ADDED.index(token) + NUM_REGULAR_TOKENS) == 3


@given(st.lists(st.one_of(st.sampled_from(ADDED), st.text(max_size=8)), max_size=6).map("".join))
def test_literal_text_round_trips_and_holds_no_control_token(text: str) -> None:
    tokenizer = load_tokenizer(TokenizerConfig())
    (ids,) = tokenizer.encode_texts([text], policy="literal")
    assert all(token < NUM_REGULAR_TOKENS for token in ids)
    normal = tokenizer.regular.normalizer.normalize_str(text)
    assert tokenizer.regular.decode(ids, skip_special_tokens=False) == normal


def test_every_form_of_the_vocabulary_is_the_same(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    (tmp_path / "whole").mkdir()
    tokenizer.full.save(str(tmp_path / "whole" / "tokenizer.json"))
    model = json.loads((tmp_path / "whole" / "tokenizer.json").read_text())["model"]
    halves = tmp_path / "halves"
    halves.mkdir()
    (halves / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (halves / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    for path in (tmp_path / "whole", tmp_path / "whole" / "tokenizer.json", halves):
        loaded = load_tokenizer(TokenizerConfig(path=str(path)))
        assert loaded.digest == tokenizer.digest == vocab.VOCABULARY_SHA256
        assert loaded.full.encode("Hello <|im_end|> 你好").ids == tokenizer.full.encode("Hello <|im_end|> 你好").ids


def test_a_hub_id_is_found_in_the_local_cache(tmp_path: Path, tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    snapshot = tmp_path / "models--acme--omni" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (tmp_path / "models--acme--omni" / "refs").mkdir()
    (tmp_path / "models--acme--omni" / "refs" / "main").write_text("0" * 40)
    tokenizer.full.save(str(snapshot / "tokenizer.json"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path))
    loaded = load_tokenizer(TokenizerConfig(hub_id="acme/omni"))
    assert (loaded.origin, loaded.digest) == ("acme/omni", tokenizer.digest)


def test_a_hub_id_that_cannot_be_had_says_so() -> None:
    with pytest.raises(ConfigError, match="acme/absent is neither in the local hub cache nor can it be fetched"):
        load_tokenizer(TokenizerConfig(hub_id="acme/absent"))


def test_another_vocabulary_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "tokenizer.json"
    other.write_text(json.dumps({"model": {"vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}}))
    with pytest.raises(ConfigError, match=r"expected 151643 tokens .* got 3 tokens"):
        load_tokenizer(TokenizerConfig(path=str(other)))


@pytest.mark.parametrize("content", ["not json", "{}", '{"model": {"vocab": {}, "merges": [["a"]]}}'])
def test_a_damaged_tokenizer_file_is_a_config_error(tmp_path: Path, content: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        load_tokenizer(TokenizerConfig(path=str(path)))


def test_a_missing_path_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load_tokenizer(TokenizerConfig(path=str(tmp_path / "nowhere")))


def test_tiktoken_merges_are_those_of_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMNIPREP_CACHE", str(tmp_path / "cache"))
    alphabet = [bytes([byte]) for byte in range(256)]
    import base64

    tokens = [*alphabet, b"th", b"the", b" t", b" the"]
    path = tmp_path / "small.tiktoken"
    path.write_bytes(b"".join(base64.b64encode(token) + f" {rank}\n".encode() for rank, token in enumerate(tokens)))
    vocabulary, merges = vocab.read_tiktoken(path)
    assert merges == ["t h", "th e", "Ġ t", "Ġ the"]
    assert vocab._read_tiktoken_cached(path) == (vocabulary, merges)
    assert vocab._read_tiktoken_cached(path) == (vocabulary, merges)
    assert len(list((tmp_path / "cache").iterdir())) == 1
