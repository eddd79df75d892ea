"""The plan of an epoch is a function of what it is made of: complete, within its limits, blind to ranks."""

import hashlib
import pickle
from collections.abc import Sequence
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from omniprep.errors import ConfigError
from omniprep.prepare import prepare
from omniprep.stream.catalog import Catalog, read_catalog
from omniprep.stream.curriculum import Curriculum, Stage
from omniprep.stream.order import pass_order
from omniprep.stream.plan import Blended, Plan, PlanConfig, make_plan
from tests.prepare_builders import chat, recipe, write_media
from tests.stream.catalogs import catalog, uneven

BATCHINGS = ("packed", "padded", "single")


def plan(*catalogs: Catalog, weights: Sequence[float | None] | None = None, epoch: int = 0, **settings: Any) -> Plan:
    pairs = zip(catalogs, weights or [None] * len(catalogs), strict=True)
    return make_plan([Blended(catalog=one, weight=weight) for one, weight in pairs], PlanConfig(**settings), epoch=epoch)


def read(made: Plan, *, world_size: int = 1, start: int = 0) -> list[list[tuple[int, int]]]:
    """Return the samples that all ranks together read, step by step, sorted inside a step."""
    steps = []
    for step in range(start, made.num_steps):
        bins = chain.from_iterable(made.bins_of(step, rank=rank, world_size=world_size) for rank in range(world_size))
        steps.append(sorted(chain.from_iterable(made.samples_of(number) for number in bins)))
    return steps


def three_sets() -> list[Catalog]:
    return [catalog(uneven(count, seed=count), name=name) for name, count in (("a", 400), ("b", 300), ("c", 250))]


@given(
    st.lists(st.lists(st.tuples(st.integers(1, 90), st.integers(0, 30)), min_size=1, max_size=40), min_size=1, max_size=3),
    st.sampled_from(BATCHINGS),
    st.booleans(),
    st.integers(1, 5),
)
def test_an_epoch_holds_every_sample_once_in_bins_within_limits(
    sets: list[list[tuple[int, int]]], batching: str, shuffle: bool, size: int
) -> None:
    catalogs = [
        catalog([tokens for tokens, _ in rows], mel_frames=[mel for _, mel in rows], name=str(number))
        for number, rows in enumerate(sets)
    ]
    settings = {"max_tokens": 90, "max_mel_frames": 30, "batching": batching, "shuffle": shuffle, "window_samples": 16}
    made = plan(*catalogs, **settings, global_batch_size=size)
    everything = [(dataset, sample) for dataset, rows in enumerate(sets) for sample in range(len(rows))]
    assert sorted(chain.from_iterable(read(made))) == everything
    for number in range(made.num_bins):
        rows = [sets[dataset][sample] for dataset, sample in made.samples_of(number)]
        tokens = [tokens for tokens, _ in rows]
        assert rows
        assert (len(tokens) * max(tokens) if batching == "padded" else sum(tokens)) <= 90
        assert sum(mel for _, mel in rows) <= 30
        assert batching != "single" or len(rows) == 1
    assert made.num_tokens == sum(tokens for rows in sets for tokens, _ in rows)
    assert made.fill == made.num_tokens / (made.num_bins * 90)


@pytest.mark.parametrize("batching", BATCHINGS)
@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_any_number_of_ranks_reads_the_same_samples_in_every_step(batching: str, world_size: int) -> None:
    made = plan(*three_sets(), weights=[0.5, 0.3, 0.2], batching=batching, global_batch_size=24)
    assert read(made, world_size=world_size) == read(made)
    half = made.num_steps // 2
    assert read(made)[:half] + read(made, world_size=world_size, start=half) == read(made), "changed in the middle"


def test_the_last_step_lacks_bins_and_every_rank_still_takes_as_many() -> None:
    made = plan(catalog([10] * 21), max_tokens=20, global_batch_size=8)
    assert (made.num_bins, made.num_steps) == (11, 2)
    last = [made.bins_of(1, rank=rank, world_size=4) for rank in range(4)]
    assert [len(bins) for bins in last] == [2] * 4
    assert sorted(chain.from_iterable(last)) == [-1] * 5 + [8, 9, 10]
    assert sum(bins == [-1, -1] for bins in last) == 1, "what there is goes to as many ranks as it can"
    assert made.samples_of(-1) == []
    assert made.bins_of(1) == [8, 9, 10, -1, -1, -1, -1, -1]


