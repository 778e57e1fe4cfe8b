"""Tokenizer and quantised base: from a Base to the model that an adapter goes on.

No `prepare_model_for_kbit_training`: it would make embeddings, norms and head fp32, twice as slow and large, and is not
needed for correct gradients. Checkpointing is the non-reentrant kind, which needs no gradient at the model's input.

The same without weights, where nothing is computed and nothing takes memory:

    config --class on the meta device--> skeleton --transformers' replacement--> Linear4bit, Linear8bitLt
           --attach_adapter, still on the meta device--> what is trained
           --each parameter and buffer once (tied stay tied)--> fake tensors of the size that loading would give
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lorafit.console.wording import first_line, quantised_as
from lorafit.contracts import JsonMapping, JsonObject, Reporter, Silent
from lorafit.errors import ModelError
from lorafit.facts import CAUSAL_MODEL, ModelClass
from lorafit.files.safetensors import read_index
from lorafit.kinds.quantizations import Quantization, QuantizationSection, kind_of_codes, quantizations
from lorafit.machine.collector import leave_imports_alone
from lorafit.model.attention import check_attention, register_attention, set_attention
from lorafit.model.base import Base
from lorafit.model.check_weights import check_finite, check_loading, check_weights
from lorafit.model.classes import build_empty, find_auto_class, read_settings, untie_head, with_task
from lorafit.model.names import keep_names
from lorafit.model.new_tokens import add_tokens, grow_rows
from lorafit.model.quiet import quiet_libraries
from lorafit.model.targets import leave_towers_out, unquantised_names, wide_names
from lorafit.ops.import_bitsandbytes import import_bitsandbytes
from lorafit.ops.process_memory import is_out_of_memory, trim_heap

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_LOCAL: JsonObject = {"trust_remote_code": False, "local_files_only": True}
_NEEDS_PACKAGE = re.compile(r"(\w+) requires the (\w+) library")
"""What transformers says of a class whose package is not there."""
_WITH_SENTENCEPIECE = ("sentencepiece", "protobuf")


def load_tokenizer(base: Base, folder: Path | None = None) -> PreTrainedTokenizerBase:
    """The base's tokenizer, or that in another folder, e.g. an adapter's.

    Raises:
        ModelError: The folder holds none, it cannot be read, or takes a package that is not installed.
    """
    from transformers import AutoTokenizer

    place = base.path if folder is None else folder
    with quiet_libraries():
        try:  # the config decides the class where the tokenizer's own does not, and an adapter's folder has none
            options = _LOCAL if folder is None else {**_LOCAL, "config": read_settings(base.config)}
            tokenizer = AutoTokenizer.from_pretrained(str(place), **options)
        except ImportError as error:
            raise _missing_package(error, place) from error
        except Exception as error:  # tokenizers raises bare Exception for a broken tokenizer.json
            what = f"the tokenizer cannot be read: {first_line(error)}"
            todo = "get tokenizer.json and tokenizer_config.json of this model"
            raise ModelError(what, file=str(place), todo=todo) from error
    if base.new_tokens and folder is None:
        add_tokens(tokenizer, base.new_tokens)
    return tokenizer


def _missing_package(error: ImportError, place: Path) -> ModelError:
    """What says which package a tokenizer takes; transformers' own text is a page, and names a web site."""
    named = _NEEDS_PACKAGE.search(str(error))
    if named is None:
        return ModelError(f"the tokenizer cannot be read: {first_line(error)}", file=str(place), todo="install that")
    package = named[2].lower()
    wanted = '"lorafit[sentencepiece]"' if package in _WITH_SENTENCEPIECE else package
    what = f"{named[1]} needs the package {package}, which is not installed"
    return ModelError(what, file=str(place), todo=f"install it with: pip install {wanted}")


