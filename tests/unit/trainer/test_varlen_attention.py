"""`varlen` attention on packed rows: torch's operation is called as it wants to be, and all else is masked.

The operation has no kernel for CPUs; `tests.support.documents_kernel` is one, behind torch's own autograd formula.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from lorafit.contracts import Silent
from lorafit.data.packing import Cutter
from lorafit.errors import NumericsError
from lorafit.model import attention
from lorafit.model.attention import set_attention, takes_fused_attention, takes_varlen_attention
from lorafit.ops.attention_kernels import takes_documents
from lorafit.plan import ResolvedPlan, Way
from lorafit.trainer.stage import _open_candidates
from lorafit.trainer.startup_proofs import prove_separation
from lorafit.trainer.state import TrainState
from tests.support.documents_kernel import CALLS, FAULTS, Call, register_documents_kernel
from tests.support.tiny_run import CAUSAL_LM, PAD, Job, Rows, TinyPlan
from tests.unit.trainer.test_packing_parity import SIZES, build, gradients, same
from tests.unit.trainer.test_rehearsal import louder, open_plan, resolve, stage

KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "gpt2": {},
    "mistral": {"sliding_window": 7},  # shorter than most documents
}


@pytest.fixture(autouse=True)
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A card, as far as attention asks for one: any dtype goes to the kernel."""
    register_documents_kernel()
    monkeypatch.setattr(attention, "_capability_of", lambda tensor: (8, 0))
    monkeypatch.setattr(attention, "takes_documents", lambda *_: True)
    CALLS.clear()
    yield
    FAULTS.clear()


def with_varlen(kind: str, **changes: Any) -> Any:
    objective = build(kind, "eager", **{**KINDS[kind], **changes})
    set_attention(objective.base, "varlen")
    return objective


def packed_parts(rows: Rows) -> Any:
    return Cutter(rows, CAUSAL_LM, PAD, None, "varlen").cut(range(16), 160)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("kind", KINDS)
def test_each_document_is_computed_by_itself(kind: str, checkpointing: bool) -> None:
    rows, objective = Rows(16), with_varlen(kind)
    prove_separation(objective, [rows[0], rows[1]], PAD, one_row=True)
    assert not objective.masks_documents
    if checkpointing:
        objective.base.gradient_checkpointing_enable({"use_reentrant": False})
    CALLS.clear()
    parts = packed_parts(rows)
    packed = gradients(objective, parts, rows)
    same(packed, gradients(build(kind, "eager", **KINDS[kind]), [[[row]] for row in range(16)], rows))
    together = [documents for (documents,) in parts if len(documents) > 1]
    wanted = []
    for lengths in ([int(rows.lengths[row]) for row in documents] for documents in together):
        key_heads = 4 if kind == "gpt2" else 2
        bounds = torch.tensor([0, *lengths]).cumsum(0).tolist()
        window = [6, 0] if kind == "mistral" else [-1, 0]
        one = Call((sum(lengths), 4, 8), (sum(lengths), key_heads, 8), bounds, max(lengths), 8**-0.5, window)
        wanted += [one] * (4 if checkpointing else 2)  # two layers
    assert together and wanted == CALLS


