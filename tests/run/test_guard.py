"""A guarded function: whatever happens to its process, exactly one outcome an item, in order, and nothing left behind."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omniprep.errors import ConfigError, Reason, RejectSample
from omniprep.run import guard as guard_module
from omniprep.run import ray_cluster
from omniprep.run.guard import Fault, Guard, GuardLimits
from tests.run.guard_builders import (
    array_in,
    build_guarded_partition,
    build_in,
    build_missing_tokenizer,
    build_nothing,
    build_threads,
    build_work,
    is_running,
)
from tests.run.kept_guard import KeptGuard

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="looks at processes through Linux's /proc")


@pytest.fixture(autouse=True)
def builders_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """A guard's process has the parent's path, and the builders are found there."""
    monkeypatch.syspath_prepend(str(ROOT))


@pytest.fixture
def guard() -> Iterator[Guard]:
    with Guard(build_work, GuardLimits(timeout_s=20.0, memory_bytes=200 << 20)) as guard:
        yield guard


@pytest.fixture
def hasty() -> Iterator[Guard]:
    with Guard(build_work, GuardLimits(timeout_s=0.5)) as guard:
        yield guard


def wait_until(condition, *, timeout_s: float = 10.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def open_fds() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def children() -> set[str]:
    return {pid for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()}


def test_many_small_items_keep_their_order(guard: Guard) -> None:
    assert list(guard.map(range(10_000))) == list(range(10_000))
    assert guard.num_restarts == 0


def test_nothing_starts_before_there_is_an_item(guard: Guard) -> None:
    before = children()
    assert list(guard.map([])) == []
    assert children() == before


@pytest.mark.parametrize(
    ("item", "kind", "detail"),
    [
        (("segfault",), "crash", r"killed by signal 11 \(SIGSEGV\)"),
        (("abort",), "crash", r"killed by signal 6 \(SIGABRT\)"),
        (("kill", signal.SIGKILL), "crash", r"killed by signal 9 \(SIGKILL\); the machine may be short of memory"),
        (("exit", 3), "crash", "ended with exit code 3"),
        (("sys.exit", 4), "crash", "ended with exit code 4"),
        (("panic",), "crash", "Panic: index out of bounds"),
        (("eat", 2 << 30), "memory", "took more than 0.195 GiB of memory"),
        (("allocate", 20 << 30), "memory", "an allocation failed: MemoryError"),
    ],
)
def test_a_process_that_fails_costs_its_item(guard: Guard, item: tuple, kind: str, detail: str) -> None:
    outcomes = list(guard.map([1, item, 2]))
    assert outcomes[::2] == [1, 2]
    assert outcomes[1].kind == kind
    assert re.fullmatch(detail, outcomes[1].detail)


@pytest.mark.parametrize("item", [("loop in python",), ("loop in C",), ("sleep", 60.0)])
def test_a_process_that_hangs_costs_its_item_and_the_time_limit(hasty: Guard, item: tuple) -> None:
    list(hasty.map([0]))
    started = time.monotonic()
    assert list(hasty.map([1, item, 2])) == [1, Fault(kind="timeout", detail="no result within 0.5 s"), 2]
    assert 0.5 <= time.monotonic() - started < 5.0
    assert hasty.num_restarts == 1


@pytest.mark.parametrize(
    "faulty", [{0}, {9}, {4, 5}, {0, 1, 2}, {7, 8, 9}, set(range(10))], ids=lambda faulty: "-".join(map(str, sorted(faulty)))
)
def test_faults_anywhere_leave_the_others_alone(guard: Guard, faulty: set[int]) -> None:
    outcomes = list(guard.map([("exit", number) if number in faulty else number for number in range(10)]))
    ends = {number: Fault(kind="crash", detail=f"ended with exit code {number}") for number in faulty}
    assert outcomes == [ends.get(number, number) for number in range(10)]


@settings(max_examples=30)
@given(st.lists(st.sampled_from(["ok"] * 6 + ["crash"] * 3 + ["hang"]), max_size=12))
def test_any_sequence_has_one_outcome_an_item(shared: SimpleNamespace, fates: list[str]) -> None:
    verbs = {"crash": ("segfault",), "hang": ("sleep", 60.0)}
    items = [verbs.get(fate, number) for number, fate in enumerate(fates)]
    outcomes = list(shared.guard.map(items))
    kinds = {"crash": "crash", "hang": "timeout"}
    assert [out.kind if isinstance(out, Fault) else out for out in outcomes] == [
        kinds.get(fate, number) for number, fate in enumerate(fates)
    ]


@pytest.fixture(scope="module")
def shared() -> Iterator[SimpleNamespace]:
    """Return a guard that all examples of a property use; each begins where the last one left it."""
    with Guard(build_work, GuardLimits(timeout_s=0.3)) as guard:
        yield SimpleNamespace(guard=guard)


def test_an_item_is_not_charged_with_what_an_earlier_one_broke(guard: Guard) -> None:
    items = [("crash later", 0.05, 0), ("sleep", 0.3), 2, ("sleep", 0.1)]
    assert list(guard.map(items)) == [b"", *items[1:]]
    assert guard.num_restarts == 1


def test_an_item_is_not_charged_with_what_earlier_ones_leaked(guard: Guard) -> None:
    items = [("leak", 70 << 20)] * 6
    assert list(guard.map(items)) == items
    assert 1 <= guard.num_restarts <= 3


def test_an_answer_cut_in_the_middle_is_no_answer(guard: Guard) -> None:
    size = 8 << 20
    outcomes = guard.map([0, ("crash later", 0.3, size), 2])
    assert next(outcomes) == 0
    time.sleep(1.0)  # the child waits with a full pipe, and dies
    assert next(outcomes) == bytes(size)
    assert list(outcomes) == [2]
    assert guard.num_restarts >= 1


def test_a_slow_consumer_is_not_charged_to_the_items(hasty: Guard) -> None:
    outcomes = []
    for outcome in hasty.map([("bytes", 3 << 20)] * 3):
        time.sleep(0.7)
        outcomes.append(len(outcome))
    assert outcomes == [3 << 20] * 3


def test_an_exception_comes_back_as_it_was(guard: Guard) -> None:
    outcomes = guard.map([1, ("reject", "photo.jpg: cut off"), 2])
    assert next(outcomes) == 1
    with pytest.raises(RejectSample) as caught:
        next(outcomes)
    assert (caught.value.reason, caught.value.detail, caught.value.retryable) == (
        Reason.MEDIA_CORRUPT,
        "photo.jpg: cut off",
        True,
    )
    assert "in work\n    raise RejectSample" in caught.value.__notes__[0]
    assert list(outcomes) == []
    assert list(guard.map([3])) == [3]


def test_an_exception_that_does_not_pickle_comes_back_in_words(guard: Guard) -> None:
    with pytest.raises(RuntimeError, match=r"^Unusual: 1 and 2\nIn the guarded process:\nTraceback"):
        list(guard.map([("unusual",)]))


def test_a_result_that_does_not_pickle_is_told(guard: Guard) -> None:
    with pytest.raises(TypeError, match=r"result of a guarded function must pickle, but function does not: .*lambda"):
        list(guard.map([("lambda",)]))


def test_an_exception_of_the_items_ends_the_map(guard: Guard) -> None:
    def items() -> Iterator[int]:
        yield from range(100)
        raise OSError("disk full")

    outcomes = guard.map(items())
    assert [next(outcomes) for _ in range(64)] == list(range(64))
    with pytest.raises(OSError, match="disk full"):
        next(outcomes)


@pytest.mark.parametrize("order", ["C", "F", "strided"])
def test_arrays_arrive_as_they_were(guard: Guard, order: str) -> None:
    array = array_in(order)
    ((outcome),) = guard.map([("double", array)])
    np.testing.assert_array_equal(outcome["array"], array * 2)
    outcome["array"][0, 0] = 1  # writable, as the function's own would be


def test_large_items_and_answers_go_both_ways() -> None:
    large = os.urandom(50_000_000)
    with Guard(build_work) as guard:
        assert list(guard.map([large, b"", large[:70_000], ("bytes", 50_000_000)])) == [
            large,
            b"",
            large[:70_000],
            bytes(50_000_000),
        ]


@pytest.mark.parametrize(("size", "most_ahead"), [(10, 64), (300_000, 4), (1_100_000, 1)])
def test_items_are_read_ahead_by_a_batch_at_most(guard: Guard, size: int, most_ahead: int) -> None:
    num_read = 0

    def items() -> Iterator[bytes]:
        nonlocal num_read
        for _ in range(150):
            num_read += 1
            yield bytes(size)

    ahead = [num_read - done for done, _ in enumerate(guard.map(items()))]
    assert max(ahead) == most_ahead


def test_a_map_left_in_the_middle_does_not_spoil_the_next(guard: Guard) -> None:
    outcomes = guard.map(range(200))
    assert [next(outcomes) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(RuntimeError, match="one map at a time"):
        next(guard.map([1]))
    outcomes.close()
    assert list(guard.map("abc")) == ["a", "b", "c"]


def test_the_function_is_built_once_whatever_happens_to_children(tmp_path: Path) -> None:
    with Guard(partial(build_in, tmp_path)) as guard:
        assert len(list(guard.map([1, ("abort",), 2, ("abort",), ("abort",)]))) == 5
        assert list(guard.map([3])) == [3]
    assert (tmp_path / "built").read_text() == "x"


def test_another_function_is_built_in_the_same_process(tmp_path: Path, guard: Guard) -> None:
    before = next(iter(guard.map([("limits",)])))
    guard.rebuild(partial(build_in, tmp_path))
    after, fault, last = guard.map([("limits",), ("abort",), 3])
    assert (tmp_path / "built").read_text() == "x"
    assert after["nursery"] == before["nursery"]
    assert after["pid"] != before["pid"]
    assert (fault.kind, last) == ("crash", 3)
    assert not is_running(before["pid"])


@pytest.mark.parametrize("used", [False, True], ids=["before its first item", "after its process was lost"])
def test_a_guard_that_has_no_process_can_be_rebuilt(tmp_path: Path, guard: Guard, used: bool) -> None:
    if used:
        limits = next(iter(guard.map([("limits",)])))
        os.kill(limits["nursery"], signal.SIGKILL)
        assert wait_until(lambda: not is_running(limits["nursery"]))
    guard.rebuild(partial(build_in, tmp_path))
    assert list(guard.map([1])) == [1]
    assert (tmp_path / "built").read_text() == "x"


def test_a_guard_survives_a_builder_that_fails(guard: Guard) -> None:
    guard.rebuild(build_missing_tokenizer)
    with pytest.raises(ConfigError, match="tokenizer: no such file"):
        list(guard.map([1]))
    guard.rebuild(build_work)
    assert list(guard.map([1])) == [1]


def test_a_guard_is_not_rebuilt_in_the_middle_of_a_map(guard: Guard) -> None:
    outcomes = guard.map([1, 2])
    assert next(outcomes) == 1
    with pytest.raises(RuntimeError, match="one map at a time"):
        guard.rebuild(build_nothing)
    assert list(outcomes) == [2]


def test_an_item_that_fails_alone_is_tried_twice_and_a_hang_once(tmp_path: Path, hasty: Guard) -> None:
    assert hasty.num_restarts == 0
    assert [type(out) for out in hasty.map([0, ("abort",)])] == [int, Fault]
    assert hasty.num_restarts == 1
    assert [type(out) for out in hasty.map([0, ("sleep", 9.0)])] == [int, Fault]
    assert hasty.num_restarts == 2


def test_an_exception_of_the_builder_comes_back_as_it_was() -> None:
    with Guard(build_missing_tokenizer) as guard, pytest.raises(ConfigError, match="tokenizer: no such file"):
        list(guard.map([1]))


def test_a_builder_that_starts_threads_is_told() -> None:
    with Guard(build_threads) as guard, pytest.raises(RuntimeError, match=r"started threads \(MainThread, pool-0\)"):
        list(guard.map([1]))


def test_a_process_that_cannot_start_is_told_after_a_few_tries() -> None:
    with Guard(build_nothing) as guard, pytest.raises(RuntimeError, match=r"lost 3 times in a row.*exit code 7.*fewer workers"):
        list(guard.map([1]))


def test_the_loss_of_the_nursery_costs_no_item(guard: Guard) -> None:
    limits = next(iter(guard.map([("limits",)])))
    outcomes = guard.map([1, ("sleep", 0.5), 2])
    assert next(outcomes) == 1
    os.kill(limits["nursery"], signal.SIGKILL)
    assert list(outcomes) == [("sleep", 0.5), 2]
    assert wait_until(lambda: not is_running(limits["pid"]))


def test_an_item_that_always_kills_the_nursery_ends_the_map(guard: Guard) -> None:
    outcomes = guard.map([1, ("kill nursery",)])
    assert next(outcomes) == 1
    with pytest.raises(RuntimeError, match=r"lost 3 times in a row.*SIGKILL"):
        next(outcomes)


def test_a_child_is_limited_and_single_threaded(guard: Guard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("/some/where")
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    (tmp_path / "struct.py").write_text("raise RuntimeError('not this one')")
    (limits,) = guard.map([("limits",)])
    expected = {"core": 0, "oom": "1000", "omp": "1", "folder": str(tmp_path), "path": sys.path}
    assert {name: limits[name] for name in expected} == expected
    assert limits["session"] == limits["nursery"] != os.getsid(0)
    assert len(list(Path(f"/proc/{limits['nursery']}/task").iterdir())) == 1


def test_an_interrupt_is_for_the_parent(guard: Guard) -> None:
    outcomes = guard.map([("limits",), ("sleep", 0.3), 2])
    limits = next(outcomes)
    os.kill(limits["pid"], signal.SIGINT)
    os.kill(limits["nursery"], signal.SIGINT)
    assert list(outcomes) == [("sleep", 0.3), 2]
    assert guard.num_restarts == 0


def test_what_a_function_prints_does_not_reach_the_output(guard: Guard, capfd: pytest.CaptureFixture[str]) -> None:
    list(guard.map([("print", "from a decoder"), ("segfault",)]))
    guard.close()
    shown = capfd.readouterr()
    assert shown.out == ""
    assert "Fatal Python error" not in shown.err


def test_closing_leaves_no_process_and_no_file() -> None:
    num_fds, before = open_fds(), children()
    for _ in range(3):
        with Guard(build_work, GuardLimits(timeout_s=0.2)) as guard:
            limits, *_ = guard.map([("limits",), ("abort",), 1, ("sleep", 5.0), ("exit", 0), 2])
            assert open_fds() > num_fds
            assert children() > before
    assert open_fds() == num_fds
    assert children() == before
    assert not is_running(limits["nursery"])


def test_faults_leave_no_file_open(guard: Guard) -> None:
    list(guard.map([1]))
    num_fds = open_fds()
    list(guard.map([("abort",)] * 10 + [1]))
    assert open_fds() == num_fds


@pytest.mark.parametrize(("verb", "kind"), [("hang with a program", "timeout"), ("crash with a program", "crash")])
def test_programs_that_an_item_started_end_with_it(hasty: Guard, tmp_path: Path, verb: str, kind: str) -> None:
    (outcome,) = hasty.map([(verb, str(tmp_path))])
    child, _, program = map(int, (tmp_path / "pids").read_text().split())
    assert outcome.kind == kind
    assert wait_until(lambda: not is_running(child) and not is_running(program))


def run_python(code: str, *, ending: tuple[str, ...] = (), **options) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *(ending or ("-c", code))],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


HANGING = """
from functools import partial
from pathlib import Path
from omniprep.run.guard import Guard
from tests.run import guard_builders
with Guard(guard_builders.build_work) as guard:
    list(guard.map([1, ("hang with a program", {folder!r})]))
