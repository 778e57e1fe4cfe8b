"""What `lorafit inspect` says is so: updates by PEFT's own merge, importances by plain PEFT, planted faults found."""

from __future__ import annotations

import json
import re
import shutil
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import lorafit
from lorafit.cli import app
from lorafit.contracts import Silent
from lorafit.errors import LorafitError, ModelError
from lorafit.evaluation import ablation
from lorafit.files.atomic import atomic_dir
from lorafit.kinds.adapters import adapters
from lorafit.model.adapter import read_adapter, save_adapter
from lorafit.model.attach import attach_adapter
from lorafit.model.updates import UpdateReader
from lorafit.studies.findings import find_dead, find_exploded, name_layers, name_linears, name_modules
from tests.support.adapted import load, make_gpt2, make_llama, open_base, train_like
from tests.support.tiny_recipe import make_rows, train_tiny, write_rows

LOW_RANK = {"r": 6, "alpha": 9, "dropout": 0.0}
KINDS: dict[str, dict[str, Any]] = {
    "lora": LOW_RANK,
    "rslora": LOW_RANK,
    "dora": LOW_RANK,
    "oft": {"block_size": 16},
    "vera": {"r": 8},
    "ia3": {},
    "miss": {"r": 4},
    "layer_norm": {},
    "peft": {},
}


def saved(folder: Path, kind: str, make: Any = make_llama) -> tuple[Any, Any, Path]:
    """Base, model and folder of an adapter whose trained values are random."""
    base = open_base(make(folder / "base"))
    model = attach_adapter(load(base), adapters.make_section(kind, **KINDS[kind]), 0)
    torch.manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) * 0.05
    (folder / "adapter").mkdir()
    save_adapter(model, folder / "adapter", base=base)
    return base, model, folder / "adapter"


def planted(adapter: Path, change: Any) -> None:
    """Changes the tensors of an adapter on disk, by their names without PEFT's prefix."""
    file = adapter / "adapter_model.safetensors"
    tensors = {name.removeprefix("base_model.model."): value for name, value in load_file(file).items()}
    change(tensors)
    save_file({f"base_model.model.{name}": value.contiguous() for name, value in tensors.items()}, file)


@pytest.mark.parametrize(("kind", "make"), [*((kind, make_llama) for kind in KINDS), ("lora", make_gpt2)])
def test_an_update_is_what_a_merge_adds_to_the_weight(tmp_path: Path, kind: str, make: Any) -> None:
    base, model, adapter = saved(tmp_path, kind, make)
    before = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32).state_dict()
    reader = UpdateReader(read_adapter(adapter), base, None)
    after = model.merge_and_unload().state_dict()
    changed = {name.removesuffix(".weight") for name, value in before.items() if not torch.equal(after[name], value)}
    assert {name.removesuffix(".weight") for name in reader.modules} == changed and changed
    for module in reader.modules[:: 5 if kind == "peft" else 1]:  # PEFT's layer is made anew for each
        update, weight = reader.read(module), f"{module.removesuffix('.weight')}.weight"
        exact = (after[weight].double() - before[weight].double()).reshape(update.shape)
        assert update.matrix is not None
        torch.testing.assert_close(update.matrix.dense(), exact, rtol=1e-4, atol=1e-6)
        assert update.weight_norm == pytest.approx(float(before[weight].double().norm()), rel=1e-6)
        assert (update.matrix.right is not None) == (kind in ("lora", "rslora", "vera", "miss"))


def test_the_weight_beside_a_quantised_base_is_what_training_saw(tmp_path: Path) -> None:
    import bitsandbytes

    made = train_like(open_base(make_llama(tmp_path / "base")), "nf4")
    reader = UpdateReader(read_adapter(made.adapter), made.base, made.quantization)
    assert reader.rebuilt == len(reader.modules) == 14
    for module in reader.modules:
        weight = made.model.get_base_model().get_submodule(module).base_layer.weight
        whole = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
        assert reader.read(module).weight_norm == pytest.approx(float(whole.double().norm()), rel=1e-6)
    reader.conclude(Silent())
    found = lorafit.inspect_adapter(made.adapter, quiet=True)
    assert "14 quantised weights made again, equal to what training saw" in found.base_proof


