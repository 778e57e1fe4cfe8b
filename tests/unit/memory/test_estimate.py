"""The closed form against live tensors of real steps, and its arithmetic."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from lorafit.contracts import Batch
from lorafit.kinds.adapters import adapters
from lorafit.kinds.optimizers import optimizers
from lorafit.kinds.quantizations import quantizations
from lorafit.kinds.tasks import tasks
from lorafit.memory import MemoryEstimate, StepMemory, StepShape, closed_form, fits
from lorafit.memory.closed_form import layer_of
from lorafit.model.attach import attach_adapter
from lorafit.model.checkpointing import set_checkpointing
from lorafit.model.class_shape import find_shape
from lorafit.model.fuse import fuse_layers
from lorafit.model.known_models import known_config
from lorafit.ops.live_tensors import LiveTensors, quantization_tensors
from lorafit.ops.recomputed_layers import Checkpointing

build_objective = tasks.make("causal-lm").build_objective

SIZES = {
    "hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512,
    "intermediate_size": 352, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GPT2 = {
    "model_type": "gpt2", "n_embd": 128, "n_layer": 3, "n_head": 4, "n_positions": 512, "vocab_size": 512,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **SIZES},
    "qwen3": {"model_type": "qwen3", **SIZES, "head_dim": 32},
    "gemma2": {"model_type": "gemma2", **SIZES, "head_dim": 32},
    "gpt2": {**GPT2, "resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0},
    "gpt2 with its dropout": GPT2,
    "phi3": {"model_type": "phi3", **SIZES},
    "opt": {
        "model_type": "opt",
        **{k: v for k, v in SIZES.items() if k not in ("intermediate_size", "num_key_value_heads")},
        "ffn_dim": 512, "word_embed_proj_dim": 128, "max_position_embeddings": 512,
    },
    "falcon": {"model_type": "falcon", **SIZES, "multi_query": True},
    "mixtral": {"model_type": "mixtral", **SIZES, "num_local_experts": 4, "num_experts_per_tok": 2},
}  # fmt: skip
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Products this small only wait for each other on several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def build(config: dict[str, Any], quantization: str, dtype: torch.dtype, attention: str) -> Any:
    import transformers

    values = dict(config)
    settings = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    model = transformers.AutoModelForCausalLM.from_config(settings, dtype=dtype, attn_implementation=attention)
    if quantization == "nf4":
        quantize(model)
    model.requires_grad_(False)
    model.config.use_cache = False
    return model


def quantize(module: torch.nn.Module) -> None:
    """Replaces the linears by bitsandbytes' 4-bit ones, as transformers does while loading."""
    import bitsandbytes as bnb

    for name, child in list(module.named_children()):
        if isinstance(child, torch.nn.Linear) and name != "lm_head":
            linear = bnb.nn.Linear4bit(
                child.in_features, child.out_features, bias=child.bias is not None, compute_dtype=torch.bfloat16
            )
            linear.weight = bnb.nn.Params4bit(
                child.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True, module=linear
            )
            linear = linear.to("cpu")
            linear.support_avx512bf16_for_cpu = False
            setattr(module, name, linear)
        else:
            quantize(child)


def measure_and_estimate(
    config: dict[str, Any],
    *,
    quantization: str = "none",
    dtype: torch.dtype = torch.bfloat16,
    checkpointing: Checkpointing = False,
    dropout: float = 0.05,
    r: int = 8,
    targets: list[str] | str = "all-linear",
    attention: str = "sdpa",
    rows: int = 2,
    tokens: int = 256,
    layers: int = 3,
) -> tuple[int, MemoryEstimate]:
    """Peak of live tensors over one optimizer step, state and gradients already there, and its estimate."""
    torch.manual_seed(0)
    config = {**config, "n_layer" if "n_layer" in config else "num_hidden_layers": layers}
    shape = find_shape(config)
    optimizer = optimizers.make("adamw")
    adapter = adapters.make("lora", r=r, dropout=dropout, target_modules=targets)
    model = attach_adapter(build(config, quantization, dtype, attention), adapter.section, 0)
    fused = fuse_layers(model)
    set_checkpointing(model, checkpointing)
    model.train()
    ids = torch.randint(3, shape.vocabulary, (rows, tokens))
    index = torch.tensor([row * tokens + column for row in range(rows) for column in range(tokens - 1)])
    batch = Batch(
        {"input_ids": ids, "label_index": index, "label_ids": ids.flatten()[index + 1]},
        len(index),
        tuple(range(rows)),
        rows * tokens,
    )
    autocast = None if dtype == torch.float32 else dtype
    objective = build_objective(model, autocast_dtype=autocast, exact=not shape.plain_head)
    trained = [p for p in model.parameters() if p.requires_grad]
    steps = optimizer.build(trained, 1e-3, torch.device("cpu"))

    def step() -> None:
        loss, weight = objective(batch)
        (loss / weight).backward()
        steps.step()
        steps.zero_grad(set_to_none=False)

    step()
    with LiveTensors() as live:
        live.note(p.data for p in model.parameters())
        live.note(model.buffers())
        live.note(quantization_tensors(model))
        live.note(p.grad for p in trained)
        live.note(value for state in steps.state.values() for value in state.values())
        step()
    asked = StepShape(
        shape, quantizations.make(quantization), adapter, optimizer, tasks.make("causal-lm"), tokens, tokens - 1,
        dtype="fp32" if dtype == torch.float32 else "bf16", attention=attention, device_kind="cpu",
    )  # fmt: skip
    layer = layer_of(asked)
    assert fused["lora"] == sum(linear.count for linear in layer.adapted if layer.fuses_linear(linear))
    assert (fused["norms"] > 0, fused["gated"] > 0) == (layer.fuses_norm(), layer.fuses_gate())
    return live.peak_bytes, closed_form(asked, rows * tokens, checkpointing)


