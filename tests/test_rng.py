"""Randomness by sample."""

from hypothesis import given
from hypothesis import strategies as st

from omniprep.rng import rng_for, uniform_for


@given(key=st.text(st.characters(exclude_categories=["Cs"])), seed=st.integers(), stage=st.sampled_from(["split", "other"]))
def test_one_draw_is_the_generators_first(key: str, seed: int, stage: str) -> None:
    assert uniform_for(key, seed=seed, stage=stage) == rng_for(key, seed=seed, stage=stage).random()
