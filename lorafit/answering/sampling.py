"""How the tokens of an answer are chosen: greedily or sampled, a row alone as in any batch.

A sampled token is the largest of `logits / temperature + noise` with Gumbel noise of (seed, row, place), so that a row
draws the same numbers alone and in any batch.

Source: Gumbel-max trick, Maddison, Tarlow and Minka (2014), "A* Sampling", section 2; nucleus sampling, Holtzman et al.
(2020), "The Curious Case of Neural Text Degeneration", section 3.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from transformers import LogitsProcessorList


@dataclass(frozen=True, slots=True)
class Sampling:
    """How an answer's tokens are chosen.

    Attributes:
        max_new_tokens: Longest answer.
        temperature: 0 is greedy; else logits are divided by it before a token is drawn.
        top_p: Sampling only among the likeliest tokens that together reach this probability, 0 to 1.
        seed: Decides what is drawn.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


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


def build_processors(sampling: Sampling, rows: Sequence[int], start: int) -> LogitsProcessorList:
    """What turns logits into the scores whose largest is taken.

    Args:
        rows: Numbers of the rows in this batch.
        start: Column of the first generated token.
    """
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

    processors = LogitsProcessorList()
    if sampling.temperature > 0:
        processors.append(TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_p < 1:
            processors.append(TopPLogitsWarper(sampling.top_p))
        processors.append(_GumbelNoise(sampling.seed, rows, start))
    return processors
