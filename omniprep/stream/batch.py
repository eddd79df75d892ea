"""Records become the tensors of one forward call: packed into one row, or padded to a row each.

```
packed   input_ids     │ document 0      │ document 1 │ document 2          │ tail of pad_to │
         position_ids  │ 0 1 2 … ; t h w │ 0 1 … ; …  │ 0 1 2 … ; t h w     │ 0 1 …          │
         labels        │ -100 …          │ -100 …     │ -100 …              │ -100 …         │
         media         [ those of 0 ]    [ of 1 ]     [ of 2 ]                none
```

A document is one token sequence. A record is one, or a preference's two, which stay side by side and each have the media
of their prompt. What transformers must get so that documents of a row do not see each other is in `guard`.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from omniprep.encode.model_inputs import pad_mel
from omniprep.errors import DatasetError
from omniprep.features.patches import num_patch_columns
from omniprep.profile import IGNORE_INDEX, QWEN2_5_OMNI, ModelProfile
from omniprep.stream.decode import DamagedRecord, Picture, PictureDecoder
from omniprep.stream.record import AudioItem, MelArray, Record, VisionItem
from omniprep.types import Float32Array, Int32Array, Int64Array

ModelInput = npt.NDArray[np.generic] | int | bool
VisionKind = Literal["image", "video"]
_KINDS: tuple[VisionKind, ...] = ("image", "video")

_NUM_POSITION_ROWS = 4
"""Place in the document, temporal, height, width."""
_PADDING_POSITION = 1
"""Temporal, height and width id of padding, as the reference has it; nothing sees it."""


class BatchDocument(NamedTuple):
    """One token sequence of a batch, and the record that it is from."""

    key: str
    source: str
    sequence: str
    """"tokens", or which of a preference's two: "chosen", "rejected"."""
    num_tokens: int
    modalities: str
    """What its media are, "audio", "image", "video" or several joined by "+" in that order; "text" without media."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """The arrays of one forward call. B is rows, L tokens in a row; names are transformers'. Media are per document in order."""

    documents: tuple[BatchDocument, ...]
    """Those of the records in their order; of a preference, chosen and then rejected. Padding is none."""
    input_ids: Int64Array
    """(B, L)."""
    labels: Int64Array
    """(B, L), not shifted, -100 where unsupervised and at the first token of every document: after the shift that the model
    makes over the whole row, nothing is learnt across the border of two documents."""
    shift_labels: Int64Array
    """(B, L), shifted once per document: the token that follows in it, -100 where that is unsupervised and at its last."""
    position_ids: Int64Array
    """(4, B, L): 0 to len - 1, anew at each document; temporal, height and width ids."""
    cu_seqlens: Int32Array
    """(n + 1,) borders of the documents one after another without padding; in a packed row, of the tail of `pad_to` as well."""
    attention_mask: Int64Array | None
    """(B, L) of a padded batch, None for a packed row, whose borders the model finds by `position_ids`."""
    mel: MelArray | None
    """(128, F) of all audio items one after another at true length, in the type that is stored; None without sound."""
    audio_feature_lengths: Int64Array | None
    """(n_audio,) mel frames of each item."""
    pixel_values: Float32Array | None
    """(patches, 1176) of all images."""
    image_grid_thw: Int64Array | None
    """(n_images, 3)."""
    pixel_values_videos: Float32Array | None
    """(patches, 1176) of all videos."""
    video_grid_thw: Int64Array | None
    """(n_videos, 3)."""
    video_second_per_grid: Float32Array | None
    """(n_videos,)."""

    @property
    def is_packed(self) -> bool:
        """Return whether documents share one row."""
        return self.attention_mask is None

    @property
    def keys(self) -> tuple[str, ...]:
        """Return the record's key of each document."""
        return tuple(document.key for document in self.documents)

    @property
    def sources(self) -> tuple[str, ...]:
        """Return the source of each document."""
        return tuple(document.source for document in self.documents)

    @property
    def document_lengths(self) -> Int64Array:
        """Return the tokens of each document."""
        return np.array([document.num_tokens for document in self.documents], np.int64)

    @property
    def pairs(self) -> Int64Array:
        """Return (n_pairs, 2): which document is the chosen and which the rejected one of each preference."""
        chosen = [number for number, document in enumerate(self.documents) if document.sequence == "chosen"]
        return np.array([(number, number + 1) for number in chosen], np.int64).reshape(-1, 2)

    @property
    def num_tokens(self) -> int:
        """Return the tokens of all documents, without padding."""
        return sum(document.num_tokens for document in self.documents)

    @property
    def num_supervised(self) -> int:
        """Return how many tokens are predicted: what the loss of a step is divided by, summed over its batches and ranks."""
        return int(np.count_nonzero(self.shift_labels != IGNORE_INDEX))

    @property
    def max_seqlen(self) -> int:
        """Return the longest of what `cu_seqlens` divides."""
        return int(np.diff(self.cu_seqlens).max())

    def padded_features(self) -> tuple[Float32Array, Int32Array] | None:
        """Return `input_features` (n_audio, 128, longest) float32 and `feature_attention_mask` (n_audio, longest), or None.

        The model takes the padding off before it does anything else; a trainer that calls its audio tower can give it
        `mel` and `audio_feature_lengths`.
        """
        if self.mel is None or self.audio_feature_lengths is None:
            return None
        return pad_mel(np.split(self.mel, np.cumsum(self.audio_feature_lengths)[:-1], axis=1))

    def model_inputs(self, *, varlen: bool = False) -> dict[str, ModelInput]:
        """Return the keyword arguments of transformers' Thinker; those of absent media are left out.

        A packed row has no `attention_mask`, and `use_cache` is False: with either of them otherwise, documents see each
        other. The model's loss is the mean over the row's supervised tokens; for the mean over a step, give it
        `num_items_in_batch`. `varlen` adds the arguments of attention kernels that take borders (`cu_seq_lens_q`, ...).
        """
        inputs: dict[str, ModelInput] = {
            "input_ids": self.input_ids,
            "labels": self.labels,
            "position_ids": self.position_ids,
            "use_cache": False,
        }
        if self.attention_mask is not None:
            inputs["attention_mask"] = self.attention_mask
        features = self.padded_features()
        if features is not None:
            inputs["input_features"], inputs["feature_attention_mask"] = features
        for name in ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw", "video_second_per_grid"):
            array = getattr(self, name)
            if array is not None:
                inputs[name] = array
        if varlen:
            if not self.is_packed:
                raise ValueError("varlen=True: a padded batch has no borders inside its rows; pack it")
            inputs |= dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), self.cu_seqlens)
            inputs |= dict.fromkeys(("max_length_q", "max_length_k"), self.max_seqlen)
        return inputs


