"""The generic kind: options as PEFT's config classes have them, methods that keep the contract, and why not others."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from transformers import AutoModelForCausalLM

from lorafit.contracts import Silent
from lorafit.errors import ModelError, RecipeError
from lorafit.kinds.adapters import adapter_kind, adapters
from lorafit.kinds.adapters._peft_options import peft_methods
from lorafit.kinds.adapters.peft import fitting_methods, unfit_methods
from lorafit.kinds.quantizations import quantizations
from lorafit.model.adapter import CONFIG, adapter_tensors, read_adapter, save_adapter
from lorafit.model.attach import attach_adapter, check_plan, load_adapter_weights, open_adapter
from lorafit.model.base import Base
from lorafit.model.class_shape import find_shape
from lorafit.model.inspect import describe_quantization
from lorafit.model.merge import merge_adapter
from tests.support.adapted import load, logits, make_gpt2, make_llama, open_base
from tests.support.recipe_texts import MINIMAL
from tests.unit.recipe.conftest import fails, loads  # noqa: F401

OPTIONS: dict[str, dict[str, Any]] = {"c3a": {"block_size": 32}}
QUICK = ("hira", "gralora", "osf")
UNMERGED = ("beft", "pvera", "randlora", "road")
NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def section(method: str, **fields: Any) -> Any:
    return adapters.make_section("peft", method=method, options=OPTIONS.get(method, {}), **fields)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("llama") / "base")


@pytest.fixture
def base(llama: Path, tmp_path: Path) -> Base:
    (tmp_path / "base").symlink_to(llama)
    return open_base(tmp_path / "base")


def test_options_are_read_as_peft_has_them() -> None:
    found = peft_methods()
    assert found.keys() == {name.value for name in PEFT_TYPE_TO_CONFIG_MAPPING}
    for name, made in PEFT_TYPE_TO_CONFIG_MAPPING.items():
        fields = {field.name for field in dataclasses.fields(made)}
        assert set(found[name.value].fields) <= fields
        own = {
            field.name
            for base in made.__mro__[1:]
            if dataclasses.is_dataclass(base)
            for field in dataclasses.fields(base)
        }
        assert fields - own <= set(found[name.value].fields)


def test_every_method_of_peft_is_run_by_a_kind_or_refused_with_a_reason() -> None:
    fit, unfit = set(fitting_methods()), unfit_methods()
    assert fit | unfit.keys() == {name.lower() for name in peft_methods()} and not fit & unfit.keys()
    assert unfit["lora"] == "it has a kind of its own: lora" and "dora" not in unfit
    assert all(" " in why for why in unfit.values())
    assert {"hira", "loha", "lokr", "delora", "hra"} <= fit


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("{kind: peft, method: hirra}", "method 'hirra' is no method of PEFT's; did you mean hira"),
        ("{kind: peft, method: vera}", "method 'vera' is not run: it has a kind of its own: vera"),
        ("{kind: peft, method: poly}", "method 'poly' is not run: each forward must be told which task a row is of"),
        ("{kind: peft, method: xlora}", "method 'xlora' is not run: it stands at no linear"),
        ("{kind: peft, method: hira, options: {rr: 8}}", "options: 'rr' is no option of hira; did you mean r"),
        ("{kind: peft, method: hira, options: {r: 1.5}}", "options: 'r' is 1.5, and PEFT wants int"),
        ("{kind: peft, method: hira, options: {target_modules: [a]}}", "'target_modules' is no option of hira"),
    ],
)
def test_names_and_types_are_checked_with_the_recipe(fails: Any, written: str, said: str) -> None:  # noqa: F811
    assert said in str(fails(f"{MINIMAL}adapter: {written}\n"))


def test_options_are_checked_without_importing_peft() -> None:
    import subprocess
    import sys

    text = (
        "import sys; from lorafit.kinds.adapters import adapters;"
        "adapters.make_section('peft', method='hira', options={'r': 8});"
        "print([name for name in ('peft', 'torch') if name in sys.modules])"
    )
    told = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"


def keeps_the_contract(base: Base, method: str, quantization: str) -> None:
    """Counted, trained, resumed to the last bit, opened here and by plain PEFT, merged or told why not."""
    ids, asked = torch.arange(3, 40).reshape(1, -1), section(method)
    model = load(base, quantization)
    used = None
    if quantization != "none":
        used = describe_quantization(model, quantizations.make_section(quantization), dtype=torch.float32)
    sites = adapters.bind(asked).sites(find_shape(base.config))

    def steps(model: Any, optimizer: Any) -> None:
        for number in range(2):
            torch.manual_seed(number)
            model.train()(ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    def begin(model: Any, seed: int) -> tuple[Any, Any]:
        adapted = attach_adapter(model, asked, seed)
        return adapted, torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)

    whole, optimizer = begin(model, 0)
    check_plan(whole, sites, sum(site.parameters for site in sites))
    before = logits(load(base, quantization))
    steps(whole, optimizer)
    folder, state = base.path.parent / "adapter", copy.deepcopy(optimizer.state_dict())
    folder.mkdir()
    save_adapter(whole, folder, base=base, quantization=used)
    told = logits(whole)
    assert float((told - before).abs().max()) > 1e-3
    assert torch.equal(logits(open_adapter(load(base, quantization), folder, base=base)), told)
    assert torch.equal(logits(PeftModel.from_pretrained(load(base, quantization), folder)), told)

    resumed, other = begin(load(base, quantization), 9)
    load_adapter_weights(resumed, folder)
    other.load_state_dict(state)
    steps(whole, optimizer)
    steps(resumed, other)
    after = adapter_tensors(resumed)
    assert all(torch.equal(value, after[name]) for name, value in adapter_tensors(whole).items())

    output, kind = base.path.parent / "merged", "original" if used is None else "dequantized"
    if method in UNMERGED:
        with pytest.raises(ModelError, match="cannot be merged: "):
            merge_adapter(base, folder, output, kind=kind, quantization=used, reporter=Silent())  # type: ignore[arg-type]
        return
    report = merge_adapter(base, folder, output, kind=kind, quantization=used, reporter=Silent())  # type: ignore[arg-type]
    assert report.verified and report.merged_tensors == 14 and 0.0 <= report.largest_error <= 1.0
    merged = AutoModelForCausalLM.from_pretrained(output, attn_implementation="eager")
    assert float((logits(merged) - told).abs().max()) <= (3e-2 if quantization == "int8" else 2e-5)
    if used is None:
        plain = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
        theirs = PeftModel.from_pretrained(plain, folder).merge_and_unload().state_dict()
        ours = merged.state_dict()
        assert max(float((ours[name] - theirs[name]).abs().max()) for name in theirs) <= 2e-6


@pytest.mark.parametrize("method", QUICK)
def test_a_method_keeps_the_contract(base: Base, method: str) -> None:
    keeps_the_contract(base, method, "none")


def test_a_method_keeps_the_contract_beside_codes(base: Base) -> None:
    keeps_the_contract(base, "hira", "nf4")


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
@pytest.mark.parametrize("method", fitting_methods())
def test_every_method_keeps_the_contract_where_it_is_not_refused(base: Base, method: str, quantization: str) -> None:
    """And where it is, PEFT's own layer fails there, or computes something else than beside plain weights."""
    if adapters.bind(section(method)).refuses(quantization) is None:
        keeps_the_contract(base, method, quantization)
        return
    made: Any = PEFT_TYPE_TO_CONFIG_MAPPING[method.upper()]  # type: ignore[index]

    def trained(kind: str) -> torch.Tensor:
        torch.manual_seed(0)
        theirs = get_peft_model(load(base, kind), made(target_modules=NAMES, **OPTIONS.get(method, {})))
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data + 0.05 * torch.randn_like(parameter)
        return logits(theirs)

    plainly = trained("none")
    try:
        beside_codes = trained(quantization)
    except (RuntimeError, TypeError, ValueError):
        return
    assert float((beside_codes - plainly).abs().max()) > 0.1


