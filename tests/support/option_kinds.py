"""Cases for the options of kinds that need no model: optimizers, schedules and sources of rows."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from lorafit import pipeline
from lorafit.kinds.adapters import adapters
from lorafit.kinds.curricula import curricula, share_at
from lorafit.kinds.optimizers import optimizers
from lorafit.kinds.schedules import learning_rate_at
from lorafit.model.attach import attach_adapter
from lorafit.run.curriculum import known_difficulty
from tests.support.option_leaves import Case, Probe
from tests.support.option_world import SPLITS, OptionWorld, digest_of, named_commits
from tests.support.tiny_model import tiny_llama

BETAS = [0.9, 0.95], [0.5, 0.95], [0.9, 0.5]  # both of them must matter
EPS, DECAY, LEAST = (1e-8, 1e-2), (0.0, 0.5), (1, 100_000)

OPTIMIZERS: dict[str, dict[str, tuple[Any, ...]]] = {
    "adafactor": {
        "decay_rate": (-0.8, -0.2),
        "clip_threshold": (1.0, 0.1),
        "beta1": (None, 0.9),
        "scale_parameter": (False, True),
        "weight_decay": DECAY,
    },
    "adam": {"betas": BETAS, "eps": EPS, "weight_decay": DECAY},
    "adamw": {"betas": BETAS, "eps": EPS, "weight_decay": DECAY},
    "adamw_8bit": {"betas": BETAS, "eps": EPS, "weight_decay": DECAY, "min_8bit_size": LEAST},
    "adamw_bnb_32bit": {"betas": BETAS, "eps": EPS, "weight_decay": DECAY},
    "lion_32bit": {"betas": BETAS, "weight_decay": DECAY},
    "lion_8bit": {"betas": BETAS, "weight_decay": DECAY, "min_8bit_size": LEAST},
    "paged_adamw_32bit": {"betas": BETAS, "eps": EPS, "weight_decay": DECAY},
    "paged_adamw_8bit": {"betas": BETAS, "eps": EPS, "weight_decay": DECAY, "min_8bit_size": LEAST},
    "paged_lion_32bit": {"betas": BETAS, "weight_decay": DECAY},
    "paged_lion_8bit": {"betas": BETAS, "weight_decay": DECAY, "min_8bit_size": LEAST},
    "rmsprop": {
        "alpha": (0.99, 0.5),
        "eps": EPS,
        "momentum": (0.0, 0.9),
        "centered": (False, True),
        "weight_decay": DECAY,
    },
    "rmsprop_bnb_32bit": {"alpha": (0.99, 0.5), "eps": EPS, "weight_decay": DECAY},
    "rmsprop_bnb_8bit": {"alpha": (0.99, 0.5), "eps": EPS, "weight_decay": DECAY, "min_8bit_size": LEAST},
    "sgd": {"momentum": (0.9, 0.0), "nesterov": (False, True), "weight_decay": DECAY},
}

WARMUP: dict[str, tuple[Any, ...]] = {"warmup_ratio": (None, 0.1, 0.5), "warmup_steps": (0, 3, 9)}
SCHEDULES: dict[str, dict[str, tuple[Any, ...]]] = {
    "constant": WARMUP,
    "cosine": {**WARMUP, "min_ratio": (0.0, 0.2)},
    "inverse_sqrt": {**WARMUP, "timescale_steps": (None, 5)},
    "linear": {**WARMUP, "min_ratio": (0.0, 0.2)},
    "polynomial": {**WARMUP, "power": (1.0, 2.0), "min_ratio": (0.0, 0.2)},
}

PACES: dict[str, tuple[Any, ...]] = {"easiest": (0.3, 0.5), "until": (0.5, 1.0), "pace": ("root", "linear")}
LOW_RANK = "rslora", "lora_plus", "lora_fa"
RANKS = (None, {"late": 2}, {"q_proj": 2}, [3, 2])
LAYERS: dict[str, tuple[Any, ...]] = {"first": (1, 2), "last": (1, 2), "list": ([0], [1], [0, 1])}

HUB = "owner/rows"
SOURCES: dict[str, tuple[str, tuple[Any, ...]]] = {
    "format": ("../rows/either.jsonl", ("text", "prompt_completion")),
    "columns": ("../rows/mapped.jsonl", tuple({"question": name, "answer": "said"} for name in ("asked", "meant"))),
    "limit": ("../rows/more.jsonl", (None, 2, 3)),
    "split": (HUB, ("train", "test")),
    "subset": (HUB, (None, "small")),
    "revision": (HUB, (None, "v2")),
}
"""Of a source in any list: its path, and values of a field."""


def kind_cases(world: OptionWorld) -> dict[str, Case]:
    """Cases of optimizers, schedules and sources."""
    cases = {
        f"training.optimizer({kind}).{option}": Case(
            values, of_option(world, updates, "training.optimizer", kind, option)
        )
        for kind, options in OPTIMIZERS.items()
        for option, values in options.items()
    }
    cases |= {
        f"training.schedule({kind}).{option}": Case(values, of_option(world, rates, "training.schedule", kind, option))
        for kind, options in SCHEDULES.items()
        for option, values in options.items()
    }
    cases |= {
        f"training.curriculum({kind}).{option}": Case(
            values, of_option(world, shares, "training.curriculum", kind, option)
        )
        for kind in curricula.names()
        for option, values in PACES.items()
    }
    for option, values in {"column": ("one", "other"), "easiest_is": ("lowest", "highest")}.items():
        cases[f"training.curriculum(column).{option}"] = Case(values, partial(ordered_by, world, option))
    cases["training.optimizer"] = Case(tuple(OPTIMIZERS), lambda kind: updates_and_paging(world, kind))
    for key, split in SPLITS.items():
        cases[f"{key}[].path"] = Case(
            ("../rows/more.jsonl", "../rows/validation.jsonl"), partial(rows_of, world, key, split)
        )
        for field, (path, values) in SOURCES.items():
            cases[f"{key}[].{field}"] = Case(values, partial(rows_with, world, key, split, path, field))
    cases["data.train[].repeats"] = Case((1.0, 2.0, 0.5), lambda value: rows_of_epoch(world, value))
    return cases


def of_option(world: OptionWorld, show: Callable[[Any], Any], key: str, kind: str, option: str) -> Probe:
    """A probe: writes the option into a recipe, reads it back as the kind's section, and shows what it does."""

    def probe(value: Any) -> Any:
        training = world.load({"training.max_steps": 20, key: {"kind": kind, option: value}}).recipe.training
        return show(getattr(training, key.rsplit(".", 1)[-1]))

    return probe


