"""A merge against what it was made from: logits of the merged model and of the adapter on its base, on real prompts.

    adapter on NF4 --logits--> p        KL(p || q) a position, top-1 agreement, largest |difference|,
    merged weights --logits--> q        mean cross-entropy over the rows' own labels for both

Both compute in fp32, on the weights as they are: quantised, and merged as written. In bf16 the rounding of activations
alone makes a KL of 0.007 on chats of SmolLM2-135M, for the adapter as much as for its merge, and would hide the merge's
own error (0.0008). Where both models do not fit into memory together, the streaming check of the merge stands alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from lorafit.console.wording import counted
from lorafit.errors import NumericsError
from lorafit.kinds.quantizations import Packed, QuantizationSection, kind_of_codes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lorafit.contracts import Example, Reporter
    from lorafit.objective import Objective

KL_LIMIT = 0.02
"""Mean KL in nats a label above which a merge into the base that was trained on is called wrong.

Rounding the merged weights to bf16 gave 2e-6 on SmolLM2-135M in NF4, whose values lie anywhere between the steps of
bf16. Where the base itself is bf16, updates of less than half a step are rounded away: 0.004 after four steps, and less
the longer a run is. Merging into other weights than training's gave 0.18.
"""
FEW_LABELS = 256
"""Below this many, as of rows with one class each, the mean KL is that of a few distributions: see `require_parity`."""
UPDATE_SHARE = 0.05
"""Of KL(adapter || adapter without its update), what rounding may lose where labels are few: 0.013 after four steps."""
CLEAR_MARGIN = 0.2
"""A first choice that the adapter gives at least this much more probability than another is no near tie."""


@dataclass(frozen=True, slots=True)
class Parity:
    """How near the merged model is to the adapter on its base.

    Attributes:
        rows: Prompts compared.
        tokens: Labels compared: of a causal model every token behind the first.
        max_logit_difference: Largest |difference| of any logit.
        mean_kl: Mean over positions of KL(adapter || merged), in nats.
        max_kl: Its largest value at any position.
        top1_agreement: Share of positions whose most likely token is the same, 0 to 1.
        adapter_loss: Mean cross-entropy of the adapter on its base over the labels that are trained, in nats.
        merged_loss: The same of the merged model.
        clear_flips: Labels whose first choice is another one and was no near tie.
        update_kl: Mean KL(adapter || adapter without its update of weights, its head kept), in nats: all that a merge
            could lose. Measured where labels are few and `mean_kl` is above the limit.
    """

    rows: int
    tokens: int
    max_logit_difference: float
    mean_kl: float
    max_kl: float
    top1_agreement: float
    adapter_loss: float
    merged_loss: float
    clear_flips: int = 0
    update_kl: float | None = None

    def to_json(self) -> dict[str, float | int]:
        """Plain values for `--json` and the report."""
        return asdict(self)

    def describe(self) -> list[str]:
        """For people, line by line."""
        where = f"{counted(self.rows, 'row')} ({counted(self.tokens, 'label')})"
        return [
            f"logits of merged against adapter on {where}: mean KL {self.mean_kl:.2g}",
            f"largest difference {self.max_logit_difference:.3g}, same first choice {self.top1_agreement:.1%}",
            f"loss on them: {self.merged_loss:.4f} merged, {self.adapter_loss:.4f} adapter",
        ]


def compare_merge(
    adapted: Objective, merged: Objective, rows: Sequence[Example], pad_id: int, reporter: Reporter
) -> Parity:
    """Runs both models over the same rows, one row at a time, in eval mode, in fp32 and without gradients.

    Both are left as they were: modes, dtypes and values.

    Args:
        adapted: Around the one adapter on the base it was trained on, without autocast.
        merged: Around the merged model, loaded plainly.
        rows: Prepared rows of the task; those without a label are left out.
        pad_id: Any valid id.
        reporter: Shows progress.

    Raises:
        NumericsError: No row to compare, or logits that are not finite.
    """
    import torch

    found = []
    update_kl = None
    bar = reporter.track(len(rows), "comparing logits")
    with fp32_compute(adapted.model), fp32_compute(merged.model), torch.no_grad(), bar:
        for row in rows:
            batch = adapted.task.collate_whole(row, pad_id)
            if len(batch["label_ids"]):
                p, q = (each.logits(batch.to(each.device)).float().cpu() for each in (adapted, merged))
                found.append(_sums(p, q, batch["label_ids"], batch.tensors.get("counted")))
            bar.advance()
        if not found:
            raise NumericsError("no row to compare the merge on", todo="give rows of two tokens or more")
        *columns, differences, kls = zip(*found, strict=True)
        tokens, kl, same, flips, labels, adapter_loss, merged_loss = map(sum, columns)
        if tokens < FEW_LABELS and kl / tokens > KL_LIMIT:
            update_kl = _measure_update(adapted, rows, pad_id)
    return Parity(
        rows=len(found),
        tokens=tokens,
        max_logit_difference=max(differences),
        mean_kl=kl / tokens,
        max_kl=max(kls),
        top1_agreement=same / tokens,
        adapter_loss=adapter_loss / max(1, labels),
        merged_loss=merged_loss / max(1, labels),
        clear_flips=flips,
        update_kl=update_kl,
    )


@contextlib.contextmanager
def fp32_compute(model: PreTrainedModel) -> Iterator[None]:
    """Within it the model is in eval mode and computes in fp32 with the weights it has.

    Plain weights become fp32 and afterwards what they were, which loses nothing. Quantised linears multiply with their
    dequantised values on every device, where bitsandbytes' own int8 products would round activations to 8 bits too.
    """
    modes = [(module, module.training) for module in model.modules()]
    quantised = [(module, kind) for module in model.modules() if (kind := kind_of_codes(module)) is not None]
    casts = [(p, p.dtype) for p in model.parameters() if p.is_floating_point() and p.dtype is not torch.float32]
    model.eval()
    try:
        for parameter, _ in casts:
            parameter.data = parameter.data.float()
        for module, kind in quantised:
            module.forward = partial(_multiply_unpacked, module, kind)
        yield
    finally:
        for module, training in modes:
            module.training = training
        for module, _ in quantised:
            vars(module).pop("forward", None)
        for parameter, dtype in casts:
            parameter.data = parameter.data.to(dtype)


def _multiply_unpacked(
    layer: torch.nn.Module, kind: type[Packed[QuantizationSection]], x: torch.Tensor
) -> torch.Tensor:
    bias: torch.Tensor | None = layer.bias  # type: ignore[assignment]
    return torch.nn.functional.linear(x, kind.unpack(layer).to(x.dtype), bias)


def require_parity(parity: Parity, *, limit: float = KL_LIMIT) -> None:
    """Raises NumericsError where the merged model is further from its adapter than rounding explains.

    Of many labels that is a mean KL above the limit. A few distributions, one a row, move more by rounding: there it is
    a larger share of the adapter's whole effect, or another first choice where the adapter was sure of its own.
    """
    allowed = limit if parity.update_kl is None else max(limit, UPDATE_SHARE * parity.update_kl)
    why = "" if parity.mean_kl <= allowed else f"mean KL {parity.mean_kl:.4g} is above {allowed:.3g}"
    if not why and parity.tokens < FEW_LABELS and parity.clear_flips:
        why = f"{counted(parity.clear_flips, 'clear first choice')} of {parity.tokens} changed"
    if why:
        raise NumericsError(
            f"the merged model is not the adapter it was made from: {why} "
            f"(max logit difference {parity.max_logit_difference:.3g}, loss {parity.merged_loss:.4f} "
            f"against {parity.adapter_loss:.4f})",
            todo="train on (rounding loses updates finer than the dtype's steps), or ship the adapter beside its base",
        )


def _measure_update(adapted: Objective, rows: Sequence[Example], pad_id: int) -> float:
    """Mean KL(adapter || adapter without its update of weights) over the labels; a trained head stays in both."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    batches = [adapted.task.collate_whole(row, pad_id).to(adapted.device) for row in rows]
    layers = [module for module in adapted.model.modules() if isinstance(module, BaseTunerLayer)]
    flags = [(parameter, parameter.requires_grad) for parameter in adapted.model.parameters()]
    tuned = torch.cat([adapted.logits(batch).float().cpu() for batch in batches])
    try:
        for layer in layers:
            layer.enable_adapters(False)
        plain = torch.cat([adapted.logits(batch).float().cpu() for batch in batches])
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
    return float(_divergence(tuned, plain).mean())


