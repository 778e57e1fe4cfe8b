"""Runs in folders of their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_run import Job


@pytest.fixture
def job(tmp_path: Path) -> Callable[..., Job]:
    """Builds runs in folders of their own."""

    def build(name: str = "run", **values: Any) -> Job:
        return Job(tmp_path / name, **values)

    return build
