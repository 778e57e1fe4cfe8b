"""How each linear is stored, where a recipe leaves that to calibration rows: they are asked once, before the base is
loaded as the run will have it.

unquantised base + a few training rows ──backward──> change of the loss by linear and kind ──> the section's choice
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast_object_list
from transformers.pytorch_utils import Conv1D

from lorafit.console.wording import counted
from lorafit.contracts import Batch, JsonObject, Reporter, Silent
from lorafit.errors import NumericsError, RecipeError, ResourceError
from lorafit.facts import LinearShape
from lorafit.job import Job, build_objective
from lorafit.kinds.quantizations import Quantization, Sensitivity, quantizations
from lorafit.kinds.section import KindSection
from lorafit.memory.step_shape import DTYPE_BYTES
from lorafit.model.load import build_class, load_model
from lorafit.model.targets import find_linears, unquantised_names
from lorafit.objective import Objective
from lorafit.ops.dtypes import dtype_named
from lorafit.ops.process_memory import is_out_of_memory, peak_memory_bytes, release_memory
from lorafit.plan import Plan
from lorafit.plan.calibration import CALIBRATION_TOKENS
from lorafit.trainer.sensitivity import Kinds, measure_changes

if TYPE_CHECKING:
    from accelerate import Accelerator
    from rich.table import Table

_NUMBER = re.compile(r"\d+")
_SHOWN_NUMBERS = 6


@dataclass(frozen=True, slots=True)
class Choice:
    """How each linear is to be stored, and why.

    Attributes:
        linears: Kinds by path.
        found: What each kind would change the loss by.
        bits: Mean bits a weight.
        peak_bytes: Of the process, or the card's tensors, while the rows were asked; None where nothing tells.
    """

    linears: dict[str, str]
    found: Sequence[Sensitivity]
    bits: float
    peak_bytes: int | None

    def to_json(self) -> JsonObject:
        """Plain values, a line each linear."""
        lines = [{"path": one.path, "changes": dict(one.changes), "kind": self.linears[one.path]} for one in self.found]
        return {"format": 1, "bits": self.bits, "peak_bytes": self.peak_bytes, "linears": lines}

    def table(self) -> Table:
        """Kinds by the last part of paths: how many linears, and of which numbers where those are few."""
        from rich.table import Table

        kinds = list(dict.fromkeys(kind for one in self.found for kind in one.changes))
        table = Table(title=f"{self.bits:.3f} bits a weight, constants included", title_justify="left")
        for heading in ("linear", *kinds):
            table.add_column(heading, justify="left" if heading == "linear" else "right")
        for name in dict.fromkeys(one.linear.name for one in self.found):
            numbers = defaultdict[str, list[str]](list)
            for one in self.found:
                if one.linear.name == name:
                    numbers[self.linears[one.path]].append(next(iter(_NUMBER.findall(one.path)), "-"))
            table.add_row(name, *(_told(numbers[kind]) for kind in kinds))
        return table


def _told(numbers: Sequence[str]) -> str:
    few = 0 < len(numbers) <= _SHOWN_NUMBERS
    return f"{len(numbers)} ({', '.join(numbers)})" if few else str(len(numbers) or "-")


def choose_linears(job: Job, plan: Plan, accelerator: Accelerator, reporter: Reporter) -> Choice | None:
    """The kind of each linear, by calibration rows; None where the recipe or a run has told all.

    Args:
        job: Whose rows and base.
        plan: The precision and the attention.
        accelerator: All processes take what rank 0 found.
        reporter: Gets the table.

    Raises:
        RecipeError: The budget is less than the linears take on this device.
        NumericsError: A change is not finite.
        ResourceError: Memory ran out.
    """
    quantization, width = quantizations.bind(job.recipe.model.quantization), DTYPE_BYTES[plan.dtype]
    kinds = quantization.candidates()
    if not kinds:
        return None
    shapes = open_linears(job)
    on_cpu = accelerator.device.type == "cpu"
    possible = {
        path: [name for name, kind in kinds.items() if not on_cpu or linear.in_features % kind.cpu_row_multiple == 0]
        for path, linear in shapes.items()
    }
    if not shapes:
        raise RecipeError("no linear of this model can be quantised", key="model.quantization", todo="write none")
    nothing = [Sensitivity(path, shapes[path], dict.fromkeys(names, 0.0)) for path, names in possible.items()]
    quantization.allot(nothing, width)  # a budget that is too small is told before anything is loaded
    tried = {
        path: {name: kinds[name] for name in names if kinds[name].is_quantized} for path, names in possible.items()
    }
    changes = _ask_rows(job, plan, tried, accelerator.device, reporter)
    peak = peak_memory_bytes(accelerator.device)
    release_memory(accelerator.device)
    found = [replace(one, changes={**one.changes, **changes[one.path]}) for one in nothing]
    for one in found:
        if not all(map(math.isfinite, one.changes.values())):
            what = "the loss of the calibration rows, or its gradient, is not finite"
            raise NumericsError(what, key=one.path, todo="check the base's weights, or use another model.dtype")
    chosen = list(quantization.allot(found, width))
    if accelerator.num_processes > 1:
        broadcast_object_list(chosen)
    sizes = [_stored_bytes(kinds[kind], one.linear, width) for one, kind in zip(found, chosen, strict=True)]
    bits = 8 * sum(sizes) / sum(one.linear.weight_parameters for one in found)
    choice = Choice(dict(zip(shapes, chosen, strict=True)), found, bits, peak)
    reporter.show(choice.table())
    return choice


def _stored_bytes(kind: Quantization[KindSection], linear: LinearShape, dtype_bytes: int) -> int:
    return kind.weight_bytes(linear, dtype_bytes) + kind.constant_bytes(linear)


def open_linears(job: Job) -> dict[str, LinearShape]:
    """All linears that loading quantises wherever the device can, with their sizes, by path."""
    skeleton = build_class(job.base, model_class=job.task.model_class)
    plain = set(unquantised_names(skeleton, None, Silent()))
    # transformers replaces no class derived from them
    linears = [(path, x) for path, x in find_linears(skeleton) if type(x) in (torch.nn.Linear, Conv1D)]
    return {path: _shape_of(path, linear) for path, linear in linears if path not in plain}


def _shape_of(path: str, linear: Any) -> LinearShape:
    is_conv = isinstance(linear, Conv1D)
    reads, writes = (linear.nx, linear.nf) if is_conv else (linear.in_features, linear.out_features)
    return LinearShape(path.rsplit(".", 1)[-1], reads, writes, 1, linear.bias is not None, is_conv)


def _ask_rows(
    job: Job, plan: Plan, tried: Mapping[str, Kinds], device: torch.device, reporter: Reporter
) -> dict[str, dict[str, float]]:
    """Loads the base unquantised, asks, and lets go of it."""
    batches = calibration_batches(job, quantizations.bind(job.recipe.model.quantization).calibration_rows)
    reporter.info(f"choosing the kind of {len(tried)} linears by {counted(sum(len(b.rows) for b in batches), 'row')}")
    try:
        objective = _load_plain(job, plan, device, reporter)
        return measure_changes(objective, (batch.to(device) for batch in batches), tried)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        what = "out of memory while the unquantised base said how its linears are to be stored"
        todo = "copy the linears of card.json of a run on a larger machine into the recipe, or write quantization: nf4"
        raise ResourceError(what, key="model.quantization", todo=todo) from error


def _load_plain(job: Job, plan: Plan, device: torch.device, reporter: Reporter) -> Objective:
    model = load_model(
        job.base,
        quantization=quantizations.make("none").section,
        dtype=dtype_named(plan.dtype),
        compute_dtype=dtype_named(plan.compute_dtype),
        attention=plan.attention,
        device=device,
        model_class=job.task.model_class.padded_with(job.pad_id),
        reporter=reporter,
    )
    return build_objective(job, model, plan.dtype)


def calibration_batches(job: Job, count: int) -> list[Batch]:
    """Rows from all over the training set, as they lie in it, a few in each batch."""
    rows, task = job.rows.train, job.task
    count = min(count, len(rows))
    groups: list[list[int]] = [[]]
    for row in (number * len(rows) // count for number in range(count)):
        widest = max(int(rows.lengths[each]) for each in [*groups[-1], row])
        if groups[-1] and widest * (len(groups[-1]) + 1) > CALIBRATION_TOKENS:
            groups.append([])
        groups[-1].append(row)
    return [task.collate([[rows[row]] for row in group], job.pad_id) for group in groups]
