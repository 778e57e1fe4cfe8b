"""Images of rows through the model's own processor: looked at once, their tokens told by size, read for each batch.

    Picture ──look──> file, hash, size ──expand──> the text that stands for it, once for each size
    PlacedPicture ──read──> pixel tensors, by the processor

Looking decodes an image once, so that one that is damaged is told before step 1, and keeps nothing of it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafit.contracts import Encoded, Sample
from lorafit.errors import DataError, ModelError, UnusableImageError
from lorafit.files.atomic import atomic_file
from lorafit.files.cache import own_folder
from lorafit.kinds.chat_fields import count_images
from lorafit.pictures import Picture, PlacedPicture

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

    from lorafit.data.chat.render import ChatRenderer
    from lorafit.data.chat.typed_chat import Messages

_TURNED = frozenset({5, 6, 7, 8})  # EXIF orientations that swap width and height
_ORIENTATION = 0x0112
_OF_TEXT = frozenset({"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"})
_SIZES_KEPT = 4096
_PUT_BACK = "put it back; a run then goes on from its last saved step with --resume"


class ProcessorPictures:
    """Reads images for one processor of transformers.

    Args:
        processor: The model's.
        folder: Where images are put that rows hold themselves, by their hashes.

    Attributes:
        mark: What a chat template writes for an image.
    """

    def __init__(self, processor: ProcessorMixin, folder: Path) -> None:
        self._processor, self._folder = processor, folder
        self.mark = str(getattr(processor, "image_token", None) or "")
        if not self.mark:
            what = f"{type(processor).__name__} writes no token in the place of an image"
            raise ModelError(what, key="model.base", todo="use a model like LLaVA, Idefics3 or SmolVLM")
        self.expand = lru_cache(_SIZES_KEPT)(self._expand)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The processor's tokenizer, with the tokens that it adds for images."""
        tokenizer: PreTrainedTokenizerBase = self._processor.tokenizer
        return tokenizer

    @property
    def key(self) -> str:
        """A hash of all that decides what becomes of an image, but for the libraries' code."""
        options = f"{type(self._processor.image_processor).__name__} {self._processor.to_json_string()}"
        return hashlib.sha256(options.encode()).hexdigest()

    def look(self, picture: Picture) -> PlacedPicture:
        """Where an image is, what it is known by, and its size; it stands nowhere yet.

        Raises:
            DataError: It is missing, no image, or damaged.
        """
        from PIL import Image

        file = Path(picture.path).absolute()
        changed_at_ns = _changed_at_ns(str(file))

        def unusable(what: str, todo: str) -> DataError:
            if picture.data is not None:
                return DataError(what, key=picture.key, todo=todo)
            return UnusableImageError(what, path=str(file), changed_at_ns=changed_at_ns, key=picture.key, todo=todo)

        try:
            data = picture.data if picture.data is not None else Path(picture.path).read_bytes()
        except OSError as error:
            what = f"no such image: {picture.path}" if isinstance(error, FileNotFoundError) else _cannot(picture, error)
            raise unusable(what, "paths start in the folder of the rows' file") from None
        try:
            with Image.open(io.BytesIO(data)) as image:
                width, height = image.size
                if image.getexif().get(_ORIENTATION) in _TURNED:
                    width, height = height, width
                image.draft("L", (1, 1))  # a JPEG is decoded at an eighth of its size then
                image.load()
        except Exception as error:  # Pillow's decoders raise whatever they meet
            raise unusable(_cannot(picture, error), "replace it, or remove the row") from None
        digest = hashlib.sha256(data).hexdigest()
        if picture.data is not None:
            file = own_folder(self._folder) / digest
            if not file.exists():
                with atomic_file(file) as temporary:
                    temporary.write_bytes(data)
        return PlacedPicture(str(file), digest, width, height, file.stat().st_mtime_ns)

    def fold(self, ids: list[int], pictures: Sequence[PlacedPicture]) -> list[int]:
        """A row's tokens for people: one mark in the place of each image's tokens."""
        mark, place, kept = int(self.tokenizer.convert_tokens_to_ids(self.mark)), 0, list[int]()
        for one in pictures:
            kept += [*ids[place : one.start], mark]
            place = one.end
        return [*kept, *ids[place:]]

    def texts(self, looked: Sequence[PlacedPicture]) -> list[str]:
        """What stands for each image in a rendering."""
        return [self.expand(one.width, one.height) for one in looked]

    def _expand(self, width: int, height: int) -> str:
        """The text that the processor writes in the place of an image's mark."""
        from PIL import Image

        blank = Image.new("RGB", (width, height))
        made = self._processor(images=[[blank]], text=[self.mark], return_text_replacement_offsets=True)
        return str(made["text_replacement_offsets"][0][0]["replacement"])

    def read(self, pictures: Sequence[PlacedPicture]) -> Mapping[str, torch.Tensor]:
        """What the processor makes of images beside tokens, for all of them in one row.

        Raises:
            DataError: A file is gone, or is another one than when it was looked at.
        """
        return self._pixels([_open(one) for one in pictures]) if pictures else {}

    def _pixels(self, images: list[Any]) -> dict[str, torch.Tensor]:
        made = self._processor(images=[images], text=[self.mark * len(images)], return_tensors="pt")
        return {name: values for name, values in made.items() if name not in _OF_TEXT}

    def tokens_of(self, width: int, height: int) -> int:
        """How many tokens stand for an image of that size."""
        return len(self.tokenizer(self.expand(width, height), add_special_tokens=False).input_ids)

    def shapes(self, width: int, height: int) -> dict[str, tuple[str, tuple[int, ...], tuple[int, ...]]]:
        """What is made of images of that size, by name: dtype, and the shapes of one and of two of them."""
        from PIL import Image

        blank = Image.new("RGB", (width, height))
        try:
            one, two = (self._pixels([blank] * count) for count in (1, 2))
        except Exception:  # whatever a processor raises of an image without anything on it
            return {}
        dtypes = {name: str(values.dtype).removeprefix("torch.") for name, values in one.items()}
        return {name: (dtypes[name], tuple(one[name].shape), tuple(two[name].shape)) for name in one}


