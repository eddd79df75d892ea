"""A tiny Thinker takes a few steps on a dataset: the last proof that shards are what the model expects.

    python -m omniprep.train.tiny OUT --steps 20

The model is transformers' own `Qwen2_5OmniThinkerForConditionalGeneration` with the released layout (token ids, mel bins,
patches, TMRoPE sections in the released proportions) and small widths, about 20 M parameters, nearly all of them the
embedding and the head. It sees the stored `position_ids`; a wrong count of placeholders, mel frames or patches stops it
with an error, and labels that do not belong to their inputs leave the loss where it was. It is no trainer: one fixed
batch of samples, gradients summed sample by sample, AdamW.
"""

import argparse
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from torch.nn import functional as F  # noqa: N812

from omniprep.encode.model_inputs import model_inputs
from omniprep.errors import ConfigError, OmniPrepError
from omniprep.profile import IGNORE_INDEX, QWEN2_5_OMNI, ModelProfile
from omniprep.shards.reader import ShardReader, index_rows

ModelInputs = Mapping[str, npt.NDArray[Any]]
"""Inputs of one sample as `encode.model_inputs` makes them: transformers' names, no batch axis."""

_HIDDEN = 64
_HEAD_DIM = 16
_MROPE_SECTION = [2, 3, 3]
"""Rotary pairs of the temporal, height and width ids: [16, 24, 24] of the released model, for a head of 16 instead of 128."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """What one optimizer step did."""

    number: int
    loss: float
    """Cross-entropy in nats, mean over the supervised tokens of the whole batch, before the update."""
    seconds: float


def tiny_thinker(profile: ModelProfile = QWEN2_5_OMNI, *, seed: int = 0) -> Any:
    """Return a randomly initialised Thinker of transformers with small widths and the profile's token ids and features."""
    from transformers import Qwen2_5OmniThinkerConfig, Qwen2_5OmniThinkerForConditionalGeneration

    special = profile.special
    config = Qwen2_5OmniThinkerConfig(
        audio_config={
            "num_mel_bins": profile.num_mel_bins,
            "encoder_layers": 2,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 2 * _HIDDEN,
            "d_model": _HIDDEN,
            "output_dim": _HIDDEN,
        },
        vision_config={
            "depth": 2,
            "hidden_size": _HIDDEN,
            "intermediate_size": 2 * _HIDDEN,
            "num_heads": 4,
            "patch_size": profile.patch_size,
            "spatial_merge_size": profile.merge_size,
            "temporal_patch_size": profile.temporal_patch_size,
            "fullatt_block_indexes": [1],
            "out_hidden_size": _HIDDEN,
        },
        text_config={
            "vocab_size": profile.vocab_size,
            "hidden_size": _HIDDEN,
            "intermediate_size": 2 * _HIDDEN,
            "num_hidden_layers": 2,
            "num_attention_heads": _HIDDEN // _HEAD_DIM,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": _MROPE_SECTION},
            "tie_word_embeddings": False,
        },
        audio_token_index=special.audio,
        image_token_index=special.image,
        video_token_index=special.video,
        audio_start_token_id=special.audio_bos,
        audio_end_token_id=special.audio_eos,
        position_id_per_seconds=profile.position_id_per_second,
        seconds_per_chunk=int(profile.seconds_per_chunk),
        # The class has no default for these two; the released configuration file supplies them.
        vision_start_token_id=special.vision_bos,
        vision_end_token_id=special.vision_eos,
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    return Qwen2_5OmniThinkerForConditionalGeneration(config).train()


def supervised_loss(model: Any, inputs: ModelInputs) -> Any:
    """Return the cross-entropy summed over a sample's supervised tokens, a scalar tensor.

    Only supervised rows go through the head: with a vocabulary of 150,000, the logits of every prompt token would cost
    more than the rest of the model.
    """
    tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in inputs.items()}
    targets = tensors.pop("labels")[1:]
    for name, axis in (("input_ids", 0), ("attention_mask", 0), ("position_ids", 1)):
        tensors[name] = tensors[name].unsqueeze(axis)  # a batch of one
    hidden = model.model(**tensors, use_cache=False).last_hidden_state[0, :-1]
    supervised = targets != IGNORE_INDEX
    return F.cross_entropy(model.lm_head(hidden[supervised]), targets[supervised], reduction="sum")


def num_targets(inputs: ModelInputs) -> int:
    """Return how many tokens of a sample are predicted: a supervised first token has nothing before it."""
    return int(np.count_nonzero(inputs["labels"][1:] != IGNORE_INDEX))


