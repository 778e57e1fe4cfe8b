"""Which adapter a prompt is for: the one whose training prompts are like it, or the base where none are.

    user's text ──StateReader──> state ──DomainChooser──> adapter, or the base       model: auto
                                   └──log-odds of the adapter that answers──> window ──> drift from its training prompts

Fitted anew whenever an adapter comes or goes, from the prompts that runs keep and a file of prompts about anything.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from lorafit.answering.states import StateReader
from lorafit.answering.trained_prompts import read_prompts
from lorafit.console.wording import counted
from lorafit.contracts import Reporter
from lorafit.errors import LorafitError, ModelError, UsageError
from lorafit.machine.shipped import shipped
from lorafit.ops.domain_chooser import LEAST_STATES, DomainChooser, drift_of, fit_domains

if TYPE_CHECKING:
    from lorafit.answering.batched import BatchedEngine

NAME = "auto"
LEAST_SEEN = 32
"""Prompts of an adapter, before its drift is told: of fewer any two samples differ."""
_WINDOW = 256
_ENOUGH_KNOWN = 100
"""Prompts of an adapter, with fewer of which `auto` picks noticeably worse; docs/serve.md has the figures."""
_LABELS = ("model_name", "adapter")


class Router:
    """What knows the adapters of a server by their training prompts.

    Args:
        engine: Whose adapters; its base reads the prompts.
        base: What that is called.
        share: Of each adapter's own prompts, how many are to go to it; None: nobody may ask for `auto`.
        reporter: Told what is fitted, and of adapters that cannot be known.
        watches: Whether drift is told, of requests that name their adapter too.
    """

    def __init__(
        self, engine: BatchedEngine, base: str, share: float | None, reporter: Reporter, *, watches: bool
    ) -> None:
        self._base, self.share, self._watches, self._reporter = base, share, watches, reporter
        self._reader = StateReader(engine)
        self._states: dict[str, torch.Tensor] = {}
        self._background: torch.Tensor | None = None
        self._chooser: DomainChooser | None = None
        self._routed: Counter[str | None] = Counter()
        self._seen: dict[str, deque[float]] = {}
        self._watching: asyncio.Future[None] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters that it knows."""
        return tuple(self._states)

    def learn(self, folders: Mapping[str, Path], *, draws: bool) -> None:
        """Knows more adapters, by their folders, while others are answered; warns of those that have no prompts.

        `draws`: see `read_prompts`.
        """
        began, prompts = time.perf_counter(), dict[str, list[str]]()
        for name, folder in folders.items():
            try:
                prompts[name] = read_prompts(folder, self._reporter, draws=draws)
                if len(prompts[name]) < LEAST_STATES:
                    what = f"{counted(len(prompts.pop(name)), 'training prompt')} say too little"
                    raise ModelError(what, todo=f"name the adapter in requests; it takes {LEAST_STATES}")
            except LorafitError as error:
                self._reporter.warn(f"adapter '{name}' cannot be told by its prompts: {error.one_line}")
        if not prompts:
            return
        background = [] if self._background is not None else read_background()
        number = sum(map(len, [*prompts.values(), background]))
        with self._reporter.track(number, "reading prompts") as bar:
            if self._background is None:
                self._background = self._reader.read_all(background, bar.advance)
            states = {name: self._reader.read_all(texts, bar.advance) for name, texts in prompts.items()}
        if self.share is not None:
            for name, texts in prompts.items():
                self._warn_of_few(name, len(texts))
        self._fit({**self._states, **states})
        told = ", ".join(f"{len(texts)} of {name}" for name, texts in prompts.items())
        self._reporter.info(f"training prompts learnt in {time.perf_counter() - began:.1f} s: {told}")

    def _warn_of_few(self, name: str, number: int) -> None:
        if number < _ENOUGH_KNOWN:
            self._reporter.warn(
                f"only {counted(number, 'training prompt')} of adapter '{name}' say what is for it: with fewer than "
                f"{_ENOUGH_KNOWN}, `{NAME}` sends more of its prompts elsewhere; name it in requests that are for it"
            )

    def forget(self, name: str) -> None:
        """An adapter is gone."""
        if name in self._states:
            self._fit({other: states for other, states in self._states.items() if other != name})

    def require_known(self) -> None:
        """Raises UsageError where no adapter is known."""
        if not self._states:
            key = "--route" if self.share is not None else "--drift"
            what = "no adapter is served whose training prompts are known"
            raise UsageError(what, key=key, todo="serve a run of this lorafit, or leave it out")

    async def choose(self, text: str) -> str | None:
        """The adapter for what a user asks; None: the base.

        Raises:
            LorafitError: Too many prompts wait, or the engine is closed.
        """
        picked = None
        if text and self._chooser is not None:
            state = await self._state(text)
            chooser = self._chooser  # another one may be fitted by now
            if chooser is not None:
                (picked,) = chooser.choose(state[None])
                self._see(chooser, picked, state)
        self._routed[picked] += 1
        return picked

    def watch(self, adapter: str | None, text: str) -> None:
        """Has a look at what an adapter was asked by its name, beside the answer; at one prompt at a time."""
        is_busy = self._watching is not None and not self._watching.done()
        if self._watches and text and adapter in self._states and not is_busy:
            self._watching = asyncio.ensure_future(self._look(adapter, text))

    def collect(self) -> Iterator[Metric]:
        """Counters and gauges, as prometheus_client asks for them; `adapter` is empty for the base."""
        if self.share is not None:
            counter = CounterMetricFamily(
                "lorafit:routed_requests", "Requests for auto, by who got them.", labels=_LABELS
            )
            for adapter in (None, *self.names):
                counter.add_metric([self._base, adapter or ""], self._routed[adapter])
            yield counter
        if self._watches:
            text = "How much less an adapter's last prompts are like it than its training prompts, 0 to 1."
            drift = GaugeMetricFamily("lorafit:prompt_drift", text, labels=_LABELS)
            text = f"How many prompts of an adapter its drift is of; it is told from {LEAST_SEEN} on."
            number = GaugeMetricFamily("lorafit:prompt_drift_seen", text, labels=_LABELS)
            chooser = self._chooser
            for name, seen in list(self._seen.items()):
                number.add_metric([self._base, name], len(seen))
                if chooser is not None and name in chooser.known and len(seen) >= LEAST_SEEN:
                    drift.add_metric([self._base, name], drift_of([*seen], chooser.known[name]))
            yield drift
            yield number

    def _fit(self, states: dict[str, torch.Tensor]) -> None:
        """Log-odds of an earlier fit are of no use to this one."""
        assert self._background is not None
        self._states = states
        self._seen = {name: deque(maxlen=_WINDOW) for name in states}
        self._chooser = fit_domains(states, self._background, self.share or 1.0) if states else None

    async def _state(self, text: str) -> torch.Tensor:
        ids = await asyncio.to_thread(self._reader.ids, text)
        return await asyncio.wrap_future(self._reader.submit(ids))

    async def _look(self, adapter: str, text: str) -> None:
        try:
            state = await self._state(text)
        except LorafitError:  # of a look in passing
            return
        if self._chooser is not None:
            self._see(self._chooser, adapter, state)

    def _see(self, chooser: DomainChooser, adapter: str | None, state: torch.Tensor) -> None:
        if adapter is not None and adapter in self._seen and adapter in chooser.names:
            odds = chooser.log_odds(state[None])[0, chooser.names.index(adapter)]
            self._seen[adapter].append(float(odds))


def read_background() -> list[str]:
    """Prompts about anything, which are no adapter's."""
    return shipped("generic_prompts.txt").read_text(encoding="utf-8").splitlines()
