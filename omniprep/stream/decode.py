"""Frames of records become patch rows in their final place: decode into a kept buffer, then scatter into the rows.

```
JPEG of frame 2t, 2t + 1 ── decode ──> kept buffer (H, W, 3) x 2 ── patchify_step ──> out[first row of step t :]
```

The unit of work is one temporal step, so a pixel is touched while it is in the cache, no array of all frames is ever
made, and several threads share even a single video. Both halves of the work release the interpreter's lock.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import NamedTuple

import numpy as np

from omniprep.errors import DatasetError
from omniprep.features.patches import patchify_step
from omniprep.media.frames import decode_frame
from omniprep.profile import QWEN2_5_OMNI, ModelProfile
from omniprep.stream.record import Record, VisionItem
from omniprep.types import Float32Array, FrameFormat, Uint8Array


class DamagedRecord(DatasetError):
    """A record whose content cannot be used: leave record `number` of those given out, and make the batch again."""

    def __init__(self, number: int, key: str, detail: str) -> None:
        super().__init__(f"{key}: {detail}")
        self.number = number
        self.key = key
        self.detail = detail

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions that cross a process border are rebuilt from `args`, which hold only the message.
        return DamagedRecord, (self.number, self.key, self.detail)


class Picture(NamedTuple):
    """An image or video and where its patch rows go."""

    number: int
    """Which of the records it is in, for messages."""
    record: Record
    item: VisionItem
    first_row: int

    @property
    def num_rows(self) -> int:
        """Return its patches."""
        steps, rows, columns = self.item.grid_thw
        return steps * rows * columns


class _Step(NamedTuple):
    """One temporal step of a picture: the frames that it is made of, and its rows."""

    picture: Picture
    frames: tuple[memoryview, ...]
    """One frame where the same is taken twice: an image, or the last of an odd number."""
    first_row: int


class PictureDecoder:
    """Decodes pictures into patch rows with a fixed number of threads, the caller's among them.

    Keeps two frames of buffer a thread. Safe to use from several threads; close it, or use it as a context manager.
    """

    def __init__(self, *, num_threads: int = 1, profile: ModelProfile = QWEN2_5_OMNI) -> None:
        if num_threads < 1:
            raise ValueError(f"expected num_threads >= 1, got {num_threads}")
        self.profile = profile
        self._helpers = ThreadPoolExecutor(num_threads - 1, "decode") if num_threads > 1 else None
        self._num_helpers = num_threads - 1
        self._buffers: list[Uint8Array] = []

    def __enter__(self) -> "PictureDecoder":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the threads."""
        if self._helpers is not None:
            self._helpers.shutdown()

    def decode(self, pictures: Iterable[Picture], out: Float32Array) -> None:
        """Write the patch rows of pictures to `out` (rows, 1176), C-ordered. Raises `DamagedRecord`."""
        steps = deque(step for picture in pictures for step in _steps(picture, self.profile))
        num_helpers = min(self._num_helpers, len(steps) - 1)
        if self._helpers is None or num_helpers < 1:
            self._work(steps, out)
            return
        helpers = [self._helpers.submit(self._work, steps, out) for _ in range(num_helpers)]
        try:
            self._work(steps, out)
        finally:
            steps.clear()
            # All are waited for before the first error is raised: none may still write to `out` when this returns.
            errors = [helper.exception() for helper in helpers]
        for error in errors:
            if error is not None:
                raise error

    def _work(self, steps: "deque[_Step]", out: Float32Array) -> None:
        """Do steps until none is left; what several threads take from one queue is shared evenly whatever a step costs."""
        try:
            buffer = self._buffers.pop()
        except IndexError:  # asking first whether there is one would race with other threads, as it would below
            buffer = np.empty(0, np.uint8)
        try:
            while True:
                try:
                    step = steps.popleft()
                except IndexError:
                    break
                buffer = self._write(step, out, buffer)
        except BaseException:
            steps.clear()
            raise
        finally:
            self._buffers.append(buffer)

    def _write(self, step: _Step, out: Float32Array, buffer: Uint8Array) -> Uint8Array:
        """Write one step's rows; return the buffer to keep, a larger one if it was too small."""
        picture, item = step.picture, step.picture.item
        size = item.height * item.width * 3
        if buffer.size < 2 * size and picture.record.frame_format == "jpeg":
            buffer = np.empty(2 * size, np.uint8)
        frame_format: FrameFormat = picture.record.frame_format
        try:
            frames = [
                decode_frame(data, frame_format, height=item.height, width=item.width, out=buffer[place * size :][:size])
                for place, data in enumerate(step.frames)
            ]
        except DatasetError as error:
            raise DamagedRecord(picture.number, picture.record.key, str(error)) from None
        repeated = [*frames, *frames[-1:] * (self.profile.temporal_patch_size - len(frames))]
        num_rows = item.grid_thw[1] * item.grid_thw[2]
        patchify_step(repeated, out[step.first_row : step.first_row + num_rows], self.profile)
        return buffer


def _steps(picture: Picture, profile: ModelProfile) -> Sequence[_Step]:
    """Return the temporal steps of a picture. Raises `DamagedRecord` if its frames are not those of its grid."""
    item, record = picture.item, picture.record
    num_frames, pair = len(item.frame_offsets), profile.temporal_patch_size
    expected = profile.grid_thw(num_frames, item.height, item.width)
    if item.grid_thw != expected or item.height % profile.resize_factor or item.width % profile.resize_factor:
        shape = f"{num_frames} frames of {item.height}x{item.width}"
        raise DamagedRecord(picture.number, record.key, f"{shape} are a grid of {expected}, the record says {item.grid_thw}")
    frames = [record.frames[offset : offset + size] for offset, size in zip(item.frame_offsets, item.frame_sizes, strict=True)]
    per_step = item.grid_thw[1] * item.grid_thw[2]
    return [
        _Step(picture, tuple(frames[step * pair : (step + 1) * pair]), picture.first_row + step * per_step)
        for step in range(item.grid_thw[0])
    ]
