"""What rows will cost, from headers alone, in a guarded process: headers may be hostile too."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice

from omniprep.encode.estimate import Estimate
from omniprep.encode.thinker import ThinkerEncoder
from omniprep.errors import RejectSample
from omniprep.guarded_rows import GuardedRows, RowTask
from omniprep.partition_size import choose_rows_per_partition
from omniprep.profile import QWEN2_5_OMNI, ModelProfile
from omniprep.recipe import Recipe
from omniprep.sources.media_store import MediaStore
from omniprep.sources.partitions import Row

_PARTITIONS_PROBED, _ROWS_OF_EACH = 8, 4
_FIRST_CUT = 1000


class RowProber:
    """Rows in, estimates out; built once in the guarded process."""

    def __init__(self, recipe: Recipe, profile: ModelProfile = QWEN2_5_OMNI) -> None:
        located = recipe.located()
        self._sources, self._store = located.sources, MediaStore(located.media)
        self._encoder = ThinkerEncoder(located.encode, profile)

    def __call__(self, task: RowTask) -> Estimate | RejectSample:
        """Return what a row will cost, or why it cannot be used."""
        row = task.row
        try:
            if row.error is not None:
                raise row.error
            record = self._sources[task.source].to_record(row.value)
            return self._encoder.estimate(record, resolve=partial(self._store.resolve, base=row.base))
        except RejectSample as error:
            return error


@dataclass(frozen=True)
class BuildProber:
    """Makes a `RowProber` in another process."""

    recipe: Recipe

    def __call__(self) -> RowProber:
        """Return it."""
        return RowProber(self.recipe)


def choose_rows(recipe: Recipe, position: int) -> int:
    """Return how many rows of a source make a good partition, from the headers of a few rows spread over it.

    It depends on the rows alone, never on the machine, for it shows in the dataset. `recipe` has its paths located.
    """
    source = recipe.sources[position]
    parts = source.partitions(rows_per_partition=_FIRST_CUT)
    step = max(1, len(parts) // _PARTITIONS_PROBED)

    def rows() -> Iterator[Row]:
        for part in parts[::step][:_PARTITIONS_PROBED]:
            yield from islice(source.read(part), _ROWS_OF_EACH)

    prober: GuardedRows[Estimate | RejectSample] = GuardedRows(BuildProber(recipe), recipe.run.guard)
    try:
        outcomes = list(prober.map(rows(), source=position, source_name=source.name))
    finally:
        prober.close()
    estimates = [outcome for _, outcome in outcomes if isinstance(outcome, Estimate)]
    if not estimates:  # a rejected row is kept whole until its partition ends, so large ones make small partitions too
        estimates = [Estimate(num_tokens=1000, stored_bytes=max(20_000, len(row.raw))) for row, _ in outcomes]
    return choose_rows_per_partition(estimates, num_rows=sum(part.num_rows for part in parts))
