"""DPO against a plain formula over transformers' log-probabilities, and what becomes of pairs on their way there."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from lorafit.contracts import Example, Silent
from lorafit.data.batch import cut_step
from lorafit.errors import RecipeError
from lorafit.job import build_objective, open_job, refer
from lorafit.kinds.metrics import RowScore, metrics
from lorafit.kinds.tasks import tasks
from lorafit.model.attach import attach_adapter
from lorafit.model.load import load_model
from lorafit.recipe.load import load_recipe
from tests.support.pairs import PAD, SIDES, make_examples, plain_log_probs
from tests.support.tiny_model import make_base, make_tokenizer
from tests.support.tiny_recipe import make_pairs, make_recipe, write_rows
from tests.unit.evaluation.conftest import add_adapter, build_llama


@torch.no_grad()
def refer_to(objective: Any, examples: list[Example]) -> list[Example]:
    """The examples with the reference of the objective's model, each asked alone."""
    asked = [objective.task.refer(objective, objective.task.collate([[one]], PAD))["reference"][0] for one in examples]
    return [
        replace(one, columns={**one.columns, "reference": values}) for one, values in zip(examples, asked, strict=True)
    ]


def plain_loss(section: Any, example: Example, ratios: torch.Tensor) -> torch.Tensor:
    """The papers' formulas for one pair."""
    beta, margin = section.beta, section.beta * (ratios[0] - ratios[1])
    if section.loss == "hinge":
        return (1 - margin).clamp(min=0)
    if section.loss == "ipo_sum":  # Azar et al. equation 17, h - 1 / (2 tau), of whole answers
        return (ratios[0] - ratios[1] - 1 / (2 * beta)) ** 2
    if section.loss == "ipo":  # the same of means over tokens
        chosen, rejected = (sum(example[f"{side}_trained"]) for side in SIDES)
        return (ratios[0] / chosen - ratios[1] / rejected - 1 / (2 * beta)) ** 2
    clean, flipped, rate = -functional.logsigmoid(margin), -functional.logsigmoid(-margin), section.label_smoothing
    return ((1 - rate) * clean - rate * flipped) / (1 - 2 * rate)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        *({}, {"beta": 2.5}, {"label_smoothing": 0.2}, {"sft_weight": 0.7}),
        *({"loss": "hinge", "beta": 1.0}, {"loss": "ipo"}, {"loss": "ipo_sum"}),
    ],
    ids=str,
)
def test_loss_and_gradient_are_those_of_the_formula(options: dict[str, Any], exact: bool) -> None:
    task = tasks.bind(tasks.section("dpo")(**options))
    examples = refer_to(task.build_objective(build_llama(), exact=exact), make_examples())
    tuned = add_adapter(build_llama())
    objective, trained = task.build_objective(tuned, exact=exact), [p for p in tuned.parameters() if p.requires_grad]
    batch = task.collate([[one] for one in examples], PAD)
    loss = objective(batch)
    base = build_llama()
    with torch.no_grad():
        references = [plain_log_probs(base, one) for one in examples]
    found = [plain_log_probs(tuned, one) for one in examples]
    ratios = [now - before for now, before in zip(found, references, strict=True)]
    wanted = torch.stack([plain_loss(task.section, one, ratio) for one, ratio in zip(examples, ratios, strict=True)])
    means = [now[0] / sum(one["chosen_trained"]) for now, one in zip(found, examples, strict=True)]
    wanted = wanted - task.section.sft_weight * torch.stack(means)
    assert (loss.weight, batch.trained_tokens) == (6, sum(sum(o[f"{s}_trained"]) for o in examples for s in SIDES))
    torch.testing.assert_close(loss.loss_sum, wanted.sum(), rtol=2e-5, atol=1e-5)
    gradients = torch.autograd.grad(loss.loss_sum, trained)
    for ours, theirs in zip(gradients, torch.autograd.grad(wanted.sum(), trained), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-5 * float(theirs.abs().max()))
    scores = objective.score(batch)
    margins = np.array([float((ratio[0] - ratio[1]).detach()) for ratio in ratios])
    assert np.allclose(scores["loss"], wanted.detach().numpy(), rtol=1e-4, atol=1e-5)
    assert np.allclose(scores["margin"], options.get("beta", 0.1) * margins, rtol=1e-3, atol=1e-4)
    assert scores["preferred"].tolist() == (margins > 0).tolist()
    gained = torch.stack(ratios).sum(-1).detach().numpy()
    assert np.allclose(scores["log_ratio"], gained, rtol=1e-3, atol=1e-4)
    assert scores["answer_tokens"].tolist() == [sum(sum(one[f"{side}_trained"]) for side in SIDES) for one in examples]


