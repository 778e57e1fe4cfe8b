"""benchmarks/merge.py runs from start to end and leaves nothing behind."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "merge.py"


@pytest.mark.slow
def test_it_measures_and_agrees_with_peft(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--size", "tiny", "--pairs", "1", "--folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in ("PEFT merge", "cp, fsync", "lorafit original --no-verify", "lorafit original, streaming check"):
        assert re.search(rf"^{name}.*\d\.\d", done.stdout, re.MULTILINE), done.stdout
    for name in ("lorafit dequantized --no-verify", "lorafit dequantized, streaming check"):
        ratio = re.search(rf"^{name}.* (\d+\.\d+)$", done.stdout, re.MULTILINE)
        assert ratio is not None and float(ratio[1]) > 0.0
    agreement = r"^([\d.]+)% of all values have the same bits.* at most ([\d.]+)%$"
    found = re.search(agreement, done.stdout, re.MULTILINE)
    assert found is not None and float(found[1]) > 99.9 and float(found[2]) <= 0.79  # a step of bf16 is 0.78 %
    assert not list(tmp_path.iterdir())
