"""One function turns runs of tokens and measured media into ids, labels, positions and the segment map, together.

Because all four are written in the same step, token counts, order, loss mask and positions cannot disagree.

A video with sound is one block:

    <|vision_bos|><|audio_bos|>  video 0-2 s, audio 0-2 s, video 2-4 s, audio 2-4 s, ...  <|audio_eos|><|vision_eos|>

`aligned` (the report's rule) puts every grid step and audio token at its true time, cuts the chunks on those ids, and
continues after the largest id of the block. `reference` is bit-equal to transformers: chunks of ids and of positions
are cut by different arithmetic, and the text after the block continues from the last chunk's largest id. In both, the
two opening tokens share an id, and so do the two closing ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from omniprep.errors import Reason, RejectSample
from omniprep.profile import IGNORE_INDEX, QWEN2_5_OMNI, ModelProfile
from omniprep.tokens import positions
from omniprep.tokens.interleave import interleave, reference_interleave
from omniprep.types import Int32Array, Int64Array, Layout, RopeMode, Segment


@dataclass(frozen=True, kw_only=True, slots=True)
class AudioRun:
    """Standalone sound."""

    num_tokens: int
    item: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageRun:
    """A still picture."""

    grid_thw: tuple[int, int, int]
    item: int


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackRun:
    """The sound of a video."""

    num_tokens: int
    start_s: float
    """Time of its first sample on the video's time line."""
    item: int


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoRun:
    """A video, with its sound if `track` is set."""

    grid_thw: tuple[int, int, int]
    grid_times_s: tuple[float, ...]
    """(t,) time of the first frame of each grid step, on the video's own time line."""
    second_per_grid: float
    """What the reference is told, for `rope_mode: reference`."""
    item: int
    track: TrackRun | None = None


Span = tuple[int, int]
"""Tokens [start, stop) of a run."""
TextRun = tuple[list[int], bool | Sequence[Span]]
"""Ids, and which of them are supervised: all, none, or those in some spans, which are in order and apart."""
Run = TextRun | AudioRun | ImageRun | VideoRun


def lay_out(runs: Sequence[Run], *, rope_mode: RopeMode, profile: ModelProfile = QWEN2_5_OMNI) -> Layout:
    """Return the token sequence of `runs`.

    Media runs bring their own opening and closing control tokens. Raises `RejectSample` (`REFERENCE_UNDEFINED`) where
    `rope_mode: reference` has no answer: the reference crashes on a silent video before one with sound.
    """
    if rope_mode == "reference":
        degraded = _silent_videos_as_text(runs)
    else:
        degraded = frozenset()
    sheet = _Sheet(profile)
    for index, run in enumerate(runs):
        match run:
            case (ids, supervised):
                sheet.text(ids, supervised)
            case AudioRun():
                sheet.audio(run)
            case ImageRun():
                sheet.image(run)
            case VideoRun(track=None):
                if index in degraded:
                    sheet.video_as_text(run)
                else:
                    sheet.silent_video(run, rope_mode)
            case VideoRun():
                sheet.video_with_sound(run, rope_mode)
    return sheet.finish()


def _silent_videos_as_text(runs: Sequence[Run]) -> frozenset[int]:
    """Return the silent videos that the reference takes for text: those after the last video with sound, if there is one.

    Its `use_audio_in_video` is one flag for the whole call.
    """
    videos = [(index, run) for index, run in enumerate(runs) if isinstance(run, VideoRun)]
    last_with_sound = max((index for index, run in videos if run.track is not None), default=None)
    if last_with_sound is None:
        return frozenset()
    silent = [index for index, run in videos if run.track is None]
    if any(index < last_with_sound for index in silent):
        raise RejectSample(
            Reason.REFERENCE_UNDEFINED,
            "a silent video comes before a video with sound, for which transformers' get_rope_index fails; "
            'use rope_mode: aligned, or set "audio_in_video": "off" on every video of the record',
        )
    return frozenset(silent)


