"""lorafit: fine-tune language models with LoRA and QLoRA from one YAML recipe.

    import lorafit

    run = lorafit.train("recipe.yaml", overrides={"training.epochs": 1})
    print(lorafit.evaluate(run))

Every command of the command line is a function here (`lorafit.api`); it is imported when it is first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lorafit.machine.version import __version__

if TYPE_CHECKING:
    from lorafit.api import (
        classify,
        compare,
        compose,
        estimate,
        evaluate,
        export,
        generate,
        init,
        inspect_adapter,
        merge,
        preview,
        serve,
        train,
        trim,
        validate,
    )
    from lorafit.errors import LorafitError

__all__ = [
    "LorafitError",
    "__version__",
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


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'lorafit' has no attribute '{name}'")
    from lorafit import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted(__all__)
