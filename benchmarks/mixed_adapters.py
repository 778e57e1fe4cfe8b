"""Tokens a second of several clients, each with an adapter of its own, beside the same clients on one adapter.

    python benchmarks/mixed_adapters.py BASE [--clients 4] [--adapters 4] [--new-tokens 24] [--repeats 5]
                                             [--quantization none nf4]

BASE is a model folder, such as the quickstart's base. Adapters are of rank 16 on all linears, with values drawn. All
contenders write the same number of greedy tokens to the same prompts and take turns; medians are printed, of seconds
and of processor time, which other work on the machine moves less.

    mixed            BatchedEngine, each client with its own adapter
    one adapter      BatchedEngine, all clients with the first adapter
    one by one       BatchedEngine, each client with its own adapter, the next when the last is answered
    peft mixed       PEFT's generate(adapter_names=...)
    peft one         PEFT's generate, all with the first adapter

The tokens of `mixed` must be those of `one by one`; on an unquantised base PEFT's, too.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoTokenizer

from lorafit.answering.batched import BatchedEngine
from lorafit.answering.engine import Engine
from lorafit.answering.sampling import Sampling
from lorafit.answering.ticket import LiveRequest
from lorafit.contracts import Silent
from lorafit.kinds.quantizations import quantizations
from lorafit.model.base import resolve_base
from lorafit.model.load import load_model

PROMPTS = (
    "Why are your teapots so dark?",
    "Write a short poem about the sea.",
    "What is the capital of France, and what is it known for?",
    "How do I return a mug that arrived broken?",
)
Tokens = list[list[int]]


def load_base(folder: Path, kind: str) -> Any:
    """In fp32, or NF4 with bf16 beside it."""
    named: Any = SimpleNamespace(base=str(folder), revision=None)
    dtype = torch.float32 if kind == "none" else torch.bfloat16
    return load_model(
        resolve_base(named, folder.parent, Silent()),
        quantization=quantizations.make_section(kind),
        dtype=dtype,
        compute_dtype=dtype,
        attention="auto",
        device="cpu",
        reporter=Silent(),
    )


def write_adapters(base: Any, folder: Path, count: int) -> dict[str, Path]:
    """Adapters of rank 16 with values of a size that training gives."""
    made = {}
    for number in range(count):
        torch.manual_seed(number)
        tuned = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
        with torch.no_grad():
            for path, parameter in tuned.named_parameters():
                if "lora_B" in path:
                    parameter.normal_(0, 0.01)
        made[f"adapter-{number}"] = folder / f"adapter-{number}"
        tuned.save_pretrained(made[f"adapter-{number}"])
        base = tuned.unload()
    return made


def ask_ours(live: BatchedEngine, prompts: Tokens, names: Sequence[str], count: int, *, together: bool) -> Tokens:
    """Tokens of each answer."""
    exactly = Sampling(max_new_tokens=count, min_new_tokens=count)
    asked = [LiveRequest(prompt, name, exactly) for prompt, name in zip(prompts, names, strict=True)]
    if not together:
        return [[piece.token_id for piece in live.submit(request)] for request in asked]
    return [[piece.token_id for piece in ticket] for ticket in [live.submit(request) for request in asked]]


def ask_peft(model: PeftModel, tokenizer: Any, prompts: Tokens, names: Sequence[str], count: int) -> Tokens:
    """The same of PEFT's mixed batch; without names of the active adapter."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[tokenizer.eos_token_id] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    mixed = {"adapter_names": list(names)} if names else {}
    with torch.no_grad():
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
            **mixed,
        )
    written: Tokens = output[:, longest:].tolist()
    return written


def measure(folder: Path, kind: str, asked: argparse.Namespace) -> None:
    """One table."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [PROMPTS[number % len(PROMPTS)] for number in range(asked.clients)]
    chats = [[{"role": "user", "content": text}] for text in texts]
    prompts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) for chat in chats]
    count = asked.new_tokens
    with tempfile.TemporaryDirectory() as scratch:
        folders = write_adapters(load_base(folder, kind), Path(scratch), asked.adapters)
        own = [list(folders)[number % asked.adapters] for number in range(asked.clients)]
        first = [own[0]] * asked.clients
        autocast = None if kind == "none" else torch.bfloat16
        live = BatchedEngine(Engine(load_base(folder, kind), tokenizer, autocast_dtype=autocast, quantization=kind))
        peft: Any = None
        for name, place in folders.items():
            live.load_adapter(name, place)
            if peft is None:
                peft = PeftModel.from_pretrained(load_base(folder, kind), place, adapter_name=name).eval()
            else:
                peft.load_adapter(place, adapter_name=name)
        assert live.why_alone is None
        contenders: dict[str, Callable[[], Tokens]] = {
            "mixed": lambda: ask_ours(live, prompts, own, count, together=True),
            "one adapter": lambda: ask_ours(live, prompts, first, count, together=True),
            "one by one": lambda: ask_ours(live, prompts, own, count, together=False),
            "peft mixed": lambda: ask_peft(peft, tokenizer, prompts, own, count),
            "peft one": lambda: ask_peft(peft, tokenizer, prompts, (), count),
        }
        seconds, written = take_turns(contenders, asked.repeats)
        live.close(finish=True)
    report(kind, seconds, asked.clients * count)
    same = {name: written[name] == written["one by one"] for name in ("mixed", "peft mixed")}
    print("tokens: " + ", ".join(f"{name} {'equal' if is_same else 'DIFFERS'}" for name, is_same in same.items()))


def take_turns(
    contenders: dict[str, Callable[[], Tokens]], repeats: int
) -> tuple[dict[str, list[tuple[float, float]]], dict[str, Tokens]]:
    """Seconds and processor seconds of every round but the first, and what each wrote."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    written = {}
    for number in range(repeats + 1):
        for name, run in contenders.items():
            began, began_cpu = time.perf_counter(), time.process_time()
            written[name] = run()
            if number:
                seconds[name].append((time.perf_counter() - began, time.process_time() - began_cpu))
    return seconds, written


def report(kind: str, seconds: dict[str, list[tuple[float, float]]], tokens: int) -> None:
    """Medians, and each as a share of the one adapter's rate: ours, and PEFT's."""
    medians = {name: [statistics.median(part) for part in zip(*taken, strict=True)] for name, taken in seconds.items()}
    print(f"\n{kind}: {tokens} tokens, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    for name, (wall, cpu) in medians.items():
        ours, theirs = ([medians[one][k] / medians[name][k] for k in (0, 1)] for one in ("one adapter", "peft one"))
        share = f"{ours[0]:4.0%} ({ours[1]:4.0%}) of one adapter, {theirs[0]:4.0%} ({theirs[1]:4.0%}) of peft one"
        print(f"  {name:12} {tokens / wall:7.1f} tokens/s ({tokens / cpu:7.1f} by processor time)  {share}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    for name, default in (("clients", 4), ("adapters", 4), ("new-tokens", 24), ("repeats", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--quantization", nargs="+", default=["none", "nf4"])
    asked = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for kind in asked.quantization:
        measure(asked.base, kind, asked)


if __name__ == "__main__":
    main()
