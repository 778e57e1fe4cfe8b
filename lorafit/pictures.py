"""Images of rows on their way: as a row names them, as they stand in its tokens, and who makes tensors of them.

    row ──format──> Picture ──looked at──> PlacedPicture ──kept with the row's tokens──> PictureReader ──> pixels

Only the last step reads pixels, for one micro-batch at a time.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Picture:
    """An image that a row names or holds.

    Attributes:
        path: Its file, relative to the folder of the rows until their source is known; may be empty beside `data`.
        key: Where in the row it stands.
        data: Its bytes, where the row holds them.
    """

    path: str
    key: str
    data: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class PlacedPicture:
    """An image that was looked at, and where it stands in a row of tokens.

    Attributes:
        file: Its absolute path.
        sha256: Of the file, in hex.
        width: In pixels, as it is shown.
        height: In pixels.
        changed_at_ns: When the file was last written to.
        start: Its first token.
        end: One behind its last token.
    """

    file: str
    sha256: str
    width: int
    height: int
    changed_at_ns: int
    start: int = 0
    end: int = 0

    @property
    def tokens(self) -> int:
        """How many stand for it."""
        return self.end - self.start

    def moved(self, tokens: int) -> PlacedPicture:
        """The same, so many tokens further on."""
        return replace(self, start=self.start + tokens, end=self.end + tokens)


class PictureReader(Protocol):
    """What makes tensors of images, as the model's own processor does."""

    def read(self, pictures: Sequence[PlacedPicture]) -> Mapping[str, torch.Tensor]:
        """What the model's forward takes beside token ids, for images in the order of their tokens.

        Raises:
            DataError: A file is gone, or is another one than when it was looked at.
        """

    def tokens_of(self, width: int, height: int) -> int:
        """How many tokens stand for an image of that size."""

    def shapes(self, width: int, height: int) -> Mapping[str, tuple[str, tuple[int, ...], tuple[int, ...]]]:
        """What `read` makes of images of that size, by name: dtype, and the shapes of one and of two of them; empty
        where it makes nothing of blank ones."""


def pack_pictures(pictures: Sequence[PlacedPicture]) -> bytes:
    """Images as prepared rows keep them."""
    fields = PlacedPicture.__dataclass_fields__
    return json.dumps([[getattr(one, name) for name in fields] for one in pictures]).encode()


def unpack_pictures(values: Sequence[float]) -> tuple[PlacedPicture, ...]:
    """What `pack_pictures` gave, byte by byte."""
    return tuple(PlacedPicture(*one) for one in json.loads(bytes(map(int, values)) or b"[]"))
