"""Answers are what the model says: alone or in a batch, greedy or sampled, up to the first stop token."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode

from lorafit.answering.generate import Request, cut_prompts, find_stop_ids, generate_answers
from lorafit.answering.sampling import Sampling
from lorafit.contracts import Silent
from lorafit.errors import ResourceError

PROMPTS = ["a", "the sky is blue", "why?", "one two three four five six", "z" * 40, "", "été ☃"]


def ids_of(tokenizer, texts=PROMPTS):
    return [tokenizer(text)["input_ids"] for text in texts]


def answers_of(model, tokenizer, prompts, *, stop_ids=(), batch_rows=64, reporter=None, **sampling):
    """Answers to prompts, each numbered by its place."""
    how, stops = Sampling(**sampling), tuple(stop_ids)
    requests = [Request(ids, None, how, stops, row) for row, ids in enumerate(prompts)]
    return generate_answers(model, tokenizer, requests, batch_rows=batch_rows, reporter=reporter or Silent())


def greedy_alone(model, prompt, count, stops):
    """The definition: the likeliest next token, again and again, from full logits without cache or padding."""
    ids = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] in stops:
            break
    return ids[len(prompt) :]


def test_batched_greedy_answers_equal_the_definition(tuned, tokenizer):
    tuned.eval()
    prompts = [ids for ids in ids_of(tokenizer) if ids]
    answers = answers_of(tuned, tokenizer, prompts, max_new_tokens=24, batch_rows=4)
    for prompt, answer in zip(prompts, answers, strict=True):
        expected = greedy_alone(tuned, prompt, 24, {257})
        assert answer.tokens == len(expected)
        assert answer.text == tokenizer.decode(expected, skip_special_tokens=True)
    assert len({answer.text for answer in answers}) > 1


def test_rows_that_ended_are_dropped_and_the_others_go_on_unchanged(tuned, tokenizer):
    """Many ends at different places, so that several rounds happen, each with the cache of the last."""
    tuned.eval()
    prompts = [tokenizer(f"{number} " * (1 + number % 5))["input_ids"] for number in range(24)]
    stops = {257, *range(0, 256, 12)}
    sizes, generate = [], tuned.get_base_model().generate

    def watched(**inputs):
        sizes.append((len(inputs["input_ids"]), "past_key_values" in inputs))
        return generate(**inputs)

    tuned.get_base_model().generate = watched
    answers = answers_of(tuned, tokenizer, prompts, max_new_tokens=40, stop_ids=sorted(stops), batch_rows=24)
    assert [answer.tokens for answer in answers] == [len(greedy_alone(tuned, p, 40, stops)) for p in prompts]
    assert len(sizes) >= 3
    assert sizes[0] == (24, False)
    assert all(later <= 0.5 * earlier and cached for (earlier, _), (later, cached) in itertools.pairwise(sizes))


def test_stop_ids_end_an_answer_and_leave_no_trace(llama, tokenizer):
    prompts = ids_of(tokenizer, ["a", "the sky is blue", "why?"])
    free = [greedy_alone(llama, prompt, 12, set()) for prompt in prompts]
    stop = free[0][5]
    answers = answers_of(llama, tokenizer, prompts, max_new_tokens=12, stop_ids=[stop])
    for tokens, answer in zip(free, answers, strict=True):
        ends = [place for place, token in enumerate(tokens) if token in (stop, 257)]
        assert answer.ended == ("stop" if ends else "length")
        assert answer.tokens == (ends[0] + 1 if ends else 12)
        assert answer.text == tokenizer.decode(tokens[: ends[0]] if ends else tokens, skip_special_tokens=True)
    assert answers[0].ended == "stop"


def test_every_known_end_token_stops(llama, tokenizer):
    llama.generation_config.eos_token_id = [3, 4]
    assert find_stop_ids(llama, tokenizer, [258]) == [3, 4, 257, 258]


@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_sampling_does_not_depend_on_the_batch(tuned, tokenizer, top_p):
    tuned.eval()
    prompts = ids_of(tokenizer)
    options = {"max_new_tokens": 12, "temperature": 0.9, "top_p": top_p}
    alone = answers_of(tuned, tokenizer, prompts, seed=3, batch_rows=1, **options)
    together = answers_of(tuned, tokenizer, prompts, seed=3, batch_rows=64, **options)
    other = answers_of(tuned, tokenizer, prompts, seed=4, **options)
    assert [a.text for a in alone] == [a.text for a in together]
    assert [a.text for a in alone] != [a.text for a in other]


def test_samples_follow_the_softmax_within_the_nucleus(llama, tokenizer):
    prompt, draws, temperature, top_p = tokenizer("q")["input_ids"], 3000, 3.0, 0.7
    with torch.no_grad():
        likely = torch.softmax(llama(torch.tensor([prompt])).logits[0, -1].double() / temperature, dim=-1)
    order = likely.argsort(descending=True)
    nucleus = order[: int((likely[order].cumsum(0) < top_p).sum()) + 1]
    expected = (likely[nucleus] / likely[nucleus].sum()).tolist()
    answers = answers_of(
        llama,
        tokenizer,
        [prompt] * draws,
        max_new_tokens=1,
        temperature=temperature,
        top_p=top_p,
        batch_rows=500,
    )
    assert len(nucleus) >= 3
    seen = Counter(answer.text for answer in answers)
    names = [tokenizer.decode([int(token)], skip_special_tokens=True) for token in nucleus]
    assert set(seen) <= set(names)
    wanted = Counter()
    for name, share in zip(names, expected, strict=True):
        wanted[name] += share
    distance = sum(abs(seen[name] / draws - share) for name, share in wanted.items()) / 2
    assert distance < 0.5 * (len(wanted) / draws) ** 0.5 + 0.01  # mean total variation of a sample of that size


def test_the_models_own_generation_settings_do_not_reach_the_answer_and_stay(tuned, tokenizer):
    tuned.eval()
    prompts = ids_of(tokenizer)
    plain = answers_of(tuned, tokenizer, prompts, max_new_tokens=16)
    config = tuned.get_base_model().generation_config
    config.repetition_penalty, config.do_sample, config.min_new_tokens, config.temperature = 50.0, True, 10, 9.0
    tuned.get_base_model().config.use_cache = False
    again = answers_of(tuned, tokenizer, prompts, max_new_tokens=16)
    assert [a.text for a in again] == [a.text for a in plain]
    assert tuned.get_base_model().generation_config is config
    assert config.repetition_penalty == 50.0
    assert tuned.get_base_model().config.use_cache is False


class LinearInputs(TorchFunctionMode):
    """Keeps the shape of each linear's input, by the number of its outputs, and which were no whole matrices."""

    def __init__(self):
        super().__init__()
        self.shapes, self.strided = {}, []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.nn.functional.linear:
            self.shapes.setdefault(len(args[1]), []).append(tuple(args[0].shape))
            shape, stride = args[0].shape, args[0].stride()
            if stride != torch.empty(shape).stride():  # is_contiguous() ignores the stride of a dimension of one
                self.strided.append((tuple(shape), stride))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("batch_rows", [1, 4])
