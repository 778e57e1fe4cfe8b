"""What all tests share."""

from __future__ import annotations

import os
import signal

import pytest

# A shell's background jobs ignore Ctrl-C, and so would everything that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Tests kill processes, never the machine: a run waits for the disk fifty times, and nothing reads what that is for.
os.fsync = lambda descriptor: None  # type: ignore[assignment]


@pytest.fixture
def memory_by_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that train tiny models and show nothing of memory: the dry run that measures what no formula covers
    takes longer than the training.
    """
    from lorafit.estimation import measured

    monkeypatch.setattr(measured, "covers", lambda step: True)
