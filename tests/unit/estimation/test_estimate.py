"""`estimate-memory`: the verdict, what would save memory, the methods beside it, and how all of it is shown."""

from __future__ import annotations

import io
import json
import math
import shlex
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from lorafit.console.reporting import ConsoleReporter
from lorafit.errors import DoesNotFitError, RecipeError, UsageError
from lorafit.estimation import Options, RecipeEstimate, RowLengths, check_headroom, estimate_recipe, measured
from lorafit.facts import Bar
from lorafit.machine.devices import format_bytes, parse_gpu
from lorafit.machine.hardware import cards, find_cards, usable_bytes
from lorafit.memory import MemoryEstimate, StepShape, closed_form
from lorafit.plan.recipe_step import recipe_step
from lorafit.recipe.load import load_recipe
from tests.support.plan_cases import GIB, ROWS, card, recipe, shape_of

BARS = (Bar(1, 100, 0), Bar(101, 200, 70), Bar(201, 300, 0), Bar(301, 600, 30))


def guess(
    gib: float | None = None,
    *,
    rows: RowLengths | None = None,
    hub_id: str = "meta-llama/Llama-3.1-8B",
    **sections: Any,
) -> RecipeEstimate:
    options = Options(gpu=None if gib is None else card(gib))
    return estimate_recipe(recipe(**sections), shape_of(hub_id), rows or RowLengths(), options)


def shown(estimate: RecipeEstimate, *, width: int = 80, encoding: str = "utf-8") -> str:
    from rich.console import Console

    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="backslashreplace")
    estimate.render(Console(file=out, width=width, soft_wrap=True))
    out.seek(0)
    return out.read()


def test_without_rows_max_length_stands_for_them() -> None:
    found = guess(data={"max_length": 1024}, rows=RowLengths(missing="a.jsonl is not on this disk"))
    assert (found.asked.step.row_tokens, found.fits) == (1024, None)
    assert found.memory.micro_batch_tokens == 1024
    found.raise_unless_fits()  # no card, no verdict
    assert found.to_json()["rows_missing"] == "a.jsonl is not on this disk"
    text = shown(found)
    assert "rows not read: a.jsonl is not on this disk; data.max_length stands for them" in text
    assert "tokens on average" not in text and " to " not in text  # no empty bars
    assert guess(data={"max_length": 9000}, hub_id="openai-community/gpt2").asked.step.row_tokens == 1024


@pytest.mark.parametrize(
    ("rows", "named"),
    [
        (RowLengths(), "a source of data.max_length, a target"),
        (RowLengths(ROWS, BARS), "source and target of the longest row"),
    ],
)
def test_a_row_of_an_encoder_decoder_is_its_source_and_its_target(
    monkeypatch: pytest.MonkeyPatch, rows: RowLengths, named: str
) -> None:
    monkeypatch.setattr(measured, "covers", lambda step: True)  # a dry run of these layers takes long
    found = guess(rows=rows, task={"kind": "seq2seq-lm"}, data={"max_length": 512})
    assert f"tokens ({named})" in shown(found) and found.asked.step.row_tokens > 512


def test_what_is_not_quantised_is_called_so_and_nothing_of_it_dequantised() -> None:
    """What comes and goes beside the activations is a weight's copy only where weights are quantised."""
    texts = []
    for kind in ("nf4", "none"):
        found = guess(model={"quantization": kind}, training={"epochs": 1}, rows=RowLengths(ROWS, BARS))
        busy = replace(found.memory.peak_phase, parts={"workspace": 2**20})
        texts.append(shown(replace(found, memory=replace(found.memory, phases=(busy,)))))
    nf4, text = texts
    assert "dequantised weight" in nf4 and ", nf4, bf16" in nf4
    assert "temporary tensors" in text and "dequantised" not in text and ", not quantised, bf16" in text
    assert "the run, 1 epoch, " in text


def test_real_rows_are_what_is_estimated_and_shown() -> None:
    known = guess(data={"max_length": 1024}, rows=RowLengths(ROWS, BARS))
    assert known.asked.step.row_tokens == 600
    assert known.memory.tensor_bytes < guess(data={"max_length": 1024}).memory.tensor_bytes
    plain = known.to_json()
    assert plain["rows"]["histogram"][1] == {"low": 101, "high": 200, "rows": 70}
    assert plain["rows_missing"] is None
    lines = shown(known).splitlines()
    assert "100 rows of 200 tokens on average, the longest 600 (data.max_length 1,024)" in lines
    first = lines.index(next(line for line in lines if line.startswith("100 rows"))) + 1
    bars = {line.split()[0]: line.count("█") for line in lines[first : lines.index("", first)]}
    assert bars == {"101-200": 40, "301-600": 17}  # nothing is shorter, and nothing lies between


