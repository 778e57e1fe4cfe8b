"""The tiny models and the tokenizer of the tests of evaluation."""

from tests.unit.evaluation.conftest import attach, gpt2, llama, make_rows, make_tuned, tokenizer, tuned

__all__ = ["attach", "gpt2", "llama", "make_rows", "make_tuned", "tokenizer", "tuned"]
