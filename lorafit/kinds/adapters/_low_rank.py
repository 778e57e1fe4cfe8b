"""What the methods share that train a product of two narrow matrices beside a frozen linear: A [r, in] and B [out, r].

Source: Hu et al. 2021, LoRA (https://arxiv.org/abs/2106.09685), section 4.1; rank-stabilised scaling: Kalajdzievski
2023 (https://arxiv.org/abs/2312.03732), equation 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence, Set
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypeVar

from pydantic import Field, field_validator, model_validator

from lorafit.contracts import JsonMapping, JsonObject
from lorafit.errors import ModelError, RecipeError
from lorafit.files.safetensors import read_rows
from lorafit.kinds.adapter_parts import Number, Rank, SavedField, Site
from lorafit.kinds.adapters import Adapter
from lorafit.kinds.adapters._layer_ranks import THIRDS, LayerRanks
from lorafit.kinds.adapters._low_rank_fold import LowRankFold
from lorafit.kinds.folding import AdaptedLayer, Folding, compile_layers
from lorafit.kinds.initialisations import Initialisation, InitialisationSection, initialisations
from lorafit.kinds.linear_targets import LinearsSection, choose_linears

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel

    from lorafit.facts import LinearShape, ModelShape
    from lorafit.files.safetensors import TensorEntry

    InitialisationChoice = InitialisationSection
else:
    InitialisationChoice = initialisations.one_of("kaiming")

_FACTORS_KEPT = 4  # both of an expert's two parameters
_PLAIN_INITS = (True, False, "gaussian", "eva", None)
_PLAIN_KEYS = frozenset(
    {
        *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "init_lora_weights"),
        *("target_modules", "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern"),
        *("peft_type", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping"),
        *("eva_config", "corda_config", "lora_ga_config", "loftq_config", "runtime_config", "megatron_core"),
        *("qalora_group_size", "ensure_weight_tying", "lora_dropout", "task_type"),
    }
)
"""Keys of adapter_config.json that leave the product s * B A, or are judged by `LowRankFolding`."""


_UNQUANTISED_OPTIONS = {
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "use_bdlora": "BD-LoRA",
    "use_qalora": "QA-LoRA",
}
SectionRank = Annotated[int, Field(ge=1, le=4096)]
"""A rank that a recipe may ask for."""


class ProductSection(LinearsSection):
    """Two narrow matrices beside frozen linears, B zero at the start."""

    r: SectionRank = 16
    """Rank: width of the bottleneck."""
    alpha: float = Field(default=32.0, gt=0.0, le=1e6, allow_inf_nan=False)
    """The update is scaled by alpha / r."""
    ranks: list[SectionRank] | dict[str, SectionRank] | None = None
    """Ranks that differ: {early: 4, middle: 8, late: 16} by thirds of the adapted layers, a list with one for each of
    them, or by linear, e.g. {down_proj: 32}. What it does not name has rank r; the scale is alpha / r for all."""
    dropout: float = Field(default=0.05, ge=0.0, lt=1.0)
    """Share of the adapter's inputs that is zeroed while training (0 to 1)."""

    @field_validator("ranks")
    @classmethod
    def _ranks_are_of_one_form(cls, value: list[int] | dict[str, int] | None) -> list[int] | dict[str, int] | None:
        if value is not None and not value:
            raise ValueError("it names no rank; leave it out, and all have rank r")
        names = [name for name in value if name not in THIRDS] if isinstance(value, dict) else []
        if names and len(names) < len(value or ()):
            raise ValueError(f"it names thirds of the layers and {names[0]!r}, a linear; keep one of the two")
        return value


