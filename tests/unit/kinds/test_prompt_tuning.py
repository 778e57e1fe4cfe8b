"""Prompt, P- and prefix tuning are PEFT's: PEFT loads, scores and answers with what is trained; merges say why not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

from lorafit.answering.engine import Engine
from lorafit.answering.generate import Request, cut_prompts
from lorafit.answering.sampling import Sampling
from lorafit.contracts import Example, Silent
from lorafit.errors import DoesNotFitError, ModelError, RecipeError
from lorafit.facts import DatasetFacts
from lorafit.kinds.adapters import adapters
from lorafit.kinds.tasks import tasks
from lorafit.model.adapter import derived_tensors, read_adapter, save_adapter
from lorafit.model.attach import attach_adapter, check_plan, load_adapter_weights, open_adapter
from lorafit.model.base import Base
from lorafit.model.class_shape import find_shape
from lorafit.model.inspect import coverage
from lorafit.model.merge import merge_adapter
from lorafit.objective.next_token import has_fast_path
from lorafit.ops.isolation import adapter_off
from lorafit.plan import plan, require_fit
from lorafit.recipe.cross_field_rules import disagreements
from tests.support.adapted import load, logits, lora, make_gpt2, make_llama, open_base
from tests.support.plan_cases import card, recipe, shape_of
from tests.support.tiny_model import make_tokenizer

FAMILIES = {"llama": make_llama, "gpt2": make_gpt2}
PROMPTS = [[5, 9, 30], [7, 8, 9, 10, 11, 12, 13, 60, 61], [40]]
GREEDY = Sampling(max_new_tokens=9)


FORMS: dict[str, dict[str, Any]] = {
    "prompt_tuning": {},
    "p_tuning": {"encoder_size": 8},
    "p_tuning lstm": {"encoder": "lstm", "encoder_size": 8},
    "prefix_tuning": {},
    "prefix_tuning projection": {"projection": True, "projection_size": 8},
}
all_forms = pytest.mark.parametrize("form", FORMS)


def section(form: str = "prompt_tuning", **fields: Any) -> Any:
    return adapters.make_section(form.split()[0], **({"tokens": 5} | FORMS[form] | fields))


def grow(model: Any, times: float = 1.5) -> None:
    """Other values, as training would give."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.dim() > 1:
                parameter.mul_(times)


@pytest.fixture(params=FAMILIES)
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Base:
    return open_base(FAMILIES[request.param](tmp_path / "base"))


def saved(base: Base, model: Any) -> Path:
    folder = base.path.parent / "adapter"
    folder.mkdir()
    save_adapter(model, folder, base=base)
    return folder


@all_forms
def test_the_plan_counts_what_is_trained_and_the_base_stays_the_base(base: Base, form: str) -> None:
    plain = load(base)
    before, total = logits(plain), coverage(plain).total_parameters
    model = attach_adapter(plain, section(form), 0)
    sites = adapters.bind(section(form)).sites(find_shape(base.config))
    check_plan(model, sites, sum(site.parameters for site in sites))
    found = coverage(model)
    assert (found.total_parameters, found.trainable_parameters) == (total, sites[0].parameters)
    if form == "prompt_tuning":
        assert sites[0].parameters == 5 * model.config.hidden_size
    assert [kind.name for kind in found.kinds if kind.trainable] == ["prompt"]
    assert float((logits(model)[:, -before.shape[1] :] - before).abs().max()) > 1e-3
    with adapter_off(model):
        assert torch.equal(logits(model), before)


def test_first_values_are_tokens_or_noise_by_seed(base: Base) -> None:
    def vectors(seed: int, **fields: Any) -> torch.Tensor:
        model = attach_adapter(load(base), section(**fields), seed)
        return model.prompt_encoder["default"].embedding.weight.detach()

    words = load(base).get_input_embeddings().weight.detach()
    assert all(any(torch.equal(vector, word) for word in words) for vector in vectors(0))
    assert torch.equal(vectors(0), vectors(0)) and not torch.equal(vectors(0), vectors(1))
    assert vectors(0, init="random").std() > 0.5


@all_forms
def test_the_loss_is_pefts_own(base: Base, form: str) -> None:
    """With and without padding: labels follow the tokens, not the vectors before them."""
    model = attach_adapter(load(base), section(form), 0)
    assert not has_fast_path(model) and has_fast_path(attach_adapter(load(base), lora(), 0))
    objective = tasks.make("causal-lm").build_objective(model)
    assert objective.exact
    lengths = (9, 4)
    columns = [{"tokens": list(range(3, 3 + size)), "trained": [0, *[1] * (size - 1)]} for size in lengths]
    rows = [Example(n, values, "x", n) for n, values in enumerate(columns)]
    batch = objective.task.collate([[row] for row in rows], 0)
    model.eval()
    ours = objective(batch)
    theirs = 0.0
    for row in rows:
        ids = torch.tensor([row["tokens"]])
        labels = torch.where(torch.arange(ids.shape[1]) > 0, ids, -100)  # a first token is not trained
        with torch.no_grad():
            theirs += float(model(input_ids=ids, labels=labels, use_cache=False).loss) * (ids.shape[1] - 1)
    assert ours.loss_sum.item() == pytest.approx(theirs, rel=1e-5)
    ours.loss_sum.backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in model.prompt_encoder.parameters())


