"""Where the Thinker comes from, which parts of it learn, and that what is written is what plain transformers reads."""

import json
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from typer.testing import CliRunner

from omniprep.cli import app
from omniprep.config import parse_config
from omniprep.errors import ConfigError
from omniprep.profile import QWEN2_5_OMNI
from tests.stream.model_records import alone
from tests.train.batches import batch_of

pytestmark = pytest.mark.reference
torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402

from omniprep.train.attention import use_attention  # noqa: E402
from omniprep.train.export import copy_processor, put_into_omni  # noqa: E402
from omniprep.train.forward import TrainableThinker  # noqa: E402
from omniprep.train.lora import adapters_off, has_lora, is_adapter  # noqa: E402
from omniprep.train.model import (  # noqa: E402
    LoraSettings,
    ModelSettings,
    ModuleName,
    add_lora,
    load_thinker,
    modules_of,
    parameters_of,
    save_thinker,
    train_only,
)

ALL: tuple[ModuleName, ...] = get_args(ModuleName)
BATCH = ("mixed", "text")


@pytest.fixture(autouse=True)
def quiet() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(1)


def losses_of(thinker: Any) -> Any:
    batch = batch_of(*BATCH)
    with torch.no_grad():
        return TrainableThinker(thinker)(batch["inputs"], batch["shift_labels"])


def with_adapters(*, seed: int = 1, **settings: Any) -> Any:
    """Return a Thinker whose adapters do something: they begin as nothing."""
    thinker = load_thinker(ModelSettings(lora=LoraSettings(rank=4, **settings)), seed=seed)
    torch.manual_seed(seed)
    for name, parameter in thinker.named_parameters():
        if is_adapter(name):
            torch.nn.init.normal_(parameter, std=0.2)
    return thinker


def weights_of(thinker: Any) -> dict[str, Any]:
    return {name: value.clone() for name, value in thinker.state_dict().items()}


