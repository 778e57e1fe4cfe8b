"""LLM.int8() looks for outliers over all tokens of a batch: what is evaluated and proven must not depend on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lorafit.errors import ModelError
from lorafit.objective import Objective, next_token
from lorafit.ops.isolation import tokens_apart
from tests.support.adapted import load, make_llama, open_base
from tests.unit.trainer.test_sensitivity import batch_of, build

ROW = [3, 14, 15, 9, 26, 5, 35, 8, 9, 79, 32, 38]


def model_of(tmp_path: Path) -> Any:
    """One whose states have outliers of some tokens in some columns, as those of larger models do."""
    model = load(open_base(make_llama(tmp_path / "base")), "int8").eval()
    with torch.no_grad():
        model.get_input_embeddings().weight[32:].mul_(40.0)
        for layer in model.model.layers:
            layer.input_layernorm.weight[::7] *= 8.0
    return model


def layers_of(model: Any) -> list[Any]:
    return [module for module in model.modules() if hasattr(getattr(module, "state", None), "threshold")]


def as_bitsandbytes_has_it(model: Any) -> None:
    """As on a card: evaluated by LLM.int8()."""
    for layer in layers_of(model):
        layer.state.__class__ = type(layer.state).__mro__[1]


def test_on_a_cpu_an_evaluation_computes_what_training_does(tmp_path: Path) -> None:
    model, ids = model_of(tmp_path), torch.tensor([ROW])
    with torch.no_grad():
        trained, evaluated = model.train()(ids).logits, model.eval()(ids).logits
        assert torch.equal(trained, evaluated)
        as_bitsandbytes_has_it(model)
        assert (model(ids).logits - trained).abs().max() > 1e-3


def test_outliers_of_later_tokens_make_no_language_model_an_encoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective: Objective = build(model_of(tmp_path)).eval()
    as_bitsandbytes_has_it(objective.base)
    batch = batch_of(objective, [ROW])
    objective.reference_loss(batch)
    assert all(layer.state.threshold == 6.0 for layer in layers_of(objective.base))
    monkeypatch.setattr(next_token, "tokens_apart", lambda _: torch.no_grad())  # as before
    with pytest.raises(ModelError, match="sees the tokens that it is to predict"):
        objective.reference_loss(batch)
    with tokens_apart(objective.base):
        assert all(layer.state.threshold == 0.0 for layer in layers_of(objective.base))
