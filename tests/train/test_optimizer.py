"""The learning rate is a function of the step; what decays are matrices."""

import pytest

torch = pytest.importorskip("torch")

from omniprep.train.optimizer import OptimizerSettings, learning_rate_at, make_optimizer, set_learning_rate  # noqa: E402


def rates(num_steps: int = 12, **settings: object) -> list[float]:
    made = OptimizerSettings.model_validate({"learning_rate": 2.0, **settings})
    return [learning_rate_at(step, num_steps=num_steps, settings=made) for step in range(num_steps)]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_it_rises_to_its_highest_and_falls_to_its_last_value(schedule: str) -> None:
    found = rates(schedule=schedule, warmup_steps=4, min_learning_rate_ratio=0.1)
    assert found[:4] == [0.5, 1.0, 1.5, 2.0]
    assert found[4] == 2.0
    assert found[4:] == sorted(found[4:], reverse=True)
    assert found[-1] == pytest.approx(2.0 if schedule == "constant" else 0.2)


def test_the_cosine_is_half_way_down_in_its_middle() -> None:
    assert rates(num_steps=11, min_learning_rate_ratio=0.0)[5] == pytest.approx(1.0)


@pytest.mark.parametrize("settings", [{"num_steps": 1}, {"num_steps": 3, "warmup_steps": 5}, {"num_steps": 2, "warmup_steps": 2}])
def test_short_runs_have_a_rate_above_0(settings: dict[str, int]) -> None:
    assert all(0 < rate <= 2.0 for rate in rates(**settings))


def test_matrices_decay_and_norms_and_biases_do_not() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3))
    model[0].bias.requires_grad_(False)
    optimizer = make_optimizer(model.parameters(), OptimizerSettings(weight_decay=0.25))
    decays = {id(one): group["weight_decay"] for group in optimizer.param_groups for one in group["params"]}
    assert decays == {id(model[0].weight): 0.25, id(model[1].weight): 0.0, id(model[1].bias): 0.0}
    set_learning_rate(optimizer, 0.125)
    assert {group["lr"] for group in optimizer.param_groups} == {0.125}
