"""Derived numbers of a run, bounds of what is left to the rehearsal, and the verdict before any weight is loaded."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorafit.errors import CheckpointError, DataError, DoesNotFitError, RecipeError
from lorafit.facts import DatasetFacts, DeviceFacts
from lorafit.kinds.adapters import adapters
from lorafit.machine.devices import format_bytes, parse_gpu
from lorafit.machine.hardware import cards
from lorafit.memory import fits
from lorafit.ops.recomputed_layers import CHECKPOINTING, Checkpointing
from lorafit.plan import Plan, ResolvedPlan, plan, plan_table, require_fit
from lorafit.plan.methods import describe_section
from lorafit.plan.recipe_step import recipe_step
from tests.support.plan_cases import GIB, ROWS, card, recipe, shape_of


def make(
    device: DeviceFacts | None = None,
    facts: DatasetFacts = ROWS,
    hub_id: str = "meta-llama/Llama-3.1-8B",
    **sections: Any,
) -> Plan:
    return plan(recipe(**sections), shape_of(hub_id), facts, device or card(24))


@pytest.mark.parametrize(
    ("training", "steps", "epochs"),
    [
        ({}, 21, 3.0),  # seven steps an epoch: the last, of 4 rows, is kept
        ({"epochs": 1}, 7, 1.0),
        ({"epochs": 0.5}, 4, 0.5),
        ({"epochs": 0.001}, 1, 0.001),
        ({"epochs": 2.1, "batch_size": 10}, 21, 2.1),
        ({"max_steps": 14}, 14, 2.0),
        ({"batch_size": 1000}, 3, 3.0),
    ],
)
def test_length_of_the_run(training: dict[str, Any], steps: int, epochs: float) -> None:
    found = make(training=training)
    assert (found.total_steps, found.epochs) == (steps, epochs)


def test_classes_and_their_weights_are_shown() -> None:
    facts = replace(ROWS, classes={"ham": 90, "[spam]": 10}, class_weights={"ham": 5 / 9, "[spam]": 5.0})
    text = shown(plan_table(make(facts=facts)))
    assert "ham 90, [spam] 10" in text and "class weights" in text and "ham 0.556, [spam] 5" in text
    assert make(facts=facts).to_json()["class_weights"] == facts.class_weights
    many = {f"c{number}": number + 1.0 for number in range(13)}
    assert "13 classes, 1 (c0) to 13 (c12)" in shown(plan_table(make(facts=replace(ROWS, class_weights=many))))
    assert "class weights" not in shown(plan_table(make()))


@pytest.mark.parametrize(
    ("task", "unit"), [("reward", "pairs"), ("sequence-classification", "rows"), ("sequence-regression", "rows")]
)
def test_what_carries_loss_is_named_by_the_task_and_a_new_head_is_counted_once(task: str, unit: str) -> None:
    facts = replace(ROWS, trained_tokens=100)
    found = plan(recipe(task={"kind": task}), replace(shape_of(), new_head_parameters=770), facts, card(24))
    text = " ".join(shown(plan_table(found)).split())
    assert f"20,000 an epoch; 100 {unit} carry loss" in text and "label" not in text
    assert f"{found.total_parameters - 770:,} + {found.trainable_parameters:,} trainable" in text


def test_weights_that_are_not_quantised_are_called_so() -> None:
    text = shown(plan_table(make(model={"quantization": "none"})))
    assert "not quantised, bf16; compute bf16" in text and "none, the rest" not in text


def test_warm_up() -> None:
    assert make(training={"schedule": {"kind": "cosine", "warmup_ratio": 0.1}}).warmup_steps == 3
    assert make(training={"schedule": {"kind": "cosine", "warmup_steps": 21}}).warmup_steps == 21
    with pytest.raises(
        RecipeError, match=r"training\.schedule\.warmup_steps: warmup_steps 22 is more than the 21 steps"
    ):
        make(training={"schedule": {"kind": "cosine", "warmup_steps": 22}})


@pytest.mark.parametrize(
    ("device", "dtype"),
    [(card(24), "bf16"), (card(16, bf16=False), "fp16"), (card(64, kind="cpu"), "bf16"),
     (card(64, kind="cpu", bf16=False), "fp32")],
)  # fmt: skip
def test_dtype_follows_the_device(device: DeviceFacts, dtype: str) -> None:
    found = make(device)
    assert (found.dtype, found.compute_dtype) == (dtype, dtype)


@pytest.mark.parametrize("packing", [False, True])
def test_on_no_card_attention_keeps_scores_unless_a_dtype_is_forced(packing: bool) -> None:
    steps = {
        str(one["file"]): make(device, data={"train": "a.jsonl", "packing": packing}).step
        for one in cards()
        if (device := parse_gpu(str(one["names"][0]))).memory_bytes > 8 * GIB
    }
    assert len(steps) > 50 and not any(step.step.keeps_scores for step in steps.values())
    assert steps["t4"].step.attention_kernel == "efficient"
    assert steps["l4"].step.attention_kernel == "flash"
    masked = make(parse_gpu("L4"), data={"train": "a.jsonl", "packing": packing}, model={"attention": "sdpa"})
    assert masked.step.step.attention_kernel == ("efficient" if packing else "flash")
    assert make(parse_gpu("T4"), model={"dtype": "bf16"}).step.step.keeps_scores
    assert make(parse_gpu("L4"), model={"dtype": "fp32", "attention": "eager"}).step.step.keeps_scores


PROMPTS = {"kind": "prompt_tuning"}


@pytest.mark.parametrize(
    ("device", "sections", "packing", "attention"),
    [
        (card(24), {}, None, "varlen"),
        (card(24), {"data": {"packing": True}}, True, "varlen"),
        (card(24), {"data": {"packing": False}}, False, "sdpa"),
        (card(24), {"model": {"attention": "sdpa"}}, None, "sdpa"),
        (card(24), {"model": {"dtype": "fp32"}}, None, "sdpa"),
        (card(24), {"adapter": PROMPTS}, False, "sdpa"),
        (card(24), {"task": {"kind": "dpo"}}, False, "sdpa"),
        (card(24), {"hub_id": "google/gemma-2-9b"}, None, "eager"),
        (parse_gpu("T4"), {}, None, "sdpa"),
        (parse_gpu("T4"), {"data": {"packing": True}}, True, "sdpa"),
        (card(64, kind="cpu"), {}, False, "sdpa"),
        (card(64, kind="cpu"), {"data": {"packing": True}}, True, "sdpa"),
    ],
)
def test_packing_and_its_attention(
    device: DeviceFacts, sections: dict[str, Any], packing: bool | None, attention: str
) -> None:
    step = make(device, **sections)
    assert (step.packing, step.step.step.attention) == (packing, attention)
    assert step.step.step.packs_rows is (packing is True and attention != "varlen")
    shown = json.loads(json.dumps(step.to_json()))["packing"]
    assert shown == ("auto" if packing is None else packing)


def test_what_an_attention_left_open_holds_goes_with_it() -> None:
    """Every token of a packed row may carry loss; under sdpa rows are padded then, and nothing is masked."""
    step = make(card(24)).step
    padded, packed = step.changed(attention="sdpa").step, step.changed(attention="varlen").step
    assert packed.labels_at(4096) == 4096 > padded.labels_at(4096)
    assert not padded.packs_rows and not packed.packs_rows


@pytest.mark.parametrize(
    ("device", "sections", "said"),
    [
        (card(64, kind="cpu"), {}, "needs a card of compute capability 8.0"),
        (parse_gpu("T4"), {}, "needs a card of compute capability 8.0"),
        (card(24), {"dtype": "fp32"}, "needs a card of compute capability 8.0"),
        (card(24), {"hub_id": "openai-community/gpt2"}, "a model that drops no scores"),
    ],
)
def test_varlen_attention_by_name(device: DeviceFacts, sections: dict[str, Any], said: str) -> None:
    model = {"attention": "varlen", "dtype": sections.get("dtype", "auto")}
    with pytest.raises(RecipeError, match=f"model.attention: varlen attention .*{said}"):
        make(device, hub_id=sections.get("hub_id", "meta-llama/Llama-3.1-8B"), model=model)
    named = make(card(24), model={"attention": "varlen"})
    assert (named.packing, named.step.step.packs) == (None, True)


def test_named_dtypes_stay_and_are_warned_about() -> None:
    slow = make(card(64, kind="cpu"), model={"dtype": "fp16"})
    assert slow.dtype == "fp16"
    assert any("fp16 on a CPU is slow" in warning for warning in slow.warnings)
    emulated = make(card(16, bf16=False), model={"dtype": "bf16"})
    assert any("no bf16" in warning for warning in emulated.warnings)
    mixed = make(model={"quantization": {"kind": "nf4", "compute_dtype": "fp32"}})
    assert (mixed.dtype, mixed.compute_dtype) == ("bf16", "fp32")


def test_warnings_name_what_a_user_would_trip_over() -> None:
    data = {"data": {"validation": {"fraction": 0.1}}, "evaluation": {"every_steps": 50}}
    found = " | ".join(
        make(card(64, kind="cpu"), training={"batch_size": 200, "optimizer": "paged_adamw_8bit"}, **data).warnings
    )
    assert "batch_size 200 is more than the 100 rows" in found
    assert "every_steps 50 is more than the run's 3 steps" in found
    assert "paged_adamw_8bit runs unpaged" in found
    assert "experts" in " ".join(make(card(200), hub_id="mistralai/Mixtral-8x7B-v0.1").warnings)
    few = make(training={"epochs": 3})
    assert f"only {few.total_steps} optimizer steps" in few.warnings[0] and "raise training.epochs" in few.warnings[0]
    capped = make(training={"max_steps": 49, "schedule": {"kind": "cosine", "warmup_steps": 49}})
    assert "raise training.max_steps" in capped.warnings[0]
    assert "the warmup takes all 49 steps" in capped.warnings[1]
    assert make(training={"max_steps": 50}).warnings == ()


@pytest.mark.parametrize(
    ("adapter", "training", "said"),
    [
        ({"kind": "prompt_tuning"}, {}, "0.0002 is low for prompt_tuning, which usually wants 0.0005 to 0.25"),
        ({"init": "pissa"}, {"learning_rate": 2e-3}, "for lora with init pissa, which usually wants 1e-06 to 0.0005"),
        ({}, {"learning_rate": 0.02}, "0.02 is high for lora, which usually wants 1e-05 to 0.005: the run may diverge"),
        ({"init": "eva"}, {"learning_rate": 2e-3}, ""),
        ({"kind": "vera"}, {}, ""),
        ({}, {"learning_rate": 0.02, "optimizer": "sgd"}, ""),
    ],
)  # fmt: skip
def test_a_rate_far_from_what_the_kind_wants_is_warned_of(
    adapter: dict[str, Any], training: dict[str, Any], said: str
) -> None:
    found = make(card(80), adapter=adapter, training=training, model={"quantization": "none"}).warnings
    about = [warning for warning in found if warning.startswith("training.learning_rate")]
    assert len(about) == bool(said) and said in " ".join(about)


def test_checkpointing_is_decided_where_memory_decides_it() -> None:
    assert make(card(80), training={"batch_size": 4}).gradient_checkpointing is False
    assert make(card(24)).gradient_checkpointing is None
    assert make(card(9)).gradient_checkpointing is True
    assert make(card(9), training={"gradient_checkpointing": False}).gradient_checkpointing is False
    assert make(card(80), training={"gradient_checkpointing": True}).gradient_checkpointing is True
    assert make(card(9), training={"micro_batch_tokens": 2400}).gradient_checkpointing is True
    assert make(card(80), training={"micro_batch_tokens": 2400}).gradient_checkpointing is False


def test_no_more_layers_are_recomputed_than_memory_asks_for() -> None:
    """Where half of them are enough by the estimate, all of them are left to the rehearsal."""
    step = make(card(9)).step
    off, half = (step.at(600, choice).needed_bytes / 0.95 / GIB for choice in (False, "half"))
    cases: list[tuple[float, Checkpointing, bool]] = [
        (off + 0.01, False, True), (off - 0.01, "half", True), (half + 0.01, "half", True), (half - 0.01, True, False)
    ]  # fmt: skip
    for gib, choice, is_open in cases:
        found = make(card(gib))
        assert found.memory.gradient_checkpointing == choice and found.fits
        assert found.gradient_checkpointing is (None if is_open else choice)
    fixed = make(card(half + 0.01), training={"micro_batch_tokens": 600})
    assert fixed.gradient_checkpointing is None and fixed.memory.gradient_checkpointing == "half"
    named = make(card(half - 0.01), training={"gradient_checkpointing": "half"})
    assert named.gradient_checkpointing == named.memory.gradient_checkpointing == "half"
    assert not named.may_recompute_more and make(card(80)).may_recompute_more
    assert any("half" in str(cell) for cell in plan_table(named).columns[1].cells)


def test_bounds_of_the_token_budget() -> None:
    free = make(card(80))
    assert (free.min_micro_batch_tokens, free.max_micro_batch_tokens) == (600, 16 * 600)  # a whole step
    assert make(card(80, count=4)).max_micro_batch_tokens == 4 * 600
    assert make(card(80), training={"batch_size": 100}).max_micro_batch_tokens == 16_384
    fixed = make(card(80), training={"micro_batch_tokens": 1200})
    assert (fixed.min_micro_batch_tokens, fixed.max_micro_batch_tokens) == (1200, 1200)
    short = make(card(80), training={"micro_batch_tokens": 10})  # a longer row is a micro-batch of its own
    assert short.max_micro_batch_tokens == 600
    assert free.memory_least.tensor_bytes < free.memory.tensor_bytes


@settings(max_examples=25, deadline=None)
@given(
    gib=st.floats(min_value=6, max_value=40),
    longest=st.integers(min_value=16, max_value=2000),
    rank=st.sampled_from([4, 16, 64]),
    checkpointing=st.sampled_from(list(CHECKPOINTING)),
    hub_id=st.sampled_from(
        ["meta-llama/Llama-3.1-8B", "Qwen/Qwen2.5-0.5B", "openai-community/gpt2", "google/gemma-2-2b"]
    ),
)
def test_the_upper_bound_is_maximal(
    gib: float, longest: int, rank: int, checkpointing: Checkpointing, hub_id: str
) -> None:
    shape, most = shape_of(hub_id), 16_384
    rows = replace(
        ROWS, longest_tokens=longest, longest_sequence_tokens=longest, longest_trained_tokens=longest // 2 + 1
    )
    question = recipe_step(recipe(adapter={"r": rank}), shape, rows, card(gib))
    size = round(gib * GIB)
    found = question.largest_tokens(checkpointing, most, size, 0.05)
    if found is None:
        assert not fits(question.at(longest, checkpointing), size)
        return
    assert fits(question.at(found, checkpointing), size)
    assert found == max(most, longest) or not fits(question.at(found + 1, checkpointing), size)


def test_a_run_that_cannot_fit_is_refused_before_it_loads() -> None:
    small = make(card(6))
    assert not small.fits
    with pytest.raises(DoesNotFitError, match="one row of 600 tokens with checkpointing needs") as caught:
        require_fit(small)
    assert caught.value.exit_code == 10
    assert "data.max_length" in str(caught.value)
    border = small.memory_least.needed_bytes / 0.95 / GIB
    require_fit(make(card(border + 0.01)))
    with pytest.raises(DoesNotFitError):
        require_fit(make(card(border - 0.2)))  # a paged state may leave the card: 0.08 GiB of leeway
    # what is not the least is no reason to refuse
    require_fit(make(card(border + 0.01), training={"micro_batch_tokens": 100_000, "gradient_checkpointing": False}))


def test_facts_that_do_not_go_together() -> None:
    with pytest.raises(DataError, match="no row"):
        make(facts=replace(ROWS, rows=0))
    with pytest.raises(DataError):
        make(facts=replace(ROWS, trained_tokens=0))
    with pytest.raises(RecipeError, match=r"data\.max_length: the longest row has 1500 tokens; gpt2 has 1024"):
        make(facts=replace(ROWS, longest_tokens=1500, longest_sequence_tokens=1500), hub_id="openai-community/gpt2")
    with pytest.raises(RecipeError, match=r"model\.attention: sdpa cannot apply the soft-cap"):
        make(hub_id="google/gemma-2-2b", model={"attention": "sdpa"})
    with pytest.raises(RecipeError, match=r"model\.attention: flash_attention_2 runs on no CPU"):
        make(card(64, kind="cpu"), model={"attention": "flash_attention_2"})
    with pytest.raises(RecipeError, match="matches no linear"):
        make(adapter={"target_modules": ["q_prj"]})


def test_the_metric_that_selects() -> None:
    data = {"data": {"validation": {"fraction": 0.1}}}
    assert make().select_metric is None
    assert make(**data, evaluation={"every_steps": 5}).select_metric == "loss"
    stopping = {"metric": "token_accuracy"}
    during = {"every_steps": 5, "during": ["loss", "token_accuracy"], "early_stopping": stopping}
    assert make(**data, evaluation=during).select_metric == "token_accuracy"


def shown(renderable: Any) -> str:
    from rich.console import Console

    out = io.StringIO()
    Console(file=out, width=80).print(renderable)
    return out.getvalue()


def test_the_table_shows_every_derived_number_in_80_columns() -> None:
    found = make(training={"schedule": {"kind": "linear", "warmup_ratio": 0.1}})
    text = shown(plan_table(found))
    assert max(map(len, text.splitlines())) <= 80
    for number in (
        "8,030,261,248",
        "41,943,040",
        "100 an epoch",
        "longest 600",
        "5,000",
        "25.0%",
        "21 of 16 rows",
        "linear",
    ):
        assert number in text
    assert "3 steps of warm-up" in text
    assert "600 to 9,600 tokens" in text
    assert "every 50 steps, the last 2 kept" in text
    assert "\x1b" not in text
    odd = shown(plan_table(plan(recipe(model={"base": "[red]b[/]"}), shape_of(), ROWS, card(24))))
    assert "[red]b[/]" in odd  # what a user wrote is no markup


def test_the_table_names_the_method_with_what_is_not_at_its_default() -> None:
    def rows(**sections: Any) -> str:
        return " ".join(shown(plan_table(make(card(80), **sections))).split())

    assert " adapter lora weights " in rows().replace("no adapter", "")
    changed = {"kind": "lora_plus", "r": 4, "dropout": 0.0, "init": {"kind": "pissa", "iterations": 8}}
    text = rows(
        adapter={**changed, "ranks": {"v_proj": 2}, "layers": {"first": 4}},
        training={"unfreezing": {"top": 2, "steps": [3, 6]}, "embedding_noise": 5, "learning_rate": 1e-4},
        evaluation={"every_steps": 5, "on_plateau": {"factor": 0.25, "go_back": True}},
        data={"train": "a.jsonl", "validation": {"fraction": 0.1}},
    )
    for said in (
        "adapter lora_plus, layers (first 4), r 4, ranks {v_proj: 2}, dropout 0, init pissa (iterations 8)",
        "unfreezing the upper 2 layers of those that are trained first; the others join in equal parts at steps 3, 6",
        "embedding noise NEFTune, alpha 5",
        "after 2 evaluations without a better one the rate falls to 0.25 of what it is, 3 times at most, and the run",
        "lora_B at 16 times it",
    ):
        assert said in text


@pytest.mark.parametrize("name", [name for name, _ in adapters.items()])
def test_each_kind_says_only_what_was_asked_of_it(name: str) -> None:
    needed = {"peft": {"method": "lokr"}}.get(name, {})
    assert describe_section(adapters.make_section(name, **needed)).split(", ")[0] == name


SMALL = "Qwen/Qwen2.5-0.5B"


def test_a_card_is_told_of_the_waits_of_its_optimizer() -> None:
    def rows(device: DeviceFacts, optimizer: str) -> str:
        return " ".join(shown(plan_table(make(device, training={"optimizer": optimizer}))).split())

    said = "waits for the card at each trained tensor"
    assert f"paged_adamw_8bit {said}" in rows(card(80), "paged_adamw_8bit")
    assert said not in rows(card(80), "adamw") and said not in rows(card(64, kind="cpu"), "adamw_8bit")


def kept_in(gib: float, *, kind: str = "cpu", asked: bool | str = "auto", hub_id: str = SMALL, **sections: Any) -> Plan:
    quantization = {"kind": "nf4", "keep_unpacked": asked, **sections.pop("quantization", {})}
    return make(card(gib, kind=kind), hub_id=hub_id, model={"quantization": quantization}, **sections)


def test_unpacked_copies_are_kept_where_a_cpu_has_room() -> None:
    plain, kept = kept_in(64, asked=False), kept_in(64)
    assert (plain.keeps_unpacked, kept.keeps_unpacked) == (False, True)
    size = kept.memory.fixed["unpacked_weights"]
    assert size == 2 * sum(x.in_features * x.out_features * x.count for x in shape_of(SMALL).linears)
    assert kept.memory.tensor_bytes - plain.memory.tensor_bytes == size
    assert "unpacked" in shown(plan_table(kept)) and "unpacked" not in shown(plan_table(plain))
    assert json.loads(json.dumps(kept.to_json()))["keeps_unpacked"] is True


def test_true_always_keeps_copies_where_there_are_any() -> None:
    assert kept_in(4, kind="cuda", asked=True).keeps_unpacked and not kept_in(4, kind="cuda").keeps_unpacked
    assert kept_in(1, asked=True).keeps_unpacked
    for kind in ("none", "int8"):
        assert not make(card(64, kind="cpu"), hub_id=SMALL, model={"quantization": kind}).keeps_unpacked


def test_auto_gives_copies_a_quarter_of_memory_at_most() -> None:
    few = {"training": {"gradient_checkpointing": True}}  # so that all else is small
    size = kept_in(64, **few).memory.fixed["unpacked_weights"]
    border = 4 * size / GIB
    assert kept_in(64, **few).memory.needed_bytes < 0.95 * 4 * size
    assert kept_in(border, **few).keeps_unpacked
    assert not kept_in(border - 2 / GIB, **few).keeps_unpacked


@pytest.mark.parametrize(
    "training",
    [
        {"gradient_checkpointing": False},
        {"gradient_checkpointing": "auto"},
        {"micro_batch_tokens": 2400, "gradient_checkpointing": True},
        {"micro_batch_tokens": 2400},
    ],
)
def test_auto_keeps_copies_only_where_the_smallest_micro_batch_fits_beside_them(training: dict[str, Any]) -> None:
    tokens, checkpointing = training.get("micro_batch_tokens", 600), training.get("gradient_checkpointing") is True
    fixed = {"micro_batch_tokens": tokens, "gradient_checkpointing": checkpointing}
    targets = {"target_modules": ["down_proj"], "r": 64}
    needed = kept_in(640, training=fixed, adapter=targets).memory.needed_bytes
    border = needed / 0.95 / GIB
    assert kept_in(border + 2 / GIB, training=training, adapter=targets).keeps_unpacked
    least = kept_in(border - 2 / GIB, training=training, adapter=targets)
    assert not least.keeps_unpacked
    assert least.memory.fixed["unpacked_weights"] == 0


LLAMA = "meta-llama/Llama-3.1-8B"


@pytest.mark.parametrize(
    ("gib", "training", "keeps"),
    [
        (80, {}, True),
        (48, {}, False),  # a wide micro-batch without checkpointing takes the room
        (48, {"gradient_checkpointing": True}, True),
        (48, {"batch_size": 2}, True),  # of two rows of 600 tokens no wider one can be made
        (24, {"gradient_checkpointing": True}, False),  # 13 GiB of copies
        (80, {"micro_batch_tokens": 9000}, False),  # checkpointing stays off
        (80, {"micro_batch_tokens": 1200}, True),
    ],
)
def test_a_gpu_keeps_copies_where_nothing_else_suffers(gib: float, training: dict[str, Any], keeps: bool) -> None:
    found = kept_in(gib, kind="cuda", hub_id=LLAMA, training=training)
    never = kept_in(gib, kind="cuda", hub_id=LLAMA, training=training, asked=False)
    assert found.keeps_unpacked is keeps
    assert ("13 GiB of dequantised weights kept" in shown(plan_table(found))) is keeps
    assert found.memory.gradient_checkpointing == never.memory.gradient_checkpointing
    assert found.fits and fits(found.memory_at_most, found.device.memory_bytes)
    assert found.may_let_go_of_unpacked is keeps
    assert not kept_in(80, kind="cuda", hub_id=LLAMA, asked=True).may_let_go_of_unpacked


@pytest.mark.parametrize(
    ("hub_id", "quantization"), [("openai-community/gpt2", {}), (SMALL, {"compute_dtype": "fp32"})]
)
def test_nothing_is_kept_where_no_forward_would_use_it(hub_id: str, quantization: dict[str, str]) -> None:
    """PEFT's own forward runs there, and unpacks each time."""
    forced = kept_in(64, asked=True, hub_id=hub_id, quantization=quantization)
    assert not forced.keeps_unpacked and forced.memory.fixed["unpacked_weights"] == 0
    assert any("keep_unpacked has nothing to keep" in warning for warning in forced.warnings)
    left = kept_in(64, hub_id=hub_id, quantization=quantization)
    assert not left.keeps_unpacked and not any("keep_unpacked" in warning for warning in left.warnings)


