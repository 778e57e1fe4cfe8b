"""`--to gguf`: base and adapter merged, as one file of weights, tokenizer and chat template that llama.cpp loads."""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lorafit.exporting.architectures import ROPE_FACTORS, Architecture
from lorafit.exporting.exported import EngineProof, Exported
from lorafit.exporting.gguf_file import DataType, GgufTensor, require_type, write_gguf
from lorafit.exporting.llama_cpp import prove_gguf, require_llama_cpp
from lorafit.exporting.source import Source
from lorafit.exporting.vocabulary import Vocabulary, require_rule
from lorafit.files.atomic import TEMPORARY_PREFIX, atomic_file, make_folder
from lorafit.files.safetensors import read_index
from lorafit.model.base_config import load_config
from lorafit.model.tokenizer_files import TokenizerFolder

if TYPE_CHECKING:
    from gguf import GGUFWriter


def export(source: Source, output: Path) -> Exported:
    """Merges and writes the file."""
    data_type = require_type(source.wish.dtype)
    check(source)
    with merged(source, output) as model, atomic_file(output) as file:
        proof = write_model(source, model, file, data_type)
    notes = [f"weights in {data_type}; vectors in f32; chat template and tokenizer are in the file"]
    return Exported("gguf", output, notes, shlex.join(["llama-server", "-m", str(output)]), proof)


def check(source: Source) -> None:
    """Says before anything is merged what cannot be converted, and that the engine of `--verify` is missing."""
    if source.wish.verify:
        require_llama_cpp()
    Architecture.of(source.base.config, source.base.shown).name_tensors(read_index(source.base.path), source.base.shown)
    tokenizer = source.companions.tokenizer or TokenizerFolder(source.base.path)
    require_rule(tokenizer.path)


@contextmanager
def merged(source: Source, output: Path) -> Iterator[Path]:
    """The whole model's folder, merged for the while into a hidden folder beside the output."""
    make_folder(output.parent)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=TEMPORARY_PREFIX) as place:
        yield source.merge(Path(place) / "merged")


def write_model(
    source: Source, model: Path, file: Path, data_type: DataType, *, is_proven: bool = True
) -> EngineProof | None:
    """Writes a model's folder as GGUF, and compares logits where that is wished.

    Of narrower types the same in f32 is compared first, made for the while: rounding would hide a wrong number in the
    model's description, which nothing else reads back.
    """
    config, entries = load_config(model), read_index(model)
    if config.get("tie_word_embeddings"):
        entries.pop("lm_head.weight", None)
    architecture = Architecture.of(config, model.name)
    names = architecture.name_tensors(entries, model.name)
    tensors = [GgufTensor(names[name], entry, architecture.heads_turned(name)) for name, entry in entries.items()]
    if (factors := architecture.rope_factors()) is not None:
        tensors.append(GgufTensor(ROPE_FACTORS, factors))
    vocabulary = Vocabulary.of(model, int(config["vocab_size"]), source.ends, adds_bos=_adds_bos(source))

    def describe(writer: GGUFWriter) -> None:
        import gguf

        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(source.place.name)
        types = {"f32": gguf.LlamaFileType.ALL_F32, "f16": gguf.LlamaFileType.MOSTLY_F16}
        types |= {"bf16": gguf.LlamaFileType.MOSTLY_BF16, "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}
        writer.add_file_type(types[data_type])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        architecture.describe(writer)
        vocabulary.describe(writer)

    write_gguf(file, architecture.name, tensors, data_type, describe, source.reporter)
    if not (is_proven and source.wish.verify):
        return None
    if data_type == "f32":
        return prove_gguf(file, model, source, data_type)
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=TEMPORARY_PREFIX) as place:
        exact = write_model(source, model, Path(place) / "f32.gguf", "f32")
    assert exact is not None
    return replace(prove_gguf(file, model, source, data_type), exact=exact.distance)


def _adds_bos(source: Source) -> bool:
    """Whether the engine puts a BOS before every text: of a run on chats the template writes it, where there is one."""
    voice = source.voice
    if voice.chats is not None:
        return False
    ids = voice.tokenizer("a")["input_ids"]
    return bool(ids) and ids[0] == voice.tokenizer.bos_token_id
