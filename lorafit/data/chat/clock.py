"""The clock that chat templates see, stopped at the moment when a run began.

Templates such as Llama-3.2's write today's date into every chat (`strftime_now("%d %b %Y")`). A run that is resumed,
scored or asked days later must see the chats that it was trained on, so the moment is kept in the run and given to the
template again:

    manifest.json  "template_date": "2026-02-05T10:32"  ──>  strftime_now("%d %b %Y") = "05 Feb 2026", on any day
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from lorafit.contracts import JsonMapping
from lorafit.data.chat.traced_text import blur
from lorafit.errors import CheckpointError
from lorafit.run.prelude import with_dates


def read_clock() -> datetime:
    """This machine's local time, to the minute."""
    return datetime.now().replace(second=0, microsecond=0)


def write_moment(moment: datetime) -> str:
    """A moment as a run keeps it, e.g. `2026-02-05T10:32`."""
    return moment.isoformat(timespec="minutes")


def find_moment(facts: JsonMapping, file: Path) -> datetime | None:
    """The moment that a run keeps among its facts; None where its template does not ask for one.

    Raises:
        CheckpointError: What stands there is no moment.
    """
    text = facts.get("template_date")
    try:
        return datetime.fromisoformat(text) if text is not None else None
    except (ValueError, TypeError) as error:
        what, todo = f"'{text}' is no moment", "restore the file"
        raise CheckpointError(what, file=str(file), key="template_date", todo=todo) from error


class StoppedClock:
    """Always says the same moment."""

    def __init__(self, moment: datetime) -> None:
        self.moment = moment
        self._said: dict[str, str] = {}

    def strftime_now(self, format: str) -> str:
        """The moment in a format of `datetime.strftime`: what templates call."""
        said = self._said[str.__str__(format)] = self.moment.strftime(format)
        return blur(said, format)

    def reading(self, formats: Sequence[str] | None) -> str:
        """What the clock says in some formats; the moment itself where they are not known."""
        if formats is None:
            return write_moment(self.moment)
        return ", ".join(self.moment.strftime(format) for format in formats)

    def dates(self, formats: Sequence[str] = ()) -> dict[str, str]:
        """What it says in some formats, and in all that it was asked in."""
        return {format: self.moment.strftime(format) for format in formats} | self._said

    def stop_in(self, source: str) -> str:
        """A template that gets the same answers wherever it is rendered, to all that was asked here."""
        return with_dates(source, self._said)
