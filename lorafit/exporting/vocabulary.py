"""A run's tokenizer, special tokens and chat template as a GGUF's metadata.

GGUF files hold vocabulary and merges, and for how a text is split before them only the name of a rule that llama.cpp
knows. A tokenizer whose rule is none of those would be read as another one, so it is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafit.contracts import JsonMapping, JsonObject
from lorafit.errors import ModelError
from lorafit.model.tokenizer_files import DEFAULT, TOKENIZER_JSON, TokenizerFolder, read_object

if TYPE_CHECKING:
    from gguf import GGUFWriter

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_BYTES, _BYTES_OF_WORDS = ("ByteLevel", False), ("ByteLevel", True)
_RULES: dict[tuple[object, ...], tuple[str, tuple[str | None, ...], bool]] = {
    (_BYTES_OF_WORDS,): ("gpt-2", (None,), False),
    (("Digits", True), _BYTES_OF_WORDS): ("smollm", (None,), False),
    (("Split", _WORDS + r"\p{N}{1,3}" + _REST), _BYTES): ("llama-bpe", (None,), True),
    (("Split", _WORDS + r"\p{N}" + _REST), _BYTES): ("qwen2", ("NFC",), False),
}
"""By how a text is split: llama.cpp's name, the normaliser that goes with it, whether whole words need no merges."""


@dataclass(frozen=True)
class Vocabulary:
    """What a tokenizer.json says, in GGUF's words.

    Attributes:
        rule: `tokenizer.ggml.pre`.
        tokens: By id, as many as the model has rows.
        types: `gguf.TokenType` of each.
        merges: Pairs of tokens, in order.
        special: Ids by what they are: `bos`, `eos`, `unk`, `pad`, `eot`.
        adds_bos: Whether the engine puts the BOS before every text.
        template: The chat template; None without any.
    """

    rule: str
    tokens: Sequence[str]
    types: Sequence[int]
    merges: Sequence[str]
    special: dict[str, int]
    adds_bos: bool
    template: str | None

    @classmethod
    def of(cls, folder: Path, rows: int, ends: Sequence[int], *, adds_bos: bool) -> Vocabulary:
        """Reads a model's folder.

        Args:
            folder: With tokenizer.json, its settings and templates.
            rows: Of the embedding.
            ends: Tokens that end an answer.
            adds_bos: Whether the run's texts begin with a BOS that the chat template does not write.

        Raises:
            ModelError: There is no tokenizer.json, or llama.cpp has no rule that splits as this tokenizer does.
        """
        from gguf import TokenType

        files = TokenizerFolder(folder, follows_links=True)
        rule, written = require_rule(folder), read_object(folder / TOKENIZER_JSON)
        model = written["model"]
        vocabulary: dict[str, int] = model["vocab"]
        tokens = [f"[PAD{number}]" for number in range(rows)]
        types = [int(TokenType.UNUSED)] * rows
        for token, number in vocabulary.items():
            tokens[number], types[number] = token, int(TokenType.NORMAL)
        for added in written.get("added_tokens") or []:
            kind = TokenType.CONTROL if added.get("special") else TokenType.USER_DEFINED
            tokens[added["id"]], types[added["id"]] = added["content"], int(kind)
        if len(set(tokens)) < rows:
            raise _refused(folder, "has two tokens of one text")
        settings, known = files.settings(), {token: number for number, token in enumerate(tokens)}
        special = {
            name: known[text]
            for name in ("bos", "eos", "unk", "pad")
            if (text := _text(settings.get(f"{name}_token"))) in known
        }
        if ends and special.get("eos") not in ends:
            special["eos"] = ends[0]
        if others := [number for number in ends if number != special.get("eos")]:
            special["eot"] = others[0]
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model.get("merges") or []]
        return cls(rule, tokens, types, merges, special, adds_bos, files.templates().get(DEFAULT))

    def describe(self, writer: GGUFWriter) -> None:
        """Writes it."""
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.rule)
        writer.add_token_list(list(self.tokens))
        writer.add_token_types(list(self.types))
        if self.merges:
            writer.add_token_merges(list(self.merges))
        for name, number in self.special.items():
            write = {"unk": writer.add_unk_token_id, "pad": writer.add_pad_token_id, "bos": writer.add_bos_token_id}
            write |= {"eos": writer.add_eos_token_id, "eot": writer.add_eot_token_id}
            write[name](number)
        writer.add_add_bos_token(self.adds_bos)
        if self.template is not None:
            writer.add_chat_template(self.template)


def require_rule(folder: Path) -> str:
    """llama.cpp's name of how a folder's tokenizer splits text. Raises ModelError where it has none."""
    if not (folder / TOKENIZER_JSON).is_file():
        raise _refused(folder, "has no tokenizer.json")
    written = read_object(folder / TOKENIZER_JSON)
    model = written.get("model") or {}
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        kind = f"{model.get('type')} with bytes as a last resort" if model.get("byte_fallback") else model.get("type")
        raise _refused(folder, f"is of type {kind}, and only byte-level BPE is proven here")
    split = tuple(_step(step) for step in _flat(written.get("pre_tokenizer")))
    normal = tuple(step.get("type") for step in _flat(written.get("normalizer"))) or (None,)
    rule, normals, whole_words = _RULES.get(split, ("", (), False))
    if not rule or normal not in (normals, (None,)) or bool(model.get("ignore_merges")) != whole_words:
        raise _refused(folder, "splits text by a rule that llama.cpp has no name for")
    return rule


def _flat(step: Any) -> list[JsonObject]:
    if not isinstance(step, dict):
        return []
    parts = step.get("pretokenizers") or step.get("normalizers")
    return [inner for part in parts for inner in _flat(part)] if parts is not None else [step]


def _step(step: JsonMapping) -> object:
    """What a step does, without what decides nothing; the whole step where it is no kind that the rules name."""
    kind = step.get("type")
    if kind == "ByteLevel" and not step.get("add_prefix_space"):
        return kind, bool(step.get("use_regex", True))
    if kind == "Digits":
        return kind, bool(step.get("individual_digits"))
    if kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        return kind, (step.get("pattern") or {}).get("Regex")
    return repr(step)


def _text(token: Any) -> str | None:
    return token.get("content") if isinstance(token, dict) else token


def _refused(folder: Path, what: str) -> ModelError:
    todo = "use --to peft or --to vllm, or convert a merge with llama.cpp's own converter"
    return ModelError(f"the tokenizer {what}, so a GGUF of it might read text otherwise", file=folder.name, todo=todo)
