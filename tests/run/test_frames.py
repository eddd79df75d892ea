"""Frames on a pipe: what goes in comes out, in order, whatever its size."""

import contextlib
import os
import pickle
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from omniprep.run.frames import FrameReader, PipeClosed, num_bytes_of, to_frame, write_frames

SIZES = st.one_of(st.integers(0, 100), st.integers(65_000, 66_000), st.integers(130_000, 300_000))
VALUES = st.recursive(
    st.one_of(
        st.none(),
        st.integers(),
        st.text(),
        st.binary(),
        SIZES.map(lambda size: b"\x07" * size),
        SIZES.map(lambda size: "ü" * size),
        SIZES.map(bytearray),
    ),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reading, writing = os.pipe()
    yield reading, writing
    for fd in (reading, writing):
        with contextlib.suppress(OSError):
            os.close(fd)


@given(st.lists(VALUES, max_size=5))
def test_values_come_back_in_order(values: list[object]) -> None:
    reading, writing = os.pipe()
    writer = threading.Thread(target=write_frames, args=(writing, [to_frame(value) for value in values]))
    writer.start()
    try:
        reader = FrameReader(reading)
        assert [reader.read_value() for _ in values] == values
    finally:
        writer.join()
        os.close(reading)
        os.close(writing)


@given(st.lists(VALUES, min_size=1, max_size=3))
def test_the_size_of_a_frame_is_what_it_takes(values: list[object]) -> None:
    frame = to_frame(values)
    assert num_bytes_of(frame) == len(b"".join(frame))
    assert pickle.loads(b"".join(frame)[8:]) == values


def test_large_values_are_not_copied_into_the_frame() -> None:
    large, array = bytes(1_000_000), np.zeros(1_000_000, np.uint8)
    frame = to_frame([large, array])
    assert any(piece is large for piece in frame)
    assert any(np.shares_memory(np.frombuffer(piece, np.uint8), array) for piece in frame)


def test_thousands_of_pieces_are_more_than_one_call(pipe: tuple[int, int]) -> None:
    values = list(range(1_500))
    write_frames(pipe[1], [to_frame(value) for value in values])
    reader = FrameReader(pipe[0])
    assert [reader.read_value() for _ in values] == values


def test_a_pickle_can_be_read_before_it_is_opened(pipe: tuple[int, int]) -> None:
    write_frames(pipe[1], [to_frame("first"), to_frame("second")])
    reader = FrameReader(pipe[0])
    assert pickle.loads(reader.read_pickle()) == "first"
    assert reader.read_value() == "second"


@pytest.mark.parametrize("num_bytes", [0, 3, 8, 20])
def test_an_end_in_the_middle_is_told(pipe: tuple[int, int], num_bytes: int) -> None:
    os.write(pipe[1], b"".join(to_frame("a text that is long enough"))[:num_bytes])
    os.close(pipe[1])
    with pytest.raises(PipeClosed):
        FrameReader(pipe[0]).read_value()


def test_an_end_in_the_middle_of_a_large_value_is_told(pipe: tuple[int, int]) -> None:
    whole = b"".join(to_frame(bytes(1_000_000)))
    threading.Thread(target=lambda: (os.write(pipe[1], whole[:50_000]), os.close(pipe[1]))).start()
    with pytest.raises(PipeClosed):
        FrameReader(pipe[0]).read_value()


def test_writing_to_no_one_is_told(pipe: tuple[int, int]) -> None:
    os.close(pipe[0])
    with pytest.raises(PipeClosed):
        write_frames(pipe[1], [to_frame(1)])


def test_each_read_waits_first(pipe: tuple[int, int]) -> None:
    waits = []

    def wait() -> None:
        waits.append(len(waits))
        if len(waits) == 2:
            raise TimeoutError

    write_frames(pipe[1], [to_frame(1), to_frame(2)])
    reader = FrameReader(pipe[0], wait)
    assert [reader.read_value(), reader.read_value()] == [1, 2]
    assert waits == [0]
    with pytest.raises(TimeoutError):
        reader.read_value()
