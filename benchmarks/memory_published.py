"""The closed form against peaks that other people measured on GPUs, with other stacks.

    python benchmarks/memory_published.py measured.csv

Prints predicted, measured and error of each row, a summary by source and by what was measured, the verdict that `--gpu`
would give for the card it ran on (at headroom 0, and by default), and the rows that cannot be described, with the
reason. What those stacks do otherwise than lorafit (loss from full logits, residual stream in fp32, adapters in bf16,
full fine-tuning, experts as linears, old bitsandbytes) is described here, by what their code does; no number is fitted
to a row.
"""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from lorafit.errors import LorafitError
from lorafit.facts import LinearShape, ModelShape
from lorafit.kinds.quantizations import quantizations
from lorafit.machine.hardware import cards, find_card, usable_bytes
from lorafit.machine.shipped import shipped
from lorafit.memory.closed_form import step_phases
from lorafit.memory.layer import Layer
from lorafit.memory.operations import Moment, Operation
from lorafit.memory.peak import ALLOCATOR_FACTOR, CONTEXT_BYTES
from lorafit.model.class_shape import find_shape
from lorafit.model.known_models import known_config

GIB = 2**30
HEADROOM = 0.05


def _qwen1(hidden: int, inner: int, layers: int, heads: int, vocabulary: int) -> dict[str, Any]:
    return {
        "model_type": "qwen2", "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": heads, "vocab_size": vocabulary,
        "max_position_embeddings": 8192,
    }  # fmt: skip


# Models that only their own code can load, written as the Llama-like that they are. The first Qwen: its config's
# intermediate_size is twice the inner width, c_attn has a bias. Source: their config.json.
OTHER_CODE = {
    "qwen-1_8b": _qwen1(2048, 5504, 24, 16, 151936),
    "qwen-7b": _qwen1(4096, 11008, 32, 32, 151936),
    "qwen-14b": _qwen1(5120, 13696, 40, 40, 152064),
    "qwen-72b": _qwen1(8192, 24576, 80, 64, 152064),
}
DERIVED = {  # fine-tunes under a name of their own, by the base_model of their model cards
    "zephyr-7b-beta": "mistralai/Mistral-7B-v0.1",
    "vicuna-7b-v1.5": "meta-llama/Llama-2-7b-hf",
    "vicuna-13b-v1.5": "meta-llama/Llama-2-13b-hf",
}
LORA_METHODS = ("lora", "qlora", "rslora", "pissa", "olora", "lora-fa")
_TUNED = re.compile(r"^meta-|-(instruct|chat|it|base|hf|bnb-4bit)(?=-|$)")


