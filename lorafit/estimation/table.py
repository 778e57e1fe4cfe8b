"""An estimate for people: one screen of 80 columns. rich is imported only in the functions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorafit.console.reporting import Printed, draw_histogram, full_block, say
from lorafit.console.wording import counted, in_sequences, quantised_as
from lorafit.estimation.answer import Answer
from lorafit.machine.devices import format_bytes
from lorafit.memory import MemoryEstimate, covers
from lorafit.memory.peak import ALLOCATOR_FACTOR
from lorafit.ops.recomputed_layers import CHECKPOINTING
from lorafit.plan.render import describe_memory, format_count
from lorafit.plan.run_cost import HIGH_UTILISATION, LOW_UTILISATION, UTILISATION

if TYPE_CHECKING:
    from rich.console import Console, JustifyMethod
    from rich.table import Table

    from lorafit.estimation.fit import Fit, Largest

_LABELS = {
    "base_weights": "base weights",
    "quantization_constants": "quantisation constants",
    "unpacked_weights": "unpacked weights",
    "adapter": "adapter",
    "gradients": "gradients",
    "optimizer_state": "optimizer state",
    "kept_activations": "kept activations",
    "recomputation": "one layer at work",
    "loss": "loss (logits chunk)",
    "workspace": "dequantised weight",
}
_PHASE_BAR_CHARACTERS = 8
_VERDICTS = {True: "fits", False: "does not fit", None: "cannot be told, more than this is needed"}
_SHARES = (UTILISATION, HIGH_UTILISATION, LOW_UTILISATION)


@dataclass(frozen=True)
class RecipeEstimate(Answer, Printed):
    """The answer of `lorafit estimate-memory`: its figures, and how they are shown."""

    def render(self, console: Console) -> None:
        """Head, itemised memory, row lengths, methods, cost, and what the flags asked for."""
        block = full_block(console)
        for line in _head(self):
            say(console, line)
        console.print()
        console.print(_memory(self.memory, block, self.quantization))
        if self.exact is not None:
            console.print()
            engine = "closed form" if _is_closed(self) else "few layers"
            console.print(_exact(self.exact, self.memory, engine, self.quantization))
            say(console, f"peak in {_moment(self.exact)}")
        if self.here is not None:
            say(console, "\nthis machine has no GPU; train plans for its CPU:")
            say(console, f"  {describe_memory(self.here)}")
        for line in _lengths(self, block):
            say(console, line)
        console.print()
        if self.methods:
            console.print(_methods(self))
        if self.device is not None and any(method.fits is False for method in self.methods):
            say(console, f"* more than {self.device.name} has")
        console.print()
        for line in _cost(self):
            say(console, line)
        if self.device is not None:
            for line, style in _verdict(self):
                say(console, line, style)
        if self.fit is not None:
            for line in _fit(self.fit):
                say(console, line)


def _head(estimate: Answer) -> Iterator[str]:
    memory, facts = estimate.memory, estimate.rows.facts
    step = estimate.asked.step
    total, trained = step.model.total_parameters, step.trainable_parameters
    stored = quantised_as(estimate.quantization)
    yield (
        f"{estimate.recipe.model.base}: {format_count(total)} parameters, {stored}, {step.dtype}; "
        f"{format_count(trained)} trainable ({trained / total:.2%})"
    )
    what = "the longest row" if facts is not None else "a row of data.max_length"
    if step.task.two_texts is not None:
        what = "source and target of the longest row" if facts is not None else "a source of data.max_length, a target"
    if memory.micro_batch_tokens > step.row_tokens:
        what = f"{what} has {step.row_tokens:,}"
    checkpointing = CHECKPOINTING[memory.gradient_checkpointing]
    kernels = ", kernels liger" if step.kernels == "liger" else ""  # they hold less than lorafit's own
    yield f"micro-batch of {memory.micro_batch_tokens:,} tokens ({what}), checkpointing {checkpointing}{kernels}"
    if estimate.device is None:
        yield "for a card that computes bf16: --gpu names another, or cpu for this machine"
    if estimate.without_checkpointing is not None and estimate.device is not None:
        needed = format_bytes(estimate.without_checkpointing.needed_bytes)
        turned = f"checkpointing was turned {'on' if checkpointing == 'on' else 'half on'} for {estimate.device.name}"
        yield f"{turned}: without it {needed} would be needed"
    if estimate.with_checkpointing_bytes is not None:
        needed = format_bytes(estimate.with_checkpointing_bytes)
        yield f"gradient_checkpointing is auto: half or on where a card needs it (--gpu), {needed} in all at least"
    if facts is None:
        yield f"rows not read: {estimate.rows.missing or 'none were given'}; data.max_length stands for them"
    yield from _pictures(estimate)
    if not memory.counts_all and estimate.exact is None:
        scans = f"{step.model.scanning_layers} of {step.model.layers} layers carry a state along the row (Mamba, "
        what = f"{scans}linear attention), which" if step.model.scanning_layers else "what this method adds to a step"
        yield f"too low: {what} is not counted here"
    elif not _is_closed(estimate):
        yield "measured by dry runs of a few layers"
    if (calibration := estimate.calibration) is not None:
        needed = f"for which {format_bytes(calibration.needed_bytes)} is needed"
        yield f"at most so much: calibration rows choose each linear's kind before the run, {needed}"
    if memory.unquantized_expert_bytes:
        yield f"{format_bytes(memory.unquantized_expert_bytes)} of weights are experts, which no quantisation reaches"


def _pictures(estimate: Answer) -> Iterator[str]:
    """What images the step was estimated with, of a model that sees."""
    step, memory = estimate.asked.step, estimate.exact or estimate.memory
    if step.pictures is not None:
        images, size = step.pictures.images(memory.micro_batch_tokens), f"{step.pictures.width}x{step.pictures.height}"
        taken = f"{counted(images, 'image')} of {size}, {counted(step.pictures.one_tokens, 'token')} each"
        yield f"{'assumed, one a row' if estimate.rows.facts is None else 'at most'}: {taken}"
    if step.task.reads_pictures and not memory.counts_pictures and (step.pictures or estimate.rows.facts is None):
        why = "does not run on tensors without values" if step.pictures else "waits for the base's processor"
        yield f"too low: what the vision tower holds for a moment is not counted, which {why}"


def _memory(memory: MemoryEstimate, block: str, quantization: str) -> Table:
    """Components on the left; phases, and what the card needs besides tensors, on the right."""
    on_card = memory.device_kind == "cuda"
    slack = memory.needed_bytes - memory.context_bytes - memory.tensor_bytes
    factor = ALLOCATOR_FACTOR[memory.device_kind]
    quantization = "none" if memory.peak_phase.name == "start" else quantization  # nothing is dequantised then
    left = [
        (_label(name, quantization), format_bytes(size), f"{size / memory.tensor_bytes:.0%}")
        for name, size in memory.components.items()
        if size
    ]
    right = [
        *_phases(memory, block),
        ("", "", ""),
        ("tensors", format_bytes(memory.tensor_bytes), ""),
        (f"allocator x {factor:.2f}", format_bytes(slack), ""),
        ("CUDA context" if on_card else "process", format_bytes(memory.context_bytes), ""),
        (f"[bold]{'card' if on_card else 'memory'} needed[/]", f"[bold]{format_bytes(memory.needed_bytes)}[/]", ""),
    ]
    both = _grid("left", "left")
    both.add_row(_filled(left), _filled(right))
    return both


def _label(component: str, quantization: str) -> str:
    """What a component is called: without quantised weights nothing is dequantised, and only temporaries are left."""
    return "temporary tensors" if (component, quantization) == ("workspace", "none") else _LABELS[component]


def _is_closed(estimate: Answer) -> bool:
    """Whether formulas gave the figures, or tried to."""
    return covers(estimate.asked.step) or not estimate.memory.counts_all


def _exact(exact: MemoryEstimate, memory: MemoryEstimate, engine: str, quantization: str) -> Table:
    """A dry run of the whole step beside the other engine, by component."""
    table = figures("dry run of the step", "exact", engine)
    closed = memory.components
    for name, size in exact.components.items():
        if size or closed.get(name):
            table.add_row(_label(name, quantization), format_bytes(size), format_bytes(closed.get(name, 0)))
    error = memory.tensor_bytes / exact.tensor_bytes - 1
    table.add_row("tensors", format_bytes(exact.tensor_bytes), f"{format_bytes(memory.tensor_bytes)} ({error:+.1%})")
    what = "card needed" if memory.device_kind == "cuda" else "memory needed"
    table.add_row(what, format_bytes(exact.needed_bytes), format_bytes(memory.needed_bytes), style="bold")
    return table


def _moment(exact: MemoryEstimate) -> str:
    """`backward: mm in recomputing layers.31.mlp.down_proj`."""
    phase = exact.peak_phase
    where = phase.where.removeprefix("aten.").replace(".default", "")
    return f"{phase.name}: {where}" if where else phase.name


def figures(*names: str) -> Table:
    """A table whose rows begin with words, and go on with numbers."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="")
    for name in names:
        table.add_column(name, justify="left" if name is names[0] else "right", no_wrap=True)
    return table


