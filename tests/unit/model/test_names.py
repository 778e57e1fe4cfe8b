"""The table of names says of every parameter which rows of the files it is, by what transformers itself loads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lorafit.errors import ModelError
from lorafit.files.safetensors import TensorEntry, read_index, read_rows
from lorafit.model.check_weights import check_weights
from lorafit.model.load import build_class
from lorafit.model.names import Part, TensorNames, names_of, note_parts, read_names, read_parts, rows_of
from tests.support.adapted import load, make_gpt2, make_llama, open_base
from tests.support.named_bases import BASES, change_file, transposed_llama


def assemble(parts: tuple[Part, ...], entries: Mapping[str, TensorEntry], shape: tuple[int, ...]) -> torch.Tensor:
    rows = [read_rows(entries[part.name].as_matrix(), part.start, part.stop).reshape(-1) for part in parts]
    return torch.cat(rows).view(shape)


@pytest.mark.parametrize("name", BASES)
def test_rows_put_together_are_what_transformers_loads(tmp_path: Path, name: str) -> None:
    base = open_base(BASES[name](tmp_path / "base"))
    names, entries = names_of(load(base)), read_index(base.path)
    assert names is not None and not names.converted
    theirs = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32).state_dict()
    assert names.parts.keys() == theirs.keys()
    for parameter, value in theirs.items():
        assert torch.equal(assemble(names.parts[parameter], entries, tuple(value.shape)), value), parameter
    used = {part.name for parts in names.parts.values() for part in parts}
    assert used | names.ignored.keys() == entries.keys() and not used & names.ignored.keys()


@pytest.mark.parametrize(
    ("name", "parameter", "first"),
    [
        ("gemma3", "model.language_model.norm.weight", "language_model.model.norm.weight"),
        ("qwen3_5", "model.layers.3.self_attn.q_proj.weight", "model.language_model.layers.3.self_attn.q_proj.weight"),
        ("gpt2_bare", "transformer.h.1.attn.c_attn.weight", "h.1.attn.c_attn.weight"),
        ("mixtral", "model.layers.0.mlp.experts.down_proj", "model.layers.0.block_sparse_moe.experts.0.w2.weight"),
        ("hrm", "model.H_module.layers.0.mlp.up_proj.weight", "model.H_module.layers.0.mlp.gate_up_proj.weight"),
    ],
)  # fmt: skip
def test_renamed_stacked_and_split(tmp_path: Path, name: str, parameter: str, first: str) -> None:
    base = open_base(BASES[name](tmp_path / "base"))
    names = names_of(load(base))
    assert names is not None
    rows = rows_of(read_index(base.path))[first]
    assert names.parts[parameter][0] == Part(first, *((128, 256) if name == "hrm" else (0, rows)))


def test_what_the_class_leaves_out_is_ignored_and_else_is_not(tmp_path: Path) -> None:
    base = open_base(BASES["qwen3_next"](tmp_path / "base"))
    ignored = names_of(load(base)).ignored  # type: ignore[union-attr]
    assert len(ignored) == 6 and all(name.startswith("mtp.") for name in ignored)
    change_file(base.path, lambda tensors: tensors | {"model.layers.0.extra.weight": torch.ones(2, 2)})
    with pytest.raises(ModelError, match=r"1 tensors that the model has no place for \(model.layers.0.extra.weight\)"):
        load(base)


def test_old_names_of_norms_are_renamed_too(tmp_path: Path) -> None:
    import transformers

    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.BertConfig(**sizes, vocab_size=96, is_decoder=True)
    transformers.BertLMHeadModel(config).save_pretrained(tmp_path)
    old = {".LayerNorm.weight": ".LayerNorm.gamma", ".LayerNorm.bias": ".LayerNorm.beta"}

    def age(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        for new, name in old.items():
            tensors = {key.replace(new, name): value for key, value in tensors.items()}
        return tensors

    change_file(tmp_path, age)
    names = names_of(load(open_base(tmp_path)))
    assert names is not None
    parts = names.parts["bert.encoder.layer.0.output.LayerNorm.weight"]
    assert parts == (Part("bert.encoder.layer.0.output.LayerNorm.gamma", 0, 64),)


def test_a_tied_head_lies_where_the_embedding_lies(tmp_path: Path) -> None:
    names = names_of(load(open_base(make_llama(tmp_path / "base", tied=True))))
    assert names is not None and names.parts["lm_head.weight"] == names.parts["model.embed_tokens.weight"]
    assert names.tied["lm_head.weight"] == {"lm_head.weight", "model.embed_tokens.weight"}


def test_experts_of_another_number_or_width_are_misfits(tmp_path: Path) -> None:
    base = open_base(BASES["qwen2_moe"](tmp_path / "base"))
    whole = read_index(base.path)
    lacking = {name: entry for name, entry in whole.items() if "layers.1.mlp.experts.3." not in name}
    with pytest.raises(
        ModelError, match=r"2 tensors do not fit: .*down_proj is made \[3, 64, 64\] of 3 tensors, .* it \[4,"
    ):
        check_weights(build_class(base), lacking, base.path)
    change_file(
        base.path, lambda t: {n: v[:, :32] if "layers.1.mlp.experts" in n and "down" in n else v for n, v in t.items()}
    )
    with pytest.raises(ModelError, match=r"1 tensors do not fit: .*\[4, 64, 32\].*\[4, 64, 64\]"):
        load(base)


def test_a_conversion_without_rows_to_follow_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = names_of(load(open_base(transposed_llama(tmp_path / "base", monkeypatch))))
    assert names is not None
    found = names.converted["model.layers.1.mlp.up_proj.weight"]
    assert found.how == "Transpose" and found.files == ("model.layers.1.mlp.up_proj.weight",)
    assert "model.layers.1.mlp.up_proj.weight" not in names.parts and not names.misfits


def test_two_tensors_for_one_parameter_are_refused(tmp_path: Path) -> None:
    base = open_base(make_gpt2(tmp_path / "base"))
    change_file(base.path, lambda t: t | {"ln_f.weight": t["transformer.ln_f.weight"] + 1})
    with pytest.raises(ModelError, match=r"no place for \((transformer\.)?ln_f.weight\)"):
        load(base)


def test_parts_as_json_come_back() -> None:
    parts = (Part("a", 0, 4), Part("b", 2, 6))
    noted: Any = note_parts(parts)
    assert noted == [["a", 0, 4], ["b", 2, 6]] and read_parts(json.loads(json.dumps(noted))) == parts
    for other in ([], [["a", 0]], [["a", 0, "4"]], None, "abc"):
        with pytest.raises((TypeError, ValueError)):
            read_parts(other)


def test_a_model_of_other_origin_has_no_table(tmp_path: Path) -> None:
    base = open_base(make_llama(tmp_path / "base"))
    assert names_of(AutoModelForCausalLM.from_pretrained(base.path)) is None
    assert isinstance(read_names(build_class(base), read_index(base.path)), TensorNames)