CASES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama checkpointed": {"checkpointing": True},
    "llama half": {"checkpointing": "half"},
    "llama half of four": {"checkpointing": "half", "layers": 4},
    "llama half of two": {"checkpointing": "half", "layers": 2},
    "llama half of five, without dropout": {"checkpointing": "half", "layers": 5, "dropout": 0.0},
    "llama without dropout": {"dropout": 0.0},
    "llama without dropout, checkpointed": {"dropout": 0.0, "checkpointing": True},
    "llama q and v": {"targets": ["q_proj", "v_proj"]},
    "llama q and v, checkpointed": {"targets": ["q_proj", "v_proj"], "checkpointing": True},
    "llama down alone": {"targets": ["down_proj"]},
    "llama rank 64": {"r": 64, "checkpointing": True},
    "llama fp32": {"dtype": torch.float32},
    "llama fp32 checkpointed": {"dtype": torch.float32, "checkpointing": True},
    "llama nf4": {"quantization": "nf4"},
    "llama nf4 checkpointed": {"quantization": "nf4", "checkpointing": True},
    "llama nf4 half of four": {"quantization": "nf4", "checkpointing": "half", "layers": 4},
    "llama eager": {"attention": "eager"},
    "llama eager checkpointed": {"attention": "eager", "checkpointing": True},
    "llama one long row": {"rows": 1, "tokens": 700, "checkpointing": True},
    "llama many short rows": {"rows": 16, "tokens": 32},
    "qwen3": {},
    "qwen3 checkpointed": {"checkpointing": True},
    "qwen3 half of four": {"checkpointing": "half", "layers": 4},
    "gemma2": {"attention": "eager"},
    "gemma2 checkpointed": {"attention": "eager", "checkpointing": True},
    "gpt2": {},
    "gpt2 checkpointed": {"checkpointing": True},
    "gpt2 half of four": {"checkpointing": "half", "layers": 4},
    "gpt2 with its dropout": {},
    "phi3": {},
    "phi3 checkpointed": {"checkpointing": True},
    "opt": {},
    "opt checkpointed": {"checkpointing": True},
    "opt half of four": {"checkpointing": "half", "layers": 4},
    "falcon": {},
    "falcon checkpointed": {"checkpointing": True},
    "mixtral": {"targets": ATTENTION},
    "mixtral checkpointed": {"targets": ATTENTION, "checkpointing": True},
    "mixtral half of four": {"targets": ATTENTION, "checkpointing": "half", "layers": 4},
}


@pytest.mark.parametrize("case", CASES)
def test_estimate_meets_live_tensors(case: str) -> None:
    """Tiny models, so that every term counts; a few per cent is what in-place tricks and order of frees leave."""
    model = max((name for name in MODELS if case.startswith(name)), key=len)
    measured, guess = measure_and_estimate(MODELS[model], **CASES[case])
    error = guess.tensor_bytes / measured - 1
    print(f"{case}: measured {measured / 2**20:.2f} MiB, estimated {guess.tensor_bytes / 2**20:.2f} MiB, {error:+.1%}")
    assert abs(error) < 0.05


def ask(hub_id: str = "meta-llama/Llama-3.1-8B", **changes: Any) -> MemoryEstimate:
    config = known_config(hub_id)
    assert config is not None
    quantization = quantizations.make(changes.pop("quantization", "nf4"))
    optimizer = optimizers.make(changes.pop("optimizer", "adamw"))
    adapter = adapters.make(
        "lora",
        r=changes.pop("r", 16),
        dropout=changes.pop("dropout", 0.05),
        target_modules=changes.pop("targets", "all-linear"),
    )
    tokens, labels = changes.pop("tokens", 1024), changes.pop("labels", 2**31)
    checkpointing = changes.pop("checkpointing", True)
    step = StepShape(
        find_shape(config),
        quantization,
        adapter,
        optimizer,
        tasks.make("causal-lm"),
        tokens,
        min(labels, tokens),
        **changes,
    )
    return closed_form(step, tokens, checkpointing)


