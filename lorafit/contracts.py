"""What rooms hand to each other: the rows on their way to a batch, and the protocols that kinds fulfil."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeAlias

from lorafit.pictures import Picture, PlacedPicture

if TYPE_CHECKING:
    import torch

JsonValue: TypeAlias = "bool | int | float | str | list[JsonValue] | dict[str, JsonValue] | None"
"""What stands at a place of a JSON file that is checked."""
JsonObject = dict[str, Any]
"""A JSON object as Python holds it; what its values are is checked where they are read."""
JsonMapping = Mapping[str, Any]
"""The same for whoever only reads it."""
Message = JsonObject
"""One chat message in OpenAI's form: role, content, tool_calls, tool_call_id, name, reasoning_content, weight."""

Kept = Literal["head", "tail", "both"]
"""Of a text that is too long: its beginning, its end, or a quarter of its room for the beginning and the rest for the
end."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One row of a source after its format has read it: a chat, or a prompt with its completion, or plain text.

    A training row has exactly one of `messages`, `completion` and `text` (`prompt` goes with `completion`). A prompt
    that a model is to answer has `messages` that wait for an answer, or `prompt` alone.

    Attributes:
        file: The file or hub data set as the recipe names it.
        line: Line in the file, from 1 (the row's number for parquet and hub data).
        must_contain: Strings that a right answer holds; used by the metric of that name.
        paraphrases: The user's last words said otherwise; used by the metric paraphrase_consistency.
        labels: Names of the classes that the row belongs to; None where it is not classified. With `words` one a word.
        words: The text word by word, where each has a label.
        text_pair: A second text that is read together with the first; None where there is none.
        numbers: What is to be predicted of the text, where that is numbers; None where it is not.
        rejected: The same prompt with the answer that is not wanted, where the row compares two.
        is_apart: Whether prompt and completion are two texts, one for an encoder and one for a decoder.
        mismatched: The same prompt with an answer to another one, where the task reads such (`Task.arrange`).
        pictures: Its images, in the order of the parts of `messages` that stand for them.
        copy: Which changed copy of its row it is, from 1; 0: the row as it is.
    """

    file: str
    line: int
    messages: tuple[Message, ...] | None = None
    tools: tuple[dict[str, Any], ...] | None = None
    prompt: str = ""
    completion: str | None = None
    text: str | None = None
    must_contain: tuple[str, ...] = ()
    paraphrases: tuple[str, ...] = ()
    labels: tuple[str, ...] | None = None
    words: tuple[str, ...] | None = None
    text_pair: str | None = None
    numbers: tuple[float, ...] | None = None
    rejected: Sample | None = None
    is_apart: bool = False
    mismatched: Sample | None = None
    pictures: tuple[Picture, ...] = ()
    copy: int = 0

    @property
    def is_labelled(self) -> bool:
        """Whether it is a text that something is told of, rather than one to be written."""
        return self.labels is not None or self.numbers is not None

    @property
    def turns(self) -> tuple[Message, ...]:
        """A prompt as a chat: a text alone is what the user says."""
        return self.messages if self.messages is not None else ({"role": "user", "content": self.prompt},)

    @property
    def said(self) -> str:
        """Of a prompt what the user says last; empty where it ends in something else than a text of the user."""
        last = self.turns[-1] if self.turns else {}
        content = last.get("content") if last.get("role") == "user" else None
        return content if isinstance(content, str) else ""


