"""The rehearsal tells what is open and right, tries the heaviest micro-batches, and leaves no trace."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.modeling_utils import AttentionInterface
from transformers.models.llama.modeling_llama import eager_attention_forward

from lorafit.contracts import Silent
from lorafit.errors import NumericsError, ResourceError
from lorafit.files.cache import keep
from lorafit.job import open_job
from lorafit.model.attention import FUSED_ATTENTION
from lorafit.ops import causal_attention
from lorafit.ops.live_tensors import LiveTensors
from lorafit.ops.recomputed_layers import Checkpointing
from lorafit.ops.rng import capture_rng
from lorafit.plan import ResolvedPlan, Way
from lorafit.recipe.load import load_recipe
from lorafit.trainer.executor import Executor
from lorafit.trainer.rehearsal import fill_rows, heaviest_shapes, rehearse, resolve_plan, run_heaviest
from lorafit.trainer.stage import Stage, _disagreement, _logits, _probe
from lorafit.trainer.state import TrainState
from lorafit.trainer.threaded_micro_batches import InThreads
from tests.support.pictures import draw_rows
from tests.support.tiny_recipe import write_rows
from tests.support.tiny_run import CAUSAL_LM, PAD, Job, Rows
from tests.support.tiny_vision import make_llava


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
    """These rows are tiny, so that the ways begin at one longest row."""
    monkeypatch.setattr("lorafit.trainer.stage._FIRST_BUDGET_TOKENS", {"cpu": 1, "gpu": 1})


def open_plan(**fixed: Any) -> Any:
    values = {
        "attention": "auto",
        "gradient_checkpointing": None,
        "micro_batch_tokens": None,
        "min_micro_batch_tokens": 40,
        "max_micro_batch_tokens": 320,
        "keeps_unpacked": False,
        "may_let_go_of_unpacked": False,
        "loss_chunk_bytes": None,
        "total_steps": 400,
        "dtype": "fp32",
        "compute_dtype": "fp32",
        "may_recompute_more": fixed.get("gradient_checkpointing") is None,
    }
    return SimpleNamespace(**{**values, **fixed})


def resolve(rehearsal: Stage, plan: Any, **sources: Any) -> ResolvedPlan:
    return resolve_plan(plan, rehearsal, **sources)


def tried(plan: ResolvedPlan) -> list[tuple[str, int, int]]:
    """Attention, tokens and number at once of each way, in turn."""
    return [(way.attention, way.micro_batch_tokens, way.micro_batches_at_once) for way in plan.ways]


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


def test_it_tells_what_is_open_and_right_within_the_bounds(job: Callable[..., Job]) -> None:
    rehearsal = stage(job())
    resolved = resolve(rehearsal, open_plan())
    alone = [("fused", 80, 1), ("sdpa", 40, 1), ("eager", 40, 1), ("fused", 160, 1), ("fused", 320, 1)]
    assert tried(resolved) == [("fused", 40, 1), *alone] and not resolved.is_settled
    assert resolved.first_steps == [*resolved.ways, *resolved.ways]
    assert rehearsal.objective.base.config._attn_implementation == resolved.attention == "fused"
    assert resolved.gradient_checkpointing is False and resolved.measured["peak_memory_bytes"] > 0


def test_an_attention_whose_proof_runs_out_of_memory_is_left_out(
    job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a card or in the host; its activations are let go of before what it held is given back."""
    rehearsal, held, cleared = stage(job()), [], []
    errors = {"fused": torch.OutOfMemoryError("CUDA out of memory"), "sdpa": MemoryError()}

    def run_out(rehearsal: Stage, name: str, *_: object) -> str:
        activations = torch.nn.Linear(1, 1)
        held.append(weakref.ref(activations))
        raise errors.pop(name)

    clear = rehearsal.clear
    monkeypatch.setattr("lorafit.trainer.stage._disagreement", run_out)
    monkeypatch.setattr(rehearsal, "clear", lambda: (cleared.append([kept() is None for kept in held]), clear()))
    assert tried(resolve(rehearsal, open_plan()))[0][0] == "eager"
    assert not errors and cleared[:2] == [[True], [True, True]]


