"""`--to gguf-lora`: the adapter alone, as a file that llama.cpp puts on a GGUF of its base."""

from __future__ import annotations

import shlex
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from lorafit.errors import ModelError
from lorafit.exporting.architectures import Architecture
from lorafit.exporting.exported import EngineProof, Exported
from lorafit.exporting.factors import FoldedAdapter
from lorafit.exporting.gguf import write_model
from lorafit.exporting.gguf_file import GgufTensor, write_gguf
from lorafit.exporting.llama_cpp import prove_adapter, require_llama_cpp
from lorafit.exporting.source import Source
from lorafit.files.atomic import TEMPORARY_PREFIX, atomic_file
from lorafit.files.safetensors import read_index

if TYPE_CHECKING:
    from gguf import GGUFWriter


def export(source: Source, output: Path) -> Exported:
    """Writes the file."""
    if source.wish.verify:
        require_llama_cpp()
    with atomic_file(output) as file:
        notes = write_adapter(source, file)
        proof = prove(source, file) if source.wish.verify else None
    command = shlex.join(["llama-server", "-m", "BASE.gguf", "--lora", str(output)])
    return Exported("gguf-lora", output, notes, command, proof)


def write_adapter(source: Source, file: Path) -> list[str]:
    """Writes an adapter as GGUF; gives back what was changed for llama.cpp, and what its base must be."""
    saved, base = source.require_adapter(), source.base
    architecture = Architecture.of(base.config, base.shown)
    entries = read_index(base.path)
    adapter = FoldedAdapter(saved, entries, "own", "a GGUF adapter")
    lost = [path for path in adapter.paths if f"{path}.weight" not in entries]
    if lost or (base.config.get("tie_word_embeddings") and "lm_head" in adapter.paths):
        what = f"a GGUF of the base has no tensor '{(lost or ['lm_head'])[0]}' of its own to put an adapter on"
        raise ModelError(what, file=str(saved.path), todo="merge it: --to gguf")
    names = architecture.name_tensors([f"{path}.weight" for path in adapter.paths], base.shown)
    tensors = []
    for layer in adapter.layers:
        name = names[f"{layer.path}.weight"]
        turned = architecture.heads_turned(layer.path)
        tensors += [GgufTensor(f"{name}.lora_a", layer.a), GgufTensor(f"{name}.lora_b", layer.b, turned)]

    def describe(writer: GGUFWriter) -> None:
        import gguf

        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, adapter.alpha)
        writer.add_name(source.place.name)

    write_gguf(file, architecture.name, tensors, "f32", describe, source.reporter)
    return [*_folded(adapter), *_of_the_base(source)]


def prove(source: Source, file: Path) -> EngineProof:
    """Compares it on an f32 GGUF of its base, which is made for the while."""
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=TEMPORARY_PREFIX) as place:
        base = Path(place) / "base.gguf"
        write_model(source, source.base.path, base, "f32", is_proven=False)
        return prove_adapter(base, file, source)


def _folded(adapter: FoldedAdapter) -> list[str]:
    if not adapter.folded:
        return []
    what = f"the scale of {adapter.folded} of {len(adapter.paths)} layers is in their B"
    return [f"{what}: llama.cpp computes alpha / rank, and knows no rsLoRA and no patterns"]


def _of_the_base(source: Source) -> list[str]:
    """What a GGUF of the base must be for the adapter to answer as it was trained."""
    only = f"put it on a GGUF of {source.base.origin.name}, and of no other model"
    return [only, *source.note_quantised("--to gguf merges into those")]