PlacedSample: TypeAlias = tuple[int, int, Sample]
"""Number of its source, line there, sample."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A rendered text as tokens, and which of them carry loss. `trained[i]` means: token i is to be predicted.

    Attributes:
        is_cut: Whether it is what was left of a longer text.
        types: Token type of each, where the tokenizer tells two texts apart by them; else empty.
        cuts: Numbers of tokens that stand before something that was left out.
        pictures: Its images, in order.
        images: Where they stand, from a first token to behind the last, before anybody looked at them.
    """

    input_ids: list[int]
    trained: list[bool]
    is_cut: bool = False
    types: Sequence[int] = ()
    cuts: tuple[int, ...] = ()
    pictures: tuple[PlacedPicture, ...] = ()
    images: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a task's prepared rows.

    Attributes:
        name: Its name.
        dtype: numpy's, with its byte order, e.g. `<i4`.
        width: Values of each row; None: as many as the row has.
        holds_tokens: Whether the values are token ids, which the model's embedding must have rows for.
        may_be_empty: Whether a row may have no values in it, where all would be 0.
        is_bounded: Whether values beyond `data.max_length` are left out, whatever `overlength` says: of a sequence
            beside the row's own, which shall not decide what becomes of the row.
        of_tokens: Whether a row without a `width` has a value for each of its tokens.
        says_where: Whether it says where something lies on this machine, which is no part of what the rows are.
    """

    name: str
    dtype: str
    width: int | None = None
    holds_tokens: bool = False
    may_be_empty: bool = False
    is_bounded: bool = False
    of_tokens: bool = True
    says_where: bool = False


@dataclass(frozen=True, slots=True)
class TaskRow:
    """What a task makes of one sample.

    Attributes:
        columns: Its values by column.
        tokens: Tokens of its longest sequence, which `data.max_length` bounds.
        weight: Its share of what a step's loss is divided by, e.g. its trained tokens.
        asked: Tokens that ask; empty where nothing does. Rows that ask the same and answer differently contradict.
        answered: Everything else that tells rows apart.
        trained_tokens: Tokens that carry loss; None where that is its weight.
    """

    columns: Mapping[str, Sequence[float]]
    tokens: int
    weight: int
    asked: Sequence[int]
    answered: Sequence[int]
    trained_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Example:
    """One prepared row, as the loop takes it.

    Attributes:
        index: Its number in the ExampleSet.
        columns: Its values by column of the task, each a sequence (an array, read from the prepared file).
        file: Where it came from.
        line: Line there, from 1.
    """

    index: int
    columns: Mapping[str, Sequence[float]]
    file: str
    line: int

    def __getitem__(self, column: str) -> Sequence[float]:
        return self.columns[column]


@dataclass(frozen=True, slots=True)
class ShownSequence:
    """One of a row's sequences for people.

    Attributes:
        input_ids: Its tokens.
        trained: 0/1 for each: whether it carries loss.
        name: What tells it from the row's other sequences; empty where there is one.
        label: What is learnt of the sequence as a whole; empty where tokens are.
        cuts: Numbers of tokens that stand before something that was left out, where the row knows.
        pictures: Its images.
    """

    input_ids: list[int]
    trained: list[int]
    name: str = ""
    label: str = ""
    cuts: tuple[int, ...] = ()
    pictures: tuple[PlacedPicture, ...] = ()


@dataclass(frozen=True, slots=True)
class ReportTable:
    """A table that a task adds to an evaluation's report.

    Attributes:
        name: Its key in `report.json`.
        title: What it shows, for people.
        headings: Of its columns; the first is of what a line is about.
        lines: Its cells; a share of 1 is a float.
    """

    name: str
    title: str
    headings: tuple[str, ...]
    lines: tuple[tuple[str | int | float, ...], ...]

    def cells(self) -> list[tuple[str, ...]]:
        """The lines for people: shares in per cent."""
        return [
            tuple(f"{100 * cell:.1f} %" if isinstance(cell, float) else str(cell) for cell in line)
            for line in self.lines
        ]


@dataclass(frozen=True, slots=True)
class GenerationRow:
    """One held-out row that an answer is generated for.

    Attributes:
        prompt_ids: What the model gets, generation prompt included.
        prompt_text: The same for people.
        reference: The answer that the row holds, without the end-of-turn token.
        must_contain: Strings that a right answer holds.
        calls: Names of the tools that the answer calls, in order, where the row holds calls apart from its text.
        is_inner: Whether it is a turn before the row's last answer: the last one that calls tools.
        pictures: The prompt's images.
        asked: What the prompt is made of, the answer apart: whoever asks it in other words takes it from here.
    """

    prompt_ids: list[int]
    prompt_text: str
    reference: str
    must_contain: tuple[str, ...]
    file: str
    line: int
    calls: tuple[str, ...] = ()
    is_inner: bool = False
    pictures: tuple[PlacedPicture, ...] = ()
    asked: Sample | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch, made by the task on the CPU. Integer index tensors only, so that no step waits for the device.

    Attributes:
        tensors: What the task's loss reads, by name; `input_ids` [sequences, tokens] is always among them, and
            `pooled` where the task pools over the step that the micro-batch is of.
        weight: What the loss sum is divided by, e.g. the number of labels; known on the host, before the forward.
        rows: Indices of the examples, for messages about a bad step.
        tokens: Real tokens, padding apart.
        trained_tokens: Those that carry loss; None where that is the weight.
        longest_document: Tokens of the longest one of a packed row, where the batch is one row.
        attached: Names of the tensors that the model's forward takes beside token ids, such as pixels.
        lengths: Real tokens of each sequence, where a causal model reads padding behind them without a mask.
    """

    tensors: Mapping[str, torch.Tensor]
    weight: int
    rows: tuple[int, ...]
    tokens: int
    trained_tokens: int | None = None
    longest_document: int | None = None
    attached: tuple[str, ...] = ()
    lengths: tuple[int, ...] = ()

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    @property
    def padded_tokens(self) -> int:
        """Tokens that go through the model, padding included; where a decoder has its own, those too."""
        return sum(self.tensors[name].numel() for name in ("input_ids", "decoder_labels") if name in self.tensors)

    def pinned(self) -> Batch:
        """The same batch in memory that a card reads by itself: copying it there then waits for nothing."""
        return replace(self, tensors={name: tensor.pin_memory() for name, tensor in self.tensors.items()})

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on `device` (copied without waiting)."""
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in self.tensors.items()}
        return replace(self, tensors=moved)


class LossSum(NamedTuple):
    """What one forward gives.

    Attributes:
        loss_sum: Summed over the micro-batch, a scalar in fp32.
        weight: `Batch.weight`, by which the sum over a whole step is divided.
    """

    loss_sum: torch.Tensor
    weight: int


class Examples(Protocol):
    """Prepared rows by number; lengths are known without reading tokens."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...

    @property
    def lengths(self) -> Sequence[int]:
        """Tokens that each row takes in a micro-batch, its sequences padded to one length."""

    @property
    def source_of(self) -> Sequence[int]:
        """Number of each row's source."""

    @property
    def repeats(self) -> Sequence[float]:
        """How often an epoch sees each source."""


