"""Tests on the pretended card; `make test-fake-card` runs them in an environment with torch's CUDA build."""

from __future__ import annotations

import pytest
import torch

from tests.fake_card.card import CAPABILITIES

if torch.version.cuda is None:
    pytest.exit("tests/fake_card needs torch's CUDA build: run make test-fake-card", returncode=2)


@pytest.fixture(scope="session", params=CAPABILITIES, ids=lambda found: ".".join(map(str, found)))
def capability(request: pytest.FixtureRequest) -> tuple[int, int]:
    """Of each kind of card once."""
    found: tuple[int, int] = request.param
    return found