def _filled(rows: Iterable[tuple[str, ...]]) -> Table:
    table = _grid("left", "right", "left")
    for row in rows:
        table.add_row(*row)
    return table


def _grid(*justified: JustifyMethod) -> Table:
    from rich.table import Table

    table = Table.grid(padding=(0, 2, 0, 0))
    for justify in justified:
        table.add_column(justify=justify, no_wrap=True)
    return table


def _phases(memory: MemoryEstimate, block: str) -> Iterator[tuple[str, str, str]]:
    """A bar per phase, its length against the peak's."""
    fixed = sum(memory.fixed.values())
    for phase in memory.phases:
        total = fixed + phase.total_bytes
        bar = block * max(1, round(_PHASE_BAR_CHARACTERS * total / memory.tensor_bytes))
        yield phase.name, format_bytes(total), f"{bar} peak" if phase is memory.peak_phase else bar


def _lengths(estimate: Answer, block: str) -> Iterator[str]:
    """Rows by length; nothing where no rows were read."""
    facts = estimate.rows.facts
    if facts is None:
        return
    sequences = in_sequences(facts.longest_tokens, estimate.asked.step.task.sequences)
    yield ""
    yield (
        f"{counted(facts.rows, 'row')} of {facts.tokens / max(facts.rows, 1):,.0f} tokens on average, the longest "
        f"{facts.longest_tokens:,}{sequences} (data.max_length {estimate.recipe.data.max_length:,})"
    )
    yield from draw_histogram(estimate.rows.bars, block)


