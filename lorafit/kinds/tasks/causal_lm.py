"""Next-token prediction: chats, prompts with completions, and plain text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from lorafit.contracts import Batch, Column, ShownSequence, TaskRow
from lorafit.errors import DataError
from lorafit.kinds.tasks import TaskSection, tasks
from lorafit.kinds.tasks._next_token import NextTokenTask

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from lorafit.contracts import Encoded, Example, LossSum, Sample
    from lorafit.objective import Objective


class CausalLmSection(TaskSection):
    """Next-token prediction."""

    kind: Literal["causal-lm"] = "causal-lm"


@tasks.register(CausalLmSection)
class CausalLm(NextTokenTask[CausalLmSection]):
    """The loss is the cross-entropy of the trained tokens; an answer is generated text."""

    closed_form = True
    final_metrics = ("perplexity", "rouge", "exact_match")
    unread: ClassVar[Mapping[str, str]] = {}

    @property
    def scores(self) -> Mapping[str, int]:
        """Summed loss, its weight, which is the trained tokens, and those whose most likely prediction was right."""
        return {"loss": 1, "weight": 1, "tokens": 1, "correct": 1}

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
        encoded = render(sample)
        if encoded is None or not any(encoded.trained[1:]):
            return None
        ids, trained = encoded.input_ids, [False, *encoded.trained[1:]]
        end = len(trained) - trained[::-1].index(True)
        start = next((place for place in range(end, 0, -1) if not trained[place - 1]), 0)
        start = start if start > 1 else 0
        return TaskRow({"tokens": ids, "trained": trained}, len(ids), sum(trained), ids[:start], ids[start:])

    def collate(self, rows: Sequence[Sequence[Example]], pad_id: int) -> Batch:
        """One micro-batch; of packed rows `position_ids` say where each document begins, of one row `bounds` too."""
        from lorafit.objective.next_token import label_tokens

        documents = [[(document["tokens"], document["trained"]) for document in row] for row in rows]
        tensors = label_tokens(documents, pad_id)
        together = [document for row in rows for document in row]
        lengths = [len(document["tokens"]) for document in together]
        numbers, longest = tuple(document.index for document in together), max(lengths) if "bounds" in tensors else None
        return Batch(tensors, len(tensors["label_ids"]), numbers, sum(lengths), longest_document=longest)

    def collate_whole(self, example: Example, pad_id: int) -> Batch:
        """One row with all of its tokens as labels, of which those that are trained count."""
        import torch

        flags = [int(flag) for flag in example["trained"]]
        whole = replace(example, columns={**example.columns, "trained": [1] * len(flags)})
        batch = self.collate([[whole]], pad_id)
        return replace(batch, tensors={**batch.tensors, "counted": torch.tensor(flags[1:])})

    def shape_batch(self, rows: int, tokens: int, labels: int, *, packed: bool) -> Batch:
        """A micro-batch of such a shape, its values left open."""
        import torch

        ids = torch.empty((rows, tokens), dtype=torch.int64)
        index, targets = (torch.empty(labels, dtype=torch.int64) for _ in range(2))
        tensors = {"input_ids": ids, "label_index": index, "label_ids": targets}
        tensors |= {"position_ids": torch.empty_like(ids)} if packed else {}
        return Batch(tensors, labels, tuple(range(rows)), ids.numel())

    def show(self, example: Example) -> tuple[ShownSequence, ...]:
        """The row's tokens, and which of them carry loss."""
        return (ShownSequence([int(token) for token in example["tokens"]], [int(flag) for flag in example["trained"]]),)

    def sum_loss(self, objective: Objective, batch: Batch) -> LossSum:
        """Nats summed over the trained tokens."""
        from lorafit.objective.next_token import sum_cross_entropy

        return sum_cross_entropy(objective, batch)

    def score(self, objective: Objective, batch: Batch) -> Mapping[str, NDArray[np.float64]]:
        """Of each row: summed loss, trained tokens, and those whose most likely prediction was right, [rows]."""
        from lorafit.objective.next_token import score_rows

        return score_rows(objective, batch)

    def cut_probe(self, example: Example, most_tokens: int) -> Example:
        """The row up to its last trained token, and of that the last `most_tokens`, at least 2."""
        flags = example["trained"]
        trained = [place for place, flag in enumerate(flags) if flag]
        end = trained[-1] + 1 if trained else len(flags)
        kept = slice(max(0, end - max(2, most_tokens)), end)
        return replace(example, columns={name: values[kept] for name, values in example.columns.items()})
