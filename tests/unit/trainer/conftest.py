"""Runs in folders of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.tiny_run import Job


@pytest.fixture
def job(tmp_path: Path) -> Callable[..., Job]:
    """Builds runs in folders of their own."""

    def build(name: str = "run", **values: Any) -> Job:
        return Job(tmp_path / name, **values)

    return build


@pytest.fixture(autouse=True)
def own_number_of_threads() -> Iterator[None]:
    """A test may set torch's threads; those behind it, and its neighbours on the same cores, keep theirs."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
