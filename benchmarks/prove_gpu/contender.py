"""A contender of the speed stage, in a process of its own: `python -m benchmarks.prove_gpu.contender NAME WORK OUTPUT`.

WORK holds `task.json` (base, steps, and for each set its recipe and rows of a step) and the sets' rows as lorafit's
steps see them. OUTPUT gets, for each set, seconds, tokens and loss of every step.
"""

from __future__ import annotations

import gc
import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.throughput import load_base, rows_in_order

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RATE, RANK = 1e-3, 16
DEVICE_ROWS = 8  # TRL's default
PACKED_TOKENS, PACKED_ROWS = 2048, 4

Figures = dict[str, list[float]]


def run_lorafit(work: Path, task: dict[str, Any]) -> dict[str, Figures]:
    """Everything on auto. Leaves each set's rows behind for the others."""
    from benchmarks.prove_gpu.world import steps_of
    from lorafit import pipeline
    from lorafit.contracts import Silent
    from lorafit.job import open_job
    from lorafit.recipe.load import load_recipe

    found = {}
    for name, one in task["sets"].items():
        rows = work / f"{name}.json"
        if not rows.is_file():
            job = open_job(load_recipe(Path(one["recipe"])), Silent())
            rows.write_text(json.dumps(rows_in_order(job, task["steps"], one["batch"])))
        run = pipeline.train(Path(one["recipe"]), output=work / f"{name}-{time.time_ns()}").path
        steps = steps_of(run)
        found[name] = {key: [step[key] for step in steps] for key in ("seconds", "tokens", "loss")}
        gc.collect()
    return found


def run_trl(work: Path, task: dict[str, Any], name: str) -> dict[str, Figures]:
    """TRL's SFTTrainer: its defaults; with Liger and packing; or with Unsloth's model."""
    if name == "unsloth":
        import unsloth  # noqa: F401  before all it patches

    from importlib.util import find_spec

    packs = name == "trl-liger-packing"
    attention = "flash_attention_2" if packs and find_spec("flash_attn") else "sdpa"
    model = load_unsloth(task["base"]) if name == "unsloth" else load_base(task["base"], attention)
    found = {}
    for set_name, one in task["sets"].items():
        rows = json.loads((work / f"{set_name}.json").read_text())
        model, found[set_name] = time_what_fits(model, rows, one, task, packs=packs, wraps=name != "unsloth")
        gc.collect()
    return found


def load_unsloth(base: str) -> Any:
    import torch
    from unsloth import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained(
        model_name=base, max_seq_length=PACKED_TOKENS, dtype=torch.bfloat16, load_in_4bit=True
    )
    return FastLanguageModel.get_peft_model(
        model, r=RANK, lora_alpha=2 * RANK, lora_dropout=0, target_modules=TARGETS, use_gradient_checkpointing="unsloth"
    )


def time_what_fits(
    model: Any, rows: list[dict[str, Any]], one: dict[str, Any], task: dict[str, Any], *, packs: bool, wraps: bool
) -> tuple[Any, Figures]:
    """The model, ready for the next set, and figures with as many rows a device batch as fit: at most TRL's default."""
    import torch

    device_rows = min(DEVICE_ROWS, one["batch"])
    while True:
        try:
            figures, trained = time_trl(model, rows, one, task, device_rows, packs=packs, wraps=wraps)
        except torch.OutOfMemoryError:
            if device_rows == 1 or packs or not wraps:
                raise
            device_rows //= 2
        else:
            return (trained.unload() if wraps else trained), figures
        model = load_base(task["base"], "sdpa")  # the other one is torn
        gc.collect()
        torch.cuda.empty_cache()


def time_trl(
    model: Any,
    rows: list[dict[str, Any]],
    one: dict[str, Any],
    task: dict[str, Any],
    device_rows: int,
    *,
    packs: bool,
    wraps: bool,
) -> tuple[Figures, Any]:
    """Seconds, real tokens and loss of each step, and the trained model."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    on_card = torch.cuda.is_available()
    tokens = sum(len(row["input_ids"]) for row in rows)
    accumulated = one["batch"] // device_rows
    if packs:  # rows of a fixed length, as many a step as hold the tokens that the others see
        packed = max(1, round(tokens / task["steps"] / PACKED_TOKENS))
        device_rows = min(packed, PACKED_ROWS)
        accumulated = packed // device_rows
    config = SFTConfig(
        output_dir=str(Path(one["recipe"]).parent / "trl"), per_device_train_batch_size=device_rows,
        gradient_accumulation_steps=accumulated, learning_rate=RATE, lr_scheduler_type="constant",
        max_length=PACKED_TOKENS, max_steps=task["steps"], use_cpu=not on_card, train_sampling_strategy="sequential",
        report_to="none", save_strategy="no", disable_tqdm=True, logging_steps=1, packing=packs, use_liger_kernel=packs,
    )  # fmt: skip
    adapter = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS, task_type="CAUSAL_LM")
    trainer = SFTTrainer(
        model=model, args=config, train_dataset=Dataset.from_list(rows), peft_config=adapter if wraps else None,
        processing_class=AutoTokenizer.from_pretrained(task["base"]),
    )  # fmt: skip
    moments: list[float] = []
    counted: list[list[Any]] = [[]]

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self._note()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self._note()
            counted.append([])

        def _note(self) -> None:
            if on_card:
                torch.cuda.synchronize()
            moments.append(time.perf_counter())

    compute_loss = trainer.compute_loss

    def counting(model: Any, inputs: dict[str, Any], *arguments: Any, **options: Any) -> Any:
        mask = inputs.get("attention_mask")
        counted[-1].append(inputs["input_ids"].numel() if mask is None or mask.dim() > 2 else mask.sum())
        return compute_loss(model, inputs, *arguments, **options)

    trainer.compute_loss = counting
    trainer.add_callback(Watch())
    trainer.train()
    losses = [float(line["loss"]) for line in trainer.state.log_history if "loss" in line]
    ends = moments[1::2]
    seconds = [ends[0] - moments[0], *(b - a for a, b in itertools.pairwise(ends))]
    figures = {"seconds": seconds, "tokens": [float(sum(map(int, many))) for many in counted[: len(seconds)]]}
    return {**figures, "loss": losses}, trainer.model


def main() -> None:
    name, work, output = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    task = json.loads((work / "task.json").read_text())
    found = run_lorafit(work, task) if name == "lorafit" else run_trl(work, task, name)
    output.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
