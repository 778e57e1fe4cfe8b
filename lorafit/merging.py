"""`lorafit merge`: from a run, or from an adapter alone, to a merged model that is proven before it gets its name.

Nothing of transformers or PEFT is imported before the weights are written, so that streaming stays small.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal, cast

from lorafit.answering.opening import open_plain_model
from lorafit.answering.tuned import Tuned, open_lone_adapter, open_tuned
from lorafit.contracts import Column, Example, JsonMapping, Reporter
from lorafit.data.chat.template import compile_or_explain
from lorafit.errors import CheckpointError, DataError, ModelError, ResourceError
from lorafit.evaluation.parity import Parity, compare_merge, require_parity
from lorafit.files.atomic import read_object
from lorafit.files.safetensors import read_index
from lorafit.job import open_job
from lorafit.kinds.tasks import Task, TaskSection, tasks
from lorafit.machine.devices import read_device
from lorafit.model.merge import merge_adapter
from lorafit.model.tokenizer_files import Companions
from lorafit.ops.process_memory import is_out_of_memory
from lorafit.run.results import Merged
from lorafit.run.workspace import OpenedRun

BaseKind = Literal["dequantized", "original"]
_NAMES_BEFORE = {"tokens": "input_ids"}  # of columns, in the rows that an earlier lorafit put aside
_WEIGHTS_HELD = 3.5  # the base quantised, and both models' products in fp32; measured on bf16 files
_LOADED_LIBRARIES_BYTES = 3 << 29
_SPARE_SHARE = 0.8  # of the free memory that a comparison may take


class _Comparison:
    """Logits of the merged folder against the adapter on its base; what `merge_adapter` calls before it publishes."""

    def __init__(self, tuned: Tuned, rows: Sequence[Example], *, must_agree: bool, reporter: Reporter) -> None:
        self._tuned, self._rows, self._must_agree, self._reporter = tuned, rows, must_agree, reporter
        self.parity: Parity | None = None
        self.skipped = ""

    def __call__(self, merged_folder: Path) -> None:
        """Compares where both models fit into memory: on the GPU, else on the CPU.

        Raises:
            NumericsError: The merge is further from the adapter than rounding explains.
        """
        import torch

        weights = sum(entry.size_bytes for entry in read_index(self._tuned.base.path).values())
        needed, found = int(_WEIGHTS_HELD * weights) + _LOADED_LIBRARIES_BYTES, []
        for device in ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",):
            try:
                free = int(_SPARE_SHARE * read_device("cpu" if device == "cpu" else "auto").memory_bytes)
                if needed <= free:
                    self.parity = self._compare(merged_folder, device)
                    break
                found.append(f"{free / 2**30:.1f} GiB are free ({device})")
            except (RuntimeError, MemoryError, OSError, ResourceError) as error:
                if not (is_out_of_memory(error) or isinstance(error, ResourceError)):
                    raise
                found.append(f"not as much could be had ({device})")
            except DataError as error:  # an image of the rows is not there any more
                self.skipped = error.what
                return
        if self.parity is None:
            self.skipped = f"both models take {needed / 2**30:.1f} GiB of memory, {', '.join(found)}"
        elif self._must_agree:
            require_parity(self.parity)

    def _compare(self, merged_folder: Path, device: str) -> Parity:
        card, reporter = self._tuned.card, self._reporter
        if card.attention == "flash_attention_2":  # knows no fp32, and no CPU
            card = card.model_copy(update={"attention": "sdpa"})
        task, tuned = tasks.bind(card.task), replace(self._tuned, card=card)
        task = task if tuned.pictures is None else task.seeing(tuned.pictures)
        adapted = task.build_objective(tuned.load(tuned.tokenizer(), reporter, device).model)
        merged = task.build_objective(open_plain_model(merged_folder, reporter, device).load().model)
        return compare_merge(adapted, merged, self._rows, card.pad_id, reporter)


def merge_run(
    opened: OpenedRun,
    output: Path,
    base_kind: str | None,
    checkpoint: str | None,
    base_model: str | None,
    *,
    verify: bool,
    reporter: Reporter,
) -> Merged:
    """Merges a run's adapter into what it was trained on, or into the original weights. No training row is opened."""
    tuned = open_tuned(opened, checkpoint, base_model, reporter)
    is_quantized = tuned.card.quantization.kind != "none"
    kind = cast(BaseKind, base_kind or ("dequantized" if is_quantized else "original"))
    if kind == "dequantized" and not is_quantized:
        raise ModelError("the run's base was not quantised", key="--base", todo="use --base original")
    agrees = kind == "dequantized" or not is_quantized
    rows = _rows_to_compare(opened, tasks.bind(tuned.card.task), reporter) if verify else None
    compare = _Comparison(tuned, rows or [], must_agree=agrees, reporter=reporter)
    if verify and rows is None:
        compare.skipped = f"{opened.run.comparison.name} is missing, which holds the rows"
    report = merge_adapter(
        tuned.base,
        tuned.adapter,
        output,
        kind=kind,
        quantization=read_object(opened.run.quantization) if kind == "dequantized" else None,
        verify=verify,
        judge=partial(_check_templates, tuned.adapter),
        check=compare if rows is not None else None,
        reporter=reporter,
    )
    return Merged(report, compare.parity, compare.skipped)


