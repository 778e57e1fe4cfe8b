"""A text and what is to be written of it: `{"source": "...", "target": "..."}`, as summaries and translations are."""

from __future__ import annotations

from collections.abc import Mapping

from lorafit.contracts import Sample
from lorafit.errors import DataError
from lorafit.kinds.fields import CHECKS, Row, missing_field, read_checks, read_filled_string
from lorafit.kinds.formats import Format, formats

_PAIRS = {"source": "target", "article": "highlights", "document": "summary", "text": "summary"}
_NESTED = "translation"  # of the hub's data sets: {"translation": {"de": "...", "en": "..."}}


@formats.register("source_target")
class SourceTarget(Format):
    """Two texts, for an encoder and a decoder; also as the columns that data sets of summaries have."""

    priority = 100
    fields: Mapping[str, bool] = {
        "source": True,
        "target": True,
        **CHECKS,
        **dict.fromkeys([*list(_PAIRS)[1:], "highlights", "summary"], False),
    }
    answer = "target"
    rewordable = frozenset({"source"})
    known_as: Mapping[str, tuple[str, ...]] = {
        "source": ("article", "document", "dialogue", "src"),
        "target": ("highlights", "summary", "headline", "abstract", "tgt"),
    }
    verbatim = True

    def matches(self, row: Row) -> bool:
        """Whether it has both texts, under one of their pairs of names, or the hub's object of translations."""
        return any(source in row and target in row for source, target in _PAIRS.items()) or _is_nested(row)

    def read(self, row: Row, file: str, line: int) -> Sample:
        """Both texts as they are."""
        names = next((pair for pair in _PAIRS.items() if all(name in row for name in pair)), None)
        if names is None:
            if _is_nested(row):
                one, other = (f"{_NESTED}.{language}" for language in list(row[_NESTED])[:2])
                todo = f"columns: {{source: {one}, target: {other}}}, or the other way round"
                raise DataError("does not say which language is the source", key=_NESTED, todo=todo)
            raise missing_field("source" if "source" not in row else "target", row)
        source, target = (read_filled_string(row, name) for name in names)
        return Sample(file, line, prompt=source, completion=target, is_apart=True, **read_checks(row))

    def read_prompt(self, row: Row, file: str, line: int) -> Sample:
        """The source alone."""
        name = next((source for source in _PAIRS if source in row), "source")
        return Sample(file, line, prompt=read_filled_string(row, name), **read_checks(row))


def _is_nested(row: Row) -> bool:
    return isinstance(row.get(_NESTED), dict) and len(row[_NESTED]) > 1
