"""What metrics ask a model beside the rows' own answers: rows in other words, drawn again, alone.

    rows ──metric.questions──> questions ──reword──> requests ──engine──> replies, by row and metric

The questions are the same for base and tuned model, so that they are made once, and told before anything is written.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple, Protocol

from lorafit.answering.generate import Request
from lorafit.answering.sampling import GREEDY, Sampling
from lorafit.console.wording import counted
from lorafit.contracts import Silent
from lorafit.errors import DataError
from lorafit.kinds.metrics import Question, Reply, RowScore, metrics

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from lorafit.answering.engine import Engine
    from lorafit.answering.generate import Answer
    from lorafit.contracts import GenerationRow, Reporter, Sample

_OFTEN = 11
"""So often a filler is written to see how many tokens it takes."""

Reword = Callable[["Sample", str], list[int]]
"""Token ids of what asks for an answer, with other words in the place of what the user says last."""

Replies = Mapping[str, tuple[Reply, ...]]
"""Of one row: what it answered to each metric's questions."""


class Embeds(Protocol):
    """Gives texts a vector each: a `SentenceEncoder`."""

    def embed(self, texts: Sequence[str], reporter: Reporter) -> Mapping[str, NDArray[np.float64]]: ...


@dataclass(frozen=True, slots=True)
class Asking:
    """How more is asked than the rows' own answers, and by what answers are compared.

    Attributes:
        reword: `Renderer.reword`.
        draws: `evaluation.draws`.
        temperature: `evaluation.draw_temperature`.
        seed: Of the draws.
        encoder: By which metrics compare texts; None: by their letters.
        row_tokens: Of the longest row.
        context_tokens: Of the longest prompt that is asked.
    """

    reword: Reword
    draws: int
    temperature: float
    seed: int = 0
    encoder: Embeds | None = None
    row_tokens: int = 512
    context_tokens: int = 2048

    def fill(self, asked: Sample, question: Question, answer_tokens: int) -> str:
        """The words of a question behind its filler, as often as leaves room for the answer."""
        words, most = question.words or "", self.context_tokens - answer_tokens
        most = min(most, self.row_tokens) if question.room == "row" else most
        if not question.filler:
            return words
        once, often = (len(self.reword(asked, question.filler * times + words)) for times in (1, _OFTEN))
        is_cut = often == once  # an encoder's prompts are cut, however long they are
        times = _OFTEN if is_cut else 1 + (_OFTEN - 1) * (most - once) // (often - once)
        return question.filler * max(1, times) + words


class _Asked(NamedTuple):
    """A question on its way: which row (of a metric's own prompts: one more) and metric it is of, and its tokens."""

    row: int
    metric: str
    question: Question
    prompt_ids: Sequence[int]


