"""Liger's kernels compute what lorafit's own operations do, and the same gradients, in Triton's interpreter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.launches import LAUNCHES, launches_on_a_card
from lorafit.model.fuse import fuse_layers
from lorafit.ops.cross_entropy import linear_cross_entropy
from lorafit.ops.kernel_proof import TOLERANCE, prove_kernels
from lorafit.ops.kernels import PLAIN, Kernels
from lorafit.ops.layer_functions import rms_norm, rotate, silu_product
from lorafit.ops.liger import LIGER
from lorafit.ops.lora_gated import lora_gated
from lorafit.ops.lora_linear import AdaptedWeight, lora_linear
from tests.support.interpreted_triton import teach, why_not
from tests.support.tiny_model import tiny_llama

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())
CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.float16)


@pytest.fixture(scope="module")
def liger() -> Kernels:
    teach()
    return LIGER


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_proof_at_start_leaves_nothing_out(liger: Kernels, dtype: torch.dtype) -> None:
    assert prove_kernels(liger, PLAIN, CPU, dtype) == (liger, {})


def random(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.randn(*shape).to(dtype)


def norm(kernels: Kernels, dtype: torch.dtype) -> tuple[Callable[..., Any], Sequence[torch.Tensor]]:
    weight = random(dtype, 48)
    return lambda x: rms_norm(x, weight, 1e-5, kernels), [random(dtype, 2, 7, 48)]


def head_norm(kernels: Kernels, dtype: torch.dtype) -> tuple[Callable[..., Any], Sequence[torch.Tensor]]:
    """Of queries, whose heads do not follow each other in memory."""
    weight = random(dtype, 16)
    return lambda x: rms_norm(x.transpose(1, 2), weight, 1e-5, kernels), [random(dtype, 2, 4, 5, 16)]


def gated(kernels: Kernels, dtype: torch.dtype) -> tuple[Callable[..., Any], Sequence[torch.Tensor]]:
    return lambda gate, up: silu_product(gate, up, kernels), [random(dtype, 2, 7, 40), random(dtype, 2, 7, 40)]


def mlp(kernels: Kernels, dtype: torch.dtype) -> tuple[Callable[..., Any], Sequence[torch.Tensor]]:
    """A whole one: gradients of gate and up come where these lay, after the last linear has multiplied them again."""
    gate, up, down = random(dtype, 40, 16) / 4, random(dtype, 40, 16) / 4, random(dtype, 16, 40) / 6

    def run(x: torch.Tensor, *ab: torch.Tensor) -> torch.Tensor:
        first, second, last = (
            AdaptedWeight(a, b, weight, None, None, 0.5)
            for a, b, weight in zip(ab[::2], ab[1::2], (gate, up, down), strict=True)
        )
        product, factors = lora_gated(x, first, second, kernels)
        return lora_linear(product, None, last, factors, kernels)

    shapes = [(4, 16), (40, 4), (4, 16), (40, 4), (4, 40), (16, 4)]
    return run, [random(dtype, 2, 7, 16), *(random(dtype, *shape) / 4 for shape in shapes)]


def rotation(kernels: Kernels, dtype: torch.dtype) -> tuple[Callable[..., Any], Sequence[torch.Tensor]]:
    angles = (6 * torch.rand(2, 1, 7, 8)).repeat(1, 1, 1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)

    def run(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, ...]:
        before = (q * 1).transpose(1, 2), (k * 1).transpose(1, 2)  # as projections lay them out
        return *rotate(*before, cos, sin, kernels), *before  # what was rotated is as it was

    return run, [random(dtype, 2, 7, 4, 16), random(dtype, 2, 7, 2, 16)]


def loss(kernels: Kernels, dtype: torch.dtype) -> tuple[Callable[..., Any], Sequence[torch.Tensor]]:
    """In several chunks, of which the last is shorter."""
    head, labels = random(dtype, 90, 16) / 2, torch.arange(11) * 7 % 90
    return lambda hidden: linear_cross_entropy(hidden, head, None, labels, 4 * 90 * 4, kernels) / 11, [
        random(dtype, 11, 16)
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operation", [norm, head_norm, gated, mlp, rotation, loss])
def test_values_and_gradients_are_lorafits_own(
    liger: Kernels, operation: Callable[..., Any], dtype: torch.dtype
) -> None:
    results = []
    for kernels in (PLAIN, liger):
        torch.manual_seed(0)
        run, operands = operation(kernels, dtype)
        leaves = [operand.requires_grad_() for operand in operands]
        made = run(*leaves)
        outputs = [made] if isinstance(made, torch.Tensor) else list(made)
        gradients = torch.autograd.grad(sum(output.float().cos().sum() for output in outputs), leaves)
        results.append([*(output.detach() for output in outputs), *gradients])
    for ours, ligers in zip(*results, strict=True):
        assert ours.dtype == ligers.dtype and ours.shape == ligers.shape
        assert (ours.float() - ligers.float()).abs().max() <= TOLERANCE[dtype] * ours.float().abs().max()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_trains_as_with_lorafits_own(liger: Kernels, checkpointing: bool) -> None:
    results = []
    for kernels in (PLAIN, liger):
        torch.manual_seed(0)
        settings = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "init_lora_weights": False}
        model: Any = get_peft_model(tiny_llama(seed=None), LoraConfig(**settings)).train()
        assert fuse_layers(model, kernels) == {"lora": 14, "norms": 5, "gated": 2, "rotary": 2}
        if checkpointing:
            model.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        ids = torch.arange(24).view(2, 12) % 97
        value = model(input_ids=ids, labels=ids, use_cache=False).loss
        value.backward()
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        results.append((value.item(), torch.cat(gradients)))
    (own, own_gradients), (ligers, ligers_gradients) = results
    assert ligers == pytest.approx(own, rel=1e-6)
    assert (own_gradients - ligers_gradients).norm() < 1e-5 * own_gradients.norm()


def test_angles_whose_halves_differ_are_left_to_lorafits_own(liger: Kernels) -> None:
    """Liger reads the first half alone."""
    from transformers.models.llama import modeling_llama

    from lorafit.model.proven_forwards import _fuse_rotary

    q, k, cos, sin = torch.randn(1, 2, 5, 16), torch.randn(1, 1, 5, 16), torch.randn(1, 5, 16), torch.randn(1, 5, 16)
    theirs = modeling_llama.apply_rotary_pos_emb(q, k, cos, sin)
    ours = _fuse_rotary(modeling_llama.apply_rotary_pos_emb, liger)(q, k, cos, sin)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(theirs, ours, strict=True))


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Triton's kernels and torch's, copies apart, that run inside."""
    from triton.runtime.interpreter import GridExecutor

    counts: Counter[str] = Counter()
    run = GridExecutor.__call__

    def counted(self: Any, *arguments: Any, **options: Any) -> None:
        counts["triton"] += 1
        paused, counts["paused"] = counts["paused"], 1
        run(self, *arguments, **options)
        counts["paused"] = paused

    class Operations(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
            if not counts["paused"] and launches_on_a_card(function):
                counts["copies" if "clone" in function.name() else "torch"] += 1
            return function(*arguments, **(options or {}))

    monkeypatch.setattr(GridExecutor, "__call__", counted)
    with Operations():
        yield counts


def test_it_launches_what_the_benchmark_counts(liger: Kernels, launched: Counter[str]) -> None:
    x, weight = torch.zeros(6, 32), torch.zeros(32)
    q, k, angles = torch.zeros(1, 2, 6, 16), torch.zeros(1, 1, 6, 16), torch.zeros(1, 1, 6, 16)
    scale, labels = torch.zeros(6), torch.zeros(6, dtype=torch.int64)
    calls = {
        "norm": lambda: liger.norm(x, weight, 1e-5),
        "norm_backward": lambda: liger.norm_backward(x, x, weight, scale),
        "multiply_silu": lambda: liger.multiply_silu(x, x),
        "differentiate_silu": lambda: liger.differentiate_silu(x, x, x),
        "rotate": lambda: liger.rotate(q, k, angles, angles, False),
        "logit_errors": lambda: liger.logit_errors(x, labels, True),
    }
    assert calls.keys() == LAUNCHES["liger"].keys()
    for name, call in calls.items():
        launched.clear()
        call()
        assert launched["triton"] + launched["torch"] == LAUNCHES["liger"][name], name
        assert launched["copies"] == (2 if name == "rotate" else 0), name
