"""A GGUF holds what a merge holds and what an adapter adds, read back by gguf's reader and by transformers' own."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from lorafit.contracts import Silent
from lorafit.errors import ModelError, NumericsError
from lorafit.exporting.architectures import Architecture, turn_heads
from lorafit.exporting.export import export
from lorafit.exporting.exported import EngineProof
from lorafit.exporting.gguf_file import GgufTensor, check_gguf, write_gguf
from lorafit.exporting.llama_cpp import sum_exactly
from lorafit.exporting.vocabulary import require_rule
from lorafit.files.safetensors import read_index
from lorafit.kinds.adapters import adapters
from lorafit.model.adapter import finish_adapter, save_adapter
from lorafit.model.attach import attach_adapter
from tests.support.adapted import added, load, make_gpt2, open_base, randomise
from tests.support.tiny_model import make_base, make_tokenizer, tiny_llama

IDS = torch.arange(3, 40).reshape(1, -1)
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def adapted(folder: Path, kind: str = "lora", make: Any = make_base, **fields: Any) -> tuple[Any, Path]:
    """A base's model with an adapter of random factors, and the adapter's folder."""
    base = open_base(make(folder / "base"))
    model = attach_adapter(load(base), low_rank_section(kind, **fields), 0)
    randomise(model)
    (folder / "adapter").mkdir()
    save_adapter(model, folder / "adapter", base=base)
    return model.eval(), folder / "adapter"


def low_rank_section(kind: str, **fields: Any) -> Any:
    """Of rank 6 and alpha 9 where the method has these."""
    usual = {"r": 6, "alpha": 9, "dropout": 0.0}
    own = {name: value for name, value in usual.items() if name in adapters.section(kind).model_fields}
    return adapters.make_section(kind, **own | fields)


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def read(file: Path) -> Any:
    """The model in a GGUF, by transformers' reader, which knows nothing of ours."""
    return AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.float32).eval()


def tensors(file: Path) -> dict[str, torch.Tensor]:
    found = GGUFReader(file).tensors
    return {t.name: torch.from_numpy(dequantize(t.data, t.tensor_type).copy()) for t in found}


def field(file: Path, name: str) -> Any:
    return GGUFReader(file).fields[name].contents()


