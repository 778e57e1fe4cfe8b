"""The pretended card: torch's CUDA build, told by a small C library that a device is there.

    cudart.c ──cc──> libcudart_pretended.so ──LD_PRELOAD──> a Python of its own for each compute capability
                                                            └─ pretend(): fake tensors on cuda:0, no values

`docs/gpu.md` says what can be seen this way and what not.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FOLDER = Path(sys.prefix) / "fake_card"
LIBRARY = FOLDER / "libcudart_pretended.so"
CAPABILITIES = ((7, 5), (8, 0), (8, 9), (9, 0), (12, 0))
"""T4 and RTX 20xx; A100; L4 and RTX 40xx; H100; RTX 50xx."""
_DRIVER_NAMES = ("libcuda.so.1", "libnvidia-ml.so.1")


def build_library() -> None:
    """Compiles the C library into the virtual environment, where it is older than its source."""
    source = HERE / "cudart.c"
    if LIBRARY.exists() and LIBRARY.stat().st_mtime > source.stat().st_mtime:
        return
    import triton

    header = next(Path(triton.__file__).parent.rglob("nvidia/include/driver_types.h"))
    FOLDER.mkdir(exist_ok=True)
    compiler = os.environ.get("CC", "cc")
    command = [compiler, "-shared", "-fPIC", "-O1", f"-I{header.parent}", "-o", str(LIBRARY), str(source)]
    subprocess.run(command, check=True)
    for name in _DRIVER_NAMES:
        (FOLDER / name).unlink(missing_ok=True)
        (FOLDER / name).symlink_to(LIBRARY.name)


def ask_card(capability: tuple[int, int], module: str, question: Any) -> Any:
    """The answer of a module's `answer` to a question, in a process that finds a card of that capability.

    Question and answer are JSON. What the process prints is shown.
    """
    build_library()
    major, minor = capability
    environment = {
        **os.environ,
        "LD_PRELOAD": str(LIBRARY),
        "LD_LIBRARY_PATH": str(FOLDER),
        "FAKE_CARD_CAPABILITY": f"{major}{minor}",
        "CUDA_VISIBLE_DEVICES": "0",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "tests.fake_card.card", module]
    done = subprocess.run(
        command, input=json.dumps(question), text=True, stdout=subprocess.PIPE, env=environment, cwd=ROOT, check=True
    )
    *printed, answer = done.stdout.splitlines()
    print(*printed, sep="\n")
    return json.loads(answer)


def pretend() -> None:
    """Lets this process run on fake tensors of cuda:0.

    Python must believe that no card is there, or FakeTensorMode would allocate on it; autocast and the loss scale, that
    one is. Memory that the driver would move between host and card is taken on the card. What has a size
    by its values has none: of the inputs of LLM.int8(), the columns with outliers.
    """
    import bitsandbytes.functional
    import torch
    import torch.cuda.amp.common as common
    from torch._library.fake_impl import FakeImplCtx

    def paged(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        made = torch.empty(shape, dtype=dtype, device=device)
        made.is_paged, made.page_deviceid = True, device.index
        return made

    torch.Tensor.pin_memory = lambda tensor, device=None: tensor  # by the driver
    FakeImplCtx.new_dynamic_size = lambda context, **options: 0
    bitsandbytes.functional.get_paged = paged
    bitsandbytes.functional.prefetch_tensor = lambda *arguments, **options: None
    bitsandbytes.functional.fill = lambda *arguments, **options: None
    torch.cuda.is_available = lambda: False
    common.amp_definitely_not_available = lambda: False
    torch.cuda.is_bf16_supported = lambda including_emulation=True: True  # which every card has, emulated before 8.0


def main() -> None:
    """Answers the question on stdin."""
    pretend()
    import importlib

    module = importlib.import_module(f"tests.fake_card.{sys.argv[1]}")
    print(json.dumps(module.answer(json.load(sys.stdin))))


if __name__ == "__main__":
    main()
