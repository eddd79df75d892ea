"""Sample answers: what transformers itself would generate, and nothing of the training is changed by them."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from omniprep.config import parse_config
from omniprep.encode.model_inputs import model_inputs
from omniprep.encode.thinker import EncodeConfig, ThinkerEncoder
from omniprep.errors import ConfigError
from omniprep.profile import IGNORE_INDEX
from tests.stream.model_records import AUDIO, FILES, IMAGES, ROWS, alone, ask, encode, encoder
from tests.stream.stored import SAMPLES, stored

pytestmark = pytest.mark.reference
torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from omniprep.train.attention import use_attention  # noqa: E402
from omniprep.train.forward import TrainableThinker  # noqa: E402
from omniprep.train.generate import (  # noqa: E402
    SampleSettings,
    generate_samples,
    generation_inputs,
    load_prompts,
    sampler,
)
from omniprep.train.parallel import ParallelSettings  # noqa: E402
from omniprep.train.prompts import choose_rows, prompt_of, prompts_from_file, prompts_from_records  # noqa: E402
from omniprep.train.tiny import tiny_thinker  # noqa: E402
from tests.train.answer_work import answer_on_ranks, answers, prompt  # noqa: E402
from tests.train.rank_work import batch_of  # noqa: E402
from tests.train.ranks import run_ranks  # noqa: E402
from tests.train.tiny_inputs import train_steps  # noqa: E402

MEDIA = ("text", "dialogue", "audio", "sounds", "image", "video", "film")
GREEDY = SampleSettings(do_sample=False, max_new_tokens=6)
SAMPLED = SampleSettings(max_new_tokens=6)


@pytest.fixture(scope="module")
def thinker() -> Any:
    torch.set_num_threads(1)
    return tiny_thinker(seed=2)


@contextmanager
def logits_of(thinker: Any) -> Iterator[list[Any]]:
    """Collect the logits behind the last token of every call."""
    seen: list[Any] = []
    hook = thinker.lm_head.register_forward_hook(lambda module, given, output: seen.append(output[0, -1].detach().clone()))
    try:
        yield seen
    finally:
        hook.remove()


def reference_prompt(name: str) -> Any:
    from omniprep.records import parse_record
    from omniprep.types import MediaFile

    ours = ThinkerEncoder(EncodeConfig(rope_mode="reference"))
    # The reference is told one rate for all videos: the one that the frames of these have.
    rows = json.loads(json.dumps(ROWS[name]).replace('"sample_fps": 1.6', '"sample_fps": 2.0'))
    sample = ours.encode(parse_record(rows), key=name, resolve=lambda ref: MediaFile(name=str(ref), data=FILES[str(ref)]))
    return prompt_of(sample, ours.tokenizer)


@pytest.mark.parametrize("name", MEDIA)
def test_answers_are_those_of_transformers_that_computes_the_positions_itself(thinker: Any, name: str) -> None:
    prompt = reference_prompt(name)
    with logits_of(thinker) as ours:
        answer = generate_samples(thinker, [prompt], GREEDY, encoder().tokenizer)[0]
    theirs_inputs = generation_inputs(prompt)
    del theirs_inputs["position_ids"]
    with logits_of(thinker) as theirs, torch.no_grad():
        thinker.eval()
        ids = thinker.generate(
            **theirs_inputs,
            use_audio_in_video=name == "film",
            max_new_tokens=6,
            do_sample=False,
            repetition_penalty=1.05,
            eos_token_id=[151645, 151643],
            pad_token_id=151643,
        )[0, theirs_inputs["input_ids"].shape[1] :]
        thinker.train()
    assert len(ours) == len(theirs) == answer.num_tokens == 6
    assert max(float((mine - other).abs().max()) for mine, other in zip(ours, theirs, strict=True)) <= 1e-5
    assert encoder().tokenizer.full.decode(ids.tolist(), skip_special_tokens=False) == answer.answer


@pytest.mark.parametrize("name", ["text", "mixed"])
def test_with_a_cache_and_aligned_positions_each_token_is_the_one_without_a_cache(thinker: Any, name: str) -> None:
    with logits_of(thinker) as cached:
        answers(thinker, (name,), GREEDY)
    inputs = generation_inputs(prompt(name))
    bare = {key: value for key, value in inputs.items() if key != "attention_mask"}
    with torch.no_grad():
        for seen in cached:
            logits = thinker(**bare, use_cache=False).logits[0, -1]
            assert float((logits - seen).abs().max()) <= 1e-5
            told = set(bare["input_ids"][0].tolist())
            penalised = torch.tensor([1.05 if token in told else 1.0 for token in range(len(logits))])
            token = torch.where(logits > 0, logits / penalised, logits * penalised).argmax()
            bare["input_ids"] = torch.cat([bare["input_ids"], token.view(1, 1)], dim=1)
            bare["position_ids"] = torch.cat([bare["position_ids"], bare["position_ids"][..., -1:] + 1], dim=-1)


def test_positions_behind_the_prompt_are_those_that_the_record_has() -> None:
    for name in MEDIA:
        whole = alone(name)["tokens"]["position_ids"]
        before = prompt(name).inputs["position_ids"]
        num_more = whole.shape[1] - before.shape[1]
        assert num_more > 0
        np.testing.assert_array_equal(whole[:, before.shape[1] :], before[:, -1:] + np.arange(1, num_more + 1))


def test_nothing_of_the_training_is_changed(thinker: Any) -> None:
    model = TrainableThinker(thinker)
    use_attention(thinker, "varlen")
    thinker.model.visual.eval()
    modes = {name: module.training for name, module in thinker.named_modules()}
    torch.manual_seed(11)
    expected = torch.rand(3)
    before = model(*batch_of("mixed")).detach()
    torch.manual_seed(11)
    answers(model, ("text", "mixed"), SAMPLED)
    torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)
    assert {name: module.training for name, module in thinker.named_modules()} == modes
    assert thinker.model.language_model.config._attn_implementation == "flash_varlen"
    torch.testing.assert_close(model(*batch_of("mixed")).detach(), before, rtol=0, atol=0)
    use_attention(thinker, "sdpa")
    thinker.train()


def test_the_seed_alone_decides_the_answers(thinker: Any) -> None:
    def texts(seed: int) -> list[str]:
        return [one.answer for one in answers(thinker, ("text", "image"), SAMPLED.model_copy(update={"seed": seed}))]

    torch.manual_seed(1)
    first = texts(0)
    torch.manual_seed(2)
    assert texts(0) == first
    assert texts(1) != first
    assert texts(0)[1:] == [answers(thinker, ("image",), SAMPLED)[0].answer]


def test_a_checkpoints_own_ways_to_choose_have_no_say(thinker: Any) -> None:
    expected = [one.answer for one in answers(thinker, ("text",), SAMPLED)]
    given = thinker.generation_config
    thinker.generation_config = type(given)(do_sample=True, top_k=1, min_p=0.9, suppress_tokens=list(range(1000)), num_beams=1)
    try:
        assert [one.answer for one in answers(thinker, ("text",), SAMPLED)] == expected
    finally:
        thinker.generation_config = given


def test_a_model_says_what_it_has_learnt_by_heart() -> None:
    torch.set_num_threads(1)
    thinker = tiny_thinker(seed=0)
    rows = {"audio": ask(AUDIO[0], answer="Somebody hums."), "image": ask(IMAGES[0], answer="Dots of all colours.")}
    samples = [encode(row, name) for name, row in rows.items()]
    train_steps(thinker, [model_inputs(sample) for sample in samples], steps=20, learning_rate=1e-2)
    prompts = [prompt_of(sample, encoder().tokenizer) for sample in samples]
    found = generate_samples(thinker, prompts, SampleSettings(do_sample=False, repetition_penalty=1.0), encoder().tokenizer)
    assert [one.answer for one in found] == ["Somebody hums.", "Dots of all colours."]
    assert [one.expected for one in found] == [one.answer for one in found]
    assert all(one.is_finished for one in found)


def test_ranks_that_share_a_model_answer_as_one_process_does() -> None:
    torch.set_num_threads(1)
    names, settings = ("text", "mixed"), SampleSettings(max_new_tokens=3)
    model = TrainableThinker(tiny_thinker(seed=2))
    expected = [one.answer for one in answers(model, names, settings)]
    loss = float(model(*batch_of("mixed")).detach().sum())
    for first, second, loss_of_rank in run_ranks(answer_on_ranks, 2, names, settings, ParallelSettings()):
        assert first == second == expected
        assert loss_of_rank == pytest.approx(loss, rel=1e-5)


def test_a_model_that_computes_in_bfloat16_answers_between_steps() -> None:
    """Wrapped as on a GPU, where even one process is."""
    parallel = ParallelSettings(bf16=True, activation_checkpointing=True, reshard_after_forward=False, attention="varlen")
    [(first, second, loss)] = run_ranks(answer_on_ranks, 1, ("text", "mixed"), SampleSettings(max_new_tokens=3), parallel)
    assert first == second
    assert all(first)
    assert loss > 0


def write_prompts(folder: Path, *rows: object) -> Path:
    for name in ("a.wav", "a.png"):
        (folder / name).write_bytes(FILES[name])
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_prompts_of_a_file_end_where_the_answer_begins(tmp_path: Path) -> None:
    unanswered = {"id": "mine", "messages": ask(AUDIO[0])["messages"][:1]}
    path = write_prompts(
        tmp_path, ask(IMAGES[0], answer="A picture."), unanswered, {"parts": [{"type": "text", "text": "It rains " * 20}]}
    )
    image, audio, document = prompts_from_file(path, encoder())
    assert image.expected == "A picture."
    assert image.question.endswith("What is it?<|im_end|>\n<|im_start|>assistant\n")
    assert "[image]" in image.question
    assert (image.key, audio.key) == ("prompts.jsonl:1", "mine")
    assert audio.expected == ""
    assert "[audio]" in audio.question
    assert (document.question + " " + document.expected).split() == ["It", "rains"] * 20
    assert "labels" not in image.inputs
    same = prompt_of(encode(ask(IMAGES[0], answer="A picture."), "x"), encoder().tokenizer)
    assert same.expected == "A picture."
    for name, array in image.inputs.items():
        np.testing.assert_array_equal(array, same.inputs[name])


def test_a_prompt_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    missing = {"type": "image", "image": "gone.png"}
    for row, message in ((ask(missing), "gone.png"), ({"messages": []}, "messages"), ("no object", "object")):
        with pytest.raises(ConfigError, match=rf"samples.prompts: .*prompts.jsonl:2.*{message}"):
            prompts_from_file(write_prompts(tmp_path, ask(), row), encoder())
    with pytest.raises(ConfigError, match="has no rows"):
        prompts_from_file(write_prompts(tmp_path), encoder())
    with pytest.raises(ConfigError, match=r"other\.jsonl"):
        prompts_from_file(tmp_path / "other.jsonl", encoder())


def test_prompts_of_records_are_their_tokens_before_the_last_answer(tmp_path: Path) -> None:
    stored(tmp_path)
    prompts = prompts_from_records([tmp_path], encoder().tokenizer, split="train", num_records=4)
    assert len({one.key for one in prompts}) == 4
    of_key = {sample.key: sample.layouts["tokens"] for sample in SAMPLES}
    for one in prompts:
        layout = of_key[one.key]
        length = one.inputs["input_ids"].size
        np.testing.assert_array_equal(one.inputs["input_ids"], layout.input_ids[:length])
        assert (layout.labels[length:] != IGNORE_INDEX).any()
    with pytest.raises(ConfigError, match="no supervised record in split 'val'"):
        prompts_from_records([tmp_path], encoder().tokenizer, split="val", num_records=4)


def test_settings_tell_a_file_from_a_number() -> None:
    found = [parse_config(SampleSettings, {"prompts": value}, place="samples").prompts for value in (3, "prompts.jsonl")]
    assert found == [3, Path("prompts.jsonl")]
    for wrong in ({"prompts": 0}, {"top_p": 1.5}, {"temperature": 0.0}, {"repetition_penalty": 0.0}, {"max_new_tokens": 0}):
        with pytest.raises(ConfigError, match=f"samples: {next(iter(wrong))}"):
            parse_config(SampleSettings, wrong, place="samples")


def test_of_a_preference_the_chosen_answer_is_expected() -> None:
    found = prompt("media pair")
    assert found.expected == "The first, since it is there."
    assert "[audio]" in found.question
    assert found.question.endswith("<|im_start|>assistant\n")


def test_a_text_that_is_supervised_from_its_start_is_cut_in_its_middle() -> None:
    text = "It rains, and it has rained all day. " * 3
    sample = encode({"parts": [{"type": "text", "text": text}]}, "rain")
    found = prompt_of(sample, encoder().tokenizer)
    assert text.startswith(found.question)
    assert found.inputs["input_ids"].size == sample.layouts["tokens"].num_tokens // 2
    assert (found.question + " " + found.expected).split() == text.split()


def test_the_sampler_reads_a_datasets_own_settings(tmp_path: Path, thinker: Any) -> None:
    from omniprep.prepare import prepare
    from tests.prepare_builders import chat, recipe, write_media

    write_media(tmp_path / "data")
    rows = [chat(number, {"type": "audio", "audio": "a.wav"}, split="val") for number in range(2)]
    template = {"system_prompt": "Be brief."}
    made = recipe(tmp_path, [*rows, chat(9)], encode={"template": template})
    prepare(made)
    from omniprep.shards.manifest import read_manifest

    manifests = {made.output: read_manifest(made.output)}
    found = sampler(thinker, SampleSettings(prompts=2, max_new_tokens=2), manifests, split="val")()
    assert [one["expected"] for one in found] == ["answer 0", "answer 1"]
    assert all("Be brief." in one["question"] and one["num_tokens"] == 2 for one in found)
    path = write_prompts(tmp_path, ask())
    prompts, _ = load_prompts(SampleSettings(prompts=path), manifests, split="val")
    assert "Be brief." in prompts[0].question


def test_rows_are_chosen_over_all_mixes_of_modalities() -> None:
    flags = dict.fromkeys(("has_audio", "has_image", "has_video", "has_video_with_sound"), False)
    rows = [{**flags, "key": f"t{n}", "num_tokens": n, "num_supervised": n} for n in range(5)]
    rows += [{**flags, "has_image": True, "key": f"i{n}", "num_tokens": 100 + n, "num_supervised": 1} for n in range(2)]
    assert [row["key"] for row in choose_rows(rows, num_samples=4)] == ["t1", "i0", "t2", "i1"]
    assert [row["key"] for row in choose_rows(rows, num_samples=99)] == ["t1", "i0", "t2", "i1", "t3", "t4"]
