"""Losses and logits of next tokens: what every task on a language model computes with.

fast    backbone -> last hidden states -> those that a label follows -> head and cross-entropy, in chunks
        of an encoder-decoder, which may scale states before its head and add a bias behind it: the model's own forward,
        its head fed with a zero; the states are those that would have gone in, and the bias is what came out
exact   the model's own forward, its head fed with those hidden states alone: soft-caps and logit scales behind
        the head run too

input_ids      [sequences, tokens]   right-padded; causal models need no attention mask then
position_ids   [sequences, tokens]   where rows hold several documents: from 0 in each, and in the padding
bounds         [documents + 1]       where the documents of one packed row begin, and its end
label_index    [labels]              flat position (sequence * tokens + column) whose hidden state predicts ...
label_ids      [labels]              ... this token. Position t predicts token t + 1, so column < tokens - 1.

Of an encoder-decoder the labels are a text of their own, and a flat position is one of the decoder's:

attention_mask [sequences, tokens]   0 where a source is padding
decoder_labels [sequences, targets]  what each of the decoder's positions predicts; -100 where it is padding
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from lorafit.console.wording import first_line
from lorafit.contracts import JsonObject, LossSum
from lorafit.errors import ModelError
from lorafit.ops.attention_kernels import VARIABLE_LENGTH_ATTENTION
from lorafit.ops.cross_entropy import linear_cross_entropy, linear_label_losses, score_linear, score_logits
from lorafit.ops.isolation import tokens_apart
from lorafit.ops.masks import block_diagonal_mask
from lorafit.ops.output_head import output_head
from lorafit.ops.process_memory import is_out_of_memory
from lorafit.ops.virtual_tokens import count_virtual_tokens

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

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


def label_targets(rows: Sequence[tuple[Sequence[float], Sequence[float]]], pad_id: int) -> dict[str, torch.Tensor]:
    """Tensors of a micro-batch of sources and their targets, each padded on the right.

    Args:
        rows: Token ids of source and target.
        pad_id: Any valid id.
    """
    widths = [max(len(row[side]) for row in rows) for side in range(2)]
    input_ids = np.full((len(rows), widths[0]), pad_id, dtype=np.int64)
    mask, labels = np.zeros_like(input_ids), np.full((len(rows), widths[1]), _IGNORED_LABEL, dtype=np.int64)
    for number, (source, target) in enumerate(rows):
        input_ids[number, : len(source)], mask[number, : len(source)] = source, 1
        labels[number, : len(target)] = target
    index = np.flatnonzero(labels != _IGNORED_LABEL)
    placed = {"label_index": index, "label_ids": labels.reshape(-1)[index]}
    arrays = {"input_ids": input_ids, "attention_mask": mask, "decoder_labels": labels, **placed}
    return {name: torch.from_numpy(values) for name, values in arrays.items()}


def has_fast_path(model: PreTrainedModel) -> bool:
    """Whether the output embedding is a linear layer and nothing else (no adapter, not quantised, no wrapper) behind a
    backbone of its own or a decoder, and no adapter stands outside of both, as trained vectors before the tokens do.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    has_backbone = base.config.is_encoder_decoder or isinstance(getattr(base, base.base_model_prefix, None), nn.Module)
    return type(output_head(base)) is nn.Linear and has_backbone and count_virtual_tokens(model) == 0


def sum_cross_entropy(objective: Objective, batch: Batch) -> LossSum:
    """Nats summed over the labels, and the number of labels."""
    if objective.exact:
        return LossSum(_exact_losses(objective, batch, "sum"), batch.weight)
    states, weight, bias = _labelled_states(objective, batch)
    labels, chunk_bytes = batch["label_ids"], objective.loss_chunk_bytes
    return LossSum(linear_cross_entropy(states, weight, bias, labels, chunk_bytes, objective.kernels), batch.weight)


def label_losses(objective: Objective, batch: Batch) -> torch.Tensor:
    """Each label's loss in nats, fp32 [labels], with a gradient; for losses that are no plain sum of them."""
    if objective.exact:
        return _exact_losses(objective, batch, "none")
    return linear_label_losses(*_labelled_states(objective, batch), batch["label_ids"], objective.loss_chunk_bytes)


