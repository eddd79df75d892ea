"""The stream under the trainers that people use: ranks, Accelerate, Lightning, FSDP, pinned memory, and their checkpoints."""

import os
import pickle
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader
from torch.utils.data._utils.pin_memory import pin_memory

from tests.stream.streams import CONFIG, keys, stream

RANKS = """
import sys, torch.distributed as dist
from torch.utils.data import DataLoader
from omniprep.stream.dataset import StreamingDataset
from omniprep.stream.plan import PlanConfig
rank, folder, way = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dataset = StreamingDataset(folder, PlanConfig(max_tokens=64, global_batch_size=4))   # before there are ranks
dist.init_process_group("gloo", init_method="file://" + sys.argv[4], rank=rank, world_size=2)
"""
WAYS = {
    "plain": "loader = DataLoader(dataset, batch_size=None, num_workers=int(sys.argv[5]))",
    "spawned": """
loader = DataLoader(dataset, batch_size=None, num_workers=int(sys.argv[5]), multiprocessing_context="spawn")
""",
    "not prepared": """
from accelerate import Accelerator
from accelerate.utils import send_to_device
accelerator = Accelerator(cpu=True)
loader = (send_to_device(b, accelerator.device) for b in DataLoader(dataset, batch_size=None, num_workers=int(sys.argv[5])))
""",
    "sharded": """
from accelerate import Accelerator, DataLoaderConfiguration
accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(dispatch_batches=False))
loader = DataLoader(dataset, batch_size=1, collate_fn=lambda items: items[0], num_workers=int(sys.argv[5]))
loader = accelerator.prepare(loader)
""",
    "tensor parallel": """
from torch.distributed.device_mesh import init_device_mesh
mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
dataset = StreamingDataset(
    folder, PlanConfig(max_tokens=64, global_batch_size=4), rank=mesh.get_local_rank("dp"), world_size=mesh["dp"].size()
)
loader = DataLoader(dataset, batch_size=None, num_workers=int(sys.argv[5]))
""",
    "dispatched": """
from accelerate import Accelerator
loader = Accelerator(cpu=True).prepare(DataLoader(dataset, batch_size=None, num_workers=int(sys.argv[5])))
""",
}
"""How a trainer gets its batches."""


def launched(rank: int) -> dict[str, str]:
    """Return what torchrun says to a process; the port is not used."""
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


def run_ranks(folder: str, way: str, num_workers: int, tmp_path: Path) -> list[tuple[int, list[str], str]]:
    """Return exit code, keys and standard error of two ranks. One that fails leaves the other waiting, which is ended."""
    return run_code(WAYS[way] + '\nfor batch in loader: print(*batch["keys"])', folder, way, num_workers, tmp_path)


def run_code(code: str, folder: str, way: str, num_workers: int, tmp_path: Path) -> list[tuple[int, list[str], str]]:
    """Run code in two ranks, after `RANKS`."""
    code = RANKS + code + "\ndist.destroy_process_group()\n"
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank), folder, way, str(tmp_path / "meeting"), str(num_workers)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | (launched(rank) if way in ("not prepared", "sharded", "dispatched") else {}),
        )
        for rank in range(2)
    ]
    told = [run.communicate(timeout=180) for run in runs]
    return [(run.returncode, out.split(), errors) for run, (out, errors) in zip(runs, told, strict=True)]


@pytest.mark.parametrize(
    ("way", "num_workers"), [("plain", 0), ("plain", 2), ("spawned", 1), ("not prepared", 0), ("not prepared", 2)]
)
def test_ranks_that_come_up_later_are_found(folders, tmp_path: Path, num_workers: int, way: str) -> None:
    """As under Lightning, where datasets are made before the process group is."""
    if way == "not prepared":
        pytest.importorskip("accelerate")
    (first, keys, errors), (second, other_keys, _) = run_ranks(next(iter(folders)), way, num_workers, tmp_path)
    assert (first, second) == (0, 0), errors
    assert len(keys) + len(other_keys) == len({*keys, *other_keys}) == 400


