"""Fused layers compute what PEFT and transformers compute, in training, and step aside from everything unusual."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import bitsandbytes
import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GlmConfig,
    GlmForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SeedOssConfig,
    SeedOssForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lorafit.model.fuse import fuse_layers
from lorafit.model.fused_lora import cast_adapters, keep_unpacked
from lorafit.model.targets import choose_targets
from lorafit.ops.dropout import drop
from lorafit.ops.layer_functions import rms_norm, rotate, silu_product
from lorafit.ops.live_tensors import unpacked_weights
from lorafit.ops.lora_gated import lora_gated
from lorafit.ops.lora_linear import AdaptedWeight, lora_linear
from tests.support.tiny_model import tiny_llama
from tests.support.zoo_models import tiny_config

SIZES = {
    "vocab_size": 97, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0,
}  # fmt: skip
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def llama(dtype: torch.dtype = torch.float32, **lora: Any) -> Any:
    torch.manual_seed(0)
    return with_lora(tiny_llama(seed=None, **SIZES).to(dtype), **lora)


def with_lora(model: Any, **options: Any) -> Any:
    settings = {"r": 8, "lora_alpha": 24, "target_modules": LINEARS, "lora_dropout": 0.0, "init_lora_weights": False}
    adapted = get_peft_model(model, LoraConfig(**{**settings, **options}))
    adapted.train()
    return adapted


def in_nf4(model: Any, dtype: torch.dtype) -> Any:
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, torch.nn.Linear) and name in LINEARS:
                linear = bitsandbytes.nn.Linear4bit(
                    child.in_features, child.out_features, child.bias is not None, compute_dtype=dtype, quant_type="nf4"
                )
                linear.load_state_dict(child.state_dict())
                linear.to(dtype).to("cpu")
                linear.support_avx512bf16_for_cpu = False
                setattr(parent, name, linear)
    return model


@pytest.fixture(autouse=True)
def same_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT's layers drop what the fused ones drop."""
    monkeypatch.setattr(torch.nn.Dropout, "forward", lambda self, x: drop(x, self.p) if self.training else x)


def loss_and_gradients(model: Any, dtype: torch.dtype | None = None) -> tuple[float, dict[str, torch.Tensor]]:
    torch.manual_seed(1)  # dropout
    ids = torch.randint(3, 97, (2, 24), generator=torch.Generator().manual_seed(0))
    model.zero_grad()
    with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Of all gradients together, relative."""
    assert a.keys() == b.keys() and a
    left, right = (torch.cat([gradients[name].flatten() for name in a]) for gradients in (a, b))
    return float((left - right).norm() / left.norm())


@pytest.mark.parametrize(
    "options",
    [{}, {"lora_dropout": 0.3}, {"use_rslora": True, "lora_alpha": 8}],  # a larger scaling amplifies both roundings
    ids=["plain", "dropout", "rslora"],
)
@pytest.mark.parametrize("quantised", [False, True], ids=["fp32", "nf4"])
def test_losses_and_gradients_are_pefts_in_fp32(options: dict[str, Any], quantised: bool) -> None:
    torch.manual_seed(0)
    base = tiny_llama(seed=None, **SIZES)
    model = with_lora(in_nf4(base, torch.float32) if quantised else base, **options)
    loss, gradients = loss_and_gradients(model)
    assert fuse_layers(model) == {"lora": 14, "norms": 5, "gated": 2, "rotary": 2}
    fused_loss, fused_gradients = loss_and_gradients(model)
    assert fused_loss == pytest.approx(loss, rel=1e-6)
    assert fused_loss != loss or difference(gradients, fused_gradients) > 0  # it is another way of computing
    assert difference(gradients, fused_gradients) < 1e-5


def test_bf16_stays_within_rounding() -> None:
    torch.manual_seed(0)
    exact = llama()
    rounded = copy.deepcopy(exact).to(torch.bfloat16)
    for name, parameter in rounded.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    for module in rounded.modules():
        if hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = False
    _, truth = loss_and_gradients(exact)
    _, pefts = loss_and_gradients(rounded, torch.bfloat16)
    fuse_layers(rounded)
    _, ours = loss_and_gradients(rounded, torch.bfloat16)
    assert difference(truth, ours) < 1.2 * difference(truth, pefts)


def test_biases_and_head_norms() -> None:
    torch.manual_seed(0)
    model = with_lora(Qwen2ForCausalLM(Qwen2Config(**SIZES)))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    loss, gradients = loss_and_gradients(model)
    fuse_layers(model)
    fused_loss, fused_gradients = loss_and_gradients(model)
    assert fused_loss == pytest.approx(loss, rel=1e-6)
    assert difference(gradients, fused_gradients) < 1e-5


def test_checkpointing_gives_the_same_gradients() -> None:
    model = llama()
    fuse_layers(model)
    _, gradients = loss_and_gradients(model)
    model.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    _, again = loss_and_gradients(model)
    assert difference(gradients, again) == 0


def test_other_norms_and_other_gates_are_left_alone() -> None:
    """Gemma's norm multiplies by 1 + weight, and its gate is a GELU."""
    model = with_lora(Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=32)))
    assert fuse_layers(model) == {"lora": 14, "norms": 0, "gated": 0, "rotary": 2}


