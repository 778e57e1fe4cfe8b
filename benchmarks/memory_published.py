"""The closed form against peaks that other people measured on GPUs, with other stacks.

    python benchmarks/memory_published.py measured.csv

Prints predicted, measured and error of each row, a summary by source and by what was measured, the verdict that `--gpu`
would give for the card it ran on, and the rows that cannot be described. What those stacks do otherwise than lorafit
(loss from full logits, residual stream in fp32, adapters in bf16, full fine-tuning) is described here, by what their
code does; no number is fitted to a row.
"""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from lorafit.devices import find_card, usable_bytes
from lorafit.kinds.quantizations import quantizations
from lorafit.memory.estimate import ALLOCATOR_FACTOR, CONTEXT_BYTES, step_phases
from lorafit.memory.layer import Numerics, Work
from lorafit.model_shapes import known_config, read_shape
from lorafit.shapes import LinearShape, ModelShape

GIB = 2**30
FLASH_SCORES_FREE = "sdpa"

# Models that only their own code can load, written as the Llama-like that they are. Qwen-7B: 22016 is twice its inner
# width, c_attn has a bias. Source: its config.json.
OTHER_CODE = {
    "Qwen/Qwen-7B-Chat": {
        "model_type": "qwen2", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 151936, "max_position_embeddings": 8192,
    },
}  # fmt: skip


class UndescribedError(Exception):
    """A row that this file has no words for."""


@dataclass(frozen=True)
class Described:
    """One row in our terms."""

    id: str
    source: str
    measure: str
    gpu: str
    measured_bytes: float
    predicted_bytes: float
    needed_bytes: float

    @property
    def error(self) -> float:
        """Of the prediction, relative."""
        return self.predicted_bytes / self.measured_bytes - 1


def describe(row: dict[str, str]) -> Described:
    """The prediction for one row.

    Raises:
        UndescribedError: Something in it is not known here.
    """
    shape = shape_of(row["model_id"])
    # rows longer than a table of learned positions cannot run: trainers cut them to the model's length
    length = min(int(row["seq_len"]), shape.max_positions if shape.position_parameters else 2**31)
    tokens, trains_all = int(row["micro_batch"]) * length, row["method"].startswith("full")
    numerics = numerics_of(row, trains_all)
    targets = () if trains_all else targets_of(row["target_modules"], shape)
    rank = int(float(row["lora_r"] or 0))
    adapter = sum(rank * (x.in_features + x.out_features) * x.count for x in targets)
    trained_adapter = sum(rank * x.out_features * x.count for x in targets) if "lora-fa" in row["method"] else adapter
    trainable = shape.total_parameters if trains_all else trained_adapter
    # litgpt's finetune/lora.py sets 0.05; the others' default is 0
    match = re.search(r"lora_dropout ([0-9.]+)", row["notes"])
    dropout = float(match[1]) if match else (0.05 if row["id"].startswith("litgpt") else 0.0)
    weights, dequantised = weight_bytes(row["quant"], shape)
    work = Work(length, targets, rank, dropout, FLASH_SCORES_FREE, dequantised, numerics)
    checkpointing = row["grad_checkpointing"].strip().lower().startswith("yes")
    phases = step_phases(shape, work, tokens, loss_bytes(row, shape, tokens), checkpointing, trainable)
    width = numerics.adapter_bytes
    states = (2 + 8 / 256 if "8bit" in row["optimizer"] else 2 * width) * trainable
    if trains_all:
        # gradients come as the backward pass goes: none at its start, all at the update
        moving = max(p.total_bytes for p in phases if p.name != "update")
        tensors = weights + states + max(moving, 2 * width * trainable)
    else:
        fixed = weights + width * (adapter + trainable) + states
        tensors = fixed + max(phase.total_bytes for phase in phases)
    measure = row["measure"].lower()
    needed = tensors * ALLOCATOR_FACTOR["cuda"] + CONTEXT_BYTES["cuda"]
    if measure.startswith(("max_memory_allocated", "peak active")):
        predicted = tensors
    else:
        predicted = needed if "nvidia-smi" in measure else tensors * ALLOCATOR_FACTOR["cuda"]
    return Described(
        row["id"], row["id"].split("-")[0], "allocated" if predicted == tensors else "reserved or unknown", row["gpu"],
        float(row["peak_gib"]) * GIB, predicted, needed,
    )  # fmt: skip


def shape_of(model_id: str) -> ModelShape:
    config = known_config(model_id) or OTHER_CODE.get(model_id)
    if config is None:
        raise UndescribedError(f"no shape of {model_id}")
    return replace(read_shape(config), plain_head=True, hidden_dropout=0.0, attention_dropout=0.0)


def numerics_of(row: dict[str, str], trains_all: bool) -> Numerics:
    dtype = row["compute_dtype"].lower()
    text = f"{dtype} {row['notes'].lower()}"
    wide_stream = "residual stream becomes fp32" in text or "prepare_model_for_kbit" in text
    wide_adapter = not trains_all and bool(re.search(r"(adapters|lora|adapter weights) fp32", text))
    autocast = "autocast" in dtype and "no autocast" not in dtype
    return Numerics(
        stream_bytes=4 if wide_stream else 2,
        compute_bytes=2,
        adapter_bytes=4 if wide_adapter else 2,
        autocast=autocast,
        widens=autocast,
        casts_adapter_inputs=True,  # PEFT's default
        keeps_inputs=trains_all,
        fused_norm="foak" in text,
        trains_a="lora-fa" not in row["method"],
        offloads_layer_inputs="offload" in row["grad_checkpointing"].lower(),
    )


