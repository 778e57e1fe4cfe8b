"""A server as its clients meet it: the official client, curl, bad requests, adapters that come and go, its end."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

import lorafit
from tests.support.adapted import randomise
from tests.support.served import Server
from tests.support.tiny_model import make_base
from tests.support.tiny_recipe import make_recipe
from tests.support.world import World, say_all

QUESTION = "what does the shop sell"
TOOL = {"type": "function", "function": {"name": "price", "parameters": {"type": "object", "properties": {}}}}


def foreign_adapter(folder: Path, base: Path, seed: int = 1) -> Path:
    """An adapter as PEFT alone writes it, whose B is not zero."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=4, target_modules="all-linear"))
    randomise(tuned, seed)
    tuned.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, a run on it whose template takes tools, and an adapter of PEFT's."""
    folder = tmp_path_factory.mktemp("shop")
    make_base(folder / "base", max_position_embeddings=1024)
    lorafit.train(make_recipe(folder, data={"chat_template": "hermes"}, training={"max_steps": 2}), quiet=True)
    foreign_adapter(folder / "peft", folder / "base")
    return folder


@pytest.fixture(scope="module")
def server(shop: Path) -> Iterator[Server]:
    made = Server("base", "--adapter", "run=run", "--adapter", "peft=peft", "--allow-loading", cwd=shop)
    yield made
    made.close()


def test_the_start_says_what_is_served_and_how_to_try_it(server: Server, shop: Path) -> None:
    lines = server.stderr.splitlines()
    assert any(line.split(None, 1)[0] == "base" and "chats" in line for line in lines)
    assert any(line.strip().startswith("run") and "lora" in line and "run/adapter" in line for line in lines)
    curl = next(line for line in lines if line.startswith("try: curl")).removeprefix("try: ")
    told = subprocess.run(curl, shell=True, capture_output=True, text=True, check=True, timeout=60)
    assert json.loads(told.stdout)["choices"][0]["message"]["role"] == "assistant"


def test_the_official_client_lists_models_with_their_parent(server: Server, shop: Path) -> None:
    found = {model.id: model for model in server.openai().models.list()}
    assert list(found) == ["base", "run", "peft"]
    assert found["base"].parent is None and found["base"].root == str(shop / "base")
    assert found["run"].parent == "base" and found["run"].root.endswith("run/adapter")
    assert found["run"].max_model_len == 1024
    assert server.openai().models.retrieve("peft").id == "peft"


