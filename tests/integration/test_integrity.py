"""What is hashed is compared, what is loaded is checked, and what others wrote is not trusted: by the command line."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.processes import PROGRAM, finish
from tests.support.world import Outcome, World, say_all

GENERATE = ("--prompt", "what opens", "--max-new-tokens", "4")
DEEP = "[" * 3000 + "]" * 3000


def copy_base(world: World, name: str = "model") -> Path:
    folder = world.root / name
    shutil.copytree(world.base, folder)
    return folder


def edit_json(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | values), encoding="utf-8")


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def flip_a_bit(file: Path, place: int = -100) -> None:
    raw = bytearray(file.read_bytes())
    raw[place] ^= 1
    file.write_bytes(raw)


# --- a model folder, as `generate MODEL` and as the base of a recipe ------------------------------------------------

UP = "model.layers.0.mlp.up_proj.weight"


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    return lambda folder: edit_weights(folder, change)


def config(**values: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config.json", **values)


def index(value: Any) -> Callable[[Path], None]:
    """Weights behind an index that says `value`."""

    def change(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "weights.safetensors")
        text = value if isinstance(value, str) else json.dumps(value)
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")

    return change


def header(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Another header before the same data."""

    def write(folder: Path) -> None:
        file = folder / "model.safetensors"
        raw = file.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        entries = json.loads(raw[8 : 8 + length])
        change(entries)
        text = json.dumps(entries).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])

    return write


def pickle_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"weight": torch.zeros(2)}, folder / "pytorch_model.bin")


def renamed_pickle(folder: Path) -> None:
    torch.save({"weight": torch.zeros(2)}, folder / "model.safetensors")