def targets_of(text: str, shape: ModelShape) -> tuple[LinearShape, ...]:
    lowered = text.lower()
    if "all linear" in lowered or "all-linear" in lowered:
        return shape.linears
    if "default" in lowered:  # the attention's input projections
        return tuple(x for x in shape.linears if x.role in ("q", "k", "v", "qkv"))
    short = {"q": "q", "k": "k", "v": "v", "o": "o", "output_proj": "o", "o_proj": "o", "gate": "gate", "up": "up"}
    roles: set[str] = set()
    names: set[str] = set()
    for word in re.split(r"[+,\s]+", lowered):
        if word == "mlp":
            roles |= {"gate", "up", "gate_up", "down"}
        elif word in short:
            roles.add(short[word])
        else:
            names.add(word)
    found = tuple(x for x in shape.linears if x.name in names or x.role in roles)
    if not found:
        raise UndescribedError(f"targets '{text}' match nothing")
    return found


def weight_bytes(quant: str, shape: ModelShape) -> tuple[float, Callable[[LinearShape], int]]:
    """Bytes of the frozen model, and of one linear's dequantised copy."""
    kind = {"none": "none", "nf4": "nf4", "nf4+dq": "nf4", "fp4": "fp4", "int8": "int8"}.get(quant.lower())
    if kind is None:
        raise UndescribedError(f"quantisation '{quant}'")
    quantization = quantizations.get(kind)
    section = quantization.section(**({"double_quant": "dq" in quant} if kind in ("nf4", "fp4") else {}))
    outside = shape.total_parameters - shape.linear_parameters
    inside = sum(
        quantization.weight_bytes(section, x, 2) + quantization.constant_bytes(section, x) for x in shape.linears
    )
    return 2 * outside + inside, lambda x: quantization.workspace_bytes(section, replace(x, count=1), 2)


def loss_bytes(row: dict[str, str], shape: ModelShape, tokens: int) -> int:
    """What a stack's loss holds at its worst moment. Bytes by vocabulary and token, unless chunked by rows."""
    text, logits, states = row["loss"].lower(), shape.vocabulary * tokens, 2 * shape.hidden_size * tokens
    if "liger" in text:
        # chunks of next_power_of_2(tokens / (vocabulary / hidden)) rows: bf16, fp32 and bf16 again; and the gradient
        parts = -(-shape.vocabulary // shape.hidden_size)
        rows = 1 << (-(-tokens // parts) - 1).bit_length()
        return 8 * shape.vocabulary * rows + 2 * states
    if "cut cross" in text:
        return 2 * states  # hidden states and their gradient; logits never leave the chip
    if "chunkedoutput" in text:
        # bf16 chunks, one of 8 at work: in fp32, or, compiled, as its bf16 gradient alone
        return 2 * logits + (2 if "compile" in row["compute_dtype"] else 12) * logits // 8
    if "chunked lm_head" in text:
        return 6 * logits  # bf16 chunks, their log-softmax, and gradients
    if "fast ce" in text:
        return 10 * logits  # bf16, fp32 and its shifted copy, which becomes the gradient in place
    if "full logits" in text:
        if shape.model_type == "gpt_bigcode":
            return 8 * logits  # its own loss stays in bf16: logits, shifted copy, log-softmax, gradient
        old = re.search(r"transformers 4\.(\d+)", row["notes"])
        # up to 4.45 the model itself makes its logits fp32 and drops the bf16 ones; from 4.46 both are there
        return (12 if old and int(old[1]) < 46 else 14) * logits  # fp32, shifted copy or its gradient, log-softmax
    raise UndescribedError(f"loss '{row['loss']}'")


def main(path: Path) -> int:
    described, unknown = [], []
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            try:
                described.append(describe(row))
            except (UndescribedError, KeyError, ValueError) as error:
                unknown.append((row.get("id", "?"), str(error)))
    print(f"{'row':52} {'predicted':>9} {'measured':>9} {'error':>7}  card")
    refused = 0
    for one in described:
        verdict = card_verdict(one)
        refused += verdict == "refused at headroom 0.05"
        sizes = f"{one.predicted_bytes / GIB:9.2f} {one.measured_bytes / GIB:9.2f}"
        print(f"{one.id:52.52} {sizes} {one.error:+7.1%}  {verdict}")
    for title, key in (("by source", "source"), ("by measure", "measure")):
        print(f"\n{title}")
        for value in sorted({str(getattr(one, key)) for one in described}):
            errors = [abs(one.error) for one in described if getattr(one, key) == value]
            mean = sum(errors) / len(errors)
            print(f"  {value:30} {len(errors):3} rows, mean error {mean:5.1%}, largest {max(errors):5.1%}")
    print(f"\n{len(described)} rows described, {len(unknown)} not; the default headroom refuses {refused} that did run")
    for name, reason in unknown:
        print(f"  not described: {name}: {reason}")
    return 0


def card_verdict(row: Described) -> str:
    """What `--gpu` would have said of the card that the row ran on."""
    names = [row.gpu, re.sub(r"\s+SXM\d?$", "", row.gpu), re.sub(r"\s+\d+GB$", "", row.gpu)]
    if row.gpu == "A100" and row.measured_bytes > 40 * GIB:
        names = ["A100-80GB"]  # it did run
    card = next((card for name in names if (card := find_card(name)) is not None), None)
    if card is None:
        return f"card '{row.gpu}' unknown"
    size = usable_bytes(card)
    if row.needed_bytes <= 0.95 * size:
        return "fits"
    return "refused at headroom 0.05" if row.needed_bytes <= size else "DOES NOT FIT, BUT RAN"


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python benchmarks/memory_published.py MEASURED.csv")
    sys.exit(main(Path(sys.argv[1])))