def test_an_mlp_that_drops_is_left_alone_though_it_is_loaded_for_evaluation() -> None:
    """Seed-OSS drops behind its MLP by a function: no layer of it says so, and only training shows it."""
    sizes = SIZES | {"head_dim": 32, "attention_dropout": 0.0}
    for drops, expected in ((0.0, 2), (0.1, 0)):
        model = with_lora(SeedOssForCausalLM(SeedOssConfig(**sizes, residual_dropout=drops)).eval()).eval()
        assert fuse_layers(model)["gated"] == expected


def attentions(model: Any) -> list[Any]:
    return [module for name, module in model.named_modules() if name.endswith("self_attn")]


@pytest.mark.parametrize(
    "build",
    [
        lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=32)),
        lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=32)),
        lambda: SmolLM3ForCausalLM(SmolLM3Config(**SIZES, no_rope_layers=[1, 0])),
    ],
    ids=["head norms", "capped scores", "a layer without rotation"],
)
def test_rotations_are_transformers_own(build: Callable[[], Any]) -> None:
    torch.manual_seed(0)
    model = with_lora(build())
    loss, gradients = loss_and_gradients(model)
    assert fuse_layers(model)["rotary"] == 2
    fused_loss, fused_gradients = loss_and_gradients(model)
    assert fused_loss == pytest.approx(loss, rel=1e-6)
    assert difference(gradients, fused_gradients) < 1e-5


def test_rotations_in_bf16_are_as_exact_as_transformers() -> None:
    torch.manual_seed(0)
    exact, upstream, angles = (
        torch.randn(2, 3, 9, 32),
        torch.randn(2, 3, 9, 32),
        6 * torch.rand(2, 9, 16).repeat(1, 1, 2),
    )
    results = []
    for dtype in (torch.float64, torch.bfloat16):
        x, cos, sin = (tensor.bfloat16().to(dtype) for tensor in (exact, angles.cos(), angles.sin()))
        leaf = x.requires_grad_()
        theirs, _ = modeling_llama.apply_rotary_pos_emb(leaf, leaf, cos, sin)
        for output in (theirs, rotate(leaf, leaf, cos.unsqueeze(1), sin.unsqueeze(1))[0]):
            gradient = torch.autograd.grad(output, leaf, upstream.bfloat16().to(dtype), retain_graph=True)[0]
            results.append(torch.stack([output.detach().double(), gradient.double()]))
    truth, same, pefts, ours = results
    assert torch.allclose(truth, same, atol=1e-12)
    assert (ours - truth).norm() < 1.05 * (pefts - truth).norm()


def test_rotations_of_other_layouts_are_left_alone() -> None:
    """GLM rotates pairs of neighbours, and half of each head; GPT-NeoX's file has the name for a part of each head."""
    torch.manual_seed(0)
    glm = GlmForCausalLM(GlmConfig(**SIZES, head_dim=32))
    assert fuse_layers(glm)["rotary"] == 0
    neox = GPTNeoXForCausalLM(
        GPTNeoXConfig(vocab_size=97, hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4)
    )
    neox.train()
    loss, gradients = loss_and_gradients(neox)
    fuse_layers(neox)
    fused_loss, fused_gradients = loss_and_gradients(neox)
    assert fused_loss == pytest.approx(loss, rel=1e-6)
    assert difference(gradients, fused_gradients) < 1e-5


def test_a_decorated_or_hooked_attention_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, own = llama(), modeling_llama.LlamaAttention.forward
    hooked = attentions(model)[0]
    hooked.forward = hooked.forward
    assert fuse_layers(model)["rotary"] == 1
    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", functools.wraps(own)(lambda *a, **k: own(*a, **k)))
    assert fuse_layers(llama())["rotary"] == 0


