"""What fake tensors of a CPU cannot answer, and what a card does otherwise: put in its place while a dry run runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from lorafit.model import attention, fused_lora
from lorafit.ops import dropout
from lorafit.ops.live_tensors import LiveTensors

if TYPE_CHECKING:
    from lorafit.memory import StepShape

_attention = functional.scaled_dot_product_attention


class LiveFakes(LiveTensors):  # type: ignore[no-untyped-call]
    """Counts, and answers what fake tensors cannot: the value of a number, and kernels that only write in place.

    Args:
        rounding_bytes: See LiveTensors.
        holds_documents: Whether rows hold several; transformers asks their positions whether all rows hold one.
        sees: Whether there are images; a mask then chooses all, since of none is a part padding.
    """

    def __init__(self, rounding_bytes: int = 1, *, holds_documents: bool = False, sees: bool = False) -> None:
        super().__init__(rounding_bytes)
        self._holds_documents, self._sees = holds_documents, sees
        self._counts: dict[int, int] = {}  # how many a mask chooses, by the storage that says it

    def call(self, function: Any, arguments: Any, options: Any) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default:
            if arguments[0].dtype == torch.bool:
                return not self._holds_documents
            if arguments[0].dtype.is_floating_point:
                return 1.0
            if self._sees and _key(arguments[0]) not in self._counts:
                raise RuntimeError("a tower asks for a number, such as an image's size")
            return self._counts.get(_key(arguments[0]), 1)
        if function is torch.ops.aten.index.Tensor and self._sees and all(_is_mask(index) for index in arguments[1]):
            return _all_of(*arguments)
        if function is torch.ops.aten._grouped_mm.default:
            return _grouped_product(*arguments[:2])
        if function.namespace == "bitsandbytes" and not function._schema.returns:
            return None
        result = function(*arguments, **options)
        if function is torch.ops.aten.sum.dim_IntList and self._sees and _is_mask(arguments[0]):
            self._counts[_key(result)] = arguments[0].numel() // max(1, result.numel())
        return result

    def _forget(self, key: int) -> None:
        super()._forget(key)
        self._counts.pop(key, None)


def _is_mask(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype == torch.bool


def _key(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _all_of(values: torch.Tensor, masks: Sequence[torch.Tensor]) -> torch.Tensor:
    """What a mask chooses that leaves nothing out."""
    (mask,) = masks
    return values.new_empty((mask.numel(), *values.shape[mask.dim() :]))


def _grouped_product(rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Each token times its expert's weight: [tokens, in] x [experts, in, out]; torch's own fake takes bf16 alone."""
    return rows.new_empty((*rows.shape[:-1], weights.shape[-1]))


@contextlib.contextmanager
def as_it_would_run(step: StepShape) -> Iterator[None]:
    """Puts in place what a real run does otherwise than fake tensors of a CPU, as far as it decides what is kept.

    transformers takes fake tensors for a trace, and then builds masks that a run does without. A CPU's dropout mask is
    made, not drawn. On CUDA a fused dropout keeps a mask of a byte a value, attention with dropout keeps no scores
    unless the card has no kernel but plain products, and autocast computes pow and LayerNorm in fp32.

    Source: ATen/native/Dropout.cpp; ATen/autocast_mode.h, AT_FORALL_FP32 (the rest of that list meets fp32 already, or
    stands in no model).
    """
    from transformers.utils import import_utils

    with contextlib.ExitStack() as stack:
        patches: list[tuple[Any, str, Any]] = [
            (import_utils, "is_fake_tensor", lambda tensor: False),
            (dropout, "draw_kept", lambda x, probability: torch.empty_like(x)),
        ]
        if step.device_kind != "cpu":
            is_math = step.attention_kernel == "math"
            patches += [
                (attention, "_capability_of", lambda tensor: step.capability),
                (functional, "dropout", _fused_dropout),
                (fused_lora, "drop", _fused_dropout),
                (functional, "layer_norm", _computed_in_fp32(functional.layer_norm)),
                (torch, "pow", _computed_in_fp32(torch.pow)),
                (functional, "scaled_dot_product_attention", _with_products if is_math else _attention_without_masks),
            ]
        for owner, name, replacement in patches:
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, replacement)
        yield


def _fused_dropout(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    return torch.native_dropout(input, p, training)[0] if training and p > 0 else input


def _attention_without_masks(*arguments: Any, **options: Any) -> torch.Tensor:
    """CUDA's flash kernel draws its dropout again in the backward pass; a CPU's has none and falls back to scores."""
    return _attention(*arguments, **{**options, "dropout_p": 0.0})


def _with_products(*arguments: Any, **options: Any) -> torch.Tensor:
    """What torch falls back to, on every device."""
    with sdpa_kernel(SDPBackend.MATH):
        return _attention(*arguments, **options)


def _computed_in_fp32(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """What autocast does with a function of its fp32 list."""

    def computed(*arguments: Any, **options: Any) -> torch.Tensor:
        if not torch.is_autocast_enabled("cpu"):
            return function(*arguments, **options)
        wide = [_in_fp32(value) for value in arguments]
        with torch.autocast("cpu", enabled=False):
            return function(*wide, **{name: _in_fp32(value) for name, value in options.items()})

    return computed


def _in_fp32(value: Any) -> Any:
    is_narrow = isinstance(value, torch.Tensor) and value.dtype in (torch.float16, torch.bfloat16)
    return value.float() if is_narrow else value
