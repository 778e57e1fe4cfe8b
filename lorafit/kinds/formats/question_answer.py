"""Questions with their answers: `{"question": "...", "answer": "...", "system": ...}`."""

from __future__ import annotations

from collections.abc import Mapping

from lorafit.contracts import Message, Sample
from lorafit.kinds.chat_fields import assistant_turn, user_turn, with_system
from lorafit.kinds.fields import CHECKS, Row, read_checks, read_filled_string, read_optional_string
from lorafit.kinds.formats import Format, formats


@formats.register("question_answer")
class QuestionAnswer(Format):
    """A chat of one turn each: the user asks, the assistant answers."""

    priority = 40
    asks = "question"
    fields: Mapping[str, bool] = {"question": True, "answer": True, "system": False, **CHECKS}
    answer = "answer"
    rewordable = frozenset({"question"})
    known_as: Mapping[str, tuple[str, ...]] = {
        "question": (
            *("instruction", "prompt", "input", "query", "problem", "user", "human", "frage", "pregunta", "domanda"),
            *("source", "document", "article", "dialogue"),
        ),
        "answer": (
            *("response", "output", "completion", "reply", "solution", "assistant", "gpt", "antwort", "réponse"),
            *("respuesta", "risposta", "sql", "query", "target", "summary", "highlights"),
        ),
    }

    def read(self, row: Row, file: str, line: int) -> Sample:
        """A chat of two turns, behind the system message if there is one."""
        messages = (*_read_asked(row), assistant_turn(read_filled_string(row, "answer")))
        return Sample(file, line, messages=messages, **read_checks(row))

    def read_prompt(self, row: Row, file: str, line: int) -> Sample:
        """The question, behind the system message if there is one."""
        return Sample(file, line, messages=_read_asked(row), **read_checks(row))


def _read_asked(row: Row) -> tuple[Message, ...]:
    return with_system(read_optional_string(row, "system"), [user_turn(read_filled_string(row, "question"))])