@dataclass(frozen=True)
class OtherLayer(Layer):
    """A layer as another stack computes it: PEFT's own forward beside bitsandbytes', nothing fused.

    Attributes:
        wide_stream: The residual stream is fp32.
        wide_adapter: Adapter weights are fp32.
        casts_adapter_inputs: PEFT's default, which lorafit's objective turns off under autocast: an adapter's input is
            cast to the adapter's dtype before autocast casts it down again.
        offloads_layer_inputs: Checkpointed layer inputs wait in host memory.
        fused_norm: A fused kernel keeps the norm's input and no fp32 copy.
        trains_a: Whether the adapters' A is trained; a frozen one (LoRA-FA) keeps nothing of its input.
    """

    fused: bool = False
    wide_stream: bool = False
    wide_adapter: bool = False
    casts_adapter_inputs: bool = True
    offloads_layer_inputs: bool = False
    fused_norm: bool = False
    trains_a: bool = True

    @property
    def stream_bytes(self) -> int:
        return 4 if self.wide_stream else 2

    @property
    def adapter_bytes(self) -> int:
        return 4 if self.wide_adapter else 2

    @property
    def layer_inputs_kept(self) -> int:
        return 1 if self.offloads_layer_inputs else self.shape.layers

    def norm(self, name: str) -> Operation:
        if not self.fused_norm or self.shape.norm == "layer":
            return super().norm(name)
        kept, moment = self.stream_bytes * self.shape.hidden_size, 2 * self.stream_bytes * self.shape.hidden_size
        return Operation(name, kept + 4, (Moment("backward", moment),))

    def norm_keeps_stream(self) -> bool:
        return self.fused_norm or super().norm_keeps_stream()

    def norm_out_bytes(self) -> int:
        """What autocast computes in fp32 (LayerNorm, pow) goes on in fp32."""
        return 4 if self.shape.norm == "layer" and self.wide_on_gpu else self.compute_bytes

    def product_bytes(self) -> int:
        return 4 if self.shape.activation == "gelu_new" and self.wide_on_gpu else self.compute_bytes

    def reads_shared_input(self, linear: LinearShape) -> bool:
        return linear in self.adapted and self.trains_a and not self.own_copy_bytes(linear)

    def input_bytes(self, linear: LinearShape) -> int:
        """Of what a linear reads, a value."""
        if linear.role == "o":
            return self.compute_bytes
        return self.product_bytes() if linear.role == "down" else self.norm_out_bytes()

    def adapter_reads(self, linear: LinearShape) -> int:
        """Of what its adapter gets, a value."""
        casts = self.casts_adapter_inputs or not self.autocast
        return self.adapter_bytes if casts else self.input_bytes(linear)

    def own_copy_bytes(self, linear: LinearShape) -> int:
        """Of the tensor that A multiplies and keeps, a value; 0 where that is the block's shared input itself."""
        read, reads = self.input_bytes(linear), self.adapter_reads(linear)
        multiplied = self.compute_bytes if self.autocast else reads
        return multiplied if self.trains_a and (self.dropout > 0 or {multiplied, reads} != {read}) else 0

    def linear(self, linear: LinearShape, *, alive: float, ends_block: bool = False, freed: float = 0.0) -> Operation:
        """With PEFT's casts: an adapter's input, and in the backward pass its gradient, goes through each of them."""
        if linear not in self.adapted:
            return super().linear(linear, alive=alive, ends_block=ends_block, freed=freed)
        c, width_in, width_out = self.compute_bytes, linear.in_features, linear.out_features
        result, weight = c * width_out, self.dequantised_bytes(linear)
        arriving = 0 if ends_block else result
        read, reads, copy = self.input_bytes(linear), self.adapter_reads(linear), self.own_copy_bytes(linear)
        mask = (reads if self.device_kind == "cpu" else 1) if self.dropout > 0 else 0
        stages = [reads] * ((reads != read) + (self.dropout > 0))  # cast, dropout
        if self.autocast and reads != c:
            stages.append(c)
        wide = max(sum(stages) - copy, 0)  # the last of them is the copy that stays
        steps = [c if self.autocast else reads, *reversed(stages), read]  # widths of the gradient on its way back
        returns = max(max(x + y for x, y in pairwise(steps)) - copy, 0) if stages else steps[0]
        low = c if self.autocast else self.adapter_bytes
        kept = (copy + mask) * width_in + low * self.rank
        moments = (
            Moment("forward", alive + result - kept, weight),  # W comes first, when the adapter has kept nothing yet
            Moment("forward", alive + result + wide * width_in),
            Moment("forward", alive + result + 2 * low * width_out + (reads * width_in if reads != read else 0)),
            Moment("backward", arriving + returns * width_in),
            Moment("backward", arriving + (3 * c - copy - mask) * width_in - freed, weight),
        )
        return Operation(linear.name, kept, moments)


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


