"""Adapters on a loaded model: fresh from a recipe, opened from a folder, or given the values of a checkpoint.

Whatever the method, PEFT wraps the model here and nowhere else. An adapter has a name, so that one base may carry
several.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lorafit.console.wording import first_line, list_names
from lorafit.contracts import JsonMapping, Reporter, Silent
from lorafit.errors import ModelError, RecipeError
from lorafit.facts import CAUSAL_MODEL, ModelClass
from lorafit.files.safetensors import read_rows
from lorafit.kinds.adapter_parts import Site
from lorafit.kinds.adapters import AdapterSection, adapters
from lorafit.kinds.linear_targets import LinearsSection
from lorafit.kinds.quantizations import kind_of_codes
from lorafit.model.adapter import (
    ADAPTER_NAME,
    CONFIG,
    WEIGHTS,
    AdapterFolder,
    adapter_config,
    adapter_tensors,
    check_base,
    derived_tensors,
    read_adapter,
    saved_kind,
)
from lorafit.model.base import Base
from lorafit.model.detach import put_back
from lorafit.model.language_modules import module_paths
from lorafit.model.layer_numbers import layer_paths
from lorafit.model.load import keep_weights_unpacked
from lorafit.model.new_tokens import ask_for_rows
from lorafit.model.quiet import quiet_libraries
from lorafit.model.targets import choose_targets
from lorafit.model.towers import projector_names
from lorafit.model.trained_whole import ask_for_modules, keep_dtypes, widen
from lorafit.ops.output_head import outer_modules
from lorafit.ops.process_memory import is_out_of_memory
from lorafit.ops.trained_copies import LAYERS

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel

_SHOWN_DIFFERENCES = 3


def attach_adapter(
    model: PreTrainedModel | PeftModel,
    section: AdapterSection,
    seed: int,
    *,
    folder: Path | None = None,
    model_class: ModelClass = CAUSAL_MODEL,
) -> PeftModel:
    """The model with the recipe's adapter: fresh, or going on from `init_from`.

    Args:
        model: From `load_model`, or without weights.
        section: The recipe's.
        seed: Of the fresh values.
        folder: What `init_from` is relative to.
        model_class: The task's: a head of its own is trained and saved whole beside the adapter.

    Raises:
        RecipeError: A target matches nothing, or `init_from` disagrees with the recipe.
        ModelError: The adapter of `init_from` does not fit this model, or PEFT cannot wrap it.
    """
    apart: list[str] = []
    if model_class.has_new_head or model_class.trains_projector:
        apart = projector_names(model) if model_class.trains_projector else [*outer_modules(model)]
    method, config = adapters.bind(section), _fresh_config(model, section, apart)
    config.task_type = model_class.peft_task
    if apart:
        config.modules_to_save = apart
    whole = ask_for_modules(config, model, section)
    ask_for_rows(config, model, section)
    with quiet_libraries():
        try:
            with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
                torch.manual_seed(seed)
                adapted = _wrap(model, config, ADAPTER_NAME)
        except (AttributeError, TypeError, ValueError, NotImplementedError) as error:
            what = f"PEFT cannot put an adapter on {type(model).__name__}: {first_line(error)}"
            raise ModelError(what, todo="use another base model") from error
    method.mend(adapted)
    method.settle(adapted)
    keep_weights_unpacked(adapted)
    for name, parameter in adapted.named_parameters() if model_class.trains_projector else ():
        if ".modules_to_save." in name:  # as adapters are: in bf16 most of an update would be rounded away
            parameter.data = parameter.data.float()
    widen(adapted, whole)
    if section.init_from is not None:
        _go_on_from(adapted, section, (folder or Path()) / section.init_from)
    if not any(parameter.requires_grad for parameter in adapted.parameters()):
        raise RecipeError("the adapter has no trainable parameters", key="adapter")
    return adapted


def _fresh_config(model: PreTrainedModel | PeftModel, section: AdapterSection, apart: Sequence[str]) -> PeftConfig:
    """PEFT's config of the recipe's adapter on this model, beside modules that are trained whole.

    Raises:
        RecipeError: A target matches nothing.
    """
    method, layers = adapters.bind(section), layer_paths(model)
    chosen = section.layers if isinstance(section, LinearsSection) else None
    if chosen is not None:
        numbers = chosen.numbers(len(layers))
        layers = {path: number for path, number in layers.items() if number in numbers}
    asked = method.linear_names()
    targets = choose_targets(model, asked, None if chosen is None else layers) if asked else []
    if method.copies is not None:
        targets = module_paths(model, method.copies, apart)
    config = method.peft_config(targets, is_transposed=_are_transposed(model, targets))
    method.fit(config, model, layers)
    return config


def open_adapter(
    base_model: PreTrainedModel | PeftModel,
    folder: Path,
    *,
    base: Base | None = None,
    reporter: Reporter | None = None,
    name: str = ADAPTER_NAME,
) -> PeftModel:
    """The loaded base with a saved adapter on it, frozen like the base.

    Args:
        base_model: From `load_model`, or from here, with adapters of other names.
        folder: The adapter's.
        base: Checked against the adapter's notes where given.
        reporter: Warned where the adapter has no effect; silent where None.
        name: What the adapter is called in the model.

    Raises:
        ModelError: It does not fit, in any respect, or its method cannot run on a base stored so; nothing is guessed.
        SafetyError: See `read_adapter`.
    """
    saved = check_adapter(folder, base, reporter or Silent())
    _refuse_codes(base_model, saved)
    with put_back(base_model, name):
        model = wrap_model(base_model, saved.config, saved.tensors, folder, name=name)
        _load_weights(model, saved, name)
    keep_weights_unpacked(model)
    for parameter in adapter_tensors(model, name).values():
        parameter.requires_grad_(False)
    return model


def check_adapter(folder: Path, base: Base | None, reporter: Reporter) -> AdapterFolder:
    """A saved adapter whose values were looked at, and that was trained on the base where that is given.

    Raises:
        ModelError: It was trained on another base, or holds values that are no finite floats.
        SafetyError: See `read_adapter`.
    """
    saved = read_adapter(folder)
    if base is not None:
        check_base(saved, base)
    saved.check_values(reporter)
    return saved


def wrap_model(
    base_model: PreTrainedModel | PeftModel,
    config: JsonMapping,
    tensors: Collection[str],
    folder: Path,
    *,
    empty: bool = False,
    name: str = ADAPTER_NAME,
) -> PeftModel:
    """A base model with fresh layers where PEFT puts those of an adapter.

    Args:
        base_model: As in `open_adapter`.
        config: The adapter's adapter_config.json.
        tensors: Names of its saved tensors.
        folder: Where those lie, for messages.
        empty: Whether the layers get no values, as those of a base on the meta device.
        name: What the adapter is called in the model.

    Raises:
        ModelError: PEFT does not know its config, or cannot apply it to this model.
    """
    from peft import get_peft_config
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    kind = saved_kind(config, folder / CONFIG)
    known = PEFT_TYPE_TO_CONFIG_MAPPING[config["peft_type"]].__dataclass_fields__
    foreign = {key: value for key, value in config.items() if key not in known and value}
    if foreign:
        raise ModelError(f"keys this PEFT does not know: {list_names(foreign)}", file=str(folder / CONFIG))
    opened = kind.opened_config({key: value for key, value in config.items() if key in known and key != "auto_mapping"})
    with quiet_libraries():
        try:
            model = _wrap(base_model, get_peft_config({**opened, "inference_mode": True}), name, empty=empty)
            kind.reopen(model, name, tensors)
        except Exception as error:  # PEFT raises whatever its tuners meet in a foreign config
            if is_out_of_memory(error):
                raise
            raise ModelError(f"does not fit this model: {first_line(error)}", file=str(folder / CONFIG)) from error
    kind.mend(model)
    return model


def load_adapter_weights(model: PeftModel, folder: Path) -> None:
    """Puts a saved adapter's values into the model's adapter, in place (shapes and dtype of the model stay).

    Raises:
        ModelError: Missing or superfluous tensors, wrong shapes, all counted; or values that are no finite floats.
    """
    saved = read_adapter(folder)
    saved.check_values(Silent())
    _load_weights(model, saved, ADAPTER_NAME)


def check_fit(saved: AdapterFolder, wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ModelError where an adapter's tensors are not exactly the wanted ones; names every mismatch."""
    missing = [name for name in wanted if name not in saved.tensors]
    resumed = saved.kind.resumed_prefix
    left = () if resumed is None or any(name.startswith(resumed) for name in wanted) else (resumed,)
    extra = [name for name in saved.tensors if name not in wanted and not name.startswith(left)]
    misshapen = [n for n, shape in wanted.items() if n in saved.tensors and saved.tensors[n].shape != shape]
    problems = []
    if missing:
        problems.append(f"{len(missing)} of {len(wanted)} missing adapter tensors ({list_names(missing)})")
    if extra:
        problems.append(f"{len(extra)} adapter tensors find no home in this model ({list_names(extra)})")
    if misshapen:
        name = sorted(misshapen)[0]
        has, needs = list(saved.tensors[name].shape), list(wanted[name])
        problems.append(f"{len(misshapen)} of another shape ({name} is {has}, the model needs {needs})")
    if problems:
        raise ModelError("; ".join(problems), file=str(saved.path / WEIGHTS), todo="use the base it was trained on")


