"""`make prove-gpu`: what its verdicts follow from, that each stage's figures can miss, and its small mode, whole."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.prove_gpu import __main__ as command
from benchmarks.prove_gpu import card, speed, values
from benchmarks.prove_gpu.trace import Trace
from benchmarks.prove_gpu.verdicts import STAGES, Check, Lack, Proof, at_least, at_most, run_stages, table
from lorafit.facts import DeviceFacts
from tests.support.docs_scripts import load_script

ROOT = Path(__file__).resolve().parents[3]
HELD, MISSED, REPORTED = at_most("loss", 0.01, 0.02), at_most("loss", 0.03, 0.02), Check("free", "3 GiB")


def silent(text: str) -> None:
    pass


def run(
    found: dict[str, list[Check | Lack]] | None = None,
    *,
    device: str = "cuda",
    wanted: tuple[str, ...] = STAGES,
    where: str = "NVIDIA L4, driver 580",
) -> Proof:
    """A proof in which every stage holds one bound, but for those that find something else."""

    def stage(name: str) -> Callable[[], Iterator[Check | Lack]]:
        return lambda: iter((found or {}).get(name, [HELD]))

    proof = Proof(where, device, {"torch": "2.13"})
    run_stages(proof, {name: stage(name) for name in STAGES}, wanted, iter(range(1000)).__next__, silent)
    return proof


def printed(proof: Proof) -> str:
    from rich.console import Console

    console = Console(width=120)
    with console.capture() as shown:
        console.print(table(proof))
    return shown.get()


def test_a_card_that_held_all_stages_is_proven() -> None:
    proof = run({"waits": [at_most("host waits a step", 2, 2)]})
    assert proof.line() == "PROVEN on NVIDIA L4, driver 580: 7 of 7 bounds held in 7 s; host waits a step 2"
    assert proof.exit_status == 0 and proof.to_json()["proven"]


@pytest.mark.parametrize("stage", STAGES)
def test_nothing_is_proven_with_a_stage_left_out(stage: str) -> None:
    missing = run(wanted=tuple(name for name in STAGES if name != stage))
    alone = run(wanted=(stage,))
    lacking = run({stage: [HELD, Lack("trl is not installed", is_whole=False)]})
    unjudged = run({stage: [REPORTED]})
    for proof in (missing, alone, lacking, unjudged):
        assert proof.exit_status == 0
        assert "PROVEN" not in proof.line() and "PROVEN" not in printed(proof) and not proof.to_json()["proven"]
    for proof in (missing, lacking, unjudged):
        assert proof.left_out == [stage]
        assert proof.line().endswith(f"not run, or not whole: {stage}")


def test_what_a_bare_machine_lacks_is_said_and_does_not_spoil_the_proof() -> None:
    proof = run({"values": [HELD, Lack("random weights instead of SmolLM2's")]})
    assert proof.line().startswith("PROVEN on ")
    assert "random weights instead of SmolLM2's" in printed(proof)


def test_a_cpu_is_never_said_to_be_proven() -> None:
    small = run(device="cpu", wanted=STAGES[:-1])
    assert small.line() == "proven on a CPU (small mode, speed not run): 6 of 6 bounds held in 6 s"
    part = run(device="cpu", wanted=("card",))
    assert part.line().startswith("not all proven on a CPU (small mode): 1 of 1 bounds held")
    for proof in (small, part, run(device="cpu")):
        assert "PROVEN" not in proof.line() + printed(proof) and not proof.is_proven


@pytest.mark.parametrize("stage", STAGES)
def test_the_first_bound_missed_ends_the_proof(stage: str) -> None:
    proof = run({stage: [HELD, MISSED, HELD]})
    assert proof.exit_status == 1 and not proof.is_proven
    assert proof.line() == f"MISSED on NVIDIA L4, driver 580: {stage}: loss 0.03, bound <= 0.02"
    assert list(proof.checks) == list(STAGES[: STAGES.index(stage) + 1])  # nothing ran behind it
    assert len(proof.checks[stage]) == 2
    assert printed(proof).count("not run") == len(STAGES) - len(proof.checks)


def test_a_stage_that_breaks_is_a_bound_missed() -> None:
    def breaks() -> Iterator[Check | Lack]:
        yield HELD
        raise RuntimeError("no kernel image is available")

    proof = Proof("a card", "cuda", {})
    run_stages(proof, {"card": breaks}, ["card"], iter(range(9)).__next__, silent)
    assert proof.exit_status == 1
    assert "card: ran to its end RuntimeError: no kernel image is available" in proof.line()


def test_what_is_no_number_misses() -> None:
    assert at_most("x", float("nan"), 1).held is False
    assert at_least("x", float("nan"), 1).held is False


def test_what_is_asked_for_wrongly_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for device, stage, words in (
        ("tpu", "", "PROVE_DEVICE=tpu is neither cuda nor cpu"),
        ("cpu", "vales", "STAGE names vales; the stages are card, kernels"),
    ):
        monkeypatch.setenv("PROVE_DEVICE", device)
        monkeypatch.setenv("STAGE", stage)
        assert command.main() == 2
        assert words in capsys.readouterr().err


@pytest.mark.parametrize("reason", [None, "this machine has a card that torch 2.13 cannot use"])
def test_a_machine_without_a_card_is_told_why(
    reason: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    from lorafit.errors import ResourceError
    from lorafit.machine import devices

    def read_device() -> None:
        if reason:
            raise ResourceError(reason, todo="update the driver")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(devices, "read_device", read_device)
    monkeypatch.delenv("PROVE_DEVICE", raising=False)
    monkeypatch.delenv("STAGE", raising=False)
    assert command.main() == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {reason or 'torch finds no CUDA card'}") and "PROVE_DEVICE=cpu" in said


def test_a_part_does_not_overwrite_the_whole() -> None:
    whole, part = command.name_of(run(), []), command.name_of(run(), ["values", "waits"])
    assert (whole, part) == ("nvidia-l4", "nvidia-l4.values.waits")
    assert command.name_of(run(device="cpu"), []) == "cpu-small-mode"


# what the stages conclude


def write_run(folder: Path, losses: list[float], gradient: list[float]) -> Path:
    """A run folder as far as the stage values reads it."""
    import torch
    from safetensors.torch import save_file

    first = folder / "checkpoints" / "step-000001"
    first.mkdir(parents=True)
    lines = [json.dumps({"step": number, "loss": loss}) for number, loss in enumerate(losses, 1)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    save_file({"w/exp_avg": torch.tensor(gradient), "w/step": torch.tensor(1.0)}, first / "optimizer.safetensors")
    return folder


@pytest.mark.parametrize(
    ("losses", "gradient", "held"),
    [
        ([2.0, 1.0], [1.0, 2.0], [True, True]),
        ([2.02, 1.01], [3.0, 6.0], [True, True]),  # clipped otherwise
        ([2.0, 1.03], [1.0, 2.0], [False, True]),
        ([2.0, float("nan")], [1.0, 2.0], [False, True]),
        ([2.0, 1.0], [1.0, 1.5], [True, False]),
        ([2.0, 1.0], [float("nan"), 2.0], [True, False]),
    ],
)
def test_losses_and_gradients_that_differ_miss(
    tmp_path: Path, losses: list[float], gradient: list[float], held: list[bool]
) -> None:
    reference = write_run(tmp_path / "reference", [2.0, 1.0], [1.0, 2.0])
    checks = values.compare("x", write_run(tmp_path / "run", losses, gradient), reference, True)
    assert [check.held for check in checks] == held


@pytest.mark.parametrize(
    ("capability", "kernels", "found"),
    [((8, 0), ["flash", "flash by lengths"], [True]), ((9, 0), ["efficient"], [False]), ((7, 5), ["efficient"], [])],
)
def test_packed_rows_that_a_card_masks_miss(
    capability: tuple[int, int], kernels: list[str], found: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where torch computes documents by themselves."""
    facts = DeviceFacts("cpu", "a card", 2**30, bf16=True, capability=capability)
    monkeypatch.setattr("lorafit.machine.devices.read_device", lambda _: facts)
    monkeypatch.setattr("lorafit.ops.matmul_peak.measure_matmul_peak", lambda *_: 1e12)
    asked = []
    monkeypatch.setattr(card, "_attention", lambda _, *how: asked.append(how) or kernels)
    checks = list(card.prove_card(SimpleNamespace(is_small=True, device="cpu")))  # type: ignore[arg-type]
    held = [one.held for one in checks if isinstance(one, Check) and one.name == "attention, packed rows, left open"]
    assert held == found and (("bf16", True, "auto") in asked) is bool(found)


