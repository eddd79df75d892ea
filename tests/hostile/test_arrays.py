"""`.npy` files that promise what they do not hold, or more than plain numbers."""

import io
import pickle
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from omniprep.errors import Reason, RejectSample
from omniprep.media.arrays import load_array
from omniprep.media.audio import decode_audio
from omniprep.types import MediaFile


def npy(header: str, data: bytes = b"", version: tuple[int, int] = (1, 0)) -> bytes:
    text = header.encode("latin1")
    return b"\x93NUMPY" + bytes(version) + len(text).to_bytes(2 if version == (1, 0) else 4, "little") + text + data


def header(descr: str, shape: str) -> str:
    return f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n"


class Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return (Path("/tmp/omniprep-was-here").touch, ())


def pickled() -> bytes:
    data = io.BytesIO()
    np.save(data, np.array([Evil()], dtype=object), allow_pickle=True)
    return data.getvalue()


ATTACKS = {
    "pickle": (pickled(), Reason.MEDIA_CORRUPT),
    "bare pickle": (b"\x93NUMPY" + pickle.dumps(1), Reason.MEDIA_CORRUPT),
    "terabytes": (npy(header("'|u1'", "(1000000000000, 3)"), b"x" * 100), Reason.MEDIA_TRUNCATED),
    "more than 64 bits": (npy(header("'<f4'", f"({2**62}, {2**62})"), b"x" * 100), Reason.MEDIA_TRUNCATED),
    "negative length": (npy(header("'<f4'", "(-1,)"), b"x" * 100), Reason.MEDIA_CORRUPT),
    "negative lengths that multiply to few": (npy(header("'<f4'", "(-2, -2)"), b"x" * 100), Reason.MEDIA_CORRUPT),
    "a thousand axes": (npy(header("'<f4'", "(" + "1," * 1000 + ")"), b"x" * 100), Reason.MEDIA_CORRUPT),
    "no item size": (npy(header("'|S0'", "(1000000000,)")), Reason.MEDIA_CORRUPT),
    "records": (npy(header("[('a', '<f4'), ('b', '<f4')]", "(4,)"), b"x" * 100), Reason.MEDIA_CORRUPT),
    "nested records": (npy(header("[('a', '<f4', (100000, 100000))]", "(4,)"), b"x" * 100), Reason.MEDIA_CORRUPT),
    "not a literal": (npy("__import__('os').system('true')"), Reason.MEDIA_CORRUPT),
    "open brackets": (npy("(" * 9000), Reason.MEDIA_CORRUPT),
    "a huge header": (npy(header("'<f4'", "(1,)") + " " * 60_000, b"x" * 100), Reason.MEDIA_CORRUPT),
    "a header of 4 GB": (npy(header("'<f4'", "(1,)"), version=(2, 0))[:8] + b"\xff\xff\xff\xff", Reason.MEDIA_CORRUPT),
    "a later version": (npy(header("'<f4'", "(1,)"), b"x" * 4, version=(3, 0)), Reason.MEDIA_CORRUPT),
    "only the magic": (b"\x93NUMPY", Reason.MEDIA_CORRUPT),
    "a float shape": (npy(header("'<f4'", "(1e3,)"), b"x" * 100), Reason.MEDIA_CORRUPT),
    "a true shape": (npy(header("'<f4'", "(True, 7)"), b"x" * 100), None),
}


@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize("name", ATTACKS)
def test_a_hostile_array_is_refused_before_anything_is_allocated(tmp_path: Path, name: str, in_memory: bool) -> None:
    data, expected = ATTACKS[name]
    path = tmp_path / "a.npy"
    path.write_bytes(data)
    media = MediaFile(name="a.npy", data=data) if in_memory else MediaFile(name="a.npy", path=path)
    tracemalloc.start()
    try:
        if expected is None:
            load_array(media)
        else:
            with pytest.raises(RejectSample) as caught:
                load_array(media)
            assert caught.value.reason is expected
            assert len(caught.value.detail) < 400
        assert tracemalloc.get_traced_memory()[1] < 5 << 20
    finally:
        tracemalloc.stop()
    with pytest.raises(RejectSample):
        decode_audio(media)
    assert not Path("/tmp/omniprep-was-here").exists()


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("shape", [(0,), (7,), (2, 3, 4), (0, 4)])
def test_an_array_comes_back_as_numpy_reads_it(tmp_path: Path, shape: tuple[int, ...], order: str) -> None:
    array = np.asarray(np.random.default_rng(0).integers(0, 255, shape, np.uint8), order=order)  # type: ignore[call-overload]
    path = tmp_path / "a.npy"
    np.save(path, array)
    for media in (MediaFile(name="a", path=path), MediaFile(name="a", data=path.read_bytes())):
        np.testing.assert_array_equal(load_array(media), array)
