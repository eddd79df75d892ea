"""What is refused before a run starts: data and models that do not belong together, settings that could never work."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from omniprep.errors import ConfigError
from omniprep.profile import QWEN2_5_OMNI, ModelProfile
from omniprep.shards.manifest import Manifest, read_manifest
from omniprep.train.recipe import DataSettings, TrainRecipe
from omniprep.types import RopeMode

CARD_NAME = "omniprep.json"
"""What an exported model says of the data that it was trained on."""
_KINDS = {"next_token": "sequence", "dpo": "preference"}


def read_datasets(recipe: TrainRecipe, profile: ModelProfile = QWEN2_5_OMNI) -> dict[str, Manifest]:
    """Return the manifests of a recipe's datasets. Raises `ConfigError` if one of them cannot be trained on, and says why."""
    manifests = {place: read_manifest(place) for place in recipe.data.datasets}
    for place, manifest in manifests.items():
        if manifest.profile != profile.name:
            raise ConfigError(
                f"{place}: made for the profile {manifest.profile!r}, the model is {profile.name!r}; prepare it anew"
            )
        if manifest.codec:
            raise ConfigError(
                f"{place}: holds speech codes of the codec {manifest.codec!r}, which a Thinker does not read; "
                "name a dataset without replies as speech"
            )
        if manifest.kind != _KINDS[recipe.objective]:
            wanted = (
                "preferences (`kind: preference` in its recipe)" if recipe.objective == "dpo" else "conversations or documents"
            )
            raise ConfigError(
                f"{place}: objective {recipe.objective!r} learns from {wanted}, this dataset holds {manifest.kind}s"
            )
        split = manifest.by_split.get(recipe.data.split)
        if split is not None and not split.num_supervised:
            raise ConfigError(
                f"{place}: none of the {split.num_tokens:,} tokens of split {recipe.data.split!r} is supervised, so there is "
                "nothing to learn; look at a record with `omniprep inspect`"
            )
    return manifests


def rope_mode_of(manifests: Mapping[str, Manifest]) -> RopeMode:
    """Return how positions were counted in all datasets. Raises `ConfigError` if they differ."""
    modes = {place: manifest.rope_mode for place, manifest in manifests.items()}
    if len(set(modes.values())) > 1:
        told = ", ".join(f"{place}: {mode}" for place, mode in modes.items())
        raise ConfigError(f"datasets of one run must have positions of one kind (encode.rope_mode); got {told}")
    return next(iter(modes.values()))


def check_rope_mode(checkpoint: str, data: DataSettings, manifests: Mapping[str, Manifest]) -> None:
    """Raise `ConfigError` if a checkpoint was made for positions of another kind than the data have."""
    found = rope_mode_of(manifests)
    known = (read_card(checkpoint) or {}).get("rope_mode")
    wanted, why = (data.rope_mode, "data.rope_mode") if data.rope_mode is not None else (known, f"{checkpoint}/{CARD_NAME}")
    if wanted is not None and wanted != found:
        raise ConfigError(
            f"rope_mode: {why} says {wanted!r}, the datasets have positions of {found!r}; prepare them with "
            f"`encode.rope_mode: {wanted}`, or set data.rope_mode: {found} to train on these positions all the same"
        )


def check_context(config: Any, max_tokens: int) -> None:
    """Raise `ConfigError` if rows are longer than what the model has positions for. `config` is the Thinker's."""
    limit = config.text_config.max_position_embeddings
    if max_tokens > limit:
        raise ConfigError(f"data.plan.max_tokens: {max_tokens} > {limit}, the model's max_position_embeddings; lower it")


def read_card(checkpoint: str) -> dict[str, Any] | None:
    """Return what an exported model says of itself, None for one of another origin."""
    try:
        return dict(json.loads((Path(checkpoint) / CARD_NAME).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def write_card(folder: Path, *, rope_mode: RopeMode, profile: str, steps: int, datasets: Iterable[Manifest]) -> None:
    """Let an exported model say what it was trained on."""
    values = {
        "profile": profile,
        "rope_mode": rope_mode,
        "steps": steps,
        "datasets": [{"recipe_sha256": manifest.recipe_sha256, "records": manifest.totals.num_records} for manifest in datasets],
    }
    (folder / CARD_NAME).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
