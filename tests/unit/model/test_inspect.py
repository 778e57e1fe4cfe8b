"""Counts equal what is published, and hashes change with a bit."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from lorafit.kinds.code_proofs import count_differences, sum_codes
from lorafit.kinds.quantizations import quantizations
from lorafit.model import inspect
from lorafit.model.attach import attach_adapter
from lorafit.model.base import Base
from lorafit.model.inspect import coverage, coverage_table, quantized_hashes
from tests.support.adapted import Trained, load, lora, make_gpt2, make_llama, open_base


@pytest.mark.parametrize("kind", ["none", "nf4", "int8"])
@pytest.mark.parametrize("family", ["tied", "untied", "gpt2"])
def test_totals_are_the_plain_models_whatever_the_storage(tmp_path: Path, kind: str, family: str) -> None:
    folder = tmp_path / "base"
    base = open_base(make_gpt2(folder) if family == "gpt2" else make_llama(folder, tied=family == "tied"))
    plain = AutoModelForCausalLM.from_pretrained(base.path)
    model = attach_adapter(load(base, kind), lora(), 0)
    found = coverage(model)
    assert found.total_parameters == plain.num_parameters()
    trainable, _ = model.get_nb_trainable_parameters()
    assert found.trainable_parameters == trainable
    assert found.trainable_percent == pytest.approx(100 * trainable / plain.num_parameters())
    linears = sum(k.parameters for k in found.kinds if k.adapted)
    biases = sum(p.numel() for n, p in plain.named_parameters() if n.endswith("bias") and ".c_" in n)
    assert found.quantised_parameters == (linears - biases if kind != "none" else 0)
    assert all(k.adapted == k.count for k in found.kinds if k.trainable)
    assert coverage(load(base, kind)).total_parameters == plain.num_parameters()


def test_partial_coverage_shows(llama: Base) -> None:
    model = attach_adapter(load(llama, "nf4"), lora(target_modules=["q_proj", "v_proj"]), 0)
    found = coverage(model)
    assert {k.name for k in found.kinds if k.adapted} == {"q_proj", "v_proj"}
    assert {k.name for k in found.kinds if k.quantised} > {"up_proj", "q_proj"}
    stream = io.StringIO()
    Console(file=stream, width=120).print(coverage_table(found))
    assert f"{found.trainable_parameters:,} of {found.total_parameters:,}" in stream.getvalue()
    assert "down_proj" in stream.getvalue()


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_hashes_are_repeatable_and_see_a_bit(llama: Base, kind: str) -> None:
    model = load(llama, kind)
    before = quantized_hashes(model)
    adapted = attach_adapter(load(llama, kind), lora(), 0)
    assert quantized_hashes(adapted) == before and len(before) == 14
    weight = model.model.layers[1].mlp.down_proj.weight
    weight.data.view(torch.uint8).reshape(-1)[7] ^= 4
    after = quantized_hashes(model)
    changed = [name for name in before if before[name] != after[name]]
    assert changed == ["model.layers.1.mlp.down_proj"]
    if kind == "nf4":
        one, other = before[changed[0]], after[changed[0]]
        assert one["constants"] == other["constants"] and one["codes"] != other["codes"]
        assert count_differences(one["code_sums"], other["code_sums"]) == 4
        weight.quant_state.offset += 1e-3
        assert quantized_hashes(model)[changed[0]]["offset"] != one["offset"]


def test_sums_count_levels_over_stretches() -> None:
    codes = torch.randint(0, 256, (30_000,), dtype=torch.uint8)
    other = codes.clone()
    other[5] = (int(codes[5]) & 0xF0) | ((int(codes[5]) & 15) ^ 1)  # one level up or down
    other[20_000] ^= 16
    assert count_differences(sum_codes(codes, packed=True), sum_codes(other, packed=True)) == 2
    assert count_differences(sum_codes(codes, packed=True), sum_codes(codes[:-9000], packed=True)) > 2**40


def test_describe_is_what_the_run_stores(trained: Callable[..., Trained]) -> None:
    used = trained("nf4").quantization
    assert used is not None
    assert (used["kind"], used["double_quant"], used["weights_dtype"], used["device"]) == (
        "nf4",
        True,
        "float32",
        "cpu",
    )
    assert len(used["digest"]) == 64 and len(used["tensors"]) == 14


def test_on_a_card_codes_are_hashed_while_it_works_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, which has no other work, before anything else; what goes wrong comes out where the hashes are asked."""
    may_hash, threads = threading.Event(), []

    def describe(model: Any, section: Any, *, dtype: torch.dtype) -> dict[str, Any]:
        threads.append(threading.current_thread())
        if model.on.type == "cuda" and not may_hash.wait(20):
            raise TimeoutError
        if section is None:
            raise MemoryError
        return {"digest": str(dtype)}

    def holding(kind: str) -> Any:
        on = torch.device(kind)
        return SimpleNamespace(on=on, parameters=lambda: iter([SimpleNamespace(device=on)]))

    monkeypatch.setattr(inspect, "describe_quantization", describe)
    section = quantizations.make_section("nf4")
    wait = inspect.describing_quantization(holding("cuda"), section, dtype=torch.float16)
    fails = inspect.describing_quantization(holding("cuda"), None, dtype=torch.float16)  # type: ignore[arg-type]
    may_hash.set()
    assert wait() == wait() == {"digest": "torch.float16"}
    with pytest.raises(MemoryError):
        fails()
    assert threading.main_thread() not in threads
    inspect.describing_quantization(holding("cpu"), section, dtype=torch.float16)
    assert threads[-1] is threading.main_thread()