def test_comparing_gradients_takes_one_set_of_them(job: Callable[..., Job]) -> None:
    """Where all is trained, each further set is as large as the model."""
    rehearsal = stage(job())
    for parameter in (parameters := list(rehearsal.objective.parameters())):
        parameter.requires_grad_(True)
    objective, one_set = rehearsal.objective, 4 * sum(parameter.numel() for parameter in parameters)
    objective.train()
    rehearsal.set_attention("sdpa")
    with LiveTensors() as step:
        for _ in range(2):  # as two micro-batches of a step
            objective(objective.batch_of(_probe(rehearsal), PAD)).loss_sum.backward()
    for parameter in parameters:
        parameter.grad = None
    expected = _logits(rehearsal, "eager", [[_probe(rehearsal)]])
    with LiveTensors() as live:
        assert not _disagreement(rehearsal, FUSED_ATTENTION, expected)
    assert one_set < step.peak_bytes
    assert live.peak_bytes < step.peak_bytes + 0.5 * one_set
    assert all(parameter.grad is None for parameter in parameters)


@pytest.mark.parametrize(("total_steps", "ways"), [(1, 1), (39, 1), (40, 2), (60, 3), (1000, 6)])
def test_a_run_tries_for_a_tenth_of_its_steps_at_most(job: Callable[..., Job], total_steps: int, ways: int) -> None:
    resolved = resolve(stage(job()), open_plan(total_steps=total_steps))
    assert len(resolved.ways) == ways and len(resolved.first_steps) == (2 * ways if ways > 1 else 0)
    assert resolved.is_settled is (ways == 1)