def assert_same(one: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


# Parts -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [None, LoraSettings(rank=2)], ids=["plain", "lora"])
def test_every_parameter_is_in_exactly_one_part(lora: LoraSettings | None) -> None:
    thinker = load_thinker(ModelSettings(lora=lora))
    parts = parameters_of(thinker)
    assert tuple(parts) == tuple(modules_of(thinker)) == ALL
    listed = [id(parameter) for parameter in chain.from_iterable(parts.values())]
    assert len(listed) == len(set(listed))
    assert set(listed) == {id(parameter) for parameter in thinker.parameters()}
    assert all(parts.values())


@pytest.mark.parametrize("names", [(name,) for name in ALL] + [ALL, ("audio_adapter", "vision_adapter")], ids="+".join)
def test_only_the_named_parts_learn(names: tuple[ModuleName, ...]) -> None:
    thinker = load_thinker(ModelSettings())
    train_only(thinker, names)
    unused = set(thinker.model.audio_tower.audio_bos_eos_token.parameters())
    for part, parameters in parameters_of(thinker).items():
        assert all(parameter.requires_grad == (part in names) for parameter in set(parameters) - unused), part
    assert not any(parameter.requires_grad for parameter in unused)


def test_what_no_input_goes_through_is_frozen_from_the_start() -> None:
    thinker = load_thinker(ModelSettings())
    assert {name for name, one in thinker.named_parameters() if not one.requires_grad} == {
        "model.audio_tower.audio_bos_eos_token.weight"
    }


def test_a_head_that_is_the_embeddings_learns_with_them_or_not_at_all(tmp_path: Path) -> None:
    save_thinker(load_thinker(ModelSettings()), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = True
    (tmp_path / "config.json").write_text(json.dumps(config))
    settings = ModelSettings(checkpoint=str(tmp_path), from_scratch=True)
    thinker = load_thinker(settings, seed=8)
    embeddings = thinker.model.language_model.embed_tokens.weight
    assert thinker.lm_head.weight is embeddings
    listed = [id(parameter) for parameter in chain.from_iterable(parameters_of(thinker).values())]
    assert sorted(listed) == sorted({id(parameter) for parameter in thinker.parameters()})
    for names, learns in ((("head", "language_model"), True), (("audio_adapter",), False)):
        train_only(thinker, names)
        assert embeddings.requires_grad == learns
    for name in ("head", "language_model"):
        with pytest.raises(
            ConfigError, match="shares its weights with the embeddings, so `head` and `language_model` learn toge"
        ):
            train_only(thinker, [name])
    save_thinker(thinker, tmp_path / "tied")
    assert_same(in_plain_transformers(tmp_path / "tied").state_dict(), thinker.state_dict())
    add_lora(thinker, LoraSettings())
    train_only(thinker, ["language_model"])
    assert not embeddings.requires_grad
    with pytest.raises(ConfigError, match="leave `head` out"):
        train_only(thinker, ["language_model", "head"])


# Adapters --------------------------------------------------------------------------------------------------------------


def test_adapters_are_in_every_layer_of_the_language_model_and_in_no_tower() -> None:
    thinker = with_adapters()
    adapters = {name for name, _ in thinker.named_parameters() if is_adapter(name)}
    assert {name.split(".layers.")[0] for name in adapters} == {"model.language_model"}
    assert len(adapters) == 2 * 2 * len(LoraSettings().targets)  # layers, the two matrices of each
    plain = {name for name, _ in load_thinker(ModelSettings()).named_parameters()}
    assert {name.replace(".base_layer.", ".") for name, _ in thinker.named_parameters()} - adapters == plain


def test_with_adapters_the_language_model_means_them() -> None:
    thinker = with_adapters()
    train_only(thinker, ["language_model", "audio_adapter"])
    learning = {name for name, parameter in thinker.named_parameters() if parameter.requires_grad}
    assert {name for name in learning if not is_adapter(name)} == {
        f"model.audio_tower.{name}" for name in ("ln_post.weight", "ln_post.bias", "proj.weight", "proj.bias")
    }
    assert {name for name in learning if is_adapter(name)} == {name for name, _ in thinker.named_parameters() if is_adapter(name)}


def test_adapters_change_nothing_at_first_and_nothing_while_they_are_off() -> None:
    base = losses_of(load_thinker(ModelSettings(), seed=1))
    assert torch.equal(losses_of(load_thinker(ModelSettings(lora=LoraSettings()), seed=1)), base)
    thinker = with_adapters(seed=1)
    train_only(thinker, ["language_model"])
    learning = [name for name, parameter in thinker.named_parameters() if parameter.requires_grad]
    changed = losses_of(thinker)
    assert (changed - base).abs().max() > 0.1
    with adapters_off(thinker):
        assert torch.equal(losses_of(thinker), base)
    assert torch.equal(losses_of(thinker), changed)
    assert [name for name, parameter in thinker.named_parameters() if parameter.requires_grad] == learning


def test_adapters_come_back_after_an_error() -> None:
    thinker = with_adapters()
    expected = losses_of(thinker)
    with pytest.raises(ZeroDivisionError), adapters_off(thinker):
        raise ZeroDivisionError
    assert torch.equal(losses_of(thinker), expected)


def test_wrong_use_of_adapters_is_told() -> None:
    thinker = load_thinker(ModelSettings())
    assert not has_lora(thinker)
    with pytest.raises(ConfigError, match=r"no adapters; set model\.lora"), adapters_off(thinker):
        pass
    with pytest.raises(ConfigError, match=r"lora\.targets: no qkv, v_prj in a layer .* it has down_proj, gate_proj"):
        add_lora(thinker, LoraSettings(targets=("q_proj", "v_prj", "qkv")))
    add_lora(thinker, LoraSettings())
    with pytest.raises(ConfigError, match="has adapters already"):
        add_lora(thinker, LoraSettings())


@pytest.mark.parametrize(
    "values", [{"rank": 0}, {"alpha": 0}, {"dropout": 1.0}, {"targets": []}, {"r": 4}], ids=lambda values: next(iter(values))
)
def test_settings_that_make_no_adapter_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(values))):
        parse_config(LoraSettings, values, place="recipe.yaml")


