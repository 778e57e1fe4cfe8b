"""Facts about a model, its data and the device: plain numbers, frozen, no torch. `plan` turns them into a Plan."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace

from lorafit.contracts import JsonMapping, JsonObject

SEQ2SEQ_CLASS = "AutoModelForSeq2SeqLM"
"""Loads models of an encoder that reads a text and a decoder that writes another."""


@dataclass(frozen=True, slots=True)
class ModelClass:
    """How a task's models are built.

    Attributes:
        auto_class: The transformers class that loads them.
        config: Values that their config gets, e.g. `num_labels`.
        has_new_head: Whether what lies outside of the backbone is the task's own: it is drawn anew where the base's
            files lack it, theirs is left out, and it is trained and saved whole beside the adapter.
        peft_task: PEFT's name of the task.
        trains_projector: Whether what joins a vision tower to the language model is trained, and saved whole beside the
            adapter.
    """

    auto_class: str = "AutoModelForCausalLM"
    config: JsonMapping = field(default_factory=dict)
    has_new_head: bool = False
    peft_task: str = "CAUSAL_LM"
    trains_projector: bool = False

    @property
    def generates(self) -> bool:
        """Whether its models write text token by token."""
        return self.auto_class in ("AutoModelForCausalLM", "AutoModelForImageTextToText", SEQ2SEQ_CLASS)

    def padded_with(self, pad_id: int) -> ModelClass:
        """The same, told what fills up rows, where it has a head of its own: some find the end of a row by that."""
        return replace(self, config={**self.config, "pad_token_id": pad_id}) if self.has_new_head else self

    def whole(self) -> ModelClass:
        """The same for a folder that holds the head, as a merged model's does."""
        return replace(self, has_new_head=False)


CAUSAL_MODEL = ModelClass()
SEQ2SEQ_MODEL = ModelClass(SEQ2SEQ_CLASS, peft_task="SEQ_2_SEQ_LM")


@dataclass(frozen=True, slots=True)
class LinearShape:
    """One kind of linear layer of a language model, its output head apart.

    Attributes:
        name: Last part of the module's name, e.g. `q_proj`.
        in_features: Width of its input.
        out_features: Width of its output.
        count: How many the whole model holds.
        bias: Whether it has a bias vector.
        transposed: Stored `[in, out]` (GPT-2's Conv1D) instead of `[out, in]`.
        role: What it does in its layer: `q`, `k`, `v`, `qkv`, `o`, `gate`, `up`, `gate_up`, `down`, or `` for another.
        left_out: Why it carries no adapter; empty for those that may.
        quantizable: Whether the loader replaces it by a quantised one: transformers leaves classes of their own
            (Falcon's) alone.
        layers: Number of the layer that each of them stands in, an encoder's before its decoder's; -1: outside of all
            layers. None: one in each layer.
    """

    name: str
    in_features: int
    out_features: int
    count: int
    bias: bool = False
    transposed: bool = False
    role: str = ""
    left_out: str = ""
    quantizable: bool = True
    layers: tuple[int, ...] | None = None

    @property
    def weight_parameters(self) -> int:
        """Parameters of all `count` weights, biases apart."""
        return self.in_features * self.out_features * self.count


