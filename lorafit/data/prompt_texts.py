"""What is asked in rows and requests, as plain text without any template: by it a server picks an adapter for a prompt,
and sees how far prompts have drifted from the training rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lorafit.contracts import Sample
from lorafit.data.batch import shuffle
from lorafit.kinds.chat_fields import text_of

if TYPE_CHECKING:
    from lorafit.data.prepare import Prepared

MOST_PROMPTS = 256
LONGEST_PROMPT = 4000
"""Characters: more than is looked at of a prompt."""
_ROWS_READ = 20_000  # of each source; of more, a run would wait for its prompts
_PROMPTS_KEY = 5  # tells this draw of the seed from the orders of epochs


def asked_text(sample: Sample) -> str:
    """All that the user says in a chat; of a row without turns its prompt, or the text that it is."""
    if sample.messages is None:
        return (sample.prompt or sample.text or "").strip()
    return "\n\n".join(text_of(turn) for turn in sample.messages if turn["role"] == "user").strip()


def draw_prompts(rows: Prepared, seed: int) -> list[str]:
    """What the training rows ask, each text once, in their order: at most `MOST_PROMPTS`, drawn by the seed.

    Rows that are held out of the training rows are not among them.
    """
    placed: list[tuple[int, int]] = []
    texts: list[str] = []
    for number, line, sample in rows.samples("train").first(_ROWS_READ).rows():
        if isinstance(sample, Sample):
            placed.append((number, line))
            texts.append(asked_text(sample)[:LONGEST_PROMPT])
    train = np.stack([np.asarray(rows.train.source_of), rows.train.lines]).astype(np.int64)
    first, last = np.int64(1) << 40, np.array(placed, np.int64).reshape(-1, 2).T
    trained = np.isin(last[0] * first + last[1], train[0] * first + train[1])
    found = list(dict.fromkeys(text for text, is_trained in zip(texts, trained, strict=True) if is_trained and text))
    return [found[place] for place in sorted(shuffle(len(found), seed, _PROMPTS_KEY)[:MOST_PROMPTS])]
