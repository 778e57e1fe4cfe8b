"""YAML text to a tree of entries. PyYAML scans and parses; what a word means, and what is refused, is decided here.

Refused: duplicate keys, tags, merge keys, several documents, control characters, aliases that refer to themselves or
blow up, deep nesting, keys that are not text, and words that YAML 1.1 and 1.2 read differently. All but broken syntax
is collected, so that a reader sees every problem at once. `dump_yaml` writes values that are read back as the same.

Source: YAML 1.2.2, section 10.3 (core schema), and the YAML 1.1 type repository (yaml.org/type: bool, int, float).
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from lorafit.errors import RecipeError
from lorafit.recipe.yaml_tree import Entry, KeyPath, Place, Plain, Scalar, Unreadable, Value, shown

_NULL = frozenset({"", "~", "null", "Null", "NULL"})
_TRUE = frozenset({"true", "True", "TRUE"})
_FALSE = frozenset({"false", "False", "FALSE"})
_YAML11_BOOL = {"y": "true", "yes": "true", "on": "true", "n": "false", "no": "false", "off": "false"}
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_HEX = re.compile(r"0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_MOST_DIGITS = 40
_FIRST_ZEROS = re.compile(r"^([-+]?)0+(?=[0-9])")
_UNCLEAR = (  # the form of a word, why it is ambiguous, what to write instead: `{}` is its digits in base 10
    (re.compile(r"[-+]?0[0-9_]+(\.[0-9_]*)?([eE][-+]?[0-9]+)?"), "octal to YAML 1.1", "{}"),
    (re.compile(r"[-+]?[0-9][0-9_]*(:[0-9]+)+(\.[0-9_]*)?"), "a base-60 number to YAML 1.1", "a number"),
    (
        re.compile(
            r"[-+]?([0-9]+_[0-9_]*(\.[0-9_]*)?|[0-9]+\.[0-9]*_[0-9_]*|0x[0-9a-fA-F]*_[0-9a-fA-F_]*)([eE][-+]?[0-9]+)?"
        ),
        "a number to YAML 1.1, text to 1.2",
        "{}",
    ),
    (re.compile(r"[-+]?0([bB][01_]+|[oO][0-7_]+|X[0-9a-fA-F_]+)"), "YAML 1.1 and 1.2 disagree", "a decimal number"),
)
MOST_BYTES = 1 << 20
MOST_VALUES = 20_000
MOST_ERRORS = 100
DEEPEST_LEVEL = 32
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\x80-\x84\x86-\x9f\ufffe\uffff]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_CORE_TAG = "tag:yaml.org,2002:"
_SYNTAX_WORDS = (  # what PyYAML says, what is wrong, what to do; the first that fits
    ("expected ',' or", "a comma is missing here", "write [a, b] or {a: 1, b: 2}"),
    ("expected <block end>, but found '<scalar>'", "text behind a closing quote or bracket", "quote the whole value"),
    ("expected <block end>, but found ']'", "nothing opens this bracket", "remove it"),
    ("expected <block end>, but found '}'", "nothing opens this bracket", "remove it"),
    ("expected <block end>", "wrong indentation", "start the keys of one section in one column"),
    ("expected the node content", "a value is missing here", "write one, or null"),
    ("character '\\t'", "a tab where YAML wants spaces", "indent with spaces"),
    ("mapping values are not allowed", "a second ': ' in one value", "quote the value, or start a new line"),
    ("sequence entries are not allowed", "a list item in the middle of a line", "start it on a line of its own"),
    ("could not find expected ':'", "a key without ': '", "write key: value"),
    ("found unexpected end of stream", "a quote is never closed", "close the quote"),
    ("found unexpected document separator", "a quote is never closed", "close the quote"),
    ("that cannot start any token", "a value cannot start with this character", "quote the value"),
    ("found unknown escape character", "unknown escape in a double-quoted text", "double the backslash"),
    ("tag handle", "tags are not allowed", "remove it; recipes hold plain values"),
)
_UNCLOSED_BRACKET = ("'<stream end>'", "or ']', but got ':'", "or '}', but got ':'")
_CLOSING = {"[": "]", "{": "}"}


def read_scalar(text: str) -> Scalar:
    """The value of an unquoted word: null, a boolean, a finite number, or text. `2e-4` is a number; dates are text.

    Raises:
        RecipeError: YAML 1.1 and 1.2 disagree about it, or it is a number that no computer holds.
    """
    if text in _NULL:
        return None
    if text in _TRUE or text in _FALSE:
        return text in _TRUE
    _refuse_unclear(text)
    if len(text) > _MOST_DIGITS and _FLOAT.fullmatch(text):
        raise RecipeError(f"a number of {len(text)} digits", todo="write a shorter number, or quote it")
    if _INTEGER.fullmatch(text):
        return int(text)
    if _HEX.fullmatch(text):
        return int(text, 16)
    return _read_float(text) if _FLOAT.fullmatch(text) else text


def _refuse_unclear(text: str) -> None:
    reading = _YAML11_BOOL.get(text.lower())
    if reading is not None:
        what = f"'{text}' is ambiguous (YAML 1.1 reads {reading})"
        raise RecipeError(what, todo=f'quote it ("{text}") if it is text, or write {reading}')
    short = text[:_MOST_DIGITS]
    for form, why, instead in _UNCLEAR:
        if form.fullmatch(text):
            digits = _FIRST_ZEROS.sub(r"\1", text.replace("_", ""))[:_MOST_DIGITS]
            todo = f'quote it ("{short}") if it is text, or write {instead.format(digits)}'
            raise RecipeError(f"'{short}' is ambiguous ({why})", todo=todo)
    if _NOT_FINITE.fullmatch(text):
        raise RecipeError(f"'{text}' is not a finite number", todo="write a number, or quote it if it is text")


def _read_float(text: str) -> float:
    number = float(text)
    mantissa = re.split("[eE]", text)[0]
    if number in (float("inf"), float("-inf")) or (number == 0 and re.search("[1-9]", mantissa)):
        what = f"'{text}' is outside the numbers a computer holds"
        raise RecipeError(what, todo="write a number, or quote it if it is text")
    return number


def decode(raw: bytes, file: str) -> str:
    """The text of a recipe file, without a byte order mark.

    Raises:
        RecipeError: Larger than a recipe can be, not UTF-8, or with a control character in it.
    """
    if len(raw) > MOST_BYTES:
        raise RecipeError("larger than 1 MiB, which no recipe is", file=file, todo="name the recipe, not its data")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        offset = error.start + (3 if raw.startswith(b"\xef\xbb\xbf") else 0)
        raise RecipeError(f"not UTF-8 at byte {offset}", file=file, todo="save the file as UTF-8") from None
    control = _CONTROL.search(text)
    if control is not None:
        before = text[: control.start()].replace("\r\n", "\n").replace("\r", "\n")
        line, column = before.count("\n") + 1, control.start() - max(text.rfind("\n", 0, control.start()), -1)
        raise Place(file, line, column).error(f"control character U+{ord(control[0]):04X}", todo="remove it")
    return text


def read_tree(text: str, place: Place, path: KeyPath = ()) -> tuple[Entry, list[RecipeError]]:
    """The tree of one YAML document, and everything that is wrong with it.

    Args:
        text: The document.
        place: Where it stands. With lines, a file of its own; without, a flag, and every entry stands there.
        path: The key that the document is the value of; empty for a whole recipe.

    Returns:
        The tree, with `Unreadable.VALUE` where a value could not be read, and the errors.
    """
    reading = _Reading(place)
    try:
        return reading.document(text, path), reading.errors
    except RecipeError as last:  # nothing behind it can be read
        return Entry(Unreadable.VALUE, place, place), [*reading.errors, last]


def read_value(text: str, place: Place, path: KeyPath) -> tuple[Entry, list[RecipeError]]:
    """What `--set KEY=TEXT` means: a list, mapping or quoted text in YAML's words, else one unquoted word or sentence.

    Args:
        text: Everything behind the equals sign.
        place: The flag.
        path: The key.
    """
    if text.startswith(("[", "{", '"', "'")):
        return read_tree(text, place, path)
    try:
        return Entry(_read_text(text, is_quoted=False), place, place), []
    except RecipeError as unclear:
        return Entry(Unreadable.VALUE, place, place), [place.error(unclear.what, path, unclear.todo)]


def _read_text(text: str, *, is_quoted: bool) -> Scalar:
    """What a scalar's text means.

    Raises:
        RecipeError: An unquoted word that is ambiguous, or escapes that make what is no text.
    """
    control = _CONTROL.search(text) or _SURROGATE.search(text)
    if control is not None:
        what = "control character" if ord(control[0]) < 0xD800 else "half a character (a lone surrogate)"
        raise RecipeError(f"{what} U+{ord(control[0]):04X}", todo="remove it")
    return text if is_quoted else read_scalar(text)


class _Reading:
    """One document being read: its events, its anchors, and the errors so far."""

    def __init__(self, file: Place) -> None:
        self.file = file
        self.errors: list[RecipeError] = []
        self.anchors: dict[str, tuple[Value, int] | None] = {}  # with the count of values; None while it is being read
        self.count = 0
        self.open_brackets: list[tuple[str, yaml.Mark]] = []
        self.events: Any = None

    def document(self, text: str, path: KeyPath) -> Entry:
        """The tree of the only document.

        Raises:
            RecipeError: It cannot be read to its end.
        """
        try:
            self.events = yaml.BaseLoader(text)
            self.events.get_event()  # start of the stream
            if self.events.check_event(yaml.StreamEndEvent):
                return Entry(None, self.file, self.file)
            self.events.get_event()  # start of the document
            entry = self.value(path)
            self.events.get_event()  # end of the document
            if not self.events.check_event(yaml.StreamEndEvent):
                second = self.place(self.events.peek_event().start_mark)
                self.say(second, (), "a second document starts here", "keep one recipe a file")
            return entry
        except yaml.MarkedYAMLError as error:
            raise self.syntax_error(error) from None
        except (yaml.YAMLError, ValueError):  # PyYAML calls chr() on any \U escape
            place = self.place(self.events.get_mark()) if self.events else self.file
            raise place.error("invalid YAML: a character that does not exist") from None

    def place(self, mark: yaml.Mark) -> Place:
        """Where a mark is."""
        return self.file if self.file.line is None else Place(self.file.file, mark.line + 1, mark.column + 1)

    def say(self, place: Place, path: KeyPath, what: str, todo: str | None) -> None:
        """Notes an error; reading goes on."""
        self.errors.append(place.error(what, path, todo))
        if len(self.errors) >= MOST_ERRORS:
            raise place.error(f"more than {MOST_ERRORS} errors", todo="mend those first")

    def value(self, path: KeyPath, key_place: Place | None = None) -> Entry:
        """The next value with everything below it."""
        event = self.events.get_event()
        place, before = self.place(event.start_mark), self.count
        if len(path) > DEEPEST_LEVEL:
            what = f"nested deeper than {DEEPEST_LEVEL} levels"
            raise place.error(what, path[:3], "no section lies that deep")
        self.count += 1
        if isinstance(event, yaml.AliasEvent):
            return Entry(self.alias(str(event.anchor), path, place), place, key_place or place)
        if event.tag is not None:
            tag = "!!" + event.tag.removeprefix(_CORE_TAG) if event.tag.startswith(_CORE_TAG) else event.tag
            self.say(place, path, f"the tag {shown(tag)} is not allowed", "remove it; recipes hold plain values")
        if event.anchor is not None:
            self.anchors[event.anchor] = None
        held = self.content(event, path, place)
        if event.tag is not None:
            held = Unreadable.VALUE
        if event.anchor is not None:
            self.anchors[event.anchor] = (held, self.count - before)
        if self.count > MOST_VALUES:
            raise place.error(f"more than {MOST_VALUES} values", path[:3], "no recipe needs that many")
        return Entry(held, place, key_place or place)

    def content(self, event: Any, path: KeyPath, place: Place) -> Value:
        """What a scalar, list or mapping holds that begins with `event`."""
        if isinstance(event, yaml.ScalarEvent):
            try:
                return _read_text(event.value, is_quoted=event.style is not None)
            except RecipeError as unclear:
                self.say(place, path, unclear.what, unclear.todo)
                return Unreadable.VALUE
        if event.flow_style:
            self.open_brackets.append(("[" if isinstance(event, yaml.SequenceStartEvent) else "{", event.start_mark))
        items: list[Entry] = []
        entries: dict[str, Entry] = {}
        while not self.events.check_event(yaml.CollectionEndEvent):
            if isinstance(event, yaml.SequenceStartEvent):
                items.append(self.value((*path, len(items))))
            else:
                self.pair(entries, path)
        self.events.get_event()
        if event.flow_style:
            self.open_brackets.pop()
        return tuple(items) if isinstance(event, yaml.SequenceStartEvent) else entries

    def pair(self, entries: dict[str, Entry], path: KeyPath) -> None:
        """Reads one key with its value into `entries`."""
        at = self.place(self.events.peek_event().start_mark)
        key = self.key(path, at)
        below = (*path, key if key is not None else "?")
        value = self.value(below, at)
        if key is not None and entries.setdefault(key, value) is not value:
            line = entries[key].key_place.line
            where = f"first at line {line}" if line is not None else "twice in one mapping"
            self.say(at, below, f"duplicate key ({where})", "keep one of the two")

    def key(self, path: KeyPath, at: Place) -> str | None:
        """The next key; None, with an error, where it is not text."""
        if not self.events.check_event(yaml.ScalarEvent):
            self.value((*path, "?"))
            self.say(at, path, "a key that is not text", "write key: value")
            return None
        event = self.events.get_event()
        name, is_quoted = str(event.value), event.style is not None
        if event.tag is not None:
            refusal = f"the tag {shown(event.tag)} is not allowed", "remove it; recipes hold plain values"
        elif name == "<<" and not is_quoted:
            refusal = "merge keys (<<) are not read", "write the keys out, or use extends"
        else:
            try:
                if name and isinstance(_read_text(name, is_quoted=is_quoted), str):
                    return name
                refusal = f"{shown(name)} is a key that is not text", "write a name, or quote it"
            except RecipeError as unclear:
                refusal = f"key: {unclear.what}", str(unclear.todo).partition(" if it is text")[0]
        self.say(at, path, *refusal)
        return None

    def alias(self, name: str, path: KeyPath, place: Place) -> Value:
        """What an alias stands for."""
        target = self.anchors.get(name)
        if target is None and name in self.anchors:
            self.say(place, path, f"the alias *{name[:40]} refers to itself", "write the value out")
        elif target is None:
            self.say(place, path, f"the alias *{name[:40]} names no anchor above it", f"define &{name[:40]} first")
        if target is None:
            return Unreadable.VALUE
        self.count += target[1]
        if self.count > MOST_VALUES:
            raise place.error(f"aliases grow to more than {MOST_VALUES} values", path, "write the values out")
        return target[0]

    def syntax_error(self, error: yaml.MarkedYAMLError) -> RecipeError:
        """PyYAML's complaint in our words, at the place that a reader has to mend."""
        problem, mark = str(error.problem or error.context), error.problem_mark or error.context_mark
        if self.open_brackets and any(sign in problem for sign in _UNCLOSED_BRACKET):
            bracket, mark = self.open_brackets[-1]
            what, todo = f"'{bracket}' is never closed", f"add '{_CLOSING[bracket]}'"
        else:
            what, todo = next(((w, t) for sign, w, t in _SYNTAX_WORDS if sign in problem), (problem, "quote the value"))
            mark = (error.context_mark if "is never closed" in what else None) or mark
        return (self.place(mark) if mark else self.file).error(f"invalid YAML: {what}", todo=todo)


class _Dumper(yaml.SafeDumper):
    """PyYAML's safe dumper, but text is quoted by our reader's rules (`2e-4` is a number to it, not to PyYAML)."""


def _represent_text(dumper: _Dumper, text: str) -> yaml.Node:
    try:
        clear = isinstance(read_scalar(text), str) and "\n" not in text
    except RecipeError:
        clear = False
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if clear else '"')


_Dumper.add_representer(str, _represent_text)


def dump_yaml(values: Plain) -> str:
    """The values in their own order, one a line."""
    return yaml.dump(
        values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10_000, default_flow_style=False
    )
