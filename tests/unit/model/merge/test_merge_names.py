"""Merging where names in the files are not those of the class: what comes out is what the adapter was, in any class."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lorafit.contracts import Silent
from lorafit.errors import ModelError
from lorafit.model.adapter import CONFIG, NOTES, WEIGHTS
from lorafit.model.attach import attach_adapter
from lorafit.model.merge import MergeReport, merge_adapter
from lorafit.model.names import names_of
from lorafit.model.shippable import check_shippable
from tests.support.adapted import Trained, load, logits, lora, make_llama, open_base, randomise, train_like
from tests.support.named_bases import BASES, change_file, laguna, transposed_llama


def merge(trained: Trained, kind: str = "original") -> MergeReport:
    quantization = trained.quantization if kind == "dequantized" else None
    output = trained.base.path.parent / "merged"
    return merge_adapter(
        trained.base, trained.adapter, output, kind=kind, quantization=quantization, reporter=Silent()  # type: ignore[arg-type]
    )  # fmt: skip


def foreign(base_folder: Path, **fields: Any) -> Trained:
    """An adapter that PEFT made and saved, as other tools leave it: no notes of ours."""
    base = open_base(base_folder)
    torch.manual_seed(1)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base.path), LoraConfig(r=4, lora_alpha=8, **fields))
    randomise(model)
    folder = base.path.parent / "adapter"
    model.save_pretrained(folder)
    return Trained(base, folder, None, model)


def merged_by_peft(trained: Trained) -> dict[str, torch.Tensor]:
    plain = AutoModelForCausalLM.from_pretrained(trained.base.path, dtype=torch.float32)
    return PeftModel.from_pretrained(plain, trained.adapter).merge_and_unload().state_dict()  # type: ignore[no-any-return]


def largest_difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max()) for name in theirs)


def forget_notes(trained: Trained) -> None:
    """Leaves the adapter as an older lorafit wrote it: no layers noted, no parts, nothing kept."""
    file = trained.adapter / NOTES
    notes = json.loads(file.read_text())
    assert notes.pop("layers")
    file.write_text(json.dumps(notes))
    if trained.quantization is not None:
        trained.quantization.pop("kept")
        for proof in trained.quantization["tensors"].values():
            proof.pop("parts", None)


@pytest.mark.parametrize("kind", ["none", "nf4"])
@pytest.mark.parametrize("name", BASES)
def test_merged_is_the_adapter_in_plain_transformers(tmp_path: Path, name: str, kind: str) -> None:
    made = train_like(open_base(BASES[name](tmp_path / "base")), kind)
    check_shippable(made.model, made.base)
    report = merge(made, "original" if kind == "none" else "dequantized")
    before, after = load_file(made.base.path / "model.safetensors"), load_file(report.output / "model.safetensors")
    assert before.keys() == after.keys() and report.verified
    if kind == "nf4":
        assert made.quantization is not None and report.proven
        assert report.rebuilt_tensors == len(made.quantization["tensors"]) > 0
    merged = AutoModelForCausalLM.from_pretrained(report.output, attn_implementation="eager")
    ours, plain = logits(made.model), logits(load(made.base, kind))
    assert float((logits(merged) - ours).abs().max()) < 1e-4 < float((plain - ours).abs().max())
    for left_out in names_of(made.model).ignored:  # type: ignore[union-attr]
        assert torch.equal(before[left_out], after[left_out])


@pytest.mark.parametrize("name", ["gemma3", "qwen3_5"])
def test_the_class_of_text_and_vision_reads_the_merged_folder_too(tmp_path: Path, name: str) -> None:
    made = train_like(open_base(BASES[name](tmp_path / "base")), "none")
    output = merge(made).output
    whole = getattr(transformers, made.base.config["architectures"][0])
    model, told = whole.from_pretrained(output, output_loading_info=True, attn_implementation="eager")
    assert not any(told[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    assert float((logits(model) - logits(made.model)).abs().max()) < 1e-4


def test_what_the_class_leaves_out_keeps_its_bytes_where_others_are_cast(tmp_path: Path) -> None:
    base = open_base(BASES["qwen3_next"](tmp_path / "base"))
    change_file(base.path, lambda tensors: tensors | {"mtp.steps": torch.arange(3)})
    made = train_like(open_base(base.path), "nf4", dtype=torch.bfloat16)
    output = merge(made, "dequantized").output
    before, after = load_file(base.path / "model.safetensors"), load_file(output / "model.safetensors")
    dtypes = {name: value.dtype for name, value in after.items()}
    kept = {name for name in before if name.startswith("mtp.")}
    assert kept == set(made.quantization["kept"]) and len(kept) == 7  # type: ignore[index]
    assert all(torch.equal(before[name], after[name]) for name in kept)
    assert {dtypes[name] for name in before.keys() - kept} == {torch.bfloat16}
    assert json.loads((output / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("kind", ["none", "nf4"])
@pytest.mark.parametrize("name", ["gemma3", "qwen3_5", "qwen3_next", "gpt2_bare", "hrm"])
def test_an_older_adapter_is_merged_by_the_class(tmp_path: Path, name: str, kind: str) -> None:
    made = train_like(open_base(BASES[name](tmp_path / "base")), kind)
    forget_notes(made)
    report = merge(made, "original" if kind == "none" else "dequantized")
    merged = AutoModelForCausalLM.from_pretrained(report.output, attn_implementation="eager")
    assert float((logits(merged) - logits(made.model)).abs().max()) < 1e-4


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("gemma3", ["q_proj", "o_proj"]),
        ("qwen3_next", ["q_proj", "down_proj"]),  # q_proj is also in the head that the class leaves out
        ("qwen2_moe", ["q_proj", "gate_proj", "up_proj", "down_proj"]),  # PEFT moves these to the stacked experts
        ("mixtral", ["q_proj", "w1", "w2", "w3"]),
        ("hrm", ["q_proj", "gate_proj"]),
    ],
)
def test_an_adapter_of_peft_is_merged_as_peft_does(tmp_path: Path, name: str, targets: list[str]) -> None:
    made = foreign(BASES[name](tmp_path / "base"), target_modules=targets)
    ours = AutoModelForCausalLM.from_pretrained(merge(made).output).state_dict()
    plain = AutoModelForCausalLM.from_pretrained(made.base.path).state_dict()
    assert largest_difference(ours, merged_by_peft(made)) <= 1e-6 < largest_difference(ours, plain)


def test_experts_named_one_by_one_get_each_its_own(tmp_path: Path) -> None:
    """As an adapter of transformers 4 names them: those are the file's own names."""
    made = foreign(BASES["mixtral"](tmp_path / "base"), target_modules=["w1", "w2", "w3"])
    tensors = {}
    for layer in range(2):
        for expert in range(4):
            for name, inputs, outputs in (("w1", 64, 128), ("w2", 128, 64), ("w3", 64, 128)):
                path = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}"
                tensors[f"{path}.lora_A.weight"] = torch.randn(4, inputs) * 0.05
                tensors[f"{path}.lora_B.weight"] = torch.randn(outputs, 4) * 0.05
    save_file(tensors, made.adapter / WEIGHTS)
    config = json.loads((made.adapter / CONFIG).read_text())
    changed = {"target_modules": ["w1", "w2", "w3"], "target_parameters": None, "rank_pattern": {}, "alpha_pattern": {}}
    (made.adapter / CONFIG).write_text(json.dumps(config | changed))
    after = load_file(merge(made).output / "model.safetensors")
    before = load_file(made.base.path / "model.safetensors")
    for name, value in tensors.items():
        if "lora_A" in name:
            weight = name.removeprefix("base_model.model.").replace(".lora_A", "")
            exact = before[weight] + 2 * tensors[name.replace("lora_A", "lora_B")] @ value
            assert float((after[weight] - exact).abs().max()) <= 1e-6