def pipe(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return change


def endless(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to("/dev/zero")

    return change


def write(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text, encoding="utf-8") and None


MODELS: list[tuple[str, Callable[[Path], None], int, list[str]]] = [
    ("a tensor is missing", weights(lambda t: t.pop(UP)), 5, [UP]),
    ("all are renamed", weights(lambda t: [t.update({f"x.{n}": t.pop(n)}) for n in list(t)]), 5, ["missing"]),
    ("one too many", weights(lambda t: t.update(zzz=torch.zeros(4))), 5, ["zzz"]),
    ("NaN", weights(lambda t: t[UP].view(-1)[7:8].fill_(float("nan"))), 5, ["NaN", UP]),
    ("Inf", weights(lambda t: t["model.norm.weight"][3:4].fill_(float("inf"))), 5, ["model.norm.weight"]),
    ("another shape", weights(lambda t: t.update({UP: torch.zeros(128, 63)})), 5, [UP, "63"]),
    ("integers", weights(lambda t: t.update({UP: torch.zeros(128, 64, dtype=torch.int32)})), 5, [UP, "I32"]),
    ("pickles alone", pickle_weights, 8, ["pytorch_model.bin", "pickle"]),
    ("a pickle called safetensors", renamed_pickle, 5, ["model.safetensors", "pickle"]),
    ("an index out of the folder", index({"weight_map": {UP: "../../etc/passwd"}}), 8, ["index.json", "passwd"]),
    ("an absolute index", index({"weight_map": {UP: "/etc/passwd"}}), 8, ["index.json", "passwd"]),
    ("an index of other types", index({"weight_map": {UP: 3}}), 5, ["index.json"]),
    ("an index that is a list", index([1, 2]), 5, ["index.json"]),
    ("a deep index", index(DEEP), 5, ["index.json"]),
    ("an index of absent tensors", index({"weight_map": {"a": "weights.safetensors"}}), 5, ["missing"]),
    ("a dtype that is a list", header(lambda h: h[UP].update(dtype=["F32"])), 5, ["model.safetensors", UP]),
    ("offsets of text", header(lambda h: h[UP].update(data_offsets=["0", "4"])), 5, ["model.safetensors", UP]),
    ("a shape of text", header(lambda h: h[UP].update(shape="64")), 5, ["model.safetensors", UP]),
    ("an overlap", header(lambda h: h[UP].update(data_offsets=[0, 32768])), 5, ["model.safetensors"]),
    ("no heads", config(num_attention_heads=0), 5, ["config.json", "num_attention_heads"]),
    ("heads that do not divide", config(num_key_value_heads=3), 5, ["config.json", "num_key_value_heads"]),
    ("layers in words", config(num_hidden_layers="two"), 5, ["config.json", "num_hidden_layers"]),
    ("layers without end", config(num_hidden_layers=10**9), 5, ["config.json", "num_hidden_layers"]),
    ("experts without end", config(model_type="qwen3_next", num_experts=10**9), 5, ["config.json", "num_experts"]),
    ("a width without end", config(hidden_size=10**12), 5, ["config.json", "hidden_size"]),
    ("a vocabulary without end", config(vocab_size=10**12), 5, ["config.json", "vocab_size"]),
    ("more layers than weights", config(num_hidden_layers=3), 5, ["missing"]),
    ("eps in words", config(rms_norm_eps="small"), 5, ["config.json", "rms_norm_eps"]),
    ("dropout in words", config(attention_dropout=["x"]), 5, ["config.json", "attention_dropout"]),
    ("an unknown activation", config(hidden_act="evil"), 5, ["evil"]),
    ("positions in words", config(rope_parameters="evil"), 5, ["config.json"]),
    ("an unknown type", config(model_type="evil"), 5, ["evil"]),
    ("quantised by a word", config(quantization_config="evil"), 5, ["config.json", "quantization_config"]),
    ("quantised by a list", config(quantization_config=[1]), 5, ["config.json", "quantization_config"]),
    ("a kernel of the hub", config(attn_implementation={"": "evil/kernel"}), 8, ["config.json", "evil/kernel"]),
    ("a nested kernel", config(_attn_implementation={"a": {"b": "evil/k"}}), 8, ["config.json", "evil/k"]),
    ("a list of kernels", config(_attn_implementation=["evil/k"]), 8, ["config.json", "evil/k"]),
    ("a deep config", write("config.json", DEEP), 5, ["config.json", "nested deeper"]),
    ("a config that is a list", write("config.json", "[]"), 5, ["config.json"]),
    ("a config of a pipe", pipe("config.json"), 5, ["config.json", "regular file"]),
    ("a config without end", endless("config.json"), 5, ["config.json", "regular file"]),
    ("weights of a pipe", pipe("model.safetensors"), 5, ["model.safetensors"]),
    ("a broken tokenizer", write("tokenizer.json", "{}"), 5, ["tokenizer"]),
]


@pytest.mark.parametrize(("change", "code", "said"), [m[1:] for m in MODELS], ids=[m[0] for m in MODELS])
def test_a_model_folder_is_checked_the_same_everywhere(
    world: World, change: Callable[[Path], None], code: int, said: list[str]
) -> None:
    """`generate MODEL` and a recipe with that base end alike, and never with an answer."""
    folder = copy_base(world)
    say_all(world.run("generate", "model", *GENERATE), 0)
    change(folder)
    world.recipe((f"  base: {world.base}", "  base: model"))
    for command in (("generate", "model", *GENERATE), ("train", "r.yaml")):
        outcome = world.run(*command)
        say_all(outcome, code, *said)
        assert outcome.stdout == ""
    assert not (world.root / "run").exists()


def test_a_merge_is_checked_against_its_manifest(trained: World) -> None:
    """Of a folder that lorafit made, every file is hashed before it answers or is a base."""
    world = trained
    say_all(world.run("merge", "run", "--output", "merged"), 0)
    world.recipe((f"  base: {world.base}", "  base: merged"), name="m.yaml")
    for command in (("generate", "merged", *GENERATE), ("train", "m.yaml", "--output", "of-merge")):
        say_all(world.run(*command), 0)
    flip_a_bit(world.root / "merged" / "model.safetensors")
    shutil.rmtree(world.root / "of-merge")
    for command in (("generate", "merged", *GENERATE), ("train", "m.yaml", "--output", "of-merge")):
        say_all(world.run(*command), 6, "merged", "model.safetensors", "checksum")
    assert not (world.root / "of-merge").exists()


# --- a run's adapter -------------------------------------------------------------------------------------------------

ADAPTER_COMMANDS = (
    ("eval", "run", "--split", "train"),
    ("merge", "run", "--output", "m"),
    ("generate", "run", *GENERATE),
)


@pytest.fixture(scope="session")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs that were trained once, each to be copied into the folders of many tests."""
    return tmp_path_factory.mktemp("kept")


def train_once(world: World, kept: Path, name: str, *flags: str) -> World:
    """A run in `world`, trained by the first test that wants it."""
    if not (kept / name).is_dir():
        say_all(world.run("train", "r.yaml", *flags), 0)
        shutil.copytree(world.root / "run", kept / name)
    else:
        shutil.copytree(kept / name, world.root / "run")
    return world


@pytest.fixture
def trained(world: World, kept: Path) -> World:
    return train_once(world, kept, "trained")


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json", "lorafit.json"])
def test_an_adapter_is_checked_against_its_manifest(trained: World, file: str) -> None:
    world = trained
    shutil.copytree(world.root / "run" / "adapter", world.root / "alone")
    world.recipe(("  dropout: 0.0", "  dropout: 0.0\n  init_from: alone"), name="on.yaml")
    for folder in ("run/adapter", "alone"):
        if file.endswith(".json"):
            edit_json(world.root / folder / file, lora_alpha=16)
        else:
            flip_a_bit(world.root / folder / file)
    before = world.digests()
    for command in ADAPTER_COMMANDS:
        say_all(world.run(*command), 6, "run/adapter", file)
    say_all(world.run("merge", "alone", "--output", "m"), 6, "alone", file)
    say_all(world.run("train", "on.yaml", "--output", "on"), 6, "alone", file)
    assert world.digests() == before


def test_a_manifest_of_another_format(trained: World) -> None:
    world = trained
    manifest = world.root / "run" / "adapter" / "MANIFEST"
    edit_json(manifest, format=999)
    for command in ADAPTER_COMMANDS:
        say_all(world.run(*command), 6, "MANIFEST", "format 999", "format 1")
    manifest.unlink()
    for command in ADAPTER_COMMANDS:
        say_all(world.run(*command), 6, "run/adapter", "MANIFEST is missing")


# --- a cache that others may write ------------------------------------------------------------------------------------


@pytest.fixture
def cache(world: World, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this test's own, with prepared rows in it."""
    folder = world.root / "cache"
    monkeypatch.setenv("LORAFIT_CACHE", str(folder))
    say_all(world.run("preview", "r.yaml"), 0)
    return folder


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o1777, 0o757])
@pytest.mark.parametrize("part", ["", "data", "data/locks", "data/index", "entry"])
def test_a_cache_that_others_may_write_is_not_trusted(world: World, cache: Path, part: str, mode: int) -> None:
    folder = cache / part if part != "entry" else next(cache.glob("data/*/MANIFEST")).parent
    folder.chmod(mode)
    before = world.digests()
    for command in ("preview", "train"):
        say_all(world.run(command, "r.yaml"), 8, str(folder), "LORAFIT_CACHE", f"mode {mode:o}")
    assert world.digests() == before


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give folders away")
def test_a_cache_of_somebody_else_is_not_trusted(world: World, cache: Path) -> None:
    os.chown(cache / "data", 65534, 65534)
    say_all(world.run("preview", "r.yaml"), 8, str(cache / "data"), "another user", "LORAFIT_CACHE")


