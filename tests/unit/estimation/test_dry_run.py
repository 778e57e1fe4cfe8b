"""The exact engine: the step on fake tensors against the same step on real ones, and against the closed form."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lorafit.contracts import Batch, Silent
from lorafit.errors import ModelError
from lorafit.estimation import Options, RecipeEstimate, estimate_recipe
from lorafit.estimation import dry_run as dryrun
from lorafit.estimation.dry_run import DryRun, run_exactly
from lorafit.facts import RunFacts
from lorafit.kinds.optimizers import rate_groups
from lorafit.kinds.tasks import tasks
from lorafit.machine.devices import parse_gpu
from lorafit.memory import MemoryEstimate, StepMemory, closed_form
from lorafit.model.attach import attach_adapter
from lorafit.model.checkpointing import set_checkpointing
from lorafit.model.class_shape import find_shape
from lorafit.model.fuse import fuse_layers
from lorafit.model.fused_lora import keep_unpacked
from lorafit.model.known_models import known_config
from lorafit.ops.live_tensors import LivePeak, LiveTensors, watching
from lorafit.ops.recomputed_layers import CHECKPOINTING, Checkpointing
from lorafit.plan.recipe_step import recipe_step
from lorafit.recipe.load import load_recipe
from lorafit.trainer.executor import Executor
from lorafit.trainer.step import Update, accumulate_gradients
from tests.unit.memory.test_estimate import ATTENTION, GPT2, MODELS, SIZES, build, one_thread  # noqa: F401

build_objective = tasks.make("causal-lm").build_objective

ROWS, TOKENS = 2, 128


def ask(
    config: dict[str, Any], folder: Path, *, device_kind: str = "cpu", tokens: int = TOKENS, **changes: Any
) -> StepMemory:
    """A recipe's step; `changes` are overrides such as `adapter__r=64`."""
    file = folder / "recipe.yaml"
    file.write_text("name: x\nmodel: {base: x}\ndata: {train: [{path: x.jsonl}]}\noutput: x\n", encoding="utf-8")
    plain = {"training__optimizer": "adamw", "model__quantization": "none", "data__packing": "false"}
    overrides = {**plain, **changes}
    overrides |= {} if "adapter" in changes else {"adapter__dropout": changes.get("adapter__dropout", 0.05)}
    recipe = load_recipe(file, [f"{key.replace('__', '.')}={value}" for key, value in overrides.items()]).recipe
    step = recipe_step(recipe, find_shape(config), None, None).step
    return StepMemory(replace(step, row_tokens=tokens, row_labels=tokens - 1, device_kind=device_kind))


def exact_each(asked: StepMemory, config: dict[str, Any], rows: int = ROWS) -> dict[Checkpointing, MemoryEstimate]:
    """Without checkpointing and with more and more of it, on one model."""
    dry = DryRun(asked.step, config)
    return {checkpointing: dry.run(rows * asked.step.row_tokens, checkpointing) for checkpointing in CHECKPOINTING}


def exact(asked: StepMemory, config: dict[str, Any], checkpointing: Checkpointing, rows: int = ROWS) -> MemoryEstimate:
    return DryRun(asked.step, config).run(rows * asked.step.row_tokens, checkpointing)


