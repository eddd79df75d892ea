"""A record and its media become an encoded sample: render, encode text, decode media, lay out.

    record ── template ──> pieces ── tokenizer ──> token runs ┐
       └────── media ──> features and grids ──> media runs ───┴── layout ──> ids, labels, positions, segments

`ThinkerEncoder` is built once per worker. It takes conversations, preferences (one prompt and its media once, two
answers as two tails) and documents.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Literal

from pydantic import Field

from omniprep.encode.estimate import Estimate, estimate_media, estimate_text
from omniprep.encode.media_cache import MediaCache
from omniprep.encode.media_items import ComputeMel, MediaEncoder, MediaSettings, OpenVideo, Resolve
from omniprep.errors import Reason, RejectSample
from omniprep.profile import QWEN2_5_OMNI, ModelProfile
from omniprep.records import AudioPart, Conversation, Document, ImagePart, MediaPart, Preference, Record, VideoPart
from omniprep.tokens.encode_text import encode_pieces
from omniprep.tokens.layout import AudioRun, ImageRun, Run, Span, TextRun, VideoRun, lay_out
from omniprep.tokens.template import ChatTemplate, MediaPiece, Piece, TemplateConfig
from omniprep.tokens.vocab import TokenizerConfig, load_tokenizer
from omniprep.types import EncodedAudio, EncodedSample, EncodedVision, Layout, RopeMode


class EncodeConfig(MediaSettings):
    """How a record becomes a sample. The media settings (`audio`, `image`, `video`, `frame_format`) stand beside these."""

    rope_mode: RopeMode = "aligned"
    """`aligned`: every position is a true time. `reference`: bit-equal to transformers, quirks included."""
    reference_fps: float = Field(default=QWEN2_5_OMNI.video_fps, gt=0)
    """In `rope_mode: reference`, the `fps` that the reference's processor is called with; it takes every file for that."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Longest sequence; for a preference, each of its two."""
    on_overflow: Literal["reject", "truncate_text"] = "reject"
    """Over-long: reject, or cut the end off. Media are never cut through: one that does not fit is left out whole."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    template: TemplateConfig = TemplateConfig()


@dataclass
class _Media:
    """The encoded media of one record, in the order of their tokens."""

    audio: list[EncodedAudio] = field(default_factory=list)
    vision: list[EncodedVision] = field(default_factory=list)


class ThinkerEncoder:
    """Encodes records. Holds what is built once: tokenizer and template."""

    def __init__(
        self,
        config: EncodeConfig,
        profile: ModelProfile = QWEN2_5_OMNI,
        *,
        compute_mel: ComputeMel | None = None,
        cache: MediaCache | None = None,
    ) -> None:
        """`compute_mel` replaces the mel backend that `config.audio` names; `cache` keeps encoded media for the next build."""
        self.config = config
        self.profile = profile
        self.media = MediaEncoder(config, profile, compute_mel, cache)
        self.tokenizer = load_tokenizer(config.tokenizer)
        self.tokenizer.encode_constant("\n")  # built now, once, for all processes that are forked from this one
        self.template = ChatTemplate(config.template, profile)

    def encode(self, record: Record, *, key: str, resolve: Resolve, add_generation_prompt: bool = False) -> EncodedSample:
        """Return the sample of a record. Raises `RejectSample` with the place in the record and the reason."""
        media = _Media()
        if isinstance(record, Preference):
            layouts = self._encode_preference(record, media, resolve)
        else:
            pieces = self._render(record, add_generation_prompt=add_generation_prompt)
            runs = self._encode_media(self._encode_text(pieces), media, resolve)
            layouts = {"tokens": self._lay_out(runs)}
            self._drop_unused(media, layouts["tokens"])
        return EncodedSample(
            key=key,
            id=record.id or "",
            layouts=layouts,
            audio=tuple(media.audio),
            vision=tuple(media.vision),
            rope_mode=self.config.rope_mode,
            split=record.split or "train",
            meta=record.meta,
        )

    def _render(self, record: Conversation | Document, *, add_generation_prompt: bool) -> list[Piece]:
        if isinstance(record, Document):
            return self.template.document(record)
        return self.template.conversation(record.messages, tools=record.tools, add_generation_prompt=add_generation_prompt)

    def _encode_text(self, pieces: Sequence[Piece]) -> list[TextRun | MediaPiece]:
        return encode_pieces(pieces, self.tokenizer, self.config.template.text_policy)

    def _encode_preference(self, record: Preference, media: _Media, resolve: Resolve) -> dict[str, Layout]:
        """Encode the prompt with its media once; each answer is a tail. Only the answers are supervised."""
        prompt = self._encode_text(self.template.conversation(record.prompt, tools=record.tools, place="prompt"))
        tails = {
            name: [run for run in self._encode_text(self.template.reply(answer, place=name)) if not isinstance(run, MediaPiece)]
            for name, answer in (("chosen", record.chosen), ("rejected", record.rejected))
        }
        longest = max(sum(len(ids) for ids, _ in tail) for tail in tails.values())
        unsupervised = [run if isinstance(run, MediaPiece) else (run[0], False) for run in prompt]
        runs = self._encode_media(unsupervised, media, resolve, reserved=longest)
        return {name: self._lay_out([*runs, *tail], keep_media=True) for name, tail in tails.items()}

    def _encode_media(
        self, runs: Sequence[TextRun | MediaPiece], media: _Media, resolve: Resolve, *, reserved: int = 0
    ) -> list[Run]:
        """Put a media run in place of every media piece. Videos come last, when the tokens of all else are known."""
        with ExitStack() as files:
            opened = []
            for run in runs:
                opened.append(self._open(run, resolve))
                if isinstance(opened[-1], OpenVideo):
                    files.callback(opened[-1].close)
            videos = [run for run in opened if isinstance(run, OpenVideo)]
            num_tokens = reserved + sum(self._num_tokens(run) for run in opened if not isinstance(run, OpenVideo))
            num_tokens += sum(self._num_video_overhead(video) for video in videos)
            shares = self._video_shares(videos, num_tokens)
            return [placed for run in opened for placed in self._place(run, media, shares)]

    def _open(self, run: TextRun | MediaPiece, resolve: Resolve) -> "TextRun | OpenVideo | _Sounds | _Picture":
        if not isinstance(run, MediaPiece):
            return run
        try:
            opened = self._open_part(run.part, resolve)
        except RejectSample as error:
            raise error.at(run.place) from None
        return replace(opened, place=run.place) if isinstance(opened, OpenVideo) else opened

    def _open_part(self, part: MediaPart, resolve: Resolve) -> "OpenVideo | _Sounds | _Picture":
        match part:
            case AudioPart():
                return _Sounds(self.media.audio(part, resolve))
            case ImagePart():
                return _Picture(self.media.image(part, resolve))
            case VideoPart():
                return self.media.open_video(part, resolve)

    def estimate(self, record: Record, *, resolve: Resolve) -> Estimate:
        """Return what a record will cost, from headers alone. A preference counts both its sequences.

        Raises `RejectSample` as `encode` would, as far as headers tell.
        """
        if isinstance(record, Preference):
            prompt = self._encode_text(self.template.conversation(record.prompt, tools=record.tools, place="prompt"))
            answers = (("chosen", record.chosen), ("rejected", record.rejected))
            tails = [self._encode_text(self.template.reply(answer, place=name)) for name, answer in answers]
            sides = [self._estimate_runs([*prompt, *tail], resolve) for tail in tails]
            return sides[0] + estimate_text(sides[1].num_tokens)
        return self._estimate_runs(self._encode_text(self._render(record, add_generation_prompt=False)), resolve)

    def _estimate_runs(self, runs: Sequence[TextRun | MediaPiece], resolve: Resolve) -> Estimate:
        total = estimate_text(sum(len(run[0]) for run in runs if not isinstance(run, MediaPiece)))
        limit = self.config.max_tokens
        for run in sorted((run for run in runs if isinstance(run, MediaPiece)), key=lambda run: run.part.type == "video"):
            left = None if limit is None else max(0, limit - total.num_tokens)
            try:
                total += estimate_media(run.part, resolve, self.media, max_tokens=left)
            except RejectSample as error:
                raise error.at(run.place) from None
        return total

    def _num_tokens(self, run: "TextRun | _Sounds | _Picture") -> int:
        match run:
            case _Sounds(items):
                return sum(self.profile.num_audio_tokens(item.num_mel_frames) + 2 for item in items)
            case _Picture(item):
                return self.profile.num_vision_tokens(item.grid_thw) + 2
            case (ids, _):
                return len(ids)

    def _num_video_overhead(self, video: OpenVideo) -> int:
        """Return the tokens of a video besides its frames: opening and closing tokens and its sound."""
        if video.track is None:
            return 2
        return 4 + self.profile.num_audio_tokens(video.track.num_mel_frames)

    def _video_shares(self, videos: Sequence[OpenVideo], num_other_tokens: int) -> Iterator[int | None]:
        """Yield how many tokens each video's frames may take: the rest of the budget, shared by length."""
        if self.config.max_tokens is None:
            return iter([None] * len(videos))
        left = max(0, self.config.max_tokens - num_other_tokens)
        total_s = sum(video.duration_s for video in videos) or 1.0
        return iter([int(left * video.duration_s / total_s) for video in videos])

    def _place(
        self, run: "TextRun | OpenVideo | _Sounds | _Picture", media: _Media, shares: Iterator[int | None]
    ) -> Iterator[Run]:
        match run:
            case _Sounds(items):
                for sound in items:
                    yield self.media.audio_run(sound, len(media.audio))
                    media.audio.append(sound)
            case _Picture(picture):
                yield ImageRun(grid_thw=picture.grid_thw, item=len(media.vision))
                media.vision.append(picture)
            case OpenVideo():
                try:
                    yield self._place_video(run, media, next(shares))
                except RejectSample as error:
                    raise error.at(run.place) from None
            case _:
                yield run

    def _place_video(self, video: OpenVideo, media: _Media, max_tokens: int | None) -> VideoRun:
        plan = self.media.plan(video, max_tokens=max_tokens)
        # The reference's processor is told one rate for a whole call, and never the one that was sampled from a file.
        claimed_fps = self.config.reference_fps if self.config.rope_mode == "reference" else None
        run = self.media.video_run(video, plan, item=len(media.vision), track_item=len(media.audio), claimed_fps=claimed_fps)
        media.vision.append(self.media.video(video, plan, run))
        if video.track is not None:
            media.audio.append(video.track)
        return run

    def _lay_out(self, runs: Sequence[Run], *, keep_media: bool = False) -> Layout:
        return lay_out(self._fit(runs, keep_media=keep_media), rope_mode=self.config.rope_mode, profile=self.profile)

    def _fit(self, runs: Sequence[Run], *, keep_media: bool) -> list[Run]:
        """Return the runs that fit `max_tokens`. Raises `RejectSample` (`TOO_MANY_TOKENS`) where they may not be cut."""
        limit = self.config.max_tokens
        sizes = [self._run_size(run) for run in runs]
        total = sum(sizes)
        if limit is None or total <= limit:
            return list(runs)
        if self.config.on_overflow == "reject":
            advice = "raise encode.max_tokens, set encode.on_overflow: truncate_text, or lower the frames or pixels of its media"
            raise RejectSample(Reason.TOO_MANY_TOKENS, f"{total} tokens > max_tokens={limit}; {advice}")
        kept: list[Run] = []
        left = limit
        for run, size in zip(runs, sizes, strict=True):
            if size <= left:
                kept.append(run)
                left -= size
                continue
            if isinstance(run, tuple) and left:
                ids, supervised = run
                kept.append((ids[:left], _spans_before(left, supervised)))
            elif keep_media and not isinstance(run, tuple):
                detail = (
                    f"media need {size} tokens where {left} of max_tokens={limit} are left; a preference's media cannot be cut"
                )
                raise RejectSample(Reason.TOO_MANY_TOKENS, detail)
            break
        if not any(isinstance(run, tuple) and run[1] for run in kept):
            detail = f"{total} tokens > max_tokens={limit}, and nothing supervised is left when the end is cut off"
            raise RejectSample(Reason.TOO_MANY_TOKENS, detail)
        return kept

    def _run_size(self, run: Run) -> int:
        match run:
            case AudioRun():
                return run.num_tokens + 2
            case ImageRun():
                return self.profile.num_vision_tokens(run.grid_thw) + 2
            case VideoRun():
                return self.profile.num_vision_tokens(run.grid_thw) + (2 if run.track is None else 4 + run.track.num_tokens)
            case (ids, _):
                return len(ids)

    def _drop_unused(self, media: _Media, layout: Layout) -> None:
        """Leave out media whose tokens were cut off; items are numbered in token order, so those are the last ones."""
        audio = [segment.item for segment in layout.segments if segment.kind == "audio"]
        vision = [segment.item for segment in layout.segments if segment.kind in ("image", "video")]
        del media.audio[max(audio, default=-1) + 1 :]
        del media.vision[max(vision, default=-1) + 1 :]


@dataclass(frozen=True, slots=True)
class _Sounds:
    """An encoded sound, in one item or several."""

    items: list[EncodedAudio]


@dataclass(frozen=True, slots=True)
class _Picture:
    """An encoded picture."""

    item: EncodedVision


def _spans_before(end: int, supervised: bool | Sequence[Span]) -> bool | Sequence[Span]:
    """Return which tokens are supervised of a run that is cut off at `end`."""
    if isinstance(supervised, bool):
        return supervised
    return [(start, min(stop, end)) for start, stop in supervised if start < end]
