"""Randomness that belongs to the sample, not to the worker."""

import hashlib

import numpy as np


def rng_for(key: str, *, seed: int, stage: str) -> np.random.Generator:
    """Return the generator of one sample in one stage: the same for any number of workers and after any resume.

    >>> rng_for("a", seed=0, stage="split").random() == rng_for("a", seed=0, stage="split").random()
    True
    """
    digest = hashlib.sha256(f"{seed}/{stage}/{key}".encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "big")))
