"""A composed adapter is the weighted sum of what its parts add, to 1e-6 of the fp64 sum, and loads as plain LoRA."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import lorafit
from lorafit.cli import app, main
from lorafit.errors import LorafitError, ModelError
from lorafit.kinds.adapters import adapters as kinds
from lorafit.model.adapter import save_adapter
from lorafit.model.attach import attach_adapter
from tests.support.adapted import load, logits, make_gpt2, make_llama, open_base, randomise
from tests.support.tiny_model import make_base
from tests.support.tiny_recipe import make_recipe, make_rows, write_rows

Deltas = dict[str, torch.Tensor]
SECTIONS: dict[str, dict[str, Any]] = {
    "plain": {"r": 6, "alpha": 9},
    "stable": {"kind": "rslora", "r": 4, "alpha": 16},
    "ranked": {"r": 3, "alpha": 5, "ranks": {"q_proj": 2, "down_proj": 5}},
    "few": {"r": 8, "alpha": 4, "target_modules": ["q_proj", "down_proj"]},
    "upper": {"r": 2, "alpha": 8, "target_modules": ["v_proj", "down_proj"], "layers": {"last": 1}},
}


def deltas(model: Any, name: str = "default") -> Deltas:
    """s B A of each layer in fp64, by PEFT's own scale and factors."""
    found = {}
    for path, module in model.named_modules():
        if name in getattr(module, "lora_A", {}):
            a, b = (getattr(module, part)[name].weight.detach().double() for part in ("lora_A", "lora_B"))
            found[path.removeprefix("base_model.model.")] = module.scaling[name] * (b @ a)
    return found


def put(base: Any, folder: Path, seed: int, kind: str = "lora", **fields: Any) -> Deltas:
    """Saves an adapter with random factors; gives what it adds."""
    section = kinds.make_section(kind, **({"dropout": 0.0} | fields))
    model = attach_adapter(load(base), section, 0)
    randomise(model, seed)
    folder.mkdir()
    save_adapter(model, folder, base=base)
    return deltas(model)


def dense_sum(parts: dict[str, Deltas], weights: dict[str, float]) -> Deltas:
    total: Deltas = {}
    for name, weight in weights.items():
        for path, delta in parts[name].items():
            total[path] = total.get(path, torch.zeros_like(delta)) + weight * delta
    return total


def opened(base: Any, folder: Path) -> Any:
    """By plain PEFT."""
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32), folder)


def off(found: Deltas, wanted: Deltas) -> float:
    """Largest relative Frobenius error of a layer."""
    assert found.keys() == wanted.keys()
    return max(float((found[path] - wanted[path]).norm() / wanted[path].norm()) for path in wanted)


class World:
    """A base with saved adapters of every form."""

    def __init__(self, root: Path) -> None:
        self.root, self.base = root, open_base(make_llama(root / "base"))
        self.parts = {name: put(self.base, root / name, n, **own) for n, (name, own) in enumerate(SECTIONS.items())}
        self.folders = {name: root / name for name in SECTIONS}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("compose"))


SUMS: list[dict[str, float]] = [
    {"plain": 0.7},
    {"stable": 1.0, "plain": -0.5},
    {"ranked": 2.0, "stable": 0.3},
    {"few": 1.0, "upper": 1.0},
    {"plain": 0.7, "stable": 0.3, "ranked": -1.0, "few": 0.25, "upper": -3.0},
]


