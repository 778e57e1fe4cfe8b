"""How the tokens of an answer are chosen: greedily, sampled or by beam search, a row alone as in any batch.

A sampled token is the largest of `logits / temperature + noise` with Gumbel noise of (seed, row, place), so that a row
draws the same numbers alone and in any batch.

Source: Gumbel-max trick, Maddison, Tarlow and Minka (2014), "A* Sampling", section 2; nucleus sampling, Holtzman et al.
(2020), "The Curious Case of Neural Text Degeneration", section 3.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from lorafit.console.arguments import check_search
from lorafit.console.wording import counted

if TYPE_CHECKING:
    from transformers import LogitsProcessorList

    from lorafit.contracts import JsonObject
    from lorafit.recipe.schema import EvaluationSection


@dataclass(frozen=True, slots=True)
class Sampling:
    """How an answer's tokens are chosen.

    Attributes:
        max_new_tokens: Longest answer.
        temperature: 0 is greedy; else logits are divided by it before a token is drawn.
        top_p: Sampling only among the likeliest tokens that together reach this probability, 0 to 1.
        seed: Decides what is drawn.
        num_beams: Answers that are kept at each step of a beam search, for which temperature is 0; 1: no such search.
        length_penalty: Of beam search: the summed log-probability of an answer is divided by its tokens to this power.
        min_new_tokens: No answer ends before it has so many.
        no_repeat_ngram_size: No sequence of so many tokens stands twice in an answer; 0: any may.

    Raises:
        UsageError: Some of them do not go together: `check_search`.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    num_beams: int = 1
    length_penalty: float = 1.0
    min_new_tokens: int = 0
    no_repeat_ngram_size: int = 0

    def __post_init__(self) -> None:
        check_search(asdict(self))

    def __str__(self) -> str:
        """For people: what decides an answer."""
        ways = ["greedy" if self.temperature == 0 else f"temperature {self.temperature:g}, top_p {self.top_p:g}"]
        if self.num_beams > 1:
            ways = [f"{self.num_beams} beams, length penalty {self.length_penalty:g}"]
        if self.no_repeat_ngram_size:
            ways.append(f"no {self.no_repeat_ngram_size} tokens twice")
        least = f"{self.min_new_tokens:,} to " if self.min_new_tokens else "at most "
        return f"{', '.join(ways)}, {least}{counted(self.max_new_tokens, 'token')}"

    @classmethod
    def of_recipe(cls, evaluation: EvaluationSection) -> Sampling:
        """What a recipe says of answers."""
        return cls(
            evaluation.max_new_tokens,
            num_beams=evaluation.num_beams,
            length_penalty=evaluation.length_penalty,
            min_new_tokens=evaluation.min_new_tokens,
            no_repeat_ngram_size=evaluation.no_repeat_ngram_size,
        )

    def search(self) -> JsonObject:
        """What transformers' `generate` is told of the search."""
        if self.num_beams == 1:
            return {"do_sample": False}
        return {"do_sample": False, "num_beams": self.num_beams, "length_penalty": self.length_penalty}


GREEDY = Sampling()


class _GumbelNoise:
    """Logits processor: adds each row's own noise, so that the largest sum is a sample of the softmax.

    The noise is a function of (seed, row, place in the answer), and not of what was drawn before.

    Args:
        seed: Decides everything.
        rows: Numbers of the rows in this batch.
        start: Column of the first generated token.
    """

    def __init__(self, seed: int, rows: Sequence[int], start: int) -> None:
        self._seed, self._rows, self._start = seed, rows, start

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores plus noise, `[batch, vocabulary]`."""
        noise = torch.empty_like(scores, dtype=torch.float32)
        generator = torch.Generator(noise.device)
        for line, row in zip(noise, self._rows, strict=True):
            # mixed first: torch on a CPU reads only the lower 32 bits of a seed
            key = np.random.SeedSequence([self._seed, row, input_ids.shape[1] - self._start])
            line.exponential_(generator=generator.manual_seed(int(key.generate_state(1, np.uint64)[0])))
        return scores - noise.log()


class _NoRepeat:
    """Logits processor: transformers' own against repeated n-grams, held to the answer, and not to what asks for it.

    Args:
        size: Tokens that may not come twice in this order.
        start: Column of the first generated token.
    """

    def __init__(self, size: int, start: int) -> None:
        from transformers import NoRepeatNGramLogitsProcessor

        self._processor, self._start = NoRepeatNGramLogitsProcessor(size), start

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores, `[batch, vocabulary]`, -inf where a token would repeat."""
        repeated: torch.Tensor = self._processor(input_ids[:, self._start :], scores)
        return repeated


def build_processors(sampling: Sampling, rows: Sequence[int], start: int) -> LogitsProcessorList:
    """What turns logits into the scores whose largest is taken.

    Args:
        rows: Numbers of the rows in this batch.
        start: Column of the first generated token.
    """
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

    processors = LogitsProcessorList()
    if sampling.no_repeat_ngram_size:
        processors.append(_NoRepeat(sampling.no_repeat_ngram_size, start))
    if sampling.temperature > 0:
        processors.append(TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_p < 1:
            processors.append(TopPLogitsWarper(sampling.top_p))
        processors.append(_GumbelNoise(sampling.seed, rows, start))
    return processors
