"""A step is the same on one rank and on two, whatever media each of them has."""

import os
from typing import Any

import pytest

pytestmark = pytest.mark.reference
torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch.distributed as dist  # noqa: E402

from omniprep.errors import ConfigError  # noqa: E402
from omniprep.train.parallel import (  # noqa: E402
    ParallelSettings,
    World,
    all_sum,
    clip_gradients,
    decoder_layers,
    shard,
    world,
)
from tests.train.rank_work import ALL, Compared, batch_of, compare_all, trainable  # noqa: E402
from tests.train.ranks import RankFailed, outcomes_of, run_ranks  # noqa: E402

TEXT, MEDIA = ["text", "dialogue"], ["mixed"]
CASES: dict[str, dict[str, Any]] = {
    "text, media": {"per_rank": [TEXT, MEDIA]},
    "media, text": {"per_rank": [MEDIA, TEXT]},
    "audio, image": {"per_rank": [["audio"], ["image"]]},
    "nothing to learn, media": {"per_rank": [[], MEDIA]},
    "recomputed": {"per_rank": [TEXT, MEDIA], "settings": ParallelSettings(activation_checkpointing=True)},
    "kept gathered": {"per_rank": [MEDIA, TEXT], "settings": ParallelSettings(reshard_after_forward=False)},
    # What is frozen needs no backward pass on a rank without media, but the others wait for it there.
    "frozen language model": {"per_rank": [TEXT, MEDIA], "names": ("audio_adapter", "vision_adapter")},
    "LoRA": {"per_rank": [TEXT, MEDIA], "names": ("lora", "language_model", "audio_adapter")},
    "frozen embeddings": {"per_rank": [MEDIA, TEXT], "names": ("audio_encoder", "vision_adapter", "layers")},
}


@pytest.fixture(scope="module")
def compared() -> dict[str, Compared]:
    return run_ranks(compare_all, 2, CASES)[0]


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_with_different_media_take_the_step_of_one_process(compared: dict[str, Compared], case: str) -> None:
    found = compared[case]
    assert found.loss == pytest.approx(found.loss_alone, rel=1e-6)
    assert found.norm == pytest.approx(found.norm_alone, rel=1e-5)
    assert found.worst_gradient <= 1e-5
    assert found.norm_alone > 1e-3


def losses_of_steps(here: World, num_steps: int) -> list[float]:
    """Train on two batches a step, however many ranks share them."""
    model = shard(trainable(), ParallelSettings(), here)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rows = [batch_of("text", "audio"), batch_of("image", "film")]
    total = sum(int((labels != -100).sum()) for _, labels in rows)
    losses = []
    for _ in range(num_steps):
        parts = [model(*row).sum() / total for row in rows[here.rank :: here.world_size]]
        for part in parts:
            part.backward()
        clip_gradients(model.parameters(), 1.0, here)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(all_sum([sum(part.item() for part in parts)], here)[0])
    return losses


def test_one_and_two_ranks_have_the_same_losses_step_by_step() -> None:
    one, two = run_ranks(losses_of_steps, 1, 4)[0], run_ranks(losses_of_steps, 2, 4)
    assert two[0] == two[1]
    assert two[0] == pytest.approx(one, rel=1e-5)
    assert one[-1] < one[0] - 1


def frozen_losses(here: World) -> list[list[float]]:
    """Ask a model in which nothing trains, as a reference is, once sharded and once whole."""
    batch = batch_of(*(TEXT, MEDIA)[here.rank])
    with torch.no_grad():
        return [model(*batch).tolist() for model in (shard(trainable(names=()), ParallelSettings(), here), trainable(names=()))]


def test_a_frozen_model_answers_sharded_as_it_does_whole() -> None:
    for sharded, whole in run_ranks(frozen_losses, 2):
        assert sharded == pytest.approx(whole, rel=1e-6)


