"""The small worlds of the integration tests on a CUDA device; without one every test here is skipped."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.conftest import shared_cache, tiny_base, world
from tests.support.tiny_model import make_base, tiny_llama
from tests.support.world import World, say_all

__all__ = ["shared_cache", "tiny_base", "world"]

# cuBLAS's workspace counts as allocated memory and would be most of a small model's; a fixed one is also deterministic.
CUBLAS = {"CUBLAS_WORKSPACE_CONFIG": ":16:8", "CUBLASLT_WORKSPACE_SIZE": "128"}
NF4 = (("  dtype: fp32", "  dtype: bf16"), ("  quantization: none", "  quantization: nf4"))


@pytest.fixture(autouse=True)
def _needs_cuda() -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device")


@pytest.fixture
def gpu(world: World, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """The integration tests' world; its commands run in processes of their own and find the card."""
    world.environment.update(CUBLAS)
    world.environment.pop("CUDA_VISIBLE_DEVICES", None)
    yield world


@pytest.fixture(scope="session")
def larger_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 26 million parameters with the tiny one's tokenizer: large beside what CUDA takes anyway."""
    import torch

    folder = make_base(tmp_path_factory.mktemp("larger") / "base")
    small = json.loads((folder / "config.json").read_text())
    model = tiny_llama(
        **{key: small[key] for key in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")},
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=512,
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def train(world: World, output: str, *flags: str, device: str = "cuda") -> list[dict[str, Any]]:
    """Trains into `output` and gives the lines of its log; `device="cpu"` hides the card."""
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    say_all(world.spawn("train", "r.yaml", "--output", output, *flags, env=hidden), 0)
    resolved = json.loads((world.root / output / "plan.json").read_text())
    assert resolved["device_kind"] == device
    return log_of(world.root / output)


def log_of(run: Path) -> list[dict[str, Any]]:
    """A run's steps."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line and "evaluation" not in line]
