"""Which linears of a model get an adapter, which stay unquantised, and why the others have none.

    every linear, Conv1D too ── output head ── routers ── towers beside the language model ── shared and moved ones
                             └─ what is left: the linears that `all-linear` names

The answer is read off the model itself, loaded or on the meta device, so that plan, dry run and training agree.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections import Counter
from collections.abc import Collection, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from lorafit.console.wording import list_names
from lorafit.contracts import Reporter
from lorafit.kinds.linear_targets import choose_names
from lorafit.model.classes import build_whole
from lorafit.model.quiet import quiet_libraries
from lorafit.ops.output_head import outer_modules, output_head, text_part

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel

    from lorafit.kinds.quantizations import Quantization, QuantizationSection

EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
ROUTER_NAMES = frozenset({"gate", "router", "shared_expert_gate", "wg"})
_WEIGHT_READ = re.compile(r"(?<!isinstance\()self\.(\w+)\.weight\b(?!\.(?:dtype|device|shape)|\[)")
"""Children in `self.NAME.weight`: its class, type, place and slices apart, as values."""
_WEIGHT_CHANGED = re.compile(r"\b(\w+\.\w+)\.weight\.(?:mul|div|add|sub)_\(")
"""Last two parts of the paths of weights that are multiplied or added to in place."""
_LEADING = re.compile(r"^\^?\(?(\w+(?:_encoder|_adapter|_tower|_model))\b")
_CHOOSERS = frozenset({"indexer", "patcher"})  # of sparse attention (DeepSeek-V3.2 and its kin), of bytes (BLT)
_EXPERT_NAMES = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")  # what PEFT looks for in old configs

ROUTER = "chooses experts"
OUTSIDE = "outside of the language model"
MOVED = "PEFT moves adapters of this name to the fused experts"
SHARED = "one weight for several layers"
CHOICE = "picks what other layers see, and no gradient passes a choice"
OTHER = "no plain linear: it computes something else than x W^T"
READ = "the model reads its weight past any adapter"
RENAMED = "PEFT renames adapters of this layer while it loads them, and would not find it again"


def choose_targets(
    model: PreTrainedModel, asked: Literal["all-linear"] | Sequence[str], layers: Collection[str] | None = None
) -> list[str]:
    """Names for PEFT's `target_modules` that match exactly the wanted linears: last parts of paths where those suffice.

    Args:
        model: Loaded or on the meta device.
        asked: `adapter.target_modules`.
        layers: Paths of the layers that they are in; None: wherever they are.

    Raises:
        RecipeError: See `choose_names`.
    """
    left_out = left_out_names(model)
    linears = [name for name, _ in find_linears(model) if name not in left_out]
    names = choose_names(asked, map(_last, linears), {_last(path): why for path, why in left_out.items()})
    wanted = {name for name in linears if _last(name) in names}
    if layers is not None:
        starts = tuple(f"{layer}." for layer in layers)
        wanted = {name for name in wanted if name.startswith(starts)}
    matched = {name for name, _ in model.named_modules() if _last(name) in names}
    return sorted(names) if matched == wanted else sorted(wanted)


def left_out_names(model: PreTrainedModel) -> dict[str, str]:
    """Paths of the other linears, the output head apart, each with the reason."""
    import torch
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    linears = find_linears(model)
    routers, towers = set(router_names(model)), set(tower_names(model))
    shared, read, changed = _shared_names(model, linears), _read_names(model), _changed_names(model, linears)
    # PEFT is asked only where it does not take names as they are: it costs a second to import.
    converts = get_checkpoint_conversion_mapping(model.config.model_type) is not None
    scans = any(isinstance(part, torch.nn.Conv1d) for part in model.modules())
    moved = _moved_by_peft(model, linears) if converts else set()
    refused = _refused_by_peft(model, linears) if scans else set()
    found = {}
    for name, module in linears:
        if name in routers:
            found[name] = ROUTER
        elif name in towers:
            found[name] = OUTSIDE
        elif _CHOOSERS & set(name.split(".")):
            found[name] = CHOICE
        elif name in shared:
            found[name] = SHARED
        elif not _multiplies(module):
            found[name] = OTHER
        elif _last(name) in moved:
            found[name] = MOVED
        elif name in read or name in changed or _last(name) in refused:
            found[name] = READ
    usable = [name for name, _ in linears if name not in found]
    return found | dict.fromkeys(_renamed_by_peft(model, usable) if converts else (), RENAMED)


def whole_modules(model: PreTrainedModel) -> dict[str, Any]:
    """Modules that may be trained whole, by path: those of the language model that hold a weight and are neither a
    linear of its layers nor part of a task's own head."""
    import torch

    linears, head = {name for name, _ in find_linears(model)}, output_head(model)
    inside = {id(module) for module in (text_part(model) or model).modules()} | {id(head)}
    outer = tuple(f"{name}." for name, module in outer_modules(model).items() if module is not head)
    left_out = {*router_names(model), *linears}
    return {
        path: module
        for path, module in model.named_modules()
        if id(module) in inside and path not in left_out and not f"{path}.".startswith(outer)
        if isinstance(getattr(module, "weight", None), torch.nn.Parameter) and next(module.children(), None) is None
    }


