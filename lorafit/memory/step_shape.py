"""`StepShape`: all that decides how much memory a training step takes, its micro-batch and checkpointing apart."""

from __future__ import annotations

from dataclasses import dataclass

from lorafit.contracts import JsonValue
from lorafit.facts import LinearShape, ModelShape, PictureFacts
from lorafit.kinds.adapters import Adapter, AdapterSection, adapters
from lorafit.kinds.linear_targets import row_parameters, whole_parameters
from lorafit.kinds.optimizers import Optimizer, OptimizerSection
from lorafit.kinds.quantizations import Quantization, QuantizationSection, quantizations
from lorafit.kinds.section import KindSection
from lorafit.kinds.tasks import Task, TaskSection
from lorafit.ops.attention_kernels import VARIABLE_LENGTH_ATTENTION, Capability, Kernel, kernel_of, packs
from lorafit.ops.chunk_sizes import chunk_labels, usual_chunk_bytes

DTYPE_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}


@dataclass(frozen=True)
class StepShape:
    """A model, the kinds that train it, and its rows.

    Attributes:
        dtype: Of weights that are not quantised and of activations: `bf16`, `fp16` or `fp32`.
        compute_dtype: Of products with dequantised weights.
        attention: `eager`, `sdpa`, `fused`, `varlen` or `flash_attention_2`.
        device_kind: `cpu`, or `cuda` for every other: what kernels and allocator are like.
        capability: A CUDA card's compute capability.
        kernels: What computes norms, products and losses on a card: `none`, or `liger` with what of it is left out.
        row_tokens: Tokens of the longest row, all of its sequences together.
        row_labels: Most trained tokens in one row.
        packing: Whether rows hold several documents, every token of which may be trained; None: under attention that
            is made for it.
        keeps_unpacked: Whether adapted 4-bit weights keep their dequantised copy for the whole run.
        loss_chunk_bytes: Of fp32 logits that the loss holds at once; None: as many as are usual on the device.
        max_grad_norm: What gradients are clipped to; None: they are not.
        pictures: What a micro-batch's images are at most; None: it has none, or they are not known.
        held_rows: Rows whose images the host holds: those of a step, and of the next one, which is built ahead.
    """

    model: ModelShape
    quantization: Quantization[QuantizationSection]
    adapter: Adapter[AdapterSection]
    optimizer: Optimizer[OptimizerSection]
    task: Task[TaskSection]
    row_tokens: int
    row_labels: int
    dtype: str = "bf16"
    compute_dtype: str = "bf16"
    attention: str = "sdpa"
    device_kind: str = "cuda"
    capability: Capability = (8, 0)
    kernels: str = "none"
    packing: bool | None = False
    keeps_unpacked: bool = False
    loss_chunk_bytes: int | None = None
    max_grad_norm: float | None = 1.0
    pictures: PictureFacts | None = None
    held_rows: int = 0

    @property
    def chunk_bytes(self) -> int:
        """Of fp32 logits that the loss holds at once."""
        return self.loss_chunk_bytes or usual_chunk_bytes(self.device_kind)

    @property
    def chunk_labels(self) -> int:
        """Labels whose fp32 logits those are."""
        return chunk_labels(self.model.vocabulary, self.device_kind, self.chunk_bytes)

    @property
    def dtype_bytes(self) -> int:
        """Of `dtype`, a value."""
        return DTYPE_BYTES[self.dtype]

    @property
    def sequence_tokens(self) -> int:
        """Tokens of the longest sequence, which `data.max_length` bounds."""
        return self.task.sequence_tokens(self.row_tokens, self.row_labels)

    @property
    def trainable_parameters(self) -> int:
        """Of the adapter, of modules and rows of new tokens beside it, and of a task's own head."""
        section, shape = self.adapter.section, self.model
        beside = whole_parameters(section, shape) + row_parameters(section, shape) + shape.new_head_parameters
        return sum(site.parameters for site in self.adapter.sites(self.model)) + beside

    @property
    def adapted_linears(self) -> tuple[LinearShape, ...]:
        """The linears that carry the adapter, each with as many as do."""
        return tuple(site.linear for site in self.adapter.sites(self.model) if site.linear is not None)

    @property
    def start_bytes(self) -> int:
        """What is held at once beside the model while the adapter gets its first values, before there are gradients."""
        begins = self.adapter.initialisation()
        return 0 if begins is None else begins.memory_bytes(self.adapted_linears, self.adapter.rank())

    def stored_as(self, linear: LinearShape) -> Quantization[KindSection]:
        """How a linear's weight is stored: plain where transformers leaves its class alone."""
        return self.quantization.of(linear.name) if linear.quantizable else quantizations.make("none")

    @property
    def packs(self) -> bool:
        """Whether rows hold several documents."""
        return packs(self.packing, self.attention)

    @property
    def packs_rows(self) -> bool:
        """Whether a mask keeps several documents of a row apart; a variable-length kernel needs none."""
        return self.packs and self.attention not in VARIABLE_LENGTH_ATTENTION

    @property
    def attention_kernel(self) -> Kernel:
        """What computes attention that is not eager; a CPU's kernels keep what CUDA's flash keeps."""
        if self.device_kind == "cpu" or self.attention in VARIABLE_LENGTH_ATTENTION:
            return "flash"
        return kernel_of(self.capability, self.dtype, grouped=False, masked=self.packs_rows)  # keys are repeated

    @property
    def runs_liger(self) -> bool:
        """Whether all of Liger's kernels stand in place of torch's operations, which take more memory."""
        return self.device_kind != "cpu" and self.kernels == "liger"

    @property
    def keeps_scores(self) -> bool:
        """Whether attention keeps a number for each pair of tokens of a row."""
        return self.attention == "eager" or self.attention_kernel == "math"

    @property
    def fuses_branches(self) -> bool:
        """Whether the adapter's layers are PEFT's LoRA layers: no other runs as one operation with its base."""
        return self.adapter.peft_type == "LORA"

    @property
    def pages_state(self) -> bool:
        """Whether the optimizer's state can leave the card."""
        return self.optimizer.is_paged and self.device_kind == "cuda"

    @property
    def unquantized_expert_bytes(self) -> int:
        """Experts of a mixture that is quantised: no quantisation touches them; 0 for one that is not."""
        is_quantized = self.quantization.is_quantized and self.model.quantizable
        return self.model.expert_parameters * self.dtype_bytes if is_quantized else 0

    def labels_at(self, tokens: int) -> int:
        """Most labels in so many padded tokens: as many rows as fit, each with the most labels that any row has."""
        if self.packs:
            return tokens
        rows = max(1, tokens // max(1, self.row_tokens))
        return rows * (min(self.row_labels, self.row_tokens - 1) if self.row_tokens > 1 else 1)

    def adapter_with(self, **options: JsonValue) -> Adapter[AdapterSection]:
        """The same adapter with other options."""
        return adapters.bind(self.adapter.section.model_copy(update=options))
