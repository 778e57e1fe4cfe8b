"""Secrets have no place in a recipe, which is copied into every run folder: what looks like one is refused.

A message never holds the value, nor a key that looks like one itself.
"""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise

from lorafit.errors import SafetyError
from lorafit.recipe.yaml_tree import Entry, KeyPath, Unreadable, Value, key_text, walk, with_entry

_WORD_BREAK = re.compile(r"[^A-Za-z0-9]+|(?<=[a-z0-9])(?=[A-Z])")
_SECRET_WORDS = re.compile(
    "secrets?|password|passwd|passphrase|pwd|credentials?|bearer|authorization|(api|access|secret)(key|token)"
)
_OWNERS_OF_KEYS = re.compile(
    "api|access|secret|private|auth|wandb|hf|openai|anthropic|azure|aws|gcp|ssh|encryption|signing|license"
)
_TOKENS_OF_TEXT = re.compile(  # `pad_token` and its like are a tokenizer's words, no secrets
    "pad|eos|bos|unk|sep|cls|mask|eot|eom|boi|eoi|end|start|stop|first|last|next|new|per|image|audio|video|special"
    "|additional|extra|added|think|prompt|response|tool|label|trained|padded"
)
_SECRET_VALUES = re.compile(
    r"\bhf_(?=[A-Za-z]*[0-9A-Z])[A-Za-z0-9]{12,}\b|\bhf_[A-Za-z0-9]{20,}\b"  # Hugging Face
    r"|\bsk-[A-Za-z0-9_-]{16,}"  # OpenAI, Anthropic
    r"|\b(ghp|gho|ghu|ghs|ghr)_[A-Za-z0-9]{20,}|\bgithub_pat_[A-Za-z0-9_]{20,}|\bglpat-[A-Za-z0-9_-]{16,}"
    r"|\b(AKIA|ASIA)[0-9A-Z]{16}\b|\bAIza[0-9A-Za-z_-]{30,}|\bxox[abeprs]-[A-Za-z0-9-]{10,}"
    r"|\beyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}"  # a JSON web token
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----"
    r"|://[^/\s:@]+:[^/\s:@]+@"  # user:password in an address
)
HIDDEN = "…"


def is_secret_key(key: str) -> bool:
    """Whether a key names a secret, e.g. `hf_token`, `apiKey`, `wandb_api_key`, `password`; `pad_token` does not."""
    words = [word.lower() for word in _WORD_BREAK.split(key) if word]
    if words and words[-1] == "token" and not (len(words) > 1 and _TOKENS_OF_TEXT.fullmatch(words[-2])):
        return True
    owned = any(word == "key" and _OWNERS_OF_KEYS.fullmatch(owner) for owner, word in pairwise(words))
    return owned or any(_SECRET_WORDS.fullmatch(word) for word in words)


def is_secret_value(value: Value) -> bool:
    """Whether a text holds something of a known secret's form."""
    return isinstance(value, str) and _SECRET_VALUES.search(value) is not None


def without_secrets(tree: Entry) -> tuple[Entry, list[SafetyError]]:
    """A tree without what looks like a secret, and an error for each; nothing below one is looked at."""
    found: list[KeyPath] = []
    errors: list[SafetyError] = []
    for path, entry in walk(tree):
        key = path[-1] if path and isinstance(path[-1], str) else ""
        is_key = is_secret_value(key) or is_secret_key(key)
        if not (is_key or is_secret_value(entry.value)) or any(path[: len(known)] == known for known in found):
            continue
        found.append(path)
        what = "a secret in a recipe" if is_key else "the value looks like a secret"
        shown = key_text(tuple(HIDDEN if is_secret_value(part) else part for part in path))
        todo = "use the environment (HF_TOKEN, WANDB_API_KEY) instead; recipes are copied into run folders"
        errors.append(SafetyError(what, **entry.key_place._asdict(), key=shown, todo=todo))
        tree = with_entry(tree, path, None if is_key else replace(entry, value=Unreadable.VALUE))
    return tree, errors


def shown_flag(flag: str) -> str:
    """A `KEY=VALUE` flag as messages may name it: without what is, or may be, a secret."""
    key, equals, value = " ".join(flag.split()).partition("=")
    if any(is_secret_key(word) for word in re.findall(r"[\w.-]+", flag)) or is_secret_value(value):
        value = HIDDEN
    return _SECRET_VALUES.sub(HIDDEN, f"{key}{equals}{value}")
