"""A function runs on several ranks, each a process, as torchrun would start them."""

import multiprocessing
import os
import pickle
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from omniprep.train.parallel import world

TIMEOUT_S = 120.0
_AFTER_A_FAILURE_S = 20.0
_PROCESSES = multiprocessing.get_context("forkserver")
# What takes seconds to import is imported once, in the process that the ranks are forked from.
_PROCESSES.set_forkserver_preload(["torch", "transformers.models.qwen2_5_omni.modeling_qwen2_5_omni", "tests.train.ranks"])


class RankFailed(Exception):
    """A rank raised, or died without a word."""


def free_port() -> int:
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        return int(chosen.getsockname()[1])


def run_ranks(work: Callable[..., Any], num_ranks: int, *arguments: Any) -> list[Any]:
    """Return what `work(world, *arguments)` returns on each rank. Raises `RankFailed` with tracebacks."""
    outcomes = outcomes_of(work, num_ranks, *arguments)
    failed = [f"rank {rank}: {outcome}" for rank, outcome in enumerate(outcomes) if isinstance(outcome, RankFailed)]
    if failed:
        raise RankFailed("\n".join(failed))
    return outcomes


def outcomes_of(work: Callable[..., Any], num_ranks: int, *arguments: Any) -> list[Any]:
    """Return each rank's result, or a `RankFailed` in its place."""
    port = free_port()
    started = []
    for rank in range(num_ranks):
        ours, theirs = _PROCESSES.Pipe(duplex=False)
        process = _PROCESSES.Process(target=_be_rank, args=(theirs, rank, num_ranks, port, work, arguments), daemon=True)
        process.start()
        theirs.close()
        started.append((process, ours))
    try:
        return _outcomes([pipe for _, pipe in started])
    finally:
        for process, pipe in started:
            process.kill()
            process.join()
            pipe.close()


def _outcomes(pipes: list[Connection]) -> list[Any]:
    """Wait for all; when one has failed, the others, which may wait for it for ever, get only a little longer."""
    outcomes: dict[int, Any] = {}
    due_s = time.monotonic() + TIMEOUT_S
    while len(outcomes) < len(pipes):
        left = {pipe: rank for rank, pipe in enumerate(pipes) if rank not in outcomes}
        ready = wait(list(left), max(0.0, due_s - time.monotonic()))
        if not ready:
            outcomes |= dict.fromkeys(left.values(), RankFailed("no answer in time"))
        for pipe in ready:
            outcomes[left[pipe]] = outcome = _outcome(pipe)
            if isinstance(outcome, RankFailed):
                due_s = min(due_s, time.monotonic() + _AFTER_A_FAILURE_S)
    return [outcomes[rank] for rank in range(len(pipes))]


def _outcome(pipe: Connection) -> Any:
    try:
        return pickle.loads(pipe.recv_bytes())
    except EOFError:
        return RankFailed("died")


def _be_rank(
    pipe: Connection, rank: int, num_ranks: int, port: int, work: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    try:
        with world(device="cpu", timeout_s=TIMEOUT_S) as here:
            outcome: Any = work(here, *arguments)
    except Exception:
        outcome = RankFailed(traceback.format_exc())
    pipe.send_bytes(pickle.dumps(outcome))