def load_model(
    base: Base,
    *,
    quantization: QuantizationSection,
    dtype: torch.dtype,
    compute_dtype: torch.dtype,
    attention: str,
    device: torch.device | str,
    model_class: ModelClass = CAUSAL_MODEL,
    quantised: Collection[str] | None = None,
    reporter: Reporter,
) -> PreTrainedModel:
    """The base model, frozen, its linears quantised as asked; embeddings, head and norms in `dtype`.

    Args:
        base: From `resolve_base`.
        quantization: The recipe's section, of any kind.
        dtype: Of weights that are not quantised, and what weights are rounded to before they are quantised.
        compute_dtype: Of products with dequantised weights.
        attention: `eager`, `sdpa`, `fused`, `varlen`, `flash_attention_2`, or `auto` for transformers' choice.
        device: Where the whole model goes.
        model_class: The task's; `find_auto_class` may take another transformers class.
        quantised: Linears that the run had quantised (`recorded_linears`); None: as the device would have it.
        reporter: Told what is loaded.

    Raises:
        ModelError: Weights are missing, superfluous, misshapen or unreadable, or transformers does not know the model,
            or it cannot run with this attention.
        SafetyError: Pickle weights, an index that leaves the folder, foreign code.
    """
    import transformers

    entries = read_index(base.path)
    reporter.info(f"loading {base.shown} ({quantised_as(quantization.kind)})")
    with quiet_libraries():
        if torch.device(device).type in ("cpu", "cuda"):
            import_bitsandbytes()
        auto = getattr(transformers, find_auto_class(base.config, model_class.auto_class))
        leave_imports_alone()
        skeleton = build_class(base, model_class=model_class)
        names = check_weights(skeleton, entries, base.path, has_new_head=model_class.has_new_head)
        if names.redrawn:
            reporter.warn(f"the base's head is one for other classes, and a new one is drawn: {names.redrawn[0]}")
        check_attention(attention, skeleton)
        register_attention()
        kind = quantizations.bind(quantization)
        plain = unquantised_names(skeleton, kind if torch.device(device).type == "cpu" else None, reporter, quantised)
        settings = kind.transformers_config(compute_dtype, plain)
        options: JsonObject = {"ignore_mismatched_sizes": True} if names.redrawn else {}
        options |= {} if settings is None else {"quantization_config": settings}
        try:
            if attention != "auto":
                options["attn_implementation"] = set_attention(skeleton, attention)
            del skeleton
            with torch.random.fork_rng(devices=[]), _raising_at_once():
                torch.manual_seed(0)  # what a new head is drawn from, in every process of a run
                model, info = auto.from_pretrained(
                    str(base.path),
                    config=with_task(read_settings(base.config), model_class),
                    dtype=dtype,
                    device_map={"": torch.device(device)},
                    use_safetensors=True,
                    output_loading_info=True,
                    **_LOCAL,
                    **options,
                )
        except Exception as error:  # the classes raise whatever their arithmetic meets in a foreign config
            if is_out_of_memory(error):
                raise
            name = "" if isinstance(error, ValueError | OSError | ImportError) else f"{type(error).__name__} "
            what = f"transformers cannot load this model: {name}{first_line(error)}"
            raise ModelError(what, file=str(base.path), todo="get config.json and weights of one model") from error
    check_loading(info, base.path, names)
    check_finite(model, base.path)
    kind.quantise_rest(model, compute_dtype, plain)
    _finish_quantising(model, kind, set(plain).intersection(quantised or ()))
    keep_names(model, names)
    _settle(model, base)
    return model


def _settle(model: PreTrainedModel, base: Base) -> None:
    """Rows for new tokens, and nothing that is trained, repacked or remembered."""
    if base.new_tokens:
        grow_rows(model, load_tokenizer(base), base.new_tokens)
    keep_weights_unpacked(model)
    model.requires_grad_(False)
    model.config.use_cache = False  # else packed rows see each other, and checkpointing warns


@contextlib.contextmanager
def _raising_at_once() -> Iterator[None]:
    """Within it an error that transformers meets while it converts or quantises a weight is raised as it is.

    Else it goes on with the other weights and raises that there were issues, in a report that nobody is shown: memory
    that ran out would be told as a model that cannot be loaded.
    """
    from transformers import core_model_loading

    collecting = getattr(core_model_loading, "log_conversion_errors", None)
    if collecting is None:  # a release that collects none
        yield
        return
    loading: Any = core_model_loading
    loading.log_conversion_errors = lambda *_, **__: contextlib.nullcontext()
    try:
        yield
    finally:
        loading.log_conversion_errors = collecting


def _round_plain(model: torch.nn.Module, kind: Quantization[QuantizationSection], names: Collection[str]) -> None:
    """Gives linears that a run had quantised, and this CPU cannot hold so, the values that their codes stand for."""
    for name in names:
        linear: Any = model.get_submodule(name)
        lies_across = not hasattr(linear, "in_features")  # Conv1D: [in, out]
        weight = linear.weight.data
        value = kind.of(name).rounded((weight.t() if lies_across else weight).contiguous())
        linear.weight.data = value.t().contiguous() if lies_across else value


def _finish_quantising(
    model: torch.nn.Module, kind: Quantization[QuantizationSection], rounded: Collection[str]
) -> None:
    if not kind.is_quantized:
        return
    _round_plain(model, kind, rounded)
    for module in model.modules():
        if (held := kind_of_codes(module)) is not None:
            held.settle(module)
    trim_heap()  # what quantising took, before what is left in mapped files is copied
    let_go_of_files(model)


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


