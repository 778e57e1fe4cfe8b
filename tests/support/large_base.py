"""Synthetic bases of any size, written without holding them: for what a merge takes in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lorafit.files.safetensors import INDEX, build_header, read_index, row_blocks
from lorafit.kinds.quantizations import packed_kind
from lorafit.model.inspect import digest_of

LINEARS = {"q_proj": "self_attn", "o_proj": "self_attn", "gate_proj": "mlp", "up_proj": "mlp", "down_proj": "mlp"}


def make_large_base(folder: Path, *, hidden: int, inner: int, layers: int, shards: int) -> Path:
    """A Llama-like base in bf16: one layer's worth of tensors after the other, spread over `shards` files."""
    folder.mkdir(parents=True)
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": hidden, "vocab_size": 256,
        "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": 8, "num_key_value_heads": 8,
        "dtype": "bfloat16", "tie_word_embeddings": True,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (256, hidden), "model.norm.weight": (hidden,)}
    for layer in range(layers):
        for name, group in LINEARS.items():
            wide = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
            shapes[f"model.layers.{layer}.{group}.{name}.weight"] = wide.get(name, (hidden, hidden))
    names = list(shapes)
    generator = torch.Generator().manual_seed(0)
    weight_map = {}
    for shard in range(shards):
        file = folder / f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        own = names[shard * len(names) // shards : (shard + 1) * len(names) // shards]
        with file.open("wb") as stream:
            stream.write(build_header([(name, "BF16", shapes[name]) for name in own]))
            for name in own:
                weight_map[name] = file.name
                width = shapes[name][1] if len(shapes[name]) > 1 else 1
                for start, stop in row_blocks(shapes[name][0], width):
                    values = torch.randn((stop - start) * width, generator=generator).mul_(0.02).to(torch.bfloat16)
                    stream.write(values.view(torch.uint8).numpy())
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def make_large_adapter(base: Path, folder: Path, *, rank: int) -> Path:
    """A random LoRA adapter over every linear of the base."""
    folder.mkdir(parents=True)
    tensors = {}
    for name, entry in read_index(base).items():
        if "proj" in name:
            path = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{path}.lora_A.weight"] = torch.randn(rank, entry.shape[1]) * 0.01
            tensors[f"{path}.lora_B.weight"] = torch.randn(entry.shape[0], rank) * 0.01
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": sorted(LINEARS), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def record_quantization(base: Path, file: Path, kind: str = "nf4") -> Path:
    """The quantization.json that a run on this base would have stored."""
    used: dict[str, Any] = {"kind": kind, "double_quant": True, "weights_dtype": "bfloat16", "device": "cpu"}
    entries = {name.removesuffix(".weight"): entry for name, entry in read_index(base).items() if "proj" in name}
    tensors = {path: dict(packed_kind(kind).rebuild(entry, used, {}).proof) for path, entry in entries.items()}
    file.write_text(json.dumps({**used, "tensors": tensors, "digest": digest_of(tensors)}))
    return file


MERGE = """
import json, sys, time
from pathlib import Path
from lorafit.contracts import Silent
from lorafit.model.base import read_base
from lorafit.model.merge import merge_adapter
base, adapter, output, kind, record = sys.argv[1:6]
used = json.loads(Path(record).read_text()) if kind == "dequantized" else None
report = merge_adapter(read_base(Path(base)), Path(adapter), Path(output), kind=kind, quantization=used,
                       reporter=Silent())
peak = next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print(json.dumps({"peak_bytes": int(peak) * 1024, "seconds": report.seconds, "proven": report.proven,
                  "verified": report.verified, "tensors": report.tensors, "worst": report.largest_error,
                  "bytes": report.written_bytes}))
"""