def test_chunks_of_the_loss_follow_the_memory_of_a_card_and_no_cpus() -> None:
    assert make(card(64, kind="cpu")).loss_chunk_bytes is None and make(card(16)).loss_chunk_bytes is None
    large = make(card(80), training={"micro_batch_tokens": 6000})
    assert large.loss_chunk_bytes == 512 * 2**20
    usual = large.step.changed(loss_chunk_bytes=None).at(6000, False)
    rows = 512 * 2**20 // (4 * 128_256)  # full chunks: one of probabilities, the next one's logits and their copy
    held = {
        name: phase.parts["loss"] for name, phase in (("large", large.memory.phases[1]), ("usual", usual.phases[1]))
    }
    assert held["large"] > 2 * held["usual"] and held["large"] >= 128_256 * rows * 6
    training = {"micro_batch_tokens": 1200, "gradient_checkpointing": True}
    narrow: dict[str, Any] = {"model": {"quantization": "none"}, "training": training}
    full = make(card(60), replace(ROWS, longest_trained_tokens=600), "Qwen/Qwen2.5-14B", **narrow)
    border = full.memory.needed_bytes / 0.95 / GIB
    assert full.loss_chunk_bytes == 256 * 2**20 and full.memory.peak_phase.name == "loss" and border > 20
    below = make(card(border - 2 / GIB), replace(ROWS, longest_trained_tokens=600), "Qwen/Qwen2.5-14B", **narrow)
    assert below.loss_chunk_bytes is None and below.memory.needed_bytes < full.memory.needed_bytes  # and it fits