def build_class(base: Base, class_name: str | None = None, model_class: ModelClass = CAUSAL_MODEL) -> PreTrainedModel:
    """The model of a class, or of a task's, on the meta device: names and shapes, no memory.

    Raises:
        ModelError: transformers cannot build it.
    """
    with quiet_libraries():
        settings = with_task(read_settings(base.config), model_class)
        skeleton = build_empty(settings, class_name or find_auto_class(base.config, model_class.auto_class))
        leave_towers_out(skeleton, settings)
    return skeleton


def build_weightless(
    config: JsonMapping,
    *,
    quantization: QuantizationSection,
    dtype: torch.dtype,
    compute_dtype: torch.dtype,
    attention: str,
    device_kind: str,
    model_class: ModelClass = CAUSAL_MODEL,
) -> PreTrainedModel:
    """The base model, frozen, as `load_model` would give it, on the meta device.

    Args:
        config: What config.json holds.
        quantization: The recipe's section, of any kind.
        dtype: Of weights that are not quantised.
        compute_dtype: Of products with dequantised weights.
        attention: `eager`, `sdpa`, ...
        device_kind: What the run would be on; on a CPU 4-bit layers of odd widths stay unquantised.
        model_class: The task's.

    Raises:
        ModelError: transformers cannot build the model from this config.
    """
    kind = quantizations.bind(quantization)
    with quiet_libraries():
        import_bitsandbytes()
        settings = with_task(read_settings(config), model_class)
        model = build_empty(settings, find_auto_class(config, model_class.auto_class), dtype=dtype)
        untie_head(model, config)
        if model._can_set_attn_implementation():
            set_attention(model, attention)
        plain = unquantised_names(model, kind if device_kind == "cpu" else None, Silent())
        kind.replace_linears(model, compute_dtype, plain)
        for name in wide_names(model) if dtype is torch.float16 else ():
            model.get_submodule(name).float()
    model.requires_grad_(False)
    model.config.use_cache = False
    return model


def fill_with_fakes(model: torch.nn.Module) -> None:
    """Puts fake tensors of torch's default device, a CPU unless a context says otherwise, in the place of meta ones.

    Call it under a FakeTensorMode, when the adapter is on.

    A tensor that two modules share stays one.
    """
    made: dict[int, Any] = {}

    def real(tensor: Any) -> Any:
        if id(tensor) not in made:
            empty = torch.empty_like(tensor, device=torch.get_default_device())
            is_parameter = isinstance(tensor, torch.nn.Parameter)
            made[id(tensor)] = torch.nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
        return made[id(tensor)]

    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            kind = kind_of_codes(module) if name == "weight" else None
            module._parameters[name] = real(parameter) if kind is None else kind.fake(module)
        held = [values for name, values in vars(module).items() if isinstance(values, dict) and name[0] != "_"]
        for values in (module._buffers, *held):  # PEFT keeps the numbers of its prompts in a plain dict
            for name, tensor in list(values.items()):
                if isinstance(tensor, torch.Tensor) and tensor.is_meta:
                    values[name] = real(tensor)


@contextlib.contextmanager
def unpacking_fakes() -> Iterator[None]:
    """Lets PEFT's layers that compute with dequantised weights run on a model without values."""
    from bitsandbytes.functional import QuantState, dequantize_4bit
    from peft.utils import integrations

    plainly = integrations.dequantize_bnb_weight

    def dequantised(weight: torch.Tensor, state: Any = None) -> Any:  # PEFT tells four bits by the weight's class
        return dequantize_4bit(weight.data, state) if isinstance(state, QuantState) else plainly(weight, state)

    replaced: JsonObject = {"dequantize_module_weight": _unpacked, "dequantize_bnb_weight": dequantised}
    own = {name: getattr(integrations, name) for name in replaced}
    libraries = [module for path, module in sys.modules.items() if path.startswith("peft")]
    holders = [(module, name) for module in libraries for name in replaced if hasattr(module, name)]
    for module, name in holders:
        setattr(module, name, replaced[name])
    try:
        yield
    finally:
        for module, name in holders:
            setattr(module, name, own[name])


def _unpacked(linear: torch.nn.Module) -> torch.Tensor:
    """[out, in] of a layer's weight, which may have codes or not even those."""
    kind = kind_of_codes(linear)
    weight: Any = linear.weight
    unpacked: torch.Tensor = weight if kind is None else kind.unpack(linear)
    return unpacked
