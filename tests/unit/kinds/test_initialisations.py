"""What adapters begin with, against each paper's equation and PEFT's own numbers."""

from __future__ import annotations

import dataclasses
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from lorafit.contracts import Example, Silent
from lorafit.errors import DataError, LorafitError, RecipeError
from lorafit.kinds.adapters import adapters, begins_as_base
from lorafit.kinds.initialisations import initialisations
from lorafit.kinds.quantizations import kind_of_codes
from lorafit.kinds.tasks import tasks
from lorafit.model.adapter import CONFIG, adapter_tensors, save_adapter
from lorafit.model.attach import attach_adapter, load_adapter_weights, open_adapter
from lorafit.model.base import Base
from lorafit.model.class_shape import find_shape
from lorafit.ops.live_tensors import LiveTensors
from lorafit.recipe.load import load_recipe
from lorafit.trainer import first_values
from tests.support.adapted import begin, load, lora, make_gpt2, make_llama, open_base
from tests.support.tiny_run import VOCABULARY, Rows, tiny_model

QUANTIZATIONS = "none", "nf4", "int8"
CORRECTED = "pissa", "olora"
BY_ROWS = "eva", "corda"
LAYER = "model.layers.0.self_attn.q_proj"
SOME = ["q_proj", "k_proj", "down_proj"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return open_base(make_llama(tmp_path_factory.mktemp("initialisations") / "base", vocab_size=VOCABULARY))


def some(**fields: Any) -> Any:
    """LoRA on a few of the linears, where those are enough."""
    return lora(target_modules=SOME, **fields)


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
    exact, fast = (begin(base, some(init={"kind": "pissa", "iterations": n})) for n in (None, 16))
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


@pytest.mark.parametrize("kind", ["rslora", "lora_plus", "lora_fa"])
def test_other_scales_rates_and_frozen_halves(base: Base, tmp_path: Path, kind: str) -> None:
    """A scale of alpha / sqrt(r), a rate of B's own and an A that is frozen: each with a part of the base."""
    section = adapters.make_section(kind, r=4, alpha=8.0, dropout=0.0, init={"kind": "pissa"}, ranks={"down_proj": 8})
    model = begin(base, section)
    assert (logits(model) - logits(load(base))).abs().max() < 1e-5
    u, s, vh = torch.linalg.svd(weight_of(model))
    (a, b), scaling = factors_of(model), 8 / 2 if kind == "rslora" else 8 / 4
    assert torch.allclose(scaling * b[:, :4] @ a[:4], u[:, :4] @ torch.diag(s[:4]) @ vh[:4], atol=1e-5)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert trained == sum(site.parameters for site in adapters.bind(section).sites(find_shape(base.config)))
    train_a_little(model)
    save_adapter(model, tmp_path / "adapter", base=base)
    assert torch.equal(logits(open_adapter(load(base), tmp_path / "adapter")), logits(model))


ROWS = Rows(10)  # of 5 to 40 tokens


def inputs_of(base: Base, path: str, rows: Sequence[int]) -> list[torch.Tensor]:
    """What a layer gets of each row, in fp64."""
    model, found = load(base), list[torch.Tensor]()
    model.get_submodule(path).register_forward_pre_hook(lambda _, arguments: found.append(arguments[0][0].double()))
    with torch.no_grad():
        for row in rows:
            model.eval()(torch.tensor([ROWS.ids[row]]))
    return found


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_eva_begins_with_what_layers_see_most_of(base: Base, kind: str) -> None:
    """Paischer et al. 2024, section 3.1: A is V_r^T of the inputs, so no r directions explain more of them."""
    section = some(init={"kind": "eva", "rows": 10})
    model = begin(base, section, kind, rows=ROWS)
    assert torch.equal(logits(model), logits(load(base, kind))) and begins_as_base(section)
    path = "model.layers.1.mlp.down_proj"
    inputs = torch.cat(inputs_of(base, path, range(10)))
    inputs -= inputs.mean(0)
    a, b = factors_of(model, path)
    _, s, vh = torch.linalg.svd(inputs, full_matrices=False)
    explained = (inputs @ a.T).square().sum(0) / inputs.square().sum()
    best = s[:4].square() / s.square().sum()
    assert torch.allclose(explained, best, rtol=0.05 if kind == "none" else 0.15) and not b.any()
    assert torch.allclose(a @ a.T, torch.eye(4, dtype=torch.float64), atol=1e-5)
    queries, keys = (factors_of(model, f"model.layers.1.self_attn.{name}_proj")[0] for name in "qk")
    assert torch.equal(queries, keys)  # of the same inputs, looked at once
    drawn, _ = factors_of(begin(base, some()), path)
    orthonormal = torch.linalg.qr(drawn.T).Q.T
    assert (inputs @ orthonormal.T).square().sum() < 0.5 * (inputs @ a.T).square().sum()
    assert best.sum() == pytest.approx(float(explained.sum()), rel=0.1) and torch.linalg.norm(vh[:4] @ a.T) > 1.8


def test_eva_s_numbers_are_peft_s(base: Base) -> None:
    """PEFT goes over the rows again and again until nothing moves, here there is one pass."""
    from peft import EvaConfig
    from peft.tuners.lora.eva import get_eva_state_dict

    model = begin(base, some(init={"kind": "eva", "rows": 10}), rows=ROWS)
    eva: Any = {"init_lora_weights": "eva", "eva_config": EvaConfig(rho=1.0)}  # which keeps the ranks
    config = LoraConfig(r=4, lora_alpha=8, target_modules=SOME, **eva)
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(base.path, attn_implementation="eager"), config)
    order = random.Random(0).sample(range(10), 10)
    batches = [{"input_ids": torch.tensor([ROWS.ids[row]])} for row in order]
    found = get_eva_state_dict(theirs, batches, show_progress_bar=False)
    for path in (LAYER, "model.layers.1.mlp.down_proj"):
        ours, wanted = factors_of(model, path)[0], found[f"base_model.model.{path}"].double()
        inputs = torch.cat(inputs_of(base, path, range(10)))
        held = [(inputs - inputs.mean(0)) @ a.T for a in (ours, wanted)]
        assert held[0].norm() == pytest.approx(float(held[1].norm()), rel=0.01), path
        assert torch.linalg.svdvals(ours @ wanted.T).median() > 0.95, path


