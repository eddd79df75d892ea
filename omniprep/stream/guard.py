"""Refuses the calls in which the documents of a packed row would silently see each other.

transformers keeps them apart only if all of this holds together, and says nothing where it does not:

* `position_ids` has four rows, the first of which begins anew at each document; with three, the row is one document;
* there is no `attention_mask`; any two-dimensional one, all ones as well, turns the search for documents off;
* no cache is made: `use_cache=False` is in the call, or it is in the *text* configuration, whose default is what counts.
  `model.config.use_cache = False`, which trainers set, does not reach it.

Measured on the tiny Thinker, the last of three documents: each of these moves its logits by 0.7, a right call by 2e-7.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from omniprep.errors import ConfigError
from omniprep.profile import IGNORE_INDEX

_ADVICE = "; `Batch.model_inputs()` has it right"


def check_packed(inputs: Mapping[str, Any], *, model: Any = None, cu_seqlens: Any = None) -> None:
    """Raise `ConfigError` if a packed row, called as `model(**inputs)`, would let its documents see or teach each other.

    `inputs` are numpy arrays or torch tensors. `model` is asked for its default where `use_cache` is not given;
    `cu_seqlens` are the borders that are meant, compared with those that the model will find.
    """
    starts = _starts(inputs)
    _check_mask(inputs)
    _check_cache(inputs, model)
    borders = np.append(np.flatnonzero(starts), starts.size)
    for name, given in (("cu_seqlens", cu_seqlens), *((name, inputs.get(name)) for name in ("cu_seq_lens_q", "cu_seq_lens_k"))):
        if given is not None:
            _check_borders(name, _array(given), borders)
    for name in ("max_length_q", "max_length_k"):
        longest = int(np.diff(borders).max())
        if inputs.get(name) is not None and int(inputs[name]) < longest:
            raise ConfigError(f"{name}: {int(inputs[name])}, but the longest document has {longest} tokens{_ADVICE}")
    _check_labels(inputs, starts)


def prepare_model_for_packing(model: Any) -> None:
    """Turn the cache off where the model looks: in its text configuration. For trainers that call without `use_cache`.

    Only that setting is changed; `generate` with a cache needs it back, or `use_cache=True` in its own call.
    """
    _text_config(model).use_cache = False


def _starts(inputs: Mapping[str, Any]) -> npt.NDArray[np.bool_]:
    """Return (B, L) which tokens begin a document for the model. Raises `ConfigError` if it would not look."""
    if inputs.get("position_ids") is None:
        raise ConfigError(
            "position_ids: expected (4, B, L), got none; the model would make positions of one document of the whole row"
            + _ADVICE
        )
    positions = _array(inputs["position_ids"])
    if positions.ndim != 3 or positions.shape[0] != 4:
        raise ConfigError(
            f"position_ids: expected (4, B, L), got {positions.shape}; without a first row that begins anew at each document "
            "the model takes a row for one document, and all of it sees each other" + _ADVICE
        )
    places = positions[0]
    follows = np.zeros(places.shape, np.bool_)
    follows[:, 1:] = places[:, 1:] == places[:, :-1] + 1
    wrong = np.argwhere(~follows & (places != 0))
    if len(wrong):
        row, column = (int(index) for index in wrong[0])
        raise ConfigError(
            f"position_ids: the first row is 0, 1, 2, ... anew at each document, got {int(places[row, column])} at token "
            f"{column} of row {row}, which neither follows nor begins" + _ADVICE
        )
    return ~follows


def _check_mask(inputs: Mapping[str, Any]) -> None:
    mask = inputs.get("attention_mask")
    if mask is not None and not isinstance(mask, Mapping) and _array(mask).ndim == 2:
        raise ConfigError(
            "attention_mask: expected none for a packed row, got a two-dimensional one; with it, even all ones, the model does "
            "not look for documents, and they see each other" + _ADVICE
        )


def _check_cache(inputs: Mapping[str, Any], model: Any) -> None:
    if inputs.get("past_key_values") is not None:
        raise ConfigError("past_key_values: expected none for a packed row: with a cache the model does not look for documents")
    given = inputs.get("use_cache")
    if given is None and model is not None:
        given = _text_config(model).use_cache
    if given is not False:
        shown = "left to its default" if inputs.get("use_cache") is None else f"{inputs['use_cache']!r}"
        raise ConfigError(
            f"use_cache: expected False for a packed row, got it {shown}; a model that makes a cache does not look for "
            "documents. Pass use_cache=False, or call prepare_model_for_packing(model) and give the model to this check: "
            "model.config.use_cache does not reach its text configuration"
        )


def _check_borders(name: str, given: npt.NDArray[Any], found: npt.NDArray[np.int64]) -> None:
    if not np.array_equal(given.reshape(-1), found):
        raise ConfigError(
            f"{name}: {given.reshape(-1).tolist()!s:.200}, but by position_ids documents begin and end at "
            f"{found.tolist()!s:.200}{_ADVICE}"
        )


def _check_labels(inputs: Mapping[str, Any], starts: npt.NDArray[np.bool_]) -> None:
    """Raise `ConfigError` if the last token of a document is to predict the first of the next."""
    shifted, labels = inputs.get("shift_labels"), inputs.get("labels")
    if shifted is not None:
        last = np.roll(starts, -1, axis=1)
        taught = np.argwhere(last & (_array(shifted) != IGNORE_INDEX))
        name, place = "shift_labels", "last"
    elif labels is not None:
        # The model shifts labels over the whole row; the first of a row is dropped by that.
        inside = starts.copy()
        inside[:, 0] = False
        taught = np.argwhere(inside & (_array(labels) != IGNORE_INDEX))
        name, place = "labels", "first"
    else:
        return
    if len(taught):
        row, column = (int(index) for index in taught[0])
        raise ConfigError(
            f"{name}: expected {IGNORE_INDEX} at the {place} token of every document, got a target at token {column} of row "
            f"{row}; the end of one document would be taught to predict the beginning of the next{_ADVICE}"
        )


def _text_config(model: Any) -> Any:
    return getattr(model, "module", model).config.get_text_config()


def _array(value: Any) -> npt.NDArray[Any]:
    """Return an array or tensor as numpy; from another device it is fetched."""
    return np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)
