"""The rules that every stored sample obeys, whatever made it."""

from collections.abc import Iterator
from io import BytesIO

import numpy as np

from omniprep.profile import IGNORE_INDEX, QWEN2_5_OMNI, ModelProfile
from omniprep.shards.members import MemberFormat
from omniprep.types import EncodedAudio, EncodedSample, EncodedVision, Int32Array, Layout, Segment

Problem = tuple[str, str]
"""(member, what is wrong)."""


def check_sample(sample: EncodedSample, form: MemberFormat, profile: ModelProfile = QWEN2_5_OMNI) -> Iterator[Problem]:
    """Yield every rule that a sample breaks."""
    for name, layout in sample.layouts.items():
        for message in check_layout(layout, sample, profile):
            yield f"{name}.npy", message
    for number, audio in enumerate(sample.audio):
        for message in check_audio(audio, profile):
            yield "mel.npy", f"audio {number}: {message}"
    frames = next(name for name in form.names if name.startswith("frames."))
    for number, item in enumerate(sample.vision):
        for message in check_vision(item, len(sample.audio), profile):
            yield frames, f"{item.kind} {number}: {message}"


def check_layout(layout: Layout, sample: EncodedSample, profile: ModelProfile) -> Iterator[str]:
    """Yield what is wrong with a sequence: tiling, labels, placeholders, positions."""
    ids, labels, positions = layout.input_ids, layout.labels, layout.position_ids
    stops = [segment.stop for segment in layout.segments]
    if [segment.start for segment in layout.segments] != [0, *stops[:-1]] or stops[-1:] != [len(ids)]:
        yield "segments do not tile the sequence"
        return
    if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= profile.vocab_size):
        yield f"ids reach from {ids.min()} to {ids.max()}, outside [0, {profile.vocab_size})"
    wrong = np.flatnonzero((labels != IGNORE_INDEX) & (labels != ids))
    if len(wrong):
        at = int(wrong[0])
        yield f"token {at}: label {labels[at]} is neither its id {ids[at]} nor {IGNORE_INDEX}"
    for segment in layout.segments:
        yield from _check_supervision(segment, layout)
    yield from _check_placeholders(layout, sample, profile)
    if len(ids) and int(positions.min()) < 0:
        yield f"positions reach down to {positions.min()}"
    yield from _check_positions(layout, sample, profile)


def _check_supervision(segment: Segment, layout: Layout) -> Iterator[str]:
    labelled = layout.labels[segment.start : segment.stop] != IGNORE_INDEX
    if labelled.any() != segment.supervised or labelled.all() != segment.supervised:
        yield (
            f"segment [{segment.start}, {segment.stop}) is {'' if segment.supervised else 'not '}supervised, "
            f"but {int(labelled.sum())} of its {len(labelled)} tokens have labels"
        )


def _check_placeholders(layout: Layout, sample: EncodedSample, profile: ModelProfile) -> Iterator[str]:
    special = profile.special
    fillers = {"audio": special.audio, "image": special.image, "video": special.video}
    inside = np.zeros(len(layout.input_ids), bool)
    counts: dict[tuple[str, int], int] = {}
    for segment in layout.segments:
        if segment.kind not in fillers:
            continue
        inside[segment.start : segment.stop] = True
        if (layout.input_ids[segment.start : segment.stop] != fillers[segment.kind]).any():
            yield f"{segment.kind} segment [{segment.start}, {segment.stop}) holds other tokens than {fillers[segment.kind]}"
        tower = "audio" if segment.kind == "audio" else "vision"
        if segment.offset != counts.get((tower, segment.item), 0):
            yield f"{segment.kind} segment [{segment.start}, {segment.stop}) starts at token {segment.offset} of its item"
        counts[tower, segment.item] = counts.get((tower, segment.item), 0) + segment.stop - segment.start
    stray = np.flatnonzero(~inside & np.isin(layout.input_ids, list(fillers.values())))
    if len(stray):
        yield f"token {int(stray[0])} is a placeholder outside of any media segment"
    expected = {("audio", n): profile.num_audio_tokens(item.num_mel_frames) for n, item in enumerate(sample.audio)}
    expected |= {("vision", n): profile.num_vision_tokens(item.grid_thw) for n, item in enumerate(sample.vision)}
    for (tower, number), count in sorted({**expected, **counts}.items()):
        wanted, got = expected.get((tower, number)), counts.get((tower, number), 0)
        if wanted != got:
            yield f"{tower} item {number}: expected {wanted} placeholder tokens, got {got} ({count} in all)"