@pytest.mark.parametrize(
    ("kind", "part", "dead"),
    [("lora", "lora_B.weight", 0.0), ("rslora", "lora_B.weight", 1e-4), ("oft", "oft_R.weight", 0.0)],
)
def test_planted_faults_are_found(tmp_path: Path, kind: str, part: str, dead: float) -> None:
    _, _, adapter = saved(tmp_path, kind)
    assert "nothing stands out" in str(lorafit.inspect_adapter(adapter, quiet=True))
    paths = {what: f"model.layers.{layer}.self_attn.{name}" for what, layer, name in PLANTED}

    def plant(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{paths['dead']}.{part}"] *= dead
        tensors[f"{paths['broken']}.{part}"][0, 0] = torch.inf
        tensors[f"{paths['exploded']}.{part}"] *= 60
        if kind != "oft":
            for factor in "AB":
                tensors[f"{paths['copy']}.lora_{factor}.weight"] = (
                    tensors[f"{paths['source']}.lora_{factor}.weight"] * 2
                )
            tensors[f"{paths['ranks']}.lora_A.weight"][3] = tensors[f"{paths['ranks']}.lora_A.weight"][1]
            tensors[f"{paths['ranks']}.{part}"][:, 3] = tensors[f"{paths['ranks']}.{part}"][:, 1]

    planted(adapter, plant)
    found = lorafit.inspect_adapter(adapter, quiet=True, output=tmp_path / "out")
    assert (found.dead, found.not_finite) == ((paths["dead"],), (paths["broken"],))
    assert found.exploded == (paths["exploded"],)
    assert found.same_modules == (((paths["source"], paths["copy"]),) if kind != "oft" else ())
    assert found.same_ranks == ({paths["ranks"]: [(1, 3)]} if kind != "oft" else {})
    shown, figures = str(found), json.loads((tmp_path / "out" / "inspect.json").read_text())
    assert f"dead (no update, or under 1 % of the median): 1: {paths['dead']}" in shown and " NaN " in shown
    assert figures == found.to_json() and figures["not_finite"] == [paths["broken"]]
    picture = ElementTree.parse(tmp_path / "out" / "heat_map.svg")
    texts = [text.text for text in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert {"NaN", "dead", "q_proj", "0", "1"} <= set(texts)


PLANTED = [
    ("dead", 0, "q_proj"),
    ("broken", 1, "o_proj"),
    ("exploded", 1, "v_proj"),
    ("source", 0, "k_proj"),
    ("copy", 1, "k_proj"),
    ("ranks", 0, "o_proj"),
]


def test_a_dead_dora_module_is_found_though_its_norms_are_saved(tmp_path: Path) -> None:
    base, _, adapter = saved(tmp_path, "dora")
    weights = load_file(base.path / "model.safetensors")

    def plant(tensors: dict[str, torch.Tensor]) -> None:
        path = "model.layers.1.mlp.up_proj"
        tensors[f"{path}.lora_B.weight"].zero_()
        tensors[f"{path}.lora_magnitude_vector"].copy_(weights[f"{path}.weight"].norm(dim=1))

    planted(adapter, plant)
    assert lorafit.inspect_adapter(adapter, quiet=True).dead == ("model.layers.1.mlp.up_proj",)


def test_what_is_far_and_what_is_nothing_goes_by_the_others() -> None:
    usual = {f"m{number}": 0.02 * 1.1**number for number in range(10)}
    assert find_dead(usual) == find_exploded(usual) == []
    assert find_dead({**usual, "a": 0.0, "b": 1e-4, "c": 6e-4}) == ["a", "b"]
    assert find_exploded({**usual, "a": 0.14, "b": 2.0}) == ["b"]  # 4.5 times the median, and 60 times
    assert find_exploded({"a": 1.0, "b": 100.0}) == [] and find_dead({"a": 1.0, "b": 1e-9, "c": 0.0}) == ["c"]


def test_layers_and_linears_are_named_as_short_as_they_can_be_told_apart() -> None:
    paths = ["encoder.block.3.layer.0.SelfAttention.q", "decoder.block.11.layer.1.EncDecAttention.q", "lm_head"]
    assert name_modules(paths)[paths[0]] == "encoder 3.layer.0.SelfAttention.q"
    assert list(name_layers(["m.layers.3", "m.layers.11"]).values()) == ["3", "11"]
    assert list(name_linears(paths).values()) == ["layer.SelfAttention.q", "layer.EncDecAttention.q", "lm_head"]
    experts = [f"model.layers.0.moe.experts.{number}.w1" for number in (0, 1)]
    assert list(name_linears([*experts, "model.layers.1.mlp.experts.gate_up_proj[3]"]).values()) == [
        *("w1", "w1", "gate_up_proj")
    ]


@pytest.mark.parametrize("kind", ["prompt_tuning", "prefix_tuning"])
def test_what_changes_no_weight_is_refused(tmp_path: Path, kind: str) -> None:
    KINDS[kind] = {"tokens": 4}
    _, _, adapter = saved(tmp_path, kind)
    with pytest.raises(ModelError, match=r"cannot be inspected: .* trains .*, and changes no weight; .*lorafit eval"):
        lorafit.inspect_adapter(adapter, quiet=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inspect")
    return train_tiny(folder, valid=make_rows(3, first=100))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAFIT_CACHE", str(tmp_path / "cache"))


class Plain:
    """The run's adapter on its base in plain PEFT, and its test rows."""

    def __init__(self, run: Path) -> None:
        base = AutoModelForCausalLM.from_pretrained(
            run.parent / "base", dtype=torch.float32, attn_implementation="eager"
        )
        self.model = PeftModel.from_pretrained(base, run / "adapter").eval()
        self.factors = {
            path.removeprefix("base_model.model.").partition(".lora_B")[0]: (parameter, parameter.detach().clone())
            for path, parameter in self.model.named_parameters()
            if "lora_B" in path
        }
        self.rows = json.loads((run / "comparison.json").read_text())["rows"]

    @torch.no_grad()
    def loss(self, keeps: Any) -> float:
        """The mean of trained tokens, with B of every module zero that is not kept."""
        for path, (parameter, value) in self.factors.items():
            parameter.copy_(value if keeps(path) else torch.zeros_like(value))
        loss = weight = 0.0
        for row in self.rows:
            ids = torch.tensor([row["tokens"]])
            losses = functional.cross_entropy(self.model(ids).logits[0, :-1].double(), ids[0, 1:], reduction="none")
            trained = torch.tensor(row["trained"][1:], dtype=torch.float64)
            loss, weight = loss + float((losses * trained).sum()), weight + float(trained.sum())
        return loss / weight


@pytest.mark.parametrize("unit", ["layers", "modules"])
def test_importances_are_those_of_plain_peft_with_factors_zeroed(run: Path, unit: str) -> None:
    found, plain = lorafit.inspect_adapter(run, ablate=unit, quiet=True).ablation, Plain(run)
    assert found is not None and (found.rows, found.split) == (6, "test")
    assert found.tuned_loss == pytest.approx(plain.loss(lambda path: True), abs=1e-5)
    assert found.base_loss == pytest.approx(plain.loss(lambda path: False), abs=1e-5)
    assert len(found.parts) == (2 if unit == "layers" else 14)
    names = [part.name for part in found.parts]
    for number, part in enumerate(found.parts):
        if unit == "modules" and number % 5:
            continue
        off = plain.loss(lambda path, name=part.name: not path.startswith(name))
        assert part.off == pytest.approx(off, abs=1e-5)
        up, down = (tuple(names[:number]), tuple(names[number + 1 :]))
        without = [plain.loss(lambda path, on=on: path.startswith(on)) for on in (up, down)]
        with_it = [plain.loss(lambda path, on=on: path.startswith(on)) for on in ((*up, part.name), (part.name, *down))]
        assert part.value == pytest.approx((sum(without) - sum(with_it)) / 2, abs=1e-5)
    assert sum(part.value for part in found.parts) == pytest.approx(found.gain, abs=1e-6)
    assert found.off_together == pytest.approx(sum(part.off for part in found.parts) - len(names) * found.tuned_loss)


def test_what_stands_before_a_part_is_not_computed_again_and_changes_nothing(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, forward = list[int](), ablation._Ways._replayed

    def counted(self: Any, given: Any, before: int) -> Any:
        calls.append(before)
        return forward(self, given, before)

    monkeypatch.setattr(ablation._Ways, "_replayed", counted)
    found = lorafit.inspect_adapter(run, quiet=True, limit=2)
    assert calls == [1, 0, 1, 0, 1] and found.ablation is not None and found.ablation.rows == 2
    assert "2 rows of 6 of test" in str(found)
    monkeypatch.setattr(ablation._Ways, "_replayed", lambda self, given, before: forward(self, given, 0))
    assert lorafit.inspect_adapter(run, quiet=True, limit=2).ablation == found.ablation


def test_a_model_that_changes_its_layers_results_is_computed_whole(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the figures would be of other states than the model's."""
    calls, forward = list[int](), ablation._Ways._replayed

    def spoiled(self: Any, given: Any, before: int) -> Any:
        calls.append(before)
        return forward(self, {number: value * 1.5 for number, value in given.items()}, before)

    whole = lorafit.inspect_adapter(run, quiet=True).ablation
    monkeypatch.setattr(ablation._Ways, "_replayed", spoiled)
    assert lorafit.inspect_adapter(run, quiet=True).ablation == whole
    assert calls[0] == 1 and set(calls[1:]) == {0}


def test_rows_checkpoint_and_base_are_those_that_were_named(run: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", make_rows(5, first=300))
    given: dict[str, Any] = {"checkpoint": 2, "base_model": run.parent / "base", "limit": None, "quiet": True}
    found = lorafit.inspect_adapter(run.parent / "recipe.yaml", split="validation", **given)
    assert found.adapter == run / "checkpoints" / "step-000002" / "adapter" and found.ablation is not None
    assert (found.ablation.split, found.ablation.rows) == ("validation", 3)
    other = lorafit.inspect_adapter(run, overrides={"data.test": str(rows)}, **given).ablation
    last = lorafit.inspect_adapter(run, quiet=True, overrides={"data.test": str(rows)}).ablation
    assert other is not None and last is not None and (other.rows, last.rows) == (5, 5)
    assert other.base_loss == last.base_loss and other.tuned_loss != last.tuned_loss


def test_two_adapters_of_one_base_stand_side_by_side(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(run / "adapter", other)
    (other / "MANIFEST").unlink()

    def plant(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            if "lora_B" in name:
                tensors[name] *= -2.0

    planted(other, plant)
    found = lorafit.inspect_adapter(run, compare=other, quiet=True)
    assert found.other is not None and len(found.other.pairs) == 14 and found.other.missing == found.other.added == ()
    for pair in found.other.pairs:
        assert pair.ratio is not None and pair.other_ratio == pytest.approx(2 * pair.ratio)
        assert (pair.cosine, pair.reads, pair.writes) == pytest.approx((-1.0, 1.0, 1.0))
    assert "other / this" in str(found) and json.dumps(found.to_json(), allow_nan=False)
    assert found.not_ablated == "" and found.ablation is None
    assert "by % of weight" not in str(found) and "in per cent, Frobenius" not in str(found)
    both = lorafit.inspect_adapter(run, ablate="layers", compare=other, quiet=True)
    assert both.ablation is not None and str(both).index("other / this") < str(both).index("by importance")
    alone = lorafit.inspect_adapter(other, quiet=True)
    assert alone.ablation is None and "an adapter alone has no rows to lose on; name its run" in str(alone)


def test_no_figure_is_cut_on_a_narrow_screen(run: Path, tmp_path: Path) -> None:
    from rich.console import Console

    found = lorafit.inspect_adapter(run, ablate="none", compare=run / "adapter", quiet=True)
    name = "model.language_model.layers.{}.self_attn.q_proj"
    modules = tuple(replace(found.modules[0], name=name.format(at), update_norm=1.2345e-05) for at in range(13))
    assert found.other is not None
    pairs = tuple(replace(found.other.pairs[0], name=name.format(at), cosine=-0.9876) for at in range(13))
    wide = replace(found, modules=modules, other=replace(found.other, pairs=pairs))
    with (tmp_path / "shown").open("w+", encoding="utf-8") as file:
        wide.render(Console(file=file, width=80))
        replace(wide, other=None).render(Console(file=file, width=80))
        file.seek(0)
        shown = file.read()
    assert "…" not in shown and max(len(line) for line in shown.splitlines() if "q_proj" in line) <= 80
    assert (shown.count("1.234e-05"), shown.count("-0.9876")) == (12, 12)
    assert "by % of weight, the largest first; 12 of 13 modules, all of them with --json or --output:" in " ".join(
        shown.split()
    )


def test_a_run_with_nan_is_shown_without_importances(run: Path, tmp_path: Path) -> None:
    for name in ("run", "base"):
        shutil.copytree(run.parent / name, tmp_path / name)
    adapter = tmp_path / "run" / "adapter"

    def plant(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.mlp.up_proj.lora_A.weight"][0, 0] = torch.nan

    with atomic_dir(adapter, replace=True) as folder:  # with a MANIFEST of its own
        shutil.copytree(run / "adapter", folder, dirs_exist_ok=True)
        (folder / "MANIFEST").unlink()
        planted(folder, plant)
    found = lorafit.inspect_adapter(tmp_path / "run", quiet=True)
    assert (found.not_finite, found.ablation) == (("model.layers.0.mlp.up_proj",), None)
    assert "no importances: with NaN or Inf in the adapter there is no loss" in str(found)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["RUN", "--ablate", "ranks"], 2, "--ablate: 'ranks' is no part of an adapter; use layers, modules or none"),
        (["RUN", "--split", "half"], 2, "--split: 'half' is no split"),
        (["RUN", "--limit", "0"], 2, "--limit"),
        (["RUNS"], 2, "no such file or folder"),
        (["BASE"], 2, "is a whole model, in which no adapter can be told from its base"),
        (["RUN", "--compare", "BASE"], 2, "is a whole model"),
        (["RUN", "--compare", "OTHER", "--ablate", "none"], 5, "trained on 'base' .*, but this base is 'base'"),
        (["OTHER", "--checkpoint", "best"], 2, "only a run has checkpoints"),
        (["OTHER", "--set", "data.validation=x"], 2, "an adapter alone has no recipe"),
        (["RUN", "--output", "BASE"], 2, "exists already"),
        (["RUN", "--base-model", "OTHERBASE"], 5, "base mismatch|another|digest"),
        (["RUN", "--checkpoint", "9"], 6, "step"),
    ],
)
def test_what_cannot_be_done_is_said(
    run: Path, tmp_path_factory: pytest.TempPathFactory, arguments: list[str], code: int, message: str
) -> None:
    other = tmp_path_factory.mktemp("other")
    if any("OTHER" in word for word in arguments):
        saved(other, "lora")
    places = {"RUN": run, "RUNS": run.with_name("runs"), "BASE": run.parent / "base"}
    places |= {"OTHER": other / "adapter", "OTHERBASE": other / "base"}
    from lorafit.cli import main

    with pytest.raises(SystemExit) as ended, pytest.MonkeyPatch.context() as patch:
        errors: list[str] = []
        patch.setattr("sys.stderr.write", errors.append)
        main(["inspect", *(str(places.get(word, word)) for word in arguments)])
    assert ended.value.code == code
    assert re.search(message, "".join(errors))


def test_the_command_prints_one_object(run: Path, tmp_path: Path) -> None:
    told = CliRunner().invoke(app, ["inspect", str(run), "--json", "--quiet", "--output", str(tmp_path / "out")])
    found = json.loads(told.stdout)
    assert found["ablation"]["unit"] == "layers" and len(found["modules"]) == 14 and found["dead"] == []
    assert found["base_proof"].startswith("the one that it was trained on, by digest")
    assert json.loads((tmp_path / "out" / "inspect.json").read_text()) == found
    with pytest.raises(LorafitError, match="exists already"):
        lorafit.inspect_adapter(run, output=tmp_path / "out", quiet=True)
