"""What a merge takes in memory does not grow with the model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lorafit.files.safetensors import read_index
from tests.support.large_base import MERGE, make_large_adapter, make_large_base, record_quantization


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["original", "dequantized"])
def test_peak_is_bounded_by_the_largest_tensor(tmp_path: Path, kind: str) -> None:
    base = make_large_base(tmp_path / "base", hidden=2048, inner=16384, layers=4, shards=8)
    adapter = make_large_adapter(base, tmp_path / "adapter", rank=16)
    record = record_quantization(base, tmp_path / "quantization.json")
    arguments = [str(base), str(adapter), str(tmp_path / "merged"), kind, str(record)]
    done = subprocess.run([sys.executable, "-c", MERGE, *arguments], capture_output=True, text=True, check=True)
    result = json.loads(done.stdout)
    largest = max(entry.size_bytes for entry in read_index(base).values())
    whole = sum(entry.size_bytes for entry in read_index(base).values())
    assert result["verified"] and result["proven"] is (kind == "dequantized")
    assert result["peak_bytes"] <= 1.5 * largest + 700e6 < whole, result
