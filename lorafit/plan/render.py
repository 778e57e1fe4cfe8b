"""Tables for people: a plan, and an estimate. Readable in 80 columns; rich is imported only here, in the functions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from lorafit.devices import format_bytes
from lorafit.memory import MemoryEstimate

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from lorafit.plan.derive import Plan
    from lorafit.plan.verdict import RecipeEstimate

_LABELS = {
    "base_weights": "base weights",
    "quantization_constants": "quantisation constants",
    "adapter": "adapter",
    "gradients": "gradients",
    "optimizer_state": "optimizer state",
    "kept_activations": "kept activations",
    "recomputation": "one layer at work",
    "loss": "loss (logits chunk)",
    "workspace": "dequantised weight",
}
_BAR_CHARACTERS = 24


def format_count(number: int) -> str:
    """`1,234`, `2.44M`, `8.03B`."""
    for suffix, scale in (("B", 10**9), ("M", 10**6)):
        if number >= scale:
            return f"{number / scale:.3g}{suffix}" if number < 100 * scale else f"{number / scale:.0f}{suffix}"
    return f"{number:,}"


def plan_table(plan: Plan) -> Table:
    """Every derived number of a run."""
    table = _two_columns(f"plan: {plan.name}")
    for label, value in _plan_rows(plan):
        table.add_row(label, value)
    for warning in plan.warnings:
        table.add_row("[yellow]warning[/]", _plain(warning))
    return table


def _plan_rows(plan: Plan) -> Iterable[tuple[str, str]]:
    share = plan.trainable_parameters / plan.total_parameters
    yield "model", _plain(plan.model)
    yield "parameters", (f"{plan.total_parameters:,} + {plan.trainable_parameters:,} trainable ({share:.2%})")
    yield (
        "weights",
        f"{plan.quantization}, the rest {plan.dtype}; compute {plan.compute_dtype}; attention {plan.attention}",
    )
    yield (
        "rows",
        f"{plan.rows:,} an epoch, longest {plan.longest_tokens:,} tokens; {plan.validation_rows:,} validation rows",
    )
    yield "tokens", f"{plan.tokens:,} an epoch, {plan.trained_tokens:,} of them trained ({plan.trained_share:.1%})"
    yield (
        "steps",
        f"{plan.total_steps:,} of {plan.batch_size} rows: {plan.epochs:g} epochs of {plan.steps_per_epoch:,} steps",
    )
    yield (
        "learning rate",
        f"{plan.learning_rate:g}, {plan.schedule}, {plan.warmup_steps:,} steps of warm-up; {plan.optimizer}",
    )
    yield "micro-batch", _micro_batch(plan)
    yield "checkpointing", {True: "on", False: "off", "auto": "auto: both can fit"}[plan.gradient_checkpointing]
    yield (
        "evaluation",
        (f"every {plan.evaluate_every_steps:,} steps" if plan.evaluate_every_steps else "none while training")
        + (f"; best by {plan.select_metric}" if plan.select_metric else "; the last step is taken"),
    )
    yield "checkpoints", f"every {plan.save_every_steps:,} steps, the last {plan.keep_last} kept"
    ranks = f" x {plan.device.count} processes" if plan.device.count > 1 else ""
    yield "device", _plain(f"{plan.device.name}, {format_bytes(plan.device.memory_bytes)}{ranks}")
    yield "memory", _memory(plan)


def _micro_batch(plan: Plan) -> str:
    if plan.micro_batch_tokens != "auto":
        return f"{plan.min_micro_batch_tokens:,} tokens"
    return f"auto: {plan.min_micro_batch_tokens:,} to {plan.max_micro_batch_tokens:,} tokens"


def _memory(plan: Plan) -> str:
    least, most = plan.memory, plan.memory_at_most
    parts = f"{format_bytes(least.tensor_bytes)} tensors, {format_bytes(least.needed_bytes)} needed"
    if most.needed_bytes > least.needed_bytes:
        parts += f"; up to {format_bytes(most.needed_bytes)} with the largest micro-batch"
    return (
        parts if plan.fits else f"[red]does not fit:[/] {format_bytes(plan.memory_least.needed_bytes)} needed at least"
    )


def estimate_table(estimate: RecipeEstimate) -> RenderableType:
    """Components, phases, the card that is needed, the verdict and what would save memory."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    memory = estimate.memory
    rows = "longest row" if estimate.rows_known else "data.max_length"
    head = Text(
        f"{estimate.model}: {format_count(estimate.total_parameters)} parameters, "
        f"{estimate.quantization}, {estimate.dtype}; "
        f"{format_count(estimate.trainable_parameters)} trainable\n"
        f"micro-batch of {memory.micro_batch_tokens:,} tokens ({rows} {estimate.longest_tokens:,}), "
        f"checkpointing {'on' if memory.gradient_checkpointing else 'off'}"
    )
    table = _sizes("component")
    for name, size in memory.components.items():
        if size:
            table.add_row(_LABELS[name], format_bytes(size), f"{size / memory.tensor_bytes:.1%}")
    table.add_section()
    table.add_row("[bold]tensors at the peak[/]", f"[bold]{format_bytes(memory.tensor_bytes)}[/]", "")
    slack = memory.needed_bytes - memory.context_bytes - memory.tensor_bytes
    table.add_row("allocator", format_bytes(slack), "")
    table.add_row("context" if memory.device_kind == "cuda" else "process", format_bytes(memory.context_bytes), "")
    table.add_row("[bold]card needed[/]" if memory.device_kind == "cuda" else "[bold]memory needed[/]",
                  f"[bold]{format_bytes(memory.needed_bytes)}[/]", "")  # fmt: skip
    parts: list[RenderableType] = [head, table, _phases(memory)]
    if memory.unquantized_expert_bytes:
        parts.append(Text(f"{format_bytes(memory.unquantized_expert_bytes)} of experts: no quantisation reaches them"))
    if estimate.savings:
        savings = Table(box=None, padding=(0, 2, 0, 0), title_justify="left", title="would save")
        savings.add_column("switch", overflow="fold")
        savings.add_column("saves", justify="right")
        for saving in estimate.savings:
            savings.add_row(_plain(saving.switch), format_bytes(saving.saved_bytes))
        parts.append(savings)
    if estimate.device is not None:
        parts.append(_verdict(estimate))
    return Group(*parts)


