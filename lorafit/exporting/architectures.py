"""How a GGUF file describes a model: its architecture's name, its numbers, the names and row order of its tensors.

Only architectures whose logits were compared with llama.cpp's are here; every other one is refused.

Source: llama.cpp, convert_hf_to_gguf.py (LlamaModel, Qwen2Model, Qwen3Model), read and run beside it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lorafit.console.wording import list_names
from lorafit.contracts import JsonMapping
from lorafit.errors import ModelError

if TYPE_CHECKING:
    from gguf import GGUFWriter

_KNOWN = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
_TURNED = {"llama": {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}}
_ROPES = ("default", "linear", "llama3")
ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True)
class Architecture:
    """A model's config as GGUF files say it.

    Attributes:
        name: `general.architecture`.
        config: config.json.
    """

    name: str
    config: JsonMapping

    @classmethod
    def of(cls, config: JsonMapping, file: str) -> Architecture:
        """Raises ModelError where the architecture, or an option of it, is none whose conversion is proven."""
        kind = str(config.get("model_type"))
        todo = "use --to peft or --to vllm, or convert a merge with llama.cpp's own converter"
        if kind not in _KNOWN:
            what = f"no conversion of '{kind}' models to GGUF is proven here (known: {', '.join(_KNOWN)})"
            raise ModelError(what, file=file, todo=todo)
        found = cls(_KNOWN[kind], config)
        windowed = config.get("sliding_window") and (kind == "mistral" or config.get("use_sliding_window"))
        unknown = {
            f"hidden_act {config.get('hidden_act')}": config.get("hidden_act", "silu") != "silu",
            f"rope_type {found._rope_type}": found._rope_type not in _ROPES,
            "sliding_window": windowed,
            "mlp_bias": config.get("mlp_bias"),
        }
        if wrong := [name for name, is_there in unknown.items() if is_there]:
            raise ModelError(f"no conversion to GGUF is proven for {list_names(wrong)}", file=file, todo=todo)
        return found

    @property
    def _rope(self) -> JsonMapping:
        config = self.config
        older = {**(config.get("rope_scaling") or {}), "rope_theta": config.get("rope_theta", 10000.0)}
        return config.get("rope_parameters") or older

    @property
    def _rope_type(self) -> str:
        return str(self._rope.get("rope_type", self._rope.get("type", "default")))

    @property
    def head_size(self) -> int:
        """Features of one attention head."""
        heads = int(self.config["num_attention_heads"])
        return int(self.config.get("head_dim") or self.config["hidden_size"] // heads)

    def name_tensors(self, names: Iterable[str], file: str) -> dict[str, str]:
        """GGUF's names of the model's tensors. Raises ModelError where one has none."""
        import gguf

        number = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == self.name)
        table = gguf.get_tensor_name_map(number, int(self.config["num_hidden_layers"]))
        found = {name: table.get_name(name, try_suffixes=(".weight", ".bias")) for name in names}
        if unknown := [name for name, theirs in found.items() if theirs is None]:
            what = f"{len(unknown)} tensors have no name in a GGUF of '{self.name}' models ({list_names(unknown)})"
            raise ModelError(what, file=file, todo="use --to peft or --to vllm")
        return {name: theirs for name, theirs in found.items() if theirs is not None}

    def heads_turned(self, path: str) -> int | None:
        """How many heads' rows stand in another order in GGUF; None where none do.

        transformers keeps the two halves of a rotated head one behind the other, ggml's llama its pairs side by side.
        """
        key = _TURNED.get(self.name, {}).get(path.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2])
        return None if key is None else int(self.config.get(key) or self.config["num_attention_heads"])

    def describe(self, writer: GGUFWriter) -> None:
        """Writes the model's numbers."""
        config, rope = self.config, self._rope
        heads = int(config["num_attention_heads"])
        writer.add_block_count(int(config["num_hidden_layers"]))
        writer.add_context_length(int(config["max_position_embeddings"]))
        writer.add_embedding_length(int(config["hidden_size"]))
        writer.add_feed_forward_length(int(config["intermediate_size"]))
        writer.add_head_count(heads)
        writer.add_head_count_kv(int(config.get("num_key_value_heads") or heads))
        writer.add_key_length(self.head_size)
        writer.add_value_length(self.head_size)
        writer.add_layer_norm_rms_eps(float(config["rms_norm_eps"]))
        writer.add_rope_dimension_count(self.head_size)
        writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
        writer.add_vocab_size(int(config["vocab_size"]))
        if self._rope_type == "linear":
            import gguf

            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(float(rope["factor"]))

    def rope_factors(self) -> torch.Tensor | None:
        """By what llama.cpp divides each frequency of a `llama3` rope, `[head_size / 2]`; None for other ropes.

        Source: transformers.modeling_rope_utils._compute_llama3_parameters.
        """
        if self._rope_type != "llama3":
            return None
        rope, size = self._rope, self.head_size
        factor, low, high = (float(rope[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
        trained = float(rope["original_max_position_embeddings"])
        waves = 2 * math.pi * float(rope["rope_theta"]) ** (torch.arange(0, size, 2).double() / size)
        smooth = ((trained / waves - low) / (high - low)).clamp(0, 1)
        return (1 / ((1 - smooth) / factor + smooth)).float()


def turn_heads(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of whole heads, `[heads * size, ...]`, from transformers' order to ggml's: 0, h, 1, h + 1, ... of each."""
    half = rows.shape[0] // heads // 2
    return rows.reshape(heads, 2, half, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)
