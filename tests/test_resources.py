"""A worker that meets thousands of good and bad files keeps none of them open."""

import gc
from functools import partial
from pathlib import Path

import pytest

from omniprep.encode.thinker import EncodeConfig, ThinkerEncoder
from omniprep.errors import RejectSample
from omniprep.records import parse_record
from omniprep.sources.media_store import MediaConfig, MediaStore
from tests.test_bad_input import cases, write_media


def num_open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts files as Linux tells them")
@pytest.mark.parametrize("probe_only", [False, True])
def test_no_file_stays_open(tmp_path: Path, ffmpeg: str, probe_only: bool) -> None:
    write_media(tmp_path / "data", ffmpeg)
    encoder, store = ThinkerEncoder(EncodeConfig()), MediaStore(MediaConfig())
    resolve = partial(store.resolve, base=str(tmp_path / "data"))

    def encode_all() -> None:
        for case in cases():
            try:
                record = parse_record(case.row)
                if probe_only:
                    encoder.estimate(record, resolve=resolve)
                else:
                    encoder.encode(record, key="k", resolve=resolve)
            except RejectSample:
                pass

    encode_all()  # what is opened once and kept: libraries, the tokenizer
    gc.collect()
    before = num_open_files()
    gc.disable()
    try:
        for _ in range(3):
            encode_all()
        after = num_open_files()
    finally:
        gc.enable()
    assert after == before
