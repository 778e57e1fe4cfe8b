"""YAML text to a tree of entries. PyYAML scans and parses; what a word means, and what is refused, is decided here.

Refused: duplicate keys, tags, merge keys, several documents, control characters, aliases that refer to themselves or
blow up, deep nesting, keys that are not text, and words that YAML 1.1 and 1.2 read differently. All but broken syntax
is collected, so that a reader sees every problem at once.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from lorafit.errors import RecipeError
from lorafit.recipe.scalars import UnclearScalarError, read_scalar
from lorafit.recipe.yaml_tree import Entry, KeyPath, Place, Unreadable, key_text, mapping, shown

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


class _StopReadingError(Exception):
    """Nothing behind this point can be read."""

    def __init__(self, error: RecipeError) -> None:
        super().__init__(str(error))
        self.error = error


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
        raise RecipeError(
            f"control character U+{ord(control[0]):04X}", file=file, line=line, column=column, todo="remove it"
        )
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
    except _StopReadingError as stop:
        unreadable = Entry(Unreadable.VALUE, place, place)
        return unreadable, [*reading.errors, stop.error]


def read_value(text: str, place: Place, path: KeyPath) -> tuple[Entry, list[RecipeError]]:
    """What `--set KEY=TEXT` means: a list, mapping or quoted text in YAML's words, else one unquoted word or sentence.

    Args:
        text: Everything behind the equals sign.
        place: The flag.
        path: The key.
    """
    if text.startswith(("[", "{", '"', "'")):
        return read_tree(text, place, path)
    reading = _Reading(place)
    return Entry(reading.word(text, path, place), place, place), reading.errors


class _Reading:
    """The state of reading one document: its events, its anchors, and the errors so far."""

    def __init__(self, place: Place) -> None:
        self.file = place
        self.errors: list[RecipeError] = []
        self.anchors: dict[str, Entry | None] = {}  # None while its value is being read
        self.count = 0
        self.open_brackets: list[tuple[str, Any]] = []
        self.events: Any = None

    def document(self, text: str, path: KeyPath) -> Entry:
        try:
            self.events = yaml.SafeLoader(text)
            self.events.get_event()  # start of the stream
            if self.events.check_event(yaml.StreamEndEvent):
                return Entry(None, self.file, self.file)
            self.events.get_event()  # start of the document
            entry = self.value(path, None)
            self.events.get_event()  # end of the document
            if not self.events.check_event(yaml.StreamEndEvent):
                second = self.place(self.events.peek_event().start_mark)
                self.say(second, (), "a second document starts here", "keep one recipe a file")
            return entry
        except yaml.MarkedYAMLError as error:
            raise _StopReadingError(self.syntax_error(error)) from None
        except (yaml.YAMLError, ValueError):  # PyYAML calls chr() on any \U escape
            mark = self.events.get_mark() if self.events else None
            known = self.place(mark).known if mark else self.file.known
            raise _StopReadingError(RecipeError("invalid YAML: a character that does not exist", **known)) from None

    def place(self, mark: Any) -> Place:
        if self.file.line is None:
            return self.file
        return Place(self.file.file, mark.line + 1, mark.column + 1)

    def say(self, place: Place, path: KeyPath, what: str, todo: str) -> None:
        self.errors.append(RecipeError(what, **place.known, key=key_text(path) or None, todo=todo))
        if len(self.errors) >= MOST_ERRORS:
            raise self.stop(place, (), f"more than {MOST_ERRORS} errors", "mend those first")

    def stop(self, place: Place, path: KeyPath, what: str, todo: str) -> _StopReadingError:
        return _StopReadingError(RecipeError(what, **place.known, key=key_text(path) or None, todo=todo))

    def value(self, path: KeyPath, key_place: Place | None) -> Entry:
        event = self.events.get_event()
        place = self.place(event.start_mark)
        key_place = key_place or place
        if len(path) > DEEPEST_LEVEL:
            raise self.stop(place, path[:3], f"nested deeper than {DEEPEST_LEVEL} levels", "no section lies that deep")
        self.count += 1
        if isinstance(event, yaml.AliasEvent):
            return self.alias(str(event.anchor), path, place, key_place)
        if event.tag is not None:
            tag = "!!" + event.tag.removeprefix(_CORE_TAG) if event.tag.startswith(_CORE_TAG) else event.tag
            self.say(place, path, f"the tag {shown(tag)} is not allowed", "remove it; recipes hold plain values")
        if event.anchor is not None:
            self.anchors[event.anchor] = None
        entry = self.content(event, path, place, key_place)
        if event.tag is not None:
            entry = Entry(Unreadable.VALUE, place, key_place)
        if event.anchor is not None:
            self.anchors[event.anchor] = entry
        if self.count > MOST_VALUES:
            raise self.stop(place, path[:3], f"more than {MOST_VALUES} values", "no recipe needs that many")
        return entry

    def content(self, event: Any, path: KeyPath, place: Place, key_place: Place) -> Entry:
        if isinstance(event, yaml.ScalarEvent):
            return Entry(self.scalar(event, path, place), place, key_place)
        if event.flow_style:
            self.open_brackets.append(("[" if isinstance(event, yaml.SequenceStartEvent) else "{", event.start_mark))
        entry = self.collection(event, path, place, key_place)
        if event.flow_style:
            self.open_brackets.pop()
        return entry

    def collection(self, event: Any, path: KeyPath, place: Place, key_place: Place) -> Entry:
        if isinstance(event, yaml.SequenceStartEvent):
            items: list[Entry] = []
            while not self.events.check_event(yaml.SequenceEndEvent):
                items.append(self.value((*path, len(items)), None))
            self.events.get_event()
            return Entry(tuple(items), place, key_place, 1 + sum(item.count for item in items))
        entries: dict[str, Entry] = {}
        while not self.events.check_event(yaml.MappingEndEvent):
            self.pair(entries, path)
        self.events.get_event()
        return mapping(entries, place, key_place)

    def pair(self, entries: dict[str, Entry], path: KeyPath) -> None:
        """Reads one key with its value into `entries`."""
        at = self.place(self.events.peek_event().start_mark)
        key = self.key(path, at)
        below = (*path, key if key is not None else "?")
        value = self.value(below, at)
        if key is None:
            return
        if key in entries:
            first = entries[key].key_place
            where = f"first at line {first.line}" if first.line is not None else "twice in one mapping"
            self.say(at, below, f"duplicate key ({where})", "keep one of the two")
        else:
            entries[key] = value

    def key(self, path: KeyPath, at: Place) -> str | None:
        """The next key; None, with an error, where it is not text."""
        if not self.events.check_event(yaml.ScalarEvent):
            self.value((*path, "?"), None)
            self.say(at, path, "a key that is not text", "write key: value")
            return None
        event = self.events.get_event()
        name: str = event.value
        if event.tag is not None:
            self.say(at, path, f"the tag {shown(event.tag)} is not allowed", "remove it; recipes hold plain values")
            return None
        if event.style is None and name == "<<":
            self.say(at, path, "merge keys (<<) are not read", "write the keys out, or use extends")
            return None
        try:
            read = read_scalar(name) if event.style is None else name
        except UnclearScalarError as unclear:
            self.say(at, path, f"key: {unclear.what}", f'quote it ("{name[:20]}")')
            return None
        if not isinstance(read, str) or not name:
            self.say(at, path, f"{shown(name)} is a key that is not text", "write a name, or quote it")
            return None
        return name if self.is_text(name, path, at) else None

    def scalar(self, event: Any, path: KeyPath, place: Place) -> Any:
        if event.style is None:
            return self.word(event.value, path, place)
        return event.value if self.is_text(event.value, path, place) else Unreadable.VALUE

    def word(self, text: str, path: KeyPath, place: Place) -> Any:
        """The value of an unquoted word."""
        if not self.is_text(text, path, place):
            return Unreadable.VALUE
        try:
            return read_scalar(text)
        except UnclearScalarError as unclear:
            self.say(place, path, unclear.what, unclear.todo)
            return Unreadable.VALUE

    def is_text(self, text: str, path: KeyPath, place: Place) -> bool:
        """Whether escapes made nothing that is no text; says so where they did."""
        control = _CONTROL.search(text) or _SURROGATE.search(text)
        if control is not None:
            what = "control character" if ord(control[0]) < 0xD800 else "half a character (a lone surrogate)"
            self.say(place, path, f"{what} U+{ord(control[0]):04X}", "remove it")
        return control is None

    def alias(self, name: str, path: KeyPath, place: Place, key_place: Place) -> Entry:
        if name not in self.anchors:
            self.say(place, path, f"the alias *{name[:40]} names no anchor above it", f"define &{name[:40]} first")
            return Entry(Unreadable.VALUE, place, key_place)
        target = self.anchors[name]
        if target is None:
            self.say(place, path, f"the alias *{name[:40]} refers to itself", "write the value out")
            return Entry(Unreadable.VALUE, place, key_place)
        self.count += target.count
        if self.count > MOST_VALUES:
            raise self.stop(place, path, f"aliases grow to more than {MOST_VALUES} values", "write the values out")
        return Entry(target.value, place, key_place, target.count)

    def syntax_error(self, error: yaml.MarkedYAMLError) -> RecipeError:
        """PyYAML's complaint in our words, at the place that a reader has to mend."""
        problem = str(error.problem or error.context)
        if self.open_brackets and any(sign in problem for sign in _UNCLOSED_BRACKET):
            bracket, mark = self.open_brackets[-1]
            what, todo = f"'{bracket}' is never closed", f"add '{_CLOSING[bracket]}'"
        else:
            what, todo = next(((w, t) for sign, w, t in _SYNTAX_WORDS if sign in problem), (problem, "quote the value"))
            is_open_quote = "is never closed" in what and error.context_mark is not None
            mark = error.context_mark if is_open_quote else error.problem_mark or error.context_mark
        return RecipeError(f"invalid YAML: {what}", **self.place(mark).known, todo=todo)
