"""Which share of a stream is this process's: found, or an error, never a guess."""

import subprocess
import sys
import textwrap

import pytest

from omniprep.errors import ConfigError
from omniprep.stream.ranks import Ranks, find_ranks


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, Ranks(0, 1)),
        ({"RANK": "3", "WORLD_SIZE": "8"}, Ranks(3, 8)),
        ({"WORLD_SIZE": "1"}, Ranks(0, 1)),
        ({"RANK": "0"}, Ranks(0, 1)),
        ({"RANK": "", "WORLD_SIZE": ""}, Ranks(0, 1)),
    ],
)
def test_ranks_of_the_environment(environ: dict[str, str], expected: Ranks) -> None:
    assert find_ranks(environ=environ) == expected


@pytest.mark.parametrize("environ", [{"WORLD_SIZE": "4"}, {"RANK": "one", "WORLD_SIZE": "4"}, {"RANK": "4", "WORLD_SIZE": "4"}])
def test_an_environment_that_does_not_add_up_is_refused(environ: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"WORLD_SIZE|world_size"):
        find_ranks(environ=environ)


def test_one_of_rank_and_world_size_is_not_enough() -> None:
    with pytest.raises(ConfigError, match="both rank and world_size, or neither"):
        find_ranks(1, environ={})


def test_given_ranks_are_those_of_data_parallelism() -> None:
    """Eight processes in four groups of two: the two of a group read the same."""
    assert find_ranks(2, 4, environ={"RANK": "5", "WORLD_SIZE": "8"}) == Ranks(2, 4)


@pytest.mark.parametrize(("rank", "world_size", "said"), [(0, 3, "divides"), (0, 16, "divides"), (0, 8, "is rank 5 of 8")])
def test_given_ranks_that_contradict_the_job_are_refused(rank: int, world_size: int, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        find_ranks(rank, world_size, environ={"RANK": "5", "WORLD_SIZE": "8"})


def test_a_process_group_counts_before_the_environment() -> None:
    code = textwrap.dedent(
        """
        import tempfile, torch.distributed as dist
        from omniprep.stream.ranks import find_ranks
        dist.init_process_group("gloo", init_method=f"file://{tempfile.mktemp()}", rank=0, world_size=1)
        print(find_ranks(environ={"RANK": "3", "WORLD_SIZE": "8"}))
        """
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert ended.stdout.strip() == "Ranks(rank=0, world_size=1)"