def look_at(pictures: Sequence[Picture], reader: ProcessorPictures | None) -> list[PlacedPicture]:
    """Images as they are found, which stand nowhere yet.

    Raises:
        DataError: One cannot be read, or the model reads none.
    """
    if pictures and reader is None:
        todo = "ask a model that was trained for task image-text-to-text"
        raise DataError("has images, and the model reads text alone", key=pictures[0].key, todo=todo)
    return [reader.look(one) for one in pictures] if reader is not None else []


def place(encoded: Encoded, looked: Sequence[PlacedPicture]) -> Encoded:
    """The tokens with their images, each where it stands."""
    if not looked:
        return encoded
    pairs = zip(looked, encoded.images, strict=True)
    return dataclasses.replace(
        encoded, pictures=tuple(dataclasses.replace(one, start=start, end=end) for one, (start, end) in pairs)
    )


def ask(chats: ChatRenderer, messages: Messages, sample: Sample, reader: ProcessorPictures | None) -> Encoded:
    """A chat that waits for its answer, with the images of these messages.

    Args:
        chats: Renders it.
        messages: Those of the sample, or what stands before one of its answers.
        sample: Has their images and tools.
        reader: Looks at images; None where the model reads text alone.

    Raises:
        DataError: An image cannot be read, or the template refuses the chat.
    """
    looked = look_at(sample.pictures[: count_images(messages)], reader)
    texts = [] if reader is None else reader.texts(looked)
    return place(chats.prompt(messages, sample.tools, texts), looked)


def find_changed(files: Iterable[tuple[str, int | None]]) -> str | None:
    """The first file that was written to since then, came or went; None where all are as they were.

    Args:
        files: Each with the time when it was last written to; None where it was not there.
    """
    return next((file for file, changed_at_ns in files if _changed_at_ns(file) != changed_at_ns), None)


def _changed_at_ns(file: str) -> int | None:
    try:
        return Path(file).stat().st_mtime_ns
    except OSError:
        return None


def _open(picture: PlacedPicture) -> Any:
    """The image as transformers reads one: turned as its camera says, in RGB."""
    from PIL import Image, ImageOps

    try:
        data = Path(picture.file).read_bytes()
    except OSError:
        raise DataError(f"the image {picture.file} is gone", todo=_PUT_BACK) from None
    if hashlib.sha256(data).hexdigest() != picture.sha256:
        what = f"the image {picture.file} was changed since the rows were prepared"
        raise DataError(what, todo=f"{_PUT_BACK}; or start anew")
    with Image.open(io.BytesIO(data)) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


def _cannot(picture: Picture, error: Exception) -> str:
    from PIL import UnidentifiedImageError

    name = picture.path or "the row's image"
    if isinstance(error, UnidentifiedImageError):  # its text names an object of this process
        return f"{name} cannot be read as an image: it is none, or one that Pillow does not know"
    return f"{name} cannot be read as an image: {' '.join(str(error).split())[:80] or type(error).__name__}"