def test_components_add_up_to_the_peak_and_are_what_the_formulas_say() -> None:
    guess = ask()
    assert sum(guess.components.values()) == guess.tensor_bytes
    linears, plain = 6_979_321_856, 8_030_261_248 - 6_979_321_856
    assert guess.fixed["base_weights"] == linears // 2 + 2 * plain
    # an 8-bit constant for 64 weights, an fp32 one for 256 of those, and small tables a tensor
    assert guess.fixed["quantization_constants"] == pytest.approx(linears * (1 / 64 + 4 / 16384), rel=0.01)
    trained = 41_943_040
    assert guess.fixed["gradients"] == 4 * trained
    assert guess.fixed["optimizer_state"] == 8 * trained
    assert guess.components["kept_activations"] == 32 * 1024 * 4096 * 2
    assert guess.needed_bytes > guess.tensor_bytes * 1.1


def test_every_switch_moves_the_estimate_the_way_it_should() -> None:
    plain = ask().tensor_bytes
    assert ask(checkpointing=False).tensor_bytes > 1.8 * plain
    assert ask(tokens=2048).tensor_bytes > plain
    assert ask(r=64).tensor_bytes > plain
    assert ask(targets=["q_proj", "v_proj"]).tensor_bytes < plain
    assert ask(optimizer="adamw_8bit").tensor_bytes < plain
    assert ask(quantization="int8").tensor_bytes > plain
    assert ask(quantization="none").tensor_bytes > ask(quantization="int8").tensor_bytes
    assert ask(attention="eager", tokens=4096).tensor_bytes > ask(tokens=4096).tensor_bytes
    assert ask(dropout=0.0, checkpointing=False).tensor_bytes < ask(checkpointing=False).tensor_bytes
    assert ask(dtype="fp32").tensor_bytes > plain
    assert ask(labels=16).phases[1].total_bytes < ask().phases[1].total_bytes


def test_half_holds_what_lies_between() -> None:
    """Of 32 layers 16 keep all that they keep without, and 16 their input alone."""
    off, half, on = (ask(checkpointing=value) for value in (False, "half", True))
    assert off.tensor_bytes > half.tensor_bytes > on.tensor_bytes
    kept = [estimate.phases[1].parts["kept_activations"] for estimate in (off, half, on)]
    assert kept[1] == pytest.approx((kept[0] + kept[2]) / 2, rel=0.01)


def test_experts_are_counted_as_they_are_loaded() -> None:
    guess = ask("mistralai/Mixtral-8x7B-v0.1")
    experts = 45_097_156_608
    assert guess.unquantized_expert_bytes == 2 * experts
    assert guess.tensor_bytes > 2 * experts  # no 26 GB model, whatever its NF4 label says
    assert ask("mistralai/Mixtral-8x7B-v0.1", quantization="none").unquantized_expert_bytes == 0


def test_int8_keeps_inputs_that_checkpointing_does_not_reach() -> None:
    kept = ask(quantization="int8").components["kept_activations"]
    assert kept > 2 * ask(quantization="nf4").components["kept_activations"]


def test_fits_at_the_border() -> None:
    guess = ask()
    assert fits(guess, guess.needed_bytes, 0.0)
    assert not fits(guess, guess.needed_bytes - 1, 0.0)
    border = -(-guess.needed_bytes * 100 // 95)
    assert fits(guess, border + 1)
    assert not fits(guess, border - 2)


def test_labels_are_those_of_whole_rows() -> None:
    kinds = quantizations.make("none"), adapters.make("lora"), optimizers.make("adamw"), tasks.make("causal-lm")
    config = known_config("meta-llama/Llama-3.1-8B")
    assert config is not None

    def labels(tokens: int, longest: int, trained: int, packing: bool = False) -> int:
        return StepShape(find_shape(config), *kinds, longest, trained, packing=packing).labels_at(tokens)

    assert labels(4096, 1000, 300) == 4 * 300
    assert labels(100, 1000, 300) == 300
    assert labels(1000, 1000, 1000) == 999  # nothing predicts the first token
    assert labels(4096, 1000, 300, packing=True) == 4096


def test_json_is_plain() -> None:
    plain = json.loads(json.dumps(ask().to_json()))
    assert sum(plain["components_bytes"].values()) == plain["tensor_bytes"] == max(plain["phases_bytes"].values())


def test_first_values_are_the_peak_where_they_take_more_than_the_step() -> None:
    """They come before gradients, optimizer state and unpacked weights; a step that takes more stays what it was."""
    config = known_config("meta-llama/Llama-3.1-8B")
    assert config is not None
    adapter = adapters.make("lora", init={"kind": "loftq"})
    kinds = quantizations.make("nf4"), adapter, optimizers.make("adamw"), tasks.make("causal-lm")
    step = StepShape(find_shape(config), *kinds, 4096, 4096)
    assert step.start_bytes == 5 * 4 * 4096 * 14336
    wide = closed_form(step, 4096, False)
    assert StepMemory(step).at(4096, False) == wide  # activations of 4,096 tokens are more
    short = replace(step, row_tokens=16, row_labels=16)
    plain, found = closed_form(short, 16, True), StepMemory(short).at(16, True)
    assert found.peak_phase.name == "start" and found.phases[1:] == plain.phases
    fixed = sum(plain.fixed.values()) - plain.fixed["gradients"] - plain.fixed["optimizer_state"]
    assert found.tensor_bytes == fixed + step.start_bytes > plain.tensor_bytes