# Writing ---------------------------------------------------------------------------------------------------------------


def in_plain_transformers(folder: Path) -> Any:
    from transformers import Qwen2_5OmniThinkerForConditionalGeneration

    thinker, report = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return thinker


@pytest.mark.parametrize("attention", ["sdpa", "varlen"])
def test_what_is_written_is_what_plain_transformers_loads_and_generates_with(tmp_path: Path, attention: Any) -> None:
    thinker = load_thinker(ModelSettings(), seed=3)
    use_attention(thinker, attention)
    save_thinker(thinker, tmp_path)
    plain = in_plain_transformers(tmp_path)
    assert plain.config._attn_implementation == "sdpa"
    assert_same(plain.state_dict(), thinker.state_dict())
    inputs = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in alone("audio")["tokens"].items()}
    prompt = {name: inputs[name][None] for name in ("input_ids", "attention_mask")}
    media = {name: inputs[name] for name in ("input_features", "feature_attention_mask")}
    made = plain.generate(**prompt, **media, max_new_tokens=3, do_sample=False)
    assert made.shape == (1, prompt["input_ids"].shape[1] + 3)


def test_the_names_in_the_files_are_those_of_the_released_weights(tmp_path: Path) -> None:
    save_thinker(load_thinker(ModelSettings()), tmp_path)
    names = load_file(tmp_path / "model.safetensors")
    assert {name.split(".")[0] for name in names} == {"audio_tower", "visual", "model", "lm_head"}
    released = {
        "model.embed_tokens.weight",
        "model.layers.1.self_attn.q_proj.bias",
        "model.layers.0.mlp.gate_proj.weight",
        "model.norm.weight",
        "lm_head.weight",
        "audio_tower.conv1.weight",
        "audio_tower.layers.0.self_attn_layer_norm.weight",
        "audio_tower.proj.weight",
        "visual.patch_embed.proj.weight",
        "visual.blocks.0.attn.q.weight",
        "visual.merger.mlp.0.weight",
    }
    assert released <= names.keys()
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "qwen2_5_omni_thinker"


def test_what_is_written_can_be_trained_on(tmp_path: Path) -> None:
    thinker = load_thinker(ModelSettings(), seed=3)
    save_thinker(thinker, tmp_path)
    again = load_thinker(ModelSettings(checkpoint=str(tmp_path)), seed=4)
    assert_same(again.state_dict(), thinker.state_dict())
    assert again.training
    fresh = load_thinker(ModelSettings(checkpoint=str(tmp_path), from_scratch=True), seed=4)
    assert fresh.state_dict().keys() == thinker.state_dict().keys()
    assert not torch.equal(fresh.lm_head.weight, thinker.lm_head.weight)
    assert_same(fresh.state_dict(), load_thinker(ModelSettings(checkpoint=str(tmp_path), from_scratch=True), seed=4).state_dict())


def test_adapters_are_merged_into_what_is_written_and_stay_as_they_are_in_memory(tmp_path: Path) -> None:
    thinker = with_adapters(targets=("q_proj", "down_proj"), alpha=3.5)
    before = weights_of(thinker)
    expected = losses_of(thinker)
    save_thinker(thinker, tmp_path)
    assert_same(thinker.state_dict(), before)
    written = losses_of(in_plain_transformers(tmp_path))
    assert (written - expected).abs().max() < 1e-5
    with adapters_off(thinker):
        assert (written - losses_of(thinker)).abs().max() > 0.1


def test_without_merging_the_base_is_written(tmp_path: Path) -> None:
    save_thinker(with_adapters(seed=1), tmp_path, merge_lora=False)
    assert_same(in_plain_transformers(tmp_path).state_dict(), load_thinker(ModelSettings(), seed=1).state_dict())


