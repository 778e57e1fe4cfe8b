"""Sums of adapters by lorafit and by PEFT's `add_weighted_adapter`, each against the dense sum in fp64.

    python benchmarks/compose.py [--ranks 8 8] [--seeds 3]
    python benchmarks/compose.py --shape 7b [--ranks 16 16] [--layers 32] [--only sum ties]

Random adapters on a tiny Llama: nothing is trained, and the errors are of arithmetic alone. The worst layer's relative
Frobenius error is printed, the mean over seeds. With --shape: two adapters of Llama-2-7B's linears, without a base, and
what a sum, a sum at a rank and TIES take: seconds and the largest resident size of the command's process.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

import lorafit

WEIGHTS = {"a": 0.7, "b": 0.3}
PEFTS = ("linear", "cat", "svd")
TARGETS = ["q_proj", "v_proj", "down_proj"]


def make_base(folder: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=96, max_position_embeddings=64, **sizes)).save_pretrained(folder)


def make_adapter(base: Path, folder: Path, seed: int, rank: int, **options: Any) -> None:
    """Random factors of the size that training leaves."""
    model = get_peft_model(open_base(base), LoraConfig(r=rank, lora_alpha=16, target_modules=TARGETS, **options))
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder)


def open_base(folder: Path) -> Any:
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)


def deltas(model: Any, name: str) -> dict[str, torch.Tensor]:
    found = {}
    for path, module in model.named_modules():
        if name in getattr(module, "lora_A", {}):
            a, b = (getattr(module, part)[name].weight.detach().double() for part in ("lora_A", "lora_B"))
            found[path] = module.scaling[name] * (b @ a)
    return found


def worst(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    return max(float((found[path] - wanted[path]).norm() / wanted[path].norm()) for path in wanted)


def measure(folder: Path, seed: int, ranks: list[int], options: dict[str, Any]) -> dict[str, float | str]:
    """Errors by who made the sum, or that PEFT refuses."""
    base = folder / "base"
    make_base(base)
    for number, (name, rank) in enumerate(zip(WEIGHTS, ranks, strict=True)):
        make_adapter(base, folder / name, 10 * seed + number, rank, **options)
    model = PeftModel.from_pretrained(open_base(base), folder / "a", adapter_name="a")
    model.load_adapter(folder / "b", adapter_name="b")
    parts = {name: deltas(model, name) for name in WEIGHTS}
    wanted = {path: sum(weight * parts[name][path] for name, weight in WEIGHTS.items()) for path in parts["a"]}
    found: dict[str, float | str] = {}
    for kind in PEFTS:
        try:
            model.add_weighted_adapter(list(WEIGHTS), list(WEIGHTS.values()), kind, combination_type=kind)
            found[f"PEFT {kind}"] = worst(deltas(model, kind), wanted)
        except ValueError:  # "All adapters must have the same r value"
            found[f"PEFT {kind}"] = "refused"
    folders = {name: folder / name for name in WEIGHTS}
    for label, rank in (("lorafit", None), (f"lorafit --rank {max(ranks)}", max(ranks))):
        output = folder / label.replace(" ", "-")
        lorafit.compose("0.7*a + 0.3*b", adapters=folders, output=output, rank=rank, quiet=True)
        opened = PeftModel.from_pretrained(open_base(base), output)
        found[label] = worst(deltas(opened, "default"), wanted)
    values = [torch.linalg.svdvals(delta) for delta in wanted.values()]
    found["Eckart and Young"] = max(float(one[max(ranks) :].norm() / one.norm()) for one in values)
    return found


SHAPES = {"7b": {"hidden": 4096, "intermediate": 11008}}
COMMANDS = {"sum": [], "rank": ["--rank", "16"], "ties": ["--method", "ties", "--density", "0.2", "--rank", "16"]}


def write_adapter(folder: Path, sizes: dict[str, int], layers: int, rank: int, seed: int) -> None:
    """Factors of N(0, 0.02) in PEFT's form, as a folder without a base."""
    hidden, intermediate = sizes["hidden"], sizes["intermediate"]
    linears = {f"self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"}
    linears |= {f"mlp.{name}_proj": (intermediate, hidden) for name in ("gate", "up")}
    linears["mlp.down_proj"] = (hidden, intermediate)
    draw, tensors = torch.Generator().manual_seed(seed), dict[str, torch.Tensor]()
    for layer in range(layers):
        for name, (outputs, inputs) in linears.items():
            path = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{path}.lora_A.weight"] = 0.02 * torch.randn(rank, inputs, generator=draw)
            tensors[f"{path}.lora_B.weight"] = 0.02 * torch.randn(outputs, rank, generator=draw)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    targets = [name.rpartition(".")[2] for name in linears]
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "7b", "r": rank}
    config |= {"lora_alpha": 2 * rank, "target_modules": targets, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def measure_shape(sizes: dict[str, int], layers: int, ranks: list[int], only: list[str]) -> None:
    with tempfile.TemporaryDirectory() as place:
        for number, (name, rank) in enumerate(zip(WEIGHTS, ranks, strict=True)):
            write_adapter(Path(place) / name, sizes, layers, rank, number)
        adapters = [word for name in WEIGHTS for word in ("--adapter", f"{name}={place}/{name}")]
        for name in only:
            words = [sys.executable, "-m", "lorafit", "compose", "a + b", *adapters, "--output", f"{place}/{name}"]
            began = time.perf_counter()
            process = subprocess.Popen([*words, *COMMANDS[name]], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            _, status, used = os.wait4(process.pid, 0)
            assert status == 0, f"{name} ended with {status}"
            took, most = time.perf_counter() - began, used.ru_maxrss >> 10
            print(f"{name}: {layers} layers, {took:.1f} s, {used.ru_utime:.1f} s of processor, {most:,} MiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--only", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    parser.add_argument("--ranks", type=int, nargs=2, default=None)
    parser.add_argument("--seeds", type=int, default=3)
    asked = parser.parse_args()
    if asked.shape:
        measure_shape(SHAPES[asked.shape], asked.layers, asked.ranks or [16, 16], asked.only)
        return
    ranks_of_all = asked.ranks or [8, 8]
    cases = {
        "plain": (ranks_of_all, {}),
        "rsLoRA": (ranks_of_all, {"use_rslora": True}),
        "patterns": (ranks_of_all, {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"down_proj": 4}}),
        "ranks 4 and 16": ([4, 16], {}),
    }
    columns = {}
    for case, (ranks, options) in cases.items():
        runs = []
        for seed in range(asked.seeds):
            with tempfile.TemporaryDirectory() as folder:
                runs.append(measure(Path(folder), seed, ranks, options))
        columns[case] = {
            who.replace(f"--rank {max(ranks)}", "--rank r"): first
            if isinstance(first, str)
            else f"{statistics.mean(run[who] for run in runs):.1e}"
            for who, first in runs[0].items()
        }
    table = Table(box=None)
    for heading in ("", *columns):
        table.add_column(heading, justify="left" if not heading else "right")
    for who in columns["plain"]:
        table.add_row(who, *(str(column[who]) for column in columns.values()))
    Console(width=160).print(table)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