def pack(
    records: Sequence[Record],
    *,
    pad_to: int | None = None,
    decoder: PictureDecoder | None = None,
    profile: ModelProfile = QWEN2_5_OMNI,
) -> Batch:
    """Return one row that holds the documents of all records.

    `pad_to` fills the row up with unsupervised tokens that are a document of their own and count nowhere. Without records
    the row is such a document alone, for a rank that has no bin and still takes part in the step. `decoder` decodes frames,
    the caller's thread by default. Raises `DamagedRecord` for a record whose parts do not belong together, `ValueError` if
    the documents are longer than `pad_to`.
    """
    documents = _documents(records, profile)
    num_tokens = sum(document.num_tokens for document in documents)
    length = num_tokens if pad_to is None else pad_to
    if num_tokens > length:
        raise ValueError(f"{num_tokens} tokens > {pad_to = }; plan with max_tokens of at most that")
    length = max(length, 1)
    tail = [length - num_tokens] if length > num_tokens else []
    borders = np.cumsum([0, *(document.num_tokens for document in documents), *tail], dtype=np.int32)
    tokens = _Tokens.empty(1, length, profile)
    for document, start in zip(documents, borders.tolist(), strict=False):
        tokens.put(document, row=0, start=start)
    tokens.put_padding(row=0, start=num_tokens, first_position=0)
    return _batch(documents, tokens, borders, None, decoder=decoder, profile=profile)


