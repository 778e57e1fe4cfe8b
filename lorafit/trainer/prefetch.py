"""The next step's micro-batches, made while this step runs.

    main thread    take 1 ──── forward, backward, optimizer ──── take 2 ──── forward, ...
    feed           build 1 │ build 2 ┘                           │ build 3 ┘

What a step trains on is a function of its number and the token budget alone, so it does not matter who builds it, and
when. One step is built ahead, no more: a batch is small unless it has images, but reading a row may wait for a disk.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Built = TypeVar("Built")


class StepFeed(Generic[Built]):
    """Builds one step ahead in a thread. Use it as a context: at its end nothing is left running.

    Args:
        build: From a step's number and its token budget to what the step needs; a pure function, which draws no random
            numbers. What it raises comes out of `take` for that step, and not before.
        last_step: Nothing is built beyond it.
    """

    def __init__(self, build: Callable[[int, int], Built], last_step: int) -> None:
        self._build, self._last_step = build, last_step
        self._thread: ThreadPoolExecutor | None = None
        self._ahead: tuple[int, int] | None = None
        self._future: Future[Built] | None = None

    def __enter__(self) -> StepFeed[Built]:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="lorafit-feed")
        return self

    def __exit__(self, *exc: object) -> None:
        self._ahead = self._future = None
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)
            self._thread = None

    def forget(self) -> None:
        """Drops what was built ahead: the function that builds gives something else from now on."""
        self._ahead = self._future = None

    def take(self, step: int, token_budget: int) -> Built:
        """What the step needs: built ahead where that was this very step and budget, else here and now.

        Outside of its context nothing is built ahead.
        """
        future, is_this = self._future, self._ahead == (step, token_budget)
        self._ahead = self._future = None
        built = future.result() if future is not None and is_this else self._build(step, token_budget)
        if self._thread is not None and step < self._last_step:
            self._ahead = (step + 1, token_budget)
            self._future = self._thread.submit(self._build, *self._ahead)
        return built
