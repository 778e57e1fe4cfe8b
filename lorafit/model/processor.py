"""The processor of a model that reads images: transformers' own, with the tokenizer that it completes.

processor_config.json, preprocessor_config.json, chat_template.json     what makes tokens and pixels of a chat
"""

from __future__ import annotations

import importlib.util
import inspect
from pathlib import Path
from typing import TYPE_CHECKING

from lorafit.console.wording import first_line
from lorafit.contracts import JsonMapping
from lorafit.errors import ModelError
from lorafit.model.base import Base
from lorafit.model.classes import find_auto_class, read_settings
from lorafit.model.quiet import quiet_libraries

if TYPE_CHECKING:
    from transformers import ProcessorMixin

_INSTALL = 'pip install "lorafit[vision]"'


def refuse_token_kinds(config: JsonMapping) -> None:
    """Refuses a model whose forward takes the kind of every token, which batches do not have: images would be read as
    text is, one token behind the other, without a word.

    Args:
        config: What config.json holds.

    Raises:
        ModelError: It does, or reads no images.
    """
    from transformers import AutoModelForImageTextToText

    find_auto_class(config, "AutoModelForImageTextToText")
    kind = AutoModelForImageTextToText._model_mapping[type(read_settings(config))]
    if {"token_type_ids", "mm_token_type_ids"} & inspect.signature(kind.forward).parameters.keys():
        what = f"{kind.__name__} takes the kind of every token beside its id, which lorafit does not build yet"
        raise ModelError(what, file="config.json", key="task", todo="use a model like LLaVA, Idefics3 or SmolVLM")


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
