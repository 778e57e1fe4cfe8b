"""Methods at linears: each is its paper's equation, PEFT's numbers, and a merge that is what training saw."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from lorafit.contracts import Silent
from lorafit.errors import ModelError, NumericsError, RecipeError
from lorafit.kinds.adapters import _linears, adapters, boft
from lorafit.kinds.adapters.boft import BlockDiagonal, butterfly
from lorafit.kinds.quantizations import quantizations
from lorafit.model.adapter import adapter_tensors, read_adapter, save_adapter
from lorafit.model.attach import attach_adapter, check_plan, load_adapter_weights, open_adapter
from lorafit.model.base import Base
from lorafit.model.class_shape import find_shape
from lorafit.model.inspect import describe_quantization
from lorafit.model.merge import MergeReport, merge_adapter
from lorafit.plan.recipe_step import recipe_step
from tests.support.adapted import load, logits, make_gpt2, make_llama, open_base
from tests.support.plan_cases import card, recipe, shape_of

METHODS: dict[str, dict[str, Any]] = {
    "boft": {"rounds": 3},
    "ia3": {},
    "miss": {"r": 5},
    "oft": {"block_size": 8},
    "vera": {"r": 16},
}
TRANSPOSED = ("ia3", "vera")


def section(kind: str, **fields: Any) -> Any:
    return adapters.make_section(kind, **{**METHODS[kind], **fields})


def train_like(model: Any) -> None:
    """Other values, as training would give."""
    torch.manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data + 0.1 * torch.randn_like(parameter)


def save(base: Base, section: Any, quantization: str = "none", dtype: torch.dtype = torch.float32) -> Any:
    """Model, folder of its adapter, and the run's quantization.json."""
    model = load(base, quantization, dtype=dtype)
    used = None
    if quantization != "none":
        used = describe_quantization(model, quantizations.make_section(quantization), dtype=dtype)
    model = attach_adapter(model, section, 0)
    train_like(model)
    folder = base.path.parent / f"adapter-{quantization}"
    folder.mkdir()
    save_adapter(model, folder, base=base, quantization=used)
    return model, folder, used


def merge(base: Base, adapter: Path, used: Any) -> MergeReport:
    kind: Any = "original" if used is None else "dequantized"
    return merge_adapter(base, adapter, adapter.parent / "merged", kind=kind, quantization=used, reporter=Silent())


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("llama") / "base")


@pytest.fixture
def base(llama: Path, tmp_path: Path) -> Base:
    (tmp_path / "base").symlink_to(llama)
    return open_base(tmp_path / "base")


def block(values: torch.Tensor, size: int) -> torch.Tensor:
    """Skew-symmetric, of the values above its diagonal."""
    upper = torch.zeros(size, size, dtype=torch.float64)
    upper[*torch.triu_indices(size, size, 1)] = values
    return upper - upper.t()


def equation(kind: str, tensors: dict[str, torch.Tensor], weight: torch.Tensor) -> torch.Tensor:
    """The new weight `[out, in]` by the paper's equation, written out in fp64."""
    one = torch.eye(weight.shape[1], dtype=torch.float64)
    if kind == "miss":  # Kang & Yin 2024, section 3.2: W + expand(D)
        block_rows = tensors["miss_block"].t()
        return torch.stack([weight[:, j] + block_rows[:, j % block_rows.shape[1]] for j in range(weight.shape[1])], 1)
    if kind == "vera":  # Kopiczko et al. 2023, equation 2: W + diag(b) B diag(d) A
        b, d = tensors["vera_lambda_b"].diag(), tensors["vera_lambda_d"].diag()
        return weight + b @ tensors["B"][: weight.shape[0]] @ d @ tensors["A"][:, : weight.shape[1]]
    if kind == "ia3":  # Liu et al. 2022, section 3.3: l (W x), or W (l x)
        return weight * tensors["ia3_l"]
    if kind == "oft":  # Qiu et al. 2023, section 3.2: a block-diagonal Cayley transform of the inputs
        blocks = [block(values, 8) for values in tensors["oft_R.weight"]]
        eye = torch.eye(8, dtype=torch.float64)
        turns = torch.block_diag(*[(eye - q) @ torch.linalg.inv(eye + q) for q in blocks])
        assert torch.allclose(turns @ turns.t(), one, atol=1e-12), "a rotation"
        return weight @ turns.t()
    turns = one  # Liu et al. 2023, equation 4: the product of butterfly factors, and a scale for each output
    rounds = tensors["boft_R"]
    for number, blocks in enumerate(rounds):
        eye = torch.eye(blocks.shape[-1], dtype=torch.float64)
        skews = [(q - q.t()) / 2 for q in blocks]
        stage = torch.block_diag(*[(eye - q) @ torch.linalg.inv(eye + q) for q in skews])
        order = one[butterfly(len(one), len(blocks) >> number, blocks.shape[-1])]
        turns = order @ stage @ order.t() @ turns
    assert torch.allclose(turns @ turns.t(), one, atol=1e-12), "a rotation"
    return tensors["boft_s"] * (weight @ turns.t())


