"""What lies beside weights so that a folder speaks as it was trained: tokenizer, chat templates, generation settings.

    tokenizer.json, tokenizer_config.json, ...     as the base has them, templates and local paths taken out
    chat_template.jinja                            the template called `default`
    additional_chat_templates/NAME.jinja           the others
    generation_config.json                         with every token that ends an answer

Plain files only, read without transformers: a merge needs them before anything heavy is imported.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lorafit.console.wording import first_line
from lorafit.contracts import JsonMapping, JsonObject
from lorafit.errors import ModelError
from lorafit.files.portable import portable
from lorafit.files.strict_json import JsonError, read_object_file

TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_JSON = "tokenizer.json"
TEMPLATE = "chat_template.jinja"
MORE_TEMPLATES = "additional_chat_templates"
GENERATION = "generation_config.json"
OF_DECODERS = (
    *("decoder_start_token_id", "forced_bos_token_id"),
    *("bad_words_ids", "suppress_tokens", "begin_suppress_tokens"),
)
"""Settings there that say how an encoder-decoder was trained to begin, and what it never writes."""
DEFAULT = "default"
TOKENIZER_PATTERNS = (
    *("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.spm", "spiece.model"),
    *("sentencepiece*.model", "*.tiktoken", "tekken.json"),
)
"""Files of every kind of tokenizer that transformers reads."""
PROCESSOR_PATTERNS = ("*processor_config.json",)
"""Files that make a processor of images of a tokenizer."""
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
_TODO = "get the file again, or remove the tokenizer files of this folder to take the base's"


@dataclass(frozen=True)
class TokenizerFolder:
    """The tokenizer, templates and generation settings in a folder, as files.

    Attributes:
        path: The folder.
        follows_links: Whether files that are links out of the folder count: they do in a base, which the user chose,
            and not in an adapter, which may come from anybody.
    """

    path: Path
    follows_links: bool = False

    def files(self, patterns: Sequence[str] = TOKENIZER_PATTERNS) -> list[Path]:
        """The tokenizer's files, or others, in order."""
        found = {file for pattern in patterns for file in self.path.glob(pattern)}
        return sorted(file for file in found if self._has(file))

    def has_tokenizer(self) -> bool:
        """Whether a whole tokenizer is there, and not only settings of one."""
        return any(file.name in _VOCABULARIES for file in self.files())

    def ignored_links(self) -> list[str]:
        """Names of files that would count if they were no links."""
        patterns = (*TOKENIZER_PATTERNS, TEMPLATE, GENERATION, MORE_TEMPLATES, f"{MORE_TEMPLATES}/*.jinja")
        found = {file for pattern in patterns for file in self.path.glob(pattern)}
        return sorted(file.relative_to(self.path).as_posix() for file in found if not self._counts(file))

    def templates(self) -> dict[str, str]:
        """Chat templates by name, as transformers finds them: files first, else those in the tokenizer's config.

        Raises:
            ModelError: A file cannot be read.
        """
        found: dict[str, str] = {}
        default, more = self.path / TEMPLATE, self.path / MORE_TEMPLATES
        if self._has(default):
            found[DEFAULT] = _read_text(default)
        if more.is_dir() and self._counts(more):
            files = [file for file in sorted(more.glob("*.jinja")) if self._has(file)]
            found |= {file.name.removesuffix(".jinja"): _read_text(file) for file in files}
        written = None if found else self.settings().get("chat_template")
        if isinstance(written, str):
            return {DEFAULT: written}
        if isinstance(written, list):
            pairs = [(entry.get("name"), entry.get("template")) for entry in written if isinstance(entry, dict)]
            return {name: text for name, text in pairs if isinstance(name, str) and isinstance(text, str)}
        return found

    def settings(self) -> JsonObject:
        """tokenizer_config.json; empty where there is none.

        Raises:
            ModelError: It is no JSON object.
        """
        return self._object(TOKENIZER_CONFIG) or {}

    def generation(self) -> JsonObject | None:
        """generation_config.json; None where there is none.

        Raises:
            ModelError: It is no JSON object.
        """
        return self._object(GENERATION)

    def digest(self) -> str:
        """SHA-256 of what the tokenizer does: its rules and vocabulary, whoever wrote the file and how."""
        rules = self._object(TOKENIZER_JSON)
        if rules is not None:
            kept = {key: value for key, value in rules.items() if key not in ("padding", "truncation")}
            return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
        digest = hashlib.sha256()
        for vocabulary in (file for file in self.files() if file.name != TOKENIZER_CONFIG):
            digest.update(vocabulary.name.encode() + vocabulary.read_bytes())
        return digest.hexdigest()

    def is_same_tokenizer(self, other: TokenizerFolder) -> bool:
        """Whether both do the same. Equal bytes are found without reading them as JSON, which takes memory."""
        mine, theirs = self.path / TOKENIZER_JSON, other.path / TOKENIZER_JSON
        if self._has(mine) and other._has(theirs) and mine.read_bytes() == theirs.read_bytes():
            return True
        return self.digest() == other.digest()

    def vocabulary(self) -> dict[str, int]:
        """Token ids by token, after every file was read; empty where there is no tokenizer.json.

        Raises:
            ModelError: A file cannot be read.
        """
        for name in (TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json"):
            self._object(name)
        file = self.path / TOKENIZER_JSON
        if not self._has(file):
            return {}
        from tokenizers import Tokenizer

        try:
            return Tokenizer.from_file(str(file)).get_vocab(with_added_tokens=True)
        except BaseException as error:  # Rust's panics are no Exception
            if isinstance(error, (KeyboardInterrupt, SystemExit, MemoryError)):
                raise
            raise ModelError(
                f"the tokenizer cannot be read: {first_line(error)}", file=str(file), todo=_TODO
            ) from error

    def copy_to(self, target: Path, tokenizer_class: str | None = None) -> None:
        """Copies the tokenizer: its config without templates, which have files of their own, and without local paths.

        Args:
            target: The folder.
            tokenizer_class: Goes into the config where that names none.
        """
        for file in self.files():
            if file.name != TOKENIZER_CONFIG:
                shutil.copyfile(file, target / file.name)
        settings = {key: value for key, value in portable(self.settings()).items() if key != "chat_template"}
        if tokenizer_class is not None:
            settings.setdefault("tokenizer_class", tokenizer_class)
        if settings:
            write_object(target / TOKENIZER_CONFIG, settings)

    def _object(self, name: str) -> JsonObject | None:
        file = self.path / name
        return read_object(file) if self._has(file) else None

    def _has(self, file: Path) -> bool:
        return file.is_file() and self._counts(file)

    def _counts(self, file: Path) -> bool:
        """Whether a path belongs to the folder: it is no link, or one into the hub cache that the folder lies in.

        models--ORG--NAME/snapshots/COMMIT/tokenizer.json -> models--ORG--NAME/blobs/SHA
        """
        if self.follows_links or not file.is_symlink():
            return True
        target = file.resolve()
        return any(parent / "blobs" == target.parent for parent in self.path.resolve().parents[:2])


@dataclass(frozen=True)
class Companions:
    """What a folder of weights gets beside them.

    Attributes:
        tokenizer: Where the tokenizer is copied from; None where there is none.
        templates: Text of each chat template by name.
        generation: generation_config.json; None where none is written.
        tokenizer_class: Name of the tokenizer's class, for where its config does not say it.
        processor: Files of the processor of a model that reads images.
    """

    tokenizer: TokenizerFolder | None
    templates: Mapping[str, str]
    generation: JsonMapping | None
    tokenizer_class: str | None = None
    processor: Sequence[Path] = ()

    def write(self, folder: Path) -> None:
        """Puts them into `folder`, which holds none of them yet."""
        if self.tokenizer is not None:
            self.tokenizer.copy_to(folder, self.tokenizer_class)
        for file in self.processor:
            shutil.copyfile(file, folder / file.name)
        write_templates(folder, self.templates)
        if self.generation is not None:
            write_object(folder / GENERATION, portable(dict(self.generation)))


def end_with(
    settings: JsonMapping | None, config: JsonMapping, ends: Iterable[int], begins: JsonMapping | None = None
) -> JsonObject:
    """Generation settings in which every one of `ends` ends an answer, beside those that did already.

    Args:
        settings: The base's generation_config.json; None where it has none.
        config: The base's config.json, which stands in for it.
        ends: Token ids: the tokenizer's end token, and what the chat template writes behind an answer.
        begins: Settings by which an encoder-decoder begins in the run's language.
    """
    known = {key: value for key, value in (settings or {}).items() if key != "_from_model_config"}
    if settings is None:
        text = {**config, **(config.get("text_config") or {})}
        names = ["bos_token_id", "eos_token_id", "pad_token_id"]
        names += OF_DECODERS if config.get("is_encoder_decoder") else ()
        known = {name: text[name] for name in names if text.get(name) is not None}
    written = known.get("eos_token_id")
    before = written if isinstance(written, list) else [] if written is None else [written]
    return {**known, **(begins or {}), "eos_token_id": list(dict.fromkeys([*before, *ends]))}


def write_templates(folder: Path, templates: Mapping[str, str]) -> None:
    """Writes chat templates where transformers looks for them.

    Raises:
        ModelError: A name would lead out of the folder.
    """
    for name, text in templates.items():
        file = folder / TEMPLATE
        if name != DEFAULT:
            if not name or Path(name).name != name or name.startswith("."):
                raise ModelError(f"'{name}' is no name of a chat template", key="chat_template", todo="rename it")
            (folder / MORE_TEMPLATES).mkdir(exist_ok=True)
            file = folder / MORE_TEMPLATES / f"{name}.jinja"
        file.write_bytes(text.encode("utf-8"))


def digest_templates(templates: Mapping[str, str]) -> str:
    """SHA-256 of chat templates: of the text where there is one, else of names and texts."""
    text = templates[DEFAULT] if templates.keys() == {DEFAULT} else json.dumps(dict(templates), sort_keys=True)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def read_object(file: Path) -> JsonObject:
    """A JSON object from a model folder.

    Raises:
        ModelError: It is missing, too large, not UTF-8, no JSON, nested too deep, or no object.
    """
    try:
        return read_object_file(file, constants=True)
    except JsonError as error:
        raise ModelError(f"cannot be read: {error.what}", file=str(file), todo=_TODO) from error


def write_object(file: Path, value: JsonMapping) -> None:
    """Writes a JSON object."""
    file.write_bytes((json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n").encode("utf-8"))


def _read_text(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8")
    except (UnicodeDecodeError, OSError) as error:
        raise ModelError(f"cannot be read ({type(error).__name__})", file=str(file), todo=_TODO) from error
