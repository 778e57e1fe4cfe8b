"""Chats with images: the loss is that of the answers' tokens, and an answer is generated text.

    row      tokens     <image> <image> <image> <image> What is it? A cat.<end>    images stand where their tokens do
             trained    0       0       0       0       0           1
             pictures   file, hash, size, first and last token of each             no pixel is kept
    batch    input_ids, labels, and what the model's processor makes of the images of its rows, in their order

Images are read when a batch is built, in the thread that builds ahead. A row is never cut through an image: it is
whole, or left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from lorafit.contracts import Batch, Column, ShownSequence, TaskRow
from lorafit.errors import DataError
from lorafit.facts import ModelClass, PictureFacts
from lorafit.kinds.tasks import TaskSection, tasks
from lorafit.kinds.tasks._answers import AnswerTask, answer_row
from lorafit.pictures import pack_pictures, unpack_pictures

if TYPE_CHECKING:
    import torch

    from lorafit.contracts import Encoded, Example, Examples, Sample
    from lorafit.pictures import PictureReader, PlacedPicture

_LARGE = (2048, 2048)
"""Pixels of an image of which processors make what they make of their largest: they scale it down, or cut it up."""


class ImageTextToTextSection(TaskSection):
    """Answers about images."""

    kind: Literal["image-text-to-text"] = "image-text-to-text"
    """Answers about images: LLaVA, Idefics3, SmolVLM and their kin."""
    projector: Literal["none", "full"] = "none"
    """What becomes of the module that joins the vision tower to the language model: `none`, it stays as it is; `full`,
    it is trained whole and saved with the adapter. The vision tower itself stays as it is."""


@tasks.register(ImageTextToTextSection)
class ImageTextToText(AnswerTask[ImageTextToTextSection]):
    """The loss is the cross-entropy of the trained tokens, none of which is an image's."""

    row_format = "image_messages"
    reads_pictures = True
    unread: ClassVar[Mapping[str, str]] = {
        **AnswerTask.unread,
        "data.overlength=truncate": "cuts no row, which would cut its images",
        "evaluation.num_beams": "searches no beams for prompts with images",
        "data.augment": "reads chats with images, which are no texts of one field",
        "data.system_prompt": "takes chats as they are: give them their system messages",
    }
    columns = (
        Column("tokens", "<i4", holds_tokens=True),
        Column("trained", "|u1"),
        Column("pictures", "|u1", of_tokens=False, says_where=True),
        Column("picture_hashes", "|u1", of_tokens=False),
    )
    _reader: PictureReader | None = None

    @property
    def model_class(self) -> ModelClass:
        """A model of several modalities, its projector trained where the recipe says so."""
        return ModelClass("AutoModelForImageTextToText", trains_projector=self.section.projector == "full")

    def seeing(self, reader: PictureReader) -> ImageTextToText:
        """The task with the model's processor."""
        sees = copy(self)
        sees._reader = reader
        return sees

    def pictures(self, example: Example) -> tuple[PlacedPicture, ...]:
        """The images of a row, each where its tokens stand."""
        return unpack_pictures(example["pictures"])

    def image_tokens(self, examples: Examples) -> list[int]:
        """Of each row, how many tokens stand for images."""
        return [sum(one.tokens for one in self.pictures(examples[row])) for row in range(len(examples))]

    def picture_facts(self, examples: Examples) -> PictureFacts | None:
        """What images take where they fill as large a share of a micro-batch as of any row, each as large as any."""
        of_images, lengths = self.image_tokens(examples), examples.lengths
        if not any(of_images):
            return None
        densest = max(range(len(of_images)), key=lambda row: of_images[row] / lengths[row])
        all_of_them = (one for row, tokens in enumerate(of_images) if tokens for one in self.pictures(examples[row]))
        by_tokens = {one.tokens: (one.width, one.height) for one in all_of_them}
        largest, tokens = max(by_tokens), int(lengths[densest])
        return self._facts(tokens, of_images[densest], largest, by_tokens[largest], alike=len(by_tokens) == 1)

    def assume_pictures(self) -> PictureFacts | None:
        """One image a row, so large that a processor makes as much of it as of any."""
        assert self._reader is not None, "who assumes images gives the task its reader"
        tokens = self._reader.tokens_of(*_LARGE)
        return self._facts(tokens, tokens, tokens, _LARGE, alike=True)

    def _facts(self, tokens: int, of_images: int, of_one: int, size: tuple[int, int], *, alike: bool) -> PictureFacts:
        shapes = {} if self._reader is None else self._reader.shapes(*size)
        return PictureFacts(tokens, of_images, *size, of_one, alike, shapes)

    def encode(self, sample: Sample, render: Callable[[Sample], Encoded | None]) -> TaskRow | None:
        """The rendered row with its images; None where no token is trained."""
        if sample.rejected is not None or sample.labels is not None:
            raise DataError("holds no chat with one answer", todo="set the task that learns it")
        encoded = render(sample)
        row = answer_row(encoded)
        if encoded is None or row is None:
            return None
        hashes = b"".join(bytes.fromhex(one.sha256) for one in encoded.pictures)
        columns = {**row.columns, "pictures": [*pack_pictures(encoded.pictures)], "picture_hashes": [*hashes]}
        return replace(row, columns=columns, asked=[*row.asked, *hashes])

    def collate(self, rows: Sequence[Sequence[Example]], pad_id: int) -> Batch:
        """One micro-batch, with the pixels of its images."""
        from lorafit.objective.next_token import label_tokens

        examples = [row[0] for row in rows]
        tensors = label_tokens([[(one["tokens"], one["trained"])] for one in examples], pad_id)
        attached = self._attach(examples)
        lengths, numbers = tuple(len(one["tokens"]) for one in examples), tuple(one.index for one in examples)
        together, labels = {**tensors, **attached}, len(tensors["label_ids"])
        return Batch(together, labels, numbers, sum(lengths), attached=tuple(attached), lengths=lengths)

    def _attach(self, examples: Sequence[Example]) -> Mapping[str, torch.Tensor]:
        pictures = [self.pictures(one) for one in examples]
        if not any(pictures):
            return {}
        assert self._reader is not None, "whoever opens rows gives the task its reader"
        try:
            return self._reader.read([one for row in pictures for one in row])
        except DataError as error:
            raise error.at(file=examples[0].file, line=examples[0].line if len(examples) == 1 else None) from None

    def cut(self, example: Example, tokens: int) -> Example:
        """The end of a row: at most so many tokens, none of an image that does not fit whole."""
        return self._between(example, len(example["tokens"]) - max(1, tokens), len(example["tokens"]))

    def cut_probe(self, example: Example, most_tokens: int) -> Example:
        """The row up to its last trained token, and of that the last `most_tokens`, at least 2."""
        flags = example["trained"]
        end = max((place + 1 for place, flag in enumerate(flags) if flag), default=len(flags))
        return self._between(example, end - max(2, most_tokens), end)

    def _between(self, example: Example, start: int, end: int) -> Example:
        start, pictures = max(0, start), self.pictures(example)
        start = next((one.end for one in pictures if one.start < start < one.end), start)
        left = [one.moved(-start) for one in pictures if start <= one.start and one.end <= end]
        hashes = b"".join(bytes.fromhex(one.sha256) for one in left)
        columns = {name: example[name][start:end] for name in ("tokens", "trained")}
        columns |= {"pictures": [*pack_pictures(left)], "picture_hashes": [*hashes]}
        return replace(example, columns=columns)

    def show(self, example: Example) -> tuple[ShownSequence, ...]:
        """The row's tokens, which of them carry loss, and where its images stand."""
        ids, trained = ([int(value) for value in example[name]] for name in ("tokens", "trained"))
        return (ShownSequence(ids, trained, pictures=self.pictures(example)),)