def test_what_dropout_takes_is_said_on_a_card() -> None:
    dropped, plain = (make(card(24), adapter={"dropout": rate}) for rate in (0.05, 0.0))
    more = dropped.memory.tensor_bytes - plain.memory.tensor_bytes
    assert more > 64 * 2**20
    assert f"0.05: {format_bytes(more)} more for 600 tokens" in shown(plan_table(dropped))
    assert "more for" not in shown(plan_table(plain))
    assert "more for" not in shown(plan_table(make(card(64, kind="cpu"), adapter={"dropout": 0.05})))


def test_json_is_plain() -> None:
    plain = json.loads(json.dumps(make().to_json()))
    assert plain["total_steps"] == 21
    assert plain["memory"]["tensor_bytes"] > 5 * GIB
    assert plain["device"]["memory_bytes"] == 24 * GIB
    assert plain["gradient_checkpointing"] == plain["micro_batch_tokens"] == "auto" and "step" not in plain


RESOLVED = ResolvedPlan(1024, 2048, "sdpa", True, "bf16", "bf16", "cpu", 1, "rehearsal", {"seconds": {"1024": 0.5}})


def test_a_resolved_plan_survives_json() -> None:
    for resolved in (RESOLVED, replace(RESOLVED, gradient_checkpointing="half")):
        assert ResolvedPlan.from_json(json.loads(json.dumps(resolved.to_json()))) == resolved


@pytest.mark.parametrize(
    ("key", "value"),
    [("micro_batch_tokens", "many"), ("ranks", 0), ("ranks", True), ("gradient_checkpointing", 1),
     ("gradient_checkpointing", "third"), ("attention", None), ("measured", [])],
)  # fmt: skip
def test_a_spoilt_resolved_plan_names_its_key(key: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=f"plan.json: {key}"):
        ResolvedPlan.from_json(RESOLVED.to_json() | {key: value})
    values = RESOLVED.to_json()
    del values["dtype"]
    with pytest.raises(CheckpointError, match="dtype: is missing"):
        ResolvedPlan.from_json(values)
