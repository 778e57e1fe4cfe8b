"""What was trained ships: adapter and merged folder, opened by plain transformers and PEFT, speak as training wrote."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
)

from lorafit import pipeline
from lorafit.data.chat.render import ChatRenderer
from lorafit.kinds.metrics.tool_call import read_calls
from tests.support.chat_families import CHATML, FAMILIES, QWEN, WEATHER, assistant, call, tokenizer_of, tool, user
from tests.support.tiny_model import tiny_llama
from tests.support.tiny_recipe import write_rows

SYSTEM = 'Be "kind", e.g. \\n or %} {{ x }} é 😀:\n- always'
PAIRS = [
    ("What opens locker 1?", "The blue key."),
    ("What opens locker 2?", "A red card, on Monday."),
    ("Who reads the meter?", "Ann does."),
    ("Where is the mug?", "On the shelf."),
]
NEW_TOKENS = 24


def make_base(folder: Path, tokenizer: PreTrainedTokenizerBase) -> Path:
    """A random Llama for a tokenizer, whose own end token is not the one that ends a turn."""
    sizes = {"vocab_size": len(tokenizer), "num_key_value_heads": 4, "max_position_embeddings": 512}
    model = tiny_llama(bos_token_id=None, eos_token_id=0, pad_token_id=None, **sizes)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def train(
    folder: Path, rows: list[dict[str, Any]], *, model: dict[str, Any] | None = None, steps: int = 100, **data: Any
) -> Path:
    """Trains on `rows`, with that many steps until the answers are no accident; gives the recipe."""
    write_rows(folder / "d.jsonl", rows)
    recipe = {
        "name": "shipped",
        "model": model or {"base": "base", "dtype": "fp32", "attention": "sdpa", "quantization": "none"},
        "adapter": {"r": 16, "alpha": 32, "dropout": 0.0},
        "data": {"train": "d.jsonl", "max_length": 400, **data},
        "training": {
            "max_steps": steps, "batch_size": 4, "micro_batch_tokens": 1024, "learning_rate": 1e-2,
            "optimizer": "adamw", "gradient_checkpointing": False,
        },
        "output": "run",
    }  # fmt: skip
    file = folder / "r.yaml"
    file.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    pipeline.train(file)
    pipeline.merge(folder / "run", output=folder / "merged")
    return file


def greedy(model: Any, folder: Path, tokenizer: Any, prompts: list[list[int]]) -> list[tuple[str, int]]:
    """What plain transformers answers with the settings that lie in a folder: text, and tokens written."""
    settings = GenerationConfig.from_pretrained(folder, do_sample=False, max_new_tokens=NEW_TOKENS)
    found = []
    for ids in prompts:
        written = model.generate(torch.tensor([ids]), generation_config=settings)[0, len(ids) :]
        text = tokenizer.decode(written, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        found.append((text, len(written)))
    return found


def check_answers(folder: Path, prompts: list[str], prompt_ids: list[list[int]]) -> list[str]:
    """Run, adapter and merged folder give the same greedy answers, which end where training's did."""
    (folder / "prompts.txt").write_text("\n".join(prompts), encoding="utf-8")
    answers = [
        [(answer.text, answer.tokens) for answer in pipeline.generate(
            folder / name, input_file=folder / "prompts.txt", max_new_tokens=NEW_TOKENS
        ).answers]
        for name in ("run", "merged")
    ]  # fmt: skip
    adapter, merged = folder / "run" / "adapter", folder / "merged"
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    assert greedy(AutoPeftModelForCausalLM.from_pretrained(adapter), adapter, tokenizer, prompt_ids) == answers[0]
    assert greedy(AutoModelForCausalLM.from_pretrained(merged), merged, tokenizer, prompt_ids) == answers[0]
    assert answers[1] == answers[0]
    return [text for text, _ in answers[0]]


def plain(tokenizer: Any, messages: list[dict[str, Any]], **options: Any) -> list[int]:
    ids: list[int] = tokenizer.apply_chat_template(messages, return_dict=False, **options)
    return ids


@pytest.mark.parametrize("family", [*FAMILIES])
def test_a_family_of_templates_ships(tmp_path: Path, family: str) -> None:
    make_base(tmp_path / "base", tokenizer_of(family))
    rows = [{"messages": [user(ask), assistant(answer)]} for ask, answer in PAIRS]
    recipe = train(tmp_path, rows, system_prompt=SYSTEM, steps=60)
    trained = [row.input_ids for row in pipeline.preview(recipe, show=None).rows]
    tokenizers = [AutoTokenizer.from_pretrained(tmp_path / name) for name in ("run/adapter", "merged")]
    for tokenizer in tokenizers:
        assert [plain(tokenizer, row["messages"]) for row in rows] == trained
        assert tokenizer.decode(trained[0]).count("- always") == 1
    prompts = [ask for ask, _ in PAIRS]
    asked = [plain(tokenizers[0], [user(ask)], add_generation_prompt=True) for ask in prompts]
    assert len(set(check_answers(tmp_path, prompts, asked))) > 1


