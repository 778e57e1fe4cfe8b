"""What is loaded is what the files hold, quantised as asked, and gradients through it are right."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM
from transformers.pytorch_utils import Conv1D

from lorafit.console.wording import list_names
from lorafit.contracts import Silent
from lorafit.errors import ModelError, RecipeError
from lorafit.files.safetensors import read_index
from lorafit.kinds.quantizations import packed_kind, quantizations
from lorafit.model.attach import attach_adapter
from lorafit.model.base import Base
from lorafit.model.load import load_model, load_tokenizer
from lorafit.model.targets import choose_targets
from tests.support.adapted import load, logits, lora, make_gpt2, make_llama, open_base, randomise
from tests.support.tiny_seq2seq import make_marian_base


def edit(base: Base, change: Any) -> None:
    """Rewrites the weights after `change(tensors)`."""
    file = base.path / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def gradients(model: Any) -> dict[str, torch.Tensor]:
    """Adapter gradients of one row's loss, model in train mode."""
    model.train()
    model.zero_grad()
    ids = torch.arange(3, 35).reshape(1, -1)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_plain_load_equals_transformers(llama: Base) -> None:
    ours = load(llama)
    theirs = AutoModelForCausalLM.from_pretrained(llama.path, attn_implementation="eager")
    assert torch.equal(logits(ours), logits(theirs))
    assert not any(parameter.requires_grad for parameter in ours.parameters()) and ours.config.use_cache is False


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads the process's mappings")
def test_a_quantised_model_leaves_no_weight_file_mapped(llama: Base) -> None:
    ours = load(llama, "nf4")
    assert str(llama.path) not in Path("/proc/self/maps").read_text(encoding="utf-8")
    theirs = AutoModelForCausalLM.from_pretrained(llama.path)
    assert torch.equal(ours.get_input_embeddings().weight, theirs.get_input_embeddings().weight)


def test_no_compiler_is_imported_for_a_model_that_is_not_compiled(tmp_path: Path) -> None:
    base = make_llama(tmp_path / "base")
    code = """
        import os, sys
        sys.path.insert(0, sys.argv[2])
        from pathlib import Path
        from tests.support.adapted import load, lora, open_base
        from lorafit.model.attach import attach_adapter
        attach_adapter(load(open_base(Path(sys.argv[1])), "nf4"), lora(), 0)
        print(*(name in sys.modules for name in ("bitsandbytes", "torch._inductor.compile_fx")))
        print("TORCHDYNAMO_DISABLE" in os.environ)
    """
    root = Path(__file__).parents[3]
    command = [sys.executable, "-c", textwrap.dedent(code), str(base), str(root)]
    said = subprocess.run(command, check=True, capture_output=True, text=True, cwd=root).stdout
    assert said.split() == ["True", "False", "False"]


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("tied", [True, False])
def test_quantised_linears_only_and_the_rest_in_the_compute_dtype(tmp_path: Path, kind: str, tied: bool) -> None:
    import bitsandbytes as bnb

    model = load(open_base(make_llama(tmp_path / "base", tied=tied)), kind, dtype=torch.bfloat16)
    wanted = bnb.nn.Linear8bitLt if kind == "int8" else bnb.nn.Linear4bit
    packed = [name for name, module in model.named_modules() if isinstance(module, wanted)]
    assert len(packed) == 14 and not any("lm_head" in name for name in packed)
    plain = {name: p.dtype for name, p in model.named_parameters() if "proj" not in name}
    assert set(plain.values()) == {torch.bfloat16} and (tied or "lm_head.weight" in plain)
    assert torch.isfinite(logits(model)).all()


