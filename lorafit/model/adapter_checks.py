"""What an adapter's files may say: types and ranges of every field that is used, patterns that end, finite values.

An adapter is a stranger's file. PEFT fills what is missing with defaults of its own (an alpha of 8) and takes what is
wrong as it comes; here each is an error that names the file and the key.
"""

from __future__ import annotations

import contextlib
import re
import signal
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field

from lorafit.contracts import JsonMapping
from lorafit.errors import ModelError, SafetyError
from lorafit.files.safetensors import TensorEntry
from lorafit.kinds.adapter_parts import Number, Rank, SavedField
from lorafit.kinds.adapters import Adapter, AdapterSection
from lorafit.kinds.folding import compile_layers

_PATTERN_SECONDS = 1.0
_LONGEST_TEXT_CHARACTERS = 4096
_UNBOUNDED_TIMES = 64
_LAYER_PATH = re.compile(r"^(?:base_model\.model\.)?(?P<path>.+?)(?:\.weight|\.bias)?$")

Text = Annotated[str, Field(max_length=_LONGEST_TEXT_CHARACTERS)]


class _Quantization(BaseModel):
    """How a base was quantised: a kind, and options that are its own."""

    kind: Text = ""


_SAVED_FIELDS: dict[str, SavedField] = {
    "rank_pattern": SavedField(dict[Text, Rank] | None, "ranks by pattern"),
    "alpha_pattern": SavedField(dict[Text, Number] | None, "finite numbers by pattern"),
    **dict.fromkeys(
        ("target_modules", "exclude_modules", "layers_pattern"),
        SavedField(Text | list[Text] | None, "a text or a list of texts"),
    ),
    **dict.fromkeys(("modules_to_save", "target_parameters"), SavedField(list[Text] | None, "a list of texts")),
    "trainable_token_indices": SavedField(list[int] | dict[Text, list[int]] | None, "numbers of rows"),
    "layers_to_transform": SavedField(int | list[int] | None, "whole numbers"),
    "base_model_name_or_path": SavedField(Text | None, "a text"),
    "bias": SavedField(Text, "a text"),
}
"""Of PEFT's config, whatever the method."""
NOTES_FORMAT = 2
"""Of lorafit.json. Format 1 noted less of where layers lie, so that those are found as another tool's are."""

_NOTES: dict[str, SavedField] = {
    "base": SavedField(dict[Text, Text | bool | None] | None, "name and digest of a base"),
    "quantization": SavedField(_Quantization | None, "a kind and its options"),
    "transposed": SavedField(list[Text] | None, "a list of texts"),
}
_PATTERNS = ("target_modules", "exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern")


def check_fields(
    kind: type[Adapter[AdapterSection]], config: JsonMapping, tensors: Mapping[str, TensorEntry], file: Path
) -> None:
    """Checks adapter_config.json against the adapter's method and tensors.

    Raises:
        ModelError: A field is missing, or of a type or range that no adapter has, or a pattern is malformed.
        SafetyError: A pattern can take for ever.
    """
    _check_known(config, {**_SAVED_FIELDS, **kind.saved_fields}, file)
    found = {match["path"] for name in tensors if (match := _LAYER_PATH.match(name))}
    paths = sorted(found | {path.rpartition(".")[0] for path in found})
    for key in _PATTERNS:
        value = config.get(key)
        # A list holds names, not patterns, but for `layers_pattern`.
        texts = [value] if isinstance(value, str) else list(value) if isinstance(value, dict) else []
        for pattern in texts if key != "layers_pattern" or isinstance(value, str) else value or []:
            _check_pattern(pattern, paths, file, key)


def check_notes(notes: JsonMapping, file: Path) -> None:
    """Raises ModelError where lorafit.json holds another type than lorafit writes."""
    if notes.get("format", 1) not in (1, NOTES_FORMAT):
        raise ModelError(
            f"is of format {notes['format']!r}, this lorafit reads formats 1 and {NOTES_FORMAT}",
            file=str(file),
            todo="use the lorafit that wrote it",
        )
    _check_known(notes, _NOTES, file)


def _check_known(values: JsonMapping, known: Mapping[str, SavedField], file: Path) -> None:
    for key, field in known.items():
        if key not in values:
            if field.needed:
                raise ModelError("is missing", file=str(file), key=key, todo=f"it must be {field.wanted}")
        elif not field.is_valid(values[key]):
            what = f"{str(values[key])[:60]!r} is not {field.wanted}"
            raise ModelError(what, file=str(file), key=key, todo="restore the file")


def _check_pattern(pattern: str, paths: list[str], file: Path, key: str) -> None:
    try:
        compiled = compile_layers(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        what = f"'{pattern[:60]}' is no pattern ({error})"
        raise ModelError(what, file=str(file), key=key, todo="restore the file") from error
    endless = SafetyError(
        f"the pattern '{pattern[:60]}' can take for ever", file=str(file), key=key, todo="do not use this adapter"
    )
    if _repeats_repeats(pattern):
        raise endless
    try:
        with _within(_PATTERN_SECONDS):
            for path in paths:
                compiled.match(path)
    except TimeoutError:
        raise endless from None


def _repeats_repeats(pattern: str) -> bool:
    """Whether a repetition without bound holds another one, or a choice: what backtracks exponentially."""
    from re import _constants, _parser  # type: ignore[attr-defined]

    repeats = (_constants.MAX_REPEAT, _constants.MIN_REPEAT)

    def look(part: Any, inside: bool) -> bool:
        if isinstance(part, _parser.SubPattern | list | tuple):
            items = list(part)
            if len(items) == 2 and items[0] in repeats:
                _, most, inner = items[1]
                unbounded = most > _UNBOUNDED_TIMES
                return (inside and unbounded) or look(inner, inside or unbounded)
            if len(items) == 2 and items[0] is _constants.BRANCH and inside:
                return True
            return any(look(item, inside) for item in items)
        return False

    return look(_parser.parse(pattern), inside=False)


@contextlib.contextmanager
def _within(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in the main thread when the time is over; other threads have no clock that could."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