@pytest.mark.parametrize("kind", METHODS)
def test_a_layer_computes_the_equation(base: Base, kind: str) -> None:
    model = attach_adapter(load(base), section(kind), 0)
    train_like(model)
    saved = {name: value.detach().double() for name, value in adapter_tensors(model).items()}
    shared = {name[-1]: value for name, value in saved.items() if name.startswith("base_model.vera_")}
    torch.manual_seed(0)
    for path in ("model.layers.1.self_attn.k_proj", "model.layers.0.mlp.down_proj"):
        layer = model.base_model.model.get_submodule(path)
        start = f"base_model.model.{path}."
        own = {name.removeprefix(start): value for name, value in saved.items() if name.startswith(start)}
        inputs = torch.randn(7, layer.in_features)
        exact = inputs.double() @ equation(kind, {**own, **shared}, layer.base_layer.weight.detach().double()).t()
        with torch.no_grad():
            assert torch.allclose(layer(inputs).double(), exact, atol=1e-5)


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
@pytest.mark.parametrize("kind", METHODS)
def test_it_starts_as_the_base_and_a_merge_is_what_was_trained(base: Base, kind: str, quantization: str) -> None:
    method = adapters.bind(section(kind))
    before = logits(load(base, quantization))
    fresh = attach_adapter(load(base, quantization), section(kind), 0)
    sites = method.sites(find_shape(base.config))
    check_plan(fresh, sites, sum(site.parameters for site in sites))
    assert torch.equal(logits(fresh), before) or not method.starts_as_base
    assert torch.allclose(logits(fresh), before, atol=1e-5)
    model, folder, used = save(base, section(kind), quantization)
    told = logits(model)
    assert float((told - before).abs().max()) > 0.01
    assert torch.equal(logits(open_adapter(load(base, quantization), folder, base=base)), told)
    assert torch.equal(logits(PeftModel.from_pretrained(load(base, quantization), folder)), told)
    again = attach_adapter(load(base, quantization), section(kind, init_from=folder.name), 7, folder=folder.parent)
    assert torch.equal(logits(again), told)
    report = merge(base, folder, used)
    assert report.verified and 0.0 < report.largest_error <= 1.0 and report.proven == (used is not None)
    merged = AutoModelForCausalLM.from_pretrained(report.output, attn_implementation="eager")
    rounding = 3e-2 if quantization == "int8" else 1e-5  # int8 rounds activations too
    assert float((logits(merged) - told).abs().max()) <= rounding
    if used is None:
        plain = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
        theirs = PeftModel.from_pretrained(plain, folder).merge_and_unload().state_dict()
        ours = merged.state_dict()
        assert max(float((ours[name] - theirs[name]).abs().max()) for name in theirs) <= 1e-6


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("kind", METHODS)
def test_weights_that_lie_the_other_way(tmp_path: Path, kind: str, quantization: str) -> None:
    """GPT-2's, with their biases: PEFT's layers over plain ones are LoRA's, VeRA's and IA3's."""
    base = open_base(make_gpt2(tmp_path / "base"))
    if quantization == "none" and kind not in TRANSPOSED:
        with pytest.raises(ModelError, match=rf"{kind} stands at weights that lie \[out, in\]"):
            attach_adapter(load(base), section(kind), 0)
        return
    model, folder, used = save(base, section(kind, **({"rounds": 2} if kind == "boft" else {})), quantization)
    merged = AutoModelForCausalLM.from_pretrained(merge(base, folder, used).output, attn_implementation="eager")
    assert float((logits(merged) - logits(model)).abs().max()) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ia3_scales_the_bias_of_a_key_too(tmp_path: Path, dtype: torch.dtype) -> None:
    """A bias of the files is a tensor of its own, which a fold of the weight alone would leave as it was."""
    config = Qwen2Config(vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)  # fmt: skip
    torch.manual_seed(1)
    plain = Qwen2ForCausalLM(config).to(dtype)
    for name, parameter in plain.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    plain.save_pretrained(tmp_path / "base")
    base = open_base(tmp_path / "base")
    model, folder, used = save(base, section("ia3"), "nf4", dtype)
    output = merge(base, folder, used).output
    merged = AutoModelForCausalLM.from_pretrained(output, attn_implementation="eager")
    scales = adapter_tensors(model)["base_model.model.model.layers.0.self_attn.k_proj.ia3_l"].detach()
    name = "model.layers.0.self_attn.k_proj.bias"
    assert torch.equal(merged.state_dict()[name], (plain.state_dict()[name] * scales[:, 0]).to(dtype))
    assert float((logits(merged) - logits(model)).abs().max()) <= (1e-5 if dtype == torch.float32 else 0.05)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_ia3_over_codes_answers_in_the_dtype_it_is_asked_in(base: Base, quantization: str) -> None:
    """PEFT's answers in fp32, and attention refuses queries in bf16 beside such keys."""
    with pytest.raises(RuntimeError, match=r"dtype|scalar type"):
        theirs = load(base, quantization, dtype=torch.bfloat16)
        config = adapters.bind(section("ia3")).peft_config(["k_proj", "v_proj"], is_transposed=False)
        logits(PeftModel(theirs, config))
    model = attach_adapter(load(base, quantization, dtype=torch.bfloat16), section("ia3", target_modules=["k_proj"]), 0)
    of_base = logits(load(base, quantization, dtype=torch.bfloat16))  # in bf16 throughout
    assert torch.allclose(logits(model), of_base, atol=0.02)
    model.train()(torch.arange(3, 9)[None], labels=torch.arange(3, 9)[None]).loss.backward()
    assert all(bool(p.grad.abs().max() > 0) for p in model.parameters() if p.requires_grad)