def describe(raw: dict[str, Any]) -> Described:
    """The prediction for one row.

    Raises:
        UndescribedError: Something in it is not known here.
    """
    row = {str(name): value if isinstance(value, str) else "" for name, value in raw.items()}
    measured = number(row, "peak_gib") * GIB
    if row.get("n_gpus", "") not in ("", "1", "1.0"):
        raise UndescribedError(f"{row['n_gpus']} GPUs: how they share the work is not described")
    tensors = tensors_of(row)
    needed = tensors * ALLOCATOR_FACTOR["cuda"] + CONTEXT_BYTES["cuda"]
    measure = row["measure"].lower()
    if "allocated" in measure or "active" in measure:
        predicted = tensors
    else:
        predicted = needed if "nvidia-smi" in measure or "nvml" in measure else tensors * ALLOCATOR_FACTOR["cuda"]
    read = "allocated" if predicted == tensors else "reserved or unknown"
    return Described(row["id"], row["id"].split("-")[0], read, row["gpu"], measured, predicted, needed)


def tensors_of(row: dict[str, str]) -> float:
    """Peak of live tensors."""
    method = row["method"].lower().strip()
    trains_all = method.startswith("full")
    if not trains_all and re.sub(r"-(bf16|fp16|fp32|nf4|fp4|int8|4bit|8bit)$", "", method) not in LORA_METHODS:
        raise UndescribedError(f"method '{row['method']}'")
    shape = shape_of(row)
    # rows longer than a table of learned positions cannot run: trainers cut them to the model's length
    length = min(int(number(row, "seq_len")), shape.max_positions if shape.position_parameters else 2**31)
    tokens = int(number(row, "micro_batch")) * length
    targets = () if trains_all else targets_of(row["target_modules"], shape)
    rank = 0 if trains_all else int(number(row, "lora_r"))
    adapter = sum(rank * (x.in_features + x.out_features) * x.count for x in targets)
    trained_adapter = sum(rank * x.out_features * x.count for x in targets) if "lora-fa" in method else adapter
    trainable = shape.total_parameters if trains_all else trained_adapter
    # litgpt's finetune/lora.py sets 0.05; the others' default is 0
    match = re.search(r"lora_dropout ([0-9.]+)", row["notes"])
    dropout = float(match[1].rstrip(".")) if match else (0.05 if row["id"].startswith("litgpt") else 0.0)
    weights, dequantised = weight_bytes(row["quant"], shape)
    attention = "eager" if "eager" in row["attention"].lower() else "sdpa"
    layer = OtherLayer(shape, length, targets, rank, dropout, attention, dequantised, **numerics_of(row, trains_all))
    phases = step_phases(layer, tokens, loss_bytes(row, shape, tokens), is_checkpointed(row), trainable)
    states = state_bytes(row["optimizer"], layer.adapter_bytes) * trainable
    if not trains_all:
        fixed = weights + layer.adapter_bytes * (adapter + trainable) + states
        return fixed + max(phase.total_bytes for phase in phases)
    # gradients come as the backward pass goes: none at its start, all at the update, unless each is used up at once;
    # foreach AdamW holds denominators beside them, fused AdamW (what torchtune's configs ask for) holds nothing
    optimizer = row["optimizer"].lower()
    is_fused = "fused" in optimizer or "torchtune" in row["source"].lower() or "8bit" in optimizer
    update = 0 if "in_bwd" in optimizer else layer.adapter_bytes * trainable * (1 if is_fused else 2)
    return weights + states + max(update, *(p.total_bytes for p in phases if p.name != "update"))


def number(row: dict[str, str], name: str) -> float:
    """A positive number of a row."""
    text = row.get(name, "").strip().replace(",", "")
    try:
        value = float(text)
    except ValueError:
        raise UndescribedError(f"{name} '{text}' is no number" if text else f"{name} is missing") from None
    if not 0 < value < 1e12:
        raise UndescribedError(f"{name} {text} is out of range")
    return value


