"""Chat templates in the manner of well-known families, written for these tests, and a tiny tokenizer for each."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "The quick brown fox answers: yes, it is so.\n\n  The lazy dog asks <why> | and [why] not?",
    "user assistant system model",
    "def add(a, b):\n    return a + b  # [[1, 2], [3, 4]]\n\n\n",
    '{"name": "weather", "arguments": {"city": "Paris"}} think tool call im_start im_end end of turn',
]

CHATML = """
{%- if messages[0].role != 'system' %}{{- '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}{% endif %}
{%- for m in messages %}{{- '<|im_start|>' ~ m.role ~ '\\n' ~ m.content ~ '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""

LLAMA3 = """
{%- for m in messages %}
{%- set text = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] | trim + '<|eot_id|>' %}
{%- if loop.first %}{% set text = bos_token + text %}{% endif %}
{{- text }}
{%- endfor %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}"""

MISTRAL = """
{{- bos_token }}
{%- set rest = messages %}{% set system = '' %}
{%- if messages[0].role == 'system' %}
{%- set system = messages[0].content + '\\n\\n' %}{% set rest = messages[1:] %}
{%- endif %}
{%- for m in rest %}
{%- if m.role == 'user' %}
{%- if loop.first and tools %}{{- '[AVAILABLE_TOOLS] ' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}{% endif %}
{{- '[INST] ' + (system if loop.first else '') + m.content + ' [/INST]' }}
{%- elif m.role == 'assistant' and m.tool_calls %}
{{- '[TOOL_CALLS] [' }}
{%- for call in m.tool_calls %}
{{- '{"name": "%s", "arguments": %s}' % (call.function.name, call.function.arguments | tojson) }}
{{- ', ' if not loop.last else '' }}
{%- endfor %}
{{- ']' + eos_token }}
{%- elif m.role == 'assistant' %}{{- ' ' + m.content | trim + eos_token }}
{%- elif m.role == 'tool' %}{{- '[TOOL_RESULTS] {"content": %s}[/TOOL_RESULTS]' | format(m.content | tojson) }}
{%- else %}{{- raise_exception('only user, assistant, tool and one system message') }}{% endif %}
{%- endfor %}"""

GEMMA = """
{{- bos_token }}
{%- set prefix = '' %}{% set rest = messages %}
{%- if messages[0]['role'] == 'system' %}
{%- set prefix = messages[0]['content'] ~ '\\n\\n' %}{% set rest = messages[1:] %}
{%- endif %}
{%- for m in rest %}
{%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{- raise_exception('roles must alternate') }}{% endif %}
{{- '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\\n' + (prefix if loop.first else '') }}
{%- if m['content'] is string %}{{- m['content'] | trim }}
{%- else %}{% for part in m['content'] %}{{- part['text'] | trim }}{% endfor %}{% endif %}
{{- '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{% endif %}"""

PHI = """
{%- for m in messages %}{{- '<|' + m['role'] + '|>\\n' + m['content'] + '<|end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{% else %}{{- eos_token }}{% endif %}"""

QWEN = """
{%- if tools %}
{{- '<|im_start|>system\\n' + (messages[0].content + '\\n\\n' if messages[0].role == 'system' else '') + '<tools>' }}
{%- for tool in tools %}{{- '\\n' + tool | tojson }}{% endfor %}
{{- '\\n</tools>\\nCall with <tool_call>{}</tool_call>.<|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last_query=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last_query = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{%- if m.role == 'user' or (m.role == 'system' and not loop.first) %}
{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- elif m.role == 'assistant' %}
{%- set content = m.content %}{% set reasoning = '' %}
{%- if m.reasoning_content is string %}{% set reasoning = m.reasoning_content %}
{%- elif '</think>' in content %}
{%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}
{%- endif %}
{{- '<|im_start|>' + m.role + '\\n' }}
{%- if loop.index0 > ns.last_query and (loop.last or reasoning) %}
{{- '<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
{%- else %}{{- content }}{% endif %}
{%- for call in m.tool_calls or [] %}
{%- if not loop.first or content %}{{- '\\n' }}{% endif %}
{{- '<tool_call>\\n{"name": "' ~ call.function.name ~ '", "arguments": ' }}
{{- (call.function.arguments | tojson) ~ '}\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- elif m.role == 'tool' %}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{% endif %}
{{- '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{% endif %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""

DEEPSEEK = """
{{- bos_token }}
{%- for m in messages %}
{%- if m.role == 'system' %}{{- m.content }}
{%- elif m.role == 'user' %}{{- '<｜User｜>' + m.content }}
{%- elif m.role == 'tool' %}{{- '<｜tool▁output▁begin｜>' + m.content + '<｜tool▁output▁end｜>' }}
{%- elif m.tool_calls %}
{{- '<｜Assistant｜>' + m.content }}
{%- for call in m.tool_calls %}
{{- '<｜tool▁call▁begin｜>' + call.function.name + '\\n' + call.function.arguments + '<｜tool▁call▁end｜>' }}
{%- endfor %}
{{- eos_token }}
{%- else %}{{- '<｜Assistant｜>' + m.content.split('</think>')[-1] + eos_token }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<｜Assistant｜><think>\\n' }}{% endif %}"""

HARMONY = """
{%- for m in messages %}
{%- if m.role == 'assistant' %}
{%- if m.thinking %}{{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif %}
{{- '<|start|>assistant<|channel|>final<|message|>' + m.content + ('<|return|>' if loop.last else '<|end|>') }}
{%- else %}{{- '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{% endif %}"""

VICUNA = """
{%- for m in messages %}
{%- if m.role == 'user' %}{{- 'USER: ' + m.content + ' ' }}
{%- elif m.role == 'assistant' %}{{- 'ASSISTANT: ' + m.content + eos_token }}
{%- else %}{{- m.content + '\\n\\n' }}{% endif %}
{%- endfor %}"""

GENERATION = """
{%- for m in messages %}
{{- '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' %}{% generation %}{{- m.content + '<|im_end|>' }}{% endgeneration %}{{- '\\n' }}
{%- else %}{{- m.content + '<|im_end|>\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""


@dataclass(frozen=True)
class Family:
    """A template with its control tokens. `plain` ones are added tokens that are not marked special."""

    template: str
    end: str
    eos: str
    special: tuple[str, ...]
    plain: tuple[str, ...] = ()
    bos: str | None = None
    normalizer: str | None = None


FAMILIES = {
    "chatml": Family(CHATML, "<|im_end|>", "<|im_end|>", ("<|im_start|>", "<|im_end|>", "<|endoftext|>")),
    "llama3": Family(
        LLAMA3,
        "<|eot_id|>",
        "<|end_of_text|>",
        ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        bos="<|begin_of_text|>",
    ),
    "mistral": Family(
        MISTRAL,
        "</s>",
        "</s>",
        ("<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
        plain=("[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
        bos="<s>",
    ),
    "gemma": Family(
        GEMMA,
        "<end_of_turn>",
        "<eos>",
        ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
        plain=("\n\n", "<table>"),
        bos="<bos>",
    ),
    "phi": Family(
        PHI, "<|end|>", "<|endoftext|>", ("<|endoftext|>", "<|end|>", "<|user|>", "<|system|>", "<|assistant|>")
    ),
    "qwen": Family(
        QWEN,
        "<|im_end|>",
        "<|im_end|>",
        ("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
        plain=("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"),
        normalizer="NFC",
    ),
    "deepseek": Family(
        DEEPSEEK,
        "<｜end▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
        plain=("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"),
        bos="<｜begin▁of▁sentence｜>",
    ),
    "harmony": Family(
        HARMONY,
        "<|return|>",
        "<|return|>",
        ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>"),
    ),
    "vicuna": Family(VICUNA, "</s>", "</s>", ("<s>", "</s>"), bos="<s>"),
    "generation": Family(GENERATION, "<|im_end|>", "<|im_end|>", ("<|im_start|>", "<|im_end|>")),
}


@cache
def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of some 350 tokens with the control tokens and the template of a family."""
    family = FAMILIES[name]
    backend = Tokenizer(models.BPE())
    if family.normalizer == "NFC":
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in family.special])
    backend.add_tokens([AddedToken(token, normalized=False) for token in family.plain])
    special: dict[str, Any] = {"eos_token": family.eos}
    if family.bos:
        special["bos_token"] = family.bos
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    tokenizer.chat_template = family.template
    return tokenizer


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **fields}


def system(content: str) -> dict[str, Any]:
    return {"role": "system", "content": content}


def tool(content: str, **fields: Any) -> dict[str, Any]:
    return {"role": "tool", "content": content, **fields}


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
