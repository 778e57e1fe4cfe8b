"""README.md of an exported adapter: which base it belongs to, how to have that base, and lines that ask it something.

Nothing of it names a place on this machine. A base that is not on the hub is the folder `BASE` in all lines, and where
it came from a GGUF file the first lines make that folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from lorafit.exporting.source import Source
from lorafit.facts import CAUSAL_MODEL, SEQ2SEQ_CLASS
from lorafit.kinds.quantizations import quantizations
from lorafit.machine.version import __version__
from lorafit.model.gguf import PACKAGE_SCHEME
from lorafit.model.low_rank import method_of
from lorafit.model.tokenizer_files import DEFAULT
from lorafit.ops.dtypes import dtype_named

BASE = "BASE"
"""What a base without a hub id is called."""
_SEES = "AutoModelForImageTextToText"


def write_readme(source: Source, folder: Path, served: str | None = None) -> None:
    """Writes README.md of a folder that is no repository of the hub.

    Args:
        source: Whose it is.
        folder: Of the adapter.
        served: The command that serves it.
    """
    serving = "" if served is None else "## Serve\n\n" + _code("bash", [served])
    parts = [f"# {source.place.name}", say_what(source), say_base(source, "."), serving, say_use(source, ".")]
    (folder / "README.md").write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")


def say_what(source: Source) -> str:
    """The method, the base, what proves it, and how it was held in training."""
    origin, named, card = source.base.origin, source.base_id, source.card
    known = f"[{named}](https://huggingface.co/{named})" if named else f"`{origin.name}`, which is not on the hub"
    said = [f"An adapter ({method_of(source.require_adapter())}) on {known}, exported with lorafit {__version__}."]
    if source.is_base_stated:
        said.append(
            f"That this is its base is stated by its author and was not compared: it was trained on `{origin.name}`."
        )
    if origin.digest:
        said.append(
            f"Fingerprint of the base that it was trained on (SHA-256 of config and weights): `{origin.digest}`."
        )
    if card is not None and card.quantization.kind != "none":
        said.append(f"In training the base was held in {card.quantization.kind} and computed in {card.compute_dtype}.")
    return " ".join(said)


def say_base(source: Source, adapter: str) -> str:
    """How to have a base that the hub does not have; empty where it has it."""
    origin = source.base.origin
    if source.base_id is not None:
        return ""
    if origin.kind not in ("package", "gguf"):
        return f"## Base\n\n`{BASE}` below is the folder of {origin.name}."
    package, _, file = origin.name.removeprefix(PACKAGE_SCHEME).partition("/")
    place, about = f'find_spec("{package}").submodule_search_locations[0]', f"of the Python package `{package}`"
    if origin.kind == "gguf":
        place, file, about = '"."  # its folder', origin.name, "a GGUF file"
    auto = _auto_class(source)
    lines = [
        *(["from importlib.util import find_spec"] * (origin.kind == "package")),
        f"from transformers import {auto}, AutoTokenizer, GgufConfig",
        "",
        f"place = {place}",
        f'kept = {{"dtype": "{_written_dtype(source)}", "quantization_config": GgufConfig(dequantize=True)}}',
        f'base = {auto}.from_pretrained(place, gguf_file="{file}", **kept)',
        f'base.save_pretrained("{BASE}")',
        f'AutoTokenizer.from_pretrained("{adapter}").save_pretrained("{BASE}")',
    ]
    made = f"With transformers {version('transformers')} these lines make the folder `{BASE}` of it"
    return f"## Base\n\n`{file}` {about}. {made}:\n\n{_code('python', lines)}"


def say_use(source: Source, adapter: str) -> str:
    """Lines that open base and adapter as they were trained, and print an answer.

    Args:
        source: Whose it is.
        adapter: What the lines open: a repository, or a folder.
    """
    card, auto = source.card, _auto_class(source)
    words = "AutoProcessor" if auto == _SEES else "AutoTokenizer"
    config = {} if card is None else card.model_class.config
    packed = _packed(source)
    dtype = "" if card is None else f", dtype={dtype_named(card.dtype)}"
    imported = [auto, words, *(["BitsAndBytesConfig"] if packed else [])]
    lines = [
        *(["import torch"] if dtype else []),
        "from peft import PeftModel",
        f"from transformers import {', '.join(sorted(imported))}",
        "",
        f'base, adapter = "{source.base_id or BASE}", "{adapter}"',
        f"tokenizer = {words}.from_pretrained(adapter)",
        *([f"packed = BitsAndBytesConfig({packed})"] if packed else []),
        f"model = {auto}.from_pretrained(base{dtype}{', quantization_config=packed' if packed else ''}"
        + "".join(f", {key}={value!r}" for key, value in config.items())
        + ")",
        *(["model.resize_token_embeddings(len(tokenizer))"] if source.base.new_tokens else []),
        "model = PeftModel.from_pretrained(model, adapter).eval()",
        "",
        *_asked(source, auto),
    ]
    return f"## Use\n\n{_code('python', lines)}"


def note_quantised(source: Source) -> list[str]:
    """What is to be known of a base that was quantised, and who opens it so."""
    return source.note_quantised(f"{'README.md' if _packed(source) else 'lorafit generate'} opens the base so")


def _auto_class(source: Source) -> str:
    return (CAUSAL_MODEL if source.card is None else source.card.model_class).auto_class


def _written_dtype(source: Source) -> str:
    """Of the base's files."""
    return str(source.base.config.get("dtype") or source.base.config.get("torch_dtype") or "auto")


