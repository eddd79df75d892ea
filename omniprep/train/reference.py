"""How likely a reference model finds the answers of a preference: the fixed point that DPO measures departures from.

It is the model that the training began with, got in one of three ways: a frozen copy (a second model in memory and a second
forward pass), the trained model with its adapters off (the pass alone), or values computed once for the whole dataset and
stored beside its shards as `reference-SPLIT-DIGEST.parquet` (neither). The digest is that of the model's weights, so values
of another model are never taken for its own.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from omniprep.errors import ConfigError
from omniprep.shards.index import parquet_bytes
from omniprep.storage.folder import open_folder
from omniprep.train.dpo import DpoSettings
from omniprep.train.forward import TrainableThinker
from omniprep.train.lora import adapters_off, is_adapter
from omniprep.train.loss import document_sums, documents_of
from omniprep.train.parallel import release_memory

StreamBatch = Mapping[str, Any]
"""What `StreamingDataset` yields, its tensors on the model's device."""

_COLUMNS = ("source", "key", "chosen", "rejected", "chosen_tokens", "rejected_tokens")
_NUM_VALUES_OF_A_WEIGHT = 4096


class Reference(Protocol):
    """A model that does not learn."""

    def __call__(self, batch: StreamBatch) -> Tensor:
        """Return (num_documents,) the log-probability of each document's supervised tokens; all ranks call it together."""


def log_probabilities(model: TrainableThinker, batch: StreamBatch) -> Tensor:
    """Return (num_documents,) the log-probability of each document's supervised tokens, without gradients."""
    with torch.no_grad():
        losses = model(batch["inputs"], batch["shift_labels"])
    return -document_sums(losses, documents_of(batch), len(batch["documents"]))


class FrozenCopy:
    """A second model."""

    def __init__(self, model: TrainableThinker) -> None:
        self._model = model.eval()
        self._model.requires_grad_(False)

    def __call__(self, batch: StreamBatch) -> Tensor:
        """Return its log-probabilities."""
        return log_probabilities(self._model, batch)


class AdaptersOff:
    """The trained model without its adapters."""

    def __init__(self, model: TrainableThinker) -> None:
        """Raise `ConfigError` if it has none."""
        with adapters_off(model.thinker):
            self._model = model

    def __call__(self, batch: StreamBatch) -> Tensor:
        """Return the base's log-probabilities."""
        with adapters_off(self._model.thinker):
            return log_probabilities(self._model, batch)


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredPair:
    """What a reference model made of one preference."""

    chosen: float
    rejected: float
    chosen_tokens: int
    rejected_tokens: int


class Stored:
    """Values that were computed before, by source and key."""

    def __init__(self, pairs: Mapping[tuple[str, str], StoredPair]) -> None:
        self._pairs = pairs

    def __call__(self, batch: StreamBatch) -> Tensor:
        """Return the stored log-probabilities. Raises `ConfigError` for a pair that has none, or that is another one now."""
        documents = documents_of(batch)
        counts = torch.bincount(documents, minlength=len(batch["documents"])).tolist()
        values = []
        for document, count in zip(batch["documents"], counts, strict=True):
            pair = self._pairs.get((document.source, document.key))
            if pair is None or count != getattr(pair, f"{document.sequence}_tokens"):
                found = "none" if pair is None else "those of another answer"
                raise ConfigError(
                    f"{document.source}/{document.key}: expected stored reference log-probabilities, found {found}; the dataset "
                    "was prepared anew: remove its reference-*.parquet, and the next run computes them again"
                )
            values.append(getattr(pair, document.sequence))
        return torch.tensor(values, dtype=torch.float32, device=documents.device)


def open_reference(
    settings: DpoSettings,
    *,
    model: TrainableThinker,
    frozen_copy: Callable[[], TrainableThinker],
    parts: Sequence[tuple[str, str]],
    read: Callable[[str, str], Iterable[StreamBatch]],
) -> Reference:
    """Return the reference that the settings name, for a `model` that has not learnt anything yet.

    `frozen_copy` makes a second model. `parts` are the datasets and splits that it will be asked about, and
    `read(place, split)` yields every pair of one once, on the model's device. What is not needed is not called. All ranks
    call it. Raises `ConfigError`.
    """
    if settings.reference == "adapter_off":
        return AdaptersOff(model)
    if settings.reference == "copy":
        return FrozenCopy(frozen_copy())
    digest = weights_digest(model.thinker)
    wanted = [(place, split, reference_name(split, digest)) for place, split in parts]
    missing = [one for one in wanted if open_folder(one[0]).size(one[2]) is None]
    missing = _from_main(missing)  # on another machine the file may be seen later
    if missing:
        copy = FrozenCopy(frozen_copy())
        for place, split, name in missing:
            compute_reference(copy, read(place, split), place=place, name=name)
        del copy
        release_memory()  # that it need not be there while the model learns is what storing is for
    return Stored(_merged((place, read_reference(place, name)) for place, _, name in wanted))


