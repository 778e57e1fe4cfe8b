"""A CPU's heap: what a long step leaves free goes back to the system, and products of new shapes do not stay."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lorafit.machine.library_settings import LIBRARY_SETTINGS
from lorafit.ops.process_memory import release_memory
from lorafit.trainer.executor import trim_after

MIB = 2**20

PRODUCTS_OF_MANY_SHAPES = """
import torch
weight = torch.ones(1536, 576, dtype=torch.bfloat16)
product = lambda tokens: torch.ones(tokens, 576, dtype=torch.bfloat16) @ weight.t()
pages = lambda: int(open("/proc/self/statm").read().split()[1])
for tokens in range(200, 400):
    product(tokens)
before = pages()
for tokens in range(400, 700):
    product(tokens)
print((pages() - before) * 4096 // 2**20)
"""


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
    monkeypatch.setattr("lorafit.trainer.executor.trim_heap", lambda: trimmed.append(None))
    trim_after(0.01, torch.device("cpu"))
    trim_after(9.0, torch.device("cuda"))
    assert not trimmed
    trim_after(9.0, torch.device("cpu"))
    assert len(trimmed) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_products_of_ever_new_shapes_do_not_grow_the_process() -> None:
    # Without the settings 240 MiB where the CPU has products in bf16, 124 with one of the two caches bounded.
    done = subprocess.run(
        [sys.executable, "-c", PRODUCTS_OF_MANY_SHAPES],
        env={**os.environ, **LIBRARY_SETTINGS},
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) < 70