def test_named_templates_ship_with_the_system_prompt(tmp_path: Path) -> None:
    own = copy.deepcopy(tokenizer_of("qwen"))
    own.chat_template = {"default": CHATML, "tool_use": QWEN}
    make_base(tmp_path / "base", own)
    chat = [user("How is Paris?"), assistant("", tool_calls=[call("weather", city="Paris")]), tool("sun")]
    rows = [
        {"messages": [*chat, assistant("Sunny.")], "tools": [WEATHER]},
        {"messages": [user("Who?"), assistant("I.")]},
        {"messages": [{"role": "system", "content": "Own."}, user("Who?"), assistant("I.")]},
    ]
    recipe = train(tmp_path, rows, system_prompt=SYSTEM)
    trained = [row.input_ids for row in pipeline.preview(recipe, show=None).rows]
    for name in ("run/adapter", "merged"):
        shipped = AutoTokenizer.from_pretrained(tmp_path / name)
        assert shipped.chat_template.keys() == {"default", "tool_use"}
        assert [plain(shipped, row["messages"], tools=row.get("tools")) for row in rows] == trained
        assert [shipped.decode(ids).count("- always") for ids in trained] == [1, 1, 0]
    again = ChatRenderer(shipped)  # reads the prompt out of the template, and does not add it once more
    assert [again.encode(again.render(row["messages"], row.get("tools"))).input_ids for row in rows] == trained


def test_hermes_ships_and_what_was_learnt_is_called(tmp_path: Path) -> None:
    base = copy.deepcopy(tokenizer_of("qwen"))
    base.chat_template = None  # as base models have none
    make_base(tmp_path / "base", base)
    rows = [
        {
            "messages": [
                user(f"{city}?"),
                assistant("", tool_calls=[call("weather", city=city)]),
                tool("sun"),
                assistant("Sunny."),
            ],
            "tools": [WEATHER],
        }
        for city in ("Paris", "Rome")
    ]
    rows.append({"messages": [user("Who?"), assistant("I.")]})
    recipe = train(tmp_path, rows, chat_template="hermes", system_prompt=SYSTEM, max_length=1000)
    trained = [row.input_ids for row in pipeline.preview(recipe, show=None).rows]
    for name in ("run/adapter", "merged"):
        shipped = AutoTokenizer.from_pretrained(tmp_path / name)
        assert [plain(shipped, row["messages"], tools=row.get("tools")) for row in rows] == trained
        assert [shipped.decode(ids).count("- always") for ids in trained] == [1, 1, 1]
    asked = [{"messages": row["messages"][:1], "tools": row.get("tools", [])} for row in rows]
    answers = [
        [answer.text for answer in pipeline.generate(tmp_path / name, rows=asked, max_new_tokens=80).answers]
        for name in ("run", "merged")
    ]
    assert answers[0] == answers[1] and answers[0][2] == "I."
    called = [[("weather", {"city": city})] for city in ("Paris", "Rome")]
    assert [read_calls(text) for text in answers[0]] == [*called, []]


def test_the_pages_lines_open_a_quantised_run(tmp_path: Path) -> None:
    make_base(tmp_path / "base", tokenizer_of("chatml"))
    rows = [{"messages": [user(ask), assistant(answer)]} for ask, answer in PAIRS]
    train(tmp_path, rows, model={"base": "base", "dtype": "bf16"})
    adapter, prompts = tmp_path / "run" / "adapter", [ask for ask, _ in PAIRS]
    answers = pipeline.generate(tmp_path / "run", rows=prompts, max_new_tokens=NEW_TOKENS).answers
    page = (Path(__file__).parents[2] / "docs" / "merge.md").read_text(encoding="utf-8")
    [block] = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(block.replace("RUN/adapter", str(adapter)), "merge.md", "exec"), names)
    model, plainly = names["model"], AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    ids = [tokenizer.apply_chat_template([user(ask)], add_generation_prompt=True).input_ids for ask in prompts]
    assert greedy(model, adapter, tokenizer, ids) == [(answer.text, answer.tokens) for answer in answers]
    with torch.no_grad():
        one, other = (opened(input_ids=torch.tensor([ids[0]])).logits.float() for opened in (model, plainly))
    assert (one - other).abs().max() > 0.1, "the base without quantisation is another"


def test_a_run_on_verbatim_rows_stays_verbatim(tmp_path: Path) -> None:
    make_base(tmp_path / "base", tokenizer_of("chatml"))  # it has a template, which these rows do not go through
    recipe = train(tmp_path, [{"prompt": f"{ask} ", "completion": answer} for ask, answer in PAIRS])
    trained = [row.input_ids for row in pipeline.preview(recipe, show=None).rows]
    for name in ("run/adapter", "merged"):
        shipped = AutoTokenizer.from_pretrained(tmp_path / name)
        assert [[*shipped(f"{ask} {answer}").input_ids, shipped.eos_token_id] for ask, answer in PAIRS] == trained
    prompts = [f"{ask} " for ask, _ in PAIRS]
    ids = [shipped(prompt).input_ids for prompt in prompts]
    answers = check_answers(tmp_path, prompts, ids)
    assert answers[0] == PAIRS[0][1]
    adapter = tmp_path / "run" / "adapter"  # transformers opens an adapter's folder as well
    plainly = greedy(AutoModelForCausalLM.from_pretrained(adapter), adapter, shipped, ids)
    assert [text for text, _ in plainly] == answers
