"""What each command gives back: plain values for `--json`, and the same for people."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lorafit.console.reporting import say
from lorafit.console.wording import counted
from lorafit.contracts import JsonObject, Printed, Sample
from lorafit.ops.recomputed_layers import CHECKPOINTING

if TYPE_CHECKING:
    from rich.console import Console

    from lorafit.answering.generate import Answer
    from lorafit.evaluation.evaluation import Evaluation
    from lorafit.evaluation.parity import Parity
    from lorafit.files.rundir import RunDir
    from lorafit.memory import MemoryEstimate
    from lorafit.model.merge import MergeReport
    from lorafit.plan import Plan, ResolvedPlan
    from lorafit.recipe.load import LoadedRecipe
    from lorafit.trainer.profile import Speed
    from lorafit.trainer.state import FitResult

_GIB, _MIB = 1 << 30, 1 << 20


@dataclass(frozen=True)
class Validated:
    """A recipe without errors."""

    loaded: LoadedRecipe

    def to_json(self) -> JsonObject:
        """The resolved recipe, every default written out."""
        return {
            "valid": True,
            "file": self.loaded.file,
            "digest": self.loaded.digest,
            "recipe": self.loaded.recipe.model_dump(mode="json"),
        }

    def line(self) -> str:
        """For people."""
        return f"{self.loaded.file} is valid (rows and models are not opened: see preview, train --dry-run)"


@dataclass(frozen=True)
class Trained(Printed):
    """A finished run, or only its plan after a dry run (`fit` and `resolved` are None then).

    Attributes:
        has_held_out_rows: Whether its recipe names rows to score it on.
        resumes: Whether a dry run was asked where it would go on.
    """

    run: RunDir
    plan: Plan
    resolved: ResolvedPlan | None
    fit: FitResult | None
    estimate: MemoryEstimate | None = None
    speed: Speed | None = None
    profile: str | None = None
    has_held_out_rows: bool = True
    resumes: bool = False

    @property
    def path(self) -> Path:
        """The run folder."""
        return self.run.root

    def summary(self) -> JsonObject:
        """How training ended, for `result.json`: memory as estimated and as measured among it."""
        from dataclasses import asdict

        if self.fit is None:
            return {}
        return {
            **asdict(self.fit),
            "estimated_tensor_bytes": self.estimate.tensor_bytes if self.estimate else None,
            "estimated_memory_bytes": self.estimate.needed_bytes if self.estimate else None,
            "speed": self.speed.to_json() if self.speed else None,
        }

    def to_json(self) -> JsonObject:
        """Plan, resolved plan and how training ended."""
        return {
            "run": self.run.root.name,
            "plan": self.plan.to_json(),
            "resolved": self.resolved.to_json() if self.resolved else None,
            "result": self.summary() or None,
        }

    def render(self, console: Console) -> None:
        """How it ended, where the time went, memory beside its estimate, and what to do next."""
        if self.fit is None:
            say(console, f"dry run: nothing was loaded or written{self._where_it_would_go_on()}")
            return
        fit = self.fit
        if not fit.was_complete:
            if self.profile is not None:
                say(console, self.profile)
                say(console, f"profile: {near(self.run.profile)}, {near(self.run.trace)}\n")
            rate = f": {self.speed.describe()}" if self.speed else ""
            before, after = "", ""
            if fit.resumed_step:
                before, after = f", {fit.resumed_step:,} of them before this resume,", " altogether"
            say(console, f"trained {counted(fit.steps, 'step')}{before} in {_clock(fit.seconds)}{after}{rate}")
            say(console, self._memory_line(fit))
        which = f"the adapter of step {fit.adapter_step}"
        if fit.best is not None and fit.best.step == fit.adapter_step:
            which += f" (best {fit.best.metric}: {fit.best.value:.4g})"
        shown = near(self.run.root)
        after = f"lorafit eval {shown}"
        if not self.has_held_out_rows:
            task = self.plan.step.step.task
            command = "classify" if task.classified_format is not None else "generate" if task.writes_answers else None
            asked = f"lorafit {command} {shown} --prompt TEXT, or " if command else ""
            after = f"{asked}{after} --set data.test=FILE"
        say(console, f"{which} is in {shown}/adapter; next: {after}")

    def _where_it_would_go_on(self) -> str:
        """Of a dry run with `--resume`: from which checkpoint, or that there is none."""
        if not self.resumes:
            return ""
        found = max(self.run.steps(), default=None)
        none = f"; nothing to resume in {near(self.run.root)}: the run would start at step 0"
        return none if found is None else f"; the last checkpoint is of step {found:,}"

    def _memory_line(self, fit: FitResult) -> str:
        """Peak memory as measured, beside the estimate of the same quantity."""
        tensors, needed = (self.estimate.tensor_bytes, self.estimate.needed_bytes) if self.estimate else (0, 0)

        def beside(measured: int, what: str, estimated: int) -> str:
            return f"{measured / _MIB:,.0f} MiB {what}" + (f" ({estimated / _MIB:,.0f} estimated)" if estimated else "")

        if fit.peak_reserved_bytes is not None:
            parts = [beside(fit.peak_memory_bytes, "of tensors", tensors)]
            parts += [beside(fit.peak_reserved_bytes, "reserved", 0), f"{needed / _MIB:,.0f} MiB of the card estimated"]
        else:
            parts = [beside(fit.peak_memory_bytes, "resident", needed)]
        if (before := fit.peak_before_steps_bytes) is not None and before > fit.peak_memory_bytes:
            parts.append(f"{before / _MIB:,.0f} MiB before its first step")
        if fit.live_tensors is not None:
            parts.append(beside(fit.live_tensors.tensor_bytes, "of live tensors counted", tensors))
        return f"peak memory {'in training' if before is not None else 'of the whole run'}: {', '.join(parts)}"


@dataclass(frozen=True)
class Evaluated(Printed):
    """An evaluation, the run it belongs to, its report's name, and the folder that places of rows are relative to."""

    run: RunDir
    evaluation: Evaluation
    report: str
    folder: Path

    @property
    def metrics(self) -> JsonObject:
        """Figures of base and tuned model by metric, as in `report.json`."""
        figures: JsonObject = self.to_json()["metrics"]
        return figures

    def to_json(self) -> JsonObject:
        """As in `report.json`."""
        return self.evaluation.to_json()

    def render(self, console: Console) -> None:
        """The table, and where the report is."""
        from lorafit.evaluation.report import render_evaluation

        console.print(render_evaluation(self.evaluation, columns=console.width, place=self._place))
        say(console, f"\nreport: {near(self.run.report('md', self.report))}")

    def _place(self, file: str) -> str:
        """A row's file as seen from the current folder; what is no file here (a data set of the hub) stays."""
        path = self.folder / file
        return near(path) if path.exists() else file