def updates(section: Any) -> Any:
    """Where a few steps of an optimizer lead, and the dtypes of its state."""
    import torch

    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(64, 128) * 0.1)  # 8192 values: enough for 8-bit state
    optimizer = optimizers.bind(section).build([parameter], 1e-2, torch.device("cpu"))
    for scale in (1.0, 0.1, 3.0, 0.5):
        gradient = torch.randn_like(parameter) * scale
        gradient[:, :16] *= 1e-4  # so small that eps can be seen
        parameter.grad = gradient
        optimizer.step()
    state = optimizer.state[parameter]
    dtypes = sorted(str(value.dtype) for value in state.values() if isinstance(value, torch.Tensor) and value.dim())
    return digest_of(parameter), dtypes


def updates_and_paging(world: OptionWorld, kind: str) -> Any:
    """The same, and how much of the state could leave a GPU: on a CPU a paged optimizer does what its twin does."""
    changes = {"training.optimizer": kind}
    memory = pipeline.estimate(world.recipe(changes), gpu="24GiB").memory
    return *updates(world.load(changes).recipe.training.optimizer), memory.paged_bytes


def rates(section: Any) -> list[float]:
    """The learning rate of each of 20 steps."""
    return [learning_rate_at(section, 1.0, step, 20) for step in range(1, 21)]


def shares(section: Any) -> list[float]:
    """The share of the rows that each of 20 steps is drawn from."""
    return [share_at(section, step, 20) for step in range(1, 21)]


def ordered_by(world: OptionWorld, option: str, value: str) -> list[int]:
    """Training rows, the easiest first, by a column of their file."""
    section = {"kind": "column", "column": "one", option: value}
    difficulty = known_difficulty(world.job({"data.train": "../rows/numbered.jsonl", "training.curriculum": section}))
    assert difficulty is not None
    return [int(row) for row in difficulty.argsort()]


