"""Answers of a model in training to fixed prompts, to read.

They are made by transformers' own `generate`, with the positions that OmniPrep has laid out: those of `rope_mode: aligned`
transformers could not compute itself. `generate` goes on from them by one a token in each row, which is right behind a
prompt that ends in text. Nothing of the training is changed: the mode, the attention and the random state are put back.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MethodType
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

from omniprep.config import Config
from omniprep.profile import QWEN2_5_OMNI, ModelProfile
from omniprep.rng import rng_for
from omniprep.shards.manifest import Manifest
from omniprep.tokens.vocab import TextTokenizer
from omniprep.train.prompts import Prompt, encoder_of, prompts_from_file, prompts_from_records


class SampleSettings(Config):
    """Which prompts are answered, and how."""

    prompts: Path | Annotated[int, Field(ge=1)] = 4
    """A JSONL file of native conversations, whose last answer is left out; or how many records of the validation split."""
    media_roots: tuple[str, ...] = ()
    """Folders under which the media of that file may lie, besides its own."""
    max_new_tokens: int = Field(default=64, ge=1)
    do_sample: bool = True
    """False: always the most probable token; `temperature` and `top_p` have no say then."""
    temperature: float = Field(default=0.7, gt=0)
    top_p: float = Field(default=0.9, gt=0, le=1)
    repetition_penalty: float = Field(default=1.05, gt=0)
    """How much less probable tokens are that the prompt or the answer has already; 1 for none."""
    seed: int = Field(default=0, ge=0)


@dataclass(frozen=True, kw_only=True)
class SampleAnswer:
    """What a model made of a prompt."""

    key: str
    question: str
    answer: str
    expected: str
    num_tokens: int
    """Of the answer, with the token that ends it."""
    is_finished: bool
    """Whether it ended by itself, not at `max_new_tokens`."""
    seconds: float


def load_prompts(
    settings: SampleSettings, manifests: Mapping[str, Manifest], *, split: str, profile: ModelProfile = QWEN2_5_OMNI
) -> tuple[list[Prompt], TextTokenizer]:
    """Return the prompts and their tokenizer; `manifests` are those of the datasets that are trained on, by their places.

    Raises `ConfigError` for a prompt that cannot be read or encoded, and for a split without records.
    """
    encoder = encoder_of(next(iter(manifests.values())), profile)
    if isinstance(settings.prompts, Path):
        return prompts_from_file(settings.prompts, encoder, media_roots=settings.media_roots), encoder.tokenizer
    prompts = prompts_from_records(list(manifests), encoder.tokenizer, split=split, num_records=settings.prompts, profile=profile)
    return prompts, encoder.tokenizer


def sampler(
    model: nn.Module,
    settings: SampleSettings,
    manifests: Mapping[str, Manifest],
    *,
    split: str,
    profile: ModelProfile = QWEN2_5_OMNI,
) -> Callable[[], list[dict[str, Any]]]:
    """Return a function that lets the model answer, for the log. Prompts are read now, with the errors of `load_prompts`."""
    prompts, tokenizer = load_prompts(settings, manifests, split=split, profile=profile)
    return lambda: [asdict(answer) for answer in generate_samples(model, prompts, settings, tokenizer, profile=profile)]


def generate_samples(
    model: nn.Module,
    prompts: Sequence[Prompt],
    settings: SampleSettings,
    tokenizer: TextTokenizer,
    *,
    profile: ModelProfile = QWEN2_5_OMNI,
) -> list[SampleAnswer]:
    """Return the answer to each prompt: the same ones for the same weights and seed, whatever was computed before.

    `model` is a Thinker or a `TrainableThinker`; all ranks over which it is sharded call this with the same prompts.
    """
    thinker = getattr(model, "thinker", model)
    device = next(model.parameters()).device
    answers = []
    with _undisturbed(thinker, device), torch.no_grad(), _as_forward(model, thinker) as call:
        for prompt in prompts:
            start_s = time.perf_counter()
            torch.manual_seed(int(rng_for(prompt.key, seed=settings.seed, stage="answer").integers(1 << 62)))
            ids = call(generation_inputs(prompt, device), settings, profile)
            answers.append(_answer(prompt, ids, tokenizer, profile, seconds=time.perf_counter() - start_s))
    return answers


def generation_inputs(prompt: Prompt, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Return a prompt as the arguments of transformers' `generate`: a batch of one, with positions of four rows.

    The first row counts the tokens; with the three of TMRoPE alone, transformers could take a row for several documents.
    """
    inputs = {name: torch.from_numpy(np.ascontiguousarray(array)).to(device) for name, array in prompt.inputs.items()}
    positions = inputs["position_ids"]
    counted = torch.arange(positions.shape[1], device=positions.device)[None]
    inputs["position_ids"] = torch.cat([counted, positions])[:, None]
    return inputs | {name: inputs[name][None] for name in ("input_ids", "attention_mask")}


def _generate(thinker: Any, inputs: Mapping[str, Tensor], settings: SampleSettings, profile: ModelProfile) -> Tensor:
    """Return the ids of the answer."""
    from transformers import GenerationConfig

    sampling: dict[str, Any] = {"do_sample": False}
    if settings.do_sample:
        # Not named, `top_k` would be 50.
        sampling = {"do_sample": True, "temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0}
    config = GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        repetition_penalty=settings.repetition_penalty,
        eos_token_id=[profile.special.im_end, profile.special.endoftext],
        pad_token_id=profile.special.endoftext,
        use_cache=True,
        **sampling,
    )
    alone = not (torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1)
    # A rank that ends first goes on with the others: each step gathers weights from all of them.
    ids: Tensor = thinker.generate(**inputs, generation_config=config, synced_gpus=not alone)
    return ids[0, inputs["input_ids"].shape[1] :]


def _answer(prompt: Prompt, ids: Tensor, tokenizer: TextTokenizer, profile: ModelProfile, *, seconds: float) -> SampleAnswer:
    tokens = ids.tolist()
    ends = (profile.special.im_end, profile.special.endoftext)
    is_finished = bool(tokens) and tokens[-1] in ends
    return SampleAnswer(
        key=prompt.key,
        question=prompt.question,
        answer=tokenizer.full.decode(tokens[: len(tokens) - is_finished], skip_special_tokens=False),
        expected=prompt.expected,
        num_tokens=len(tokens),
        is_finished=is_finished,
        seconds=round(seconds, 3),
    )


@contextmanager
def _undisturbed(thinker: Any, device: torch.device) -> Iterator[None]:
    """Evaluate with an attention that knows caches, and without what the checkpoint says of generation; put all of it back."""
    from transformers import GenerationConfig

    modes = [(module, module.training) for module in thinker.modules()]
    text = thinker.model.language_model.config
    attention, own = text._attn_implementation, thinker.generation_config
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            thinker.eval()
            thinker.generation_config = GenerationConfig()
            text._attn_implementation = "sdpa"
            yield
        finally:
            text._attn_implementation = attention
            thinker.generation_config = own
            for module, mode in modes:
                module.training = mode


@contextmanager
def _as_forward(model: nn.Module, thinker: Any) -> Iterator[Callable[..., Tensor]]:
    """Yield `_generate`; of a sharded model, as a call for which it gathers its root's weights as for any other."""
    if not isinstance(model, FSDPModule):
        yield lambda *arguments: _generate(thinker, *arguments)
        return
    model.answer = MethodType(lambda _, *arguments: _generate(thinker, *arguments), model)
    register_fsdp_forward_method(model, "answer")
    try:
        yield model.answer
    finally:
        del model.answer
        model.reshard()
