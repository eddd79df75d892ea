"""The headers of pictures, sounds and films: any bytes are facts, or rejected with a reason."""

import tempfile
from pathlib import Path

from omniprep.errors import RejectSample
from omniprep.media.audio import probe_audio
from omniprep.media.image import probe_image
from omniprep.media.video_probe import probe_video
from omniprep.types import MediaFile


def seeds() -> list[bytes]:
    """Return the small files that the corpus of mutants starts from."""
    from tests.hostile.mutants import make_seeds

    with tempfile.TemporaryDirectory() as folder:
        return [seed.data for seed in make_seeds(Path(folder)) if len(seed.data) < 30_000]


def one(data: bytes) -> None:
    """Probe one file as everything that it may be."""
    media = MediaFile(name="m", data=data)
    for probe in (probe_image, probe_audio, _probe_video):
        try:
            probe(media)
        except RejectSample as error:
            assert error.detail.startswith("m: ")


def _probe_video(media: MediaFile) -> None:
    info = probe_video(media)
    if info.opened is not None:
        info.opened[0].close()
    assert len(info.frame_times_s) == info.num_frames == len(info.packet_bytes)
