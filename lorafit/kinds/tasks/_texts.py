"""What tasks share that tell something of a whole text, or of two: how rows, batches and cuts are made."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal, TypeVar

from pydantic import Field

from lorafit.contracts import Batch, Column, ShownSequence, TaskRow
from lorafit.kinds.tasks import Task, TaskSection
from lorafit.kinds.tasks._heads import NO_TOKENS, mean_states, pad_texts

if TYPE_CHECKING:
    import torch

    from lorafit.contracts import Encoded, Example, Kept, Sample
    from lorafit.objective import Objective

_SECOND, _CUT_BEFORE, _CUT_BEHIND = 1, 2, 4


class TextSection(TaskSection):
    """What the section of every task has that tells something of whole texts."""

    long_texts: Literal["head", "tail", "both"] = Field(default="head")
    """What `data.overlength: truncate` leaves of a longer text: its beginning, its end, or both, of which the beginning
    gets a quarter of the room. Special tokens stay. Of two texts the longer one gives way first."""

    head: Literal["drawn", "fitted"] = Field(default="drawn")
    """Where the new head begins: `drawn` at random, or `fitted`, as the regression over what it reads of the training
    rows before step 1, which takes a pass over them. Worth it where classes are many and rows of each are few."""


T_co = TypeVar("T_co", bound=TextSection, covariant=True)


class TextTask(Task[T_co]):
    """A task whose rows are texts, or pairs of texts; a row weighs 1."""

    unread: ClassVar[Mapping[str, str]] = NO_TOKENS
    labels_rows = True
    loss_unit = "row"
    text_columns: ClassVar[tuple[Column, ...]] = (
        Column("tokens", "<i4", holds_tokens=True),
        Column("marks", "|u1", may_be_empty=True),  # sums of _SECOND, _CUT_BEFORE and _CUT_BEHIND
    )

    @property
    def keeps(self) -> Kept:
        return self.section.long_texts

    @property
    def starts_head(self) -> bool:
        return self.section.head == "fitted"

    def text_row(
        self,
        sample: Sample,
        render: Callable[[Sample], Encoded | None],
        values: Mapping[str, Sequence[float]],
        answered: Sequence[int],
    ) -> TaskRow | None:
        """The row of a text.

        Args:
            sample: The text.
            render: Makes tokens of it.
            values: By column, what is told of it.
            answered: What tells that from anything else.
        """
        encoded = render(sample)
        if encoded is None:
            return None
        ids, marks = encoded.input_ids, [_SECOND * (kind > 0) for kind in encoded.types]
        for cut in encoded.cuts:
            marks = marks or [0] * len(ids)
            marks[min(cut, len(ids) - 1)] |= _CUT_BEFORE if cut < len(ids) else _CUT_BEHIND
        return TaskRow({"tokens": ids, "marks": marks, **values}, len(ids), 1, ids, answered)

    def text_batch(self, examples: Sequence[Example], pad_id: int, tensors: Mapping[str, torch.Tensor]) -> Batch:
        """Padded texts with a mask, and token types where a row has a second text; `tensors` beside them."""
        import torch

        texts = [example["tokens"] for example in examples]
        made = pad_texts(texts, pad_id)
        marks = [example.columns.get("marks", ()) for example in examples]  # rows of earlier versions have none
        if any(_SECOND & int(mark) for row in marks for mark in row):
            types = torch.zeros_like(made["input_ids"])
            for row, each in enumerate(marks):
                types[row, : len(each)] = torch.tensor([_SECOND & int(mark) for mark in each])
            made["token_type_ids"] = types
        return Batch({**made, **tensors}, len(texts), tuple(each.index for each in examples), sum(map(len, texts)))

    def show_text(self, example: Example, label: str) -> tuple[ShownSequence, ...]:
        """The text, where it is cut, and what is told of it."""
        ids = [int(token) for token in example["tokens"]]
        marks = [int(mark) for mark in example.columns.get("marks", ())]
        before = [place for place, mark in enumerate(marks) if mark & _CUT_BEFORE]
        behind = [len(ids)] if marks and marks[-1] & _CUT_BEHIND else []
        return (ShownSequence(ids, [0] * len(ids), label=label, cuts=(*before, *behind)),)

    def cut_probe(self, example: Example, most_tokens: int) -> Example:
        """The end of the row: what is told of it is told of any part."""
        return self.cut(example, most_tokens)

    def states(self, objective: Objective, batch: Batch) -> torch.Tensor:
        """Mean over a row's tokens."""
        return mean_states(objective, batch)
