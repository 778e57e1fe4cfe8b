"""What the schema says, for people: `docs/recipe.md`; and the file for editors beside it.

python -m lorafit.recipe.reference          writes docs/recipe.md and configs/recipe.schema.json of the checkout
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel

from lorafit.files.rundir import atomic_file
from lorafit.machine.shipped import shipped
from lorafit.recipe.docstrings import field_docs, first_paragraph
from lorafit.recipe.editor_schema import EXTENDS, json_schema
from lorafit.recipe.expect import allowed_range, expectation, listed_names
from lorafit.recipe.extends import preset_names
from lorafit.recipe.schema_tree import Choice, Field, Group, Items, Leaf, Slot, Variants, fields_of, recipe_outline
from lorafit.recipe.yaml_tree import KeyPath, key_text

_INTRODUCTION = """\
# The recipe

*Generated from the schema by `make docs`; do not edit.*

One YAML file describes a run, and every command reads it. `lorafit validate RECIPE` names every error at once, with
file, line, column, and the nearest valid name. Three keys are required: `name`, `model.base` and `data.train`.

```yaml
# yaml-language-server: $schema=../configs/recipe.schema.json
name: support-bot
model: {base: HuggingFaceTB/SmolLM2-135M-Instruct}
data: {train: data/train.jsonl, validation: {fraction: 0.05}}
```

The first line lets editors complete keys and mark errors, from `configs/recipe.schema.json`.

**Kinds.** Where a field names a kind, a bare word stands for the kind with its defaults: `optimizer: adamw` is
`optimizer: {kind: adamw}`. A mapping without `kind` means the default kind: `adapter: {r: 8}` is `adapter: {kind: lora,
r: 8}`. Each kind has its own options, and an option of another kind is an error.

**Paths** are relative to the folder of the file that they are written in. A value given by `--set` is relative to the
recipe's folder, `--output` to the folder you are in.

**Layers.** `extends` takes a shipped preset (@PRESETS@) or the path of another recipe.
Sections merge key by key, and so do the options of one kind; lists, values and other kinds are replaced whole.
`--set KEY=VALUE` (repeatable) comes last, e.g. `--set training.epochs=1 --set data.train[0].limit=100`; its errors name
the flag.

```yaml
extends: code
name: my-coder
model: {base: Qwen/Qwen2.5-Coder-7B}
data: {train: [{path: tasks.jsonl}, {path: snippets.txt, repeats: 0.5}]}
adapter: {r: 16}
```

**YAML, strictly.** `2e-4` is a number. Words that YAML 1.1 and 1.2 read differently (`no`, `on`, `010`, `1:30`,
`1_000`) are refused until you quote them or write what you mean. Duplicate keys, tags, merge keys (`<<`), several
documents and files over 1 MiB are refused. Aliases are read, as long as they stay small.

**Secrets** have no place in a recipe, which is copied into every run folder. Keys such as `hf_token` or `api_key`, and
values that look like one, are refused; put them into the environment (`HF_TOKEN`, `WANDB_API_KEY`).
"""


def reference_markdown() -> str:
    """The reference of the recipe: a table for each section, and for each kind its own options."""
    presets = ", ".join(f"`{name}`" for name in preset_names())
    parts = [_INTRODUCTION.replace("@PRESETS@", presets)]
    outline = recipe_outline()
    fields = fields_of(outline.model)
    top = {name: field for name, field in fields.items() if not isinstance(field.slot, Group | Choice)}
    parts.append(f"## The top level\n\n{_table(top, field_docs(outline.model), extends=True)}")
    for name, field in fields.items():
        if name not in top:
            parts += _pages((name,), field.slot)
    return "\n".join(part.rstrip() + "\n" for part in parts)


def _pages(path: KeyPath, slot: Slot) -> list[str]:
    """The heading and table of a section or kind, and those of the sections in it."""
    if isinstance(slot, Choice):
        return [_choice_page(path, slot)]
    if isinstance(slot, Items) and isinstance(slot.item, Group):
        return [_section_page(path, slot.item.model, " (each source)")] if path == ("data", "train") else []
    if isinstance(slot, Variants):
        models = [form.model for form in slot.forms.values() if isinstance(form, Group)]
        note = f" (or sources, as in {key_text(('data', 'train'))}, without repeats)"
        return [_section_page(path, model, note) for model in models]
    if not isinstance(slot, Group):
        return []
    pages = [_section_page(path, slot.model)]
    for name, field in fields_of(slot.model).items():
        pages += _pages((*path, name), field.slot)
    return pages


def _section_page(path: KeyPath, model: type[BaseModel], note: str = "") -> str:
    heading = "##" if len(path) == 1 else "###"
    text = first_paragraph(model.__doc__)
    return f"{heading} {key_text(path)}{note}\n\n{text}\n\n{_table(fields_of(model), field_docs(model))}"


def _choice_page(path: KeyPath, slot: Choice) -> str:
    heading = "##" if len(path) == 1 else "###"
    kinds = ", ".join(f"`{kind}`" for kind in slot.kinds)
    parts = [f"{heading} {key_text(path)}\n\nOne of {kinds}; default `{slot.default}`.\n"]
    by_table: dict[str, list[str]] = {}
    for kind, model in slot.kinds.items():
        table = _table(fields_of(model), field_docs(model)) if fields_of(model) else "No options of its own.\n"
        by_table.setdefault(table, []).append(f"- **`{kind}`**: {first_paragraph(model.__doc__)}")
    for table, lines in by_table.items():
        parts += ["\n".join(lines) + "\n", table]
    return "\n".join(parts)


def _table(fields: Mapping[str, Field], docs: dict[str, str], *, extends: bool = False) -> str:
    rows = ["| key | type | default | range | meaning |", "|---|---|---|---|---|"]
    if extends:
        rows.append(f"| `extends` | text | | | {EXTENDS} |")
    for name, field in fields.items():
        cells = (_type_words(field.slot), _default_words(field), allowed_range(field.slot), docs.get(name, ""))
        rows.append(f"| `{name}` | " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def _type_words(slot: Slot) -> str:
    if isinstance(slot, Choice):
        return "a kind"
    if isinstance(slot, Group):
        return "a section or null" if slot.nullable else "a section"
    if isinstance(slot, Variants):
        return "a share, or sources, or null"
    if isinstance(slot, Leaf):
        names = next((names for _, limits in slot.forms if (names := listed_names(limits)) is not None), None)
        if names is not None:
            return f"one of {', '.join(names)}"
    return expectation(slot)


def _default_words(field: Field) -> str:
    if field.required:
        return "**required**"
    default = field.default
    if isinstance(field.slot, Group) and default is not None:
        return "see below"
    if isinstance(default, float):
        return f"`{default:g}`"
    if default is None or isinstance(default, bool):
        return f"`{json.dumps(default)}`"
    if isinstance(default, list | tuple):
        return f"`[{', '.join(str(item) for item in default)}]`"
    return f"`{default}`" if default not in ("", {}) else "empty"


def main() -> None:
    """Writes both files into the checkout."""
    checkout = Path(__file__).resolve().parents[2]
    if not (checkout / "pyproject.toml").is_file():
        sys.exit("the reference is written in a checkout, not in an installed package")
    targets = {
        shipped("recipe.schema.json"): json.dumps(json_schema(), indent=2, ensure_ascii=False, allow_nan=False) + "\n",
        checkout / "docs" / "recipe.md": reference_markdown(),
    }
    for path, text in targets.items():
        with atomic_file(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
        sys.stdout.write(f"wrote {path}\n")


if __name__ == "__main__":
    main()