"""
BUILDING = """
from functools import partial
from pathlib import Path
from omniprep.run.guard import Guard
from tests.run import guard_builders
with Guard(partial(guard_builders.build_forever, Path({folder!r}))) as guard:
    list(guard.map([1]))
"""


def pids_in(folder: Path) -> list[int]:
    assert wait_until(lambda: (folder / "pids").exists() and (folder / "pids").read_text().endswith("\n"), timeout_s=30.0)
    return [int(pid) for pid in (folder / "pids").read_text().split()]


def test_the_death_of_the_parent_ends_all(tmp_path: Path) -> None:
    parent = run_python(HANGING.format(folder=str(tmp_path)))
    pids = pids_in(tmp_path)
    assert all(map(is_running, pids))
    parent.kill()
    parent.communicate()
    assert len(pids) == 3
    assert wait_until(lambda: not any(map(is_running, pids)))


def test_the_death_of_the_parent_is_seen_while_another_process_holds_its_socket(tmp_path: Path) -> None:
    """As after a fork by some other library: the nursery's socket stays open."""
    forking = "import os, sys, time\nif os.fork() == 0: time.sleep(20); os._exit(0)\n"
    code = HANGING.format(folder=str(tmp_path)).replace("list(guard", "list(guard.map([0]))\n    exec({0!r})\n    list(guard")
    parent = run_python(code.format(forking), start_new_session=True)
    pids = pids_in(tmp_path)
    parent.kill()
    try:
        assert wait_until(lambda: not any(map(is_running, pids)))
    finally:
        os.killpg(parent.pid, signal.SIGKILL)  # the fork
        parent.communicate()