def test_the_border_is_exact() -> None:
    needed = guess().memory.needed_bytes
    for size, fits in ((needed, True), (needed - 1, False)):
        device = parse_gpu(f"{size / GIB!r}GiB")
        assert device.memory_bytes == size
        found = estimate_recipe(
            recipe(training={"gradient_checkpointing": False}), shape_of(), options=Options(gpu=device, headroom=0.0)
        )
        assert found.fits is fits
    fifth = replace(card(1), memory_bytes=math.ceil(needed / 0.8))
    options = Options(gpu=fifth, headroom=0.2)
    assert estimate_recipe(recipe(training={"gradient_checkpointing": False}), shape_of(), options=options).fits
    less = Options(gpu=replace(fifth, memory_bytes=math.floor(needed / 0.8) - 1), headroom=0.2)
    assert not estimate_recipe(recipe(training={"gradient_checkpointing": False}), shape_of(), options=less).fits


@pytest.mark.parametrize("headroom", [-0.1, 0.91, math.nan, math.inf])
def test_what_is_no_headroom(headroom: float) -> None:
    with pytest.raises(UsageError, match=r"--headroom: .* out of range; a share lies in the range 0 to 0.9"):
        check_headroom(headroom, card(24))


ON = {"gradient_checkpointing": True}


def test_the_verdict_names_card_and_size() -> None:
    needed = guess(training=ON).memory.needed_bytes
    size = needed / GIB * 0.99
    small = guess(size, training=ON)
    said, have = format_bytes(needed), format_bytes(round(size * GIB))
    with pytest.raises(DoesNotFitError) as caught:
        small.raise_unless_fits()
    assert str(caught.value).startswith(
        f"--gpu: does not fit: needs {said}, a {size} GiB card has {have} usable, of which"
    )
    assert caught.value.exit_code == 10
    assert "; it would fit with " in str(caught.value)
    text = shown(small)
    assert (
        f"does not fit: {said} of {format_bytes(size * GIB * 0.95)} (a {size} GiB card: {have} usable, 5% stay" in text
    )
    assert "then it fits" in text
    assert f"fits: {said} of " in shown(guess(needed / GIB / 0.94, training=ON))


@pytest.mark.parametrize(
    ("base", "said"),
    [
        ("Qwen/Qwen3-30B-A3B", "54 GiB are experts, which no quantisation reaches; the smallest known card with"),
        ("meta-llama/Llama-3.1-405B", "no three switches are enough, no single card of configs/hardware has that much"),
        ("meta-llama/Llama-3.1-70B", "no three switches are enough, the smallest known card with"),
    ],
)
def test_what_is_far_too_large_gets_the_smallest_card_that_has_it(base: str, said: str) -> None:
    options = Options(gpu=parse_gpu("rtx 3060"))
    asked = recipe(model={"base": base, "quantization": "nf4"}, training=ON)
    found = estimate_recipe(asked, shape_of(base), options=options)
    with pytest.raises(DoesNotFitError) as caught:
        found.raise_unless_fits()
    message = str(caught.value)
    assert said in message and "…" not in message and "data.max_length" not in message
    if "405B" in base:
        return
    name = message.rpartition(" ")[2]
    needed = found.memory.needed_bytes
    larger = [each for each in cards() if needed <= 0.95 * usable_bytes(each)]
    assert estimate_recipe(asked, shape_of(base), options=Options(gpu=parse_gpu(name))).fits
    assert min(each["label_gib"] for each in larger) == parse_label(name)
    with pytest.raises(DoesNotFitError, match=f"--fit: nothing fits.* is {name}$"):
        estimate_recipe(asked, shape_of(base), options=Options(fit=parse_gpu("rtx 3060"))).raise_unless_fits()


def parse_label(name: str) -> int:
    (found,) = find_cards(name)
    return int(found["label_gib"])