def test_eva_needs_as_many_tokens_as_ranks(base: Base) -> None:
    with pytest.raises(DataError, match=r"eva looked at \d+ tokens, and rank 48 takes as many at least; raise it"):
        begin(base, some(init={"kind": "eva", "rows": 1}, r=48), rows=ROWS)


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_loftq_leaves_less_of_what_quantisation_took(base: Base, kind: str) -> None:
    """Li et al. 2023, equation 6: min ||W - Q - s B A||_F, which falls with every rank more."""
    original, found = load(base).get_submodule(LAYER).weight.double(), list[float]()
    for r in (1, 8, 64):
        model = begin(base, some(init="loftq", r=r, alpha=2 * r), kind)
        a, b = factors_of(model)
        lost = original - weight_of(model)
        found.append(float((lost - 2.0 * b @ a).norm() / lost.norm()))
        best = torch.linalg.svdvals(lost)[r:].norm() / lost.norm()
        assert found[-1] == pytest.approx(float(best), abs=1e-5)  # no A and B of this rank leave less
    assert found == sorted(found, reverse=True) and found[0] < 0.99 and found[-1] < 0.6


def test_loftq_comes_nearer_to_what_the_base_was(base: Base, tmp_path: Path) -> None:
    wanted, plain = logits(load(base)), logits(load(base, "nf4"))
    section = lora(init="loftq", r=32, alpha=32)
    model = begin(base, section, "nf4")
    assert (logits(model) - wanted).norm() < 0.8 * (plain - wanted).norm() and not begins_as_base(section)
    near = begin(base, lora(init={"kind": "loftq", "iterations": 8}, r=32, alpha=32), "nf4")
    assert (logits(near) - logits(model)).norm() < 0.2 * (plain - wanted).norm()
    save_adapter(model, tmp_path / "adapter", base=base)
    assert torch.equal(logits(open_adapter(load(base, "nf4"), tmp_path / "adapter")), logits(model))
    dora = begin(base, adapters.make_section("dora", r=32, alpha=32, dropout=0.0, init={"kind": "loftq"}), "nf4")
    assert torch.allclose(logits(dora), logits(model), atol=1e-5)  # norms are those of Q + s B A


