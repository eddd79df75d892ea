"""Answers of a model in training to fixed prompts, to read."""

from pathlib import Path

from pydantic import Field

from omniprep.config import Config


class SampleSettings(Config):
    """Which prompts are answered, and how."""

    prompts: Path | int = 4
    """A JSONL file of native conversations, whose last answer is left out; or how many records of the validation split."""
    max_new_tokens: int = Field(default=64, ge=1)
    do_sample: bool = True
    """False: always the most probable token; `temperature` and `top_p` have no say then."""
    temperature: float = Field(default=0.7, gt=0)
    top_p: float = Field(default=0.9, gt=0, le=1)
    repetition_penalty: float = Field(default=1.05, gt=0)
    """How much less probable tokens are that the prompt or the answer has already; 1 for none."""
    seed: int = Field(default=0, ge=0)
