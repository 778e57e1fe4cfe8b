"""Token ids against the embedding's rows: an id beyond them ends a step in the middle of a run, on a GPU without a word
of why.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from lorafit.contracts import Column, Examples
from lorafit.errors import ModelError, row_place

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def highest_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The highest token id that the tokenizer can give; it may know tokens of a larger model, and never give them."""
    return max([len(tokenizer) - 1, *map(int, tokenizer.added_tokens_decoder)])


def check_examples(
    splits: Mapping[str, Examples], columns: Iterable[Column], tokenizer: PreTrainedTokenizerBase, embedding_rows: int
) -> None:
    """Raises ModelError where a prepared row holds a token that the embedding has no row for.

    Rows are looked at only where the tokenizer can give such a token at all.
    """
    if highest_id(tokenizer) < embedding_rows:
        return
    names = [column.name for column in columns if column.holds_tokens]
    for examples in splits.values():
        for number in range(len(examples)):
            example = examples[number]
            for name in names:
                if int(np.max(example[name], initial=0)) >= embedding_rows:
                    error = beyond(map(int, example[name]), tokenizer, embedding_rows)
                    error.what += f" (row {row_place(example.file, example.line)})"
                    raise error


def check_ids(ids: Iterable[int], tokenizer: PreTrainedTokenizerBase, embedding_rows: int) -> None:
    """Raises ModelError where one of a prompt's tokens has no row in the embedding."""
    ids = list(ids)
    if max(ids, default=0) >= embedding_rows:
        raise beyond(ids, tokenizer, embedding_rows)


def beyond(ids: Iterable[int], tokenizer: PreTrainedTokenizerBase, embedding_rows: int) -> ModelError:
    """The error for a row of tokens, the first of which that is too high is named."""
    first = next(int(number) for number in ids if number >= embedding_rows)
    return ModelError(
        f"token {tokenizer.convert_ids_to_tokens(first)!r} has id {first}: the tokenizer's vocab size is "
        f"{highest_id(tokenizer) + 1}, the model's embedding size {embedding_rows} rows",
        key="model.base",
        todo="use the tokenizer of this base, or rows and a template without that token",
    )