def test_transformers_keeps_its_own_rotation() -> None:
    """Only instances change; without gradients, and in mixed dtypes, they call their file's own function."""
    own, calls = modeling_llama.apply_rotary_pos_emb, []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args[0].dtype)
        return own(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling_llama, "apply_rotary_pos_emb", counted)
        model = llama()
        fuse_layers(model)
        assert modeling_llama.apply_rotary_pos_emb is counted
    calls.clear()
    fused = attentions(model)[0].forward.__globals__["apply_rotary_pos_emb"]
    q, angles = torch.randn(1, 2, 3, 8, requires_grad=True), torch.rand(1, 3, 8)
    fused(q, q, angles, angles)
    assert not calls
    with torch.no_grad():
        fused(q, q, angles, angles)
    fused(q.bfloat16(), q.bfloat16(), angles, angles)
    fused(q, q, angles, angles, 1)
    assert calls == [torch.float32, torch.bfloat16, torch.float32]
    assert attentions(llama())[0].forward.__func__ is modeling_llama.LlamaAttention.forward


def add_second(model: Any) -> None:
    model.add_adapter("second", LoraConfig(r=4, target_modules=LINEARS, init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])


UNUSUAL: dict[str, Callable[[Any], object]] = {
    "two adapters": add_second,
    "disabled": lambda model: model.base_model.disable_adapter_layers(),
    "merged": lambda model: model.merge_adapter(),
}


@pytest.mark.parametrize("change", UNUSUAL.values(), ids=UNUSUAL.keys())
def test_the_unusual_is_pefts_own(change: Callable[[Any], object]) -> None:
    plain, fused = llama(), llama()
    fuse_layers(fused)
    for model in (plain, fused):
        torch.manual_seed(2)
        change(model)
    ids = torch.randint(3, 97, (2, 24))
    assert torch.allclose(plain(input_ids=ids).logits, fused(input_ids=ids).logits, atol=1e-5)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True, "target_modules": ["q_proj"]}])
