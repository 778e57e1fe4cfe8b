"""README.md of an adapter on the hub: what was trained, which tokens carried loss, figures with intervals, limits.

The front is made by huggingface_hub's own classes, which write the form that the hub reads. Nothing of it names a place
on this machine: a base or data set that is not on the hub is named in the text, with its hash.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafit.contracts import JsonObject
from lorafit.data.sources.source import is_local
from lorafit.exporting.readme import say_base, say_use, say_what
from lorafit.exporting.source import Source
from lorafit.facts import SEQ2SEQ_CLASS
from lorafit.files.atomic import read_object
from lorafit.model.low_rank import method_of

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

    from lorafit.recipe.schema import Recipe

_PIPELINES = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForImageTextToText": "image-text-to-text",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    SEQ2SEQ_CLASS: "text2text-generation",
}
_CARRIES_LOSS = {
    "assistant": "every answer of the assistant, with the token that ends it",
    "last_turn": "the last answer of each chat, with the token that ends it",
    "completion": "the completion of each row, with the token that ends it",
    "all": "every token",
}


def write_card(source: Source, folder: Path, repo: str) -> list[str]:
    """Writes README.md; gives back what it leaves out, and why."""
    from huggingface_hub import ModelCardData

    base, card, report = source.base_id, source.card, _report(source)
    pipeline = _PIPELINES["AutoModelForCausalLM" if card is None else card.model_class.auto_class]
    data = ModelCardData(
        base_model=base,
        datasets=_hub_datasets(source) or None,
        eval_results=_figures(report, pipeline, source) or None,
        library_name="peft",
        license=source.wish.license,
        model_name=repo,
        pipeline_tag=pipeline,
        tags=[*([f"base_model:adapter:{base}"] if base else []), "lora", "lorafit", "transformers"],
    )
    if base is not None:
        data["base_model_relation"] = "adapter"
    parts = [f"# {repo.partition('/')[2]}", say_what(source)]
    if source.opened is not None:
        parts += [_training(source, source.opened.loaded.recipe), _rows(source, source.opened.loaded.recipe)]
    parts += [_evaluation(report), say_base(source, repo), say_use(source, repo), _limits(source, report)]
    text = f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(part for part in parts if part) + "\n"
    (folder / "README.md").write_text(text, encoding="utf-8")
    notes = []
    if base is None:
        notes.append(
            f"the card names no base_model: {source.base.origin.name} has no hub id, and a local path "
            "would be refused: --base-id states one"
        )
    if source.wish.license is None:
        notes.append("the card names no licence: add --license")
    if not report:
        notes.append("the card has no figures: lorafit eval was not run")
    return notes


def _report(source: Source) -> JsonObject:
    """The run's own evaluation; empty where there is none, or another checkpoint is exported."""
    opened = source.opened
    if opened is None or not opened.run.report("json").is_file():
        return {}
    found = read_object(opened.run.report("json"))
    return found if found.get("checkpoint_step") == opened.adapter(source.wish.checkpoint)[1] else {}


def _hub_datasets(source: Source) -> list[str]:
    if source.opened is None:
        return []
    loaded = source.opened.loaded
    return [one.path for one in loaded.recipe.data.train if not is_local(one.path, loaded.folder)]


def _figures(report: JsonObject, pipeline: str, source: Source) -> list[EvalResult]:
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type=pipeline,
            dataset_type="held-out",
            dataset_name=f"{report['rows']} {report['split']} rows of {source.place.name}",
            dataset_split=str(report["split"]),
            metric_type=str(found["metric"]),
            metric_name=name,
            metric_value=found["tuned"],
            metric_args={
                "interval_95": [found["tuned_low"], found["tuned_high"]],
                "base": found["base"],
                "difference_interval_95": [found["low"], found["high"]],
                "rows": found["rows"],
                "verdict": found["verdict"],
            },
        )
        for name, found in (report.get("metrics") or {}).items()
    ]


