"""Rows of one batch, each with its own adapter, are answered as by PEFT's model with that adapter alone."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

from lorafit.answering.batched import BatchedEngine, Limits
from lorafit.answering.engine import Engine
from lorafit.answering.generate import Request
from lorafit.answering.sampling import Sampling
from lorafit.answering.ticket import LiveRequest
from lorafit.contracts import Silent
from lorafit.errors import ModelError, NumericsError, ResourceError
from lorafit.ops.process_memory import trim_heap
from tests.support.adapted import load, open_base
from tests.unit.evaluation.conftest import build_llama

SIZES: dict[str, Any] = {
    "vocab_size": 259,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 257,
}


def build(made: Callable[[], Any]) -> Any:
    torch.manual_seed(0)
    return made().eval()


FAMILIES = {
    "llama": build_llama,
    "qwen2": partial(build, lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES))),
    "gpt2": partial(
        build,
        lambda: GPT2LMHeadModel(
            GPT2Config(
                vocab_size=259,
                n_embd=64,
                n_layer=2,
                n_head=4,
                n_positions=64,
                bos_token_id=256,
                eos_token_id=257,
                initializer_range=0.2,
            )
        ),
    ),
}
SLIDING = partial(build, lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=4)))
OF_GPT2 = {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}
KINDS: dict[str, dict[str, Any]] = {  # by the adapter's name
    "plain": {"r": 4, "lora_alpha": 8},
    "stable": {"r": 8, "lora_alpha": 4, "use_rslora": True},
    "patterns": {"r": 2, "lora_alpha": 8, "rank_pattern": {".*0.*": 5}, "alpha_pattern": {".*1.*": 2}},
    "some": {"r": 4, "lora_alpha": 16, "layers_to_transform": [1]},
}


def save(model: Any, folder: Path, config: Any, seed: int = 1, scale: float = 0.1) -> Path:
    """An adapter as PEFT writes it, which changes what the model says."""
    torch.manual_seed(seed)
    tuned = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if any(part in name for part in ("lora_B", "prompt_encoder", "lora_magnitude")):
                parameter.add_(torch.randn_like(parameter) * scale)
    tuned.save_pretrained(folder)
    return folder


def save_kinds(family: str, folder: Path) -> dict[str, Path]:
    targets = OF_GPT2 if family == "gpt2" else {"target_modules": ["q_proj", "k_proj", "o_proj", "down_proj"]}
    return {
        name: save(FAMILIES[family](), folder / name, LoraConfig(**targets, **options), seed)
        for seed, (name, options) in enumerate(KINDS.items())
    }


def requests_for(tokenizer: Any, names: list[str | None], count: int) -> list[LiveRequest]:
    """Of different lengths, prompts and answers both, the names in turn."""
    texts = [("why is the sky blue? " * 3)[: 1 + 5 * (number % 7)] for number in range(count)]
    return [
        LiveRequest(tokenizer(text)["input_ids"], names[number % len(names)], Sampling(4 + number % 9))
        for number, text in enumerate(texts)
    ]


def alone(model: Any, folders: dict[str, Path], tokenizer: Any, requests: list[LiveRequest]) -> list[str]:
    """What PEFT's model answers each by itself."""
    engine = Engine(model, tokenizer)
    for name, folder in folders.items():
        engine.add_adapter(name, folder)
    asked = [Request(request.prompt_ids, request.adapter, request.sampling) for request in requests]
    return [engine.answer([one])[0].text for one in asked]


def together(live: BatchedEngine, requests: list[LiveRequest]) -> list[str]:
    tickets = [live.submit(request) for request in requests]
    return ["".join(piece.text for piece in ticket) for ticket in tickets]


def watch_rows(model: Any) -> list[int]:
    """Gets how many rows each forward has."""
    seen: list[int] = []
    model.get_input_embeddings().register_forward_hook(lambda _, given, __: seen.append(len(given[0])))
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_16_requests_over_4_adapters_and_the_base(family: str, tmp_path: Path, tokenizer: Any) -> None:
    folders, model = save_kinds(family, tmp_path), FAMILIES[family]()
    rows = watch_rows(model)
    live = BatchedEngine(Engine(model, tokenizer))
    for name, folder in folders.items():
        live.load_adapter(name, folder)
    requests = requests_for(tokenizer, [None, *folders], 16)
    found = together(live, requests)
    live.close(finish=True)
    assert found == alone(FAMILIES[family](), folders, tokenizer, requests)
    assert live.why_alone is None and max(rows) > 8
    assert not live.engine.adapters, "an adapter went PEFT's way"
    assert len(set(found)) > 12


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantised_bases_are_shared_too(kind: str, tmp_path: Path, tokenizer: Any) -> None:
    build_llama().save_pretrained(tmp_path / "base")
    base, folders = open_base(tmp_path / "base"), save_kinds("llama", tmp_path)
    live = BatchedEngine(Engine(load(base, kind), tokenizer))
    for name, folder in folders.items():
        live.load_adapter(name, folder)
    requests = requests_for(tokenizer, [None, *folders], 10)
    found = together(live, requests)
    live.close(finish=True)
    assert found == alone(load(base, kind), folders, tokenizer, requests)
    assert live.why_alone is None and not live.engine.adapters