@pytest.mark.parametrize("kind", ["nf4", "int8", "none"])
def test_memory_that_runs_out_while_loading_is_not_told_as_a_broken_model(
    llama: Base, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers collects what fails while a weight is quantised, and says that there were issues."""
    import bitsandbytes as bnb
    from transformers import core_model_loading

    ran_out = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")

    def fail(*_: object, **__: object) -> None:
        raise ran_out

    collecting = core_model_loading.log_conversion_errors
    place, name = {
        "nf4": (bnb.functional, "quantize_4bit"),
        "int8": (bnb.functional, "int8_vectorwise_quant"),
        "none": (core_model_loading, "_materialize_copy"),
    }[kind]
    monkeypatch.setattr(place, name, fail)
    with pytest.raises(RuntimeError) as caught:
        load(llama, kind)
    assert caught.value is ran_out
    assert core_model_loading.log_conversion_errors is collecting


@pytest.mark.parametrize("double_quant", [True, False])
def test_double_quant_is_the_sections(llama: Base, double_quant: bool) -> None:
    model = load(llama, "nf4", double_quant=double_quant)
    state = model.model.layers[0].mlp.up_proj.weight.quant_state
    assert state.nested is double_quant and state.quant_type == "nf4"


def test_four_bit_weights_are_not_repacked_by_a_forward_in_eval_mode(llama: Base) -> None:
    """bitsandbytes on a CPU with AVX512-BF16 repacks them for good; gradients after it were 5 times too small."""
    model = attach_adapter(load(llama, "nf4", dtype=torch.bfloat16), lora(), 0)
    randomise(model)
    before = gradients(model)
    codes = {n: p.data.clone() for n, p in model.named_parameters() if p.dtype is torch.uint8}
    logits(model)
    for name, parameter in model.named_parameters():
        if name in codes:
            assert torch.equal(parameter.data, codes[name])
            assert not getattr(parameter.quant_state, "packing_format_for_cpu", False)
    after = gradients(model)
    assert all(torch.equal(before[name], after[name]) for name in before) and len(before) == 28


@pytest.mark.parametrize("kind", ["none", "nf4", "int8"])
def test_gpt2_conv1d_is_quantised_and_adapted(tmp_path: Path, kind: str) -> None:
    base = open_base(make_gpt2(tmp_path / "base"))
    model = load(base, kind)
    plain = AutoModelForCausalLM.from_pretrained(base.path, attn_implementation="eager")
    difference = float((logits(model) - logits(plain)).abs().max())
    assert difference == 0.0 if kind == "none" else 0.0 < difference < 0.2
    layers = [m for n, m in model.named_modules() if n.rsplit(".", 1)[-1] in ("c_attn", "c_proj", "c_fc")]
    assert len(layers) == 8 and all(isinstance(m, Conv1D) for m in layers) is (kind == "none")
    adapted = attach_adapter(model, lora(), 0)
    assert adapted.peft_config["default"].fan_in_fan_out is (kind == "none")
    assert adapted.peft_config["default"].target_modules == {"c_attn", "c_fc", "c_proj"}
    before = logits(adapted)
    randomise(adapted)
    found = gradients(adapted)
    assert len(found) == 16 and all(gradient.abs().sum() > 0 for gradient in found.values())
    assert not torch.equal(before, logits(adapted))


def test_four_bit_on_a_cpu_leaves_out_rows_that_are_no_multiple_of_64(tmp_path: Path) -> None:
    """bitsandbytes 0.50 dequantises them with the constants of other blocks, without a word."""
    base = open_base(make_llama(tmp_path / "base", intermediate_size=160))
    reporter = Silent()
    section = quantizations.make_section("nf4")
    options = {"dtype": torch.float32, "compute_dtype": torch.float32, "attention": "eager", "device": "cpu"}
    model = load_model(base, quantization=section, reporter=reporter, **options)
    assert type(model.model.layers[0].mlp.down_proj) is torch.nn.Linear
    assert "2 linears stay unquantised" in reporter.warnings[0] and "down_proj" in reporter.warnings[0]
    assert type(model.model.layers[0].mlp.up_proj) is not torch.nn.Linear
    weight = load_file(base.path / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]
    assert torch.equal(model.model.layers[0].mlp.down_proj.weight, weight)


@pytest.mark.parametrize(("kind", "fields"), [("nf4", {}), ("nf4", {"double_quant": False}), ("fp4", {})])
@pytest.mark.parametrize("width", [160, 127])
def test_on_a_cpu_the_base_has_the_values_of_a_run_on_a_card(
    tmp_path: Path, kind: str, fields: dict[str, Any], width: int
) -> None:
    """A card quantises rows of any width; what bitsandbytes cannot hold here is plain, with what codes stand for."""
    base = open_base(make_llama(tmp_path / "base", intermediate_size=width))
    options = {"dtype": torch.float32, "compute_dtype": torch.float32, "attention": "eager", "device": "cpu"}
    options |= {"quantization": quantizations.make_section(kind, **fields)}
    linears = [name for name, module in load(base).named_modules() if name.endswith("_proj")]
    reporter = Silent()
    model = load_model(base, quantised=set(linears), reporter=reporter, **options)
    down, name = model.model.layers[1].mlp.down_proj, "model.layers.1.mlp.down_proj"
    assert type(down) is torch.nn.Linear and not reporter.warnings
    used = {"weights_dtype": "float32", "double_quant": True, **fields}
    rebuilt = packed_kind(kind).rebuild(read_index(base.path)[f"{name}.weight"], used, {})
    torch.testing.assert_close(down.weight, rebuilt.read(0, 128), rtol=1e-6, atol=1e-9)
    weight = load_file(base.path / "model.safetensors")[f"{name}.weight"]
    assert (down.weight - weight).abs().max() > 1e-3
    few = load_model(base, quantised={"model.layers.0.self_attn.q_proj"}, reporter=Silent(), **options)
    plain = [path for path, module in few.named_modules() if path in linears and type(module) is torch.nn.Linear]
    assert plain == [path for path in linears if path != "model.layers.0.self_attn.q_proj"]  # as on a CPU's run
    assert torch.equal(few.model.layers[1].mlp.down_proj.weight, weight)


def test_a_transposed_weight_of_a_cards_run_is_rounded_as_it_was_quantised(tmp_path: Path) -> None:
    torch.manual_seed(1)
    config = GPT2Config(n_embd=64, n_inner=160, n_layer=1, n_head=4, vocab_size=96, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    base, name = open_base(tmp_path / "base"), "transformer.h.0.mlp.c_proj"
    section = quantizations.make_section("nf4")
    options = {"dtype": torch.float32, "compute_dtype": torch.float32, "attention": "eager", "device": "cpu"}
    model = load_model(base, quantization=section, quantised={name}, reporter=Silent(), **options)
    entry = next(entry for path, entry in read_index(base.path).items() if path.endswith("h.0.mlp.c_proj.weight"))
    used = {"weights_dtype": "float32", "double_quant": True}
    rebuilt = packed_kind("nf4").rebuild(entry, used, {"transposed": True})
    layer = model.get_submodule(name)
    assert type(layer) is Conv1D and type(model.get_submodule("transformer.h.0.mlp.c_fc")) is Conv1D
    torch.testing.assert_close(layer.weight, rebuilt.read(0, 160), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("columns", [64, 128, 576])
def test_bitsandbytes_dequantises_rows_of_whole_blocks_rightly(columns: int) -> None:
    from bitsandbytes import functional

    weight = torch.randn(32, columns)
    codes, state = functional.quantize_4bit(weight, quant_type="nf4", blocksize=64)
    pairs = torch.stack([codes.reshape(-1) >> 4, codes.reshape(-1) & 15], dim=1).reshape(-1).long()
    exact = (state.code[pairs] * state.absmax.repeat_interleave(64)).reshape(weight.shape)
    assert torch.equal(functional.dequantize_4bit(codes, state), exact)


def test_missing_extra_and_misshapen_weights_are_counted_before_loading(llama: Base) -> None:
    whole = load_file(llama.path / "model.safetensors")

    def halve(tensors: dict[str, torch.Tensor]) -> None:
        for name in sorted(whole)[::2]:
            del tensors[name]

    edit(llama, halve)
    with pytest.raises(ModelError, match=r"11 missing tensors \(lm_head.weight, model") as caught:
        load(llama)
    assert caught.value.exit_code == 5
    edit(llama, lambda tensors: tensors.update(whole, zzz=torch.ones(2), yyy=torch.ones(1)))
    with pytest.raises(ModelError, match=r"2 tensors that the model has no place for \(yyy, zzz\)"):
        load(llama)
    edit(llama, lambda tensors: (tensors.pop("zzz"), tensors.pop("yyy")))
    config = llama.path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"intermediate_size": 256}))
    with pytest.raises(ModelError, match=r"6 tensors do not fit: .* is \[\d+, \d+\] .* makes it \[\d+, \d+\]"):
        load(open_base(llama.path))


def test_a_model_that_lacks_its_head_alone_may_be_an_encoder(llama: Base) -> None:
    edit(llama, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(ModelError, match=r"1 missing tensors \(lm_head.weight\)") as caught:
        load(llama)
    assert caught.value.one_line.endswith("train task: sequence-classification, or get the whole model")


@pytest.mark.parametrize("kind", ["none", "nf4", "fp4", "int8"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_weights_that_are_not_finite_are_named(llama: Base, kind: str, value: float, name: str) -> None:
    def poke(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].reshape(-1)[77] = value

    edit(llama, poke)
    with pytest.raises(ModelError, match=rf"1 tensors hold non-finite values, NaN or Inf \({name}\)"):
        load(llama, kind)


def test_double_quantised_constants_show_it_too(llama: Base) -> None:
    edit(llama, lambda t: t["model.layers.1.mlp.up_proj.weight"].reshape(-1)[77:78].fill_(float("nan")))
    with pytest.raises(ModelError, match="non-finite"):
        load(llama, "nf4", double_quant=False)


def test_integers_where_floats_belong(llama: Base) -> None:
    edit(llama, lambda t: t.update({"model.norm.weight": torch.ones(128, dtype=torch.int32)}))
    with pytest.raises(ModelError, match=r"model.norm.weight holds I32"):
        load(llama)


def test_a_tied_head_may_be_absent_and_old_buffers_may_be_there(tmp_path: Path) -> None:
    base = open_base(make_llama(tmp_path / "base", tied=True))
    names = load_file(base.path / "model.safetensors")
    assert "lm_head.weight" not in names
    edit(base, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)}))
    model = load(base)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_names_without_the_models_prefix_are_found(tmp_path: Path) -> None:
    base = open_base(make_gpt2(tmp_path / "base"))
    before = logits(load(base))

    def strip(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)

    edit(base, strip)
    assert torch.equal(logits(load(base)), before)


def test_fused_experts_load_and_the_router_is_no_target(tmp_path: Path) -> None:
    config = MixtralConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=96, num_local_experts=3, max_position_embeddings=64,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(tmp_path / "moe")
    base = open_base(tmp_path / "moe")
    plain = AutoModelForCausalLM.from_pretrained(base.path, attn_implementation="eager")
    model = load(base)
    assert torch.equal(logits(model), logits(plain))
    assert choose_targets(model, "all-linear") == ["k_proj", "o_proj", "q_proj", "v_proj"]
    with pytest.raises(RecipeError, match="'gate' matches no linear"):
        choose_targets(model, ["gate"])


def test_unknown_targets_list_what_exists(llama: Base) -> None:
    model = load(llama)
    with pytest.raises(RecipeError, match="'q_prj' matches no linear") as caught:
        attach_adapter(model, lora(target_modules=["q_prj"]), 0)
    assert "did you mean q_proj?" in str(caught.value) and "up_proj" in str(caught.value)
    with pytest.raises(RecipeError, match="'lm_head' matches no linear"):
        attach_adapter(model, lora(target_modules=["lm_head"]), 0)


def test_a_target_whose_name_another_module_shares_is_named_by_its_path(llama: Base) -> None:
    model = load(llama)
    model.model.layers[0].mlp.q_proj = torch.nn.Identity()
    chosen = choose_targets(model, ["q_proj"])
    assert chosen == ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]


def test_fresh_adapters_are_fp32_start_as_nothing_and_follow_the_seed(llama: Base) -> None:
    base = load(llama, "nf4", dtype=torch.bfloat16)
    before = logits(base)
    first = attach_adapter(base, lora(), 7)
    weights = {n: p.detach().clone() for n, p in first.named_parameters() if p.requires_grad}
    assert {p.dtype for p in weights.values()} == {torch.float32} and len(weights) == 28
    assert torch.equal(logits(first), before)
    state = torch.get_rng_state()
    again = attach_adapter(load(llama, "nf4", dtype=torch.bfloat16), lora(), 7)
    assert torch.equal(torch.get_rng_state(), state), "building an adapter moved the run's random numbers"
    assert all(torch.equal(p, weights[n]) for n, p in again.named_parameters() if p.requires_grad)
    other = attach_adapter(load(llama, "nf4", dtype=torch.bfloat16), lora(), 8)
    assert any(not torch.equal(p, weights[n]) for n, p in other.named_parameters() if p.requires_grad)


def test_a_missing_tokenizer_is_our_error(llama: Base) -> None:
    with pytest.raises(ModelError, match="tokenizer cannot be read"):
        load_tokenizer(llama)


def test_a_tokenizer_names_the_package_that_it_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoTokenizer
    from transformers.utils.import_utils import SENTENCEPIECE_IMPORT_ERROR

    make_marian_base(tmp_path / "base", {"source": ["the red mug"] * 9, "target": ["der rote Becher"] * 9})
    base = open_base(tmp_path / "base")
    assert load_tokenizer(base)(text_target="der").input_ids[-1] == 0

    def refuse(*_: Any, **__: Any) -> None:  # the class is transformers' placeholder where the package is not there
        raise ImportError(SENTENCEPIECE_IMPORT_ERROR.format("MarianTokenizer"))

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", refuse)
    with pytest.raises(ModelError, match="MarianTokenizer needs the package sentencepiece") as raised:
        load_tokenizer(base)
    assert 'pip install "lorafit[sentencepiece]"' in str(raised.value)


def test_names_are_listed_short() -> None:
    assert list_names("dcba") == "a, b, c, d" and list_names("fedcba") == "a, b, c, d and 2 more"


def test_flash_attention_without_its_package_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the package `kernels` transformers would fetch one from the hub and run it."""
    asked: list[str] = []
    monkeypatch.setattr("transformers.modeling_utils.is_kernels_available", lambda: True)
    monkeypatch.setattr("transformers.modeling_utils.lazy_import_flash_attention", lambda name, **_: asked.append(name))
    base, plain = open_base(make_llama(tmp_path / "base")), quantizations.make_section("none")
    same = {"dtype": torch.bfloat16, "compute_dtype": torch.bfloat16, "attention": "flash_attention_2", "device": "cpu"}
    with pytest.raises(ModelError, match="flash_attention_2 needs the package flash-attn"):
        load_model(base, quantization=plain, **same, reporter=Silent())
    assert asked == []
