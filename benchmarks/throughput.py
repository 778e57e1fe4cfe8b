"""lorafit and its peers on the same work: rows a second, peak memory, held-out loss.

    python benchmarks/throughput.py MODEL ROWS.jsonl [ROWS.jsonl ...] [--quick] [--rounds 2] [--json FILE]

MODEL is a folder of safetensors with a chat template, or `package://NAME/FILE.gguf`. Every contender trains the same
adapter (LoRA r 16 on all linears, from the same initial weights) of the same NF4 model on the same token ids and
labels, 16 rows a step, at most 512 tokens a row, with the same optimizer, rate and clipping, each in a process of its
own, in turns.

    lorafit           `lorafit train`, everything on auto
    trl               TRL's SFTTrainer with its defaults: checkpointing on, 8 rows a device batch, accumulated twice
    trl-best          TRL without checkpointing, the fastest of eager and sdpa attention with 1 to 8 rows a batch;
                      --quick tries one row with either, and eight rows with sdpa, which is faster for short rows
    trl-packing       TRL's defaults with packing, one epoch (steps hold other rows then: no loss is compared)
    plain             transformers and PEFT in a loop of twenty lines: one row at a time, no checkpointing

`steps` are the seconds of the three optimizer steps, `process` those of the whole process with imports, loading and
quantising; memory is the peak of the process as the kernel counted it. Trained tokens are counted by each contender
itself and must be equal. Losses are of adapters as saved, by one evaluator. Utilisation is 4 N_frozen T + 6 N_adapter T
+ 4 N_head T_labelled + attention over the fastest square product that the machine was seen to do with these threads.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

STEPS, BATCH, MAX_TOKENS, RATE = 3, 16, 512, 1e-3
HELD_OUT_ROWS = 24
GIB = 2**30
PACKAGES = ("lorafit", "torch", "transformers", "peft", "bitsandbytes", "accelerate", "trl")
QUICK_SEARCH = [("sdpa", 1), ("eager", 1), ("sdpa", 8)]
SEARCH = [("sdpa", 1), ("eager", 1), ("sdpa", 2), ("eager", 2), ("eager", 4), ("eager", 8)]
IGNORED = -100


@dataclass
class Outcome:
    """One process of one contender."""

    contender: str
    steps_seconds: float
    process_seconds: float
    cpu_seconds: float
    peak_bytes: int
    tokens: int
    trained_tokens: int
    loss: float | None = None


# The parent: starts, times and compares. It imports nothing heavy, or its children would be charged for it.


def run_process(command: list[str], log: Path, threads: int, cache: Path) -> tuple[float, float, int]:
    """Wall seconds, CPU seconds and peak resident bytes of a process; its output goes to `log`."""
    environment = {
        **os.environ, "OMP_NUM_THREADS": str(threads), "LORAFIT_CACHE": str(cache), "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore",
    }  # fmt: skip
    with log.open("wb") as stream:
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise SystemExit(f"failed ({process.returncode}): {' '.join(command)}\n{log.read_text()[-3000:]}")
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


def child(work: Path, name: str, *arguments: str) -> list[str]:
    return [sys.executable, __file__, "--child", name, str(work), *arguments]


def run_contender(name: str, work: Path, threads: int, number: int) -> Outcome:
    output = work / f"{name.replace('/', '-')}-{number}"
    if name == "lorafit":
        recipe = str(work / "recipe.yaml")
        command = [sys.executable, "-m", "lorafit", "train", recipe, "--output", str(output), "--quiet"]
    else:
        command = child(work, "peer", name, str(output))
    figures = run_process(command, work / f"{output.name}.log", threads, work / "cache")
    result = json.loads((output / "result.json").read_text())
    return Outcome(name, result["seconds"], *figures, result["tokens"], result["trained_tokens"])


def find_best(work: Path, threads: int, quick: bool) -> str:
    """TRL's fastest setting on these rows, by one run of each."""
    candidates = QUICK_SEARCH if quick else SEARCH
    seconds = {}
    for attention, rows in candidates:
        name = f"trl-best/{attention}/{rows}"
        outcome = run_contender(name, work, threads, 0)
        seconds[name] = outcome.steps_seconds
        say(f"  {name}: {outcome.steps_seconds:.1f} s, {outcome.peak_bytes / GIB:.2f} GiB")
    return min(seconds, key=lambda name: seconds[name])


