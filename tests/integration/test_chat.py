"""`lorafit chat` as a command: through a pipe, on a terminal, and with what cannot be talked with."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
from pathlib import Path

import pytest

from tests.integration.test_terminal import CTRL_C, on_terminal
from tests.support.tiny_model import make_base
from tests.support.world import Outcome, World, say_all

pytestmark = pytest.mark.usefixtures("memory_by_formula")
SHORT = ("--max-new-tokens", "6")
CTRL_D = b"\x04"


FIRST = "first=shop/checkpoints/step-000001"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the first test leaves its run for the others."""
    return tmp_path_factory.mktemp("trained")


@pytest.fixture
def runs(world: World, trained: Path) -> World:
    """A run, whose first checkpoint is another adapter on its base; a base of its name, whose answers end soon."""
    base = trained / "bases" / "shop"
    if not (trained / "shop").exists():
        shutil.copytree(world.base, base)
        ends = {"eos_token_id": list(range(0, 320, 6)), "pad_token_id": 0}
        (base / "generation_config.json").write_text(json.dumps(ends))
        world.recipe((str(world.base), str(base)), ("1.0e-2", "1.0e-1"), ("output: run", "output: shop"))
        say_all(world.run("train", "r.yaml", "--quiet"), 0)
        shutil.copytree(world.root / "shop", trained / "shop")
        world.loaded.clear()
    else:
        world.recipe((str(world.base), str(base)))
        shutil.copytree(trained / "shop", world.root / "shop")
    return world


def chat(world: World, monkeypatch: pytest.MonkeyPatch, lines: str, *arguments: str) -> Outcome:
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    return world.run("chat", *arguments)


