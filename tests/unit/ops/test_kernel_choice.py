"""Which kernels a run takes: by recipe, device and packages; proven one by one, and repeated by a resume."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lorafit.contracts import Silent
from lorafit.errors import RecipeError
from lorafit.ops import kernel_choice, kernel_proof, liger
from lorafit.ops.kernel_choice import check_kernels, choose_kernels, describe_versions, planned_kernels
from lorafit.ops.kernel_proof import prove_kernels
from lorafit.ops.kernels import FUSED, PLAIN
from lorafit.plan import ResolvedPlan
from lorafit.run import resumption
from lorafit.trainer.checkpoint import Environment, check_continuity

CPU = torch.device("cpu")
CARD: Any = SimpleNamespace(type="cuda")
RESOLVED = ResolvedPlan(64, 64, "sdpa", False, "bf16", "bf16", "cuda", 1, "rehearsal")


class Warnings(Silent):
    """Keeps what is warned of."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def warn(self, message: str) -> None:
        self.said.append(message)


def install(monkeypatch: pytest.MonkeyPatch, *, there: bool) -> None:
    monkeypatch.setattr(kernel_choice, "find_spec", lambda name: name if there else None)


@pytest.mark.parametrize(
    ("asked", "device", "there", "planned"),
    [
        ("auto", "cuda", True, "liger"),
        ("auto", "cuda", False, "none"),
        ("auto", "cpu", True, "none"),
        ("none", "cuda", True, "none"),
        ("liger", "cuda", True, "liger"),
    ],
)
def test_auto_takes_what_is_installed(
    asked: str, device: str, there: bool, planned: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, there=there)
    check_kernels(asked, device)
    assert planned_kernels(asked, device) == planned


@pytest.mark.parametrize(
    ("device", "there", "said"),
    [
        ("cpu", True, "model.kernels: Liger's kernels need a CUDA GPU; write auto or none"),
        ("cuda", False, "pip install 'lorafit[liger]'"),
    ],
)
def test_liger_is_refused_where_it_cannot_run(
    device: str, there: bool, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, there=there)
    with pytest.raises(RecipeError) as caught:
        check_kernels("liger", device)
    assert said in str(caught.value)


def test_a_cpu_takes_the_plain_ones() -> None:
    assert choose_kernels("liger", CPU, torch.bfloat16, Silent()) is PLAIN


def test_what_a_card_computes_in_one_launch_is_the_same_in_rounding() -> None:
    """On a CPU torch has no backward of its fused norm: the proof leaves it out, and takes what does run."""
    proven, left_out = prove_kernels(FUSED, PLAIN, CPU, torch.float32)
    assert list(left_out) == ["norm"] and "does not run on this device" in left_out["norm"]
    assert (proven.norm, proven.norm_backward) == (PLAIN.norm, PLAIN.norm_backward)
    assert proven.scaled_product is FUSED.scaled_product and proven.multiply_silu is FUSED.multiply_silu


def test_torchs_fused_norm_is_a_layers_norm() -> None:
    x, weight = torch.randn(3, 5, 64), torch.rand(64)
    normed, scale = FUSED.norm(x, weight, 1e-5)
    plain, plain_scale = PLAIN.norm(x, weight, 1e-5)
    assert torch.allclose(normed, plain, atol=1e-6) and torch.allclose(scale, plain_scale, atol=1e-6)


@pytest.mark.parametrize(
    ("operation", "field", "wrong"),
    [
        ("product", "scaled_product", lambda a, b, scaling: (a @ b).mul_(1.01 * scaling)),
        ("norm", "norm_backward", lambda grad, x, weight, scale: grad),
        ("norm", "norm_backward", lambda grad, *of: grad.copy_(PLAIN.norm_backward(grad, *of))),
        ("silu", "differentiate_silu", lambda gate, up, grad: (gate, up)),
        ("rotation", "rotate", lambda q, k, cos, sin, backwards: PLAIN.rotate(q, k, cos, sin, False)),
        ("rotation", "rotate", lambda q, k, cos, sin, backwards: (q.mul_(1.0), k.mul_(0.5))),
        ("loss", "logit_errors", lambda logits, labels, wants: (logits.sum(), logits if wants else None)),
    ],
)
def test_what_computes_otherwise_is_left_out(operation: str, field: str, wrong: Any) -> None:
    proven, left_out = prove_kernels(replace(PLAIN, name="liger", **{field: wrong}), PLAIN, CPU, torch.float32)
    assert list(left_out) == [operation]
    assert proven == replace(PLAIN, name="liger")


