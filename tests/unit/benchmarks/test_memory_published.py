"""The check against other people's measurements: known rows, rows it has no words for, and files that are none."""

from __future__ import annotations

import csv
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FILE = Path(__file__).resolve().parents[3] / "benchmarks" / "memory_published.py"
# foundation-model-stack/fms-acceleration, scripts/benchmarks/refs: Mistral-7B LoRA on an A100, 4 rows of 4,096 tokens
KNOWN = {
    "id": "fms-lora", "source": "foundation-model-stack/fms-acceleration", "model_id": "mistralai/Mistral-7B-v0.1",
    "params_b": "7.242", "method": "lora-bf16", "quant": "none", "lora_r": "16",
    "target_modules": "q_proj+k_proj+v_proj+o_proj", "micro_batch": "4", "seq_len": "4096",
    "grad_checkpointing": "yes", "optimizer": "AdamW torch (foreach)",
    "compute_dtype": "bfloat16, no autocast, LoRA fp32", "attention": "flash_attention_2",
    "loss": "HF shift+contiguous fp32 CE (full logits)", "gpu": "A100-80GB", "measure": "max_memory_allocated",
    "peak_gib": "24.871", "notes": "transformers 4.48.1/peft 0.13.2/bnb 0.43.3", "n_gpus": "1",
}  # fmt: skip


