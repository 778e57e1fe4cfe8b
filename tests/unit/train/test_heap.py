"""What a long step leaves free on a CPU's heap goes back to the system."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from lorafit.train.out_of_memory import release_memory, trim_after

MIB = 2**20


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


@pytest.mark.skipif(sys.platform != "linux", reason="malloc_trim is the GNU C library's")
@pytest.mark.parametrize(
    "give_back", [lambda: trim_after(9.0, torch.device("cpu")), lambda: release_memory(torch.device("cpu"))]
)
def test_free_blocks_between_used_ones_go_back(give_back) -> None:  # type: ignore[no-untyped-def]
    blocks = [torch.ones(16_000) for _ in range(4_000)]  # 62 KiB each: from the heap, not mapped one by one
    kept = blocks[::50]
    before = resident_bytes()
    del blocks
    give_back()
    assert before - resident_bytes() > 150 * MIB
    assert all(bool((block == 1).all()) for block in kept)


def test_a_short_step_and_a_card_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    trimmed: list[None] = []
    monkeypatch.setattr("lorafit.train.out_of_memory._trim_heap", lambda: trimmed.append(None))
    trim_after(0.01, torch.device("cpu"))
    trim_after(9.0, torch.device("cuda"))
    assert not trimmed
    trim_after(9.0, torch.device("cpu"))
    assert len(trimmed) == 1
