"""A base, and adapters on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lorafit.model.base import Base
from tests.support.adapted import Trained, make_llama, open_base, train_like


@pytest.fixture
def llama(tmp_path: Path) -> Base:
    return open_base(make_llama(tmp_path / "base"))


@pytest.fixture
def trained(llama: Base) -> Callable[..., Trained]:
    return lambda kind, **other: train_like(llama, kind, **other)