@pytest.mark.parametrize("code", [HANGING, BUILDING], ids=["working", "building"])
def test_an_interrupted_parent_ends_all(tmp_path: Path, code: str) -> None:
    parent = run_python(code.format(folder=str(tmp_path)), start_new_session=True)
    pids = pids_in(tmp_path)
    os.killpg(parent.pid, signal.SIGINT)
    _, errors = parent.communicate(timeout=10)
    assert parent.returncode == -signal.SIGINT
    assert errors.count("KeyboardInterrupt") == 1
    assert not any(map(is_running, pids))


PROGRAM = """
from omniprep.run.guard import Guard
from tests.run.guard_builders import build_work
if __name__ == "__main__":
    with Guard(build_work) as guard:
        print([getattr(outcome, "kind", outcome) for outcome in guard.map([1, ("abort",), 2])])
"""


@pytest.mark.parametrize("way", ["command", "script", "standard input", "module"])
def test_it_works_however_the_program_was_started(tmp_path: Path, way: str) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    ending = {"command": ("-c", PROGRAM), "script": ("program.py",), "standard input": ("-",), "module": ("-m", "program")}[way]
    program = run_python("", ending=ending, cwd=tmp_path, stdin=subprocess.PIPE)
    output, errors = program.communicate(PROGRAM if way == "standard input" else "", timeout=60)
    assert (output, errors, program.returncode) == ("[1, 'crash', 2]\n", "", 0)


