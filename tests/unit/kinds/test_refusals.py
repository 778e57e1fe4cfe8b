"""A method that cannot stand beside a quantised linear: `validate`, estimate and whoever opens an adapter say why."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from lorafit.errors import ModelError
from lorafit.estimation import Options, estimate_recipe
from lorafit.files.strict_json import read_object_file
from lorafit.kinds.adapters import adapters, refusal
from lorafit.kinds.adapters.dora import Dora
from lorafit.kinds.adapters.lora import Lora
from lorafit.kinds.quantizations import quantizations
from lorafit.model.adapter import CONFIG
from lorafit.model.attach import open_adapter
from tests.support.adapted import load, make_llama, open_base, train_like
from tests.support.plan_cases import card, recipe, shape_of
from tests.support.recipe_texts import MINIMAL
from tests.unit.recipe.conftest import fails, loads  # noqa: F401

WHY = "DoRA divides by a norm that four bits do not hold"


@pytest.fixture
def no_dora_on_nf4(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Dora, "refuses_saved", classmethod(lambda cls, config, kind: WHY if kind == "nf4" else None))


@pytest.mark.usefixtures("no_dora_on_nf4")
@pytest.mark.parametrize("written", ["dora", "{kind: dora}"])
def test_validate_says_why_at_the_kind(fails: Callable[..., Exception], written: str) -> None:  # noqa: F811
    error = fails(f"{MINIMAL}adapter: {written}\n", ["model.quantization=nf4"])
    assert f"adapter.kind: {WHY}; use another adapter, or another quantization" in str(error)


@pytest.mark.usefixtures("no_dora_on_nf4")
@pytest.mark.parametrize(
    ("targets", "linears", "others", "is_refused"),
    [
        ("all-linear", {"up_proj": "nf4"}, "none", True),
        (["up_proj"], {"up_proj": "nf4"}, "none", True),
        (["q_proj"], {"up_proj": "nf4"}, "none", False),
        (["q_proj", "v_proj"], {"q_proj": "int8"}, "nf4", True),
    ],
)
def test_of_a_mixed_base_what_stands_at_the_targets_counts(
    targets: str | list[str], linears: dict[str, str], others: str, is_refused: bool
) -> None:
    mixed = quantizations.make("mixed", linears=linears, others=others)
    section = adapters.make_section("dora", target_modules=targets)
    assert refusal(section, mixed) == (WHY if is_refused else None)  # type: ignore[arg-type]


def test_an_estimate_proposes_no_refused_base(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Lora, "refuses_saved", classmethod(lambda cls, config, kind: WHY if kind == "nf4" else None))
    options = Options(gpu=card(24))
    found = estimate_recipe(
        recipe(model={"quantization": "none"}), shape_of("meta-llama/Llama-3.1-8B"), options=options
    )
    assert [method.precision for method in found.methods] == ["fp32", "bf16", "fp32", "bf16", "int8"]
    assert "nf4" not in str(found.to_json()["savings"]) and found.to_json()["savings"]


@pytest.mark.parametrize(
    ("option", "value", "kind", "said"),
    [
        ("kasa_config", {"beta": 1e-4, "gamma": 1e-3}, "nf4", "KaSA beside linears stored as nf4"),
        ("use_bdlora", {"target_modules_bd_a": ["q_proj"]}, "int8", "BD-LoRA beside linears stored as int8"),
        ("use_qalora", True, "none", "QA-LoRA beside plain linears"),
    ],
)
def test_an_option_that_peft_drops_without_a_word_is_refused(
    tmp_path: Path, option: str, value: object, kind: str, said: str
) -> None:
    """Before: the adapter was opened, and computed as plain LoRA."""
    trained = train_like(open_base(make_llama(tmp_path / "base")), kind)
    config = read_object_file(trained.adapter / CONFIG)
    (trained.adapter / CONFIG).write_text(json.dumps({**config, option: value}))
    with pytest.raises(ModelError, match=f"PEFT has no {said}"):
        open_adapter(load(trained.base, kind), trained.adapter)
