"""Adapters taken off a loaded model again, so that what is left is what was there before."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def drop_adapter(model: PeftModel, name: str) -> PreTrainedModel | PeftModel:
    """The model without one of its adapters; without any the base, as it was before the first."""
    if len(model.peft_config) > 1:
        model.delete_adapter(name)
        return model
    base: PreTrainedModel = model.get_base_model()
    _take_out(base)
    return base


@contextlib.contextmanager
def put_back(model: PreTrainedModel | PeftModel, name: str) -> Iterator[None]:
    """Takes out what PEFT has put into a model for an adapter, where an error says that it does not fit."""
    from peft import PeftModel

    try:
        yield
    except BaseException:
        if not isinstance(model, PeftModel):
            _take_out(model)
        elif name in model.peft_config:
            model.delete_adapter(name)
        raise


def _take_out(base: PreTrainedModel) -> None:
    """Puts a base's own layers back into the places of PEFT's; those may hold others of PEFT's."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    done = ""
    for path, layer in list(base.named_modules()):
        if not isinstance(layer, BaseTunerLayer | AuxiliaryTrainingWrapper) or (done and path.startswith(f"{done}.")):
            continue
        done, (parent, _, own) = path, path.rpartition(".")
        inner = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer.original_module
        setattr(base.get_submodule(parent), own, inner)
    if hasattr(base, "peft_config"):
        del base.peft_config
