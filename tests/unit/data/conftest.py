"""Fixtures of the data tests: tokenizers, and one call that prepares rows as training does."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from transformers import PreTrainedTokenizerFast

from lorafit.data.prepare import Prepared, build_renderer, prepare
from lorafit.kinds.tasks import Task, tasks
from lorafit.recipe.schema import DataSection, SourceSection
from tests.support.tiny_data import Listener, make_tokenizer

# A first example may import torch, and a machine be busy: how long one takes is no property of the code.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def base_tokenizer() -> PreTrainedTokenizerFast:
    """As base models have it: no chat template."""
    return make_tokenizer(chat_template=None)


@pytest.fixture
def listener() -> Listener:
    return Listener()


@pytest.fixture
def prepare_rows(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, listener: Listener) -> Callable[..., Prepared]:
    """`prepare_rows(train="d.jsonl", max_length=64, ...)` with files in tmp_path and a cache of its own."""

    def run(
        *,
        using: Any = None,
        task: Task[Any] | None = None,
        seed: int = 0,
        retention: list[SourceSection] | None = None,
        now: datetime | None = None,
        glance: int | None = None,
        **data: Any,
    ) -> Prepared:
        section = DataSection(**data)
        return prepare(
            section,
            folder=tmp_path,
            renderer=build_renderer(using or tokenizer, section, tmp_path, now),
            task=task or tasks.make("causal-lm"),
            seed=seed,
            cache_dir=tmp_path / "cache",
            reporter=listener,
            retention=retention,
            glance=glance,
        )

    return run
