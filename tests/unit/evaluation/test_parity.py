"""The merged model is compared with the adapter it came from, and a wrong one is noticed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lorafit.contracts import Example, Silent
from lorafit.errors import NumericsError
from lorafit.evaluation.parity import Parity, compare_merge, require_parity
from lorafit.kinds.tasks import tasks
from lorafit.model.merge import merge_adapter
from tests.support.adapted import Trained, logits, make_llama, open_base, train_like

ROWS = [[3, 4, 5, 6, 7, 8], [9, 10, 11], [12]]


def compare(made: Trained, merged: Any, rows: Sequence[Sequence[int]], trained: Sequence[int] | None = None) -> Parity:
    columns = [{"tokens": row, "trained": trained or [1] * len(row)} for row in rows]
    examples = [Example(number, row, "rows.jsonl", number + 1) for number, row in enumerate(columns)]
    task = tasks.make("causal-lm")
    return compare_merge(task.build_objective(made.model), task.build_objective(merged), examples, 0, Silent())


@pytest.fixture
def made(tmp_path: Path) -> Trained:
    return train_like(open_base(make_llama(tmp_path / "base")), "nf4")


def merge(made: Trained, kind: str) -> torch.nn.Module:
    output = made.base.path.parent / f"merged-{kind}"
    options = {"kind": kind, "quantization": made.quantization, "reporter": Silent()}
    merge_adapter(made.base, made.adapter, output, **options)  # type: ignore[arg-type]
    return AutoModelForCausalLM.from_pretrained(output, attn_implementation="eager")  # type: ignore[no-any-return]


def test_merged_into_what_was_trained_is_the_adapter(made: Trained) -> None:
    made.model.train()
    parity = compare(made, merge(made, "dequantized"), ROWS)
    assert made.model.training, "comparing changed the mode"
    assert (parity.rows, parity.tokens) == (2, 7)
    assert parity.mean_kl < 1e-6 and parity.max_logit_difference < 1e-4 and parity.top1_agreement == 1.0
    assert parity.merged_loss == pytest.approx(parity.adapter_loss, abs=1e-5)
    require_parity(parity)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_bf16_models_are_compared_in_fp32_and_left_as_they_were(tmp_path: Path, kind: str) -> None:
    made = train_like(open_base(make_llama(tmp_path / "base")), kind, dtype=torch.bfloat16)
    merged = merge(made, "dequantized")
    before = {name: p.detach().clone() for name, p in made.model.named_parameters()}
    parity = compare(made, merged, ROWS)
    assert parity.mean_kl < 2e-5 and parity.max_logit_difference < 0.02  # the merged weights' own rounding is left
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16} and merged.training is False
    after = dict(made.model.named_parameters())
    assert all(after[n].dtype is p.dtype and torch.equal(after[n], p) for n, p in before.items())
    layers = [m for m in made.model.modules() if hasattr(m, "compute_dtype")]
    assert all(layer.compute_dtype is torch.bfloat16 for layer in layers)


def test_an_int8_run_is_compared_without_8_bit_activations_on_a_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bitsandbytes multiplies with dequantised weights on a CPU alone, and only in training mode."""
    import bitsandbytes.autograd._functions as products

    def as_on_cuda(x: torch.Tensor, weight: object, bias: torch.Tensor | None, state: Any) -> torch.Tensor:
        return products.MatMul8bitLt.apply(x, weight, None, bias, state)  # type: ignore[no-any-return]

    made = train_like(open_base(make_llama(tmp_path / "base")), "int8")
    merged = merge(made, "dequantized")
    monkeypatch.setattr("bitsandbytes.matmul", as_on_cuda)
    before = logits(made.model)
    parity = compare(made, merged, ROWS)
    assert parity.mean_kl < 1e-6 and parity.max_logit_difference < 1e-5
    assert torch.equal(logits(made.model), before), "its own products are back"


