"""Pictures from a recipe to a model that has learnt to see: trained, resumed, scored, merged, asked, loaded by PEFT."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lorafit import pipeline
from lorafit.answering.engine import Engine
from lorafit.errors import LorafitError, ModelError, RecipeError, UsageError
from lorafit.job import build_objective, open_job
from lorafit.kinds.quantizations import kind_of_codes, quantizations
from lorafit.model.attach import attach_adapter
from lorafit.model.processor import refuse_token_kinds
from lorafit.model.towers import check_towers, count_towers
from lorafit.recipe.load import load_recipe
from tests.support.pictures import draw_rows
from tests.support.tiny_recipe import write_rows
from tests.support.tiny_vision import make_idefics3, make_llava

MAKERS: dict[str, Callable[..., Path]] = {"llava": make_llava, "idefics3": make_idefics3}
PROJECTOR = {"llava": "full", "idefics3": "none"}  # LLaVA's files name tensors otherwise than its modules


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORAFIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def make_world(folder: Path, kind: str, *, rows: int = 96) -> dict[str, Any]:
    """Squares to learn, squares to be asked about, and the same with the pictures shuffled; a recipe over them."""
    MAKERS[kind](folder / "base")
    test = draw_rows(folder, 24, name="test")
    asked = random.Random(0).sample([row["messages"][0] for row in test], k=24)
    shuffled = [{"messages": [one, row["messages"][1]]} for one, row in zip(asked, test, strict=True)]
    write_rows(folder / "train.jsonl", draw_rows(folder, rows))
    write_rows(folder / "test.jsonl", test)
    write_rows(folder / "shuffled.jsonl", shuffled)
    return {
        "name": "squares",
        "task": {"kind": "image-text-to-text", "projector": PROJECTOR[kind]},
        "model": {"base": str(folder / "base"), "quantization": "none", "dtype": "fp32", "attention": "eager"},
        "adapter": {"r": 8, "dropout": 0.0},
        "data": {"train": str(folder / "train.jsonl"), "test": str(folder / "test.jsonl")},
        "training": {
            "max_steps": 45,
            "batch_size": 16,
            "learning_rate": 1e-2,
            "micro_batch_tokens": 2048,
            "gradient_checkpointing": False,
        },
        "evaluation": {"final": ["exact_match"], "max_new_tokens": 6},
        "checkpoints": {"every_steps": 15},
        "output": str(folder / "run"),
    }


@pytest.fixture(scope="module", params=list(MAKERS))
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    recipe = make_world(tmp_path_factory.mktemp(request.param), request.param)
    pipeline.train(recipe)
    return recipe


def right(run: Path, *overrides: str) -> tuple[float, float]:
    """Shares of right answers of base and tuned model."""
    compared = pipeline.evaluate(run, overrides=overrides).evaluation.comparisons
    (found,) = [one for one in compared if one.metric == "exact_match"]
    return found.base, found.tuned


def test_colours_are_learnt_from_the_pictures_alone(trained: dict[str, Any]) -> None:
    run = Path(trained["output"])
    base, tuned = right(run)
    assert base <= 0.1 and tuned >= 0.95
    folder = Path(trained["data"]["test"]).parent
    assert right(run, f"data.test={folder / 'shuffled.jsonl'}")[1] <= 0.6


def test_a_resume_is_the_same_run(trained: dict[str, Any]) -> None:
    run = Path(trained["output"])
    before = load_file(run / "adapter" / "adapter_model.safetensors")
    pipeline.train(trained, resume_from=30)
    after = load_file(run / "adapter" / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_merged_alone_and_in_peft_it_is_the_same_model(trained: dict[str, Any], tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText, AutoProcessor

    run, merged = Path(trained["output"]), tmp_path / "merged"
    parity = pipeline.merge(run, output=merged).parity
    assert parity is not None and parity.mean_kl < 1e-5
    folder, base = Path(trained["data"]["test"]).parent, trained["model"]["base"]
    before, after = (load_file(Path(place) / "model.safetensors") for place in (base, merged))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert len([name for name in before if "vision" in name]) > 10 and not [
        name for name in changed if "vision" in name
    ]
    assert projector_of(changed) == (projector_of(before) if trained["task"]["projector"] == "full" else set())

    questions = folder / "questions.jsonl"
    rows = [json.loads(line) for line in (folder / "test.jsonl").read_text().splitlines()][:6]
    write_rows(questions, [{"messages": row["messages"][:1]} for row in rows])
    wanted = [row["messages"][1]["content"] for row in rows]
    for place in (run, run / "adapter", merged):
        answers = pipeline.generate(place, input_file=questions, max_new_tokens=6).answers
        assert [answer.text for answer in answers] == wanted
    (alone,) = pipeline.generate(merged, rows=[absolute(rows[0], folder)], max_new_tokens=6).answers
    assert alone.text == wanted[0]
    with pytest.raises(LorafitError, match="images are for task image-text-to-text"):
        pipeline.generate(Path(base), input_file=questions)

    peft = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base), run / "adapter").eval()
    whole = AutoModelForImageTextToText.from_pretrained(merged).eval()
    for processor in map(AutoProcessor.from_pretrained, (run / "adapter", merged)):
        asked = absolute(rows[0], folder)["messages"]
        inputs = processor.apply_chat_template(
            asked, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
        )
        with torch.no_grad():
            ours, theirs = whole(**inputs).logits, peft(**inputs).logits
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        written = peft.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert processor.decode(written, skip_special_tokens=True) == wanted[0]


def test_a_batch_answers_as_single_rows_do(trained: dict[str, Any]) -> None:
    """Prompts of other lengths, with no image, one, and two."""
    folder, run = Path(trained["data"]["test"]).parent, Path(trained["output"])
    rows = [json.loads(line) for line in (folder / "test.jsonl").read_text().splitlines()][:5]
    questions = [absolute(row, folder)["messages"][0]["content"] for row in rows]
    texts = [{"type": "text", "text": words} for words in ("what", "what does the shop sell", "and")]
    asked = [
        questions[0],
        [*questions[1], texts[2], questions[2][0]],
        texts[1:2],
        [questions[3][0], texts[1]],
        questions[4],
    ]
    prompts = [{"messages": [{"role": "user", "content": parts}]} for parts in asked]
    together = pipeline.generate(run, rows=prompts, max_new_tokens=5).answers
    alone = [pipeline.generate(run, rows=[prompt], max_new_tokens=5).answers[0] for prompt in prompts[1:4]]
    assert [answer.text for answer in together[1:4]] == [answer.text for answer in alone]
    with pytest.raises(UsageError, match="no beams are searched for prompts with images"):
        pipeline.generate(run, rows=prompts, max_new_tokens=5, num_beams=2)


@pytest.mark.parametrize("trained", ["llava"], indirect=True)
def test_a_merge_without_its_images_is_not_compared_and_says_so(trained: dict[str, Any], tmp_path: Path) -> None:
    file = Path(trained["data"]["test"]).parent / "test0.png"
    file.rename(file.with_suffix(".gone"))
    try:
        done = pipeline.merge(Path(trained["output"]), output=tmp_path / "merged")
    finally:
        file.with_suffix(".gone").rename(file)
    assert done.parity is None and done.parity_skipped == f"the image {file} is gone"
    assert (tmp_path / "merged" / "model.safetensors").is_file()


def absolute(row: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The question of a row, its image named from the root."""
    picture, text = row["messages"][0]["content"]
    path = str(folder / picture["path"])
    return {"messages": [{"role": "user", "content": [{**picture, "path": path}, text]}]}


