"""Encoder-decoders answer as transformers' own `generate` does for one row, alike in any batch; so do beams."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from lorafit.answering.generate import Request, generate_answers
from lorafit.answering.sampling import Sampling
from lorafit.contracts import Silent
from lorafit.errors import ModelError
from tests.support.tiny_seq2seq import FAMILIES, make_tokenizer, tiny_seq2seq

PAD, END, BEGIN, VOCABULARY = 0, 1, 2, 128
LENGTHS = (3, 11, 1, 7, 30, 7, 18, 2)
STOPS = (END, *range(3, VOCABULARY, 3))  # so many that answers end at different places
BEAMS = Sampling(max_new_tokens=14, num_beams=3, length_penalty=2.0)
GREEDY = Sampling(max_new_tokens=14)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


def writer(family: str, *, width: float = 0.3, seed: int = 1, **changes: Any) -> Any:
    """A model in eval mode, its weights so wide that answers differ; BART's begin with a forced token."""
    model = tiny_seq2seq(family, vocab_size=VOCABULARY, **changes).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, width)
    own = model.generation_config
    own.eos_token_id, own.pad_token_id, own.forced_eos_token_id = END, PAD, None
    own.decoder_start_token_id = {"bart": END, "encoder-decoder": BEGIN}.get(family, PAD)
    if family == "bart":
        own.forced_bos_token_id = BEGIN
    if family == "marian":
        own.bad_words_ids = [[PAD]]
    return model


def sources(count: int = len(LENGTHS)) -> list[list[int]]:
    """Prompts of several lengths, none like another, each with the end token that encoders read."""
    numbers = torch.Generator().manual_seed(5)
    lengths = itertools.islice(itertools.cycle(LENGTHS), count)
    return [[*torch.randint(3, VOCABULARY, (length,), generator=numbers).tolist(), END] for length in lengths]


def answers_of(
    model: Any, tokenizer: Any, prompts: list[list[int]], sampling: Sampling, batch_rows: int = 64, **more: Any
) -> list[Any]:
    requests = [Request(ids, None, sampling, STOPS, row) for row, ids in enumerate(prompts)]
    return generate_answers(model, tokenizer, requests, batch_rows=batch_rows, reporter=more.get("reporter", Silent()))


def watch(model: Any, **asked: Any) -> list[tuple[Any, Any]]:
    """What the model's `generate` is given and gives, from now on; `asked` is added to what it is given."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    generate, seen = type(inner).generate, []

    def watched(**inputs: Any) -> Any:
        seen.append((inputs, generate(inner, **inputs, **asked)))
        return seen[-1][1]

    inner.generate = watched
    return seen


def scores_of(seen: list[tuple[Any, Any]]) -> dict[tuple[int, ...], float]:
    """The score that a search gave to its answer, by prompt."""
    return {
        tuple(ids[mask.bool()].tolist()): score
        for inputs, output in seen
        for ids, mask, score in zip(
            inputs["input_ids"], inputs["attention_mask"], output.sequences_scores.tolist(), strict=True
        )
    }


@pytest.fixture(params=["base", "adapter", "merged"])
def state(request: pytest.FixtureRequest, attach: Any) -> Any:
    """Gives a model as it is, with an adapter, or with the adapter merged into it."""

    def change(model: Any) -> Any:
        if request.param == "base":
            return model
        tuned = attach(model).eval()
        return tuned if request.param == "adapter" else tuned.merge_and_unload().eval()

    return change


@pytest.mark.parametrize("family", ["t5", "bart"])
@pytest.mark.parametrize("sampling", [GREEDY, BEAMS], ids=str)
def test_a_padded_batch_gives_the_answers_of_single_rows(
    family: str, sampling: Sampling, state: Any, tokenizer: Any
) -> None:
    """Greedy ones in several rounds; those of beams with the same scores."""
    model, prompts = state(writer(family)), sources(14)
    seen = watch(model, output_scores=True)
    alone = answers_of(model, tokenizer, prompts, sampling, 1)
    first, whole = scores_of(seen) if sampling is BEAMS else {}, len(seen)
    together = answers_of(model, tokenizer, prompts, sampling)
    assert [(a.written, a.tokens) for a in alone] == [(a.written, a.tokens) for a in together]
    assert len({a.written for a in alone}) > 4
    assert len({a.tokens for a in alone}) > 1
    if sampling is BEAMS:
        assert scores_of(seen[whole:]) == pytest.approx(first, abs=1e-4)
    else:
        cached = ["past_key_values" in inputs for inputs, _ in seen[whole:]]
        assert cached[:2] == [False, True]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "sampling", [GREEDY, BEAMS, Sampling(max_new_tokens=9, num_beams=4, length_penalty=0.5, min_new_tokens=5)], ids=str
)
def test_answers_are_those_of_transformers(family: str, sampling: Sampling, tokenizer: Any) -> None:
    """Row by row, whatever search the model brings in its own generation config."""
    model = writer(family)
    asked = {"max_new_tokens": sampling.max_new_tokens, "min_new_tokens": sampling.min_new_tokens, "do_sample": False}
    search = {"num_beams": sampling.num_beams, "length_penalty": sampling.length_penalty, "early_stopping": False}
    expected = []
    for prompt in sources(4):
        ids = torch.tensor([prompt])
        found = model.generate(
            ids, attention_mask=torch.ones_like(ids), eos_token_id=list(STOPS), pad_token_id=PAD, **asked, **search
        )
        tokens = found[0, 1:].tolist()
        expected.append(next((tokens[:n] for n, token in enumerate(tokens) if token in STOPS), tokens))
    own = model.generation_config
    own.num_beams, own.length_penalty, own.no_repeat_ngram_size, own.repetition_penalty = 4, 0.1, 1, 9.0
    answers = answers_of(model, tokenizer, sources(4), sampling)
    assert [a.written for a in answers] == [tokenizer.decode(tokens) for tokens in expected]
    assert own.num_beams == 4
    if family == "bart":
        assert all(tokens[0] == BEGIN for tokens in expected)


@pytest.mark.parametrize("sampling", [GREEDY, BEAMS], ids=str)
def test_a_token_that_the_model_never_writes_is_not_written(sampling: Sampling, tokenizer: Any) -> None:
    """Marian's pad token, which its answers begin with: no label ever was one."""
    model = writer("marian")
    with torch.no_grad():
        model.final_logits_bias[0, PAD] = 50.0
    pad = tokenizer.decode([PAD])
    assert not any(pad in answer.written for answer in answers_of(model, tokenizer, sources(), sampling))
    model.generation_config.bad_words_ids = None
    assert all(pad in answer.written for answer in answers_of(model, tokenizer, sources(), sampling))


