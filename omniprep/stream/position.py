"""Where a stream stands, for a training process and the worker processes of its `DataLoader` together.

```
training process ── go_to ──> told: epoch, bin, how many times ──> each worker begins there, unless a state of its own was
                                                                   loaded after that
each worker ── finish ──> finished: how many epochs it is through with ──> the epoch that comes next is the least of them
```

With workers the training process only learns what they write down, for a `DataLoader` hands it their batches behind the
dataset's back. So they count epochs by themselves, and nobody passes one that another has yet to read. What a worker writes
carries the number of the telling that it began under: what one that still reads ahead writes after a newer telling is void.

Nothing here imports torch. The memory that processes share is given: a tensor in shared memory, or an array in a test.
"""

from typing import Any, NamedTuple

from omniprep.errors import ConfigError

MAX_WORKERS = 1024
"""Of one DataLoader."""
NUM_CELLS = 4 + 2 * MAX_WORKERS
"""Whole numbers of 64 bits, all 0 to begin with, that processes share."""

_TOLD, _EPOCH, _BIN, _READ_BY_WORKERS = range(4)
"""Cells: how many times a position was set, which one, whether workers have read since."""
_LOADED = 4
"""From here on, one for each worker: the epoch that it has yet to read from, by the state that was loaded into it."""
_FINISHED = _LOADED + MAX_WORKERS
"""From here on, one for each worker: how many epochs it is through with, and by which telling."""
_ONE_TELLING = 1 << 32
"""What a cell of `_FINISHED` counts tellings in; below that it counts epochs."""

Worker = tuple[int, int] | tuple[()]
"""(number, number of workers) in a worker process, nothing in the training process."""


class Place(NamedTuple):
    """What comes next."""

    epoch: int = 0
    bin: int = 0
    """Of this rank's bins of the epoch, which come step after step."""
    of_worker: bool = False
    """Whether it is the place of one worker, whose next bin this is; another's is another."""


class Position:
    """The position as one process sees it. A fork, or a pickle, goes on with the same memory and things of its own."""

    def __init__(self, memory: Any) -> None:
        """`memory` has `NUM_CELLS` cells and behaves like an array of numpy: a tensor does."""
        self._memory = memory
        self._num_told = 0
        """The telling that this process goes by."""
        self._loaded: Place | None = None
        """In a worker: where a state of its own says that it goes on."""
        self._is_fresh = False
        """Whether there was no iteration yet since that was loaded."""
        self._next: Place | None = None
        """After the last batch of the iteration; None until it has one."""

    @property
    def epoch(self) -> int:
        """Return the epoch that the next iteration reads: all have finished those before."""
        num_told, epoch = divmod(int(self._memory[_FINISHED:].min()), _ONE_TELLING)
        return epoch if num_told == int(self._memory[_TOLD]) else int(self._memory[_EPOCH])

    @property
    def is_read_by_workers(self) -> bool:
        """Return whether workers have read since the position was set."""
        return bool(self._memory[_READ_BY_WORKERS])

    def next(self, worker: Worker = ()) -> Place:
        """Return what comes after the last batch, or, where there was none yet, what the iteration begins with."""
        return self._next or self._first(worker)

    def go_to(self, place: Place, *, is_over: bool = False, worker: Worker = ()) -> None:
        """Set the position: of everybody, or, in a worker, its own. `is_over` says that its epoch has no bins after it."""
        self._next = None
        if not worker:
            self._tell(Place(place.epoch + 1) if is_over else place)
            return
        self._loaded, self._is_fresh = place, True
        self._num_told = int(self._memory[_TOLD])
        self._memory[_LOADED + worker[0]] = place.epoch + is_over
        self._write_finished(place.epoch + is_over, worker)

    def rewind(self) -> None:
        """Forget what an iteration before has read: another one is about to begin."""
        self._next = None

    def begin(self, worker: Worker = ()) -> Place:
        """Return where an iteration begins. In a worker, call it when all others have loaded their states.

        Raises `ConfigError` if these are not of one moment.
        """
        place = self._first(worker)
        if worker:
            if place is self._loaded and self._is_fresh and place.epoch > self._first_loaded(worker):
                raise ConfigError(
                    f"worker {worker[0]} is to go on in epoch {place.epoch}, but another worker has not read the epoch before to "
                    "its end: the state was taken after an iteration was broken off and another one begun; "
                    'load a `batch["state"]`, and call set_epoch or load_state_dict after you break off'
                )
            self._is_fresh, self._num_told = False, int(self._memory[_TOLD])
            self._write_finished(place.epoch, worker)
        self._memory[_READ_BY_WORKERS] = bool(worker)
        return place

    def reach(self, place: Place) -> None:
        """Note what comes after the batch that is about to be yielded."""
        self._next = place

    def finish(self, epoch: int, worker: Worker = ()) -> None:
        """Note that this process is through with an epoch: with its share of it, in a worker."""
        if worker:
            self._write_finished(epoch + 1, worker)
        else:
            self._tell(Place(epoch + 1))

    def _first(self, worker: Worker) -> Place:
        if worker and self._loaded is not None and self._num_told == int(self._memory[_TOLD]):
            # At first by what was loaded, not by what others have read: they may be through before this one begins.
            epoch = self._first_loaded(worker) if self._is_fresh else self.epoch
            return self._loaded if self._loaded.epoch >= epoch else Place(epoch)
        epoch = self.epoch
        told = Place(int(self._memory[_EPOCH]), int(self._memory[_BIN]))
        return told if told.epoch == epoch else Place(epoch)

    def _first_loaded(self, worker: tuple[int, int]) -> int:
        """Return the epoch that some worker has yet to read from, by the states that were loaded."""
        return int(self._memory[_LOADED : _LOADED + worker[1]].min())

    def _tell(self, place: Place) -> None:
        self._num_told += 1
        self._memory[_EPOCH], self._memory[_BIN] = place.epoch, place.bin
        self._memory[_READ_BY_WORKERS] = 0
        self._memory[_FINISHED:] = self._num_told * _ONE_TELLING + place.epoch
        self._memory[_TOLD] = self._num_told

    def _write_finished(self, num_epochs: int, worker: tuple[int, int]) -> None:
        number, num_workers = worker
        self._memory[_FINISHED + number] = self._num_told * _ONE_TELLING + num_epochs
        # Those that are not there have read what all that are there have: the next loader may have more workers.
        together = self._memory[_FINISHED : _FINISHED + num_workers].min()
        others = self._memory[_FINISHED + num_workers :]
        others[others < together] = together
