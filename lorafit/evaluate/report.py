"""An Evaluation for people and programs: the terminal's table, and `report.json`, `report.md`, `report.jsonl`."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lorafit.evaluate.evaluation import Evaluation, Speed, WorstRow
from lorafit.evaluate.statistics import Comparison
from lorafit.rundir import RunDir, atomic_file, write_json

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

HEADINGS = ("metric", "base", "tuned", "difference", "95 % interval", "verdict", "rows better / worse")
TERMINAL_WORST_ROWS = 3
_STYLES = {"better": "green", "worse": "red", "not distinguishable": "yellow"}
_MEBIBYTE = 1 << 20


def write_report(run: RunDir, evaluation: Evaluation) -> None:
    """Writes `report.json`, `report.md` and `report.jsonl` (a line a row), each whole or not at all.

    `report.json` comes last: where it is new, the others are.

    Raises:
        ResourceError: The disk is full, read-only or broken; what was there before is intact.
    """
    with atomic_file(run.report("jsonl")) as temporary, temporary.open("w", encoding="utf-8") as file:
        for row in evaluation.rows:
            file.write(json.dumps(row.to_json(), ensure_ascii=False, allow_nan=False) + "\n")
    with atomic_file(run.report("md")) as temporary:
        temporary.write_text(render_markdown(evaluation), encoding="utf-8")
    write_json(run.report("json"), evaluation.to_json())


def describe(evaluation: Evaluation) -> list[str]:
    """What was evaluated, line by line."""
    about = evaluation.about
    generated = f", {evaluation.tuned_speed.answers} answers" if evaluation.tuned_speed else ""
    lines = [f"{len(evaluation.rows)} {about.split} rows, {evaluation.trained_tokens} trained tokens{generated}"]
    if about.checkpoint_step is not None:
        lines[0] += f"; adapter of step {about.checkpoint_step}"
    if about.split == "train":
        lines.append("these rows were trained on: the figures say what was learnt by heart, not what is understood")
    elif about.seen_in_training:
        lines.append(
            f"the {about.split} rows were used twice: they also chose the checkpoint, so that these figures are "
            "optimistic; set data.test for honest ones"
        )
    if about.trainable_share is not None:
        lines.append(
            f"trained: {about.trainable_parameters:,} of {about.total_parameters:,} parameters "
            f"({100 * about.trainable_share:.3g} %)"
        )
    lines += [
        _describe_speed(side, speed)
        for side, speed in (("base", evaluation.base_speed), ("tuned", evaluation.tuned_speed))
        if speed is not None
    ]
    lines.append(f"peak memory {evaluation.peak_memory_bytes / _MEBIBYTE:,.0f} MiB, {evaluation.seconds:.1f} s in all")
    return lines + [entry.sentence for entry in evaluation.unscored]


def describe_retention(evaluation: Evaluation) -> list[str]:
    """What the tuned model lost, kept or gained on rows of general ability, line by line."""
    words = {"better": "gained", "worse": "lost", "not distinguishable": "kept as far as can be seen"}
    return [f"{words[line.verdict]}: {line.sentence}" for line in evaluation.retention]


def render_table(evaluation: Evaluation) -> RenderableType:
    """Everything for a terminal: the table, its sentences, retention, and the worst rows in short."""
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = [_draw(evaluation.comparisons, "base and tuned model on the same rows")]
    parts += [Text(line.sentence, style=_STYLES[line.verdict]) for line in evaluation.comparisons]
    if evaluation.retention:
        parts.append(_draw(evaluation.retention, f"retention: {evaluation.retention_rows} rows of general ability"))
        parts += [Text(line) for line in describe_retention(evaluation)]
    parts += [Text(line, style="dim") for line in describe(evaluation)]
    for worst in evaluation.worst[:TERMINAL_WORST_ROWS]:
        parts.append(Text(f"\n{_headline(worst)}", style="bold"))
        parts += [Text(f"  {name}: {_shorten(text)}") for name, text in _texts(worst)]
    return Group(*parts)


def render_markdown(evaluation: Evaluation) -> str:
    """`report.md`: verdicts first, then figures, then the worst rows in full."""
    title = f"# Evaluation of {evaluation.about.run}" if evaluation.about.run else "# Evaluation"
    lines = [title, "", *(f"- {line.sentence}" for line in evaluation.comparisons), ""]
    lines += _markdown_table(evaluation.comparisons)
    if evaluation.retention:
        lines += ["", f"## Retention: {evaluation.retention_rows} rows of general ability", ""]
        lines += [f"- {line}" for line in describe_retention(evaluation)]
        lines += ["", *_markdown_table(evaluation.retention)]
    lines += ["", "## What was evaluated", "", *(f"- {line}" for line in describe(evaluation))]
    lines += [f"- {name}: {signature}" for name, signature in evaluation.signatures.items()]
    lines.append(
        f"- intervals: paired bootstrap over rows, {evaluation.resamples:,} resamples, seed {evaluation.seed}, 95 %"
    )
    if evaluation.worst:
        lines += ["", f"## The {len(evaluation.worst)} rows that the tuned model does worst on"]
    for worst in evaluation.worst:
        lines += ["", f"### {_headline(worst)}"]
        for name, text in _texts(worst):
            lines += ["", f"{name}:", "", *_fence(text)]
    return "\n".join(lines) + "\n"


def _cells(line: Comparison) -> tuple[str, ...]:
    return (
        line.name,
        line.show(line.base),
        line.show(line.tuned),
        line.show_change(line.difference),
        f"{line.show_change(line.low)} to {line.show_change(line.high)}",
        line.verdict,
        f"{line.rows_better} / {line.rows_worse} of {line.rows}",
    )


def _draw(comparisons: Sequence[Comparison], title: str) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading in ("metric", "verdict") else "right")
    for line in comparisons:
        table.add_row(*_cells(line), style=_STYLES[line.verdict])
    return table


def _markdown_table(comparisons: Sequence[Comparison]) -> list[str]:
    lines = [HEADINGS, ("---", *["---:"] * 4, "---", "---:"), *(_cells(line) for line in comparisons)]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def _describe_speed(side: str, speed: Speed) -> str:
    line = (
        f"{side} model: {speed.tokens} tokens in {speed.answers} answers, {speed.seconds:.1f} s, "
        f"{speed.tokens_per_second:.1f} tokens/s"
    )
    line += f"; {speed.cut} answers cut at the longest length" if speed.cut else ""
    return line + (f"; {speed.no_room} prompts left no room" if speed.no_room else "")


def _headline(worst: WorstRow) -> str:
    row = worst.row
    loss = f", loss {row.tuned.loss_sum / row.tuned.tokens:.4g} a token" if row.tuned.tokens else ""
    return f"{row.place}: {worst.name} {worst.tuned:.4g} (base {worst.base:.4g}){loss}"


def _texts(worst: WorstRow) -> list[tuple[str, str]]:
    row = worst.row
    texts = [("prompt", row.prompt), ("reference", row.tuned.reference)]
    if row.tuned.must_contain:
        texts.append(("must contain", ", ".join(row.tuned.must_contain)))
    answers = [("base answer", row.base.answer), ("tuned answer", row.tuned.answer)]
    return texts + [(name, text) for name, text in answers if text is not None]


def _shorten(text: str, characters: int = 300) -> str:
    """One line; the end of a long text is kept, since a prompt's question stands there."""
    flat = " ".join(text.split())
    return flat if len(flat) <= characters else "…" + flat[-characters:]


def _fence(text: str) -> list[str]:
    """A code block whose fence is longer than any row of backticks in the text."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return [f"{fence}text", *text.split("\n"), fence]
