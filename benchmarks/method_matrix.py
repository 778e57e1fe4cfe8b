"""Every adapter that a recipe can name, on every quantisation, really run: what it does there, or the reason why not.

    python -m benchmarks.method_matrix                         all of it on a tiny random model, on one core in minutes
    python -m benchmarks.method_matrix lora dora --on nf4      some of it
    python -m benchmarks.method_matrix --model FOLDER          on a real one
    python -m benchmarks.method_matrix --rows rows.jsonl       keep each row as it is made; called again, it goes on
    python -m benchmarks.method_matrix --rows benchmarks/methods.jsonl      what docs/methods.md is written from,
    python -m benchmarks.method_matrix --memory benchmarks/methods.json     by make docs

    train       some steps; what is trained has moved, the loss is finite
    resume      from a checkpoint in the middle: the adapter's file is the same to the last byte
    PEFT        plain PeftModel.from_pretrained on the same base gives lorafit's logits
    merge       a plain model folder gives the adapter's logits, or the sentence that says why it cannot
    estimate    bytes estimated without weights over those counted while training, rows being of one length

A new kind is found by itself. Where a method is refused, its own sentence stands in the row. Anything else that goes
wrong is a failure, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

COLUMNS = ("train", "resume", "PEFT", "merge", "estimate")
QUANTIZATIONS = ("nf4", "int8", "none")
SMALL: dict[str, Any] = {"r": 4, "init_r": 6, "alpha": 8, "tokens": 4, "encoder_size": 8, "projection_size": 8}
"""Options that say how large a method is, where it has them."""
OPTIONS: dict[str, dict[str, Any]] = {"c3a": {"block_size": 32}, "road": {"group_size": 32}}
"""Options of PEFT's methods whose own defaults are for wider linears."""
STEPS, MIDDLE = 4, 2
_CLOSE = 2e-4  # of the largest logit, between two ways to compute the same in fp32
_ESTIMATE = (0.8, 1.5)  # of what a step of a tiny model holds; some initialisations hold more before the first


@dataclass(frozen=True)
class Case:
    """A method as a recipe writes it.

    Attributes:
        name: What the table calls it.
        section: Of the recipe.
    """

    name: str
    section: Mapping[str, Any]


@dataclass
class Row:
    """What became of one case on one quantisation.

    Attributes:
        cells: By column; a sentence where it does not.
        broken: Columns in which something else than a refusal went wrong.
    """

    case: str
    quantization: str
    cells: dict[str, str] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)


def cases(names: Iterable[str] = ()) -> list[Case]:
    """Every registered kind, or those of these names, its initialisations, and PEFT's methods by the kind of all."""
    from lorafit.kinds.adapters import adapters
    from lorafit.kinds.adapters.peft import fitting_methods
    from lorafit.kinds.initialisations import initialisations

    found = []
    for name in names or adapters.names():
        fields = adapters.section(name).model_fields
        section = {"kind": name, **{key: value for key, value in SMALL.items() if key in fields}}
        starts = [start for start in initialisations.names() if start != "kaiming"] if name == "lora" else []
        found += [
            Case(name, section),
            *(Case(f"{name}, init: {start}", {**section, "init": start}) for start in starts),
        ]
        methods = [each for each in fitting_methods() if each != fields["method"].default] if name == "peft" else []
        found += [
            Case(f"{name}, method: {each}", {**section, "method": each, "options": OPTIONS.get(each, {})})
            for each in methods
        ]
    return found


def run(case: Case, quantization: str, folder: Path, base: str, *, columns: Sequence[str] = COLUMNS) -> Row:
    """Takes a case through all columns, in a folder of its own."""
    import lorafit
    from lorafit.errors import LorafitError

    row, recipe = Row(case.name, quantization), make_recipe(case, quantization, folder, base)
    train = partial(_train, counts="estimate" in columns)
    steps = {"train": train, "resume": _resume, "PEFT": _open_in_peft, "merge": _merge, "estimate": _estimate}
    for column in columns:
        try:
            row.cells[column] = steps[column](lorafit, recipe)
        except LorafitError as error:
            row.cells[column] = str(error.errors[0].what)
            is_refusal = column == "merge" or (column == "train" and "adapter" in str(error.errors[0].key))
            row.broken += [] if is_refusal else [column]
        except Exception as error:  # a library's: the row says so, and the others go on
            row.cells[column] = f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"
            row.broken.append(column)
        if column == "train" and row.cells[column] != "yes":
            break
    return row


