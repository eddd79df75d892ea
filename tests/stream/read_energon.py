"""Read a dataset with Megatron-Energon in a process of its own, for it forks: `read_energon.py OUT SPLIT NUM_WORKERS`.

Prints a JSON line for each sample: its key, its JSON member and digests of what it holds. The cooker is the documented one.
"""

import hashlib
import json
import re
import sys
import warnings
from typing import Any

from omniprep.stream import energon


def main(place: str, split: str, num_workers: str, task_encoder: Any) -> None:
    from megatron.energon import WorkerConfig, get_loader, get_train_dataset

    dataset = get_train_dataset(
        place,
        split_part=split,
        worker_config=WorkerConfig(rank=0, world_size=1, num_workers=int(num_workers)),
        batch_size=None,
        shuffle_buffer_size=4,
        max_samples_per_sequence=2,
        task_encoder=task_encoder,
        repeat=False,
    )
    for sample in get_loader(dataset):
        found = {
            "key": sample.__key__,
            "facts": sample.facts,
            "frames": hashlib.sha256(sample.frames).hexdigest(),
            "tokens": [str(sample.tokens.dtype), sample.tokens.tolist()],
            "mel": [str(sample.mel.dtype), sample.mel.shape, hashlib.sha256(sample.mel.tobytes()).hexdigest()],
        }
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    CODE = re.findall(r"```\n(from megatron.*?)```", energon.__doc__ or "", re.DOTALL)
    assert len(CODE) == 1
    exec(CODE[0], globals())  # its classes cross from Energon's workers to here, so they must be found in this module
    main(*sys.argv[1:], TaskEncoder())  # type: ignore[call-arg]  # noqa: F821
