"""What only a card can show: losses of a CPU, resume after a kill, memory, merge, attention, fp16, copies."""

from __future__ import annotations

import json
import math
import signal
import time
from pathlib import Path

import pytest

from tests.gpu.conftest import NF4, log_of, train
from tests.support.world import World, say_all

pytestmark = pytest.mark.gpu

BF16_TOLERANCE = 0.02  # of a loss: rounding differs with the kernel
ESTIMATE_TOLERANCE = 0.15
PAGED = "  optimizer: {kind: paged_adamw_8bit}"
# bitsandbytes pages state of 100,000 values and more (Source: its optim/optimizer.py, get_state_buffer)
PAGED_RANK = 1024  # [1024, 128] in down_proj: enough


def test_nf4_trains_as_on_a_cpu(gpu: World) -> None:
    """Four rows, which every step sees: the loss falls at each, and is the CPU's."""
    gpu.rows(4)
    gpu.recipe(*NF4, ("  max_steps: 2", "  max_steps: 3"))
    on_card = [line["loss"] for line in train(gpu, "card")]
    on_cpu = [line["loss"] for line in train(gpu, "cpu", device="cpu")]
    print(f"losses on the card {on_card}, on the CPU {on_cpu}")
    assert len(on_card) == 3
    assert on_card[0] > on_card[1] > on_card[2]
    assert on_card == pytest.approx(on_cpu, rel=BF16_TOLERANCE)


def test_state_of_a_paged_optimizer_is_paged() -> None:
    import torch

    from lorafit.kinds.optimizers import optimizers

    card = torch.device("cuda")
    for name in (name for name in optimizers.names() if name.startswith("paged")):
        weight = torch.nn.Parameter(torch.ones(1024, 128, device=card))
        optimizer = optimizers.make(name).build([weight], 1e-3, card)
        for _ in range(2):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        torch.cuda.synchronize()
        state = optimizer.state[weight]["state1"]
        assert getattr(state, "is_paged", False), name
        assert (weight < 1).all(), name


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_killed_run_with_paged_state_resumes_as_the_same_run(gpu: World, deterministic: bool) -> None:
    """Bit for bit where the card computes the same twice, as `training.deterministic` promises; else no further off
    than two unbroken runs are."""
    gpu.rows(24)
    gpu.recipe(
        *NF4,
        ("  r: 4", f"  r: {PAGED_RANK}"),
        ("  alpha: 8", f"  alpha: {PAGED_RANK}"),
        ("  dropout: 0.0", "  dropout: 0.2"),
        ("  max_steps: 2", "  max_steps: 12"),
        ("  learning_rate: 1.0e-2", f"  learning_rate: 1.0e-3\n  deterministic: {str(deterministic).lower()}"),
        ("  optimizer: adamw", PAGED),
        ("  every_steps: 1", "  every_steps: 3"),
    )
    train(gpu, "unbroken")
    train(gpu, "again")
    process = gpu.start("train", "r.yaml", "--output", "killed", "--quiet")
    began = time.monotonic()
    while process.poll() is None and time.monotonic() - began < 240:
        if (gpu.root / "killed" / "metrics.jsonl").is_file() and len(log_of(gpu.root / "killed")) >= 7:
            break
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "the run was done before it could be killed: make it longer"
    resumed = train(gpu, "killed", "--resume")
    assert [line["step"] for line in resumed] == list(range(1, 13))
    noise, off = (
        difference(gpu.root / "unbroken", gpu.root / "again"),
        difference(gpu.root / "unbroken", gpu.root / "killed"),
    )
    print(f"largest difference of a value: two unbroken runs {noise}, killed and resumed {off}")
    assert noise == 0 or not deterministic
    if noise == 0:
        assert off == 0
        for name in ("adapter/adapter_model.safetensors", "optimizer.safetensors"):
            last = Path("checkpoints/step-000012") / name
            assert (gpu.root / "killed" / last).read_bytes() == (gpu.root / "unbroken" / last).read_bytes(), name
    else:
        assert off <= 4 * noise


def difference(one: Path, other: Path) -> float:
    """The largest difference of a value between two runs' adapters."""
    from safetensors.torch import load_file

    left, right = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (one, other))
    assert left.keys() == right.keys()
    return max(float((left[name].float() - right[name].float()).abs().max()) for name in left)


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("checkpointing", ["true", "false"])
def test_memory_is_what_was_estimated(gpu: World, larger_base: Path, quantization: str, checkpointing: str) -> None:
    gpu.recipe(
        (f"  base: {gpu.base}", f"  base: {larger_base}"),
        ("  dtype: fp32", "  dtype: bf16"),
        ("  quantization: none", f"  quantization: {quantization}"),
        ("  attention: eager", "  attention: sdpa"),
        ("  r: 4", "  r: 16"),
        ("  micro_batch_tokens: 256", "  micro_batch_tokens: 1024"),
        ("  batch_size: 4", "  batch_size: 24"),
        ("  gradient_checkpointing: false", f"  gradient_checkpointing: {checkpointing}"),
    )
    gpu.rows(48)
    outcome = gpu.spawn("train", "r.yaml", "--output", "run")
    say_all(outcome, 0, "peak memory", "reserved", "of tensors")
    result = json.loads((gpu.root / "run" / "result.json").read_text())
    measured, reserved, estimated = (
        result[name] for name in ("peak_memory_bytes", "peak_reserved_bytes", "estimated_tensor_bytes")
    )
    ratio = measured / estimated
    print(f"{quantization}, checkpointing {checkpointing}: {measured / 2**20:.1f} MiB allocated at the peak, "
          f"{reserved / 2**20:.1f} reserved, {estimated / 2**20:.1f} estimated ({ratio:.3f})")  # fmt: skip
    assert reserved >= measured > 0
    assert math.isclose(ratio, 1, abs_tol=ESTIMATE_TOLERANCE)