ROWS = {
    "sequence-classification": ({"labels": ["x", "y"]}, lambda ids: {"tokens": ids, "marks": [], "classes": [0, 1]}),
    "sequence-regression": ({}, lambda ids: {"tokens": ids, "marks": [], "numbers": [0.5]}),
    "token-classification": (
        {"labels": ["O", "B-X"]},
        lambda ids: {"tokens": ids, "labels": [1] + [-1] * (len(ids) - 2) + [0]},
    ),
    "reward": ({}, lambda ids: {"chosen_tokens": ids, "rejected_tokens": ids[1:] + ids}),
}


def headed(task: Any, family: str) -> Any:
    """A tiny model of that task, drawn anew."""
    import transformers

    sizes = {"vocab_size": 83, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = getattr(transformers, {"llama": "LlamaConfig", "bert": "BertConfig"}[family])
    settings = config(**sizes, num_attention_heads=4, **task.model_class.padded_with(0).config)
    torch.manual_seed(0)
    return getattr(transformers, task.model_class.auto_class).from_config(settings).eval()


@pytest.mark.parametrize("form", ["prompt_tuning", "prefix_tuning projection"])
@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize("kind", ROWS)
def test_a_head_reads_padded_rows_as_pefts_reads_each_alone(kind: str, family: str, form: str, tmp_path: Path) -> None:
    """PEFT hands embeddings on, of which a causal model takes the last one for the end of a row, padding or not."""
    options, columns = ROWS[kind]
    task = tasks.make(kind, **options)
    adapted = attach_adapter(headed(task, family), section(form), 0, model_class=task.model_class)
    objective = task.build_objective(adapted).eval()
    rows = [Example(n, columns([n + 4, *range(9, 12 + 3 * n)]), "x", n) for n in range(3)]
    batch = task.collate([[row] for row in rows], 0)
    found = objective(batch)
    wanted = sum(objective.reference_loss(objective.batch_of(row, 0)) for row in rows)
    assert found.loss_sum.item() == pytest.approx(float(wanted), rel=1e-5)
    found.loss_sum.backward()
    assert bool(objective.model.prompt_encoder["default"].embedding.weight.grad.abs().min() > 0)
    with adapter_off(objective.model), torch.no_grad():
        assert torch.equal(objective.logits(batch), task.build_objective(objective.base).logits(batch))

    grow(adapted)
    headed(task, family).save_pretrained(tmp_path / "base")
    folder, ids = saved(open_base(tmp_path / "base"), adapted), torch.tensor([[5, 6, 7]])
    opened = [PeftModel.from_pretrained(headed(task, family), folder), open_adapter(headed(task, family), folder)]
    with torch.no_grad():
        told = [model.eval()(input_ids=ids).logits for model in (adapted, *opened)]
    assert torch.allclose(told[1], told[0], atol=1e-6) and torch.equal(told[2], told[1])


@all_forms
def test_peft_loads_what_is_saved_and_a_resume_takes_it_back(base: Base, form: str) -> None:
    model = attach_adapter(load(base), section(form), 0)
    grow(model)
    folder = saved(base, model)
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base.path), folder)
    assert float((logits(theirs) - logits(model)).abs().max()) <= 1e-5
    assert torch.allclose(logits(open_adapter(load(base), folder, base=base)), logits(model), atol=1e-6)
    fresh = attach_adapter(load(base), section(form), 7)
    parameters = [*fresh.prompt_encoder.parameters()]
    load_adapter_weights(fresh, folder)
    assert all(new is old for new, old in zip(fresh.prompt_encoder.parameters(), parameters, strict=True))
    assert torch.equal(logits(fresh), logits(model))
    going_on = attach_adapter(load(base), section(form, init_from="adapter"), 7, folder=folder.parent)
    assert torch.equal(logits(going_on), logits(model))
    with pytest.raises(RecipeError, match="the recipe says 6, the adapter to go on from has 5"):
        attach_adapter(load(base), section(form, tokens=6, init_from="adapter"), 7, folder=folder.parent)