def test_a_builder_that_cannot_be_imported_is_told(tmp_path: Path) -> None:
    code = PROGRAM.replace("from tests.run.guard_builders import build_work", "def build_work():\n    return abs\n")
    program = run_python(code)
    _, errors = program.communicate(timeout=60)
    assert "TypeError: Can't get attribute 'build_work' on <module '__main__'" in errors
    assert "must be in a module that can be imported" in errors


def test_threads_of_the_parent_have_guards_of_their_own() -> None:
    """As in a Ray worker: fork and exec must be safe whatever other threads do."""
    stop = threading.Event()
    noise = [
        threading.Thread(target=lambda: [stop.is_set() or len(os.urandom(1000)) for _ in iter(stop.is_set, True)])
        for _ in range(2)
    ]
    found: dict[int, list] = {}

    def guarded(number: int) -> None:
        with Guard(build_work, GuardLimits(timeout_s=20.0)) as guard:
            found[number] = [getattr(out, "kind", out) for out in guard.map([number, ("abort",), *range(500)])]

    workers = [threading.Thread(target=guarded, args=(number,)) for number in range(4)]
    for thread in [*noise, *workers]:
        thread.start()
    for thread in workers:
        thread.join()
    stop.set()
    for thread in noise:
        thread.join()
    assert found == {number: [number, "crash", *range(500)] for number in range(4)}


