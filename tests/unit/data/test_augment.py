"""Changed copies of training rows: what may change, what never does, and where they stand."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorafit import pipeline
from lorafit.contracts import Silent
from lorafit.data.augment import Augmenter, add_noise
from lorafit.data.prepare import hold_out
from lorafit.errors import LorafitError, RecipeError
from lorafit.job import Job, open_job
from lorafit.recipe.augment_section import AugmentedFieldSection, AugmentSection
from lorafit.recipe.load import load_recipe
from tests.support.tiny_model import make_base
from tests.support.tiny_recipe import make_recipe, make_rows

TEMPLATES = ["Q: {question}", "please: {question}"]
AUGMENT = {"copies": 2, "fields": [{"field": "question", "templates": TEMPLATES, "drop": 0.3}]}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("augmented")
    make_base(folder / "base")
    return folder


@pytest.fixture(autouse=True)
def cache(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAFIT_CACHE", str(world / "cache"))


def job_of(world: Path, **data: Any) -> Job:
    return open_job(load_recipe(make_recipe(world, data=data)), Silent())


def texts_of(job: Job, split: str) -> list[str]:
    rows = job.rows.splits[split]
    return [str(job.tokenizer.decode(np.asarray(rows[n]["tokens"]).tolist())) for n in range(len(rows))]


@given(st.text(alphabet="ab \n", max_size=40), st.integers(0, 99))
def test_noise_keeps_words_and_gaps_as_its_rates_say(text: str, seed: int) -> None:
    still = AugmentedFieldSection(field="x", templates=["{x}"])
    assert add_noise(text, still, Random(seed)) == text
    dropped = add_noise(text, AugmentedFieldSection(field="x", drop=0.5), Random(seed)).split()
    words = text.split()
    assert bool(dropped) == bool(words)
    remaining = iter(words)
    assert all(word in remaining for word in dropped), "what is left stands in its order"
    swapped = add_noise(text, AugmentedFieldSection(field="x", swap=0.5), Random(seed))
    assert Counter(swapped.split()) == Counter(words)


def test_each_rate_is_the_share_of_words_it_changes() -> None:
    text = " ".join(f"word{number:04}" for number in range(4000))

    def changed(**rates: float) -> list[str]:
        return add_noise(text, AugmentedFieldSection(field="x", **rates), Random(0)).split()

    assert len(changed(drop=0.2)) == pytest.approx(3200, rel=0.05)
    typos = [(new, old) for new, old in zip(changed(typo=0.1), text.split(), strict=True) if new != old]
    assert 200 < len(typos) < 400  # exchanging two equal digits changes nothing
    assert all(sorted(new) == sorted(old) and new[0] == old[0] and new[-1] == old[-1] for new, old in typos)
    moved = sum(new != old for new, old in zip(changed(swap=0.1), text.split(), strict=True))
    assert moved == pytest.approx(4000 * 2 * 0.1, rel=0.15)  # each moves two words


def test_copies_are_functions_of_seed_place_and_number() -> None:
    row = {"question": "where do the red mugs stand", "answer": "there"}

    def made(seed: int, line: int = 3, copies: int = 2) -> list[Any]:
        section = AugmentSection.model_validate({**AUGMENT, "copies": copies})
        return list(Augmenter(section, seed).copies(0, line, row, {"question"}))

    assert made(1) == made(1) == made(1, copies=5)[:2] and made(1) != made(2) and made(1) != made(1, line=4)
    assert all(copy["answer"] == "there" for copy in made(1))
    begins = {copy["question"].partition(":")[0] for copy in made(1)}
    assert begins == {"Q", "please"}, "two copies take two phrasings"
    assert not list(Augmenter(AugmentSection.model_validate(AUGMENT), 1).copies(0, 1, {"text": "x"}, {"text"}))


def test_only_training_rows_have_copies_and_answers_stay(world: Path) -> None:
    plain, more = job_of(world), job_of(world, augment=AUGMENT)
    rows = more.rows.train
    assert len(rows) == 3 * len(plain.rows.train)
    assert rows.copies.tolist() == [0, 1, 2] * 24 and rows.lines[:4].tolist() == [1, 1, 1, 2]
    assert texts_of(more, "train")[::3] == texts_of(plain, "train")
    for split in ("validation", "test"):
        assert more.rows.splits[split].digest() == plain.rows.splits[split].digest()
    assert more.rows.digest != plain.rows.digest
    for number, row in enumerate(make_rows(24)):
        assert all(row["answer"] in text for text in texts_of(more, "train")[3 * number : 3 * number + 3])
    trained = np.asarray(rows.trained_tokens).reshape(24, 3)
    assert (trained == trained[:, :1]).all(), "what carries loss is the same in a row and its copies"
    again = job_of(world, augment=AUGMENT)
    assert again.rows.digest == more.rows.digest
    assert more.rows.report.to_json()["splits"]["train"]["sources"][0]["copies"] == 48


def test_no_copy_is_held_out_nor_trained_on_where_its_row_is(world: Path) -> None:
    fraction = {"validation": {"fraction": 0.25}}
    job = job_of(world, augment=AUGMENT, **fraction)
    train, held_out = job.rows.train, job.rows.validation
    assert held_out is not None and len(held_out) == 6 and not held_out.copies.any()
    assert len(train) == 3 * 18 and not set(train.lines.tolist()) & set(held_out.lines.tolist())
    plain = job_of(world, **fraction)
    assert plain.rows.validation is not None
    assert held_out.digest() == plain.rows.validation.digest(), "the same rows as without copies"
    alone = job_of(world, augment=AUGMENT).rows.train.first(3)
    with pytest.raises(LorafitError, match="1 row is too few"):
        hold_out(alone, 0.5, 0)


def test_a_preview_shows_a_row_beside_its_copies(world: Path) -> None:
    seen = pipeline.preview(make_recipe(world, data={"augment": AUGMENT}), show=3)
    assert [row.name for row in seen.rows] == ["", "copy 1", "copy 2"] and {row.line for row in seen.rows} == {1}
    assert len({row.rendering for row in seen.rows}) == 3
    json.dumps(seen.to_json())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"augment": {"fields": [{"field": "question"}]}}, "stays as it is"),
        ({"augment": {"fields": [{"field": "question", "templates": ["Q:"]}]}}, "has no {question}"),
        ({"augment": {"fields": [{"field": "answer", "drop": 0.1}]}}, "'answer' of rows of format question_answer"),
        ({"augment": AUGMENT, "train_on": "all"}, "would be learnt with train_on: all"),
    ],
)
def test_what_is_learnt_is_never_changed(world: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises((RecipeError, LorafitError), match=said):
        job_of(world, **changes)


@pytest.mark.parametrize("task", ["token-classification", "image-text-to-text", "kto"])
def test_tasks_whose_labels_or_rows_hang_on_places_refuse_copies(world: Path, task: str) -> None:
    recipe = make_recipe(world, data={"augment": AUGMENT}, task=task, evaluation={"final": ["loss"]})
    with pytest.raises(LorafitError, match=f"task {task} "):
        pipeline.validate(recipe)