def rows_of(world: OptionWorld, key: str, of: str, path: str, **fields: Any) -> Any:
    """Ids and labels of a split with one source."""
    with patch("datasets.load_dataset", _load_dataset), named_commits():
        return world.rows({key: [{"path": path, **fields}]}, of)


def rows_with(world: OptionWorld, key: str, of: str, path: str, field: str, value: Any) -> Any:
    """The same, with the value in a field of the source."""
    return rows_of(world, key, of, path, **{field: value})


def rows_of_epoch(world: OptionWorld, repeats: float) -> list[int]:
    """Row numbers of the first epoch, in its order."""
    from lorafit.data.batch import epoch_order

    job = world.job({"data.train": [{"path": "../rows/train.jsonl", "repeats": repeats}]})
    return [int(row) for row in epoch_order(job.rows.train, job.recipe.seed, 0)]


def _load_dataset(path: str, name: str | None = None, **asked: Any) -> Any:
    """Stands for the hub, which tests cannot reach: one row that says what was asked for."""
    import datasets

    answer = f"{name} {asked['split']} {asked['revision']}"
    return datasets.Dataset.from_list([{"question": path, "answer": answer}])


def layer_cases(kind: str) -> dict[str, Case]:
    """Which layers get an adapter, and what is trained beside it, of a method that stands beside linears."""
    choices = {
        f"adapter({kind}).layers.{choice}": Case(
            values, lambda value, choice=choice: attached(kind, "layers", {choice: value})
        )
        for choice, values in LAYERS.items()
    }
    return {
        f"adapter({kind}).layers": Case((None, {"first": 1}, {"list": [1]}), partial(attached, kind, "layers")),
        **choices,
        f"adapter({kind}).modules_to_save": Case(
            (None, ["norm"], ["norm", "embed_tokens"]), partial(attached, kind, "modules_to_save")
        ),
    }


def attached(kind: str, option: str, value: Any) -> dict[str, list[int]]:
    """Shapes of what is trained on a fresh model, by name."""
    model = attach_adapter(tiny_llama(), adapters.make_section(kind, **{option: value}), 0)
    return {name: list(found.shape) for name, found in model.named_parameters() if found.requires_grad}


def low_rank_cases(world: OptionWorld) -> dict[str, Case]:
    """Options of the ways to train a LoRA that are tried on a fresh model, without a run."""
    cases = {"adapter(lora_plus).rate_ratio": Case((16.0, 2.0), partial(computed, "lora_plus", "rate_ratio"))}
    for kind in LOW_RANK:
        cases |= {
            f"adapter({kind}).r": Case((16, 2), partial(attached, kind, "r")),
            f"adapter({kind}).ranks": Case(RANKS, partial(attached, kind, "ranks")),
            f"adapter({kind}).alpha": Case((8.0, 64.0), partial(computed, kind, "alpha")),
            f"adapter({kind}).dropout": Case((0.0, 0.5), partial(computed, kind, "dropout")),
            f"adapter({kind}).target_modules": Case(
                ("all-linear", ["q_proj"], ["q_proj", "v_proj"]), partial(attached, kind, "target_modules")
            ),
            f"adapter({kind}).init_from": Case((None, str(world.root / kind)), partial(values_from, kind)),
            **layer_cases(kind),
        }
    return cases


def computed(kind: str, option: str, value: Any) -> Any:
    """Logits of a model whose adapter has learnt something, in training mode, and the rates at which it learns."""
    import torch

    section = adapters.make_section(kind, **{option: value})
    model = attach_adapter(tiny_llama(), section, 0).train()
    torch.manual_seed(1)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    for _, parameter in named:
        parameter.data.normal_(std=0.1)
    logits = model(torch.arange(3, 20)[None], use_cache=False).logits
    return digest_of(logits), {name: adapters.bind(section).rate_factor(name) for name, _ in named}


def values_from(kind: str, adapter: str | None) -> list[str]:
    """The adapter that training begins with, fresh or from a folder."""
    if adapter is not None and not Path(adapter).exists():
        attach_adapter(tiny_llama(), adapters.make_section(kind), 1).save_pretrained(adapter)
    model = attach_adapter(tiny_llama(), adapters.make_section(kind, init_from=adapter), 0)
    return [digest_of(parameter) for parameter in model.parameters()]