def test_a_linear_with_codes_and_a_bias_may_be_added_to_in_place(tmp_path: Path) -> None:
    """As PEFT's C3A does: autograd refused what bitsandbytes answers, a view."""
    base = open_base(make_llama(tmp_path / "base", attention_bias=True))
    asked, ids = section("c3a", target_modules=["q_proj"]), torch.arange(3, 9)[None]
    theirs = get_peft_model(load(base, "nf4"), adapters.bind(asked).peft_config(["q_proj"], is_transposed=False))
    with pytest.raises(RuntimeError, match="is a view and is being modified inplace"):
        theirs.train()(ids, labels=ids)
    model = attach_adapter(load(base, "nf4"), asked, 0)
    model.train()(ids, labels=ids).loss.backward()
    assert all(bool(p.grad.abs().max() > 0) for p in model.parameters() if p.requires_grad)


def test_the_page_names_every_method_of_peft() -> None:
    page = (Path(__file__).parents[3] / "docs" / "adapters.md").read_text(encoding="utf-8")
    named = [*fitting_methods(), *(name for name, why in unfit_methods().items() if "a kind of its own" not in why)]
    assert [name for name in named if f"`{name}`" not in page] == []


def test_a_method_that_would_read_codes_as_weights_is_refused(base: Base) -> None:
    """Beside int8 PEFT's HRA computes with the codes, without a word."""
    why = adapters.bind(section("hra")).refuses("int8")
    assert (
        why
        == "hra does not run beside int8: it computes with the weight itself, in whose place PEFT's layer finds codes"
    )
    made: Any = PEFT_TYPE_TO_CONFIG_MAPPING["HRA"]  # type: ignore[index]
    theirs = get_peft_model(load(base, "int8"), made(target_modules=NAMES))
    assert float((logits(theirs) - logits(load(base, "int8"))).abs().max()) > 0.1
    theirs.save_pretrained(base.path.parent / "theirs")
    with pytest.raises(ModelError, match="hra does not run beside int8"):
        open_adapter(load(base, "int8"), base.path.parent / "theirs")