@dataclass(frozen=True)
class Merged(Printed):
    """A merge, and the comparison of logits where there was memory for it."""

    report: MergeReport
    parity: Parity | None
    parity_skipped: str = ""

    def to_json(self) -> JsonObject:
        """Both."""
        return {
            **self.report.to_json(),
            "parity": self.parity.to_json() if self.parity else None,
            "parity_skipped": self.parity_skipped or None,
        }

    def render(self, console: Console) -> None:
        """What was written and proven."""
        for line in self.report.describe():
            say(console, line)
        if self.parity is not None:
            for line in self.parity.describe():
                say(console, line)
        elif self.parity_skipped:
            say(console, f"logits were not compared: {self.parity_skipped}")


@dataclass(frozen=True)
class Generated(Printed):
    """Answers to prompts, with the base model's beside them where asked; or to verbatim texts, which are no chats."""

    prompts: Sequence[Sample]
    answers: Sequence[Answer]
    base_answers: Sequence[Answer] | None
    are_chats: bool = True

    @property
    def texts(self) -> list[str]:
        """The answers' texts, in the prompts' order."""
        return [answer.text for answer in self.answers]

    def to_json(self) -> JsonObject:
        """An entry a prompt, in order."""
        rows = []
        for number, (prompt, answer) in enumerate(zip(self.prompts, self.answers, strict=True)):
            row: JsonObject = {"file": prompt.file, "line": prompt.line} if prompt.line else {}
            row |= {"messages": list(prompt.turns)} if self.are_chats else {"prompt": prompt.turns[-1]["content"]}
            if prompt.tools:
                row["tools"] = list(prompt.tools)
            row |= {"answer": answer.text, "tokens": answer.tokens, "ended": answer.ended}
            if self.base_answers is not None:
                row["base_answer"] = self.base_answers[number].text
            rows.append(row)
        return {"answers": rows}

    def render(self, console: Console) -> None:
        """The answers, each behind its prompt; that of a command line is repeated only where two models answer."""
        is_plain = len(self.prompts) == 1 and not self.prompts[0].line and self.base_answers is None
        for number, (prompt, answer) in enumerate(zip(self.prompts, self.answers, strict=True)):
            if is_plain:
                say(console, answer.text)
                continue
            asked = prompt.turns[-1]["content"]
            say(console, f"{'' if number == 0 else chr(10)}> {asked}", "bold")
            if self.base_answers is not None:
                say(console, f"base:  {self.base_answers[number].text}")
                say(console, f"tuned: {answer.text}", "green")
            else:
                say(console, answer.text)


