"""An Evaluation in files, for people and programs: `report.json`, `report.md`, `report.jsonl`; and for a terminal.

There it is readable in 80 columns: the table, what follows from it, the worst rows in short.

metric         base   tuned  change     95 % interval  verdict   + / -
must_contain  2.5 %  77.5 %   +75.0    +60.0 to +87.5  better   30 / 0
perplexity    54.60   4.213  -50.39  -61.02 to -41.77  better   40 / 0
95 % interval of the tuned score itself: must_contain 62.5 % to 90.0 %, perplexity 4.013 to 4.442
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lorafit.console.wording import counted
from lorafit.contracts import JsonMapping, ReportTable
from lorafit.errors import row_place
from lorafit.evaluation.evaluation import Evaluation, Speed
from lorafit.evaluation.rows import WorstRow
from lorafit.evaluation.statistics import LEAST_ROWS, RESAMPLES, ROUGH_ROWS, Comparison, Verdict
from lorafit.files.atomic import atomic_file, write_json
from lorafit.files.rundir import RunDir

HEADINGS = ("metric", "base", "tuned", "tuned 95 %", "difference", "95 % interval", "verdict", "rows better / worse")
_MEBIBYTE = 1 << 20
_SHOWN_CHANGES = 3
WIDE_COLUMNS = 140
WORST_ROWS_SHOWN = 3
LINES_SHOWN = 12
CELL = 80
"""Most characters of a cell of a task's or metric's table in a narrow terminal."""
_NARROW_HEADINGS = ("metric", "base", "tuned", "change", "95 % interval", "verdict", "+ / -")
_NARROW_VERDICTS: dict[Verdict, str] = {"not distinguishable": "unclear", "too few rows": "too few"}
_STYLES: dict[Verdict, str] = {
    "better": "green",
    "worse": "red",
    "not distinguishable": "yellow",
    "too few rows": "yellow",
    "not judged": "",
}
_RETENTION_WORDS: dict[Verdict, str] = {
    "better": "gained",
    "worse": "lost",
    "not distinguishable": "kept as far as can be seen",
    "too few rows": "too few rows to tell",
}


def name_report(
    *, split: str | None, limit: int | None, checkpoint_step: int | None, changed: JsonMapping | None = None
) -> str:
    """`report`, or a name of its own for what is not the run's own evaluation: other rows, answers or checkpoint.

    Args:
        split: The rows, where they are not those that are scored when none are named.
        limit: How many rows, where not all were scored.
        checkpoint_step: Step of the checkpoint, where not the run's adapter was scored.
        changed: Keys of the recipe that flags changed for this evaluation, with their values.
    """
    parts = ["report"]
    parts += [split] if split is not None else []
    if changed:  # the last words of a few keys, for people, and a hash of all, which tells any two apart
        words = list(dict.fromkeys(key.rpartition(".")[2] for key in sorted(changed)))
        text = json.dumps(changed, sort_keys=True, ensure_ascii=True)
        parts.append("-".join(["set", *words[:_SHOWN_CHANGES], hashlib.sha256(text.encode()).hexdigest()[:8]]))
    parts += [f"first-{limit}"] if limit is not None else []
    parts += [f"step-{checkpoint_step}"] if checkpoint_step is not None else []
    return ".".join(parts)


def write_report(run: RunDir, evaluation: Evaluation, name: str = "report") -> None:
    """Writes `NAME.json`, `NAME.md` and `NAME.jsonl` (a line a row), each whole or not at all.

    `NAME.json` comes last: where it is new, the others are.

    Raises:
        ResourceError: The disk is full, read-only or broken; what was there before is intact.
    """
    with atomic_file(run.report("jsonl", name)) as temporary, temporary.open("w", encoding="utf-8") as file:
        for row in evaluation.rows:
            file.write(json.dumps(row.to_json(), ensure_ascii=False, allow_nan=False) + "\n")
    with atomic_file(run.report("md", name)) as temporary:
        temporary.write_text(render_markdown(evaluation), encoding="utf-8")
    write_json(run.report("json", name), evaluation.to_json())


def describe(evaluation: Evaluation) -> list[str]:
    """What was evaluated, line by line."""
    about = evaluation.about
    generated = f", {counted(evaluation.tuned_speed.answers, 'answer')}" if evaluation.tuned_speed else ""
    tokens = f", {counted(evaluation.trained_tokens, 'trained token')}" if evaluation.trained_tokens else ""
    lines = [f"{counted(len(evaluation.rows), f'{about.split} row')}{tokens}{generated}"]
    if about.checkpoint_step is not None:
        lines[0] += f"; adapter of step {about.checkpoint_step}"
    if about.split == "train":
        lines.append("these rows were trained on: the figures say what was learnt by heart, not what is understood")
    elif about.seen_in_training:
        lines.append(
            f"the {about.split} rows were used twice: they also chose the checkpoint, so that these figures are "
            "optimistic; set data.test for honest ones"
        )
    if evaluation.base_note:
        lines.append(f"base: {evaluation.base_note}")
    if about.trainable_share is not None:
        lines.append(
            f"trained: {about.trainable_parameters:,} of {about.total_parameters:,} parameters "
            f"({100 * about.trainable_share:.3g} %)"
        )
    if evaluation.tuned_speed:
        lines.append(f"answers: {evaluation.sampling}")
    lines += [
        _describe_speed(side, speed)
        for side, speed in (("base", evaluation.base_speed), ("tuned", evaluation.tuned_speed))
        if speed is not None
    ]
    lines.append(f"peak memory {evaluation.peak_memory_bytes / _MEBIBYTE:,.0f} MiB, {evaluation.seconds:.1f} s in all")
    return lines + [entry.sentence for entry in evaluation.unscored]


def describe_retention(evaluation: Evaluation) -> list[str]:
    """What the tuned model lost, kept or gained on rows of general ability, line by line."""
    return [f"{_RETENTION_WORDS[line.verdict]}: {line.sentence}" for line in evaluation.retention]


def render_markdown(evaluation: Evaluation) -> str:
    """`report.md`: verdicts first, then figures, then the worst rows in full."""
    title = f"# Evaluation of {evaluation.about.run}" if evaluation.about.run else "# Evaluation"
    lines = [title, "", *(f"- {line.sentence}" for line in evaluation.comparisons), ""]
    lines += _markdown_table(evaluation.comparisons)
    if evaluation.retention:
        lines += ["", f"## Retention: {counted(evaluation.retention_rows, 'row')} of general ability", ""]
        lines += [f"- {line}" for line in describe_retention(evaluation)]
        lines += ["", *_markdown_table(evaluation.retention)]
    for title, table in _titled_tables(evaluation):
        lines += ["", f"## {title[0].upper()}{title[1:]}", ""]
        lines += _as_markdown([table.headings, ("---", *["---:"] * (len(table.headings) - 1)), *table.cells()])
    lines += ["", "## What was evaluated", "", *(f"- {line}" for line in describe(evaluation))]
    lines += [f"- {name}: {signature}" for name, signature in evaluation.signatures.items()]
    lines.append(
        f"- intervals, of the tuned score and of the difference: paired bootstrap over rows, {RESAMPLES:,} "
        f"resamples, seed {evaluation.seed}, 95 %; of shares of rows: Wilson's, and Newcombe's of the paired difference"
    )
    if evaluation.worst:
        lines += ["", f"## The {counted(len(evaluation.worst), 'row')} that the tuned model does worst on"]
    for worst in evaluation.worst:
        lines += ["", f"### {headline(worst, worst.row.file)}"]
        for name, text in texts_of(worst):
            lines += ["", f"{name}:", "", *_fence(text)]
    return "\n".join(lines) + "\n"


def cells_of(line: Comparison) -> tuple[str, ...]:
    """A line of the table, as `HEADINGS`."""
    return (
        line.name,
        line.show(line.base),
        line.show(line.tuned),
        line.tuned_span,
        line.show_change(line.difference),
        line.span,
        line.verdict,
        "-" if line.verdict == "not judged" else f"{line.rows_better} / {line.rows_worse} of {line.rows}",
    )


def _markdown_table(comparisons: Sequence[Comparison]) -> list[str]:
    return _as_markdown([HEADINGS, ("---", *["---:"] * 5, "---", "---:"), *(cells_of(line) for line in comparisons)])


def _as_markdown(lines: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |" for cells in lines]


def _describe_speed(side: str, speed: Speed) -> str:
    line = (
        f"{side} model: {counted(speed.tokens, 'token')} in {counted(speed.answers, 'answer')}, {speed.seconds:.1f} s, "
        f"{speed.tokens_per_second:.1f} tokens/s"
    )
    line += f"; {counted(speed.cut, 'answer')} cut at the longest length" if speed.cut else ""
    return line + (f"; {counted(speed.no_room, 'prompt')} left no room" if speed.no_room else "")


def headline(worst: WorstRow, file: str) -> str:
    """A worst row in one line: its place, what it is ranked by, its loss."""
    row, mean = worst.row, worst.row.tuned.mean_loss
    unit = " a token" if row.tuned.value("tokens") else ""
    ranked = f"{row_place(file, row.line)}: {worst.name} {worst.tuned:.4g}"
    if worst.name == "loss":
        return f"{ranked}{unit} (base {worst.base:.4g})"
    return f"{ranked} (base {worst.base:.4g})" + (f", loss {mean:.4g}{unit}" if mean is not None else "")


def texts_of(worst: WorstRow) -> list[tuple[str, str]]:
    """Prompt, images, reference (of a pair both answers) and the models' answers of a worst row, each with its name."""
    row = worst.row
    images = [("images", ", ".join(row.images))] if row.images else []
    texts = [("prompt", row.prompt), *images, *(worst.answers or [("reference", row.tuned.reference)])]
    if row.tuned.must_contain:
        texts.append(("must contain", ", ".join(row.tuned.must_contain)))
    answers = [("base answer", row.base.answer), ("tuned answer", row.tuned.answer)]
    return texts + [(name, text) for name, text in answers if text is not None]


