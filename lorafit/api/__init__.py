"""Python API: every command of lorafit as a function for scripts and notebooks.

    run = lorafit.train("recipe.yaml")                        a recipe's file, or its values as a dict
    run = lorafit.train(recipe, rows=[{"question": ...}])     rows from memory instead of files
    lorafit.evaluate(run), lorafit.merge(run, "merged"), lorafit.generate(run, "a prompt")

A function does what its command does, raises the error that the command would end with (`LorafitError`; its
`exit_code` says which kind), and gives back what `--json` prints: `print(result)` shows it, `result.to_json()` is plain
values. Progress goes to stderr; with `quiet=True` only warnings are left, as Python warnings.
"""

from __future__ import annotations

from lorafit.api.recipes import compare, estimate, init, preview, train, validate
from lorafit.api.runs import classify, compose, evaluate, export, generate, inspect_adapter, merge, trim
from lorafit.api.serving import serve
from lorafit.errors import LorafitError

__all__ = [
    "LorafitError",
    "classify",
    "compare",
    "compose",
    "estimate",
    "evaluate",
    "export",
    "generate",
    "init",
    "inspect_adapter",
    "merge",
    "preview",
    "serve",
    "train",
    "trim",
    "validate",
]
