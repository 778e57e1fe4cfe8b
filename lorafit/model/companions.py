"""What a merged folder gets beside its weights: whose tokenizer and template, and what is said where they differ.

What an adapter's folder holds was trained with, so it is taken before the base's, with a word; anything else in that
folder (`trainer_state.json`, `training_args.bin`, links) is another tool's and stays there.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from lorafit.contracts import JsonMapping, JsonObject, Reporter
from lorafit.errors import ModelError
from lorafit.files.portable import portable
from lorafit.files.safetensors import FLOAT_DTYPES, torch_dtype
from lorafit.model.adapter import AdapterFolder
from lorafit.model.base import Base
from lorafit.model.tokenizer_files import (
    PROCESSOR_PATTERNS,
    Companions,
    TokenizerFolder,
    digest_templates,
    end_with,
    write_object,
)

_OF_THE_BASE = ("LICENSE*", "NOTICE*", "USE_POLICY*", *PROCESSOR_PATTERNS)


def choose_companions(base: Base, adapter: AdapterFolder, reporter: Reporter) -> Companions:
    """Tokenizer, templates and generation settings of a merge.

    Raises:
        ModelError: A file of the adapter's tokenizer cannot be read, or it has tokens that the base has no row for.
    """
    theirs, own = TokenizerFolder(base.path, follows_links=True), TokenizerFolder(adapter.path)
    for name in own.ignored_links():
        reporter.warn(f"{adapter.path / name} is a link, which is not followed; copy the file there if it is wanted")
    card = adapter.card()
    tokenizer, ends = theirs if theirs.has_tokenizer() else None, []
    if own.has_tokenizer():
        ends = _check_own_tokenizer(own, theirs, base, reporter, has_new_tokens="rows" in adapter.notes)
        tokenizer = own
    templates, usual = own.templates(), theirs.templates()
    if card is not None and not templates:
        templates = card.shipped_templates
    if templates and usual and templates != usual:
        what = f"the adapter's chat template ({_short(templates)}) differs from the base's ({_short(usual)})"
        is_the_runs = card is not None and templates == card.shipped_templates
        is_ours = is_the_runs and card is not None and card.templates == usual  # by its system prompt or date alone
        say = reporter.info if is_the_runs else reporter.warn
        if not is_ours:
            taken = "the adapter's is taken, which it was trained with"
            say(f"{what}: {taken}; its chat_template.jinja says what it writes")
    generation = dict(card.generation) if card is not None else theirs.generation()
    if card is None and ends:
        generation = end_with(generation, base.config, ends)
    return Companions(tokenizer, templates or usual, generation)


def _check_own_tokenizer(
    own: TokenizerFolder, theirs: TokenizerFolder, base: Base, reporter: Reporter, *, has_new_tokens: bool
) -> list[int]:
    """Reads the adapter's tokenizer, compares it with the base's; gives its end token where it is another one."""
    vocabulary = own.vocabulary()
    if not theirs.has_tokenizer() or own.is_same_tokenizer(theirs) or has_new_tokens:
        return []
    reporter.warn(
        f"the adapter's tokenizer ({own.digest()[:12]}) differs from the base's ({theirs.digest()[:12]}): "
        "the adapter's is taken, which it was trained with; remove its tokenizer files to take the base's"
    )
    rows, highest = embedding_rows(base.config), max(vocabulary.values(), default=0)
    if rows is not None and highest >= max(rows, len(theirs.vocabulary())):
        raise ModelError(
            f"its tokenizer has token ids up to {highest}, the base's embedding size is {rows} rows",
            file=str(own.path),
            todo="use the tokenizer that belongs to this base",
        )
    end = own.settings().get("eos_token")
    end = end.get("content") if isinstance(end, dict) else end
    return [vocabulary[end]] if isinstance(end, str) and end in vocabulary else []


def embedding_rows(config: JsonObject) -> int | None:
    """Rows of the embedding, from a config.json: token ids are below it; None where the config does not say."""
    text = config.get("text_config")
    found = config.get("vocab_size") or (text.get("vocab_size") if isinstance(text, dict) else None)
    return found if isinstance(found, int) else None


def write_rest(
    base: Base, companions: Companions, target: Path, dtypes: Iterable[str], head: JsonMapping | None = None
) -> None:
    """Everything but the weights: config.json without quantisation and with the new dtype, licence, companions.

    Args:
        base: The base.
        companions: From `choose_companions`.
        target: The merged folder.
        dtypes: safetensors' names of the dtypes that were written.
        head: What config.json says of a head that the base has not.
    """
    for file in TokenizerFolder(base.path).files(_OF_THE_BASE):
        shutil.copyfile(file, target / file.name)
    config = {key: value for key, value in base.config.items() if key not in ("quantization_config", "torch_dtype")}
    floats = {dtype for dtype in dtypes if dtype in FLOAT_DTYPES}
    if len(floats) == 1:
        config["dtype"] = str(torch_dtype(floats.pop())).removeprefix("torch.")
    elif "torch_dtype" in base.config:
        config.setdefault("dtype", base.config["torch_dtype"])
    write_object(target / "config.json", portable({**config, **(head or {})}))
    companions.write(target)


def _short(templates: dict[str, str]) -> str:
    return digest_templates(templates)[:12]