@dataclass(frozen=True)
class Classified(Printed):
    """Texts with their labels and the probabilities of all."""

    texts: Sequence[Sample]
    found: Sequence[JsonObject]

    @property
    def labels(self) -> list[list[str]]:
        """Labels of each text, in order; several or none where a text may have so."""
        return [list(row["labels"]) for row in self.found]

    def to_json(self) -> JsonObject:
        """An entry a text, in order."""
        places = [{"file": text.file, "line": text.line} if text.line else {} for text in self.texts]
        rows = zip(places, self.texts, self.found, strict=True)
        return {"labels": [{**place, **_asked(text), **found} for place, text, found in rows]}

    def write(self, file: Path) -> None:
        """The same as JSON lines, or as a table where the file ends in `.csv`. Raises ResourceError where the disk is
        full, read-only or broken.
        """
        from lorafit.files.atomic import atomic_file

        rows = self.to_json()["labels"]
        lines = [f"{json.dumps(row, ensure_ascii=False, allow_nan=False)}\n" for row in rows]
        text = _as_table(rows) if file.suffix.lower() == ".csv" else "".join(lines)
        with atomic_file(file) as temporary:
            temporary.write_text(text, encoding="utf-8", newline="")

    def render(self, console: Console) -> None:
        """A line a text: labels with their probabilities, and the text where there are several.

        Blank lines of a file that holds a text a line are blank here too, so that both can be laid side by side.
        """
        before, line_before = "", 0
        for text, found in zip(self.texts, self.found, strict=True):
            line_before = line_before if text.file == before else 0
            if text.file.removesuffix(".gz").endswith((".txt", ".jsonl", ".ndjson")):
                console.print("\n" * (text.line - line_before - 1), end="")
            before, line_before = text.file, text.line
            line = _say_words(text, found) if text.words else _say_classes(found)
            flat = " ".join((text.text or "").split())
            console.print(line + (f"  {flat}" if text.line else ""), markup=False, highlight=False, soft_wrap=True)


_PLACE = ("file", "line")


def _as_table(rows: Sequence[JsonObject]) -> str:
    """CSV with a column for each value, and for each class its probability; commas part several labels of a text.

    Words, their labels and entities are JSON lists, as training reads them.
    """
    import csv
    from io import StringIO

    flat: list[JsonObject] = []
    for row in rows:
        if "words" in row:
            as_text = {name: json.dumps(value, ensure_ascii=False) for name, value in row.items() if name not in _PLACE}
            flat.append({name: row[name] for name in _PLACE if name in row} | as_text)
        else:
            own = {name: value for name, value in row.items() if name != "probabilities"}
            shares = {f"p({name})": share for name, share in row["probabilities"].items()}  # a class may be named text
            flat.append({**own, "labels": ", ".join(row["labels"]), **shares})
    table = StringIO()
    writer = csv.DictWriter(table, list(dict.fromkeys(name for line in flat for name in line)))
    writer.writeheader()
    writer.writerows(flat)
    return table.getvalue()


def _asked(text: Sample) -> JsonObject:
    return {"text": text.text} if text.words is None else {"words": list(text.words)}


def _say_classes(found: JsonObject) -> str:
    """`spam 98.2 %`"""
    given = found["labels"] or [max(found["probabilities"], key=found["probabilities"].get)]
    shown = ", ".join(f"{label} {100 * found['probabilities'][label]:.1f} %" for label in given)
    return shown if found["labels"] else f"none of them (nearest: {shown})"


def _say_words(text: Sample, found: JsonObject) -> str:
    """`PER Ada Lovelace, LOC London`; of labels that tell of no entities each word with its own."""
    words = text.words or ()
    if all(label == "O" or "-" in label for label in found["labels"]):
        named = [f"{one['type']} {' '.join(words[one['first'] : one['behind']])}" for one in found["entities"]]
        return ", ".join(named) or "none"
    return " ".join(f"{word}/{label}" for word, label in zip(words, found["labels"], strict=False))


def describe_resolved(resolved: ResolvedPlan) -> str:
    """What `auto` became, and where that comes from."""
    at_once = f", {resolved.micro_batches_at_once} at once" if resolved.micro_batches_at_once > 1 else ""
    cost = resolved.micro_batch_cost_tokens
    started = f" (starting one counts as {cost:,})" if cost else ""
    tried = ""
    if not resolved.is_settled:
        ways = len(set(resolved.first_steps))
        tried = f"; steps 1 to {len(resolved.first_steps)} try {ways} ways, the rest take the fastest"
    kernels = "" if resolved.kernels == "none" else f"{resolved.kernels} kernels, "
    return (
        f"micro-batches of {resolved.micro_batch_tokens} tokens{started}{at_once}, {resolved.attention} attention, "
        f"{kernels}checkpointing {CHECKPOINTING[resolved.gradient_checkpointing]} (from the {resolved.source}){tried}"
    )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def near(path: Path) -> str:
    """A path as the user would type it: relative to the current folder where that is shorter."""
    absolute = os.path.normpath(Path.cwd() / path)
    return min(os.path.relpath(absolute), absolute, key=len)