def make_recipe(case: Case, quantization: str, folder: Path, base: str) -> dict[str, Any]:
    """A recipe of a few steps over a few rows."""
    from tests.support.tiny_recipe import write_rows

    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"question": f"what opens {number}", "answer": f"the shop {number}"} for number in range(10, 18)]
    write_rows(folder / "train.jsonl", rows)
    dtype = "fp32" if quantization == "none" else "bf16"
    return {
        "name": "matrix",
        "model": {"base": base, "dtype": dtype, "attention": "eager", "quantization": quantization},
        "adapter": dict(case.section),
        "data": {"train": str(folder / "train.jsonl"), "max_length": 128},
        "training": {
            "max_steps": STEPS,
            "batch_size": 4,
            "micro_batch_tokens": 16,
            "learning_rate": 1e-2,
            "gradient_checkpointing": False,
        },
        "checkpoints": {"every_steps": MIDDLE},
        "output": str(folder / "run"),
    }


def _weights(recipe: Mapping[str, Any]) -> Path:
    return Path(recipe["output"]) / "adapter" / "adapter_model.safetensors"


def _train(lorafit: Any, recipe: Mapping[str, Any], *, counts: bool) -> str:
    from safetensors.torch import load_file

    from lorafit import pipeline

    pipeline.train(dict(recipe), measure_memory=counts)
    first = load_file(Path(recipe["output"]) / "checkpoints" / f"step-{MIDDLE:06d}" / "adapter" / _weights(recipe).name)
    last = load_file(_weights(recipe))
    assert any(not value.equal(first[name]) for name, value in last.items() if name in first), "nothing moved"
    return "yes"


def _resume(lorafit: Any, recipe: Mapping[str, Any]) -> str:
    from tests.support.world import stop_after

    whole, run = _weights(recipe).read_bytes(), Path(recipe["output"])
    (run / "counted.json").write_bytes((run / "result.json").read_bytes())
    stop_after(run, MIDDLE)
    lorafit.train(dict(recipe), resume=True, quiet=True)
    assert _weights(recipe).read_bytes() == whole, "the resumed run ends elsewhere"
    return "to the bit"


def _open_in_peft(lorafit: Any, recipe: Mapping[str, Any]) -> str:
    from peft import PeftModel

    from lorafit.model.attach import open_adapter

    adapter = _weights(recipe).parent
    ours = _logits(open_adapter(_load(recipe), adapter))
    theirs = _logits(PeftModel.from_pretrained(_load(recipe), adapter))
    apart = float((ours - theirs).abs().max())
    assert apart <= _CLOSE * float(ours.abs().max()), f"PEFT's logits are {apart:.2g} apart"
    base = _logits(_load(recipe))
    assert ours.shape != base.shape or not ours.equal(base), "the opened adapter changes nothing"
    return "yes"


def _load(recipe: Mapping[str, Any]) -> Any:
    """The base as training loads it, computing in fp32, where two ways to the same logits can be told from rounding."""
    from types import SimpleNamespace

    from lorafit.contracts import Silent
    from lorafit.kinds.quantizations import quantizations
    from lorafit.model.base import resolve_base
    from lorafit.model.load import load_model
    from lorafit.ops.dtypes import dtype_named

    model = recipe["model"]
    found: Any = SimpleNamespace(base=model["base"], revision=None)
    dtype = dtype_named("fp32")
    return load_model(
        resolve_base(found, Path(model["base"]).parent, Silent()),
        quantization=quantizations.make_section(model["quantization"]),
        dtype=dtype,
        compute_dtype=dtype,
        attention="eager",
        device="cpu",
        reporter=Silent(),
    )


def _logits(model: Any) -> Any:
    import torch

    with torch.no_grad():
        return model.eval()(torch.arange(3, 40).reshape(1, -1), use_cache=False).logits.float()


def _merge(lorafit: Any, recipe: Mapping[str, Any]) -> str:
    merged = lorafit.merge(recipe["output"], Path(recipe["output"]).parent / "merged", quiet=True)
    return f"yes, logits within {merged.parity.max_logit_difference:.0e}"


def _estimate(lorafit: Any, recipe: Mapping[str, Any]) -> str:
    counted = json.loads((Path(recipe["output"]) / "counted.json").read_text(encoding="utf-8"))
    ratio = counted["estimated_tensor_bytes"] / counted["live_tensors"]["tensor_bytes"]
    assert _ESTIMATE[0] <= ratio <= _ESTIMATE[1], f"estimated {ratio:.2f} of what was counted"
    return f"{ratio:.2f}"


