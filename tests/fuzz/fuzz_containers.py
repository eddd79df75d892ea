"""What OmniPrep parses itself: the outermost boxes of media, `.npy` headers, tars of samples. Facts, or a documented error."""

import io
import struct
import tempfile
from pathlib import Path

import numpy as np

from omniprep.errors import ConfigError, RejectSample
from omniprep.media.arrays import load_array
from omniprep.media.containers import audio_opener, is_whole_mpeg_audio, num_missing_bytes
from omniprep.sources.webdataset import WebDatasetSource
from omniprep.types import MediaFile

_FOLDER = Path(tempfile.mkdtemp())


def seeds() -> list[bytes]:
    """Return boxes of every kind, arrays, and the hostile tars of the tests."""
    from tests.hostile.tars import ATTACKS, END, FIRST, LAST

    array = io.BytesIO()
    np.save(array, np.zeros((2, 3, 4, 3), np.uint8))
    boxes = [
        b"RIFF"
        + struct.pack("<I", 36)
        + b"WAVEfmt "
        + struct.pack("<I", 16)
        + bytes(16)
        + b"data"
        + struct.pack("<I", 4)
        + bytes(4),
        b"FORM" + struct.pack(">I", 4) + b"AIFF",
        struct.pack(">I", 16) + b"ftypisom" + bytes(4) + struct.pack(">IQ", 1, 16),
        b"\x1a\x45\xdf\xa3\x81\0\x18\x53\x80\x67\x01" + bytes(7),
        b"ID3\x04\0\0\0\0\0\x04" + bytes(4) + b"\xff\xfb\x90\0" + bytes(413),
        array.getvalue(),
    ]
    tars = [FIRST + blocks + LAST + END for blocks, _ in ATTACKS.values() if len(blocks) < 20_000]
    return [*(b"\0" + box for box in boxes), *(b"\x01" + tar for tar in tars)]


def one(data: bytes) -> None:
    """Parse one input: an odd first byte says that the rest is a tar."""
    if data[:1] and data[0] % 2:
        _read_tar(data[1:])
        return
    body = data[1:]
    audio_opener(body[:16])
    assert num_missing_bytes(io.BytesIO(body)) >= 0
    is_whole_mpeg_audio(io.BytesIO(body))
    try:
        load_array(MediaFile(name="m", data=body))
    except RejectSample as error:
        assert error.detail.startswith("m: ")


def _read_tar(data: bytes) -> None:
    path = _FOLDER / "a.tar"
    path.write_bytes(data)
    source = WebDatasetSource(name="s", path=(str(path),))
    try:
        facts = []
        for rows_per_partition in (1, 100):
            parts = source.partitions(rows_per_partition=rows_per_partition)
            rows = [row for part in parts for row in source.read(part)]
            assert len(rows) == sum(part.num_rows for part in parts)
            facts.append([(row.place, row.error and row.error.detail) for row in rows])
            assert all(row.place.isprintable() and row.raw is not None for row in rows)
        assert facts[0] == facts[1]
    except ConfigError as error:
        assert "cannot be read as a tar" in str(error) or "run again" in str(error)
