"""A tiny base once a session, and a fresh folder with a recipe and rows over it for each test."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.support.tiny_model import make_base
from tests.support.world import Outcome, World


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("tiny") / "base")


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def world(
    tmp_path: Path,
    tiny_base: Path,
    shared_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> World:
    """A folder with a good recipe and good rows, which is also the current folder."""
    from lorafit import cli
    from lorafit.model import load

    monkeypatch.chdir(tmp_path)
    for name, value in {"LORAFIT_CACHE": str(shared_cache), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}.items():
        monkeypatch.setenv(name, value)

    def invoke(arguments: Sequence[str]) -> Outcome:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main([str(argument) for argument in arguments])
        shown = capsys.readouterr()
        code = stop.value.code
        return Outcome(code if isinstance(code, int) else 0, shown.out, shown.err)

    made = World(tmp_path, tiny_base, invoke, dict(os.environ))
    real = load.load_model

    def load_model(*arguments: Any, **options: Any) -> Any:
        made.loaded.append("weights")
        return real(*arguments, **options)

    monkeypatch.setattr(load, "load_model", load_model)
    made.recipe()
    made.rows()
    return made