def unturned(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows as transformers has them: the other way round of `turn_heads`, written out."""
    size = rows.shape[0] // heads
    order = [head * size + (row % (size // 2)) * 2 + row // (size // 2) for head in range(heads) for row in range(size)]
    return rows[order]


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_merged_gguf_answers_as_the_adapter_on_its_base(tmp_path: Path, kind: str) -> None:
    model, adapter = adapted(tmp_path, kind)
    found = export(adapter, to="gguf", dtype="f32", output=tmp_path / "m.gguf")
    assert found.output == tmp_path / "m.gguf" and not list(tmp_path.glob(".tmp-*"))
    torch.testing.assert_close(logits_of(read(tmp_path / "m.gguf")), logits_of(model), rtol=1e-4, atol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path), gguf_file="m.gguf")
    own = make_tokenizer()
    text = "<|im_start|>user\nwhat opens at 9?<|im_end|>\n"
    assert tokenizer(text)["input_ids"] == own(text)["input_ids"]
    assert field(tmp_path / "m.gguf", "tokenizer.chat_template") == own.chat_template
    assert field(tmp_path / "m.gguf", "tokenizer.ggml.eos_token_id") == own.eos_token_id
    assert field(tmp_path / "m.gguf", "tokenizer.ggml.pre") == "gpt-2"
    assert field(tmp_path / "m.gguf", "tokenizer.ggml.add_bos_token") is False


@pytest.mark.parametrize("dtype", ["f16", "bf16", "q8_0"])
def test_types_round_no_further_than_they_must(tmp_path: Path, dtype: str) -> None:
    base = make_base(tmp_path / "base")
    export(base, to="gguf", dtype=dtype, output=tmp_path / "m.gguf")
    written, source = tensors(tmp_path / "m.gguf"), read_index(base)
    kinds = {t.name: t.tensor_type.name for t in GGUFReader(tmp_path / "m.gguf").tensors}
    assert kinds["blk.0.attn_q.weight"] == dtype.upper() and kinds["blk.0.attn_norm.weight"] == "F32"
    exact = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).state_dict()
    down, worst = exact["model.layers.1.mlp.down_proj.weight"], {"f16": 5e-5, "bf16": 4e-4, "q8_0": 5e-4}[dtype]
    assert 0 < float((written["blk.1.ffn_down.weight"] - down).abs().max()) < worst
    assert len(written) == len(source)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("lora", {}),
        ("rslora", {}),
        ("rslora", {"ranks": {"q_proj": 2, "down_proj": 5}}),
        ("adalora", {"init_r": 8}),
        ("vera", {}),
        ("miss", {}),
    ],
)
def test_a_gguf_adapter_adds_what_peft_adds(tmp_path: Path, kind: str, fields: dict[str, Any]) -> None:
    """llama.cpp computes alpha / rank of the tensor, and nothing else, times B A."""
    model, adapter = adapted(tmp_path, kind, **fields)
    export(adapter, to="gguf-lora", output=tmp_path / "a.gguf")
    found, alpha = tensors(tmp_path / "a.gguf"), field(tmp_path / "a.gguf", "adapter.lora.alpha")
    assert field(tmp_path / "a.gguf", "general.type") == "adapter"
    assert field(tmp_path / "a.gguf", "general.architecture") == "llama"
    names = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
    names |= {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
    layers = {path: m for path, m in model.named_modules() if hasattr(m, "base_layer")}
    assert len(found) == 2 * len(layers) == 28
    for path, layer in layers.items():
        number, own = int(re.search(r"layers\.(\d+)", path)[1]), path.rpartition(".")[2]  # type: ignore[index]
        a, b = (found[f"blk.{number}.{names[own]}.weight.lora_{part}"] for part in "ab")
        update = alpha / a.shape[0] * (b.double() @ a.double())
        if own in ("q_proj", "k_proj"):
            update = unturned(update, {"q_proj": 4, "k_proj": 2}[own])
        torch.testing.assert_close(update, added(layer), rtol=1e-5, atol=1e-7)


def test_linears_that_adalora_left_no_rank_are_left_out(tmp_path: Path) -> None:
    model, adapter = adapted(tmp_path, "adalora", init_r=8)
    for path, layer in model.named_modules():
        if hasattr(layer, "lora_E"):
            kept = 0 if path.endswith("layers.0.mlp.up_proj") else 3
            layer.lora_E["default"].data[kept:] = 0
    save_adapter(model, adapter, base=open_base(tmp_path / "base"))
    finish_adapter(adapter)
    export(adapter, to="gguf-lora", output=tmp_path / "a.gguf")
    found = tensors(tmp_path / "a.gguf")
    assert len(found) == 26 and "blk.0.ffn_up.weight.lora_a" not in found
    assert {value.shape[0] for name, value in found.items() if name.endswith("lora_a")} == {3}


def test_the_side_that_llama_cpp_is_held_to_rounds_no_sum(tmp_path: Path) -> None:
    """Sums in fp32 moved the logits of a run by 1.2e-4, more than twice as far as llama.cpp's own roundings."""
    model, _ = adapted(tmp_path)
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        wanted, in_fp32 = exact(IDS, use_cache=False).logits, logits_of(model).double()
        sum_exactly(model)
        found = logits_of(model)
    assert found.dtype == torch.float64 and model.dtype == torch.float32
    assert float((found - wanted).norm()) < 0.5 * float((in_fp32 - wanted).norm())


def test_a_plain_adapter_is_not_changed_by_a_bit(tmp_path: Path) -> None:
    model, adapter = adapted(tmp_path)
    export(adapter, to="gguf-lora", output=tmp_path / "a.gguf")
    up = model.base_model.model.model.layers[1].mlp.up_proj.lora_B["default"].weight
    assert torch.equal(tensors(tmp_path / "a.gguf")["blk.1.ffn_up.weight.lora_b"], up)
    assert field(tmp_path / "a.gguf", "adapter.lora.alpha") == 9


def make_qwen2(folder: Path) -> Path:
    return _make_other(folder, Qwen2ForCausalLM, Qwen2Config)


def make_qwen3(folder: Path) -> Path:
    return _make_other(folder, Qwen3ForCausalLM, Qwen3Config, head_dim=128)


def _make_other(folder: Path, model_class: Any, config_class: Any, **changes: Any) -> Path:
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    model = model_class(config_class(vocab_size=len(tokenizer), **SIZES | changes))
    for name, parameter in model.named_parameters():
        if "bias" in name or "norm" in name:
            parameter.data += torch.randn_like(parameter) * 0.1
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("make", [make_qwen2, make_qwen3])
def test_other_architectures_keep_their_tensors(tmp_path: Path, make: Any) -> None:
    base = make(tmp_path / "base")
    export(base, to="gguf", dtype="f32", output=tmp_path / "m.gguf")
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    torch.testing.assert_close(logits_of(read(tmp_path / "m.gguf")), logits_of(plain), rtol=1e-4, atol=1e-5)


def test_llama3s_frequencies_are_divided_as_transformers_divides_them() -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = tiny_llama(rope_parameters={**rope, "original_max_position_embeddings": 32}).config
    ours = Architecture.of(config.to_dict(), "base").rope_factors()
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 1 / 1e4 ** (torch.arange(0, 16, 2) / 16)
    torch.testing.assert_close(ours, plain / scaled, rtol=1e-5, atol=0)


def test_turned_heads_are_whole(tmp_path: Path) -> None:
    rows = torch.arange(12.0).reshape(12, 1)
    assert turn_heads(rows, 2)[:, 0].tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    assert torch.equal(unturned(turn_heads(rows, 2), 2), rows)


def test_a_file_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    values = torch.randn(8, 32)
    tensor = GgufTensor("a.weight", values)
    write_gguf(tmp_path / "a.gguf", "llama", [tensor], "q8_0", lambda writer: None, Silent())
    check_gguf(tmp_path / "a.gguf", [tensor])
    values[3, 7] += 1.0
    with pytest.raises(NumericsError, match="read back as something else than Q8_0"):
        check_gguf(tmp_path / "a.gguf", [tensor])


def test_what_does_not_fit_f16_is_refused(tmp_path: Path) -> None:
    tensor = GgufTensor("a.weight", torch.full((2, 2), 1e6))
    with pytest.raises(NumericsError, match="use --dtype bf16 or f32"):
        write_gguf(tmp_path / "a.gguf", "llama", [tensor], "f16", lambda writer: None, Silent())


@pytest.mark.parametrize(
    ("kind", "fields", "make", "message"),
    [
        ("dora", {}, make_base, "the new weight of dora is m V / ||V||, V = W + s B A, which adds no product"),
        ("ia3", {}, make_base, "the new weight of ia3 is diag(l) W, or W diag(l), which adds no product"),
        ("lora", {"modules_to_save": ["embed_tokens"]}, make_base, "it trains more than products beside linears"),
        ("lora", {}, make_gpt2, "no conversion of 'gpt2' models to GGUF is proven here (known: llama, mistral, qwen2"),
    ],
)
def test_what_a_gguf_adapter_cannot_hold_is_refused(
    tmp_path: Path, kind: str, fields: dict[str, Any], make: Any, message: str
) -> None:
    _, adapter = adapted(tmp_path, kind, make, **fields)
    with pytest.raises(ModelError, match=re.escape(message)):
        export(adapter, to="gguf-lora", output=tmp_path / "a.gguf")
    assert not (tmp_path / "a.gguf").exists() and not list(tmp_path.glob(".tmp-*"))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_act": "gelu"}, "hidden_act gelu"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "rope_type yarn"),
        ({"model_type": "mistral", "sliding_window": 16}, "sliding_window"),
    ],
)
def test_options_that_nobody_proved_are_refused(changes: dict[str, Any], named: str) -> None:
    config = {**tiny_llama().config.to_dict(), **changes}
    with pytest.raises(ModelError, match=re.escape(f"no conversion to GGUF is proven for {named}")):
        Architecture.of(config, "base")


