"""The plan's table for people, readable in 80 columns."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from lorafit.console.wording import agreed, counted, in_sequences, list_classes, list_weights, quantised_as
from lorafit.machine.devices import format_bytes
from lorafit.memory import covers
from lorafit.ops.recomputed_layers import CHECKPOINTING

if TYPE_CHECKING:
    from rich.table import Table

    from lorafit.contracts import Reporter
    from lorafit.plan.bounds import Bounds
    from lorafit.plan.derive import Plan


def format_count(number: int) -> str:
    """`1,234`, `2.44M`, `8.03B`."""
    for suffix, scale in (("B", 10**9), ("M", 10**6)):
        if number >= scale:
            return f"{number / scale:.3g}{suffix}" if number < 100 * scale else f"{number / scale:.0f}{suffix}"
    return f"{number:,}"


LARGE_CHECKPOINTS_BYTES = 2**30


def show_plan(plan: Plan, reporter: Reporter, shown: Plan | None = None) -> None:
    """Shows the plan to people, and warns of what they should know; of one that replaces another which was shown, only
    where that says something else.
    """
    if shown is None or set(_plan_rows(plan)) - set(_plan_rows(shown)):
        reporter.show(plan_table(plan))
    for warning in plan.warnings:
        if shown is None or warning not in shown.warnings:
            reporter.warn(warning)


def plan_table(plan: Plan) -> Table:
    """Every derived number of a run."""
    from rich.table import Table

    title = _plain(f"plan: {plan.name}")
    table = Table(box=None, padding=(0, 2, 0, 0), title=title, title_justify="left", show_header=False)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for label, value in _plan_rows(plan):
        table.add_row(label, value)
    return table


def _plan_rows(plan: Plan) -> Iterable[tuple[str, str]]:
    share = plan.trainable_parameters / plan.total_parameters
    yield "model", _plain(plan.model)
    frozen = plan.total_parameters - plan.step.step.model.new_head_parameters
    yield "parameters", f"{frozen:,} + {plan.trainable_parameters:,} trainable ({share:.2%})"
    yield from ((label, _plain(said)) for label, said in plan.methods.items())
    if plan.without_adapter:
        yield "no adapter", _plain(_left_out(plan))
    stored = f"{quantised_as(plan.quantization)}, {'' if plan.quantization == 'none' else 'the rest '}{plan.dtype}"
    kernels = f"; kernels {plan.kernels}" if plan.device.kind != "cpu" else ""
    yield "weights", f"{stored}; compute {plan.compute_dtype}; attention {plan.attention}{kernels}"
    if (calibration := plan.calibration) is not None:
        yield "calibration", f"{format_bytes(calibration.needed_bytes)} needed to choose each linear's kind, once"
    if plan.packing is not False:
        yield "packing", "on" if plan.packing else "auto: with varlen attention, where that is right and fastest"
    if plan.keeps_unpacked:
        size = format_bytes(plan.memory.fixed["unpacked_weights"])
        yield "unpacked", f"{size} of dequantised weights kept for the whole run"
    if (begins := _start(plan)) is not None:
        yield "begins with", begins
    if (price := _price_of_dropout(plan)) is not None:
        yield "dropout", price
    longest = counted(plan.longest_tokens, "token") + in_sequences(plan.longest_tokens, plan.step.step.task.sequences)
    yield "rows", f"{plan.rows:,} an epoch, longest {longest}; {counted(plan.validation_rows, 'validation row')}"
    carry = f", {plan.trained_tokens:,} of them trained ({plan.trained_share:.1%})"
    if (task := plan.step.step.task).labels_rows:
        verb = agreed(plan.trained_tokens, "carries", "carry")
        carry = f"; {counted(plan.trained_tokens, task.loss_unit)} {verb} loss"
    if plan.classes:
        yield "classes", _plain(list_classes(plan.classes, plan.step.step.task.class_unit))
    if plan.class_weights:
        yield "class weights", _plain(list_weights(plan.class_weights))
    yield "tokens", f"{plan.tokens:,} an epoch{carry}"
    epochs = f"{counted(plan.epochs, 'epoch')} of {counted(plan.steps_per_epoch, 'step')}"
    yield "steps", f"{plan.total_steps:,} of {counted(plan.batch_size, 'row')}: {epochs}"
    if plan.curriculum is not None:
        yield "curriculum", _plain(str(plan.curriculum))
    schedule = f"{plan.schedule}, {counted(plan.warmup_steps, 'step')} of warm-up"
    factors = plan.step.step.adapter.rate_factors().items()
    others = "".join(f"; {part.strip('.')} at {factor:g} times it" for part, factor in factors if factor != 1)
    yield "learning rate", f"{plan.learning_rate:g}, {schedule}{others}; {plan.optimizer}"
    if plan.device.kind == "cuda" and plan.step.step.optimizer.waits_at_each_tensor:
        yield "optimizer", f"{plan.optimizer} waits for the card at each trained tensor; adamw never does"
    yield "micro-batch", _micro_batch(plan)
    on = plan.gradient_checkpointing
    yield "checkpointing", "auto: as little as fits" if on is None else CHECKPOINTING[on]
    scored = _every(plan.evaluate_every_steps) if plan.evaluate_every_steps else "none while training"
    taken = f"best by {plan.select_metric}" if plan.select_metric else "the last step is taken"
    yield "evaluation", f"{scored}; {taken}"
    if plan.answered_rows:
        beams = f" in each of {plan.answer_beams} beams" if plan.answer_beams > 1 else ""
        most = f"at most {counted(plan.answer_tokens, 'token')}{beams}"
        yield "answers", f"{counted(plan.answered_rows, 'row')} each time, {most}"
    yield "checkpoints", f"{_every(plan.save_every_steps)}, the last {plan.keep_last} kept{_on_disk(plan)}"
    ranks = f" x {plan.device.count} processes" if plan.device.count > 1 else ""
    yield "device", _plain(f"{plan.device.name}, {format_bytes(plan.device.memory_bytes)}{ranks}")
    yield "memory", describe_memory(plan) if plan.fits else f"[red]{describe_memory(plan)}[/]"


def _on_disk(plan: Plan) -> str:
    """What the run puts on the disk, where that is much: weights in fp32 and the optimizer's state, in each."""
    trained = plan.trainable_parameters
    each = 4 * trained + plan.step.step.optimizer.state_bytes(trained)
    most = each * (plan.keep_last + 2)
    if most < LARGE_CHECKPOINTS_BYTES:
        return ""
    parts = f"{format_bytes(each)} of disk each; with the best one and the one being written up to"
    return f"; {parts} {format_bytes(most)}"


