"""Python's collector waits for the imports of a command, and is as usual once there is a model."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

import pytest

from lorafit.contracts import Silent
from lorafit.machine import collector
from lorafit.model.base import resolve_base
from lorafit.model.load import load_model
from tests.support.tiny_model import make_base


def test_imports_are_put_off_and_then_left_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import torch

    from lorafit.recipe.schema import Recipe

    frozen: list[int] = []
    monkeypatch.setattr(gc, "freeze", lambda: frozen.append(1))  # what other tests leave is to be collected
    values = {"name": "x", "model": {"base": str(make_base(tmp_path / "base")), "quantization": "none"}}
    model = Recipe.model_validate({**values, "data": {"train": "rows.jsonl"}}).model
    kinds = {"quantization": model.quantization, "dtype": torch.float32, "compute_dtype": torch.float32}
    base = resolve_base(model, tmp_path, Silent())
    collector.put_off_collections()
    try:
        assert gc.get_threshold() == (*collector.USUAL[:2], collector.RARELY)
        for _ in range(2):  # once
            load_model(base, **kinds, attention="eager", device="cpu", reporter=Silent())
            assert gc.get_threshold() == collector.USUAL and frozen == [1]
    finally:
        gc.set_threshold(*collector.USUAL)


def test_a_command_goes_through_its_imports_less_often() -> None:
    code = (
        "import gc, sys\n"
        "found = []\n"
        "gc.callbacks.append(lambda phase, info: found.append(info['generation']) if phase == 'start' else None)\n"
        "sys.argv = ['lorafit', '--version']\n"
        "from lorafit.__main__ import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "found.clear()\n"
        "kept = [[[]] for _ in range(300_000)]\n"
        "print(found.count(2))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout.split()[-1]) == 0, done.stderr