def shape_of(row: dict[str, str]) -> ModelShape:
    """The shape of a row's model, also under another owner's name, or a tuned one's; experts as these stacks load them:
    each a linear of its own, which bitsandbytes quantises (transformers 5 fuses them)."""
    model_id = row["model_id"].strip()
    config = known_config(model_id) or _find_config(model_id)
    if config is None:
        raise UndescribedError(f"no shape of {model_id}" if model_id else "names no model")
    shape = replace(find_shape(config), plain_head=True, hidden_dropout=0.0, attention_dropout=0.0)
    said = row.get("params_b", "").strip()
    if said and abs(number(row, "params_b") * 1e9 / shape.total_parameters - 1) > 0.05:
        known = shape.total_parameters / 1e9
        raise UndescribedError(f"{model_id} is said to have {said}B parameters, the shape known here has {known:.3f}B")
    if row["id"].startswith("litgpt"):
        # q, k and v are one product, which v, a view, keeps whole; GptNeoxMLP calls one fused gelu
        view = LinearShape("attn", 0, 0, 1, role="qkv")
        gelu = "gelu_pytorch_tanh" if shape.activation == "gelu_new" else shape.activation
        return replace(shape, linears=(*shape.linears, view), activation=gelu)
    if shape.experts and has_wide_stream(row):  # an unadapted Linear4bit gives back its input's dtype: here fp32
        return replace(shape, experts_per_token=2 * shape.experts_per_token)
    return shape


def has_wide_stream(row: dict[str, str]) -> bool:
    """Whether `prepare_model_for_kbit_training` made the norms, and so the residual stream, fp32."""
    return any(said in row["notes"].lower() for said in ("residual stream becomes fp32", "prepare_model_for_kbit"))


def _find_config(model_id: str) -> dict[str, Any] | None:
    """By the last part of the id: mirrors, and tuned models of the same shape."""
    name = model_id.rpartition("/")[2].lower()
    if name in DERIVED:
        return known_config(DERIVED[name])
    plain = _TUNED.sub("", name)
    if plain in OTHER_CODE:
        return OTHER_CODE[plain]
    for path in sorted(shipped("models").glob("*.json")):
        facts = json.loads(path.read_text(encoding="utf-8"))
        if plain in (_TUNED.sub("", known.rpartition("/")[2].lower()) for known in facts["ids"]):
            config: dict[str, Any] = facts["config"]
            return config
    return None


def numerics_of(row: dict[str, str], trains_all: bool) -> dict[str, Any]:
    """How a row's stack computes, as arguments of `OtherLayer`."""
    dtype = row["compute_dtype"].lower()
    text = f"{dtype} {row['notes'].lower()}"
    if re.match(r"(fp32|float32)(?!.*autocast)", dtype):
        raise UndescribedError(f"compute dtype '{row['compute_dtype']}'")
    wide_adapter = not trains_all and bool(re.search(r"(adapters|lora|adapter weights) fp32", text))
    # MatMul4Bit of bitsandbytes 0.41 held its input as well as the weight (`ctx.tensors = (A, B)`)
    old_bnb = "saves input activation" in text or re.search(r"(bnb|bitsandbytes) 0\.(3\d|40|41)\b", text)
    keeps_inputs = trains_all or (bool(old_bnb) and row["quant"].lower() not in ("", "none"))
    return {
        "wide_stream": has_wide_stream(row),
        "wide_adapter": wide_adapter,
        "autocast": "autocast" in dtype and "no autocast" not in dtype,
        "keeps_input": lambda linear: keeps_inputs,
        # FOAK's kernels, or inductor's: it saves a norm's input and its fp32 reciprocal, no fp32 copy
        "fused_norm": "foak" in text or "compile" in dtype,
        "trains_a": "lora-fa" not in row["method"],
        "offloads_layer_inputs": "offload" in row["grad_checkpointing"].lower(),
    }


def is_checkpointed(row: dict[str, str]) -> bool:
    said = row["grad_checkpointing"].strip().lower()
    if said.startswith(("yes", "true", "on", "unsloth")):
        return True
    if said.startswith(("no", "false", "off")):
        return False
    raise UndescribedError(f"gradient checkpointing '{said}'" if said else "does not say whether it was checkpointed")