def test_a_step_costs_the_same_however_it_is_cut(trained: dict[str, Any], tmp_path: Path) -> None:
    """Rows without an image and with two share micro-batches with others; the model's own loss says the same."""
    folder = Path(trained["data"]["test"]).parent
    rows = [json.loads(line) for line in (folder / "test.jsonl").read_text().splitlines()][:5]
    first, second = (row["messages"][0]["content"][0] for row in rows[:2])
    rows[1]["messages"][0]["content"] = [first, {"type": "text", "text": "and"}, second]
    rows[2]["messages"][0]["content"] = "no picture"
    write_rows(folder / "mixed.jsonl", rows)
    job, model = open_model({**trained, "data": {"train": str(folder / "mixed.jsonl")}})
    objective = build_objective(job, model, "fp32")
    rows_of = job.rows.train

    def gradients(parts: list[list[int]]) -> list[torch.Tensor]:
        model.zero_grad()
        for part in parts:
            objective(job.task.collate([[rows_of[row]] for row in part], job.pad_id)).loss_sum.backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    whole = gradients([[0, 1, 2, 3, 4]])
    for parts in ([[0], [1], [2], [3], [4]], [[4, 1], [2, 0, 3]]):
        for ours, theirs in zip(gradients(parts), whole, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    for row in range(5):
        batch = job.task.collate([[rows_of[row]]], job.pad_id)
        assert float(objective.reference_loss(batch)) == pytest.approx(objective.probed_loss(batch), rel=1e-5)


def open_model(recipe: dict[str, Any], quantization: str = "none") -> tuple[Any, Any]:
    """The recipe's rows, and its model with a fresh adapter in training mode."""
    from lorafit.contracts import Silent
    from lorafit.model.load import load_model

    job = open_job(load_recipe(recipe), Silent())
    base = load_model(
        job.base,
        quantization=quantizations.make(quantization).section,
        dtype=torch.float32,
        compute_dtype=torch.float32,
        attention="eager",
        device="cpu",
        model_class=job.task.model_class,
        reporter=Silent(),
    )
    model = attach_adapter(base, job.recipe.adapter, 0, model_class=job.task.model_class)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return job, model


@pytest.mark.parametrize("trained", ["idefics3"], indirect=True)
def test_only_the_language_model_is_trained(trained: dict[str, Any]) -> None:
    tensors = load_file(Path(trained["output"]) / "adapter" / "adapter_model.safetensors")
    assert tensors and all(".language_model." in name or ".text_model." in name for name in tensors)
    job, model = open_model(trained)
    build_objective(job, model, "fp32")(job.task.collate([[job.rows.train[0]]], job.pad_id)).loss_sum.backward()
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert reached and all("lora_" in name and ("language" in name or "text_model" in name) for name in reached)


@pytest.mark.parametrize("trained", ["llava"], indirect=True)
def test_a_projector_is_trained_whole_and_saved(trained: dict[str, Any]) -> None:
    saved = load_file(Path(trained["output"]) / "adapter" / "adapter_model.safetensors")
    whole = [name for name in saved if "lora_" not in name]
    assert len(whole) == len(projector_of(saved)) > 0
    base = load_file(Path(trained["model"]["base"]) / "model.safetensors")
    assert len(whole) == len(projector_of(base)) and all(saved[name].dtype == torch.float32 for name in whole)


def projector_of(tensors: Iterable[str]) -> set[str]:
    return {name for name in tensors if "projector" in name or "connector" in name}


def test_each_part_of_the_model_is_counted(trained: dict[str, Any]) -> None:
    from dataclasses import replace

    job, model = open_model({**trained, "task": "image-text-to-text"})
    language, vision, projector = count_towers(model)
    assert sum(part.parameters for part in (language, vision, projector)) == job.shape.total_parameters
    assert (vision.trained, projector.trained, vision.adapted, projector.adapted) == (0, 0, 0, 0)
    assert language.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    with_projector = replace(job.task.model_class, trains_projector=True)
    whole = attach_adapter(model.unload(), job.recipe.adapter, 0, model_class=with_projector)
    assert [part.trained > 0 for part in count_towers(whole)] == [True, False, True]
    assert count_towers(whole)[2].trained == projector.parameters
    check_towers(count_towers(whole), trains_projector=True)
    with pytest.raises(ModelError, match="parameters of the projector are trained, and 0 should be"):
        check_towers(count_towers(whole), trains_projector=False)
    next(p for name, p in whole.named_parameters() if "vision" in name).requires_grad_(True)
    with pytest.raises(ModelError, match="parameters of the vision tower are trained, and 0 should be"):
        check_towers(count_towers(whole), trains_projector=True)
    assert {p.dtype for name, p in whole.named_parameters() if p.requires_grad} == {torch.float32}


def test_nf4_is_of_the_language_model(trained: dict[str, Any]) -> None:
    job, model = open_model(trained, "nf4")
    quantised = [name for name, module in model.named_modules() if kind_of_codes(module) is not None]
    assert len(quantised) == 14 and all("language_model" in name or "text_model" in name for name in quantised)
    objective = build_objective(job, model, "fp32")
    batch = job.task.collate([[job.rows.train[0]]], job.pad_id)
    assert objective.probed_loss(batch) == pytest.approx(float(objective.reference_loss(batch)), rel=1e-4)
    language, vision, projector = count_towers(model)
    assert language.parameters + vision.parameters + projector.parameters == job.shape.total_parameters


def test_without_pillow_one_sentence_says_what_to_install(trained: dict[str, Any], monkeypatch: Any) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    with pytest.raises(ModelError) as caught:
        pipeline.preview(trained)
    said = 'reading images needs Pillow, which is not installed; install it with: pip install "lorafit[vision]"'
    assert str(caught.value) == said


@pytest.mark.parametrize("trained", ["idefics3"], indirect=True)
def test_the_shipped_recipe_trains_a_tiny_base(trained: dict[str, Any], tmp_path: Path) -> None:
    import yaml

    file = Path(__file__).parents[2] / "recipes" / "describe_smolvlm.yaml"
    values = yaml.safe_load(file.read_text(encoding="utf-8"))
    values["model"]["base"] = trained["model"]["base"]
    values["data"] |= {"train": trained["data"]["test"], "validation": {"fraction": 0.2}}
    values["training"] |= {"batch_size": 8}
    values["evaluation"] |= {"every_steps": 2, "max_new_tokens": 4}
    values["output"] = str(tmp_path / "run")
    done = pipeline.train(values)
    assert done.fit is not None
    assert done.plan.memory.counts_pictures and not [said for said in done.plan.warnings if "vision tower" in said]
    assert pipeline.evaluate(tmp_path / "run").evaluation.comparisons


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"overlength": "truncate"}, "cuts no row, which would cut its images; leave it out, or set error or drop"),
        ({"packing": True}, "takes one row a sequence"),
        ({"system_prompt": "look"}, "takes chats as they are"),
    ],
)
def test_options_that_do_not_go_with_images_are_refused(change: dict[str, Any], said: str) -> None:
    recipe = {"name": "n", "task": "image-text-to-text", "model": {"base": "b"}}
    with pytest.raises(RecipeError, match=said):
        pipeline.validate({**recipe, "data": {"train": "t.jsonl", **change}})
    with pytest.raises(RecipeError, match="searches no beams"):
        pipeline.validate({**recipe, "data": {"train": "t.jsonl"}, "evaluation": {"num_beams": 2}})