def train_steps(model: Any, batch: Sequence[ModelInputs], *, steps: int, learning_rate: float = 3e-3) -> Iterator[Step]:
    """Take `steps` AdamW steps on one fixed batch and yield each as it is done.

    The loss is the sum over all samples divided by all their supervised tokens, so a long answer weighs what it is long.
    """
    total = sum(num_targets(inputs) for inputs in batch)
    if not total:
        raise ConfigError("nothing to learn: none of the chosen records has a supervised token")
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    for number in range(1, steps + 1):
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        loss = 0.0
        for inputs in batch:
            part = supervised_loss(model, inputs) / total
            part.backward()
            loss += part.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        yield Step(number=number, loss=loss, seconds=time.perf_counter() - start)


def choose_rows(rows: Sequence[Mapping[str, Any]], *, num_samples: int) -> list[Mapping[str, Any]]:
    """Return up to `num_samples` index rows, the shortest of every mix of modalities in turn.

    >>> text = {"has_audio": False, "has_image": False, "has_video": False, "has_video_with_sound": False, "num_supervised": 1}
    >>> rows = [{**text, "key": "a", "num_tokens": 9}, {**text, "key": "b", "num_tokens": 5}]
    >>> rows += [{**text, "key": "c", "num_tokens": 99, "has_audio": True}]
    >>> [row["key"] for row in choose_rows(rows, num_samples=2)]
    ['b', 'c']
    """
    mixes: dict[tuple[bool, ...], list[Mapping[str, Any]]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: (row["num_tokens"], row["key"])):
        if row["num_supervised"]:
            mixes[tuple(row[f"has_{name}"] for name in ("audio", "image", "video", "video_with_sound"))].append(row)
    in_turn = chain.from_iterable(zip_longest(*(mixes[mix] for mix in sorted(mixes))))
    return [row for row in in_turn if row is not None][:num_samples]


def read_batch(folder: Path, *, num_samples: int, split: str = "train") -> list[tuple[str, ModelInputs]]:
    """Return (key, model inputs) of `num_samples` records of a finished dataset.

    Raises `ConfigError` if the split is empty or the dataset holds preferences, `DatasetError` if it is damaged.
    """
    rows = choose_rows([row for row in index_rows(folder) if row["split"] == split], num_samples=num_samples)
    if not rows:
        raise ConfigError(f"{folder}: no record with a supervised token in split {split!r}")
    batch: list[tuple[str, ModelInputs]] = []
    for row in rows:
        with ShardReader(folder, row["shard"]) as reader:
            number = next(number for number, other in enumerate(reader.rows) if other["key"] == row["key"])
            sample = reader.read(number)
        if "tokens" not in sample.layouts:
            raise ConfigError(f"{folder}: expected conversations or documents, the dataset holds {' and '.join(sample.layouts)}")
        batch.append((row["key"], model_inputs(sample)))
    return batch


def train_tiny(
    folder: Path, *, steps: int = 20, num_samples: int = 8, seed: int = 0, console: Console | None = None
) -> list[float]:
    """Train a tiny Thinker on a finished dataset, print a line a step, and return the losses in order."""
    console = console or Console()
    # So small a model gains nothing from threads, and on a busy machine their waiting for each other costs it 20-fold.
    torch.set_num_threads(1)
    batch = read_batch(folder, num_samples=num_samples)
    model = tiny_thinker(seed=seed)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    num_tokens = sum(inputs["input_ids"].size for _, inputs in batch)
    num_supervised = sum(num_targets(inputs) for _, inputs in batch)
    console.print(
        f"tiny Thinker: {num_parameters / 1e6:.1f} M parameters; one batch of {len(batch)} records, {num_tokens} tokens, "
        f"{num_supervised} supervised: {', '.join(key for key, _ in batch)}",
        highlight=False,
        soft_wrap=True,
    )
    losses = []
    for step in train_steps(model, [inputs for _, inputs in batch], steps=steps):
        losses.append(step.loss)
        bar = "█" * round(40 * step.loss / losses[0])
        console.print(f"  step {step.number:3d}  loss {step.loss:7.4f}  {step.seconds:5.2f} s  {bar}", highlight=False)
    return losses


def main(arguments: list[str] | None = None) -> int:
    """Train a tiny Thinker on a finished dataset; exit code 0 if the loss fell, 1 if it did not, 2 for bad use."""
    parser = argparse.ArgumentParser(prog="python -m omniprep.train.tiny", description=main.__doc__)
    parser.add_argument("folder", type=Path, help="a finished dataset (the output of `omniprep prepare`)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--samples", type=int, default=8, help="records in the batch")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    console = Console()
    try:
        losses = train_tiny(given.folder, steps=given.steps, num_samples=given.samples, seed=given.seed, console=console)
    except OmniPrepError as error:
        Console(stderr=True).print(f"[red]error:[/] {error}", highlight=False)
        return 2
    fell = losses[-1] < losses[0]
    verb = "fell" if fell else "did NOT fall"
    console.print(f"loss {verb}: {losses[0]:.4f} -> {losses[-1]:.4f} in {len(losses)} steps", highlight=False)
    return 0 if fell else 1


if __name__ == "__main__":
    sys.exit(main())