def test_vera_is_the_same_where_random_numbers_are_others(base: Base) -> None:
    """The shared matrices are in the file: nobody has to draw them again."""
    model, folder, _ = save(base, section("vera", projection_seed=5))
    saved = read_adapter(folder)
    assert saved.tensors["base_model.vera_A"].shape == (16, 192) and saved.config["save_projection"] is True
    fresh = attach_adapter(load(base), section("vera", projection_seed=6), 0)
    assert not torch.equal(logits(fresh), logits(model))
    load_adapter_weights(fresh, folder)
    assert torch.equal(logits(fresh), logits(model))


@pytest.mark.parametrize("rounds", [1, 3])
def test_boft_compiles_nothing_and_keeps_its_rounds(
    base: Base, rounds: int, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    """PEFT without a compiler for CUDA warns, and makes one round of however many were asked for."""
    from peft.tuners.boft import layer
    from torch.utils import cpp_extension

    def compiles(*args: Any, **options: Any) -> None:
        raise AssertionError("an extension is built")

    loaded: Any = layer
    monkeypatch.setattr(loaded, "_FBD_CUDA", None)
    monkeypatch.setattr(cpp_extension, "load", compiles)
    model = attach_adapter(load(base), section("boft", rounds=rounds), 0)
    tensors = adapter_tensors(model)
    assert {value.shape[0] for name, value in tensors.items() if name.endswith("boft_R")} == {rounds}
    assert not [str(each.message) for each in recwarn if "CUDA" in str(each.message)]


@pytest.mark.parametrize(("inputs", "size", "rounds"), [(96, 4, 3), (64, 8, 4), (30, 5, 1)])
def test_a_butterfly_is_pefts(inputs: int, size: int, rounds: int) -> None:
    """From a second copy of PEFT's module, in which nothing was replaced."""
    found = importlib.util.find_spec("peft.tuners.boft.layer")
    assert found is not None and found.loader is not None
    untouched = importlib.util.module_from_spec(found)
    found.loader.exec_module(untouched)
    layer = untouched.BOFTLayer
    for number in range(rounds):
        groups = inputs // size >> number
        theirs = layer.block_butterfly_perm(None, inputs, groups, size // 2, rounds - 1)
        assert torch.equal(butterfly(inputs, groups, size), theirs)
        order = boft._matrix(None, theirs)
        assert torch.equal(order, layer.perm2mat(None, theirs)) and order.dtype == torch.float32


def test_blocks_on_a_diagonal_and_back() -> None:
    torch.manual_seed(0)
    blocks = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    wanted = torch.stack([torch.block_diag(*each) for each in blocks])
    assert torch.equal(BlockDiagonal().forward(blocks)[0], wanted)
    assert torch.equal(BlockDiagonal().backward(wanted, blocks)[0], blocks)


@pytest.mark.parametrize(
    ("kind", "fields", "key", "said"),
    [
        ("miss", {"r": 200}, "adapter.r", "200 is more than the 128 inputs of 'q_proj'; choose at most 128"),
        ("oft", {"block_size": 24}, "adapter.block_size", "24 does not divide the 128 inputs of"),
        ("boft", {"block_size": 8, "rounds": 6}, "adapter.block_size", "blocks of 8 in 6 rounds do not fit the 128"),
        ("boft", {"block_size": 3, "rounds": 2}, "adapter.block_size", "blocks of 3 in 2 rounds do not fit the 128"),
    ],
)
def test_options_that_do_not_fit_the_widths_are_told_by_the_plan(
    base: Base, kind: str, fields: dict[str, Any], key: str, said: str
) -> None:
    with pytest.raises(RecipeError, match=said.replace("'", ".")) as caught:
        adapters.bind(section(kind, **fields)).sites(find_shape(base.config))
    assert caught.value.key == key


def test_parameters_of_a_real_model() -> None:
    """Llama-3.1-8B: r 256 of VeRA is 1.5 million values, of LoRA 671 million."""
    shape = shape_of("meta-llama/Llama-3.1-8B")
    counts = {kind: sum(s.parameters for s in adapters.make(kind).sites(shape)) for kind in METHODS}
    assert counts["vera"] == sum((x.out_features + 256) * x.count for x in shape.linears if not x.left_out)
    assert counts["ia3"] == 32 * (4096 * 2 + 1024 * 2 + 14336 * 2 + 14336)
    assert counts["oft"] == 32 * (6 * 4096 + 14336) * 31 // 2


@pytest.mark.parametrize(
    ("kind", "change", "said"),
    [
        ("miss", {"init_weights": "bat"}, "init_weights=bat"),
        ("oft", {"coft": True}, "coft=True"),
        ("oft", {"block_share": True}, "block_share=True"),
        ("vera", {"bias": "all"}, "bias=all"),
    ],
)
def test_a_form_that_is_not_folded_is_not_merged(kind: str, change: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError, match=f"cannot be merged: it uses {said}"):
        adapters.get(kind).folding({"r": 8, **change})


def test_a_series_is_folded_as_peft_computes_it(base: Base) -> None:
    model, folder, _ = save(base, section("oft", cayley="neumann"))
    merged = AutoModelForCausalLM.from_pretrained(merge(base, folder, None).output, attn_implementation="eager")
    assert float((logits(merged) - logits(model)).abs().max()) <= 1e-5


def test_a_wrong_value_is_seen_while_streaming(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    _, folder, _ = save(base, section("oft"))
    apply = _linears.DenseFold.apply

    def longer(self: Any, weight: torch.Tensor, first_row: int, out: torch.Tensor) -> None:
        apply(self, weight, first_row, out)
        out[0] *= 1 + 1e-6

    monkeypatch.setattr(_linears.DenseFold, "apply", longer)
    with pytest.raises(NumericsError, match="times the rounding bound"):
        merge(base, folder, None)


@pytest.mark.parametrize("kind", ["miss", "oft", "vera"])
def test_one_that_was_never_trained_is_said_to_have_no_effect(base: Base, kind: str) -> None:
    model = attach_adapter(load(base), section(kind), 0)
    folder = base.path.parent / "fresh"
    folder.mkdir()
    save_adapter(model, folder, base=base)
    told: list[str] = []

    class Told(Silent):
        def warn(self, text: str) -> None:
            told.append(text)

    open_adapter(load(base), folder, reporter=Told())
    assert "the adapter has no effect: every" in told[0]


@pytest.mark.parametrize("kind", METHODS)
def test_a_stopped_training_goes_on_to_the_last_bit(base: Base, kind: str) -> None:
    ids = torch.arange(3, 40).reshape(1, -1)

    def steps(model: Any, optimizer: Any, count: int) -> None:
        for _ in range(count):
            model.train()(ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    def begin(seed: int) -> tuple[Any, Any]:
        model = attach_adapter(load(base, "nf4"), section(kind), seed)
        return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)

    whole, optimizer = begin(0)
    steps(whole, optimizer, 2)
    folder, state = base.path.parent / "half", copy.deepcopy(optimizer.state_dict())
    folder.mkdir()
    save_adapter(whole, folder, base=base)
    steps(whole, optimizer, 2)
    resumed, other = begin(9)
    load_adapter_weights(resumed, folder)
    other.load_state_dict(state)
    steps(resumed, other, 2)
    after = adapter_tensors(resumed)
    assert all(torch.equal(value, after[name]) for name, value in adapter_tensors(whole).items())


@pytest.mark.parametrize("kind", [*METHODS, "lora"])
def test_only_lora_layers_keep_dequantised_weights(kind: str) -> None:
    """No other layer runs fused: the plan named a size that its memory did not have, and ended in a KeyError."""
    asked = recipe(adapter={"kind": kind}, model={"quantization": {"kind": "nf4", "keep_unpacked": True}})
    step = recipe_step(asked, shape_of("meta-llama/Llama-3.1-8B"), None, card(80))
    assert step.step.keeps_unpacked == (kind == "lora")