def test_a_cache_with_windows_is_answered_row_by_row(tmp_path: Path, tokenizer: Any) -> None:
    folders, model, reporter = {}, SLIDING(), Silent()
    for name in ("plain", "stable"):
        folders[name] = save(SLIDING(), tmp_path / name, LoraConfig(target_modules=["q_proj"], **KINDS[name]))
    rows = watch_rows(model)
    live = BatchedEngine(Engine(model, tokenizer), reporter=reporter)
    for name, folder in folders.items():
        live.load_adapter(name, folder)
    requests = requests_for(tokenizer, [None, *folders], 6)
    assert together(live, requests) == alone(SLIDING(), folders, tokenizer, requests)
    live.close(finish=True)
    assert max(rows) == 1 and live.why_alone == "MistralForCausalLM keeps more than keys and values of every token"
    assert reporter.warnings == [f"requests take turns, and share no forward: {live.why_alone}"]


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(use_dora=True, target_modules=["q_proj", "down_proj"], r=4),
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    ],
    ids=["dora", "prompt", "prefix"],
)
def test_what_is_no_product_is_answered_beside_the_others(config: Any, tmp_path: Path, tokenizer: Any) -> None:
    plain = LoraConfig(target_modules=["q_proj"], **KINDS["plain"])
    folders = {"plain": save(build_llama(), tmp_path / "plain", plain)}
    odd = {"odd": save(build_llama(), tmp_path / "odd", config, scale=0.5)}
    live = BatchedEngine(Engine(build_llama(), tokenizer))
    for name, folder in (folders | odd).items():
        live.load_adapter(name, folder)
    requests = requests_for(tokenizer, [None, "plain", "odd"], 9)
    found = together(live, requests)
    for names, own in (((None, "plain"), folders), (("odd",), odd)):
        places = [place for place, request in enumerate(requests) if request.adapter in names]
        expected = alone(build_llama(), own, tokenizer, [requests[place] for place in places])
        assert [found[place] for place in places] == expected
    live.unload_adapter("odd")
    again = [request for request in requests if request.adapter != "odd"]
    assert together(live, again) == [found[place] for place, r in enumerate(requests) if r.adapter != "odd"]
    assert type(live.engine.model).__name__ == "LlamaForCausalLM" and live.adapters == ("plain",)
    live.close(finish=True)


def test_what_must_see_the_whole_text_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], alora_invocation_tokens=[3, 4])
    live = BatchedEngine(Engine(build_llama(), tokenizer))
    with pytest.raises(
        ModelError, match="invocation tokens in the whole text at each token; answer with it by lorafit"
    ):
        live.load_adapter("late", save(build_llama(), tmp_path, config))
    assert live.adapters == ()
    live.close(finish=True)


def test_an_adapter_that_the_engine_had_is_stacked(tmp_path: Path, tokenizer: Any) -> None:
    folders = {"default": save(build_llama(), tmp_path, LoraConfig(target_modules=["q_proj"], **KINDS["plain"]))}
    engine = Engine(build_llama(), tokenizer)
    engine.add_adapter("default", folders["default"])
    live = BatchedEngine(engine)
    requests = requests_for(tokenizer, [None, "default"], 4)
    assert together(live, requests) == alone(build_llama(), folders, tokenizer, requests)
    assert live.adapters == ("default",) and not engine.adapters
    live.close(finish=True)