def test_memory_that_runs_out_in_a_proof_is_no_fault_of_the_kernel() -> None:
    def exhaust(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with pytest.raises(torch.OutOfMemoryError):
        prove_kernels(replace(PLAIN, multiply_silu=exhaust), PLAIN, CPU, torch.float32)


def test_what_is_left_out_is_said_and_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    def prove(table: Any, instead: Any, device: Any, dtype: Any) -> tuple[Any, dict[str, str]]:
        return table, {"norm": "no kernel image is available"} if table.name == "liger" else {}

    monkeypatch.setattr(kernel_proof, "prove_kernels", prove)
    monkeypatch.setattr(kernel_choice, "version", {"liger-kernel": "0.8.5"}.__getitem__)
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__="3.7.1"))  # type: ignore[misc]
    reporter = Warnings()
    chosen = choose_kernels("liger", CARD, torch.bfloat16, reporter)
    assert reporter.said == ["Liger's norm is left out: no kernel image is available"]
    assert describe_versions(chosen) == "liger without norm, liger-kernel 0.8.5, triton 3.7.1"
    saved = replace(RESOLVED, kernels=chosen.name)
    assert ResolvedPlan.from_json(saved.to_json()) == saved
    assert describe_versions(choose_kernels("none", CARD, torch.bfloat16, reporter)) == ""


def test_what_liger_no_longer_has_is_left_out() -> None:
    """The proof meets each import by itself; here the package is not even installed, or there is no driver."""
    proven, left_out = prove_kernels(liger.LIGER, FUSED, torch.device("meta"), torch.bfloat16)
    assert left_out.keys() == {"norm", "silu", "rotation", "loss"}
    assert proven.norm is FUSED.norm and not proven.repeats_angles


# A resume


@pytest.mark.parametrize(
    ("asked", "planned", "saved", "taken"),
    [
        ("auto", "liger", "none", "none"),  # installed since
        ("auto", "liger", "liger", "liger"),
        ("auto", "none", "liger", "none"),  # gone since: warned of by the environment
        ("liger", "liger", "none", "liger"),
    ],
)
def test_a_resume_repeats_what_the_run_took(
    asked: str, planned: str, saved: str, taken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resumption, "choose_kernels", lambda planned, *_: planned)
    monkeypatch.setattr(resumption.Resumption, "_check_continuity", lambda *_: [])
    monkeypatch.setattr(resumption, "own_device", lambda kind: CARD)
    recipe = SimpleNamespace(model=SimpleNamespace(kernels=asked))
    job: Any = SimpleNamespace(recipe=recipe, device=SimpleNamespace(kind="cuda"))
    plan: Any = SimpleNamespace(kernels=planned, dtype="bf16")
    begun = resumption.Resumption(job, None, plan, Silent())  # type: ignore[arg-type]
    before = replace(RESOLVED, kernels=saved)
    checkpoint: Any = SimpleNamespace(resolved=before.to_json(), folder="step-000001")
    assert replace(begun, checkpoint=checkpoint).choose_kernels(None, False) == (taken, [])
    assert begun.choose_kernels(before, False) == (taken, [])  # --plan


def test_a_resume_without_liger_says_so() -> None:
    was = Environment("cuda", 1, {}, kernels="liger, liger-kernel 0.8.5, triton 3.7.1")
    reporter = Warnings()
    events = check_continuity(was, replace(was, kernels=""), allow_inexact=False, reporter=reporter, where="here")
    said = "the kernels were liger, liger-kernel 0.8.5, triton 3.7.1 and are lorafit's own"
    assert reporter.said == [f"{said}: the rest of the run is not guaranteed bitwise the same"]
    assert [event["kind"] for event in events] == ["inexact_resume"]


def test_a_plan_of_before_had_lorafits_own() -> None:
    values = RESOLVED.to_json()
    del values["kernels"]
    assert ResolvedPlan.from_json(values).kernels == "none"