def test_variants_of_lora_are_pefts_own(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    config = Qwen2Config(**SIZES)  # q_proj has a bias
    model = with_lora(Qwen2ForCausalLM(config), **options)
    loss, gradients = loss_and_gradients(model)
    fuse_layers(model)
    fused_loss, fused_gradients = loss_and_gradients(model)
    assert fused_loss == pytest.approx(loss, rel=1e-6)
    assert difference(gradients, fused_gradients) < 1e-4


def test_without_gradients_the_forward_is_the_librarys_own() -> None:
    model = llama()
    ids = torch.randint(3, 97, (2, 24))
    with torch.no_grad():
        before = model(input_ids=ids).logits
        fuse_layers(model)
        assert torch.equal(before, model(input_ids=ids).logits)


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Grows with each MLP whose gate and up projections ran as one operation."""
    found: list[torch.Size] = []

    def counted(x: torch.Tensor, *linears: AdaptedWeight) -> Any:
        found.append(x.shape)
        return lora_gated(x, *linears)

    monkeypatch.setattr("lorafit.model.proven_forwards.lora_gated", counted)
    return found


GATED: dict[str, dict[str, Any]] = {
    "all linears": {},
    "of the MLP alone": {"target_modules": ["gate_proj", "up_proj", "down_proj"]},  # the first input has no gradient
    "two ranks": {"rank_pattern": {"up_proj": 3}, "alpha_pattern": {"gate_proj": 5}},
    "without adapted down": {"target_modules": ["gate_proj", "up_proj"]},
}


@pytest.mark.parametrize("options", GATED.values(), ids=GATED.keys())
@pytest.mark.parametrize("quantised", [False, True], ids=["fp32", "nf4"])
def test_gate_and_up_are_one_operation(options: dict[str, Any], quantised: bool, joined: list[torch.Size]) -> None:
    torch.manual_seed(0)
    base = tiny_llama(seed=None, **SIZES, mlp_bias=True)
    for name, parameter in base.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model = with_lora(in_nf4(base, torch.float32) if quantised else base, **options)
    loss, gradients = loss_and_gradients(model)
    fuse_layers(model)
    fused_loss, fused_gradients = loss_and_gradients(model)
    assert len(joined) == 2
    assert fused_loss == pytest.approx(loss, rel=1e-6)
    assert difference(gradients, fused_gradients) < 1e-5


def test_frozen_halves_get_no_gradient(joined: list[torch.Size]) -> None:
    model = llama()
    fuse_layers(model)
    _, gradients = loss_and_gradients(model)
    frozen = ("gate_proj.lora_A", "up_proj.lora_A", "up_proj.lora_B")  # LoRA-FA freezes A
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and not any(part in name for part in frozen))
    _, fewer = loss_and_gradients(model)
    assert len(joined) == 4
    assert fewer.keys() == {name for name in gradients if not any(part in name for part in frozen)}
    assert all(torch.equal(gradients[name], gradient) for name, gradient in fewer.items())


def listen_at_gates(model: Any) -> None:
    for name, module in model.named_modules():
        if name.endswith("gate_proj"):
            module.register_forward_hook(lambda module, args, output: 2 * output)


APART: dict[str, tuple[dict[str, Any], Callable[[Any], object]]] = {
    "dropout": ({"lora_dropout": 0.3}, lambda model: None),
    "only gate": ({"target_modules": ["gate_proj", "q_proj"]}, lambda model: None),
    "dora": ({"use_dora": True}, lambda model: None),
    "listened to": ({}, listen_at_gates),
    "two adapters": ({}, lambda model: add_second(model)),
    "merged": ({}, lambda model: model.merge_adapter()),
}


@pytest.mark.parametrize(("options", "change"), APART.values(), ids=APART.keys())
def test_gate_and_up_run_apart(
    options: dict[str, Any], change: Callable[[Any], object], joined: list[torch.Size]
) -> None:
    plain, fused = llama(**options), llama(**options)
    fuse_layers(fused)
    ids, logits = torch.randint(3, 97, (2, 24)), []
    for model in (plain, fused):
        torch.manual_seed(2)
        change(model)
        logits.append(model(input_ids=ids).logits)
    assert not joined
    assert torch.allclose(*logits, atol=2e-5)


def test_without_dropout_in_evaluation_they_are_joined(joined: list[torch.Size]) -> None:
    """Dropout is for training; gradients may be recorded outside of it."""
    plain, fused = llama(lora_dropout=0.3).eval(), llama(lora_dropout=0.3).eval()
    fuse_layers(fused)
    (loss, gradients), (fused_loss, fused_gradients) = loss_and_gradients(plain), loss_and_gradients(fused)
    assert len(joined) == 2
    assert fused_loss == pytest.approx(loss, rel=1e-6)
    assert difference(gradients, fused_gradients) < 1e-5


@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("options", [{}, {"lora_dropout": 0.3}], ids=["no dropout", "dropout"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_kept_copies_change_no_bit(
    dtype: torch.dtype, options: dict[str, Any], checkpointed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = in_nf4_with_lora(dtype, **options)
    fuse_layers(model)
    if checkpointed:
        model.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    autocast = None if dtype == torch.float32 else dtype
    unpacked = count_unpacking(monkeypatch)
    loss, gradients = loss_and_gradients(model, autocast)
    assert len(unpacked) == (3 * 14 if checkpointed else 2 * 14 - 3)  # the first q, k, v: no gradient for their input
    assert keep_unpacked(model) == 14
    unpacked.clear()
    kept_loss, kept_gradients = loss_and_gradients(model, autocast)
    assert not unpacked
    assert kept_loss == loss
    assert gradients.keys() == kept_gradients.keys()
    assert all(torch.equal(kept_gradients[name], gradient) for name, gradient in gradients.items())
    assert keep_unpacked(model) == 14 and not unpacked  # they are there
    assert keep_unpacked(model, False) == 0 and not unpacked_weights(model)
    loss_and_gradients(model, autocast)
    assert unpacked


def in_nf4_with_lora(dtype: torch.dtype, **options: Any) -> Any:
    torch.manual_seed(0)
    base = in_nf4(tiny_llama(seed=None, **SIZES).to(dtype), dtype)
    base.is_loaded_in_4bit = True  # so that PEFT takes its 4-bit layer
    model = with_lora(base, **options)
    for module in model.modules():
        if dtype != torch.float32 and hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = False  # as the objective does under autocast
    return model


def count_unpacking(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Grows with each weight that is dequantised."""
    from bitsandbytes import functional

    real, found = functional.dequantize_4bit, []

    def counted(weight: torch.Tensor, state: Any) -> torch.Tensor:
        found.append(state.shape)
        return real(weight, state)

    monkeypatch.setattr(functional, "dequantize_4bit", counted)
    return found


def test_kept_copies_are_in_no_state_and_change_no_base() -> None:
    model = in_nf4_with_lora(torch.float32)
    fuse_layers(model)
    names, state = [n for n, _ in model.named_parameters()], {k: v.clone() for k, v in model.state_dict().items()}
    buffers, adapter = [n for n, _ in model.named_buffers()], get_peft_model_state_dict(model)
    keep_unpacked(model)
    loss_and_gradients(model)
    assert [n for n, _ in model.named_parameters()] == names
    assert [n for n, _ in model.named_buffers()] == buffers
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert get_peft_model_state_dict(model).keys() == adapter.keys()


def test_kept_copies_are_left_out_where_the_forward_is_pefts_own() -> None:
    """Another compute dtype, a plain base, and a weight that a merge replaced."""
    assert keep_unpacked(in_nf4_with_lora(torch.float32)) == 0  # not fused
    plain, mixed = llama(), in_nf4_with_lora(torch.float32)
    for module in mixed.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.compute_dtype = torch.bfloat16
    for model in (plain, mixed):
        fuse_layers(model)
        assert keep_unpacked(model) == 0
    merged = in_nf4_with_lora(torch.float32)
    fuse_layers(merged)
    keep_unpacked(merged)
    merged.merge_adapter()
    merged.unmerge_adapter()  # four bits round twice: the base is not what it was
    after, gradients = loss_and_gradients(merged)
    keep_unpacked(merged)
    again, kept = loss_and_gradients(merged)
    assert after == again and difference(gradients, kept) == 0


def test_names_and_saved_adapter_stay() -> None:
    model = llama()
    names, state = [n for n, _ in model.named_parameters()], {k: v.clone() for k, v in model.state_dict().items()}
    fuse_layers(model)
    assert [n for n, _ in model.named_parameters()] == names
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert fuse_layers(model) == {"lora": 0, "norms": 0, "gated": 0, "rotary": 0}  # once is enough


def kept_bytes(model: Any, ids: torch.Tensor) -> int:
    """Activations that autograd keeps for the backward pass in bf16, each storage once."""
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        model.get_base_model().model(input_ids=ids, use_cache=False)
    return sum(size for size, _ in kept.values())


def test_less_is_kept_for_the_backward_pass() -> None:
    torch.manual_seed(0)
    model = with_lora(tiny_llama(seed=None, **SIZES).to(torch.bfloat16))
    ids = torch.randint(3, 97, (2, 128))
    before = kept_bytes(model, ids)
    fuse_layers(model)
    assert kept_bytes(model, ids) < 0.8 * before


def test_gradients_hold_in_fp64() -> None:
    torch.manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    weight, bias = random(6, 4).detach(), random(6).detach()
    x, dropped, a, b = random(2, 3, 4), random(2, 3, 4), random(2, 4), random(6, 2)
    assert torch.autograd.gradcheck(
        lambda x, a, b: lora_linear(x, None, AdaptedWeight(a, b, weight, None, bias, 1.5)), (x, a, b)
    )
    assert torch.autograd.gradcheck(
        lambda x, d, a, b: lora_linear(x, d, AdaptedWeight(a, b, weight, None, None, 1.5)), (x, dropped, a, b)
    )
    second = AdaptedWeight(random(3, 4), random(6, 3), random(6, 4).detach(), None, None, 0.5)

    def gated(x: torch.Tensor, *trained: torch.Tensor) -> torch.Tensor:
        up = second._replace(a=trained[2], b=trained[3])
        return lora_gated(x, AdaptedWeight(*trained[:2], weight, None, bias, 1.5), up)[0]

    assert torch.autograd.gradcheck(gated, (x, a, b, second.a, second.b))
    down = AdaptedWeight(random(2, 6), random(4, 2), random(4, 6).detach(), None, None, 0.7)

    def whole(x: torch.Tensor, *trained: torch.Tensor) -> torch.Tensor:
        product, factors = lora_gated(x, AdaptedWeight(*trained[:2], weight, None, bias, 1.5), second)
        return lora_linear(product, None, down._replace(a=trained[2], b=trained[3]), factors)

    assert torch.autograd.gradcheck(whole, (x, a, b, down.a, down.b))
    assert torch.autograd.gradcheck(silu_product, (random(3, 4), random(3, 4)))
    cos, sin = random(2, 1, 3, 6).detach(), random(1, 1, 3, 6).detach()
    assert torch.autograd.gradcheck(lambda q, k: rotate(q, k, cos, sin), (random(2, 2, 3, 6), random(2, 1, 3, 6)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gated_product_holds_over_several_blocks(dtype: torch.dtype) -> None:
    """More rows than a block of the cache's size has, and a last block that is shorter."""
    torch.manual_seed(0)
    gate, up = (torch.randn(3, 111, 4096, dtype=dtype, requires_grad=True) for _ in range(2))
    upstream = torch.randn(3, 111, 4096).to(dtype)
    theirs, ours = torch.nn.functional.silu(gate) * up, silu_product(gate, up)
    assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-6)
    gradients = [torch.autograd.grad(output, (gate, up), upstream) for output in (theirs, ours)]
    assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-6) for a, b in zip(*gradients, strict=True))