@pytest.mark.parametrize("part", ["data", "data/locks", "data/index"])
def test_a_link_in_the_cache_is_not_followed(world: World, cache: Path, part: str) -> None:
    (cache / part).rename(world.root / "elsewhere")
    (cache / part).symlink_to(world.root / "elsewhere")
    before = world.digests()
    say_all(world.run("preview", "r.yaml"), 8, str(cache / part), "link", "LORAFIT_CACHE")
    assert world.digests() == before


def test_the_cache_itself_may_be_a_link(world: World, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (world.root / "linked").symlink_to(cache)
    monkeypatch.setenv("LORAFIT_CACHE", str(world.root / "linked"))
    say_all(world.run("preview", "r.yaml"), 0, "cache hit")


def test_a_lock_that_is_a_link_empties_nothing(world: World, cache: Path) -> None:
    """Whoever has the rows can tell the lock's name; opening it must not empty what it leads to."""
    mine = world.root / "mine.txt"
    mine.write_text("years of work", encoding="utf-8")
    lock = next((cache / "data" / "locks").iterdir())
    shutil.rmtree(cache / "data" / lock.name)
    lock.unlink()
    lock.symlink_to(mine)
    for command in ("preview", "train"):
        say_all(world.run(command, "r.yaml"), 8, lock.name, "remove it")
    assert mine.read_text(encoding="utf-8") == "years of work"
    lock.unlink()
    os.mkfifo(lock)
    say_all(world.run("preview", "r.yaml"), 8, lock.name)


def test_the_cache_is_made_for_its_user_alone(world: World, cache: Path) -> None:
    shutil.rmtree(cache)
    old = os.umask(0o002)
    try:
        for said in ("cache miss", "cache hit"):
            say_all(world.run("preview", "r.yaml"), 0, said)
    finally:
        os.umask(old)
    assert (cache / "data").stat().st_mode & 0o077 == 0


# --- what an adapter's files may say ---------------------------------------------------------------------------------

ADAPTER_FAULTS: list[tuple[str, Callable[[Path], None], int, list[str]]] = []


def adapter_fault(name: str, code: int, *said: str) -> Callable[[Callable[[Path], None]], Callable[[Path], None]]:
    def keep(change: Callable[[Path], None]) -> Callable[[Path], None]:
        ADAPTER_FAULTS.append((name, change, code, list(said)))
        return change

    return keep


def adapter_config(name: str, code: int = 5, *, said: tuple[str, ...] = (), **values: Any) -> None:
    adapter_fault(name, code, "adapter_config.json", *said or values)(
        lambda folder: edit_json(folder / "adapter_config.json", **values)
    )


def adapter_weights(name: str, *said: str) -> Callable[[Callable[[dict[str, torch.Tensor]], object]], None]:
    def keep(change: Callable[[dict[str, torch.Tensor]], object]) -> None:
        def write(folder: Path) -> None:
            tensors = load_file(folder / "adapter_model.safetensors")
            change(tensors)
            save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})

        adapter_fault(name, 5, "adapter_model.safetensors", *said)(write)

    return keep


B = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
adapter_weights("NaN", "NaN", B)(lambda t: t[B].view(-1)[3:4].fill_(float("nan")))
adapter_weights("Inf", "Inf", B)(lambda t: t[B].view(-1)[3:4].fill_(-float("inf")))
adapter_weights("integers", "I32", B)(lambda t: t.update({B: torch.ones(128, 4, dtype=torch.int32)}))
adapter_config("alpha is NaN", lora_alpha=float("nan"))
adapter_config("alpha is endless", lora_alpha=float("inf"))
adapter_config("alpha in words", lora_alpha="x")
adapter_config("alpha is a list", lora_alpha=[8])
adapter_config("alpha is true", lora_alpha=True)
adapter_config("rank in words", r="four")
adapter_config("a list of ranks", rank_pattern=["q_proj"])
adapter_config("ranks in words", rank_pattern={"q_proj": "four"})
adapter_config("alphas without end", alpha_pattern={"q_proj": float("inf")})
adapter_config("targets in targets", target_modules=[["q_proj"]])
adapter_config("targets that are a number", target_modules=7)
adapter_config("a broken pattern", target_modules="(((", said=("target_modules",))
adapter_config("a broken pattern of ranks", rank_pattern={"(((": 4})
adapter_config("a pattern for ever", 8, exclude_modules="(([a-z._0-9]+)+)+!")
adapter_config("a pattern of choices for ever", 8, target_modules=r"(model|mod|el|\.|[a-z0-9_]+)+!")
adapter_config("a slow pattern", 8, target_modules=".*" * 16 + "!")
adapter_config("ranks by a pattern for ever", 8, rank_pattern={"(([a-z._0-9]+)+)+!": 4})
adapter_config("a base of a list", base_model_name_or_path=["x"])
adapter_config("a base without end", base_model_name_or_path="x" * 100_000)
adapter_config("a flag in words", use_rslora="yes")


