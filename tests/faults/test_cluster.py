"""Builds on a cluster of two nodes on this machine: a worker or a node is killed in the middle of a partition, nothing is lost.

`tests/run/test_cluster.py` tries the same on the map over partitions alone, and more of it.
"""

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from omniprep.run.ray_cluster import DRIVER_ENVIRONMENT
from omniprep.storage.folder import open_folder
from tests.faults.builds import Decoders, Run, files_of, is_running, parent_of, prepare, wait_until, watching
from tests.s3_server import S3, s3

__all__ = ["s3"]
pytestmark = [pytest.mark.ray, pytest.mark.media, pytest.mark.filterwarnings("ignore")]
GATE = "0012.wav"
OBJECT_STORE = 80 << 20


@pytest.fixture(scope="module")
def cluster() -> Iterator[object]:
    """A head without CPUs and two nodes of one CPU."""
    os.environ.update(DRIVER_ENVIRONMENT)
    from ray.cluster_utils import Cluster

    # A node is dead after three looks, one a second, at which nobody is there; one that is only slow to answer lives.
    health = {"health_check_period_ms": 1000, "health_check_timeout_ms": 30_000, "health_check_failure_threshold": 3}
    head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": OBJECT_STORE, "_system_config": health}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    for _ in range(2):
        cluster.add_node(num_cpus=1, object_store_memory=OBJECT_STORE)
    yield cluster
    cluster.shutdown()


@pytest.fixture
def begin_there(cluster, begin) -> Callable[..., Run]:
    """Return a function that starts a build on the cluster, whose workers get the environment given."""

    def begin_there(recipe: Path, out: object, environment: dict[str, str]) -> Run:
        job = {"RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps({"runtime_env": {"env_vars": environment}})}
        command = prepare(recipe, out, "--address", cluster.address, "--workers", "2")
        run: Run = begin(command, {**environment, **job})
        return run

    return begin_there


def program_of(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode()


def worker_of(child: int) -> int:
    """Return the Ray worker above a decoding process: child, nursery, worker."""
    worker = parent_of(parent_of(child))
    assert program_of(worker).startswith("ray::")
    return worker


def killed(undisturbed, decoders: Decoders, begin_there, out: Path, choose: Callable[[int], int]) -> None:
    """Build on the cluster and kill one process in the middle of a partition."""
    decoders.fail({GATE: "gate"})
    with watching(out) as watch:
        run = begin_there(undisturbed.corpus.recipe, out, decoders.environment)
        child = decoders.wait_at(GATE)
        worker = worker_of(child)
        os.kill(choose(child), signal.SIGKILL)
        decoders.open_gate()  # a worker whose raylet is gone may finish its partition beside the one that does it again
        assert run.wait() == 0, run.told()
    assert "Traceback" not in run.told()
    watch.check(undisturbed.files)
    wait_until(lambda: not is_running(worker) and not is_running(child))


@pytest.mark.fault("kill -9 of a Ray worker in the middle of a partition")
def test_a_worker_is_killed(undisturbed, decoders, begin_there, survived, tmp_path: Path) -> None:
    killed(undisturbed, decoders, begin_there, tmp_path / "out", worker_of)
    survived(tmp_path / "out", num_rows=undisturbed.corpus.num_rows(), expected=undisturbed.files)


@pytest.mark.fault("output in S3 from a cluster")
def test_a_cluster_writes_to_s3(undisturbed, s3: S3, decoders, begin_there, survived) -> None:
    """A worker is killed here too, between its first upload and its last."""
    out = f"{s3.url}/out"
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL", "AWS_EC2_METADATA_DISABLED")
    environment = {name: os.environ[name] for name in names}
    held = s3.fail(lambda request: request.method == "PUT" and request.key.endswith("train-chat-00002.parquet"), "hang")
    decoders.fail({GATE: "gate"})
    run = begin_there(undisturbed.corpus.recipe, out, {**environment, **decoders.environment})
    worker = worker_of(decoders.wait_at(GATE))
    decoders.open_gate()
    wait_until(lambda: held.times == 0)
    os.kill(worker, signal.SIGKILL)
    assert run.wait() == 0, run.told()
    assert files_of(open_folder(out)) == {name: digest for name, digest in undisturbed.files.items() if name != "receipts/lock"}
    survived(out, num_rows=undisturbed.corpus.num_rows())


@pytest.mark.fault("kill -9 of a raylet: a node is lost")
def test_a_node_is_killed(undisturbed, cluster, decoders, begin_there, survived, tmp_path: Path) -> None:
    def raylet_of(child: int) -> int:
        raylet = parent_of(worker_of(child))
        assert program_of(raylet).endswith("raylet/raylet")
        return raylet

    killed(undisturbed, decoders, begin_there, tmp_path / "out", raylet_of)
    survived(tmp_path / "out", num_rows=undisturbed.corpus.num_rows(), expected=undisturbed.files)
