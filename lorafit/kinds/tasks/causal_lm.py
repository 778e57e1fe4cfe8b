"""Next-token prediction: chats, prompts with completions, and plain text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from lorafit.contracts import Batch, Column, ShownSequence, TaskRow
from lorafit.errors import DataError
from lorafit.kinds.tasks import TaskSection, tasks
from lorafit.kinds.tasks._answers import AnswerTask, answer_row

if TYPE_CHECKING:
    from lorafit.contracts import Encoded, Example, Sample


class CausalLmSection(TaskSection):
    """Next-token prediction."""

    kind: Literal["causal-lm"] = "causal-lm"


@tasks.register(CausalLmSection)
class CausalLm(AnswerTask[CausalLmSection]):
    """The loss is the cross-entropy of the trained tokens; an answer is generated text."""

    closed_form = True
    unread: ClassVar[Mapping[str, str]] = {}

    @property
    def columns(self) -> tuple[Column, ...]:
        """Token ids, and 0/1 for each: whether it is to be predicted."""
        return (Column("tokens", "<i4", holds_tokens=True), Column("trained", "|u1"))

    def encode(self, sample: Sample, render: Callable[[Sample], Encoded | None]) -> TaskRow | None:
        """The rendered row; None where no token is trained (the first cannot be: nothing stands before it).

        The last stretch of trained tokens is the answer; a first token alone before it asks nothing.
        """
        if sample.labels is not None and (sample.messages or sample.completion) is not None:
            todo = "set task: kto, or keep rows whose label is true; format: prompt_completion learns every answer"
            raise DataError("an answer with a verdict is not for task causal-lm", todo=todo)
        if sample.labels is not None:
            todo = "set the task that learns it; format: text learns the text alone"
            raise DataError("a row that is classified is not for task causal-lm", todo=todo)
        if sample.rejected is not None:
            columns = "completion: chosen" if sample.messages is None else "messages: chosen"
            todo = f"set the task that learns it; columns: {{{columns}}} learns the chosen answer alone"
            raise DataError("a row that compares two answers is not for task causal-lm", todo=todo)
        if sample.is_apart:
            todo = "set task: seq2seq-lm; columns: {prompt: .., completion: ..} learns both as one text"
            raise DataError("a row of a source and a target is not for task causal-lm", todo=todo)
        return answer_row(render(sample))

    def collate(self, rows: Sequence[Sequence[Example]], pad_id: int) -> Batch:
        """One micro-batch; of packed rows `position_ids` say where each document begins, of one row `bounds` too."""
        from lorafit.objective.next_token import label_tokens

        documents = [[(document["tokens"], document["trained"]) for document in row] for row in rows]
        tensors = label_tokens(documents, pad_id)
        together = [document for row in rows for document in row]
        lengths = [len(document["tokens"]) for document in together]
        numbers, longest = tuple(document.index for document in together), max(lengths) if "bounds" in tensors else None
        each = tuple(sum(len(document["tokens"]) for document in row) for row in rows)
        return Batch(tensors, len(tensors["label_ids"]), numbers, sum(each), longest_document=longest, lengths=each)

    def show(self, example: Example) -> tuple[ShownSequence, ...]:
        """The row's tokens, and which of them carry loss."""
        return (ShownSequence([int(token) for token in example["tokens"]], [int(flag) for flag in example["trained"]]),)

    def cut_probe(self, example: Example, most_tokens: int) -> Example:
        """The row up to its last trained token, and of that the last `most_tokens`, at least 2."""
        flags = example["trained"]
        trained = [place for place, flag in enumerate(flags) if flag]
        end = trained[-1] + 1 if trained else len(flags)
        kept = slice(max(0, end - max(2, most_tokens)), end)
        return replace(example, columns={name: values[kept] for name, values in example.columns.items()})