@pytest.mark.parametrize("kind", ["llama", "mistral"])
@pytest.mark.parametrize("why", ["no kernel", "dropout"])
def test_what_the_kernel_cannot_take_is_masked(kind: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout of the model's own on scores is asked for, and is so small that it drops nothing."""
    dropout = 1e-12 if why == "dropout" else 0.0
    if why == "no kernel":
        monkeypatch.setattr(attention, "takes_documents", takes_documents)  # fp32
    rows, objective = Rows(16), with_varlen(kind, attention_dropout=dropout)
    prove_separation(objective, [rows[0], rows[1]], PAD, one_row=True)
    CALLS.clear()
    packed = gradients(objective, packed_parts(rows), rows)
    assert not CALLS
    same(packed, gradients(build(kind, "eager", **KINDS[kind]), [[[row]] for row in range(16)], rows))


def test_rows_of_one_document_and_several_packed_rows_are_sdpas() -> None:
    rows, objective = Rows(16), with_varlen("llama")
    for part in ([[0]], [[1], [2]], [[3, 4], [5, 6]]):
        same(gradients(objective, [part], rows), gradients(build("llama", "sdpa"), [part], rows))
    assert not CALLS


class Reads(TorchDispatchMode):
    """Counts numbers that are read out of tensors: a card would be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("name", ["varlen", "sdpa", "eager"])
def test_no_forward_of_packed_rows_reads_a_number(name: str) -> None:
    rows, objective = Rows(16), build("llama", "eager")
    set_attention(objective.base, name)
    batch = CAUSAL_LM.collate([[rows[0], rows[1], rows[2]]], PAD)
    with Reads() as reads:
        objective(batch).loss_sum.backward()
    kernel_reads = len(CALLS)  # its own stand-in makes lists of the bounds
    assert reads.count == 0 and kernel_reads == (2 if name == "varlen" else 0)


@pytest.mark.parametrize(
    ("capability", "dtype", "head_dim", "takes"),
    [
        ((8, 0), "bf16", 128, True),
        ((12, 0), "fp16", 256, True),
        ((7, 5), "fp16", 128, False),
        ((9, 0), "fp32", 128, False),
        ((9, 0), "bf16", 264, False),
        ((9, 0), "bf16", 100, False),
    ],
)
def test_which_cards_dtypes_and_heads_the_kernel_takes(
    capability: tuple[int, int], dtype: str, head_dim: int, takes: bool
) -> None:
    assert takes_documents(capability, dtype, head_dim) is takes


def test_a_batch_that_holds_fewer_bits_computes_in_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autocast does not know the operation, whose operands must all be of one dtype."""
    seen = []
    monkeypatch.setattr(attention, "takes_documents", lambda _, dtype, __: seen.append(dtype) or True)
    rows, objective = Rows(3), with_varlen("qwen3")
    objective.autocast_dtype = torch.bfloat16
    loss, found = gradients(objective, [[[0, 1, 2]]], rows)
    assert set(seen) == {"bf16"} and len(CALLS) == 2 and len(found) >= 8
    objective.autocast_dtype = None
    assert loss == pytest.approx(gradients(objective, [[[0, 1, 2]]], rows)[0], rel=2e-2)


@pytest.mark.parametrize(
    ("packing", "has_package", "has_kernel", "wanted"),
    [
        (None, False, True, ["varlen", "sdpa"]),
        (None, True, True, ["varlen", "sdpa", "flash_attention_2"]),
        (True, True, True, ["varlen", "flash_attention_2", "sdpa"]),
        (True, False, False, ["sdpa"]),  # one long row would be masked
        (False, False, True, ["sdpa"]),
    ],
)
def test_on_a_card_packed_rows_are_tried_first(
    packing: bool | None, has_package: bool, has_kernel: bool, wanted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.utils.is_flash_attn_2_available", lambda: has_package)
    values = {"packing": packing, "takes_varlen": has_kernel}
    card = SimpleNamespace(device=torch.device("cuda"), objective=build("llama", "sdpa"), **values)
    assert _open_candidates(card, 64, False) == wanted  # type: ignore[arg-type]
    card.objective = build("falcon", "sdpa")  # computes its attention by itself
    assert "varlen" not in _open_candidates(card, 64, False)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (None, ""),
        ("mixes", "documents see each other"),
        ("backward", "varlen attention is left out: its gradients are"),
    ],
)
def test_packing_left_open_is_taken_where_it_is_right(
    job: Callable[..., Job], fault: str | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorafit.trainer.stage._open_candidates", lambda *_: ["varlen", "sdpa"])
    FAULTS.update([fault] if fault else [])
    told = []
    monkeypatch.setattr(Silent, "info", lambda _, message: told.append(message))
    rehearsal = louder(stage(job(), packing=None))
    resolved = resolve(rehearsal, open_plan(micro_batch_tokens=64))
    assert [way.attention for way in resolved.ways] == (["sdpa"] if fault else ["varlen", "sdpa"])
    assert said in " ".join([*told, *rehearsal.reporter.warnings])  # type: ignore[attr-defined]
    assert resolved == ResolvedPlan.from_json(resolved.to_json())
    if fault:
        refused = pytest.raises(NumericsError, match="llama cannot be packed with varlen attention")
        with refused if fault == "mixes" else contextlib.nullcontext():
            rehearsal.set_attention("varlen")


def test_steps_pack_under_varlen_alone_and_learn_the_same(job: Callable[..., Job]) -> None:
    ways = {"first_steps": [Way("varlen", 256), Way("sdpa", 256)] * 2, "is_settled": False}
    logs = []
    for name, packing, trials in (("padded", False, {}), ("open", None, ways)):
        one = job(name, packing=packing, trials=trials, budget=256, rows=Rows(48), plan=TinyPlan(total_steps=4))
        trainer = one.trainer()
        packed = [any("bounds" in batch.tensors for batch in trainer.build_micro_batches(n, 256)) for n in (1, 2, 3, 4)]
        assert packed == ([True, False, True, False] if trials else [False] * 4)
        trainer.fit(TrainState())
        logs.append(one.lines())
    assert CALLS
    for field in ("loss", "grad_norm", "tokens", "trained_tokens"):
        assert [line[field] for line in logs[1]] == pytest.approx([line[field] for line in logs[0]], rel=1e-5)


def test_the_models_own_forward_is_told_where_documents_begin_too() -> None:
    rows, objective = Rows(4), with_varlen("llama")
    objective.exact = True
    packed = gradients(objective, [[[0, 1, 2, 3]]], rows)
    assert len(CALLS) == 2
    same(packed, gradients(build("llama", "eager"), [[[row]] for row in range(4)], rows))


def test_a_run_that_packed_answers_and_is_scored_as_with_sdpa() -> None:
    """Padded prompts with a cache, and held-out rows one to a row."""
    rows, found = Rows(3), []
    mask = torch.ones(2, 6, dtype=torch.long).index_fill_(1, torch.tensor([0]), 0)
    for name in ("varlen", "sdpa"):
        objective = build("llama", name).eval()
        ids = objective.base.generate(
            torch.randint(3, 90, (2, 6), generator=torch.Generator().manual_seed(0)),
            attention_mask=mask,
            max_new_tokens=8,
            do_sample=False,
        )
        scores = objective.score(CAUSAL_LM.collate([[rows[0]], [rows[1]]], PAD))
        found.append((ids.tolist(), scores["loss"].tolist()))
    assert found[0] == found[1] and not CALLS


@pytest.mark.parametrize(("has_kernel", "wanted"), [(True, "varlen"), (False, "sdpa")])
def test_a_plan_of_another_card_packs_only_where_the_kernel_is(
    job: Callable[..., Job], has_kernel: bool, wanted: str
) -> None:
    elsewhere = ResolvedPlan(64, 64, "varlen", False, "fp32", "fp32", "cuda", 1, "rehearsal")
    here = stage(job(), packing=None, takes_varlen=has_kernel)
    resolved = resolve(here, open_plan(gradient_checkpointing=False), given=elsewhere)
    assert (resolved.attention, here.cutter.packs) == (wanted, has_kernel)


def test_values_of_another_width_than_keys_are_not_for_the_kernel() -> None:
    sizes = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
    config = AutoConfig.for_model("deepseek_v3", **SIZES, **sizes, n_routed_experts=2, n_group=1, topk_group=1)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    assert takes_fused_attention(model) and not takes_varlen_attention(model)
    assert takes_varlen_attention(build("llama", "sdpa").base)