@pytest.mark.parametrize(
    ("way", "said"), [("sharded", "leave the loader out of accelerator.prepare()"), ("dispatched", "TypeError")]
)
@pytest.mark.parametrize("num_workers", [0, 2])
def test_accelerate_may_not_split_the_stream_again(folders, tmp_path: Path, way: str, said: str, num_workers: int) -> None:
    """Where it takes a loader apart it fails by itself; where it would silently drop samples, the stream refuses."""
    pytest.importorskip("accelerate")
    runs = run_ranks(next(iter(folders)), way, num_workers, tmp_path)
    assert all(code for code, _, _ in runs)
    assert said in runs[0][2]


def test_ranks_that_share_a_batch_read_the_same(folders, tmp_path: Path) -> None:
    """Tensor parallel: the rank that is given is that of the data-parallel dimension of a mesh."""
    (first, keys, errors), (second, other_keys, _) = run_ranks(next(iter(folders)), "tensor parallel", 0, tmp_path)
    assert (first, second) == (0, 0), errors
    assert keys == other_keys
    assert len(keys) == len(set(keys)) == 400


UNEVEN = """
import torch
class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.text, self.encoder = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    def forward(self, has_sound):
        out = self.text(torch.ones(1, 4))
        if has_sound or "always" in way:
            out = out + float(has_sound) * self.encoder(torch.ones(1, 4))
        return out.sum()
model = Model()
model.encoder.requires_grad_("frozen" not in way)
if "fsdp" in way:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    mesh = init_device_mesh("cpu", (2,))
    if "always" in way:
        fully_shard(model.encoder, mesh=mesh)
    fully_shard(model, mesh=mesh)
else:
    model = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters="find" in way)
dataset = StreamingDataset(folder, PlanConfig(batching="single", shuffle=False, global_batch_size=2))  # every other has sound
num_uneven = 0
for batch, _ in zip(dataset, range(8)):
    has_sound = "input_features" in batch["inputs"]
    total = torch.tensor(int(has_sound))
    dist.all_reduce(total)
    num_uneven += int(total) == 1
    model(has_sound).backward()
print(num_uneven)
"""
"""A model with an encoder that only some batches need."""


@pytest.mark.parametrize("way", ["ddp find", "ddp frozen", "fsdp always", "fsdp frozen"])
def test_a_rank_may_have_no_media_when_another_has(folders, tmp_path: Path, way: str) -> None:
    (first, out, errors), (second, _, _) = run_code(UNEVEN, list(folders)[-1], way, 0, tmp_path)
    assert (first, second) == (0, 0), errors
    assert out == ["8"], "only one of two had sound each time"


@pytest.mark.parametrize("way", ["ddp", "fsdp root"])
def test_without_precautions_it_ends_where_only_one_rank_has_media(folders, tmp_path: Path, way: str) -> None:
    """The same code as above but for one setting; which error comes first depends on the ranks' pace."""
    assert all(code for code, _, _ in run_code(UNEVEN, list(folders)[-1], way, 0, tmp_path))


def test_a_state_goes_through_a_distributed_checkpoint(folders, tmp_path: Path) -> None:
    """Loading wants values of the same shape to begin with: those of a stream that has read nothing."""
    from torch.distributed import checkpoint

    whole = keys(stream(folders))
    batches = list(islice(stream(folders), CONFIG.global_batch_size))
    again = stream(folders)
    found = {"stream": again.state_dict()}
    with pytest.warns(UserWarning, match="single process"):
        checkpoint.save({"stream": batches[-1]["state"]}, checkpoint_id=tmp_path)
        checkpoint.load(found, checkpoint_id=tmp_path)
    again.load_state_dict(found["stream"])
    assert keys(batches) + keys(again) == whole


@pytest.mark.parametrize("stop", [10, 250])
def test_accelerate_keeps_the_position_in_its_checkpoints(folders, tmp_path: Path, stop: int) -> None:
    accelerate = pytest.importorskip("accelerate")
    alone = stream(folders)
    whole = [one for _ in range(2) for one in keys(alone)]
    accelerator, dataset = accelerate.Accelerator(cpu=True), stream(folders)
    accelerator.register_for_checkpointing(dataset)
    loader = DataLoader(dataset, batch_size=None)
    found = keys(islice((batch for _ in range(2) for batch in loader), stop))
    accelerator.save_state(tmp_path)

    accelerator, dataset = accelerate.Accelerator(cpu=True), stream(folders)
    accelerator.register_for_checkpointing(dataset)
    accelerator.load_state(tmp_path)
    loader = DataLoader(dataset, batch_size=None)
    assert dataset.epoch == stop // 240
    for _ in range(dataset.epoch, 2):
        found += keys(loader)
    assert found == whole


