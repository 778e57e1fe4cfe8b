"""Sequence to sequence: an encoder reads a source, and a decoder learns to write its target.

    source            summarize: the whole report ... </s>       read at once, padded and masked
    decoder input     <pad>  the  report  in  short              the target, behind the model's own start token
    labels            the  report  in  short  </s>               the target, every token of it

Each target token is predicted from the source and the target tokens before it; the loss is their cross-entropy. The
shift by one, and the start token, are the model's own (`prepare_decoder_input_ids_from_labels`); before step 1 the loss
is compared with the one that the model computes from labels alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from lorafit.contracts import Batch, Column, ShownSequence, TaskRow
from lorafit.facts import SEQ2SEQ_MODEL, ModelClass
from lorafit.kinds.row_limits import Limit, TwoTexts
from lorafit.kinds.tasks import Task, TaskSection, tasks
from lorafit.kinds.tasks._next_token import NextTokenTask

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from lorafit.contracts import Encoded, Example, LossSum, Sample
    from lorafit.objective import Objective

_NO_CHATS = "reads sources and targets, which go through no chat template"
_SIDES = ("source", "target")


class Seq2SeqLmSection(TaskSection):
    """An encoder that reads a source, and a decoder that writes its target: T5, BART, Marian."""

    kind: Literal["seq2seq-lm"] = "seq2seq-lm"
    """Sequence to sequence."""
    prefix: str = ""
    """What stands before every source, such as `summarize: `, with its blank."""
    max_target_length: int = Field(default=128, ge=2)
    """Most tokens of a target, its end token included; `data.max_length` is for sources. `data.overlength` says what
    becomes of rows with a longer one."""
    source_language: str | None = None
    """What the tokenizer calls the language of sources, where it writes it beside them (mBART: `en_XX`, NLLB:
    `eng_Latn`)."""
    target_language: str | None = None
    """The same of targets."""


@tasks.register(Seq2SeqLmSection)
class Seq2SeqLm(NextTokenTask[Seq2SeqLmSection]):
    """The labels are all tokens of the target; an answer is generated text."""

    row_format = "source_target"
    final_metrics = ("rouge", "bleu", "chrf", "perplexity")
    columns = tuple(Column(side, "<i4", holds_tokens=True) for side in _SIDES)
    unread: ClassVar[Mapping[str, str]] = {
        **Task.unread,
        "data.chat_template": _NO_CHATS,
        "data.system_prompt": _NO_CHATS,
        "data.dropped_fields": _NO_CHATS,
        "data.train_on": "learns targets, whole",
        "training.embedding_noise": "reads two texts, each by an embedding of its own",
    }

    @property
    def model_class(self) -> ModelClass:
        """An encoder with a decoder."""
        return SEQ2SEQ_MODEL

    @property
    def scores(self) -> Mapping[str, int]:
        """Summed loss, its weight, which is the target's tokens, and those whose most likely prediction was right."""
        return {"loss": 1, "weight": 1, "tokens": 1, "correct": 1}

    @property
    def two_texts(self) -> TwoTexts:
        """The prefix, the target's limit, and the languages."""
        section = self.section
        return TwoTexts(section.prefix, section.max_target_length, section.source_language, section.target_language)

    def limits(self, max_length: int) -> tuple[Limit, ...]:
        """One for each side."""
        target = Limit("task.max_target_length", self.section.max_target_length, "target")
        return (Limit("data.max_length", max_length, "source"), target)

    def assumed_row(self, sequence_tokens: int) -> tuple[int, int]:
        """A source so long, and the longest target."""
        target = self.section.max_target_length
        return sequence_tokens + target, target

    def sequence_tokens(self, row_tokens: int, row_labels: int) -> int:
        """What the target leaves for the source."""
        return max(1, row_tokens - row_labels)

    def encode(self, sample: Sample, render: Callable[[Sample], Encoded | None]) -> TaskRow | None:
        """Tokens of both sides. The row takes as many in a micro-batch as both have."""
        encoded = render(sample)
        if encoded is None:
            return None
        begin = encoded.trained.index(True)
        source, target = encoded.input_ids[:begin], encoded.input_ids[begin:]
        return TaskRow({"source": source, "target": target}, len(encoded.input_ids), len(target), source, target)

    def collate(self, rows: Sequence[Sequence[Example]], pad_id: int) -> Batch:
        """Padded sources with their mask, targets as labels, and where those stand among the decoder's positions."""
        from lorafit.objective.next_token import label_targets

        examples = [example for (example,) in rows]
        tensors = label_targets([(example["source"], example["target"]) for example in examples], pad_id)
        tokens = sum(len(example[side]) for example in examples for side in _SIDES)
        numbers = tuple(example.index for example in examples)
        labels = len(tensors["label_ids"])
        return Batch(tensors, labels, numbers, tokens, trained_tokens=labels)

    def shape_batch(self, rows: int, tokens: int, labels: int, *, packed: bool) -> Batch:
        """A micro-batch of such a shape, its values left open: sources have what the longest targets leave."""
        import torch

        target = max(1, labels // rows)
        ids = torch.empty((rows, max(1, tokens - target)), dtype=torch.int64)
        index, right = (torch.empty(rows * target, dtype=torch.int64) for _ in range(2))
        tensors = {"input_ids": ids, "attention_mask": torch.empty_like(ids), "label_index": index, "label_ids": right}
        tensors["decoder_labels"] = torch.empty((rows, target), dtype=torch.int64)
        return Batch(tensors, rows * target, tuple(range(rows)), rows * tokens)

    def cut(self, example: Example, tokens: int) -> Example:
        """The ends of both sides, each with its share of the tokens."""
        source, target = (len(example[side]) for side in _SIDES)
        kept = min(target, max(1, round(tokens * target / (source + target))))
        ends = {"source": max(1, tokens - kept), "target": kept}
        return replace(example, columns={**example.columns, **{side: example[side][-ends[side] :] for side in _SIDES}})

    def cut_probe(self, example: Example, most_tokens: int) -> Example:
        """The same, of at least two tokens."""
        return self.cut(example, max(2, most_tokens))

    def show(self, example: Example) -> tuple[ShownSequence, ...]:
        """The source, and the target, whose tokens all carry loss."""
        sides = {side: [int(token) for token in example[side]] for side in _SIDES}
        return tuple(ShownSequence(ids, [int(side == "target")] * len(ids), side) for side, ids in sides.items())

    def sum_loss(self, objective: Objective, batch: Batch) -> LossSum:
        """Nats summed over the targets' tokens."""
        from lorafit.objective.next_token import sum_cross_entropy

        return sum_cross_entropy(objective, batch)

    def score(self, objective: Objective, batch: Batch) -> Mapping[str, NDArray[np.float64]]:
        """Of each row: summed loss, target tokens, and those whose most likely prediction was right, [rows]."""
        from lorafit.objective.next_token import score_rows

        return score_rows(objective, batch)
