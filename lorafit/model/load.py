"""Tokenizer and quantised base: from a Base to the model that an adapter goes on.

No `prepare_model_for_kbit_training`: it would make embeddings, norms and head fp32, twice as slow and large, and is not
needed for correct gradients. Checkpointing is the non-reentrant kind, which needs no gradient at the model's input.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafit.contracts import JsonObject
from lorafit.errors import ModelError
from lorafit.facts import CAUSAL_MODEL, ModelClass
from lorafit.files.safetensors import read_index
from lorafit.kinds.quantizations import quantizations
from lorafit.model.attention import loading_option, offer_attention
from lorafit.model.check_weights import check_finite, check_loading, check_weights
from lorafit.model.classes import find_auto_class, with_task
from lorafit.model.names import keep_names
from lorafit.model.quiet import quiet_libraries
from lorafit.model.targets import leave_narrow, leave_towers_out, unquantised_names
from lorafit.ops.process_memory import trim_heap

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from lorafit.contracts import Reporter
    from lorafit.kinds.quantizations import QuantizationSection
    from lorafit.model.base import Base


def load_tokenizer(base: Base, folder: Path | None = None) -> PreTrainedTokenizerBase:
    """The base's tokenizer, or that in another folder, e.g. an adapter's.

    Raises:
        ModelError: The folder holds none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    place = base.path if folder is None else folder
    with quiet_libraries():
        try:  # the config decides the class where the tokenizer's own does not, and an adapter's folder has none
            config = None if folder is None else _config(base)
            return AutoTokenizer.from_pretrained(
                str(place), config=config, trust_remote_code=False, local_files_only=True
            )
        except Exception as error:  # tokenizers raises bare Exception for a broken tokenizer.json
            first = (str(error).splitlines() or [type(error).__name__])[0]
            todo = "get tokenizer.json and tokenizer_config.json of this model"
            raise ModelError(f"the tokenizer cannot be read: {first}", file=str(place), todo=todo) from error


