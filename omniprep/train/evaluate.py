"""The loss on a split that is not trained on: the same sums, without gradients and without a change to anything."""

from collections.abc import Callable

import torch
from torch import nn

from omniprep.stream.dataset import StreamingDataset
from omniprep.train.loop import to_device
from omniprep.train.objective import Objective
from omniprep.train.parallel import World
from omniprep.train.tally import Tally


def validator(model: nn.Module, objective: Objective, stream: StreamingDataset, world: World) -> Callable[[], dict[str, float]]:
    """Return a function that gives the means over the stream's split; all ranks call it together."""

    def validate() -> dict[str, float]:
        tally = Tally()
        was_training = model.training
        model.eval()
        stream.set_epoch(0)
        try:
            with torch.no_grad():
                for found in stream:
                    batch = to_device(found, world.device)
                    objective.loss(model(batch["inputs"], batch["shift_labels"]), batch, tally)
        finally:
            model.train(was_training)
        return tally.over_ranks(world).means()

    return validate