def test_nothing_is_timed_or_proven_that_a_short_run_does_not_take(
    job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the three steps of a short run: the proof of one attention, and the heaviest micro-batches."""
    rehearsal = stage(job())
    seen = forwards(rehearsal)
    monkeypatch.setattr("lorafit.trainer.rehearsal.run_heaviest", lambda *_: None)
    resolve(rehearsal, open_plan(total_steps=3))
    assert len(seen) == 4 and len(set(seen)) == 1  # eager's and fused's logits, sdpa's and fused's gradients


def test_a_cpu_gets_no_more_tokens_than_its_cores_are_served_with(
    job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorafit.trainer.stage._MOST_CORE_TOKENS", 40)
    torch.set_num_threads(2)
    resolved = resolve(stage(job()), open_plan(attention="sdpa"))
    assert tried(resolved) == [("sdpa", 40, 1), ("sdpa", 80, 1)]


@pytest.mark.parametrize(("most", "expected"), [(160, [("sdpa", 40, 2), ("sdpa", 160, 1), ("sdpa", 40, 1)])])
def test_a_micro_batch_a_core_or_one_on_all(
    job: Callable[..., Job], most: int, expected: list[tuple[str, int, int]]
) -> None:
    torch.set_num_threads(2)
    plan = open_plan(attention="sdpa", max_micro_batch_tokens=most)
    assert tried(resolve(stage(job(), one_by_one=False), plan)) == expected
    tight = stage(job(), one_by_one=False, fits=lambda tokens, checkpointing, attention: tokens < 80)
    assert tried(resolve(tight, plan)) == [("sdpa", 40, 1)]


def test_one_by_one_where_it_is_asked_for_or_the_recipe_sets_the_size(job: Callable[..., Job]) -> None:
    torch.set_num_threads(2)
    open_ = resolve(stage(job(), one_by_one=True), open_plan(attention="sdpa"))
    fixed = resolve(stage(job(), one_by_one=False), open_plan(attention="sdpa", micro_batch_tokens=128))
    assert open_.micro_batches_at_once == fixed.micro_batches_at_once == 1


def test_out_of_memory_abreast_goes_back_to_one_by_one(
    job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(2)
    accumulate = InThreads.accumulate

    def run_out(self: InThreads, *arguments: Any) -> Any:
        accumulate(self, *arguments)
        raise RuntimeError("alloc_cpu: can't allocate memory")

    monkeypatch.setattr(InThreads, "accumulate", run_out)
    for total_steps in (3, 400):
        plan = open_plan(attention="sdpa", total_steps=total_steps, max_micro_batch_tokens=80)
        resolved = resolve(stage(job(), one_by_one=False), plan)
        assert {way.micro_batches_at_once for way in resolved.ways} == {1}


def test_the_ways_begin_at_a_size_that_is_never_far_from_the_best(
    job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorafit.trainer.stage._FIRST_BUDGET_TOKENS", {"cpu": 200})
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
        assert {way.attention for way in resolved.ways} == left
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


def test_the_heaviest_micro_batches_hold_as_many_images_as_any(tmp_path: Path) -> None:
    """Long texts are the widest and the fullest; what is run of short rows has their images, none of them cut off."""
    make_llava(tmp_path / "base", side=64)
    long = {"messages": [{"role": "user", "content": "what " * 120}, {"role": "assistant", "content": "red"}]}
    write_rows(tmp_path / "train.jsonl", [long, *draw_rows(tmp_path, 6), long])
    data, model = {"train": str(tmp_path / "train.jsonl")}, {"base": str(tmp_path / "base")}
    opened = open_job(load_recipe({"name": "n", "task": "image-text-to-text", "model": model, "data": data}), Silent())
    task, rows = opened.task, opened.rows.train
    images, budget = task.image_tokens(rows), 2 * max(rows.lengths)
    assert list(images) == [0, *[64] * 6, 0]
    shapes = heaviest_shapes(rows.lengths, budget, 8, one_row=False, images=images)
    assert shapes[:-1] == heaviest_shapes(rows.lengths, budget, 8, one_row=False)
    filled = [fill_rows(task, rows, *shape, packing=False, images=images) for shape in shapes]
    held = [sum(len(task.pictures(document)) for (document,) in micro_batch) for micro_batch in filled]
    assert held == [1, shapes[-1][0]] and shapes[-1][0] > 1 and shapes[-1][1] == sorted(rows.lengths)[-3]


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
    """As little of it as the longest row needs; of all layers where nothing is enough by the estimate."""
    fitting: list[tuple[list[Checkpointing], Checkpointing]] = [
        ([False, "half", True], False), (["half", True], "half"), ([True], True), ([], True)
    ]  # fmt: skip
    for fits, wanted in fitting:
        switched: list[Checkpointing] = []
        rehearsal = stage(
            job(),
            set_checkpointing=switched.append,
            fits=lambda tokens, checkpointing, attention, fits=fits: checkpointing in fits,
        )
        assert resolve(rehearsal, open_plan(attention="sdpa")).gradient_checkpointing == wanted and switched == [wanted]


def test_out_of_memory_leaves_large_ways_out_then_lowers_the_budget_then_recomputes_more_then_ends(
    job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorafit.trainer.stage._FIRST_BUDGET_TOKENS", {"cpu": 160})
    tried: list[tuple[int, Checkpointing]] = []

    def limited(stage: Stage, choice: ResolvedPlan) -> None:
        tokens = max(way.tokens_at_once for way in choice.ways)
        tried.append((tokens, choice.gradient_checkpointing))
        if not (choice.gradient_checkpointing in enough or tokens == fits_too):
            raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr("lorafit.trainer.rehearsal.run_heaviest", limited)
    enough, fits_too = [True], 0
    resolved = resolve(stage(job()), open_plan(attention="sdpa"))
    assert tried == [(320, False), (160, False), (80, False), (40, False), (40, "half"), (40, True)]
    assert (resolved.micro_batch_tokens, resolved.gradient_checkpointing) == (40, True) and resolved.is_settled
    enough = ["half", True]
    assert resolve(stage(job()), open_plan(attention="sdpa")).gradient_checkpointing == "half"
    fits_too = 160
    resolved = resolve(stage(job()), open_plan(attention="sdpa"))
    assert (resolved.micro_batch_tokens, resolved.first_steps, resolved.is_settled) == (160, [], True)
    enough, fits_too = [], 0
    with pytest.raises(ResourceError, match=r"out of memory before step 1: seq length 40"):
        resolve(stage(job()), open_plan(attention="sdpa"))


def test_out_of_memory_lets_go_of_unpacked_copies_first(
    job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the heaviest micro-batch has no room beside them, or they have none; a resume does without them too."""
    held: list[bool] = []

    def full(wanted: bool) -> None:
        held.append(wanted)
        if wanted:
            raise torch.OutOfMemoryError("out of memory")

    def limited(stage: Stage, choice: ResolvedPlan) -> None:
        if choice.keeps_unpacked:
            raise torch.OutOfMemoryError("out of memory")

    keeping = {"attention": "sdpa", "keeps_unpacked": True}
    open_copies = open_plan(**keeping, may_let_go_of_unpacked=True)
    whole = resolve(stage(job()), open_plan(attention="sdpa"))
    dropped = resolve(stage(job(), keep_unpacked=full), open_copies)
    assert held[-1] is False and dropped.keeps_unpacked is False and dropped.ways == whole.ways
    monkeypatch.setattr("lorafit.trainer.rehearsal.run_heaviest", limited)
    again = resolve(stage(job(), keep_unpacked=held.append), open_copies)
    assert again.ways == whole.ways and not again.keeps_unpacked and held[-1] is False
    with pytest.raises(ResourceError):
        resolve(stage(job()), open_plan(**keeping))  # the recipe asks for them
    again = resolve(stage(job(), keep_unpacked=held.append), open_copies, resumed=dropped)
    assert held[-1] is False and not again.keeps_unpacked
    older = ResolvedPlan.from_json({k: v for k, v in dropped.to_json().items() if k != "keeps_unpacked"})
    assert resolve(stage(job(), keep_unpacked=held.append), open_copies, resumed=older).keeps_unpacked and held[-1]
    asked = resolve(stage(job(), keep_unpacked=held.append), open_plan(**keeping), resumed=dropped)
    assert asked.keeps_unpacked and held[-1]


def test_chunks_of_the_loss_are_the_plans_and_a_resume_repeats_them(job: Callable[..., Job]) -> None:
    rehearsal = stage(job())
    first = resolve(rehearsal, open_plan(attention="sdpa", loss_chunk_bytes=4096))
    assert first.loss_chunk_bytes == rehearsal.objective.loss_chunk_bytes == 4096
    elsewhere = stage(job())
    again = resolve(elsewhere, open_plan(attention="sdpa"), resumed=first)  # a card with less memory
    assert again.loss_chunk_bytes == elsewhere.objective.loss_chunk_bytes == 4096
    older = ResolvedPlan.from_json({k: v for k, v in first.to_json().items() if k != "loss_chunk_bytes"})
    resolve(elsewhere, open_plan(attention="sdpa", loss_chunk_bytes=4096), resumed=older)
    assert elsewhere.objective.loss_chunk_bytes is None


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (lambda tokens: 0.010 + 1e-5 * tokens, 1024),
        (lambda tokens: 0.010, 16_384),  # the card waits for the host all the time
        (lambda tokens: 1e-5 * tokens, 128),
    ],
)
def test_a_card_tells_what_starting_a_micro_batch_costs(
    job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch, seconds: Callable[[int], float], expected: int
) -> None:
    """A CPU is not asked; what is told is kept for a resume. A first time may take longer."""
    seen: list[int] = []

    def planted(_: Executor, batches: list[Any]) -> float:
        seen.append(batches[0].padded_tokens)
        return seconds(seen[-1]) + (9.0 if seen.count(seen[-1]) == 1 else 0.0)

    monkeypatch.setattr("lorafit.trainer.rehearsal.time_micro_batches", planted)
    monkeypatch.setattr("lorafit.trainer.rehearsal.run_heaviest", lambda *_: None)
    alone = open_plan(attention="sdpa", micro_batch_tokens=320)
    assert resolve(stage(job()), alone).micro_batch_cost_tokens is None and not seen
    monkeypatch.setattr(Stage, "device", torch.device("cuda"))
    told = resolve(stage(job()), alone)
    assert told.micro_batch_cost_tokens == expected and len(seen) == 4 and max(seen) > 4 * min(seen)
    again = resolve(stage(job()), alone, resumed=told)
    assert again.micro_batch_cost_tokens == expected and len(seen) == 4


