"""`--to peft`: the adapter's folder as plain PEFT opens it, without places of this machine and lorafit's own files."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lorafit.errors import ModelError, NumericsError
from lorafit.exporting.exported import EngineProof, Exported
from lorafit.exporting.probes import probe_texts
from lorafit.exporting.readme import note_quantised, write_readme
from lorafit.exporting.source import BASE_NAME, Source
from lorafit.facts import CAUSAL_MODEL
from lorafit.files.atomic import atomic_dir
from lorafit.files.portable import portable
from lorafit.model.adapter import CONFIG, WEIGHTS, write_object

if TYPE_CHECKING:
    import torch

    from lorafit.contracts import JsonMapping

_BOUND = 1e-5
"""Of `logits_distance`: the same weights in the same library; a scale that is folded into B is rounded once."""


def export(source: Source, output: Path) -> Exported:
    """Writes the folder."""
    require_provable(source)
    with atomic_dir(output, replace=output.exists(), lists_files=False) as folder:
        notes = [*write_clean(source, folder), *note_quantised(source)]
        write_readme(source, folder)
        proof = prove_peft(source, folder) if source.wish.verify else None
    return Exported("peft", output, notes, None, proof)


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
    saved, name = source.require_adapter(), source.base_id
    written = portable(dict(config or saved.config)) | {BASE_NAME: name, "inference_mode": True}
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
        what = f"the base, {source.base.origin.name}, has no hub id, so adapter_config.json names none"
        notes.append(f"{what}: README.md says which it is; --base-id gives an id")
    elif source.is_base_stated:
        notes.append(f"that the base is {name} is stated by --base-id, and was not compared")
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
        "the base as its files have it",
        len(own),
        float((own - theirs).abs().max()),
        logits_distance(own, theirs),
        _BOUND,
        float((own.argmax(-1) == theirs.argmax(-1)).double().mean()),
    )
    if not proof.distance <= _BOUND:
        raise NumericsError(proof.describe(), todo="nothing was kept; please report this adapter")
    return proof
