"""What adapters begin with, against each paper's equation and PEFT's own numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from lorafit.errors import LorafitError, RecipeError
from lorafit.kinds.adapters import adapters, begins_as_base
from lorafit.kinds.initialisations import initialisations
from lorafit.kinds.quantizations import kind_of_codes
from lorafit.model.adapter import CONFIG, adapter_tensors, save_adapter
from lorafit.model.attach import attach_adapter, load_adapter_weights, open_adapter
from lorafit.model.base import Base
from lorafit.model.class_shape import find_shape
from lorafit.recipe.load import load_recipe
from tests.support.adapted import begin, load, lora, make_gpt2, make_llama, open_base

QUANTIZATIONS = "none", "nf4", "int8"
CORRECTED = "pissa", "olora"
LAYER = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return open_base(make_llama(tmp_path_factory.mktemp("initialisations") / "base"))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model.eval()(torch.arange(1, 25).view(2, 12)).logits
    return found


def weight_of(model: Any, path: str = LAYER) -> torch.Tensor:
    """A base's weight as the model computes with it."""
    layer = model.get_base_model().get_submodule(path).get_base_layer()
    codes = kind_of_codes(layer)
    found: torch.Tensor = (layer.weight if codes is None else codes.unpack(layer)).detach().double()
    return found