def pad(
    records: Sequence[Record],
    *,
    pad_to: int | None = None,
    decoder: PictureDecoder | None = None,
    profile: ModelProfile = QWEN2_5_OMNI,
) -> Batch:
    """Return a row for each document, padded at its end to the longest, or to `pad_to`; errors as in `pack`.

    Without records there is one row of one unsupervised token.
    """
    documents = _documents(records, profile)
    longest = max((document.num_tokens for document in documents), default=1)
    length = longest if pad_to is None else pad_to
    if longest > length:
        raise ValueError(f"a document of {longest} tokens > {pad_to = }; plan with max_tokens of at most that")
    mask = np.zeros((max(len(documents), 1), length), np.int64)
    tokens = _Tokens.empty(len(mask), length, profile)
    for row, document in enumerate(documents):
        tokens.put(document, row=row, start=0)
        tokens.put_padding(row=row, start=document.num_tokens, first_position=document.num_tokens)
        mask[row, : document.num_tokens] = 1
    if not documents:
        tokens.put_padding(row=0, start=0, first_position=0)
        mask[0, 0] = 1  # attention kernels that take padding off are left with one token
    borders = np.cumsum([0, *(document.num_tokens for document in documents)], dtype=np.int32)
    if not documents:
        borders = np.array([0, 1], np.int32)
    return _batch(documents, tokens, borders, mask, decoder=decoder, profile=profile)


class _Document(NamedTuple):
    """A token sequence of a record, and the media that its placeholders stand for."""

    number: int
    """Which of the records it is from."""
    record: Record
    sequence: str
    tokens: Int32Array
    audio: tuple[AudioItem, ...]
    vision: tuple[VisionItem, ...]

    @property
    def num_tokens(self) -> int:
        return int(self.tokens.shape[1])

    @property
    def modalities(self) -> str:
        kinds = {"audio"} if self.audio else set[str]()
        return "+".join(sorted(kinds.union(item.kind for item in self.vision))) or "text"


def _documents(records: Sequence[Record], profile: ModelProfile) -> list[_Document]:
    """Return the documents of all records in order. Raises `DamagedRecord`."""
    documents: list[_Document] = []
    for number, record in enumerate(records):
        try:
            documents += [_document(number, record, name, profile) for name in record.tokens]
        except DamagedRecord:
            raise
        except DatasetError as error:  # its `json`, which is read only now
            raise DamagedRecord(number, record.key, str(error)) from None
    return documents


def _document(number: int, record: Record, sequence: str, profile: ModelProfile) -> _Document:
    """Return one document with its media: all of the record's, or, if it is one of two that has no placeholders, none.

    Raises `DamagedRecord` if its placeholders are not those of the media.
    """
    tokens, special = record.tokens[sequence], profile.special
    if not tokens.shape[1]:
        raise DamagedRecord(number, record.key, f"{sequence}: no tokens")
    given = tuple(int(np.count_nonzero(tokens[0] == token)) for token in (special.audio, special.image, special.video))
    if not any(given) and (len(record.tokens) > 1 or not (record.audio or record.vision)):
        return _Document(number, record, sequence, tokens, (), ())
    needed = (
        sum(profile.num_audio_tokens(item.num_mel_frames) for item in record.audio),
        *(sum(profile.num_vision_tokens(item.grid_thw) for item in record.vision if item.kind == kind) for kind in _KINDS),
    )
    if given != needed:
        detail = f"{sequence}: (audio, image, video) tokens are {given}, its media make {needed}"
        raise DamagedRecord(number, record.key, detail)
    return _Document(number, record, sequence, tokens, record.audio, record.vision)