@pytest.mark.parametrize("start", ["fresh", "trained"])
def test_step_0_costs_ln_2_however_it_is_cut(start: str) -> None:
    task = tasks.make("dpo")
    model = add_adapter(build_llama(), scale=0.05 if start == "trained" else 0.0)
    objective = task.build_objective(model)
    examples = refer_to(objective, make_examples(9))
    lengths = [task.row_tokens(max(len(one[f"{side}_tokens"]) for side in SIDES)) for one in examples]
    for budget in (1, 60, 90, 1000):
        cut = cut_step(range(len(examples)), lengths, budget)
        losses = [objective(task.collate([[examples[row]] for row in part], PAD)).loss_sum.item() for part in cut]
        assert len(cut) == {1: 9, 1000: 1}.get(budget, len(cut))
        assert sum(losses) / 9 == pytest.approx(math.log(2), abs=1e-5)


def test_gains_that_only_rounding_tells_apart_are_a_tie() -> None:
    task = tasks.make("dpo", beta=0.5)
    objective = task.build_objective(build_llama())
    batch = task.collate([[one] for one in refer_to(objective, make_examples(3))], PAD)
    batch["reference"][:, 0] += torch.tensor([1e-5, 1e-3, -1e-3])  # what the chosen answers gained less
    assert objective.score(batch)["preferred"].tolist() == [0.5, 0.0, 1.0]