@pytest.mark.parametrize("name", ["run", "peft"])
def test_an_answer_is_that_of_generate(server: Server, shop: Path, name: str) -> None:
    """The same tokens as a lone run's, through the template that the adapter was trained with."""
    alone = lorafit.generate(shop / name, QUESTION, max_new_tokens=12, quiet=True).texts[0]
    client = server.openai()
    messages: Any = [{"role": "user", "content": QUESTION}]
    whole = client.chat.completions.create(model=name, messages=messages, temperature=0, max_completion_tokens=12)
    assert whole.choices[0].message.content == alone
    chunks = list(
        client.chat.completions.create(
            model=name,
            messages=messages,
            temperature=0,
            max_tokens=12,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == alone
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage and whole.usage.completion_tokens > 0
    plain = server.post("/generate", prompt=QUESTION, model=name, max_new_tokens=12).json()
    assert (plain["text"], plain["model"]) == (alone, name)


def test_a_stream_ends_with_done(server: Server) -> None:
    text = server.chat("base", max_tokens=3, stream=True, stream_options={"include_usage": True}).text
    events = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    chunks = [json.loads(event) for event in events[:-1]]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert [chunk["usage"] is None for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
    assert "usage" not in json.loads(server.chat("base", max_tokens=3, stream=True).text.splitlines()[0][6:])


def test_log_probabilities_are_of_the_tokens_written(server: Server) -> None:
    client = server.openai()
    messages: Any = [{"role": "user", "content": QUESTION}]
    told = client.chat.completions.create(
        model="peft", messages=messages, temperature=0, max_tokens=4, logprobs=True, top_logprobs=3
    )
    content = told.choices[0].logprobs.content
    assert len(content) == told.usage.completion_tokens
    for token in content:  # greedy: the likeliest was taken
        assert len(token.top_logprobs) == 3
        assert token.logprob == max(top.logprob for top in token.top_logprobs) <= 0
    text = client.completions.create(model="peft", prompt="the shop", temperature=0, max_tokens=4, logprobs=2)
    probabilities = text.choices[0].logprobs
    assert len(probabilities.tokens) == len(probabilities.token_logprobs) == len(probabilities.text_offset)
    assert all(len(top) == 2 for top in probabilities.top_logprobs)


def test_choices_differ_and_a_seed_repeats_them(server: Server) -> None:
    def answers(**more: Any) -> list[str]:
        told = server.chat("peft", n=3, temperature=1.5, max_tokens=8, **more).json()
        assert [choice["index"] for choice in told["choices"]] == [0, 1, 2]
        return [choice["message"]["content"] for choice in told["choices"]]

    seeded = answers(seed=7)
    assert len(set(seeded)) > 1
    assert answers(seed=7) == seeded
    assert answers(seed=-8) != seeded
    assert answers() != answers()


def test_a_stop_text_ends_the_answer_and_is_no_part_of_it(server: Server) -> None:
    told = server.chat("run", max_tokens=24).json()["choices"][0]
    text = told["message"]["content"]
    stop = text[len(text) // 2 :][:2]
    stopped = server.chat("run", max_tokens=24, stop=[stop, "never"]).json()["choices"][0]
    assert stopped["message"]["content"] == text[: text.index(stop)]
    assert stopped["finish_reason"] == "stop"
    streamed = server.chat("run", max_tokens=24, stop=stop, stream=True).text
    parts = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: {")]
    assert "".join(part["choices"][0]["delta"].get("content", "") for part in parts) == text[: text.index(stop)]


def test_tools_go_to_the_template(server: Server) -> None:
    bare, told, none = (
        server.chat("run", max_tokens=2, **more).json()["usage"]["prompt_tokens"]
        for more in ({}, {"tools": [TOOL]}, {"tools": [TOOL], "tool_choice": "none"})
    )
    assert told > bare == none
    refused = server.chat("base", max_tokens=2, tools=[TOOL])  # whose template writes none
    assert refused.status_code == 400
    assert "drops the tools" in refused.json()["error"]["message"]


def test_completions_take_texts_and_tokens(server: Server) -> None:
    client = server.openai()
    one = client.completions.create(model="base", prompt="the shop", temperature=0, max_tokens=4)
    several = client.completions.create(model="base", prompt=["the shop", "it opens"], temperature=0, max_tokens=4)
    assert several.choices[0].text == one.choices[0].text
    assert [choice.index for choice in several.choices] == [0, 1]
    assert client.completions.create(model="base", prompt=[5, 6], max_tokens=2).usage.prompt_tokens == 2
    both = client.completions.create(model="base", prompt=[[5, 6], [7]], n=2, max_tokens=2)
    assert (len(both.choices), both.usage.prompt_tokens) == (4, 3)


def test_many_clients_over_all_models_get_the_answers_of_lone_ones(server: Server) -> None:
    def ask(number: int) -> str:
        model, text = ("base", "run", "peft")[number % 3], f"{QUESTION} {number % 5}"
        return str(server.chat(model, text, max_tokens=10).json()["choices"][0]["message"]["content"])

    alone = [ask(number) for number in range(15)]
    with ThreadPoolExecutor(15) as pool:
        assert list(pool.map(ask, range(15))) == alone


def test_health_is_no_answer_and_metrics_count(server: Server) -> None:
    figures = ("prompt_tokens_total", "generation_tokens_total", "request_success_total")
    before = [server.metric(name, adapter="") for name in figures]
    assert server.client.get("/health").json() == {"status": "ok"}
    assert [server.metric(name, adapter="") for name in figures] == before
    ended = server.metric("request_success_total", adapter="peft", finished_reason="length")
    usage = server.chat("peft", max_tokens=1).json()["usage"]
    assert usage["completion_tokens"] == 1
    labels = {"adapter": "peft", "finished_reason": "length"}  # counted behind the answer
    wait_for(lambda: server.metric("request_success_total", **labels) == ended + 1)
    assert server.metric("time_to_first_token_seconds_count", adapter="peft") >= 1
    assert server.metric("e2e_request_latency_seconds_count", adapter="peft") >= 1
    assert server.metric("request_generation_tokens_sum", adapter="peft") >= 1
    assert server.metric("request_prompt_tokens_count", adapter="peft") >= 1
    assert server.metric("request_refusals_total", adapter="peft") == 0
    assert server.metric("num_requests_running") == 0


def nested(depth: int) -> list[Any]:
    """Lists within each other."""
    return [nested(depth - 1)] if depth else []


CHAT = "/v1/chat/completions"
ASK = {"model": "base", "messages": [{"role": "user", "content": "q"}]}
LONG = {**ASK, "max_tokens": 900, "temperature": 0}  # this base goes on for ever


@pytest.mark.parametrize(
    ("path", "body", "status", "says"),
    [
        (CHAT, "{", 400, "no JSON"),
        (CHAT, b'{"model": "\xff"}', 400, "no JSON in UTF-8"),
        (CHAT, "[" * 100_000, 400, "nested too deeply"),
        (CHAT, {**ASK, "messages": [{"role": "user", "content": "q", "x": nested(700)}]}, 400, "nested too deeply"),
        (CHAT, "", 400, "empty"),
        (CHAT, "[]", 400, "no JSON object"),
        (CHAT, {"model": "base"}, 400, "messages: is missing"),
        (CHAT, {**ASK, "model": "nobody"}, 404, "served: base, run, peft"),
        (CHAT, {**ASK, "messages": []}, 400, "messages: is an empty list"),
        (CHAT, {**ASK, "messages": [{"role": "usr", "content": "q"}]}, 400, "did you mean 'user'"),
        (CHAT, {**ASK, "messages": [{"role": "assistant", "content": "q"}]}, 400, "the last message"),
        (CHAT, {**ASK, "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "only text"),
        (CHAT, {**ASK, "messages": [{"role": "user", "content": "q " * 2000}]}, 400, "the longest prompt"),
        (CHAT, {**ASK, "max_tokens": 5000}, 400, "5,000 of the answer"),
        (CHAT, {**ASK, "max_tokens": 0}, 400, "max_tokens"),
        (CHAT, {**ASK, "temperature": -1}, 400, "temperature"),
        (CHAT, {**ASK, "top_p": 2}, 400, "top_p"),
        (CHAT, {**ASK, "n": 99}, 400, "n: "),
        (CHAT, {**ASK, "stop": 3}, 400, "stop"),
        (CHAT, {**ASK, "frequency_penalty": 0.5}, 400, "frequency_penalty"),
        (CHAT, {**ASK, "best_of_all": 1}, 400, "best_of_all: this server knows no such parameter"),
        (CHAT, {**ASK, "response_format": {"type": "json_object"}}, 400, "response_format: is not served here"),
        (CHAT, {**ASK, "messages": [{"role": "user", "content": "\ud800"}]}, 400, "messages: holds half a character"),
        ("/v1/completions", {"model": "base", "prompt": [10_000]}, 400, "has id 10000"),
        ("/v1/completions", {"model": "base", "prompt": [10**20]}, 400, "prompt"),
        ("/v1/completions", {"model": "base", "prompt": []}, 400, "prompt"),
        ("/generate", {"prompt": ""}, 400, "prompt"),
        ("/generate", {"prompt": "q", "max_length": 3}, 400, "max_length"),
        ("/v1/load_lora_adapter", {"lora_name": "x"}, 400, "lora_path: is missing"),
        ("/v1/load_lora_adapter", {"lora_name": "../x", "lora_path": "peft"}, 400, "lora_name"),
        ("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "nowhere"}, 400, "no such file or folder"),
        ("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "base"}, 400, "is a whole model"),
        ("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "~nobody/x"}, 400, "no such file or folder"),
        ("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "x\0y"}, 400, "lora_path"),
        ("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "recipe.yaml"}, 400, "recipes are not followed here"),
        ("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "/etc"}, 400, "or an adapter folder"),
        ("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "x" * 300}, 400, "too long"),
        ("/v1/load_lora_adapter", {"lora_name": "peft", "lora_path": "peft"}, 400, "served already"),
        ("/v1/unload_lora_adapter", {"lora_name": "nobody"}, 404, "no model is called"),
        ("/v1/unload_lora_adapter", {"lora_name": "base"}, 400, "the base cannot be unloaded"),
        ("/v1/nothing", {}, 404, "not found"),
        ("/v1/feedback", {"id": "x", "rating": True}, 403, "--feedback FILE"),
        ("/health", {}, 405, "not allowed"),
    ],
)
def test_a_bad_request_gets_its_status_and_the_reason(
    server: Server, path: str, body: Any, status: int, says: str
) -> None:
    content = body if isinstance(body, str | bytes) else json.dumps(body)
    told = server.client.post(path, content=content, headers={"Content-Type": "application/json"})
    assert told.status_code == status, told.text
    error = told.json()["error"]
    assert says in error["message"], error
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"


def test_the_field_that_is_at_fault_is_named(server: Server) -> None:
    for path, body, param in (
        (CHAT, {**ASK, "max_tokens": 5000}, "max_tokens"),
        (CHAT, {**ASK, "max_completion_tokens": 5000}, "max_completion_tokens"),
        (CHAT, {**ASK, "messages": [{"role": "user", "content": "q " * 2000}]}, "messages"),
        ("/v1/completions", {"model": "base", "prompt": "q " * 2000}, "prompt"),
        ("/generate", {"prompt": "q", "max_new_tokens": 5000}, "max_new_tokens"),
        ("/v1/load_lora_adapter", {"lora_name": "peft", "lora_path": "peft"}, "lora_name"),
        ("/v1/unload_lora_adapter", {"lora_name": "nobody"}, "lora_name"),
    ):
        assert server.post(path, **body).json()["error"]["param"] == param, body
    bare = server.client.post(CHAT, content="{}")
    assert "the header Content-Type: application/json" in bare.json()["error"]["message"]


def test_metrics_count_a_prompt_once_as_usage_does(server: Server) -> None:
    """However many answers it gets; and what is refused is counted by its code."""
    asked = [server.metric(name, adapter="") for name in ("prompt_tokens_total", "request_prompt_tokens_count")]
    ended, refused = server.metric("request_success_total", adapter=""), server.metric("http_errors_total", code="404")
    told = server.post("/v1/completions", model="base", prompt=["the shop", "a b c"], n=3, max_tokens=2).json()
    wait_for(lambda: server.metric("request_success_total", adapter="") == ended + 6)
    assert server.metric("prompt_tokens_total", adapter="") == asked[0] + told["usage"]["prompt_tokens"]
    assert server.metric("request_prompt_tokens_count", adapter="") == asked[1] + 2
    server.chat("nobody")
    wait_for(lambda: server.metric("http_errors_total", code="404") == refused + 1)


def test_a_slip_is_told_with_what_was_meant_and_logged(server: Server) -> None:
    told = server.client.post("/v1/completions", json={"model": "pefft", "prompt": "q"})
    assert "no model is called 'pefft'; did you mean peft? served:" in told.json()["error"]["message"]
    told = server.client.post("/v1/completions", json={"model": "peft", "prompt": "q", "max_token": 3})
    assert "max_token: this server knows no such parameter; did you mean max_tokens?" in told.json()["error"]["message"]
    wait_for(lambda: "400, unknown_parameter: max_token: this" in " ".join(server.stderr.split()))
    assert "404, model_not_found: no model is called 'pefft'" in " ".join(server.stderr.split())


def test_the_codes_that_clients_go_by(server: Server) -> None:
    import openai

    client, messages = server.openai(), [{"role": "user", "content": "q " * 2000}]
    with pytest.raises(openai.BadRequestError) as long:
        client.chat.completions.create(model="base", messages=messages)  # type: ignore[arg-type]
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="x", messages=messages)  # type: ignore[arg-type]
    assert unknown.value.code == "model_not_found"


def test_a_page_of_a_browser_cannot_ask(server: Server) -> None:
    """Neither with a body that needs no leave of the browser's, nor under a name that now leads to this machine."""
    text = server.client.post(CHAT, content=json.dumps(ASK), headers={"Content-Type": "text/plain"})
    assert text.status_code == 400
    foreign = {"Origin": "http://evil.example:8000"}
    assert server.client.post(CHAT, json={**ASK, "max_tokens": 1}, headers=foreign).status_code == 403
    for nobody in ("null", "http://[", ""):
        assert server.client.post(CHAT, json={**ASK, "max_tokens": 1}, headers={"Origin": nobody}).status_code == 403
    own = {"Origin": "http://localhost:3000"}
    assert server.client.post(CHAT, json={**ASK, "max_tokens": 1}, headers=own).status_code == 200


def test_a_body_of_10_mb_is_refused_and_the_server_lives(server: Server, tmp_path: Path) -> None:
    large = {**ASK, "messages": [{"role": "user", "content": "x" * 10_000_000}]}
    told = server.client.post(CHAT, json=large)
    assert (told.status_code, "4 MiB" in told.json()["error"]["message"]) == (413, True)

    def pieces() -> Iterator[bytes]:  # no length is said beforehand
        yield from [b"x" * 1_000_000] * 10

    assert server.client.post(CHAT, content=pieces()).status_code == 413
    file = tmp_path / "large.json"
    file.write_text(json.dumps(large))
    curl = [
        "curl",
        "-s",
        "-w",
        " %{http_code}",
        "-H",
        "Content-Type: application/json",
        "-d",
        f"@{file}",
        server.url + CHAT,
    ]
    assert subprocess.run(curl, capture_output=True, text=True, check=True).stdout.endswith(" 413")
    assert server.chat("base", max_tokens=1).status_code == 200


def http(body: Any, head: str = "Connection: close", version: str = "1.1") -> bytes:
    """A request for an answer, as it goes over the wire."""
    content = json.dumps(body).encode()
    lines = (f"POST {CHAT} HTTP/{version}", "Host: localhost", "Content-Type: application/json", head)
    return "\r\n".join([*lines, f"Content-Length: {len(content)}", "", ""]).encode() + content


SHORT = {**ASK, "max_tokens": 1}
KEPT = "Connection: keep-alive"


@pytest.mark.parametrize(
    ("sent", "statuses"),
    [
        (http(SHORT, "X: y", "1.0"), [200]),
        (
            http(SHORT, KEPT) * 2 + http({**SHORT, "model": "nobody"}, KEPT) + http(SHORT),
            [200, 200, 404, 200],
        ),  # at once
        (http(SHORT)[:-9], []),  # and no more is sent
        (b"\x16\x03\x01\x02" + b"\0" * 500, [400]),  # TLS
        (f"GET /{'a' * 90_000} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode(), [404]),
        (f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n".encode(), [400]),
        (http(SHORT).replace(b"Content-Length: ", b"Content-Length: 1, "), [400]),
    ],
)
def test_whatever_comes_over_a_socket_the_next_one_is_answered(
    server: Server, sent: bytes, statuses: list[int]
) -> None:
    with socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1])), timeout=20) as client:
        client.sendall(sent)
        if not statuses:
            client.shutdown(socket.SHUT_WR)
        told = b"".join(iter(lambda: client.recv(65_536), b""))
    assert [int(status) for status in re.findall(rb"HTTP/1.1 (\d+) ", told)] == statuses
    assert len(told) < 2_000
    assert server.chat("base", max_tokens=1).status_code == 200


def test_two_hundred_clients_that_hang_up_leave_nothing_behind(server: Server) -> None:
    address = ("127.0.0.1", int(server.url.rsplit(":", 1)[1]))
    clients = [socket.create_connection(address, timeout=20) for _ in range(200)]
    for number, client in enumerate(clients):
        client.sendall(http(LONG)[: (None, 40, 0)[number % 3]])
    assert server.chat("base", max_tokens=1).status_code in (200, 429)
    for client in clients:
        client.close()
    wait_for(lambda: server.metric("num_requests_running") == server.metric("num_requests_waiting") == 0)
    assert server.chat("base", max_tokens=1).status_code == 200


def test_a_split_is_sticky_and_ratings_become_rows(shop: Path, tmp_path: Path) -> None:
    from lorafit.data.prompts import read_prompt_rows
    from lorafit.kinds.formats import formats

    file = tmp_path / "ratings.jsonl"
    arms = ["--adapter", "run=run", "--adapter", "peft=peft", "--split", "run=0.5,peft=0.5"]
    server = Server("base", *arms, "--feedback", file, "--allow-loading", cwd=shop)
    try:
        assert "split  of users: run=0.5,peft=0.5" in server.stderr
        assert [model.id for model in server.openai().models.list()] == ["base", "run", "peft", "split"]
        assert server.openai().models.retrieve("split").id == "split"
        taken = server.post("/v1/load_lora_adapter", lora_name="split", lora_path="peft")
        assert taken.status_code == 400, taken.text
        for _ in range(4):  # no model of the split goes under its name
            assert server.post("/v1/unload_lora_adapter", lora_name="split").status_code == 404
        assert "served: base, run, peft, split" in server.chat("nobody").json()["error"]["message"]
        answered: dict[str, str] = {}
        for number in range(12):
            told = server.chat("split", max_tokens=2, user=f"user {number % 6}").json()
            assert answered.setdefault(f"user {number % 6}", told["model"]) == told["model"]
            if number < 10:
                body = {"id": told["id"], "rating": told["model"] == "run"}
                assert server.post("/v1/feedback", **body).json()["model"] == told["model"]
        assert set(answered.values()) == {"run", "peft"}
        streamed = server.chat("run", max_tokens=2, stream=True).text
        name = json.loads(streamed.splitlines()[0][6:])["id"]
        assert server.post("/v1/feedback", id=name, rating=True, choice=3).json()["error"]["param"] == "choice"
        assert server.post("/v1/feedback", id=name, rating=True).status_code == 200
        assert server.post("/v1/feedback", id=name, rating=True).status_code == 404  # once
        assert server.post("/v1/feedback", id=name, rating=1).status_code == 400
        report = {one["model"]: one for one in server.client.get("/v1/split").json()["models"]}
        assert report["run"]["share"] == 1 and report["peft"]["share"] == 0
        assert report["run"]["rated"] + report["peft"]["rated"] == 11
        assert report["peft"]["difference"] == -1 and report["peft"]["verdict"] == "worse"
    finally:
        server.close()
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    read = [formats.get("unpaired_preference").read(row, "ratings.jsonl", 1) for row in rows]
    assert [sample.labels for sample in read].count(("desirable",)) == report["run"]["good"]
    assert read[0].messages is not None and read[0].messages[0]["content"] == QUESTION
    assert read_prompt_rows(rows, [{}])[0].messages == read[0].messages[:1]


def wait_for(holds: Callable[[], bool], seconds: float = 20) -> None:
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.mark.parametrize("stream", [False, True])
def test_work_stops_when_the_client_goes(server: Server, stream: bool) -> None:
    before = server.metric("request_success_total", finished_reason="abort")
    body = {**LONG, "n": 2, "stream": stream}
    with httpx.Client(base_url=server.url, timeout=60) as client:
        if stream:
            with client.stream("POST", CHAT, json=body) as answer:
                next(answer.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post(CHAT, json=body, timeout=0.3)
    wait_for(lambda: server.metric("request_success_total", finished_reason="abort") == before + 2)
    assert server.metric("num_requests_running") == 0
    wait_for(lambda: f"{'ended by ' if stream else ''}499, the client hung up" in " ".join(server.stderr.split()))


def test_adapters_come_and_go_while_others_answer(server: Server, shop: Path) -> None:
    expected = server.chat("peft", max_tokens=8).json()["choices"][0]["message"]["content"]
    told = server.post("/v1/load_lora_adapter", lora_name="more", lora_path=str(shop / "peft"))
    assert told.status_code == 200, told.text
    assert server.chat("more", max_tokens=8).json()["choices"][0]["message"]["content"] == expected
    assert "more" in [model["id"] for model in server.client.get("/v1/models").json()["data"]]
    ended: list[float] = []

    def ask() -> None:
        running = server.chat("more", max_tokens=150, temperature=1.5, seed=3)
        ended.append(time.monotonic())
        assert running.status_code == 200, running.text

    asking = threading.Thread(target=ask)
    asking.start()
    wait_for(lambda: server.metric("num_requests_running") == 1)
    assert server.post("/v1/unload_lora_adapter", lora_name="more").status_code == 200
    unloaded = time.monotonic()
    asking.join()
    assert ended[0] <= unloaded + 0.2, "the adapter went before its running request was answered"
    assert server.chat("more").status_code == 404


def change_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}!{% endfor %}")


def break_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }")


def cut_weights(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def make_nan(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = folder / "adapter_model.safetensors"
    save_file({name: value * float("nan") for name, value in load_file(file).items()}, file)


def swap_tokens(folder: Path, base: Path | None = None) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy((base or folder.parent / "base") / name, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


@pytest.mark.parametrize(
    ("source", "spoil", "says"),
    [
        ("run/adapter", change_template, "is not the chat template that the adapter was trained with"),
        ("peft", break_template, "template"),
        ("peft", cut_weights, "adapter_model.safetensors"),
        ("peft", make_nan, "NaN"),
        ("peft", swap_tokens, "its vocabulary is another one: 2 of its tokens"),
    ],
)
def test_a_spoilt_adapter_is_refused_with_the_reason(
    server: Server, shop: Path, source: str, spoil: Callable[[Path], None], says: str
) -> None:
    folder = shop / f"spoilt-{spoil.__name__}"
    shutil.copytree(shop / source, folder, ignore=shutil.ignore_patterns("MANIFEST*"))
    spoil(folder)
    told = server.post("/v1/load_lora_adapter", lora_name="spoilt", lora_path=str(folder))
    assert told.status_code == 400, told.text
    assert says in told.json()["error"]["message"]
    assert server.chat("spoilt").status_code == 404


@pytest.mark.parametrize("made_by", ["lorafit", "peft"])
def test_an_adapter_of_another_base_is_refused(server: Server, shop: Path, tmp_path: Path, made_by: str) -> None:
    """Of the same shape, so that only its digest tells."""
    other = make_base(tmp_path / "base", seed=9, max_position_embeddings=1024)
    if made_by == "peft":
        folder = foreign_adapter(tmp_path / "adapter", other)
    else:
        lorafit.train(make_recipe(tmp_path, training={"max_steps": 1}), quiet=True)
        folder = tmp_path / "run"
    told = server.post("/v1/load_lora_adapter", lora_name="other", lora_path=str(folder))
    assert told.status_code == 400, told.text
    assert "base" in told.json()["error"]["message"]


KEY = {"LORAFIT_API_KEY": "geheim"}


@pytest.fixture(scope="module")
def small(shop: Path) -> Iterator[Server]:
    """A server with a key, room for one request and for one to wait, half a second for an answer, and no loading."""
    limits = ["--max-running", "1", "--max-waiting", "1", "--timeout", "0.5"]
    made = Server("base", *limits, cwd=shop, env=KEY)
    yield made
    made.close()


def test_with_a_key_only_who_has_it_is_answered(small: Server) -> None:
    import openai

    assert f"with the key of {next(iter(KEY))}" in small.stderr and "geheim" not in small.stderr
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "geheim"}):
        for path in ("/v1/models", "/metrics"):
            told = small.client.get(path, headers=headers)
            assert (told.status_code, told.json()["error"]["code"]) == (401, "invalid_api_key")
    assert small.client.get("/health").status_code == 200
    assert [model.id for model in small.openai("geheim").models.list()] == ["base"]
    with pytest.raises(openai.AuthenticationError):
        small.openai("wrong").models.list()


def test_bounds_have_their_codes(small: Server) -> None:
    import openai

    client = small.client
    client.headers["Authorization"] = "Bearer geheim"
    try:
        never = client.post(CHAT, json={**LONG, "n": 8})  # more than may ever wait: 429 would ask to try again
        assert (never.status_code, never.json()["error"]["param"]) == (400, "n")
        with ThreadPoolExecutor(2) as pool:
            held = [pool.submit(client.post, CHAT, json=LONG)]
            wait_for(lambda: small.metric("num_requests_running") == 1)  # else the second finds the first one waiting
            held.append(pool.submit(client.post, CHAT, json=LONG))
            wait_for(lambda: small.metric("num_requests_waiting") == 1)
            full = client.post(CHAT, json=LONG)
            assert [one.result().status_code for one in held] == [504, 504]
        assert (full.status_code, full.json()["error"]["type"]) == (429, "rate_limit_error")
        assert int(full.headers["Retry-After"]) >= 1
        late = client.post(CHAT, json=LONG)
        assert (late.status_code, late.json()["error"]["code"]) == (504, "timeout")
        streamed = client.post(CHAT, json={**LONG, "stream": True})
        events = [line for line in streamed.text.splitlines() if line.startswith("data: ")]
        assert json.loads(events[-2][6:])["error"]["code"] == "timeout" and events[-1] == "data: [DONE]"
        wait_for(lambda: "tokens, ended by 504, timeout: " in " ".join(small.stderr.split()))
        with pytest.raises(openai.APIError, match="not answered within"):
            list(small.openai("geheim").chat.completions.create(**LONG, stream=True))
        assert client.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": "run"}).status_code == 403
        assert client.post(CHAT, json={**ASK, "max_tokens": 1}).status_code == 200
    finally:
        del client.headers["Authorization"]


def test_sigterm_lets_running_answers_end_and_turns_new_ones_away(shop: Path) -> None:
    server = Server("run", cwd=shop)
    try:
        expected = server.chat("run", max_tokens=120).json()
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(server.chat, "run", max_tokens=120)
            wait_for(lambda: server.metric("num_requests_running") == 1)
            server.signal(signal.SIGTERM)
            wait_for(lambda: server.chat("run", max_tokens=1).status_code == 503)
            assert running.result().json()["choices"] == expected["choices"]
        ended = server.ended()
        assert ended.code == 0, ended.stderr
        assert "ending: running answers have 30 seconds" in ended.stderr
        assert re.search(r"[23] answers \(run [23]\), \d+ tokens written", ended.stdout)  # one may have come before
        assert f"POST {CHAT} 503, " in ended.stderr
    finally:
        server.close()


def test_ctrl_c_ends_within_the_grace(shop: Path) -> None:
    server = Server("base", "--grace", "0.2", "--json", cwd=shop)
    try:
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(server.post, CHAT, **LONG)
            wait_for(lambda: server.metric("num_requests_running") == 1)
            server.signal(signal.SIGINT)
            assert running.result().status_code == 503
        ended = server.ended()
        assert (ended.code, ended.last) == (
            130,
            "error: stopped by SIGINT; 1 running request was cut off after --grace",
        )
        assert ended.json["signal"] == signal.SIGINT and ended.json["answers"] == {}
        assert ended.json["cut"] == 1
    finally:
        server.close()


def test_what_cannot_be_served_is_told_before_a_weight_is_loaded(world: World, server: Server) -> None:
    base, port = str(world.base), server.url.rsplit(":", 1)[1]
    peft = foreign_adapter(world.root / "peft", world.base)
    foreign_adapter(world.root / "foreign", make_base(world.root / "other", seed=9))
    for name in ("cut", "bare", "swapped"):
        shutil.copytree(peft, world.root / name)
    swap_tokens(world.root / "swapped", world.base)
    cut_weights(world.root / "cut")
    (world.root / "bare" / "adapter_model.safetensors").unlink()
    for arguments, code, *says in (
        ((base, "--port", port), 2, f"--port: port {port} of 127.0.0.1 is in use"),
        ((base, "--host", "0.0.0.0"), 8, "--host: ", "set LORAFIT_API_KEY"),
        ((base, "--host", "no.such.host.invalid"), 8, "set LORAFIT_API_KEY"),
        ((base, "--adapter", "peft"), 2, "--adapter: ", "NAME=DIR"),
        ((base, "--adapter", "a=nowhere"), 2, "nowhere: no such file or folder"),
        ((base, "--adapter", f"a={base}"), 2, "is a whole model"),
        ((base, "--adapter", "a=peft", "--adapter", "a=peft"), 2, "two adapters are called 'a'"),
        ((base, "--adapter", "base=peft"), 2, "the base is called 'base' too"),
        ((base, "--adapter", "a=d.jsonl"), 2, "d.jsonl"),
        ((base, "--checkpoint", "best"), 2, "--checkpoint: "),
        ((base, "--split", "a=0.5,base=0.5"), 2, "--split: 'a' is not served"),
        ((base, "--split", "base=0.5"), 2, "--split: the shares are 0.5 together"),
        ((base, "--split", "base"), 2, "--split: ", "NAME=SHARE"),
        ((base, "--feedback", "no/such/folder/f.jsonl"), 2, "ratings cannot be written"),
        ((base, "--feedback", "/dev/zero"), 2, "--feedback: is no file"),
        ((base, "--feedback", "d.jsonl"), 4, "d.jsonl:1: is no rating"),
        ((base, "--feedback", str(world.base / "model.safetensors")), 4, "model.safetensors"),
        ((base, "--port", "99999"), 2, "--port", "65535"),
        ((base, "--adapter", "a=cut"), 5, "adapter_model.safetensors: is incomplete"),
        ((base, "--adapter", "a=swapped"), 5, "swapped: its vocabulary is another one: 2 of its tokens"),
        ((base, "--adapter", "a=bare"), 5, "bare: adapter_model.safetensors is missing"),
        ((base, "--adapter", "a=foreign"), 5, "foreign: trained on"),
        (("nowhere/at/all",), 2, "nowhere/at/all: no such file or folder"),
        (("/no/such",), 2, "/no/such: no such file or folder"),
        (("no/such.gguf",), 5, "no/such.gguf: no such file; check the path; it begins in "),
        (("package://no_such_package/x.gguf",), 5, "no installed package is called 'no_such_package'"),
    ):
        say_all(world.run("serve", *arguments), code, *says)
    assert world.loaded == []


def test_a_base_gives_way_to_an_adapter_of_its_name(world: World) -> None:
    from lorafit.contracts import Silent
    from lorafit.serving.catalog import open_served

    shutil.copytree(world.base, world.root / "shop")
    peft = foreign_adapter(world.root / "peft", world.base)
    for called, expected in (("shop", "base"), ("law", "shop")):
        opened = open_served(str(world.root / "shop"), {called: peft}, None, None, None, Silent())
        assert (opened.name, list(opened.adapters)) == (expected, [called])


def test_without_the_extra_one_sentence_says_how_to_get_it(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "uvicorn" else real(name, *more)
    )
    told = world.run("serve", str(world.base))
    say_all(told, 2, "uvicorn is not installed", 'pip install "lorafit[serve]"')


def test_python_checks_as_the_command_does(world: World) -> None:
    from lorafit.errors import UsageError

    with pytest.raises(UsageError, match="adapter: 'a' names no adapter"):
        lorafit.serve(world.base, adapters=["a"], quiet=True)
    with pytest.raises(UsageError, match="port: found 'x'"):
        lorafit.serve(world.base, port="x", quiet=True)  # type: ignore[arg-type]
