"""A smaller rank is the closest one, what it loses is Eckart and Young's, and what was measured is what was written."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import lorafit
from lorafit.errors import LorafitError, ModelError, UsageError
from lorafit.kinds.adapters import adapters
from lorafit.model.adapter import read_adapter, save_adapter
from lorafit.model.attach import attach_adapter, open_adapter
from lorafit.model.trim import Trimming
from lorafit.studies import trim as trimmed
from tests.support.adapted import load, logits, make_gpt2, make_llama, open_base, randomise
from tests.support.tiny_recipe import make_rows, train_tiny

LORA = {"r": 6, "alpha": 9, "dropout": 0.0}


def saved(folder: Path, make: Any = make_llama, kind: str = "lora", **fields: Any) -> tuple[Any, Any, Path]:
    """Base, model and folder of an adapter with random factors."""
    base = open_base(make(folder / "base"))
    model = attach_adapter(load(base), adapters.make_section(kind, **{**LORA, **fields}), 0)
    randomise(model)
    (folder / "adapter").mkdir()
    save_adapter(model, folder / "adapter", base=base)
    return base, model, folder / "adapter"


def updates(model: Any) -> dict[str, torch.Tensor]:
    """PEFT's own s B A of each layer, in the weight's orientation."""
    layers = {path: module for path, module in model.named_modules() if hasattr(module, "get_delta_weight")}
    return {
        path.removeprefix("base_model.model."): m.get_delta_weight("default").double() for path, m in layers.items()
    }


FORMS = [
    (make_llama, {}),
    (make_gpt2, {}),
    (make_llama, {"kind": "rslora"}),
    (make_llama, {"ranks": {"q_proj": 2, "down_proj": 5}}),
]


@pytest.mark.parametrize(("make", "fields"), FORMS)
def test_the_svd_is_the_closest_update_of_its_rank(tmp_path: Path, make: Any, fields: dict[str, Any]) -> None:
    """||W - W_k||_F^2 = sum of the squares of the singular values behind the k-th (Eckart and Young 1936)."""
    base, model, folder = saved(tmp_path, make, **fields)
    output = tmp_path / "smaller"
    output.mkdir()
    errors = {error.layer: error for error in Trimming(read_adapter(folder), nested=False).write(3, output)}
    plain = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
    smaller = updates(PeftModel.from_pretrained(plain, output))
    whole = updates(model)
    assert errors.keys() == whole.keys() == smaller.keys()
    for path, update in whole.items():
        values = torch.linalg.svdvals(update)
        left = float(values[3:].norm())
        assert errors[path].error == pytest.approx(left, rel=1e-5, abs=1e-6)
        assert errors[path].update == pytest.approx(float(update.norm()), rel=1e-6)
        assert float((smaller[path] - update).norm()) == pytest.approx(left, rel=1e-4, abs=1e-5)
    config = json.loads((output / "adapter_config.json").read_text())
    assert (config["r"], config["rank_pattern"], config["alpha_pattern"]) == (3, {}, {})


def test_first_ranks_are_those_that_were_trained(tmp_path: Path) -> None:
    """DyLoRA's: alpha / b times the first b columns and rows."""
    _, _, folder = saved(tmp_path, kind="dylora")
    output = tmp_path / "smaller"
    output.mkdir()
    errors = Trimming(read_adapter(folder), nested=True).write(2, output)
    tensors, whole = (load_file(f / "adapter_model.safetensors") for f in (output, folder))
    assert errors == []  # at alpha / b they are another adapter, and no part of the whole one is lost
    assert json.loads((output / "adapter_config.json").read_text())["lora_alpha"] == 9
    for name, value in whole.items():
        assert torch.equal(tensors[name], value[:2] if "lora_A" in name else value[:, :2])


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("dora", "the update of dora is no product s * B A of two matrices; train anew with that rank"),
        ("vera", "the update of vera is no product s * B A of two matrices; train anew with that rank"),
        ("ia3", "ia3 has no rank; train a method that has one, e.g. lora"),
        ("prompt_tuning", "prompt_tuning has no rank; train a method that has one, e.g. lora"),
        ("layer_norm", "layer_norm has no rank; train a method that has one, e.g. lora"),
    ],
)
def test_what_is_no_product_of_two_matrices_is_refused_by_the_name_of_the_recipe(
    tmp_path: Path, kind: str, message: str
) -> None:
    section = adapters.section(kind).model_fields
    base = open_base(make_llama(tmp_path / "base"))
    fields = {key: value for key, value in LORA.items() if key in section}
    model = attach_adapter(load(base), adapters.make_section(kind, **fields), 0)
    (tmp_path / "adapter").mkdir()
    save_adapter(model, tmp_path / "adapter", base=base)
    with pytest.raises(ModelError, match=re.escape(f"cannot be given a smaller rank: {message}")):
        Trimming(read_adapter(tmp_path / "adapter"), nested=False)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trim")
    return train_tiny(folder, valid=make_rows(12, first=100))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAFIT_CACHE", str(tmp_path / "cache"))