def test_an_operation_that_is_wrong_misses() -> None:
    import torch

    from benchmarks.prove_gpu.kernels import EPSILONS, error_of, operations
    from lorafit.ops.kernels import PLAIN

    for name, operation, exact, shapes in operations(64, {"": PLAIN}):
        right = error_of(operation, exact, shapes, "cpu", torch.float32)
        wrong = error_of(lambda *x, f=operation: f(*x) * 1.001, exact, shapes, "cpu", torch.float32)  # type: ignore[misc]
        assert right < 1e-5 < 5e-4 < wrong, name
    assert EPSILONS * torch.finfo(torch.bfloat16).eps < 0.02


def test_codes_that_are_not_the_nearest_are_counted() -> None:
    import torch
    from bitsandbytes.functional import get_4bit_type, quantize_4bit

    from benchmarks.prove_gpu.kernels import _different, _off_nearest

    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    packed, state = quantize_4bit(weight, blocksize=64, quant_type="nf4")
    levels = get_4bit_type("nf4", device="cpu").double()
    planted = packed.clone()
    planted[0] ^= 0x11  # both codes of a byte
    assert _off_nearest(packed, state.absmax, weight, levels) == 0
    assert _off_nearest(planted, state.absmax, weight, levels) == 2 == _different(planted, packed)


