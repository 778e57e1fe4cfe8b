"""bitsandbytes' first import brings nothing along, in processes that have not imported it yet."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

from tests.support.adapted import make_llama

ROOT = Path(__file__).parents[3]
FETCHING = """
    import sys
    from pathlib import Path
    def get_kernel(*args, **options):
        Path({marker!r}).touch()
        raise OSError("the hub")
"""
STAND_IN = """
    try:
        from kernels import get_kernel
        get_kernel("kernels-community/anything")
    except Exception: pass
"""
WAYS = {
    "load": 'load(open_base(Path(sys.argv[1])), "nf4")',
    "dry run": """build_weightless(
        json.loads((Path(sys.argv[1]) / "config.json").read_text()), quantization=quantizations.make("nf4").section,
        dtype=torch.bfloat16, compute_dtype=torch.bfloat16, attention="sdpa", device_kind="cuda")""",
    "merge": "Rebuilder({}, {}, {})",
}
"""Where bitsandbytes may be imported first."""
IMPORTS = """
    import json, os, sys
    from pathlib import Path
    import torch
    from lorafit.kinds.quantizations import quantizations
    from lorafit.model.load import build_weightless
    from lorafit.model.merge.requantize import Rebuilder
    from tests.support.adapted import load, open_base
"""


def run(code: str, *arguments: Path, packages: Path) -> str:
    """What a fresh process prints, to which the packages of a folder come first."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(packages), str(ROOT)])}
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def write(folder: Path, name: str, code: str) -> None:
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(textwrap.dedent(code))


def test_no_kernel_is_fetched_from_the_hub(tmp_path: Path) -> None:
    """bitsandbytes does so where the CPU has AVX512-BF16; the stand-in does it anywhere."""
    marker = tmp_path / "fetched"
    write(tmp_path / "packages", "kernels", FETCHING.format(marker=str(marker)))
    write(tmp_path / "packages", "bitsandbytes", STAND_IN)
    base = make_llama(tmp_path / "base")
    code = textwrap.dedent(IMPORTS)
    for way in WAYS.values():
        code += f"""
sys.modules.pop("bitsandbytes", None)
try: {way}
except Exception: pass
print("bitsandbytes" in sys.modules, Path({str(marker)!r}).exists())
"""
    code += "from kernels import get_kernel\n"
    assert run(code, base, packages=tmp_path / "packages").splitlines() == ["True False"] * len(WAYS)


def test_what_is_compiled_later_is_compiled(tmp_path: Path) -> None:
    code = """
        import torch
        from lorafit.ops.import_bitsandbytes import import_bitsandbytes
        import_bitsandbytes()
        import bitsandbytes
        graphs = []
        def backend(graph, inputs):
            graphs.append(graph)
            return graph.forward
        torch.compile(lambda x: x + 1, backend=backend)(torch.ones(2))
        print(len(graphs))
    """
    assert run(code, packages=tmp_path).strip() == "1"