@adapter_fault("no alpha", 5, "adapter_config.json", "lora_alpha", "missing")
def drop_alpha(folder: Path) -> None:
    values = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    del values["lora_alpha"]
    (folder / "adapter_config.json").write_text(json.dumps(values), encoding="utf-8")


for _name, _text in {"deep": DEEP, "a list": "[1]", "a number": "7"}.items():
    for _file in ("adapter_config.json", "lorafit.json"):
        adapter_fault(f"{_file} is {_name}", 5, _file)(write(_file, _text))
for _key, _value in {"base": "evil", "quantization": "nf4", "transposed": 3, "format": 999}.items():
    adapter_fault(f"{_key} of the notes", 5, "lorafit.json", _key)(
        lambda folder, key=_key, value=_value: edit_json(folder / "lorafit.json", **{key: value})
    )


@pytest.mark.parametrize(
    ("change", "code", "said"), [f[1:] for f in ADAPTER_FAULTS], ids=[f[0] for f in ADAPTER_FAULTS]
)
def test_an_adapter_that_is_wrong_itself(
    trained: World, change: Callable[[Path], None], code: int, said: list[str]
) -> None:
    """Without a MANIFEST, as other tools write adapters: the fault is told of the adapter, not of base or disk."""
    world = trained
    adapter = world.root / "run" / "checkpoints" / "step-000002" / "adapter"
    change(adapter)
    make_manifest(adapter.parent)
    shutil.copytree(adapter, world.root / "alone")
    (world.root / "base").symlink_to(world.base)
    world.recipe(("  dropout: 0.0", "  dropout: 0.0\n  init_from: alone"), name="on.yaml")
    before = world.digests()
    for command in (
        ("eval", "run", "--checkpoint", "2", "--split", "train"),
        ("generate", "run", "--checkpoint", "2", *GENERATE),
        ("merge", "run", "--checkpoint", "2", "--output", "m"),
        ("merge", "alone", "--output", "m"),
        ("train", "on.yaml", "--output", "on"),
    ):
        say_all(world.run(*command), code, *said)
    assert world.digests() == before


@pytest.mark.parametrize("change", [pipe, endless])
@pytest.mark.parametrize("file", ["adapter_config.json", "lorafit.json", "adapter_model.safetensors", "MANIFEST"])
def test_an_adapter_of_pipes(trained: World, file: str, change: Callable[[str], Callable[[Path], None]]) -> None:
    change(file)(trained.root / "run" / "adapter")
    for command in ADAPTER_COMMANDS:
        say_all(trained.run(*command), 6, "run/adapter", file)
    shutil.rmtree(trained.root / "run" / "checkpoints")
    if file != "MANIFEST":
        (trained.root / "run" / "adapter" / "MANIFEST").unlink()
        (trained.root / "run" / "adapter").rename(trained.root / "alone")
        say_all(trained.run("merge", "alone", "--output", "m"), 5, file)