def test_a_run_of_the_card_is_merged(gpu: World, larger_base: Path) -> None:
    gpu.recipe(*NF4, (f"  base: {gpu.base}", f"  base: {larger_base}"))
    train(gpu, "run")
    outcome = gpu.spawn("merge", "run", "--output", "merged", "--json")
    say_all(outcome, 0)
    assert outcome.json["proven"] and outcome.json["verified"]
    assert outcome.json["parity"] is not None
    answer = gpu.spawn("generate", "merged", "--prompt", "what opens", "--max-new-tokens", "4", "--json")
    say_all(answer, 0)
    assert 1 <= answer.json["answers"][0]["tokens"] <= 4


def test_attention_is_chosen_among_what_the_card_offers(gpu: World) -> None:
    gpu.recipe(*NF4, ("  attention: eager", "  attention: auto"))
    train(gpu, "run")
    resolved = json.loads((gpu.root / "run" / "plan.json").read_text())
    assert resolved["attention"] in ("varlen", "sdpa", "flash_attention_2") and resolved["is_settled"]
    fixed = train(gpu, "fixed", "--set", "model.attention=eager")
    assert [line["loss"] for line in log_of(gpu.root / "run")] == pytest.approx(
        [line["loss"] for line in fixed], rel=BF16_TOLERANCE
    )


def test_rows_share_a_row_by_themselves_and_learn_the_same(gpu: World) -> None:
    """From Ampere on: every document by itself, in torch's variable-length attention."""
    import torch

    gpu.rows(24)
    gpu.recipe(*NF4, ("  attention: eager", "  attention: auto"))
    packed = train(gpu, "packed")
    padded = train(gpu, "padded", "--set", "data.packing=false")
    names = [json.loads((gpu.root / run / "plan.json").read_text())["attention"] for run in ("packed", "padded")]
    print(f"attention of packed and of padded rows: {names}")
    assert (names[0] == "varlen") is (torch.cuda.get_device_capability() >= (8, 0)) and names[1] != "varlen"
    assert [line["loss"] for line in packed] == pytest.approx([line["loss"] for line in padded], rel=BF16_TOLERANCE)


def test_fp16_trains_with_a_loss_scale(gpu: World) -> None:
    gpu.rows(4)
    gpu.recipe(
        ("  dtype: fp32", "  dtype: fp16"),
        ("  quantization: none", "  quantization: nf4"),
        ("  max_steps: 2", "  max_steps: 8"),
    )
    losses = [line["loss"] for line in train(gpu, "run")]
    state = json.loads((gpu.root / "run" / "checkpoints" / "step-000008" / "state.json").read_text())["train"]
    print(f"losses {losses}, loss scale {state['scaler']['scale']:g}, {state['overflows']} overflows")
    assert all(map(math.isfinite, losses)) and losses[-1] < losses[0]
    assert state["scaler"]["scale"] >= 1
    assert state["overflows"] < 8


@pytest.mark.parametrize("pinned", [True, False])
def test_batches_arrive_whole(pinned: bool) -> None:
    """Copies that nobody waits for, from pinned and from ordinary memory: the card sees what the CPU had."""
    import torch

    from lorafit.contracts import Batch

    card = torch.device("cuda")
    generator = torch.Generator().manual_seed(0)
    arrived, sent = [], []
    for number in range(64):
        parts = [torch.randint(0, 1 << 30, shape, generator=generator) for shape in ((8, 512), (4000,), (4000,))]
        sent.append([part.clone() for part in parts])
        names = ("input_ids", "label_index", "label_ids")
        tensors = {name: part.pin_memory() if pinned else part for name, part in zip(names, parts, strict=True)}
        batch = Batch(tensors, 4000, (number,), 4096)
        arrived.append(batch.to(card))
    for batch, parts in zip(arrived, sent, strict=True):
        for tensor, part in zip(batch.tensors.values(), parts, strict=True):
            assert tensor.device.type == "cuda"
            assert torch.equal(tensor.cpu(), part)


def test_evaluation_and_generation_on_the_card(gpu: World) -> None:
    gpu.recipe(*NF4)
    train(gpu, "run")
    scored = gpu.spawn("eval", "run", "--split", "train", "--json")
    say_all(scored, 0)
    assert scored.json["peak_memory_bytes"] > 0
    on_cpu = gpu.spawn("eval", "run", "--split", "train", "--json", env={"CUDA_VISIBLE_DEVICES": ""})
    figures = [outcome.json["metrics"]["perplexity"]["tuned"] for outcome in (scored, on_cpu)]
    assert figures[0] == pytest.approx(figures[1], rel=0.1)
    answer = gpu.spawn("generate", "run", "--prompt", "what opens", "--compare-base", "--max-new-tokens", "4", "--json")
    say_all(answer, 0)


@pytest.mark.parametrize("name", ["none", "liger"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_kernels_of_a_card_compute_what_plain_ones_do(name: str, dtype: str) -> None:
    import torch

    from lorafit.contracts import Silent
    from lorafit.ops.kernel_choice import choose_kernels, has_liger
    from lorafit.ops.kernel_proof import prove_kernels
    from lorafit.ops.kernels import PLAIN

    if name == "liger" and not has_liger():
        pytest.skip("liger-kernel is not installed: pip install 'lorafit[liger]'")
    card, kind = torch.device("cuda", 0), getattr(torch, dtype)
    chosen = choose_kernels(name, card, kind, Silent())
    assert chosen.name == name
    assert prove_kernels(chosen, PLAIN, card, kind) == (chosen, {})