class LowRankSection(ProductSection):
    """Two narrow matrices beside frozen linears."""

    init: InitialisationChoice = Field(default="kaiming", validate_default=True)
    """First values of A and B. Not together with init_from."""
    new_tokens: list[str] | dict[str, str] | None = None
    """Tokens that the tokenizer is taught, e.g. ["<call>"], and whose rows of embedding and head are trained. Each
    begins as the mean of all, or of the tokens of a text: {"<call>": "call a function"}."""

    @field_validator("new_tokens")
    @classmethod
    def _new_tokens_are_words(cls, value: list[str] | dict[str, str] | None) -> list[str] | dict[str, str] | None:
        if value is not None and not value:
            raise ValueError("it names no token; leave it out")
        tokens = list(value or ())
        blank = [token for token in tokens if not token or token.strip() != token]
        if blank:
            raise ValueError(f"{blank[0]!r} is empty, or begins or ends with a blank")
        twice = [token for token in tokens if tokens.count(token) > 1]
        if twice:
            raise ValueError(f"it names {twice[0]!r} twice")
        return value

    @model_validator(mode="after")
    def _begins_once(self) -> LowRankSection:
        if self.init_from is not None and self.init.kind != "kaiming":
            raise ValueError(f"init {self.init.kind} and init_from both say what it begins with; keep one")
        return self