@pytest.mark.parametrize(
    ("kind", "said"),
    [("qwen2_vl", "the kind of every token"), ("gemma3", "the kind of every token"), ("llama", "reads no images")],
)
def test_models_that_want_more_than_ids_and_pixels_are_refused(kind: str, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        refuse_token_kinds({"model_type": kind})
    for sees in ("llava", "llava_next", "idefics3", "smolvlm"):
        refuse_token_kinds({"model_type": sees})


def test_a_plain_base_is_asked_in_parts_as_its_template_reads_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoProcessor

    seen: list[list[int]] = []
    base, answer = make_llava(tmp_path / "base"), Engine.answer

    def keep(engine: Engine, requests: Any, **more: Any) -> Any:
        seen.extend(list(request.prompt_ids) for request in requests)
        return answer(engine, requests, **more)

    monkeypatch.setattr(Engine, "answer", keep)
    told = pipeline.generate(base, prompt="what", max_new_tokens=3)
    assert told.answers[0].tokens and told.are_chats
    chat = [{"role": "user", "content": [{"type": "text", "text": "what"}]}]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    assert seen == [AutoProcessor.from_pretrained(base).apply_chat_template(chat, **options)["input_ids"][0]]


def test_a_base_that_reads_no_images_is_told(tmp_path: Path) -> None:
    from tests.support.tiny_model import make_base

    make_base(tmp_path / "base")
    write_rows(tmp_path / "rows.jsonl", draw_rows(tmp_path, 2))
    recipe = {"name": "n", "task": "image-text-to-text", "data": {"train": str(tmp_path / "rows.jsonl")}}
    with pytest.raises(ModelError, match="'llama' reads no images"):
        pipeline.preview({**recipe, "model": {"base": str(tmp_path / "base")}})
