"""One contract over every registered name of every registry: what a recipe can name is whole, or it is not listed."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import pkgutil
from pathlib import Path
from typing import Any, Literal, Protocol, get_args, get_origin

import pytest
from pydantic import ValidationError

from lorafit.errors import RecipeError
from lorafit.kinds.adapters import Adapter, AdapterSection, adapter_kind, adapters
from lorafit.kinds.curricula import Curriculum, CurriculumSection, curricula
from lorafit.kinds.formats import Format, formats
from lorafit.kinds.initialisations import Initialisation, InitialisationSection, initialisations
from lorafit.kinds.metrics import Metric, metrics
from lorafit.kinds.optimizers import Optimizer, OptimizerSection, optimizers
from lorafit.kinds.quantizations import Quantization, QuantizationSection, quantizations
from lorafit.kinds.registry import Registry, SectionRegistry
from lorafit.kinds.schedules import Schedule, ScheduleSection, schedules
from lorafit.kinds.section import Section
from lorafit.kinds.tasks import Task, tasks
from tests.support.docs_scripts import load_script

PROTOCOLS: dict[str, tuple[Registry[Any] | SectionRegistry[Any], type]] = {
    "adapters": (adapters, Adapter),
    "curricula": (curricula, Curriculum),
    "formats": (formats, Format),
    "initialisations": (initialisations, Initialisation),
    "metrics": (metrics, Metric),
    "optimizers": (optimizers, Optimizer),
    "quantizations": (quantizations, Quantization),
    "schedules": (schedules, Schedule),
    "tasks": (tasks, Task),
}
SECTIONS: dict[str, type[Section]] = {
    "adapters": AdapterSection,
    "curricula": CurriculumSection,
    "initialisations": InitialisationSection,
    "optimizers": OptimizerSection,
    "quantizations": QuantizationSection,
    "schedules": ScheduleSection,
}
KINDS = [(family, name) for family, (registry, _) in PROTOCOLS.items() for name in registry.names()]
WITH_SECTION = [(family, name) for family, name in KINDS if family in SECTIONS]
IDS = [f"{family}-{name}" for family, name in KINDS]
IDS_WITH_SECTION = [f"{family}-{name}" for family, name in WITH_SECTION]


def member(family: str, name: str) -> Any:
    registry = PROTOCOLS[family][0]
    return registry.make(name) if isinstance(registry, SectionRegistry) else registry.get(name)


def section_of(family: str, name: str) -> type[Section]:
    registry = PROTOCOLS[family][0]
    assert isinstance(registry, SectionRegistry)
    return registry.section(name)


def wanted(protocol: type) -> dict[str, Any]:
    """Attributes and methods that a Protocol asks for."""
    methods = {name: value for name, value in vars(protocol).items() if inspect.isfunction(value) and name[0] != "_"}
    return {**inspect.get_annotations(protocol), **methods}


def gaps(kind: Any, protocol: type) -> list[str]:
    """What a kind lacks of its protocol: attributes, and arguments of methods."""
    found = [f"no {name}" for name in wanted(protocol) if not hasattr(kind, name)]
    for name, asked in wanted(protocol).items():
        if inspect.isfunction(asked) and hasattr(kind, name):
            has = list(inspect.signature(getattr(kind, name)).parameters)
            asks = list(inspect.signature(asked).parameters)[1:]
            found += [f"{name}({', '.join(has)}) instead of ({', '.join(asks)})"] if has != asks else []
    return found


def test_every_registry_of_the_package_is_under_contract() -> None:
    import lorafit.kinds

    families = {module.name for module in pkgutil.iter_modules(lorafit.kinds.__path__) if module.ispkg}
    assert families == set(PROTOCOLS)
    assert all(registry.names() for registry, _ in PROTOCOLS.values())


def test_every_file_of_a_family_registers_something() -> None:
    """A file that registers nothing is either dead or a second list."""
    for family, (registry, _) in PROTOCOLS.items():
        package = importlib.import_module(f"lorafit.kinds.{family}")
        files = {f"lorafit.kinds.{family}.{m.name}" for m in pkgutil.iter_modules(package.__path__) if m.name[0] != "_"}
        assert {type(member(family, name)).__module__ for name in registry.names()} == files


@pytest.mark.parametrize(("family", "name"), KINDS, ids=IDS)
def test_a_kind_has_everything_that_its_protocol_asks_for(family: str, name: str) -> None:
    assert gaps(member(family, name), PROTOCOLS[family][1]) == []


@pytest.mark.parametrize(("family", "name"), KINDS, ids=IDS)
def test_a_kind_and_all_its_methods_are_explained(family: str, name: str) -> None:
    kind = type(member(family, name))
    assert inspect.getdoc(kind), f"{kind.__name__} has no docstring"
    for attribute, asked in wanted(PROTOCOLS[family][1]).items():
        if inspect.isfunction(asked):
            assert getattr(kind, attribute).__doc__, f"{kind.__name__}.{attribute} has no docstring"


@pytest.mark.parametrize(("family", "name"), KINDS, ids=IDS)
def test_importing_a_kind_imports_nothing_heavy(family: str, name: str) -> None:
    """Every command reads every kind's file, `validate` among them."""
    heavy = {
        "torch",
        "transformers",
        "peft",
        "bitsandbytes",
        "datasets",
        "accelerate",
        "numpy",
        "rich",
        "sacrebleu",
        "rouge_score",
    }
    tree = ast.parse(Path(inspect.getfile(type(member(family, name)))).read_text(encoding="utf-8"))
    for node in tree.body:
        names = (
            [a.name for a in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
        assert not {one.split(".")[0] for one in names} & heavy


@pytest.mark.parametrize(("family", "name"), KINDS, ids=IDS)
def test_a_name_is_fit_for_a_recipe(family: str, name: str) -> None:
    """Lower-case words that YAML reads as text, and that a near miss finds again."""
    from lorafit.recipe.reader import read_scalar

    assert read_scalar(name) == name
    assert name == name.lower()
    with pytest.raises(RecipeError, match="available: ") as caught:
        PROTOCOLS[family][0].get(f"{name}x")
    assert f"did you mean {name}" in str(caught.value) or f"or {name}" in str(caught.value)


@pytest.mark.parametrize("name", adapters.names())
def test_a_saved_adapter_is_opened_by_the_kind_whose_file_it_is(name: str) -> None:
    """A file without any option is one in which they are off; two kinds never claim the same file."""
    kind = adapters.get(name)
    config = {"peft_type": kind.peft_type, **kind.peft_options}
    assert adapter_kind(config) is adapters.get(kind.saved_as or name)
    others = {option: False for other in adapters.names() for option in adapters.get(other).peft_options}
    assert adapter_kind(others | config) is adapters.get(kind.saved_as or name)


@pytest.mark.parametrize("name", adapters.names())
def test_a_rate_is_multiplied_by_something_above_zero(name: str) -> None:
    for part in ("lora_A", "lora_B", "prompt_encoder"):
        assert adapters.make(name).rate_factor(f"model.base_model.layers.0.{part}.default.weight") > 0


@pytest.mark.parametrize(("family", "name"), WITH_SECTION, ids=IDS_WITH_SECTION)
class TestSection:
    def test_its_kind_is_its_registered_name(self, family: str, name: str) -> None:
        annotation = section_of(family, name).model_fields["kind"].annotation
        assert get_origin(annotation) is Literal
        assert get_args(annotation) == (name,)
        assert section_of(family, name).model_fields["kind"].default == name

    def test_it_is_made_of_its_defaults_alone(self, family: str, name: str) -> None:
        section = section_of(family, name)()
        assert isinstance(section, SECTIONS[family])
        assert section.model_dump(mode="json")["kind"] == name

    def test_its_defaults_pass_its_own_checks(self, family: str, name: str) -> None:
        """pydantic does not check defaults: a default outside its range would be found by whoever writes it down."""
        section = section_of(family, name)
        assert section.model_validate(section().model_dump(), strict=True) == section()

    def test_it_survives_json(self, family: str, name: str) -> None:
        section = section_of(family, name)
        text = json.dumps(section().model_dump(mode="json"), allow_nan=False)
        assert section.model_validate(json.loads(text)) == section()

    def test_it_is_frozen_and_refuses_unknown_keys(self, family: str, name: str) -> None:
        section = section_of(family, name)
        with pytest.raises(ValidationError, match="extra_forbidden"):
            section.model_validate({"no_such_option": 1})
        with pytest.raises(ValidationError, match="frozen"):
            section().kind = "other"  # type: ignore[attr-defined]

    def test_it_and_every_option_are_explained(self, family: str, name: str) -> None:
        section = section_of(family, name)
        docs = load_script("write_reference").field_docs(section)
        assert (section.__doc__ or "").strip()
        assert section.__doc__ != (SECTIONS[family].__doc__ or ""), "the docstring is its base's"
        for option in section.model_fields:
            assert option == "kind" or docs.get(option), f"{section.__name__}.{option} has no docstring"

    def test_every_number_has_a_range(self, family: str, name: str) -> None:
        """Without one a recipe's slip, a learning rate of -1, would only be found by a library, or by nobody."""
        from lorafit.recipe.explain import allowed_range
        from lorafit.recipe.schema_tree import forms, without_references

        schema = without_references(section_of(family, name).model_json_schema())
        for option, field in schema["properties"].items():
            if {"integer", "number"} & {form.get("type") for form in forms(field)}:
                assert allowed_range(field), f"{name}.{option} has no range"

    def test_a_recipe_can_name_it(self, family: str, name: str, tmp_path: Path) -> None:
        from lorafit.recipe.load import load_recipe

        keys = {"adapters": "adapter", "optimizers": "training.optimizer", "quantizations": "model.quantization"}
        keys |= {"initialisations": "adapter.init", "curricula": "training.curriculum"}
        key = keys.get(family, "training.schedule")
        stored = "nf4" if family == "initialisations" else "none"  # loftq wants codes, full fine-tuning none
        recipe = f"name: x\nmodel: {{base: b, quantization: {stored}}}\ndata: {{train: a.jsonl}}\n"
        (tmp_path / "r.yaml").write_text(recipe)
        bare = load_recipe(tmp_path / "r.yaml", [f"{key}={name}"])
        long = load_recipe(tmp_path / "r.yaml", [f"{key}={{kind: {name}}}"])
        assert bare.digest == long.digest
        chosen: Any = bare.recipe
        for part in key.split("."):
            chosen = getattr(chosen, part)
        assert chosen == section_of(family, name)()


def test_the_contract_can_be_broken() -> None:
    """The check of protocols sees an attribute, a method and an argument that are not there."""

    class Asked(Protocol):
        size: int

        def build(self, section: Any, seed: int) -> None: ...

        def finish(self) -> None: ...

    class Lacking:
        def build(self, section: Any) -> None: ...

    class Whole(Lacking):
        size = 3

        def build(self, section: Any, seed: int = 0) -> None: ...

        def finish(self) -> None: ...

    assert gaps(Lacking(), Asked) == ["no size", "no finish", "build(section) instead of (section, seed)"]
    assert gaps(Whole(), Asked) == []