def _methods(estimate: Answer) -> Table:
    """The same model trained otherwise; the recipe's own way stands out."""
    table = figures("this model as", "weights", "gradients", "optimizer", "temporary", "needed")
    own = estimate.quantization if estimate.quantization != "none" else estimate.asked.step.dtype
    for method in estimate.methods:
        parts = (method.weights_bytes, method.gradients_bytes, method.optimizer_bytes, method.temporary_bytes)
        is_own = method.name != "full" and method.precision == own
        needed = format_bytes(method.needed_bytes) + ("" if method.fits is not False else " *")
        table.add_row(
            f"{method.name}, {method.precision}", *(format_bytes(part) for part in parts), needed,
            style="bold" if is_own else "",
        )  # fmt: skip
    return table


def _cost(estimate: Answer) -> Iterator[str]:
    cost = estimate.cost
    tokens = f"{format_count(cost.tokens)} tokens"
    what = f"the run, {counted(estimate.epochs, 'epoch')}, {tokens}" if cost.is_whole_run else tokens
    flops = f"{what}: {cost.flops.total:.2g} flops".replace("e+", "e")
    if cost.device is None or cost.peak_flops is None:
        yield f"{flops}; a card's name (--gpu) says how long that takes"
        return
    yield f"{flops}, {_range([cost.seconds(share) or 0.0 for share in _SHARES], format_seconds)} on {cost.device}"
    if cost.price_per_hour is not None:
        prices = _range([cost.price(share) or 0.0 for share in _SHARES], _format_price)
        yield f"  price {prices} at {cost.price_per_hour:g} an hour"
    yield (
        f"  assumed: {UTILISATION:.0%} ({LOW_UTILISATION:.0%} to {HIGH_UTILISATION:.0%}) of its peak, "
        f"{cost.peak_flops / 1e12:,.0f} TFLOP/s; evaluation comes on top"
    )