def test_with_fit_all_is_of_that_card() -> None:
    """Everything above the last block is what `--gpu` shows of the same card, the verdict as well."""
    device = parse_gpu("rtx 3060")
    asked, rows = recipe(model={"base": "b", "quantization": "nf4"}), RowLengths()
    fit = estimate_recipe(asked, shape_of(), rows, Options(fit=device))
    gpu = estimate_recipe(asked, shape_of(), rows, Options(gpu=device))
    assert fit.memory.gradient_checkpointing and fit.fits
    assert shown(fit).startswith(shown(gpu).rstrip())
    plain = fit.to_json()
    assert plain.pop("fit") is not None
    assert plain == {key: value for key, value in gpu.to_json().items() if key != "fit"}
    small = estimate_recipe(asked, shape_of(), rows, Options(fit=card(8)))
    assert small.fits is False and "does not fit" in shown(small)
    small.raise_unless_fits()  # shorter rows do: --fit asks how far they can go


def test_checkpointing_that_the_card_asked_for_is_said() -> None:
    plain = guess(training={"gradient_checkpointing": False}).memory.needed_bytes
    half = guess(training={"gradient_checkpointing": "half"}).memory.needed_bytes
    for needed, value, words in ((plain, "half", "half on"), (half, True, "on")):
        turned_on = guess(needed / GIB)  # 5 % too small
        assert turned_on.memory.gradient_checkpointing == value and turned_on.without_checkpointing is not None
        assert turned_on.to_json()["needed_without_checkpointing_bytes"] == plain
        assert f", checkpointing {'half' if value == 'half' else 'on'}" in shown(turned_on)
        card_name = f"a {needed / GIB} GiB card"
        said = f"checkpointing was turned {words} for {card_name}: without it {format_bytes(plain)} would be needed"
        assert said in shown(turned_on)
    for other in (guess(plain / GIB / 0.94), guess(), guess(plain / GIB, training=ON)):
        assert other.without_checkpointing is None
        assert "turned on" not in shown(other)


def switches(found: RecipeEstimate) -> dict[str, int]:
    return {saving.switch: saving.saved_bytes for saving in found.savings}


def test_every_switch_that_saves_is_listed_and_no_other() -> None:
    bare = {"gradient_checkpointing": False, "optimizer": "adamw", "micro_batch_tokens": 8192}
    rows = RowLengths(replace(ROWS, longest_tokens=1024))
    large = guess(rows=rows, training=bare, model={"quantization": "none"})
    assert set(switches(large)) == {
        "training.gradient_checkpointing: true", "training.gradient_checkpointing: half",
        "training.micro_batch_tokens: 1024",
        "model.quantization: nf4", "training.optimizer: adamw_8bit", "training.optimizer: paged_adamw_8bit",
        "adapter.r: 8", "adapter.target_modules: [q_proj, v_proj]", "adapter.dropout: 0.0",
    }  # fmt: skip
    assert all(saved > 0 for saved in switches(large).values())
    assert list(switches(large).values()) == sorted(switches(large).values(), reverse=True)
    plain = {"kind": "nf4", "double_quant": False}
    assert switches(guess(model={"quantization": plain}))["model.quantization.double_quant: true"] > 300 * 2**20
    least = guess(
        data={"max_length": 8}, adapter={"r": 1, "dropout": 0.0, "target_modules": ["q_proj", "v_proj"]},
        training={"gradient_checkpointing": True, "optimizer": "paged_adamw_8bit"},
    )  # fmt: skip
    assert least.savings == ()


def test_kept_copies_are_a_saving_and_a_weight() -> None:
    asked = [{"kind": "nf4", "keep_unpacked": choice} for choice in (True, False)]
    kept, plain = (guess(24, model={"quantization": section}, training=ON) for section in asked)
    switch = "model.quantization.keep_unpacked: false"
    assert switches(kept)[switch] == kept.memory.needed_bytes - plain.memory.needed_bytes
    assert switch not in switches(plain) and switch not in switches(guess(24))
    copies = kept.memory.fixed["unpacked_weights"]
    assert copies == 2 * 6_979_321_856
    assert kept.methods[-1].weights_bytes - plain.methods[-1].weights_bytes == copies
    assert "unpacked weights" in shown(kept) and "unpacked weights" not in shown(plain)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "paged_adamw_8bit"])