@dataclass(frozen=True, slots=True)
class ModuleShape:
    """One kind of module of a language model that is no linear of its layers and may be trained whole.

    Attributes:
        name: Last part of the modules' names, e.g. `norm`.
        count: How many the whole model holds.
        parameters: Of all of them.
        shares: How many modules have this one's weight; 2 of an embedding that is the output head too.
    """

    name: str
    count: int
    parameters: int
    shares: int = 1


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Weights of the layers that no adapter reaches.

    Attributes:
        name: What they are, e.g. `experts` or the last part of their paths.
        parameters: How many.
        reason: Why.
    """

    name: str
    parameters: int
    reason: str


@dataclass(frozen=True, slots=True)
class HolderShape:
    """Modules of the language model of one name that hold parameters of their own, its output head among them.

    Attributes:
        name: Last part of their paths.
        count: How many.
        parameters: Of all of them; a tensor that several modules share is counted at the first.
        biased: How many of them add a bias vector.
        bias_parameters: Of those vectors.
        is_norm: Whether they are norms.
        uncopied: Why no copies can stand in their place; empty where they can.
    """

    name: str
    count: int
    parameters: int
    biased: int
    bias_parameters: int
    is_norm: bool
    uncopied: str = ""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What plan and memory must know of a causal language model; read from a `config.json` alone.

    Attributes:
        linears: Every kind of linear layer of the language model (head and routers apart).
        other_parameters: Parameters outside linears' weights, embeddings, head and experts: norms, biases, position
            tables, routers, towers of other modalities.
        expert_parameters: Weights of the fused experts of a mixture: 3-D tensors that no quantisation touches.
        experts: Experts a layer; 0 for a dense model.
        experts_per_token: How many of them see a token.
        expert_size: Inner width of one expert.
        norm: `rms` (computed in fp32 by transformers' own code) or `layer` (torch's LayerNorm).
        norms_per_layer: Norms over the hidden width in one decoder layer.
        qk_norm: Whether queries and keys are normalised too.
        activation: Of the MLP, by transformers' name.
        parallel: Attention and MLP read the same input (Phi, Falcon, GPT-NeoX, Cohere).
        hidden_dropout: The model's own dropout on what its blocks add to the stream.
        attention_dropout: The model's own dropout on attention weights.
        softcap: Whether a soft-cap on attention scores forces eager attention (Gemma 2).
        math_attention: Whether sdpa falls back to plain matrix products in fp32 (Falcon's multi-query broadcast).
        no_sdpa: Whether its class has no attention but eager (GPT-OSS, BLOOM).
        beside: What holds weights and takes no adapter, linears apart: experts, routers, towers.
        has_sinks: Whether attention has a learned sink a head, and so its softmax in the compute dtype (gpt-oss).
        decoder_parameters: Weights of the linears that only a target's tokens go through; 0 without an encoder beside.
        new_head_parameters: Of a task's own head, which is trained whole.
        modules: What may be trained whole beside an adapter: embeddings, output head, norms.
        scanning_layers: Layers that carry a state along the row (Mamba, linear attention).
        holders: All that holds parameters of its own, a task's new head apart.
        plain_norm: Whether its RMSNorm multiplies by its weight and nothing else (Gemma adds 1 to it).
        plain_head: Whether nothing stands behind the head (no soft-cap, no logit scale), so that the loss runs in
            chunks.
    """

    model_type: str
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    max_positions: int
    linears: tuple[LinearShape, ...]
    embedding_parameters: int
    head_parameters: int
    other_parameters: int
    gated_mlp: bool = True
    position_parameters: int = 0
    expert_parameters: int = 0
    experts: int = 0
    experts_per_token: int = 0
    expert_size: int = 0
    norm: str = "rms"
    norms_per_layer: int = 2
    qk_norm: bool = False
    activation: str = "silu"
    parallel: bool = False
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    softcap: bool = False
    math_attention: bool = False
    plain_head: bool = True
    plain_norm: bool = True
    no_sdpa: bool = False
    beside: tuple[LeftOut, ...] = ()
    scanning_layers: int = 0
    has_sinks: bool = False
    new_head_parameters: int = 0
    decoder_parameters: int = 0
    modules: tuple[ModuleShape, ...] = ()
    holders: tuple[HolderShape, ...] = ()

    def to_json(self) -> JsonObject:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: JsonMapping) -> ModelShape:
        """What `to_json` gave."""
        layers = ((*part["layers"],) if part.get("layers") is not None else None for part in values["linears"])
        linears = (LinearShape(**{**part, "layers": own}) for part, own in zip(values["linears"], layers, strict=True))
        beside = (LeftOut(**part) for part in values["beside"])
        modules = (ModuleShape(**part) for part in values.get("modules", ()))
        holders = (HolderShape(**part) for part in values.get("holders", ()))
        own = {"linears": (*linears,), "beside": (*beside,), "modules": (*modules,), "holders": (*holders,)}
        return cls(**{**values, **own})

    def layers_of(self, linear: LinearShape) -> tuple[int, ...]:
        """Number of the layer that each linear of a kind stands in."""
        return tuple(range(self.layers)) if linear.layers is None else linear.layers

    @property
    def layer_count(self) -> int:
        """Layers in all: an encoder's and its decoder's."""
        return 1 + max((number for linear in self.linears for number in self.layers_of(linear)), default=-1)

    @property
    def embedding_width(self) -> int:
        """Of a token's embedding, which some models make wider before their first layer (ALBERT)."""
        return self.embedding_parameters // self.vocabulary

    @property
    def quantizable(self) -> bool:
        """Whether any of its linears can be quantised."""
        return any(linear.quantizable for linear in self.linears)

    @property
    def left_out(self) -> tuple[LeftOut, ...]:
        """All that takes no adapter, by name."""
        parameters: dict[tuple[str, str], int] = {}
        for linear in (linear for linear in self.linears if linear.left_out):
            key = (linear.name, linear.left_out)
            parameters[key] = parameters.get(key, 0) + linear.weight_parameters
        return (*self.beside, *(LeftOut(name, count, why) for (name, why), count in parameters.items()))

    @property
    def linear_parameters(self) -> int:
        """Parameters of all linear weights inside the decoder layers."""
        return sum(linear.weight_parameters for linear in self.linears)

    @property
    def total_parameters(self) -> int:
        """The published parameter count; a tied head is counted once."""
        inside = self.linear_parameters + self.expert_parameters + self.other_parameters
        return inside + self.embedding_parameters + self.head_parameters