@pytest.mark.parametrize("form", ["p_tuning", "prefix_tuning projection"])
def test_what_an_encoder_makes_in_training_is_what_is_saved(tmp_path: Path, form: str) -> None:
    """Under autocast, too: the encoder computes in fp32 there, as when the adapter is written."""
    model = attach_adapter(load(open_base(make_llama(tmp_path / "base"))), section(form), 0)
    written = derived_tensors(model)["prompt_embeddings"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made = model.prompt_encoder["default"](model.prompt_tokens["default"])
    assert made.dtype == torch.float32 and torch.equal(made, written)


@pytest.mark.parametrize("form", ["prompt_tuning", "prefix_tuning projection"])
def test_an_engine_answers_as_peft_does(base: Base, form: str) -> None:
    """Prompts of several lengths: padding would stand between the vectors and the tokens."""
    tuned = attach_adapter(load(base), section(form), 3)
    grow(tuned, 40 if form == "prompt_tuning" else 4)  # else the tokens alone decide
    tokenizer, folder = make_tokenizer(), saved(base, tuned)
    engine = Engine(open_adapter(load(base), folder), tokenizer)
    asked = [Request(ids, "default", GREEDY, row=row) for row, ids in enumerate(PROMPTS)]
    answers = engine.answer([*asked, *[Request(ids, None, GREEDY) for ids in PROMPTS]])
    theirs: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base.path), folder).eval()
    plain: Any = AutoModelForCausalLM.from_pretrained(base.path).eval()
    expected = []
    for model in (theirs, plain):
        for ids in PROMPTS:
            given = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.int64)}
            out = model.generate(**given, max_new_tokens=9, do_sample=False)
            expected.append(tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True))
    assert [answer.text for answer in answers] == expected
    assert cut_prompts([3, 9, 1, 9], [9] * 4, batch_tokens=999, batch_rows=9, pads=False) == [[1, 3], [0], [2]]


def test_a_merge_says_why_not_and_writes_nothing(base: Base) -> None:
    folder = saved(base, attach_adapter(load(base), section(), 0))
    with pytest.raises(ModelError, match="prompt tuning trains vectors that stand before the tokens, and changes no"):
        merge_adapter(base, folder, base.path.parent / "merged", kind="original", reporter=Silent())
    assert not (base.path.parent / "merged").exists()


def test_a_strangers_config_opens_no_tokenizer(base: Base) -> None:
    folder = saved(base, attach_adapter(load(base), section(), 0))
    file = folder / "adapter_config.json"
    changed = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "x", "tokenizer_name_or_path": "/no/such/place"}
    config = json.loads(file.read_text()) | changed | {"tokenizer_kwargs": {"trust_remote_code": True}}
    file.write_text(json.dumps(config))
    open_adapter(load(base), folder)
    file.write_text(json.dumps(config | {"num_virtual_tokens": 0}))
    with pytest.raises(ModelError, match="'0' is not a whole number from 1"):
        read_adapter(folder)


FACTS = DatasetFacts(rows=8, tokens=800, trained_tokens=400, longest_tokens=100, longest_trained_tokens=50)


@pytest.mark.parametrize("kind", ["prompt_tuning", "p_tuning", "prefix_tuning"])
def test_packed_rows_are_refused(kind: str) -> None:
    asked = recipe(adapter={"kind": kind}, data={"packing": True})
    (found,) = disagreements(asked)
    assert found.keys[0] == "data.packing" and f"adapter {kind} begins a row with vectors of its own" in found.what
    assert plan(recipe(adapter={"kind": kind}), shape_of(), FACTS, card(80)).packing is False


def test_a_prefix_is_never_lost_to_checkpointing() -> None:
    """Layers that run forward again are given no cache: the prefix would be gone, and nothing trained."""
    for asked in (True, "half"):
        (found,) = disagreements(recipe(adapter={"kind": "prefix_tuning"}, training={"gradient_checkpointing": asked}))
        assert found.what.startswith("prefix_tuning takes no gradient checkpointing: its keys and values reach")
    assert plan(recipe(adapter={"kind": "prefix_tuning"}), shape_of(), FACTS, card(80)).gradient_checkpointing is False
    tight = plan(recipe(adapter={"kind": "prefix_tuning"}), shape_of(), FACTS, card(0.1))
    assert not tight.fits and tight.gradient_checkpointing is False and not tight.may_recompute_more
    with pytest.raises(DoesNotFitError, match="tokens without checkpointing needs"):
        require_fit(tight)
    assert plan(recipe(adapter={"kind": "p_tuning"}), shape_of(), FACTS, card(0.1)).gradient_checkpointing is True


def test_a_prefix_is_refused_where_layers_take_none() -> None:
    method = adapters.make("prefix_tuning")
    with pytest.raises(RecipeError, match="2 layers of llama keep a state in the place of keys and values"):
        method.sites(replace(shape_of(), scanning_layers=2))
    with pytest.raises(RecipeError, match="PEFT gives all layers of a decoder beside an encoder the keys"):
        method.sites(replace(shape_of(), decoder_parameters=9))


def test_peft_gives_all_layers_of_a_joined_decoder_the_first_ones_prefix() -> None:
    """Why prefix tuning is refused there: half of what would be trained has no gradient."""
    sizes = {"vocab_size": 96, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4}
    tuned: Any = get_peft_model(
        T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)),
        PrefixTuningConfig(num_virtual_tokens=3, task_type="SEQ_2_SEQ_LM"),
    )
    ids = torch.tensor([[5, 6, 7]])
    tuned(input_ids=ids, decoder_input_ids=ids, use_cache=False).logits.sum().backward()
    gradient = tuned.prompt_encoder["default"].embedding.weight.grad.view(3, 4, 64)
    assert [bool(part.any()) for part in gradient.unbind(1)] == [True, True, False, False]