def test_savings_of_the_optimizer(optimizer: str) -> None:
    found = guess(training={"optimizer": optimizer, "gradient_checkpointing": True})
    names = {saving.switch.rpartition(" ")[2]: saving for saving in found.savings if "optimizer" in saving.switch}
    assert set(names) == {"adamw": {"adamw_8bit", "paged_adamw_8bit"}, "adamw_8bit": {"paged_adamw_8bit"}}.get(
        optimizer, set()
    )
    if names:
        state = found.memory.fixed["optimizer_state"]
        assert names["paged_adamw_8bit"].saved_bytes == pytest.approx(1.1 * state, rel=0.01)
        assert names["paged_adamw_8bit"].note


def test_a_saving_is_what_the_changed_recipe_needs_less() -> None:
    now = guess(24, training={"gradient_checkpointing": False})
    by_hand = {
        "training.gradient_checkpointing: half": guess(24, training={"gradient_checkpointing": "half"}),
        "training.gradient_checkpointing: true": guess(24, training={"gradient_checkpointing": True}),
        "adapter.r: 8": guess(24, adapter={"r": 8}, training={"gradient_checkpointing": False}),
        "data.max_length: 1024": guess(24, data={"max_length": 1024}, training={"gradient_checkpointing": False}),
    }
    for saving in now.savings:
        if saving.switch in by_hand:
            other = by_hand.pop(saving.switch)
            assert saving.saved_bytes == now.memory.needed_bytes - other.memory.needed_bytes
            assert saving.fits is other.fits
    assert not by_hand


def test_methods_are_computed_for_the_model() -> None:
    found = guess(24)
    rows = {(method.name, method.precision): method for method in found.methods}
    own = rows["QLoRA", "nf4"]
    assert own.needed_bytes == found.memory.needed_bytes
    parts = (own.weights_bytes, own.gradients_bytes, own.optimizer_bytes, own.temporary_bytes)
    assert sum(parts) == found.memory.tensor_bytes
    full = rows["full", "fp32"]
    assert (
        full.weights_bytes
        == full.gradients_bytes
        == 4 * found.asked.step.model.total_parameters
        == full.optimizer_bytes // 2
    )
    usable = 24 * GIB * 0.95
    assert [method.fits for method in found.methods] == [method.needed_bytes <= usable for method in found.methods]
    assert [method.fits for method in found.methods][:3] == [False] * 3 and found.methods[-1].fits
    checkpointed = [method.needed_bytes for method in guess(training=ON).methods]
    assert checkpointed == sorted(checkpointed, reverse=True)
    assert all(method.fits is None for method in guess().methods)
    old = estimate_recipe(recipe(), shape_of(), options=Options(gpu=replace(card(24), bf16=False)))
    assert [method.precision for method in old.methods] == ["fp32", "fp16", "fp32", "fp16", "int8", "nf4"]
    own = guess(model={"quantization": {"kind": "adaptive", "bits": 5.0}})
    assert own.methods[-1].precision == own.quantization == "adaptive"  # the row that stands out
    assert own.methods[-1].needed_bytes == own.memory.needed_bytes
    lora = guess(model={"quantization": "none", "dtype": "bf16"})
    assert {m.precision: m.needed_bytes for m in lora.methods if m.name == "LoRA"}["bf16"] == lora.memory.needed_bytes


def test_rows_of_another_method_are_called_by_its_kind() -> None:
    found = guess(adapter={"kind": "rslora"})
    rows = {(method.name, method.precision): method for method in found.methods}
    assert {name for name, _ in rows} == {"full", "adapter rslora"}
    assert rows["adapter rslora", "nf4"].needed_bytes == found.memory.needed_bytes


@pytest.mark.parametrize(
    ("adapter", "said"),
    [
        ({"kind": "lora", "modules_to_save": ["q_proj"]}, "is a linear of the layers"),
        ({"kind": "oft", "block_size": 100}, "100 does not divide the 4096 inputs"),
    ],
)
def test_names_and_widths_are_judged_before_any_dry_run(adapter: dict[str, object], said: str) -> None:
    def never(step: StepShape, tokens: int, checkpointing: object) -> MemoryEstimate:
        raise AssertionError("a dry run was made")

    with pytest.raises(RecipeError, match=said):
        estimate_recipe(recipe(adapter=adapter), shape_of(), options=Options(gpu=card(64, kind="cpu")), engine=never)


