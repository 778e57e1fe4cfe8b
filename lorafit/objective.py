"""The module of model and loss that training and evaluation share.

    fast    backbone -> last hidden states -> those that a label follows -> head and cross-entropy, in chunks
    exact   the model's own forward, its head fed with those hidden states alone: soft-caps and logit scales behind
            the head run too

`prove_objective` compares either with the model's own loss from full logits, on one row, before step 1, and refuses
what cannot learn to continue a text: models that need more than text, and those that see the tokens ahead.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn
from torch.nn import functional

from lorafit.contracts import LossSum
from lorafit.errors import ModelError, NumericsError
from lorafit.model.targets import output_head
from lorafit.ops.cross_entropy import linear_cross_entropy, score_linear, score_logits
from lorafit.ops.masks import block_diagonal_mask
from lorafit.ops.memory_errors import is_out_of_memory
from lorafit.ops.rng import preserved_rng

if TYPE_CHECKING:
    from lorafit.contracts import Batch, Example, Reporter

_Result = TypeVar("_Result")
_IGNORED_LABEL = -100  # what transformers leaves out of its loss
_TOLERANCE = {None: 1e-4, torch.float16: 1e-2, torch.bfloat16: 1e-2}  # relative; logits are rounded to the dtype
_PROBED_ROWS = 64
_AHEAD_TOLERANCE = {None: 1e-3, torch.float16: 5e-2, torch.bfloat16: 5e-2}  # of the largest change of a logit


class Objective(nn.Module):
    """Summed cross-entropy of a causal language model over the labels of a micro-batch.

    Args:
        model: The base model or a PEFT model around it.
        autocast_dtype: What the forward computes in; None: as the weights are (fp32).
        exact: Start on the exact path. It is also taken where the head is not a plain linear layer.

    Attributes:
        masks_documents: Whether packed rows get a mask beside their positions, for models that do not build one from
            positions alone. `lorafit.trainer.packing_isolation` finds out.
    """

    def __init__(self, model: nn.Module, *, autocast_dtype: torch.dtype | None = None, exact: bool = False) -> None:
        super().__init__()
        self.model = model
        self.autocast_dtype = autocast_dtype
        self.exact = exact or self._plain_head() is None
        self.masks_documents = False
        if autocast_dtype is not None:
            _let_autocast_cast(model)
            _keep_results_narrow(model)

    def forward(self, batch: Batch) -> LossSum:
        """Nats summed over the labels, the number of labels, and `correct` predictions."""
        with self._autocast(batch):
            if self.exact:
                logits = self.labelled_logits(batch)
                full = logits if logits.dtype == torch.float64 else logits.float()
                loss_sum = functional.cross_entropy(full, batch["label_ids"], reduction="sum")
                correct = (logits.detach().argmax(-1) == batch["label_ids"]).sum()
            else:
                loss_sum, correct = linear_cross_entropy(
                    self._labelled_states(batch), *self._head(), batch["label_ids"]
                )
        return LossSum(loss_sum, batch.weight, {"correct": correct})

    @torch.no_grad()
    def score(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Each label's loss, fp32 [labels], and whether it was the most likely token, bool [labels]."""
        with self._autocast(batch):
            if self.exact:
                return score_logits(self.labelled_logits(batch), batch["label_ids"])
            return score_linear(self._labelled_states(batch), *self._head(), batch["label_ids"])

    def own_loss(self, batch: Batch) -> torch.Tensor:
        """The model's own loss from full logits, summed over the labels: what `score` must agree with."""
        labels = torch.full_like(batch["input_ids"], _IGNORED_LABEL).flatten()
        labels[batch["label_index"] + 1] = batch["label_ids"]
        with torch.no_grad(), self._autocast(batch):
            outputs = self.model(**self._inputs(batch), labels=labels.view_as(batch["input_ids"]))
        loss: torch.Tensor = outputs.loss.double() * batch.weight
        return loss

    @torch.no_grad()
    def full_logits(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Logits of whole rows by the model's own forward, fp32 [batch, seq, vocabulary]."""
        kind = input_ids.device.type
        with torch.autocast(kind, dtype=self.autocast_dtype, enabled=self.autocast_dtype is not None):
            outputs = self.model(input_ids=input_ids, use_cache=False, return_dict=True)
        logits: torch.Tensor = outputs.logits
        return logits.float()

    @property
    def base(self) -> Any:
        """The transformers model, the PEFT model around it taken off."""
        model: Any = self.model
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    def _autocast(self, batch: Batch) -> contextlib.AbstractContextManager[object]:
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(batch["input_ids"].device.type, dtype=self.autocast_dtype)

    def _plain_head(self) -> nn.Linear | None:
        """The output embedding where it is a linear layer and nothing else (no adapter, not quantised, no wrapper)."""
        base = self.base
        head = output_head(base)
        has_backbone = isinstance(getattr(base, base.base_model_prefix, None), nn.Module)
        return head if type(head) is nn.Linear and has_backbone else None

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        """Arguments of a forward. Right-padded causal rows need no attention mask.

        Documents of packed rows are kept apart by positions that begin anew, with neither a mask nor a cache:
        transformers derives from them what each implementation needs (lengths of the documents, or its own mask).
        """
        inputs = {"input_ids": batch["input_ids"], "use_cache": False, "return_dict": True}
        positions = batch.tensors.get("position_ids")
        if positions is not None:
            inputs["position_ids"] = positions
            if self.masks_documents:
                dtype = self.autocast_dtype or self.base.dtype
                inputs["attention_mask"] = block_diagonal_mask(positions, dtype)
        return inputs

    def _head(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        head = output_head(self.base)
        return head.weight, head.bias

    def _labelled_states(self, batch: Batch) -> torch.Tensor:
        """Hidden states that a label follows, [labels, hidden]."""
        base = self.base
        backbone = getattr(base, base.base_model_prefix)
        hidden = backbone(**self._inputs(batch)).last_hidden_state
        states: torch.Tensor = hidden.flatten(0, 1).index_select(0, batch["label_index"])
        return states

    def labelled_logits(self, batch: Batch) -> torch.Tensor:
        """Logits of the labels, [labels, vocabulary], by the model's own forward."""
        with self._autocast(batch), _head_sees_only(output_head(self.base), batch["label_index"]):
            outputs = self.model(**self._inputs(batch))
        logits: torch.Tensor = outputs.logits.squeeze(0)
        return logits


@contextlib.contextmanager
def _head_sees_only(head: nn.Module, label_index: torch.Tensor) -> Iterator[None]:
    """The head gets [1, labels, hidden] instead of [batch, seq, hidden]; an integer index, so that no device waits."""

    def select(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        states = arguments[0].flatten(0, 1).index_select(0, label_index)
        return (states.unsqueeze(0), *arguments[1:])

    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


def _let_autocast_cast(model: nn.Module) -> None:
    """Adapters leave their input's dtype alone: autocast casts their fp32 weights instead, which are far smaller.

    PEFT would cast every input up to fp32 before autocast casts it down again.
    """
    for module in model.modules():
        if hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = False  # type: ignore[assignment]


def _keep_results_narrow(model: nn.Module) -> None:
    """CUDA's autocast computes LayerNorm and `pow` in fp32 and leaves the result so: cast back to the input's dtype.

    Else everything behind a norm is twice as wide, and with bitsandbytes' layers, which take no part in autocast and
    give back the dtype they got, the whole residual stream. On a CPU nothing is cast.
    """

    def narrow(module: nn.Module, arguments: tuple[torch.Tensor, ...], result: torch.Tensor) -> torch.Tensor:
        return result.to(arguments[0].dtype)

    for module in model.modules():
        if isinstance(module, nn.LayerNorm) or "GELU" in type(module).__name__:
            module.register_forward_hook(narrow)


def choose_probe(lengths: Sequence[int], *, most_tokens: int) -> int:
    """The row that proofs look at: of the first ones the longest that is no longer than that, else the shortest."""
    rows = range(min(len(lengths), _PROBED_ROWS))
    return max(rows, key=lambda row: lengths[row] if lengths[row] <= most_tokens else -lengths[row])


def cut_probe(example: Example, most_tokens: int) -> Example:
    """The row up to its last trained token, and of that the last `most_tokens`, at least 2: one label is among them."""
    trained = [place for place, flag in enumerate(example.trained) if flag]
    end = trained[-1] + 1 if trained else len(example.trained)
    kept = slice(max(0, end - max(2, most_tokens)), end)
    return replace(example, input_ids=example.input_ids[kept], trained=example.trained[kept])


def prove_objective(objective: Objective, batch: Batch, reporter: Reporter) -> None:
    """Compares the objective with the model's own loss from full logits, on one small batch (on the model's device).

    Where the fast path differs (soft-caps, logit scales, unusual heads) the objective goes over to the exact one, and
    says so. Modes and random numbers are left as they were.

    Raises:
        ModelError: The model runs on no text alone, or a token's logits depend on the tokens behind it.
        NumericsError: The exact path differs too, or the model's own loss is not finite.
    """
    was_training = objective.training
    objective.eval()
    try:
        with preserved_rng():
            refuse_what_is_not_causal(objective, batch)
            own = _on_text_alone(objective, lambda: float(objective.own_loss(batch)))
            if not torch.isfinite(torch.tensor(own)):
                raise NumericsError(
                    f"the model's own loss on one row is {own}",
                    todo="check the base model's weights, or use another model.dtype",
                )
            tolerance = _TOLERANCE[objective.autocast_dtype] * max(abs(own), 1.0)
            ours = float(objective.score(batch)[0].sum(dtype=torch.float64))
            if abs(ours - own) > tolerance and not objective.exact:
                reporter.warn(
                    f"the chunked loss ({ours:.6g}) is not this model's own ({own:.6g}): something stands behind its "
                    "head; going on with the exact path, which is slower"
                )
                objective.exact = True
                ours = float(objective.score(batch)[0].sum(dtype=torch.float64))
            if abs(ours - own) > tolerance or ours != ours:
                raise NumericsError(
                    f"the loss that would be trained ({ours:.6g}) is not the model's own ({own:.6g})",
                    todo="this architecture is not supported; please report it",
                )
    finally:
        objective.train(was_training)


def refuse_what_is_not_causal(objective: Objective, batch: Batch) -> None:
    """Runs the model on a row and on the same row with another end: the logits before that end must not move.

    Raises:
        ModelError: They do (an encoder such as BERT), or the model does not run on token ids alone.
    """
    ids = batch["input_ids"]
    changed = ids.clone()
    kept = ids.shape[1] - max(1, ids.shape[1] // 4)
    changed[:, kept:] = ids.flip(1)[:, kept:]  # the row's own tokens: some others stand for an image
    before = _on_text_alone(objective, lambda: objective.full_logits(ids))
    after = objective.full_logits(changed)
    moved = (before - after).abs().amax(dim=-1)
    allowed = _AHEAD_TOLERANCE[objective.autocast_dtype] * float(moved.max())
    if float(moved[:, :kept].max()) > allowed:
        raise ModelError(
            f"{type(objective.base).__name__} sees the tokens that it is to predict: it is no causal language model",
            todo="use a decoder-only model",
        )


def _on_text_alone(objective: Objective, run: Callable[[], _Result]) -> _Result:
    """What `run` gives; a model's own complaint about its arguments becomes ours."""
    try:
        return run()
    except (TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        name, lines = type(objective.base).__name__, str(error).strip().splitlines()
        why = lines[0] if lines else type(error).__name__
        raise ModelError(f"{name} does not run on text alone: {why}", todo="use a model that does") from error
