"""Losses and logits of next tokens: what every task on a causal language model computes with.

fast    backbone -> last hidden states -> those that a label follows -> head and cross-entropy, in chunks
exact   the model's own forward, its head fed with those hidden states alone: soft-caps and logit scales behind
        the head run too

input_ids      [sequences, tokens]   right-padded; causal models need no attention mask then
position_ids   [sequences, tokens]   where rows hold several documents: from 0 in each, and in the padding
bounds         [documents + 1]       where the documents of one packed row begin, and its end
label_index    [labels]              flat position (sequence * tokens + column) whose hidden state predicts ...
label_ids      [labels]              ... this token. Position t predicts token t + 1, so column < tokens - 1.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from lorafit.console.wording import first_line
from lorafit.contracts import JsonObject, LossSum
from lorafit.errors import ModelError
from lorafit.ops.attention_kernels import VARIABLE_LENGTH_ATTENTION
from lorafit.ops.cross_entropy import linear_cross_entropy, linear_label_losses, score_linear, score_logits
from lorafit.ops.masks import block_diagonal_mask
from lorafit.ops.output_head import output_head
from lorafit.ops.process_memory import is_out_of_memory
from lorafit.ops.virtual_tokens import count_virtual_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lorafit.contracts import Batch
    from lorafit.objective import Objective

_Result = TypeVar("_Result")
_IGNORED_LABEL = -100  # what transformers leaves out of its loss
_AHEAD_TOLERANCE = {None: 1e-3, torch.float16: 5e-2, torch.bfloat16: 5e-2}  # of the largest change of a logit


def label_tokens(
    rows: Sequence[Sequence[tuple[Sequence[float], Sequence[float]]]], pad_id: int, pads_to: int = 1
) -> dict[str, torch.Tensor]:
    """Tensors of a micro-batch of padded sequences; `position_ids` among them where a sequence holds several documents,
    and `bounds` where that is the only one.

    Position t of a sequence predicts its token t + 1, so the label of token t stands at index t - 1. A document's first
    token is never a label: it would be predicted from the document before it.

    Args:
        rows: Documents of each sequence, at least one, as (token ids, 0/1 for each: whether it is to be predicted).
        pad_id: Any valid id; no label ever points at a padded position.
        pads_to: The padded length is a multiple of it.
    """
    longest = max(sum(len(ids) for ids, _ in documents) for documents in rows)
    width = math.ceil(longest / pads_to) * pads_to
    input_ids = np.full((len(rows), width), pad_id, dtype=np.int64)
    positions = np.empty_like(input_ids)
    indices = []
    for row, documents in enumerate(rows):
        begin = 0
        for ids, trained in documents:
            end = begin + len(ids)
            input_ids[row, begin:end] = ids
            positions[row, begin:end] = np.arange(end - begin)
            indices.append(row * width + begin + np.flatnonzero(np.asarray(trained, dtype=np.uint8)[1:]))
            begin = end
        positions[row, begin:] = np.arange(width - begin)
    index = np.concatenate(indices).astype(np.int64)
    arrays = {"input_ids": input_ids, "label_index": index, "label_ids": input_ids.reshape(-1)[index + 1]}
    if any(len(documents) > 1 for documents in rows):
        arrays["position_ids"] = positions
        if len(rows) == 1 and width == longest:
            arrays["bounds"] = np.cumsum([0, *(len(ids) for ids, _ in rows[0])], dtype=np.int32)
    return {name: torch.from_numpy(values) for name, values in arrays.items()}


def has_fast_path(model: PreTrainedModel) -> bool:
    """Whether the output embedding is a linear layer and nothing else (no adapter, not quantised, no wrapper) behind a
    backbone of its own, and no adapter stands outside of both, as trained vectors before the tokens do.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    has_backbone = isinstance(getattr(base, base.base_model_prefix, None), nn.Module)
    return type(output_head(base)) is nn.Linear and has_backbone and count_virtual_tokens(model) == 0


def sum_cross_entropy(objective: Objective, batch: Batch) -> LossSum:
    """Nats summed over the labels, and the number of labels."""
    if objective.exact:
        return LossSum(_exact_losses(objective, batch, "sum"), batch.weight)
    head, states = output_head(objective.base), _labelled_states(objective, batch)
    labels, chunk_bytes = batch["label_ids"], objective.loss_chunk_bytes
    loss_sum = linear_cross_entropy(states, head.weight, head.bias, labels, chunk_bytes, objective.kernels)
    return LossSum(loss_sum, batch.weight)


def label_losses(objective: Objective, batch: Batch) -> torch.Tensor:
    """Each label's loss in nats, fp32 [labels], with a gradient; for losses that are no plain sum of them."""
    if objective.exact:
        return _exact_losses(objective, batch, "none")
    head, states = output_head(objective.base), _labelled_states(objective, batch)
    return linear_label_losses(states, head.weight, head.bias, batch["label_ids"], objective.loss_chunk_bytes)


