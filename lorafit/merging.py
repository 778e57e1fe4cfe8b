"""`lorafit merge`: from a run, or from an adapter alone, to a merged model that is proven before it gets its name.

Nothing of transformers or PEFT is imported before the weights are written, so that streaming stays small.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from lorafit.cache import cache_folder
from lorafit.errors import ModelError
from lorafit.model.adapter import read_adapter
from lorafit.model.base import Base, fingerprint, open_folder, resolve_base
from lorafit.model.merge import merge_adapter
from lorafit.model.weights import read_index
from lorafit.output_folder import check_output
from lorafit.results import Merged
from lorafit.rundir import read_json
from lorafit.workspace import OpenedRun

if TYPE_CHECKING:
    from lorafit.contracts import Reporter
    from lorafit.evaluation.parity import Parity
    from lorafit.model.tokenizer_files import Companions

BaseKind = Literal["dequantized", "original"]
PROMPTS_COMPARED = 16
_WEIGHTS_HELD = 3.5  # the base quantised, and both models' products in fp32; measured on bf16 files
_LOADED_LIBRARIES_BYTES = 3 << 29
_SPARE_SHARE = 0.8  # of the free memory that a comparison may take


class _Comparison:
    """Logits of the merged folder against the adapter on its base; what `merge_adapter` calls before it publishes."""

    def __init__(self, opened: OpenedRun, adapter: Path, base: Base, *, must_agree: bool, reporter: Reporter) -> None:
        self._opened, self._adapter, self._base = opened, adapter, base
        self._must_agree, self._reporter = must_agree, reporter
        self.parity: Parity | None = None
        self.skipped = ""

    def __call__(self, merged_folder: Path) -> None:
        """Compares, where both models fit into memory.

        Raises:
            NumericsError: The merge is further from the adapter than rounding explains.
        """
        from lorafit.devices import cpu_memory_bytes

        weights = sum(entry.size_bytes for entry in read_index(self._base.path).values())
        needed, free = int(_WEIGHTS_HELD * weights) + _LOADED_LIBRARIES_BYTES, int(_SPARE_SHARE * cpu_memory_bytes())
        if needed > free:
            self.skipped = f"both models take {needed / 2**30:.1f} GiB of memory, {free / 2**30:.1f} GiB are free"
            return
        from lorafit.evaluation.parity import compare_merge, require_parity
        from lorafit.evaluation.speaker import load_plain_model
        from lorafit.job import load_adapted, open_job

        job = open_job(self._opened.loaded, self._reporter, self._opened.began())
        examples = job.rows.test or job.rows.validation or job.rows.train
        chosen = [examples[row] for row in range(min(PROMPTS_COMPARED, len(examples)))]
        adapted = load_adapted(job, self._adapter, self._opened.resolved(), self._reporter)
        merged, _ = load_plain_model(merged_folder, self._reporter)
        self.parity = compare_merge(
            adapted,
            merged,
            [[int(token) for token in example.input_ids] for example in chosen],
            trained=[[int(flag) for flag in example.trained] for example in chosen],
            reporter=self._reporter,
        )
        if self._must_agree:
            require_parity(self.parity)


def merge_run(
    opened: OpenedRun, output: Path, base_kind: str | None, checkpoint: str | None, *, verify: bool, reporter: Reporter
) -> Merged:
    """Merges a run's adapter into what it was trained on, or into the original weights."""
    recipe = opened.loaded.recipe
    adapter, _ = opened.adapter(checkpoint)
    is_quantized = recipe.model.quantization.kind != "none"
    kind = cast(BaseKind, base_kind or ("dequantized" if is_quantized else "original"))
    if kind == "dequantized" and not is_quantized:
        raise ModelError("the run's base was not quantised", key="--base", todo="use --base original")
    check_output(output, [opened.run.root])
    base = resolve_base(recipe.model, opened.loaded.folder, reporter)
    compare = _Comparison(
        opened, adapter, base, must_agree=kind == "dequantized" or not is_quantized, reporter=reporter
    )
    report = merge_adapter(
        base,
        adapter,
        output,
        kind=kind,
        quantization=read_json(opened.run.quantization) if kind == "dequantized" else None,
        verify=verify,
        judge=partial(_check_templates, adapter),
        check=compare if verify else None,
        reporter=reporter,
    )
    return Merged(report, compare.parity, compare.skipped)


def merge_adapter_folder(
    adapter: Path, output: Path, base_kind: str | None, *, verify: bool, reporter: Reporter
) -> Merged:
    """Merges an adapter that came without its run. Its base must be on this disk: no file starts a download."""
    saved = read_adapter(adapter)
    quantization = saved.notes.get("quantization") or {}
    is_quantized = quantization.get("kind", "none") != "none"
    kind = cast(BaseKind, base_kind or ("dequantized" if is_quantized else "original"))
    check_output(output, [adapter])
    base = _local_base(str(saved.config.get("base_model_name_or_path") or ""), adapter)
    report = merge_adapter(
        base,
        adapter,
        output,
        kind=kind,
        quantization=saved.quantization(),
        verify=verify,
        judge=partial(_check_templates, adapter),
        reporter=reporter,
    )
    return Merged(report, None, "an adapter alone names no rows to compare on" if verify else "")


def _check_templates(adapter: Path, companions: Companions) -> None:
    """Raises ModelError where a template that is taken is not valid; it is compiled, and not run."""
    from lorafit.data.chat_template import compile_or_explain

    for text in companions.templates.values():
        try:
            compile_or_explain(text)
        except ModelError as error:
            raise error.at(file=str(adapter)) from error


def _local_base(name: str, adapter: Path) -> Base:
    """The base that an adapter names: a converted one in the cache, or a folder beside the adapter or here."""
    candidates = [cache_folder() / "bases" / name, Path(name), adapter / name] if name else []
    for folder in candidates:
        if (folder / "config.json").is_file():
            found = open_folder(folder)
            return replace(found, name=name, digest=fingerprint(folder, found.config))
    raise ModelError(
        f"its base '{name}' is not on this disk",
        file=str(adapter),
        todo="merge the run folder that the adapter came from",
    )
