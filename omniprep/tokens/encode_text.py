"""Pieces of text to token ids, with supervision per token.

The reference encodes a rendered conversation in one go; control tokens cut it into stretches of text. A stretch is
encoded piece by piece where that gives the same tokens (a border after a newline with no white space coming up, which
is every ordinary header), and as one string otherwise. A token that holds characters of an unsupervised piece is not
supervised.
"""

from collections.abc import Sequence

from omniprep.errors import RejectSample
from omniprep.tokens.template import ControlPiece, MediaPiece, Piece, TextPiece
from omniprep.tokens.vocab import TextPolicy, TextTokenizer, refuse_control_tokens

TokenRun = tuple[list[int], list[bool] | bool]
"""Ids with the supervision of each token, or of all."""


def encode_pieces(pieces: Sequence[Piece], tokenizer: TextTokenizer, policy: TextPolicy) -> list[TokenRun | MediaPiece]:
    """Return token runs and media places in order; no two neighbouring runs have one supervision throughout.

    Raises `RejectSample` (`CONTROL_TOKEN`) under the policy `reject`.
    """
    if policy == "reject":
        _refuse_control_tokens(pieces)
    stretches = _stretches(pieces)
    # One call of the tokenizer for a whole record: its cost a call is that of a short text.
    texts = {index: text for index, stretch in enumerate(stretches) if (text := _plain_text(stretch)) is not None}
    encoded = dict(zip(texts, tokenizer.encode_texts(list(texts.values()), policy=policy), strict=True))
    runs = _Runs()
    for index, stretch in enumerate(stretches):
        if isinstance(stretch, ControlPiece):
            runs.add([stretch.token_id], stretch.supervised)
        elif isinstance(stretch, MediaPiece):
            runs.add_apart(stretch)
        elif index in encoded:
            runs.add(encoded[index], stretch[0].supervised)
        elif len(stretch) == 1:
            runs.add(tokenizer.encode_constant(stretch[0].text), stretch[0].supervised)
        else:
            runs.add_apart(_encode_mixed(stretch, tokenizer, policy))
    return runs.finish()


def _refuse_control_tokens(pieces: Sequence[Piece]) -> None:
    """Name the part that holds one. A token over the border of two parts is found in the tokenizer, which sees them joined."""
    for piece in pieces:
        if isinstance(piece, TextPiece) and piece.place:
            try:
                refuse_control_tokens(piece.text)
            except RejectSample as error:
                raise error.at(piece.place) from None


class _Runs:
    """Joins neighbours of one supervision: fewer, longer runs are what the rest of the encoder is fast on."""

    def __init__(self) -> None:
        self._runs: list[TokenRun | MediaPiece] = []
        self._ids: list[int] = []
        self._supervised = False

    def add(self, ids: list[int], supervised: bool) -> None:
        if supervised != self._supervised:
            self._close()
            self._supervised = supervised
        self._ids += ids

    def add_apart(self, run: TokenRun | MediaPiece) -> None:
        self._close()
        self._runs.append(run)

    def finish(self) -> list[TokenRun | MediaPiece]:
        self._close()
        return self._runs

    def _close(self) -> None:
        if self._ids:
            self._runs.append((self._ids, self._supervised))
            self._ids = []


def _stretches(pieces: Sequence[Piece]) -> list[list[TextPiece] | ControlPiece | MediaPiece]:
    """Return the pieces with the text between two that must be encoded in one go put together."""
    stretches: list[list[TextPiece] | ControlPiece | MediaPiece] = []
    open_text: list[TextPiece] | None = None
    for piece in pieces:
        if not isinstance(piece, TextPiece):
            open_text = None
            stretches.append(piece)
        elif open_text is not None and not _border_is_safe(open_text[-1].text, piece.text):
            open_text.append(piece)
        else:
            open_text = [piece]
            stretches.append(open_text)
    return stretches


def _border_is_safe(left: str, right: str) -> bool:
    """Return whether no token can reach over the border.

    The pre-tokenizer ends a word after a newline unless more white space with a newline in it follows.
    """
    return left.endswith("\n") and not right[0].isspace()


def _plain_text(stretch: list[TextPiece] | ControlPiece | MediaPiece) -> str | None:
    """Return the text of a stretch with one supervision throughout that needs the batch encoder, else None."""
    if not isinstance(stretch, list):
        return None
    if len(stretch) == 1:
        return None if stretch[0].constant else stretch[0].text
    if all(piece.supervised == stretch[0].supervised for piece in stretch):
        return "".join(piece.text for piece in stretch)
    return None


def _encode_mixed(stretch: Sequence[TextPiece], tokenizer: TextTokenizer, policy: TextPolicy) -> TokenRun:
    text = "".join(piece.text for piece in stretch)
    ids, offsets = tokenizer.encode_with_offsets(text, policy=policy)
    supervised_chars = [piece.supervised for piece in stretch for _ in piece.text]
    return ids, [all(supervised_chars[first:last]) for first, last in offsets]
