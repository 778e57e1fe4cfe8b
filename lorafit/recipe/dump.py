"""Values as YAML that the recipe reader reads back as the same values."""

from __future__ import annotations

import yaml

from lorafit.recipe.scalars import UnclearScalarError, read_scalar
from lorafit.recipe.yaml_tree import Plain


class _Dumper(yaml.SafeDumper):
    """PyYAML's safe dumper, but text is quoted by our reader's rules (`2e-4` is a number to it, not to PyYAML)."""


def _represent_text(dumper: _Dumper, text: str) -> yaml.Node:
    try:
        clear = isinstance(read_scalar(text), str) and "\n" not in text
    except UnclearScalarError:
        clear = False
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if clear else '"')


_Dumper.add_representer(str, _represent_text)


def dump_yaml(values: Plain) -> str:
    """The values in their own order, one a line."""
    return yaml.dump(
        values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10_000, default_flow_style=False
    )
