"""Adapters are written as PEFT writes them, and read only where everything fits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lorafit.errors import LorafitError, ModelError, RecipeError, SafetyError
from lorafit.kinds.adapters import adapters
from lorafit.model.adapter import (
    CONFIG,
    NOTES,
    QUANTIZATION,
    WEIGHTS,
    adapter_tensors,
    check_base,
    read_adapter,
    save_adapter,
)
from lorafit.model.attach import attach_adapter, load_adapter_weights, open_adapter
from lorafit.model.base import Base
from tests.support.adapted import Trained, load, logits, lora, make_gpt2, make_llama, open_base, train_like


def change(folder: Path, **values: object) -> None:
    file = folder / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_peft_reads_what_we_write(tmp_path: Path, family: str) -> None:
    folder = tmp_path / "base"
    made = train_like(open_base(make_gpt2(folder) if family == "gpt2" else make_llama(folder)), "none")
    plain = AutoModelForCausalLM.from_pretrained(made.base.path, attn_implementation="eager")
    theirs = PeftModel.from_pretrained(plain, made.adapter)
    assert torch.equal(logits(theirs), logits(made.model))
    config = json.loads((made.adapter / CONFIG).read_text())
    assert config["base_model_name_or_path"] == str(folder) and config["inference_mode"] is True
    assert isinstance(config["lora_alpha"], int) and config["target_modules"] == sorted(config["target_modules"])
    notes = json.loads((made.adapter / NOTES).read_text())
    origin = {"kind": "folder", "name": "base", "folder": "base", "revision": None, "commit": None, "content": None}
    assert notes["base"] == origin | {"digest": made.base.origin.digest}
    assert str(tmp_path) not in (made.adapter / NOTES).read_text()
    assert len(notes["layers"]) == (8 if family == "gpt2" else 14)
    assert all(layer["transposed"] is (family == "gpt2") for layer in notes["layers"].values())


def test_files_are_equal_each_time(trained: Callable[..., Trained], tmp_path: Path) -> None:
    made = trained("nf4")
    (tmp_path / "again").mkdir()
    save_adapter(made.model, tmp_path / "again", base=made.base, quantization=made.quantization)
    for name in (CONFIG, WEIGHTS, NOTES, QUANTIZATION):
        assert (tmp_path / "again" / name).read_bytes() == (made.adapter / name).read_bytes()


@pytest.mark.parametrize("kind", ["none", "nf4", "int8"])
def test_open_and_load_give_the_saved_model(trained: Callable[..., Trained], kind: str) -> None:
    made = trained(kind)
    wanted = logits(made.model)
    opened = open_adapter(load(made.base, kind), made.adapter, base=made.base)
    assert torch.equal(logits(opened), wanted)
    assert not any(parameter.requires_grad for parameter in opened.parameters())
    fresh = attach_adapter(load(made.base, kind), lora(), 5)
    parameters = {id(parameter) for parameter in fresh.parameters()}
    load_adapter_weights(fresh, made.adapter)
    assert torch.equal(logits(fresh), wanted) and {id(p) for p in fresh.parameters()} == parameters
    assert sum(p.requires_grad for p in fresh.parameters()) == len(adapter_tensors(fresh)) == 28


def test_every_mismatch_is_counted(trained: Callable[..., Trained]) -> None:
    made = trained("none")
    file = made.adapter / WEIGHTS
    whole = load_file(file)
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    cases = {
        "28 of 28 missing adapter tensors": {"zzz": torch.ones(1)},
        "14 of 28 missing adapter tensors": dict(sorted(whole.items())[::2]),
        "1 adapter tensors find no home in this model": whole | {"zzz": torch.ones(1)},
        "1 of another shape": whole | {name: torch.ones(4, 64)},
    }
    for says, tensors in cases.items():
        save_file(tensors, file)
        with pytest.raises(ModelError, match=says):
            open_adapter(load(made.base), made.adapter)
        with pytest.raises(ModelError, match=says):
            load_adapter_weights(made.model, made.adapter)


def test_an_adapter_of_a_wider_base_does_not_open(trained: Callable[..., Trained], tmp_path: Path) -> None:
    made = trained("none")
    wider = open_base(make_llama(tmp_path / "wider", hidden_size=256))
    with pytest.raises(ModelError, match="of another shape"):
        open_adapter(load(wider), made.adapter)
    with pytest.raises(ModelError, match=r"trained on 'base' \(.*but this base is 'wider'"):
        open_adapter(load(wider), made.adapter, base=wider)


@pytest.mark.parametrize("written", ["org/other", "/home/u/x", "other", "../elsewhere"])
def test_names_of_the_base_must_agree(trained: Callable[..., Trained], written: str) -> None:
    made = trained("none")
    change(made.adapter, base_model_name_or_path=written)
    with pytest.raises(ModelError, match=rf"base mismatch: .*'{written}'.*'base'"):
        read_adapter(made.adapter)
    change(made.adapter, base_model_name_or_path="/moved/to/base")  # its folder's name stays
    check_base(read_adapter(made.adapter), made.base)
    change(made.adapter, base_model_name_or_path=written)
    (made.adapter / NOTES).unlink()  # another tool's adapter: its shapes decide
    check_base(read_adapter(made.adapter), made.base)


def test_missing_broken_and_foreign_files(trained: Callable[..., Trained], tmp_path: Path) -> None:
    made = trained("none")
    weights, config = (made.adapter / WEIGHTS).read_bytes(), (made.adapter / CONFIG).read_text()

    def refused(says: str, kind: type[LorafitError] = ModelError) -> None:
        with pytest.raises(kind, match=says):
            read_adapter(made.adapter)

    for content, says in ((b"", "empty"), (weights[:-7], "incomplete"), (b"version https://git-lfs", "git-lfs")):
        (made.adapter / WEIGHTS).write_bytes(content)
        refused(f"{WEIGHTS}: .*{says}")
    (made.adapter / WEIGHTS).unlink()
    refused(f"{WEIGHTS} is missing")
    (made.adapter / "adapter_model.bin").write_bytes(b"\x80\x02")
    refused("adapter_model.bin is a pickle", SafetyError)
    (made.adapter / WEIGHTS).write_bytes(weights)
    change(made.adapter, megatron_core="antigravity")
    refused("megatron_core", SafetyError)
    (made.adapter / CONFIG).write_text(config)
    change(made.adapter, auto_mapping={"parent_library": "os"})
    refused("auto_mapping.parent_library", SafetyError)
    (made.adapter / CONFIG).write_text(config)
    change(made.adapter, peft_type="XLORA")
    refused("'XLORA', which is not known")
    (made.adapter / CONFIG).write_text("[")
    refused(f"{CONFIG} is no valid JSON")
    (made.adapter / CONFIG).unlink()
    refused(f"{CONFIG} is missing")


def test_what_a_method_freezes_is_saved_and_not_trained(
    llama: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`settle` decides before anybody counts what is trained, and also where values come from another adapter."""

    def freeze(self: object, model: PeftModel) -> None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_B" in name)

    monkeypatch.setattr(adapters.get("lora"), "settle", freeze)
    model = attach_adapter(load(llama), lora(), 0)
    live = adapter_tensors(model)
    assert {name for name, value in live.items() if value.requires_grad} == {n for n in live if "lora_B" in n}
    save_adapter(model, tmp_path / "saved", base=llama)
    assert read_adapter(tmp_path / "saved").tensors.keys() == live.keys()
    going_on = attach_adapter(load(llama), lora(init_from="saved"), 9, folder=tmp_path)
    assert {name for name, p in going_on.named_parameters() if p.requires_grad and "lora_B" not in name} == set()
    assert all(torch.equal(value, live[name]) for name, value in adapter_tensors(going_on).items())


def test_going_on_from_an_adapter(trained: Callable[..., Trained], llama: Base) -> None:
    made = trained("none")
    relative = {"folder": made.adapter.parent}
    going_on = attach_adapter(load(llama), lora(init_from=made.adapter.name), 9, **relative)
    assert torch.equal(logits(going_on), logits(made.model))
    assert all(p.requires_grad for p in adapter_tensors(going_on).values())
    cases = {
        "says 8, the adapter to go on from has 4": {"r": 8},
        "says 3.5, the adapter to go on from has 8": {"alpha": 3.5},
        "adapts other layers": {"target_modules": ["q_proj"]},
    }
    for says, other in cases.items():
        with pytest.raises(RecipeError, match=says):
            attach_adapter(load(llama), lora(init_from=made.adapter.name, **other), 9, **relative)
    change(made.adapter, use_rslora=True)
    with pytest.raises(RecipeError, match="no plain lora adapter"):
        attach_adapter(load(llama), lora(init_from=made.adapter.name), 9, **relative)