def reference_name(split: str, digest: str) -> str:
    """Return the name of the file beside the shards.

    >>> reference_name("train", "0123456789abcdef0123")
    'reference-train-0123456789abcdef.parquet'
    """
    return f"reference-{split}-{digest[:16]}.parquet"


def compute_reference(reference: Reference, batches: Iterable[StreamBatch], *, place: str, name: str) -> int:
    """Store the log-probabilities of all pairs of a dataset in its folder; return how many pairs there were.

    The file is absent or complete. All ranks call it, each with its own part of the batches; the first writes.
    """
    import pyarrow as pa

    rows = [row for batch in batches for row in _rows(reference, batch)]
    everyone = _to_main(rows)
    if _rank() == 0:
        types = dict(zip(_COLUMNS, (pa.string(), pa.string(), pa.float32(), pa.float32(), pa.int32(), pa.int32()), strict=True))
        arrays = [pa.array([row[column] for row in everyone], type=kind) for column, kind in enumerate(types.values())]
        folder = open_folder(place)
        folder.write(name, parquet_bytes(pa.Table.from_arrays(arrays, names=list(types))))
        folder.sync([name])
    num_pairs: int = _from_main(len(everyone))
    return num_pairs


def read_reference(place: str, name: str) -> dict[tuple[str, str], StoredPair]:
    """Return the stored values of a dataset. Raises `ConfigError` if the file cannot be read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(pa.BufferReader(open_folder(place).read(name)), columns=list(_COLUMNS))
    except (OSError, pa.ArrowException) as error:
        raise ConfigError(
            f"{place}: {name} cannot be read ({' '.join(str(error).split()):.200}); remove it, and the next run computes it again"
        ) from None
    columns = (table.column(name).to_pylist() for name in _COLUMNS)
    return {
        (source, key): StoredPair(chosen=chosen, rejected=rejected, chosen_tokens=num_chosen, rejected_tokens=num_rejected)
        for source, key, chosen, rejected, num_chosen, num_rejected in zip(*columns, strict=True)
    }


def weights_digest(thinker: Any) -> str:
    """Return what tells a model from others: the sha256 of its shape and of up to 4,096 values of each of its weights.

    It does not depend on adapters, on the number of ranks, or on whether weights are kept in float32 or bfloat16. Every rank
    of a sharded model calls it.
    """
    digest = hashlib.sha256(json.dumps(_shape(thinker.config), sort_keys=True).encode())
    for name, value in thinker.state_dict().items():
        if is_adapter(name):
            continue
        weight = (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().flatten()
        stride = max(1, weight.numel() // _NUM_VALUES_OF_A_WEIGHT)
        values = weight[::stride][:_NUM_VALUES_OF_A_WEIGHT].to(torch.bfloat16).float().cpu().numpy()
        digest.update(f"{name.replace('.base_layer.', '.')} {tuple(value.shape)}".encode())
        digest.update(values.tobytes())
    return digest.hexdigest()


def _shape(config: Any) -> Any:
    """Return the settings of a model that its computation depends on, as far as they are numbers."""
    parts = {name: getattr(config, name).to_dict() for name in ("text_config", "audio_config", "vision_config")}
    return {part: {name: value for name, value in values.items() if type(value) is int} for part, values in parts.items()}


def _rows(reference: Reference, batch: StreamBatch) -> Iterator[tuple[Any, ...]]:
    """Yield what is stored of each pair of a batch."""
    values = reference(batch).tolist()  # before anything else: on every rank, even without pairs
    documents = batch["documents"]
    counts = torch.bincount(documents_of(batch), minlength=len(documents)).tolist()
    for place in range(0, len(documents), 2):
        chosen, rejected = documents[place : place + 2]
        if (chosen.sequence, rejected.sequence) != ("chosen", "rejected"):
            raise ConfigError(f"{chosen.source}/{chosen.key}: expected a preference, got {chosen.sequence}")
        yield (chosen.source, chosen.key, *values[place : place + 2], *counts[place : place + 2])


def _merged(stored: Iterable[tuple[str, Mapping[tuple[str, str], StoredPair]]]) -> dict[tuple[str, str], StoredPair]:
    pairs: dict[tuple[str, str], StoredPair] = {}
    for place, found in stored:
        for name in pairs.keys() & found.keys():
            if pairs[name] != found[name]:
                raise ConfigError(
                    f"{place}: {'/'.join(name)} is another preference than that of another dataset of the run; "
                    "give their sources different names, or take reference: copy"
                )
        pairs.update(found)
    return pairs


def _rank() -> int:
    return int(torch.distributed.get_rank()) if torch.distributed.is_initialized() else 0


def _from_main(value: Any) -> Any:
    """Return what the first rank gives."""
    if not torch.distributed.is_initialized():
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def _to_main(rows: list[Any]) -> list[Any]:
    """Return the rows of all ranks, on the first."""
    if not torch.distributed.is_initialized():
        return rows
    parts: list[Any] | None = [None] * torch.distributed.get_world_size() if _rank() == 0 else None
    torch.distributed.gather_object(rows, parts)
    return [row for part in parts or [] for row in part]
