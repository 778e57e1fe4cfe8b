"""What an adapter's files may say: types and ranges of every field that is used, patterns that end, finite values.

An adapter is a stranger's file. PEFT fills what is missing with defaults of its own (an alpha of 8) and takes what is
wrong as it comes; here each is an error that names the file and the key.
"""

from __future__ import annotations

import contextlib
import math
import re
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafit.errors import ModelError, SafetyError
from lorafit.files.safetensors import FLOAT_DTYPES, TensorEntry, read_rows
from lorafit.model.check_weights import list_names

if TYPE_CHECKING:
    from lorafit.contracts import Reporter

_PATTERN_SECONDS = 1.0
_LONGEST_TEXT_CHARACTERS = 4096
_UNBOUNDED_TIMES = 64
_LAYER_PATH = re.compile(r"^(?:base_model\.model\.)?(?P<path>.+?)\.(?:lora_\w+|weight|bias)\b")

Check = Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= 1 << 20


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= _LONGEST_TEXT_CHARACTERS


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _maybe(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _by_name(check: Check) -> Check:
    return lambda value: isinstance(value, dict) and all(_is_text(k) and check(v) for k, v in value.items())


_NEEDED: dict[str, tuple[Check, str]] = {
    "r": (_is_rank, "a whole number from 1"),
    "lora_alpha": (_is_number, "a finite number"),
}
_KNOWN: dict[str, tuple[Check, str]] = {
    "rank_pattern": (_maybe(_by_name(_is_rank)), "ranks by pattern"),
    "alpha_pattern": (_maybe(_by_name(_is_number)), "finite numbers by pattern"),
    "target_modules": (_maybe(lambda v: _is_text(v) or _is_texts(v)), "a text or a list of texts"),
    "exclude_modules": (_maybe(lambda v: _is_text(v) or _is_texts(v)), "a text or a list of texts"),
    "layers_pattern": (_maybe(lambda v: _is_text(v) or _is_texts(v)), "a text or a list of texts"),
    "modules_to_save": (_maybe(_is_texts), "a list of texts"),
    "target_parameters": (_maybe(_is_texts), "a list of texts"),
    "layers_to_transform": (
        _maybe(lambda v: all(isinstance(n, int) for n in (v if isinstance(v, list) else [v]))),
        "whole numbers",
    ),
    "lora_dropout": (lambda v: _is_number(v) and 0 <= v <= 1, "a number from 0 to 1"),
    "base_model_name_or_path": (_maybe(_is_text), "a text"),
    "bias": (_is_text, "a text"),
    **{key: (lambda v: isinstance(v, bool), "true or false") for key in ("use_rslora", "use_dora", "fan_in_fan_out")},
}
_NOTES: dict[str, tuple[Check, str]] = {
    "base": (_maybe(_by_name(_maybe(lambda v: _is_text(v) or isinstance(v, bool)))), "name and digest of a base"),
    "quantization": (_maybe(lambda v: isinstance(v, dict) and _is_text(v.get("kind", ""))), "a kind and its options"),
    "transposed": (_maybe(_is_texts), "a list of texts"),
}
_PATTERNS = ("target_modules", "exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern")


def check_fields(config: Mapping[str, Any], tensors: Mapping[str, TensorEntry], file: Path) -> None:
    """Checks adapter_config.json against the adapter's tensors.

    Raises:
        ModelError: A field is missing, or of a type or range that no adapter has, or a pattern is malformed.
        SafetyError: A pattern can take for ever.
    """
    for key, (check, wanted) in _NEEDED.items():
        if key not in config:
            raise ModelError("is missing", file=str(file), key=key, todo=f"it must be {wanted}")
        _require(config[key], check, wanted, file, key)
    _check_known(config, _KNOWN, file)
    paths = sorted({found["path"] for name in tensors if (found := _LAYER_PATH.match(name))})
    for key in _PATTERNS:
        value = config.get(key)
        # A list holds names, not patterns, but for `layers_pattern`.
        texts = [value] if isinstance(value, str) else list(value) if isinstance(value, dict) else []
        for pattern in texts if key != "layers_pattern" or isinstance(value, str) else value or []:
            _check_pattern(pattern, paths, file, key)


def check_notes(notes: Mapping[str, Any], file: Path) -> None:
    """Raises ModelError where lorafit.json holds another type than lorafit writes."""
    if notes.get("format", 1) != 1:
        raise ModelError(
            f"is of format {notes['format']!r}, this lorafit reads format 1",
            file=str(file),
            todo="use the lorafit that wrote it",
        )
    _check_known(notes, _NOTES, file)


def _check_known(values: Mapping[str, Any], known: Mapping[str, tuple[Check, str]], file: Path) -> None:
    for key, (check, wanted) in known.items():
        if key in values:
            _require(values[key], check, wanted, file, key)


def _require(value: Any, check: Check, wanted: str, file: Path, key: str) -> None:
    if not check(value):
        raise ModelError(f"{str(value)[:60]!r} is not {wanted}", file=str(file), key=key, todo="restore the file")


def _check_pattern(pattern: str, paths: list[str], file: Path, key: str) -> None:
    try:
        compiled = re.compile(rf"(.*\.)?({pattern})$")
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


def check_values(tensors: Mapping[str, TensorEntry], file: Path, alpha: float, reporter: Reporter) -> None:
    """Reads every tensor of an adapter once; warns where the adapter changes nothing.

    Raises:
        ModelError: Integers where floats belong, or NaN or Inf.
    """
    import torch

    integers = [name for name, entry in tensors.items() if entry.dtype not in FLOAT_DTYPES]
    if integers:
        first = tensors[min(integers)]
        raise ModelError(
            f"{len(integers)} adapter tensors hold {first.dtype} where floats belong ({list_names(integers)})",
            file=str(file),
            todo="get the adapter again",
        )
    broken, has_effect = [], False
    for name, entry in tensors.items():
        if entry.elements == 0:
            continue
        low, high = torch.aminmax(read_rows(entry))
        if not (torch.isfinite(low) and torch.isfinite(high)):
            broken.append(name)
        has_effect |= ".lora_A." not in name and bool(low != 0 or high != 0)
    if broken:
        what = f"{len(broken)} adapter tensors hold non-finite values, NaN or Inf ({list_names(broken)})"
        raise ModelError(what, file=str(file), todo="use another checkpoint of its run, or get the adapter again")
    if not has_effect or alpha == 0:
        why = "its lora_alpha is 0" if has_effect else "every lora_B is zero"
        reporter.warn(f"{file.parent}: the adapter has no effect: {why}, so the model answers as its base; train it")