def choose_whole(model: PreTrainedModel, names: Sequence[str]) -> dict[str, Any]:
    """Modules of these names that are to be trained whole, by path; with an embedding the head that shares its weight,
    and the other way round."""
    able = whole_modules(model)
    chosen = {id(module.weight) for path, module in able.items() if _last(path) in names}
    return {path: module for path, module in able.items() if id(module.weight) in chosen}


def head_names(model: PreTrainedModel) -> list[str]:
    """Paths of the output head; of a class that gives no token logits, of all that stands outside of its backbone."""
    head = output_head(model)
    if head is not None:
        return [name for name, module in model.named_modules() if module is head]
    return [
        name
        for name, _ in model.named_modules()
        if any(f"{name}.".startswith(f"{one}.") for one in outer_modules(model))
    ]


def router_names(model: PreTrainedModel) -> list[str]:
    """Paths of linears that choose experts: inside of a router, or called a gate and as wide as there are experts
    (or one)."""
    import torch

    text = model.config.get_text_config()
    configs = [text, *(getattr(text, name) for name in text.sub_configs)]
    counts = {value for config in configs for key in EXPERT_COUNTS if (value := config_number(config, key))}
    linears = [x for x in model.named_modules() if isinstance(x[1], torch.nn.Linear)] if counts else []
    return [
        name
        for name, module in linears
        if "router" in name or (_last(name) in ROUTER_NAMES and module.out_features in (counts | {1}))
    ]


def wide_names(model: PreTrainedModel) -> list[str]:
    """Paths of linears that transformers quantises never, and keeps in fp32 where the rest is fp16: T5's `wo`."""
    kept = tuple(model._keep_in_fp32_modules or ())
    return [name for name, _ in find_linears(model) if name.endswith(kept)]


def tower_names(model: PreTrainedModel) -> list[str]:
    """Paths of the linears outside of the language model: vision and audio towers and what joins them to it."""
    decoder = text_part(model)
    if decoder is None:
        return []
    inside = {id(module) for module in decoder.modules()}
    for part in decoder.children():  # some hold their towers inside of the decoder
        kinds = [getattr(module, "input_modalities", None) for module in part.modules()]
        if any(kinds) and not any("text" in kind for kind in kinds if kind):
            inside -= {id(module) for module in part.modules()}
    return [name for name, module in find_linears(model) if id(module) not in inside]


def leave_towers_out(skeleton: PreTrainedModel, config: PretrainedConfig) -> None:
    """Tells a language model built from a config of several modalities that its files hold towers besides.

    transformers loads it without a word on them; they are left out on purpose, and a merge copies them.
    """
    if skeleton.config is config or not config.sub_configs:
        return
    from transformers.conversion_mapping import get_model_conversion_mapping

    whole = build_whole(config)
    if whole is None:
        return
    known = tuple(skeleton._keys_to_ignore_on_load_unexpected or ())
    parts = _tower_parts(whole)
    for entry in get_model_conversion_mapping(whole):  # what files call them
        if any(part in target for part in parts for target in entry.target_patterns):
            parts |= {name for source in entry.source_patterns for name in _LEADING.findall(source)}
    skeleton._keys_to_ignore_on_load_unexpected = [*known, *(rf"(^|\.){re.escape(part)}\." for part in sorted(parts))]