def state_bytes(optimizer: str, width: int) -> float:
    """Of optimizer state, a trained parameter; moments in the parameter's dtype unless they are 8-bit."""
    text = optimizer.lower()
    if "galore" in text or "apollo" in text:
        raise UndescribedError(f"optimizer '{optimizer}'")
    if "adafactor" in text:
        return 0.01  # row and column means
    moments = 0 if "sgd" in text else 1 if "lion" in text else 2
    return moments * (1 + 4 / 256 if "8bit" in text or "8-bit" in text else width)


def targets_of(text: str, shape: ModelShape) -> tuple[LinearShape, ...]:
    lowered = text.lower().strip()
    if "all linear" in lowered or "all-linear" in lowered or lowered in ("all", "all_linear"):
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
    if whole := names & {"lm_head", "embed_tokens", "wte", "embed_out", "embeddings"}:
        raise UndescribedError(f"trains {', '.join(sorted(whole))} as well")
    found = tuple(x for x in shape.linears if x.name in names or x.role in roles)
    if not found:
        raise UndescribedError(f"targets '{text}' match nothing")
    return found


def weight_bytes(quant: str, shape: ModelShape) -> tuple[float, Callable[[LinearShape], int]]:
    """Bytes of the frozen model, and of one linear's dequantised copy."""
    lowered = re.sub(r"^bnb[.-]?", "", quant.lower().strip()).replace("-dq", "+dq")
    kind = {"": "none", "none": "none", "bf16": "none", "nf4": "nf4", "nf4+dq": "nf4", "fp4": "fp4", "fp4+dq": "fp4",
            "int8": "int8"}.get(lowered)  # fmt: skip
    if kind is None:
        raise UndescribedError(f"quantisation '{quant}'")
    quantization = quantizations.make(kind, **({"double_quant": "dq" in lowered} if kind in ("nf4", "fp4") else {}))
    experts: tuple[LinearShape, ...] = ()
    if shape.experts:
        count = shape.experts * shape.layers
        inner, hidden = shape.expert_size, shape.hidden_size
        experts = (LinearShape("w1", hidden, inner, 2 * count), LinearShape("w2", inner, hidden, count))
    outside = shape.total_parameters - shape.linear_parameters - shape.expert_parameters
    inside = sum(quantization.weight_bytes(x, 2) + quantization.constant_bytes(x) for x in (*shape.linears, *experts))
    return 2 * outside + inside, lambda x: quantization.workspace_bytes(replace(x, count=1), 2)


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
    old = re.search(r"transformers 4\.(\d+)", row["notes"])
    # up to 4.45 the model itself makes its logits fp32 and drops the bf16 ones; from 4.46 both are there
    narrow = 0 if old and int(old[1]) < 46 else 2
    if "fast ce" in text:
        return (8 + narrow) * logits  # fp32 and its shifted copy, which becomes the gradient in place
    if "full logits" in text and "compile" in row["compute_dtype"].lower():
        return 10 * logits  # one kernel reads fp32 logits and writes their gradient, whose bf16 copy goes on
    if "full logits" in text:
        if shape.model_type == "gpt_bigcode":
            return 8 * logits  # its own loss stays in bf16: logits, shifted copy, log-softmax, gradient
        return (12 + narrow) * logits  # fp32, shifted copy or its gradient, log-softmax
    raise UndescribedError(f"loss '{row['loss']}'")


def main(path: Path) -> int:
    described: list[Described] = []
    unknown: list[tuple[str, str]] = []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        sys.exit(f"{path} cannot be read: {error}")
    for line, row in enumerate(rows, start=1):
        try:
            described.append(describe(row))
        except (UndescribedError, LorafitError, KeyError, ValueError) as error:
            reason = f"no column {error}" if isinstance(error, KeyError) else str(error)
            unknown.append((row.get("id") or f"row {line}", reason))
    print_rows(described)
    print_summary("by source", {one.id: one.source for one in described}, described)
    print_summary("by measure", {one.id: one.measure for one in described}, described)
    print_summary("of all", {one.id: "all" for one in described}, described)
    print(f"\n{len(described)} of {len(rows)} rows described, {len(unknown)} not")
    for name, reason in unknown:
        print(f"  not described: {name}: {reason}")
    return 0


