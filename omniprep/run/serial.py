"""Map over partitions in this process: the reference semantics, and what a debugger can step through."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from omniprep.run import metrics

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_partitions(
    build: Callable[[], Callable[[Item], Result]],
    items: Iterable[Item],
    *,
    on_progress: Callable[[metrics.Totals], None] | None = None,
) -> Iterator[tuple[int, Result]]:
    """Yield (position, result) of every item, in order. `build` is called once, and only if there is an item.

    `on_progress` is told, at most once a second, what the unfinished item has counted (`omniprep.run.metrics`).

    >>> list(map_partitions(lambda: str.upper, ["a", "b"]))
    [(0, 'A'), (1, 'B')]
    """
    function: Callable[[Item], Result] | None = None
    for position, item in enumerate(items):
        function = function or build()
        with metrics.collecting(on_progress):
            result = function(item)
        yield position, result