def _fence(text: str) -> list[str]:
    """A code block whose fence is longer than any row of backticks in the text."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return [f"{fence}text", *text.split("\n"), fence]


def render_evaluation(
    evaluation: Evaluation, *, columns: int, place: Callable[[str], str] = lambda file: file
) -> RenderableType:
    """Everything for a terminal.

    Args:
        evaluation: What was found.
        columns: Width of the terminal; from 140 on nothing is shortened.
        place: Makes a path that the reader can open of a row's file.
    """
    wide = columns >= WIDE_COLUMNS
    parts: list[RenderableType] = [_draw(evaluation.comparisons, "base and tuned model on the same rows", wide=wide)]
    spans = [f"{line.name} {line.tuned_span}" for line in evaluation.comparisons if line.tuned_span != "-"]
    if spans and not wide:
        parts.append(Text(f"95 % interval of the tuned score itself: {', '.join(spans)}"))
    parts += [Text(line, style=_STYLES[verdict]) for verdict, line in _conclude(evaluation.comparisons)]
    if evaluation.retention:
        title = f"\nretention: {counted(evaluation.retention_rows, 'row')} of general ability"
        parts.append(_draw(evaluation.retention, title, wide=wide))
        parts += [
            Text(line, style=_STYLES[verdict]) for verdict, line in _conclude(evaluation.retention, _RETENTION_WORDS)
        ]
    parts += [_draw_table(title, table, wide=wide) for title, table in _titled_tables(evaluation)]
    parts += [Text(line, style="dim") for line in describe(evaluation)]
    for worst in evaluation.worst[:WORST_ROWS_SHOWN]:
        parts.append(Text(f"\n{headline(worst, place(worst.row.file))}", style="bold"))
        parts += [Text(f"  {name}: {_shorten(text)}") for name, text in texts_of(worst)]
    return Group(*parts)


def _draw(comparisons: Sequence[Comparison], title: str, *, wide: bool) -> Table:
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for heading in HEADINGS if wide else _NARROW_HEADINGS:
        is_word = heading in ("metric", "verdict")
        no_wrap = heading != "95 % interval"  # it breaks between its ends, where a long name needs the room
        table.add_column(heading, justify="left" if is_word else "right", no_wrap=no_wrap, overflow="fold")
    for line in comparisons:
        table.add_row(*(cells_of(line) if wide else _narrow_cells(line)), style=_STYLES[line.verdict])
    return table


def _titled_tables(evaluation: Evaluation) -> Iterator[tuple[str, ReportTable]]:
    """Those of the task and those of metrics, each with its title."""
    yield from ((f"tuned model, {table.title}", table) for table in evaluation.tables)
    yield from ((table.title, table) for table in evaluation.metric_tables)


def _draw_table(title: str, shown: ReportTable, *, wide: bool) -> Table:
    """A table of the task or of a metric, its first lines; long cells are cut where the terminal is narrow."""
    more = len(shown.lines) - LINES_SHOWN
    title = f"\n{title}" + (f": the first {LINES_SHOWN} of {len(shown.lines)}" if more > 0 else "")
    table = Table(title=Text(title), title_justify="left", box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for number, heading in enumerate(shown.headings):
        table.add_column(Text(heading), justify="right" if number else "left", overflow="fold")
    for cells in shown.cells()[:LINES_SHOWN]:
        table.add_row(*(Text(cell if wide or len(cell) <= CELL else f"{cell[: CELL - 1]}…") for cell in cells))
    return table


def _narrow_cells(line: Comparison) -> tuple[str, ...]:
    """As in the report, points and the number of rows left out: the line below the table says it."""
    name, base, tuned, _, change, interval, verdict, rows = cells_of(line)
    change, interval, rows = change.removesuffix(" points"), interval.replace(" points", ""), rows.partition(" of ")[0]
    return name, base, tuned, change, interval, _NARROW_VERDICTS.get(line.verdict, verdict), rows


def _conclude(
    comparisons: Sequence[Comparison], words: dict[Verdict, str] | None = None
) -> Iterator[tuple[Verdict, str]]:
    """A line for all values with the same verdict on equally many rows."""
    groups: dict[tuple[Verdict, int], list[str]] = {}
    for line in comparisons:
        groups.setdefault((line.verdict, line.rows), []).append(line.name)
    for (verdict, rows), names in groups.items():
        said = (words or {}).get(verdict) or ("too few rows to tell" if verdict == "too few rows" else verdict)
        number = counted(rows, "row")
        if verdict == "too few rows":
            note = f" ({number}; a verdict needs {LEAST_ROWS})"
        elif verdict == "not judged":
            note = f" (of all answers together, {number})"
        else:
            note = f" {'with' if verdict == 'not distinguishable' else 'on'} {number}"
            note += " (so few give a rough interval)" if rows < ROUGH_ROWS else ""
        yield verdict, f"{said}{note}: {', '.join(names)}"


def _shorten(text: str, characters: int = 300) -> str:
    """One line; the end of a long text is kept, since a prompt's question stands there."""
    flat = " ".join(text.split())
    return flat if len(flat) <= characters else "…" + flat[-characters:]