@pytest.mark.parametrize("weights", SUMS, ids=lambda w: "+".join(w))
@pytest.mark.parametrize("patterns", [False, True])
def test_a_sum_is_the_dense_sum_in_fp64(
    world: World, tmp_path: Path, weights: dict[str, float], patterns: bool
) -> None:
    text = " + ".join(f"{weight}*{name}" for name, weight in weights.items()).replace("+ -", "- ")
    found = lorafit.compose(
        text, adapters={name: world.folders[name] for name in weights}, output=tmp_path / "sum", patterns=patterns
    )
    model = opened(world.base, tmp_path / "sum")
    wanted = dense_sum(world.parts, weights)
    assert off(deltas(model), wanted) < 1e-6
    assert found.share == 0 and found.weights == pytest.approx(weights)
    config = json.loads((tmp_path / "sum" / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"] == found.rank and not config["use_rslora"]
    assert bool(config["rank_pattern"]) == (patterns and len({v.rank for v in ranks(model)}) > 1)
    plain = AutoModelForCausalLM.from_pretrained(world.base.path, dtype=torch.float32)
    for path, delta in wanted.items():
        plain.get_submodule(path).weight.data += delta.float()
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-4, atol=1e-4)


class _Rank:
    def __init__(self, rank: int) -> None:
        self.rank = rank


def ranks(model: Any) -> list[_Rank]:
    return [_Rank(m.r["default"]) for m in model.modules() if "default" in getattr(m, "lora_A", {})]


def test_weights_that_lie_in_out_are_summed_too(tmp_path: Path) -> None:
    base = open_base(make_gpt2(tmp_path / "base"))
    parts = {name: put(base, tmp_path / name, n, r=3 + n, alpha=8) for n, name in enumerate("ab")}
    lorafit.compose("a - 2*b", adapters={n: tmp_path / n for n in "ab"}, output=tmp_path / "sum")
    assert off(deltas(opened(base, tmp_path / "sum")), dense_sum(parts, {"a": 1, "b": -2})) < 1e-6


def test_what_peft_makes_of_the_same_sum(world: World, tmp_path: Path) -> None:
    """Its `linear` sums factors instead of products, and its `cat` loses a scale of rank-stabilised adapters."""
    two = {"x": tmp_path / "x", "y": tmp_path / "y"}
    parts = {n: put(world.base, two[n], seed, r=8, alpha=16) for seed, n in enumerate(two)}
    stable = {"s": tmp_path / "s", "t": tmp_path / "t"}
    parts |= {n: put(world.base, stable[n], seed + 5, "rslora", r=9, alpha=9) for seed, n in enumerate(stable)}

    def pefts(folders: dict[str, Path], kind: str) -> float:
        (one, first), (two, second) = folders.items()
        model = AutoModelForCausalLM.from_pretrained(world.base.path, dtype=torch.float32)
        model = PeftModel.from_pretrained(model, first, adapter_name=one)
        model.load_adapter(second, adapter_name=two)
        model.add_weighted_adapter([one, two], [0.7, 0.3], "both", combination_type=kind)
        return off(deltas(model, "both"), dense_sum(parts, {one: 0.7, two: 0.3}))

    def ours(folders: dict[str, Path]) -> float:
        one, two = folders
        output = tmp_path / f"sum-{one}"
        lorafit.compose(f"0.7*{one} + 0.3*{two}", adapters=folders, output=output)
        return off(deltas(opened(world.base, output)), dense_sum(parts, {one: 0.7, two: 0.3}))

    assert 0.5 < pefts(two, "linear") < 1.1 and pefts(two, "cat") < 1e-6
    assert pefts(stable, "cat") > 1.5
    assert ours(two) < 1e-6 and ours(stable) < 1e-6


def test_a_rank_is_the_closest_and_its_error_eckart_and_youngs(world: World, tmp_path: Path) -> None:
    weights = {"plain": 0.7, "stable": 0.3, "ranked": -1.0}
    text, folders = "0.7*plain + 0.3*stable - ranked", {name: world.folders[name] for name in weights}
    found = lorafit.compose(text, adapters=folders, output=tmp_path / "small", rank=5)
    small, wanted = deltas(opened(world.base, tmp_path / "small")), dense_sum(world.parts, weights)
    for error in found.errors:
        values = torch.linalg.svdvals(wanted[error.layer])
        optimum = float(values[5:].norm() / values.norm())
        assert error.share == pytest.approx(optimum, abs=1e-5)
        real = float((small[error.layer] - wanted[error.layer]).norm() / values.norm())
        assert real == pytest.approx(optimum, abs=1e-5)
    assert found.rank == 5 and "layers that lose most" in str(found) and "rank 5, " in str(found)


def test_a_share_of_ties_takes_the_ranks_that_it_needs(world: World, tmp_path: Path) -> None:
    """Its result is of full rank: with no more than the ranks of all adapters together it left out more than asked."""
    folders = {name: world.folders[name] for name in ("plain", "stable")}
    ask: dict[str, Any] = {"adapters": folders, "method": "ties", "density": 0.4, "quiet": True}
    usual = lorafit.compose("plain + stable", output=tmp_path / "usual", **ask)
    found = lorafit.compose("plain + stable", output=tmp_path / "share", rank="5%", **ask)
    pairs = zip(found.errors, usual.errors, strict=True)
    assert found.rank > usual.rank and all(error.share <= 0.05 < was.share for error, was in pairs)


def test_a_share_gives_each_layer_the_smallest_rank_that_keeps_it(world: World, tmp_path: Path) -> None:
    found = lorafit.compose(
        "plain + few", adapters=world.folders, output=tmp_path / "small", rank="20%", patterns=True, quiet=True
    )
    wanted = dense_sum(world.parts, {"plain": 1, "few": 1})
    tensors = load_file(tmp_path / "small" / "adapter_model.safetensors")
    for error in found.errors:
        rank = len(tensors[f"base_model.model.{error.layer}.lora_A.weight"])
        values = torch.linalg.svdvals(wanted[error.layer])
        assert values[rank:].norm() <= 0.2 * values.norm() < values[rank - 1 :].norm()


def test_the_mean_of_clients_of_different_ranks_is_the_dense_weighted_mean(world: World, tmp_path: Path) -> None:
    clients = {f"c{r}": tmp_path / f"c{r}" for r in (4, 8, 16, 32)}
    parts = {
        name: put(world.base, folder, int(name[1:]), r=int(name[1:]), alpha=16) for name, folder in clients.items()
    }
    rows = [100.0, 300.0, 50.0, 550.0]
    lorafit.compose(adapters=clients, output=tmp_path / "mean", mean=True, weights=rows)
    wanted = dense_sum(parts, dict(zip(clients, [number / 1000 for number in rows], strict=True)))
    assert off(deltas(opened(world.base, tmp_path / "mean")), wanted) < 1e-6
    one = lorafit.compose(adapters={n: world.folders[n] for n in ("few", "upper")}, output=tmp_path / "e", mean=True)
    assert one.weights == {"few": 0.5, "upper": 0.5}


def test_ties_and_dare_are_cut_to_the_closest_of_a_rank(world: World, tmp_path: Path) -> None:
    from lorafit.ops.task_vectors import dare, ties

    folders = {name: world.folders[name] for name in ("plain", "stable")}
    for method in ("ties", "dare"):
        output = tmp_path / method
        found = lorafit.compose(
            "plain - 0.5*stable", adapters=folders, output=output, method=method, density=0.4, rank=7, seed=3
        )
        made = deltas(opened(world.base, output))
        for error in found.errors:
            pair = [world.parts["plain"][error.layer], -0.5 * world.parts["stable"][error.layer]]
            seeds = [f"3 {name} {error.layer}" for name in folders]
            whole = ties(pair, 0.4) if method == "ties" else dare(pair, 0.4, seeds)
            optimum = float(torch.linalg.svdvals(whole)[7:].norm() / whole.norm())
            assert error.share == pytest.approx(optimum, abs=1e-5)
            assert float((made[error.layer] - whole).norm() / whole.norm()) == pytest.approx(optimum, abs=1e-5)
        assert found.share > 0.1 and f"{method} of plain - 0.5*stable" in str(found)


OTHERS = {
    "dora": "the new weight of dora is m V / ||V||, V = W + s B A",
    "ia3": "the new weight of ia3 is diag(l) W, or W diag(l)",
    "miss": "the new weight of miss is W + expand(D)",
}


@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_no_product_is_refused_or_converted_with_its_error(world: World, tmp_path: Path, kind: str) -> None:
    fields = {"r": 4} if "r" in kinds.section(kind).model_fields else {}
    model = attach_adapter(load(world.base), kinds.make_section(kind, target_modules=["q_proj", "v_proj"], **fields), 0)
    torch.manual_seed(4)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.02 * torch.randn_like(parameter)
    (tmp_path / kind).mkdir()
    save_adapter(model, tmp_path / kind, base=world.base)
    folders = {"x": tmp_path / kind, "plain": world.folders["plain"]}
    with pytest.raises(ModelError, match=re.escape(f"'x' cannot be summed: {OTHERS[kind]}")) as error:
        lorafit.compose("x + plain", adapters=folders, output=tmp_path / "sum")
    assert "--convert" in str(error.value) or "convert" in str(error.value)
    found = lorafit.compose("2*x + plain", adapters=folders, output=tmp_path / "sum", convert=True, rank=12, quiet=True)
    before = {
        path: m.base_layer.weight.detach().double() for path, m in model.named_modules() if hasattr(m, "base_layer")
    }
    merged = model.merge_and_unload()
    made = deltas(opened(world.base, tmp_path / "sum"))
    for layer in found.errors:
        whole = world.parts["plain"][layer.layer]
        if (own := f"base_model.model.{layer.layer}") in before:
            whole = whole + 2 * (merged.get_submodule(layer.layer).weight.double() - before[own])
        optimum = float(torch.linalg.svdvals(whole)[12:].norm() / whole.norm())
        assert float((made[layer.layer] - whole).norm() / whole.norm()) == pytest.approx(optimum, abs=1e-5)
        assert layer.share == pytest.approx(optimum, abs=1e-5)


def test_prompts_are_no_change_of_weights(world: World, tmp_path: Path) -> None:
    model = attach_adapter(load(world.base), kinds.make_section("prompt_tuning"), 0)
    (tmp_path / "p").mkdir()
    save_adapter(model, tmp_path / "p", base=world.base)
    with pytest.raises(ModelError, match="'p' cannot be summed"):
        lorafit.compose("p", adapters={"p": tmp_path / "p"}, output=tmp_path / "sum", convert=True)


def test_modules_that_are_saved_whole_must_be_equal_in_all(world: World, tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        put(world.base, tmp_path / name, seed, r=2, alpha=2, modules_to_save=["norm"])
    folders = {name: tmp_path / name for name in "ab"}
    lorafit.compose("a + b", adapters=folders, output=tmp_path / "sum")
    tensors = load_file(tmp_path / "sum" / "adapter_model.safetensors")
    assert "base_model.model.model.norm.weight" in tensors
    opened(world.base, tmp_path / "sum")
    with pytest.raises(ModelError, match="'plain' has none, and what takes the place of the base's values"):
        lorafit.compose("a + plain", adapters={**folders, "plain": world.folders["plain"]}, output=tmp_path / "s2")
    file = tmp_path / "b" / "adapter_model.safetensors"
    changed = load_file(file)
    changed["base_model.model.model.norm.weight"] += 1
    save_file(changed, file)
    with pytest.raises(ModelError, match=r"holds 'model.norm.weight' whole .*: it is not equal in all"):
        lorafit.compose("a + b", adapters=folders, output=tmp_path / "s3")


def test_adapters_of_two_bases_are_refused(world: World, tmp_path: Path) -> None:
    other = open_base(make_llama(tmp_path / "other", rms_norm_eps=1e-4))
    put(other, tmp_path / "b", 1, r=2, alpha=2)
    with pytest.raises(ModelError, match=r"'plain' and 'b' are of different bases: 'base' .* and 'other'"):
        lorafit.compose(
            "plain + b", adapters={"plain": world.folders["plain"], "b": tmp_path / "b"}, output=tmp_path / "s"
        )
    foreign = tmp_path / "foreign"  # of another tool: without notes, so that the name and the shapes are what there is
    shutil.copytree(world.folders["plain"], foreign, ignore=shutil.ignore_patterns("lorafit.json"))
    with pytest.warns(UserWarning, match="not every adapter notes its base's digest"):
        lorafit.compose(
            "plain - f", adapters={"plain": world.folders["plain"], "f": foreign}, output=tmp_path / "zero", quiet=True
        )
    wide = open_base(make_llama(tmp_path / "deeper" / "base", intermediate_size=256))
    put(wide, tmp_path / "w", 1, r=2, alpha=2)
    (tmp_path / "w" / "lorafit.json").unlink()
    with pytest.raises(ModelError, match=r"down_proj: 'plain' changes a weight \[128, 192\], 'w' one of \[128, 256\]"):
        lorafit.compose(
            "plain + w",
            adapters={"plain": world.folders["plain"], "w": tmp_path / "w"},
            output=tmp_path / "s",
            quiet=True,
        )


BAD: list[tuple[dict[str, Any], int, str]] = [
    ({"expression": None}, 2, "SUM: needs a sum of adapters"),
    ({"expression": "few + plainn"}, 2, "no adapter is called 'plainn'; did you mean plain?"),
    ({"mean": True}, 2, "mean: a sum is written already"),
    ({"weights": "1,2"}, 2, "weights: only a mean reads it"),
    ({"expression": None, "mean": True, "weights": "1,2,3"}, 2, "3 weights for 2 adapters"),
    ({"expression": None, "mean": True, "weights": "1,x"}, 2, "'x' is no number"),
    ({"expression": None, "mean": True, "weights": "1,-1"}, 2, "a mean has weights from 0"),
    ({"expression": None, "mean": True, "weights": "rows"}, 2, "'plain' is no run"),
    ({"rank": "few"}, 2, "'few' is no rank"),
    ({"rank": 0}, 2, "'0' is no rank"),
    ({"rank": "120%"}, 2, "'120%' is no rank"),
    ({"method": "tise"}, 2, "'tise' is no method; did you mean ties?"),
    ({"density": 0.5}, 2, "density: only ties and dare read it"),
    ({"density": 1.5, "method": "ties"}, 2, "density: found 1.5; give a number from 0.001 to 1"),
    ({"fit_rows": "rows.jsonl", "method": "ties"}, 2, "weights are fitted for a sum, and ties is none"),
    ({"expression": "0*plain + 0*few"}, 2, "every weight is 0"),
    ({"eval_rows": "none.jsonl"}, 5, "none of the adapters has a run's card"),
    ({"adapters": {"plain": "nowhere"}}, 2, "nowhere: no such file or folder"),
    ({"adapters": {"a b": "x"}}, 2, "'a b' is no name for a sum"),
    ({"adapters": ["plain"]}, 2, "'plain' names no adapter and its folder"),
    ({"adapters": []}, 2, "no adapter is named"),
]


@pytest.mark.parametrize(("more", "code", "message"), BAD, ids=[message[:30] for _, _, message in BAD])
def test_what_cannot_be_done_is_said(
    world: World, tmp_path: Path, more: dict[str, Any], code: int, message: str
) -> None:
    given = {"adapters": {n: world.folders[n] for n in ("plain", "few")}, "output": tmp_path / "sum", **more}
    with pytest.raises(LorafitError) as error:
        lorafit.compose(
            more.get("expression", "plain + few"), **{k: v for k, v in given.items() if k != "expression"}, quiet=True
        )
    assert message in str(error.value) and error.value.exit_code == code
    assert not (tmp_path / "sum").exists()


def test_paths_that_are_no_adapter_are_told_apart(world: World, tmp_path: Path) -> None:
    def said(path: Path, output: Path = tmp_path / "sum") -> str:
        with pytest.raises(LorafitError) as error:
            lorafit.compose("plain", adapters={"plain": path}, output=output)
        return str(error.value)

    assert "is a file and no folder of an adapter" in said(world.folders["plain"] / "adapter_config.json")
    assert "is a whole model and no adapter" in said(world.base.path)
    (tmp_path / "empty").mkdir()
    assert "is no run folder" in said(tmp_path / "empty")
    assert "exists already" in said(world.folders["plain"], tmp_path / "empty")
    assert "is also an input" in said(world.folders["plain"], world.folders["plain"])
    broken = tmp_path / "broken"
    shutil.copytree(world.folders["plain"], broken)
    tensors = load_file(broken / "adapter_model.safetensors")
    lost = next(name for name in tensors if "lora_B" in name)
    save_file({name: value for name, value in tensors.items() if name != lost}, broken / "adapter_model.safetensors")
    assert "lacks tensors of its layers" in said(broken)
    save_file({**tensors, lost: tensors[lost] * float("nan")}, broken / "adapter_model.safetensors")
    assert "non-finite values" in said(broken)
    (broken / "adapter_model.safetensors").write_bytes(b"none")
    assert "adapter_model.safetensors" in said(broken)


def test_more_rank_than_there_is_is_said(world: World, tmp_path: Path) -> None:
    adapters = [f"--adapter={name}={world.folders[name]}" for name in ("plain", "few")]
    told = CliRunner().invoke(
        app,
        [
            "compose",
            "plain + few",
            *adapters,
            f"--output={tmp_path / 's'}",
            "--rank=500",
        ],
    )
    assert told.exit_code == 0 and re.search(r"--rank 500: \d+ is all there is", told.stderr)


def test_a_minus_that_begins_a_sum_is_no_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["compose", "-a + b", "--adapter", "a=x"])
    assert ended.value.code == 2
    assert 'a sum that begins with a minus needs parentheses, e.g. "(-a) + b"' in capsys.readouterr().err


def test_what_counts_for_nothing_is_said(world: World, tmp_path: Path) -> None:
    with pytest.warns(UserWarning) as warned:
        lorafit.compose(
            "plain + 0*few",
            adapters={n: world.folders[n] for n in ("plain", "few", "upper")},
            output=tmp_path / "s",
            quiet=True,
        )
    said = [str(one.message) for one in warned]
    assert "not in the sum, and left out: upper" in said and "of weight 0, and left out: few" in said
    with pytest.warns(UserWarning, match="the sum is zero in every layer"):
        lorafit.compose(
            "a - b", adapters=dict.fromkeys("ab", world.folders["plain"]), output=tmp_path / "z", quiet=True
        )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs on one base, with different rows and ranks."""
    folder = tmp_path_factory.mktemp("runs")
    make_base(folder / "base")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORAFIT_CACHE", str(folder / "cache"))
        for number, name in enumerate("ab"):
            recipe = make_recipe(folder, evaluation={"final": ["perplexity"]})
            write_rows(folder / "valid.jsonl", make_rows(12, first=100))
            lorafit.train(
                recipe,
                overrides={"seed": number, "adapter.r": 2 + 2 * number, "data.validation": str(folder / "valid.jsonl")},
                output=folder / name,
                quiet=True,
            )
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAFIT_CACHE", str(tmp_path / "cache"))


def test_runs_are_scored_on_their_validation_rows_and_the_result_is_used_as_theirs(runs: Path, tmp_path: Path) -> None:
    adapters = {"a": runs / "a", "b": runs / "b" / "adapter"}
    found = lorafit.compose("0.5*a + 0.5*b", adapters=adapters, output=tmp_path / "sum", rank=3, quiet=True)
    assert [one.rows for one in found.scores] == ["validation rows of a", "validation rows of b"]
    losses = found.scores[0].losses
    assert list(losses) == ["the base", "a alone", "b alone", "the exact sum"]
    assert len({one.tuned for one in losses.values()}) == 1 and losses["the base"].rows == 12
    alone = lorafit.evaluate(runs / "a", split="validation", overrides={"evaluation.final": ["perplexity"]}, quiet=True)
    assert losses["the base"].base != losses["a alone"].base
    perplexity = next(c for c in alone.evaluation.comparisons if c.name == "perplexity")
    assert torch.tensor(losses["a alone"].base).exp().item() == pytest.approx(perplexity.tuned, rel=1e-4)
    assert "the exact sum" in str(found) and json.loads(json.dumps(found.to_json()))["scores"][0]["losses"]
    assert (tmp_path / "sum" / "tokenizer.json").is_file() and (tmp_path / "sum" / "MANIFEST").is_file()
    assert lorafit.generate(tmp_path / "sum", prompts="what", max_new_tokens=2, quiet=True).answers
    merged = lorafit.merge(tmp_path / "sum", tmp_path / "merged", quiet=True)
    whole = AutoModelForCausalLM.from_pretrained(merged.report.output, dtype=torch.float32)
    base = open_base(runs / "base")
    torch.testing.assert_close(logits(whole), logits(opened(base, tmp_path / "sum")), rtol=1e-4, atol=1e-4)
    again = lorafit.compose("2*s", adapters={"s": tmp_path / "sum"}, output=tmp_path / "twice", quiet=True)
    assert again.rank == 3 and not again.scores  # an adapter alone brings no rows


def test_weights_are_found_on_rows(runs: Path, tmp_path: Path) -> None:
    """What is found is less than before and than each alone, and the result that is written has that loss."""
    adapters, rows = {"a": runs / "a", "b": runs / "b"}, runs / "valid.jsonl"
    found = lorafit.compose(
        "0.5*a + 0*b", adapters=adapters, output=tmp_path / "fit", fit_rows=rows, eval_rows=rows, quiet=True
    )
    fit, losses = found.fitted, found.scores[0].losses
    assert fit is not None and fit.started == {"a": 0.5, "b": 0.0} and fit.weights == found.weights
    assert list(losses) == ["the base", "a alone", "b alone", "with the weights before", "the exact sum"]
    assert losses["the exact sum"].tuned == pytest.approx(fit.after, rel=1e-5)
    assert losses["with the weights before"].base == pytest.approx(fit.before, rel=1e-5)
    assert fit.after < min(losses[f"{name} alone"].base for name in "ab")
    assert "weights found on 12 rows of valid.jsonl" in " ".join(str(found).split())


def test_the_mean_of_runs_by_their_training_rows(runs: Path, tmp_path: Path) -> None:
    found = lorafit.compose(
        adapters={"a": runs / "a", "b": runs / "b"}, output=tmp_path / "m", mean=True, weights="rows", scores=False
    )
    assert found.weights == {"a": 0.5, "b": 0.5} and not found.scores
    counts = [json.loads((runs / name / "data.json").read_text())["splits"]["train"]["rows"] for name in "ab"]
    assert counts[0] == counts[1] > 0


def test_a_base_that_is_not_here_leaves_the_sum_unscored(runs: Path, tmp_path: Path) -> None:
    moved = runs.rename(runs.with_name(f"{runs.name}-moved"))
    try:
        (moved / "base").rename(moved / "elsewhere")
        with pytest.warns(UserWarning, match="nothing is scored"):
            found = lorafit.compose("a", adapters={"a": moved / "a"}, output=tmp_path / "s", quiet=True)
        assert not found.scores and (tmp_path / "s").is_dir()
        given = {"adapters": {"a": moved / "a"}, "base_model": moved / "elsewhere", "quiet": True}
        assert lorafit.compose("a", output=tmp_path / "named", **given).scores
    finally:
        (moved / "elsewhere").rename(moved / "base")
        moved.rename(runs)


def test_a_sum_without_adapters_is_told_how_to_name_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["compose", "2*runs/quickstart", "--output", "x"])
    assert capsys.readouterr().err.startswith("error: missing option --adapter; add --adapter NAME=DIR; see lorafit")


def test_a_sum_of_nothing_is_one_sentence(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["compose", "plain - plain", f"--adapter=plain={world.folders['plain']}", "--output", str(tmp_path / "s")])
    assert capsys.readouterr().err == "error: SUM: every weight is 0, and nothing is left; give one that is not\n"
