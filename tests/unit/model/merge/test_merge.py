"""A merge is W + s * B A of the base that training saw, or nothing is written."""

from __future__ import annotations

import base64
import copy
import json
import os
import re
import resource
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lorafit.contracts import Silent
from lorafit.errors import LorafitError, ModelError, NumericsError, ResourceError, StoppedBySignal, UsageError
from lorafit.files.atomic import check_manifest
from lorafit.files.safetensors import TensorEntry, read_header
from lorafit.kinds.quantizations import quantizations
from lorafit.model.inspect import describe_quantization, require_same_quantization
from lorafit.model.merge import MergeReport, merge_adapter
from lorafit.model.merge.shards import ShardMerger
from tests.support.adapted import Trained, load, logits, make_gpt2, make_llama, open_base, train_like


def merged_by_peft(trained: Trained) -> dict[str, torch.Tensor]:
    plain = AutoModelForCausalLM.from_pretrained(trained.base.path, dtype=torch.float32)
    return PeftModel.from_pretrained(plain, trained.adapter).merge_and_unload().state_dict()


def run(trained: Trained, kind: str = "original", **other: object) -> MergeReport:
    output = trained.base.path.parent / "merged"
    return merge_adapter(
        trained.base, trained.adapter, output, kind=kind, quantization=trained.quantization, reporter=Silent(), **other
    )  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["llama", "tied", "gpt2", "sharded"])
def test_equals_peft_in_fp32(tmp_path: Path, family: str) -> None:
    folder = tmp_path / "base"
    made = {
        "llama": lambda: make_llama(folder),
        "tied": lambda: make_llama(folder, tied=True),
        "gpt2": lambda: make_gpt2(folder),
        "sharded": lambda: make_llama(folder, shard="200KB"),
    }[family]()
    trained = train_like(open_base(made), "none")
    report = run(trained)
    model = AutoModelForCausalLM.from_pretrained(report.output)
    ours, theirs = model.state_dict(), merged_by_peft(trained)
    assert ours.keys() == theirs.keys()
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in theirs) <= 1e-6
    plain = AutoModelForCausalLM.from_pretrained(trained.base.path).state_dict()
    assert any(not torch.equal(plain[name], ours[name]) for name in ours)
    assert check_manifest(report.output) is None
    assert report.verified and 0.0 < report.largest_error <= 1.0
    if family == "sharded":
        assert len(list(report.output.glob("*.safetensors"))) > 2