def test_numbers_that_overflow_end_their_own_request(tmp_path: Path, tokenizer: Any) -> None:
    """What it left behind in the cache must not reach the row that comes into its place."""
    targets = LoraConfig(target_modules=["k_proj", "v_proj"], **KINDS["plain"])
    folders = {name: save(build_llama(), tmp_path / name, targets, scale=scale) for name, scale in
               (("good", 0.1), ("huge", 3e37))}  # fmt: skip
    live = BatchedEngine(Engine(build_llama(), tokenizer), Limits(rows=3))
    for name, folder in folders.items():
        live.load_adapter(name, folder)
    requests = requests_for(tokenizer, [None, "good", "good"], 9)
    expected = alone(build_llama(), {"good": folders["good"]}, tokenizer, requests)
    tickets = [live.submit(request) for request in requests[:2]]
    broken = live.submit(LiveRequest(requests[0].prompt_ids, "huge", Sampling(8)))
    tickets += [live.submit(request) for request in requests[2:]]
    with pytest.raises(NumericsError, match="huge: the model's logits are not finite"):
        list(broken)
    assert ["".join(piece.text for piece in ticket) for ticket in tickets] == expected
    assert live.figures().finished[("huge", "error")] == 1
    live.close(finish=True)


def test_out_of_memory_ends_the_last_that_came(tokenizer: Any) -> None:
    model, failed = build_llama(), list[int]()
    forward = model.forward

    @wraps(forward)
    def full(**given: Any) -> Any:
        rows = len(given["input_ids"])
        if rows == 3 and not failed and given.get("past_key_values") is not None:
            failed.append(rows)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(**given)

    live = BatchedEngine(Engine(model, tokenizer))
    model.forward = full
    exactly = Sampling(max_new_tokens=10, min_new_tokens=10)
    tickets = [live.submit(LiveRequest(tokenizer(text)["input_ids"], sampling=exactly)) for text in ("a", "bc", "def")]
    lengths = [len(list(ticket)) for ticket in tickets[:2]]
    with pytest.raises(ResourceError, match="out of memory while answering"):
        list(tickets[2])
    assert lengths == [10, 10] and failed
    live.close(finish=True)


@pytest.mark.parametrize("beside", [False, True], ids=["first", "another"])
def test_a_broken_adapter_leaves_nothing_behind(beside: bool, tmp_path: Path, tokenizer: Any) -> None:
    """PEFT has put its layers into the model before it is seen that half of the values are missing."""
    dora = LoraConfig(use_dora=True, target_modules=["q_proj"], r=4)
    broken = save(build_llama(), tmp_path / "broken", LoraConfig(target_modules=["q_proj", "v_proj"], r=4))
    tensors = load_file(broken / "adapter_model.safetensors")
    left = {name: value for name, value in tensors.items() if "layers.1" not in name}
    save_file(left, str(broken / "adapter_model.safetensors"), metadata={"format": "pt"})
    live = BatchedEngine(Engine(build_llama(), tokenizer))
    if beside:
        live.load_adapter("dora", save(build_llama(), tmp_path / "dora", dora))
    sizes = [value.shape for value in live.engine.model.parameters()]
    requests = requests_for(tokenizer, [None, *live.adapters], 4)
    before = together(live, requests)
    with pytest.raises(ModelError, match="4 of 8 missing adapter tensors"):
        live.load_adapter("broken", broken)
    assert [value.shape for value in live.engine.model.parameters()] == sizes
    assert together(live, requests) == before
    live.load_adapter("broken", save(build_llama(), tmp_path / "whole", dora))
    live.close(finish=True)


def cycle(live: BatchedEngine, folder: Path, times: int, tokenizer: Any) -> None:
    for _ in range(times):
        live.load_adapter("again", folder)
        ticket = live.submit(LiveRequest(tokenizer("a")["input_ids"], "again", Sampling(2)))
        assert len(list(ticket)) == 2
        live.unload_adapter("again")


def test_nothing_stays_of_an_adapter_that_left(tmp_path: Path, tokenizer: Any) -> None:
    folder = save(build_llama(), tmp_path, LoraConfig(target_modules="all-linear", **KINDS["plain"]))
    live = BatchedEngine(Engine(build_llama(), tokenizer))
    counts = []
    for times in (2, 4):
        cycle(live, folder, times, tokenizer)
        gc.collect()
        hooks = sum(len(layer._forward_hooks) for layer in live.engine.model.modules())
        counts.append((hooks, sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())))
    assert counts[0] == counts[1] and counts[0][0] == 0
    live.close(finish=True)


@pytest.mark.slow
def test_memory_is_even_over_1000_adapters(tmp_path: Path, tokenizer: Any) -> None:
    folder = save(build_llama(), tmp_path, LoraConfig(target_modules="all-linear", **KINDS["plain"]))
    live = BatchedEngine(Engine(build_llama(), tokenizer))
    resident = []
    for times in (100, 900):
        cycle(live, folder, times, tokenizer)
        gc.collect()
        trim_heap()
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        resident.append(pages * 4096 / 2**20)
    live.close(finish=True)
    assert resident[1] - resident[0] <= 10
