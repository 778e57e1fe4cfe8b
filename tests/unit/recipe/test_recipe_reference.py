"""The reference and the editors' schema say what the loader does."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from lorafit.machine.shipped import shipped
from lorafit.recipe.reader import read_tree
from lorafit.recipe.schema_tree import every_key, kinds_of, recipe_tree
from lorafit.recipe.yaml_tree import Place, plain
from tests.support.docs_scripts import load_script
from tests.support.recipe_texts import MINIMAL, Fails, Loads

CHECKOUT = Path(__file__).parents[3]
WRITER = load_script("write_reference")
SCHEMA = WRITER.json_schema()
MARKDOWN = (CHECKOUT / "docs/recipe.md").read_text()


def test_the_files_are_those_of_this_schema() -> None:
    """`make docs` writes them anew."""
    assert json.loads((CHECKOUT / "configs/recipe.schema.json").read_text()) == SCHEMA
    assert WRITER.page_with_tables(MARKDOWN) == MARKDOWN


def test_every_key_is_in_both_with_its_meaning() -> None:
    for path, _ in every_key(recipe_tree()):
        assert f"| `{path[-1]}` |" in MARKDOWN or f"\n## {path[-1]}\n" in MARKDOWN
    for name, definition in SCHEMA["$defs"].items():
        for key, one in definition["properties"].items():
            assert key == "kind" or one["description"], f"{name}.{key} has no docstring"


def test_every_kind_is_in_both() -> None:
    named = [one["properties"]["kind"] for one in SCHEMA["$defs"].values() if "kind" in one["properties"]]
    for kind in (kind for _, node in every_key(recipe_tree()) for kind in kinds_of(node)):
        assert f"**`{kind}`**" in MARKDOWN
        assert {"const": kind} in named


def test_docstrings_of_bases_belong_to_their_kinds() -> None:
    from lorafit.kinds.schedules.cosine import CosineSection

    assert set(CosineSection.model_fields) - {"kind"} <= set(WRITER.field_docs(CosineSection))


def test_every_example_of_the_reference_is_a_recipe(loads: Loads) -> None:
    examples = re.findall(r"```yaml\n(.*?)```", MARKDOWN, re.DOTALL)
    assert len(examples) >= 2
    for example in examples:
        loads(example)


def accepts(schema: dict[str, Any], value: Any) -> bool:
    """As much of JSON Schema as the recipe's uses; an unknown word of it fails the test."""
    checks = {
        "type": lambda words: is_type(value, words),
        "enum": lambda words: (
            value in words and not (isinstance(value, bool) and True not in words and False not in words)
        ),
        "const": lambda word: value == word,
        "anyOf": lambda forms: any(accepts(form, value) for form in forms),
        "$ref": lambda name: accepts(SCHEMA["$defs"][name.rsplit("/", 1)[1]], value),
        "required": lambda names: not isinstance(value, dict) or all(name in value for name in names),
        "properties": lambda below: (
            not isinstance(value, dict)
            or all(accepts(below[name], one) for name, one in value.items() if name in below)
        ),
        "additionalProperties": lambda below: (
            not isinstance(value, dict)
            or all(
                (below and accepts(below, one)) if isinstance(below, dict) else name in schema["properties"]
                for name, one in value.items()
            )
        ),
        "items": lambda below: not isinstance(value, list) or all(accepts(below, one) for one in value),
        "prefixItems": lambda forms: not isinstance(value, list) or all(map(accepts, forms, value)),
        "minItems": lambda least: not isinstance(value, list) or len(value) >= least,
        "maxItems": lambda most: not isinstance(value, list) or len(value) <= most,
        "minLength": lambda least: not isinstance(value, str) or len(value) >= least,
        "pattern": lambda form: not isinstance(value, str) or re.search(form, value) is not None,
        "minimum": lambda limit: not is_number(value) or value >= limit,
        "maximum": lambda limit: not is_number(value) or value <= limit,
        "exclusiveMinimum": lambda limit: not is_number(value) or value > limit,
        "exclusiveMaximum": lambda limit: not is_number(value) or value < limit,
        **dict.fromkeys(("description", "default", "format", "title", "$schema", "$defs"), lambda _: True),
    }
    return all(checks[word](meaning) for word, meaning in schema.items())


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_type(value: Any, name: str) -> bool:
    types: dict[str, Any] = {"string": str, "array": list, "object": dict, "null": type(None), "boolean": bool}
    if name == "integer":
        return is_number(value) and float(value).is_integer()
    return is_number(value) if name == "number" else isinstance(value, types[name])