def test_a_tokenizer_that_splits_otherwise_is_refused(tmp_path: Path) -> None:
    from tokenizers import pre_tokenizers

    rules = {
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)]),
        "": pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(False)]),
    }
    for rule, splits in rules.items():
        tokenizer = make_tokenizer()
        tokenizer.backend_tokenizer.pre_tokenizer = splits
        tokenizer.save_pretrained(tmp_path / f"t{rule}")
        if rule:
            assert require_rule(tmp_path / f"t{rule}") == rule
            continue
        with pytest.raises(ModelError, match="splits text by a rule that llama"):
            require_rule(tmp_path / "t")


def test_narrow_types_are_proven_in_f32_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound of q8_0 would hide a wrong epsilon: f32 has none to hide behind, and is gone afterwards."""
    base, asked = make_base(tmp_path / "base"), []

    def prove(file: Path, model: Path, source: Any, data_type: str) -> EngineProof:
        asked.append(
            (data_type, {t.tensor_type.name for t in GGUFReader(file).tensors if t.name == "blk.0.attn_q.weight"})
        )
        if fails:
            raise NumericsError("differs")
        return EngineProof("llama.cpp", "it", 1, 0.0, {"f32": 1e-6, "q8_0": 0.1}[data_type], 0.2, 1.0)

    fails = False
    monkeypatch.setattr("lorafit.exporting.gguf.prove_gguf", prove)
    monkeypatch.setattr("lorafit.exporting.gguf.require_llama_cpp", lambda: None)
    found = export(base, to="gguf", dtype="q8_0", verify=True, output=tmp_path / "m.gguf")
    assert asked == [("f32", {"F32"}), ("q8_0", {"Q8_0"})] and found.proof is not None
    assert found.proof.exact == 1e-6 and "0.1 of their spread (bound 0.2); in f32 1e-06" in str(found)
    fails = True
    with pytest.raises(NumericsError, match="differs"):
        export(base, to="gguf", dtype="q8_0", verify=True, output=tmp_path / "n.gguf")
    assert len(asked) == 3 and sorted(file.name for file in tmp_path.iterdir()) == ["base", "m.gguf"]
