"""Pieces of text to token ids, with supervision per token.

The reference encodes a rendered conversation in one go; control tokens cut it into stretches of text. A stretch is
encoded piece by piece where that gives the same tokens (a border after a newline with no white space coming up, which
is every ordinary header), and as one string otherwise. A token that holds characters of an unsupervised piece is not
supervised.
"""

from collections.abc import Sequence

from omniprep.tokens.template import ControlPiece, MediaPiece, Piece, TextPiece
from omniprep.tokens.vocab import TextPolicy, TextTokenizer

TokenRun = tuple[list[int], list[bool] | bool]
"""Ids with the supervision of each token, or of all."""


def encode_pieces(pieces: Sequence[Piece], tokenizer: TextTokenizer, policy: TextPolicy) -> list[TokenRun | MediaPiece]:
    """Return token runs and media places in order. Raises `RejectSample` (`CONTROL_TOKEN`) under the policy `reject`."""
    stretches: list[list[TextPiece] | ControlPiece | MediaPiece] = []
    for piece in pieces:
        if not isinstance(piece, TextPiece):
            stretches.append(piece)
        elif stretches and isinstance(stretches[-1], list) and not _border_is_safe(stretches[-1][-1].text, piece.text):
            stretches[-1].append(piece)
        else:
            stretches.append([piece])
    plain = [_plain_text(stretch) for stretch in stretches if isinstance(stretch, list)]
    encoded = iter(tokenizer.encode_texts([text for text in plain if text is not None], policy=policy))
    runs: list[TokenRun | MediaPiece] = []
    for stretch in stretches:
        if isinstance(stretch, MediaPiece):
            runs.append(stretch)
        elif isinstance(stretch, ControlPiece):
            runs.append(([stretch.token_id], stretch.supervised))
        elif _plain_text(stretch) is not None:
            runs.append((next(encoded), stretch[0].supervised))
        elif len(stretch) == 1:
            runs.append((tokenizer.encode_constant(stretch[0].text), stretch[0].supervised))
        else:
            runs.append(_encode_mixed(stretch, tokenizer, policy))
    return runs


def _border_is_safe(left: str, right: str) -> bool:
    """Return whether no token can reach over the border.

    The pre-tokenizer ends a word after a newline unless more white space with a newline in it follows.
    """
    return left.endswith("\n") and not right[0].isspace()


def _plain_text(stretch: Sequence[TextPiece]) -> str | None:
    """Return the text of a stretch with one supervision throughout that needs the batch encoder, else None."""
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