def test_merged_into_other_weights_is_further_away(made: Trained) -> None:
    near = compare(made, merge(made, "dequantized"), ROWS)
    far = compare(made, merge(made, "original"), ROWS)
    assert far.mean_kl > 100 * max(near.mean_kl, 1e-9) and far.max_logit_difference > 0.01


def test_losses_are_the_models_own_over_the_trained_tokens(made: Trained) -> None:
    merged = merge(made, "dequantized")
    row, flags = [3, 4, 5, 6, 7], [0, 0, 1, 0, 1]
    parity = compare(made, merged, [row], flags)
    labels = torch.tensor([[token if flag else -100 for token, flag in zip(row, flags, strict=True)]])
    with torch.no_grad():
        own = float(merged(input_ids=torch.tensor([row]), labels=labels).loss)
    assert parity.merged_loss == pytest.approx(own, rel=1e-5)


def test_a_far_merge_ends_with_exit_9(made: Trained) -> None:
    parity = Parity(1, 900, 1.0, 0.021, 0.1, 0.9, 2.0, 2.1, clear_flips=4)
    with pytest.raises(NumericsError, match=r"mean KL 0.021 is above 0.02") as caught:
        require_parity(parity)
    assert caught.value.exit_code == 9
    with pytest.raises(NumericsError):
        require_parity(Parity(1, 9, 1.0, float("nan"), 0.1, 0.9, 2.0, 2.1))
    require_parity(Parity(1, 900, 1.0, 0.019, 0.1, 0.9, 2.0, 2.1, clear_flips=4))
    require_parity(parity, limit=0.05)


def test_a_few_distributions_are_held_to_what_the_adapter_does_to_them() -> None:
    """0.0206 over 8 rows of a classifier of four steps is a merge's rounding where the update makes 0.6."""

    def of_rows(mean_kl: float, update_kl: float | None, clear_flips: int = 0) -> Parity:
        return Parity(8, 8, 0.2, mean_kl, 0.1, 0.9, 0.6, 0.6, clear_flips, update_kl)

    require_parity(of_rows(0.0206, 0.6))
    require_parity(of_rows(0.001, None))
    for lost in (of_rows(0.0206, 0.1), of_rows(0.031, 0.6), of_rows(0.6, 0.6), of_rows(0.0206, None)):
        with pytest.raises(NumericsError, match="is above"):
            require_parity(lost)
    with pytest.raises(NumericsError, match="1 clear first choice of 8 changed"):
        require_parity(of_rows(0.0206, 0.6, clear_flips=1))


def test_what_the_update_does_is_measured_beside_a_merge_that_lost_it(made: Trained) -> None:
    """A merge that is the bare base: its KL is that of the whole update, and the adapter is left as it was."""
    flags = {name: parameter.requires_grad for name, parameter in made.model.named_parameters()}
    bare = merge(made, "dequantized")
    layers = dict(made.model.base_model.model.named_modules())
    with torch.no_grad():
        for name, module in bare.named_modules():
            if hasattr(layers.get(name), "lora_A"):
                module.weight -= layers[name].get_delta_weight("default")
        for parameter in (p for name, p in made.model.named_parameters() if "lora_B" in name):
            parameter *= 3
    parity = compare(made, bare, ROWS)
    assert parity.update_kl == pytest.approx(parity.mean_kl, rel=1e-3) and parity.mean_kl > 0.02
    assert {name: parameter.requires_grad for name, parameter in made.model.named_parameters()} == flags
    assert compare(made, bare, ROWS) == parity, "the adapter is still off"


def test_nothing_to_compare_and_broken_logits(made: Trained) -> None:
    merged = merge(made, "dequantized")
    with pytest.raises(NumericsError, match="no row"):
        compare(made, merged, [[3]])
    with torch.no_grad():
        merged.model.norm.weight[0] = float("nan")
    with pytest.raises(NumericsError, match="not finite"):
        compare(made, merged, ROWS)
