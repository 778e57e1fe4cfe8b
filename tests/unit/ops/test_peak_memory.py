"""The peak of memory begins anew where that is asked for, so that what a rehearsal tried is not a step's."""

from __future__ import annotations

import sys

import pytest
import torch

from lorafit.ops.process_memory import forget_peak_memory, peak_memory_bytes

CPU = torch.device("cpu")
_MIB = 2**20


def _touch(mebibytes: int) -> None:
    torch.ones(mebibytes * _MIB // 4)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets a peak begin anew")
def test_the_peak_begins_anew_at_what_is_held() -> None:
    _touch(400)
    high = peak_memory_bytes(CPU)
    assert forget_peak_memory(CPU)
    assert 2**26 < peak_memory_bytes(CPU) < high - 300 * _MIB
    _touch(200)
    assert peak_memory_bytes(CPU) < high - 100 * _MIB


def test_a_cards_peak_begins_anew_without_what_its_allocator_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: done.append("empty_cache"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: done.append("reset"))
    assert forget_peak_memory(torch.device("cuda"))
    assert done == ["empty_cache", "reset"]
