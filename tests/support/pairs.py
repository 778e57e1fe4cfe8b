"""Pairs of answers as a task has prepared them, and transformers' own log-probabilities of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from lorafit.contracts import Example

PAD = 7
SIDES = ("chosen", "rejected")


def make_examples(count: int = 6) -> list[Example]:
    """Pairs of different lengths; a prompt of 3 tokens, and a token of a tool inside of some chosen answers."""
    drawn, found = np.random.default_rng(3), []
    for index in range(count):
        columns: dict[str, Any] = {}
        prompt = drawn.integers(0, 250, 3).tolist()
        for side in ("chosen", "rejected"):
            answer = drawn.integers(0, 250, int(drawn.integers(2, 12))).tolist()
            flags = [0, 0, 0, *[1] * len(answer)]
            flags[4] = int(side == "rejected" or index % 2)
            columns |= {f"{side}_tokens": prompt + answer, f"{side}_trained": flags}
        found.append(Example(index, columns, "d.jsonl", index + 1))
    return found


def plain_log_probs(model: Any, example: Example, sides: tuple[str, str] = SIDES) -> torch.Tensor:
    """transformers' log-probabilities of both answers, [2]: each sequence alone, from full logits."""
    found = []
    for side in sides:
        ids = torch.tensor([list(example[f"{side}_tokens"])])
        log_probs = model(input_ids=ids).logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])[:, 0]
        found.append((log_probs * torch.tensor(list(example[f"{side}_trained"])[1:])).sum())
    return torch.stack(found)
