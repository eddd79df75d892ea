"""The loader's benchmark: what it counts is what is in the dataset, and a consumer waits as long as it must."""

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from omniprep import bench_loader as benchmark
from omniprep.bench_loader import LoaderBench, LoaderRun, bench_loader, consume, ratio, stored_bytes, worker_counts
from omniprep.errors import ConfigError, DatasetError
from omniprep.shards.index import read_index_table
from omniprep.shards.members import MemberFormat
from omniprep.storage.folder import as_folder
from omniprep.stream.catalog import Catalog, read_catalog
from omniprep.stream.plan import PlanConfig
from tests.benchmarks.stream_corpus import write_dataset
from tests.shards.builders import media_sample, preference_sample, text_sample

pytestmark = [
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
    pytest.mark.filterwarnings("ignore:unclosed file .*tar:ResourceWarning"),  # webdataset's, where a reader stops in a tar
]

NUM_SAMPLES = 60
PLAN = PlanConfig(max_tokens=64)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("bench") / "data"
    samples = (
        replace(media_sample() if row % 5 == 1 else text_sample(length=5 + row % 30), key=f"mix-{row:08d}", source="mix", row=row)
        for row in range(NUM_SAMPLES)
    )
    write_dataset(folder, samples, max_shard_bytes=200_000)
    return str(folder)


@pytest.fixture(scope="module")
def catalog(place: str) -> Catalog:
    return read_catalog(place)


@pytest.fixture(scope="module")
def compared(place: str) -> LoaderBench:
    return bench_loader(place, PLAN, num_workers=(0, 2), num_threads=1, num_batches=1000, compare=True)


def sizes(catalog: Catalog) -> dict[str, int]:
    """Return the bytes of every record by its key, as the indexes say."""
    tables = [read_index_table(as_folder(catalog.place), shard.index_name, ("key", "size")) for shard in catalog.shards]
    return {row["key"]: row["size"] for table in tables for row in table.to_pylist()}


def a_run(loader: str = "omniprep records", **changes: float) -> LoaderRun:
    values = {
        **{"num_workers": 0, "num_threads": 1, "num_batches": 5, "num_samples": 10, "num_tokens": 100, "num_bytes": 4_000_000},
        **{"first_batch_s": 0.1, "wall_s": 2.0, "cpu_s": 0.5, "wait_share": 0.5},
    }
    return LoaderRun.model_validate({"loader": loader, **values, **changes})


def test_every_loader_counts_what_is_in_the_dataset(compared: LoaderBench, catalog: Catalog) -> None:
    runs = [(run.loader, run.num_workers, run.num_threads) for run in compared.runs]
    assert runs == [
        *(("omniprep", 0, 1), ("omniprep", 2, 1)),
        *(("omniprep records", 0, 0), ("omniprep records", 0, 1)),
        *(("webdataset", 0, None), ("webdataset", 2, None)),
        *(("datasets", 0, None), ("datasets", 2, None)),
    ]
    for run in compared.runs:
        assert run.num_samples == NUM_SAMPLES, run
        assert run.num_tokens == int(catalog.num_tokens.sum()), run
        assert run.num_bytes == sum(sizes(catalog).values()), run
        assert run.num_batches == NUM_SAMPLES or run.loader == "omniprep", run
    assert compared.runs[0].num_batches == compared.runs[1].num_batches < NUM_SAMPLES


def test_times_and_shares_are_possible_ones(compared: LoaderBench) -> None:
    for run in compared.runs:
        assert run.wall_s > 0, run
        assert run.first_batch_s > 0, run
        assert run.cpu_s > 0, run
        assert run.wait_share is not None, run
        assert 0 <= run.wait_share <= 1, run
    assert [found.loader for found in compared.ratios] == ["webdataset", "datasets"]
    assert all(found.samples_per_cpu_s > 0 and (found.samples_per_s or 0) > 0 for found in compared.ratios)


