"""A real cluster of several nodes on this machine, and what happens to them.

Nodes are raylets of one CPU each below a head without any; two to three minutes in all, most of it starting processes.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

import omniprep
from omniprep.errors import ConfigError
from omniprep.run import metrics
from omniprep.run.ray import RayOptions, WorkerLost, map_partitions
from omniprep.run.ray_cluster import DRIVER_ENVIRONMENT

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore")]

ROOT = Path(__file__).parents[2]
MB = 1 << 20
OBJECT_STORE = 80 * MB
NUM_MANY = int(os.environ.get("NUM_MANY", "3000"))
WAIT_S = 200.0
"""It only ends what hangs."""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def wait_until(true: Callable[[], bool], *, within_s: float = WAIT_S) -> None:
    deadline = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


# What the workers run. Each item leaves a line "item pid node" in `folder/began`.


def mark(folder: Path, item: int) -> str:
    """Return the node, too."""
    import ray

    node = ray.get_runtime_context().get_node_id()
    with (folder / "began").open("a") as file:
        file.write(f"{item} {os.getpid()} {node}\n")
    return str(node)


def marks(folder: Path) -> list[tuple[int, int, str]]:
    if not (folder / "began").exists():
        return []
    return [(int(item), int(pid), node) for item, pid, node in map(str.split, (folder / "began").read_text().splitlines())]


def build_slow(folder: Path, seconds: float):
    def work(item: int) -> tuple[int, int]:
        mark(folder, item)
        time.sleep(seconds)
        return item * item, os.getpid()

    return work


def build_stuck(folder: Path, *, node: str = "", item: int = -1):
    """Never end what runs on `node`, nor the first try at `item`."""

    def work(number: int) -> tuple[int, int]:
        here = mark(folder, number)
        num_tries = sum(found == number for found, *_ in marks(folder))
        while here == node or (number == item and num_tries == 1):
            time.sleep(1)
        time.sleep(0.1)
        return number * number, os.getpid()

    return work


def wait_for_processes(folder: Path, num_processes: int) -> None:
    wait_until(lambda: len({pid for _, pid, _ in marks(folder)}) >= num_processes)


def build_together(folder: Path, num_processes: int):
    """After the first item, go on when so many processes are at work: some take long to start."""

    def work(item: int) -> tuple[int, int]:
        mark(folder, item)
        if item > 0:
            wait_for_processes(folder, num_processes)
        time.sleep(0.3)
        return item * item, os.getpid()

    return work


def build_deadly(folder: Path, deadly: tuple[int, ...]):
    def work(item: int) -> int:
        mark(folder, item)
        if item in deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        return item

    return work


def build_counting(folder: Path):
    """Count ten rows; item 1 dies after them the first time."""

    def work(item: int) -> int:
        for _ in range(10):
            metrics.count(metrics.ROWS, source="chat", outcome="stored")
            time.sleep(0.2)
        if item == 1 and not (folder / "died").exists():
            (folder / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return item

    return work


def build_needing(module: str):
    def work(item: int) -> int:
        __import__(module)
        return item

    return work


def build_gpu(folder: Path):
    import ray

    def work(item: int) -> tuple[int, str, bool]:
        mark(folder, item)
        if item == 2 and sum(found == 2 for found, *_ in marks(folder)) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if item > 0:
            wait_for_processes(folder, 2)
        time.sleep(0.3)
        return os.getpid(), os.environ["CUDA_VISIBLE_DEVICES"], ray.get_runtime_context().get_actor_id() is not None

    return work


@pytest.fixture(scope="module")
def cluster() -> Iterator["object"]:
    """A head without CPUs and one node of one CPU; tests add what they break."""
    os.environ.update(DRIVER_ENVIRONMENT)
    from ray.cluster_utils import Cluster

    port = free_port()
    head = {
        "num_cpus": 0,
        "include_dashboard": False,
        "ray_client_server_port": port,
        "object_store_memory": OBJECT_STORE,
        # A node is dead after three looks, one a second, at which nobody is there; one that is only slow to answer lives.
        "_system_config": {
            "health_check_period_ms": 1000,
            "health_check_timeout_ms": 30_000,
            "health_check_failure_threshold": 3,
        },
    }
    cluster = Cluster(initialize_head=True, head_node_args=head)
    cluster.client_address = f"ray://127.0.0.1:{port}"
    cluster.add_node(num_cpus=1, object_store_memory=OBJECT_STORE)
    yield cluster
    cluster.shutdown()


@pytest.fixture
def extra_node(cluster):
    """Return a function that adds a node for this test."""
    added = []

    def add(**options):
        added.append(cluster.add_node(**{"num_cpus": 1, "object_store_memory": OBJECT_STORE, **options}))
        return added[-1]

    yield add
    for node in added:
        if node in cluster.worker_nodes:
            cluster.remove_node(node, allow_graceful=False)


def driver(code: str, **environment: str) -> subprocess.Popen:
    """Start a process of its own that runs `code` with this file's names."""
    start = f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import ray.cloudpickle, test_cluster
        ray.cloudpickle.register_pickle_by_value(test_cluster)  # the nodes need not find this file
        from test_cluster import *
    """
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(start) + textwrap.dedent(code)],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )


def output_of_client(code: str, **environment: str) -> str:
    """Start a driver again while Ray's proxy cannot start its server for it.

    The proxy forks that while other threads of its own are in gRPC; now and then, on a busy machine, the child is dead at once.
    """
    for _ in range(3):
        process = driver(code, **environment)
        out, err = process.communicate(timeout=WAIT_S)
        if "Starting Ray client server failed" not in err:
            break
    assert process.returncode == 0, err
    return out


def output_of(process: subprocess.Popen) -> str:
    out, err = process.communicate(timeout=WAIT_S)
    assert process.returncode == 0, err
    return out


def test_a_node_killed_in_the_middle_loses_nothing(
    cluster, extra_node, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    node = extra_node()

    def kill_while_it_works() -> None:
        wait_until(lambda: any(found == node.node_id for *_, found in marks(tmp_path)))
        node.kill_raylet()

    killer = threading.Thread(target=kill_while_it_works)
    killer.start()
    build = partial(build_stuck, tmp_path, node=node.node_id)
    results = map_partitions(build, range(8), RayOptions(address=cluster.address), cache_key="node")
    got = [(position, square) for position, (square, _) in results]
    killer.join()
    assert sorted(got) == [(number, number * number) for number in range(8)]
    begun = [item for item, *_ in marks(tmp_path)]
    assert len(begun) == 9, "one item was on the node that died, and was begun again"
    assert capsys.readouterr().out == "", "stdout belongs to the command"


def test_a_worker_killed_from_outside_loses_nothing(cluster, tmp_path: Path) -> None:
    got = []
    options = RayOptions(address=cluster.address, max_retries=1)
    build = partial(build_stuck, tmp_path, item=1)
    for position, (square, _) in map_partitions(build, range(5), options, cache_key="worker"):
        got.append((position, square))
        if len(got) == 1:
            wait_until(lambda: len(marks(tmp_path)) == 2)
            os.kill(marks(tmp_path)[-1][1], signal.SIGKILL)
    assert sorted(got) == [(number, number * number) for number in range(5)]
    assert len(marks(tmp_path)) == 6


def test_a_node_that_joins_late_is_used(cluster, extra_node, tmp_path: Path) -> None:
    late = None
    build = partial(build_together, tmp_path, 2)
    for _ in map_partitions(build, range(16), RayOptions(address=cluster.address), cache_key="late"):
        late = late or extra_node()
    assert late is not None
    assert {node for *_, node in marks(tmp_path)} >= {late.node_id}
    assert len(marks(tmp_path)) == 16


def test_what_cannot_be_done_is_told_after_the_rest_is_done(cluster, tmp_path: Path) -> None:
    done = []
    results = map_partitions(
        partial(build_deadly, tmp_path, (1, 3)),
        range(6),
        RayOptions(address=cluster.address, max_retries=1),
        cache_key="deadly",
        name_of=lambda item: f"partition chat-{item:05d}",
    )
    with pytest.raises(WorkerLost) as caught:
        done.extend(position for position, _ in results)
    assert sorted(done) == [0, 2, 4, 5]
    assert "partition chat-00001: its worker died 2 times" in str(caught.value)
    assert "partition chat-00003: its worker died 2 times" in str(caught.value)
    assert sorted(item for item, *_ in marks(tmp_path)) == [0, 1, 1, 2, 3, 3, 4, 5]


def test_a_run_in_which_every_partition_dies_stops_early(cluster, tmp_path: Path) -> None:
    every = tuple(range(100))
    with pytest.raises(WorkerLost, match="and 5 more; stopped, for nothing was finished between them"):
        list(
            map_partitions(
                partial(build_deadly, tmp_path, every),
                every,
                RayOptions(address=cluster.address, max_retries=0),
                cache_key="hopeless",
            )
        )
    assert len(marks(tmp_path)) <= 12


def test_a_killed_driver_takes_its_tasks_along_and_another_can_follow(cluster, tmp_path: Path) -> None:
    first = driver(f"""
        options = RayOptions(address={cluster.address!r})
        list(map_partitions(partial(build_slow, Path({str(tmp_path)!r}), 0.2), range(1000), options, cache_key="first"))
    """)
    wait_until(lambda: len(marks(tmp_path)) >= 3)
    first.send_signal(signal.SIGKILL)
    first.wait()
    pid = marks(tmp_path)[-1][1]
    wait_until(lambda: not Path(f"/proc/{pid}").exists())
    num_begun = len(marks(tmp_path))
    (tmp_path / "second").mkdir()
    build = partial(build_slow, tmp_path / "second", 0.0)
    again = map_partitions(build, range(3), RayOptions(address=cluster.address), cache_key="second")
    assert sorted(position for position, _ in again) == [0, 1, 2]
    assert len(marks(tmp_path)) == num_begun


@pytest.mark.parametrize("kind", ["client", "auto"])
def test_other_ways_to_name_a_cluster(cluster, tmp_path: Path, kind: str) -> None:
    address = cluster.client_address if kind == "client" else "auto"
    out = output_of_client(
        f"""
        seen = []
        options = RayOptions(address={address!r})
        got = map_partitions(
            partial(build_slow, Path({str(tmp_path)!r}), 0.3), range(8), options, cache_key="kind", on_progress=seen.append
        )
        print(sorted((position, square) for position, (square, _) in got))
        """,
        RAY_ADDRESS=cluster.address,
    )
    assert out.strip() == str([(number, number * number) for number in range(8)])
    assert len(marks(tmp_path)) == 8


def test_a_jobs_runtime_environment_is_kept(cluster) -> None:
    """What `ray job submit --runtime-env-json` hands to the driver it starts."""
    process = driver(
        f"""
        options = RayOptions(address={cluster.address!r})
        print(list(map_partitions(build_reading, ["OF_THE_JOB", "OMP_NUM_THREADS"], options, cache_key="environment")))
        """,
        RAY_JOB_CONFIG_JSON_ENV_VAR='{"runtime_env": {"env_vars": {"OF_THE_JOB": "set"}}}',
    )
    assert output_of(process).strip() == "[(0, 'set'), (1, '1')]"


def test_another_version_of_ray_is_one_clear_line(cluster) -> None:
    process = driver(f"""
        import ray
        ray.__version__ = "2.39.0"
        try:
            list(map_partitions(partial(build_needing, "os"), [1], RayOptions(address={cluster.address!r}), cache_key="v"))
        except ConfigError as error:
            print(error)
    """)
    told = output_of(process)
    assert re.fullmatch(
        rf"--address {cluster.address}: the cluster has other versions of Ray or Python .* Ray: 2.39.0 .*\n", told
    )


def test_another_version_of_omniprep_is_told(cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(omniprep, "__version__", "99.0")
    with pytest.raises(ConfigError, match=r"worker on .*: omniprep .*, but the run was started with 99\.0"):
        list(map_partitions(partial(build_needing, "os"), [1], RayOptions(address=cluster.address), cache_key="version"))


def test_a_package_that_the_nodes_lack_is_told(cluster) -> None:
    options = RayOptions(address=cluster.address)
    with pytest.raises(ConfigError, match="a worker cannot import not_on_the_nodes: every node of the cluster needs omniprep"):
        list(map_partitions(partial(build_needing, "not_on_the_nodes"), [1], options, cache_key="lacks"))


@pytest.mark.parametrize("num_gpus", [0, 1])
def test_nodes_without_omniprep_are_told(cluster, extra_node, tmp_path: Path, num_gpus: int) -> None:
    """Its import is made to fail in worker processes, which read `sitecustomize` when they start."""
    extra_node(num_gpus=1)
    (tmp_path / "sitecustomize.py").write_text(
        textwrap.dedent("""
        import sys

        class Absent:
            def find_spec(self, name, path, target=None):
                if name.split(".")[0] == "omniprep":
                    raise ModuleNotFoundError(f"No module named {name!r}", name=name)

        sys.meta_path.insert(0, Absent())
        """)
    )
    process = driver(
        f"""
        try:
            options = RayOptions(address={cluster.address!r}, num_gpus={num_gpus})
            list(map_partitions(build_abs, [1], options, cache_key="absent"))
        except ConfigError as error:
            print(error)
        """,
        RAY_JOB_CONFIG_JSON_ENV_VAR=json.dumps({"runtime_env": {"env_vars": {"PYTHONPATH": str(tmp_path)}}}),
    )
    assert output_of(process).startswith("a worker cannot import omniprep: every node of the cluster needs omniprep")


def test_a_function_that_only_the_driver_can_import_is_told(cluster, tmp_path: Path) -> None:
    (tmp_path / "only_here.py").write_text("def build():\n    return abs\n")
    process = driver(f"""
        import importlib.util
        spec = importlib.util.spec_from_file_location("only_here", {str(tmp_path / "only_here.py")!r})
        sys.modules["only_here"] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        try:
            list(map_partitions(module.build, [1], RayOptions(address={cluster.address!r}), cache_key="here"))
        except ConfigError as error:
            print(error)
    """)
    assert output_of(process).startswith("a worker cannot import only_here: every node of the cluster needs omniprep")


def test_a_node_runs_no_more_workers_than_its_memory_holds(cluster, extra_node, tmp_path: Path) -> None:
    big = extra_node(num_cpus=4, memory=250 * MB)
    options = RayOptions(address=cluster.address, memory_bytes_per_worker=100 * MB, num_workers=8)
    running, most = set(), 0
    for _, (_, pid) in map_partitions(partial(build_together, tmp_path, 3), range(16), options, cache_key="memory"):
        running.add(pid)
        most = max(most, len(running))
    on_big = {pid for _, pid, node in marks(tmp_path) if node == big.node_id}
    assert len(on_big) == 2


def test_gpu_work_runs_on_actors_that_keep_their_process(cluster, extra_node, tmp_path: Path) -> None:
    """The GPUs are only a number to Ray: no hardware is needed to place work on them."""
    extra_node(num_cpus=4, num_gpus=2)
    seen: list[metrics.Totals] = []
    options = RayOptions(address=cluster.address, num_gpus=1, max_retries=1, memory_bytes_per_worker=10 * MB)
    got = dict(map_partitions(partial(build_gpu, tmp_path), range(8), options, cache_key="gpu", on_progress=seen.append))
    assert sorted(got) == list(range(8))
    assert all(is_actor for *_, is_actor in got.values())
    assert {gpu for _, gpu, _ in got.values()} == {"0", "1"}
    assert len({pid for pid, *_ in got.values()}) <= 3, "one process a GPU, and one more for the one that died"
    assert sorted(item for item, *_ in marks(tmp_path)) == [0, 1, 2, 2, 3, 4, 5, 6, 7]


def test_gpu_work_that_always_dies_is_told_after_the_rest(cluster, extra_node, tmp_path: Path) -> None:
    extra_node(num_cpus=4, num_gpus=2)
    options = RayOptions(address=cluster.address, num_gpus=0.5, max_retries=1, memory_bytes_per_worker=10 * MB)
    done = []
    with pytest.raises(WorkerLost, match=r"^partition 1: its worker died 2 times \(ActorDiedError\)"):
        for position, _ in map_partitions(partial(build_deadly, tmp_path, (1,)), range(5), options, cache_key="dead"):
            done.append(position)
    assert sorted(done) == [0, 2, 3, 4]


def test_progress_counts_no_row_twice(cluster, tmp_path: Path) -> None:
    shown: list[int] = []
    with metrics.collecting() as totals:

        def show(working: metrics.Totals) -> None:
            shown.append(totals.num_rows + working.num_rows)

        options = RayOptions(address=cluster.address)
        list(map_partitions(partial(build_counting, tmp_path), range(3), options, cache_key="rows", on_progress=show))
    assert (tmp_path / "died").exists()
    assert totals.num_rows == 30, "item 1 was begun twice"
    assert max(shown) <= 30
    assert any(rows % 10 for rows in shown), "rows of unfinished partitions were seen"


def test_items_are_taken_when_a_worker_is_free(cluster) -> None:
    taken = num_done = ahead = 0

    def items() -> Iterator[int]:
        nonlocal taken
        for number in range(NUM_MANY):
            taken = number + 1
            yield number

    def resident_mb() -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024

    sizes = []
    options = RayOptions(address=cluster.address, num_workers=2)
    start = time.monotonic()
    for position, result in map_partitions(build_abs, items(), options, cache_key="many"):
        assert position == result
        num_done += 1
        ahead = max(ahead, taken - num_done)
        if num_done % 500 == 0:
            sizes.append(resident_mb())
    print(f"{num_done / (time.monotonic() - start):.0f} items/s, resident MB {sizes[1]:.1f} to {sizes[-1]:.1f}")
    assert num_done == NUM_MANY
    assert ahead <= 3, "two that run and the one that was just yielded"
    assert sizes[-1] - sizes[1] < 8


def build_reading():
    return os.environ.get


def build_abs():
    return abs