@dataclass(frozen=True, slots=True)
class FurtherQuestions:
    """All questions about some rows.

    Attributes:
        rows: The rows.
        asked: The questions in the order of rows and metrics.
        asking: How they are asked.
        sampling: How the rows' own answers are made.
    """

    rows: Sequence[GenerationRow]
    asked: Sequence[_Asked]
    asking: Asking | None
    sampling: Sampling

    @classmethod
    def of(
        cls,
        rows: Sequence[GenerationRow],
        metric_names: Sequence[str],
        asking: Asking | None,
        like: Sequence[GenerationRow] = (),
        sampling: Sampling = GREEDY,
    ) -> FurtherQuestions:
        """What the metrics ask of the rows that they can score, and prompts of their own.

        Args:
            rows: Those that are answered.
            metric_names: The metrics.
            asking: How more is asked; None: nothing is.
            like: The first of them is that in whose form, behind whose system message, prompts of their own are asked.
            sampling: How the rows' own answers are made.

        Raises:
            DataError: The chat template refuses other words.
        """
        found = list[_Asked]()
        if asking is None:
            return cls(rows, found, asking, sampling)
        for number, row in enumerate(rows):
            probe = as_asked(RowScore(answer=""), row)
            for name in metric_names if not row.is_inner else ():
                metric = metrics.get(name)
                questions = metric.questions(probe, asking.draws) if metric.usable(probe) else ()
                found += [_Asked(number, name, each, _prompt_of(row, each, asking)) for each in questions]
        for opening in [_opening(row.asked) for row in like[:1] if row.asked is not None]:
            for metric_name, each in ((name, each) for name in metric_names for each in metrics.get(name).probes()):
                with contextlib.suppress(DataError):  # some templates refuse a turn without words
                    ids = asking.reword(opening, asking.fill(opening, each, sampling.max_new_tokens))
                    found.append(_Asked(len(rows), metric_name, each, ids))
        return cls(rows, found, asking, sampling)

    def tell(self, reporter: Reporter) -> None:
        """Says what they cost, before it is spent."""
        if self.asked:
            names = ", ".join(dict.fromkeys(each.metric for each in self.asked))
            tokens = len(self.asked) * self.sampling.max_new_tokens
            number = counted(len(self.asked), "further answer")
            beside = f", beside {counted(len(self.rows), 'answer')} to the rows themselves" if self.rows else ""
            reporter.info(f"{names}: {number} of each model, at most {tokens:,} tokens{beside}")

    def ask(
        self,
        engine: Engine,
        adapter: str | None,
        stop_ids: Sequence[int],
        reporter: Reporter,
        side: str,
    ) -> list[Replies]:
        """The replies, a mapping for each row, and one more for the metrics' own prompts.

        Args:
            engine: Answers.
            adapter: With this adapter, or as the base alone.
            stop_ids: Tokens that end an answer, beside the model's own.
            reporter: Gets bars.
            side: Which model answers, for people.
        """
        if self.asking is None or not self.asked:
            return [{} for _ in range(len(self.rows) + 1)]
        drawn = replace(
            self.sampling, temperature=self.asking.temperature, seed=self.asking.seed, num_beams=1, length_penalty=1.0
        )
        requests = [
            Request(
                each.prompt_ids,
                adapter,
                drawn if each.question.draw else self.sampling,
                tuple(stop_ids),
                row=each.row * self.asking.draws + each.question.draw,
                pictures=self.rows[each.row].pictures if each.row < len(self.rows) else (),
            )
            for each in self.asked
        ]
        alone = [number for number, each in enumerate(self.asked) if each.question.alone]
        others = [number for number, each in enumerate(self.asked) if not each.question.alone]
        together = [requests[number] for number in others]
        written = engine.answer(together, reporter=reporter, what=f"further answers, {side} model")
        answers: dict[int, Answer] = dict(zip(others, written, strict=True))
        with reporter.track(len(alone), f"one by one, {side} model") if alone else Silent() as bar:
            for number in alone:
                answers[number] = engine.answer([requests[number]])[0]
                bar.advance()
        found: list[dict[str, tuple[Reply, ...]]] = [{} for _ in range(len(self.rows) + 1)]
        for number, each in enumerate(self.asked):
            answer, before = answers[number], ""
            if each.row == len(self.rows):
                before = _text_before(str(engine.tokenizer.decode(each.prompt_ids)), each.question)
            reply = Reply(
                each.question, answer.text, answer.written, answer.ended, before, self.sampling.max_new_tokens
            )
            found[each.row][each.metric] = (*found[each.row].get(each.metric, ()), reply)
        return list(found)


def as_asked(score: RowScore, row: GenerationRow) -> RowScore:
    """The score with what a held-out row holds for metrics over answers."""
    return replace(
        score,
        reference=row.reference,
        must_contain=row.must_contain,
        calls=row.calls,
        prompt=row.asked.said if row.asked is not None else "",
        paraphrases=row.asked.paraphrases if row.asked is not None else (),
    )


def _opening(asked: Sample) -> Sample:
    """The system message of a row and a turn of the user; of a row that is no chat its prompt."""
    if asked.messages is None:
        return asked
    system = [turn for turn in asked.messages if turn["role"] in ("system", "developer")]
    return replace(asked, messages=(*system, {"role": "user", "content": ""}), tools=None, pictures=())


def _text_before(prompt: str, question: Question) -> str:
    """What a rendered prompt holds before the words of the user; all of it where these are blanks."""
    words = (question.filler or question.words or "").strip()
    return prompt.partition(words)[0] if words else prompt


def _prompt_of(row: GenerationRow, question: Question, asking: Asking) -> Sequence[int]:
    if question.words is None or row.asked is None:
        return row.prompt_ids
    try:
        return asking.reword(row.asked, question.words)
    except DataError as error:
        raise error.at(file=row.file, line=row.line) from None