def test_full_fine_tuning_as_it_was_measured() -> None:
    """Mistral-7B in bf16, 4 rows of 4,096 on an A100: 67.46 GiB allocated, whatever the batch (fms-acceleration)."""
    training = {"gradient_checkpointing": True, "micro_batch_tokens": 4 * 4096}
    found = guess(hub_id="mistralai/Mistral-7B-v0.1", data={"max_length": 4096}, training=training)
    full = next(method for method in found.methods if (method.name, method.precision) == ("full", "bf16"))
    tensors = full.weights_bytes + full.gradients_bytes + full.optimizer_bytes + full.temporary_bytes
    assert tensors / GIB == pytest.approx(67.46, rel=0.01)


@pytest.mark.parametrize("hub_id", ["meta-llama/Llama-3.1-8B", "mistralai/Mixtral-8x7B-v0.1", "google/gemma-2-2b"])
@pytest.mark.parametrize("width", [80, 120])
def test_tables_keep_to_their_width(hub_id: str, width: int) -> None:
    options = Options(gpu=parse_gpu("rtx-3060"), fit=parse_gpu("rtx-3060"), price_per_hour=0.21)
    found = estimate_recipe(recipe(), shape_of(hub_id), RowLengths(ROWS, BARS), options)
    text = shown(found, width=width)
    assert max(map(len, text.splitlines())) <= width + 10  # prose may be cut by the terminal, tables may not
    assert "…" not in text and "\x1b" not in text
    for part in ("tensors", "allocator x 1.10", "CUDA context", "card needed", "forward", "loss", "backward", "update"):
        assert part in text
    assert text.count(" peak\n") + text.count(" peak ") == 1
    assert ("experts" in text) == ("Mixtral" in hub_id)
    assert "#" in shown(found, encoding="ascii") and "\\u" not in shown(found, encoding="ascii")


def test_a_cpu_is_no_card() -> None:
    found = estimate_recipe(recipe(), shape_of(), options=Options(gpu=parse_gpu("cpu")))
    text = shown(found).lower()
    assert "memory needed" in text and "process" in text
    assert "card needed" not in text and "cuda" not in text
    assert found.memory.device_kind == "cpu"


def test_what_a_user_wrote_is_no_markup() -> None:
    assert "[red]b[/]" in shown(guess(model={"base": "[red]b[/]"}))


def test_json_is_plain() -> None:
    options = Options(gpu=parse_gpu("L4"), fit=parse_gpu("L4"), price_per_hour=1.0)
    found = estimate_recipe(recipe(), shape_of(), RowLengths(ROWS, BARS), options).to_json()
    plain = json.loads(json.dumps(found, allow_nan=False))
    assert plain["fits"] is True
    assert {"memory", "rows", "savings", "fit", "cost", "methods", "headroom", "epochs"} <= plain.keys()
    assert plain["memory"]["needed_bytes"] > plain["memory"]["tensor_bytes"]
    assert plain["epochs"] == 3.0