def make_manifest(folder: Path) -> None:
    """The MANIFEST that a folder with these files would have, as who edits one can make it."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "MANIFEST")
    entries = {
        p.relative_to(folder).as_posix(): {
            "bytes": p.stat().st_size,
            "sha256": hashlib.sha256(p.read_bytes()).hexdigest(),
        }
        for p in files
    }
    (folder / "MANIFEST").write_text(json.dumps({"files": entries}), encoding="utf-8")


def test_an_adapter_without_effect_is_said(trained: World) -> None:
    world = trained
    adapter = world.root / "run" / "adapter"
    tensors = load_file(adapter / "adapter_model.safetensors")
    for command in ADAPTER_COMMANDS:
        assert "no effect" not in world.run(*command).stderr
    shutil.rmtree(world.root / "m")
    zeros = {name: value * (0 if "lora_B" in name else 1) for name, value in tensors.items()}
    save_file(zeros, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    make_manifest(adapter)
    for command in ADAPTER_COMMANDS:
        outcome = world.run(*command)
        say_all(outcome, 0, "run/adapter", "the adapter has no effect")
        assert outcome.stderr.count("no effect") == 1


# --- what is the user's stays ---------------------------------------------------------------------------------------

USERS_FILES = [
    *("recipe.yaml", "plan.json", "manifest.json", "best.json", "metrics.jsonl", "result.json", "quantization.json"),
    *("card.json", "base.json", "report.md", "notes.txt", ".env", "checkpoints", "adapter", "adapter/mine.txt"),
    *("checkpoints/step-000007/mine.txt", "deep/er/file"),
]


@pytest.mark.parametrize("through", ["", "a link", "a link to a link", "--resume"])
@pytest.mark.parametrize("name", USERS_FILES)
def test_a_folder_with_the_users_own_files_is_not_trained_into(world: World, name: str, through: str) -> None:
    mine = world.root / "mine"
    (mine / name).parent.mkdir(parents=True, exist_ok=True)
    (mine / name).write_text('{"name": "mine", "versions": {"app": "1"}}', encoding="utf-8")
    output = "mine"
    for number in range(("link" in through) + ("to a link" in through)):
        (world.root / f"link{number}").symlink_to(output)
        output = f"link{number}"
    before = world.digests()
    flags = ["--resume"] if through == "--resume" else []
    outcome = world.run("train", "r.yaml", "--output", output, *flags)
    say_all(outcome, 2, "output", "not empty", name.partition("/")[0])
    say_all(world.run("train", "r.yaml", "--set", f"output={output}", *flags), 2, "output", "not empty")
    assert world.digests() == before
    assert world.loaded == []


def test_what_systems_leave_in_a_folder_is_no_file_of_the_user(world: World) -> None:
    for name in (".DS_Store", "Thumbs.db", ".nfs0000000000a1b2c3", ".tmp-manifest.json-4711"):
        (world.root / "run").mkdir(exist_ok=True)
        (world.root / "run" / name).write_bytes(b"\0")
    (world.root / "run" / "lost+found").mkdir()
    say_all(world.run("train", "r.yaml"), 0)
    assert (world.root / "run" / ".DS_Store").read_bytes() == b"\0"


def test_an_output_that_is_a_broken_link(world: World) -> None:
    (world.root / "gone").symlink_to("nowhere")
    before = world.digests()
    say_all(world.run("train", "r.yaml", "--output", "gone"), 2, "output", "broken link")
    say_all(world.run("train", "r.yaml", "--output", "gone", "--resume"), 2, "output", "broken link")
    assert world.digests() == before


def test_a_run_that_lost_what_says_what_it_is_of(trained: World) -> None:
    """Without manifest.json or recipe.yaml nothing could be compared: neither anew nor further into that folder."""
    for name, code in {"recipe.yaml": 6, "manifest.json": 2}.items():
        shutil.copytree(trained.root / "run", trained.root / name.partition(".")[0])
        folder = trained.root / name.partition(".")[0]
        (folder / name).unlink()
        before = trained.digests()
        say_all(trained.run("train", "r.yaml", "--output", folder.name, "--resume"), code, folder.name)
        say_all(trained.run("train", "r.yaml", "--output", folder.name), 2, folder.name)
        assert trained.digests() == before


def test_a_file_where_a_runs_folder_belongs(trained: World) -> None:
    shutil.rmtree(trained.root / "run" / "checkpoints")
    shutil.rmtree(trained.root / "run" / "adapter")
    (trained.root / "run" / "checkpoints").write_text("mine", encoding="utf-8")
    before = trained.digests()
    for flags in ([], ["--resume"]):
        say_all(trained.run("train", "r.yaml", *flags), 2, "output", "checkpoints")
    assert trained.digests() == before


@pytest.mark.parametrize("name", ["report.json", "report.md", "report.jsonl", "report.train.first-1.md"])
def test_a_report_takes_no_place_of_the_users(trained: World, name: str) -> None:
    command = ["eval", "run", "--split", "train", "--limit", "1"] if "train" in name else ["eval", "run"]
    world = trained
    world.rows(4, "v.jsonl", first=50)
    world.recipe(("  max_length: 128", "  max_length: 128\n  validation: v.jsonl"), name="v.yaml")
    say_all(world.run("train", "v.yaml", "--output", "run2"), 0)
    command[1] = "run2"
    (world.root / "run2" / name).write_text("# My own report\n", encoding="utf-8")
    before, loads = world.digests(), len(world.loaded)
    say_all(world.run(*command), 2, name, "move it")
    assert world.digests() == before
    assert len(world.loaded) == loads
    (world.root / "run2" / name).unlink()
    for _ in range(2):  # its own reports are replaced
        say_all(world.run(*command), 0)


def test_a_merge_takes_no_place_of_the_users(trained: World) -> None:
    (trained.root / "mine").mkdir()
    (trained.root / "mine" / "config.json").write_text("{}", encoding="utf-8")
    (trained.root / "linked").symlink_to("mine")
    (trained.root / "gone").symlink_to("nowhere")
    (trained.root / "file").write_text("mine", encoding="utf-8")
    before = trained.digests()
    for output in ("mine", "linked", "gone", "file"):
        say_all(trained.run("merge", "run", "--output", output), 2, output)
    assert trained.digests() == before


# --- the base that a run was begun on --------------------------------------------------------------------------------

EMBEDDING = "model.embed_tokens.weight"


def edit_beside_the_sample(name: str) -> Callable[[dict[str, torch.Tensor]], object]:
    """Changes values that the quick fingerprint, 4 KiB from a tensor's middle, does not read."""
    return lambda tensors: tensors[name].view(-1)[:16].fill_(0.5)


@pytest.fixture(params=["none", "nf4"])
def own_base(world: World, request: pytest.FixtureRequest) -> World:
    """A run over a base of this test's own, cut off after two of three steps."""
    copy_base(world, "model")
    world.recipe(
        (f"  base: {world.base}", "  base: model"),
        ("  quantization: none", f"  quantization: {request.param}"),
        ("  max_steps: 2", "  max_steps: 2\n  schedule: constant"),
    )
    say_all(world.run("train", "r.yaml"), 0)
    world.recipe(
        (f"  base: {world.base}", "  base: model"),
        ("  quantization: none", f"  quantization: {request.param}"),
        ("  max_steps: 2", "  max_steps: 3\n  schedule: constant"),
    )
    return world


@pytest.mark.parametrize("name", [EMBEDDING, UP, "model.norm.weight", "lm_head.weight"])
def test_a_resume_on_an_edited_base_is_refused(own_base: World, name: str) -> None:
    """Quantised or not, inside of the fingerprint's sample or beside it; and nothing in the run is touched."""
    world = own_base
    edit_weights(world.root / "model", edit_beside_the_sample(name))
    before = world.digests("run")
    outcome = world.run("train", "r.yaml", "--resume")
    say_all(outcome, 6, "base changed", name.removesuffix(".weight"))
    assert world.digests("run") == before


