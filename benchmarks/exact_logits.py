"""How far logits in fp32 are from those in fp64: transformers' and PEFT's, those of `export --verify`, llama.cpp's.

    python benchmarks/exact_logits.py RUN

RUN is a run of a Llama, such as the quickstart's; llama-cpp-python must be installed. The reference is a forward of
this file, wholly in fp64, over the base's weights with the updates added. It takes minutes.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from lorafit.contracts import JsonMapping, Silent
from lorafit.exporting import gguf, gguf_lora
from lorafit.exporting.exported import Wish
from lorafit.exporting.llama_cpp import _Llama, load_exactly, sum_exactly
from lorafit.exporting.probes import probe_texts
from lorafit.exporting.source import Source, open_source
from lorafit.model.attach import open_adapter
from lorafit.model.saved_layers import SavedLayers
from lorafit.ops.logits_distance import logits_distance

Weights = dict[str, torch.Tensor]


def exact_logits(weights: Weights, config: JsonMapping, ids: list[int]) -> torch.Tensor:
    """Of a Llama with the plain rope, `[tokens, vocabulary]`, fp64."""
    heads, groups = int(config["num_attention_heads"]), int(config["num_key_value_heads"])
    size, count, epsilon = int(config["hidden_size"]) // heads, len(ids), float(config["rms_norm_eps"])
    rope = config.get("rope_parameters") or config
    angles = torch.arange(count)[:, None] / float(rope["rope_theta"]) ** (torch.arange(0, size, 2).double() / size)
    cosine, sine = (torch.cat([half(angles)] * 2, dim=-1) for half in (torch.cos, torch.sin))
    future = torch.full((count, count), -torch.inf, dtype=torch.float64).triu(1)

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * weights[f"{name}.weight"]

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ weights[f"{name}.weight"].T

    def turn(x: torch.Tensor) -> torch.Tensor:
        return x * cosine + torch.cat([-x[..., size // 2 :], x[..., : size // 2]], dim=-1) * sine

    x = weights["model.embed_tokens.weight"][torch.tensor(ids)]
    for layer in (f"model.layers.{number}" for number in range(int(config["num_hidden_layers"]))):
        before = norm(x, f"{layer}.input_layernorm")
        q, k, v = (linear(before, f"{layer}.self_attn.{n}_proj").view(count, -1, size).transpose(0, 1) for n in "qkv")
        q, k, v = turn(q), turn(k).repeat_interleave(heads // groups, 0), v.repeat_interleave(heads // groups, 0)
        read = ((q @ k.transpose(1, 2)) / size**0.5 + future).softmax(-1) @ v
        x = x + linear(read.transpose(0, 1).reshape(count, -1), f"{layer}.self_attn.o_proj")
        before = norm(x, f"{layer}.post_attention_layernorm")
        gate = linear(before, f"{layer}.mlp.gate_proj")
        x = x + linear(gate * torch.sigmoid(gate) * linear(before, f"{layer}.mlp.up_proj"), f"{layer}.mlp.down_proj")
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    return norm(x, "model.norm") @ head.T


def with_updates(weights: Weights, source: Source) -> Weights:
    """The weights as they answer with the adapter, fp64."""
    layers, found = SavedLayers(source.require_adapter()), dict(weights)
    for path in layers.layers:
        fold = layers.fold(path)
        factors = None if fold is None else fold.factors(None)
        if factors is None:
            sys.exit("the adapter adds no product of two matrices")
        found[f"{path}.weight"] = found[f"{path}.weight"] + factors[0] @ factors[1]
    return found


def main() -> None:
    source = open_source(Path(sys.argv[1]), Wish("gguf-lora", verify=True), Silent())
    tokenizer, config = source.voice.tokenizer, source.base.config
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"][:200] for text in probe_texts(source)[:6]]

    def ours(model: Any) -> torch.Tensor:
        with torch.no_grad():
            return torch.cat([model(torch.tensor([row]), use_cache=False).logits[0].double() for row in rows])

    def theirs(*files: Path) -> torch.Tensor:
        llama = _Llama(*files)
        return torch.cat([llama.logits(row) for row in rows])[:, : int(config["vocab_size"])].double()

    plain = load_exactly(source.base, source)
    weights = {name: value.double() for name, value in plain.state_dict().items()}
    adapted = open_adapter(load_exactly(source.base, source), source.require_adapter().path, base=source.base)
    with tempfile.TemporaryDirectory() as place:
        base_file, adapter_file = Path(place) / "base.gguf", Path(place) / "adapter.gguf"
        gguf.write_model(source, source.base.path, base_file, "f32", is_proven=False)
        gguf_lora.write_adapter(source, adapter_file)
        sides = {"base": (weights, plain, (base_file,))}
        sides["adapter"] = (with_updates(weights, source), adapted, (base_file, adapter_file))
        for what, (values, model, files) in sides.items():
            exact = torch.cat([exact_logits(values, config, row) for row in rows])
            found = {"fp32": ours(model), "llama.cpp": theirs(*files)}
            sum_exactly(model)
            found["sums in fp64"] = ours(model)
            for name, logits in found.items():
                largest, share = float((logits - exact).abs().max()), logits_distance(logits, exact)
                print(f"{what}, {name}: largest difference {largest:.2g}, {share:.2g} of the spread", flush=True)


if __name__ == "__main__":
    main()