def test_a_run_is_trimmed_and_its_result_answers_and_merges(run: Path, tmp_path: Path) -> None:
    found = lorafit.trim(run, rank=2, output=tmp_path / "small", quiet=True)
    assert (found.rank, found.whole_rank, found.how, [one.rank for one in found.tried]) == (2, 4, "SVD", [2])
    (one,) = found.tried
    assert one.loss.rows == 12 and 0 < one.share < 1
    assert len(one.errors) == 14 and json.loads(json.dumps(found.to_json()))["rank"] == 2
    shown = str(found)
    assert "update lost" in shown and "layers that lose most at rank 2" in shown and "rank 2 of 4 by SVD" in shown
    prefix = replace(found, tried=(replace(one, errors=()),))
    assert "lose" not in str(prefix) and "update" not in str(prefix) and "validation loss" in str(prefix)
    assert prefix.to_json()["tried"][0]["share"] is None
    assert (tmp_path / "small" / "tokenizer.json").is_file() and (tmp_path / "small" / "lorafit.json").is_file()
    assert (tmp_path / "small" / "MANIFEST").is_file()
    merged = lorafit.merge(tmp_path / "small", tmp_path / "merged", quiet=True)
    base = open_base(run.parent / "base")
    tuned = logits(open_adapter(load(base), tmp_path / "small", base=base))
    whole = AutoModelForCausalLM.from_pretrained(merged.report.output, attn_implementation="eager", dtype=torch.float32)
    torch.testing.assert_close(logits(whole), tuned, rtol=1e-4, atol=1e-4)
    assert lorafit.generate(tmp_path / "small", prompts="what", max_new_tokens=2, quiet=True).answers


def test_auto_is_the_smallest_that_is_not_distinguishably_worse(run: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """With verdicts put in the place of those of the rows."""
    from lorafit.evaluation import statistics

    verdicts = iter(["worse", "not distinguishable"])
    monkeypatch.setattr(statistics, "judge", lambda *_: next(verdicts))
    found = lorafit.trim(run, rank="auto", output=tmp_path / "auto", quiet=True)
    assert ([one.rank for one in found.tried], found.rank) == ([1, 2], 2)
    monkeypatch.setattr(statistics, "judge", lambda *_: "worse")
    found = lorafit.trim(run, rank="auto", output=tmp_path / "none", quiet=True)
    assert ([one.rank for one in found.tried], found.rank, found.output) == ([1, 2, 3], 4, None)
    assert "rank 4 stays" in str(found) and not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("rank", "more", "code", "message"),
    [
        (4, {}, 2, "4 is no smaller rank than the adapter's own, 4; name a smaller one"),
        (9, {}, 2, "9 is no smaller rank than the adapter's own, 4; name a smaller one"),
        (0, {}, 2, "'0' is no rank"),
        ("few", {}, 2, "'few' is no rank"),
        (2, {"overrides": {"data.validation": None}}, 4, "judged on validation rows"),
    ],
)
def test_what_cannot_be_done_is_said(run: Path, rank: Any, more: Any, code: int, message: str) -> None:
    with pytest.raises(LorafitError, match=message) as error:
        lorafit.trim(run, rank=rank, quiet=True, **more)
    assert error.value.exit_code == code
    assert not run.with_name("run-rank-2").exists()


def test_ranks_below_those_that_were_drawn_are_no_choice() -> None:
    section = adapters.make_section("dylora", r=8, r_min=3)
    assert list(trimmed._ranks_to_try(None, 8, 3, section)) == [3, 4, 5, 6, 7]
    with pytest.raises(UsageError, match="ranks below 3 were not trained for"):
        trimmed._ranks_to_try(2, 8, 3, section)


def test_an_adapter_of_twice_its_rank_says_why() -> None:
    section = adapters.make_section("lora", r=8, init={"kind": "pissa"})
    message = (
        r"16 is no smaller rank than the adapter's own, 16 \(twice its r: half takes out what adapter\.init: pissa"
    )
    with pytest.raises(UsageError, match=message):
        trimmed._ranks_to_try(16, 16, 1, section)
    assert trimmed._ranks_to_try(8, 16, 1, section) == [8]


@pytest.mark.parametrize(("rank", "output"), [(2, None), ("auto", None), (2, "taken"), ("auto", "taken")])
def test_an_output_in_the_way_is_said_before_anything_is_loaded(
    run: Path, rank: Any, output: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorafit.answering import evaluation_rows

    monkeypatch.setattr(evaluation_rows, "open_evaluation", lambda *_: pytest.fail("rows were read"))
    taken = run.with_name(output or "run-rank-2")
    taken.mkdir()
    try:
        with pytest.raises(UsageError, match=f"{taken.name}: output: exists already"):
            lorafit.trim(run, rank=rank, output=taken if output else None, quiet=True)
    finally:
        taken.rmdir()