def write_trace(folder: Path, events: list[tuple[str, float, float]]) -> Trace:
    recorded = [{"ph": "X", "name": name, "ts": ts, "dur": dur, "tid": 1} for name, ts, dur in events]
    with gzip.open(folder / "trace.json.gz", "wt") as file:
        json.dump({"traceEvents": [*recorded, {"ph": "i", "name": "cudaStreamSynchronize"}]}, file)
    return Trace(folder)


def test_waits_are_counted_a_step(tmp_path: Path) -> None:
    """Two steps, each with three waits for a stream and one in the optimizer; others are the profile's."""
    events = []
    for start in (0.0, 100.0):
        events += [("lorafit: forward", start, 10.0), ("cudaDeviceSynchronize", start + 1, 1.0)]
        events += [("cudaStreamSynchronize", start + at, 1.0) for at in (2, 4, 6)]
        events += [("Optimizer.step#AdamW.step", start + 20, 10.0), ("cudaDeviceSynchronize", start + 22, 1.0)]
        events += [("aten::_local_scalar_dense", start + at, 1.0) for at in (5, 21, 23, 40)]
        events += [("aten::_scaled_dot_product_attention_math", start + 3, 1.0)]
    trace = write_trace(tmp_path, events)
    assert (trace.host_waits("cuda"), trace.host_waits("cpu")) == (4, 2)
    assert trace.attention() == ["math"]
    assert trace.micro_batches() == 1


def rounds(seconds: float, loss: float = 2.0) -> list[dict[str, Any]]:
    """Of 100 tokens a step; the first step is slow."""
    return [{"short": {"seconds": [9.0, seconds, seconds], "tokens": [100.0] * 3, "loss": [9.0, loss, loss]}}] * 2


@pytest.mark.parametrize(
    ("peers", "missed"),
    [
        ({"trl": rounds(2.0)}, []),
        ({"trl": rounds(2.0), "unsloth": rounds(0.96)}, []),
        ({"trl": rounds(2.0), "unsloth": rounds(0.9)}, ["short: against the best (unsloth)"]),
        ({"trl": rounds(1.1)}, ["short: against TRL's defaults"]),
        ({"trl": rounds(2.0, loss=2.1)}, ["short: loss beside TRL's"]),
    ],
)
def test_a_slower_lorafit_misses(peers: dict[str, Any], missed: list[str]) -> None:
    checks = list(speed.judge({"lorafit": rounds(1.0), **peers}, {"short": None}, 1))
    assert checks[0].measured.startswith("lorafit 100, trl ")
    assert [check.name for check in checks if check.held is False] == missed
    assert all(replace(check).held is None for check in speed.judge({"lorafit": rounds(1.0)}, {"short": None}, 1))


# the page, and the whole


def test_the_page_shows_the_proofs_that_are_kept() -> None:
    page = ROOT / "docs" / "gpu.md"
    assert load_script("write_gpu").page_with_proofs(page.read_text()) == page.read_text(), "run make docs"


def test_a_proof_is_rendered_with_what_it_left_out() -> None:
    script = load_script("write_gpu")
    proven = script.row({"date": "2026-12-01", **run().to_json()})
    missed = script.row({"date": "2026-12-01", **run({"memory": [MISSED]}).to_json()})
    assert "PROVEN" in proven and "card, kernels, values, resume, memory, waits, speed" in proven
    assert "PROVEN" not in missed and "memory: loss 0.03" in missed and "| memory, waits, speed |" in missed


def test_the_command_writes_the_page_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "run_stages", lambda *_: None)
    for name, value in {"PROVE_DEVICE": "cpu", "CUDA_VISIBLE_DEVICES": "", "LORAFIT_CACHE": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    page = tmp_path / "gpu.md"
    page.write_text((ROOT / "docs" / "gpu.md").read_text(encoding="utf-8"), encoding="utf-8")
    command.main(tmp_path / "gpu", page)
    written = page.read_text(encoding="utf-8")
    [result] = [json.loads(file.read_text()) for file in (tmp_path / "gpu").glob("*.json")]
    assert load_script("write_gpu").row(result) in written
    assert written == load_script("write_gpu").page_with_proofs(written, tmp_path / "gpu")


@pytest.mark.slow
def test_the_small_mode_runs_to_its_end(tmp_path: Path) -> None:
    """Every stage but speed, really: kills, resumes and merges among them."""
    (tmp_path / "gpu.md").touch()
    program = (
        "import sys; from pathlib import Path; from benchmarks.prove_gpu.__main__ import main;"
        "sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))"
    )
    environment = {**os.environ, "PROVE_DEVICE": "cpu", "STAGE": "", "LORAFIT_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "gpu"), str(tmp_path / "gpu.md")],
        capture_output=True, text=True, check=False, cwd=ROOT, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.splitlines()[-1].startswith("proven on a CPU (small mode, speed not run): ")
    assert "PROVEN" not in done.stdout
    result = json.loads((tmp_path / "gpu" / "cpu-small-mode.json").read_text())
    assert result["left_out"] == ["speed"] and not result["proven"] and result["versions"]["torch"]
    assert all(stage["checks"] for stage in result["stages"].values()) and len(result["stages"]) == len(STAGES) - 1
