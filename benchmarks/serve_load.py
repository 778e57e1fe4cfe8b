"""Load figures of `lorafit serve`: clients at once over one adapter and over several, over HTTP.

    python -m benchmarks.serve_load [--quantization nf4|int8|none] [--dtype bf16|fp32] [--adapters 4] [--tokens 32]
                                    [--clients 1 4 16] [--requests 3] [--recipe recipes/quickstart.yaml] [--folder DIR]
                                    [--loads 1000]

The recipe's base gets one run of two steps; its adapter is copied with other values in B for each further one, so that
all are as the recipe says (r 32 on all linears), whatever they answer. One server serves them all. For each number of
clients the same questions go to one adapter, to all adapters in turn, and to adapters and base in turn, each client
with one request at a time, greedy and streamed. The first answers are asked alone before, and every answer must be the
same under load: the last column counts those that a dtype's rounding by batch made others. `--loads` then loads and
unloads one adapter so many times, and compares the server's memory after 100 with that at the end. A table is printed,
and as JSON the figures with machine and versions.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import httpx
import psutil

import lorafit
from lorafit.contracts import JsonObject

QUESTIONS = (
    "How long do I have to return a mug?",
    "Do you ship to islands?",
    "Can I pay by invoice?",
    "My plate arrived broken. What now?",
    "When is the shop open on Friday?",
    "Which glazes are safe for food?",
    "Is there a workshop for children?",
    "How do I change my address?",
)


@dataclass(frozen=True)
class Load:
    """What came of one way to ask.

    Attributes:
        asked: Who: one adapter, several, or the base too.
        clients: At once.
        tokens_per_second: Written, over all clients.
        first_token_seconds: Median wait for a first token.
        first_token_seconds_95: The same of the slowest twentieth.
        answer_seconds: Median of whole answers.
        different: Answers that were not those of lone requests.
        answers: All of them.
    """

    asked: str
    clients: int
    tokens_per_second: float
    first_token_seconds: float
    first_token_seconds_95: float
    answer_seconds: float
    different: int
    answers: int


def make_adapters(folder: Path, recipe: str, kind: str, dtype: str, count: int) -> tuple[Path, dict[str, Path]]:
    """A run of two steps, and its adapter several times with other values."""
    import torch
    from safetensors.torch import load_file, save_file

    changes = {"training.epochs": None, "training.max_steps": 2, "evaluation.every_steps": 2}
    changes |= {"model.quantization": kind, "model.dtype": dtype}
    run = lorafit.train(recipe, output=folder / "run", overrides=changes, quiet=True).path
    made = {}
    for number in range(count):
        copy = folder / f"adapter{number}"
        shutil.copytree(run / "adapter", copy, ignore=shutil.ignore_patterns("MANIFEST*"))
        torch.manual_seed(number)
        tensors = load_file(copy / "adapter_model.safetensors")
        spread = {
            name: 0.01 * torch.randn_like(value) if "lora_B" in name else value for name, value in tensors.items()
        }
        save_file(spread, copy / "adapter_model.safetensors")
        made[copy.name] = copy
    return run, made


def start(base: str, adapters: dict[str, Path]) -> tuple[subprocess.Popen[str], str]:
    """The server, and its address."""
    named = [part for name, folder in adapters.items() for part in ("--adapter", f"{name}={folder}")]
    command = [sys.executable, "-m", "lorafit", "serve", base, *named, "--port", "0", "--allow-loading"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if found := re.search(r"serving at (http://\S+),", line):
            threading.Thread(target=process.stderr.read, daemon=True).start()  # else its log would fill the pipe
            return process, found[1]
        print(line, end="", file=sys.stderr)
    raise SystemExit("the server did not start")


async def ask(client: httpx.AsyncClient, model: str, question: str, tokens: int) -> tuple[str, int, float, float]:
    """An answer, its tokens, and the seconds to the first and to the last of them."""
    body = {"model": model, "messages": [{"role": "user", "content": question}], "max_tokens": tokens, "temperature": 0}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    began, first, text, written = time.perf_counter(), 0.0, "", 0
    async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                part = json.loads(line[6:])
                first = first or time.perf_counter() - began
                for choice in part["choices"]:
                    text += choice["delta"].get("content", "")
                written = (part["usage"] or {}).get("completion_tokens", written)
    return text, written, first, time.perf_counter() - began


async def measure(url: str, models: dict[str, list[str]], clients: list[int], requests: int, tokens: int) -> list[Load]:
    """Every way to ask with every number of clients."""
    loads: list[Load] = []
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=httpx.Limits(max_connections=None)) as client:
        everybody = list(dict.fromkeys(name for names in models.values() for name in names))
        alone = {(m, q): (await ask(client, m, q, tokens))[0] for m in everybody for q in QUESTIONS}
        for number in clients:
            for asked, names in models.items():

                async def work(
                    place: int, names: list[str] = names
                ) -> list[tuple[str, str, tuple[str, int, float, float]]]:
                    done = []
                    for turn in range(requests):
                        model, question = names[place % len(names)], QUESTIONS[(place + turn) % len(QUESTIONS)]
                        done.append((model, question, await ask(client, model, question, tokens)))
                    return done

                began = time.perf_counter()
                found = [one for each in await asyncio.gather(*map(work, range(number))) for one in each]
                seconds = time.perf_counter() - began
                firsts = sorted(answer[2] for *_, answer in found)
                loads.append(
                    Load(
                        asked,
                        number,
                        sum(answer[1] for *_, answer in found) / seconds,
                        statistics.median(firsts),
                        firsts[min(len(firsts) - 1, int(0.95 * len(firsts)))],
                        statistics.median(answer[3] for *_, answer in found),
                        sum(answer[0] != alone[model, question] for model, question, answer in found),
                        len(found),
                    )
                )
                print(row(loads[-1]), flush=True)
    return loads


def load_and_unload(url: str, folder: Path, count: int, process: subprocess.Popen[str]) -> JsonObject:
    """Memory of the server after 100 loads and after all, MiB, and the seconds of one."""
    server, resident, began = psutil.Process(process.pid), list[float](), time.perf_counter()
    for _ in range(count):
        for path, body in (
            ("load", {"lora_name": "more", "lora_path": str(folder)}),
            ("unload", {"lora_name": "more"}),
        ):
            httpx.post(f"{url}/v1/{path}_lora_adapter", json=body, timeout=600).raise_for_status()
        resident.append(server.memory_info().rss / 2**20)
    early, seconds = resident[min(99, count - 1)], (time.perf_counter() - began) / count
    print(f"{count} loads and unloads of {seconds:.2f} s: {early:.0f} MiB after 100, {resident[-1]:.0f} MiB at the end")
    return {"loads": count, "mib_after_100": early, "mib_at_the_end": resident[-1], "seconds_each": seconds}


def row(load: Load) -> str:
    """A line of the table."""
    waits = f"{load.first_token_seconds:.2f} | {load.first_token_seconds_95:.2f} | {load.answer_seconds:.2f}"
    unlike = f"{load.different} of {load.answers}"
    return f"| {load.clients} | {load.asked} | {load.tokens_per_second:.1f} | {waits} | {unlike} |"


def main() -> None:
    """Reads the command line, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quantization", default="nf4")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--adapters", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--requests", type=int, default=3)
    parser.add_argument("--recipe", default="recipes/quickstart.yaml")
    parser.add_argument("--loads", type=int, default=0)
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    folder = given.folder or Path(tempfile.mkdtemp(prefix="serve-load-"))
    run, adapters = make_adapters(folder, given.recipe, given.quantization, given.dtype, given.adapters)
    base = json.loads((run / "card.json").read_text(encoding="utf-8"))["base_path"]
    process, url = start(base, adapters)
    try:
        served = [model["id"] for model in httpx.get(f"{url}/v1/models").json()["data"]]
        names = list(adapters)
        ways = {
            "one adapter": names[:1],
            f"{len(names)} adapters": names,
            f"{len(names)} adapters and the base": served,
        }
        print("| clients | asked | tokens/s | first token, s | 95 % of them | answer, s | unlike a lone answer |")
        print("|---|---|---|---|---|---|---|")
        loads = asyncio.run(measure(url, ways, given.clients, given.requests, given.tokens))
        loaded = load_and_unload(url, adapters[names[0]], given.loads, process) if given.loads else None
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    versions = {name: version(name) for name in ("torch", "transformers", "peft", "lorafit")}
    settings = {"quantization": given.quantization, "dtype": given.dtype, "tokens": given.tokens}
    about = {"machine": platform.processor() or platform.machine(), "versions": versions, **settings}
    print(json.dumps({**about, "loads": [asdict(load) for load in loads], "memory": loaded}))


if __name__ == "__main__":
    main()
