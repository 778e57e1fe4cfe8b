"""A sentence's vector is what the published pooling gives of it alone, whatever batch it is in; others are refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from lorafit.contracts import Silent
from lorafit.errors import ModelError
from lorafit.model.sentence_encoder import SentenceEncoder
from tests.support.tiny_encoder import make_encoder
from tests.support.tiny_model import make_base

TEXTS = ["open", "a mug and a plate and a bowl", "", "x", "z" * 100]
MEAN = {"word_embedding_dimension": 16, "pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_encoder(tmp_path_factory.mktemp("encoder"))


def open_encoder(folder):
    return SentenceEncoder.open(folder, "cpu", Silent())


def alone(folder, text, pool):
    """By the model card's arithmetic, of one text without padding, in fp64."""
    model, tokenizer = AutoModel.from_pretrained(folder).double().eval(), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        inputs = tokenizer(text, return_tensors="pt", truncation=True, max_length=32)
        vector = pool(model(**inputs).last_hidden_state[0])
    return (vector / vector.norm()).numpy()


def test_vectors_are_the_mean_over_a_texts_own_tokens(folder):
    found = open_encoder(folder).embed([*TEXTS, TEXTS[0]], Silent())
    assert set(found) == set(TEXTS)
    for text in TEXTS:
        assert found[text] == pytest.approx(alone(folder, text, lambda states: states.mean(0)), abs=1e-5)
    assert found["open"] @ found["x"] < 0.99


def test_the_first_token_is_taken_where_the_folder_says_so(folder, tmp_path):
    first = {"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}
    made = make_encoder(tmp_path / "first", first)
    found = open_encoder(made).embed(TEXTS[:2], Silent())
    expected = alone(folder, TEXTS[1], lambda states: states[0])
    assert found[TEXTS[1]] == pytest.approx(expected, abs=1e-5)
    assert found[TEXTS[1]] != pytest.approx(alone(folder, TEXTS[1], lambda states: states.mean(0)), abs=1e-2)


def refused(folder):
    with pytest.raises(ModelError) as caught:
        open_encoder(folder)
    assert caught.value.exit_code == 5
    return str(caught.value)


def test_what_is_no_encoder_is_refused_in_a_sentence(folder, tmp_path):
    assert "no such folder" in refused(tmp_path / "nowhere")
    make_base(tmp_path / "llama")
    assert "'llama' is no encoder that reads a text in both directions" in refused(tmp_path / "llama")
    (tmp_path / "empty").mkdir()
    assert "evaluation.encoder: holds no config.json, so it is no" in refused(tmp_path / "empty")


def test_another_pooling_is_refused(folder, tmp_path):
    made = make_encoder(tmp_path / "last", {"pooling_mode_lasttoken": True})
    assert "makes vectors by pooling_mode_lasttoken" in refused(made)
    (made / "1_Pooling" / "config.json").write_text(json.dumps(MEAN))
    parts = json.loads((made / "modules.json").read_text())
    (made / "modules.json").write_text(json.dumps([*parts, {"path": "2_Dense", "type": "st.Dense"}]))
    assert "makes vectors by Dense" in refused(made)
    (made / "modules.json").write_text("{")
    assert "is no valid JSON" in refused(made)
    shutil.rmtree(made)