@pytest.mark.parametrize("targets", [["q_proj", "lm_head"], ["embed_tokens", "q_proj"]])
def test_head_and_embedding_are_layers_like_others(tmp_path: Path, targets: list[str]) -> None:
    made = foreign(make_llama(tmp_path / "base"), target_modules=targets)
    copies = [name for name in load_file(made.adapter / WEIGHTS) if "base_layer" in name]
    assert len(copies) == 1
    report = merge(made)
    ours = AutoModelForCausalLM.from_pretrained(report.output).state_dict()
    assert report.merged_tensors == 3 and largest_difference(ours, merged_by_peft(made)) <= 1e-6


def test_the_copy_of_a_head_takes_the_place_of_the_bases(tmp_path: Path) -> None:
    """PEFT saves the whole head beside its adapter, and loads it over the base's."""
    made = foreign(make_llama(tmp_path / "base"), target_modules=["q_proj", "lm_head"])
    tensors = load_file(made.adapter / WEIGHTS)
    copied = "base_model.model.lm_head.base_layer.weight"
    save_file(tensors | {copied: tensors[copied] + 1}, made.adapter / WEIGHTS)
    ours = AutoModelForCausalLM.from_pretrained(merge(made).output).state_dict()
    theirs = merged_by_peft(made)
    assert float(theirs["lm_head.weight"].mean()) > 0.9 and largest_difference(ours, theirs) <= 1e-6
    save_file(tensors | {copied: tensors[copied][:90]}, made.adapter / WEIGHTS)
    (tmp_path / "merged").rename(tmp_path / "first")
    with pytest.raises(ModelError, match="its vocabulary was changed"):
        merge(made)


@pytest.mark.parametrize("targets", [["q_proj", "lm_head"], ["embed_tokens", "q_proj"]])
def test_tied_weights_are_the_reason(tmp_path: Path, targets: list[str]) -> None:
    made = foreign(make_llama(tmp_path / "base", tied=True), target_modules=targets)
    with pytest.raises(ModelError, match="tied weights"):
        merge(made)
    assert not (tmp_path / "merged").exists()