def test_the_cpu_time_of_workers_is_counted(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = benchmark._open_stream

    def burning(*arguments: object, num_workers: int, **options: object) -> object:
        loader = real(*arguments, num_workers=num_workers, **options)  # type: ignore[arg-type]
        make = loader.dataset._make  # type: ignore[attr-defined]

        def make_slowly(*given: object) -> object:
            until = time.thread_time() + 0.02
            while time.thread_time() < until:
                pass
            return make(*given)

        loader.dataset._make = make_slowly  # type: ignore[attr-defined]
        return loader

    monkeypatch.setattr(benchmark, "_open_stream", burning)
    (run,) = bench_loader(place, PLAN, num_workers=(1,), num_batches=1000).runs
    assert run.cpu_s > 0.02 * run.num_batches


def test_a_limit_is_kept(place: str, catalog: Catalog) -> None:
    found = bench_loader(place, PlanConfig(max_tokens=64, shuffle=False, batching="single"), num_workers=(0, 1), num_batches=7)
    known = sizes(catalog)
    for run in found.runs:
        assert (run.num_batches, run.num_samples, run.num_tokens) == (7, 7, int(catalog.num_tokens[:7].sum()))
        assert run.num_bytes == sum(known[f"mix-{row:08d}"] for row in range(7))
    assert found.ratios == ()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_no_batch_is_made_that_nobody_takes(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_workers: int
) -> None:
    from omniprep.stream.dataset import StreamingDataset

    real, made = StreamingDataset._make, tmp_path / "made"

    def counted(self: StreamingDataset, *arguments: Any) -> Any:
        with made.open("a") as file:  # a worker's memory is not this one's
            file.write("x")
        return real(self, *arguments)

    monkeypatch.setattr(StreamingDataset, "_make", counted)
    bench_loader(place, PLAN, num_workers=(num_workers,), num_batches=5)
    assert len(made.read_text()) == 2 * 5, "of the run before, which is not measured, and of the run"


def test_a_consumer_without_end_waits_and_a_slow_one_does_not(place: str) -> None:
    (fast,) = bench_loader(place, PLAN, num_workers=(0,), num_threads=0).runs
    (slow,) = bench_loader(place, PLAN, num_workers=(0,), num_threads=1, num_batches=8, consumer_tokens_per_s=1000).runs
    assert fast.wait_share is not None
    assert fast.wait_share > 0.9
    assert slow.wait_share is not None
    assert slow.wait_share < 0.2
    assert slow.tokens_per_s < 1000
    assert slow.wall_s > slow.num_tokens / 1000


def test_the_first_batch_is_no_wait_and_all_others_are() -> None:
    def batches() -> Iterator[tuple[tuple[str, ...], int]]:
        for number, delay in enumerate((0.2, 0.05, 0.05)):
            time.sleep(delay)
            yield (f"a-{number}", f"b-{number}"), 10

    seen = consume(batches(), tokens_per_s=100.0)  # a tenth of a second each
    assert (len(seen.keys), seen.num_batches, seen.num_tokens) == (6, 3, 30)
    assert seen.first_s >= 0.2
    assert seen.wall_s >= seen.first_s + 0.4
    assert seen.wait_share == pytest.approx(0.1 / 0.4, abs=0.1)
    assert consume([(("a",), 3)]).wait_share is None


def test_a_preference_is_one_sample_with_the_tokens_of_both(tmp_path: Path) -> None:
    write_dataset(
        tmp_path / "dpo", (preference_sample(f"dpo-{row:08d}") for row in range(6)), form=MemberFormat(kind="preference")
    )
    found = bench_loader(str(tmp_path / "dpo"), PLAN, num_workers=(0,), compare=True)
    expected = int(read_catalog(str(tmp_path / "dpo")).num_tokens.sum())
    assert {(run.num_samples, run.num_tokens) for run in found.runs} == {(6, expected)}


def test_rates_and_ratios_follow_from_what_was_counted() -> None:
    run = a_run()
    assert (run.samples_per_s, run.tokens_per_s, run.mb_per_s, run.cpu_ms_per_sample) == (5.0, 50.0, 2.0, 50.0)
    # The reader's best by the clock is one run and by CPU time another; rows of whole batches are not compared.
    runs = [
        *(a_run("omniprep", wall_s=0.1, cpu_s=0.01), a_run(wall_s=1.0, cpu_s=1.0), a_run(wall_s=2.0, cpu_s=0.25)),
        *(a_run("webdataset", wall_s=8.0, cpu_s=4.0), a_run("webdataset", wall_s=4.0, cpu_s=5.0), a_run("datasets", wall_s=0.1)),
    ]
    found = ratio(runs, "webdataset")
    assert (found.samples_per_s, found.samples_per_cpu_s) == (4.0, 16.0)
    assert ratio(runs, "webdataset", is_bounded=True).samples_per_s is None


def test_bytes_are_those_of_the_named_records(catalog: Catalog) -> None:
    known = sizes(catalog)
    keys = {f"mix-{row:08d}" for row in (0, 1, NUM_SAMPLES - 1)}
    assert stored_bytes(catalog, range(len(catalog.shards)), keys) == sum(known[key] for key in keys)
    assert stored_bytes(catalog, iter([0]), {"mix-00000000"}) == known["mix-00000000"]


@pytest.mark.parametrize("text", ["", "x", "0,,1", "-1", "0,257", "1.5"])
def test_numbers_of_workers_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--num-workers: expected numbers of 0 to 256"):
        worker_counts(text)


def test_numbers_of_workers_are_taken_once_each() -> None:
    assert worker_counts("2, 0,2") == (2, 0)


def test_without_torch_one_line_says_what_to_install(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs PyTorch, which is not installed: pip install 'omniprep\[torch\]'"):
        bench_loader(place, PLAN)


def test_others_are_compared_on_local_shards_only(catalog: Catalog) -> None:
    with pytest.raises(ConfigError, match="memory://nowhere: the comparison reads local shards only"):
        benchmark._others(replace(catalog, place="memory://nowhere"))


def test_a_missing_shard_is_told_before_others_stumble_over_it(catalog: Catalog) -> None:
    gone = replace(catalog, shards=(*catalog.shards[:1], catalog.shards[1].model_copy(update={"name": "gone.tar"})))
    with pytest.raises(DatasetError, match=r"gone\.tar: is missing, though the manifest names it"):
        benchmark._others(gone)
