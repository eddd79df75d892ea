"""Prompts of made records, and what the ranks of a test answer to them."""

from typing import Any

from omniprep.train.forward import TrainableThinker
from omniprep.train.generate import SampleAnswer, SampleSettings, generate_samples
from omniprep.train.parallel import ParallelSettings, World, shard
from omniprep.train.prompts import Prompt, prompt_of
from omniprep.train.tiny import tiny_thinker
from tests.stream.model_records import ROWS, encode, encoder
from tests.train.rank_work import batch_of


def prompt(name: str) -> Prompt:
    return prompt_of(encode(ROWS[name], name), encoder().tokenizer)


def answers(model: Any, names: tuple[str, ...], settings: SampleSettings) -> list[SampleAnswer]:
    return generate_samples(model, [prompt(name) for name in names], settings, encoder().tokenizer)


def answer_on_ranks(
    world: World, names: tuple[str, ...], settings: SampleSettings, parallel: ParallelSettings
) -> tuple[list[str], list[str], float]:
    """Return the answers before and after a step's forward and backward pass, and that step's loss."""
    model = shard(TrainableThinker(tiny_thinker(seed=2)), parallel, world)
    first = answers(model, names, settings)
    loss = model(*batch_of("mixed")).sum()
    loss.backward()
    second = answers(model, names, settings)
    return [one.answer for one in first], [one.answer for one in second], float(loss.detach())