def test_a_batch_that_ranks_cannot_share_is_refused_with_both_numbers() -> None:
    made = plan(catalog([10] * 20), global_batch_size=8)
    with pytest.raises(ConfigError, match=r"global_batch_size=8 .* world_size=3 ranks; set it to a multiple of 3 \(9\)"):
        made.bins_of(0, rank=0, world_size=3)
    for rank, world_size in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(ConfigError, match="0 <= rank < world_size"):
            made.bins_of(0, rank=rank, world_size=world_size)
    with pytest.raises(IndexError, match="step 1: epoch 0 has 1"):
        made.bins_of(1)
    with pytest.raises(IndexError, match="bin 1: the plan has 1"):
        made.samples_of(1)


def test_ranks_wait_little_for_each_other() -> None:
    rng = np.random.default_rng(0)
    lengths = uneven(20_000, low=50, high=8000)
    patches = (rng.integers(0, 2, 20_000) * rng.integers(0, 4, 20_000) * np.array(lengths)).tolist()
    for size, worst in ((8, 1.05), (32, 1.05)):
        made = plan(catalog(lengths, patches=patches, shard_size=500), global_batch_size=size)
        ratios = []
        for step in range(made.num_steps - 1):
            loads = [made.costs[made.bins_of(step, rank=rank, world_size=8)].sum() for rank in range(8)]
            ratios.append(max(loads) / (sum(loads) / 8))
        unsorted = np.random.default_rng(0).permutation(made.costs)[: made.num_bins // 8 * 8].reshape(-1, 8)
        assert np.mean(ratios) < worst < (unsorted.max(1) / unsorted.mean(1)).mean()


def test_weights_hold_over_the_bins_of_an_epoch() -> None:
    made = plan(*three_sets(), weights=[0.5, 0.3, 0.2])
    counts = np.bincount(made.dataset_of)
    assert counts.max() == 400, "the first dataset is used up"
    assert counts.tolist() == [400, 240, 160]
    again = plan(*three_sets(), weights=[0.5, 0.3, 0.2], stopping_strategy="all_exhausted")
    assert np.bincount(again.dataset_of).tolist() == [625, 375, 250]


def test_weights_by_tokens_are_shares_of_tokens() -> None:
    short, long = catalog([100] * 4000, name="short"), catalog([1000] * 400, name="long")
    made = plan(short, long, weights=[0.5, 0.5], blend_by="tokens")
    counts = np.bincount(made.dataset_of)
    assert counts.tolist() == [4000, 400]
    assert np.bincount(plan(short, long, weights=[0.5, 0.5]).dataset_of).tolist() == [400, 400]


def test_samples_are_blended_all_along_the_epoch() -> None:
    made = plan(*three_sets(), weights=[0.5, 0.3, 0.2], max_tokens=8192)
    first_half = np.bincount(made.dataset_of[: made.num_samples // 2]) / (made.num_samples // 2)
    assert np.abs(first_half - [0.5, 0.3, 0.2]).max() < 0.05


def test_unshuffled_bins_come_in_the_order_of_the_dataset() -> None:
    lengths = uneven(500)
    assert plan(catalog(lengths), batching="single", shuffle=False).sample_of.tolist() == list(range(500))
    firsts = plan(catalog(lengths), shuffle=False)
    starts = firsts.sample_of[firsts.bin_starts[:-1]]
    assert (np.diff(starts) > 0).all()
    assert (np.diff(plan(catalog(lengths)).sample_of[:10]) < 0).any(), "shuffled ones do not"


def test_documents_of_a_bin_keep_the_order_of_the_pass() -> None:
    lengths = catalog(uneven(300))
    order = pass_order(lengths, seed=0, epoch=0, number=0, window=50)
    place = np.argsort(order)
    made = plan(lengths, window_samples=50)
    spans = [place[made.sample_of[start:stop]] for start, stop in pairwise(made.bin_starts)]
    assert all((np.diff(span) > 0).all() for span in spans)
    assert sum(len(span) > 1 for span in spans) > 10


OVERLONG = catalog([50, 9000, 60, 9100, 70], patches=[0, 0, 700, 0, 0])


def test_an_overlong_sample_stops_the_plan_and_is_named(tmp_path: Path) -> None:
    write_media(tmp_path / "data")
    prepare(recipe(tmp_path, [chat(0), chat(1), chat(2, {"image": "i.png"}), chat(3, {"image": "i.png"})]))
    made = read_catalog(tmp_path / "out")
    longest = int(made.num_tokens.max())
    with pytest.raises(ConfigError) as told:
        plan(made, max_tokens=longest - 1)
    assert f"record 2 (chat-00000002): {longest} tokens > max_tokens={longest - 1} (so are 1 more of 4 samples)" in str(
        told.value
    )
    assert "raise max_tokens, or set overlong to 'skip'" in str(told.value)
    with pytest.raises(ConfigError, match=r"24 patches > max_patches=20"):
        plan(made, max_patches=20)
    assert plan(made, max_tokens=longest).num_samples == 4


def test_overlong_samples_are_skipped_and_counted_where_that_is_wanted() -> None:
    made = plan(OVERLONG, catalog([5, 6]), overlong="skip", max_patches=600)
    assert sorted(chain.from_iterable(read(made))) == [(0, 0), (0, 4), (1, 0), (1, 1)]
    assert made.num_overlong == (3, 0)
    assert made.num_tokens == 50 + 70 + 5 + 6
    with pytest.raises(ConfigError, match="every sample of split 'train' is too long"):
        plan(OVERLONG, overlong="skip", max_tokens=10)


def test_padded_pairs_count_two_rows_of_the_longest_each() -> None:
    pairs = catalog([30, 50, 26], longest=[20, 40, 13], kind="preference")
    padded = plan(pairs, batching="padded", max_tokens=80, shuffle=False)
    assert [padded.samples_of(number) for number in range(padded.num_bins)] == [[(0, 0), (0, 2)], [(0, 1)]]
    packed = plan(pairs, batching="packed", max_tokens=80, shuffle=False)
    assert [packed.samples_of(number) for number in range(packed.num_bins)] == [[(0, 0), (0, 1)], [(0, 2)]]


def test_datasets_that_do_not_go_together_are_refused() -> None:
    pairs, plain = catalog([10, 20], kind="preference", name="dpo"), catalog([10, 20])
    with pytest.raises(ConfigError, match=r"one kind, got preference in build/dpo, sequence in build/set"):
        plan(pairs, plain)
    with pytest.raises(ConfigError, match=r"a weight for each or for none, got \[0.5, None\]"):
        plan(plain, plain, weights=[0.5, None])
    for weight in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match=r"datasets\.1\.weight: expected a number above 0"):
            plan(plain, plain, weights=[1.0, weight])
    with pytest.raises(ConfigError, match="datasets: expected 1 to"):
        plan()


CHANGES: list[dict[str, Any]] = [
    {"max_tokens": 8000},
    {"max_mel_frames": 10_000},
    {"max_patches": 10_000},
    {"batching": "padded"},
    {"global_batch_size": 2},
    {"seed": 1},
    {"shuffle": False},
    {"window_samples": 50},
    {"blend_by": "tokens"},
    {"stopping_strategy": "all_exhausted"},
    {"overlong": "skip"},
    {"weights": [0.5, 0.3, 0.25]},
    {"epoch": 1},
]


def test_every_setting_is_in_the_digest_and_only_what_the_plan_is_made_of() -> None:
    assert set(PlanConfig.model_fields) <= {name for change in CHANGES for name in change}
    base = {"weights": [0.5, 0.3, 0.2]}
    digests = [plan(*three_sets(), **{**base, **change}).digest for change in CHANGES]
    digests += [plan(*reversed(three_sets()), **base).digest, plan(*three_sets()[:2], weights=[0.5, 0.3]).digest]
    same = plan(*three_sets(), **base)
    assert len({*digests, same.digest}) == len(digests) + 1
    moved = [pickle.loads(pickle.dumps(one)) for one in three_sets()]
    for one in moved:
        object.__setattr__(one, "place", f"elsewhere/{one.place}")
    assert plan(*moved, **base).digest == same.digest, "where the datasets lie"
    assert plan(*moved, **base).sample_of.tolist() == same.sample_of.tolist()


def test_the_same_plan_comes_out_with_every_version_of_omniprep() -> None:
    """Who changes what comes out counts `PLAN_VERSION` up, so that a checkpoint is not taken for one of the new plan."""
    digest = hashlib.sha256()
    sets = [catalog([200 + number**2 * step % 3800 for number in range(step)], name=str(step)) for step in (397, 307, 251)]
    for batching in BATCHINGS:
        made = plan(*sets, weights=[0.5, 0.3, 0.2], batching=batching, global_batch_size=4, epoch=3)
        for array in (made.dataset_of, made.sample_of, made.bin_starts, made.costs):
            digest.update(np.ascontiguousarray(array, "<i8").tobytes())
    assert digest.hexdigest() == "4d2852dbf689064e20577f53170feae15328d336f3c252db5bb7608b65223347"


def test_an_epoch_is_another_order_of_the_same_samples() -> None:
    first, second = (plan(*three_sets(), epoch=epoch) for epoch in (0, 1))
    assert read(first) != read(second)
    assert sorted(chain.from_iterable(read(first))) == sorted(chain.from_iterable(read(second)))


def test_a_state_goes_on_where_it_was_saved() -> None:
    made = plan(*three_sets(), global_batch_size=4)
    state = made.state(7)
    again = plan(*three_sets(), global_batch_size=4)
    assert again.check_state(state) == 7
    assert read(again, start=7) == read(made)[7:]
    assert again.check_state(made.state(made.num_steps)) == made.num_steps
    assert set(state) == {"epoch", "step", "plan", "made_of"}
    assert len(repr(state)) < 2000


def test_a_state_of_another_plan_is_refused_with_what_differs() -> None:
    state = plan(*three_sets(), weights=[0.5, 0.3, 0.2]).state(3)
    with pytest.raises(ConfigError, match=r"another plan than this one \(config\.max_tokens: 8192 in the state, 4096 here\)"):
        plan(*three_sets(), weights=[0.5, 0.3, 0.2], max_tokens=4096).check_state(state)
    with pytest.raises(ConfigError, match=r"\(datasets\.2\.weight: 0\.2 in the state, 0\.1 here\); resume with the settings"):
        plan(*three_sets(), weights=[0.5, 0.3, 0.1]).check_state(state)
    with pytest.raises(ConfigError, match=r"epoch: 0 in the state, 1 here"):
        plan(*three_sets(), weights=[0.5, 0.3, 0.2], epoch=1).check_state(state)
    with pytest.raises(ConfigError, match=r"datasets\.2: \{.* in the state, 'nothing' here"):
        plan(*three_sets()[:2], weights=[0.5, 0.3]).check_state(state)
    fewer = [*three_sets()[:2], catalog(uneven(251, seed=251), name="c")]
    with pytest.raises(ConfigError, match=r"datasets\.2\.num_samples: 250 in the state, 251 here"):
        plan(*fewer, weights=[0.5, 0.3, 0.2]).check_state(state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"plan": "x", "made_of": {}}, "epoch: 'nothing' in the state, 0 here"),
        ({"step": -1}, "expected a step of 0 to 1, got -1"),
        ({"step": 9}, "expected a step of 0 to 1, got 9"),
        ({"step": "1"}, "expected a step of 0 to 1, got '1'"),
    ],
)
def test_a_state_that_is_none_is_refused(change: dict[str, Any], message: str) -> None:
    made = plan(catalog([10]))
    with pytest.raises(ConfigError, match=message):
        made.check_state({**made.state(0), **change})
    with pytest.raises(ConfigError, match="not the state of a stream: lacks epoch, step"):
        made.check_state({"plan": made.digest})