class LowRankFolding(Folding):
    """Changes by s * B A, as an adapter_config.json describes them.

    Args:
        config: adapter_config.json.
        known_keys: Keys of the method's own, beside those that leave s * B A as it is.

    Raises:
        ModelError: It uses what is no such product.
    """

    parts: ClassVar[Mapping[str, str]] = {
        "lora_A": "A",
        "lora_B": "B",
        "lora_embedding_A": "A",
        "lora_embedding_B": "B",
    }
    new_weight: ClassVar[str] = "W + s B A"

    def __init__(self, config: JsonMapping, known_keys: Set[str]) -> None:
        known = _PLAIN_KEYS | known_keys
        active = [k for k, v in config.items() if k not in known and v and not (k == "bias" and v == "none")]
        if config.get("init_lora_weights", True) not in _PLAIN_INITS:
            active.append(f"init_lora_weights={config['init_lora_weights']}")
        if active:
            raise ModelError(
                f"cannot be merged as W + s * B A: it uses {', '.join(sorted(active))}",
                todo="merge it with the tool that made it",
            )
        self._config = config
        self.read = lru_cache(maxsize=_FACTORS_KEPT)(_read_fp32)

    def shape(self, layer: AdaptedLayer) -> tuple[int, int]:
        """By the factors: A `[matrices * r, in]`, or `[r, rows]` of an embedding, and B `[out, r * matrices]`.

        Raises:
            ModelError: They do not go together, or not with the config.
        """
        a, b = (layer.tensors[part].shape for part in "AB")
        rank = a[0] // layer.matrices
        if len(a) != 2 or len(b) != 2 or b[1] != a[0] or rank * layer.matrices != a[0]:
            raise ModelError(
                f"its factors are {list(a)} and {list(b)}, which no weight of a linear is made of",
                todo="get the adapter again",
            )
        self.scaling(layer)
        return (a[1], b[0]) if layer.transposed else (b[0], a[1])

    def fold(
        self, layer: AdaptedLayer, matrix: int, first_row: int, stop_row: int, read: Callable[[int, int], torch.Tensor]
    ) -> LowRankFold:
        """The sum W + s * B A."""
        return LowRankFold(*self.factors(layer, matrix, first_row, stop_row), self.scaling(layer))

    def factors(
        self, layer: AdaptedLayer, matrix: int, first_row: int, stop_row: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Left [rows, r] and right [r, columns] of one matrix, in fp32 and in the files' orientation.

        PEFT lays the matrices' columns of B side by side for each rank.

        Source: peft.tuners.lora.layer.ParamWrapper.get_delta_weight, for several matrices.
        """
        matrices, (a, b) = layer.matrices, (self.read(layer.tensors[part]) for part in "AB")
        rank = a.shape[0] // matrices
        a, b = a[matrix * rank : (matrix + 1) * rank], b[:, matrix::matrices]
        left, right = (a.t(), b.t()) if layer.transposed else (b, a)
        return left.contiguous()[first_row:stop_row], right.contiguous()

    def scaling(self, layer: AdaptedLayer) -> float:
        """s of a layer by the config's patterns. Raises ModelError where its rank is not the config's."""
        config, key, rank = self._config, layer.key, layer.tensors["A"].shape[0] // layer.matrices
        written = _matching(config.get("rank_pattern") or {}, key, config["r"])
        if written != rank:
            raise ModelError(f"has rank {rank} in the weights, {written} in its config")
        alpha = float(_matching(config.get("alpha_pattern") or {}, key, config["lora_alpha"]))
        return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _matching(patterns: JsonMapping, key: str, default: Any) -> Any:
    """What the first pattern that matches says, as in PEFT."""
    for pattern, value in patterns.items():
        if compile_layers(pattern).match(key):
            return value
    return default


def _read_fp32(entry: TensorEntry) -> torch.Tensor:
    return read_rows(entry).float()


_KAIMING = initialisations.make("kaiming")
L_co = TypeVar("L_co", bound=ProductSection, covariant=True)


class LowRank(Adapter[L_co]):
    """PEFT's LoRA layers with fp32 adapter weights, A Kaiming-uniform and B zero at the start.

    Attributes:
        folds: How a saved adapter is folded: the sum W + s * B A, unless a method does more with it.
    """

    peft_type: ClassVar[str] = "LORA"
    saved_fields: ClassVar[Mapping[str, SavedField]] = {
        "r": SavedField(Rank, "a whole number from 1", needed=True),
        "lora_alpha": SavedField(Number, "a finite number", needed=True),
        "lora_dropout": SavedField(Annotated[float, Field(ge=0, le=1)], "a number from 0 to 1"),
        **{key: SavedField(bool, "true or false") for key in ("use_rslora", "use_dora", "fan_in_fan_out")},
    }
    recipe_fields: ClassVar[Mapping[str, str]] = {"r": "r", "lora_alpha": "alpha"}
    form_fields: ClassVar[Sequence[str]] = (
        *("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save", "bias"),
    )
    folds: ClassVar[type[LowRankFolding]] = LowRankFolding

    def sites(self, shape: ModelShape) -> tuple[Site, ...]:
        """The linears that get an adapter. Raises RecipeError where a name matches none, or ranks are not to be had."""
        linears, chosen = choose_linears(self.section, shape), self.section.layers
        layers = sorted(range(shape.layer_count) if chosen is None else chosen.numbers(shape.layer_count))
        self.ranks.check(layers, (linear.name for linear in linears))
        self._check_start(linears, shape, layers)

        def parameters(linear: LinearShape) -> int:
            ranks = self.ranks.counted(linear.name, shape.layers_of(linear), layers)
            return sum(self.layer_parameters(linear, rank) * count for rank, count in ranks.items())

        return tuple(Site("linear", linear.name, linear.count, parameters(linear), linear) for linear in linears)

    @property
    def ranks(self) -> LayerRanks:
        """Ranks by layer and linear."""
        return LayerRanks(self.section.ranks, self.section.r)

    @property
    def is_uniform(self) -> bool:
        """Whether every linear of a name has an adapter of one rank, and all of that is trained and nothing else."""
        section = self.section
        others = section.layers, section.ranks, section.modules_to_save, getattr(section, "new_tokens", None)
        is_usual = all(other is None for other in others)
        return is_usual and not self.initialisation().corrects

    def layer_parameters(self, linear: LinearShape, rank: int) -> int:
        """Trained parameters beside one linear: A [rank, in] and B [out, rank]."""
        return rank * (linear.in_features + linear.out_features)

    def fit(self, config: PeftConfig, model: PreTrainedModel, layers: Mapping[str, int]) -> None:
        """Ranks of single layers, and the alphas that leave their scale alpha / r.

        Of rank-stabilised scaling the paper's own: alpha / sqrt(rank) by the layer's rank, with one alpha for all.
        """
        pattern, r = self.ranks.pattern(layers), self.section.r
        config.rank_pattern = {key: self._halves * rank for key, rank in pattern.items()}
        if not self.peft_options.get("use_rslora"):
            config.alpha_pattern = {key: config.lora_alpha * rank / r for key, rank in pattern.items()}

    def _check_start(self, linears: Sequence[LinearShape], shape: ModelShape, layers: Sequence[int]) -> None:
        """Raises RecipeError where `init` cannot begin beside a linear with the rank that it has there."""
        for linear in linears:
            ranks = self.ranks.counted(linear.name, shape.layers_of(linear), layers)
            for why in filter(None, (self.initialisation().why_not_rank(rank, linear) for rank in sorted(ranks))):
                raise RecipeError(why, key="adapter.r", todo="choose another rank, or another adapter.init")

    def initialisation(self) -> Initialisation[InitialisationSection]:
        """The recipe's `init`; of a method that takes no other, A drawn and B zero."""
        section = self.section
        return initialisations.bind(section.init) if isinstance(section, LowRankSection) else _KAIMING

    @property
    def _halves(self) -> int:
        """Of A and B: one is trained, and a second takes out what `init` begins with."""
        return 2 if self.initialisation().corrects else 1

    def rank(self) -> int:
        """r."""
        return self.section.r

    def peft_config(self, target_modules: Sequence[str], *, is_transposed: bool) -> PeftConfig:
        """PEFT's LoraConfig with the options of the method."""
        from peft import LoraConfig

        halves = self._halves  # the scale stays that of one
        alpha = self.section.alpha * (math.sqrt(halves) if self.peft_options.get("use_rslora") else halves)
        return LoraConfig(
            r=halves * self.section.r,
            lora_alpha=int(alpha) if alpha.is_integer() else alpha,
            lora_dropout=self.section.dropout,
            target_modules=list(target_modules),
            fan_in_fan_out=is_transposed,
            bias="none",
            **self.peft_options,
        )

    def settle(self, model: PeftModel) -> None:
        """Parts factors whose second halves take out what `init` begins with."""
        if self.initialisation().corrects:
            from lorafit.ops.corrected_factor import correct_layers

            correct_layers(model, str(model.active_adapter))

    @classmethod
    def live_tensors(cls, model: PeftModel, name: str) -> dict[str, torch.Tensor]:
        """The factors; those of two halves as one, which is a copy."""
        from lorafit.ops.corrected_factor import corrected_factors

        found = super().live_tensors(model, name)
        for path, factor in corrected_factors(model, name):
            del found[f"{path}.trained"]
            found[f"{path}.weight"] = factor.weight
        return found

    @classmethod
    def take_tensors(cls, model: PeftModel, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Values of both halves."""
        from lorafit.ops.corrected_factor import corrected_factors

        for path, factor in corrected_factors(model, name):
            factor.take(tensors[f"{path}.weight"])

    @classmethod
    def opened_config(cls, config: JsonMapping) -> JsonObject:
        """The saved one; no initialisation is repeated, since the values come from the file."""
        return {**config, "init_lora_weights": True}

    def refuses(self, quantization_kind: str) -> str | None:
        """What `init` cannot begin beside."""
        return super().refuses(quantization_kind) or self.initialisation().refuses(quantization_kind)

    @classmethod
    def refuses_saved(cls, config: JsonMapping, quantization_kind: str) -> str | None:
        """Options of a stranger's LoRA that PEFT drops without a word, and computes plain LoRA instead.

        Source: peft.tuners.lora.bnb, whose layers resolve DoRA and aLoRA alone; of QA-LoRA, every layer but GPTQ's.
        """
        for key, name in _UNQUANTISED_OPTIONS.items():
            if config.get(key) and (quantization_kind != "none" or key == "use_qalora"):
                beside = f"linears stored as {quantization_kind}" if quantization_kind != "none" else "plain linears"
                return f"PEFT has no {name} beside {beside}, and would compute plain LoRA without a word"
        return None

    @classmethod
    def refuses_caching(cls, config: JsonMapping) -> str | None:
        """aLoRA begins behind its invocation tokens, which a single new token does not show."""
        looks = config.get("alora_invocation_tokens")
        return "looks for its invocation tokens in the whole text at each token" if looks else None

    @classmethod
    def folding(cls, config: JsonMapping) -> LowRankFolding:
        """By the method's own class; its PEFT options are what it may use beside plain LoRA."""
        return cls.folds(config, cls.peft_options.keys())


class PlainLowRank(LowRank[L_co]):
    """A method whose forward is W + s * B A and nothing more; B begins at zero."""

    starts_as_base: ClassVar[bool] = True

    @classmethod
    def why_no_effect(cls, config: JsonMapping, nonzero_tensors: Set[str]) -> str | None:
        """A B of zeros in every layer, or an alpha of 0."""
        if all(".lora_A." in name for name in nonzero_tensors):
            return "every lora_B is zero"
        return "its lora_alpha is 0" if config["lora_alpha"] == 0 else None