def print_summary(title: str, group_of: dict[str, str], described: list[Described]) -> None:
    """Mean and largest error of each group."""
    if described:
        print(f"\nerrors {title}")
    for group in sorted(set(group_of.values())):
        errors = [abs(one.error) for one in described if group_of[one.id] == group]
        mean = sum(errors) / len(errors)
        print(f"  {group:30} {len(errors):3} rows, mean error {mean:5.1%}, largest {max(errors):5.1%}")


def print_rows(described: list[Described]) -> None:
    """A line a row; then what `--gpu` would have said, in sum."""
    print(f"{'row':52} {'predicted':>9} {'measured':>9} {'error':>7}  --gpu at headroom 0")
    verdicts = [card_verdict(one) for one in described]
    for one, verdict in zip(described, verdicts, strict=True):
        sizes = f"{one.predicted_bytes / GIB:9.2f} {one.measured_bytes / GIB:9.2f}"
        print(f"{one.id:52.52} {sizes} {one.error:+7.1%}  {verdict}")
    named = [verdict for verdict in verdicts if "unknown" not in verdict]
    fitting, refused = (sum(said in verdict for verdict in named) for said in ("fits", "default"))
    print(f"\n{fitting} of the {len(named)} runs on a known card fit it at headroom 0, and all of them did run;")
    print(f"the default headroom of {HEADROOM:.0%} refuses {refused} that fit at headroom 0")


def card_verdict(row: Described) -> str:
    """What `--gpu` would have said of the card that the row ran on."""
    card = find_any_card(row.gpu, row.measured_bytes)
    if card is None:
        return f"card '{row.gpu}' unknown" if row.gpu.strip() else "card unknown"
    size = usable_bytes(card)
    if row.needed_bytes > size:
        return f"DOES NOT FIT {card['names'][0]}, BUT RAN"
    fits = row.needed_bytes <= size * (1 - HEADROOM)
    return f"fits {card['names'][0]}" + ("" if fits else ", refused by default")


def find_any_card(text: str, measured_bytes: float) -> dict[str, Any] | None:
    """A card as people write it: with a form factor, a size, a kind of memory or a count in its name."""
    plain = re.sub(r"^\s*1\s*x\s+", "", text, flags=re.IGNORECASE)
    plain = re.sub(r"\b(SXM\d?|PCIe|HBM\d?e?|Tensor Core|GPU|Ada Generation)\b", " ", plain, flags=re.IGNORECASE)
    plain = re.sub(r"[-\s]+", " ", plain).strip()
    size = re.search(r"(\d+)\s*G(i?)B\b", plain, flags=re.IGNORECASE)
    bare = re.sub(r"\d+\s*Gi?B\b", " ", plain, flags=re.IGNORECASE).strip()
    names = [plain, *([f"{bare} {size[1]}GB"] if size else []), bare, f"{bare} Ada" if "Ada " in text else bare]
    found = next((card for name in names if name and (card := find_card(name)) is not None), None)
    if found is not None and usable_bytes(found) >= measured_bytes:
        return found
    # a family without a size, e.g. A100: its smallest card that could hold what was measured
    family = [card for card in cards() if bare and any(_begins(known, bare) for known in card["names"])]
    holding = [card for card in family if usable_bytes(card) >= measured_bytes]
    return min(holding or family, key=usable_bytes, default=found)


def _begins(known: str, family: str) -> bool:
    """Whether a card's name begins with the words of a family's."""
    one, other = (
        re.findall(r"[a-z0-9]+", re.sub(r"nvidia|geforce|tesla", " ", name.lower())) for name in (known, family)
    )
    return bool(other) and one[: len(other)] == other


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python benchmarks/memory_published.py MEASURED.csv")
    sys.exit(main(Path(sys.argv[1])))