def test_a_70b_estimate_is_quick_and_imports_no_torch() -> None:
    code = (
        "import sys, time; start = time.process_time()\n"
        "from lorafit.machine.devices import parse_gpu\n"
        "from lorafit.model.class_shape import find_shape\n"
        "from lorafit.model.known_models import known_config\n"
        "from lorafit.estimation import Options, estimate_recipe\n"
        "from lorafit.recipe.schema import Recipe\n"
        "recipe = Recipe.model_validate({'name': 'x', 'model': {'base': 'b'}, 'data': {'train': 'a.jsonl'}})\n"
        "shape = find_shape(known_config('meta-llama/Llama-3.1-70B'))\n"
        "card = parse_gpu('A100-80GB')\n"
        "guess = estimate_recipe(recipe, shape, options=Options(gpu=card, fit=card))\n"
        "assert guess.fits, guess.to_json()\n"
        "heavy = {'torch', 'transformers', 'peft', 'bitsandbytes', 'numpy', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "print(time.process_time() - start)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1.0


WASTEFUL = {
    "name": "x",
    "model": {"base": "meta-llama/Llama-3.1-8B", "quantization": "none"},
    "data": {"train": "rows.jsonl", "chat_template": "chatml", "max_length": 4096},
    "training": {"optimizer": "adamw", "gradient_checkpointing": False},
}


@pytest.mark.parametrize(
    ("size", "keys"),
    [
        (30, ["training.gradient_checkpointing"]),
        (12, ["training.gradient_checkpointing", "model.quantization"]),
        (8, ["training.gradient_checkpointing", "model.quantization", "data.max_length"]),
        (4, []),
    ],
)
def test_the_cheapest_switches_are_enough(size: int, keys: list[str]) -> None:
    """What is printed is pasted: the recipe with it fits, and with one flag less, or a longer row, it does not."""
    shape, options = shape_of(), Options(gpu=card(size))

    def estimated(overrides: list[str]) -> RecipeEstimate:
        return estimate_recipe(load_recipe(WASTEFUL, overrides).recipe, shape, options=options)

    found = estimated([])
    with pytest.raises(DoesNotFitError) as caught:
        found.raise_unless_fits()
    if not keys:
        assert found.enough is None and "no three switches are enough" in str(caught.value)
        return
    assert found.enough is not None and str(caught.value).endswith(f"it would fit with {found.enough.shown}")
    flags = [word for word in shlex.split(found.enough.shown) if word != "--set"]
    assert [flag.partition("=")[0] for flag in flags] == keys
    pasted = estimated(flags)
    assert pasted.fits and pasted.memory.needed_bytes == found.enough.needed_bytes
    for flag in flags:
        assert not estimated([other for other in flags if other != flag]).fits
    key, _, longest = flags[-1].partition("=")
    if key == "data.max_length":
        assert not estimated([*flags[:-1], f"{key}={int(longest) + 1}"]).fits


@pytest.mark.parametrize(("size", "keeps", "key"), [(40, "auto", "micro_batch_tokens"), (18, True, "keep_unpacked")])
def test_what_is_enough_needs_what_is_said_with_the_copies_that_auto_then_keeps(
    size: int, keeps: bool | str, key: str
) -> None:
    asked = {
        **WASTEFUL,
        "model": {"base": "x/y", "quantization": {"kind": "nf4", "keep_unpacked": keeps}},
        "training": {"optimizer": "adamw_8bit", "micro_batch_tokens": 65536 if keeps == "auto" else 256},
        "data": {"train": "rows.jsonl", "max_length": 256},
    }
    shape, options = shape_of(), Options(gpu=card(size))
    found = estimate_recipe(load_recipe(asked, []).recipe, shape, options=options)
    assert found.enough is not None and key in found.enough.shown
    flags = [word for word in shlex.split(found.enough.shown) if word != "--set"]
    pasted = estimate_recipe(load_recipe(asked, flags).recipe, shape, options=options)
    assert pasted.asked.step.keeps_unpacked is (keeps == "auto")
    assert pasted.fits and pasted.memory.needed_bytes == found.enough.needed_bytes


def test_layers_that_the_closed_form_does_not_count_are_named() -> None:
    said = "too low: 36 of 48 layers carry a state along the row (Mamba, linear attention)"
    scanning = replace(shape_of(), layers=48, scanning_layers=36)
    assert said in shown(estimate_recipe(recipe(), scanning), width=200)
    assert said not in shown(estimate_recipe(recipe(), shape_of()), width=200)


def test_dry_runs_are_told_as_they_are_made_and_no_more_of_them_than_an_answer_takes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They take seconds each, minutes on a busy machine: one row is one run, and another attention no new model."""
    built, ran = [], []

    class Quick:
        def __init__(self, step: StepShape, config: object) -> None:
            built.append(step.adapter.section.kind)

        def take(self, step: StepShape) -> None:
            self.step = step

        def run(self, tokens: int, checkpointing: bool, *, few_layers: bool) -> MemoryEstimate:
            ran.append((self.step.attention, tokens, checkpointing))
            return closed_form(self.step, tokens, checkpointing)

    monkeypatch.setattr("lorafit.estimation.dry_run.DryRun", Quick)
    monkeypatch.setattr(measured, "kept", lambda name: None)
    monkeypatch.setattr(measured, "keep", lambda name, value: None)
    engine = measured.MeasuredSteps({}, ConsoleReporter())
    step = recipe_step(recipe(adapter={"kind": "dora"}), shape_of(), None, None, engine=engine)
    row, own = step.least_tokens, step.step.attention
    assert step.at(row, False) == closed_form(step.step, row, False)
    step.at(row, True)
    assert capsys.readouterr().err.splitlines()[1:] == ["dry runs 1", "dry runs 2"]
    step.at(2 * row, False)
    step.changed(attention="eager").at(row, False)
    many = measured.MANY_TOKENS // row * row
    assert ran == [(own, row, False), (own, row, True), (own, many, False), ("eager", row, False)]
    assert built == ["dora"]