def merge_adapter_folder(
    adapter: Path, output: Path, base_kind: str | None, base_model: str | None, *, verify: bool, reporter: Reporter
) -> Merged:
    """Merges an adapter that came without its run. Its base must be on this disk: no file starts a download."""
    saved, base = open_lone_adapter(adapter, base_model, reporter)
    used = saved.quantization() or {}
    is_quantized = used.get("kind", "none") != "none"
    kind = cast(BaseKind, base_kind or ("dequantized" if is_quantized else "original"))
    report = merge_adapter(
        base,
        adapter,
        output,
        kind=kind,
        quantization=used or None,
        verify=verify,
        judge=partial(_check_templates, adapter),
        reporter=reporter,
    )
    return Merged(report, None, "an adapter alone holds no rows to compare on" if verify else "")


def _rows_to_compare(opened: OpenedRun, task: Task[TaskSection], reporter: Reporter) -> list[Example] | None:
    """The rows that training put aside; None where somebody took them away.

    Runs of earlier versions, which have no card, have none: there the recipe's are opened.

    Raises:
        CheckpointError: comparison.json is damaged.
    """
    file = opened.run.comparison
    if opened.run.card.is_file() and not file.is_file():
        return None
    if file.is_file():
        stored = read_object(file)
    else:
        stored = open_job(opened.loaded, reporter, opened.began()).rows_to_compare()
    try:
        rows = [_read_columns(row, task.columns) for row in stored["rows"]]
    except (KeyError, TypeError, ValueError) as error:
        todo = "restore the file, or merge with --no-verify"
        raise CheckpointError("holds no rows of tokens", file=str(file), todo=todo) from error
    return [Example(number, row, file.name, number + 1) for number, row in enumerate(rows)]


def _read_columns(row: JsonMapping, columns: Sequence[Column]) -> dict[str, list[float]]:
    """A row's numbers by column.

    Raises:
        ValueError: A value is no number, or a sequence has not as many in each of its columns as it has tokens.
    """
    found: dict[str, list[float]] = {}
    tokens = 0
    for column in columns:
        if column.may_be_empty and not row.get(column.name):
            continue  # as in runs of earlier versions
        name = column.name if column.name in row else _NAMES_BEFORE[column.name]
        values = found[column.name] = list(row[name])
        tokens = len(values) if column.holds_tokens else tokens
        if not all(isinstance(value, int | float) for value in values):
            raise ValueError("no number")
        if column.width is None and column.of_tokens and len(values) != tokens:
            raise ValueError("not a value a token")
    return found


def _check_templates(adapter: Path, companions: Companions) -> None:
    """Raises ModelError where a template that is taken is not valid; it is compiled, and not run."""
    for text in companions.templates.values():
        try:
            compile_or_explain(text)
        except ModelError as error:
            raise error.at(file=str(adapter)) from error
