"""What all tests share."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Generator

import pytest

# A shell's background jobs ignore Ctrl-C, and so would everything that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Tests kill processes, never the machine: a run waits for the disk fifty times, and nothing reads what that is for.
os.fsync = lambda descriptor: None  # type: ignore[assignment]


_modules_known = len(sys.modules)


@pytest.hookimpl(hookwrapper=True, tryfirst=True)
def pytest_collection() -> Generator[None, None, None]:
    """Half a million objects of libraries and tests stay until the end, and Python's collector looked through all of
    them again and again: a sixth of the suite's time.
    """
    gc.disable()
    yield
    gc.freeze()
    gc.enable()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """The same for what tests import, between two files: there nothing of a test is alive."""
    global _modules_known
    if (nextitem is None or nextitem.path != item.path) and len(sys.modules) >= _modules_known + 50:
        _modules_known = len(sys.modules)
        gc.collect()
        gc.freeze()


@pytest.fixture
def memory_by_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that train tiny models and show nothing of memory: the dry run that measures what no formula covers
    takes longer than the training.
    """
    from lorafit.estimation import measured

    monkeypatch.setattr(measured, "covers", lambda step: True)
