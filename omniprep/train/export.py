"""A trained Thinker as a folder that plain transformers opens, with the names of the released weights.

The weights that a run trains may lie in pieces on many ranks, with adapters beside them and wrapped for checkpointing;
what is written is whole, merged and plain. The model in memory stays as it is.
"""

import copy
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omniprep.errors import ConfigError
from omniprep.train.lora import has_lora, is_adapter, merged

PROCESSOR_FILES = (
    "added_tokens.json",
    "chat_template*",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tokenizer*",
    "video_preprocessor_config.json",
    "vocab.json",
)
"""What transformers makes a processor of, by its names in released checkpoints."""
_THINKER = "thinker."
"""Begins the names of the Thinker's weights in a released Omni checkpoint."""


def save_thinker(thinker: Any, folder: Path, *, merge_lora: bool = True, dtype: torch.dtype | None = None) -> None:
    """Write a Thinker in the layout of `save_pretrained`, for `Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained`.

    With adapters, their sum with the base is written, or with `merge_lora=False` the base alone. `dtype` is that of the
    file, by default that in memory: float32 for what was trained. Every rank of a sharded model calls it; the first writes.
    """
    state = full_state(thinker)
    if _is_main():
        write_thinker(thinker, state, folder, merge_lora=merge_lora, dtype=dtype)


def write_thinker(
    thinker: Any, state: dict[str, Tensor], folder: Path, *, merge_lora: bool = True, dtype: torch.dtype | None = None
) -> None:
    """Write what `full_state` gave, as `save_thinker` says; one rank calls it."""
    if has_lora(thinker):
        state = merged(thinker, state) if merge_lora else merged(thinker, _without_adapters(state))
    if dtype is not None:
        state = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    # A plain model of the same shape without memory: only it knows the names of its saved weights.
    config = copy.deepcopy(thinker.config)
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        plain = type(thinker)(config).to(state["lm_head.weight"].dtype)
    plain.generation_config = thinker.generation_config
    folder.mkdir(parents=True, exist_ok=True)
    plain.save_pretrained(folder, state_dict=state)


def full_state(thinker: Any) -> dict[str, Tensor]:
    """Return all weights by name, whole and on the CPU, on the first rank; every rank of a sharded model calls it."""
    state = {}
    for name, value in thinker.state_dict().items():
        tensor = value.full_tensor() if hasattr(value, "full_tensor") else value
        if _is_main():
            state[name] = tensor.detach().cpu()
    return state


def _without_adapters(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return weights in which the adapters add nothing."""
    return {name: torch.zeros_like(tensor) if is_adapter(name) else tensor for name, tensor in state.items()}


def _is_main() -> bool:
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def copy_processor(checkpoint: str, folder: Path) -> list[str]:
    """Copy tokenizer, chat template and processor settings of a checkpoint beside exported weights; return their names.

    `checkpoint` is a folder or a hub id; of one that has none of these, such as `tiny`, nothing is copied.
    """
    try:
        source = checkpoint_folder(checkpoint, patterns=PROCESSOR_FILES)
    except ConfigError:
        return []
    found = sorted({file for pattern in PROCESSOR_FILES for file in source.glob(pattern) if file.is_file()})
    for file in found:
        shutil.copyfile(file, folder / file.name)
    return [file.name for file in found]


def checkpoint_folder(checkpoint: str, *, patterns: Sequence[str] | None = None) -> Path:
    """Return the folder of a checkpoint; one of the hub is fetched if it is not here yet, or those of its files.

    Raises `ConfigError` if it is neither.
    """
    if Path(checkpoint).is_dir():
        return Path(checkpoint)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(checkpoint, allow_patterns=list(patterns) if patterns else None))
    except (OSError, ValueError) as error:  # the hub's own errors are kinds of these
        raise ConfigError(
            f"{checkpoint}: expected a folder or the id of a model on the hub; {' '.join(str(error).split()):.300}"
        ) from None


def put_into_omni(thinker: Path, *, source: Path, folder: Path) -> None:
    """Write a copy of the released Omni checkpoint `source` in which the Thinker is the one that `save_thinker` wrote.

    The released files hold its weights under `thinker.` beside the Talker's and the vocoder's. They are copied one file at a
    time, each with the new weights, in the types of the old; everything else is copied as it is. Raises `ConfigError` if
    the two are not of the same shape.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    ours = _Weights(thinker)
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
    found = set()
    for file in sorted(source.glob("*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            tensors = {name: weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118
            metadata = weights.metadata()
        for name, old in tensors.items():
            if name.startswith(_THINKER):
                tensors[name] = ours.like(name.removeprefix(_THINKER), old)
                found.add(name.removeprefix(_THINKER))
        save_file(tensors, folder / file.name, metadata)
    if left := sorted(ours.names - found):
        raise ConfigError(
            f"{source}: expected a released Omni checkpoint with {_THINKER}{left[0]} in it; {len(left)} are missing"
        )


class _Weights:
    """The weights in a folder of `save_pretrained`, read when they are asked for."""

    def __init__(self, folder: Path) -> None:
        from safetensors import safe_open

        self._folder = folder
        self._file_of: dict[str, Path] = {}
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, framework="pt") as weights:
                self._file_of |= dict.fromkeys(weights.keys(), file)
        self.names = set(self._file_of)

    def like(self, name: str, other: Tensor) -> Tensor:
        """Return a weight in the type of another. Raises `ConfigError` if it has another shape, or is not there."""
        from safetensors import safe_open

        if name not in self._file_of:
            raise ConfigError(f"{self._folder}: no weight {name}, which the Omni checkpoint has")
        with safe_open(self._file_of[name], framework="pt") as weights:
            tensor: Tensor = weights.get_tensor(name)
        if tensor.shape != other.shape:
            raise ConfigError(
                f"{self._folder}: {name} is {tuple(tensor.shape)}, that of the Omni checkpoint {tuple(other.shape)}; "
                "put a Thinker into the checkpoint that it was trained from"
            )
        return tensor.to(other.dtype)
