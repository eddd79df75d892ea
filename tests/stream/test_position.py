"""The position of a stream, with a training process and its workers played by hand: no epoch is passed, none is read twice."""

from copy import copy

import numpy as np
import pytest

from omniprep.errors import ConfigError
from omniprep.stream.position import NUM_CELLS, Place, Position

LENGTH = 10
"""Bins of an epoch."""


def trainer() -> Position:
    return Position(np.zeros(NUM_CELLS, np.int64))


def forked(position: Position, num_workers: int) -> list[Position]:
    """Return what workers have that are forked now: copies of everything but the memory, which is the same."""
    return [copy(position) for _ in range(num_workers)]


def read(position: Position, number: int, num_workers: int, *, num_batches: int = LENGTH) -> list[tuple[int, int]]:
    """Read as a worker does, to the end of its share or `num_batches` far; return (epoch, bin) of the batches."""
    worker = (number, num_workers)
    position.rewind()
    start = position.begin(worker)
    mine = range(start.bin + (0 if start.of_worker else number), LENGTH, num_workers)
    for bin_ in mine[:num_batches]:
        position.reach(Place(start.epoch, min(bin_ + num_workers, LENGTH), of_worker=True))
    if len(mine) <= num_batches:
        position.finish(start.epoch, worker)
    return [(start.epoch, bin_) for bin_ in mine[:num_batches]]


def load(position: Position, place: Place, worker: tuple[int, int]) -> None:
    position.go_to(place, is_over=place.bin >= LENGTH, worker=worker)


def whole(epoch: int, first: int = 0) -> list[tuple[int, int]]:
    return [(epoch, bin_) for bin_ in range(first, LENGTH)]


def test_one_process_goes_on_from_epoch_to_epoch() -> None:
    position = trainer()
    assert position.begin() == Place(0)
    position.reach(Place(0, 4))
    assert position.next() == Place(0, 4)
    position.rewind()
    assert position.next() == position.begin() == Place(0), "it was broken off"
    position.reach(Place(0, LENGTH))
    position.finish(0)
    assert position.next() == Place(0, LENGTH)
    assert position.epoch == 1
    position.rewind()
    assert position.next() == position.begin() == Place(1)


def test_the_end_of_an_epoch_is_the_beginning_of_the_next() -> None:
    position = trainer()
    position.go_to(Place(3, LENGTH), is_over=True)
    assert position.next() == position.begin() == Place(4)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_a_worker_that_starts_late_reads_the_same_epoch(order: tuple[int, ...]) -> None:
    position = trainer()
    for epoch in range(3):
        workers = forked(position, 3)
        found = []
        for number in order:
            assert position.epoch == epoch
            found += read(workers[number], number, 3)
        assert sorted(found) == whole(epoch)
    assert position.epoch == 3


def test_each_loader_may_have_another_number_of_workers() -> None:
    position = trainer()
    for epoch, num_workers in enumerate((2, 5, 1, 3)):
        found = [one for number, worker in enumerate(forked(position, num_workers)) for one in read(worker, number, num_workers)]
        assert sorted(found) == whole(epoch)


def test_workers_that_were_broken_off_are_no_measure_for_the_next() -> None:
    position = trainer()
    first, *_ = forked(position, 4)
    read(first, 0, 4)  # through with its share; the trainer breaks off, and goes on with fewer workers
    assert [read(worker, number, 1) for number, worker in enumerate(forked(position, 1))] == [whole(0)]
    assert position.epoch == 1


def test_workers_that_live_on_take_a_new_position_and_keep_it() -> None:
    position = trainer()
    workers = forked(position, 2)
    position.go_to(Place(4, 6))
    for epoch, first in ((4, 6), (5, 0)):
        found = [one for number, worker in enumerate(workers) for one in read(worker, number, 2)]
        assert sorted(found) == whole(epoch, first)


@pytest.mark.parametrize("ahead", [(), (0,), (1,), (0, 1)])
def test_a_new_position_holds_whatever_workers_that_read_ahead_write_after_it(ahead: tuple[int, ...]) -> None:
    """The trainer breaks off and sets an epoch; the workers get to the end of the old one only then."""
    position = trainer()
    workers = forked(position, 2)
    for number, worker in enumerate(workers):
        worker.begin((number, 2))
    position.go_to(Place(0))
    for number in ahead:
        workers[number].finish(0, (number, 2))
    assert position.epoch == 0
    found = []
    for number, worker in enumerate(workers):
        found += read(worker, number, 2)
    assert sorted(found) == whole(0)
    assert position.epoch == 1


@pytest.mark.parametrize("num_read", [(0, 0), (1, 0), (1, 1), (3, 2), (5, 4), (5, 5)])
@pytest.mark.parametrize("epoch", [0, 1])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_workers_go_on_from_states_of_their_own(num_read: tuple[int, int], epoch: int, order: tuple[int, int]) -> None:
    """Saved at any batch of an iteration, by workers that live on; loaded in any order by other processes."""
    workers = forked(trainer(), 2)
    for _ in range(epoch):
        for number, worker in enumerate(workers):
            read(worker, number, 2)
    for worker in workers:
        worker.rewind()
    states = [worker.next((number, 2)) for number, worker in enumerate(workers)]
    found = []
    for number, worker in enumerate(workers):
        if num_read[number]:
            found += read(worker, number, 2, num_batches=num_read[number])
            states[number] = worker.next((number, 2))
    others = forked(trainer(), 2)
    for number in order:
        load(others[number], states[number], (number, 2))
    for number in order:
        found += read(others[number], number, 2)
    done = num_read == (5, 5)
    assert sorted(found) == [*whole(epoch), *(whole(epoch + 1) if done else ())]


def test_a_state_that_was_loaded_is_void_after_a_newer_position() -> None:
    position = trainer()
    (worker,) = forked(position, 1)
    load(worker, Place(0, 5, of_worker=True), (0, 1))
    position.go_to(Place(2))
    assert worker.next((0, 1)) == Place(2)
    assert read(worker, 0, 1) == whole(2)


def test_states_of_several_moments_are_refused() -> None:
    workers = forked(trainer(), 2)
    load(workers[0], Place(1, 2, of_worker=True), (0, 2))
    load(workers[1], Place(0, 3, of_worker=True), (1, 2))
    with pytest.raises(ConfigError, match="worker 0 is to go on in epoch 1, but another worker has not read the epoch before"):
        workers[0].begin((0, 2))


def test_it_is_known_who_reads() -> None:
    position = trainer()
    assert not position.is_read_by_workers
    (worker,) = forked(position, 1)
    read(worker, 0, 1, num_batches=1)
    assert position.is_read_by_workers
    position.go_to(Place(0))
    assert not position.is_read_by_workers
