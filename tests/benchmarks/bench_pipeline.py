"""The whole record: parsed, decoded, encoded and written into a shard, against the reference's README path.

Ours writes members into a shard that stays open; the reference stops at tensors in memory and writes nothing.
"""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import corpus
import numpy as np
from ratios import Ratio, measure
from readme_path import ReadmePath

from omniprep.encode.thinker import EncodeConfig, ThinkerEncoder
from omniprep.profile import QWEN2_5_OMNI
from omniprep.records import MediaBlob, parse_record
from omniprep.shards.members import MemberFormat
from omniprep.shards.writer import ShardWriter, record_key, to_record
from omniprep.storage.folder import open_folder
from omniprep.tokens.layout import TrackRun, VideoRun, lay_out
from omniprep.types import MediaFile, ResizeMode

SPEECH, FILM, PHOTOS, TEXT = "speech clips, 2-3 s", "film, 6 s of 360p/720p with sound", "photos", "text dialogues"


def _resolve(reference: str | MediaBlob) -> MediaFile:
    assert isinstance(reference, str)
    return MediaFile(name=reference, path=Path(reference))


class Ours:
    """Everything from a parsed JSON row to bytes in a shard."""

    def __init__(self, folder: str, resize: ResizeMode = "fast", **settings: Any) -> None:
        config = {"image": {"resize": resize}, "video": {"resize": resize}, **settings}
        self._encoder = ThinkerEncoder(EncodeConfig.model_validate(config))
        self._form = MemberFormat()
        self._writer = ShardWriter(
            open_folder(str(folder)), f"train-{resize}", source="bench", split="train", partition=0, form=self._form
        )

    def __call__(self, rows: Sequence[dict[str, Any]]) -> None:
        for row in rows:
            key = record_key("bench", self._writer.num_records)
            sample = self._encoder.encode(parse_record(row), key=key, resolve=_resolve)
            self._writer.add(to_record(sample, self._form))

    def close(self) -> None:
        self._writer.abandon()


def _against(
    name: str, rows: Sequence[dict[str, Any]], ours: Ours, other: Callable[[Any], Any], *, target: float, pairs: int
) -> Ratio:
    return measure(
        name,
        ours=lambda: ours(rows),
        other=lambda: [other(row) for row in rows],
        target=target,
        at_least=True,
        pairs=pairs,
        min_ms=100.0,
    )


def run() -> list[Ratio]:
    """Return the ratios of whole records and of layout with positions."""
    stock, patched = ReadmePath(), ReadmePath("longest")
    speech, film, photos, text = corpus.speech(), corpus.film(), corpus.photos(), corpus.dialogues()
    with tempfile.TemporaryDirectory() as folder:
        fast, exact = Ours(folder, "fast"), Ours(folder, "exact")
        ratios = [
            _against(f"{SPEECH}: vs README path", speech, fast, stock, target=100.0, pairs=5),
            _against(f"{SPEECH}: vs README path padded to true length", speech, fast, patched, target=1.6, pairs=9),
            _against(f"{FILM}: vs README path (fast resize)", film, fast, stock, target=4.0, pairs=5),
            _against(f"{FILM}: vs README path (exact resize)", film, exact, stock, target=2.2, pairs=5),
            _against(f"{PHOTOS}: vs README path (fast resize)", photos, fast, stock, target=1.3, pairs=7),
            _against(f"{PHOTOS}: vs README path (exact resize)", photos, exact, stock, target=1.3, pairs=7),
            _against(f"{TEXT}: vs README path", text, fast, stock, target=1.2, pairs=7),
        ]
        fast.close()
        exact.close()
    return [*ratios, layout_ratio(stock)]


def layout_ratio(reference: ReadmePath) -> Ratio:
    """Return layout with positions of 300 s of video with sound, 46,500 tokens, against text expansion + get_rope_index."""
    import torch

    grid, num_mel_frames = (300, 20, 26), 30_000
    num_audio_tokens = QWEN2_5_OMNI.num_audio_tokens(num_mel_frames)
    track = TrackRun(num_tokens=num_audio_tokens, start_s=0.0, item=0)
    video = VideoRun(grid_thw=grid, grid_times_s=tuple(map(float, range(grid[0]))), second_per_grid=1.0, item=0, track=track)
    prompt = list(range(20))

    def ours() -> Any:
        return lay_out([(prompt, False), video, (prompt, True)], rope_mode="aligned")

    layout = lay_out([(prompt, False), video, (prompt, True)], rope_mode="reference")
    ids = torch.from_numpy(layout.input_ids[None].astype(np.int64))
    grids = torch.tensor([grid])
    videos = {"video_grid_thw": grids, "video_second_per_grid": [1.0]}
    sounds = {"num_audio_tokens": torch.tensor([num_audio_tokens])}

    def other() -> Any:
        reference.processor.replace_video_with_audio_token(
            videos, 0, sounds, 0, position_id_per_seconds=25, seconds_per_chunk=2.0
        )
        lengths = torch.tensor([num_mel_frames])
        return reference.rope.get_rope_index(ids, None, grids, torch.ones_like(ids), True, lengths, torch.tensor([1.0]))

    positions, _ = other()
    assert np.array_equal(positions[:, 0].numpy(), layout.position_ids), "the two sides do not compute the same"
    return measure(f"layout + positions, {layout.num_tokens} tokens", ours=ours, other=other, target=100.0, at_least=True)
