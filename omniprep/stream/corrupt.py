"""What is done with records that cannot be read: each is left out, reported once, and too many of them end the run."""

import logging
import threading
from typing import NamedTuple

from omniprep.errors import DatasetError, printable

_log = logging.getLogger(__name__)


class Corrupt(NamedTuple):
    """A record that cannot be read."""

    key: str
    place: str
    """The shard's path or URL."""
    why: str

    def __str__(self) -> str:
        return printable(f"{self.place}: {self.key}: {self.why}")


class CorruptLog:
    """The records that were left out; each counts once, however often it is met. Safe for threads."""

    def __init__(self, *, max_corrupt: int) -> None:
        if max_corrupt < 0:
            raise ValueError(f"{max_corrupt = }, expected 0 or more")
        self._max_corrupt = max_corrupt
        self._found: dict[tuple[str, str], Corrupt] = {}
        self._lock = threading.Lock()

    @property
    def found(self) -> tuple[Corrupt, ...]:
        """Return them in the order in which they were met."""
        with self._lock:
            return tuple(self._found.values())

    def add(self, corrupt: Corrupt) -> None:
        """Report a record. Raises `DatasetError` when there are more than `max_corrupt`."""
        with self._lock:
            if (corrupt.place, corrupt.key) in self._found:
                return
            self._found[corrupt.place, corrupt.key] = corrupt
            num_found = len(self._found)
            first = next(iter(self._found.values()))
        _log.warning("%s; the record is left out", corrupt)
        if num_found > self._max_corrupt:
            raise DatasetError(
                f"{num_found} records cannot be read, which is more than max_corrupt={self._max_corrupt}; the first was {first}; "
                "`omniprep verify` names all of them: build the dataset again, copy it again, or raise max_corrupt"
            )
