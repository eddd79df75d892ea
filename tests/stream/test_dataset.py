"""The stream in torch: the same order for any number of ranks and workers, and exactly on from where it was."""

import pickle
import shutil
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from omniprep.errors import ConfigError, DatasetError
from omniprep.stream.ahead import shards_of
from omniprep.stream.batch import pack
from omniprep.stream.catalog import read_catalog
from omniprep.stream.curriculum import Curriculum, Stage
from omniprep.stream.dataset import StreamingDataset
from omniprep.stream.plan import Blended, Plan
from omniprep.stream.reader import RecordReader
from omniprep.stream.shard_cache import ShardCache
from tests.benchmarks.stream_corpus import write_dataset
from tests.s3_server import S3, s3  # noqa: F401
from tests.shards.builders import preference_sample
from tests.stream.streams import CONFIG, loader, stream

pytestmark = [
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning"),  # torchdata 0.11 with torch 2.12
]
Steps = list[list[tuple[str, ...]]]


def read_steps(
    folders: Any, world_size: int, num_workers: int, *, state: dict | None = None, num_steps: int | None = None, **options: Any
) -> tuple[Steps, dict[str, Any]]:
    """Return the keys of the bins of every step, over all ranks, and the state of rank 0 after the last."""
    per_rank = CONFIG.global_batch_size // world_size
    steps: Steps = []
    last: dict[str, Any] = {}
    for rank in range(world_size):
        dataset = stream(folders, rank, world_size, **options)
        if state is not None:
            dataset.load_state_dict(state)
        batches = loader(dataset, num_workers)
        for number, batch in enumerate(islice(batches, None if num_steps is None else num_steps * per_rank)):
            if number // per_rank == len(steps):
                steps.append([])
            steps[number // per_rank].append(tuple(batch["keys"]))
            last = batch["state"] if rank == 0 else last
    return [sorted(step) for step in steps], last


def planned(plan: Plan) -> Steps:
    reader = RecordReader([dataset.catalog for dataset in plan.datasets])
    steps = []
    for step in range(plan.num_steps):
        bins = [plan.samples_of(number) for number in plan.bins_of(step)]
        steps.append(sorted(tuple(reader.read(*sample).key for sample in samples) for samples in bins))
    return steps


@pytest.fixture(scope="module")
def whole(folders) -> Steps:
    return planned(stream(folders).plan)


@pytest.mark.parametrize("num_workers", [0, 1, 2, 4])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_the_order_is_the_plans_for_any_number_of_ranks_and_workers(
    folders, whole: Steps, world_size: int, num_workers: int
) -> None:
    assert read_steps(folders, world_size, num_workers)[0] == whole


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 3), (3, 8), (8, 3), (8, 1), (1, 8)])
@pytest.mark.parametrize("workers", [(0, 2), (4, 0), (1, 3)])
def test_a_stream_goes_on_with_other_ranks_and_workers(
    folders, whole: Steps, before: int, after: int, workers: tuple[int, int]
) -> None:
    first, state = read_steps(folders, before, workers[0], num_steps=3)
    rest, _ = read_steps(folders, after, workers[1], state=state)
    assert first + rest == whole


def test_every_sample_is_read_once_an_epoch(folders) -> None:
    steps, _ = read_steps(list(folders), 3, 2)
    keys = [key for step in steps for document in step for key in document]
    assert len(keys) == len(set(keys)) == 400 + 120 + 90


