"""What an evaluation found: plain frozen values that become a table, `report.json`, `report.md` and `report.jsonl`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from lorafit.answering.generate import Answer
from lorafit.answering.sampling import Sampling
from lorafit.contracts import JsonObject, ReportTable
from lorafit.evaluation.rows import Row, Unscored, WorstRow
from lorafit.evaluation.statistics import CONFIDENCE, RESAMPLES, Comparison

if TYPE_CHECKING:
    pass


@dataclass(frozen=True, slots=True)
class About:
    """What the caller knows about the run that is evaluated.

    Attributes:
        run: Its name or folder.
        checkpoint_step: Step of the adapter that was scored.
        split: Which rows were scored: `test`, `validation`, `train`.
        seen_in_training: Whether these rows also chose the checkpoint or stopped the run.
        trainable_parameters: Parameters that were trained.
        total_parameters: Parameters of base and adapter.
    """

    run: str = ""
    checkpoint_step: int | None = None
    split: str = "test"
    seen_in_training: bool = False
    trainable_parameters: int | None = None
    total_parameters: int | None = None

    @property
    def trainable_share(self) -> float | None:
        """Trained parameters / all parameters, 0 to 1."""
        if self.trainable_parameters is None or not self.total_parameters:
            return None
        return self.trainable_parameters / self.total_parameters


@dataclass(frozen=True, slots=True)
class Speed:
    """How fast one model answered, and how its answers ended.

    Attributes:
        answers: Answers generated.
        tokens: Tokens generated.
        seconds: Time that took, prompts included.
        cut: Answers that reached max_new_tokens without an end-of-turn token.
        no_room: Prompts that filled the model's positions.
    """

    answers: int
    tokens: int
    seconds: float
    cut: int
    no_room: int

    @classmethod
    def of(cls, answers: Sequence[Answer]) -> Speed:
        """Summed over answers."""
        ended = [answer.ended for answer in answers]
        return cls(
            answers=len(answers),
            tokens=sum(answer.tokens for answer in answers),
            seconds=sum(answer.seconds for answer in answers),
            cut=ended.count("length"),
            no_room=ended.count("no_room"),
        )

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens a second, over all rows of a batch together."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def to_json(self) -> JsonObject:
        """All fields and the rate."""
        return {**asdict(self), "tokens_per_second": self.tokens_per_second}


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Base and tuned model on the same rows.

    Attributes:
        about: Run, checkpoint, split, parameters.
        comparisons: A line a value, in the order of the metrics asked for.
        unscored: Metrics that left rows out, or do not apply at all.
        rows: Every row with both models' scores.
        worst: Rows that the tuned model does worst on, worst first.
        retention: The same comparison on rows of general ability; empty without such rows.
        retention_rows: How many those are.
        base_speed: None where no answers were generated.
        tuned_speed: None where no answers were generated.
        signatures: Which program and settings computed each metric.
        seconds: Duration of the whole evaluation; of a command also what it loaded before.
        peak_memory_bytes: Of the device; of the process on a CPU.
        seed: Seed of the bootstrap.
        sampling: How answers were made.
        base_note: What the base was scored with, where that is not the base alone.
        tables: What the task shows beside metrics, of the tuned model.
        base_tables: The same of the base.
        metric_tables: What metrics show beside their values, of both models.
    """

    about: About
    comparisons: tuple[Comparison, ...]
    unscored: tuple[Unscored, ...]
    rows: tuple[Row, ...]
    worst: tuple[WorstRow, ...]
    signatures: dict[str, str]
    seconds: float
    peak_memory_bytes: int
    seed: int
    sampling: Sampling
    retention: tuple[Comparison, ...] = ()
    retention_rows: int = 0
    base_speed: Speed | None = None
    tuned_speed: Speed | None = None
    base_note: str = ""
    tables: tuple[ReportTable, ...] = ()
    base_tables: tuple[ReportTable, ...] = ()
    metric_tables: tuple[ReportTable, ...] = ()

    @property
    def trained_tokens(self) -> int:
        """Trained tokens that were scored."""
        return int(sum(row.tuned.value("tokens") for row in self.rows))

    def to_json(self) -> JsonObject:
        """Everything but the single rows, which go to `report.jsonl`."""
        return {
            **asdict(self.about),
            "trainable_share": self.about.trainable_share,
            "rows": len(self.rows),
            "trained_tokens": self.trained_tokens,
            "metrics": {line.name: line.to_json() for line in self.comparisons},
            "unscored": [{**asdict(entry), "sentence": entry.sentence} for entry in self.unscored],
            "retention": {line.name: line.to_json() for line in self.retention},
            "retention_rows": self.retention_rows,
            "generation": {
                side: speed.to_json()
                for side, speed in (("base", self.base_speed), ("tuned", self.tuned_speed))
                if speed is not None
            },
            "base_note": self.base_note,
            "tables": {"base": _by_name(self.base_tables), "tuned": _by_name(self.tables)},
            "metric_tables": _by_name(self.metric_tables),
            "worst_rows": [row.to_json() for row in self.worst],
            "signatures": self.signatures,
            "bootstrap": {"resamples": RESAMPLES, "confidence": CONFIDENCE, "seed": self.seed},
            "max_new_tokens": self.sampling.max_new_tokens,
            "answers": str(self.sampling),
            "seconds": self.seconds,
            "peak_memory_bytes": self.peak_memory_bytes,
        }


def _by_name(tables: Sequence[ReportTable]) -> JsonObject:
    return {table.name: {"headings": table.headings, "lines": table.lines} for table in tables}
