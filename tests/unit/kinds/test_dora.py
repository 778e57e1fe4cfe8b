"""DoRA is PEFT's: it starts as the base, its norms are the weights' own, and a merge is what PEFT computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lorafit.contracts import Silent
from lorafit.errors import ModelError, NumericsError
from lorafit.kinds.adapters import _low_rank_fold, adapter_kind, adapters
from lorafit.kinds.adapters.dora import DoraFold
from lorafit.kinds.folding import AdaptedLayer
from lorafit.kinds.quantizations import quantizations
from lorafit.model.adapter import read_adapter, save_adapter
from lorafit.model.attach import attach_adapter, check_plan, open_adapter
from lorafit.model.base import Base
from lorafit.model.class_shape import find_shape
from lorafit.model.inspect import describe_quantization
from lorafit.model.merge import MergeReport, merge_adapter
from tests.support.adapted import load, logits, make_gpt2, make_llama, open_base

FAMILIES = {"llama": make_llama, "gpt2": make_gpt2}


def dora(**fields: Any) -> Any:
    return adapters.make_section("dora", **({"r": 4, "alpha": 8, "dropout": 0.0} | fields))


def train_like(model: Any) -> None:
    """Other directions and other norms, as training would give."""
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn_like(parameter) * 0.05
        if "magnitude" in name:
            parameter.data *= 1 + 0.2 * torch.randn_like(parameter)


def save(base: Base, kind: str, folder: Path) -> tuple[Any, dict[str, Any] | None]:
    model = attach_adapter(load(base, kind), dora(), 0)
    train_like(model)
    used = None
    if kind != "none":
        used = describe_quantization(model, quantizations.make_section(kind), dtype=torch.float32)
    folder.mkdir()
    save_adapter(model, folder, base=base, quantization=used)
    return model, used


def merge(base: Base, adapter: Path, used: dict[str, Any] | None, **other: Any) -> MergeReport:
    kind: Any = "original" if used is None else "dequantized"
    output = adapter.parent / "merged"
    return merge_adapter(base, adapter, output, kind=kind, quantization=used, reporter=Silent(), **other)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_starts_as_the_base_with_one_norm_an_output_feature(tmp_path: Path, family: str) -> None:
    base = open_base(FAMILIES[family](tmp_path / "base"))
    plain = load(base)
    before, weights = logits(plain), {name: value.clone() for name, value in plain.named_parameters()}
    model = attach_adapter(plain, dora(), 0)
    sites = adapters.bind(dora()).sites(find_shape(base.config))
    check_plan(model, sites, sum(site.parameters for site in sites))
    assert float((logits(model) - before).abs().max()) <= 1e-6
    norms = {name: value for name, value in model.named_parameters() if "magnitude" in name}
    assert len(norms) == sum(site.count for site in sites)
    for name, norm in norms.items():
        weight = weights[name.removeprefix("base_model.model.").split(".lora_")[0] + ".weight"]
        rows = weight.t() if family == "gpt2" else weight
        assert torch.allclose(norm, rows.norm(dim=1), rtol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merge_into_plain_weights_is_pefts(tmp_path: Path, family: str) -> None:
    base, adapter = open_base(FAMILIES[family](tmp_path / "base")), tmp_path / "adapter"
    save(base, "none", adapter)
    report = merge(base, adapter, None)
    assert report.verified and 0.0 < report.largest_error <= 1.0
    plain = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(plain, adapter).merge_and_unload().state_dict()
    ours = AutoModelForCausalLM.from_pretrained(report.output).state_dict()
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in theirs) <= 1e-6


@pytest.mark.parametrize(("kind", "rounding"), [("nf4", 1e-4), ("int8", 3e-2)])  # int8 rounds activations too
@pytest.mark.parametrize("family", FAMILIES)
def test_a_merge_into_codes_is_pefts_forward_over_them(tmp_path: Path, family: str, kind: str, rounding: float) -> None:
    base, adapter = open_base(FAMILIES[family](tmp_path / "base")), tmp_path / "adapter"
    model, used = save(base, kind, adapter)
    report = merge(base, adapter, used)
    assert report.proven and report.verified and report.largest_error <= 1.0
    merged, told = AutoModelForCausalLM.from_pretrained(report.output, attn_implementation="eager"), logits(model)
    assert float((logits(merged) - told).abs().max()) <= rounding
    opened = open_adapter(load(base, kind), adapter, base=base)
    assert torch.equal(logits(opened), told)
    assert torch.equal(logits(model), told), "each forward sees the scales of the weights"


def test_a_wrong_norm_is_seen_while_streaming(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = open_base(make_llama(tmp_path / "base")), tmp_path / "adapter"
    save(base, "none", adapter)
    apply = DoraFold.apply

    def longer(self: DoraFold, weight: torch.Tensor, first_row: int, out: torch.Tensor) -> None:
        apply(self, weight, first_row, out)
        out[0] *= 1 + 1e-5

    monkeypatch.setattr(DoraFold, "apply", longer)
    with pytest.raises(NumericsError, match="times the rounding bound"):
        merge(base, adapter, None)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("of_columns", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fold_is_the_formula_within_its_bound(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, of_columns: bool
) -> None:
    monkeypatch.setattr(_low_rank_fold, "_CACHED_ELEMENTS", 500)
    torch.manual_seed(0)
    weight = (torch.randn(70, 96) * 0.02).to(dtype)
    left, right = torch.randn(70, 4) * 0.1, torch.randn(4, 96) * 0.1
    changed = weight.double() - 1.5 * left.double() @ right.double()
    norms = changed.norm(dim=0 if of_columns else 1)
    lengths = torch.rand(len(norms)) + 0.5
    scales = lengths.double() / norms
    exact = changed * (scales if of_columns else scales[:, None])
    fold = DoraFold(left, right, -1.5, scales if of_columns else lengths, of_columns=of_columns)
    out = torch.empty_like(weight)
    for start, stop in ((0, 30), (30, 70)):
        fold.apply(weight[start:stop], start, out[start:stop])
    assert torch.allclose(out.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)
    assert 0.0 < fold.error(weight, out, 0) <= 1.0
    out[41, 17] *= 1 + (2.0**-6 if dtype is torch.bfloat16 else 1e-4)
    assert fold.error(weight, out, 0) > 1.0


def test_the_registry_tells_it_from_lora_by_its_config(tmp_path: Path) -> None:
    base = open_base(make_llama(tmp_path / "base"))
    save(base, "none", tmp_path / "adapter")
    saved = read_adapter(tmp_path / "adapter")
    assert saved.kind is adapters.get("dora") and saved.config["use_dora"] is True
    assert adapter_kind({"peft_type": "LORA", "use_dora": False}) is adapters.get("lora")
    entry = next(value for name, value in saved.tensors.items() if "magnitude" in name and "k_proj" in name)
    parts = {key: saved.tensors[f"base_model.model.model.layers.0.self_attn.q_proj.lora_{key}.weight"] for key in "AB"}
    home: Any = type("Home", (), {"key": "q_proj", "matrices": 1, "transposed": False})
    with pytest.raises(ModelError, match="has 64 norms for 128 output features"):
        saved.kind.folding(saved.config).shape(AdaptedLayer({**parts, "magnitude": entry}, home))
