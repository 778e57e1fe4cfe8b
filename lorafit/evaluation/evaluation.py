"""What an evaluation found: plain frozen values that become a table, `report.json`, `report.md` and `report.jsonl`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from lorafit.answering.generate import Answer
from lorafit.console.wording import counted
from lorafit.contracts import JsonObject
from lorafit.evaluation.statistics import CONFIDENCE, RESAMPLES, Comparison
from lorafit.kinds.metrics import RowScore


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
class Row:
    """One held-out row with both models' scores.

    Attributes:
        prompt: What the model got, as text; empty where nothing was generated for the row.
        call: The same row as it was asked at an earlier turn, the last one that calls tools; None where it was not.
    """

    file: str
    line: int
    prompt: str
    base: RowScore
    tuned: RowScore
    call: Row | None = None

    def asked_for(self, needs: str) -> Row:
        """The row as a metric reads it, by what that needs: `calls` means the call, where one was asked for."""
        return self.call if needs == "calls" and self.call is not None else self

    def to_json(self) -> JsonObject:
        """The row for `report.jsonl`."""
        return {
            "file": self.file,
            "line": self.line,
            "prompt": self.prompt,
            "reference": self.tuned.reference,
            "must_contain": list(self.tuned.must_contain),
            "base": _side(self.base),
            "tuned": _side(self.tuned),
            **({"call": _call(self.call)} if self.call is not None else {}),
        }


@dataclass(frozen=True, slots=True)
class WorstRow:
    """A row that the tuned model does badly on.

    Attributes:
        row: The row, prompt and reference filled in.
        name: The value it is ranked by.
        base: That value of the base model on this row.
        tuned: That value of the tuned model on this row.
    """

    row: Row
    name: str
    base: float
    tuned: float

    def to_json(self) -> JsonObject:
        """The row and what it is ranked by."""
        return {**self.row.to_json(), "ranked_by": self.name, "base_score": self.base, "tuned_score": self.tuned}


@dataclass(frozen=True, slots=True)
class Unscored:
    """Rows that a metric could not score.

    Attributes:
        metric: The metric.
        rows: How many it could not score.
        of: Rows there were.
        condition: What a row needs.
    """

    metric: str
    rows: int
    of: int
    condition: str

    @property
    def sentence(self) -> str:
        """For people."""
        if self.rows == self.of:
            return f"{self.metric}: does not apply, none of {counted(self.of, 'row')} is {self.condition}"
        return f"{self.metric}: {self.rows} of {counted(self.of, 'row')} left out, it needs {self.condition}"


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
        seconds: Duration of the whole evaluation.
        peak_memory_bytes: Of the device; of the process on a CPU.
        seed: Seed of the bootstrap.
        max_new_tokens: Longest answer.
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
    max_new_tokens: int
    retention: tuple[Comparison, ...] = ()
    retention_rows: int = 0
    base_speed: Speed | None = None
    tuned_speed: Speed | None = None
    resamples: int = field(default=RESAMPLES)

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
            "worst_rows": [row.to_json() for row in self.worst],
            "signatures": self.signatures,
            "bootstrap": {"resamples": self.resamples, "confidence": CONFIDENCE, "seed": self.seed},
            "max_new_tokens": self.max_new_tokens,
            "seconds": self.seconds,
            "peak_memory_bytes": self.peak_memory_bytes,
        }


def _call(row: Row) -> JsonObject:
    """What was asked at a turn before the last answer; the row's losses stand beside it already."""
    return {
        "prompt": row.prompt,
        "reference": row.tuned.reference,
        "base_answer": row.base.answer,
        "tuned_answer": row.tuned.answer,
    }


def _side(score: RowScore) -> JsonObject:
    sums = {name: values for name, values in score.sums.items() if name not in ("loss", "weight")}
    shown = {name: int(values[0]) if len(values) == 1 else list(values) for name, values in sums.items()}
    return {"loss": score.mean_loss, **shown, "answer": score.answer}
