"""A run answers, merges and is scored by its card: no training row is opened, and the base is found where it is now."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorafit.run.card import RunCard
from tests.support.tiny_model import make_base
from tests.support.world import World, say_all

ASK = ("--prompt", "what opens", "--max-new-tokens", "6")
FIRST, SECOND = "c0ffee" + 34 * "0", "decaf" + 35 * "0"
SPLITS = ("  train: d.jsonl\n", "  train: d.jsonl\n  validation: v.jsonl\n  test: t.jsonl\n")


def train(world: World, *changes: tuple[str, str]) -> None:
    """A run on a base of its own that lies beside it, with rows for each split."""
    if not (world.root / "base").exists():
        shutil.copytree(world.base, world.root / "base")
    world.recipe((f"base: {world.base}", "base: base"), SPLITS, *changes)
    world.rows(3, "v.jsonl", first=50)
    world.rows(4, "t.jsonl", first=90)
    say_all(world.run("train", "r.yaml", "--quiet"), 0)


def answer(world: World, *arguments: str) -> str:
    outcome = world.run("generate", *arguments, *ASK, "--json")
    assert outcome.code == 0, outcome.stderr
    return str(outcome.json["answers"][0]["answer"])


def merge(world: World, source: str, output: str, *arguments: str) -> dict[str, Any]:
    outcome = world.run("merge", source, "--output", output, *arguments, "--json")
    assert outcome.code == 0, outcome.stderr
    return outcome.json | {"sha256": world.digests(output)["model.safetensors"]}


@pytest.mark.parametrize("kind", ["none", "nf4"])
def test_a_run_without_its_data_does_all_three(world: World, kind: str) -> None:
    train(world, ("quantization: none", f"quantization: {kind}"), ("dtype: fp32", "dtype: bf16"))
    told, whole = answer(world, "run"), merge(world, "run", "merged")
    scored = world.run("eval", "run", "--json").json
    shutil.copytree(world.root / "run", world.root / "else" / "run")
    for name in ("run", "merged"):
        shutil.rmtree(world.root / name)
    for name in ("r.yaml", "d.jsonl", "v.jsonl"):
        (world.root / name).unlink()
    (world.root / "t.jsonl").rename(world.root / "else" / "t.jsonl")
    assert answer(world, "else/run") == answer(world, "else/run/adapter") == told
    again = merge(world, "else/run", "merged")
    assert again["sha256"] == whole["sha256"] and again["parity"] == whole["parity"]
    assert again["proven"] is (kind == "nf4")
    rescored = world.run("eval", "else/run", "--json").json
    assert rescored["metrics"] == scored["metrics"] and rescored["split"] == "test"
    say_all(
        world.run("eval", "else/run", "--split", "validation"), 4, "data.validation[0].path", "v.jsonl", "no such file"
    )
    (world.root / "else" / "t.jsonl").unlink()
    say_all(world.run("eval", "else/run"), 4, "data.test[0].path", "t.jsonl", "no such file")


@pytest.mark.parametrize("kind", ["none", "nf4"])
def test_an_adapter_folder_is_enough(world: World, kind: str) -> None:
    train(world, ("quantization: none", f"quantization: {kind}"), ("dtype: fp32", "dtype: bf16"))
    whole = merge(world, "run", "merged")
    inside = merge(world, "run/adapter", "inside")
    assert inside["sha256"] == whole["sha256"] and inside["parity"] == whole["parity"]
    checkpoint = merge(world, "run/checkpoints/step-000001/adapter", "first")
    assert checkpoint["sha256"] == merge(world, "run", "first-2", "--checkpoint", "1")["sha256"] != whole["sha256"]
    told = answer(world, "run")
    shutil.copytree(world.root / "run" / "adapter", world.root / "away" / "lone")
    shutil.rmtree(world.root / "run")
    alone = merge(world, "away/lone", "alone")
    assert alone["sha256"] == whole["sha256"] and alone["proven"] is (kind == "nf4")
    assert answer(world, "away/lone") == told
    says = world.run("generate", "away/lone", *ASK, "--checkpoint", "1")
    say_all(says, 2, "--checkpoint", "only a run")


def test_a_record_of_the_quantisation_that_no_run_wrote(world: World) -> None:
    train(world, ("quantization: none", "quantization: nf4"), ("dtype: fp32", "dtype: bf16"))
    file = world.root / "run" / "quantization.json"
    good = json.loads(file.read_text())
    name = next(iter(good["tensors"]))
    for change, says in (
        ({"weights_dtype": "Tensor"}, ["quantization.json", "weights_dtype"]),
        ({"tensors": []}, ["quantization.json", "tensors"]),
        ({"tensors": {name: 1}}, ["quantization.json", name]),
        ({"tensors": {name: good["tensors"][name] | {"offset": "0"}}}, [name, "offset"]),
    ):
        file.write_text(json.dumps(good | change))
        say_all(world.run("merge", "run", "--output", "m"), 5, *says)
    file.write_text("[]")
    say_all(world.run("merge", "run", "--output", "m"), 6, "quantization.json")
    assert not (world.root / "m").exists()


def test_a_merge_imports_nothing_heavy_before_it_has_written(world: World) -> None:
    train(world)
    code = (
        "import sys\nfrom pathlib import Path\nfrom lorafit import pipeline\n"
        "pipeline.merge(Path('run'), output=Path('m'), verify=False)\n"
        "print([name for name in ('transformers', 'peft', 'bitsandbytes', 'datasets') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=world.root, env=world.environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_a_merge_without_the_rows_put_aside(world: World) -> None:
    train(world)
    (world.root / "run" / "comparison.json").unlink()
    for name in ("d.jsonl", "v.jsonl", "t.jsonl"):
        (world.root / name).unlink()
    found = merge(world, "run", "merged")
    assert found["parity"] is None and found["verified"] and "comparison.json" in found["parity_skipped"]


def test_a_base_that_moved_is_found_or_named(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    train(world)
    told = answer(world, "run")
    (world.root / "base").rename(world.root / "moved")
    digest = json.loads((world.root / "run" / "card.json").read_text())["base"]["digest"][:12]
    for command in (["generate", "run", *ASK], ["merge", "run", "--output", "m"], ["eval", "run"]):
        say_all(world.run(*command), 5, "run", "'base'", digest, "not on this disk", "--base-model")
        say_all(world.run(*command, "--base-model", "nowhere/at/all"), 5, "--base-model", "no such model folder")
    assert not (world.root / "m").exists()
    assert answer(world, "run", "--base-model", "moved") == told
    merge(world, "run", "m", "--base-model", "moved")
    say_all(world.run("eval", "run", "--base-model", "moved"), 0, "perplexity")
    make_base(world.root / "base", seed=9)
    for command in (["generate", "run", *ASK], ["generate", "run", *ASK, "--base-model", "base"]):
        say_all(world.run(*command), 5, "trained on 'base'", digest, "another", "--base-model")
    monkeypatch.setenv("LORAFIT_CACHE", str(world.root / "cache"))
    bases = world.root / "cache" / "bases"
    bases.mkdir(parents=True)
    (world.root / "moved").rename(bases / "any-name")
    for folder in (bases.parent, bases, bases / "any-name"):
        folder.chmod(0o700)
    assert answer(world, "run") == told  # by its digest
    say_all(world.run("generate", "m", *ASK, "--base-model", "base"), 2, "--base-model", "no base")


@pytest.fixture
def hub(world: World, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Path]:
    """Puts the tiny base into a hub cache of its own, offline: `hub("org/name", "commit")`."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(world.root / "hf"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def put(name: str, commit: str, seed: int = 0) -> Path:
        repository = world.root / "hf" / f"models--{name.replace('/', '--')}"
        make_base(repository / "snapshots" / commit, seed=seed)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / "main").write_text(commit)
        return repository / "snapshots" / commit

    return put


