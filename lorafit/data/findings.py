"""What is said of prepared rows as a whole: shared rows, contradictions, what a recipe may have expected otherwise."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorafit.console.wording import agreed, counted
from lorafit.data.report import DataReport, SplitReport, describe_fates, find_contradictions, find_overlaps
from lorafit.recipe.schema import ValidationFraction

if TYPE_CHECKING:
    from lorafit.data.sample_renderer import Renderer
    from lorafit.data.sources.source import SampleSet
    from lorafit.data.store import ExampleSet
    from lorafit.recipe.schema import DataSection

_FILES_NAMED = 5


def finish_report(
    reports: dict[str, SplitReport],
    sets: dict[str, ExampleSet],
    sources: dict[str, SampleSet],
    data: DataSection,
    renderer: Renderer,
    *,
    is_decided: bool,
) -> DataReport:
    """The report of all splits, with a sentence for each thing that somebody should know of before training.

    Args:
        reports: By split.
        sets: The rows of these.
        sources: What they were read from.
        data: The recipe's section.
        renderer: What rendered them.
        is_decided: How rows are written was settled when a run was trained: it is not said again.
    """
    overlaps = find_overlaps(sets)
    warnings = [_warn_of_glance(split, report, data) for split, report in reports.items() if report.of_rows is not None]
    for overlap in overlaps:
        one, other = overlap.places[0]
        warnings.append(
            f"{counted(overlap.rows, 'row')} of {overlap.second} {agreed(overlap.rows, 'occurs', 'occur')} in "
            f"{overlap.first} as well, the first at {other} and {one}"
        )
    contradictions = find_contradictions(sets["train"]) if "train" in sets else None
    if contradictions is not None:
        one, other = contradictions.places[0]
        told = f"train: {counted(contradictions.prompts, 'question')} with different answers, e.g. {one} and {other}"
        warnings.append(f"{told}: the model learns to guess between them; keep one answer each")
    for split, report in reports.items():
        warnings += describe_fates(split, report, data.max_length)
        for what, count in sorted(report.seen.items()):
            if not what.startswith("history: "):
                warnings.append(f"{split}: {what} in {counted(count, 'row')}")
    for samples in sources.values():
        warnings += [warning for source in samples.sources for warning in source.warnings()]
    warnings += [] if is_decided else _warn_of_verbatim(sources, data, renderer)
    warnings += _warn_of_date(sources, renderer)
    return DataReport(reports, overlaps, contradictions, tuple(warnings))


def _warn_of_glance(split: str, report: SplitReport, data: DataSection) -> str:
    """That only a part was looked at, and what shows with all of it."""
    read = counted(sum(counts.read for counts in report.sources), "row")
    draws = split == "train" and isinstance(data.validation, ValidationFraction)
    shows = "counts all, and draws those that are held out" if draws else "counts all"
    some = f"{split}: only the first {read} of about {report.of_rows:,} are prepared and counted"
    return f"{some}; lorafit preview without --rows {shows}"


def _warn_of_verbatim(sources: dict[str, SampleSet], data: DataSection, renderer: Renderer) -> list[str]:
    """What a recipe may expect of rows that go through no template."""
    plain = {"text"} if data.chat_template is not None else {"text", "prompt_completion"}
    found: dict[str, dict[str, None]] = {}
    for source in (source for samples in sources.values() for source in samples.sources):
        found.setdefault(source.format, {})[source.shown] = None
    warnings = []
    for kind in sorted(plain & found.keys()):
        files = list(found[kind])
        more = f" and {len(files) - _FILES_NAMED} more" if len(files) > _FILES_NAMED else ""
        named = f"{', '.join(files[:_FILES_NAMED])}{more}"
        if data.system_prompt is not None:
            warnings.append(f"{named}: rows of {kind} are verbatim: data.system_prompt is not used")
        if kind == "prompt_completion" and renderer.template and data.train_on != "completion":
            todo = "for chats map them, columns: {question: prompt, answer: completion}; else set train_on: completion"
            warnings.append(f"{named}: prompts and completions go through no chat template; {todo}")
    return warnings


def _warn_of_date(sources: dict[str, SampleSet], renderer: Renderer) -> list[str]:
    """What the template writes of the present moment: the only thing in a run's rows that nobody gave it."""
    written = renderer.written_date
    first = (sample for samples in sources.values() for sample in samples.first_samples())
    if written is None or not any(renderer.is_chat(sample) for sample in first):
        return []
    pinned = f"the chat template writes the date: pinned to {written} when the run begins, for its resumes and answers"
    return [f"{pinned}; to train without, set data.chat_template to a copy without strftime_now"]