def score_labels(objective: Objective, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Each label's loss, fp32 [labels], and whether it was the most likely token, bool [labels]; without gradients."""
    if objective.exact:
        return score_logits(labelled_logits(objective, batch), batch["label_ids"])
    head, states = output_head(objective.base), _labelled_states(objective, batch)
    return score_linear(states, head.weight, head.bias, batch["label_ids"], objective.loss_chunk_bytes)


def own_loss(objective: Objective, batch: Batch) -> torch.Tensor:
    """The model's own loss from full logits, summed over the labels in fp64.

    Raises:
        ModelError: The model runs on no text alone, or a token's logits depend on the tokens behind it.
    """
    labels = torch.full_like(batch["input_ids"], _IGNORED_LABEL).flatten()
    labels[batch["label_index"] + 1] = batch["label_ids"]
    labels = labels.view_as(batch["input_ids"])
    _refuse_what_is_not_causal(objective, batch)
    outputs = _on_text_alone(objective, lambda: objective.model(**_inputs(objective, batch), labels=labels))
    loss: torch.Tensor = outputs.loss.double() * len(batch["label_ids"])
    return loss


def labelled_logits(objective: Objective, batch: Batch) -> torch.Tensor:
    """Logits of the labels, [labels, vocabulary], by the model's own forward."""
    with _head_sees_only(output_head(objective.base), batch["label_index"], batch["input_ids"].shape[1]):
        outputs = objective.model(**_inputs(objective, batch))
    logits: torch.Tensor = outputs.logits.squeeze(0)
    return logits


def _exact_losses(objective: Objective, batch: Batch, reduction: str) -> torch.Tensor:
    logits = labelled_logits(objective, batch)
    full = logits if logits.dtype == torch.float64 else logits.float()
    return functional.cross_entropy(full, batch["label_ids"], reduction=reduction)


def _labelled_states(objective: Objective, batch: Batch) -> torch.Tensor:
    """Hidden states that a label follows, [labels, hidden]."""
    backbone = getattr(objective.base, objective.base.base_model_prefix)
    hidden = backbone(**_inputs(objective, batch)).last_hidden_state
    states: torch.Tensor = hidden.flatten(0, 1).index_select(0, batch["label_index"])
    return states


def _inputs(objective: Objective, batch: Batch) -> JsonObject:
    """Arguments of a forward. Right-padded causal rows need no attention mask.

    Documents of packed rows are kept apart by positions that begin anew, with neither a mask nor a cache: transformers
    derives from them what each implementation needs. Variable-length attention is told where documents begin besides,
    else each layer would ask the device.
    """
    inputs: JsonObject = {"input_ids": batch["input_ids"], "use_cache": False, "return_dict": True}
    positions = batch.tensors.get("position_ids")
    if positions is not None:
        inputs["position_ids"] = positions
        if objective.masks_documents:
            dtype = objective.autocast_dtype or objective.base.dtype
            inputs["attention_mask"] = block_diagonal_mask(positions, dtype)
    bounds, config = batch.tensors.get("bounds"), objective.base.config
    if bounds is not None and config.get_text_config()._attn_implementation in VARIABLE_LENGTH_ATTENTION:
        inputs |= dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), bounds)
        inputs |= dict.fromkeys(("max_length_q", "max_length_k"), batch.longest_document)
    return inputs


@contextlib.contextmanager
def _head_sees_only(head: nn.Module, label_index: torch.Tensor, columns: int) -> Iterator[None]:
    """The head gets [1, labels, hidden] instead of [batch, seq, hidden]; an integer index, so that no device waits.

    Of a sequence that an adapter begins with vectors of its own, the last `columns` positions are the tokens.
    """

    def select(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        states = arguments[0][:, -columns:].flatten(0, 1).index_select(0, label_index)
        return (states.unsqueeze(0), *arguments[1:])

    with head.register_forward_pre_hook(select):
        yield


def _refuse_what_is_not_causal(objective: Objective, batch: Batch) -> None:
    """Runs the model on a row and on the same row with another end: the logits before that end must not move.

    Raises:
        ModelError: They do (an encoder such as BERT), or the model does not run on token ids alone.
    """
    ids = batch["input_ids"]
    changed = ids.clone()
    kept = ids.shape[1] - max(1, ids.shape[1] // 4)
    changed[:, kept:] = ids.flip(1)[:, kept:]  # the row's own tokens: some others stand for an image
    before = _on_text_alone(objective, lambda: _full_logits(objective, ids))
    after = _full_logits(objective, changed)
    moved = (before - after).abs().amax(dim=-1)
    allowed = _AHEAD_TOLERANCE[objective.autocast_dtype] * float(moved.max())
    if float(moved[:, :kept].max()) > allowed:
        raise ModelError(
            f"{type(objective.base).__name__} sees the tokens that it is to predict: it is no causal language model",
            todo="use a decoder-only model",
        )


def _full_logits(objective: Objective, input_ids: torch.Tensor) -> torch.Tensor:
    """Logits of whole rows by the model's own forward, fp32 [batch, seq, vocabulary]."""
    logits: torch.Tensor = objective.model(input_ids=input_ids, use_cache=False, return_dict=True).logits
    return logits.float()


def _on_text_alone(objective: Objective, run: Callable[[], _Result]) -> _Result:
    """What `run` gives; a model's own complaint about its arguments becomes ours."""
    try:
        return run()
    except (TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        what = f"{type(objective.base).__name__} does not run on text alone: {first_line(error)}"
        raise ModelError(what, todo="use a model that does") from error
