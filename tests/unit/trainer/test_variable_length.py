"""The road of packed rows through transformers to a variable-length kernel, whose place a plain loop takes here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import modeling_flash_attention_utils as flash

from lorafit.data.packing import Cutter
from lorafit.errors import NumericsError
from lorafit.kinds.tasks import tasks
from lorafit.trainer.startup_proofs import prove_separation
from tests.support.tiny_run import PAD, Rows
from tests.unit.trainer.test_packing_parity import build, gradients, same

CAUSAL_LM = tasks.make("causal-lm")


def attend(
    q: Any, k: Any, v: Any, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False
) -> torch.Tensor:
    """As `flash_attn_func`: [batch, seq, heads, head_dim]."""
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    out = scaled_dot_product_attention(q, k, v, is_causal=causal, scale=softmax_scale, enable_gqa=True)
    return out.transpose(1, 2)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Stands where the flash-attn package would; notes where the documents of each call begin and end."""
    ends: list[list[int]] = []

    def attend_each(
        q: Any,
        k: Any,
        v: Any,
        cu_seqlens_q: torch.Tensor,
        cu_seqlens_k: torch.Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
    ) -> torch.Tensor:
        """As `flash_attn_varlen_func`: [tokens, heads, head_dim]."""
        ends.append(cu_seqlens_q.tolist())
        assert cu_seqlens_k.tolist() == ends[-1]
        sizes = cu_seqlens_q.diff().tolist()
        parts = zip(*(tensor.split(sizes) for tensor in (q, k, v)), strict=True)
        return torch.cat(
            [attend(*(t.unsqueeze(0) for t in part), dropout_p, softmax_scale, causal)[0] for part in parts]
        )

    monkeypatch.setattr(flash, "_lazy_imports", lambda *_, **__: (attend, attend_each, None, None, None))
    monkeypatch.setattr(flash, "_loaded_implementation", None)
    monkeypatch.setattr(flash, "_is_packed_sequence", lambda positions, rows: rows == 1 and asks_for(positions))
    return ends


def asks_for(positions: torch.Tensor | None) -> bool:
    """transformers asks the device in each layer where nobody told it: rows of one document hold none to keep apart."""
    assert positions is None or bool((positions.diff() == 1).all())
    return False


def with_flash(kind: str) -> Any:
    """The model with the implementation's name set; transformers refuses to set it where the package is missing."""
    objective = build(kind, "eager")
    objective.base.config._attn_implementation = "flash_attention_2"
    return objective


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3"])
def test_each_document_is_computed_by_itself(kind: str, kernel: list[list[int]]) -> None:
    rows, objective = Rows(16), with_flash(kind)
    prove_separation(objective, [rows[0], rows[1]], PAD, one_row=True)
    assert not objective.masks_documents
    kernel.clear()
    cutter = Cutter(rows, CAUSAL_LM, PAD, packing=True, attention="flash_attention_2")
    parts = cutter.cut(range(16), 160)
    packed = gradients(objective, parts, rows)
    lengths = [[rows.lengths[row] for row in documents] for ((*documents,),) in parts if len(documents) > 1]
    wanted = [torch.tensor([0, *own]).cumsum(0).tolist() for own in lengths]
    assert kernel == [ends for ends in wanted for _ in range(2)]  # two layers
    same(packed, gradients(build(kind, "eager"), [[[row]] for row in range(16)], rows))


def test_several_rows_of_documents_would_be_mixed_and_the_proof_sees_it(kernel: list[list[int]]) -> None:
    """Why a packed micro-batch is one row there: transformers looks for documents in batches of one row only."""
    rows = Rows(2)
    with pytest.raises(NumericsError, match="documents see each other"):
        prove_separation(with_flash("llama"), [rows[0], rows[1]], PAD, one_row=False)