class _Tokens(NamedTuple):
    """The token arrays of a batch while they are filled."""

    input_ids: Int64Array
    labels: Int64Array
    position_ids: Int64Array
    pad_token: int

    @classmethod
    def empty(cls, num_rows: int, length: int, profile: ModelProfile) -> "_Tokens":
        ids = np.empty((num_rows, length), np.int64)
        positions = np.empty((_NUM_POSITION_ROWS, num_rows, length), np.int64)
        return cls(ids, np.empty_like(ids), positions, profile.special.endoftext)

    def put(self, document: _Document, *, row: int, start: int) -> None:
        stop = start + document.num_tokens
        self.input_ids[row, start:stop] = document.tokens[0]
        self.labels[row, start:stop] = document.tokens[1]
        self.labels[row, start] = IGNORE_INDEX
        self.position_ids[0, row, start:stop] = np.arange(document.num_tokens)
        self.position_ids[1:, row, start:stop] = document.tokens[2:]

    def put_padding(self, *, row: int, start: int, first_position: int) -> None:
        """Fill a row from `start` to its end."""
        self.input_ids[row, start:] = self.pad_token
        self.labels[row, start:] = IGNORE_INDEX
        self.position_ids[0, row, start:] = np.arange(first_position, first_position + self.labels.shape[1] - start)
        self.position_ids[1:, row, start:] = _PADDING_POSITION


def _batch(
    documents: Sequence[_Document],
    tokens: _Tokens,
    borders: Int32Array,
    attention_mask: Int64Array | None,
    *,
    decoder: PictureDecoder | None,
    profile: ModelProfile,
) -> Batch:
    shift_labels = np.full_like(tokens.labels, IGNORE_INDEX)
    # The first label of every document is -100, so the last of the one before it comes out as -100.
    shift_labels[:, :-1] = tokens.labels[:, 1:]
    images, videos = (list(_pictures(documents, kind)) for kind in _KINDS)
    decoder = decoder or PictureDecoder(profile=profile)
    mel, mel_lengths = _mel(documents)
    return Batch(
        documents=tuple(
            BatchDocument(
                document.record.key, document.record.source, document.sequence, document.num_tokens, document.modalities
            )
            for document in documents
        ),
        input_ids=tokens.input_ids,
        labels=tokens.labels,
        shift_labels=shift_labels,
        position_ids=tokens.position_ids,
        cu_seqlens=borders,
        attention_mask=attention_mask,
        mel=mel,
        audio_feature_lengths=mel_lengths,
        pixel_values=_pixel_rows(images, decoder, profile),
        image_grid_thw=_grids(images),
        pixel_values_videos=_pixel_rows(videos, decoder, profile),
        video_grid_thw=_grids(videos),
        video_second_per_grid=np.array([video.item.second_per_grid for video in videos], np.float32) if videos else None,
    )


def _mel(documents: Iterable[_Document]) -> tuple[MelArray | None, Int64Array | None]:
    """Return the mel of all documents side by side, and the frames of each item."""
    sounds = [(document.record.mel, item) for document in documents for item in document.audio]
    if not sounds:
        return None, None
    lengths = np.array([item.num_mel_frames for _, item in sounds], np.int64)
    dtype = np.result_type(*{mel.dtype for mel, _ in sounds})
    together = np.empty((sounds[0][0].shape[0], int(lengths.sum())), dtype)
    start = 0
    for mel, (offset, num_frames, _) in sounds:
        together[:, start : start + num_frames] = mel[:, offset : offset + num_frames]
        start += num_frames
    return together, lengths


def _pictures(documents: Iterable[_Document], kind: VisionKind) -> Iterator[Picture]:
    """Yield the images or the videos of all documents in order, rows one after another."""
    first_row = 0
    for document in documents:
        for item in document.vision:
            if item.kind == kind:
                picture = Picture(document.number, document.record, item, first_row)
                yield picture
                first_row += picture.num_rows


def _pixel_rows(pictures: Sequence[Picture], decoder: PictureDecoder, profile: ModelProfile) -> Float32Array | None:
    """Return the patch rows of pictures; one that two documents share is decoded once and copied."""
    if not pictures:
        return None
    rows = np.empty((pictures[-1].first_row + pictures[-1].num_rows, num_patch_columns(profile)), np.float32)
    first_of: dict[int, Picture] = {}
    for picture in pictures:
        first_of.setdefault(id(picture.item), picture)
    decoder.decode(first_of.values(), rows)
    for picture in pictures:
        first = first_of[id(picture.item)]
        if first is not picture:
            rows[picture.first_row :][: picture.num_rows] = rows[first.first_row :][: picture.num_rows]
    return rows


def _grids(pictures: Sequence[Picture]) -> Int64Array | None:
    return np.array([picture.item.grid_thw for picture in pictures], np.int64) if pictures else None