def _range(values: list[float], write: Callable[[float], str]) -> str:
    """`12 min (8 min to 20 min)`."""
    expected, least, most = map(write, values)
    return f"{expected} ({least} to {most})"


def _format_price(price: float) -> str:
    return f"{price:.2f}" if price < 1000 else f"{price:,.0f}"


def format_seconds(seconds: float) -> str:
    """`40 s`, `12 min`, `3.4 h`, `5.1 days`."""
    for unit, scale, most in (("s", 1, 90), ("min", 60, 90), ("h", 3600, 48)):
        if seconds < most * scale:
            value = seconds / scale
            return f"{value:.0f} {unit}" if value >= 10 else f"{value:.2g} {unit}"
    return f"{seconds / 86400:,.3g} days"


def _verdict(estimate: Answer) -> Iterator[tuple[str, str]]:
    assert estimate.device is not None
    device, headroom = estimate.device, estimate.options.headroom
    usable = device.memory_bytes * (1 - headroom)
    yield "", ""
    said = (
        f"{_VERDICTS[estimate.fits]}: {format_bytes(estimate.needed_bytes)} of "
        f"{format_bytes(usable)} ({device.name}: {format_bytes(device.memory_bytes)} usable, {headroom:.0%} stay free)"
    )
    yield said, "bold green" if estimate.fits else "bold red"
    if estimate.savings:
        yield "would save, each alone:", ""
    for saving in estimate.savings:
        marks = [saving.note] if saving.note else []
        marks += ["then it fits"] if saving.fits and not estimate.fits else []
        yield f"{format_bytes(saving.saved_bytes):>10}  {'; '.join([saving.switch, *marks])}", ""
    if estimate.enough is not None:
        yield f"fits, with {format_bytes(estimate.enough.needed_bytes)}: {estimate.enough.shown}", "bold"


def _fit(fit: Fit) -> Iterator[str]:
    yield ""
    size = format_bytes(fit.device.memory_bytes)
    yield f"largest for {fit.device.name} ({size} usable, {fit.headroom:.0%} stay free), each alone:"
    rows = (fit.micro_batch.value or 0) // fit.row_tokens
    batch = f"tokens ({rows} {'row' if rows == 1 else 'rows'} of {fit.row_tokens:,})"
    yield f"  micro-batch  {_largest(fit.micro_batch, batch, 'a row of {} tokens')}"
    yield f"  longest row  {_largest(fit.row, 'tokens', '{} tokens')}"
    if fit.rank is not None:
        yield f"  rank         {_largest(fit.rank, f'at {fit.micro_batch_tokens:,} tokens a micro-batch', 'rank {}')}"


def _largest(found: Largest, what: str, least: str) -> str:
    if found.value is None:
        return f"not even {least.format(f'{found.least:,}')}"
    other = f"; {found.other:,} with it {'off' if found.checkpointing else 'on'}" if found.other is not None else ""
    bound = f"; bounded by {found.bound}" if found.bound else ""
    return f"{found.value:,} {what}, checkpointing {CHECKPOINTING[found.checkpointing]}{other}{bound}"