def _tower_parts(whole: PreTrainedModel) -> set[str]:
    """Names of what stands beside the language model in a model of several modalities, e.g. `vision_tower`."""
    text = text_part(whole)
    if text is None:
        return set()
    inside = {id(module) for module in text.modules()}
    paths = {name: module for name, module in whole.named_modules() if name}
    holders = {name for name, module in paths.items() if any(id(x) in inside for x in module.modules())}
    heads = set(head_names(whole))
    beside = {name for name in paths if name not in holders and name not in heads}
    return {_last(name) for name in beside if name.rpartition(".")[0] in (*holders, "")}


def unquantised_names(
    model: PreTrainedModel,
    kind: Quantization[QuantizationSection] | None,
    reporter: Reporter,
    quantised: Collection[str] | None = None,
) -> list[str]:
    """Paths that stay in the compute dtype: bitsandbytes leaves none out by itself once a list is given.

    Towers beside the language model are never run on text: quantising them would only cost what their users see. What
    the model itself multiplies in place would be quantised anew each time.

    Args:
        model: Loaded or on the meta device.
        kind: The quantisation, on a CPU: linears whose rows it cannot hold there stay, too. None elsewhere.
        reporter: Warned of those.
        quantised: Paths that a run had quantised, on whatever device: no others are; None: no run says.
    """
    plain = [*head_names(model), *router_names(model), *tower_names(model), *wide_names(model)]
    plain += _changed_names(model, find_linears(model))
    linears = find_linears(model)
    if quantised is not None:
        plain += [name for name, _ in linears if name not in quantised]
    narrow: dict[str, int] = {}
    for name, module in linears:
        inputs = getattr(module, "in_features", None) or next(module.parameters()).shape[0]  # Conv1D lies [in, out]
        multiple = 1 if kind is None else kind.of(name).cpu_row_multiple
        if inputs % multiple and name not in plain:
            narrow[name] = multiple
    if narrow and quantised is None:
        reporter.warn(
            f"{len(narrow)} linears stay unquantised: their input width is no multiple of {max(narrow.values())}, "
            f"which 4-bit weights on a CPU need ({list_names(narrow)})"
        )
    return [*plain, *narrow]


def find_linears(model: PreTrainedModel) -> list[tuple[str, Any]]:
    """Every linear but the output head, each module once."""
    import torch
    from transformers.pytorch_utils import Conv1D

    heads = set(head_names(model))
    kinds = (torch.nn.Linear, Conv1D)
    return [(name, module) for name, module in model.named_modules() if isinstance(module, kinds) and name not in heads]


def _shared_names(model: PreTrainedModel, linears: Sequence[tuple[str, Any]]) -> set[str]:
    """Linears whose weight is another linear's too (Zamba's blocks): one weight cannot take two updates."""
    owners = Counter(id(module.weight) for _, module in linears)
    shared = {name for name, module in linears if owners[id(module.weight)] > 1}
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    names = {name.removesuffix(".weight") for pair in tied.items() for name in pair}
    return shared | {name for name, _ in linears if name in names}


def _multiplies(module: Any) -> bool:
    """Whether a class that transformers derives from `Linear` gives [..., out] for [..., in], as an adapter does."""
    import torch

    if not type(module).__module__.startswith("transformers.models."):
        return True
    tensors = {name: value.to("meta") for name, value in [*module.named_parameters(), *module.named_buffers()]}
    probe = torch.empty(1, 2, module.in_features, device="meta", dtype=module.weight.dtype)
    try:
        result = torch.func.functional_call(module, tensors, (probe,))
    except (RuntimeError, ValueError, TypeError, IndexError):
        return False
    return isinstance(result, torch.Tensor) and result.shape == (1, 2, module.out_features)