@dataclass(frozen=True, slots=True)
class Bar:
    """Rows of `low` to `high` tokens, both included."""

    low: int
    high: int
    rows: int


@dataclass(frozen=True, slots=True)
class PictureFacts:
    """How many images a micro-batch has at most, and what the model's forward is given of them.

    Attributes:
        tokens: Of a row in which images take as large a share as in any.
        image_tokens: Those of them that stand for images.
        width: Of the image that takes the most tokens, in pixels; all are counted as like it.
        height: In pixels.
        one_tokens: Tokens that stand for that.
        alike: Whether every image takes as many.
        tensors: What the processor makes of it, by name: dtype, and the shapes of one and of two of them; empty where
            it makes nothing of a blank image.
    """

    tokens: int
    image_tokens: int
    width: int
    height: int
    one_tokens: int
    alike: bool
    tensors: Mapping[str, tuple[str, tuple[int, ...], tuple[int, ...]]]

    def images(self, tokens: int) -> int:
        """Most images in so many padded tokens."""
        share = tokens * self.image_tokens / (self.tokens * self.one_tokens)
        return max(1, math.floor(share) if self.alike else math.ceil(share))

    def shapes(self, tokens: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """dtype and shape of what so many padded tokens have at most, by name."""
        more = self.images(tokens) - 1
        return {
            name: (dtype, tuple(a + (b - a) * more for a, b in zip(one, two, strict=True)))
            for name, (dtype, one, two) in self.tensors.items()
        }


@dataclass(frozen=True, slots=True)
class DatasetFacts:
    """What plan and memory must know of the prepared training rows.

    Attributes:
        rows: Rows of one epoch, repeats counted.
        tokens: Tokens of one epoch, padding apart.
        trained_tokens: Tokens of one epoch that carry loss.
        longest_tokens: Tokens of the longest row, all of its sequences together.
        longest_trained_tokens: Most trained tokens in one row.
        longest_sequence_tokens: Of the longest sequence of all rows, those that are scored while training included.
        squared_tokens: Sum of the squares of the rows' lengths of one epoch: what attention's work grows with.
        validation_rows: Rows that are scored while training.
        validation_longest_tokens: Tokens of the longest of those.
        classes: Rows, or words, of each class, repeats not counted; empty where the task has none.
        class_weights: What the loss counts of each class while training; empty where all count alike.
        pictures: The rows' images; None where they have none.
    """

    rows: int
    tokens: int
    trained_tokens: int
    longest_tokens: int
    longest_trained_tokens: int
    squared_tokens: int = 0
    longest_sequence_tokens: int = 0
    validation_rows: int = 0
    validation_longest_tokens: int = 0
    classes: Mapping[str, int] = field(default_factory=dict)
    class_weights: Mapping[str, float] = field(default_factory=dict)
    pictures: PictureFacts | None = None


@dataclass(frozen=True, slots=True)
class RunFacts:
    """What acts between the steps of a run must know of it.

    Attributes:
        seed: The recipe's.
        total_steps: Of the whole run.
    """

    seed: int
    total_steps: int


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """Where the run happens.

    Attributes:
        kind: `cpu` or `cuda`.
        name: Name to print, e.g. `NVIDIA L4` or `cpu`.
        memory_bytes: Usable memory: of this machine's card what no other process holds, of a named one what torch
            reports; on a CPU the smaller of available RAM and the cgroup's limit.
        bf16: Whether bf16 matrix products run at speed.
        count: Processes that train together.
        capability: A card's compute capability, e.g. (8, 9); None where only a size is known, and of a CPU.
        note: What a user should know of the choice, in a sentence; mostly empty.
    """

    kind: str
    name: str
    memory_bytes: int
    bf16: bool
    count: int = 1
    capability: tuple[int, int] | None = None
    note: str = ""

    @property
    def card(self) -> str:
        """What rounds a run's sums: the card with its capability; empty of a CPU, and where only a size is known."""
        return "" if self.capability is None else f"{self.name}, capability {self.capability[0]}.{self.capability[1]}"
