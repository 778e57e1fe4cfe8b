"""The run card: everything that answering, merging and evaluating need to know of a trained run, rows apart.

    RUN/card.json            written before step 1, with the base's place on this machine
    adapter/lorafit.json     the same under `card`, without any place

Nothing else has to be opened to answer as the run was trained: no recipe, no rows.
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import WrapSerializer, field_validator, model_validator

from lorafit.contracts import JsonObject
from lorafit.errors import CheckpointError
from lorafit.files.atomic import read_object
from lorafit.kinds.adapters import AdapterSection, adapters
from lorafit.kinds.quantizations import QuantizationSection, quantizations
from lorafit.kinds.registry import as_bare_word
from lorafit.kinds.section import Section
from lorafit.kinds.tasks import TaskSection, tasks
from lorafit.run.prelude import with_dates, with_system_prompt

if TYPE_CHECKING:
    from lorafit.facts import ModelClass

    AdapterChoice = AdapterSection
    QuantizationChoice = QuantizationSection
    TaskChoice = TaskSection
else:
    AdapterChoice = adapters.one_of("lora")
    QuantizationChoice = quantizations.one_of()
    TaskChoice = Annotated[tasks.one_of("causal-lm"), WrapSerializer(as_bare_word)]

Source = Literal["hub", "package", "gguf", "folder"]
Dtype = Literal["bf16", "fp16", "fp32"]
Attention = Literal["auto", "eager", "sdpa", "fused", "varlen", "flash_attention_2"]


class BaseOrigin(Section):
    """Where a base model came from, and what proves that another copy of it is the same. Holds no place on a disk."""

    kind: Source
    """A hub id, a GGUF file inside an installed package, a GGUF file, or a folder."""
    name: str
    """Hub id, `package://NAME/FILE.gguf`, or the own name of the file or folder."""
    revision: str | None = None
    """Of a hub id: what the recipe asks for."""
    commit: str | None = None
    """Of a hub id: what that was, resolved."""
    folder: str
    """Name of the folder that holds the weights: of a GGUF file the content name of its conversion."""
    digest: str
    """`lorafit.model.base.fingerprint` of config and weights."""
    content: str | None = None
    """`lorafit.model.content.Content.digest`, over all bytes of the weights; null where an older run recorded none."""

    @property
    def shown(self) -> str:
        """For messages."""
        return f"{self.name} ({self.folder[:12]})" if self.kind in ("package", "gguf") else self.name


class RunCard(Section):
    """A trained run as whoever answers with it must know it."""

    format: Literal[1] = 1
    """Version of this form."""
    task: TaskChoice
    """The recipe's section, with what the rows decided."""
    base: BaseOrigin
    """The frozen base model."""
    base_path: str | None = None
    """Absolute folder of the base on the machine that trained; null in what leaves it."""
    adapter: AdapterChoice
    """The recipe's section."""
    quantization: QuantizationChoice
    """The recipe's section."""
    dtype: Dtype
    """Of weights that are not quantised, and of compute beside the adapter."""
    compute_dtype: Dtype
    """Of products with dequantised weights."""
    attention: Attention
    """What the run settled on."""
    chat: bool
    """Whether prompts are chats; else they go to the model verbatim."""
    template_is_named: bool = False
    """Whether the recipe named the template, which makes chats of prompt/completion rows too."""
    templates: dict[str, str]
    """Text of each chat template by name, `default` among them, without the system prompt; empty without any."""
    system_prompt: str | None = None
    """System message of chats that have none."""
    template_date: str | None = None
    """What the templates take for now, an ISO date and time; null where none asks."""
    template_dates: dict[str, str]
    """What they are told then, by the format that they ask in."""
    stop_ids: list[int]
    """Tokens that end an answer, beside the base's own."""
    pad_id: int
    """What fills up short rows."""
    generation: JsonObject
    """generation_config.json: the base's settings with every token that ends an answer."""
    max_length: int
    """Longest row, in tokens."""
    embedding_rows: int
    """Token ids are below it."""
    tokenizer: str
    """SHA-256 of the tokenizer's vocabulary, rules and special tokens."""
    chat_template: str
    """SHA-256 of the templates."""
    versions: dict[str, str]
    """Of the libraries that decide what a run computes."""
    seed: int
    """The recipe's."""

    @field_validator("template_date")
    @classmethod
    def _is_a_moment(cls, value: str | None) -> str | None:
        if value is not None:
            datetime.fromisoformat(value)
        return value

    @model_validator(mode="after")
    def _has_its_template(self) -> RunCard:
        if (self.chat or self.template_is_named) and "default" not in self.templates:
            raise ValueError("templates: a run on chats has a default one")
        return self

    @property
    def model_class(self) -> ModelClass:
        """How the run's model is built."""
        return tasks.bind(self.task).model_class.padded_with(self.pad_id)

    @property
    def shipped_templates(self) -> dict[str, str]:
        """The templates as they stand beside the weights, with system prompt and date where prompts are chats."""
        prompt, dates = (self.system_prompt, self.template_dates) if self.chat else (None, {})
        return {name: with_system_prompt(with_dates(text, dates), prompt) for name, text in self.templates.items()}

    def portable(self) -> RunCard:
        """The card without places of this machine, for folders that may be handed on."""
        section = self.adapter.model_copy(update={"init_from": None})
        return self.model_copy(update={"base_path": None, "adapter": section})

    def to_json(self) -> JsonObject:
        """Plain values."""
        return self.model_dump(mode="json")

    @classmethod
    def from_json(cls, values: Any) -> RunCard:
        """What `to_json` gave.

        Raises:
            ValueError: Another format, a key that is missing, unknown or of another type; the text names it.
        """
        from pydantic import ValidationError

        written = values.get("format") if isinstance(values, dict) else None
        if isinstance(written, int) and written != 1:
            raise ValueError(f"format: version {written} is not supported, only version 1")
        try:
            return cls.model_validate(values, strict=True)
        except ValidationError as error:
            first = error.errors()[0]
            what = first["msg"].removeprefix("Value error, ").lower()
            raise ValueError(": ".join(filter(None, [".".join(map(str, first["loc"])), what]))) from error
        except RecursionError as error:
            raise ValueError("nested too deep") from error


def read_card(file: Path) -> RunCard:
    """A run's card.json.

    Raises:
        CheckpointError: It is missing, no JSON, or no card.
    """
    try:
        return RunCard.from_json(read_object(file))
    except ValueError as error:
        key, _, what = str(error).partition(": ")
        todo = "restore the file, or take another copy of the run"
        raise CheckpointError(what or key, file=str(file), key=key if what else None, todo=todo) from error