def factors_of(model: Any, path: str = LAYER) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B as they are saved, both halves."""
    tensors = adapter_tensors(model)
    a, b = (tensors[f"base_model.model.{path}.lora_{part}.weight"].detach().double() for part in "AB")
    return a, b


@pytest.mark.parametrize("kind", QUANTIZATIONS)
@pytest.mark.parametrize("init", ["kaiming", "gaussian", "orthogonal", *CORRECTED])
def test_a_run_begins_with_what_its_base_computes(base: Base, init: str, kind: str) -> None:
    section = lora(init=init)
    model = begin(base, section, kind)
    wanted, found = logits(load(base, kind)), logits(model)
    if begins_as_base(section):
        assert torch.equal(found, wanted)
    else:
        assert (found - wanted).abs().max() < 2e-6 * wanted.abs().max()
    assert begins_as_base(section) == (init in ("kaiming", "gaussian"))
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert trained == sum(site.parameters for site in adapters.bind(section).sites(find_shape(base.config)))


def test_kaiming_changes_nothing(base: Base) -> None:
    """Recipes of before have no `init`: what they train must not change by a bit."""
    fresh, begun = attach_adapter(load(base), lora(), 0), begin(base, lora(init="kaiming"))
    for (name, value), other in zip(adapter_tensors(fresh).items(), adapter_tensors(begun).values(), strict=True):
        assert torch.equal(value, other), name


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_pissa_begins_with_the_principal_part(base: Base, kind: str) -> None:
    """Meng et al. 2024, equations 2 and 3: A and B of the r largest singular values, the root of them on each side."""
    model = begin(base, lora(init="pissa"), kind)
    weight, (a, b) = weight_of(model), factors_of(model)
    u, s, vh = torch.linalg.svd(weight)
    scaling, r = 8 / 4, 4
    principal = u[:, :r] @ torch.diag(s[:r]) @ vh[:r]
    assert torch.allclose(scaling * b[:, :r] @ a[:r], principal, atol=1e-5)
    assert torch.allclose(a[:r].square().sum(1), s[:r] / scaling, rtol=1e-4)
    assert torch.allclose(b[:, :r].square().sum(0), s[:r] / scaling, rtol=1e-4)
    assert torch.equal(a[r:], a[:r]) and torch.equal(b[:, r:], -b[:, :r])  # equation 4: the residual, W less that


def test_pissa_s_randomised_decomposition_comes_near(base: Base) -> None:
    exact, fast = (begin(base, lora(init={"kind": "pissa", "iterations": n})) for n in (None, 16))
    weight, parts = weight_of(exact), [2.0 * b[:, :4] @ a[:4] for a, b in map(factors_of, (exact, fast))]
    assert not torch.equal(*parts)
    left, near = ((weight - part).norm() for part in parts)
    assert left <= near < 1.01 * left


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_olora_begins_with_an_orthonormal_basis(base: Base, kind: str) -> None:
    """Büyükakyüz 2024, algorithm 1: B is Q's first r columns, A R's first r rows."""
    model = begin(base, lora(init="olora"), kind)
    (a, b), (q, r) = factors_of(model), torch.linalg.qr(weight_of(model))
    assert torch.allclose(b[:, :4].T @ b[:, :4], torch.eye(4, dtype=torch.float64), atol=1e-5)
    assert torch.allclose(b[:, :4] @ a[:4], q[:, :4] @ r[:4], atol=1e-5)
    assert torch.equal(a[4:], a[:4]) and torch.equal(b[:, 4:], -b[:, :4])


@pytest.mark.parametrize("init", CORRECTED)
def test_fp32_begins_with_peft_s_own_numbers(base: Base, init: str) -> None:
    plain = AutoModelForCausalLM.from_pretrained(base.path)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=init)  # type: ignore[arg-type]
    theirs, ours = get_peft_model(plain, config), begin(base, lora(init=init))
    for path, layer in theirs.get_base_model().named_modules():
        if hasattr(layer, "lora_A"):
            a, b = factors_of(ours, path)
            assert torch.equal(a[:4], layer.lora_A["default"].weight.double())
            assert torch.equal(b[:, :4], layer.lora_B["default"].weight.double())
            held = weight_of(ours, path) + 2.0 * b[:, 4:] @ a[4:]  # their base in memory, our base with the held half
            assert torch.allclose(held, layer.get_base_layer().weight.double(), atol=1e-6)


def test_gaussian_and_orthogonal_are_peft_s(base: Base) -> None:
    a, b = factors_of(begin(base, lora(init="gaussian", r=64, alpha=64)))
    assert a.std() == pytest.approx(1 / 64, rel=0.05) and not b.any()
    a, b = factors_of(begin(base, lora(init="orthogonal")))
    assert (b @ a).abs().max() < 1e-7 < min(a.abs().max(), b.abs().max())


def test_a_rank_that_cannot_be_is_refused(base: Base) -> None:
    shape = find_shape(base.config)
    for section, says in (
        (lora(init="orthogonal", r=3), "rank 3 is odd"),
        (lora(init="pissa", r=65), r"\[64, 128\] has 64 singular values, fewer than rank 65"),
    ):
        with pytest.raises(RecipeError, match=says):
            adapters.bind(section).sites(shape)


def test_going_on_from_an_adapter_takes_no_initialisation(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("name: x\nmodel: {base: b}\ndata: {train: a.jsonl}\n")
    with pytest.raises(LorafitError, match="init pissa and init_from both say what it begins with; keep one"):
        load_recipe(tmp_path / "r.yaml", ["adapter={init: pissa, init_from: a}"])


def train_a_little(model: Any) -> None:
    """A step that moves what is trained, and nothing else."""
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data += 0.02 * torch.randn_like(parameter)
            assert "lora_" in name


@pytest.mark.parametrize("kind", QUANTIZATIONS)
@pytest.mark.parametrize("init", CORRECTED)
def test_a_saved_adapter_is_a_plain_one_on_the_original_base(base: Base, tmp_path: Path, init: str, kind: str) -> None:
    model = begin(base, lora(init=init), kind)
    train_a_little(model)
    wanted = logits(model)
    save_adapter(model, tmp_path / "adapter", base=base)
    config = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    assert (config["r"], config["lora_alpha"], config["init_lora_weights"]) == (8, 16, True)
    assert torch.equal(logits(open_adapter(load(base, kind), tmp_path / "adapter", base=base)), wanted)
    if kind == "none":
        plain = AutoModelForCausalLM.from_pretrained(base.path, attn_implementation="eager")
        assert torch.equal(logits(PeftModel.from_pretrained(plain, tmp_path / "adapter")), wanted)
    fresh = attach_adapter(load(base, kind), lora(init=init), 5)  # a resume: both halves from the checkpoint
    load_adapter_weights(fresh, tmp_path / "adapter")
    assert torch.equal(logits(fresh), wanted)
    for (name, value), other in zip(fresh.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(value, other), name
        assert value.requires_grad == ("trained" in name)


def test_gradients_reach_the_trained_half_alone(base: Base) -> None:
    """They are those of the same part beside a base that was changed instead: W - s B0 A0, plain LoRA."""
    model = begin(base, lora(init="pissa"))
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights="pissa")
    theirs: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(base.path, attn_implementation="eager"), config)
    ids = torch.arange(1, 25).view(2, 12)
    for each in (model, theirs):
        each.train()
        each(ids, labels=ids).loss.backward()
    wanted = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    found = {name.replace("trained", "weight"): p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        assert torch.allclose(gradient, wanted[name], rtol=1e-3, atol=1e-6), name


@pytest.mark.parametrize("init", CORRECTED)
def test_weights_that_lie_across_and_trained_norms(base: Base, tmp_path: Path, init: str) -> None:
    """GPT-2's weights are [in, out]; DoRA's norms stay those of the base, which the product does not change."""
    across = open_base(make_gpt2(tmp_path / "gpt2"))
    assert (logits(begin(across, lora(init=init))) - logits(load(across))).abs().max() < 1e-5
    section = adapters.make_section("dora", r=4, alpha=8, dropout=0.0, init={"kind": init})
    assert (logits(begin(base, section)) - logits(load(base))).abs().max() < 1e-5


def test_every_initialisation_says_whether_it_corrects() -> None:
    assert {name for name, kind in initialisations.items() if kind.corrects} == set(CORRECTED)
    assert not [name for name, kind in initialisations.items() if kind.corrects and kind.starts_as_base]
