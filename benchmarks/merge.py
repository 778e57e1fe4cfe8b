"""`lorafit merge` against PEFT's merge_and_unload + save_pretrained, and against `cp` + fsync of the same bytes.

    python benchmarks/merge.py [--size full|small|tiny] [--pairs 3] [--folder DIR]

A random Llama in bf16 (28 layers, hidden 2048, 2.9 GB in 4 shards) and an adapter of rank 16 on all its linears are
made in a temporary folder, which takes four times the model's size on disk and goes again at the end. Whole processes
are timed from start to exit, in alternating pairs with a cold output and a warm input; the disk is idle at each start.
lorafit hashes what it writes and waits until it is on the disk; PEFT does neither.

Prints the median wall time, CPU time and peak resident memory of

    PEFT                    from_pretrained, PeftModel, merge_and_unload, save_pretrained: `--base original`'s work
    lorafit original        --base original, with --no-verify and with the streaming check
    lorafit dequantized     the same onto the base as NF4 left it, whose record lies beside the adapter, with its proof
    cp + fsync              the bytes alone

and each of lorafit's as a ratio to its unavoidable parts, measured in the same run: reading the base once, quantising
its linears with bitsandbytes one whole weight after the other, and writing the same bytes to the disk.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

RANK = 16
SHARDS = 4
LINEARS = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), "self_attn"),
    **dict.fromkeys(("gate_proj", "up_proj", "down_proj"), "mlp"),
}
SIZES = {
    "full": {"layers": 28, "hidden": 2048, "inner": 6144, "vocabulary": 49152},
    "small": {"layers": 8, "hidden": 1024, "inner": 4096, "vocabulary": 16384},
    "tiny": {"layers": 2, "hidden": 128, "inner": 256, "vocabulary": 256},
}
HEAD_WIDTH = 32


# --- what is merged: made in processes of their own, so that the measuring one stays small ---------------------------


def shapes_of(size: str) -> dict[str, tuple[int, ...]]:
    """Every tensor of the model by name, in the order of its layers."""
    of = SIZES[size]
    hidden, inner, narrow = of["hidden"], of["inner"], of["hidden"] // 4
    wide = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    wide |= {"k_proj": (narrow, hidden), "v_proj": (narrow, hidden)}
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (of["vocabulary"], hidden)}
    for number in range(of["layers"]):
        layer = f"model.layers.{number}"
        shapes |= {f"{layer}.{g}.{n}.weight": wide.get(n, (hidden, hidden)) for n, g in LINEARS.items()}
        shapes |= {f"{layer}.{n}.weight": (hidden,) for n in ("input_layernorm", "post_attention_layernorm")}
    return shapes | {"model.norm.weight": (hidden,)}


def make_base(folder: Path, size: str) -> None:
    """Random weights in bf16, a few MiB at a time, in SHARDS files."""
    import torch

    from lorafit.files.safetensors import INDEX, build_header, bytes_of, row_blocks

    of = SIZES[size]
    folder.mkdir()
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16", "tie_word_embeddings": True,
        "hidden_size": of["hidden"], "intermediate_size": of["inner"], "num_hidden_layers": of["layers"],
        "num_attention_heads": of["hidden"] // HEAD_WIDTH, "num_key_value_heads": of["hidden"] // HEAD_WIDTH // 4,
        "vocab_size": of["vocabulary"],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    shapes, generator = shapes_of(size), torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}
    names = list(shapes)
    for shard in range(SHARDS):
        file = folder / f"model-{shard + 1:05d}-of-{SHARDS:05d}.safetensors"
        own = names[shard * len(names) // SHARDS : (shard + 1) * len(names) // SHARDS]
        weight_map |= dict.fromkeys(own, file.name)
        with file.open("wb") as stream:
            stream.write(build_header([(name, "BF16", shapes[name]) for name in own]))
            for name in own:
                rows, width = shapes[name][0], shapes[name][-1] if len(shapes[name]) > 1 else 1
                for start, stop in row_blocks(rows, width):
                    values = torch.randn((stop - start) * width, generator=generator).mul_(0.02).to(torch.bfloat16)
                    stream.write(bytes_of(values))
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def make_adapter(folder: Path, size: str, base: Path) -> None:
    """A random adapter on every linear, in PEFT's layout."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    tensors, generator = {}, torch.Generator().manual_seed(1)
    for name, shape in shapes_of(size).items():
        if name.endswith("proj.weight"):
            path = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{path}.lora_A.weight"] = torch.randn(RANK, shape[1], generator=generator) * 0.02
            tensors[f"{path}.lora_B.weight"] = torch.randn(shape[0], RANK, generator=generator) * 0.02
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base), "r": RANK,
        "lora_alpha": 2 * RANK, "lora_dropout": 0.0, "bias": "none", "target_modules": sorted(LINEARS),
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))


def make(folder: Path, size: str) -> dict[str, Any]:
    """Base and adapter."""
    make_base(folder / "base", size)
    make_adapter(folder / "adapter", size, folder / "base")
    return {"bytes": sum(file.stat().st_size for file in (folder / "base").iterdir())}


