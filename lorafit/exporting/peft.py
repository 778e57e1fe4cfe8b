"""`--to peft`: the adapter's folder as plain PEFT opens it, without places of this machine and lorafit's own files."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lorafit.errors import ModelError, NumericsError
from lorafit.exporting.exported import EngineProof, Exported
from lorafit.exporting.probes import probe_texts
from lorafit.exporting.source import Source
from lorafit.facts import CAUSAL_MODEL
from lorafit.files.atomic import atomic_dir
from lorafit.files.portable import is_local_path, portable
from lorafit.model.adapter import CONFIG, WEIGHTS, write_object

if TYPE_CHECKING:
    import torch

    from lorafit.contracts import JsonMapping

_BASE_NAME = "base_model_name_or_path"
_BOUND = 1e-5
"""Of `logits_distance`: the same weights in the same library; a scale that is folded into B is rounded once."""


def export(source: Source, output: Path) -> Exported:
    """Writes the folder."""
    require_provable(source)
    with atomic_dir(output, replace=output.exists(), lists_files=False) as folder:
        notes = write_clean(source, folder)
        proof = prove_peft(source, folder) if source.wish.verify else None
    return Exported("peft", output, notes, None, proof)


def base_name(source: Source) -> str | None:
    """The base's hub id; None where it came from elsewhere."""
    origin, written = source.base.origin, str(source.require_adapter().config.get(_BASE_NAME) or "")
    if origin.kind == "hub":
        return origin.name
    return written if source.card is None and written and not is_local_path(written) else None


def write_clean(
    source: Source,
    folder: Path,
    config: JsonMapping | None = None,
    tensors: Mapping[str, torch.Tensor] | None = None,
) -> list[str]:
    """Fills a folder with adapter, tokenizer, templates and generation settings; gives back what is to be known.

    Args:
        source: Whose they are.
        folder: Empty.
        config: Instead of the adapter's own.
        tensors: Instead of its own.
    """
    saved, name = source.require_adapter(), base_name(source)
    written = portable(dict(config or saved.config)) | {_BASE_NAME: name, "inference_mode": True}
    if name is None:
        written["revision"] = None
    write_object(folder / CONFIG, written)
    if tensors is None:
        shutil.copyfile(saved.path / WEIGHTS, folder / WEIGHTS)
    else:
        from safetensors.torch import save_file

        save_file(dict(tensors), str(folder / WEIGHTS), metadata={"format": "pt"})
    source.companions.write(folder)
    notes = []
    if name is None:
        what = f"the base, {source.base.shown}, has no hub id, so the adapter names none"
        notes.append(f"{what}: open it with PeftModel.from_pretrained(model, FOLDER)")
    if source.base.new_tokens:
        count = len(source.base.new_tokens)
        notes.append(f"the tokenizer has {count} new tokens: resize the base's embedding to it before PEFT opens this")
    return notes


def require_provable(source: Source) -> None:
    """Raises ModelError where `--verify` is asked of what is no causal model."""
    card = source.card
    if source.wish.verify and card is not None and card.model_class != CAUSAL_MODEL:
        what = "--verify compares logits of next tokens, and this model has another head"
        raise ModelError(what, key="--verify", todo="leave it out")


def prove_peft(source: Source, folder: Path) -> EngineProof:
    """The folder opened by plain transformers and PEFT, beside the adapter as lorafit opens it."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from lorafit.exporting.llama_cpp import load_exactly
    from lorafit.model.attach import open_adapter
    from lorafit.model.quiet import quiet_libraries
    from lorafit.ops.logits_distance import logits_distance

    tokenizer = source.voice.tokenizer
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"][:200] for text in probe_texts(source)[:6]]

    def logits(model: torch.nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return torch.cat([model(torch.tensor([row]), use_cache=False).logits[0].float() for row in rows])

    saved = source.require_adapter()
    own = logits(open_adapter(load_exactly(source.base, source), saved.path, base=source.base))
    with quiet_libraries():
        plain = AutoModelForCausalLM.from_pretrained(str(source.base.path), dtype=torch.float32)
        if source.base.new_tokens:
            plain.resize_token_embeddings(len(tokenizer))
        theirs = logits(PeftModel.from_pretrained(plain, str(folder)).eval())
    proof = EngineProof(
        "PEFT",
        len(own),
        float((own - theirs).abs().max()),
        logits_distance(own, theirs),
        _BOUND,
        float((own.argmax(-1) == theirs.argmax(-1)).double().mean()),
    )
    if not proof.distance <= _BOUND:
        raise NumericsError(proof.describe(), todo="nothing was kept; please report this adapter")
    return proof