@pytest.fixture(scope="module")
def published() -> ModuleType:
    spec = importlib.util.spec_from_file_location("memory_published", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["memory_published"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def write(path: Path, *rows: dict[str, str]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(KNOWN))
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.mark.parametrize(
    ("changes", "peak_gib"),
    [
        ({}, 24.871),
        ({"micro_batch": "8.0"}, 36.082),
        ({"method": "full-bf16", "lora_r": "", "target_modules": "all params",
          "compute_dtype": "bfloat16, no autocast"}, 67.46),
        ({"model_id": "NousResearch/Llama-2-70b-hf", "params_b": "68.98", "method": "qlora-nf4", "quant": "nf4+dq",
          "compute_dtype": "bfloat16 + autocast, LoRA fp32"}, 63.48),
        # experts are linears of their own in transformers 4, which bitsandbytes quantises
        ({"model_id": "mistralai/Mixtral-8x7B-Instruct-v0.1", "params_b": "46.7", "method": "qlora-nf4",
          "quant": "nf4+dq", "compute_dtype": "bfloat16 + autocast, LoRA fp32"}, 33.73),
        # litgpt, one row of 1,304 tokens, no checkpointing; bitsandbytes 0.41 holds the inputs of its linears
        ({"id": "litgpt-x", "model_id": "meta-llama/Llama-2-7b-hf", "params_b": "6.738", "lora_r": "8",
          "target_modules": "q+v", "micro_batch": "1", "seq_len": "1,304", "grad_checkpointing": "no",
          "compute_dtype": "bf16-true", "loss": "litgpt chunked lm_head(128)+chunked CE(128)"}, 19.837),
        ({"id": "litgpt-x", "model_id": "meta-llama/Llama-2-7b-hf", "params_b": "6.738", "lora_r": "8",
          "target_modules": "q+v", "micro_batch": "1", "seq_len": "1304", "grad_checkpointing": "no",
          "compute_dtype": "bf16-true", "loss": "litgpt chunked lm_head(128)+chunked CE(128)", "method": "qlora-nf4",
          "quant": "nf4+dq", "notes": "bnb 0.41.1 (saves input activation in MatMul4Bit)"}, 12.89),
        # torchtune, 2 rows of 4,096 tokens, compiled
        ({"id": "tt-x", "source": "pytorch/torchtune README.md", "model_id": "meta-llama/Llama-3.2-3B",
          "params_b": "3.213", "method": "full-bf16", "lora_r": "", "target_modules": "all params",
          "micro_batch": "2", "grad_checkpointing": "no", "optimizer": "AdamW bf16",
          "compute_dtype": "bf16, torch.compile", "loss": "full logits CE"}, 51.0),
    ],
    ids=["LoRA", "8 rows", "full", "70B", "Mixtral", "litgpt", "litgpt nf4", "torchtune"],
)  # fmt: skip
def test_published_runs_are_met(published: ModuleType, changes: dict[str, str], peak_gib: float) -> None:
    found = published.describe({**KNOWN, **changes, "peak_gib": str(peak_gib)})
    assert abs(found.error) < 0.10
    assert published.card_verdict(found).startswith("fits A100-80GB")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"method": "dora-bf16"}, "method 'dora-bf16'"),
        ({"quant": "awq"}, "quantisation 'awq'"),
        ({"model_id": "some/model"}, "no shape of some/model"),
        ({"model_id": ""}, "names no model"),
        ({"params_b": "13"}, "is said to have 13B"),
        ({"loss": "a loss of its own"}, "loss 'a loss of its own'"),
        ({"optimizer": "galore_adamw"}, "optimizer"),
        ({"target_modules": "w1"}, "match nothing"),
        ({"target_modules": "q_proj+lm_head"}, "trains lm_head"),
        ({"grad_checkpointing": ""}, "checkpointed"),
        ({"micro_batch": ""}, "micro_batch is missing"),
        ({"seq_len": "long"}, "seq_len 'long' is no number"),
        ({"peak_gib": "OOM"}, "peak_gib 'OOM' is no number"),
        ({"peak_gib": "nan"}, "out of range"),
        ({"lora_r": "-1"}, "out of range"),
        ({"n_gpus": "4"}, "4 GPUs"),
        ({"compute_dtype": "fp32"}, "fp32"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_is_not_described_is_listed_with_its_reason(
    published: ModuleType, changes: dict[str, str], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert published.main(write(tmp_path / "rows.csv", KNOWN, {**KNOWN, "id": "odd", **changes})) == 0
    shown = capsys.readouterr().out
    assert "1 of 2 rows described, 1 not" in shown
    assert reason in next(line for line in shown.splitlines() if "not described: odd" in line)


@pytest.mark.parametrize(
    ("gpu", "card"),
    [
        ("NVIDIA H100 80GB HBM3", "H100-80GB"), ("GeForce RTX 3090 24GB", "RTX-3090"), ("Tesla T4 16GB", "T4"),
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"), ("A100-40GB SXM4", "A100-40GB"), ("A10G 24GB", "A10G"),
        ("RTX4090 (24 GB)", "RTX-4090"), ("RTX 6000 Ada Generation", "RTX-6000-Ada"), ("A100", "A100-80GB"),
        ("unstated", None), ("", None),
    ],
)  # fmt: skip
def test_cards_as_people_write_them(published: ModuleType, gpu: str, card: str | None) -> None:
    found = published.find_any_card(gpu, 60 * 2**30 if gpu == "A100" else 10 * 2**30)
    assert (None if found is None else found["names"][0]) == card


def test_verdicts_at_both_headrooms(published: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cards: list[Any] = [{**KNOWN, "id": gpu, "gpu": gpu} for gpu in ("A100-80GB", "RTX-5090", "unstated", "T4")]
    needed = published.describe(KNOWN).needed_bytes / 2**30
    assert 31.3 * 0.8 < needed < 31.3
    published.main(write(tmp_path / "rows.csv", *cards))
    shown = capsys.readouterr().out
    assert "2 of the 3 runs on a known card fit it at headroom 0" in shown
    assert "DOES NOT FIT T4, BUT RAN" in shown and "card 'unstated' unknown" in shown
    size = published.usable_bytes(published.find_any_card("A100-80GB", 0))
    for needed_bytes, verdict in (
        (size * 0.95, "fits A100-80GB"), (size, "fits A100-80GB, refused by default"),
        (size + 1, "DOES NOT FIT A100-80GB, BUT RAN"),
    ):  # fmt: skip
        run = published.Described("x", "x", "allocated", "A100-80GB", 2**30, 2**30, needed_bytes)
        assert published.card_verdict(run) == verdict


@pytest.mark.parametrize("text", ["", "id,peak_gib\nx,12\ny\n", ",".join(KNOWN) + "\n"])
def test_short_files(published: ModuleType, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.csv"
    file.write_text(text)
    assert published.main(file) == 0
    assert "0 of" in capsys.readouterr().out


def test_what_is_no_file(published: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    for name in ("nothing.csv", "binary.csv"):
        with pytest.raises(SystemExit, match="cannot be read"):
            published.main(tmp_path / name)