def _training(source: Source, recipe: Recipe) -> str:
    card, adapter = source.card, source.require_adapter()
    training, result = recipe.training, source.opened.run.result if source.opened else None
    steps = read_object(result).get("steps") if result is not None and result.is_file() else None
    if source.opened is not None:
        step, best = source.opened.adapter(source.wish.checkpoint)[1], source.opened.run.best_step()
        if step not in (None, steps):
            of = "" if steps is None else f" of {steps}"
            steps = f"{step}{of}{' (best on validation)' if step == best else ''}"
    fields = {ours: adapter.config.get(key) for key, ours in adapter.kind.recipe_fields.items()}
    facts: dict[str, Any] = {
        "task": recipe.task.kind,
        "adapter": ", ".join([method_of(adapter), *(f"{name} {value}" for name, value in fields.items())]),
        "base held in": card.quantization.kind if card else "its own precision",
        "optimizer steps": steps,
        "rows a step": training.batch_size,
        "learning rate": training.learning_rate,
        "optimizer": training.optimizer.kind,
        "schedule": training.schedule.kind,
        "seed": recipe.seed,
        "longest row, tokens": recipe.data.max_length,
    }
    if card is not None:
        facts |= {name: version for name, version in card.versions.items() if name in ("torch", "transformers", "peft")}
    return "## Training\n\n" + _table(("", ""), [(name, value) for name, value in facts.items() if value is not None])


def _rows(source: Source, recipe: Recipe) -> str:
    opened = source.opened
    assert opened is not None
    digest = str(read_object(opened.run.manifest).get("data") or "")
    folder = opened.loaded.folder
    names = [Path(one.path).name if is_local(one.path, folder) else one.path for one in recipe.data.train]
    lines = ["## Rows", "", f"Trained on {', '.join(f'`{name}`' for name in names)}; SHA-256 of all rows `{digest}`."]
    if opened.run.data.is_file():
        train = read_object(opened.run.data)["splits"]["train"]
        share = train["trained_tokens"] / max(1, train["tokens"])
        lines.append(
            f"{train['rows']:,} rows, {train['tokens']:,} tokens, of which {train['trained_tokens']:,} ({share:.0%}) "
            "carried loss."
        )
    carries = _CARRIES_LOSS.get(recipe.data.train_on)
    lines.append(f"What carried loss: {carries}." if carries else "")
    return "\n".join(line for line in lines if line or line == "")


def _evaluation(report: JsonObject) -> str:
    if not report:
        return ""
    rows = [
        (
            name,
            f"{found['base']:.4g}",
            f"{found['tuned']:.4g}",
            _span(found, "tuned_"),
            _span(found, ""),
            found["verdict"],
        )
        for name, found in report["metrics"].items()
    ]
    heads = ("metric", "base", "tuned", "tuned, 95 %", "difference, 95 %", "verdict")
    used = " These rows also chose the checkpoint, so the figures are optimistic." if report["seen_in_training"] else ""
    about = f"On {report['rows']} {report['split']} rows, bootstrap intervals over rows.{used}"
    return f"## Evaluation\n\n{about}\n\n{_table(heads, rows)}"


def _span(found: JsonObject, which: str) -> str:
    low, high = found[f"{which}low"], found[f"{which}high"]
    return "-" if low is None else f"{low:.4g} to {high:.4g}"


def _limits(source: Source, report: JsonObject) -> str:
    lines, card = ["## Limits", ""], source.card
    if card is not None and card.quantization.kind != "none":
        kind = card.quantization.kind
        lines.append(f"- It was trained on the base in {kind}; on other weights of the base it answers less well.")
    if card is not None:
        asked = "chats, by the template beside it" if card.chat else "verbatim text, without a chat template"
        lines.append(f"- It was trained on {asked}; asked otherwise it answers as nobody measured.")
        lines.append(f"- Rows were at most {card.max_length} tokens long.")
    if not report:
        lines.append("- No figures were measured on held-out rows.")
    lines.append("- Nothing is known of its safety, and of what it forgot beside what was measured.")
    return "\n".join(lines)


def _table(heads: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)