class Reporter(Protocol):
    """Where a long job says what it does. The CLI's draws bars and writes to stderr; tests' collects."""

    def info(self, message: str) -> None: ...

    def warn(self, message: str) -> None: ...

    def show(self, renderable: Any) -> None: ...

    def track(self, total: int | None, what: str, done: int = 0) -> Progress: ...


class Progress(Protocol):
    """One bar: `with reporter.track(100, "tokenising") as bar: bar.advance(1, loss=2.1)`.

    Where more is done than `total`, nobody knows any more how much is left, and the bar shows none.
    """

    def __enter__(self) -> Progress: ...

    def __exit__(self, *exc: object) -> None: ...

    def advance(self, amount: int = 1, **shown: Any) -> None: ...


class Silent:
    """A Reporter that keeps quiet, and its own bar, which nobody sees; warnings are kept for whoever asks."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def info(self, message: str) -> None:
        """Drops it."""

    def warn(self, message: str) -> None:
        """Keeps it."""
        self.warnings.append(message)

    def show(self, renderable: Any) -> None:
        """Drops it."""

    def track(self, total: int | None, what: str, done: int = 0) -> Silent:
        """A bar that nobody sees."""
        return self

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, *exc: object) -> None:
        return None

    def advance(self, amount: int = 1, **shown: Any) -> None:
        """Nothing to draw."""