def measure_each(asked: StepMemory, config: dict[str, Any]) -> dict[Checkpointing, LivePeak]:
    """The same steps on real tensors: gradients and optimizer state are there from a step before."""
    shape, fp32, tokens = asked.step, asked.step.dtype == "fp32", asked.step.row_tokens
    kind = shape.quantization.section.kind
    torch.manual_seed(0)
    dtype = torch.float32 if fp32 else torch.bfloat16
    base = build(config, kind, dtype, shape.attention)
    base.is_loaded_in_4bit = kind == "nf4"
    model = attach_adapter(base, shape.adapter.section, 0)
    fuse_layers(model)
    if shape.keeps_unpacked:
        keep_unpacked(model)
    objective = build_objective(model, autocast_dtype=None if fp32 else dtype, exact=not shape.model.plain_head)
    objective.train()
    executor = Executor(objective, torch.device("cpu"))
    groups = rate_groups(executor.named_parameters, shape.adapter.rate_factor)
    optimizer = shape.optimizer.build(groups, 1e-3, torch.device("cpu"))
    ids = torch.randint(3, shape.model.vocabulary, (ROWS, tokens))
    columns = range(tokens - 1)
    index = torch.tensor([row * tokens + column for row in range(ROWS) for column in columns])
    halves = torch.arange(tokens // 2).repeat(ROWS, 2) if shape.packs_rows else None
    tensors = {"input_ids": ids, "label_index": index, "label_ids": ids.flatten()[index + 1]}
    tensors |= {"position_ids": halves} if halves is not None else {}
    batch = Batch(tensors, len(index), tuple(range(ROWS)), ids.numel())
    hook = shape.adapter.step_hook(model, RunFacts(0, 100))
    hooks = [hook] if hook is not None else []
    update = Update(optimizer, executor.named_parameters, lambda step: 1e-3, executor.scaler, hooks=hooks)

    def step() -> None:
        accumulate_gradients(executor, [batch], hooks=hooks)
        update.apply(1, update.gradient_norm())

    found = {}
    for checkpointing in CHECKPOINTING:
        set_checkpointing(model, checkpointing)
        if not found:
            step()
        live = LiveTensors()
        with watching(live, objective, optimizer, hooks):
            step()
        found[checkpointing] = live.peak()
    return found


CASES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama nf4": {"model__quantization": "nf4"},
    "llama nf4 kept unpacked": {"model__quantization": "{kind: nf4, keep_unpacked: true}"},
    "llama fp32": {"model__dtype": "fp32"},
    "llama r 64": {"adapter__r": 64},
    "llama without dropout": {"adapter__dropout": 0.0},
    "llama adamw_8bit": {"training__optimizer": "adamw_8bit"},
    "llama dora": {"adapter__kind": "dora"},
    "llama nf4 prompt tuning": {"adapter": "{kind: prompt_tuning, tokens: 16}", "model__quantization": "nf4"},
    "llama nf4 adalora": {"adapter": "{kind: adalora, r: 4, init_r: 6}", "model__quantization": "nf4"},
    "llama nf4 dora": {"adapter__kind": "dora", "model__quantization": "nf4"},
    "llama lora_fa": {"adapter__kind": "lora_fa"},
    "llama nf4 lora_plus": {"adapter__kind": "lora_plus", "model__quantization": "nf4"},
    "llama packed": {"data__packing": "true"},
    "qwen3": {},
    "gemma2": {},
    "gpt2": {},
    "opt": {},
    "mixtral": {"adapter__target_modules": f"[{','.join(ATTENTION)}]"},
    "mixtral fp32": {"model__dtype": "fp32"},
}


@pytest.mark.parametrize("case", CASES)
def test_a_dry_run_holds_what_a_real_step_holds(case: str, tmp_path: Path) -> None:
    config = MODELS[max((name for name in MODELS if case.startswith(name)), key=len)]
    if "nf4" in case:  # on a CPU a width that is no multiple of 64 stays unquantised
        config = {**config, "intermediate_size": 384}
    question = ask(config, tmp_path, **CASES[case])
    measured, run = measure_each(question, config), exact_each(question, config)
    for checkpointing in CHECKPOINTING:
        real, dry = measured[checkpointing], run[checkpointing]
        print(case, checkpointing, real.tensor_bytes, dry.tensor_bytes)
        assert dry.tensor_bytes == pytest.approx(real.tensor_bytes, rel=0.03)
        assert sum(dry.components.values()) == dry.tensor_bytes == max(dry.to_json()["phases_bytes"].values())
        for name in ("base_weights", "unpacked_weights", "adapter", "gradients"):
            assert dry.components[name] == pytest.approx(real.components.get(name, 0), rel=0.02)