def _check_positions(layout: Layout, sample: EncodedSample, profile: ModelProfile) -> Iterator[str]:
    """Check that text counts up by one, media never run backwards in time, and blocks do not meet.

    In `reference` mode the text after a video with sound may start inside of it, as it does in the reference.
    """
    for segment in layout.segments:
        if (np.diff(layout.position_ids[0, segment.start : segment.stop]) < 0).any():
            yield f"{segment.kind} segment [{segment.start}, {segment.stop}) runs backwards in time"
    last = -1
    for start, stop, kinds, is_interleaved in _blocks(layout, sample):
        block = layout.position_ids[:, start:stop]
        if kinds <= {"text", "control"} and not _counts_up(layout.input_ids[start:stop], block, profile):
            yield f"text [{start}, {stop}) does not count up by one in all three rows"
        if sample.rope_mode == "aligned" and int(block.min()) <= last:
            yield f"[{start}, {stop}) starts at position {int(block.min())}, not above {last} where the block before it ends"
        last = max(last, int(block.max())) if not (is_interleaved and sample.rope_mode == "reference") else int(block.max())


def _counts_up(ids: Int32Array, block: Int32Array, profile: ModelProfile) -> bool:
    """Return whether text positions step by one; the two opening (closing) tokens of a video with sound share theirs."""
    special = profile.special
    opens = (ids[:-1] == special.vision_bos) & (ids[1:] == special.audio_bos)
    closes = (ids[:-1] == special.audio_eos) & (ids[1:] == special.vision_eos)
    steps = np.diff(block[0])
    return bool((block == block[0]).all() and ((steps == 1) | ((steps == 0) & (opens | closes))).all())


def _blocks(layout: Layout, sample: EncodedSample) -> Iterator[tuple[int, int, set[str], bool]]:
    """Yield (start, stop, kinds, whether a video with its sound) of runs whose tokens may share positions."""
    owner = {item.audio_index: number for number, item in enumerate(sample.vision) if item.audio_index is not None}
    start, current, kinds = 0, None, set[str]()
    for segment in layout.segments:
        tower = "audio" if segment.kind == "audio" else "vision"
        if segment.item < 0:
            name: tuple[str, int] = ("text", 0)
        elif tower == "audio" and segment.item in owner:
            name = ("vision", owner[segment.item])
        else:
            name = (tower, segment.item)
        if current is not None and name != current and segment.start > start:
            yield start, segment.start, kinds, {"audio", "video"} <= kinds
            start, kinds = segment.start, set()
        current = name
        if segment.stop > segment.start:
            kinds = kinds | {segment.kind}
    if current is not None and len(layout.input_ids) > start:
        yield start, len(layout.input_ids), kinds, {"audio", "video"} <= kinds


def check_audio(audio: EncodedAudio, profile: ModelProfile) -> Iterator[str]:
    """Yield what is wrong with an audio item."""
    expected = profile.num_mel_frames(audio.num_samples)
    if audio.num_mel_frames != expected:
        yield f"{audio.num_samples} samples make {expected} mel frames, got {audio.num_mel_frames}"
    if not np.isfinite(audio.mel).all():
        yield "mel holds NaN or infinity"


def check_vision(item: EncodedVision, num_audio_items: int, profile: ModelProfile) -> Iterator[str]:
    """Yield what is wrong with an image or video: grid, timing, and every frame, decoded."""
    expected = profile.grid_thw(len(item.frames), item.height, item.width)
    if item.grid_thw != expected:
        yield f"{len(item.frames)} frames of {item.height}x{item.width} make the grid {expected}, got {item.grid_thw}"
    if item.height % profile.resize_factor or item.width % profile.resize_factor:
        yield f"{item.height}x{item.width} is not a multiple of {profile.resize_factor}"
    if (item.kind == "video") != (item.timing is not None):
        yield "a video must have a timing contract and an image none"
    if item.timing is not None:
        if len(item.timing.frame_times_s) != len(item.frames):
            yield f"{len(item.frames)} frames but {len(item.timing.frame_times_s)} times"
        if (np.diff(item.timing.frame_times_s) < 0).any():
            yield "frame times run backwards"
    if item.audio_index is not None and not 0 <= item.audio_index < num_audio_items:
        yield f"its sound is audio item {item.audio_index} of {num_audio_items}"
    for number, frame in enumerate(item.frames):
        message = _check_frame(frame, item)
        if message:
            yield f"frame {number}: {message}"


def _check_frame(frame: bytes, item: EncodedVision) -> str:
    if item.frame_format == "raw":
        expected = item.height * item.width * 3
        return "" if len(frame) == expected else f"expected {expected} bytes, got {len(frame)}"
    from PIL import Image

    try:
        with Image.open(BytesIO(frame)) as picture:
            picture.load()
            size, form = picture.size, picture.format
    except (OSError, ValueError, SyntaxError) as error:
        return f"not a readable JPEG: {' '.join(str(error).split())}"
    if form != "JPEG" or size != (item.width, item.height):
        return f"expected a JPEG of {item.height}x{item.width}, got {form} of {size[1]}x{size[0]}"
    return ""