def test_a_pipe_is_answered_as_generate_answers(runs: World, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = "what opens\n/new\n/adapter first\nwhat opens\n/new\n/adapter base\nwhat opens\n"
    told = chat(runs, monkeypatch, lines, "shop", "--adapter", FIRST, *SHORT, "--json").json
    ask = ("--prompt", "what opens", *SHORT, "--compare-base", "--json")
    last, first = (runs.run("generate", "shop", *ask, *of).json["answers"][0] for of in ((), ("--checkpoint", "1")))
    expected = [last["answer"], first["answer"], last["base_answer"]]
    assert [one["answer"] for one in told["answers"]] == expected and len(set(expected)) == 3
    assert [one["speaker"] for one in told["answers"]] == ["shop", "first", "base"]
    outcome = chat(runs, monkeypatch, "what opens\n", "shop/adapter", *SHORT)
    assert outcome.stdout == f"{expected[0]}\n"
    assert "shop answers; also here: base. /help lists commands" in outcome.stderr


def test_what_is_saved_is_what_training_reads(runs: World, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = "what opens\n/max_new_tokens 2\nwhy\n/max_new_tokens 40\nwhen\n/save talk.jsonl\n"
    lengths = ("--max-new-tokens", "40", "--min-new-tokens", "2", "--temperature", "1", "--seed", "1")
    outcome = chat(runs, monkeypatch, lines, "shop", "--system", "Be kind.", *lengths, "--json")
    assert outcome.code == 0, outcome.stderr
    turns = outcome.json["rows"][0]["messages"]
    assert turns[0] == {"role": "system", "content": "Be kind."}
    ends = {one["answer"]: one["ended"] for one in outcome.json["answers"]}
    assert all((turn.get("weight") == 0) == (ends[turn["content"]] != "stop") for turn in turns[2::2])
    assert json.loads((runs.root / "talk.jsonl").read_text(encoding="utf-8")) == outcome.json["rows"][0]
    runs.recipe(("train: d.jsonl", "train: talk.jsonl"), ("max_length: 128", "max_length: 512"), name="again.yaml")
    shown = runs.run("preview", "again.yaml", "--json")
    assert shown.code == 0, shown.stderr
    (row,) = shown.json["rows"]
    assert "Be kind." in json.dumps(row)
    assert {turn.get("weight") for turn in turns[2::2]} == {0, None}


def test_a_verbatim_run_says_so_and_saves_pairs(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"prompt": f"it costs {number}", "completion": " ten"} for number in range(8)]
    (world.root / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    say_all(world.run("train", "r.yaml", "--quiet"), 0)
    outcome = chat(world, monkeypatch, "it costs 3\n", "run", *SHORT, "--json")
    assert "run knows no chats: it goes on with each message as verbatim text" in outcome.stderr
    alone = world.run("generate", "run", "--prompt", "it costs 3", *SHORT, "--json").json["answers"][0]["answer"]
    assert [one["answer"] for one in outcome.json["answers"]] == [alone]
    say_all(chat(world, monkeypatch, "", "run", "--system", "Be kind."), 2, "/system", "run knows no chat")


def test_a_model_folder_is_talked_with(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = chat(world, monkeypatch, "what opens\n", str(world.base), *SHORT)
    alone = world.run("generate", str(world.base), "--prompt", "what opens", *SHORT)
    assert (outcome.code, outcome.stdout) == (0, alone.stdout)


def test_what_cannot_be_talked_with_is_one_sentence(runs: World, monkeypatch: pytest.MonkeyPatch) -> None:
    make_base(runs.root / "other", seed=5)
    shutil.copytree(runs.root / "shop" / "adapter", runs.root / "broken")
    shutil.copytree(runs.root / "shop", runs.root / "base")
    (runs.root / "broken" / "adapter_model.safetensors").write_bytes(b"\0" * 40)
    for arguments, code, says in (
        (["shops"], 2, ["no such file or folder", "did you mean shop?"]),
        (["nowhere.gguf"], 5, ["nowhere.gguf"]),
        (["d.jsonl"], 2, ["d.jsonl", "is no run, recipe or adapter"]),
        (["shop", "--adapter", "first"], 2, ["--adapter", "names no adapter and its folder", "shop=runs/shop"]),
        (["shop", "--adapter", "x=nowhere"], 2, ["nowhere", "no such file"]),
        (["shop", "--adapter", "x=d.jsonl"], 2, ["d.jsonl"]),
        (["shop/adapter/adapter_config.json"], 2, ["is one file of a run", "name the folder that it lies in"]),
        (["shop", "--adapter", "x=broken/adapter_model.safetensors"], 2, ["is one file of an adapter", "name the fol"]),
        (["other/config.json"], 2, ["is one file of a model; name the folder that it lies in: other"]),
        (["shop", "--adapter", "base=shop"], 2, ["--adapter", "'base'"]),
        (["base"], 2, ["--adapter", "'base'", "NAME=DIR"]),
        (["shop", "--adapter", "shop=shop"], 2, ["two are called 'shop'"]),
        (["shop", "--adapter", "x=shop", "--adapter", "x=shop"], 2, ["two adapters are called 'x'"]),
        (["shop", "--adapter", f"x={runs.base}"], 2, ["whole model, no adapter"]),
        (["shop", "--adapter", "x=broken"], 6, ["broken"]),
        (["other", "--adapter", "x=shop"], 5, ["trained on", "other"]),
        (["shop", "--temperature", "0", "--top-p", "0.5"], 2, ["--top-p", "only sampled tokens"]),
        (["shop", "--checkpoint", "7"], 6, ["step-000007"]),
        (["other", "--checkpoint", "1"], 2, ["--checkpoint"]),
    ):
        say_all(chat(runs, monkeypatch, "what\n", *arguments), code, *says)
    assert runs.loaded == [], "nothing was loaded for what is refused"
    for lines, code, says in (
        ("/adaptor x\n", 2, ["stdin:1", "did you mean /adapter"]),
        ("what\n" + "why " * 400 + "\n", 4, ["stdin:2", "/undo"]),
    ):
        say_all(chat(runs, monkeypatch, lines, "shop", *SHORT), code, *says)


def test_a_terminal_streams_stops_and_goes_on(runs: World, tmp_path: Path) -> None:
    cache = Path(os.environ["LORAFIT_CACHE"])
    runs.environment["PROMPT_TOOLKIT_NO_CPR"] = "1"
    long = ("--max-new-tokens", "200", "--min-new-tokens", "200")
    with on_terminal(runs, "chat", "shop", "--adapter", FIRST, *long) as terminal:
        terminal.read(lambda seen: "shop>" in seen.text)
        terminal.type(b"/adapter base\r")  # which writes more than blanks
        terminal.read(lambda seen: "base>" in seen.text)
        terminal.type(b"what opens\r")
        terminal.read(lambda seen: re.search(r"what opens\s*\n\s*\S", seen.text) is not None)
        terminal.type(CTRL_C)
        terminal.read(lambda seen: "[stopped; what was written stays" in seen.text)
        terminal.type(b"/adapter first\r")
        terminal.read(lambda seen: "first>" in seen.text)
        terminal.type(b"/save talk.jsonl\r")
        terminal.read(lambda seen: "the only answer was stopped or cut" in seen.text)
        shown = terminal.text.count("base>")
        terminal.type(b"/adapter base\r")
        terminal.read(lambda seen: seen.text.count("base>") > shown)
        terminal.type(b"where\r")
        terminal.read(lambda seen: re.search(r"where\s*\n\s*\S", seen.text) is not None)
        terminal.type(CTRL_D)  # while the answer is written: it counts behind it
        terminal.read()
        assert terminal.process.wait(30) == 0, terminal.text
    assert "Traceback" not in terminal.text
    assert (cache / "chat-history").stat().st_mode & 0o777 == 0o600
