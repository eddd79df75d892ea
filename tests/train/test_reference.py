"""Three ways to a reference give the same numbers, and stored ones are never those of another model or another answer."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from omniprep.errors import ConfigError
from omniprep.shards.members import MemberFormat
from omniprep.verify import verify
from tests.stream.model_records import ROWS, encode
from tests.stream.stored import stored
from tests.train.batches import batch_of

pytestmark = pytest.mark.reference
torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from omniprep.stream.dataset import StreamingDataset  # noqa: E402
from omniprep.stream.plan import PlanConfig  # noqa: E402
from omniprep.train.dpo import DpoSettings  # noqa: E402
from omniprep.train.forward import TrainableThinker  # noqa: E402
from omniprep.train.lora import is_adapter  # noqa: E402
from omniprep.train.model import LoraSettings, ModelSettings, load_thinker  # noqa: E402
from omniprep.train.reference import AdaptersOff, FrozenCopy, log_probabilities, open_reference, weights_digest  # noqa: E402

KEYS = ("film-pair", "one", "two")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def base() -> TrainableThinker:
    return TrainableThinker(load_thinker(ModelSettings(), seed=2))


def adapted(*, scale: float = 0.2) -> TrainableThinker:
    """Return the same model with adapters that have learnt something."""
    thinker = load_thinker(ModelSettings(lora=LoraSettings(rank=4, dropout=0.5)), seed=2)
    torch.manual_seed(1)
    for name, parameter in thinker.named_parameters():
        if is_adapter(name):
            torch.nn.init.normal_(parameter, std=scale)
    return TrainableThinker(thinker)


def preferences(folder: Path, *, rows: tuple[str, ...] = ("media pair", "text pair", "text pair")) -> str:
    """Write a dataset of preferences."""
    samples = tuple(encode(ROWS[row], f"mix-{key}") for row, key in zip(rows, KEYS, strict=True))
    stored(folder, samples, form=MemberFormat(kind="preference"))
    return str(folder)


def read(place: str, split: str) -> Iterator[dict[str, Any]]:
    return iter(StreamingDataset([place], PlanConfig(max_tokens=700), split=split, num_threads=0))


def opened(model: TrainableThinker, place: str, copies: list[TrainableThinker], *, kind: str = "stored") -> Any:
    def frozen_copy() -> TrainableThinker:
        copies.append(base())
        return copies[-1]

    settings = DpoSettings.model_validate({"reference": kind})
    return open_reference(settings, model=model, frozen_copy=frozen_copy, parts=[(place, "train")], read=read)


def test_a_copy_adapters_off_and_stored_values_are_the_same_model(tmp_path: Path) -> None:
    place, copies = preferences(tmp_path), list[TrainableThinker]()
    model = adapted()
    references = {kind: opened(model, place, copies, kind=kind) for kind in ("copy", "adapter_off", "stored")}
    for batch in read(place, "train"):
        values = {kind: reference(batch).tolist() for kind, reference in references.items()}
        assert values["copy"] == values["adapter_off"]
        assert values["stored"] == pytest.approx(values["copy"], rel=1e-5)
        assert log_probabilities(model, batch).tolist() != pytest.approx(values["copy"], rel=1e-3)  # what it has learnt


def test_stored_values_are_computed_once(tmp_path: Path) -> None:
    place, copies = preferences(tmp_path), list[TrainableThinker]()
    opened(base(), place, copies)
    assert len(copies) == 1
    (name,) = (path.name for path in tmp_path.iterdir() if path.name.startswith("reference-"))
    assert name == f"reference-train-{weights_digest(base().thinker)[:16]}.parquet"
    opened(adapted(), place, copies)  # adapters do not make it another model
    assert len(copies) == 1
    assert not list(verify(tmp_path))


def test_a_reference_does_not_learn_and_makes_no_gradients() -> None:
    batch = batch_of("text pair")
    model = base()
    reference = FrozenCopy(model)
    assert not reference(batch).requires_grad
    assert not any(parameter.requires_grad for parameter in model.parameters())
    changing = adapted()
    off = AdaptersOff(changing)
    assert not off(batch).requires_grad
    assert changing.training
    learning = {name for name, parameter in changing.named_parameters() if parameter.requires_grad}
    assert learning
    assert all(is_adapter(name) for name in learning)


def test_adapters_off_without_adapters_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match=r"no adapters; set model\.lora, or take another reference"):
        AdaptersOff(base())


def test_a_dataset_that_was_prepared_anew_is_noticed(tmp_path: Path) -> None:
    place, copies = preferences(tmp_path / "a"), list[TrainableThinker]()
    reference = opened(base(), place, copies)
    other = ROWS["text pair"] | {"chosen": "Another answer, and a longer one than it was."}
    stored(tmp_path / "b", (encode(other, "mix-two"),), form=MemberFormat(kind="preference"))
    stored(tmp_path / "c", (encode(ROWS["text pair"], "mix-new"),), form=MemberFormat(kind="preference"))
    for folder, found in (("b", "those of another answer"), ("c", "none")):
        with pytest.raises(ConfigError, match=f"mix-(two|new): expected stored .*, found {found}; .*remove its reference"):
            reference(next(read(str(tmp_path / folder), "train")))


def test_a_damaged_file_is_told(tmp_path: Path) -> None:
    place, copies = preferences(tmp_path), list[TrainableThinker]()
    opened(base(), place, copies)
    (file,) = tmp_path.glob("reference-*")
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ConfigError, match=r"reference-train-.*\.parquet cannot be read .*; remove it"):
        opened(base(), place, copies)


def test_the_digest_tells_models_apart_and_nothing_else() -> None:
    thinker = load_thinker(ModelSettings(), seed=2)
    digest = weights_digest(thinker)
    assert weights_digest(load_thinker(ModelSettings(lora=LoraSettings(rank=2)), seed=2)) == digest
    assert weights_digest(load_thinker(ModelSettings(), seed=3)) != digest
    thinker.model.visual.bfloat16()
    assert weights_digest(thinker) == digest
    with torch.no_grad():
        thinker.model.language_model.norm.weight[3] += 0.1
    assert weights_digest(thinker) != digest