def _divergence(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL of each label, [labels], from logits [labels, classes]; of one number each, as of normal distributions around
    them whose variance is 1.
    """
    if p.shape[-1] == 1:
        return (p - q).square()[:, 0] / 2
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).clamp(min=0.0)


def _sums(p: torch.Tensor, q: torch.Tensor, labels: torch.Tensor, counted: torch.Tensor | None) -> tuple[float, ...]:
    """Of one row, with `p`, `q` `[labels, classes]`, the right classes or numbers, and which of them count: labels, KL,
    equal first choices, clear ones that changed, labels that count and both models' loss on them; the largest
    difference and the largest KL last.
    """
    if not (torch.isfinite(p).all() and torch.isfinite(q).all()):
        raise NumericsError("logits are not finite", todo="the adapter or the merged model is broken")
    log_p, log_q, kl = p.log_softmax(-1), q.log_softmax(-1), _divergence(p, q)
    counts = torch.ones(len(labels)) if counted is None else counted.float()
    if p.shape[-1] == 1:
        losses = [float((each[:, 0] - labels).square().sum()) for each in (p, q)]
    else:
        losses = [-float((log.gather(1, labels[:, None])[:, 0] * counts).sum()) for log in (log_p, log_q)]
    shares, chosen = log_p.exp(), q.argmax(-1)
    margins = shares.amax(-1) - shares.gather(1, chosen[:, None])[:, 0]
    same, flips = int((p.argmax(-1) == chosen).sum()), int((margins > CLEAR_MARGIN).sum())
    largest = float((p - q).abs().max()), float(kl.max())
    return len(p), float(kl.sum()), same, flips, int(counts.sum()), *losses, *largest