def check_plan(model: torch.nn.Module, planned: Sequence[Site], trainable_parameters: int) -> None:
    """Compares adapted layers and trainable parameters of a PEFT model with the plan's.

    Args:
        model: With its adapter.
        planned: Where the method was to train what.
        trainable_parameters: The plan's count.

    Raises:
        ModelError: They differ; the message names each kind of layer that does.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    wanted: Counter[str] = Counter()
    for site in planned:
        if site.linear is not None or site.kind == "module":
            wanted[site.name] += site.count
    found: Counter[str] = Counter()
    for path, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and not hasattr(module, "trainable_tokens_delta"):
            found[path.removesuffix(".base_layer").rsplit(".", 1)[-1]] += 1
    differences = [
        f"{name}: {wanted[name]} layers planned, {found[name]} adapted"
        for name in sorted(wanted | found)
        if wanted[name] != found[name]
    ]
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if trainable != trainable_parameters:
        differences.append(f"{trainable_parameters:,} trainable parameters planned, {trainable:,} found")
    if differences:
        more = f" and {len(differences) - _SHOWN_DIFFERENCES} more" if len(differences) > _SHOWN_DIFFERENCES else ""
        raise ModelError(
            f"plan and model disagree: {'; '.join(differences[:_SHOWN_DIFFERENCES])}{more}",
            key="adapter.target_modules",
            todo="name the linears to adapt, and please report it with the model's config.json",
        )


def _wrap(model: PreTrainedModel | PeftModel, config: PeftConfig, name: str, *, empty: bool = False) -> PeftModel:
    """PEFT's model with one more adapter, fp32 over whatever the base is; of fp16 a head that is trained, too.

    torch's loss scale takes no gradients in fp16, and PEFT leaves a head in the base's dtype.
    """
    from peft import PeftModel, get_peft_model

    if isinstance(model, PeftModel):
        model.add_adapter(name, config, low_cpu_mem_usage=empty)
        adapted = model
    else:
        adapted = get_peft_model(model, config, adapter_name=name, low_cpu_mem_usage=empty)
    for parameter in adapted.parameters():
        if parameter.requires_grad and parameter.dtype == torch.float16:
            parameter.data = parameter.data.float()
    keep_dtypes(adapted, name)
    return adapted


def _are_transposed(model: torch.nn.Module, target_modules: Sequence[str]) -> bool:
    """Whether all targets are GPT-2's Conv1D, whose weights lie `[in, out]`."""
    from transformers.pytorch_utils import Conv1D

    ends = tuple(f".{target}" for target in target_modules)
    wanted = [module for path, module in model.named_modules() if f".{path}".endswith(ends)]
    return bool(wanted) and all(isinstance(module, Conv1D) for module in wanted)