def quantise(folder: Path, _: str) -> dict[str, Any]:
    """Quantises every linear as training would, one whole weight at a time, and leaves the record of it.

    Returns:
        `seconds` inside bitsandbytes, and how many `parameters` those were.
    """
    import torch
    from bitsandbytes.functional import quantize_4bit

    from lorafit.files.safetensors import read_index, read_rows
    from lorafit.kinds.quantizations.four_bit import hash_four_bit
    from lorafit.model.inspect import digest_of

    seconds, parameters, tensors = 0.0, 0, {}
    with torch.no_grad():
        for name, entry in read_index(folder / "base").items():
            if not name.endswith("proj.weight"):
                continue
            weight = read_rows(entry)
            started = time.perf_counter()
            codes, state = quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
            seconds += time.perf_counter() - started
            parameters += weight.numel()
            tensors[name.removesuffix(".weight")] = hash_four_bit(codes, state)
    used = {"kind": "nf4", "double_quant": True, "weights_dtype": "bfloat16", "device": "cpu"}
    record = {**used, "digest": digest_of(tensors), "tensors": tensors}
    (folder / "adapter" / "quantization.json").write_text(json.dumps(record))
    return {"seconds": seconds, "parameters": parameters}


def read(folder: Path, _: str) -> dict[str, Any]:
    """Reads the base's files once, a MiB at a time."""
    buffer = bytearray(1 << 20)
    started = time.perf_counter()
    for file in sorted((folder / "base").iterdir()):
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass
    return {"seconds": time.perf_counter() - started}


def write(folder: Path, _: str) -> dict[str, Any]:
    """Writes as many bytes as the base has, from one buffer, until they are on the disk."""
    sizes = {file.name: file.stat().st_size for file in sorted((folder / "base").iterdir())}
    (folder / "written").mkdir()
    buffer = memoryview(os.urandom(1 << 20))
    started = time.perf_counter()
    for name, size in sizes.items():
        with (folder / "written" / name).open("wb", buffering=0) as stream:
            for start in range(0, size, len(buffer)):
                stream.write(buffer[: size - start])
            os.fsync(stream.fileno())
    seconds = time.perf_counter() - started
    shutil.rmtree(folder / "written")
    return {"seconds": seconds}


def merge_with_peft(folder: Path, _: str) -> dict[str, Any]:
    """What a user of PEFT writes."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype="auto")
    model = PeftModel.from_pretrained(model, str(folder / "adapter")).merge_and_unload()
    model.save_pretrained(folder / "output")
    return {}


def compare(folder: Path, _: str) -> dict[str, Any]:
    """Reads both merges: PEFT's output lies in `peft`, ours in `output`.

    Returns:
        `equal`: share of values with the same bits. `furthest`: the largest difference over the larger value.
    """
    from lorafit.files.safetensors import read_index, read_rows, row_blocks

    ours, theirs = read_index(folder / "output"), read_index(folder / "peft")
    if ours.keys() != theirs.keys():
        raise SystemExit(f"tensors of one merge only: {sorted(ours.keys() ^ theirs.keys())[:3]}")
    equal, values, furthest = 0, 0, 0.0
    for name, entry in ours.items():
        for start, stop in row_blocks(entry.rows, entry.row_elements):
            a, b = read_rows(entry, start, stop), read_rows(theirs[name], start, stop)
            values += a.numel()
            differ = (a != b).flatten().nonzero().flatten()
            equal += a.numel() - len(differ)
            if len(differ):
                x, y = a.flatten()[differ].double(), b.flatten()[differ].double()
                furthest = max(furthest, float(((x - y).abs() / x.abs().maximum(y.abs())).max()))
    return {"equal": equal / values, "furthest": furthest}


PARTS = {function.__name__: function for function in (make, quantise, read, write, merge_with_peft, compare)}


# --- measuring ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """One process, from its start to its end."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    output: str


def measure(command: list[str]) -> Measured:
    """Runs a command on an idle disk, and asks the kernel what it took.

    The peak that the kernel keeps for a child begins with its parent's: nothing large is imported in this process.
    """
    os.sync()
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=output, stderr=errors, env=os.environ | {"HF_HUB_OFFLINE": "1"})
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            errors.seek(0)
            raise SystemExit(f"{errors.read()}\nended with {process.returncode}: {' '.join(command)}")
        output.seek(0)
        return Measured(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, output.read())


def part_command(name: str, folder: Path, size: str) -> list[str]:
    """The command that runs one of PARTS in a process of its own."""
    return [sys.executable, __file__, "--part", name, "--folder", str(folder), "--size", size]


def run_part(name: str, folder: Path, size: str) -> dict[str, Any]:
    """What one of PARTS returned."""
    return dict(json.loads(measure(part_command(name, folder, size)).output.splitlines()[-1]))


