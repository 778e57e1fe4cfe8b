"""What the schema says, for people: `docs/recipe.md`; and the file for editors beside it.

python -m lorafit.recipe.reference          writes docs/recipe.md and configs/recipe.schema.json of the checkout
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from lorafit.files.rundir import atomic_file
from lorafit.machine.shipped import shipped
from lorafit.recipe.editor_schema import EXTENDS, described_schema, json_schema
from lorafit.recipe.expect import allowed_range, expectation
from lorafit.recipe.extends import preset_names
from lorafit.recipe.schema_tree import (
    Node,
    forms,
    is_nullable,
    kind_of,
    kinds_of,
    section_of,
    sections_in,
    without_references,
)
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
    tree = without_references(described_schema())
    inner = {name for name, node in tree["properties"].items() if kinds_of(node) or section_of(node)}
    top = {**tree, "properties": {name: node for name, node in tree["properties"].items() if name not in inner}}
    extends = f"\n| `extends` | text | | | {EXTENDS} |\n| `name`"
    parts = [_INTRODUCTION.replace("@PRESETS@", presets)]
    parts.append(f"## The top level\n\n{_table(top)}".replace("\n| `name`", extends))
    for name in tree["properties"]:
        parts += _pages((name,), tree["properties"][name]) if name in inner else []
    return "\n".join(part.rstrip() + "\n" for part in parts)


def _pages(path: KeyPath, node: Node) -> Iterator[str]:
    """The heading and table of a section or kind, and those of the sections in it."""
    sources = [section for form in forms(node) for section in sections_in(form)]
    if kinds_of(node):
        yield _choice_page(path, node)
    elif path == ("data", "train"):
        yield _section_page(path, sources[0], " (each source)")
    else:
        note = f" (or sources, as in {key_text(('data', 'train'))}, without repeats)" if sources else ""
        for section in forms(node):
            if "properties" in section and section not in sources:
                yield _section_page(path, section, note)
                for name, field in section["properties"].items():
                    yield from _pages((*path, name), field)


def _heading(path: KeyPath) -> str:
    return f"{'##' if len(path) == 1 else '###'} {key_text(path)}"


def _section_page(path: KeyPath, section: Node, note: str = "") -> str:
    return f"{_heading(path)}{note}\n\n{section['description']}\n\n{_table(section)}"


def _choice_page(path: KeyPath, node: Node) -> str:
    kinds = ", ".join(f"`{kind}`" for kind in kinds_of(node))
    parts = [f"{_heading(path)}\n\nOne of {kinds}; default `{kind_of(node, None)}`.\n"]
    by_table: dict[str, list[str]] = {}
    for kind, section in kinds_of(node).items():
        table = _table(section) if set(section["properties"]) > {"kind"} else "No options of its own.\n"
        by_table.setdefault(table, []).append(f"- **`{kind}`**: {section['description']}")
    for table, lines in by_table.items():
        parts += ["\n".join(lines) + "\n", table]
    return "\n".join(parts)


def _table(section: Node) -> str:
    rows = ["| key | type | default | range | meaning |", "|---|---|---|---|---|"]
    for name, field in section["properties"].items():
        if name != "kind":
            default = "**required**" if name in section.get("required", ()) else _default_words(field)
            cells = (_type_words(field), default, allowed_range(field), field["description"])
            rows.append(f"| `{name}` | " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def _type_words(node: Node) -> str:
    if kinds_of(node):
        return "a kind"
    if section_of(node):
        return "a section or null" if is_nullable(node) else "a section"
    is_share = any("fraction" in form.get("properties", ()) for form in forms(node))
    return "a share, or sources, or null" if is_share else expectation(node)


def _default_words(node: Node) -> str:
    default = node["default"]
    if section_of(node) and default is not None:
        return "see below"
    if isinstance(default, float):
        return f"`{default:g}`"
    if default is None or isinstance(default, bool):
        return f"`{json.dumps(default)}`"
    if isinstance(default, list):
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