def test_where_micro_batches_are_all_alike_the_likely_cost_is_taken(
    job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorafit.trainer.rehearsal.run_heaviest", lambda *_: None)
    monkeypatch.setattr(Stage, "device", torch.device("cuda"))
    rows = Rows(8)
    rows.ids, rows.trained, rows.lengths = [[3] * 20] * 8, [[1] * 20] * 8, [20] * 8
    plan = open_plan(attention="sdpa", micro_batch_tokens=20)
    assert resolve(stage(job(rows=rows)), plan).micro_batch_cost_tokens == 700


def test_what_memory_was_planned_for_is_not_the_last_word(
    job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Left open and planned to be off: more layers are recomputed before a run ends, and a resume repeats it."""

    def limited(stage: Stage, choice: ResolvedPlan) -> None:
        if not choice.gradient_checkpointing:
            raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr("lorafit.trainer.rehearsal.run_heaviest", limited)
    planned = open_plan(attention="sdpa", gradient_checkpointing=False, may_recompute_more=True)
    found = resolve(stage(job()), planned)
    assert found.gradient_checkpointing == "half"
    assert resolve(stage(job()), planned, resumed=found).gradient_checkpointing == "half"
    fixed = open_plan(attention="sdpa", gradient_checkpointing=False)
    assert resolve(stage(job()), fixed, resumed=found).gradient_checkpointing is False
    with pytest.raises(ResourceError):
        resolve(stage(job()), fixed)
    sure = open_plan(attention="sdpa", gradient_checkpointing=True, may_recompute_more=True)
    assert resolve(stage(job()), sure, resumed=found).gradient_checkpointing is True


def test_the_heaviest_of_all_ways_is_tried(job: Callable[..., Job]) -> None:
    """It holds the most tokens, and keeps all scores where one of those does: the others are lighter."""
    rehearsal = stage(job())
    ways = [Way("fused", 40, 2), Way("eager", 40, 2), Way("fused", 80), Way("sdpa", 40)]
    choice = resolve(rehearsal, open_plan(attention="sdpa", micro_batch_tokens=64, total_steps=1))
    seen, base = [], rehearsal.objective.base
    base.model.register_forward_pre_hook(lambda *_: seen.append((base.training, base.config._attn_implementation)))
    run_heaviest(rehearsal, replace(choice.running(ways[0]), first_steps=ways))
    assert {attention for training, attention in seen if training} == {"eager"}


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


def test_the_estimate_is_asked_about_the_attention_that_is_tried(job: Callable[..., Job]) -> None:
    """Eager attention is not tried where its scores do not fit, and budgets are bounded by what is."""
    assert "eager" in {way.attention for way in resolve(stage(job()), open_plan(micro_batch_tokens=64)).ways}
    tight = stage(job(), fits=lambda tokens, checkpointing, attention: attention != "eager" and tokens < 160)
    resolved = resolve(tight, open_plan())
    assert {way.attention for way in resolved.ways} == {"sdpa", "fused"}
    assert max(way.tokens_at_once for way in resolved.ways) < 160
    named = stage(job(), fits=lambda tokens, checkpointing, attention: checkpointing or attention != "eager")
    assert resolve(named, open_plan(attention="eager")).gradient_checkpointing == "half"


def test_fused_attention_must_train_as_sdpa_does(job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its logits in eval mode are sdpa's, whatever it does in training: only gradients tell."""
    real = causal_attention.causal_attention
    monkeypatch.setattr(causal_attention, "causal_attention", lambda q, k, v, scale: real(q, k, v, 0.5 * scale))
    rehearsal = louder(stage(job(dropout=0.3)))
    resolved = resolve(rehearsal, open_plan(micro_batch_tokens=64))
    assert "fused" not in {way.attention for way in resolved.ways}
    assert "fused attention is left out: its gradients are" in rehearsal.reporter.warnings[0]  # type: ignore[attr-defined]
    monkeypatch.setattr(causal_attention, "causal_attention", real)
    rehearsal = louder(stage(job("again", dropout=0.3)))
    assert "fused" in {way.attention for way in resolve(rehearsal, open_plan(micro_batch_tokens=64)).ways}


def test_packed_rows_do_not_try_what_would_hand_them_on(job: Callable[..., Job]) -> None:
    resolved = resolve(stage(job(), packing=True), open_plan(micro_batch_tokens=64))
    assert [way.attention for way in resolved.ways] == ["sdpa", "eager"]


def test_how_packed_rows_are_kept_apart_goes_with_the_attention(
    job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is proven once for each, and the steps that try another one switch it as well."""
    proven = []

    def prove(objective: Any, *_: Any, **__: Any) -> None:
        proven.append(objective.base.config._attn_implementation)
        objective.masks_documents = proven[-1] == "eager"

    monkeypatch.setattr("lorafit.trainer.stage.prove_separation", prove)
    rehearsal = stage(job(), packing=True)
    resolve(rehearsal, open_plan(micro_batch_tokens=64))
    for name in ("sdpa", "eager", "sdpa"):
        rehearsal.set_attention(name)
        assert rehearsal.objective.masks_documents is (name == "eager")
    assert sorted(proven) == ["eager", "sdpa"]