def test_norm_is_its_formula() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(3, 5, 8, requires_grad=True), torch.rand(8)
    upstream = torch.randn(3, 5, 8)
    expected = weight * x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
    (gradient,) = torch.autograd.grad(expected, x, upstream)
    ours = rms_norm(x, weight, 1e-5)
    assert torch.allclose(ours, expected, atol=1e-6)
    assert torch.allclose(torch.autograd.grad(ours, x, upstream)[0], gradient, atol=1e-6)


@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_is_as_exact_as_transformers(dtype: torch.dtype, size: float) -> None:
    torch.manual_seed(0)
    x, weight, upstream = size * torch.randn(7, 576), 1 + 0.3 * torch.randn(576), torch.randn(7, 576)
    x[2] = 0
    theirs = LlamaRMSNorm(576, eps=1e-5).to(dtype).requires_grad_(False)
    theirs.weight.data = weight.to(dtype)
    rounded = theirs.weight.double()

    def exact(x: torch.Tensor) -> torch.Tensor:
        return rounded * x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)

    def run(norm: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
        leaf = x.to(dtype=theirs.weight.dtype).to(dtype).requires_grad_()
        output = norm(leaf)
        return [output.detach().double(), *torch.autograd.grad(output, leaf, upstream.to(output.dtype))]

    truth = run(exact, torch.float64)
    for true, other, ours in zip(
        truth, run(theirs, dtype), run(lambda x: rms_norm(x, theirs.weight, 1e-5), dtype), strict=True
    ):
        assert ours.isfinite().all()
        assert (ours - true).norm() < max(1.1 * (other - true).norm(), 2e-7 * true.norm())


@pytest.mark.parametrize("architecture", ["llama4_text", "qwen4_exp_text"])
def test_models_that_use_results_unusually_train_with_fused_layers(architecture: str) -> None:
    """Llama 4 writes into a linear's result; Qwen's indexer rotates queries alone, by keyword."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(tiny_config(architecture), attn_implementation="eager")
    adapted = with_lora(plain, target_modules=choose_targets(plain, "all-linear"))
    ids = torch.randint(3, 300, (1, 40), generator=torch.Generator().manual_seed(0))
    gradients = []
    for fused in (False, True):
        model = copy.deepcopy(adapted)
        if fused:
            assert fuse_layers(model)["lora"] > 0
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-3, atol=1e-6)


def test_adapters_cast_together_train_as_those_cast_where_they_are_used() -> None:
    """To the bit, with scalings that differ too; and nothing of it stays."""
    model = llama(torch.bfloat16, alpha_pattern={"up_proj": 7})
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    fuse_layers(model)
    own = loss_and_gradients(model, torch.bfloat16)
    casts = []
    with cast_adapters(model, torch.bfloat16):
        kept = [vars(module)["narrow_adapter"] for module in model.modules() if "narrow_adapter" in vars(module)]
        with WatchCasts(casts):
            together = loss_and_gradients(model, torch.bfloat16)
    assert len(kept) == 14 and all(a.dtype == b.dtype == torch.bfloat16 for a, b in kept)
    assert together[0] == own[0] and all(torch.equal(together[1][name], own[1][name]) for name in own[1])
    assert not [shape for shape in casts if 8 in shape]
    with torch.no_grad():
        model.get_base_model().model.layers[0].mlp.up_proj.lora_B["default"].weight.mul_(2)
    assert not any("narrow_adapter" in vars(module) for module in model.modules())
    assert loss_and_gradients(model, torch.bfloat16)[0] != own[0]


class WatchCasts(TorchDispatchMode):
    """Notes shapes of what is cast from fp32 to bf16."""

    def __init__(self, shapes: list[tuple[int, ...]]) -> None:
        super().__init__()
        self.shapes = shapes

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        result = function(*arguments, **(options or {}))
        if function is torch.ops.aten._to_copy.default and arguments[0].dtype == torch.float32:
            self.shapes += [tuple(result.shape)] if result.dtype == torch.bfloat16 else []
        return result
