"""Frames of all formats and shapes become the rows of `patchify`, for any number of threads; damage names its record."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omniprep.features.patches import num_patch_columns, patchify
from omniprep.media.frames import decode_frames, encode_frame
from omniprep.profile import QWEN2_5_OMNI
from omniprep.stream.decode import DamagedRecord, Picture, PictureDecoder
from omniprep.stream.record import Record, VisionItem
from omniprep.types import FrameFormat

SHAPES = st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(1, 3), st.sampled_from(["jpeg", "raw"]))


def make_record(
    shapes: list[tuple[int, int, int]], frame_format: FrameFormat = "jpeg", key: str = "k"
) -> tuple[Record, np.ndarray]:
    """Return a record with a picture of each (frames, block rows, block columns), and the patch rows it must give."""
    rng = np.random.default_rng(len(shapes))
    items, data, rows = [], b"", []
    for num_frames, *blocks in shapes:
        height, width = 28 * blocks[0], 28 * blocks[1]
        stack = rng.integers(0, 256, (num_frames, height, width, 3), dtype=np.uint8)
        frames = [encode_frame(frame, frame_format, 90) for frame in stack]
        offsets = [len(data) + sum(map(len, frames[:number])) for number in range(num_frames)]
        data += b"".join(frames)
        kind = "image" if num_frames == 1 else "video"
        grid = QWEN2_5_OMNI.grid_thw(num_frames, height, width)
        items.append(VisionItem(kind, grid, height, width, tuple(offsets), tuple(map(len, frames)), None, 1.0))
        rows.append(patchify(decode_frames(frames, frame_format, height=height, width=width)))
    empty = np.empty((128, 0), np.float16)
    record = Record(key, "s", {}, empty, memoryview(data), memoryview(b""), frame_format, ((), tuple(items)))
    return record, np.concatenate(rows)


def pictures_of(record: Record, number: int = 0) -> list[Picture]:
    pictures, first_row = [], 0
    for item in record.vision:
        pictures.append(Picture(number, record, item, first_row))
        first_row += pictures[-1].num_rows
    return pictures


def decode(decoder: PictureDecoder, record: Record) -> np.ndarray:
    pictures = pictures_of(record)
    rows = np.full((sum(picture.num_rows for picture in pictures), num_patch_columns()), np.nan, np.float32)
    decoder.decode(pictures, rows)
    return rows


@settings(max_examples=30)
@given(shapes=st.lists(SHAPES, min_size=1, max_size=4), num_threads=st.integers(1, 4))
def test_rows_are_those_of_patchify_for_any_number_of_threads(shapes, num_threads: int) -> None:
    frame_format = shapes[0][3]
    record, expected = make_record([shape[:3] for shape in shapes], frame_format)
    with PictureDecoder(num_threads=num_threads) as decoder:
        np.testing.assert_array_equal(decode(decoder, record), expected)


def test_one_decoder_serves_several_threads_at_once() -> None:
    made = [make_record([(number % 4 + 1, 1 + number % 3, 2), (1, 2, 3)], key=str(number)) for number in range(8)]
    with PictureDecoder(num_threads=2) as decoder, ThreadPoolExecutor(4) as callers:
        for (_, expected), rows in zip(made * 5, callers.map(lambda one: decode(decoder, one[0]), made * 5), strict=True):
            np.testing.assert_array_equal(rows, expected)


def test_buffers_are_kept_from_one_call_to_the_next() -> None:
    large, _ = make_record([(4, 3, 3)])
    small, _ = make_record([(2, 1, 1)])
    with PictureDecoder() as decoder:
        decode(decoder, large)
        kept = decoder._buffers[0]
        for _ in range(3):
            decode(decoder, small)
            decode(decoder, large)
        assert len(decoder._buffers) == 1 and decoder._buffers[0] is kept
        assert kept.nbytes == 2 * 84 * 84 * 3


@pytest.mark.parametrize("num_threads", [1, 3])
def test_a_damaged_frame_names_its_record_and_the_decoder_goes_on(num_threads: int) -> None:
    record, expected = make_record([(6, 3, 3)] * 4, key="bad one")
    offset = record.vision[2].frame_offsets[1]
    data = bytearray(record.frames)
    data[offset : offset + 40] = bytes(40)
    damaged = replace(record, frames=memoryview(bytes(data)))
    rows = np.empty_like(expected)
    with PictureDecoder(num_threads=num_threads) as decoder:
        for _ in range(3):
            with pytest.raises(DamagedRecord, match=r"bad one: JPEG frame of \d+ bytes cannot be decoded") as error:
                decoder.decode(pictures_of(damaged, number=5), rows)
            assert error.value.number == 5
            np.testing.assert_array_equal(decode(decoder, record), expected)


def swap_frames(record: Record) -> Record:
    """Return a record whose image is a JPEG of another size than it says: smaller than its room."""
    other, _ = make_record([(1, 1, 1)])
    item = record.vision[0]._replace(frame_offsets=(0,), frame_sizes=(len(other.frames),))
    return replace(record, frames=other.frames, items=((), (item,)))


def test_a_frame_of_another_size_is_damage() -> None:
    record, _ = make_record([(1, 2, 2)])
    with PictureDecoder() as decoder, pytest.raises(DamagedRecord, match=r"expected \(56, 56, 3\), got \(28, 28, 3\)"):
        decode(decoder, swap_frames(record))


@pytest.mark.parametrize(
    "change", [{"grid_thw": (2, 4, 4)}, {"height": 84}, {"frame_offsets": (0, 0, 0), "frame_sizes": (9, 9, 9)}]
)
def test_a_grid_that_is_not_that_of_its_frames_is_damage_before_anything_is_written(change) -> None:
    record, expected = make_record([(2, 2, 2)])
    wrong = replace(record, items=((), (record.vision[0]._replace(**change),)))
    rows = np.full_like(expected, 7)
    with PictureDecoder() as decoder, pytest.raises(DamagedRecord, match="are a grid of"):
        decoder.decode(pictures_of(wrong), rows)
    assert (rows == 7).all()


def test_no_threads_at_all_are_refused() -> None:
    with pytest.raises(ValueError, match="num_threads >= 1, got 0"):
        PictureDecoder(num_threads=0)