def load_model(
    base: Base,
    *,
    quantization: QuantizationSection,
    dtype: torch.dtype,
    compute_dtype: torch.dtype,
    attention: str,
    device: torch.device | str,
    model_class: ModelClass = CAUSAL_MODEL,
    reporter: Reporter,
) -> PreTrainedModel:
    """The base model, frozen, its linears quantised as asked; embeddings, head and norms in `dtype`.

    Args:
        base: From `resolve_base`.
        quantization: The recipe's section, of any kind.
        dtype: Of weights that are not quantised, and what weights are rounded to before they are quantised.
        compute_dtype: Of products with dequantised weights.
        attention: `eager`, `sdpa`, `fused`, `flash_attention_2`, or `auto` for transformers' choice.
        device: Where the whole model goes.
        model_class: The task's; `find_auto_class` may take another transformers class.
        reporter: Told what is loaded.

    Raises:
        ModelError: Weights are missing, superfluous, misshapen or unreadable, or transformers does not know the model,
            or it cannot run with this attention.
        SafetyError: Pickle weights, an index that leaves the folder, foreign code.
    """
    import torch
    import transformers

    entries = read_index(base.path)
    reporter.info(f"loading {base.shown} ({quantization.kind})")
    with quiet_libraries():
        if torch.device(device).type in ("cpu", "cuda"):
            _import_bitsandbytes()
        auto = getattr(transformers, find_auto_class(base.config, model_class.auto_class))
        config = with_task(_config(base), model_class)
        skeleton = _build_skeleton(auto, config, base)
        names = check_weights(skeleton, entries, base.path, has_new_head=model_class.has_new_head)
        offer_attention(attention, skeleton)
        kind = quantizations.bind(quantization)
        plain = unquantised_names(skeleton)
        if torch.device(device).type == "cpu":
            plain += leave_narrow(skeleton, kind, reporter)
        settings = kind.transformers_config(compute_dtype, plain)
        options: JsonObject = {} if settings is None else {"quantization_config": settings}
        if attention != "auto":
            options["attn_implementation"] = loading_option(skeleton, attention)
        del skeleton
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)  # what a new head is drawn from, in every process of a run
                model, info = auto.from_pretrained(
                    str(base.path),
                    config=config,
                    dtype=dtype,
                    device_map={"": torch.device(device)},
                    use_safetensors=True,
                    local_files_only=True,
                    trust_remote_code=False,
                    output_loading_info=True,
                    **options,
                )
        except (torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:  # the classes raise whatever their arithmetic meets in a foreign config
            raise _model_error(base, error) from error
    check_loading(info, base.path, names)
    check_finite(model, base.path)
    kind.quantise_rest(model, compute_dtype, plain)
    if kind.is_quantized:
        trim_heap()  # what quantising took, before what is left in mapped files is copied
        let_go_of_files(model)
    keep_names(model, names)
    keep_weights_unpacked(model)
    model.requires_grad_(False)
    model.config.use_cache = False  # else packed rows see each other, and checkpointing warns
    return model


def _import_bitsandbytes() -> None:
    """Imports bitsandbytes without torch's compiler: about a second less at the start of a run.

    While it is imported, it wraps four fallback kernels in `torch.compile`, which imports all of the compiler; CPUs
    and CUDA devices have kernels of their own for what those do.
    """
    switch = "TORCHDYNAMO_DISABLE"
    before = os.environ.get(switch)
    os.environ[switch] = "1"
    try:
        with contextlib.suppress(ImportError):  # said where it is needed
            import bitsandbytes  # noqa: F401
    finally:
        if before is None:
            del os.environ[switch]
        else:
            os.environ[switch] = before


def let_go_of_files(model: torch.nn.Module) -> None:
    """Copies what still lies in a mapped weight file, so that the file's other pages leave memory.

    One tensor that was not quantised (a norm, the embedding) keeps its whole file mapped, with every page that was read
    to quantise the rest: as much again as the unquantised model. A model without quantised weights is left mapped: its
    pages are all in use, and the system may drop and read them again.
    """
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and parameter.is_floating_point():
            parameter.data = parameter.data.clone()


def keep_weights_unpacked(model: torch.nn.Module) -> None:
    """Stops bitsandbytes from repacking 4-bit weights in place at the first forward in eval mode.

    On CPUs with AVX512-BF16 it does so, and `train()` does not undo it: later gradients, merges and saves are wrong.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def enable_checkpointing(model: PreTrainedModel, enabled: bool) -> None:
    """Switches recomputation of activations in the backward pass on (non-reentrant) or off."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    with quiet_libraries():
        if not enabled:
            base.gradient_checkpointing_disable()
        elif hasattr(base, "activation_checkpointing_enable"):  # its name since transformers 5.20
            base.activation_checkpointing_enable({"use_reentrant": False})
        else:
            base.gradient_checkpointing_enable({"use_reentrant": False})
    base.config.use_cache = False


def _config(base: Base) -> PretrainedConfig:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(str(base.path), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # as in load_model
        raise _model_error(base, error) from error


def build_class(base: Base, class_name: str | None = None, model_class: ModelClass = CAUSAL_MODEL) -> PreTrainedModel:
    """The model of a class, or of a task's, on the meta device: names and shapes, no memory.

    Raises:
        ModelError: transformers cannot build it.
    """
    import transformers

    with quiet_libraries():
        name = class_name or find_auto_class(base.config, model_class.auto_class)
        return _build_skeleton(getattr(transformers, name), with_task(_config(base), model_class), base)


def _build_skeleton(auto: Any, config: PretrainedConfig, base: Base) -> PreTrainedModel:
    """The model on the meta device: names and shapes, no memory."""
    import torch

    try:
        with torch.device("meta"):
            if hasattr(auto, "from_config"):
                skeleton = auto.from_config(config, trust_remote_code=False)
            else:
                skeleton = auto._from_config(config)
    except Exception as error:  # as in load_model
        raise _model_error(base, error) from error
    leave_towers_out(skeleton, config)
    return skeleton


def _model_error(base: Base, error: Exception) -> ModelError:
    lines = str(error).strip().splitlines() or [""]
    told = lines[0] if isinstance(error, ValueError | OSError | ImportError) else f"{type(error).__name__} {lines[0]}"
    return ModelError(
        f"transformers cannot load this model: {told.strip()}",
        file=str(base.path),
        todo="get config.json and weights of one model",
    )
