"""The card of this process: taken, refused with the reason, or left alone; torch.cuda answers as asked, without one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lorafit.errors import ResourceError
from lorafit.machine import devices
from lorafit.machine.devices import parse_gpu, read_device
from lorafit.memory.peak import CONTEXT_BYTES
from lorafit.plan import plan
from tests.support.plan_cases import ROWS, recipe, shape_of

GIB = 2**30
TOO_OLD = (
    "The NVIDIA driver on your system is too old (found version 12020). Please update your GPU driver by downloading "
    "and installing a new version from the URL: http://www.nvidia.com/Download/index.aspx Alternatively, go to: ..."
)
CUDA_13 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with one card and driver 535, which torch, built for CUDA 13.0, cannot use."""

    def init() -> None:
        raise RuntimeError(TOO_OLD)

    (tmp_path / "nvidia0").touch()
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 2024\n")
    monkeypatch.setattr(devices, "_SIGNS_OF_A_CARD", ((tmp_path, "nvidia[0-9]*"),), raising=False)
    monkeypatch.setattr(devices, "_DRIVER_FILE", tmp_path / "version", raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)
    for name in ("CUDA_VISIBLE_DEVICES", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture
def put_in(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts cards into this machine that torch can use, in torch's CUDA build of the day."""

    def put(
        capability: tuple[int, int] = (8, 9),
        *,
        free: tuple[int, ...] = (24 * GIB,),
        own: int = 0,
        integrated: bool = False,
        built_for: list[str] = CUDA_13,
    ) -> None:
        def properties(index: int) -> SimpleNamespace:
            named = {"name": f"NVIDIA L4 {index}", "total_memory": 24 * GIB, "is_integrated": integrated}
            return SimpleNamespace(**named, major=capability[0], minor=capability[1])

        for name, answer in {
            "is_available": lambda: True,
            "device_count": lambda: len(free),
            "current_device": lambda: 0,
            "get_device_properties": properties,
            "get_arch_list": lambda: built_for,
            "mem_get_info": lambda index: (free[index], 24 * GIB),
            "memory_reserved": lambda index: own,
        }.items():
            monkeypatch.setattr(torch.cuda, name, answer)

    return put


def refused() -> str:
    with pytest.raises(ResourceError) as caught:
        read_device()
    assert caught.value.exit_code == 7
    message = str(caught.value)
    assert len(message) <= 300 and "CUDA_VISIBLE_DEVICES=" in message
    return message


def test_a_driver_that_is_too_old_is_told_with_both_versions(machine: Path) -> None:
    said = refused()
    for part in ("for CUDA 13.0", "driver 535.183.01", "too old (found version 12020)", "update the driver"):
        assert part in said


def test_a_torch_without_cuda_is_told_as_that(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built without CUDA; install torch's build for CUDA" in refused()


def test_a_number_that_no_card_has_is_told_as_that(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def init() -> None:
        raise RuntimeError("No CUDA GPUs are available")

    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    said = refused()
    assert "CUDA_VISIBLE_DEVICES=7" in said and "name one that nvidia-smi lists" in said
    assert "update the driver" not in said


@pytest.mark.parametrize("hidden", ["", "-1", "-1,0"])
def test_hidden_cards_mean_the_cpu(machine: Path, monkeypatch: pytest.MonkeyPatch, hidden: str) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert read_device().kind == "cpu"


def test_who_only_plans_is_not_stopped_by_a_card(machine: Path) -> None:
    assert parse_gpu("cpu").kind == "cpu"
    assert parse_gpu("4090").kind == "cuda"
    (machine / "nvidia0").unlink()
    assert read_device().kind == "cpu"  # and without a card nothing is wrong with torch


@pytest.mark.parametrize(
    ("capability", "built_for", "runs"),
    [
        ((7, 5), CUDA_13, True),
        ((8, 9), ["sm_80", "sm_90"], True),  # machine code runs on later minor capabilities of its major one
        ((8, 0), ["sm_86"], False),
        ((7, 0), CUDA_13, False),
        ((6, 1), CUDA_13, False),
        ((11, 0), CUDA_13, False),
        ((12, 1), ["sm_90", "compute_90"], True),  # what is compiled when it is loaded runs on anything later
        ((8, 9), ["compute_90"], False),
        ((10, 3), ["sm_100a"], False),  # the letter: that card alone
        ((9, 0), ["sm_90a"], True),
        ((12, 0), ["sm_90", "sm_120"], True),
    ],
)
def test_a_card_without_kernels_is_refused_before_the_first_one(
    put_in: Callable[..., None], capability: tuple[int, int], built_for: list[str], runs: bool
) -> None:
    put_in(capability, built_for=built_for)
    if runs:
        assert read_device().capability == capability
        return
    said = refused()
    for part in ("NVIDIA L4 0", f"capability {capability[0]}.{capability[1]}", *built_for):
        assert part in said


def test_kernels_of_amds_cards_are_not_counted_by_nvidias_rules(
    put_in: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    put_in((9, 4), built_for=["gfx90a", "gfx942"])
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert read_device().kind == "cuda"


def test_memory_is_what_others_left_and_what_this_process_holds(put_in: Callable[..., None]) -> None:
    """The CUDA context is this process's too: an estimate counts it."""
    put_in(free=(10 * GIB,), own=2 * GIB)
    assert read_device().memory_bytes == 12 * GIB + CONTEXT_BYTES["cuda"]
    put_in(free=(24 * GIB - 1000,))
    assert read_device().memory_bytes == 24 * GIB


def test_a_card_in_the_hosts_memory_has_what_the_host_has(
    put_in: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "cpu_memory_bytes", lambda: 20 * GIB)
    put_in(free=(GIB,), integrated=True)  # the host's file cache has the rest, and gives it back when asked
    assert read_device().memory_bytes == 20 * GIB


def test_each_rank_looks_at_its_own_card(put_in: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    put_in(free=(20 * GIB, 4 * GIB))
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert (read_device().name, read_device().memory_bytes) == ("NVIDIA L4 1", 4 * GIB + CONTEXT_BYTES["cuda"])


def test_apples_gpu_is_left_alone_and_the_plan_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(devices, "_SIGNS_OF_A_CARD", ())
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 8 * GIB)
    device = read_device()
    assert device.kind == "cpu"
    assert "Apple's GPU is not supported" in plan(recipe(), shape_of(), ROWS, device).warnings[0]