def watching() -> Any:
    """Return a class of modules that note what they are trained on, and keep the position in their checkpoints."""
    lightning = pytest.importorskip("lightning.pytorch")

    class Watching(lightning.LightningModule):
        def __init__(self, save_at: int = 0, path: Path | None = None) -> None:
            super().__init__()
            self.save_at, self.path = save_at, path
            self.weight = torch.nn.Parameter(torch.zeros(1))
            self.keys: list[tuple[str, ...]] = []
            self.position: dict[str, Any] = {}

        def training_step(self, batch: dict[str, Any], number: int) -> torch.Tensor:
            self.keys.append(tuple(batch["keys"]))
            self.position = batch["state"]
            return (self.weight * batch["num_supervised"]).sum()

        def on_train_batch_end(self, *_: object) -> None:
            if self.trainer.global_step == self.save_at:
                self.trainer.save_checkpoint(self.path)

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["stream"] = self.position

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    return Watching


def lightning_trainer(**options: Any) -> Any:
    import lightning.pytorch as lightning

    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return lightning.Trainer(accelerator="cpu", **quiet, **options)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")  # its own, of torch
@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("stop", [10, 250])
def test_lightning_trains_on_it_and_goes_on_from_a_checkpoint(folders, tmp_path: Path, stop: int, num_workers: int) -> None:
    alone = stream(folders)
    whole = [one for _ in range(2) for one in keys(alone)]
    model, path = watching(), tmp_path / "last.ckpt"
    first = model(stop, path)
    lightning_trainer(max_epochs=2, max_steps=stop + 5).fit(
        first, DataLoader(stream(folders), batch_size=None, num_workers=num_workers)
    )
    assert first.keys == whole[: stop + 5]

    second, dataset = model(), stream(folders)
    dataset.load_state_dict(torch.load(path, weights_only=True)["stream"])
    loader = DataLoader(dataset, batch_size=None, num_workers=num_workers)
    lightning_trainer(max_epochs=2).fit(second, loader, ckpt_path=path)
    assert whole[:stop] + second.keys == whole


def test_batches_can_be_pinned(folders, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a `DataLoader(pin_memory=True)` does it; pages are locked by CUDA alone, so here tensors are only told apart."""
    pinned: list[torch.Tensor] = []

    def copied(tensor: torch.Tensor, *_: object) -> torch.Tensor:
        pinned.append(tensor.clone())
        return pinned[-1]

    monkeypatch.setattr(torch.Tensor, "pin_memory", copied)
    for batch in islice(stream(folders), 20):
        pinned.clear()
        found = pin_memory(batch)
        assert found.keys() == batch.keys()
        tensors = {**found["inputs"], "shift_labels": found["shift_labels"], "cu_seqlens": found["cu_seqlens"]}
        expected = {**batch["inputs"], "shift_labels": batch["shift_labels"], "cu_seqlens": batch["cu_seqlens"]}
        assert tensors.keys() == expected.keys()
        for name, value in expected.items():
            if isinstance(value, torch.Tensor):
                assert any(tensors[name] is one for one in pinned), name
                assert torch.equal(tensors[name], value)
            else:
                assert tensors[name] is value, name
        rest = batch.keys() - {"inputs", "shift_labels", "cu_seqlens"}
        assert {name: found[name] for name in rest} == {name: batch[name] for name in rest}
        assert not any(isinstance(value, torch.Tensor) for name in rest for value in [batch[name]])
        stream(folders).load_state_dict(pickle.loads(pickle.dumps(found["state"])))


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator is found:UserWarning")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loader_that_pins_gives_the_same(folders, num_workers: int) -> None:
    dataset = stream(folders, max_batches=20)
    loader = DataLoader(dataset, batch_size=None, num_workers=num_workers, pin_memory=True)
    assert keys(loader) == keys(stream(folders, max_batches=20))