def test_an_adapter_of_another_tool_is_opened_and_merged(base: Base) -> None:
    """PEFT wrote it, whose files hold no note of where its layers lie."""
    made: Any = PEFT_TYPE_TO_CONFIG_MAPPING["LOHA"]  # type: ignore[index]
    torch.manual_seed(0)
    theirs = get_peft_model(load(base), made(target_modules=["q_proj", "down_proj"], r=4, init_weights=False))
    told, folder = logits(theirs), base.path.parent / "theirs"
    theirs.save_pretrained(folder)
    saved = read_adapter(folder)
    assert saved.kind is adapters.get("peft") is adapter_kind(saved.config)
    assert torch.equal(logits(open_adapter(load(base), folder)), told)
    report = merge_adapter(base, folder, base.path.parent / "merged", kind="original", reporter=Silent())
    merged = AutoModelForCausalLM.from_pretrained(report.output, attn_implementation="eager")
    assert report.merged_tensors == 4 and float((logits(merged) - told).abs().max()) <= 1e-5
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, "r": "four"}))
    with pytest.raises(ModelError, match="'r' is \"four\", and PEFT wants int"):
        open_adapter(load(base), folder)


def test_going_on_takes_the_same_method_and_options(base: Base) -> None:
    folder = base.path.parent / "first"
    folder.mkdir()
    save_adapter(attach_adapter(load(base), section("hira"), 0), folder, base=base)
    with pytest.raises(RecipeError, match=r"is no plain peft adapter \(peft_type\)"):
        attach_adapter(load(base), section("loha", init_from="first"), 0, folder=folder.parent)
    other = adapters.make_section("peft", method="hira", options={"hira_dropout": 0.5}, init_from="first")
    with pytest.raises(RecipeError, match=r"is no plain peft adapter \(hira_dropout\)"):
        attach_adapter(load(base), other, 0, folder=folder.parent)


def test_an_answer_that_is_not_linear_is_not_merged(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft.tuners.hira.layer import Linear

    folder, forward = base.path.parent / "adapter", Linear.forward
    folder.mkdir()
    save_adapter(attach_adapter(load(base), section("hira", target_modules=["q_proj"]), 0), folder, base=base)
    monkeypatch.setattr(Linear, "forward", lambda self, x: forward(self, x).relu())
    with pytest.raises(ModelError, match="the answer is not linear in the input"):
        merge_adapter(base, folder, base.path.parent / "merged", kind="original", reporter=Silent())


def test_what_peft_refuses_is_told_by_the_plan(base: Base, tmp_path: Path) -> None:
    asked = adapters.make("peft", method="c3a", options={"block_size": 50})
    with pytest.raises(RecipeError, match="PEFT refuses c3a for these linears: ") as caught:
        asked.sites(find_shape(base.config))
    assert caught.value.key == "adapter.options"
    with pytest.raises(ModelError, match=r"hira is run at weights that lie \[out, in\]"):
        attach_adapter(load(open_base(make_gpt2(tmp_path / "gpt2"))), section("hira"), 0)
