"""How many workers the nodes of a cluster hold: by their CPUs, their memory and, if asked for, their GPUs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

DEFAULT_WORKER_BYTES = 1_500_000_000
"""What a worker and its decoding process are given where the recipe says nothing. Together they hold about 0.8 GB at their
peak, an hour of 1080p with the fast resize, and 1.4 GB with the exact one, which loads torch."""

Node = Mapping[str, float]
"""What a living node offers: `CPU`, `memory` in bytes, `GPU`."""


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What one worker takes of a node."""

    memory_bytes: int
    num_gpus: float = 0.0

    def num_workers(self, node: Node) -> int:
        """Return how many workers a node holds.

        >>> Needs(memory_bytes=2_000).num_workers({"CPU": 8, "memory": 9_000})
        4
        >>> Needs(memory_bytes=0, num_gpus=0.25).num_workers({"CPU": 8, "GPU": 1})
        4
        """
        limits = [int(node.get("CPU", 0))]
        if self.memory_bytes:
            limits.append(int(node.get("memory", 0) // self.memory_bytes))
        if self.num_gpus:
            # A worker never spreads its share over two GPUs.
            num_gpus = int(node.get("GPU", 0))
            limits.append(num_gpus * int(1 / self.num_gpus) if self.num_gpus <= 1 else int(num_gpus // self.num_gpus))
        return min(limits)


def needs_of(nodes: Sequence[Node], *, memory_bytes: int | None, num_gpus: float) -> Needs:
    """Return what a worker takes: the memory asked for, else the default, or less where every node is smaller."""
    if memory_bytes is None:
        largest = max((int(node.get("memory", 0)) for node in nodes if node.get("CPU", 0) >= 1), default=DEFAULT_WORKER_BYTES)
        memory_bytes = min(DEFAULT_WORKER_BYTES, largest)
    return Needs(memory_bytes=memory_bytes, num_gpus=num_gpus)


def num_workers_that_fit(nodes: Sequence[Node], needs: Needs) -> int:
    """Return how many workers all nodes hold together; 0 if none holds one."""
    return sum(needs.num_workers(node) for node in nodes)


def describe_shortage(nodes: Sequence[Node], needs: Needs) -> str:
    """Return in words what a worker needs and what the nodes offer."""
    gpus = f", {needs.num_gpus:g} GPU" if needs.num_gpus else ""
    offers = [
        f"{node.get('CPU', 0):g} CPU, {node.get('memory', 0) / 1e9:.1f} GB" + (f", {node.get('GPU', 0):g} GPU" if gpus else "")
        for node in nodes
    ]
    offered = "; ".join(offers[:3]) + (f"; and {len(offers) - 3} more" if len(offers) > 3 else "")
    needed = f"1 CPU, {needs.memory_bytes / 1e9:.1f} GB of memory{gpus}"
    return f"a worker needs {needed}, and no node of the cluster has them ({offered or 'it has no node'})"
