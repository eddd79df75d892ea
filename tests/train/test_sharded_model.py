"""A Thinker with adapters, spread over two ranks, is the same model: its losses, what is written, and its reference."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from omniprep.shards.members import MemberFormat
from tests.stream.model_records import ROWS, encode
from tests.stream.stored import stored

pytestmark = pytest.mark.reference
torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from safetensors.torch import load_file  # noqa: E402

from omniprep.stream.dataset import StreamingDataset  # noqa: E402
from omniprep.stream.plan import PlanConfig  # noqa: E402
from omniprep.train.dpo import DpoSettings  # noqa: E402
from omniprep.train.forward import TrainableThinker  # noqa: E402
from omniprep.train.lora import is_adapter  # noqa: E402
from omniprep.train.model import LoraSettings, ModelSettings, load_thinker, save_thinker, train_only  # noqa: E402
from omniprep.train.parallel import ParallelSettings, World, shard  # noqa: E402
from omniprep.train.reference import log_probabilities, open_reference, weights_digest  # noqa: E402
from tests.train.ranks import run_ranks  # noqa: E402


def adapted() -> TrainableThinker:
    """Return a Thinker whose adapters and audio adapter train, and whose adapters do something."""
    thinker = load_thinker(ModelSettings(lora=LoraSettings(rank=4)), seed=2)
    torch.manual_seed(1)
    for name, parameter in thinker.named_parameters():
        if is_adapter(name):
            torch.nn.init.normal_(parameter, std=0.2)
    train_only(thinker, ["language_model", "audio_adapter"])
    return TrainableThinker(thinker)


def frozen(settings: ParallelSettings, here: World) -> TrainableThinker:
    thinker = load_thinker(ModelSettings(), seed=2)
    thinker.requires_grad_(False)
    model = shard(TrainableThinker(thinker), settings, here)
    assert isinstance(model, TrainableThinker)
    return model


def look(here: World, place: str, folder: Path, settings: ParallelSettings) -> dict[str, Any]:
    """Return what a rank finds out about the model, of its part of the pairs."""
    model = adapted()
    model.thinker.generation_config.max_length = 77
    shard(model, settings, here)

    def read(place: str, split: str) -> Iterator[Any]:
        plan = PlanConfig(max_tokens=700, batching="single", global_batch_size=here.world_size, shuffle=False)
        return iter(StreamingDataset([place], plan, split=split, num_threads=0, rank=here.rank, world_size=here.world_size))

    references = {
        kind: open_reference(
            DpoSettings.model_validate({"reference": kind}),
            model=model,
            frozen_copy=lambda: frozen(settings, here),
            parts=[(place, "train")],
            read=read,
        )
        for kind in ("copy", "adapter_off", "stored")
    }
    told: dict[str, Any] = {name: {} for name in ("learnt", *references)}
    for batch in read(place, "train"):
        key = [(document.key, document.sequence) for document in batch["documents"]]
        told["learnt"] |= dict(zip(key, log_probabilities(model, batch).tolist(), strict=True))
        for kind, reference in references.items():
            told[kind] |= dict(zip(key, reference(batch).tolist(), strict=True))
    save_thinker(model.thinker, folder, dtype=torch.float32)
    return {**told, "digest": weights_digest(model.thinker)}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("pairs")
    samples = tuple(encode(ROWS[row], f"mix-{number}") for number, row in enumerate(("text pair", "media pair", "text pair")))
    stored(folder, samples, form=MemberFormat(kind="preference"))
    return str(folder)


def test_two_ranks_have_one_ranks_log_probabilities_references_and_files(pairs: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    places = {name: tmp_path / name for name in ("one", "two")}
    two = run_ranks(look, 2, pairs, places["two"], ParallelSettings())  # first: they write what is stored, and one reads it
    (one,) = run_ranks(look, 1, pairs, places["one"], ParallelSettings())
    assert two[0]["digest"] == two[1]["digest"] == one["digest"] == weights_digest(load_thinker(ModelSettings(), seed=2))
    assert len(list(Path(pairs).glob("reference-train-*.parquet"))) == 1
    for kind in ("learnt", "copy", "adapter_off", "stored"):
        together = two[0][kind] | two[1][kind]
        assert together.keys() == one[kind].keys()
        assert len(together) == 6
        assert together == pytest.approx(one[kind], rel=1e-5)
    assert one["stored"] == pytest.approx(one["copy"], rel=1e-5)
    assert one["adapter_off"] == pytest.approx(one["copy"], rel=1e-5)
    assert one["learnt"] != pytest.approx(one["copy"], rel=1e-4)
    files = {name: load_file(place / "model.safetensors") for name, place in places.items()}
    assert files["one"].keys() == files["two"].keys()
    for name, weight in files["one"].items():
        assert torch.equal(weight, files["two"][name]), name
    assert '"max_length": 77' in (places["two"] / "generation_config.json").read_text()
