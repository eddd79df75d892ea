"""What is counted, by whom, and how it reaches Prometheus."""

import re
import socket
import time
import urllib.request
from pathlib import Path

import pytest

from omniprep.run import metrics, serial
from omniprep.run.metrics import METRICS, Totals


def test_the_names_are_these() -> None:
    """They are in people's dashboards: a change of this list is a breaking change."""
    assert {name: (metric.kind, metric.labels) for name, metric in METRICS.items()} == {
        "omniprep_rows_total": ("counter", ("source", "outcome")),
        "omniprep_rejects_total": ("counter", ("source", "reason")),
        "omniprep_bytes_written_total": ("counter", ("source",)),
        "omniprep_stage_seconds_total": ("counter", ("stage",)),
        "omniprep_guard_restarts_total": ("counter", ("kind",)),
        "omniprep_partitions_total": ("counter", ("source",)),
        "omniprep_partition_seconds": ("histogram", ()),
        "omniprep_partitions_left": ("gauge", ()),
    }


def test_every_metric_is_documented() -> None:
    page = (Path(__file__).parents[2] / "docs" / "cluster.md").read_text(encoding="utf-8")
    assert [name for name in METRICS if f"`{name}`" not in page] == []


def test_counts_add_up_by_label() -> None:
    with metrics.collecting() as totals:
        metrics.count(metrics.ROWS, source="chat", outcome="stored")
        metrics.count(metrics.ROWS, 2, source="chat", outcome="rejected")
        metrics.count(metrics.ROWS, 4, source="film", outcome="stored")
        metrics.count(metrics.BYTES_WRITTEN, 1000, source="film")
    assert (totals.num_rows, totals.num_rejected, totals.num_bytes) == (7, 2, 1000)
    assert totals.total(metrics.ROWS, source="chat") == 3
    assert totals.by_label(metrics.ROWS, "outcome") == {"stored": 5, "rejected": 2}


@pytest.mark.parametrize(
    ("name", "labels", "message"),
    [
        ("omniprep_rows", {}, "no metric 'omniprep_rows'; there are omniprep_rows_total"),
        (metrics.ROWS, {"source": "chat"}, r"is a counter with the labels \(source, outcome\); got \(source\)"),
        (metrics.BYTES_WRITTEN, {"sauce": "chat"}, r"labels \(source\); got \(sauce\)"),
        (metrics.PARTITIONS_LEFT, {}, "is a gauge"),
    ],
)
def test_a_wrong_name_or_label_is_a_bug(name: str, labels: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        metrics.count(name, **labels)


def test_time_is_counted_also_when_the_block_fails() -> None:
    with metrics.collecting() as totals:
        with pytest.raises(KeyError), metrics.timed("encode"):
            time.sleep(0.01)
            raise KeyError
        started = time.perf_counter()
        with metrics.timed("write"):
            pass
        around_s = time.perf_counter() - started
    seconds = totals.by_label(metrics.STAGE_SECONDS, "stage")
    assert seconds["encode"] >= 0.01
    assert 0 < seconds["write"] <= around_s


def test_only_what_ends_well_is_added_to_the_totals() -> None:
    with metrics.collecting() as outer:
        with metrics.collecting():
            metrics.count(metrics.PARTITIONS, source="chat")
        with pytest.raises(KeyError), metrics.collecting():
            metrics.count(metrics.PARTITIONS, source="chat")
            raise KeyError
    assert outer.total(metrics.PARTITIONS) == 1


def build_counting():
    def work(num_rows: int) -> int:
        for row in range(num_rows):
            with metrics.timed("encode"):
                pass
            metrics.count(metrics.ROWS, source="chat", outcome="rejected" if row == 3 else "stored")
        metrics.count(metrics.BYTES_WRITTEN, 10 * num_rows, source="chat")
        return num_rows

    return work


def test_a_serial_run_tells_its_progress_at_most_once_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def later() -> float:
        now[0] += 0.125  # each look at the clock: each count
        return now[0]

    monkeypatch.setattr(metrics.time, "monotonic", later)
    seen: list[Totals] = []
    with metrics.collecting() as totals:
        assert list(serial.map_partitions(build_counting, [100, 7], on_progress=seen.append)) == [(0, 100), (1, 7)]
    # A row counts twice: its time and its outcome. So 4 rows a second; each partition by itself.
    assert [snapshot.num_rows for snapshot in seen] == [*(4 * step for step in range(1, 26)), 4]
    assert totals.num_rows == 107


def test_a_count_costs_little() -> None:
    """A text record takes 150 us of work; it is counted about five times."""
    start = time.thread_time()  # not of the clock: others may have the processor meanwhile
    with metrics.collecting(lambda totals: None):
        for _ in range(20_000):
            metrics.count(metrics.ROWS, source="chat", outcome="stored")
    each_us = (time.thread_time() - start) / 20_000 * 1e6
    print(f"{each_us:.2f} us a count")
    assert each_us < 15


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def scrape(port: int) -> dict[str, float]:
    """Return the series of OmniPrep that Prometheus would see, summed over processes."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            text = answer.read().decode()
    except OSError:  # not up yet
        return {}
    found: dict[str, float] = {}
    for name, labels, value in re.findall(r"^ray_(omniprep_\w+)\{([^}]*)\} (\S+)$", text, re.MULTILINE):
        own = [label for label in re.findall(r'(\w+)="([^"]*)"', labels) if label[0] in ("source", "outcome", "stage", "le")]
        series = name + "".join(f" {value}" for _, value in sorted(own))
        found[series] = found.get(series, 0.0) + float(value)
    return found


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore")
def test_prometheus_finds_what_workers_counted() -> None:
    """About 20 s: Ray's processes send their metrics every few seconds."""
    from omniprep.run.ray import RayOptions, map_partitions
    from omniprep.run.ray_cluster import session

    options = RayOptions(num_workers=2, metrics_port=free_port())
    with metrics.collecting() as totals, session(options):
        assert sorted(map_partitions(build_counting, [5, 6], options, cache_key="metrics")) == [(0, 5), (1, 6)]
        expected = {
            "omniprep_bytes_written_total chat": 110,
            "omniprep_rows_total stored chat": 9,
            "omniprep_rows_total rejected chat": 2,
            "omniprep_partition_seconds_count": 2,
            "omniprep_partitions_left": 0,
        }
        deadline = time.monotonic() + 120
        while not expected.items() <= (found := scrape(options.metrics_port)).items():  # driver and workers each send their own
            assert time.monotonic() < deadline, f"found only {found}"
            time.sleep(0.5)
    assert found["omniprep_stage_seconds_total encode"] > 0
    assert totals.num_rows == 11