def compare(model: str, data: Path, work: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """All contenders on one set."""
    work.mkdir(parents=True)
    write_inputs(model, data, work)
    run_process(child(work, "prepare"), work / "prepare.log", arguments.threads, work / "cache")
    facts = json.loads((work / "facts.json").read_text())
    say(f"{data}: {facts['rows']} rows, {facts['tokens']} tokens, {facts['trained_tokens']} trained")
    best = find_best(work, arguments.threads, arguments.quick)
    names = ["lorafit", best, "trl", *arguments.also]
    outcomes: dict[str, list[Outcome]] = {name: [] for name in names}
    for number in range(1, arguments.rounds + 1):
        for name in names if number % 2 else reversed(names):
            outcome = run_contender(name, work, arguments.threads, number)
            outcomes[name].append(outcome)
            say(f"  {name}: {outcome.steps_seconds:.1f} s, {outcome.peak_bytes / GIB:.2f} GiB")
    adapters = [str(work / f"{name.replace('/', '-')}-1" / "adapter") for name in names]
    run_process(child(work, "evaluate", *adapters), work / "evaluate.log", arguments.threads, work / "cache")
    losses = json.loads((work / "losses.json").read_text())
    summaries = {}
    for name, adapter in zip(names, adapters, strict=True):
        loss = None if name == "trl-packing" else losses[adapter]
        summaries[name] = asdict(median_of(outcomes[name], loss))
        if summaries[name]["trained_tokens"] != facts["trained_tokens"]:
            trained = summaries[name]["trained_tokens"]
            raise SystemExit(f"{name} trained {trained} tokens, not {facts['trained_tokens']}")
    runs = {name: [asdict(outcome) for outcome in many] for name, many in outcomes.items()}
    return {"set": str(data), "facts": facts, "trl_best": best, "contenders": summaries, "runs": runs}


def median_of(outcomes: list[Outcome], loss: float | None) -> Outcome:
    def middle(field: str) -> Any:
        return statistics.median(getattr(outcome, field) for outcome in outcomes)

    first = outcomes[0]
    return Outcome(
        first.contender, middle("steps_seconds"), middle("process_seconds"), middle("cpu_seconds"),
        int(middle("peak_bytes")), first.tokens, first.trained_tokens, loss,
    )  # fmt: skip


def write_inputs(model: str, data: Path, work: Path) -> None:
    """Rows, and one recipe for training and one for the held-out rows."""
    lines = [line for line in data.read_text(encoding="utf-8").splitlines() if line.strip()]
    wanted = 2 * STEPS * BATCH  # some may be dropped: their answer is longer than the limit
    (work / "train.jsonl").write_text("\n".join(lines[:wanted]) + "\n", encoding="utf-8")
    (work / "held.jsonl").write_text("\n".join(lines[-2 * HELD_OUT_ROWS :]) + "\n", encoding="utf-8")
    base = model if "://" in model else str(Path(model).resolve())
    for name, rows in (("recipe", "train.jsonl"), ("held", "held.jsonl")):
        recipe = {
            "name": "throughput",
            "model": {"base": base, "dtype": "bf16", "quantization": {"kind": "nf4", "double_quant": True}},
            "adapter": {"kind": "lora", "r": 16, "alpha": 32, "dropout": 0.0},
            "data": {
                "train": [{"path": rows}], "max_length": MAX_TOKENS, "overlength": "truncate", "dropped_fields": "warn",
            },
            "training": {
                "max_steps": STEPS, "batch_size": BATCH, "learning_rate": RATE, "schedule": {"kind": "constant"},
                "optimizer": {"kind": "adamw", "betas": [0.9, 0.999], "weight_decay": 0.0}, "max_grad_norm": 1.0,
            },
        }  # fmt: skip
        (work / f"{name}.yaml").write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML


def print_markdown(results: dict[str, Any]) -> None:
    """The tables of RESULTS.md."""
    print(f"\n{results['machine']}, {results['threads']} threads; {results['versions']}")
    print(f"matrix products in bf16: {results['peak_flops_per_second'] / 1e9:,.0f} GFLOP/s")
    for one in results["sets"]:
        facts, many = one["facts"], one["contenders"]
        ours, default, best = (many[name] for name in ("lorafit", "trl", one["trl_best"]))
        print(f"\n**{Path(one['set']).parent.name}/{Path(one['set']).name}**: {facts['rows']} rows, ", end="")
        print(f"{facts['tokens']} tokens, {facts['trained_tokens']} trained tokens (equal for all)\n")
        print("| contender | steps s | rows/s | process s | CPU s | peak GiB | held-out loss | of the peak |")
        print("|---|---|---|---|---|---|---|---|")
        for name, it in many.items():
            share = facts["model_flops"] / it["steps_seconds"] / results["peak_flops_per_second"]
            loss = "" if it["loss"] is None else f"{it['loss']:.4f}"
            print(
                f"| {name} | {it['steps_seconds']:.1f} | {facts['rows'] / it['steps_seconds']:.2f} "
                f"| {it['process_seconds']:.1f} | {it['cpu_seconds']:.1f} | {it['peak_bytes'] / GIB:.2f} "
                f"| {loss} | {share:.0%} |"
            )
        for title, other in (("defaults", default), ("best", best)):
            print(
                f"\nagainst TRL's {title}: {other['steps_seconds'] / ours['steps_seconds']:.2f} x the rows a second, "
                f"{other['process_seconds'] / ours['process_seconds']:.2f} x the whole process, "
                f"{ours['peak_bytes'] / other['peak_bytes']:.2f} x the memory, "
                f"loss {ours['loss'] / other['loss'] - 1:+.2%}"
            )


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def describe_machine() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor()
    system = f"{platform.system()} {platform.release()}"
    return f"{model}, {os.cpu_count()} CPUs, {system}, Python {platform.python_version()}"


def installed(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Versions by package; those that are absent are said to be."""
    found = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


# The children.


def prepare(work: Path) -> None:
    """Tokens and labels as lorafit reads them, in the order of its steps; what the work costs; the machine's peak."""
    import torch

    from lorafit.contracts import Silent
    from lorafit.job import open_job
    from lorafit.model.adapter import save_adapter
    from lorafit.model.attach import attach_adapter
    from lorafit.model.load import load_model
    from lorafit.ops.matmul_peak import measure_matmul_peak
    from lorafit.plan.flops import count_flops
    from lorafit.recipe.load import load_recipe

    job = open_job(load_recipe(work / "recipe.yaml"), Silent())
    rows = rows_in_order(job, STEPS, BATCH)
    held = open_job(load_recipe(work / "held.yaml"), Silent()).rows.train
    held_rows = [as_row(held[row]) for row in range(min(HELD_OUT_ROWS, len(held.lengths)))]
    base = load_model(
        job.base,
        quantization=job.recipe.model.quantization,
        dtype=torch.bfloat16,
        compute_dtype=torch.bfloat16,
        attention="eager",
        device=torch.device("cpu"),
        model_class=job.task.model_class,
        reporter=Silent(),
    )
    model = attach_adapter(base, job.recipe.adapter, job.recipe.seed)
    save_adapter(model, work / "initial", base=job.base)
    tokens = sum(len(row["input_ids"]) for row in rows)
    trained = sum(count_labels(row["labels"]) for row in rows)
    flops = count_flops(
        job.shape,
        adapter_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        tokens=tokens,
        labelled_tokens=trained,
        squared_tokens=sum(len(row["input_ids"]) ** 2 for row in rows),
        checkpointing=False,
    )
    (work / "rows.json").write_text(json.dumps({"train": rows, "held": held_rows}))
    facts = {
        "base": str(job.base.path), "pad_id": job.pad_id, "rows": len(rows), "tokens": tokens,
        "trained_tokens": trained, "model_flops": flops.model_flops,
        "peak_flops_per_second": max(measure_matmul_peak("cpu", torch.bfloat16) for _ in range(3)),
    }  # fmt: skip
    (work / "facts.json").write_text(json.dumps(facts))


def rows_in_order(job: Any, steps: int, batch: int) -> list[dict[str, list[int]]]:
    """Tokens and labels of an opened recipe's rows, as its steps see them."""
    from lorafit.data.batch import StepRows

    examples = job.rows.train
    order = StepRows(examples, job.recipe.seed, batch)
    return [as_row(examples[row]) for step in range(1, steps + 1) for row in order.rows(step)[1]]


def as_row(example: Any) -> dict[str, list[int]]:
    ids = [int(token) for token in example["tokens"]]
    return {
        "input_ids": ids,
        "labels": [t if is_trained else IGNORED for t, is_trained in zip(ids, example["trained"], strict=True)],
    }


def count_labels(labels: list[int]) -> int:
    """The first token of a row is never predicted."""
    return sum(label != IGNORED for label in labels[1:])


def load_quantised(work: Path, attention: str) -> Any:
    from peft import PeftModel

    facts = json.loads((work / "facts.json").read_text())
    base = load_base(facts["base"], attention)
    for module in base.modules():  # else evaluation repacks the weights in place, on some CPUs
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return PeftModel.from_pretrained(base, str(work / "initial"), is_trainable=True)


def load_base(folder: str, attention: str) -> Any:
    """In NF4, on the card where there is one."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    base = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=settings, attn_implementation=attention
    )
    base.config.use_cache = False
    return base


def run_peer(work: Path, name: str, output: Path) -> None:
    """Trains as `name` says; leaves adapter/ and result.json in `output`."""
    rows = json.loads((work / "rows.json").read_text())["train"]
    if name == "plain":
        model, seconds, trained = train_plainly(work, rows)
    else:
        model, seconds, trained = train_with_trl(work, rows, name, output)
    model.save_pretrained(str(output / "adapter"))
    tokens = sum(len(row["input_ids"]) for row in rows)
    (output / "result.json").write_text(json.dumps({"seconds": seconds, "tokens": tokens, "trained_tokens": trained}))


def train_with_trl(work: Path, rows: list[dict[str, Any]], name: str, output: Path) -> tuple[Any, float, int]:
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    kind, attention, device_batch = (*name.split("/"), "", "")[:3] if "/" in name else (name, "sdpa", "8")
    size = int(device_batch)
    options: dict[str, Any] = {"gradient_checkpointing": False} if kind == "trl-best" else {}
    if kind == "trl-packing":
        options = {"packing": True, "num_train_epochs": 1}
    else:
        options["max_steps"] = STEPS
    config = SFTConfig(
        output_dir=str(output / "trl"), per_device_train_batch_size=size,
        gradient_accumulation_steps=BATCH // size, learning_rate=RATE, lr_scheduler_type="constant",
        max_length=MAX_TOKENS, use_cpu=True, train_sampling_strategy="sequential", report_to="none",
        save_strategy="no", disable_tqdm=True, **options,
    )  # fmt: skip
    facts = json.loads((work / "facts.json").read_text())
    trainer = SFTTrainer(
        model=load_quantised(work, attention),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(facts["base"]),
    )
    trained, collate = 0, trainer.data_collator

    def count(features: list[dict[str, Any]]) -> dict[str, Any]:
        nonlocal trained
        batch: dict[str, Any] = collate(features)
        trained += int((batch["labels"][:, 1:] != IGNORED).sum())
        return batch

    trainer.data_collator = count
    began = time.perf_counter()
    trainer.train()
    return trainer.model, time.perf_counter() - began, trained


def train_plainly(work: Path, rows: list[dict[str, Any]]) -> tuple[Any, float, int]:
    import torch

    model = load_quantised(work, "eager")
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, betas=(0.9, 0.999), weight_decay=0.0)
    trained, began = 0, time.perf_counter()
    for start in range(0, len(rows), BATCH):
        step = rows[start : start + BATCH]
        labels_of_step = sum(count_labels(row["labels"]) for row in step)
        for row in step:
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = model(input_ids=ids, labels=labels, num_items_in_batch=labels_of_step).loss
            loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        trained += labels_of_step
    return model, time.perf_counter() - began, trained


def evaluate(work: Path, adapters: list[str]) -> None:
    """Mean loss of each saved adapter over the held-out labels, by one model and one way of computing."""
    import torch
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file
    from torch.nn import functional

    rows = json.loads((work / "rows.json").read_text())["held"]
    model = load_quantised(work, "sdpa")
    model.eval()
    losses = {}
    for adapter in adapters:
        set_peft_model_state_dict(model, load_file(f"{adapter}/adapter_model.safetensors"))
        total, count = 0.0, 0
        for row in rows:
            labels = torch.tensor(row["labels"][1:])
            with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
                logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
            total += float(functional.cross_entropy(logits.float(), labels, reduction="sum", ignore_index=IGNORED))
            count += int((labels != IGNORED).sum())
        losses[adapter] = total / count
    (work / "losses.json").write_text(json.dumps(losses))


def run_child(arguments: list[str]) -> None:
    name, work, *rest = arguments
    if name == "prepare":
        prepare(Path(work))
    elif name == "peer":
        run_peer(Path(work), rest[0], Path(rest[1]))
    else:
        evaluate(Path(work), rest)


def work_folders(arguments: argparse.Namespace, root: Path) -> Iterator[tuple[Path, Path]]:
    for number, data in enumerate(arguments.data):
        yield Path(data), root / f"set-{number}"


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        run_child(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data", nargs="+")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="search TRL's best among one row a device batch only")
    parser.add_argument("--also", nargs="*", default=[], choices=["trl-packing", "plain"], help="further contenders")
    parser.add_argument("--json", type=Path, help="where the figures go, machine-readable")
    parser.add_argument("--keep", type=Path, help="work in this new folder and leave it there")
    arguments = parser.parse_args()
    if installed()["trl"] == "not installed":
        raise SystemExit("trl is not installed: pip install trl")
    if missing := [data for data in arguments.data if not Path(data).is_file()]:
        raise SystemExit(f"no such file: {', '.join(missing)}")
    root = arguments.keep or Path(tempfile.mkdtemp(prefix="throughput-"))
    try:
        sets = [compare(arguments.model, data, work, arguments) for data, work in work_folders(arguments, root)]
    finally:
        if not arguments.keep:
            shutil.rmtree(root, ignore_errors=True)
    results = {
        "machine": describe_machine(), "threads": arguments.threads, "versions": installed(),
        "peak_flops_per_second": max(one["facts"]["peak_flops_per_second"] for one in sets), "sets": sets,
    }  # fmt: skip
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")
    print_markdown(results)


if __name__ == "__main__":
    main()
