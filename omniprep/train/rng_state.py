"""The random number generators of a process, as text that a checkpoint keeps."""

import base64
import json
import random

import numpy as np
import torch


def capture(device: torch.device) -> str:
    """Return the state of every generator that training may draw from: torch's, the device's, Python's and numpy's."""
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state = {
        "torch": _text(torch.get_rng_state()),
        "cuda": _text(torch.cuda.get_rng_state(device)) if device.type == "cuda" else None,
        "python": random.getstate(),
        "numpy": [name, np.asarray(keys).tolist(), position, has_gauss, cached],
    }
    return json.dumps(state)


def restore(text: str, device: torch.device) -> None:
    """Put all generators into a captured state; a state from a CPU leaves a GPU's generator as it is."""
    state = json.loads(text)
    torch.set_rng_state(_tensor(state["torch"]))
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(_tensor(state["cuda"]), device)
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, np.uint32), *rest))


def _text(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode("ascii")


def _tensor(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
