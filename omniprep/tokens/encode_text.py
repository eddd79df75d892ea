"""Pieces of text to token ids, with the spans that are supervised.

The reference encodes a rendered conversation in one go; control tokens cut it into stretches of text. A stretch is
encoded piece by piece where that gives the same tokens (a border after a newline with no white space coming up, which
is every ordinary header), and as one string otherwise. A token that holds characters of an unsupervised piece is not
supervised.
"""

from collections.abc import Sequence

from omniprep.errors import RejectSample
from omniprep.tokens.layout import Span, TextRun
from omniprep.tokens.template import ControlPiece, MediaPiece, Piece, TextPiece
from omniprep.tokens.vocab import TextPolicy, TextTokenizer, refuse_control_tokens


def encode_pieces(pieces: Sequence[Piece], tokenizer: TextTokenizer, policy: TextPolicy) -> list[TextRun | MediaPiece]:
    """Return text and media places in order; what stands between two media is one run of text.

    Raises `RejectSample` (`CONTROL_TOKEN`) under the policy `reject`.
    """
    if policy == "reject":
        _refuse_control_tokens(pieces)
    stretches = _stretches(pieces)
    # One call of the tokenizer for a whole record: its cost a call is that of a short text.
    texts = [stretch.text for stretch in stretches if type(stretch) is TextPiece and not stretch.constant]
    encoded = iter(tokenizer.encode_texts(texts, policy=policy))
    runs: list[TextRun | MediaPiece] = []
    ids: list[int] = []
    spans: list[Span] = []
    for stretch in stretches:
        start = len(ids)
        if type(stretch) is TextPiece:
            ids += tokenizer.encode_constant(stretch.text) if stretch.constant else next(encoded)
        elif type(stretch) is ControlPiece:
            ids.append(stretch.token_id)
        elif type(stretch) is MediaPiece:
            runs += [*_run_of(ids, spans), stretch]
            ids, spans = [], []
            continue
        else:
            more, supervised = _encode_mixed(stretch, tokenizer, policy)
            ids += more
            for index, on in enumerate(supervised, start):
                if on:
                    _mark(spans, index, index + 1)
            continue
        if stretch.supervised:
            _mark(spans, start, len(ids))
    return [*runs, *_run_of(ids, spans)]


def _refuse_control_tokens(pieces: Sequence[Piece]) -> None:
    """Name the part that holds one. A token over the border of two parts is found in the tokenizer, which sees them joined."""
    for piece in pieces:
        if isinstance(piece, TextPiece) and piece.place:
            try:
                refuse_control_tokens(piece.text)
            except RejectSample as error:
                raise error.at(piece.place) from None


def _run_of(ids: list[int], spans: list[Span]) -> list[TextRun]:
    return [(ids, spans)] if ids else []


def _mark(spans: list[Span], start: int, stop: int) -> None:
    """Add a span, as a part of the last one if that ends where it starts."""
    if spans and spans[-1][1] == start:
        start = spans.pop()[0]
    spans.append((start, stop))


def _stretches(pieces: Sequence[Piece]) -> list[Piece | list[TextPiece]]:
    """Return the pieces with texts that must be encoded in one go put together: as a list where their supervision differs."""
    stretches: list[Piece | list[TextPiece]] = []
    last: TextPiece | None = None
    joined: dict[int, list[TextPiece]] = {}
    for piece in pieces:
        if type(piece) is not TextPiece:
            last = None
        elif last is None or _border_is_safe(last.text, piece.text):
            last = piece
        else:
            joined.setdefault(len(stretches) - 1, [last]).append(piece)
            last = piece
            continue
        stretches.append(piece)
    for index, texts in joined.items():
        stretches[index] = _as_one(texts)
    return stretches


def _border_is_safe(left: str, right: str) -> bool:
    """Return whether no token can reach over the border.

    The pre-tokenizer ends a word after a newline unless more white space with a newline in it follows.
    """
    return left.endswith("\n") and not right[0].isspace()


def _as_one(texts: list[TextPiece]) -> TextPiece | list[TextPiece]:
    supervised = texts[0].supervised
    if any(piece.supervised != supervised for piece in texts):
        return texts
    return TextPiece("".join(piece.text for piece in texts), supervised)


def _encode_mixed(stretch: Sequence[TextPiece], tokenizer: TextTokenizer, policy: TextPolicy) -> tuple[list[int], list[bool]]:
    text = "".join(piece.text for piece in stretch)
    ids, offsets = tokenizer.encode_with_offsets(text, policy=policy)
    supervised_chars = [piece.supervised for piece in stretch for _ in piece.text]
    return ids, [all(supervised_chars[first:last]) for first, last in offsets]
