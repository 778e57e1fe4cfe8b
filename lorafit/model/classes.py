"""The one place that chooses the transformers class of a model, by its config.

    an encoder that reads and a decoder that writes (T5, BART)            AutoModelForSeq2SeqLM, for the task that has
                                                                          sources and targets, and for no other
    model_type in the table of the task's class (AutoModelForCausalLM)    that class; for some checkpoints of several
                                                                          modalities (Qwen3.5, Llama 4) it builds the
                                                                          language model alone
    else in the table of image-text or multimodal models                  the whole model, its towers frozen

PEFT's `AutoPeftModelForCausalLM` opens an adapter by the first table, so names of the first class are what it finds.
"""

from __future__ import annotations

import contextlib
import re
from typing import TYPE_CHECKING, Any

from lorafit.contracts import JsonMapping
from lorafit.errors import ModelError
from lorafit.facts import CAUSAL_MODEL, SEQ2SEQ_CLASS, SEQ2SEQ_MODEL, ModelClass
from lorafit.ops.output_head import output_head

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_WHOLE_ALONE = frozenset({"emu3"})
"""Registered as language models whose classes find nothing under the names in the files of the whole model."""
_PACKAGE = re.compile(r"requires the (\w+) library")
_WHOLE = (
    ("AutoModelForImageTextToText", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES"),
    ("AutoModelForMultimodalLM", "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES"),
)


def find_auto_class(config: JsonMapping, task_class: str) -> str:
    """Name of the auto class that loads a model of this config.json.

    Args:
        config: What config.json holds.
        task_class: The auto class of the task, which is taken wherever it knows the model type.

    Raises:
        ModelError: The model reads a source text with an encoder of its own, and the task has none, or the other way
            round; or it reads another model's states.
    """
    from transformers.models.auto import modeling_auto

    kind = str(config.get("model_type", ""))
    causal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    pairs = modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
    half = kind in causal and kind in pairs and "text_config" not in config  # that would be a model with a tower
    what, todo = "", "use a decoder-only model"
    if task_class == SEQ2SEQ_CLASS:
        if kind in pairs and read_settings(config).is_encoder_decoder:
            return task_class
        what = "has no encoder that reads a text for a decoder that writes"
        todo = "use a model such as T5, BART or Marian, or another task: causal-lm writes on behind its prompt"
    elif config.get("is_encoder_decoder") or half:
        what = "is an encoder-decoder: its decoder answers what an encoder has read, and rows hold no such text"
        todo = "use a decoder-only model, or task: seq2seq-lm, whose rows have a source and a target"
    elif kind.endswith("_assistant"):
        what = "drafts tokens for another model from that one's hidden states, and rows hold no such states"
        todo = "use the model that it drafts for"
    if what:
        raise ModelError(f"'{kind}' {what}", file="config.json", todo=todo)
    if (
        task_class == "AutoModelForImageTextToText"
        and kind not in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    ):
        todo = "use a model like LLaVA, Idefics3 or SmolVLM"
        raise ModelError(f"'{kind}' reads no images", file="config.json", key="task", todo=todo)
    if task_class == "AutoModelForCausalLM" and (kind not in causal or kind in _WHOLE_ALONE):
        for auto_class, table in _WHOLE:
            if kind in getattr(modeling_auto, table):
                return auto_class
    return task_class


def reads_images(config: JsonMapping) -> bool:
    """Whether a model of which nobody says what its task was is built whole, with the tower that sees."""
    with contextlib.suppress(ModelError):
        return find_auto_class(config, CAUSAL_MODEL.auto_class) == _WHOLE[0][0]
    return False


def usual_class(config: JsonMapping) -> ModelClass:
    """How a model is built of which nobody says what its task was: a pair of encoder and decoder, else a causal one."""
    with contextlib.suppress(ModelError):
        find_auto_class(config, SEQ2SEQ_CLASS)
        return SEQ2SEQ_MODEL
    return CAUSAL_MODEL


def read_settings(config: JsonMapping) -> PretrainedConfig:
    """transformers' config object from what config.json holds, its encoded infinities included.

    Raises:
        ModelError: transformers knows no such model, or the values contradict each other.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = str(config.get("model_type", ""))
    if kind == "mistral" and "layer_types" in config:  # as transformers' AutoConfig takes it
        kind = "ministral"
    if kind not in CONFIG_MAPPING:
        raise ModelError(
            f"transformers here knows no model_type '{kind}'",
            file="config.json",
            todo="check the file, or take a newer transformers",
        )
    try:
        return CONFIG_MAPPING[kind].from_dict(_decode(dict(config)))
    except Exception as error:  # the classes raise whatever their arithmetic meets in a foreign config
        raise _cannot_build(kind, error) from error


def with_task(settings: PretrainedConfig, model_class: ModelClass) -> PretrainedConfig:
    """The config with what a task sets in it."""
    for name, value in model_class.config.items():
        setattr(settings, name, value)
    return settings


def build_empty(settings: PretrainedConfig, auto_class: str, **options: Any) -> PreTrainedModel:
    """The model of a class, or of what an auto class finds, on the meta device: names and shapes, no memory.

    Raises:
        ModelError: transformers cannot build it from this config.
    """
    import torch
    import transformers

    try:
        named = getattr(transformers, auto_class)
        make = named.from_config if hasattr(named, "from_config") else named._from_config  # auto class, or its own
        with torch.device("meta"):
            return make(settings, **options)
    except Exception as error:  # as above
        raise _cannot_build(str(settings.model_type), error) from error


def untie_head(model: PreTrainedModel, config: JsonMapping) -> None:
    """Gives the head a weight of its own where config.json says that it has one and the class ties it all the same, as
    T5's does: loading finds both in the files, and leaves them apart.
    """
    import torch

    head, embeddings = output_head(model), model.get_input_embeddings()
    is_tied = head is not None and head.weight is getattr(embeddings, "weight", None)
    if is_tied and config.get("tie_word_embeddings") is False:
        head.weight = torch.nn.Parameter(torch.empty_like(head.weight))


def build_whole(settings: PretrainedConfig) -> PreTrainedModel | None:
    """The model of all modalities of a config, on the meta device; None where transformers registers or builds none."""
    from transformers.models.auto import modeling_auto

    for auto_class, table in _WHOLE:
        if settings.model_type in getattr(modeling_auto, table):
            try:
                return build_empty(settings, auto_class)
            except ModelError:
                continue
    return None


def _cannot_build(kind: str, error: Exception) -> ModelError:
    lines = [line.strip(" :;") for line in str(error).strip().splitlines()] or [type(error).__name__]
    if "validator" in lines[0] and len(lines) > 1:  # which of a config's own checks; the next line says what is wrong
        del lines[0]
    if isinstance(error, ImportError) and (package := error.name or next(iter(_PACKAGE.findall(lines[0])), None)):
        what = f"transformers needs the package {package} to build this model ({kind})"
        return ModelError(what, file="config.json", todo=f"pip install {package}")
    return ModelError(
        f"transformers cannot build this model ({kind}): {lines[0]}",
        file="config.json",
        todo="check config.json, or use another base model",
    )


def _decode(value: Any) -> Any:
    """JSON has no infinity: transformers writes `{"__float__": "Infinity"}`."""
    if isinstance(value, dict):
        if set(value) == {"__float__"}:
            return float(value["__float__"])
        return {key: _decode(inner) for key, inner in value.items()}
    return [_decode(inner) for inner in value] if isinstance(value, list) else value
