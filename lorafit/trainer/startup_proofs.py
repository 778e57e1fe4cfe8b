"""Proofs on the loaded model before step 1: that it trains at all, and that packed documents do not see each other.

One gradient on one short row shows the first, and that every kind of adapter learns. Of documents which share a row:

    row          A A A A A B B B B      label only B
    change A     ? ? ? ? ? B B B B      B's logits stay, to rounding
    gradient     0 0 0 0 0 g g g g      of B's loss at the embeddings: exactly 0 at A's
    B alone      B B B B                the same logits as behind A: its positions begin anew

Restarted positions alone are tried first. Models that build no mask from them get an additive block-diagonal mask as
well, where each of their layers attends to the whole row, and the attention is not variable-length, which takes none.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from lorafit.console.wording import first_line, list_names
from lorafit.contracts import Batch, Example
from lorafit.errors import ModelError, NumericsError, RecipeError
from lorafit.objective import Objective
from lorafit.ops.isolation import in_mode
from lorafit.ops.logits_distance import ROUNDING, logits_distance
from lorafit.ops.process_memory import is_out_of_memory

_DOCUMENT_TOKENS = 32


def prove_gradients(objective: Objective, batch: Batch) -> None:
    """Runs forward and backward in training mode; gradients, modes and random numbers are left as they were.

    Raises:
        ModelError: The model's forward or backward fails in training mode.
        RecipeError: A kind of layer carries adapters that get no gradient anywhere: it reads its weight past them.
    """
    trained = [(name, parameter) for name, parameter in objective.named_parameters() if parameter.requires_grad]
    mark = str(getattr(getattr(objective.model, "base_model", None), "prefix", "lora_"))
    try:
        with in_mode(objective, training=True):
            objective(batch)[0].backward()
        reached = {_layer_kind(name, mark) for name, p in trained if p.grad is not None and bool(p.grad.any())}
    except (TypeError, ValueError, IndexError, NotImplementedError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise ModelError(
            f"{type(objective.base).__name__} cannot take a training step: {first_line(error)}",
            todo="use another base model, or another model.attention or model.quantization",
        ) from error
    finally:
        for _, parameter in trained:
            parameter.grad = None
    if idle := sorted({_layer_kind(name, mark) for name, _ in trained} - reached):
        others = ", ".join(sorted(reached)) or "other linears"
        raise RecipeError(
            f"the adapters of {list_names(idle)} get no gradient: the model reads those weights past them",
            key="adapter.target_modules",
            todo=f"name others: {others}",
        )


def _layer_kind(parameter: str, mark: str) -> str:
    """`q_proj` of `model.base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight`, or a head's name.

    Args:
        parameter: Its path in the objective.
        mark: What PEFT calls the method's parts: `lora_`.
    """
    return re.split(rf"\.(?:{re.escape(mark)}|modules_to_save\.)", parameter)[0].rsplit(".", 1)[-1]


def prove_separation(objective: Objective, rows: Sequence[Example], pad_id: int, *, one_row: bool) -> None:
    """Settles how packed rows are kept apart (`objective.masks_documents`), or refuses to pack.

    Modes, random numbers and gradients are left as they were.

    Args:
        objective: On its device, with the attention that will be used.
        rows: One or two rows of the run; their first tokens are the documents.
        pad_id: Fills up short rows.
        one_row: Whether micro-batches will be one row; else the proof has a second one, with padding.

    Raises:
        NumericsError: Documents see each other, however they are kept apart.
    """
    first, second = (_beginning(row) for row in (rows[0], rows[-1]))
    fault = ""
    for with_mask in (False, True):
        if with_mask and (one_row or not _attends_to_whole_rows(objective)):
            break
        objective.masks_documents = with_mask
        with in_mode(objective, training=False):
            found = _find_fault(objective, first, second, pad_id, one_row)
        if not found:
            return
        fault = fault or found
    config = objective.base.config
    raise NumericsError(
        f"{config.model_type} cannot be packed with {config._attn_implementation} attention: {fault}",
        key="data.packing",
        todo="set data.packing: false",
    )


def _find_fault(objective: Objective, first: Example, second: Example, pad_id: int, one_row: bool) -> str:
    """What is wrong, in words; empty where the documents do not see each other."""

    def pack(before: Example) -> Batch:
        rows = [[_unlabelled(before), second]] + ([] if one_row else [[_unlabelled(second)]])
        return objective.task.collate(rows, pad_id).to(objective.device)

    tokens = len(first["tokens"])
    others = np.resize(list(second["tokens"])[::-1], tokens).tolist()
    changed = replace(first, columns={**first.columns, "tokens": others})
    try:
        with torch.no_grad():
            behind, moved = objective.logits(pack(first)), objective.logits(pack(changed))
            alone = objective.logits(objective.batch_of(second, pad_id))
        gradient = _gradient_at(objective, pack(first))[:tokens]
    except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError) as error:
        if is_out_of_memory(error):
            raise
        return f"it does not run on packed rows ({type(error).__name__})"
    tolerance, unit = ROUNDING[objective.autocast_dtype], objective.task.logits_unit
    if bool(gradient.count_nonzero()) or not logits_distance(behind, moved, unit) <= tolerance:
        return "its documents see each other in a row (a state is carried on, or no mask made of their positions)"
    if not logits_distance(behind, alone, unit) <= tolerance:
        return "a document gives other logits there than alone (its positions do not begin anew)"
    return ""


def _gradient_at(objective: Objective, batch: Batch) -> torch.Tensor:
    """The gradient of the batch's loss at the input embeddings of its first row, [seq, hidden]."""
    leaves: list[torch.Tensor] = []

    def cut(_: torch.nn.Module, __: object, output: torch.Tensor) -> torch.Tensor:
        leaves.append(output.detach().requires_grad_())
        return leaves[-1].clone()  # a leaf may not be changed in place, and some models do

    with objective.base.get_input_embeddings().register_forward_hook(cut), torch.enable_grad():
        loss_sum, _ = objective(batch)
    return torch.autograd.grad(loss_sum, leaves[0])[0][0]


def _attends_to_whole_rows(objective: Objective) -> bool:
    """Whether one mask is right for every layer: no sliding windows, no chunks, no states."""
    config = objective.base.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or ["full_attention"]
    return set(kinds) == {"full_attention"} and getattr(config, "sliding_window", None) is None


def _beginning(row: Example) -> Example:
    """The first tokens of a row, all of them to be predicted."""
    ids = row["tokens"][:_DOCUMENT_TOKENS]
    return replace(row, columns={"tokens": ids, "trained": [1] * len(ids)})


def _unlabelled(row: Example) -> Example:
    return replace(row, columns={**row.columns, "trained": [0] * len(row["tokens"])})