def _start(plan: Plan) -> str | None:
    """What giving the adapter its first values takes; None where it has them already."""
    step = plan.step.step
    begins = step.adapter.initialisation()
    if begins is None or not (step.start_bytes or begins.flops(step.adapted_linears)):
        return None
    flops = begins.flops(step.adapted_linears) / 1e9
    parts = [f"{counted(getattr(begins.section, 'rows', 0), f'{begins.reads} row')} forward"] if begins.reads else []
    parts += [f"{flops:,.1f} GFLOP of decompositions"] if flops else []
    return f"{begins.section.kind}: {', '.join(parts)}{', ' if parts else ''}{format_bytes(step.start_bytes)} at once"


def _price_of_dropout(plan: Plan) -> str | None:
    """What an adapter's dropout takes on a card; None without one, and where memory is not told by formulas."""
    step, section = plan.step.step, plan.step.step.adapter.section
    rate = getattr(section, "dropout", 0.0)
    if not rate or step.device_kind == "cpu" or not covers(step):
        return None
    tokens, checkpointing = plan.memory.micro_batch_tokens, plan.memory.gradient_checkpointing
    without = plan.step.changed(adapter=step.adapter_with(dropout=0.0)).at(tokens, checkpointing)
    more = format_bytes(plan.memory.tensor_bytes - without.tensor_bytes)
    return f"{rate:g}: {more} more for {tokens:,} tokens, and perhaps 6 to 10 % of a step (counted, not measured)"


def _left_out(plan: Plan) -> str:
    """By name, the largest first, with the reason."""
    largest_first = sorted(plan.without_adapter, key=lambda part: -part.parameters)
    return "; ".join(f"{part.name} {format_count(part.parameters)} ({part.reason})" for part in largest_first)


def _every(steps: int) -> str:
    return "every step" if steps == 1 else f"every {steps:,} steps"


def _micro_batch(plan: Plan) -> str:
    if plan.micro_batch_tokens is not None:
        return f"{plan.min_micro_batch_tokens:,} tokens"
    return f"auto: {plan.min_micro_batch_tokens:,} to {plan.max_micro_batch_tokens:,} tokens"


def describe_memory(plan: Plan | Bounds) -> str:
    """What a run needs with its smallest micro-batch, and with its largest; or that it does not fit."""
    least, most = plan.memory, plan.memory_at_most
    if not plan.fits:
        return f"does not fit: {format_bytes(plan.memory_least.needed_bytes)} needed at least"
    parts = f"{format_bytes(least.tensor_bytes)} tensors, {format_bytes(least.needed_bytes)} needed"
    if most.needed_bytes > least.needed_bytes:
        parts += f"; up to {format_bytes(most.needed_bytes)} with the largest micro-batch"
    return parts


def _plain(text: str) -> str:
    """Text of the user without a meaning to rich."""
    from rich.markup import escape

    return escape(text)