def test_it_can_be_sent_to_a_worker() -> None:
    made = plan(*three_sets())
    copy: Plan = pickle.loads(pickle.dumps(made))
    assert copy.digest == made.digest
    assert read(copy) == read(made)


def test_a_curriculum_counts_epochs_over_its_stages() -> None:
    blended = [Blended(catalog=one) for one in three_sets()]
    short, long = PlanConfig(max_tokens=8192), PlanConfig(max_tokens=32_768)
    stages = Curriculum((Stage(config=short, datasets=blended, num_epochs=2), Stage(config=long, datasets=blended[:1])))
    assert stages.num_epochs == 3
    assert [stages.stage_of(epoch) for epoch in range(3)] == [0, 0, 1]
    plans = [stages.plan(epoch) for epoch in range(3)]
    assert [made.config.max_tokens for made in plans] == [8192, 8192, 32_768]
    assert [len(made.datasets) for made in plans] == [3, 3, 1]
    assert len({made.digest for made in plans}) == 3
    assert plans[0].sample_of.tolist() != plans[1].sample_of.tolist()
    for outside in (3, -1):
        with pytest.raises(ConfigError, match=f"epoch {outside}: the curriculum has 3"):
            stages.plan(outside)
    with pytest.raises(ConfigError, match="num_epochs of at least 1, got 0"):
        Stage(config=short, datasets=blended, num_epochs=0)


def test_planning_loads_no_heavy_library() -> None:
    import subprocess
    import sys

    heavy = ["pyarrow", "pandas", "torch", "ray", "datasets"]
    code = f"import sys, omniprep.stream.curriculum; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
