"""`model: auto` as clients meet it: who answers, what is told of it, adapters that come and go, and drift."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import lorafit
from tests.integration.test_serve import foreign_adapter
from tests.support.served import Server
from tests.support.tiny_model import make_base
from tests.support.tiny_recipe import make_recipe, write_rows
from tests.support.world import World, say_all

OPENING = "what opens at nine on monday"
DISHES = "red mug blue bowl green plate"
ELSE = "Write a poem about autumn rain."


def rows_about(text: str) -> list[dict[str, Any]]:
    """Rows that all ask about the same."""
    words = text.split()
    asked = [" ".join(words[(number + place) % len(words)] for place in range(3 + number % 3)) for number in range(40)]
    return [{"question": f"{question} {number}", "answer": "ten"} for number, question in enumerate(asked)]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs about different things on one base, and an adapter that came without its rows."""
    folder = tmp_path_factory.mktemp("shop")
    make_base(folder / "base", max_position_embeddings=1024)
    for name, text in (("hours", OPENING), ("dishes", DISHES)):
        recipe = make_recipe(folder, output=name, training={"max_steps": 1}, evaluation={"final": ["perplexity"]})
        write_rows(folder / "train.jsonl", rows_about(text))
        lorafit.train(recipe, quiet=True)
    foreign_adapter(folder / "peft", folder / "base")
    return folder


@pytest.fixture(scope="module")
def server(shop: Path) -> Iterator[Server]:
    adapters = ("--adapter", "hours=hours", "--adapter", "dishes=dishes", "--adapter", "peft=peft")
    made = Server("base", *adapters, "--route", "0.9", "--drift", "--allow-loading", cwd=shop)
    yield made
    made.close()


def who(server: Server, text: str) -> str:
    return str(server.chat("auto", text, max_tokens=1).json()["model"])


def test_the_prompt_decides_who_answers_and_the_answer_names_it(server: Server) -> None:
    assert "by the prompt: hours, dishes, or the base" in server.stderr
    assert "adapter 'peft' cannot be told by its prompts" in server.stderr
    assert "only 40 training prompts of adapter 'hours' say what is for it" in " ".join(server.stderr.split())
    for text, name in ((OPENING, "hours"), (DISHES, "dishes"), (ELSE, "base")):
        named = server.chat(name, text, max_tokens=6).json()
        before = server.metric("routed_requests_total", adapter=name.replace("base", ""))
        told = server.chat("auto", text, max_tokens=6).json()
        assert told["model"] == name
        assert told["choices"][0]["message"] == named["choices"][0]["message"]
        assert server.metric("routed_requests_total", adapter=name.replace("base", "")) == before + 1


def test_every_way_to_ask_takes_auto(server: Server) -> None:
    stream = server.chat("auto", DISHES, max_tokens=2, stream=True).text
    chunks = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: {")]
    assert {chunk["model"] for chunk in chunks} == {"dishes"}
    assert server.post("/v1/completions", model="auto", prompt=DISHES, max_tokens=1).json()["model"] == "dishes"
    ids = server.post("/v1/completions", model="auto", prompt=[5, 6, 7], max_tokens=1).json()
    assert ids["model"] in {"base", "hours", "dishes"}
    unknown = server.post("/v1/completions", model="auto", prompt=[10_000, 5], max_tokens=1)
    assert (unknown.status_code, "has id 10000" in unknown.text) == (400, True)
    assert server.post("/generate", model="auto", prompt=OPENING, max_new_tokens=1).json()["model"] == "hours"
    found = {model.id: model for model in server.openai().models.list()}
    assert list(found) == ["base", "hours", "dishes", "peft", "auto"]
    assert (found["auto"].root, found["auto"].parent) == ("hours,dishes", "base")
    turns = [
        {"role": "assistant", "content": DISHES},
        {"role": "user", "content": OPENING},
    ]  # its own words do not count
    told = server.post("/v1/chat/completions", model="auto", messages=turns, max_tokens=1).json()
    assert told["model"] == "hours"


def test_many_at_once_get_what_each_gets_alone(server: Server) -> None:
    texts = [f"{text} {number}" for number in range(8) for text in (OPENING, DISHES)]
    alone = [who(server, text) for text in texts]
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(lambda text: who(server, text), texts)) == alone


def test_it_follows_loads_and_unloads(server: Server) -> None:
    assert server.post("/v1/unload_lora_adapter", lora_name="dishes").status_code == 200
    assert who(server, DISHES) == "base"
    assert who(server, OPENING) == "hours"
    taken = server.post("/v1/load_lora_adapter", lora_name="auto", lora_path="dishes")
    assert (taken.status_code, "served already" in taken.text) == (400, True)
    assert server.post("/v1/load_lora_adapter", lora_name="dishes", lora_path="dishes").status_code == 200
    assert who(server, DISHES) == "dishes"


def test_drift_is_told_of_prompts_whoever_chose_the_adapter(server: Server) -> None:
    for row in rows_about(OPENING):
        server.chat("auto", row["question"], max_tokens=1)
    assert server.metric("prompt_drift_seen", adapter="dishes") <= 1  # its window is of the last load
    for number in range(200):  # of quick ones some are not looked at
        server.chat("dishes", f"{ELSE} {number}", max_tokens=1)
        assert server.metric("prompt_drift_seen", adapter="dishes") <= number + 2
        if server.metric("prompt_drift", adapter="dishes"):
            break
    assert server.metric("prompt_drift_seen", adapter="dishes") in (32, 33)  # the last look may end meanwhile
    assert server.metric("prompt_drift_seen", adapter="hours") >= 36
    assert 'lorafit:prompt_drift{adapter="hours"' in server.client.get("/metrics").text
    assert server.metric("prompt_drift", adapter="hours") < 0.1  # nearly all are its training prompts
    assert server.metric("prompt_drift", adapter="dishes") > 0.8


def test_without_the_flag_nobody_is_called_auto(shop: Path) -> None:
    plain = Server("base", "--adapter", "auto2=hours", cwd=shop)
    try:
        told = plain.chat("auto")
        assert (told.status_code, "--route" in told.json()["error"]["message"]) == (404, True)
        assert "prompt_drift" not in plain.client.get("/metrics").text
    finally:
        plain.close()


@pytest.mark.parametrize(
    ("flags", "code", "says"),
    [
        (("--adapter", "auto=hours", "--route", "0.9"), 2, "'auto' is the name of the choice by prompts"),
        (("--adapter", "peft=peft", "--route", "0.9"), 2, "no adapter is served whose training prompts are known"),
        (("--drift",), 2, "--drift: no adapter is served"),
        (("--adapter", "a=hours", "--route", "2"), 2, "--route"),
        (("--adapter", "a=hours", "--route", "much"), 2, "--route"),
    ],
)
def test_what_cannot_be_routed_is_said_at_the_start(
    world: World, shop: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...], code: int, says: str
) -> None:
    monkeypatch.chdir(shop)
    say_all(world.run("serve", "base", "--port", "0", *flags), code, says)
