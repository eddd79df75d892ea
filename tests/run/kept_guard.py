"""What a Ray worker keeps from one run to the next. Apart from `guard_builders`, which every guarded process imports."""

from omniprep.guarded_rows import GuardedRows
from omniprep.recipe import GuardConfig
from omniprep.sources.partitions import Row
from tests.run.guard_builders import work


def build_row_work():
    return lambda task: work(task.row.value)


class KeptGuard:
    """What a worker process keeps, with a guard that it leaves to its successor."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._rows = GuardedRows(build_row_work, GuardConfig())

    def __call__(self, item: int) -> tuple[str, int]:
        """Return the name, and the process that the guard's children come from."""
        row = Row(index=item, place=str(item), value=("limits",))
        [(_, limits)] = self._rows.map([row], source=0, source_name="chat")
        return self._name, limits["nursery"]

    def hand_over(self, successor: "KeptGuard") -> None:
        self._rows.hand_over(successor._rows)

    def close(self) -> None:
        self._rows.close()