def _verdict(estimate: RecipeEstimate) -> RenderableType:
    from rich.text import Text

    assert estimate.device is not None
    usable = estimate.device.memory_bytes * (1 - estimate.headroom)
    verdict = "fits" if estimate.fits else "does not fit"
    return Text(
        f"{verdict}: {format_bytes(estimate.memory.needed_bytes)} of {format_bytes(usable)} "
        f"({estimate.device.name}: {format_bytes(estimate.device.memory_bytes)}, {estimate.headroom:.0%} stay free)",
        style="green" if estimate.fits else "red",
    )


def _phases(memory: MemoryEstimate) -> Table:
    """A bar per phase, its length against the peak's."""
    fixed = sum(memory.fixed.values())
    table = _sizes("phase")
    for phase in memory.phases:
        total = fixed + phase.total_bytes
        bar = "█" * max(1, round(_BAR_CHARACTERS * total / memory.tensor_bytes))
        table.add_row(f"{phase.name} ({_plain(phase.where)})" if phase.where else phase.name, format_bytes(total), bar)
    return table


def _sizes(what: str) -> Table:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column(what, overflow="fold")
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("")
    return table


def _two_columns(title: str) -> Table:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), title=_plain(title), title_justify="left", show_header=False)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    return table


def _plain(text: str) -> str:
    """Text of the user without a meaning to rich."""
    from rich.markup import escape

    return escape(text)
