"""Any other method of PEFT's at linears, by its name there and with its own options.

    adapter: {kind: peft, method: hira, options: {r: 16}}

What runs is PEFT's layer; names and types of the options are read off PEFT's own config class. Trained parameters are
counted on a model of the same linears without values. What fails, or computes something else than it says, is refused.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from lorafit.console.nearest import did_you_mean
from lorafit.contracts import JsonMapping, JsonObject
from lorafit.errors import ModelError, RecipeError
from lorafit.kinds.adapter_parts import Site
from lorafit.kinds.adapters import Adapter, adapters
from lorafit.kinds.adapters._peft_options import TARGETS, PeftMethod, PeftOption, peft_methods
from lorafit.kinds.adapters._saved import named_on_disk
from lorafit.kinds.folding import Folding
from lorafit.kinds.linear_targets import LinearsSection, choose_linears
from lorafit.kinds.quantizations import kind_of_codes

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig, PeftModel

    from lorafit.facts import LinearShape, ModelShape

UNFIT = {
    "ADALORA": "its ranks are chosen between steps",
    "ADAMSS": "it needs scikit-learn, and chooses between steps what is trained",
    "FROD": "its first values are made of the weights', which are not there yet when its memory is told",
    "LN_TUNING": "it trains whole layers, norms for example, and no adapter beside them",
    "LILY": "what its layers share is told by a loaded model alone, and its size before",
    "POLY": "each forward must be told which task a row is of",
    "PSOFT": "it finds singular vectors of the weight anew when it is opened, and in bf16 they come out as others",
    "SHADOW": "what its layers hand on is no tensor, and transformers' own code wants one",
    "SHIRA": "which values it trains is found by an operation that needs them, and its memory is told without",
    "SUPERTUNING": "it saves places of values beside values, and an adapter's file holds values alone",
    "TINYLORA": "PEFT does not open it again as it was saved: the singular vectors it is made of are found anew",
    "TRAINABLE_TOKENS": "it trains rows of an embedding, and no linear",
    "UNILORA": "its places are counted by an operation that needs values, and its memory is told without",
    "VBLORA": "its layer looks for infinities among its values, and its memory is told without values",
    "WAVEFT": "its layer finds places by an operation that needs values, and its memory is told without",
}
"""Methods that this kind does not run, with the reason."""

_READS_WEIGHT = "it computes with the weight itself, in whose place PEFT's layer finds codes"
_PLAIN_WEIGHTS_ONLY = {
    "DEFT": _READS_WEIGHT,
    "DELORA": "it scales by the norms of the weight, which PEFT cannot take of codes",
    "GLORA": "it adds to the weight itself, and PEFT has no layer of it over codes",
    "HRA": _READS_WEIGHT,
    "OSF": "it trains singular vectors of the weight, which PEFT cannot take of codes",
    "PEANUT": _READS_WEIGHT,
}
_NO_FOUR_BITS = dict.fromkeys(
    ("LOHA", "LOKR"), "its update has the shape of the stored weight, and four-bit codes are packed in another"
)
_FOUR_BITS = ("nf4", "fp4")


def why_unfit(peft_type: str) -> str | None:
    """Why a method of PEFT's is not run by this kind; None where it is."""
    kinds = [(len(kind.peft_options), name, kind) for name, kind in adapters.items() if kind.saved_as is None]
    own = [found for found in kinds if found[2].peft_type == peft_type and found[2] is not Peft]
    if own:
        return f"it has a kind of its own: {min(own)[1]}"
    if peft_type in UNFIT:
        return UNFIT[peft_type]
    method = peft_methods().get(peft_type)
    if method is None or not method.at_linears or peft_type == "ADAPTION_PROMPT":
        return "it stands at no linear"
    return None


def fitting_methods() -> list[str]:
    """Names of the methods that this kind runs."""
    return [peft_type.lower() for peft_type in sorted(peft_methods()) if why_unfit(peft_type) is None]


def unfit_methods() -> dict[str, str]:
    """Names of all others of PEFT's methods, each with the reason."""
    return {name.lower(): why for name in sorted(peft_methods()) if (why := why_unfit(name)) is not None}


class PeftSection(LinearsSection):
    """A method of PEFT's that has no kind of its own here."""

    kind: Literal["peft"] = "peft"
    """PEFT's layers of another method."""
    method: str = "hira"
    """PEFT's name of it, e.g. hira, gralora, delora, randlora."""
    options: dict[str, PeftOption] = Field(default={})
    """Options of its config class in PEFT, e.g. {r: 16}; what is left out is at PEFT's default."""

    @model_validator(mode="after")
    def _is_peft_of_a_known_method(self) -> PeftSection:
        known, name = fitting_methods(), self.method.upper()
        if self.method not in known:
            what = f"is not run: {why_unfit(name)}"
            if name not in peft_methods():
                what = f"is no method of PEFT's; {did_you_mean(self.method, known)}known: {', '.join(known)}"
            raise ValueError(f"method '{self.method}' {what}")
        faults = (peft_methods()[name].fault_of(key, value) for key, value in self.options.items())
        if fault := next(filter(None, faults), None):
            raise ValueError(f"options: {fault}")
        return self


