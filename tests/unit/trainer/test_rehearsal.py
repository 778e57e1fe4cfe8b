"""The rehearsal settles what is open, tries the heaviest micro-batches, and leaves no trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.modeling_utils import AttentionInterface
from transformers.models.llama.modeling_llama import eager_attention_forward

from lorafit.contracts import Batch, Silent
from lorafit.data.batch import MICRO_BATCH_COST_TOKENS, cut_step
from lorafit.errors import NumericsError, ResourceError
from lorafit.files.cache import keep
from lorafit.ops import causal_attention
from lorafit.ops.rng import capture_rng
from lorafit.plan import ResolvedPlan
from lorafit.trainer.executor import Executor
from lorafit.trainer.rehearsal import fill_rows, heaviest_shapes, rehearse, resolve_plan, run_heaviest
from lorafit.trainer.stage import CLOSE_ENOUGH, Stage
from lorafit.trainer.state import TrainState
from lorafit.trainer.threaded_micro_batches import InThreads
from tests.support.tiny_run import CAUSAL_LM, PAD, Job, Rows


def stage(job: Job, **values: Any) -> Stage:
    trainer = job.trainer()
    return Stage(
        Executor(job.objective, torch.device("cpu")),
        examples=job.rows,
        validation=Rows(6, seed=5),
        step_rows=trainer.step_rows,
        pad_id=PAD,
        reporter=Silent(),
        set_checkpointing=values.pop("set_checkpointing", lambda wanted: None),
        one_by_one=values.pop("one_by_one", True),
        **values,
    )


@pytest.fixture(autouse=True)
def from_one_row_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """These rows are tiny, so that measuring begins at one longest row."""
    monkeypatch.setattr("lorafit.trainer.stage._FIRST_BUDGET_TOKENS", 1)


def open_plan(**fixed: Any) -> Any:
    values = {
        "attention": "auto",
        "gradient_checkpointing": None,
        "micro_batch_tokens": None,
        "min_micro_batch_tokens": 40,
        "max_micro_batch_tokens": 320,
        "dtype": "fp32",
        "compute_dtype": "fp32",
    }
    return SimpleNamespace(**{**values, **fixed})


def resolve(rehearsal: Stage, plan: Any, **sources: Any) -> ResolvedPlan:
    return resolve_plan(plan, rehearsal, **sources)


def forwards(rehearsal: Stage) -> list[tuple[int, int]]:
    """Shapes of all forward passes from now on."""
    seen: list[tuple[int, int]] = []
    embeddings = rehearsal.objective.base.get_input_embeddings()
    embeddings.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape)))
    return seen


def test_it_leaves_no_trace(job: Callable[..., Job]) -> None:
    """Weights, gradients, random numbers, mode; and the run that follows is the run without it."""
    plain = job("plain", dropout=0.3)
    plain.trainer().fit(TrainState())

    one = job("one", dropout=0.3)
    rehearsal = stage(one)
    trainer = one.trainer()
    rehearsal.executor, rng = Executor(one.objective, torch.device("cpu")), capture_rng()
    before = [p.detach().clone() for p in one.model.parameters()]
    one.objective.eval()
    resolved = resolve(rehearsal, open_plan(attention="eager"))
    assert resolved.source == "rehearsal" and not one.objective.training
    assert all(torch.equal(a, b) for a, b in zip(before, one.model.parameters(), strict=True))
    assert all(p.grad is None for p in one.model.parameters()) and capture_rng() == rng
    trainer.fit(TrainState())
    assert one.files(8) == plain.files(8)


def test_it_measures_what_is_open_and_picks_within_the_bounds(job: Callable[..., Job]) -> None:
    rehearsal = stage(job())
    resolved = resolve(rehearsal, open_plan())
    assert resolved.attention in ("eager", "fused", "sdpa")
    assert rehearsal.objective.base.config._attn_implementation == resolved.attention
    assert resolved.micro_batch_tokens in (40, 80, 160, 320) and resolved.gradient_checkpointing is False
    assert set(resolved.measured["attention_tokens_per_second"]) == {"eager", "fused", "sdpa"}
    rates = {int(k): v for k, v in resolved.measured["budget_tokens_per_second"].items()}
    assert min(rates) == 40 and resolved.measured["peak_memory_bytes"] > 0
    assert rates[resolved.micro_batch_tokens] >= CLOSE_ENOUGH["cpu"] * max(rates.values())


def test_the_smallest_budget_close_to_the_fastest_is_taken(
    job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU within 5 %: its memory serves others too."""
    rates = {40: 80.0, 80: 96.0, 160: 100.0, 320: 99.0}
    monkeypatch.setattr(Stage, "rate", lambda self, budget, at_once=1: rates[budget])
    assert resolve(stage(job()), open_plan(attention="sdpa")).micro_batch_tokens == 80
    bounded = stage(job(), fits=lambda tokens, checkpointing, attention: tokens <= 40)
    assert resolve(bounded, open_plan(attention="sdpa")).micro_batch_tokens == 40


