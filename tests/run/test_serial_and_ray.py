"""Both executors are the same map; Ray's survives the death of a worker."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from omniprep.errors import ConfigError, Reason, RejectSample
from omniprep.run import serial


def build_square():
    return lambda number: number * number


def build_failing():
    def fail(number: int) -> int:
        raise RejectSample(Reason.MEDIA_EMPTY, f"number {number}", retryable=True)

    return fail


def build_counting(folder: Path):
    """Leave a mark for every time that a worker builds its function."""
    (folder / f"built-{os.getpid()}").open("a").write("x")
    return lambda number: (number, os.getpid(), os.environ.get("OMP_NUM_THREADS"))


def build_dying_once(folder: Path):
    """Die the first time that item 1 is worked on."""

    def work(number: int) -> int:
        mark = folder / "died"
        if number == 1 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), 9)
        return number

    return work


def build_always_dying():
    return lambda number: os.kill(os.getpid(), 9)


def test_serial_keeps_the_order_and_builds_once() -> None:
    built = []

    def build():
        built.append(1)
        return lambda number: number + 1

    assert list(serial.map_partitions(build, [1, 2, 3])) == [(0, 2), (1, 3), (2, 4)]
    assert list(serial.map_partitions(build, [])) == []
    assert built == [1]


@pytest.fixture(scope="module")
def cluster():
    """Start Ray once for this file; a session that is there already is joined and left alone."""
    from omniprep.run import ray as on_ray
    from omniprep.run.ray_cluster import session

    with session(on_ray.RayOptions(num_workers=2)):
        yield on_ray


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore")
class TestRay:
    def test_gives_what_serial_gives(self, cluster) -> None:
        got = dict(cluster.map_partitions(build_square, range(7), cluster.RayOptions(num_workers=2), cache_key="square"))
        assert got == dict(serial.map_partitions(build_square, range(7)))

    def test_builds_once_a_worker_with_one_thread(self, cluster, tmp_path: Path) -> None:
        options = cluster.RayOptions(num_workers=2)
        got = [
            result
            for _, result in cluster.map_partitions(partial(build_counting, tmp_path), range(8), options, cache_key="count")
        ]
        assert {threads for _, _, threads in got} == {"1"}
        marks = {path.name: path.read_text() for path in tmp_path.iterdir()}
        assert marks == {f"built-{pid}": "x" for pid in {pid for _, pid, _ in got}}

    def test_exceptions_arrive_as_they_were(self, cluster) -> None:
        with pytest.raises(RejectSample, match="number 0") as caught:
            list(cluster.map_partitions(build_failing, [0], cache_key="fail"))
        assert (caught.value.reason, caught.value.retryable) == (Reason.MEDIA_EMPTY, True)

    def test_a_dead_workers_partition_is_done_by_another(self, cluster, tmp_path: Path) -> None:
        got = cluster.map_partitions(partial(build_dying_once, tmp_path), range(3), cache_key="once")
        assert dict(got) == {0: 0, 1: 1, 2: 2}
        assert (tmp_path / "died").exists()

    def test_a_worker_that_always_dies_is_told(self, cluster) -> None:
        with pytest.raises(cluster.WorkerLost, match="partition 0: its worker died 2 times"):
            list(cluster.map_partitions(build_always_dying, [0], cluster.RayOptions(max_retries=1), cache_key="die"))


def test_an_address_where_nothing_listens_is_a_config_error() -> None:
    from omniprep.run.ray_cluster import check_reachable

    with pytest.raises(ConfigError, match=r"--address 127.0.0.1:9: no Ray cluster answers there"):
        check_reachable("127.0.0.1:9")


@pytest.mark.ray
def test_a_killed_driver_takes_its_workers_along(tmp_path: Path) -> None:
    """Of a Ray that it started itself. Ray's two agents, which hold nothing, take a minute and are not waited for; about 10 s."""
    code = f"""
import time
from pathlib import Path
from omniprep.run.ray import RayOptions, map_partitions
def build():
    import os, time
    from pathlib import Path
    def work(item):
        Path({str(tmp_path)!r}, str(os.getpid())).touch()
        time.sleep(100)
    return work
list(map_partitions(build, range(9), RayOptions(num_workers=2), cache_key="killed"))
"""
    driver = subprocess.Popen([sys.executable, "-W", "ignore", "-c", code], start_new_session=True)
    wait_until(lambda: len(list(tmp_path.iterdir())) == 2)
    pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal()]
    agents = ("ray::DashboardA", "ray::RuntimeEnv")  # the kernel's names have 15 characters
    group = {pid for pid in pids if descends_from(pid, driver.pid) and not status_of(pid).get("Name", "").startswith(agents)}
    workers = {int(mark.name) for mark in tmp_path.iterdir()}
    assert workers < group
    driver.kill()
    driver.wait()
    wait_until(lambda: not any(is_alive(pid) for pid in group))


def wait_until(true: Callable[[], bool], *, within_s: float = 200.0) -> None:
    deadline = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


def status_of(pid: int) -> dict[str, str]:
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return {}
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def is_alive(pid: int) -> bool:
    return status_of(pid).get("State", "Z")[0] != "Z"


def descends_from(pid: int, ancestor: int) -> bool:
    while pid > 1:
        if pid == ancestor:
            return True
        pid = int(status_of(pid).get("PPid", 0))
    return False