def test_a_run_on_a_hub_model_keeps_id_and_commit(world: World, hub: Callable[..., Path]) -> None:
    hub("acme/tiny", FIRST)
    world.recipe((f"base: {world.base}", "base: acme/tiny"))
    say_all(world.run("train", "r.yaml", "--quiet"), 0)
    config = json.loads((world.root / "run" / "adapter" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("acme/tiny", FIRST)
    hub("acme/tiny", SECOND, seed=3)  # main moved on
    told = answer(world, "run")
    shutil.copytree(world.root / "run" / "adapter", world.root / "lone")
    assert answer(world, "lone") == answer(world, "lone", "--base-model", "acme/tiny") == told
    merge(world, "lone", "merged")
    notes = json.loads((world.root / "merged" / "lorafit.json").read_text())
    assert notes["merged"]["base"]["name"] == "acme/tiny" and notes["merged"]["base"]["commit"] == FIRST
    shutil.rmtree(world.root / "hf")
    for folder in ("run", "lone"):
        says = world.run("generate", folder, *ASK)
        say_all(says, 5, folder, "acme/tiny", "not on this disk", "--base-model PATH_OR_ID")


def make_foreign_adapter(world: World, base: Path, name: str) -> Path:
    """An adapter as PEFT leaves it, on `q_proj`; its merge by PEFT lies beside it."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base)
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    for key, value in adapted.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(value, std=0.5)
    adapted.save_pretrained(world.root / "adapter")
    file = world.root / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": name}))
    adapted.merge_and_unload().save_pretrained(world.root / "by-peft")
    return world.root / "adapter"


def test_an_adapter_of_another_tool_on_a_hub_model(world: World, hub: Callable[..., Path]) -> None:
    adapter = make_foreign_adapter(world, hub("acme/tiny", FIRST), "acme/tiny")
    merge(world, "adapter", "merged")
    ours, theirs = (load_file(world.root / name / "model.safetensors") for name in ("merged", "by-peft"))
    assert ours.keys() == theirs.keys()
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in theirs) < 1e-6
    tokenizer = AutoTokenizer.from_pretrained(world.root / "merged")
    plain = AutoModelForCausalLM.from_pretrained(world.root / "by-peft")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "what opens"}], add_generation_prompt=True, return_dict=False
    )
    written = plain.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=6)[0, len(prompt) :]
    assert answer(world, "adapter") == answer(world, "merged") == tokenizer.decode(written, skip_special_tokens=True)
    config = adapter / "adapter_config.json"
    config.write_text(config.read_text().replace("acme/tiny", "acme/other"))
    for command in (["merge", "adapter", "--output", "m"], ["generate", "adapter", *ASK]):
        outcome = world.run(*command)
        say_all(outcome, 5, "adapter", "acme/other", "not on this disk", "--base-model PATH_OR_ID")
        assert "run folder" not in outcome.last
    assert (
        merge(world, "adapter", "named", "--base-model", "acme/tiny")["sha256"]
        == world.digests("merged")["model.safetensors"]
    )
    assert answer(world, "adapter", "--base-model", str(world.base)) == answer(world, "merged")


def test_a_run_without_a_card_has_it_made_from_its_rows(world: World) -> None:
    train(world)
    told, whole = answer(world, "run"), merge(world, "run", "merged")
    for name in ("card.json", "comparison.json"):
        (world.root / "run" / name).unlink()
    for folder in [world.root / "run" / "adapter", *(world.root / "run" / "checkpoints").glob("*/adapter")]:
        for file in folder.iterdir():  # as 0.1.0 left it
            if file.name not in ("adapter_config.json", "adapter_model.safetensors"):
                file.unlink()
        notes = {"format": 1, "base": {"name": "base", "digest": whole_digest(world)}, "quantization": {"kind": "none"}}
        (folder / "lorafit.json").write_text(json.dumps(notes))
        config = json.loads((folder / "adapter_config.json").read_text()) | {"base_model_name_or_path": "base"}
        (folder / "adapter_config.json").write_text(json.dumps(config))
    write_manifest(world.root / "run" / "adapter")
    assert answer(world, "run") == told
    again = merge(world, "run", "merged-2")
    assert again["sha256"] == whole["sha256"] and again["parity"] == whole["parity"]
    say_all(world.run("eval", "run"), 0, "perplexity")
    shutil.copytree(world.root / "run" / "adapter", world.root / "lone")
    assert merge(world, "lone", "merged-3")["sha256"] == whole["sha256"]
    (world.root / "d.jsonl").unlink()
    says = world.run("generate", "run", *ASK)
    say_all(says, 6, "run", "no card.json", "earlier lorafit", "d.jsonl", "put its rows back")


def test_notes_of_an_earlier_form_are_read(world: World) -> None:
    """Layers that were noted only where they lie elsewhere, parts as names, rows by other columns."""
    train(world, ("quantization: none", "quantization: nf4"), ("dtype: fp32", "dtype: bf16"))
    whole = merge(world, "run", "merged")
    notes = json.loads((world.root / "run" / "adapter" / "lorafit.json").read_text())
    earlier = {"format": 1, "layers": dict.fromkeys(notes["layers"])}
    (world.root / "run" / "adapter" / "lorafit.json").write_text(json.dumps(notes | earlier))
    write_manifest(world.root / "run" / "adapter")
    file = world.root / "run" / "quantization.json"
    used = json.loads(file.read_text())
    for number, (path, proof) in enumerate(used["tensors"].items()):
        assert proof.pop("parts")
        if number % 2:
            proof["parts"] = [f"{path}.weight"]
    file.write_text(json.dumps(used))
    file = world.root / "run" / "comparison.json"
    put_aside = json.loads(file.read_text())
    for row in put_aside["rows"]:
        row["input_ids"] = row.pop("tokens")
    file.write_text(json.dumps(put_aside))
    again = merge(world, "run", "merged-2")
    assert again["sha256"] == whole["sha256"] and again["parity"] == whole["parity"] and again["proven"]


def whole_digest(world: World) -> str:
    return str(json.loads((world.root / "run" / "manifest.json").read_text())["base"]["digest"])


def write_manifest(folder: Path) -> None:
    from lorafit.files.atomic import atomic_dir

    with atomic_dir(folder, replace=True) as temporary:
        for file in folder.iterdir():
            if file.name != "MANIFEST":
                shutil.copyfile(file, temporary / file.name)


CARD_FAULTS: list[tuple[str, dict[str, Any] | str, list[str]]] = [
    ("no JSON", "{", ["card.json"]),
    ("a list", "[]", ["card.json"]),
    ("nested", "[" * 3000 + "]" * 3000, ["card.json", "nested"]),
    ("another format", {"format": 7}, ["card.json", "format", "7"]),
    ("a key too many", {"zzz": 1}, ["card.json", "zzz"]),
    ("a text for a number", {"pad_id": "0"}, ["card.json", "pad_id"]),
    ("a kernel of the hub", {"attention": "evil/kernel"}, ["card.json", "attention"]),
    ("an unknown adapter", {"adapter": {"kind": "nope"}}, ["card.json", "adapter"]),
    ("no moment", {"template_date": "tomorrow"}, ["card.json", "template_date"]),
    ("no template", {"templates": {}}, ["card.json", "templates"]),
]


@pytest.mark.parametrize(
    ("change", "says"), [fault[1:] for fault in CARD_FAULTS], ids=[fault[0] for fault in CARD_FAULTS]
)
def test_a_damaged_card_is_named(trained: World, change: dict[str, Any] | str, says: list[str]) -> None:
    file = trained.root / "run" / "card.json"
    before = file.read_text()
    file.write_text(change if isinstance(change, str) else json.dumps(json.loads(before) | change))
    try:
        say_all(trained.run("generate", "run", *ASK), 6, *says)
    finally:
        file.write_text(before)


def test_an_adapters_card_is_read_as_strictly(trained: World) -> None:
    shutil.copytree(trained.root / "run" / "adapter", trained.root / "lone")
    (trained.root / "lone" / "MANIFEST").unlink()
    file = trained.root / "lone" / "lorafit.json"
    notes = json.loads(file.read_text())
    for change, key in ({"pad_id": "0"}, "pad_id"), ({"dtype": "fp64"}, "dtype"):
        file.write_text(json.dumps(notes | {"card": notes["card"] | change}))
        say_all(trained.run("generate", "lone", *ASK), 5, "lorafit.json", key)
    shutil.rmtree(trained.root / "lone")


@pytest.mark.parametrize("name", ["org/other", "/home/u/x"])
def test_an_adapter_that_names_another_base(trained: World, name: str) -> None:
    shutil.copytree(trained.root / "run", trained.root / "other")
    file = trained.root / "other" / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": name}))
    for command in (["eval", "other"], ["generate", "other", *ASK], ["merge", "other", "--output", "m"]):
        say_all(trained.run(*command), 5, "other/adapter", "base mismatch", name)
    shutil.rmtree(trained.root / "other")


def test_what_was_trained_is_not_changed_by_a_flag(trained: World) -> None:
    for key in ("model.base=other", "model.quantization=nf4", "adapter.r=8", "data.system_prompt=x"):
        say_all(trained.run("eval", "run", "--split", "train", "--set", key), 2, "--set", key.split("=")[0])
    recipe = trained.root / "r.yaml"
    before = recipe.read_text()
    recipe.write_text(before.replace("  max_length: 128", "  max_length: 128\n  system_prompt: Be brief."))
    outcome = trained.run("eval", "r.yaml", "--split", "train")
    say_all(outcome, 0, "data.system_prompt", "as it was trained")
    recipe.write_text(before)
    plain = trained.run("eval", "run", "--split", "train", "--json").json
    assert plain["metrics"] == json.loads((trained.root / "run" / "report.train.json").read_text())["metrics"]


def test_the_card_is_there_before_step_1_and_holds_no_place_where_it_travels(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorafit.trainer.loop import Trainer

    seen: list[RunCard] = []

    def stop(*_: Any) -> None:
        seen.append(RunCard.from_json(json.loads((world.root / "run" / "card.json").read_text())))
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "fit", stop)
    world.run("train", "r.yaml", "--quiet")
    assert seen[0].base_path == str(world.base) and seen[0].dtype == "fp32" and seen[0].chat
    monkeypatch.undo()
    monkeypatch.chdir(world.root)
    shutil.rmtree(world.root / "run")
    say_all(world.run("train", "r.yaml", "--quiet"), 0)
    notes = (world.root / "run" / "adapter" / "lorafit.json").read_text()
    assert str(world.base) not in notes and json.loads(notes)["card"]["base_path"] is None
    merge(world, "run", "merged")
    for file in (world.root / "merged").iterdir():
        assert str(world.base).encode() not in file.read_bytes(), file.name


@pytest.fixture(scope="module")
def trained_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trained")


@pytest.fixture
def trained(world: World, trained_folder: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """A world with a finished run, trained once for all tests of this file."""
    if not (trained_folder / "run").exists():
        for name in ("r.yaml", "d.jsonl"):
            shutil.copyfile(world.root / name, trained_folder / name)
        monkeypatch.chdir(trained_folder)
        say_all(world.run("train", "r.yaml", "--quiet"), 0)
    monkeypatch.chdir(trained_folder)
    world.root = trained_folder
    return world
