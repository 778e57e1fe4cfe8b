"""The adapters of an engine that answers many requests: which may be on together, and which one at a time.

    products B A at linears (LoRA, rsLoRA, patterns)   beside each other in one batch      `stacked.py`
    all other methods                                  one at a time, as PEFT computes     `Engine.using`
    those that no answer can be written with token by token                                refused

What may share is not believed but tried, on a few tokens, before the first answer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from lorafit.answering.engine import Engine
from lorafit.answering.sharing import drawn_factors, try_rows
from lorafit.answering.stacked import Factors, StackedAdapters
from lorafit.contracts import Reporter
from lorafit.errors import ModelError, UsageError
from lorafit.kinds.quantizations import kind_of_codes
from lorafit.model.adapter import AdapterFolder
from lorafit.ops.logits_distance import ROUNDING
from lorafit.ops.process_memory import trim_heap


class LiveAdapters:
    """The adapters beside one base.

    Args:
        engine: What it was given already is taken over by `start`.

    Attributes:
        why_alone: Why no two rows share a forward; None where they may, or where that was not tried yet.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._stack = StackedAdapters(engine.model)
        self._sharing: dict[str | None, bool] = {}
        self.why_alone: str | None = None

    @property
    def model(self) -> Any:
        """The base, or PEFT's model around it."""
        return self._engine.model

    @property
    def names(self) -> tuple[str, ...]:
        """Of all that are loaded."""
        return (*self._stack.names, *self._engine.adapters)

    def mode(self, adapter: str | None) -> str | None:
        """What must be switched on in the model for an adapter; rows of the same mode may share a forward."""
        return None if adapter in self._stack.names else adapter

    def may_share(self, adapter: str | None) -> bool:
        """Whether rows with that adapter share a forward with others of their mode."""
        return self._sharing.get(self.mode(adapter), False)

    @contextlib.contextmanager
    def using(self, names: Sequence[str | None]) -> Iterator[None]:
        """Within it each row of the model's batch has its adapter; all are of one mode."""
        mode = self.mode(names[0])
        with self._engine.using(mode), self._stack.applied(names if mode is None else ()):
            yield

    def read(self, name: str, folder: Path, reporter: Reporter) -> tuple[AdapterFolder, dict[str, Factors] | None]:
        """An adapter's files, checked, with the factors that may stand beside others; without, where it has none.

        Raises:
            UsageError: The name is taken.
            ModelError: See `Engine.check_adapter`; or no answer can be written with it token by token.
        """
        self._require_new(name)
        saved = self._engine.check_adapter(folder, reporter)
        why = saved.kind.refuses_caching(saved.config)
        if why is not None:
            raise ModelError(why, file=str(folder), todo="answer with it by lorafit generate")
        try:
            return saved, self._stack.read(saved)
        except ModelError:  # PEFT opens what it can, and its error is the one to tell
            return saved, None

    def add(self, name: str, saved: AdapterFolder, factors: dict[str, Factors] | None, reporter: Reporter) -> None:
        """Loads what `read` gave, where no forward runs.

        Raises:
            UsageError: The name is taken.
            ModelError: It does not fit this base; or with it the model answers otherwise token by token.
        """
        self._require_new(name)  # another thread may have been faster
        if factors is not None:
            self._stack.add(name, factors)
            return
        self._engine.add_adapter(name, saved.path, reporter)
        self.model.eval()
        try:
            self._sharing[name] = self._try([name] * 3)
        except BaseException:  # also of memory that ran out: nobody would ever take it off again
            self._engine.remove_adapter(name)
            raise

    def _require_new(self, name: str) -> None:
        if name in self.names:
            raise UsageError(f"two adapters are called '{name}'", todo="give each a name of its own")

    def remove(self, name: str) -> None:
        """Drops one, where no forward runs."""
        if name in self._stack.names:
            self._stack.remove(name)
        else:
            self._engine.remove_adapter(name)
            self._sharing.pop(name)
        trim_heap()

    def start(self, reporter: Reporter) -> None:
        """Tries whether rows share a forward, each with an adapter of its own on every linear; loads anew what the
        engine has.

        Raises:
            ModelError: The model answers otherwise token by token than from a whole text.
        """
        loaded = dict(self._engine.folders)
        for name in loaded:
            self._engine.remove_adapter(name)
        self._stack = StackedAdapters(self.model)
        generator = torch.Generator().manual_seed(0)
        for name in ("tried 1", "tried 2"):
            self._stack.add(name, {path: drawn_factors(one, generator) for path, one in self._stack.linears.items()})
        try:
            self._sharing[None] = self._try(["tried 1", None, "tried 2"])
        finally:
            for name in ("tried 1", "tried 2"):
                self._stack.remove(name)
        if not self._sharing[None]:
            self.why_alone = f"{type(self.model).__name__} keeps more than keys and values of every token"
            reporter.warn(f"requests take turns, and share no forward: {self.why_alone}")
        for name in self._engine.adapters:  # of a model that had them before it had an engine
            self._sharing[name] = self._try([name] * 3)
        for name, folder in loaded.items():
            self.add(name, *self.read(name, folder, reporter), reporter)

    def _try(self, names: Sequence[str | None]) -> bool:
        """Whether rows with these adapters, all of one mode, share a forward. Raises ModelError as `try_rows`."""
        dtype = self._engine.autocast_dtype or self.model.dtype
        is_exact = dtype == torch.float32 and all(kind_of_codes(layer) is None for layer in self.model.modules())
        return try_rows(self.model, names, self.using, ROUNDING[None if is_exact else torch.bfloat16])