@adapters.register(PeftSection)
class Peft(Adapter[PeftSection]):
    """PEFT's layer of a method in the place of each linear; `peft_type` is one of those that it opens."""

    peft_type: ClassVar[str] = "HIRA"

    @classmethod
    def opens(cls, peft_type: object) -> bool:
        """Whether it is a method that this kind runs."""
        return isinstance(peft_type, str) and why_unfit(peft_type) is None

    @property
    def _method(self) -> PeftMethod:
        return peft_methods()[self.section.method.upper()]

    def sites(self, shape: ModelShape) -> tuple[Site, ...]:
        """The linears it goes on; what all share is counted at the first.

        Raises:
            RecipeError: A name matches none, or PEFT takes these options at none such.
        """
        linears = choose_linears(self.section, shape)
        counted = _count(self._method.peft_type, json.dumps(self.section.options, sort_keys=True), linears)
        return tuple(
            Site("linear", linear.name, linear.count, parameters, linear)
            for linear, parameters in zip(linears, counted, strict=True)
        )

    def peft_config(self, target_modules: Sequence[str], *, is_transposed: bool) -> PeftConfig:
        """PEFT's config class with the recipe's options. Raises RecipeError where PEFT takes them not."""
        if is_transposed:
            what = f"{self.section.method} is run at weights that lie [out, in], and this model's lie [in, out]"
            raise ModelError(what, key="adapter.method", todo="use kind: lora, dora, vera or ia3")
        return _config(self._method.peft_type, self.section.options, target_modules)

    def refuses(self, quantization_kind: str) -> str | None:
        """Of the methods that need the weight's own values: why."""
        return self.refuses_saved({"peft_type": self._method.peft_type}, quantization_kind)

    @classmethod
    def refuses_saved(cls, config: JsonMapping, quantization_kind: str) -> str | None:
        """As `refuses`."""
        peft_type = str(config.get("peft_type"))
        why = _PLAIN_WEIGHTS_ONLY.get(peft_type) if quantization_kind != "none" else None
        if quantization_kind in _FOUR_BITS:
            why = why or _NO_FOUR_BITS.get(peft_type)
        return why and f"{peft_type.lower()} does not run beside {quantization_kind}: {why}"

    @classmethod
    def opened_config(cls, config: JsonMapping) -> JsonObject:
        """The saved one. Raises ModelError where an option is of another type than PEFT's."""
        faults = peft_methods()[str(config["peft_type"])].faults(config)
        if faults:
            raise ModelError(faults[0], file="adapter_config.json", todo="restore the file")
        return dict(config)

    @classmethod
    def differences(cls, saved: JsonMapping, fresh: JsonMapping) -> list[str]:
        """The method, or every option that is not the recipe's."""
        if saved["peft_type"] != fresh["peft_type"]:
            return ["peft_type"]
        own = peft_methods()[str(saved["peft_type"])].options()
        return [key for key in own if key in saved and saved[key] != fresh.get(key)]

    @classmethod
    def mend(cls, model: PeftModel) -> None:
        """Some layers add in place to what a linear with codes and a bias answers: a view, which autograd refuses."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        for layer in model.modules():
            base: Any = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else None
            has_view = base is not None and kind_of_codes(base) is not None and base.bias is not None
            if has_view and not base._forward_hooks:
                base.register_forward_hook(_as_copy)

    @classmethod
    def live_tensors(cls, model: PeftModel, name: str) -> dict[str, torch.Tensor]:
        """The trained parameters, and every buffer that a state has: PEFT takes of them what it saves."""
        buffers = {
            f"{path}.{key}": value
            for path, module in model.named_modules(remove_duplicate=False)
            for key, value in module._buffers.items()
            if value is not None and key not in module._non_persistent_buffers_set
        }
        return named_on_disk(model, name, {**buffers, **dict(model.named_parameters(remove_duplicate=False))})

    @classmethod
    def take_tensors(cls, model: PeftModel, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """By PEFT's own loading: some methods save what they make of a parameter."""
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(model, dict(tensors), adapter_name=name)

    @classmethod
    def folding(cls, config: JsonMapping) -> Folding:
        """By PEFT's own layer; see `_peft_fold`."""
        from lorafit.kinds.adapters._peft_fold import PeftFolding

        return PeftFolding(config)


def _as_copy(linear: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
    return output.clone()


def _config(peft_type: str, options: JsonMapping, target_modules: Sequence[str]) -> PeftConfig:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    made: Any = PEFT_TYPE_TO_CONFIG_MAPPING[peft_type]
    try:
        config: PeftConfig = made(**{**options, TARGETS: list(target_modules)})
    except (TypeError, ValueError) as error:
        what = f"PEFT refuses these options of {peft_type.lower()}: {str(error).splitlines()[0]}"
        raise RecipeError(what, key="adapter.options") from error
    return config


@lru_cache(maxsize=16)
def _count(peft_type: str, options: str, linears: tuple[LinearShape, ...]) -> tuple[int, ...]:
    """Trained parameters at all linears of each shape, on a model of nothing else, without values."""
    import torch
    from peft import get_peft_model

    with torch.device("meta"):
        layers = [torch.nn.Module() for _ in range(max(linear.count for linear in linears))]
        for linear in linears:
            for layer in layers[: linear.count]:
                layer.add_module(linear.name, torch.nn.Linear(linear.in_features, linear.out_features, linear.bias))
        model = torch.nn.Module()
        model.add_module("layers", torch.nn.ModuleList(layers))
        names = [f"layers.{number}.{linear.name}" for linear in linears for number in range(linear.count)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                adapted = get_peft_model(model, _config(peft_type, json.loads(options), names))
            except (TypeError, ValueError) as error:
                what = f"PEFT refuses {peft_type.lower()} for these linears: {str(error).splitlines()[0]}"
                raise RecipeError(what, key="adapter.options") from error
    trained = {path: value.numel() for path, value in adapted.named_parameters() if value.requires_grad}
    own = [sum(size for path, size in trained.items() if f".{linear.name}." in path) for linear in linears]
    own[0] += sum(trained.values()) - sum(own)
    return tuple(own)