def test_loftq_wants_a_quantised_base(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("name: x\nmodel: {base: b, quantization: none}\ndata: {train: a.jsonl}\n")
    with pytest.raises(LorafitError, match="loftq begins with what quantisation took from a weight"):
        load_recipe(tmp_path / "r.yaml", ["adapter.init=loftq"])


@pytest.mark.parametrize("kind", QUANTIZATIONS)
@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_corda_begins_with_directions_by_use(base: Base, mode: str, kind: str) -> None:
    """Yang et al. 2024, equations 2 to 4: W C = U S V^T, and W = U S (V^T C^-1) is parted by S."""
    model = begin(base, some(init={"kind": "corda", "mode": mode, "rows": 10}), kind, rows=ROWS)
    assert (logits(model) - logits(load(base, kind))).abs().max() < 1e-5
    weight, (a, b) = weight_of(model), factors_of(model)
    assert torch.equal(a[4:], a[:4]) and torch.equal(b[:, 4:], -b[:, :4])
    if kind != "none":
        return  # other inputs, of a quantised model
    rows = [x / x.max().abs() for x in inputs_of(base, LAYER, range(10))]
    covariance = torch.stack([x.T @ x for x in rows]).mean(0)
    covariance += 0.01 * covariance.diag().mean() * torch.eye(len(covariance))  # so that it has an inverse
    u, s, vh = torch.linalg.svd(weight @ covariance, full_matrices=False)
    chosen = slice(4) if mode == "ipm" else slice(len(s) - 4, None)
    wanted = u[:, chosen] @ torch.diag(s[chosen]) @ vh[chosen] @ covariance.inverse()
    assert torch.allclose(2.0 * b[:, :4] @ a[:4], wanted, rtol=1e-2, atol=2e-3)


def test_corda_s_numbers_are_peft_s(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "attr", SimpleNamespace(dataclass=dataclasses.dataclass))  # not installed
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    model = begin(base, some(init={"kind": "corda", "rows": 10}), rows=ROWS)
    plain = AutoModelForCausalLM.from_pretrained(base.path, attn_implementation="eager")
    corda: Any = {"init_lora_weights": "corda", "corda_config": CordaConfig(corda_method="ipm")}
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], **corda)
    order = random.Random(0).sample(range(10), 10)
    preprocess_corda(plain, config, lambda: [plain(torch.tensor([ROWS.ids[row]])) for row in order])
    theirs = get_peft_model(plain, config)
    layer = theirs.get_base_model().get_submodule(LAYER)
    a, b = factors_of(model)
    made = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    assert torch.allclose(b[:, :4] @ a[:4], made.double(), atol=1e-4)


def test_layers_take_turns_where_their_covariances_have_no_room(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    section = some(init={"kind": "corda", "rows": 3})
    together = adapter_tensors(begin(base, section, rows=ROWS))
    monkeypatch.setattr("lorafit.kinds.initialisations.corda._COVARIANCES_BYTES", 4 * 192**2)
    for name, value in adapter_tensors(begin(base, section, rows=ROWS)).items():
        assert torch.equal(value, together[name]), name


def test_the_run_s_random_numbers_stay(base: Base) -> None:
    torch.manual_seed(5)
    wanted = torch.rand(3)
    for init in initialisations.names():
        torch.manual_seed(5)
        begin(base, some(init={"kind": init}), "nf4", rows=ROWS)
        assert torch.equal(torch.rand(3), wanted), init


def test_padding_is_not_seen() -> None:
    """Pairs are padded to one length, and to a multiple; EVA and CorDA get tokens alone."""
    seen = list[tuple[int, ...]]()
    task, model = tasks.make("dpo"), tiny_model()
    look = {"model.layers.0.self_attn.q_proj": lambda inputs: seen.append(tuple(inputs.shape))}
    sides = {"chosen": [5, 6, 7], "rejected": [5, 6, 7, 8, 9]}
    columns = {f"{side}_{what}": ids for side, ids in sides.items() for what in ("tokens", "trained")}
    row = Example(0, columns, "d.jsonl", 1)
    first_values._run_rows(task.build_objective(model), {"train": [row]}, 0, 0, Silent(), "train", 1, look)
    assert seen == [(8, 64)]


@pytest.mark.parametrize("init", ["pissa", "olora", "loftq", "corda"])
def test_memory_of_the_start_is_what_is_held(base: Base, init: str) -> None:
    """Live tensors while it runs, the model's apart: what the estimate says, which a step's forward may exceed."""
    section = lora(init={"kind": init})
    model = attach_adapter(load(base, "nf4"), section, 0)
    objective, live = tasks.make("causal-lm").build_objective(model), LiveTensors()
    live.note(parameter.data for parameter in model.parameters())
    before = live.live_bytes
    with live:
        first_values.give_first_values(objective, section, base, {"train": ROWS}, 0, 0, Silent())
    method = adapters.bind(section)
    linears = [site.linear for site in method.sites(find_shape(base.config)) if site.linear is not None]
    begins = method.initialisation()
    assert begins is not None
    assert 0.7 < (live.peak_bytes - before) / begins.memory_bytes(linears, method.rank()) < 1.15


def test_every_initialisation_says_whether_it_corrects() -> None:
    assert {name for name, kind in initialisations.items() if kind.corrects} == {*CORRECTED, "corda"}
    assert not [name for name, kind in initialisations.items() if kind.corrects and kind.starts_as_base]
