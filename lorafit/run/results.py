"""What commands about a recipe or a run give back: plain values for `--json`, and the same for people."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lorafit.console.reporting import Printed, say
from lorafit.console.wording import near
from lorafit.contracts import JsonObject

if TYPE_CHECKING:
    from rich.console import Console

    from lorafit.evaluation.evaluation import Evaluation
    from lorafit.evaluation.parity import Parity
    from lorafit.files.rundir import RunDir
    from lorafit.model.merge import MergeReport
    from lorafit.recipe.load import LoadedRecipe


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
