"""Chunked cross-entropy equals the naive one in value and gradient, whatever is trained and however it is cut."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from lorafit.ops import chunk_sizes as pieces
from lorafit.ops.cross_entropy import linear_cross_entropy, linear_label_losses, score_linear, score_logits


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 3 labels for a vocabulary of 11, so that 7 labels take three chunks, the last one short."""
    monkeypatch.setitem(pieces.LOGITS_CHUNK_BYTES, "cpu", 3 * 4 * 11)


def operands(dtype: torch.dtype, labels: int = 7) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(labels, 5, dtype=dtype, requires_grad=True)
    weight = torch.randn(11, 5, dtype=dtype, requires_grad=True)
    bias = torch.randn(11, dtype=dtype, requires_grad=True)
    return hidden, weight, bias, torch.randint(0, 11, (labels,))


@pytest.mark.parametrize("with_bias", [True, False])
def test_gradcheck_in_fp64(with_bias: bool) -> None:
    hidden, weight, bias, labels = operands(torch.float64)
    assert pieces.chunk_labels(11, "cpu") == 3
    arguments = (hidden, weight, bias if with_bias else None, labels)
    assert torch.autograd.gradcheck(linear_cross_entropy, arguments)


def test_chunks_are_as_large_as_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    real = functional.linear

    def counted(states: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        sizes.append(len(states))
        return real(states, *others)

    monkeypatch.setattr(functional, "linear", counted)
    of_five = 5 * 4 * 11
    for chunked in (linear_cross_entropy, linear_label_losses, score_linear):
        for bytes_of, expected in ((None, [3, 3, 1]), (of_five, [5, 2])):
            sizes.clear()
            chunked(*operands(torch.float32), bytes_of)
            assert sizes == expected, chunked


@pytest.mark.parametrize(
    ("gib", "mib"), [(8, None), (15.8, None), (22.0, 256), (23.6, 256), (47.5, 256), (79.1, 512), (139, 512)]
)
def test_larger_cards_take_larger_chunks(gib: float, mib: int | None) -> None:
    assert pieces.larger_chunk_bytes(round(gib * 2**30)) == (mib and mib * 2**20)


@pytest.mark.parametrize("trained", ["hidden", "weight", "bias", "all"])
def test_equals_naive(trained: str) -> None:
    hidden, weight, bias, labels = operands(torch.float64)
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        tensor.requires_grad_(trained in (name, "all"))
    used = [t for t in (hidden, weight, bias) if t.requires_grad]
    logits = functional.linear(hidden, weight, bias)
    naive = functional.cross_entropy(logits, labels, reduction="sum")
    loss_sum = linear_cross_entropy(hidden, weight, bias, labels)
    torch.testing.assert_close(loss_sum, naive)
    wanted = torch.autograd.grad(naive * 0.3, used)
    for ours, theirs in zip(torch.autograd.grad(loss_sum * 0.3, used), wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_each_labels_loss_has_a_gradient_of_its_own(dtype: torch.dtype) -> None:
    """Whatever each is scaled by afterwards; and the values are those that a score has, to the last bit."""
    *used, labels = operands(dtype)
    losses, scales = linear_label_losses(*used, labels), torch.linspace(-1.0, 2.0, len(labels), dtype=dtype)
    assert torch.equal(losses.detach(), score_linear(*used, labels)[0])
    naive = functional.cross_entropy(functional.linear(*used), labels, reduction="none")
    wanted = torch.autograd.grad((naive * scales).sum(), used)
    for ours, theirs in zip(torch.autograd.grad((losses * scales).sum(), used), wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_bf16_sums_in_fp32() -> None:
    hidden, weight, _, labels = operands(torch.bfloat16, labels=2000)
    loss_sum = linear_cross_entropy(hidden, weight, None, labels)
    naive = functional.cross_entropy((hidden @ weight.T).float(), labels, reduction="sum")
    assert loss_sum.dtype == torch.float32
    torch.testing.assert_close(loss_sum, naive, rtol=1e-5, atol=0)


def test_autocast_decides_the_dtype() -> None:
    hidden, weight, bias, labels = operands(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss_sum = linear_cross_entropy(hidden, weight, bias, labels)
        naive = functional.cross_entropy(functional.linear(hidden, weight, bias).float(), labels, reduction="sum")
    torch.testing.assert_close(loss_sum, naive)
    loss_sum.backward()
    assert hidden.grad is not None and hidden.grad.dtype == torch.float32


def test_a_large_loss_scale_does_not_overflow_fp16() -> None:
    hidden, weight, _, labels = operands(torch.float16)
    loss_sum = linear_cross_entropy(hidden * 0.01, weight * 0.01, None, labels)
    (loss_sum * 2.0**17).backward()  # more than fp16 holds; its product with the gradient here is not
    assert hidden.grad is not None and bool(torch.isfinite(hidden.grad).all())


def test_score_gives_each_label() -> None:
    hidden, weight, bias, labels = operands(torch.float32)
    losses, correct = score_linear(hidden, weight, bias, labels)
    logits = functional.linear(hidden, weight, bias)
    torch.testing.assert_close(losses, functional.cross_entropy(logits, labels, reduction="none"))
    assert correct.tolist() == (logits.argmax(-1) == labels).tolist()
    empty = score_linear(hidden[:0], weight, bias, labels[:0])
    assert empty[0].shape == (0,) and empty[1].dtype == torch.bool


def test_runs_on_fake_tensors() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        hidden, weight = torch.randn(9, 5, requires_grad=True), torch.randn(11, 5)
        loss_sum = linear_cross_entropy(hidden, weight, None, torch.zeros(9, dtype=torch.long))
        loss_sum.backward()
        assert hidden.grad is not None and hidden.grad.shape == (9, 5)


class LogitsOfLosses(TorchFunctionMode):
    """Keeps the shape and dtype of what each cross-entropy is computed from."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[tuple[int, ...], torch.dtype]] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if function is functional.cross_entropy:
            self.seen.append((tuple(args[0].shape), args[0].dtype))
        return function(*args, **(kwargs or {}))


def test_logits_that_exist_are_scored_a_chunk_at_a_time() -> None:
    """fp32 copies of all logits of a micro-batch would be the peak of an evaluation of a large vocabulary."""
    hidden, weight, _, labels = operands(torch.bfloat16)
    logits = (hidden @ weight.T).detach()
    with LogitsOfLosses() as losses:
        found, correct = score_logits(logits, labels)
    assert losses.seen == [((3, 11), torch.float32), ((3, 11), torch.float32), ((1, 11), torch.float32)]
    assert torch.equal(found, functional.cross_entropy(logits.float(), labels, reduction="none"))
    assert torch.equal(correct, logits.argmax(-1) == labels)
    assert score_logits(logits[:0], labels[:0])[0].shape == (0,)
