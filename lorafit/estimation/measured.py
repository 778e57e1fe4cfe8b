"""The measured engine: peak memory of a step that no formula describes, from dry runs at a few sizes.

    a dry run over few layers ─> what each further layer keeps is added ─> one row, many rows ─> a line through both

With its kinds and the length of its rows fixed, what a step holds grows linearly with its tokens, phase by phase and
component by component; where scores are kept, it grows linearly with the length of rows as well. So two sizes tell all
others, and of one row the first is enough. What was measured is kept in the cache by config, kinds, rows and versions:
the next answer takes milliseconds.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from lorafit.contracts import JsonMapping
from lorafit.errors import ModelError
from lorafit.files.cache import keep, kept, key_of_code
from lorafit.memory import MemoryEstimate, Phase, StepShape, closed_form, covers
from lorafit.ops.recomputed_layers import Checkpointing

if TYPE_CHECKING:
    from lorafit.contracts import JsonObject, Reporter
    from lorafit.estimation.dry_run import DryRun

MANY_TOKENS = 16_384
"""Of the larger size: what overtakes something else only in large micro-batches has done so there."""
LONGEST_ROW_TOKENS = 2048
"""Rows of layers that carry a state are not measured beyond: transformers' own code loops over their parts."""
_CHANGED_IN_PLACE = ("attention", "packing", "keeps_unpacked")
"""Of what a dry run depends on, what its model can be given later: building it takes as long as a few dry runs."""


class MeasuredSteps:
    """An engine for every step: by formulas where they cover it, else by dry runs.

    Args:
        config: The base's config.json.
        reporter: Told once that dry runs are made, which takes seconds each, and of every one.
        uses_formulas: Whether formulas answer where they can.
    """

    def __init__(self, config: JsonMapping, reporter: Reporter, *, uses_formulas: bool = True) -> None:
        self._config = config
        self._uses_formulas = uses_formulas
        self._reporter = reporter
        self._known: dict[str, MemoryEstimate] = {}
        self._dry: tuple[str, DryRun] | None = None
        self._refused = False
        self._runs = 0

    def __call__(self, step: StepShape, tokens: int, checkpointing: Checkpointing) -> MemoryEstimate:
        """Peak memory of a step; where a model cannot run on fake tensors, the part of it that formulas count."""
        if self._uses_formulas and covers(step):
            return closed_form(step, tokens, checkpointing)
        if not self._refused:
            try:
                return self._measured(step, tokens, checkpointing)
            except ModelError:
                self._refused = True
        return replace(closed_form(step, tokens, checkpointing), counts_all=False)

    def _measured(self, step: StepShape, tokens: int, checkpointing: Checkpointing) -> MemoryEstimate:
        if not step.model.scanning_layers or step.row_tokens <= LONGEST_ROW_TOKENS:
            return self._on_line(step, tokens, checkpointing)
        longest = self._measured(_of_length(step, LONGEST_ROW_TOKENS), tokens, checkpointing)
        if not step.keeps_scores:
            return longest
        half = self._measured(_of_length(step, LONGEST_ROW_TOKENS // 2), tokens, checkpointing)
        return _between(half, longest, 2 * step.row_tokens / LONGEST_ROW_TOKENS - 1, tokens)

    def _on_line(self, step: StepShape, tokens: int, checkpointing: Checkpointing) -> MemoryEstimate:
        """One row as it was measured; of more the estimate on the line through that and what `MANY_TOKENS` hold."""
        one = self._of_rows(step, 1, checkpointing)
        if tokens == one.micro_batch_tokens:
            return one
        many = self._of_rows(step, max(2, MANY_TOKENS // step.row_tokens), checkpointing)
        share = (tokens - one.micro_batch_tokens) / (many.micro_batch_tokens - one.micro_batch_tokens)
        return _between(one, many, share, tokens)

    def _of_rows(self, step: StepShape, rows: int, checkpointing: Checkpointing) -> MemoryEstimate:
        """What was measured of so many rows, now or before."""
        kinds = _kinds_of(step)
        key = key_of_code([self._config, kinds, [rows, step.row_tokens, step.row_labels, checkpointing]])
        if key not in self._known:
            found = _read(kept(f"steps/{key}.json"))
            if found is None:
                found = self._run(kinds, step, rows * step.row_tokens, checkpointing)
                keep(f"steps/{key}.json", asdict(found))
            self._known[key] = found
        return self._known[key]

    def _run(self, kinds: JsonObject, step: StepShape, tokens: int, checkpointing: Checkpointing) -> MemoryEstimate:
        from lorafit.estimation.dry_run import DryRun

        own = json.dumps({**kinds, **dict.fromkeys(_CHANGED_IN_PLACE)})
        if self._dry is None:
            self._reporter.info("no formula covers the memory of this step: measuring it by dry runs of a few layers")
        if self._dry is None or self._dry[0] != own:
            self._dry = own, DryRun(step, self._config)
        dry = self._dry[1]
        dry.take(step)
        with self._reporter.track(None, "dry runs", self._runs) as bar:
            found = dry.run(tokens, checkpointing, few_layers=True)
            bar.advance()
        self._runs += 1
        return found


def _of_length(step: StepShape, row_tokens: int) -> StepShape:
    """The same step over shorter rows, of which as large a share is trained."""
    return replace(step, row_tokens=row_tokens, row_labels=max(1, step.row_labels * row_tokens // step.row_tokens))


def _kinds_of(step: StepShape) -> JsonObject:
    """All that a dry run depends on beside config and rows."""
    return {
        "quantization": step.quantization.section.model_dump(mode="json"),
        "adapter": step.adapter.section.model_dump(mode="json"),
        "optimizer": step.optimizer.section.model_dump(mode="json"),
        "task": step.task.section.model_dump(mode="json"),
        "dtype": [step.dtype, step.compute_dtype],
        "attention": [step.attention, step.attention_kernel],
        "device": [step.device_kind, step.kernels],
        "packing": step.packs,
        "keeps_unpacked": step.keeps_unpacked,
        "chunk_labels": step.chunk_labels,
        "clips": step.max_grad_norm is not None,
        "pictures": None if step.pictures is None else [asdict(step.pictures), step.held_rows],
    }


def _between(one: MemoryEstimate, other: MemoryEstimate, share: float, tokens: int) -> MemoryEstimate:
    """0 is the one and 1 the other; beyond 1 it is further away."""
    phases = []
    for low, high in zip(one.phases, other.phases, strict=True):
        sizes = {name: (low.parts.get(name, 0), high.parts.get(name, 0)) for name in {**low.parts, **high.parts}}
        parts = {name: round(a + (b - a) * share) for name, (a, b) in sizes.items()}
        phases.append(Phase(low.name, (low if share < 0.5 else high).where, parts))
    return replace(one, phases=tuple(phases), micro_batch_tokens=tokens)


def _read(stored: Any) -> MemoryEstimate | None:
    """A step as it was kept; None where it is nothing of the kind."""
    try:
        return MemoryEstimate(**{**stored, "phases": tuple(Phase(**phase) for phase in stored["phases"])})
    except (ValueError, KeyError, TypeError):
        return None
