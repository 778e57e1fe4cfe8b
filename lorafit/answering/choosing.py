"""The next tokens of several rows, each chosen by its own request's sampling, from one tensor of logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from lorafit.answering.answer_text import AnswerText
from lorafit.answering.sampling import build_processors
from lorafit.answering.ticket import FinishReason, Ticket, Written
from lorafit.errors import LorafitError, NumericsError


@dataclass(eq=False)
class LiveRow:
    """One request while it is answered.

    Attributes:
        ticket: Gets its pieces.
        prompt: The prompt's ids, at least one.
        stops: Tokens that end the answer.
        text: Its text so far.
        tokens: Its tokens so far.
    """

    ticket: Ticket
    prompt: list[int]
    stops: frozenset[int]
    text: AnswerText
    tokens: list[int] = field(default_factory=list)

    @property
    def most_tokens(self) -> int:
        """Positions that prompt and answer take at most."""
        return self.ticket.prompt_tokens + self.ticket.request.sampling.max_new_tokens

    @property
    def is_over(self) -> bool:
        """Whether its ticket has its end."""
        return self.ticket.finish_reason is not None

    def end(self, reason: FinishReason, error: LorafitError | None = None) -> None:
        """Ends it, once."""
        if not self.is_over:
            self.ticket.end(reason, error)

    def take(self, token: int, logprob: float | None, top: tuple[tuple[int, float], ...]) -> None:
        """Adds a token to the answer, and ends it where that token does."""
        self.tokens.append(token)
        reason: FinishReason | None = None
        if token in self.stops:
            text, reason = self.text.finish(), "stop"
        else:
            text = self.text.add(token)
            if self.text.is_stopped:
                reason = "stop"
            elif len(self.tokens) >= self.ticket.request.sampling.max_new_tokens:
                text, reason = text + self.text.finish(), "stop" if self.text.is_stopped else "length"
        self.ticket.add(Written(token, text, logprob, top))
        if reason is not None:
            self.end(reason)


def choose_tokens(rows: Sequence[LiveRow], logits: torch.Tensor) -> None:
    """Gives each row its next token; one whose logits hold no number to choose by ends with an error.

    Args:
        rows: In the order of the logits.
        logits: Of the last position, `[rows, vocabulary]`.
    """
    logits = logits.float()
    best, greedy = logits.max(dim=-1)  # NaN where any is
    are_numbers, likeliest = torch.isfinite(best).tolist(), greedy.tolist()
    for number, row in enumerate(rows):
        if not are_numbers[number]:
            what = "the model's logits are not finite, so no token can be chosen"
            todo = "ask the base alone: if that answers, the adapter is broken"
            row.end("error", NumericsError(what, key=row.ticket.adapter, todo=todo))
            continue
        token = _choose(row, logits[number : number + 1])
        token = likeliest[number] if token is None else token
        row.take(token, *_logprobs(logits[number], token, row.ticket.request.top_logprobs))


def _choose(row: LiveRow, scores: torch.Tensor) -> int | None:
    """A row's token where it is not simply the likeliest, as `generate_answers` chooses it for a row numbered 0."""
    sampling = row.ticket.request.sampling
    is_too_short = len(row.tokens) < sampling.min_new_tokens and bool(row.stops)
    processors = build_processors(sampling, [0], 0)
    if not processors and not is_too_short:
        return None
    scores = scores.clone()
    if is_too_short:
        scores[:, sorted(row.stops)] = -torch.inf
    written = torch.tensor([row.tokens], dtype=torch.long, device=scores.device)
    return int(processors(written, scores).argmax(dim=-1))


def _logprobs(
    logits: torch.Tensor, token: int, count: int | None
) -> tuple[float | None, tuple[tuple[int, float], ...]]:
    """The token's log-probability and those of the likeliest, where they are asked for."""
    if count is None:
        return None, ()
    logprobs = torch.log_softmax(logits, dim=-1)
    values, ids = logprobs.topk(min(count, len(logprobs)))
    return float(logprobs[token]), tuple(zip(ids.tolist(), values.tolist(), strict=True))