def score_labels(objective: Objective, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Each label's loss, fp32 [labels], and whether it was the most likely token, bool [labels]; without gradients."""
    if objective.exact:
        return score_logits(labelled_logits(objective, batch), batch["label_ids"])
    return score_linear(*_labelled_states(objective, batch), batch["label_ids"], objective.loss_chunk_bytes)


def score_rows(objective: Objective, batch: Batch) -> dict[str, NDArray[np.float64]]:
    """Of each row: summed loss, labels, and those whose most likely prediction was right, [rows] each."""
    losses, correct = score_labels(objective, batch)
    rows = batch["label_index"] // _labelled_columns(batch)
    values = torch.stack([losses.double(), torch.ones_like(losses).double(), correct.double()]).cpu().numpy()
    owners = rows.cpu().numpy()
    loss, tokens, right = (
        np.bincount(owners, weights, minlength=len(batch.rows)).astype(np.float64) for weights in values
    )
    return {"loss": loss, "weight": tokens, "tokens": tokens, "correct": right}


def own_loss(objective: Objective, batch: Batch) -> torch.Tensor:
    """The model's own loss from full logits, summed over the labels in fp64.

    Raises:
        ModelError: The model runs on no text alone, or a token's logits depend on the tokens behind it.
    """
    inputs = _inputs(objective, batch)
    if "decoder_labels" in batch.tensors:
        labels = batch["decoder_labels"]
        del inputs["decoder_input_ids"]  # the model is to shift the labels by itself
    else:
        labels = torch.full_like(batch["input_ids"], _IGNORED_LABEL).flatten()
        labels[batch["label_index"] + 1] = batch["label_ids"]
        labels = labels.view_as(batch["input_ids"])
        _refuse_what_is_not_causal(objective, batch)
    with warnings.catch_warnings():  # an EncoderDecoderModel tells whoever gives it labels of a change in 2021
        warnings.simplefilter("ignore", FutureWarning)
        outputs = _on_text_alone(objective, lambda: objective.model(**inputs, labels=labels))
    loss: torch.Tensor = outputs.loss.double() * len(batch["label_ids"])
    return loss


def labelled_logits(objective: Objective, batch: Batch) -> torch.Tensor:
    """Logits of the labels, [labels, vocabulary], by the model's own forward."""
    with _head_sees_only(output_head(objective.base), batch["label_index"], _labelled_columns(batch)):
        outputs = objective.model(**_inputs(objective, batch))
    logits: torch.Tensor = outputs.logits.squeeze(0)
    return logits


def _exact_losses(objective: Objective, batch: Batch, reduction: str) -> torch.Tensor:
    logits = labelled_logits(objective, batch)
    full = logits if logits.dtype == torch.float64 else logits.float()
    return functional.cross_entropy(full, batch["label_ids"], reduction=reduction)


def _labelled_columns(batch: Batch) -> int:
    """Positions of each sequence that labels are counted by."""
    return int(batch.tensors.get("decoder_labels", batch["input_ids"]).shape[1])


def _labelled_states(objective: Objective, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Hidden states that a label follows, [labels, hidden], and the weight and bias that make logits of them.

    Raises:
        ModelError: An encoder-decoder's head reads no state for each position.
    """
    base, head = objective.base, output_head(objective.base)
    if "decoder_labels" in batch.tensors:
        with _head_sees_zero(head) as seen:
            bias = base(**_inputs(objective, batch)).logits.flatten().detach()
        hidden = seen[0]
        if hidden.shape[:2] != batch["decoder_labels"].shape:
            what = f"{type(base).__name__} predicts something else than one token at each position of a target"
            raise ModelError(what, todo="use another base model")
    else:
        hidden, bias = getattr(base, base.base_model_prefix)(**_inputs(objective, batch)).last_hidden_state, head.bias
    return hidden.flatten(0, 1).index_select(0, batch["label_index"]), head.weight, bias


@contextlib.contextmanager
def _head_sees_zero(head: nn.Module) -> Iterator[list[torch.Tensor]]:
    """The head gets one state of zeros, and its logits are the bias of whatever stands behind; gives the states that it
    would have got.
    """
    seen: list[torch.Tensor] = []

    def keep(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        seen.append(arguments[0])
        return (torch.zeros_like(arguments[0][:1, :1]), *arguments[1:])

    with head.register_forward_pre_hook(keep):
        yield seen


def _inputs(objective: Objective, batch: Batch) -> JsonObject:
    """Arguments of a forward. Right-padded causal rows need no attention mask; sources, which are read at once, do.

    Documents of packed rows are kept apart by positions that begin anew, with neither a mask nor a cache: transformers
    derives from them what each implementation needs. Variable-length attention is told where documents begin besides,
    else each layer would ask the device.
    """
    inputs: JsonObject = {"input_ids": batch["input_ids"], "use_cache": False, "return_dict": True}
    if "decoder_labels" in batch.tensors:
        shifted = _shift(objective.base, batch["decoder_labels"])
        return {**inputs, "attention_mask": batch["attention_mask"], "decoder_input_ids": shifted}
    inputs |= {name: batch[name] for name in batch.attached}
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


def _shift(base: Any, labels: torch.Tensor) -> torch.Tensor:
    """What a decoder reads to predict labels, [sequences, targets]: its start token, then all of them but the last.

    By the model's own function; a few (M2M100, Blenderbot) have that inside of their forward alone.

    Raises:
        ModelError: The model's config names no start token, or none that fills up.
    """
    try:
        if hasattr(base, "prepare_decoder_input_ids_from_labels"):
            shifted: torch.Tensor = base.prepare_decoder_input_ids_from_labels(labels=labels)
            return shifted
        start, pad = base.config.decoder_start_token_id, base.config.pad_token_id
        begin = torch.full_like(labels[:, :1], start)
        return torch.cat([begin, labels[:, :-1].masked_fill(labels[:, :-1] == _IGNORED_LABEL, pad)], dim=1)
    except (ValueError, TypeError) as error:
        todo = "set decoder_start_token_id and pad_token_id there"
        raise ModelError(f"says not how targets begin: {first_line(error)}", file="config.json", todo=todo) from error


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

    Tokens that stand for an image stay, since there are as many of them as the image gives states.

    Raises:
        ModelError: They do (an encoder such as BERT), or the model does not run on token ids alone.
    """
    ids = batch["input_ids"]
    changed = ids.clone()
    kept = ids.shape[1] - max(1, ids.shape[1] // 4)
    other, stays = ids.flip(1), torch.zeros_like(ids, dtype=torch.bool)  # the row's own: some others mean an image
    if batch.attached:
        stays = torch.isin(torch.stack([ids, other]), ids.new_tensor(image_tokens(objective.base.config))).any(0)
    changed[:, kept:] = torch.where(stays, ids, other)[:, kept:]
    with tokens_apart(objective.model):
        before = _on_text_alone(objective, lambda: _full_logits(objective, batch, ids))
        after = _full_logits(objective, batch, changed)
    moved = (before - after).abs().amax(dim=-1)
    allowed = _AHEAD_TOLERANCE[objective.autocast_dtype] * float(moved.max())
    if float(moved[:, :kept].max()) > allowed:
        raise ModelError(
            f"{type(objective.base).__name__} sees the tokens that it is to predict: it is no causal language model",
            todo="use a decoder-only model",
        )


def image_tokens(config: PretrainedConfig) -> list[int]:
    """Tokens that a model puts the states of an image in the place of, by its config."""
    names = ("image_token_id", "image_token_index")
    return [value for name in names if isinstance(value := getattr(config, name, None), int)]


def _full_logits(objective: Objective, batch: Batch, input_ids: torch.Tensor) -> torch.Tensor:
    """Logits of whole rows by the model's own forward, fp32 [batch, seq, vocabulary]."""
    attached = {name: batch[name] for name in batch.attached}
    logits: torch.Tensor = objective.model(input_ids=input_ids, use_cache=False, return_dict=True, **attached).logits
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
