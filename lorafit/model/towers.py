"""The parts of a model that sees: its language model, its vision tower, and the projector that joins them.

    pixels ──vision tower──> states ──projector──> states as wide as tokens ──language model──> text

A tower is a model of its own in transformers' classes, a projector is not: that tells them apart in every family.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorafit.errors import ModelError
from lorafit.kinds.quantizations import kind_of_codes
from lorafit.ops.output_head import text_part

if TYPE_CHECKING:
    from rich.table import Table
    from transformers import PreTrainedModel

LANGUAGE, VISION, PROJECTOR = "language model", "vision tower", "projector"


@dataclass(frozen=True, slots=True)
class TowerCount:
    """One part of a model that sees.

    Attributes:
        name: What it is.
        parameters: Of the base.
        adapted: Modules that carry an adapter, or are trained whole.
        trained: Parameters that are trained.
    """

    name: str
    parameters: int
    adapted: int
    trained: int


def projector_names(model: PreTrainedModel) -> list[str]:
    """Names of the modules that join a vision tower to the language model, beside which they stand.

    Raises:
        ModelError: The model has none: its tower does it inside of itself, or it sees nothing.
    """
    from transformers import PreTrainedModel

    inner, text = getattr(model, model.base_model_prefix, model), text_part(model)
    found = [
        name
        for name, child in inner.named_children()
        if text is not None and child is not text and not isinstance(child, PreTrainedModel)
        if next(child.parameters(), None) is not None
    ]
    if not found:
        what = f"{type(model).__name__} has no projector of its own"
        raise ModelError(what, key="task.projector", todo="leave task.projector out")
    return found


def count_towers(model: PreTrainedModel) -> list[TowerCount]:
    """Parameters of each part of a model with an adapter; nothing of one that reads text alone."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if text_part(base) is None:
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    decoder, inner = text_part(base), getattr(base, base.base_model_prefix, base)
    kinds = {id(module): LANGUAGE for module in decoder.modules()}
    for child in inner.children():
        is_tower = hasattr(child, "main_input_name")  # a model of its own
        for module in child.modules():
            kinds.setdefault(id(module), VISION if is_tower else PROJECTOR)
    rows: dict[str, Counter[str]] = {LANGUAGE: Counter(), VISION: Counter(), PROJECTOR: Counter()}
    seen: set[int] = set()
    for path, module in base.named_modules():
        row = rows[kinds.get(id(module), LANGUAGE)]
        row["adapted"] += isinstance(module, BaseTunerLayer | ModulesToSaveWrapper)
        beside = ".lora_" in f".{path}" or ".modules_to_save." in f"{path}."
        for parameter in module.parameters(recurse=False):
            row["trained"] += parameter.numel() * parameter.requires_grad
            if not beside and id(parameter) not in seen:
                seen.add(id(parameter))
                is_packed = kind_of_codes(module) is not None and parameter is module.weight
                row["parameters"] += module.in_features * module.out_features if is_packed else parameter.numel()
    return [TowerCount(name, row["parameters"], row["adapted"], row["trained"]) for name, row in rows.items()]


def check_towers(counts: list[TowerCount], *, trains_projector: bool) -> None:
    """Raises ModelError where what takes gradients is not the language model's adapter, with the projector if asked."""
    wanted = {VISION: 0, PROJECTOR: counts[-1].parameters if trains_projector else 0}
    for count in counts:
        if count.trained != wanted.get(count.name, count.trained):
            what = f"{count.trained:,} parameters of the {count.name} are trained, and {wanted[count.name]:,} should be"
            raise ModelError(what, key="task.projector", todo="please report it with the model's config.json")


def tower_table(counts: list[TowerCount]) -> Table:
    """The parts as a rich table."""
    from rich.table import Table

    table = Table(title="by part of the model", title_justify="left")
    for heading in ("part", "parameters", "adapted", "trained"):
        table.add_column(heading, justify="left" if heading == "part" else "right")
    for count in counts:
        adapted, trained = (f"{number:,}" if number else "-" for number in (count.adapted, count.trained))
        table.add_row(count.name, f"{count.parameters:,}", adapted, trained)
    return table