def in_editor(text: str) -> bool:
    tree, errors = read_tree(text, Place("r.yaml", 1, 1))
    assert errors == []
    return accepts(SCHEMA, plain(tree))


GOOD = [
    MINIMAL,
    "extends: code\n",
    "extends: ../base.yaml\nseed: 3\n",
    "extends: code\nmodel: {revision: main}\ndata: {max_length: 9}\n",
    MINIMAL + "adapter: lora\n",
    MINIMAL + "adapter: {r: 8}\n",
    MINIMAL + "training: {optimizer: sgd, micro_batch_tokens: 512, gradient_checkpointing: true}\n",
    MINIMAL + "training: {optimizer: {kind: adamw, betas: [0.9, 0.99]}, schedule: {warmup_ratio: 0.1}}\n",
    MINIMAL.replace("a.jsonl}", "[a.jsonl, {path: b, repeats: 0.5, columns: {text: t}}], validation: {fraction: 0.1}}"),
    MINIMAL.replace("a.jsonl}", "{path: b}, validation: v.jsonl, test: null}"),
    MINIMAL + "evaluation: {early_stopping: null, final: [bleu]}\ntracking: [wandb]\n",
    *(path.read_text() for path in sorted((CHECKOUT / "recipes").glob("*.yaml"))),
]
BAD = [
    "name: x\n",
    MINIMAL.replace("base: b", "revision: r"),
    MINIMAL.replace("train: a.jsonl", "max_length: 9"),
    MINIMAL + "sead: 3\n",
    MINIMAL + "seed: -1\n",
    MINIMAL + "seed: 1.5\n",
    MINIMAL + "adapter: lorra\n",
    MINIMAL + "adapter: {dropuot: 1}\n",
    MINIMAL + "adapter: {kind: lora, dropout: 1.5}\n",
    MINIMAL + "training: {optimizer: {kind: adamw, momentum: 0.5}}\n",
    MINIMAL + "training: {optimizer: {momentum: 0.5}}\n",
    MINIMAL + "training: {optimizer: {kind: adamw, betas: [0.9]}}\n",
    MINIMAL + "evaluation: {final: [rogue]}\n",
    MINIMAL + "tracking: wandb\n",
    MINIMAL.replace("a.jsonl", "[]"),
    MINIMAL.replace("a.jsonl", "[{limit: 3}]"),
    MINIMAL.replace("a.jsonl}", "a.jsonl, validation: {fraction: 2}}"),
]


@pytest.mark.parametrize("text", GOOD, ids=range(len(GOOD)))
def test_what_is_right_is_right_to_an_editor(text: str) -> None:
    assert in_editor(text)


@pytest.mark.parametrize("text", BAD, ids=range(len(BAD)))
def test_what_is_wrong_is_wrong_to_an_editor_and_to_the_loader(fails: Fails, text: str) -> None:
    assert not in_editor(text)
    assert fails(text).exit_code == 3


def test_shipped_recipes_name_the_schema_for_editors() -> None:
    for path in (CHECKOUT / "recipes").glob("*.yaml"):
        reference = re.match(r"# yaml-language-server: \$schema=(\S+)\n", path.read_text())
        assert reference is not None, f"{path.name} does not start with the schema's name"
        assert (path.parent / reference[1]).resolve() == shipped("recipe.schema.json").resolve()


def test_presets_hold_no_name_model_or_rows() -> None:
    for path in shipped("presets").glob("*.yaml"):
        preset = yaml.safe_load(path.read_text())
        assert not {"name", "model", "output"} & set(preset)
        assert "train" not in preset["data"]
