"""Save once, then again and again, each time in a process that is killed before its next operation on a file.

    python killed_saves.py FOLDER

Each fork of this process starts from the complete checkpoint of step 1 and saves step 2; the n-th is killed by SIGKILL
before its n-th operation on a file of the folder, so that every moment in between is met. What then is the newest
checkpoint is printed, a line a fork, after it was loaded and compared.
"""

import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from omniprep.train.checkpoint import Checkpoints, CheckpointSettings
from omniprep.train.parallel import world

OPERATIONS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree", "os.listdir", "os.scandir"}
SETTINGS = CheckpointSettings(keep_last=1)


def state(value: float) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """Return a model of this value, one step of its optimizer before."""
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    torch.nn.init.constant_(model.weight, value)
    model(torch.full((1, 4), value)).sum().backward()
    optimizer.step()
    return model, optimizer


def save(folder: Path, step: int) -> None:
    """Save a step whose weights are all its number."""
    with world(device="cpu") as here:
        model, optimizer = state(float(step))
        Checkpoints(folder, SETTINGS, here).save(
            step, model=model, optimizer=optimizer, progress={"step": step}, metric=1.0 / step
        )


def die_before(number: int, folder: Path) -> None:
    """Kill this process before its n-th operation below the folder."""
    seen = 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event in OPERATIONS and arguments and str(folder) in str(arguments[0]):
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def loaded_step(folder: Path) -> int:
    """Return the step of the newest checkpoint, loaded. Raises if any part of it is not of that step."""
    with world(device="cpu") as here:
        checkpoints = Checkpoints(folder, SETTINGS, here)
        newest = checkpoints.latest()
        assert newest is not None, "no checkpoint is left"
        model, optimizer = state(0.0)
        step = int(checkpoints.load(newest, model=model, optimizer=optimizer)["step"])
        assert torch.all(model.weight == step), model.weight
        assert torch.allclose(optimizer.state[model.weight]["exp_avg"], torch.full((4, 4), 0.1 * step))
        # What a killed process left is no hindrance, and is gone after the next save.
        checkpoints.save(3, model=model, optimizer=optimizer, progress={"step": 3})
        assert not list(folder.glob("*.tmp"))
        return step


def in_a_fork(folder: Path, number: int | None) -> bool:
    """Save step 2 in a fork; return whether it lived to the end."""
    child = os.fork()
    if not child:
        try:
            if number is not None:
                die_before(number, folder)
            save(folder, 2)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return not os.WIFSIGNALED(status)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    first = folder / "first"
    save(first, 1)
    for number in range(1, 200):
        tried = folder / f"killed-{number}"
        shutil.copytree(first, tried)
        lived = in_a_fork(tried, number)
        print(number, "lived" if lived else "killed", loaded_step(tried), flush=True)
        shutil.rmtree(tried)
        if lived:
            return


if __name__ == "__main__":
    main(Path(sys.argv[1]))