def _moved_by_peft(model: PreTrainedModel, linears: Sequence[tuple[str, nn.Module]]) -> set[str]:
    """Last parts of paths that PEFT, whenever it opens an adapter of this model, takes for names of fused experts.

    It does so for models whose experts were linears before transformers 5; linears of the same name (shared experts,
    dense layers) would then get no adapter, and the experts one that nobody asked for.
    """
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    config = LoraConfig(target_modules=[*_EXPERT_NAMES, *{_last(name) for name, _ in linears}])
    asked = set(config.target_modules or ())
    with quiet_libraries():
        convert_peft_config_for_transformers(config, model=model, conversions=None)
    return asked - set(config.target_modules or ())


def _refused_by_peft(model: PreTrainedModel, linears: Sequence[tuple[str, nn.Module]]) -> set[str]:
    """Last parts of paths that PEFT attaches no adapter to (Mamba's `out_proj`, whose kernel reads the weight)."""
    from peft import LoraConfig
    from peft.tuners.lora import LoraModel

    refused = set()
    for name in {_last(name) for name, _ in linears}:
        try:
            LoraModel._check_target_module_compatiblity(None, LoraConfig(), model, name)
        except ValueError:
            refused.add(name)
    return refused


def _renamed_by_peft(model: PreTrainedModel, names: Sequence[str]) -> list[str]:
    """Of some linears, those whose adapters get another name when PEFT loads them; none, where those are all.

    Then no choice of names helps, and `check_shippable` tells what would be lost.
    """
    import torch
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers

    keys = {f"base_model.model.{name}.lora_A.weight": name for name in names}
    nothing = {key: torch.empty(0, device="meta") for key in keys}
    with quiet_libraries():
        try:
            kept = convert_peft_adapter_state_dict_for_transformers(model, LoraConfig(), nothing)
        except (RuntimeError, ValueError, KeyError, IndexError):  # tensors of several layers become one: asked later
            return []
    lost = [name for key, name in keys.items() if key not in kept]
    return lost if len(lost) < len(names) else []


def _changed_names(model: PreTrainedModel, linears: Sequence[tuple[str, Any]]) -> set[str]:
    """Linears whose weight the model multiplies in place when it goes from training to evaluation (RWKV does)."""
    kinds: set[Any] = set(map(type, model.modules()))
    changed = tuple(f".{path}" for kind in kinds for path in _named_in_code(kind, _WEIGHT_CHANGED))
    return {name for name, _ in linears if name.endswith(changed)}


def _read_names(model: PreTrainedModel) -> set[str]:
    """Linears whose weight the code of the module around them reads itself, on some path (Mamba's kernels do)."""
    found = set()
    for path, module in model.named_modules():
        kind: Any = type(module)
        children = _named_in_code(kind, _WEIGHT_READ) & module._modules.keys()
        found |= {f"{path}.{child}" if path else child for child in children}
    return found


@cache
def _named_in_code(kind: type[nn.Module], pattern: re.Pattern[str]) -> frozenset[str]:
    """What a pattern finds in the code of a class of transformers."""
    if not kind.__module__.startswith("transformers."):
        return frozenset()
    try:
        code = _code_of_classes(kind.__module__).get(kind.__qualname__) or inspect.getsource(kind)
    except (OSError, TypeError, KeyError):  # no source at hand
        return frozenset()
    return frozenset(pattern.findall(code))


@cache
def _code_of_classes(module: str) -> dict[str, str]:
    """The code of each class at the top of a module: `inspect` would parse the whole file for each of them."""
    code = inspect.getsource(sys.modules[module])
    lines, classes = code.splitlines(), (node for node in ast.parse(code).body if isinstance(node, ast.ClassDef))
    return {node.name: "\n".join(lines[node.lineno - 1 : node.end_lineno]) for node in classes}


def config_number(config: PretrainedConfig, key: str, default: int = 0) -> int:
    """A whole number above 0 of a config; the default where it is missing, or differs from layer to layer."""
    try:
        value = getattr(config, key, None)
    except (AttributeError, ValueError, RuntimeError):
        return default
    return value if isinstance(value, int) and value > 0 else default


def _last(path: str) -> str:
    return path.rsplit(".", 1)[-1]