def test_a_pair_is_two_sequences_wherever_memory_is_asked() -> None:
    task, (one, other) = tasks.make("dpo"), make_examples(2)
    longest = max(len(pair[f"{side}_tokens"]) for pair in (one, other) for side in SIDES)
    batch, row_tokens = task.collate([[one], [other]], PAD), task.row_tokens(longest)
    shaped = task.shape_batch(2, row_tokens, len(batch["label_ids"]), packed=False)
    assert shaped["input_ids"].shape == batch["input_ids"].shape == (4, row_tokens // 2)
    assert longest <= row_tokens // 2 < longest + 16 and row_tokens % 32 == 0  # no product of a block that is not full
    assert (shaped.weight, shaped.trained_tokens) == (batch.weight, batch.trained_tokens)
    assert shaped.tensors.keys() - {"reference"} == batch.tensors.keys()
    cut = task.cut(one, 8)
    assert [len(cut[name]) for name in cut.columns] == [4, 4, 4, 4]
    probe = task.cut_probe(one, 4)
    assert [len(probe[f"{side}_tokens"]) for side in SIDES] == [2, 2]


@pytest.fixture(scope="module")
def pair_rows(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Prepared rows of pairs, by options of `data`."""
    root = tmp_path_factory.mktemp("pairs")
    make_base(root / "base")

    def prepare(rows: list[dict[str, Any]], **data: Any) -> Any:
        recipe = make_recipe(root, task="dpo", evaluation={"final": ["reward_accuracy"]})
        write_rows(root / "train.jsonl", rows)
        for name in ("valid", "test"):
            write_rows(root / f"{name}.jsonl", make_pairs(2, first=50))
        overrides = [f"data.{key}={json.dumps(value)}" for key, value in data.items()]
        return open_job(load_recipe(recipe, overrides), Silent()).rows

    return prepare


def sides_of(rows: Any, row: int = 0) -> list[tuple[list[int], list[int]]]:
    return [(shown.input_ids, shown.trained) for shown in rows.task.show(rows.train[row])]


def test_only_the_answers_tokens_carry_loss(pair_rows: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer()
    said = [{"role": "user", "content": "the shop"}, {"role": "assistant", "content": "opens at nine"}]
    chat = [*said, {"role": "user", "content": "red mug"}]
    verbatim = {"prompt": "red mug", "chosen": " on monday", "rejected": " on friday it"}
    messages = {"prompt": chat, **{side: [{"role": "assistant", "content": verbatim[side]}] for side in SIDES}}
    for row, ends, before in (
        (verbatim, "<|im_end|>", verbatim["prompt"]),
        (messages, "<|im_end|>", tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)),
    ):
        for (ids, trained), side in zip(sides_of(pair_rows([row])), SIDES, strict=True):
            begin = trained.index(1)
            assert tokenizer.decode(ids[:begin]) == before
            assert tokenizer.decode([i for i, flag in zip(ids, trained, strict=True) if flag]) == verbatim[side] + ends
    with pytest.raises(RecipeError, match=r"data\.train_on: task dpo learns from answers alone"):
        pair_rows([verbatim], train_on="all")


def test_both_sides_keep_one_prompt_where_a_pair_is_cut(pair_rows: Callable[..., Any]) -> None:
    asked, short = " ".join(f"red mug {n}" for n in range(9)), " on monday"
    long = " ".join(f"it opens {n}" for n in range(12))
    row = {"prompt": asked, "chosen": short, "rejected": long}
    (whole, _), (longer, _) = sides_of(pair_rows([row]))
    room = len(longer) - 10
    rows = pair_rows([row], max_length=room, overlength="truncate")
    (chosen, kept), (rejected, flags) = sides_of(rows)
    begin = kept.index(1)
    assert begin == flags.index(1) and chosen[:begin] == rejected[:begin]
    assert chosen[begin:] == whole[len(whole) - len(chosen) + begin :] and len(rejected) <= room
    assert rows.report.splits["train"].sources[0].cut == 1
    dropped = pair_rows([row, {**row, "rejected": short + " it"}], max_length=room, overlength="drop")
    assert (len(dropped.train), dropped.report.splits["train"].sources[0].dropped) == (1, 1)
    alike = {"prompt": "red", "chosen": long + " nine", "rejected": long + " ten"}
    cut = pair_rows([row, alike], max_length=24, overlength="truncate")
    assert (len(cut.train), cut.report.splits["train"].sources[0].dropped) == (1, 1)


def test_a_pair_the_other_way_round_contradicts_and_another_pair_of_the_prompt_does_not(
    pair_rows: Callable[..., Any],
) -> None:
    row = {"prompt": "red", "chosen": "mug", "rejected": "bowl"}
    swapped = {**row, "chosen": "bowl", "rejected": "mug"}
    assert pair_rows([row, {**row, "rejected": "plate"}]).report.contradictions is None
    assert pair_rows([row, swapped]).report.contradictions.rows == 2


def test_the_reference_is_kept_by_base_first_adapter_rows_and_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAFIT_CACHE", str(tmp_path / "cache"))
    make_base(tmp_path / "base")
    make_base(tmp_path / "other", seed=1)
    recipe = make_recipe(tmp_path, task="dpo", evaluation={"final": ["reward_accuracy"]})
    for name in ("train", "valid", "test"):
        write_rows(tmp_path / f"{name}.jsonl", make_pairs(3))
    asked = 0
    own = tasks.get("dpo").refer

    def count(self: Any, objective: Any, batch: Any) -> Any:
        nonlocal asked
        asked += len(batch.rows)
        return own(self, objective, batch)

    monkeypatch.setattr(tasks.get("dpo"), "refer", count)

    def passes(*overrides: str, scale: float | None = None) -> int:
        """Pairs that the model is asked for."""
        nonlocal asked
        before, job = asked, open_job(load_recipe(recipe, list(overrides)), Silent())
        options = {"quantization": job.recipe.model.quantization, "dtype": torch.float32, "attention": "eager"}
        base = load_model(job.base, **options, compute_dtype=torch.float32, device="cpu", reporter=Silent())
        model = attach_adapter(base, job.recipe.adapter, job.recipe.seed, folder=tmp_path)
        if scale is not None:
            model.save_pretrained(tmp_path / "first")
        refer(job, build_objective(job, model, job.recipe.model.dtype), ("train",), Silent())
        assert np.shape(job.rows.train[0]["reference"]) == (2,)
        return asked - before

    assert passes(scale=1.0) == 3
    assert passes() == passes("seed=4") == passes("adapter.r=2") == passes("task.beta=0.3") == 0
    assert passes("model.base=other") == 3
    assert passes("model.dtype=bf16") == 3
    assert passes("model.quantization=nf4") == 3
    assert passes("adapter.init_from=first") == 3 and passes("adapter.init_from=first") == 0
    write_rows(tmp_path / "train.jsonl", make_pairs(4))
    assert passes() == 4


def test_rewards_are_counted() -> None:
    rows = [RowScore({"weight": (1.0,), "preferred": (share,), "margin": (3.0 * share,)}) for share in (1.0, 0.5, 0.0)]
    rows = [replace(row, sums={**row.sums, "log_ratio": (-2.0,), "answer_tokens": (4.0,)}) for row in rows]
    for name, wanted in (("reward_accuracy", 0.5), ("reward_margin", 1.5), ("ref_log_ratio", -0.5)):
        metric = metrics.get(name)
        assert metric.values(np.sum(metric.row_sums(rows), axis=0).tolist()) == {name: wanted}