@pytest.mark.parametrize("name", [EMBEDDING, UP, "model.norm.weight"])
def test_a_run_is_not_answered_with_on_an_edited_base(own_base: World, name: str) -> None:
    """Nor scored, nor merged, by the run and by its adapter alone; a run that recorded no content is let through."""
    world = own_base
    edit_weights(world.root / "model", edit_beside_the_sample(name))
    shutil.copytree(world.root / "run" / "adapter", world.root / "alone")
    before = world.digests()
    for command in ADAPTER_COMMANDS:
        say_all(world.run(*command), 5, "model", name.removesuffix(".weight"))
    say_all(world.run("merge", "alone", "--output", "m"), 5, "model")
    assert world.digests() == before


def test_a_run_that_recorded_no_content_goes_on(own_base: World) -> None:
    """As runs of 0.1.0 are: what they did not record is not compared; their codes are."""
    world = own_base
    run = world.root / "run"
    (run / "base.json").unlink()
    manifest = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
    del manifest["base"]["content"]
    (run / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    quantization = (run / "quantization.json").read_bytes()
    say_all(world.run("train", "r.yaml", "--resume"), 0, "step 3")
    assert (run / "quantization.json").read_bytes() == quantization


def test_a_moved_and_resharded_base_is_the_same_base(own_base: World) -> None:
    """The hash is over names and values: not over files, and not over when they were written."""
    world = own_base
    folder = world.root / "model"
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, part in halves.items() for name in part}
    text = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    say_all(world.run("train", "r.yaml", "--resume"), 0, "step 3")