def bf16_step(here: World) -> dict[str, Any]:
    """Take a step in bfloat16 with a frozen part that is stored in it."""
    model = shard(trainable(names=("language_model", "audio_adapter"), dtype=torch.bfloat16), ParallelSettings(bf16=True), here)
    seen = []
    model.thinker.model.language_model.norm.register_forward_hook(lambda _module, _given, out: seen.append(out.dtype))
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=1e-2)
    losses = []
    for _ in range(2):
        loss = model(*batch_of("mixed")).mean()
        loss.backward()
        gradient_types = {value.grad.dtype for value in model.parameters() if value.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return {
        "computed in": set(seen),
        "gradients": gradient_types,
        "trained": {value.dtype for value in model.parameters() if value.requires_grad},
        "frozen": {value.dtype for value in model.parameters() if not value.requires_grad},
        "losses": losses,
    }


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_bfloat16_computes_over_float32_weights_and_gradients(num_ranks: int) -> None:
    (found, *_) = run_ranks(bf16_step, num_ranks)
    assert found["computed in"] == {torch.bfloat16}
    assert found["gradients"] == found["trained"] == {torch.float32}
    assert found["frozen"] == {torch.bfloat16}
    with torch.no_grad():
        exact = trainable(names=("language_model", "audio_adapter"))(*batch_of("mixed")).mean().item()
    assert found["losses"][0] == pytest.approx(exact, rel=5e-3)
    assert found["losses"][1] < found["losses"][0]


def sums(here: World) -> Any:
    doubled = all_sum(torch.tensor([here.rank + 1.0, 0.5]), here)
    return all_sum([here.rank + 1, 2**53], here), doubled.tolist(), doubled.dtype, here


def test_sums_over_ranks_are_in_float64() -> None:
    for rank, (numbers, tensor, dtype, here) in enumerate(run_ranks(sums, 2)):
        assert (numbers, tensor, dtype) == ([3.0, 2.0**54], [3.0, 1.0], torch.float64)
        assert (here.rank, here.world_size, here.is_main, here.is_distributed) == (rank, 2, rank == 0, True)


def leave(here: World) -> list[float]:
    """Die on rank 1; what rank 0 waits for will not come."""
    if here.rank == 1:
        os._exit(9)
    return all_sum([1.0], here)


def test_a_rank_whose_peer_died_fails_instead_of_waiting() -> None:
    survivor, dead = outcomes_of(leave, 2)
    assert isinstance(survivor, RankFailed)
    assert "RuntimeError" in str(survivor)
    assert isinstance(dead, RankFailed)


def test_alone_there_is_a_group_of_one_for_as_long_as_the_world_lasts() -> None:
    with world(device="cpu") as here:
        assert (here.rank, here.world_size, here.is_distributed, here.is_main) == (0, 1, False, True)
        assert dist.get_world_size() == 1
        assert all_sum([1.5, 2], here) == [1.5, 2.0]
        with world(device="cpu") as inner:
            assert inner == here
        assert dist.is_initialized()
        model = trainable()
        assert shard(model, ParallelSettings(), here) is model
        assert type(model.thinker.lm_head.weight) is torch.nn.Parameter
        assert len(decoder_layers(model)) == 2
    assert not dist.is_initialized()


TORCHRUN = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"MASTER_PORT": None}, "half a process group: MASTER_PORT not set"),
        ({"RANK": None, "LOCAL_RANK": None}, "RANK, LOCAL_RANK not set"),
        ({"RANK": "2"}, "RANK=2 is not below WORLD_SIZE=2"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two': expected a whole number"),
    ],
)
def test_an_environment_that_makes_no_sense_is_the_users_mistake(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, str | None], message: str
) -> None:
    for name, value in (TORCHRUN | changes).items():
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message), world(device="cpu"):
        pass


def test_what_runs_where_is_settled_by_the_device() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    settings = ParallelSettings()
    assert (settings.computes_in_bf16(cpu), settings.computes_in_bf16(gpu)) == (False, True)
    assert settings.chosen_attention == "varlen"
    assert ParallelSettings(attention="sdpa").chosen_attention == "sdpa"
    assert ParallelSettings(bf16=True).computes_in_bf16(cpu)


def test_gradients_are_clipped_to_a_global_norm() -> None:
    with world(device="cpu") as here:
        weights = [torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))]
        weights[0].grad, weights[1].grad = torch.tensor([3.0, 0.0]), torch.tensor([4.0])
        assert clip_gradients(weights, None, here) == 5.0
        assert clip_gradients(weights, 1.0, here) == 5.0
        assert clip_gradients(weights, 1.0, here) == pytest.approx(1.0, rel=1e-5)
        assert clip_gradients(weights[2:], 1.0, here) == 0.0
    assert len(ALL) == 6
