import pytest

from omniprep.tokens.vocab import TextTokenizer, TokenizerConfig, load_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> TextTokenizer:
    return load_tokenizer(TokenizerConfig())