@pytest.mark.parametrize(("device_kind", "quantization"), [("cpu", "none"), ("cuda", "nf4")])
@pytest.mark.parametrize(
    "model", ["meta-llama/Llama-3.1-8B", "Qwen/Qwen2.5-7B", "google/gemma-2-9b", "openai-community/gpt2"]
)
def test_closed_form_meets_the_dry_run(model: str, quantization: str, device_kind: str, tmp_path: Path) -> None:
    """Models cut to two layers, so that what stands beside them weighs most; benchmarks/memory_engines.py has all."""
    config = {
        **(known_config(model) or {}),
        "num_hidden_layers": 2,
        "n_layer": 2,
        "n_positions": 1024,
        "resid_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }
    question = ask(config, tmp_path, device_kind=device_kind, tokens=512, model__quantization=quantization)
    within = 0.05 if "lama" in model or "Qwen" in model else 0.10
    for checkpointing, dry in exact_each(question, config).items():
        assert question.at(ROWS * 512, checkpointing).tensor_bytes == pytest.approx(dry.tensor_bytes, rel=within)


@pytest.mark.parametrize(
    "model",
    ["google/gemma-3-4b-pt",
     *(pytest.param(model, marks=pytest.mark.slow) for model in (
         "allenai/Olmo-3-1025-7B", "unsloth/gpt-oss-20b-BF16",
         "swiss-ai/Apertus-8B-2509", "google/gemma-4-31B", "google/gemma-4-26B-A4B",
         "mistralai/Ministral-3-8B-Base-2512", "zai-org/GLM-4.5-Air"))],
)  # fmt: skip
def test_closed_form_of_models_read_from_their_classes(model: str, tmp_path: Path) -> None:
    """Cut to six layers: Gemma's last of them looks at the whole row."""
    config = known_config(model) or {}
    text = config.get("text_config", config)
    text |= {"num_hidden_layers": 6} | ({"layer_types": text["layer_types"][:6]} if "layer_types" in text else {})
    question = ask(config, tmp_path, device_kind="cuda", tokens=1024, model__quantization="nf4")
    for checkpointing, dry in exact_each(question, config).items():
        assert question.at(2 * 1024, checkpointing).tensor_bytes == pytest.approx(dry.tensor_bytes, rel=0.05)


@pytest.mark.parametrize("kind", ["lora", "lora_fa"])
def test_few_layers_stand_for_the_casts_of_all(kind: str, tmp_path: Path) -> None:
    """On a card all adapters are cast before the model runs: copies of layers that are left out are there, too."""
    config = {**MODELS["llama"], "num_hidden_layers": 9}
    asked = ask(config, tmp_path, device_kind="cuda", adapter__kind=kind, adapter__r=128)
    dry = DryRun(asked.step, config)
    few, whole = (dry.run(TOKENS, False, few_layers=few) for few in (True, False))
    assert few.tensor_bytes == pytest.approx(whole.tensor_bytes, rel=1e-3)


def test_flash_attention_is_tried_without_its_package(tmp_path: Path) -> None:
    """Its memory is that of sdpa's own flash kernel; transformers would import the package, or fetch a kernel."""
    config = {**(known_config("HuggingFaceTB/SmolLM2-135M") or {}), "num_hidden_layers": 2}
    sdpa, flash = (
        exact(ask(config, tmp_path, device_kind="cuda", model__attention=name), config, False)
        for name in ("sdpa", "flash_attention_2")
    )
    assert flash.tensor_bytes == sdpa.tensor_bytes


def test_rows_packed_for_varlen_attention_hold_no_mask_and_labels_everywhere(tmp_path: Path) -> None:
    """What a recipe that leaves both open is estimated with on a card."""
    config = {**(known_config("HuggingFaceTB/SmolLM2-135M") or {}), "num_hidden_layers": 2}
    asked = ask(config, tmp_path, device_kind="cuda", tokens=1024, data__packing="auto")
    masked = ask(config, tmp_path, device_kind="cuda", tokens=1024, data__packing="true", model__attention="sdpa")
    assert (asked.step.attention, asked.step.labels_at(1024)) == ("varlen", 1024)
    for checkpointing, dry in exact_each(asked, config).items():
        assert asked.at(ROWS * 1024, checkpointing).tensor_bytes == pytest.approx(dry.tensor_bytes, rel=0.01)
        assert dry.tensor_bytes + ROWS * 1024**2 <= exact(masked, config, checkpointing).tensor_bytes


@pytest.mark.slow
def test_a_tower_that_knows_no_sdpa_keeps_its_own_attention(tmp_path: Path) -> None:
    """Gemma 4's for sounds."""
    config = known_config("google/gemma-4-E2B") or {}
    text = config["text_config"]
    sizes = {"num_hidden_layers": 10, "num_kv_shared_layers": 5, "layer_types": text["layer_types"][:10]}
    question = ask({**config, "text_config": {**text, **sizes}}, tmp_path, device_kind="cuda")
    assert question.step.attention == "sdpa"
    assert exact(question, {**config, "text_config": {**text, **sizes}}, True).tensor_bytes > 2**30


@pytest.mark.slow
@pytest.mark.parametrize(("model", "device_kind"), [("meta-llama/Llama-3.1-8B", "cuda"), ("Qwen/Qwen2.5-7B", "cpu")])
def test_kept_copies_are_counted_by_both_engines(model: str, device_kind: str, tmp_path: Path) -> None:
    config = {**(known_config(model) or {}), "num_hidden_layers": 4}  # the first keeps less than the closed form says
    kept = "{kind: nf4, keep_unpacked: true}"
    question = ask(config, tmp_path, device_kind=device_kind, tokens=1024, model__quantization=kept)
    weights = sum(x.in_features * x.out_features * x.count for x in question.step.model.linears)
    for checkpointing, dry in exact_each(question, config).items():
        closed = question.at(2 * 1024, checkpointing)
        assert closed.components["unpacked_weights"] == dry.components["unpacked_weights"] == 2 * weights
        assert closed.tensor_bytes == pytest.approx(dry.tensor_bytes, rel=0.01)


def test_larger_chunks_of_the_loss_are_counted_by_both_engines(tmp_path: Path) -> None:
    config = {**MODELS["llama"], "vocab_size": 50_000}
    usual = ask(config, tmp_path, device_kind="cuda", tokens=512)
    larger = usual.changed(loss_chunk_bytes=256 * 2**20)
    for asked in (usual, larger):
        dry, closed = exact(asked, config, True), asked.at(ROWS * 512, True)
        assert dry.peak_phase.name == closed.peak_phase.name == "loss"
        assert closed.components["loss"] == pytest.approx(dry.components["loss"], rel=0.01)
    assert exact(larger, config, True).components["loss"] > 1.3 * exact(usual, config, True).components["loss"]


def test_a_change_to_the_step_changes_the_estimate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs the loop's own functions: a tensor that the gradients' code kept would be seen."""
    config = MODELS["llama"]
    question = ask(config, tmp_path)
    before = exact(question, config, False).tensor_bytes
    real, kept, size = dryrun.accumulate_gradients, [], 2**22

    def wasteful(*arguments: Any, **options: Any) -> Any:
        kept.append(torch.empty(size, dtype=torch.uint8))
        return real(*arguments, **options)

    monkeypatch.setattr(dryrun, "accumulate_gradients", wasteful)
    assert exact(question, config, False).tensor_bytes == before + size


def test_int8_holds_its_inputs_and_a_first_micro_batch_has_no_gradients_yet(tmp_path: Path) -> None:
    config = MODELS["llama"]
    four, eight = (ask(config, tmp_path, model__quantization=kind) for kind in ("nf4", "int8"))
    held = exact(eight, config, True).components["kept_activations"]
    assert held > 1.5 * exact(four, config, True).components["kept_activations"]
    alone = DryRun(four.step, config).run(ROWS * TOKENS, False, accumulates=False)
    assert alone.tensor_bytes < exact(four, config, False).tensor_bytes


def test_where_the_peak_is(tmp_path: Path) -> None:
    config = {**MODELS["llama"], "vocab_size": 50_000}
    question = ask(config, tmp_path)
    dry = exact(question, config, True)
    assert dry.peak_phase.name == "loss"
    assert dry.components["loss"] > 50_000 * 8 * 80  # a chunk of logits, their fp32 copy and the error
    small = exact(ask({**config, "vocab_size": 64}, tmp_path), {**config, "vocab_size": 64}, True)
    assert small.peak_phase.name == "backward"
    assert "layers." in small.peak_phase.where
    plain = json.loads(json.dumps(small.to_json()))
    assert plain["peak_phase"] == "backward"
    assert plain["needed_bytes"] > plain["tensor_bytes"]


@pytest.mark.parametrize(
    ("optimizer", "makes_a_copy"),
    [("adamw", False), ("adamw_8bit", False), ("paged_lion_8bit", False), ("sgd", False), ("rmsprop", True)],
)
def test_an_update_on_cuda_holds_a_copy_of_the_adapter_where_its_optimizer_makes_one(
    tmp_path: Path, optimizer: str, makes_a_copy: bool
) -> None:
    """By both engines: fused and bitsandbytes' optimizers make none, foreach ones the denominators of all tensors."""
    asked = ask(MODELS["llama"], tmp_path, device_kind="cuda", training__optimizer=optimizer, adapter__r=64)
    adapter = 4 * asked.step.trainable_parameters
    for estimate in (asked.at(TOKENS, True), exact(asked, MODELS["llama"], True, rows=1)):
        update = next(phase for phase in estimate.phases if phase.name == "update")
        assert update.total_bytes == pytest.approx(adapter if makes_a_copy else 0, abs=0.1 * adapter)


def test_plain_attention_keeps_its_result_to_both_engines(tmp_path: Path) -> None:
    """No kernel keeps it beside the scores: the adapter behind it does, which drops nothing of it."""
    options = {"device_kind": "cuda", "model__attention": "eager", "adapter__dropout": 0.0}
    asked = ask(MODELS["llama"], tmp_path, **options)
    found = [asked.at(ROWS * TOKENS, False), exact(asked, MODELS["llama"], False)]
    closed, run = (estimate.peak_phase.parts["kept_activations"] for estimate in found)
    assert closed == pytest.approx(run, rel=0.015)


def test_gpt2s_activation_on_cuda_is_the_same_to_both_engines(tmp_path: Path) -> None:
    """Under autocast it is computed in fp32, and the result's gradient is cast up before it is used."""
    config = {**(known_config("openai-community/gpt2") or {}), "n_layer": 2}
    asked = ask(config, tmp_path, device_kind="cuda", tokens=512)
    found = [asked.at(2048, True), exact(asked, config, True, rows=4)]
    closed, run = (next(p.total_bytes for p in estimate.phases if p.name == "backward") for estimate in found)
    assert closed == pytest.approx(run, rel=0.02)


def test_on_cuda_dropout_keeps_a_byte_and_nothing_stays_patched(tmp_path: Path) -> None:
    before = (torch.nn.functional.dropout, torch.nn.functional.layer_norm, torch.pow)
    config = MODELS["llama"]
    cpu, cuda = (exact(ask(config, tmp_path, device_kind=kind), config, False) for kind in ("cpu", "cuda"))
    assert cuda.components["kept_activations"] < 0.95 * cpu.components["kept_activations"]
    assert before == (torch.nn.functional.dropout, torch.nn.functional.layer_norm, torch.pow)


def test_a_config_that_transformers_cannot_build(tmp_path: Path) -> None:
    question = ask(MODELS["llama"], tmp_path)
    with pytest.raises(ModelError, match=r"config\.json.*knows no model_type 'no-such-model'"):
        exact(question, {**SIZES, "model_type": "no-such-model"}, False)
    with pytest.raises(ModelError, match=r"config\.json.*transformers cannot build this model \(llama\)"):
        exact(question, {**MODELS["llama"], "hidden_size": 129}, False)


@pytest.mark.slow
def test_a_70b_model_takes_little_memory_here(tmp_path: Path) -> None:
    """Whole process; seconds are the benchmark's."""
    code = f"""
import resource, sys
sys.path.insert(0, {str(Path(__file__).parents[3])!r})
from pathlib import Path
from tests.unit.estimation.test_dry_run import ask, exact
from lorafit.model.known_models import known_config
config = {{**known_config("meta-llama/Llama-3.1-70B"), "num_hidden_layers": 8}}
question = ask(config, Path({str(tmp_path)!r}), device_kind="cuda", tokens=2048, model__quantization="nf4")
print(exact(question, config, True, rows=1).tensor_bytes, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    tensor_bytes, resident_kib = map(int, done.stdout.split()[-2:])
    assert tensor_bytes > 5 * 2**30
    assert resident_kib < 2 * 2**20


def test_a_card_that_has_too_little_gets_more_and_more_checkpointing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Left open, as the dry runs say, each of which says more here than the closed form did."""
    file = tmp_path / "recipe.yaml"
    file.write_text("name: x\nmodel: {base: x}\ndata: {train: [{path: x.jsonl}]}\noutput: x\n", encoding="utf-8")
    shape = find_shape(known_config("meta-llama/Llama-3.1-8B") or {})
    real, ran = closed_form, []

    class Dry:
        def __init__(self, step: Any, config: Any) -> None:
            self.step = step

        def run(self, tokens: int, checkpointing: Checkpointing, **_: Any) -> MemoryEstimate:
            ran.append(checkpointing)
            return replace(real(self.step, tokens, checkpointing), device_kind="cpu")

    monkeypatch.setattr(dryrun, "DryRun", Dry)

    def answer(gib: float, asked: str) -> RecipeEstimate:
        ran.clear()
        read = load_recipe(file, [f"training.gradient_checkpointing={asked}"]).recipe
        found = estimate_recipe(read, shape, options=Options(gpu=parse_gpu(f"{gib}GiB"), headroom=0.0))
        return run_exactly(found, {}, Silent())

    half = answer(25, "auto")
    assert half.memory.gradient_checkpointing == "half" and ran == [False, "half"] and half.fits
    assert half.without_checkpointing is not None and half.without_checkpointing.gradient_checkpointing is False
    assert answer(15, "auto").memory.gradient_checkpointing is True and ran == ["half", True]
    assert answer(25, "false").fits is False and ran == [False]


def test_one_model_answers_for_other_attentions_and_its_update_runs_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the byte as a model built for each would, which takes longer than the runs."""
    asked = ask(MODELS["llama"], tmp_path, adapter="dora", model__quantization="nf4").step
    updates: list[int] = []
    apply = Update.apply
    monkeypatch.setattr(Update, "apply", lambda self, step, norm: updates.append(step) or apply(self, step, norm))
    dry = DryRun(asked, MODELS["llama"])
    found = {}
    for attention in ("sdpa", "eager"):
        dry.take(replace(asked, attention=attention, keeps_unpacked=attention == "eager"))
        found[attention] = dry.run(ROWS * TOKENS, True, few_layers=True)
    assert len(updates) == 2  # of these one makes the optimizer's state
    assert found["eager"] == DryRun(dry.step, MODELS["llama"]).run(ROWS * TOKENS, True, few_layers=True)
    assert found["eager"].tensor_bytes > found["sdpa"].tensor_bytes


def test_a_step_that_needs_values_is_an_error_of_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def needs_values(*_: Any, **options: Any) -> None:
        torch.nonzero(torch.ones(3))

    monkeypatch.setattr(dryrun, "accumulate_gradients", needs_values)
    with pytest.raises(ModelError, match=r"--exact: llama does not run on tensors without values.*leave --exact out"):
        exact(ask(MODELS["llama"], tmp_path), MODELS["llama"], False)