def test_an_end_that_a_model_forces_does_not_hide_that_an_answer_was_cut(tokenizer: Any) -> None:
    model = writer("bart")
    two = Sampling(max_new_tokens=2)
    free = [answer.ended for answer in answers_of(model, tokenizer, sources(), two)]
    model.generation_config.forced_eos_token_id = END
    assert [answer.ended for answer in answers_of(model, tokenizer, sources(), two)] == free
    assert "length" in free


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family", ["t5", "bart", "llama"])
def test_least_and_longest_length_hold(family: str, beams: int, request: pytest.FixtureRequest, tokenizer: Any) -> None:
    model = request.getfixturevalue("llama") if family == "llama" else writer(family)
    prompts = sources(24)
    free = answers_of(model, tokenizer, prompts, Sampling(max_new_tokens=12, num_beams=beams))
    held = answers_of(model, tokenizer, prompts, Sampling(max_new_tokens=12, num_beams=beams, min_new_tokens=6))
    assert min(answer.tokens for answer in free) < 6
    assert {answer.ended for answer in held} == {"stop", "length"}
    assert all(answer.tokens - (answer.ended == "stop") >= 6 for answer in held)
    assert max(answer.tokens for answer in held) == 12


@pytest.mark.parametrize("beams", [1, 3])
def test_beams_of_a_causal_model_do_not_depend_on_the_batch(beams: int, llama: Any, tokenizer: Any) -> None:
    """With what may not repeat: what stands before an answer, the padding too, does not count."""
    prompts, sampling = sources(16), Sampling(max_new_tokens=14, num_beams=beams, no_repeat_ngram_size=1)
    alone = answers_of(llama, tokenizer, prompts, sampling, 1)
    together = answers_of(llama, tokenizer, prompts, sampling)
    assert [a.written for a in alone] == [a.written for a in together]
    assert [a.written for a in alone] != [a.written for a in answers_of(llama, tokenizer, prompts, GREEDY)]


@pytest.mark.parametrize("beams", [1, 3])
def test_no_sequence_of_tokens_stands_twice(beams: int, tokenizer: Any) -> None:
    model, prompts = writer("bart"), sources()
    seen = watch(model)

    def repeats(size: int) -> int:
        answers_of(model, tokenizer, prompts, Sampling(max_new_tokens=14, num_beams=beams, no_repeat_ngram_size=size))
        written = [[t for t in row[1:].tolist() if t not in STOPS] for row in seen[-1][1].sequences]
        pairs = [list(itertools.pairwise(tokens)) for tokens in written]
        return sum(len(each) - len(set(each)) for each in pairs)

    assert repeats(2) == 0
    assert repeats(0) > 0


def test_an_encoder_decoder_reads_and_writes_at_positions_of_its_own(tokenizer: Any) -> None:
    model, reporter = writer("bart", max_position_embeddings=16), Silent()
    model.generation_config.eos_token_id = END
    prompts = [[65] * 16, [66] * 17, [67]]
    sampling, stops = Sampling(max_new_tokens=40, min_new_tokens=40), (END,)
    requests = [Request(ids, None, sampling, stops) for ids in prompts]
    answers = generate_answers(model, tokenizer, requests, reporter=reporter)
    assert [(a.ended, a.tokens) for a in answers] == [("length", 16), ("no_room", 0), ("length", 16)]
    assert "1 of 3 prompts" in reporter.warnings[0]
    free = answers_of(writer("t5"), tokenizer, [[65] * 300], Sampling(max_new_tokens=200, min_new_tokens=200))
    assert free[0].tokens == 200


def test_beams_count_as_rows_of_a_batch(tokenizer: Any) -> None:
    model = writer("t5")
    seen = watch(model)
    answers_of(model, tokenizer, sources(), BEAMS, 6)
    assert [len(inputs["input_ids"]) for inputs, _ in seen] == [2, 2, 2, 2]


def test_a_cache_that_no_beam_can_be_told_of_is_an_error(llama: Any, tokenizer: Any) -> None:
    def generate(**_: Any) -> Any:
        raise ValueError("Odd cannot use beam search with a cache currently, as the cache cannot be reordered")

    llama.generate = generate
    with pytest.raises(ModelError, match=r"LlamaForCausalLM cannot be searched with beams.*num_beams: 1"):
        answers_of(llama, tokenizer, sources(1), BEAMS)
