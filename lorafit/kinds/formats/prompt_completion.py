"""Prompts with what comes after them: `{"prompt": "...", "completion": "..."}`."""

from __future__ import annotations

from collections.abc import Mapping

from lorafit.contracts import Sample
from lorafit.kinds.fields import CHECKS, Row, read_checks, read_filled_string, read_string
from lorafit.kinds.formats import Format, formats


@formats.register("prompt_completion")
class PromptCompletion(Format):
    """Used verbatim, prompt + completion + end of text, unless the recipe names a chat template."""

    priority = 50
    asks = "prompt"
    fields: Mapping[str, bool] = {"prompt": True, "completion": True, **CHECKS}
    answer = "completion"
    rewordable = frozenset({"prompt"})
    known_as: Mapping[str, tuple[str, ...]] = {
        "prompt": ("input", "question", "instruction", "query", "source"),
        "completion": ("response", "output", "answer", "target", "sql", "query"),
    }
    verbatim = True

    def read(self, row: Row, file: str, line: int) -> Sample:
        """Both strings as they are; the prompt may be empty."""
        prompt, completion = read_string(row, "prompt"), read_filled_string(row, "completion")
        return Sample(file, line, prompt=prompt, completion=completion, **read_checks(row))

    def read_prompt(self, row: Row, file: str, line: int) -> Sample:
        """The prompt as it is."""
        return Sample(file, line, prompt=read_filled_string(row, "prompt"), **read_checks(row))