def test_rank_stabilised_scaling_and_patterns_equal_peft(llama: object, tmp_path: Path) -> None:
    base = llama
    model = AutoModelForCausalLM.from_pretrained(base.path)  # type: ignore[attr-defined]
    config = LoraConfig(
        r=4, lora_alpha=8, use_rslora=True, target_modules=["q_proj", "down_proj"],
        rank_pattern={"down_proj": 2}, alpha_pattern={"layers.1.self_attn.q_proj": 3}, init_lora_weights=False,
    )  # fmt: skip
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    trained = Trained(base, tmp_path / "adapter", None, None)  # type: ignore[arg-type]
    ours = load_file(run(trained).output / "model.safetensors")
    theirs = merged_by_peft(trained)
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in theirs) <= 1e-6


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dequantized_gives_what_the_adapter_gave_on_its_base(
    trained: Callable[..., Trained], kind: str, dtype: torch.dtype
) -> None:
    made = trained(kind, dtype=dtype)
    report = run(made, "dequantized")
    assert report.proven and report.rebuilt_tensors == 14
    assert json.loads((report.output / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    merged = AutoModelForCausalLM.from_pretrained(report.output, attn_implementation="eager")
    assert merged.dtype == dtype and not getattr(merged, "is_quantized", False)
    adapted = made.model.base_model.model
    for name, module in adapted.named_modules():
        if getattr(module, "lora_A", None) is not None and len(module.lora_A):
            base_layer = module.get_base_layer()
            exact = dequantised(base_layer).float() + module.get_delta_weight("default").detach().float()
            got = merged.get_submodule(name).weight.detach().float()
            roundoff = 2.0**-8 if dtype is torch.bfloat16 else 2.0**-22
            assert float(((got - exact).abs() / exact.abs().clamp(min=1e-3)).max()) <= roundoff
    if dtype is torch.float32 and kind != "int8":  # int8 computes its forward in 8 bits, no dense weight can
        assert float((logits(merged) - logits(made.model)).abs().max()) < 1e-4


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_run_that_noted_one_kind_for_all_weights_merges_to_the_same_bytes(
    trained: Callable[..., Trained], kind: str
) -> None:
    """quantization.json as version 0.1.0 wrote it."""
    made = trained(kind)
    assert made.quantization is not None
    assert {proof.pop("kind") for proof in made.quantization["tensors"].values()} == {kind}
    old = run(made, "dequantized")
    bytes_of_old = (old.output / "model.safetensors").read_bytes()
    shutil.rmtree(old.output)
    now = run(Trained(made.base, made.adapter, describe_quantization(
        made.model, quantizations.make_section(kind), dtype=torch.float32), made.model), "dequantized")  # fmt: skip
    assert old.proven and now.proven and (now.output / "model.safetensors").read_bytes() == bytes_of_old
    require_same_quantization(
        describe_quantization(made.model, quantizations.make_section(kind), dtype=torch.float32),
        made.quantization,
        file=made.base.path,
    )


def test_a_kind_that_cannot_be_made_again_is_named(trained: Callable[..., Trained]) -> None:
    made = trained("nf4")
    assert made.quantization is not None
    first = next(iter(made.quantization["tensors"]))
    made.quantization["tensors"][first]["kind"] = "none"
    with pytest.raises(ModelError, match=re.escape(f"tensors.{first}.kind")):
        run(made, "dequantized")


def dequantised(layer: torch.nn.Module) -> torch.Tensor:
    import bitsandbytes as bnb

    weight = layer.weight
    if getattr(weight, "quant_state", None) is not None:
        state = copy.copy(weight.quant_state)
        state.dtype = torch.float32  # not rounded: the merge rounds once, with the update
        return bnb.functional.dequantize_4bit(weight.data, state)  # type: ignore[no-any-return]
    return bnb.functional.int8_vectorwise_dequant(weight.data, weight.SCB)  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_an_update_finer_than_the_steps_of_bf16_is_not_rounded_away(trained: Callable[..., Trained], kind: str) -> None:
    """Its sum over many weights is kept, since quantised values lie anywhere between the steps."""
    made = trained(kind, dtype=torch.bfloat16)
    file = made.adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({name: t * 0.002 if "lora_B" in name else t for name, t in tensors.items()}, file)
    merged = AutoModelForCausalLM.from_pretrained(run(made, "dequantized").output)
    for name, module in made.model.base_model.model.named_modules():
        if getattr(module, "lora_A", None) is not None and len(module.lora_A):
            update = 0.002 * module.get_delta_weight("default").detach().double()
            base = dequantised(module.get_base_layer())
            step = torch.exp2(torch.floor(torch.log2(base.abs())) - 7)
            assert float((update.abs() / step).median()) < 0.5, "the update is as coarse as a step"
            written = merged.get_submodule(name).weight.detach().double() - base.double()
            assert float((written * update).sum() / update.square().sum()) == pytest.approx(1.0, abs=0.25)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_gpt2_is_rebuilt_the_way_conv1d_is_quantised(tmp_path: Path, kind: str) -> None:
    made = train_like(open_base(make_gpt2(tmp_path / "base")), kind)
    assert all(proof["transposed"] for proof in made.quantization["tensors"].values())  # type: ignore[index]
    report = run(made, "dequantized")
    merged = AutoModelForCausalLM.from_pretrained(report.output, attn_implementation="eager")
    assert report.merged_tensors == report.rebuilt_tensors == 8
    if kind == "nf4":
        assert float((logits(merged) - logits(made.model)).abs().max()) < 1e-4
    else:
        for name, module in made.model.base_model.model.named_modules():
            if getattr(module, "lora_A", None) is not None and len(module.lora_A):
                exact = dequantised(module.get_base_layer()).float() + module.get_delta_weight("default").detach()
                assert float((merged.get_submodule(name).weight.detach().t() - exact).abs().max()) < 1e-6


def test_original_keeps_untouched_tensors_byte_for_byte(trained: Callable[..., Trained]) -> None:
    made = trained("nf4")
    before = load_file(made.base.path / "model.safetensors")
    after = load_file(run(made).output / "model.safetensors")
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {name for name in before if "proj" not in name}


def test_a_flipped_bit_of_the_base_is_noticed(trained: Callable[..., Trained]) -> None:
    made = trained("nf4")
    proof = made.quantization["tensors"]["model.layers.1.mlp.up_proj"]  # type: ignore[index]
    file = made.base.path / "model.safetensors"
    entry = read_header(file)["model.layers.1.mlp.up_proj.weight"]
    with file.open("r+b") as stream:  # the top exponent bit of one value, away from what the fingerprint samples
        stream.seek(entry.offset + 3)
        byte = stream.read(1)[0]
        stream.seek(entry.offset + 3)
        stream.write(bytes([byte ^ 0x40]))
    assert proof["codes"]
    with pytest.raises(NumericsError, match="differs from the one the run was trained on") as caught:
        run(made, "dequantized")
    assert caught.value.key == "model.layers.1.mlp.up_proj.weight" and caught.value.exit_code == 9
    assert not (made.base.path.parent / "merged").exists()


def test_a_few_codes_one_level_off_are_a_warning_only_for_another_device(trained: Callable[..., Trained]) -> None:
    made = trained("nf4")
    used = made.quantization
    assert used is not None
    proof = used["tensors"]["model.layers.0.mlp.up_proj"]
    sums = np.frombuffer(base64.b64decode(proof["code_sums"]), dtype="<u2").copy()
    proof["code_sums"] = base64.b64encode((sums + 2).astype("<u2").tobytes()).decode()
    proof["codes"] = "0" * 64
    with pytest.raises(NumericsError, match="differs"):
        run(made, "dequantized")
    used["device"] = "cuda"
    with pytest.raises(NumericsError, match="4 of 245760 codes"):  # 1e-5 of these are 2
        run(made, "dequantized")
    proof["code_sums"] = base64.b64encode((sums + np.array([2, 0])).astype("<u2").tobytes()).decode()
    reporter = Silent()
    output = made.base.path.parent / "other"
    report = merge_adapter(made.base, made.adapter, output, kind="dequantized", quantization=used, reporter=reporter)
    assert report.codes_off == 2 and "2 of 245760 codes are one level off" in reporter.warnings[0]


def test_a_run_of_a_card_with_blocks_of_zeros_is_rebuilt_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA gives such a block the lowest code instead of that of 0, 448 levels away."""
    import bitsandbytes.functional as functional

    folder, own = make_llama(tmp_path / "base"), functional.quantize_4bit
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][5:9] = 0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    def as_on_cuda(weight: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        codes, state = own(weight, *args, **kwargs)
        codes.view(-1, 32)[~weight.reshape(-1, 64).any(1)] = 0
        return codes, state

    with monkeypatch.context() as patched:
        patched.setattr(functional, "quantize_4bit", as_on_cuda)
        made = train_like(open_base(folder), "nf4")
    assert run(made, "dequantized").verified


@pytest.mark.parametrize("perturbed", ["embed", "up_proj"])
def test_a_wrong_written_tensor_is_found_and_nothing_is_kept(
    trained: Callable[..., Trained], monkeypatch: pytest.MonkeyPatch, perturbed: str
) -> None:
    made = trained("none", dtype=torch.float32)
    check = ShardMerger._check

    def flip(self: ShardMerger, source: Any, written: TensorEntry) -> None:
        if perturbed in written.name:
            with written.file.open("r+b") as file:
                position = written.offset + written.elements * 4 - 4
                file.seek(position)
                byte = file.read(1)[0]
                file.seek(position)
                file.write(bytes([byte ^ 0x80]))  # a low mantissa bit of the last value
        check(self, source, written)

    monkeypatch.setattr(ShardMerger, "_check", flip)
    with pytest.raises(NumericsError, match="written tensor is wrong") as caught:
        run(made)
    assert perturbed in str(caught.value.key)
    assert nothing_is_left(made)
    run(made, verify=False)


def test_output_must_be_no_input_and_empty(trained: Callable[..., Trained]) -> None:
    made = trained("none")
    cases = {made.base.path: "also an input", made.adapter: "also an input", made.base.path / "in": "also an input"}
    full = made.base.path.parent / "full"
    full.mkdir()
    (full / "a").write_text("x")
    for output, why in {**cases, full: "not empty"}.items():
        with pytest.raises(UsageError, match=why):
            merge_adapter(made.base, made.adapter, output, kind="original", reporter=Silent())
    assert (full / "a").read_text() == "x"
    empty = made.base.path.parent / "empty"
    empty.mkdir()
    merge_adapter(made.base, made.adapter, empty, kind="original", reporter=Silent())
    assert check_manifest(empty) is None


@pytest.mark.parametrize(
    ("key", "value"),
    [("use_qalora", True), ("bias", "all"), ("modules_to_save", ["lm_head"]), ("init_lora_weights", "pissa"),
     ("lora_bias", True), ("layer_replication", [[0, 1]]), ("a_key_of_tomorrow", 1)],
)  # fmt: skip
def test_what_is_no_plain_update_is_refused(trained: Callable[..., Trained], key: str, value: object) -> None:
    made = trained("none")
    file = made.adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(ModelError, match=key):
        run(made)


def test_every_adapter_tensor_is_used_and_none_is_missing(trained: Callable[..., Trained]) -> None:
    made = trained("none")
    file = made.adapter / "adapter_model.safetensors"
    whole = load_file(file)
    half = dict(list(whole.items())[::2])
    cases: list[tuple[dict[str, torch.Tensor], str]] = [
        ({"zzz": torch.ones(2)}, "28 missing adapter tensors"),
        (half, "missing adapter tensors"),
        (whole | {"base_model.model.model.layers.9.mlp.up_proj.lora_A.weight": torch.ones(4, 128)}, "layers.9.mlp"),
    ]
    for tensors, why in cases:
        save_file(tensors, file)
        with pytest.raises(ModelError, match=why):
            run(made)


def test_another_base_is_refused(trained: Callable[..., Trained], tmp_path: Path) -> None:
    made = trained("none")
    other = make_llama(tmp_path / "other", dtype=torch.bfloat16)
    with pytest.raises(ModelError, match="trained on 'base'"):
        merge_adapter(open_base(other), made.adapter, tmp_path / "out", kind="original", reporter=Silent())


def test_dequantized_needs_the_runs_record(trained: Callable[..., Trained]) -> None:
    made = trained("none")
    with pytest.raises(ModelError, match="cannot be rebuilt"):
        run(made, "dequantized")


def test_a_merge_that_dies_leaves_nothing_under_its_name(trained: Callable[..., Trained]) -> None:
    made = trained("none")
    output = made.base.path.parent / "merged"
    child = os.fork()
    if child == 0:
        seen = 0

        def die(*_: object) -> None:
            nonlocal seen
            seen += 1
            if seen == 9:
                os.kill(os.getpid(), 9)

        ShardMerger._check = die  # type: ignore[method-assign, assignment]
        try:
            run(made)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == 9 and not output.exists()
    assert run(made).tensors == 21


def test_a_full_disk_is_ours_and_leaves_nothing(trained: Callable[..., Trained]) -> None:
    made = trained("none")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # met by the writing thread, in the middle of a tensor
    try:
        with pytest.raises(ResourceError, match="file too large") as caught:
            run(made)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.exit_code == 7 and nothing_is_left(made)
    assert run(made).tensors == 21


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), StoppedBySignal("stopped by SIGTERM", signal_number=15)])
def test_an_interrupted_merge_leaves_nothing(trained: Callable[..., Trained], stop: BaseException) -> None:
    class Interrupting(Silent):
        def track(self, total: int, what: str, done: int = 0) -> Any:
            bar, seen = super().track(total, what), []

            def advance(amount: int = 1, **_: Any) -> None:
                seen.append(amount)
                if len(seen) == 9:
                    raise stop

            bar.advance = advance  # type: ignore[method-assign]
            return bar

    made, threads = trained("none"), threading.active_count()
    output = made.base.path.parent / "merged"
    with pytest.raises(type(stop)):
        merge_adapter(made.base, made.adapter, output, kind="original", reporter=Interrupting())
    assert nothing_is_left(made) and threading.active_count() == threads


def nothing_is_left(made: Trained) -> bool:
    beside = made.base.path.parent
    return not (beside / "merged").exists() and not list(beside.glob(".tmp-*"))


def test_torch_keeps_its_threads(trained: Callable[..., Trained]) -> None:
    made, before = trained("none"), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        run(made)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_errors_are_ours(trained: Callable[..., Trained]) -> None:
    made = trained("none")
    (made.adapter / "adapter_model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(LorafitError, match="git-lfs"):
        run(made)
    assert load(made.base) is not None