def _packed(source: Source) -> str:
    """Arguments of a BitsAndBytesConfig that stores the base as training did; empty where it does not, or cannot."""
    card = source.card
    if card is None:
        return ""
    kind = quantizations.bind(card.quantization)
    found = kind.transformers_config(dtype_named(card.compute_dtype), [])
    if found is None or kind.of("") is not kind:  # several kinds in one model: transformers has no word for that
        return ""
    names = [name for name in vars(found) if name.startswith(("_load_in_", "bnb_4bit_"))]
    given = {name.removeprefix("_"): getattr(found, name) for name in names if name != "bnb_4bit_quant_storage"}
    is_four_bit = bool(given.get("load_in_4bit"))
    kept = {name: value for name, value in given.items() if value and (is_four_bit or name == "load_in_8bit")}
    return ", ".join(f"{name}={value!r}" for name, value in kept.items())


def _asked(source: Source, auto: str) -> list[str]:
    """Lines behind those that open it."""
    card, verbatim = source.card, ['inputs = tokenizer("A text of yours.", return_tensors="pt").to(model.device)']
    is_chat = source.companions.templates.get(DEFAULT) is not None if card is None else card.chat
    if auto not in (CAUSAL_MODEL.auto_class, SEQ2SEQ_CLASS, _SEES):
        head = {} if card is None else card.model_class.config
        is_number = head.get("num_labels") == 1 or head.get("problem_type") == "regression"  # one: a reward
        shares = ".sigmoid()" if head.get("problem_type") == "multi_label_classification" else ".softmax(-1)"
        return [*verbatim, f"print(model(**inputs).logits{'' if is_number else shares})"]
    content = '[{"type": "text", "text": "What can you do?"}]' if auto == _SEES else '"What can you do?"'
    rendered = "messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors"
    asking = [
        f'messages = [{{"role": "user", "content": {content}}}]',
        f'inputs = tokenizer.apply_chat_template({rendered}="pt").to(model.device)',
    ]
    ends = (source.companions.generation or {}).get("eos_token_id")
    stop = "" if ends is None else f", eos_token_id={ends}"
    new = "answer[0]" if auto == SEQ2SEQ_CLASS else 'answer[0, inputs["input_ids"].shape[1] :]'
    return [
        *(asking if is_chat else verbatim),
        f"answer = model.generate(**inputs, max_new_tokens=64, do_sample=False{stop})",
        f"print(tokenizer.decode({new}, skip_special_tokens=True))",
    ]


def _code(language: str, lines: Sequence[str]) -> str:
    return "\n".join([f"```{language}", *lines, "```"])
