"""Flags and arguments of commands for typer: their type, default, metavar and help, by the parameter's name.

What a value may be stands in `lorafit.console.arguments`, which the Python API reads too.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from lorafit.console.arguments import ARGUMENTS, FLAGS
from lorafit.contracts import JsonMapping

_HELP = {
    "json": ("", "One JSON object on stdout, also for an error."),
    "quiet": ("", "Only errors and the result."),
    "verbose": ("", "Say more."),
    "debug": ("", "Show tracebacks and the libraries' own logs."),
    "recipe": ("RECIPE", "The recipe, a YAML file."),
    "overrides": ("KEY=VALUE", "Change one value of the recipe, e.g. training.epochs=1. Repeatable."),
    "checkpoint": ("best|last|STEP", "Which checkpoint; the saved adapter if left out."),
    "base_model": (
        "PATH_OR_ID",
        "Where the base model is: a folder, a .gguf file or a hub id. It must be the one that was trained on.",
    ),
    "train.output": ("DIR", "Run folder instead of the recipe's."),
    "resume": ("", "Go on with the run in the output folder."),
    "resume_from": ("STEP", "Go on from this checkpoint."),
    "plan_file": ("FILE", "Take the resolved values of another run's plan.json."),
    "dry_run": ("", "Plan and check, then stop before the weights are loaded."),
    "allow_inexact": ("", "Resume on another kind of device or number of ranks."),
    "measure_memory": ("", "Count live tensors in every step: slower, and exact."),
    "profile": ("", "Write where the time goes into the run folder: a table and a trace."),
    "evaluate.run": ("RUN_OR_RECIPE", "A run folder, its adapter folder, or the recipe of one."),
    "split": ("test|validation|train", "Rows to score; test where the recipe has it."),
    "limit": ("ROWS", "Score only the first rows."),
    "merge.run": ("RUN_OR_ADAPTER", "A run folder, or an adapter folder."),
    "merge.output": ("DIR", "Where the merged model goes."),
    "base": ("dequantized|original", "Weights to merge into; what was trained on if left out."),
    "merge.verify": ("", "Skip the check of what was written."),
    "export.run": ("RUN_OR_ADAPTER", "A run folder, an adapter folder, or a whole model for gguf and ollama."),
    "to": ("TARGET", "peft, gguf, gguf-lora, ollama, vllm or hub."),
    "export.output": ("PATH", "File (gguf, gguf-lora) or folder instead of one beside the run."),
    "base_id": (
        "OWNER/NAME",
        "peft, vllm, hub: the base's hub id, where the run had it from elsewhere; not compared.",
    ),
    "export.base": ("dequantized|original", "gguf, ollama: weights to merge into; what was trained on if left out."),
    "dtype": ("f32|f16|bf16|q8_0", "gguf, ollama: of the matrices; f16 if left out."),
    "from_base": ("MODEL", "ollama: put the adapter on this model of Ollama's or GGUF file, and merge nothing."),
    "repo": ("OWNER/NAME", "hub: where to push to, with the token in HF_TOKEN."),
    "private": ("", "hub: make the repository private, where it is made."),
    "license": ("NAME", "hub: the adapter's licence, e.g. apache-2.0."),
    "export.dry_run": ("", "hub: write the folder and send nothing."),
    "export.verify": ("", "Compare logits of the target's engine with lorafit's: llama.cpp's, or PEFT's."),
    "generate.run": ("RUN_OR_MODEL", "A run, its recipe, an adapter, a model folder or a .gguf file."),
    "generate.prompt": ("TEXT", "One prompt."),
    "generate.input_file": ("FILE", "A file of prompts: txt, one a line, or training's rows."),
    "compare_base": ("", "Answer with the base model too."),
    "temperature": ("NUMBER", "0 is greedy."),
    "top_p": ("SHARE", "Nucleus of the sampled tokens."),
    "max_new_tokens": ("TOKENS", "Longest answer, in tokens."),
    "min_new_tokens": ("TOKENS", "No answer ends before it has so many."),
    "num_beams": ("BEAMS", "Answers kept at each step of a beam search; 1 is none."),
    "length_penalty": ("NUMBER", "Of beam search: more than 0 favours long answers."),
    "no_repeat_ngram_size": ("TOKENS", "No so many tokens stand twice in an answer; 0 allows it."),
    "seed": ("NUMBER", "Of the sampling."),
    "classify.run": ("RUN_OR_MODEL", "A run, its recipe, an adapter or a merged model folder."),
    "classify.prompt": ("TEXT", "One text."),
    "classify.input_file": ("FILE", "A file of texts: txt, one a line, or training's rows."),
    "classify.output": ("FILE", "Write the labels there too: a table (.csv), or JSON lines (.jsonl)."),
    "data": ("ROWS", "A file of rows to train on: jsonl, json, csv, tsv, txt, parquet, xlsx."),
    "init.output": ("FILE", "The recipe to write; recipe.yaml where not given."),
    "init.base_model": ("PATH_OR_ID", "The base model: a folder, a .gguf file or a hub id."),
    "task": ("TASK", "What the rows teach; the first that reads them where not given."),
    "adapter": ("KIND", "The adapter; lora where not given."),
    "quantization": ("KIND", "How the frozen weights are stored."),
    "test_file": ("ROWS", "Rows that training never sees."),
    "columns": ("OURS=THEIRS", "Which columns hold the fields of a format, e.g. question=Frage,answer=Antwort."),
    "gpu": (
        "SIZE|NAME",
        "24GiB, rtx-4090 or cpu: exit 10 where it does not fit; several are compared. `list` names all cards.",
    ),
    "fit": ("SIZE|NAME", "The largest micro-batch, row and rank that fit; exit 10 if none does."),
    "headroom": ("SHARE", "Of the card's memory, what must stay free: 0.05 where not given."),
    "price_per_hour": ("PRICE", "Of the card, in any currency: what the run will cost."),
    "exact": ("", "Run the training step itself on tensors without values: up to a minute."),
    "recipes": ("RECIPE", "A recipe with --over, or several recipes of the same rows."),
    "over": ("KEY=A,B", "Values of a key that are compared, e.g. adapter=lora,dora. Repeatable: every combination."),
    "compare.output": ("DIR", "Folder of the comparison instead of RUN-comparison."),
    "rates": ("NUMBER", "Learning rates of each method, around its own."),
    "spread": ("FACTOR", "The highest of these rates is so many times the lowest."),
    "learning_rates": ("A,B,C", "These learning rates for every method instead."),
    "seeds": ("NUMBER", "Runs of each method at each rate, each with a seed of its own."),
    "metric": ("NAME", "What methods are ranked by, on the test rows."),
    "budget": ("TIME", "Most time, e.g. 60min: what it does not reach is left out, and said."),
    "trim.run": ("RUN_OR_RECIPE", "A run folder, or the recipe of one."),
    "rank": (
        "RANK",
        "The smaller rank, or auto: the smallest that validation rows cannot tell from the whole adapter.",
    ),
    "trim.output": ("DIR", "Folder of the adapter instead of RUN-rank-RANK."),
    "serve.run": ("BASE|RUN", "A model folder, a .gguf file, a hub id, or a run or adapter on its base."),
    "adapters": ("NAME=DIR", "An adapter or run, and the name it is asked for by. Repeatable."),
    "ab_split": ("NAME=SHARE,...", "Who answers for the model `split`, e.g. a=0.9,b=0.1; a user always gets the same."),
    "feedback": ("FILE", "Take ratings, and add them to this file as rows to train on."),
    "route": (
        "SHARE",
        "Serve the model `auto`: the prompt decides who answers. An adapter gets such a share of its own, say 0.9.",
    ),
    "drift": ("", "Tell in /metrics how far the prompts of each adapter are from those it was trained on."),
    "host": ("ADDRESS", "Where it listens. Other than this machine's own: LORAFIT_API_KEY must be set."),
    "port": ("PORT", "0 takes any that is free."),
    "allow_loading": ("", "Let requests load and unload adapters."),
    "serve.max_new_tokens": ("TOKENS", "Longest answer of a request that names no length."),
    "max_running": ("REQUESTS", "Answered at the same time."),
    "max_waiting": ("REQUESTS", "Wait for room; one more gets 429."),
    "max_batch_tokens": ("TOKENS", "Bound of running requests x longest prompt with its answer."),
    "timeout": ("SECONDS", "Most time of an answer, its wait included."),
    "grace": ("SECONDS", "Of running answers, when the server is asked to end."),
    "inspect_adapter.run": ("RUN_OR_ADAPTER", "A run folder, or an adapter folder."),
    "ablate": (
        "layers|modules|none",
        "Parts that are switched off one by one, to see what each is worth; layers, and none with --compare.",
    ),
    "inspect_adapter.limit": ("ROWS", "Rows to measure that on: the first ones."),
    "compare": ("RUN_OR_ADAPTER", "Another adapter on the same base, shown beside the first."),
    "inspect_adapter.output": ("DIR", "Write inspect.json and a heat map (SVG) there."),
    "chat.run": ("RUN|MODEL", "A run or adapter on its base, a model folder, a .gguf file, or a hub id."),
    "system": ("TEXT", "The system message; without, the one that was trained with."),
    "expression": (
        "SUM",
        'A weighted sum of adapters, e.g. "0.7*a + 0.3*b - c"; a minus at its beginning in parentheses: "(-a) + b".',
    ),
    "compose.adapters": ("NAME=DIR", "A run or an adapter folder, by its name in the sum. Repeatable."),
    "compose.output": ("DIR", "Folder of the adapter."),
    "compose.rank": ("RANK|SHARE", "A smaller rank, or what each layer may lose of its update, e.g. 1%."),
    "method": ("sum|ties|dare", "How updates become one."),
    "density": ("SHARE", "Of each update's values, what ties and dare keep; 0.2 where not given."),
    "compose.seed": ("NUMBER", "Of what dare drops."),
    "mean": ("", "The weighted mean instead of a sum."),
    "weights": ("A,B,C|rows", "Of the mean: numbers, or the training rows of the runs; equal where not given."),
    "fit_rows": ("ROWS", "Find the weights that give the least loss on these rows."),
    "eval_rows": ("ROWS", "Score these rows instead of the runs' own validation rows."),
    "scores": ("", "Score nothing."),
    "convert": ("", "Take what other methods change in their base as an update, cut to a rank."),
    "patterns": ("", "Keep each layer's own rank, by PEFT's rank_pattern, which some engines ignore."),
    "compare.resume": ("", "Go on with the comparison in the output folder."),
    "show": ("ROWS", "Rows to show; of many, only the first are counted then. Without: 3, or all with --json."),
}
"""What stands for a value, empty where a flag has none, and the help: by parameter, of one command or of all."""
COMMON = ("json", "quiet", "verbose", "debug")
_DEFAULTS = {
    "temperature": 0.0,
    "top_p": 1.0,
    "seed": 0,
    "max_new_tokens": 256,
    "min_new_tokens": 0,
    "num_beams": 1,
    "length_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "rates": 3,
    "spread": 10.0,
    "seeds": 3,
    "metric": "loss",
    "host": "127.0.0.1",
    "port": 8000,
    "max_running": 16,
    "max_waiting": 64,
    "max_batch_tokens": 16_384,
    "timeout": 600.0,
    "grace": 30.0,
    "inspect_adapter.limit": 12,
    "method": "sum",
}
_REQUIRED = ("merge.output", "trim.rank", "compose.output", "compose.adapters", "export.to")
_SEVERAL = ("overrides", "gpu", "over", "recipes", "adapters")
_POSITIONAL = ("recipe", "run", "recipes", "data", "expression")


def parameter(command: str, name: str, more: Mapping[str, JsonMapping]) -> inspect.Parameter:
    """A parameter of a command, as typer reads it.

    Args:
        command: The function that is called, whose own help goes before that of all.
        name: The parameter.
        more: What else typer must know of a flag, such as a callback, by the flag's parameter.
    """
    argument = ARGUMENTS[name]
    default: Any = _DEFAULTS.get(f"{command}.{name}", _DEFAULTS.get(name, inspect.Parameter.empty))
    metavar, text = _HELP.get(f"{command}.{name}") or _HELP[name]
    kind: Any = next((kind for kind in (bool, str, float, int) if kind in argument.types), str)
    if os.PathLike in argument.types and name != "base_model":
        kind = Path
    kind = list[str] if name in _SEVERAL else kind
    own = f"{command}.{name}"
    flag = FLAGS.get(own) or FLAGS.get(name, f"--{name.replace('_', '-')}")
    rest = more.get(own) or more.get(name, {})
    option: Any = typer.Option(flag, metavar=metavar or None, help=text, min=argument.least, max=argument.most, **rest)
    if name in _POSITIONAL:
        option = typer.Argument(metavar=metavar, readable=name == "run", help=text)
    is_needed = f"{command}.{name}" in _REQUIRED or (name in _POSITIONAL and name != "expression")
    if default is inspect.Parameter.empty and not is_needed:
        kind, default = (kind, False) if kind is bool else (kind | None, None)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option])
