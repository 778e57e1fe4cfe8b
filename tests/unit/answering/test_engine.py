"""One engine with several adapters answers as each would alone."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoTokenizer

from lorafit.answering.engine import Engine
from lorafit.answering.generate import Request
from lorafit.answering.sampling import Sampling
from lorafit.errors import ModelError, UsageError
from tests.unit.evaluation.conftest import build_llama

PROMPTS = ["a", "the sky is blue", "why?", "one two three four five six", "z" * 40, "été ☃"]
SHORT = Sampling(max_new_tokens=12)


def adapter_folder(folder: Path, seed: int) -> Path:
    """An adapter on all linears as PEFT writes it, whose B is not zero."""
    torch.manual_seed(seed)
    tuned = get_peft_model(build_llama(), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.05)
    tuned.save_pretrained(folder)
    return folder


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    return {name: adapter_folder(tmp_path / name, seed) for name, seed in (("law", 1), ("code", 2))}


@pytest.fixture
def engine(folders: dict[str, Path], tokenizer: Any) -> Engine:
    engine = Engine(build_llama(), tokenizer, quantization="none")
    for name, folder in folders.items():
        engine.add_adapter(name, folder)
    return engine


def lone_answer(adapter: Path | None, tokenizer: Any, text: str) -> str:
    """transformers' own greedy answer of PEFT's model with that adapter alone."""
    model: Any = build_llama() if adapter is None else PeftModel.from_pretrained(build_llama(), adapter)
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    with torch.no_grad():
        out = model.eval().generate(input_ids=ids, max_new_tokens=12, do_sample=False)
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


def test_interleaved_requests_get_the_answers_of_lone_runs(
    engine: Engine, folders: dict[str, Path], tokenizer: Any
) -> None:
    names = [None, "law", "code"]
    requests = [
        Request(tokenizer(text)["input_ids"], name, SHORT, row=row)
        for row, text in enumerate(PROMPTS)
        for name in names[row % 3 :] + names[: row % 3]
    ]
    answers = engine.answer(requests)
    expected = [
        lone_answer(folders.get(name or ""), tokenizer, text)
        for row, text in enumerate(PROMPTS)
        for name in names[row % 3 :] + names[: row % 3]
    ]
    assert [answer.text for answer in answers] == expected
    assert len(set(expected)) > len(PROMPTS), "the adapters answer alike, which shows nothing"


def test_a_sampled_answer_does_not_depend_on_the_requests_beside_it(engine: Engine, tokenizer: Any) -> None:
    sampling = Sampling(max_new_tokens=12, temperature=0.9, top_p=0.9, seed=3)
    requests = [
        Request(tokenizer(text)["input_ids"], name, sampling, row=row)
        for row, text in enumerate(PROMPTS)
        for name in ("law", "code")
    ]
    together = engine.answer(requests)
    assert [answer.text for answer in together] == [engine.answer([one])[0].text for one in requests]
    assert together[0].text != engine.answer([Request(requests[0].prompt_ids, "law", sampling, row=7)])[0].text


@pytest.mark.parametrize("name", [None, "law", "code"])
def test_the_model_is_peft_s_with_that_adapter_and_flags_stay(
    engine: Engine, folders: dict[str, Path], tokenizer: Any, name: str | None
) -> None:
    before = engine.model.active_adapter
    flags = [parameter.requires_grad for parameter in engine.model.parameters()]
    ids = tokenizer("the sky is blue")["input_ids"]
    lone: Any = build_llama() if name is None else PeftModel.from_pretrained(build_llama(), folders[name])
    with torch.no_grad(), engine.using(name):
        own = engine.model(input_ids=torch.tensor([ids])).logits
        torch.testing.assert_close(own, lone.eval()(torch.tensor([ids])).logits)
    assert [parameter.requires_grad for parameter in engine.model.parameters()] == flags
    assert engine.model.active_adapter == before


@pytest.mark.parametrize("text", PROMPTS)
def test_the_pieces_of_a_stream_are_the_answer(engine: Engine, tokenizer: Any, text: str) -> None:
    request = Request(tokenizer(text)["input_ids"], "code", SHORT)
    pieces = list(engine.stream(request))
    assert "".join(pieces) == engine.answer([request])[0].text
    assert len(pieces) > 1


def test_a_stream_gives_the_answer_at_its_end(engine: Engine, tokenizer: Any) -> None:
    request = Request(tokenizer("why?")["input_ids"], "law", SHORT)
    stream, expected = engine.stream(request), engine.answer([request])[0]
    with pytest.raises(StopIteration) as end:
        while True:
            next(stream)
    assert (end.value.value.text, end.value.value.tokens) == (expected.text, expected.tokens)
    assert end.value.value.ended == "length"


def test_a_tokenizer_in_python_is_streamed(tmp_path: Path) -> None:
    """Marian's has no tokenizer of Rust's underneath: the first token of a stream was an AttributeError."""
    from lorafit.answering.pieces import Pieces
    from tests.support.tiny_seq2seq import make_marian_base

    lines = {"source": ["what does the shop sell"], "target": ["der laden verkauft grüne tassen ☃"]}
    tokenizer: Any = AutoTokenizer.from_pretrained(make_marian_base(tmp_path / "marian", lines))
    ids = tokenizer(text_target="der laden verkauft tassen ☃")["input_ids"]
    pieces = Pieces(tokenizer)
    written = [pieces.step(token) for token in ids]
    assert "".join(written) == pieces.text == tokenizer.decode(ids, skip_special_tokens=True) != ""
    assert len([piece for piece in written if piece]) > 3


def test_a_stream_that_nobody_reads_on_ends(engine: Engine, tokenizer: Any) -> None:
    calls, forward = [], engine.model.get_base_model().forward

    def counted(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        time.sleep(0.01)  # longer than the reader takes, so that the writer cannot be done before
        return forward(*arguments, **named)

    engine.model.get_base_model().forward = counted
    pieces = engine.stream(Request(tokenizer("why?")["input_ids"], "law", Sampling(max_new_tokens=200)))
    next(pieces)
    pieces.close()
    assert len(calls) < 150
    assert not [thread for thread in threading.enumerate() if thread.name == "lorafit answer"]


def test_beams_are_neither_drawn_nor_streamed(engine: Engine, tokenizer: Any) -> None:
    with pytest.raises(UsageError, match="a beam search draws nothing; leave out"):
        Sampling(num_beams=2, temperature=0.5)
    with pytest.raises(UsageError, match="only at the end; stream without beams"):
        next(engine.stream(Request(tokenizer("a")["input_ids"], "law", Sampling(8, num_beams=2))))


def test_an_adapter_that_is_not_loaded_is_told_the_loaded_ones(engine: Engine, tokenizer: Any) -> None:
    request = Request(tokenizer("a")["input_ids"], "laws", SHORT)
    with pytest.raises(UsageError, match="'laws'; loaded: law, code"):
        engine.answer([request])
    with pytest.raises(UsageError, match="plain model"):
        Engine(build_llama(), tokenizer).answer([request])
    with pytest.raises(UsageError, match="'laws'"):
        next(engine.stream(request))


def test_an_adapter_that_would_be_another_here_is_refused(engine: Engine, folders: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match="two adapters are called 'law'"):
        engine.add_adapter("law", folders["law"])
    notes = {"format": 1, "quantization": {"kind": "nf4"}}
    (folders["code"] / "lorafit.json").write_text(json.dumps(notes), encoding="utf-8")
    with pytest.raises(ModelError, match="in nf4, and this one is loaded in none"):
        engine.add_adapter("third", folders["code"])
    assert engine.adapters == ("law", "code")


@pytest.mark.parametrize("name", ["a.b", "a", "weight", "keys"])
def test_users_call_adapters_as_they_like(
    engine: Engine, folders: dict[str, Path], tokenizer: Any, name: str, recwarn: pytest.WarningsRecorder
) -> None:
    """PEFT takes no name with a dot, warns of parts of `lora_`, and fails on names that its modules have."""
    engine.add_adapter(name, folders["code"])
    assert engine.adapters == ("law", "code", name)
    ids = tokenizer("the sky is blue")["input_ids"]
    named, plain = engine.answer([Request(ids, one, SHORT) for one in (name, "code")])
    assert named.text == plain.text
    engine.remove_adapter(name)
    assert engine.adapters == ("law", "code")
    assert not [told for told in recwarn.list if "adapter" in str(told.message).lower()]  # libraries tell other things
