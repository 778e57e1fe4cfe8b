"""`--to vllm`: the adapter as vLLM reads it, what it would read wrongly mended, and the command that serves it.

vLLM reads r, lora_alpha and use_rslora of adapter_config.json. Patterns of ranks and alphas it drops without a word;
DoRA and modules_to_save it refuses.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from lorafit.contracts import JsonObject
from lorafit.errors import ModelError
from lorafit.exporting.exported import Exported
from lorafit.exporting.factors import FoldedAdapter
from lorafit.exporting.peft import prove_peft, require_provable, write_clean
from lorafit.exporting.readme import BASE, write_readme
from lorafit.exporting.source import Source
from lorafit.files.atomic import atomic_dir
from lorafit.files.safetensors import read_index
from lorafit.model.low_rank import method_of
from lorafit.model.tokenizer_files import TEMPLATE

_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What `--max-lora-rank` may be. Source: vllm.config.lora, MaxLoRARanks."""
_OF_ANY_TYPE = ("task_type", "base_model_name_or_path", "revision", "fan_in_fan_out")


def export(source: Source, output: Path) -> Exported:
    """Writes the folder."""
    require_provable(source)
    saved = source.require_adapter()
    adapter = FoldedAdapter(saved, read_index(source.base.path), "one", "vLLM")
    if adapter.rank > _RANKS[-1]:
        what = f"vLLM takes ranks up to {_RANKS[-1]}, and the adapter's is {adapter.rank}"
        todo = f"make it smaller with lorafit trim --rank {_RANKS[-1]}, or merge it"
        raise ModelError(what, file=str(saved.path), todo=todo)
    with atomic_dir(output, replace=output.exists(), lists_files=False) as folder:
        notes = write_clean(source, folder, _config(source, adapter), adapter.by_name())
        write_readme(source, folder, _command(source, adapter.rank, source.base_id or BASE, folder, Path()))
        proof = prove_peft(source, folder) if source.wish.verify else None
    base = source.base_id or (str(source.base.path) if source.base.origin.kind == "folder" else BASE)
    if base == BASE:
        notes.append(f"{BASE} in the command is a folder of the base, which README.md makes; or serve a merge")
    command = _command(source, adapter.rank, base, output, output)
    return Exported("vllm", output, [*_mended(source, adapter), *notes], command, proof)


def _command(source: Source, rank: int, base: str, folder: Path, called: Path) -> str:
    """What serves a base with the adapter in a folder that has that name where the command is given."""
    most = next(known for known in _RANKS if known >= rank)
    words = ["vllm", "serve", base, "--enable-lora", "--max-lora-rank", str(most)]
    words += ["--lora-modules", f"{source.place.name}={called}"]
    if (folder / TEMPLATE).is_file():
        words += ["--chat-template", str(called / TEMPLATE)]
    return shlex.join(words)


def _config(source: Source, adapter: FoldedAdapter) -> JsonObject:
    saved, alpha = source.require_adapter(), adapter.alpha
    entries, own = read_index(source.base.path), set(adapter.paths)
    ends = {path.rpartition(".")[2] for path in own}
    alike = {
        name.removesuffix(".weight") for name in entries if name.removesuffix(".weight").rpartition(".")[2] in ends
    }
    is_lora = saved.config["peft_type"] == "LORA"  # the others' keys say nothing of a LoRA
    return {
        **(saved.config if is_lora else {key: saved.config.get(key) for key in _OF_ANY_TYPE}),
        "peft_type": "LORA",
        "r": adapter.rank,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "target_modules": sorted(ends if alike <= own else own),
        "layers_to_transform": None,
        "layers_pattern": None,
        "exclude_modules": None,
        "init_lora_weights": True,
    }


def _mended(source: Source, adapter: FoldedAdapter) -> list[str]:
    """What differs from the trained folder, and what vLLM does that training did not."""
    saved = source.require_adapter()
    config, notes = saved.config, []
    if config["peft_type"] != "LORA":
        notes.append(f"{method_of(saved)} is written as plain LoRA: what it adds is a product of two matrices")
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        what = f"ranks or scales differ from layer to layer, which vLLM ignores: all have rank {adapter.rank} now"
        notes.append(f"{what}, filled up with zeros, and their scales are in B")
    if config.get("use_rslora"):
        notes.append(f"rsLoRA's scale is in lora_alpha, {adapter.alpha:g}, and B")
    notes += source.note_quantised("lorafit merge writes what was trained on, and vLLM serves that as it is")
    if source.companions.templates:
        notes.append("the template is the trained one: without --chat-template vLLM takes the base's")
    return notes