@pytest.mark.ray
def test_a_ray_worker_can_guard() -> None:
    from omniprep.run import ray

    parts = [[1, ("segfault",), 2], [("loop in C",), 3]]
    outcomes = dict(ray.map_partitions(build_guarded_partition, parts, ray.RayOptions(num_workers=2), cache_key="guard"))
    assert outcomes == {
        0: [1, Fault(kind="crash", detail="killed by signal 11 (SIGSEGV)"), 2],
        1: [Fault(kind="timeout", detail="no result within 1 s"), 3],
    }


@pytest.mark.ray
def test_a_ray_worker_keeps_the_guarded_process_for_the_next_run() -> None:
    from omniprep.run import ray

    options = ray.RayOptions(num_workers=1)
    with ray_cluster.session(options):
        first, second = (
            dict(ray.map_partitions(partial(KeptGuard, name), [1, 2], options, cache_key=name)) for name in ("first", "second")
        )
    assert [name for name, _ in (*first.values(), *second.values())] == ["first", "first", "second", "second"]
    assert len({nursery for _, nursery in (*first.values(), *second.values())}) == 1


def test_what_it_costs() -> None:
    """The limits are loose, for a busy machine; the figures printed (`pytest -s`) are in the decision note."""
    with Guard(build_work) as guard:
        list(guard.map([0]))

        def seconds(items: list) -> float:
            started = time.perf_counter()
            for _ in guard.map(items):
                pass
            return time.perf_counter() - started

        small_s = seconds([{"text": "a conversation " * 20}] * 10_000) / 10_000
        megabytes_s = seconds([("bytes", 1 << 20)] * 1_000) / 1_000
        crash_s = seconds([("abort",)] * 100) / 100
        again_s = seconds([{"text": "a conversation " * 20}] * 10_000) / 10_000
    print(
        f"\nsmall item: {small_s * 1e6:.1f} us, after 100 crashes {again_s * 1e6:.1f} us; answers of 1 MiB: "
        f"{(1 << 20) / megabytes_s / 1e9:.2f} GB/s; crash and restart: {crash_s * 1e3:.2f} ms"
    )
    assert small_s < 1e-3
    assert megabytes_s < 20e-3
    assert crash_s < 0.2


@pytest.mark.parametrize("limits", [{"timeout_s": 0.0}, {"memory_bytes": 0}])
def test_limits_must_be_positive(limits: dict) -> None:
    with pytest.raises(ValueError, match="limits must be positive"):
        GuardLimits(**limits)


def test_where_a_system_does_not_tell_memory_the_allocation_limit_is_left(guard: Guard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard_module._Memory, "read", lambda self: 0)
    (outcome,) = guard.map([("eat", 2 << 30)])
    assert outcome == Fault(kind="memory", detail="an allocation failed: MemoryError")
