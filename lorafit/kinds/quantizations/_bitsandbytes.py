"""What every quantisation of bitsandbytes shares."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from lorafit.contracts import JsonObject
from lorafit.files.safetensors import AnyEntry, read_rows, row_blocks
from lorafit.kinds.quantizations import Packed
from lorafit.kinds.registry import S_co

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import BitsAndBytesConfig, PreTrainedModel

    from lorafit.facts import LinearShape


def is_layer(layer: nn.Module, name: str) -> bool:
    """Whether a layer is bitsandbytes' own of that name; PEFT's around it are called the same."""
    return type(layer).__name__ == name and type(layer).__module__.startswith("bitsandbytes.")


def rounded_blocks(
    entry: AnyEntry, dtype: torch.dtype, *, transposed: bool, multiple: int = 1
) -> Iterator[tuple[int, int, torch.Tensor]]:
    """A weight `[out, in]` as it was before it was quantised, some rows at a time: (first row, end, values).

    Args:
        entry: In the file.
        dtype: What it was rounded to.
        transposed: Whether it lies `[in, out]` in the file; it is read whole then.
        multiple: Each stretch of rows holds a multiple of so many values.
    """
    source = read_rows(entry).t() if transposed else None
    for start, stop in row_blocks(*(entry.shape if source is None else source.shape), multiple=multiple):
        yield start, stop, (read_rows(entry, start, stop) if source is None else source[start:stop]).to(dtype)


class BitsandbytesKind(Packed[S_co]):
    """Linears of bitsandbytes, put in place and loaded by transformers."""

    def workspace_bytes(self, largest: LinearShape, dtype_bytes: int) -> int:
        """The dequantised copy of one weight."""
        return largest.in_features * largest.out_features * dtype_bytes

    @abstractmethod
    def settings(self, compute_dtype: torch.dtype) -> JsonObject:
        """Arguments of transformers' BitsAndBytesConfig that say what a weight becomes."""

    def transformers_config(self, compute_dtype: torch.dtype, skip_modules: Sequence[str]) -> BitsAndBytesConfig:
        """transformers' BitsAndBytesConfig."""
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(**self.settings(compute_dtype), llm_int8_skip_modules=list(skip_modules))

    def replace_linears(self, model: PreTrainedModel, compute_dtype: torch.dtype, skip_modules: Sequence[str]) -> None:
        """transformers' replacement, and the marks by which PEFT finds its own layers."""
        from transformers.integrations.bitsandbytes import replace_with_bnb_linear

        config = self.transformers_config(compute_dtype, skip_modules)
        replace_with_bnb_linear(model, modules_to_not_convert=list(skip_modules), quantization_config=config)
        model.is_loaded_in_4bit, model.is_loaded_in_8bit = config.load_in_4bit, config.load_in_8bit
