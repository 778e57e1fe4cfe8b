"""What a model is held to while it writes answers: none of its own penalties, logits of the last position alone.

Of an encoder-decoder's generation config stays what its answers begin with, and the tokens that it may never write:
they belong to how the model was trained. How answers are searched for is the recipe's: beams, length penalty, least and
longest length, sampling. An end that is forced at the longest length would hide that an answer was cut.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from lorafit.model.tokenizer_files import OF_DECODERS
from lorafit.ops.isolation import as_whole
from lorafit.ops.output_head import output_head

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lorafit.contracts import JsonMapping


def room_of(model: PreTrainedModel, prompt_tokens: int, longest: int) -> int:
    """New tokens that the model has positions for behind a prompt, at most `longest`; less than 1: none.

    An encoder-decoder reads and writes at positions of their own. Nothing bounds those of a model that names no number.
    """
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    if not model.config.is_encoder_decoder:
        return longest if limit is None else min(longest, limit - prompt_tokens)
    read = getattr(getattr(model.config, "encoder", config), "max_position_embeddings", None)
    if read is not None and prompt_tokens > read:
        return 0
    return longest if limit is None else min(longest, limit)


def begin_as(model: PreTrainedModel, generation: JsonMapping) -> None:
    """Has an encoder-decoder begin its answers as a run says, for good: in the language of its targets."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    for name in ("decoder_start_token_id", "forced_bos_token_id") if model.config.is_encoder_decoder else ():
        if name in generation:
            setattr(inner.generation_config, name, generation[name])


@contextlib.contextmanager
def plain_generation(model: PreTrainedModel, stops: list[int]) -> Iterator[None]:
    """A neutral generation config in place of the model's own, whose penalties and sampling `generate` would mix in.

    Meanwhile adapters cast their input to their own dtype, as they do for whoever loads them with PEFT, unless the
    caller computes under autocast, which casts their weights instead; the objective may have left them either way.
    """
    from transformers import GenerationConfig

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    own = inner.generation_config
    modules = [module for module in model.modules() if hasattr(module, "cast_input_dtype_enabled")]
    casts = [(module, module.cast_input_dtype_enabled) for module in modules]
    autocast = torch.is_autocast_enabled(model.get_input_embeddings().weight.device.type)
    for module, _ in casts:
        module.cast_input_dtype_enabled = not autocast
    kept = {name: getattr(own, name, None) for name in OF_DECODERS} if model.config.is_encoder_decoder else {}
    pad = stops[0] if stops else 0
    inner.generation_config = GenerationConfig(eos_token_id=stops or None, pad_token_id=pad, **kept)
    try:
        yield
    finally:
        inner.generation_config = own
        for module, cast in casts:
            module.cast_input_dtype_enabled = cast


@contextlib.contextmanager
def head_sees_last(model: PreTrainedModel) -> Iterator[None]:
    """The output head gets the last position alone, [batch, 1, hidden], in one piece: no other logits are read.

    `generate` hands it a slice of the prompt's hidden states, or all of them where the model knows no
    `logits_to_keep`. On a CPU such a slice makes a copy of the weight for each row (see `as_whole`): 1.6 GiB and 16 s
    instead of 0.06 s for 8 rows and a vocabulary of 262,144.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = output_head(inner)

    def take_last(_: torch.nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not arguments or not torch.is_tensor(arguments[0]) or arguments[0].ndim != 3:
            return None
        return (as_whole(arguments[0][:, -1:]), *arguments[1:])

    with head.register_forward_pre_hook(take_last) if head is not None else contextlib.nullcontext():
        yield