def test_hashes_of_large_files_are_kept_and_belong_to_one_state_of_them(
    own_base: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read once for as long as a file is the same; read anew after every change, and where others may write."""
    from lorafit.files import cache
    from lorafit.model import content

    world, folder = own_base, own_base.root / "model"
    read: list[Path] = []
    real = content._hash_tensors

    def hash_tensors(file: Path, **options: Any) -> dict[str, str]:
        read.append(file)
        return real(file, **options)

    monkeypatch.setattr(content, "_hash_tensors", hash_tensors)
    monkeypatch.setattr(cache, "_SETTLED_SECONDS", -1.0)
    monkeypatch.setenv("LORAFIT_CACHE", str(world.root / "own-cache"))
    first = content.read_content(folder)
    assert content.read_content(folder) == first and len(read) == 1
    edit_weights(folder, edit_beside_the_sample(EMBEDDING))
    second = content.read_content(folder)
    assert len(read) == 2 and second.digest != first.digest
    assert {name for name in first.tensors if first.tensors[name] != second.tensors[name]} == {EMBEDDING}
    for memo in (world.root / "own-cache" / "hashes").iterdir():
        edit_json(memo, value={"forged": "x"})
    (world.root / "own-cache" / "hashes").chmod(0o777)
    assert content.read_content(folder) == second and len(read) == 3


# --- files of a run that hold something else -------------------------------------------------------------------------


@pytest.fixture
def unfinished(world: World, kept: Path) -> World:
    """A run whose recipe now asks for one step more."""
    train_once(world, kept, "unfinished", "--set", "training.schedule=constant")
    world.recipe(("  max_steps: 2", "  max_steps: 3\n  schedule: constant"))
    return world


def refused_untouched(world: World, *said: str, code: int = 6) -> None:
    before = world.digests("run")
    say_all(world.run("train", "r.yaml", "--resume"), code, *said)
    assert world.digests("run") == before


STATES: list[tuple[str, Any]] = [
    *[("step", value) for value in ("7", 6.5, -5, 10**12, None, True, 1)],
    *[(key, "x") for key in ("rng", "best", "seconds", "events", "hooks", "scaler", "epoch", "tokens")],
    *[("rng", value) for value in ([], [1], [{}], [{"python": 1}], [{"python": [3, [1], None]}])],
    *[("patience_value", []), ("micro_batch_limit_tokens", [3]), ("micro_batch_limit_tokens", 0)],
    *[("best", {"step": 1}), ("best", {"step": "1", "metric": "loss", "value": 1.0}), ("seconds", -1.0)],
    *[("hooks", [{}, {}]), ("evaluated_step", "2"), ("stopped_early", "no"), ("unknown", 1)],
]


@pytest.mark.parametrize(("key", "value"), STATES, ids=[f"{key}={str(value)[:24]}" for key, value in STATES])
def test_a_state_that_holds_something_else(unfinished: World, key: str, value: Any) -> None:
    """With a MANIFEST that fits: refused, and nothing in the run is touched."""
    folder = unfinished.root / "run" / "checkpoints" / "step-000002"
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    state["train"][key] = value
    (folder / "state.json").write_text(json.dumps(state), encoding="utf-8")
    make_manifest(folder)
    refused_untouched(unfinished, "step-000002")


RUN_FILES: list[tuple[str, str, Any]] = [
    *[("state.json", key, value) for key in ("train", "resolved", "environment") for value in (7, [], "x")],
    *[("optimizer.json", key, value) for key in ("states", "optimizer") for value in (7, [], "x", {})],
    *[("state.json", "resolved.attention", "evil/kernel"), ("state.json", "resolved.micro_batch_tokens", "many")],
    *[("state.json", "environment.ranks", "one"), ("state.json", "format", 999), ("state.json", "version", 999)],
]


@pytest.mark.parametrize(("file", "key", "value"), RUN_FILES, ids=[f"{f} {k}={v}" for f, k, v in RUN_FILES])
def test_a_checkpoints_file_that_holds_something_else(unfinished: World, file: str, key: str, value: Any) -> None:
    folder = unfinished.root / "run" / "checkpoints" / "step-000002"
    values = json.loads((folder / file).read_text(encoding="utf-8"))
    outer, _, inner = key.partition(".")
    if inner:
        values[outer][inner] = value
    else:
        values[outer] = value
    (folder / file).write_text(json.dumps(values), encoding="utf-8")
    make_manifest(folder)
    refused_untouched(unfinished, "step-000002")


@pytest.mark.parametrize("text", [DEEP, "[]", "7", "", "{"], ids=["deep", "a list", "a number", "empty", "torn"])
@pytest.mark.parametrize("file", ["state.json", "optimizer.json", "optimizer.safetensors"])
def test_a_checkpoints_file_that_is_junk(unfinished: World, file: str, text: str) -> None:
    folder = unfinished.root / "run" / "checkpoints" / "step-000002"
    (folder / file).write_text(text, encoding="utf-8")
    make_manifest(folder)
    refused_untouched(unfinished, "step-000002")


@pytest.mark.parametrize("key", ["format", "version"])
def test_a_checkpoint_of_another_lorafit(unfinished: World, key: str) -> None:
    """It is not damaged: nothing goes on from the one before it, and it is not moved aside."""
    edit_json(unfinished.root / "run" / "checkpoints" / "step-000002" / "MANIFEST", **{key: 999})
    refused_untouched(unfinished, "step-000002", "MANIFEST", f"{key} 999", f"{key} 1")


@pytest.mark.parametrize("text", [DEEP, "[]", "{}", '{"format": 999}', "pipe"], ids=lambda text: text[:20])
@pytest.mark.parametrize(
    "file", ["manifest.json", "plan.json", "card.json", "quantization.json", "base.json", "best.json"]
)
def test_a_runs_file_that_holds_something_else(unfinished: World, file: str, text: str) -> None:
    """Whatever a command makes of it, it is no bug of ours, and a resume that ends leaves the run as it was."""
    place = unfinished.root / "run" / file
    if text == "pipe":
        pipe(place.name)(place.parent)
    else:
        place.write_text(text, encoding="utf-8")
    before = unfinished.digests("run")
    codes = set()
    for command in (ADAPTER_COMMANDS[0], ("train", "r.yaml", "--resume"), ("train", "r.yaml")):
        outcome = unfinished.run(*command)
        assert outcome.code in (0, 2, 3, 5, 6), outcome.stderr
        codes.add(outcome.code)
        if outcome.code:
            assert unfinished.digests("run") == before
            say_all(outcome, outcome.code, "run")
        if outcome.code == 0:
            before = unfinished.digests("run")
    if file == "manifest.json" or (file in ("base.json", "quantization.json") and text != "{}"):
        assert codes & {2, 5, 6}


# --- a cache whose content is wrong ----------------------------------------------------------------------------------


def forge(change: Callable[[Path], object]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        change(folder)
        make_manifest(folder)

    return write


CACHED = {
    "a short file": lambda folder: (folder / "lines.int64").write_bytes(b"\0" * 8),
    "offsets that go back": lambda folder: edit_numbers(folder / "tokens_ends.int64", 1, -3),
    "offsets without end": lambda folder: edit_numbers(folder / "tokens_ends.int64", -1, 2**40),
    "a torn token": lambda folder: (folder / "tokens.int32").write_bytes((folder / "tokens.int32").read_bytes()[:-3]),
    "a deep report": lambda folder: (folder / "report.json").write_text(DEEP, encoding="utf-8"),
    "a report of a list": lambda folder: (folder / "report.json").write_text("[]", encoding="utf-8"),
    "a report of other things": lambda folder: (folder / "report.json").write_text("{}", encoding="utf-8"),
}


def edit_numbers(file: Path, place: int, value: int) -> None:
    numbers = np.fromfile(file, dtype="<i8")
    numbers[place] = value
    numbers.tofile(file)


@pytest.mark.parametrize("change", CACHED.values(), ids=CACHED.keys())
def test_a_cache_entry_that_holds_something_else_is_made_anew(
    world: World, cache: Path, change: Callable[[Path], object]
) -> None:
    right = world.run("preview", "r.yaml", "--json").json
    entry = next(cache.glob("data/*/MANIFEST")).parent
    forge(change)(entry)
    outcome = world.run("preview", "r.yaml")
    say_all(outcome, 0, "cache miss: the cached copy is damaged")
    assert world.run("preview", "r.yaml", "--json").json["rows"] == right["rows"]
    say_all(world.run("train", "r.yaml"), 0, "cache hit")


@pytest.mark.parametrize("text", [DEEP, "[]", "7", "{}", "{"])
def test_files_of_the_cache_that_hold_something_else_are_ignored(world: World, cache: Path, text: str) -> None:
    """Plans, lengths, indexes, peaks, hashes: each is made anew, and none stops every later command."""
    say_all(world.run("train", "r.yaml"), 0)
    say_all(world.run("estimate-memory", "r.yaml"), 0)
    shutil.rmtree(world.root / "run")
    kept = [
        file for file in cache.rglob("*") if file.is_file() and "locks" not in file.parts and file.suffix != ".int64"
    ]
    for file in kept:
        if file.suffix == ".json" or file.name == "MANIFEST":
            file.write_text(text, encoding="utf-8")
    for command in ("preview", "estimate-memory", "train"):
        say_all(world.run(command, "r.yaml"), 0)


# --- what nobody wrote into a recipe ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("begun", "resumed", "quantization"),
    [("1", "2", "nf4"), pytest.param("2", "1", "none", marks=pytest.mark.slow)],
)
def test_a_resume_has_the_threads_of_its_run(world: World, begun: str, resumed: str, quantization: str) -> None:
    """Real processes: begun with one number of threads and resumed with another, it is the unbroken run bit for bit."""
    changes = [
        ("  max_steps: 2", "  max_steps: 4\n  schedule: constant"),
        ("  quantization: none", f"  quantization: {quantization}"),
    ]
    world.recipe(*changes)
    say_all(world.spawn("train", "r.yaml", "--output", "unbroken", env={"OMP_NUM_THREADS": begun}), 0)
    short = ["--set", "training.max_steps=2"]
    say_all(world.spawn("train", "r.yaml", *short, env={"OMP_NUM_THREADS": begun}), 0)
    outcome = world.spawn("train", "r.yaml", "--resume", env={"OMP_NUM_THREADS": resumed})
    threads = "1 thread" if begun == "1" else "2 threads"
    say_all(outcome, 0, f"begun with {threads} and goes on so, where {resumed} were set")
    assert world.weights() == world.weights("unbroken")
    state = json.loads((world.root / "run/checkpoints/step-000004/state.json").read_text(encoding="utf-8"))
    assert state["environment"]["threads"] == int(begun)
    assert [event["kind"] for event in state["train"]["events"]] == ["threads"]
    manifest = json.loads((world.root / "run/manifest.json").read_text(encoding="utf-8"))
    assert manifest["threads"] == int(begun)


def stranger() -> tuple[str, ...]:
    """What runs a command as a user id that no passwd entry knows; nothing where this machine does not let one."""
    before = ("unshare", "-U", "--map-user=54321", "--map-group=54321")
    if shutil.which("unshare") is None:
        return ()
    return before if subprocess.run([*before, "true"], capture_output=True, check=False).returncode == 0 else ()


@pytest.mark.skipif(not stranger(), reason="this machine lets nobody be a stranger")
def test_without_home_and_name(world: World, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A container's user: commands run, in a temporary cache, and one line says what to set."""
    world.recipe(("  final: [perplexity]", "  final: [perplexity, rouge]"))
    temporary = tmp_path_factory.mktemp("tmp")
    bare = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", "TMPDIR": str(temporary)}
    bare |= {name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ}
    for command in (("train", "r.yaml"), ADAPTER_COMMANDS[0]):
        done = subprocess.run(
            [*stranger(), str(PROGRAM), *command], cwd=world.root, env=bare, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, (command, done.stderr)
        assert done.stderr.count("set LORAFIT_CACHE") == 1, (command, done.stderr)
    assert "lorafit-home-54321" in {path.name for path in temporary.iterdir()}
    (temporary / "lorafit-home-54321").chmod(0o777)
    done = subprocess.run(
        [*stranger(), str(PROGRAM), "preview", "r.yaml"], cwd=world.root, env=bare, capture_output=True, text=True
    )
    say_all(Outcome(done.returncode, done.stdout, done.stderr), 8, "lorafit-home-54321", "LORAFIT_CACHE")


ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "TZ": "Asia/Kathmandu"}
LATIN = {"LC_ALL": "de_DE.ISO-8859-1", "PYTHONIOENCODING": "ascii", "TZ": "Pacific/Auckland"}


THREE_COMMANDS = """
import json, sys
from lorafit.__main__ import main, read_names_as_utf8
read_names_as_utf8()
for words in json.loads(sys.argv[1]):
    sys.argv = ["lorafit", *words]
    try:
        main()
    except SystemExit as stop:
        print(words[0], "ended with", stop.code)
"""


def test_locale_and_time_zone_decide_nothing(world: World) -> None:
    """Rows, names and answers beyond ASCII, under locales that cannot write them: the same files, and no crash."""
    rows = [{"question": f"Größe {n} 日本 İı ا", "answer": f"¼ – {n} 🙂"} for n in range(8)]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (world.root / "dätä 数.jsonl").write_text(text, encoding="utf-8")
    world.recipe(
        ("  train: d.jsonl", "  train: dätä 数.jsonl"),
        ("name: tiny", "name: größe"),
        ("  max_length: 128", "  max_length: 256"),
        name="rezept ü.yaml",
    )
    say_all(world.spawn("train", "rezept ü.yaml", "--output", "eben 🙂", env={"TZ": "UTC"}), 0)
    say_all(world.spawn("train", "rezept ü.yaml", "--output", "laüf 🙂", env=ASCII), 0)
    ask = ["--prompt", "Größe 日本", "--max-new-tokens", "4", "--json"]
    commands = [
        ["preview", "rezept ü.yaml"],
        ["eval", "laüf 🙂", "--split", "train"],
        ["generate", "laüf 🙂", *ask],
    ]
    done = finish("-c", THREE_COMMANDS, json.dumps(commands), cwd=world.root, env=world.environment | LATIN)
    assert done.stdout.count("ended with 0") == 3 and "UnicodeEncodeError" not in done.stderr, done
    answered = json.loads(done.stdout.splitlines()[-2])
    assert answered["answers"] == world.run("generate", "eben 🙂", *ask).json["answers"]
    found = {}
    for output in ("eben 🙂", "laüf 🙂"):
        manifest = json.loads((world.root / output / "manifest.json").read_text(encoding="utf-8"))
        facts = {key: manifest[key] for key in ("data", "recipe", "base", "tokenizer", "threads")}
        found[output] = [world.weights(output), facts]
    assert found["laüf 🙂"] == found["eben 🙂"]