def table(rows: Iterable[Row]) -> str:
    """The rows as markdown; where a method is refused, its sentence stands in the first column, for all of the row."""
    lines = [f"| method | base | {' | '.join(COLUMNS)} |", f"|{'---|' * (len(COLUMNS) + 2)}"]
    for row in rows:
        refused = row.cells.get("train", "") != "yes"
        texts = [row.cells.get(column, "-" if refused else "not tried") for column in COLUMNS]
        cells = [f"**{text}**" if column in row.broken else text for column, text in zip(COLUMNS, texts, strict=True)]
        shown = [cell.replace("|", "/").replace("\n", " ") for cell in cells]
        lines.append(f"| `{row.case}` | {row.quantization} | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


def in_order(rows: Iterable[Row]) -> list[Row]:
    """Rows of cases that there are, in the order of these."""
    places = {case.name: place for place, case in enumerate(cases())}
    found = [row for row in rows if row.case in places]
    return sorted(found, key=lambda row: (places[row.case], QUANTIZATIONS.index(row.quantization)))


def each(
    chosen: Sequence[Case],
    on: Sequence[str],
    base: str | None,
    folder: Path,
    known: Collection[tuple[str, str]] = (),
) -> Iterator[Row]:
    """All rows but known ones, one by one; a method's own folder is taken away behind it."""
    import shutil

    from tests.support.tiny_model import make_base

    base = base or str(make_base(folder / "base", attention_bias=True))  # there is a bias to train
    for case in chosen:
        for quantization in (kind for kind in on if (case.name, kind) not in known):
            where = folder / re.sub(r"\W+", "-", f"{case.name} {quantization}")
            yield run(case, quantization, where, base)
            shutil.rmtree(where, ignore_errors=True)


def measure_memory(file: Path) -> None:
    """Adds to a file what a step takes of each kind that it lacks, by a dry run of Llama-3.1-8B in bf16 on a card: one
    row of 2,048 tokens, no checkpointing, AdamW. The reason where the kind is not for that model."""
    from lorafit.errors import LorafitError
    from lorafit.estimation.dry_run import DryRun
    from lorafit.facts import DeviceFacts
    from lorafit.kinds.adapters import adapters
    from lorafit.model.class_shape import find_shape
    from lorafit.model.known_models import known_config
    from lorafit.plan.recipe_step import recipe_step
    from lorafit.recipe.schema import Recipe

    config = known_config("meta-llama/Llama-3.1-8B")
    assert config is not None
    card = DeviceFacts("cuda", "a card", 2**39, bf16=True, capability=(9, 0))
    found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    for name in (name for name in adapters.names() if name not in found):
        recipe = Recipe.model_validate(
            {
                "name": "memory",
                "model": {"base": "b", "quantization": "none", "attention": "sdpa"},
                "adapter": {"kind": name},
                "data": {"train": "a.jsonl", "max_length": 2048, "packing": False},
            }
        )
        try:
            step = recipe_step(recipe, find_shape(config), None, card).step
            found[name] = DryRun(step, config).run(2048, False, few_layers=True).needed_bytes
        except LorafitError as error:
            found[name] = error.errors[0].what
        print(name, found[name], file=sys.stderr, flush=True)
        file.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def main() -> int:
    """Runs what was asked for and prints each row as it is made."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("adapters", nargs="*", help="kinds; all where none is named")
    parser.add_argument("--on", nargs="+", choices=QUANTIZATIONS, default=QUANTIZATIONS, help="quantisations")
    parser.add_argument("--model", help="a base model as in a recipe; a tiny random one where left out")
    parser.add_argument("--rows", type=Path, help="file of rows that are there already, and get the new ones")
    parser.add_argument(
        "--memory", type=Path, help="file of what a step of Llama-3.1-8B needs, by kind, which gets the missing"
    )
    asked = parser.parse_args()
    if asked.memory is not None:
        measure_memory(asked.memory)
        return 0
    kept = asked.rows or Path(os.devnull)
    rows = [Row(**json.loads(line)) for line in kept.read_text(encoding="utf-8").splitlines()] if kept.exists() else []
    known = {(row.case, row.quantization) for row in rows}
    with tempfile.TemporaryDirectory() as temporary, kept.open("a", encoding="utf-8") as file:
        os.environ.setdefault("LORAFIT_CACHE", f"{temporary}/cache")
        for row in each(cases(asked.adapters), asked.on, asked.model, Path(temporary), known):
            rows.append(row)
            for output in (file, sys.stderr):
                print(json.dumps(asdict(row)), file=output, flush=True)
    print(table(in_order(rows)))
    return int(any(row.broken for row in rows))


if __name__ == "__main__":
    sys.exit(main())