def test_saved_modules_are_refused_with_the_reason(tmp_path: Path) -> None:
    made = foreign(make_llama(tmp_path / "base"), target_modules=["q_proj"], modules_to_save=["lm_head"])
    with pytest.raises(ModelError, match="it uses modules_to_save"):
        merge(made)


def test_an_adapter_that_lacks_layers_of_its_class_is_refused(tmp_path: Path) -> None:
    made = foreign(BASES["qwen3_next"](tmp_path / "base"), target_modules=["q_proj", "k_proj"])
    tensors = load_file(made.adapter / WEIGHTS)
    save_file({name: value for name, value in tensors.items() if "k_proj" not in name}, made.adapter / WEIGHTS)
    with pytest.raises(ModelError, match="2 missing adapter tensors"):
        merge(made)


def test_notes_that_were_changed_are_refused(tmp_path: Path) -> None:
    made = train_like(open_base(BASES["gemma3"](tmp_path / "base")), "none")
    file = made.adapter / NOTES
    notes = json.loads(file.read_text())
    path = next(iter(notes["layers"]))
    gone = notes["layers"][path] | {"parts": [["gone", 0, 4]]}
    for written, why in ((gone, "has no 'gone'"), (3, "not as lorafit writes it")):
        file.write_text(json.dumps(notes | {"layers": notes["layers"] | {path: written}}))
        with pytest.raises(ModelError, match=why):
            merge(made)


@pytest.mark.parametrize(
    ("written", "why"),
    [([["gone", 0, 4]], "has no 'gone'"), ([["a", "b", 4]], "says something else"), ([], "says something else")],
)
def test_parts_in_a_record_that_was_changed_are_refused(tmp_path: Path, written: list[Any], why: str) -> None:
    made = train_like(open_base(BASES["gemma3"](tmp_path / "base")), "nf4")
    assert made.quantization is not None
    path = next(path for path, proof in made.quantization["tensors"].items() if "parts" in proof)
    made.quantization["tensors"][path]["parts"] = written
    with pytest.raises(ModelError, match=why):
        merge(made, "dequantized")
    assert not (tmp_path / "merged").exists()


def test_a_noted_merge_imports_no_model_library(tmp_path: Path) -> None:
    made = train_like(open_base(BASES["gemma3"](tmp_path / "base")), "none")
    code = """
import sys
from pathlib import Path
from lorafit.contracts import Silent
from lorafit.model.base import read_base
from lorafit.model.merge import merge_adapter
base, adapter, output = map(Path, sys.argv[1:])
merge_adapter(read_base(base), adapter, output, kind="original", reporter=Silent())
print([name for name in ("transformers", "peft") if name in sys.modules])
"""
    arguments = [str(made.base.path), str(made.adapter), str(tmp_path / "merged")]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# Before the first step


def test_what_peft_would_not_find_again_gets_no_adapter_or_is_refused_before_training(tmp_path: Path) -> None:
    """Laguna's files say `shared_expert`, its class `shared_experts`; PEFT renames that once more."""
    base = open_base(laguna(tmp_path / "base"))
    named = load(base)
    names = [name for name, _ in named.named_modules() if name.endswith("shared_experts.down_proj")]
    whole = get_peft_model(named, LoraConfig(r=4, target_modules=names))
    with pytest.raises(ModelError, match=r"PEFT renames the layers of this class .*shared_experts") as caught:
        check_shippable(whole, base)
    assert caught.value.exit_code == 5
    model = attach_adapter(load(base), lora(target_modules=["q_proj", "down_proj"]), 0)
    adapted = {name for name, _ in model.named_parameters() if ".lora_A." in name}
    assert not [name for name in adapted if "shared_experts" in name] and [x for x in adapted if "mlp.down_proj" in x]
    check_shippable(model, base)
    randomise(model)
    model.save_pretrained(tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base.path), tmp_path / "adapter")
    assert float((logits(theirs) - logits(model)).abs().max()) < 1e-5


def test_what_could_not_be_merged_is_refused_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = open_base(transposed_llama(tmp_path / "base", monkeypatch))
    model = attach_adapter(load(base), lora(target_modules=["up_proj", "q_proj"]), 0)
    with pytest.raises(ModelError, match=r"could not be merged: .*by Transpose.*and 1 layers more") as caught:
        check_shippable(model, base)
    assert caught.value.key == "adapter.target_modules"
    check_shippable(attach_adapter(load(base), lora(target_modules=["q_proj"]), 0), base)
    quantised = attach_adapter(load(base, "nf4"), lora(target_modules=["q_proj"]), 0)
    with pytest.raises(ModelError, match="2 layers would be quantised whose rows are in none") as caught:
        check_shippable(quantised, base)
    assert caught.value.key == "model.quantization"