def test_batches_hold_what_was_planned(folders) -> None:
    dataset = stream(folders)
    reader = RecordReader([one.catalog for one in dataset.plan.datasets])
    for number, batch in enumerate(islice(dataset, 30)):
        bins = dataset.plan.bins_of(number // CONFIG.global_batch_size)
        expected = pack([reader.read(*sample) for sample in dataset.plan.samples_of(bins[number % CONFIG.global_batch_size])])
        assert batch["inputs"].keys() == expected.model_inputs().keys()
        for name, value in expected.model_inputs().items():
            same = torch.equal(batch["inputs"][name], torch.as_tensor(value)) if not isinstance(value, bool) else not value
            assert same, name
        assert torch.equal(batch["shift_labels"], torch.as_tensor(expected.shift_labels))
        assert batch["num_supervised"] == expected.num_supervised


@pytest.mark.parametrize("num_threads", [0, 1, 5])
def test_threads_change_nothing(folders, whole: Steps, num_threads: int) -> None:
    assert read_steps(folders, 1, 0, num_threads=num_threads)[0] == whole


@pytest.mark.parametrize("stop", [0, 1, 10, 24, 100])
def test_the_state_of_the_dataset_is_that_of_the_last_batch(folders, stop: int) -> None:
    dataset, again = stream(folders), stream(folders)
    iterator = iter(dataset)
    states = [batch["state"] for batch in islice(iterator, stop)]
    assert states[-1:] == [dataset.state_dict()] * bool(stop)
    again.load_state_dict(pickle.loads(pickle.dumps(dataset.state_dict())))
    assert [batch["keys"] for batch in again] == [batch["keys"] for batch in iterator]


def test_the_next_iteration_is_the_next_epoch(folders) -> None:
    dataset = stream(folders)
    epochs = [[tuple(batch["keys"]) for batch in dataset] for _ in range(3)]
    assert dataset.epoch == 3
    assert len({tuple(epoch) for epoch in epochs}) == 3
    dataset.set_epoch(1)
    assert [tuple(batch["keys"]) for batch in dataset] == epochs[1]


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_go_on_to_the_next_epoch_too(folders, persistent: bool) -> None:
    alone = stream(folders)
    expected = [[tuple(batch["keys"]) for batch in alone] for _ in range(3)]
    batches = DataLoader(stream(folders), batch_size=None, num_workers=2, persistent_workers=persistent)
    assert [[tuple(batch["keys"]) for batch in batches] for _ in range(3)] == expected


def test_spawned_workers_read_the_same(folders, whole: Steps) -> None:
    """They get the dataset as a pickle, in a process that knows nothing of this one."""
    dataset = stream(folders)
    batches = DataLoader(dataset, batch_size=None, num_workers=1, multiprocessing_context="spawn")
    found = [tuple(batch["keys"]) for batch in batches]
    assert sorted(found[: CONFIG.global_batch_size]) == whole[0]
    assert dataset.epoch == 1


def test_epochs_may_end_early(folders) -> None:
    alone = stream(folders)
    expected = [[batch["keys"] for batch in alone][:10] for _ in range(2)]
    dataset = stream(folders, max_batches=10)
    batches = DataLoader(dataset, batch_size=None, num_workers=1, multiprocessing_context="spawn")
    assert len(dataset) == 10
    assert [[batch["keys"] for batch in batches] for _ in range(2)] == expected


def test_an_iteration_that_was_broken_off_begins_again(folders) -> None:
    dataset = stream(folders)
    first = [batch["keys"] for batch in islice(dataset, 10)]
    assert [batch["keys"] for batch in islice(dataset, 10)] == first


def test_an_epoch_is_over_with_its_last_batch(folders) -> None:
    """A trainer that knows the length asks for no batch after the last."""
    dataset = stream(folders)
    *_, last = islice(dataset, len(dataset))
    assert dataset.epoch == 1
    again = stream(folders)
    again.load_state_dict(last["state"])
    assert again.epoch == 1
    assert [batch["keys"] for batch in again] == [batch["keys"] for batch in dataset]


def test_a_state_in_the_middle_of_a_step_is_for_as_many_ranks(folders) -> None:
    state = next(iter(stream(folders, 0, 2)))["state"]
    assert state["bin"] == 1
    with pytest.raises(ConfigError, match="in the middle of step 0 by 2 ranks, and there are 3 now"):
        stream(folders, 0, 3).load_state_dict(state)
    dataset = stream(folders, 0, 2)
    dataset.load_state_dict(state)
    assert [batch["keys"] for batch in dataset] == [batch["keys"] for batch in stream(folders, 0, 2)][1:]


def test_a_state_of_another_plan_is_refused(folders) -> None:
    state = stream(folders).state_dict()
    with pytest.raises(ConfigError, match=r"another plan.*seed"):
        stream(folders, config=CONFIG.model_copy(update={"seed": 8})).load_state_dict(state)
    with pytest.raises(ConfigError, match=r"expected the state of a stream \(epoch, step, plan, made_of, bin"):
        stream(folders).load_state_dict({"step": 3})


def test_where_workers_read_the_dataset_does_not_guess_its_state(folders) -> None:
    dataset = stream(folders)
    assert dataset.state_dict()["step"] == 0
    for _ in islice(loader(dataset, 2), 3):
        pass
    with pytest.raises(ConfigError, match="StatefulDataLoader"):
        dataset.state_dict()


@pytest.mark.parametrize("num_workers", [0, 1, 3])
@pytest.mark.parametrize("stop", [1, 8, 50])
def test_torchdatas_stateful_loader_resumes(folders, num_workers: int, stop: int) -> None:
    torchdata = pytest.importorskip("torchdata.stateful_dataloader")
    whole = [tuple(batch["keys"]) for batch in stream(folders)]
    first = torchdata.StatefulDataLoader(stream(folders), batch_size=None, num_workers=num_workers)
    iterator = iter(first)
    found = [tuple(batch["keys"]) for batch in islice(iterator, stop)]
    state = pickle.loads(pickle.dumps(first.state_dict()))
    del iterator
    second = torchdata.StatefulDataLoader(stream(folders), batch_size=None, num_workers=num_workers)
    second.load_state_dict(state)
    assert found + [tuple(batch["keys"]) for batch in second] == whole


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("stop", [241, 244, 479, 480])
def test_torchdatas_stateful_loader_resumes_in_a_later_epoch(folders, num_workers: int, stop: int) -> None:
    torchdata = pytest.importorskip("torchdata.stateful_dataloader")
    alone = stream(folders)
    assert len(alone) == 240
    whole = [tuple(batch["keys"]) for _ in range(3) for batch in alone]
    first = torchdata.StatefulDataLoader(stream(folders), batch_size=None, num_workers=num_workers)
    batches = chain.from_iterable(iter(first) for _ in range(3))
    found = [tuple(batch["keys"]) for batch in islice(batches, stop)]
    state = pickle.loads(pickle.dumps(first.state_dict()))
    del batches
    second = torchdata.StatefulDataLoader(stream(folders), batch_size=None, num_workers=num_workers)
    second.load_state_dict(state)
    rest: list[tuple[str, ...]] = []
    while len(found) + len(rest) < len(whole):
        rest += [tuple(batch["keys"]) for batch in second]
    assert found + rest == whole


@pytest.mark.parametrize("stop", [3, 240, 242, 479, 480])
def test_torchdatas_stateful_loader_resumes_with_workers_that_live_on(folders, stop: int) -> None:
    """Also where an epoch has begun, and some workers have not read from it."""
    torchdata = pytest.importorskip("torchdata.stateful_dataloader")
    alone = stream(folders)
    whole = [tuple(batch["keys"]) for _ in range(3) for batch in alone]
    options = {"batch_size": None, "num_workers": 3, "persistent_workers": True}
    first = torchdata.StatefulDataLoader(stream(folders), **options)
    batches = chain.from_iterable(iter(first) for _ in range(3))
    found = [tuple(batch["keys"]) for batch in islice(batches, stop)]
    second = torchdata.StatefulDataLoader(stream(folders), **options)
    second.load_state_dict(pickle.loads(pickle.dumps(first.state_dict())))
    while len(found) < len(whole):
        found += [tuple(batch["keys"]) for batch in second]
    assert found == whole


@pytest.mark.parametrize("stop", [0, 1, 2, 3])
def test_a_state_of_workers_that_live_on_is_that_of_their_new_position(folders, stop: int) -> None:
    torchdata = pytest.importorskip("torchdata.stateful_dataloader")
    whole = [tuple(batch["keys"]) for batch in stream(folders)]
    options = {"batch_size": None, "num_workers": 3, "persistent_workers": True}
    dataset = stream(folders)
    first = torchdata.StatefulDataLoader(dataset, **options)
    list(islice(first, 100))
    dataset.set_epoch(0)
    found = [tuple(batch["keys"]) for batch in islice(first, stop)]
    if not stop:
        iter(first)
    second = torchdata.StatefulDataLoader(stream(folders), **options)
    second.load_state_dict(pickle.loads(pickle.dumps(first.state_dict())))
    assert found + [tuple(batch["keys"]) for batch in second] == whole


@pytest.mark.parametrize("persistent", [False, True])
def test_after_an_iteration_that_was_broken_off_a_position_that_is_set_is_kept(folders, persistent: bool) -> None:
    """Wherever it was broken off, and however far the workers were; the batches before it are neither lost nor made up."""
    whole = [tuple(batch["keys"]) for batch in stream(folders, max_batches=12)]
    dataset = stream(folders, max_batches=12)
    batches = DataLoader(dataset, batch_size=None, num_workers=2, persistent_workers=persistent)
    for stop in range(1, 12):
        taken = list(islice(batches, stop))
        dataset.load_state_dict(taken[-1]["state"])
        assert [tuple(batch["keys"]) for batch in [*taken, *batches]] == whole, f"to go on after {stop}"
        dataset.set_epoch(0)
        list(islice(batches, stop))
        dataset.set_epoch(0)
        assert [tuple(batch["keys"]) for batch in batches] == whole, f"to begin again after {stop}"
        dataset.set_epoch(0)


def test_a_workers_state_is_for_as_many_ranks(folders, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("omniprep.stream.dataset._worker", lambda: (0, 2))
    dataset = stream(folders, 0, 24)  # a bin a step: every batch ends one
    next(iter(dataset))
    state = dataset.state_dict()
    assert (state["bin"], state["worker"]) == (0, [0, 2])
    with pytest.raises(ConfigError, match="worker 0 by 24 ranks, and there are 12 now"):
        stream(folders, 0, 12).load_state_dict(state)


def test_workers_that_live_on_take_a_new_position(folders) -> None:
    alone = stream(folders)
    epochs = [[tuple(batch["keys"]) for batch in alone] for _ in range(3)]
    dataset = stream(folders)
    batches = DataLoader(dataset, batch_size=None, num_workers=2, persistent_workers=True)
    assert [tuple(batch["keys"]) for batch in islice(batches, 10)] == epochs[0][:10]
    assert [tuple(batch["keys"]) for batch in batches] == epochs[0]  # begun again: the trainer broke off
    assert [tuple(batch["keys"]) for batch in batches] == epochs[1]
    dataset.set_epoch(0)
    assert [tuple(batch["keys"]) for batch in batches] == epochs[0]
    state = next(islice(stream(folders), 4, None))["state"]
    dataset.load_state_dict(state)
    assert dataset.state_dict() == state
    assert [tuple(batch["keys"]) for batch in batches] == epochs[0][5:]
    list(islice(batches, 236))  # so near the end of epoch 1 that workers are through
    dataset.set_epoch(1)
    assert [tuple(batch["keys"]) for batch in batches] == epochs[1]


@pytest.mark.parametrize("change", [{"batching": "padded"}, {"batching": "single"}, {"max_tokens": 65}])
def test_rows_are_padded_only_where_that_keeps_to_the_plan(folders, change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="pad_to=64: expected packed bins and at least max_tokens="):
        stream(folders, config=CONFIG.model_copy(update=change), pad_to=64)


def test_a_curriculum_goes_from_short_to_long(folders) -> None:
    datasets = [Blended(catalog=read_catalog(folder)) for folder in folders]
    stages = [
        Stage(datasets=datasets, config=CONFIG, num_epochs=2),
        Stage(datasets=datasets, config=CONFIG.model_copy(update={"max_tokens": 256}), num_epochs=1),
    ]
    dataset = StreamingDataset(Curriculum(stages=tuple(stages)), rank=0, world_size=1)
    longest = [max(batch["inputs"]["input_ids"].shape[1] for batch in dataset) for _ in range(3)]
    assert longest[0] <= 64 and longest[1] <= 64 < longest[2] <= 256
    with pytest.raises(ConfigError, match="epoch 3: the curriculum has 3"):
        next(iter(dataset))


def test_rows_can_be_padded_to_one_length(folders) -> None:
    assert {batch["inputs"]["input_ids"].shape for batch in islice(stream(folders, pad_to=64), 30)} == {(1, 64)}


def test_padded_batches_hold_samples_of_similar_length(folders) -> None:
    config = CONFIG.model_copy(update={"batching": "padded", "max_tokens": 128})
    shapes = [batch["inputs"]["attention_mask"].shape for batch in stream(folders, config=config)]
    assert all(rows * length <= 128 for rows, length in shapes)
    assert max(rows for rows, _ in shapes) > 4


def test_preferences_stream_as_pairs(tmp_path: Path) -> None:
    from omniprep.shards.members import MemberFormat

    samples = (preference_sample(f"dpo-{number:08d}") for number in range(9))
    write_dataset(tmp_path / "dpo", samples, form=MemberFormat(kind="preference"))
    keys = [key for batch in stream(str(tmp_path / "dpo")) for key in batch["keys"]]
    assert len(keys) == 18
    assert keys[::2] == keys[1::2]


def test_records_that_cannot_be_read_are_left_out_and_told(folders, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    copy = tmp_path / "chat"
    shutil.copytree(next(iter(folders)), copy)
    with (copy / "train-chat-00000.tar").open("r+b") as tar:
        tar.write(bytes(512))
    dataset = stream(str(copy))
    keys = {key for batch in dataset for key in batch["keys"]}
    assert len(keys) == 399
    assert [corrupt.key for corrupt in dataset.corrupt] == ["chat-00000000"]
    assert "train-chat-00000.tar: chat-00000000: expected the tar header" in caplog.text
    with pytest.raises(DatasetError, match="max_corrupt=0"):
        list(stream(str(copy), max_corrupt=0))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_remote_shards_come_through_the_cache(folders, whole: Steps, s3: S3, tmp_path: Path, num_workers: int) -> None:  # noqa: F811
    from omniprep.storage.folder import open_folder

    remote = {}
    for folder, weight in folders.items():
        url = f"{s3.url}/{Path(folder).name}"
        for path in Path(folder).iterdir():
            open_folder(url).write(path.name, path.read_bytes())
        remote[url] = weight
    cache = ShardCache(tmp_path / "cache", max_bytes=1 << 20)
    assert read_steps(remote, 2, num_workers, cache=cache)[0] == whole
    assert cache.num_bytes <= 1 << 20


def test_shards_are_listed_in_the_order_of_their_use(folders) -> None:
    plan = stream(folders).plan
    catalogs = [dataset.catalog for dataset in plan.datasets]
    used = [(d, catalogs[d].locate(s)[0]) for number in range(plan.num_bins) for d, s in plan.samples_of(number)]
    assert list(shards_of(plan, [*range(plan.num_bins), -1])) == list(dict.fromkeys(used))


def test_shards_are_listed_as_far_as_they_are_asked_for(folders, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("omniprep.stream.ahead._BINS_AT_ONCE", 10)
    plan = stream(folders).plan
    bins = iter(range(plan.num_bins))
    shards = shards_of(plan, bins)
    next(shards)
    assert next(bins) == 10
    next(bins)
    assert len({next(shards) for _ in range(3)}) == 3
