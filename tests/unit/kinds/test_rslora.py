"""rsLoRA is LoRA scaled by equation 4 of Kalajdzievski 2023, and PEFT's with `use_rslora`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lorafit.contracts import Silent
from lorafit.kinds.adapters import adapter_kind, adapters
from lorafit.model.adapter import read_adapter, save_adapter
from lorafit.model.attach import attach_adapter, check_plan, open_adapter
from lorafit.model.class_shape import find_shape
from lorafit.model.merge import merge_adapter
from tests.support.adapted import load, logits, make_llama, open_base, randomise


def rslora(**fields: Any) -> Any:
    return adapters.make_section("rslora", **({"r": 4, "alpha": 6.0, "dropout": 0.0} | fields))


@pytest.mark.parametrize("rank", [4, 16])
def test_equation_4(rank: int, tmp_path: Path) -> None:
    """W' = W + (alpha / sqrt(r)) B A."""
    base = open_base(make_llama(tmp_path / "base"))
    model = attach_adapter(load(base), rslora(r=rank), 0)
    randomise(model)
    sites = adapters.bind(rslora(r=rank)).sites(find_shape(base.config))
    check_plan(model, sites, sum(site.parameters for site in sites))
    layer = model.base_model.model.model.layers[1].mlp.down_proj
    x = torch.randn(3, layer.in_features)
    weight, a, b = layer.base_layer.weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        assert torch.allclose(layer(x), x @ (weight + 6.0 / math.sqrt(rank) * b @ a).t(), atol=1e-6)


def test_what_is_saved_is_opened_and_merged_as_peft_does(tmp_path: Path) -> None:
    base, adapter = open_base(make_llama(tmp_path / "base")), tmp_path / "adapter"
    model = attach_adapter(load(base), rslora(), 0)
    randomise(model)
    save_adapter(model, adapter, base=base)
    assert read_adapter(adapter).kind is adapters.get("rslora")
    assert torch.equal(logits(open_adapter(load(base), adapter, base=base)), logits(model))
    plain = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32, attn_implementation="eager")
    theirs = PeftModel.from_pretrained(plain, adapter)
    assert torch.equal(logits(theirs), logits(model))
    report = merge_adapter(base, adapter, tmp_path / "merged", kind="original", quantization=None, reporter=Silent())
    ours = AutoModelForCausalLM.from_pretrained(report.output).state_dict()
    merged = theirs.merge_and_unload().state_dict()
    assert report.verified
    assert max(float((ours[name] - merged[name]).abs().max()) for name in merged) <= 1e-6


def test_a_scaled_dora_stays_a_dora() -> None:
    """Whose folding knows both; a file of an older PEFT does not name what is off."""
    assert adapter_kind({"peft_type": "LORA", "use_rslora": True, "use_dora": True}) is adapters.get("dora")
    assert adapter_kind({"peft_type": "LORA", "use_rslora": True}) is adapters.get("rslora")
    assert adapter_kind({"peft_type": "LORA", "use_rslora": False}) is adapters.get("lora")