@pytest.mark.parametrize("knows_what_to_keep", [True, False])
def test_the_head_gets_whole_matrices_of_last_positions(tuned, tokenizer, knows_what_to_keep, batch_rows):
    """A linear on a CPU copies its weight once a row where the input is a slice; other positions' logits go unread."""
    tuned.eval()
    inner = tuned.get_base_model()
    if not knows_what_to_keep:
        forward = inner.forward

        def forward_of_old(input_ids, attention_mask=None, position_ids=None, past_key_values=None, **rest):
            named = {"attention_mask": attention_mask, "position_ids": position_ids, "past_key_values": past_key_values}
            return forward(input_ids, **named, **rest)  # by name: transformers 5.24 has other places for them

        inner.forward = forward_of_old
    prompts = ids_of(tokenizer)
    with LinearInputs() as seen:
        answers = answers_of(tuned, tokenizer, prompts, max_new_tokens=6, batch_rows=batch_rows)
    assert not seen.strided
    heads = seen.shapes[len(inner.lm_head.weight)]
    assert {shape[1:] for shape in heads} == {(1, 64)}
    assert max(shape[0] for shape in heads) == batch_rows
    for prompt, answer in zip(prompts, answers, strict=True):
        expected = greedy_alone(tuned, prompt or [257], 6, {257})
        assert answer.text == tokenizer.decode(expected, skip_special_tokens=True)
    assert inner(torch.tensor([prompts[1]])).logits.shape[1] == len(prompts[1])  # the hook is gone


