"""The processor of a model that reads images: transformers' own, with the tokenizer that it completes.

processor_config.json, preprocessor_config.json, chat_template.json     what makes tokens and pixels of a chat
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from lorafit.console.wording import first_line
from lorafit.errors import ModelError
from lorafit.model.base import Base
from lorafit.model.quiet import quiet_libraries

if TYPE_CHECKING:
    from transformers import ProcessorMixin

_INSTALL = 'pip install "lorafit[vision]"'


def load_processor(base: Base, folder: Path | None = None) -> ProcessorMixin:
    """The base's processor, or that in another folder, e.g. an adapter's; its tokenizer has its chat template.

    Raises:
        ModelError: Pillow is not installed, or the folder holds no processor of images, or it cannot be read.
    """
    if importlib.util.find_spec("PIL") is None:
        raise ModelError("reading images needs Pillow, which is not installed", todo=f"install it with: {_INSTALL}")
    place = base.path if folder is None else folder
    with quiet_libraries():
        try:
            from transformers import AutoProcessor

            processor = AutoProcessor.from_pretrained(str(place), trust_remote_code=False, local_files_only=True)
        except Exception as error:  # as for a tokenizer, and what a package raises that does not fit torch
            lacks = isinstance(error, ImportError) or "torchvision" in str(error)
            todo = _INSTALL if lacks else "get processor_config.json or preprocessor_config.json of this model"
            raise ModelError(
                f"the processor cannot be read: {first_line(error)}", file=str(place), todo=todo
            ) from error
    if not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
        what = f"{type(processor).__name__} reads no images"
        raise ModelError(what, file=str(place), key="task", todo="use a model like LLaVA, Idefics3 or SmolVLM")
    if getattr(processor, "chat_template", None):
        processor.tokenizer.chat_template = processor.chat_template
    return processor
