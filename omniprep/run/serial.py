"""Map over partitions in this process: the reference semantics, and what a debugger can step through."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_partitions(build: Callable[[], Callable[[Item], Result]], items: Sequence[Item]) -> Iterator[tuple[int, Result]]:
    """Yield (position, result) of every item, in order. `build` is called once, and only if there is an item.

    >>> list(map_partitions(lambda: str.upper, ["a", "b"]))
    [(0, 'A'), (1, 'B')]
    """
    if items:
        function = build()
        for position, item in enumerate(items):
            yield position, function(item)