def test_an_answer_keeps_the_control_tokens_that_it_wrote_apart_from_its_text(llama, tokenizer):
    """Many families mark tool calls with control tokens, which the text leaves out."""
    with torch.no_grad():
        llama.lm_head.weight.zero_()  # every token equally likely: the first, token 0, is taken
    free = answers_of(llama, tokenizer, [[65]], max_new_tokens=2)[0]
    assert free.text == free.written == tokenizer.decode([0, 0])
    with torch.no_grad():
        llama.lm_head.weight[258] = 100 * llama.model(torch.tensor([[65]])).last_hidden_state[0, -1]
    answer = answers_of(llama, tokenizer, [[65]], max_new_tokens=1)[0]
    assert (answer.text, answer.written) == ("", "<|eot_id|>")
    ended = answers_of(llama, tokenizer, [[65]], max_new_tokens=1, stop_ids=[258])[0]
    assert (ended.text, ended.written, ended.ended) == ("", "", "stop")


def test_positions_bound_the_answer(gpt2, tokenizer):
    reporter = Silent()
    prompts = [[65] * length for length in (3, 28, 31, 32, 40)]
    answers = answers_of(gpt2, tokenizer, prompts, max_new_tokens=10, reporter=reporter)
    for prompt, answer, room in zip(prompts, answers, (10, 4, 1, 0, 0), strict=True):
        if room == 0:
            assert (answer.ended, answer.text) == ("no_room", "")
        else:
            assert answer.tokens == len(greedy_alone(gpt2, prompt, room, {257}))
    assert "2 of 5 prompts" in reporter.warnings[0]


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("no memory"), RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED")]
)
def test_a_batch_that_does_not_fit_is_halved_and_one_row_that_does_not_is_an_error(llama, tokenizer, error):
    prompts = ids_of(tokenizer, PROMPTS[:5])
    whole = answers_of(llama, tokenizer, prompts, max_new_tokens=6)
    generate, sizes = llama.generate, []

    def fails_above(limit):
        def small_generate(**inputs):
            sizes.append(len(inputs["input_ids"]))
            if sizes[-1] > limit:
                raise error
            return generate(**inputs)

        return small_generate

    llama.generate = fails_above(2)
    halved = answers_of(llama, tokenizer, prompts, max_new_tokens=6)
    assert [a.text for a in halved] == [a.text for a in whole]
    assert sizes[:4] == [5, 2, 3, 1]
    llama.generate = fails_above(0)
    with pytest.raises(ResourceError, match="one answer"):
        answers_of(llama, tokenizer, prompts, max_new_tokens=6)


@pytest.mark.parametrize("autocast", [False, True])
def test_adapters_over_a_half_precision_base_answer_with_and_without_autocast(attach, llama, tokenizer, autocast):
    tuned = attach(llama.to(torch.bfloat16)).eval()
    layers = [module for module in tuned.modules() if hasattr(module, "cast_input_dtype_enabled")]
    for layer in layers:
        layer.cast_input_dtype_enabled = False  # as the objective leaves them
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        answers = answers_of(tuned, tokenizer, ids_of(tokenizer), max_new_tokens=4)
    assert all(answer.tokens for answer in answers)
    assert not any(layer.cast_input_dtype_enabled for layer in layers)


@given(
    rows=st.lists(st.tuples(st.integers(1, 50), st.integers(0, 9)), max_size=40),
    budget=st.integers(1, 200),
    most=st.integers(1, 6),
)
def test_batches_hold_every_row_that_has_room_once_within_the_bounds(rows, budget, most):
    lengths, rooms = [length for length, _ in rows], [room for _, room in rows]
    batches = cut_prompts(lengths, rooms, batch_tokens=budget, batch_rows=most)
    assert sorted(row for batch in batches for row in batch) == [row for row in range(len(rows)) if rooms[row] > 0]
    for batch in batches:
        assert len({rooms[row] for row in batch}) == 1
        assert len(batch) <= most
        cells = len(batch) * (max(lengths[row] for row in batch) + rooms[batch[0]])
        assert cells <= budget or len(batch) == 1