def test_weights_are_written_in_the_type_that_is_asked_for(tmp_path: Path) -> None:
    thinker = load_thinker(ModelSettings())
    save_thinker(thinker, tmp_path, dtype=torch.bfloat16)
    assert {value.dtype for value in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    assert in_plain_transformers(tmp_path).dtype == torch.bfloat16
    assert load_thinker(ModelSettings(checkpoint=str(tmp_path))).dtype == torch.float32
    assert thinker.dtype == torch.float32


# A whole Omni checkpoint -----------------------------------------------------------------------------------------------


def omni_checkpoint(folder: Path, *, seed: int) -> Any:
    """Write a checkpoint in the layout of the released ones, two files of weights, and return its Thinker."""
    thinker = load_thinker(ModelSettings(), seed=seed)
    save_thinker(thinker, folder, dtype=torch.bfloat16)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2_5_omni", "thinker_config": config}))
    weights = {f"thinker.{name}": value for name, value in load_file(folder / "model.safetensors").items()}
    weights["talker.codec_head.weight"] = torch.arange(6.0)
    names = sorted(weights)
    files = {"model-00001-of-00002.safetensors": names[:20], "model-00002-of-00002.safetensors": names[20:]}
    for file, some in files.items():
        save_file({name: weights[name] for name in some}, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {name: file for file, some in files.items() for name in some}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "spk_dict.pt").write_bytes(b"voices")
    return thinker.bfloat16()


def test_of_an_omni_checkpoint_the_thinker_is_taken(tmp_path: Path) -> None:
    thinker = omni_checkpoint(tmp_path, seed=5)
    assert_same(load_thinker(ModelSettings(checkpoint=str(tmp_path))).state_dict(), thinker.float().state_dict())


def test_a_trained_thinker_is_put_back_into_the_omni_checkpoint(tmp_path: Path) -> None:
    omni_checkpoint(tmp_path / "omni", seed=5)
    trained = load_thinker(ModelSettings(), seed=6)
    save_thinker(trained, tmp_path / "trained")
    put_into_omni(tmp_path / "trained", source=tmp_path / "omni", folder=tmp_path / "result")
    loaded = load_thinker(ModelSettings(checkpoint=str(tmp_path / "result")))
    assert_same(loaded.state_dict(), trained.bfloat16().float().state_dict())
    files = {file: path.read_bytes() for path in (tmp_path / "omni").iterdir() if (file := path.name)}
    assert {path.name for path in (tmp_path / "result").iterdir()} == files.keys()
    for name in ("spk_dict.pt", "config.json", "model.safetensors.index.json"):
        assert (tmp_path / "result" / name).read_bytes() == files[name]
    talker = load_file(tmp_path / "result" / "model-00001-of-00002.safetensors")["talker.codec_head.weight"]
    assert talker.tolist() == [0, 1, 2, 3, 4, 5]


def test_the_command_puts_a_thinker_back_and_refuses_what_is_none(tmp_path: Path) -> None:
    omni_checkpoint(tmp_path / "omni", seed=5)
    trained = load_thinker(ModelSettings(), seed=6)
    save_thinker(trained, tmp_path / "trained")
    arguments = ["export", "omni", str(tmp_path / "trained"), "--into", str(tmp_path / "omni"), "--out", str(tmp_path / "result")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    loaded = load_thinker(ModelSettings(checkpoint=str(tmp_path / "result")))
    assert_same(loaded.state_dict(), trained.bfloat16().float().state_dict())
    again = CliRunner().invoke(app, arguments)
    assert (again.exit_code, "is not empty; name another folder" in again.output) == (2, True)
    (tmp_path / "trained" / "config.json").unlink()
    nothing = CliRunner().invoke(app, [*arguments[:-1], str(tmp_path / "other")])
    assert (nothing.exit_code, "expected the folder `model` of a phase" in nothing.output) == (2, True)


def test_processor_files_of_the_checkpoint_are_copied_beside_the_weights(tmp_path: Path) -> None:
    source, folder = tmp_path / "source", tmp_path / "folder"
    source.mkdir()
    folder.mkdir()
    names = ["chat_template.jinja", "merges.txt", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"]
    for name in [*names, "config.json", "model.safetensors", "README.md"]:
        (source / name).write_text(name)
    assert copy_processor(str(source), folder) == names
    assert sorted(path.name for path in folder.iterdir()) == names


def test_a_checkpoint_keeps_its_type_if_that_is_asked_for(tmp_path: Path) -> None:
    omni_checkpoint(tmp_path, seed=5)
    settings = ModelSettings(checkpoint=str(tmp_path))
    assert {value.dtype for value in load_thinker(settings, keep_dtype=True).parameters()} == {torch.bfloat16}
    assert {value.dtype for value in load_thinker(settings).parameters()} == {torch.float32}


def test_a_thinker_of_another_shape_is_not_put_into_an_omni_checkpoint(tmp_path: Path) -> None:
    omni_checkpoint(tmp_path / "omni", seed=5)
    save_thinker(load_thinker(ModelSettings()), tmp_path / "trained")
    file = tmp_path / "trained" / "model.safetensors"
    weights = load_file(file)
    save_file({**weights, "lm_head.weight": torch.zeros(2, 2)}, file, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"lm_head\.weight is \(2, 2\), that of the Omni checkpoint \(151665, 64\)"):
        put_into_omni(tmp_path / "trained", source=tmp_path / "omni", folder=tmp_path / "result")
    del weights["lm_head.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"no weight lm_head\.weight"):
        put_into_omni(tmp_path / "trained", source=tmp_path / "omni", folder=tmp_path / "result")


# Wrong use -------------------------------------------------------------------------------------------------------------


def test_loading_leaves_the_random_state_alone_and_depends_on_the_seed() -> None:
    torch.manual_seed(9)
    before = torch.get_rng_state()
    one, same, other = (load_thinker(ModelSettings(lora=LoraSettings()), seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert_same(one, same)
    moved = {name for name, value in one.items() if not torch.equal(value, other[name])}
    assert {"lm_head.weight", "model.language_model.layers.0.mlp.up_proj.lora_A.default.weight"} <= moved


def test_a_checkpoint_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.checkpoint: .*nowhere: expected 'tiny', a folder with a config\.json"):
        load_thinker(ModelSettings(checkpoint=str(tmp_path / "nowhere")))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"model\.checkpoint: .*: expected 'tiny'"):
        load_thinker(ModelSettings(checkpoint=str(tmp_path)))


def test_another_kind_of_model_is_told(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(ConfigError, match="expected a model of type qwen2_5_omni or qwen2_5_omni_thinker, got 'qwen2'"):
        load_thinker(ModelSettings(checkpoint=str(tmp_path)))


def test_a_configuration_that_does_not_fit_the_data_is_told(tmp_path: Path) -> None:
    save_thinker(load_thinker(ModelSettings()), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["image_token_index"], config["position_id_per_seconds"] = 7, 40
    config["audio_config"]["num_mel_bins"] = 80
    config["text_config"]["vocab_size"] = 1000
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError) as caught:
        load_thinker(ModelSettings(checkpoint=str(tmp_path)), profile=QWEN2_5_OMNI)
    message = str(caught.value)
    for part in (
        "profile qwen2.5-omni",
        "image_token_index is 7, the data need 151655",
        "position_id_per_seconds is 40, the data need 25",
        "audio_config.num_mel_bins is 80, the data need 128",
        "text_config.vocab_size is 1000, the data need 151665",
    ):
        assert part in message


def test_weights_that_are_missing_or_unreadable_are_told(tmp_path: Path) -> None:
    save_thinker(load_thinker(ModelSettings()), tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    del weights["visual.merger.mlp.0.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"1 weights of the Thinker are missing, the first is model\.visual\.merger\.mlp\.0"):
        load_thinker(ModelSettings(checkpoint=str(tmp_path)))
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ConfigError, match="its weights cannot be read"):
        load_thinker(ModelSettings(checkpoint=str(tmp_path)))
    file.unlink()
    with pytest.raises(ConfigError, match="its weights cannot be read"):
        load_thinker(ModelSettings(checkpoint=str(tmp_path)))