class _Sheet:
    """The sequence while it is written. `_next` is the next free position id."""

    def __init__(self, profile: ModelProfile) -> None:
        self._profile = profile
        self._special = profile.special
        self._next = 0
        self._num_tokens = 0
        self._ids: list[Int32Array] = []
        self._labels: list[Int32Array] = []
        self._positions: list[Int32Array] = []
        self._segments: list[Segment] = []

    def text(self, ids: Sequence[int], supervised: bool | Sequence[Span]) -> None:
        """Add tokens whose ids go on by one."""
        count = len(ids)
        tokens = np.array(ids, np.int32)
        labels = np.full(count, IGNORE_INDEX, np.int32)
        if isinstance(supervised, bool):
            supervised = [(0, count)] if supervised else []
        done = 0
        for start, stop in supervised:
            labels[start:stop] = tokens[start:stop]
            self._text_segment(start - done, supervised=False)
            self._text_segment(stop - start, supervised=True)
            done = stop
        self._text_segment(count - done, supervised=False)
        self._ids.append(tokens)
        self._labels.append(labels)
        self._positions.append(positions.audio_ids(count, first=self._next))
        self._next += count

    def audio(self, run: AudioRun) -> None:
        self._control(self._special.audio_bos)
        ids = positions.audio_ids(run.num_tokens, first=self._next)
        self._media("audio", self._special.audio, run.item, ids)
        self._next += run.num_tokens
        self._control(self._special.audio_eos)

    def image(self, run: ImageRun) -> None:
        self._control(self._special.vision_bos)
        ids = positions.vision_ids(np.zeros(1, np.int64), run.grid_thw, base=self._next, profile=self._profile)
        self._media("image", self._special.image, run.item, ids)
        self._next = int(ids.max()) + 1
        self._control(self._special.vision_eos)

    def silent_video(self, run: VideoRun, rope_mode: RopeMode) -> None:
        if rope_mode == "reference":
            grid_ids = positions.reference_grid_ids(run.grid_thw[0], run.second_per_grid, self._profile)
        else:
            grid_ids = positions.aligned_ids(run.grid_times_s, zero_s=run.grid_times_s[0], profile=self._profile)
        self._control(self._special.vision_bos)
        ids = positions.vision_ids(grid_ids, run.grid_thw, base=self._next, profile=self._profile)
        self._media("video", self._special.video, run.item, ids)
        self._next = int(ids.max()) + 1
        self._control(self._special.vision_eos)

    def video_as_text(self, run: VideoRun) -> None:
        """Number the tokens of a silent video like text, as the reference does beside a video with sound."""
        self._control(self._special.vision_bos)
        num_tokens = self._profile.num_vision_tokens(run.grid_thw)
        self._media("video", self._special.video, run.item, positions.audio_ids(num_tokens, first=self._next))
        self._next += num_tokens
        self._control(self._special.vision_eos)

    def video_with_sound(self, run: VideoRun, rope_mode: RopeMode) -> None:
        track = run.track
        assert track is not None
        self._control(self._special.vision_bos, shared=True)
        self._control(self._special.audio_bos)
        base = self._next
        if rope_mode == "reference":
            grid_ids = positions.reference_grid_ids(run.grid_thw[0], run.second_per_grid, self._profile)
            track_start = 0
        else:
            zero_s = min(run.grid_times_s[0], track.start_s)
            grid_ids = positions.aligned_ids(run.grid_times_s, zero_s=zero_s, profile=self._profile)
            track_start = int(positions.aligned_ids([track.start_s], zero_s=zero_s, profile=self._profile)[0])
        video = positions.vision_ids(grid_ids, run.grid_thw, base=base, profile=self._profile)
        audio = positions.audio_ids(track.num_tokens, first=base + track_start)
        tokens_per_step = video.shape[1] // run.grid_thw[0]
        ticks: list[Int64Array] = [np.repeat(grid_ids, tokens_per_step), np.arange(track_start, track_start + track.num_tokens)]
        per_chunk = self._profile.position_ids_per_chunk
        if rope_mode == "reference":
            order = reference_interleave(ticks, ticks_per_chunk=per_chunk)
            grid_ticks = positions.reference_grid_ticks(run.grid_thw[0], run.second_per_grid, self._profile)
            id_order = reference_interleave([np.repeat(grid_ticks, tokens_per_step), ticks[1]], ticks_per_chunk=per_chunk)
        else:
            id_order = order = interleave(ticks, ticks_per_chunk=per_chunk)
        block = np.concatenate([(video, audio)[stream][:, first:end] for stream, first, end in order], axis=1)
        stream, first, end = order[-1]
        last = (video, audio)[stream][:, first:end] if rope_mode == "reference" else block
        self._interleaved(run.item, track.item, id_order, block)
        self._next = int(last.max()) + 1
        self._control(self._special.audio_eos, shared=True)
        self._control(self._special.vision_eos)

    def finish(self) -> Layout:
        """Return the finished sequence."""
        return Layout(
            input_ids=_joined(self._ids),
            labels=_joined(self._labels),
            position_ids=np.concatenate(self._positions, axis=1) if self._positions else np.zeros((3, 0), np.int32),
            segments=tuple(self._segments),
        )

    def _text_segment(self, count: int, *, supervised: bool) -> None:
        """Note `count` more tokens of text, in the last segment if they are of its kind."""
        if count == 0:
            return
        start = self._num_tokens
        self._num_tokens += count
        last = self._segments[-1] if self._segments else None
        if last is not None and last.kind == "text" and last.supervised == supervised:
            start = self._segments.pop().start
        self._segments.append(Segment("text", start, self._num_tokens, supervised))

    def _control(self, token: int, *, shared: bool = False) -> None:
        """Add one control token. `shared`: the next token has the same id."""
        self._ids.append(np.array([token], np.int32))
        self._labels.append(np.array([IGNORE_INDEX], np.int32))
        self._positions.append(positions.audio_ids(1, first=self._next))
        self._segments.append(Segment(kind="control", start=self._num_tokens, stop=self._num_tokens + 1))
        self._num_tokens += 1
        self._next += 0 if shared else 1

    def _media(self, kind: str, token: int, item: int, ids: Int32Array) -> None:
        count = ids.shape[1]
        self._ids.append(np.full(count, token, np.int32))
        self._labels.append(np.full(count, IGNORE_INDEX, np.int32))
        self._positions.append(ids)
        self._segments.append(Segment(kind=kind, start=self._num_tokens, stop=self._num_tokens + count, item=item))  # type: ignore[arg-type]
        self._num_tokens += count

    def _interleaved(self, video_item: int, audio_item: int, order: Sequence[tuple[int, int, int]], ids: Int32Array) -> None:
        count = ids.shape[1]
        input_ids = np.empty(count, np.int32)
        start = 0
        for stream, first, end in order:
            stop = start + end - first
            input_ids[start:stop] = self._special.audio if stream else self._special.video
            self._segments.append(
                Segment(
                    kind="audio" if stream else "video",
                    start=self._num_tokens + start,
                    stop=self._num_tokens + stop,
                    item=audio_item if stream else video_item,
                    offset=first,
                )
            )
            start = stop
        self._ids.append(input_ids)
        self._labels.append(np.full(count, IGNORE_INDEX, np.int32))
        self._positions.append(ids)
        self._num_tokens += count


def _joined(arrays: Sequence[Int32Array]) -> Int32Array:
    return np.concatenate(arrays) if arrays else np.zeros(0, np.int32)
