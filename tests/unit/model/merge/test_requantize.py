"""Blocks of rows give the codes of the whole, for any shape, dtype and orientation."""

from __future__ import annotations

from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import save_file

from lorafit.files import safetensors
from lorafit.files.safetensors import TensorEntry, read_header, row_blocks
from lorafit.kinds.quantizations.four_bit import FourBitRows, hash_four_bit
from lorafit.kinds.quantizations.int8 import Int8Rows
from lorafit.model.merge.requantize import compare_proof


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors, "BLOCK_ELEMENTS", 5000)


def on_disk(tmp_path: Path, weight: torch.Tensor) -> TensorEntry:
    save_file({"w": weight.contiguous()}, tmp_path / "w.safetensors")
    return read_header(tmp_path / "w.safetensors")["w"]


def exact_values(packed: torch.Tensor, state: bnb.functional.QuantState) -> torch.Tensor:
    """code[q] * absmax, by the definition."""
    flat = packed.reshape(-1)
    codes = torch.stack([flat >> 4, flat & 15], dim=1).reshape(-1).long()[: state.shape.numel()]
    absmax = state.absmax
    if state.nested:
        absmax = bnb.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    scales = absmax.repeat_interleave(64)[: codes.numel()]
    return (state.code[codes] * scales).reshape(state.shape)


@pytest.mark.parametrize(
    "shape", [(192, 96), (100, 33), (77, 50), (512, 576), (31, 8), (1, 5000), (5, 96), (3, 20_000)]
)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bit_codes_and_values(tmp_path: Path, shape: tuple[int, int], transposed: bool, kind: str) -> None:
    for on_file, loaded, double in (
        (torch.bfloat16, torch.bfloat16, True),
        (torch.float32, torch.float16, True),
        (torch.float32, torch.float32, False),
    ):
        weight = torch.randn(shape).to(on_file)
        source = (weight.t() if transposed else weight).to(loaded).contiguous()
        whole = bnb.nn.Params4bit(source, quant_type=kind, compress_statistics=double).to("cpu")
        proof = hash_four_bit(whole.data, whole.quant_state) | {"transposed": transposed}
        rows = FourBitRows(on_disk(tmp_path, weight), kind, loaded, double, proof)
        assert compare_proof("w", rows.proof, proof, same_device=True) == 0
        wanted = exact_values(whole.data, whole.quant_state)
        got = torch.cat([rows.read(start, stop) for start, stop in row_blocks(*shape)])
        assert torch.equal(got, wanted.t() if transposed else wanted)
        seen = bnb.functional.dequantize_4bit(whole.data, whole.quant_state)
        assert transposed or shape[1] % 64 or torch.equal(got.to(loaded), seen), "rounded, not what training sees"
        assert torch.equal(rows.read(shape[0] // 2, shape[0]), got[shape[0] // 2 :])


@pytest.mark.parametrize("transposed", [False, True])
def test_int8_codes(tmp_path: Path, transposed: bool) -> None:
    weight = torch.randn(130, 70).to(torch.bfloat16)
    whole = bnb.nn.Int8Params(weight.t() if transposed else weight, requires_grad=False).to("cpu")
    rows = Int8Rows(on_disk(tmp_path, weight), torch.bfloat16, transposed=transposed)
    exact = whole.CB.float() * whole.SCB[:, None] / 127.0
    got = torch.cat([rows.read(start, stop) for start, stop in row_blocks(130, 70)])
    assert torch.allclose(got, exact.t() if transposed else exact, rtol=1e-6, atol=0.0)


def test_the_runs_offset_is_used(tmp_path: Path) -> None:
    weight = torch.randn(64, 64)
    entry = on_disk(tmp_path, weight)
    own = FourBitRows(entry, "nf4", torch.float32, True, {}).proof
    nudged = FourBitRows(entry, "nf4", torch.float32, True, {"offset": own["offset"] * 1.01}).proof
    assert nudged["codes"] == own["codes"] and nudged["nested"] != own["nested"]


def test_blocks_cover_all_rows_and_hold_whole_quantised_blocks() -> None:
    for rows, width in ((7, 33), (1, 1), (100, 64), (3, 100_000), (10_000, 1)):
        blocks = list(row_blocks(rows, width, multiple=64))
        assert [b for b, _ in blocks] == [0, *(e for _, e in blocks[:-1])] and blocks[-1][1] == rows
        assert all((stop - start) * width % 64 == 0 for start, stop in blocks[:-1])