def test_a_cpu_gets_no_more_tokens_than_its_cores_are_served_with(
    job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorafit.trainer.stage._MOST_CORE_TOKENS", 40)
    monkeypatch.setattr(Stage, "rate", lambda self, budget, at_once=1: float(budget))
    torch.set_num_threads(2)
    assert resolve(stage(job()), open_plan(attention="sdpa")).micro_batch_tokens == 80


@pytest.mark.parametrize(("budget", "at_once"), [(40, 1), (160, 1), (120, 2)])
def test_a_rate_counts_padding_and_idle_cores(
    job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch, budget: int, at_once: int
) -> None:
    """A machine of exactly 1,000 padded tokens a second and core, and what each micro-batch costs besides."""
    rehearsal, seen = stage(job()), []

    def clock(executor: Any, batches: list[Batch]) -> float:
        seen.append(tuple(batch.rows for batch in batches))
        return max(MICRO_BATCH_COST_TOKENS + batch.padded_tokens for batch in batches) / 1000

    monkeypatch.setattr("lorafit.trainer.stage.time_micro_batches", clock)
    rate = rehearsal.rate(budget, at_once)
    seconds = tokens = 0.0
    for step in range(1, 5):
        rows = rehearsal.step_rows.rows(step)[1]
        parts = cut_step(rows, rehearsal.examples.lengths, budget, at_once)
        padded = [len(part) * max(rehearsal.examples.lengths[row] for row in part) for part in parts]
        cores = [0.0] * at_once
        for size in sorted(padded, reverse=True):
            cores[cores.index(min(cores))] += (MICRO_BATCH_COST_TOKENS + size) / 1000
        seconds += max(cores)
        tokens += sum(rehearsal.examples.lengths[row] for row in rows)
    assert rate == pytest.approx(tokens / seconds)
    assert len(set(seen)) == len(seen) == 3 and all(len(rows) == at_once for rows in seen)  # nothing is timed twice


@pytest.mark.parametrize(("abreast_rate", "expected"), [(150.0, 2), (99.0, 1)])
def test_a_micro_batch_a_core_where_that_pays(
    job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch, abreast_rate: float, expected: int
) -> None:
    torch.set_num_threads(2)
    tokens_asked = []

    def fits(tokens: int, checkpointing: bool, attention: str) -> bool:
        tokens_asked.append(tokens)
        return tokens <= 160

    monkeypatch.setattr(
        Stage, "rate", lambda self, budget, at_once=1: (abreast_rate if at_once > 1 else 100.0) + budget
    )
    rehearsal = stage(job(), one_by_one=False, fits=fits)
    resolved = resolve(rehearsal, open_plan(attention="sdpa"))
    assert resolved.micro_batches_at_once == expected
    assert resolved.tokens_at_once <= 160
    assert rehearsal.measured["at_once_tokens_per_second"] == {"1": 140.0, "2": abreast_rate + 40}
    assert 80 in tokens_asked


def test_one_by_one_where_it_is_asked_for_or_the_recipe_sets_the_size(job: Callable[..., Job]) -> None:
    torch.set_num_threads(2)
    open_ = resolve(stage(job(), one_by_one=True), open_plan(attention="sdpa"))
    fixed = resolve(stage(job(), one_by_one=False), open_plan(attention="sdpa", micro_batch_tokens=128))
    assert open_.micro_batches_at_once == fixed.micro_batches_at_once == 1


@pytest.mark.parametrize("when", ["measured", "tried"])
def test_out_of_memory_abreast_goes_back_to_one_by_one(
    job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    torch.set_num_threads(2)
    if when == "tried":  # the rates look well, the heaviest micro-batches run out
        monkeypatch.setattr(Stage, "rate", lambda self, budget, at_once=1: float(at_once))
    accumulate = InThreads.accumulate

    def run_out(self: InThreads, *arguments: Any) -> Any:
        accumulate(self, *arguments)
        raise RuntimeError("alloc_cpu: can't allocate memory")

    monkeypatch.setattr(InThreads, "accumulate", run_out)
    resolved = resolve(stage(job(), one_by_one=False), open_plan(attention="sdpa"))
    assert resolved.micro_batches_at_once == 1


def test_measuring_begins_at_a_size_that_is_never_far_from_the_best(
    job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine so slow that one measurement takes all the time keeps that size, if it fits."""
    monkeypatch.setattr("lorafit.trainer.stage._FIRST_BUDGET_TOKENS", 200)
    monkeypatch.setattr("lorafit.trainer.rehearsal._MOST_SECONDS", -1.0)
    monkeypatch.setattr(Stage, "rate", lambda self, budget, at_once=1: float(budget))
    assert resolve(stage(job()), open_plan(attention="sdpa")).micro_batch_tokens == 200
    tight = stage(job(), fits=lambda tokens, checkpointing, attention: tokens <= 100)
    assert resolve(tight, open_plan(attention="sdpa")).micro_batch_tokens == 100
    assert resolve(stage(job()), open_plan(attention="sdpa", max_micro_batch_tokens=60)).micro_batch_tokens == 60


def test_fixed_values_are_kept_and_only_the_heaviest_micro_batches_run(job: Callable[..., Job]) -> None:
    one = job()
    rehearsal = stage(one)
    seen = forwards(rehearsal)
    resolved = resolve(rehearsal, open_plan(attention="eager", gradient_checkpointing=False, micro_batch_tokens=128))
    assert (resolved.source, resolved.micro_batch_tokens, resolved.attention) == ("recipe", 128, "eager")
    held_out = rehearsal.validation.lengths  # type: ignore[union-attr]
    widest = [(128 // max(lengths), max(lengths)) for lengths in (one.rows.lengths, held_out)]
    fullest = [(4, max(n for n in lengths if n <= 128 // 4)) for lengths in (one.rows.lengths, held_out)]
    assert seen == [widest[0], fullest[0], widest[1], fullest[1]]


@pytest.fixture
def other_attentions() -> Iterator[None]:
    """`blind` is causal attention that knows no documents; `cold` is eager attention with the scores halved."""

    def blind(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        scaled = scaled_dot_product_attention(query, key, value, is_causal=True, scale=kwargs["scaling"])
        return scaled.transpose(1, 2).contiguous(), None

    def cold(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        return eager_attention_forward(module, query * 0.5, key, value, mask, **kwargs)

    AttentionInterface.register("blind", blind)
    AttentionInterface.register("cold", cold)
    AttentionMaskInterface.register("cold", eager_mask)
    yield
    for name in ("blind", "cold"):
        AttentionInterface._global_mapping.pop(name)
    AttentionMaskInterface._global_mapping.pop("cold")


def louder(rehearsal: Stage) -> Stage:
    """Weights so large that attention decides the loss."""
    with torch.no_grad():
        for parameter in rehearsal.objective.parameters():
            parameter.mul_(5.0)
    return rehearsal


def test_attention_that_mixes_documents_or_changes_the_loss_is_left_out(
    job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch, other_attentions: None
) -> None:
    monkeypatch.setattr("lorafit.trainer.stage._open_candidates", lambda *_: ["blind", "cold", "sdpa"])
    for packing, left in ((True, {"sdpa"}), (False, {"blind", "sdpa"})):
        rehearsal = louder(stage(job(), packing=packing))
        resolved = resolve(rehearsal, open_plan(micro_batch_tokens=64))
        assert set(resolved.measured["attention_tokens_per_second"]) == left and resolved.attention in left
        assert "cold attention is left out: its logits are" in rehearsal.reporter.warnings[0]  # type: ignore[attr-defined]


def test_eager_attention_is_taken_where_no_candidate_is_left(
    job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch, other_attentions: None
) -> None:
    monkeypatch.setattr("lorafit.trainer.stage._open_candidates", lambda *_: ["cold"])
    assert resolve(louder(stage(job())), open_plan(micro_batch_tokens=64)).attention == "eager"


@pytest.mark.parametrize("source", ["recipe", "resumed", "given"])
def test_packing_is_proven_wherever_the_attention_comes_from(
    job: Callable[..., Job], other_attentions: None, source: str
) -> None:
    blind = ResolvedPlan(64, 64, "blind", False, "fp32", "fp32", "cpu", 1, "rehearsal", {})
    plan = open_plan(attention="blind") if source == "recipe" else open_plan()
    known = {} if source == "recipe" else {source: blind}
    with pytest.raises(NumericsError, match="llama cannot be packed with blind attention") as caught:
        resolve(stage(job(), packing=True), plan, **known)
    assert caught.value.exit_code == 9
    resolve(stage(job()), plan, **known)


def test_the_heaviest_packed_micro_batches_are_full(job: Callable[..., Job]) -> None:
    one = job(batch_size=4)
    rehearsal, filled = stage(one, packing=True), []
    decoder = rehearsal.objective.base.model

    def note(_: Any, __: Any, inputs: Any) -> None:
        ids, positions = inputs["input_ids"], inputs.get("position_ids")
        filled.append((tuple(ids.shape), None if positions is None else int((positions == 0).sum())))

    fixed = open_plan(attention="eager", gradient_checkpointing=False, micro_batch_tokens=128)
    choice = rehearse(rehearsal, fixed)
    decoder.register_forward_pre_hook(note, with_kwargs=True)
    run_heaviest(rehearsal, choice)
    widest, fullest, *held_out = filled
    assert widest == ((3, 40), 6) and fullest == ((4, 32), 8)  # two documents to a row
    assert all(documents is None for _, documents in held_out)


@pytest.mark.parametrize(
    ("budget", "most_rows", "one_row", "wanted"),
    [
        (100, 9, False, [(1, 60), (2, 50)]),
        (120, 9, False, [(2, 60)]),
        (1000, 9, False, [(6, 60)]),
        (1000, 2, False, [(2, 60)]),
        (50, 9, False, [(1, 60)]),
        (512, 9, True, [(1, 512)]),
        (50, 9, True, [(1, 60)]),
    ],
)
def test_heaviest_shapes(budget: int, most_rows: int, one_row: bool, wanted: list[tuple[int, int]]) -> None:
    lengths = [60, 50, 50, 20, 10, 5]
    assert heaviest_shapes(lengths, budget, most_rows, one_row=one_row) == wanted


def test_filled_rows_keep_the_end_of_rows_where_labels_are() -> None:
    rows = Rows(12)
    for packing in (False, True):
        for documents in fill_rows(CAUSAL_LM, rows, 3, 25, packing=packing):
            assert sum(len(d["tokens"]) for d in documents) == 25 and (len(documents) > 1) is packing
            assert all(list(d["tokens"]) == rows.ids[d.index][-len(d["tokens"]) :] for d in documents)
    assert (
        fill_rows(CAUSAL_LM, Rows(1), 3, 100, packing=True)[0][0].index == 0
        and len(fill_rows(CAUSAL_LM, Rows(1), 3, 9, packing=True)) == 1
    )


def test_checkpointing_goes_on_where_the_estimate_says_so(job: Callable[..., Job]) -> None:
    switched: list[bool] = []
    rehearsal = stage(
        job(), set_checkpointing=switched.append, fits=lambda tokens, checkpointing, attention: checkpointing
    )
    assert resolve(rehearsal, open_plan(attention="sdpa")).gradient_checkpointing is True and switched == [True]


def test_out_of_memory_lowers_the_budget_then_turns_checkpointing_on_then_ends(
    job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Stage, "rate", lambda self, budget, at_once=1: float(budget))  # the largest is the fastest
    tried: list[tuple[int, bool]] = []

    def limited(stage: Stage, choice: Any) -> None:
        tried.append((choice.micro_batch_tokens, choice.gradient_checkpointing))
        if not (choice.gradient_checkpointing and roomy):
            raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr("lorafit.trainer.rehearsal.run_heaviest", limited)
    roomy = True
    resolved = resolve(stage(job()), open_plan(attention="sdpa"))
    assert tried == [(320, False), (160, False), (80, False), (40, False), (40, True)]
    assert (resolved.micro_batch_tokens, resolved.gradient_checkpointing) == (40, True)
    roomy = False
    with pytest.raises(ResourceError, match=r"out of memory before step 1: seq length 40"):
        resolve(stage(job()), open_plan(attention="sdpa"))


def test_sources_come_in_order_and_the_recipe_wins(
    job: Callable[..., Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAFIT_CACHE", str(tmp_path))

    def known(tokens: int) -> ResolvedPlan:
        return ResolvedPlan(
            tokens, tokens, "eager", False, "fp32", "fp32", "cpu", 1, "rehearsal", measured={"seconds": 1}
        )

    keep("plans/recipe.json", known(33).to_json())
    rehearsal = stage(job())
    seen = forwards(rehearsal)
    everything = {"resumed": known(31), "given": known(32), "cache_name": "plans/recipe.json"}
    for wanted, tokens in (("run", 31), ("plan", 32), ("cache", 33)):
        resolved = resolve(rehearsal, open_plan(), **everything)
        assert (resolved.source, resolved.micro_batch_tokens, resolved.attention) == (wanted, tokens, "eager")
        assert bool(seen) == (wanted == "plan")  # another run's plan is tried; the others have been
        seen.clear()
        everything.pop({"run": "resumed", "plan": "given", "cache": "cache_name"}[wanted])
    fixed = resolve(rehearsal, open_plan(micro_batch_tokens=64), resumed=known(31))
    assert (fixed.micro_batch_tokens, fixed.attention) == (64, "eager")


def test_a_rehearsal_is_cached_and_a_broken_cache_is_measured_anew(
    job: Callable[..., Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAFIT_CACHE", str(tmp_path))
    first = resolve(stage(job()), open_plan(), cache_name="plans/a.json")
    again = resolve(stage(job()), open_plan(), cache_name="plans/a.json")
    assert (first.source, again.source) == ("rehearsal", "cache")
    assert again.micro_batch_tokens == first.micro_batch_tokens
    for broken in ("{", '{"attention": "sdpa"}'):
        (tmp_path / "plans" / "a.json").write_text(broken)
        assert resolve(stage(job()), open_plan(), cache_name="plans/a.json").source == "rehearsal"


@pytest.mark.parametrize(
    ("rates", "taken"),
    [
        ({"sdpa": 100.0, "fused": 90.0, "eager": 109.0}, "sdpa"),
        ({"sdpa": 100.0, "fused": 105.0, "eager": 115.0}, "fused"),
        ({"sdpa": 100.0, "fused": 90.0, "eager": 112.0}, "eager"),
    ],
)
def test_eager_attention_has_to_pay_for_the_scores_it_keeps(
    job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch, rates: dict[str, float], taken: str
) -> None:
    monkeypatch.setattr(Stage, "rate", lambda self, budget, at_once=1: rates[self.attention])
    resolved = resolve(stage(job()), open_plan(micro_batch_tokens=64))
    assert resolved.attention == taken and resolved.measured["attention_tokens_per_second"] == rates


def test_the_estimate_is_asked_about_the_attention_that_is_tried(
    job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eager attention is not tried where its scores do not fit, and budgets are bounded by what was chosen."""
    monkeypatch.setattr(Stage, "rate", lambda self, budget, at_once=1: 2.0 if self.attention == "eager" else 1.0)
    roomy = resolve(stage(job()), open_plan(micro_batch_tokens=64))
    assert roomy.attention == "eager"
    tight = stage(job(), fits=lambda tokens, checkpointing, attention: attention != "eager" and tokens < 160)
    resolved = resolve(tight, open_plan())
    assert resolved.attention != "eager" and resolved.micro_batch_tokens < 160
    assert set(resolved.measured["attention_tokens_per_second"]) == {"sdpa", "fused"}
    named = stage(job(), fits=lambda tokens, checkpointing, attention: checkpointing or attention != "eager")
    assert resolve(named, open_plan(attention="eager")).gradient_checkpointing is True


def test_fused_attention_must_train_as_sdpa_does(job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its logits in eval mode are sdpa's, whatever it does in training: only gradients tell."""
    real = causal_attention.causal_attention
    monkeypatch.setattr(causal_attention, "causal_attention", lambda q, k, v, scale: real(q, k, v, 0.5 * scale))
    rehearsal = louder(stage(job(dropout=0.3)))
    resolved = resolve(rehearsal, open_plan(micro_batch_tokens=64))
    assert "fused" not in resolved.measured["attention_tokens_per_second"] and resolved.attention != "fused"
    assert "fused attention is left out: its gradients are" in rehearsal.reporter.warnings[0]  # type: ignore[attr-defined]
    monkeypatch.setattr(causal_attention, "causal_attention", real)
    rehearsal = louder(stage(job("again", dropout=0.3)))
    assert "fused" in resolve(rehearsal, open_plan(micro_batch_tokens=64)).measured["attention_tokens_per_second"]


def test_packed_rows_are_not_measured_twice(job: Callable[..., Job]) -> None:
    resolved = resolve(stage(job(), packing=True), open_plan(micro_batch_tokens=64))
    assert set(resolved.measured["attention_tokens_per_second"]) == {"sdpa", "eager"}