def _refuse_codes(model: torch.nn.Module, saved: AdapterFolder) -> None:
    """Raises ModelError where an adapter's method cannot stand beside one of its layers as that is stored."""
    beside = {path for name in saved.tensors for path in _above(name.removeprefix("base_model.model."))}
    for path, layer in model.named_modules():
        if path.removeprefix("base_model.model.").removesuffix(".base_layer") not in beside:
            continue
        codes = kind_of_codes(layer)
        why = saved.kind.refuses_saved(saved.config, "none" if codes is None else codes.name())
        if why is not None:
            todo = "open it on its base in another quantization"
            raise ModelError(why, file=str(saved.path / CONFIG), todo=todo)


def _above(name: str) -> Iterator[str]:
    """Every path that a tensor may lie under."""
    while name:
        name = name.rpartition(".")[0]
        yield name


def _load_weights(model: PeftModel, saved: AdapterFolder, name: str) -> None:
    live = adapter_tensors(model, name)
    wanted = {**live, **derived_tensors(model, name)}
    check_fit(saved, {path: tuple(value.shape) for path, value in wanted.items()})
    with torch.no_grad():
        for path, parameter in live.items():
            values = read_rows(saved.tensors[path])
            is_narrow = values.dtype == torch.float32 and parameter.dtype == torch.bfloat16
            is_whole = f".{LAYERS}." not in path and isinstance(parameter, torch.nn.Parameter)
            if is_narrow and is_whole:  # a projector, trained so
                parameter.data = parameter.data.float()
            parameter.copy_(values)
    saved.kind.take_tensors(model, name, live)


def _go_on_from(model: PeftModel, section: AdapterSection, folder: Path) -> None:
    """Gives a fresh adapter the weights of a saved one of the same method, options and layers.

    Raises:
        RecipeError: Recipe and adapter differ in one of those.
        ModelError: See `read_adapter`.
    """
    saved, fresh, kind = read_adapter(folder), adapter_config(model, "", None), adapters.get(section.kind)
    for key, ours in kind.recipe_fields.items():
        theirs, asked = saved.config.get(key), fresh[key]
        if theirs != asked:
            shown = f"{asked:g}" if isinstance(asked, float) else asked
            raise RecipeError(f"the recipe says {shown}, the adapter to go on from has {theirs}", key=f"adapter.{ours}")
    unlike = kind.differences(saved.config, fresh)
    if unlike or saved.kind is not adapters.get(kind.saved_as or section.kind):
        form = ", ".join(unlike) or saved.config["peft_type"]
        raise RecipeError(f"{folder} is no plain {section.kind} adapter ({form})", key="adapter.init_from")
    live = adapter_tensors(model).keys() | derived_tensors(model).keys()
    if live != saved.tensors.keys():
        raise RecipeError(
            f"{folder} adapts other layers: {list_names(saved.tensors.keys() ^ live)}",
            key="adapter.target_modules",
            todo="name the targets it was trained with",
        )
    load_adapter_weights(model, folder)