def commands(folder: Path, size: str) -> dict[str, list[str]]:
    """What is compared, by the name it is printed under. All write to the folder `output`."""
    base, output = folder / "base", folder / "output"
    lorafit = [
        sys.executable,
        "-c",
        "from lorafit.cli import main; main()",
        "merge",
        "--quiet",
        "--output",
        str(output),
        str(folder / "adapter"),
        "--base",
    ]
    copy = 'mkdir "$1" && cp "$0"/* "$1" && sync "$1"/* "$1"'
    return {
        PEFT: part_command("merge_with_peft", folder, size),
        ORIGINAL: [*lorafit, "original", "--no-verify"],
        COPY: ["sh", "-c", copy, str(base), str(output)],
        ORIGINAL_CHECKED: [*lorafit, "original"],
        DEQUANTIZED: [*lorafit, "dequantized", "--no-verify"],
        DEQUANTIZED_CHECKED: [*lorafit, "dequantized"],
    }


PEFT, COPY = "PEFT merge_and_unload, save_pretrained", "cp, fsync"
ORIGINAL, ORIGINAL_CHECKED = "lorafit original --no-verify", "lorafit original, streaming check"
DEQUANTIZED, DEQUANTIZED_CHECKED = "lorafit dequantized --no-verify", "lorafit dequantized, streaming check"


def measure_all(folder: Path, size: str, pairs: int) -> tuple[dict[str, list[Measured]], dict[str, Any]]:
    """Every command `pairs` times, the order turned round each time; and how far PEFT's result is from ours."""
    output, peft, agreement = folder / "output", folder / "peft", {}
    runs: dict[str, list[Measured]] = {name: [] for name in commands(folder, size)}
    for number in range(pairs):
        turn = list(commands(folder, size).items())
        for name, command in turn if number % 2 == 0 else reversed(turn):
            runs[name].append(measure(command))
            print(f"  {number + 1}/{pairs} {name}: {runs[name][-1].seconds:.1f} s", file=sys.stderr, flush=True)
            if number == 0 and name == PEFT:
                output.rename(peft)
            elif number == 0 and name == ORIGINAL:
                agreement = run_part("compare", folder, size)
                shutil.rmtree(peft)
            shutil.rmtree(output, ignore_errors=True)
    return runs, agreement


def middle(runs: list[Measured], field: str) -> float:
    """The median of one field."""
    return statistics.median(float(getattr(run, field)) for run in runs)


def report(runs: dict[str, list[Measured]], parts: dict[str, float], agreement: dict[str, Any]) -> None:
    """Prints the table, and the ratios that were promised."""
    plain, quantised = parts["read"] + parts["write"], parts["read"] + parts["quantise"] + parts["write"]
    unavoidable = {ORIGINAL: plain, ORIGINAL_CHECKED: plain, DEQUANTIZED: quantised, DEQUANTIZED_CHECKED: quantised}
    print(f"\n{'':38} {'wall s':>7} {'cpu s':>7} {'peak MB':>8} {'/ PEFT':>7} {'/ cp':>6} {'/ parts':>8}")
    peft, copy = middle(runs[PEFT], "seconds"), middle(runs[COPY], "seconds")
    for name, measured in runs.items():
        seconds, cpu_seconds = middle(measured, "seconds"), middle(measured, "cpu_seconds")
        peak_mb = middle(measured, "peak_bytes") / 1e6
        to_parts = f"{seconds / unavoidable[name]:8.2f}" if name in unavoidable else ""
        shares = f"{seconds / peft:7.2f} {seconds / copy:6.2f} {to_parts}"
        print(f"{name:38} {seconds:7.1f} {cpu_seconds:7.1f} {peak_mb:8.0f} {shares}")
    print(f"\nparts: read {parts['read']:.1f} s, quantise {parts['quantise']:.1f} s, write {parts['write']:.1f} s")
    ratios = [ours.seconds / theirs.seconds for ours, theirs in zip(runs[ORIGINAL], runs[PEFT], strict=True)]
    peak = middle(runs[ORIGINAL], "peak_bytes") / middle(runs[PEFT], "peak_bytes")
    print(f"lorafit / PEFT, pair by pair: {', '.join(f'{ratio:.2f}' for ratio in ratios)}; peak memory {peak:.2f}")
    print(
        f"{agreement['equal']:.4%} of all values have the same bits in both merges; "
        f"the others differ by at most {agreement['furthest']:.2%}"
    )


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="an empty folder to work in; a temporary one if left out")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    size: str = arguments.size
    if arguments.part:
        print(json.dumps(PARTS[arguments.part](arguments.folder, size)))
        return
    with tempfile.TemporaryDirectory(prefix="lorafit-merge-", dir=arguments.folder) as temporary:
        folder = Path(temporary)
        names = ("lorafit", "torch", "transformers", "peft", "bitsandbytes")
        print(f"python {platform.python_version()}, " + ", ".join(f"{name} {version(name)}" for name in names))
        made = run_part("make", folder, size)
        print(f"{made['bytes'] / 1e9:.2f} GB in {SHARDS} shards, adapter of rank {RANK}; {os.cpu_count()} cores")
        parts = {name: float(run_part(name, folder, size)["seconds"]) for name in ("quantise", "read", "write")}
        runs, agreement = measure_all(folder, size, arguments.pairs)
        report(runs, parts, agreement)


if __name__ == "__main__":
    main()
