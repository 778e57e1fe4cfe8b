"""Two values of every leaf of the recipe, and what shows that they differ. A new option needs a line here."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from lorafit import pipeline
from lorafit.answering import generate
from lorafit.files.atomic import read_object
from lorafit.files.rundir import RunDir
from lorafit.kinds.adapters import adapters
from lorafit.kinds.tasks import tasks
from lorafit.machine.devices import parse_gpu
from lorafit.model.class_shape import find_shape
from lorafit.plan.recipe_step import recipe_step
from lorafit.trainer.step import Update
from lorafit.trainer.unfreezing import Unfreezing
from tests.support import tiny_seq2seq, tiny_vision
from tests.support.option_adapters import AT_LINEARS, linear_cases, two_steps
from tests.support.option_between_steps import OF_KINDS, between_steps_cases
from tests.support.option_first_values import first_value_cases
from tests.support.option_kinds import LOW_RANK, RANKS, attached, kind_cases, layer_cases, low_rank_cases
from tests.support.option_leaves import Case, Probe
from tests.support.option_world import (
    Changes,
    OptionWorld,
    adapter_tensors,
    evaluation_lines,
    files_of,
    named_commits,
    scores_of,
    step_lines,
)
from tests.support.pictures import draw_rows
from tests.support.tiny_model import make_base
from tests.support.tiny_recipe import write_rows

VALIDATED = {"data.validation": "../rows/validation.jsonl", "evaluation.every_steps": 1}
STOPPING = {**VALIDATED, "training.max_steps": 5}
FALLING = {"patience": 1, "min_delta": 100.0, "at_most": 2}
EASY = {"data.train": "../rows/numbered.jsonl", "training.batch_size": 3, "training.max_steps": 4}
SGD = {"training.optimizer": "sgd", "adapter.alpha": 512.0}  # Adam would hide the gradients' length
NO_ANSWERS = {"evaluation.final": ["loss"], "evaluation.during": ["loss"], "evaluation.max_new_tokens": 256}
HEADED = "token-classification", "sequence-regression"
DRAWN = {"evaluation.final": ["sampled_similarity"]}
TRACKERS = "tensorboard", "wandb", "mlflow", "trackio"


def all_cases(world: OptionWorld) -> dict[str, Case]:
    """A case for each leaf, by the leaf's name."""
    return {
        **kind_cases(world),
        **linear_cases(world),
        **low_rank_cases(world),
        **model_cases(world),
        **data_cases(world),
        **task_cases(world),
        **training_cases(world),
        **evaluation_cases(world),
        **folder_cases(world),
    }


ADAPTIVE = {"kind": "adaptive", "bits": 7.0}


def of_run(world: OptionWorld, key: str, look: Callable[[RunDir], Any], more: Changes | None = None) -> Probe:
    """A probe: trains with the value in its place, and looks at what is left."""
    return lambda value: look(world.train({**(more or {}), key: value}))


def of_rows(world: OptionWorld, key: str, more: Changes | None = None, split: str = "train") -> Probe:
    """A probe: the ids and labels of a split with the value in its place."""
    return lambda value: world.rows({**(more or {}), key: value}, split)


def of_report(world: OptionWorld, key: str, more: Changes | None = None) -> Probe:
    """A probe: what an evaluation of one and the same run finds with the value in its place."""
    return lambda value: scores_of(world.evaluate({**(more or {}), key: value}))


def of_kind(kind: str) -> Changes:
    """An adapter's kind as an override; the default is not written, so that its runs are everybody's."""
    return {} if kind == "lora" else {"adapter.kind": kind}


def model_cases(world: OptionWorld) -> dict[str, Case]:
    """The base, how it is loaded, and what is trained beside it."""

    def quantized(option: str, kind: str) -> Probe:
        return lambda value: first_loss(world.train({"model.quantization": {"kind": kind, option: value}}))

    def chosen(option: str) -> Probe:
        return lambda value: linears_of(world.train({"model.quantization": {**ADAPTIVE, option: value}}))

    def adapted(kind: str, option: str, look: Callable[[RunDir], Any]) -> Probe:
        return of_run(world, f"adapter.{option}", look, of_kind(kind))

    def prompted(kind: str, option: str, look: Callable[[RunDir], Any], **more: Any) -> Probe:
        return lambda value: look(world.train({"adapter": {"kind": kind, **more, option: value}}))

    cases = {
        "model.base": Case(("../base", "../other"), of_run(world, "model.base", first_loss)),
        "model.revision": Case((None, "v2"), partial(loss_of_revision, world)),
        "model.dtype": Case(("fp32", "bf16", "fp16"), of_run(world, "model.dtype", first_loss)),
        "model.attention": Case(
            ("eager", "sdpa", "fused"),
            partial(saved_bytes, world, "model.attention"),
            refused=("flash_attention_2", "varlen"),
        ),
        "model.kernels": Case(("none", "liger"), partial(memory_on_a_card, world, "model.kernels")),
        "model.quantization": Case(
            ("none", "nf4", "fp4", "int8", {"kind": "mixed", "linears": {"down_proj": "int8"}}, ADAPTIVE),
            of_run(world, "model.quantization", first_loss),
        ),
        "adapter": Case(
            (
                *("lora", "dora", *LOW_RANK),
                *({"kind": "prompt_tuning"}, {"kind": "p_tuning"}, {"kind": "prefix_tuning"}, {"kind": "adalora"}),
                *({"kind": "dylora"}, {"kind": "growing_lora"}, {"kind": "layer_norm"}, {"kind": "full"}, *AT_LINEARS),
            ),
            partial(shapes_of_kind, world, adapter_tensors),
            refused=("bias",),  # the tiny Llama has none
        ),
        "adapter(prompt_tuning).init": Case(
            ("vocabulary", "random"), prompted("prompt_tuning", "init", adapter_tensors)
        ),
        "adapter(p_tuning).encoder": Case(("mlp", "lstm"), prompted("p_tuning", "encoder", adapter_shapes)),
        "adapter(p_tuning).encoder_size": Case((8, 16), prompted("p_tuning", "encoder_size", adapter_shapes)),
        "adapter(prefix_tuning).init": Case(("random", "zero"), prompted("prefix_tuning", "init", adapter_tensors)),
        "adapter(prefix_tuning).projection": Case(
            (False, True), prompted("prefix_tuning", "projection", adapter_shapes)
        ),
        "adapter(prefix_tuning).projection_size": Case(
            (8, 16), prompted("prefix_tuning", "projection_size", adapter_shapes, projection=True)
        ),
    }
    for kind in ("prompt_tuning", "p_tuning", "prefix_tuning"):
        cases |= {
            f"adapter({kind}).tokens": Case((3, 5), prompted(kind, "tokens", adapter_shapes)),
        }
    for kind in ("prompt_tuning", "p_tuning", "prefix_tuning", "layer_norm", "bias", "full"):
        cases |= {
            f"adapter({kind}).init_from": Case((None, str(world.root / kind)), partial(first_loss_of, world, kind)),
        }
    for kind in ("lora", "dora"):
        cases |= {
            f"adapter({kind}).r": Case((4, 2), adapted(kind, "r", adapter_shapes)),
            f"adapter({kind}).alpha": Case((8.0, 64.0), adapted(kind, "alpha", last_loss)),
            f"adapter({kind}).dropout": Case((0.0, 0.5), adapted(kind, "dropout", adapter_tensors)),
            f"adapter({kind}).target_modules": Case(
                ("all-linear", ["q_proj"], ["q_proj", "v_proj"]), adapted(kind, "target_modules", adapter_shapes)
            ),
            f"adapter({kind}).init_from": Case((None, str(world.root / kind)), partial(first_loss_from, world, kind)),
            **layer_cases(kind),
            f"adapter({kind}).ranks": Case(RANKS, partial(attached, kind, "ranks")),
        }
    for kind in ("lora", "dora", *LOW_RANK):
        cases[f"adapter({kind}).new_tokens"] = Case((None, ["<a>"]), partial(attached, kind, "new_tokens"))
        cases |= first_value_cases(world, kind)
    cases |= between_steps_cases()
    for kind in OF_KINDS:
        start = Case((None, str(world.root / kind)), partial(first_loss_from, world, kind))
        cases[f"adapter({kind}).init_from"] = start
    cases["model.quantization(mixed).linears"] = Case(({}, {"down_proj": "int8"}), quantized("linears", "mixed"))
    cases["model.quantization(mixed).others"] = Case(("nf4", "none"), quantized("others", "mixed"))
    cases["model.quantization(mixed).double_quant"] = Case((True, False), quantized("double_quant", "mixed"))
    cases |= {
        "model.quantization(adaptive).bits": Case((7.0, 12.0), chosen("bits")),
        "model.quantization(adaptive).calibration_rows": Case((64, 2), chosen("calibration_rows")),
        "model.quantization(adaptive).double_quant": Case((True, False), chosen("double_quant")),
        "model.quantization(adaptive).linears": Case(
            (all_stored_as("nf4"), all_stored_as("int8")), quantized("linears", "adaptive")
        ),
    }
    for kind in ("nf4", "fp4"):
        cases[f"model.quantization({kind}).double_quant"] = Case((True, False), quantized("double_quant", kind))
        cases[f"model.quantization({kind}).compute_dtype"] = Case(
            ("fp32", "bf16", "fp16"), quantized("compute_dtype", kind)
        )
        cases[f"model.quantization({kind}).keep_unpacked"] = Case((True, False), partial(times_unpacked, world, kind))
    return cases


def data_cases(world: OptionWorld) -> dict[str, Case]:
    """Which rows there are, and how they become tokens and labels."""
    texts, bad = {"data.train": "../rows/texts.jsonl"}, {"data.train": "../rows/bad.jsonl"}
    chats, named = {"data.train": "../rows/chats.jsonl"}, {"data.train": "../rows/named.jsonl"}
    tools = {"data.train": "../rows/tools.jsonl", "data.max_length": 2048, "data.dropped_fields": "warn"}
    one, two = "../rows/more.jsonl", ["../rows/more.jsonl", "../rows/validation.jsonl"]
    return {
        "seed": Case((0, 1), of_run(world, "seed", adapter_tensors)),
        "data.train": Case((one, two), of_rows(world, "data.train")),
        "data.validation": Case(
            (None, one, two, {"fraction": 0.5}), of_rows(world, "data.validation", split="validation")
        ),
        "data.validation.fraction": Case(
            (0.1, 0.5), lambda value: world.rows({"data.validation": {"fraction": value}}, "validation")
        ),
        "data.test": Case((one, two), lambda value: scores_of(world.evaluate({}, {"data.test": value}))),
        "data.chat_template": Case((None, "alpaca", "hermes", "plain"), of_rows(world, "data.chat_template", tools)),
        "data.system_prompt": Case((None, "Be kind."), of_rows(world, "data.system_prompt")),
        "data.dropped_fields": Case(("warn",), of_rows(world, "data.dropped_fields", named), refused=("error",)),
        "data.train_on": Case(("assistant", "last_turn", "completion", "all"), of_rows(world, "data.train_on", chats)),
        "data.max_length": Case((16, 32), of_rows(world, "data.max_length", {**texts, "data.overlength": "truncate"})),
        "data.overlength": Case(
            ("drop", "truncate", "split"),
            of_rows(world, "data.overlength", {**texts, "data.max_length": 32}),
            refused=("error",),
        ),
        **augment_cases(world),
        "data.packing": Case((False, True), partial(forward_tokens, world)),
        "data.bad_rows.policy": Case(
            ("skip",),
            lambda value: world.rows({**bad, "data.bad_rows": {"policy": value, "max_fraction": 0.5}}),
            refused=("error",),
        ),
        "data.bad_rows.max_fraction": Case(
            (0.5,),
            lambda value: world.rows({**bad, "data.bad_rows": {"policy": "skip", "max_fraction": value}}),
            refused=(0.05,),
        ),
    }


def task_cases(world: OptionWorld) -> dict[str, Case]:
    """What is learnt of a row."""
    preferences = partial(last_of_pairs, world, "dpo")
    return {
        "task": Case(
            ("causal-lm", "dpo", "kto", "orpo", "reward", "seq2seq-lm", "image-text-to-text", classifier(), *HEADED),
            partial(last_of_task, world),
        ),
        "task(sequence-classification).labels": Case(
            (["no", "yes"], ["no", "perhaps", "yes"]), lambda names: last_of_classes(world, classifier(labels=names))
        ),
        "task(sequence-classification).multi_label": Case(
            (False, True), lambda several: last_of_classes(world, classifier(multi_label=several))
        ),
        "task(sequence-classification).class_weights": Case(
            ("none", "balanced", [1.0, 5.0]),
            lambda weights: last_of_classes(world, classifier(labels=["no", "yes"], class_weights=weights)),
        ),
        "task(sequence-classification).threshold": Case((0.5, 0.3, "f1", "f1_each"), partial(given_above, "threshold")),
        "task(sequence-classification).thresholds": Case(([], [0.3, 0.85]), partial(given_above, "thresholds")),
        "task(sequence-classification).long_texts": Case(
            ("head", "tail", "both"), lambda keep: ids_of_texts(world, classifier(long_texts=keep))
        ),
        "task(sequence-regression).long_texts": Case(
            ("head", "tail", "both"),
            lambda keep: ids_of_texts(world, {"kind": "sequence-regression", "long_texts": keep}),
        ),
        "task(sequence-classification).head": Case(
            ("drawn", "fitted"), lambda head: last_of_classes(world, classifier(head=head))
        ),
        "task(sequence-regression).head": Case(("drawn", "fitted"), partial(last_of_numbers, world, ["score"])),
        "task(sequence-regression).outputs": Case((["score"], ["tone", "length"]), partial(last_of_numbers, world)),
        "task(token-classification).labels": Case((["O", "B-X"], ["O", "B-X", "I-X"]), partial(last_of_words, world)),
        "task(dpo).beta": Case((0.1, 5.0), partial(preferences, "beta")),
        "task(dpo).loss": Case(("sigmoid", "hinge", "ipo", "ipo_sum"), partial(preferences, "loss")),
        "task(dpo).label_smoothing": Case((0.0, 0.3), partial(preferences, "label_smoothing"), refused=(0.5,)),
        "task(dpo).sft_weight": Case((0.0, 0.5), partial(preferences, "sft_weight")),
        "task(kto).beta": Case((0.1, 5.0), partial(last_of_pairs, world, "kto", "beta")),
        "task(kto).desirable_weight": Case((1.0, 2.0), partial(last_of_pairs, world, "kto", "desirable_weight")),
        "task(kto).undesirable_weight": Case((1.0, 2.0), partial(last_of_pairs, world, "kto", "undesirable_weight")),
        "task(image-text-to-text).projector": Case(("none", "full"), partial(last_of_seen, world)),
        "task(orpo).odds_weight": Case((0.1, 1.0), partial(last_of_pairs, world, "orpo", "odds_weight")),
        **{
            f"task(seq2seq-lm).{option}": Case(values, partial(sides_of, world, option))
            for option, values in (("prefix", ("", "red ")), ("max_target_length", (64, 4)))
        },
        **{
            f"task(seq2seq-lm).{side}_language": Case(
                ("en_XX", "de_DE"), partial(sides_of, world, f"{side}_language"), (None, "xx")
            )
            for side in ("source", "target")
        },
        "task(reward).centering": Case((0.0, 0.5), partial(last_of_pairs, world, "reward", "centering")),
    }


def training_cases(world: OptionWorld) -> dict[str, Case]:
    """The optimisation."""
    schedules = "constant", "cosine", "linear", "inverse_sqrt", {"kind": "polynomial", "power": 3.0}
    return {
        "training.epochs": Case(
            (1.0, 2.0), of_run(world, "training.epochs", steps_taken, {"training.max_steps": None})
        ),
        "training.max_steps": Case((2, 3), of_run(world, "training.max_steps", steps_taken)),
        "training.batch_size": Case((4, 2), of_run(world, "training.batch_size", trained_tokens)),
        "training.micro_batch_tokens": Case((128, 64), partial(forward_passes, world)),
        "training.learning_rate": Case((1e-2, 1e-3), of_run(world, "training.learning_rate", adapter_tensors)),
        "training.schedule": Case(
            schedules, of_run(world, "training.schedule", adapter_tensors, {"training.max_steps": 3})
        ),
        "training.max_grad_norm": Case((1.0, None, 0.01), of_run(world, "training.max_grad_norm", last_loss, SGD)),
        "training.gradient_checkpointing": Case(
            (False, "half", True), partial(saved_bytes, world, "training.gradient_checkpointing")
        ),
        "training.curriculum": Case(
            (None, "length", "loss", {"kind": "column", "column": "one"}),
            of_run(world, "training.curriculum", trained_tokens, EASY),
        ),
        "training.embedding_noise": Case((None, 5.0, 50.0), of_run(world, "training.embedding_noise", last_loss)),
        "training.unfreezing": Case((None, {"top": 1, "steps": [2]}), of_run(world, "training.unfreezing", last_loss)),
        "training.unfreezing.top": Case((1, 2, 3), lambda top: layers_trained(top=top, steps=[3])),
        "training.unfreezing.steps": Case(([3], [2, 4], [4]), lambda steps: layers_trained(top=1, steps=steps)),
        "training.deterministic": Case((False, True), partial(algorithms_taken, world)),
    }


def layers_trained(top: int, steps: list[int]) -> list[list[int]]:
    """Layers of a model of 4 that each of 5 steps trains."""
    parameters = {f"layers.{number}.weight": torch.nn.Parameter(torch.zeros(1)) for number in range(4)}
    layers = {f"layers.{number}": number for number in range(4)}
    hook = Unfreezing(parameters, layers, top, steps)
    return [hook.layers_at(step) for step in range(1, 6)]


def algorithms_taken(world: OptionWorld, deterministic: bool) -> set[bool]:
    """Whether only deterministic algorithms were taken in the updates of a run."""
    taken = set()
    apply = Update.apply

    def look(self: Update, *arguments: Any, **options: Any) -> Any:
        taken.add(torch.are_deterministic_algorithms_enabled())
        return apply(self, *arguments, **options)

    with patch.object(Update, "apply", look):
        pipeline.train(world.recipe({"training.deterministic": deterministic}))
    return taken


def evaluation_cases(world: OptionWorld) -> dict[str, Case]:
    """What is measured, and what follows from it."""

    def stopped(option: str, more: Mapping[str, Any]) -> Probe:
        def probe(value: Any) -> Any:
            return steps_taken(world.train({**STOPPING, "evaluation.early_stopping": {**more, option: value}}))

        return probe

    def asked(option: str, more: Changes | None = None) -> Probe:
        return of_report(world, f"evaluation.{option}", {"evaluation.final": ["chrf"], **(more or {})})

    chrf = {**VALIDATED, "evaluation.during": ["chrf"]}
    return {
        "evaluation.every_steps": Case((1, 2), of_run(world, "evaluation.every_steps", evaluation_lines, VALIDATED)),
        "evaluation.during": Case(
            (["loss"], ["loss", "token_accuracy"]), of_run(world, "evaluation.during", evaluation_lines, VALIDATED)
        ),
        "evaluation.final": Case((["perplexity"], ["must_contain"], ["bleu"]), of_report(world, "evaluation.final")),
        "evaluation.max_new_tokens": Case((1, 6), asked("max_new_tokens")),
        "evaluation.min_new_tokens": Case((0, 4), partial(tokens_of_answers, world, "min_new_tokens")),
        "evaluation.num_beams": Case((1, 4), asked("num_beams")),
        "evaluation.length_penalty": Case((-9.0, 9.0), partial(tokens_of_answers, world, "length_penalty")),
        "evaluation.no_repeat_ngram_size": Case((0, 1), asked("no_repeat_ngram_size")),
        "evaluation.draws": Case((2, 3), asked("draws", DRAWN)),
        "evaluation.draw_temperature": Case((0.1, 5.0), asked("draw_temperature", DRAWN)),
        "evaluation.encoder": Case((None, str(world.root / "encoder")), asked("encoder", DRAWN), ("nowhere",)),
        "evaluation.answered_rows": Case((1, 4), of_run(world, "evaluation.answered_rows", evaluation_lines, chrf)),
        "evaluation.early_stopping": Case(
            (None, {"patience": 1, "min_delta": 100.0}),
            of_run(world, "evaluation.early_stopping", steps_taken, STOPPING),
        ),
        "evaluation.early_stopping.metric": Case(("loss", "token_accuracy", "rouge"), partial(best_by, world)),
        "evaluation.early_stopping.patience": Case((1, 2), stopped("patience", {"min_delta": 100.0})),
        "evaluation.early_stopping.min_delta": Case((0.0, 100.0), stopped("min_delta", {"patience": 1})),
        "evaluation.on_plateau": Case((None, FALLING), of_run(world, "evaluation.on_plateau", rates_of, STOPPING)),
        **{
            f"evaluation.on_plateau.{option}": Case(values, partial(fallen, world, look, option))
            for option, values, look in (
                ("patience", (1, 2), rates_of),
                ("min_delta", (0.0, 100.0), rates_of),
                ("factor", (0.5, 0.1), rates_of),
                ("at_most", (1, 9), rates_of),
                ("go_back", (False, True), last_weights),
            )
        },
        "evaluation.retention": Case(
            (None, "../rows/more.jsonl", "../rows/validation.jsonl"),
            lambda value: scores_of(world.evaluate({}, {"evaluation.retention": value})),
        ),
    }


def folder_cases(world: OptionWorld) -> dict[str, Case]:
    """What is written, and where."""
    every = {"checkpoints.every_steps": 1, "training.max_steps": 4}
    is_missing = [name for name in TRACKERS if find_spec(name) is None]
    return {
        "checkpoints.every_steps": Case(
            (1, 2, 4),
            of_run(world, "checkpoints.every_steps", files_of, {"training.max_steps": 4, "checkpoints.keep_last": 9}),
        ),
        "checkpoints.keep_last": Case((1, 2, 9), of_run(world, "checkpoints.keep_last", files_of, every)),
        "tracking": Case(
            ([], ["tensorboard"]), of_run(world, "tracking", files_of), refused=tuple([name] for name in is_missing)
        ),
        "name": Case(("one", "two"), lambda value: places_of_runs(world, {"name": value, "output": ""})),
        "output": Case(("run", "deep/er"), lambda value: places_of_runs(world, {"output": value})),
    }


def linears_of(run: RunDir) -> Any:
    """What calibration rows say of each linear, and how it is stored."""
    return read_object(run.sensitivity)["linears"]


def all_stored_as(kind: str) -> dict[str, str]:
    """A table of every linear of the tiny base."""
    parts = [f"self_attn.{part}_proj" for part in "qkvo"] + [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
    return {f"model.layers.{layer}.{part}": kind for layer in range(2) for part in parts}


def fallen(world: OptionWorld, look: Callable[[RunDir], Any], option: str, value: Any) -> Any:
    """What is left of a run whose learning rate falls at evaluations that find no improvement."""
    learning_rate = 5.0 if option == "go_back" else 1e-2  # so much that it never gets better
    section = {"evaluation.on_plateau": {**FALLING, option: value}, "training.learning_rate": learning_rate}
    return look(world.train({**STOPPING, **section}))


def rates_of(run: RunDir) -> list[float]:
    """The learning rate of each step."""
    return [line["learning_rate"] for line in step_lines(run)]


def last_weights(run: RunDir) -> dict[str, str]:
    """Of the adapter behind the last step, whichever is the best one."""
    return adapter_tensors(run, step=5)


def first_loss(run: RunDir) -> float:
    """The loss before anything was learnt: what base, precision and a given adapter decide."""
    return float(step_lines(run)[0]["loss"])


def last_loss(run: RunDir) -> float:
    """The loss of the last step."""
    return float(step_lines(run)[-1]["loss"])


def trained_tokens(run: RunDir) -> list[int]:
    """Tokens with a label, step by step."""
    return [line["trained_tokens"] for line in step_lines(run)]


def last_of_pairs(world: OptionWorld, kind: str, option: str | None = None, value: Any = None) -> float:
    """The last loss of a task over pairs of answers, or single ones with verdicts; causal-lm gets the chosen ones."""
    columns = {"completion": "chosen"} if kind == "causal-lm" else {}
    task = {"kind": kind} if option is None else {"kind": kind, option: value}
    source = {"path": "../rows/verdicts.jsonl" if kind == "kto" else "../rows/pairs.jsonl", "columns": columns}
    evaluation = {"evaluation.final": ["loss"], "evaluation.max_new_tokens": 256}
    return last_loss(world.train({"task": task, "data.train": [source], **evaluation}))


def adapter_shapes(run: RunDir) -> dict[str, str]:
    """The adapter's tensors, contents apart."""
    return {name: found.split(") ")[0] for name, found in adapter_tensors(run).items()}


def steps_taken(run: RunDir) -> int:
    """How many there were."""
    return len(step_lines(run))


def last_of_task(world: OptionWorld, task: Any) -> Any:
    """The last loss of a task, on rows that it reads."""
    if task == "token-classification":
        return last_of_words(world, ["O", "B-X"])
    if task == "sequence-regression":
        return last_of_numbers(world, ["score"])
    if task == "seq2seq-lm":
        return last_loss(world.train({"task": task, **apart(world, "t5")}))
    if task == "image-text-to-text":
        return last_of_seen(world, "none")
    return last_of_classes(world, task) if isinstance(task, dict) else [last_of_pairs(world, task)]


def last_of_seen(world: OptionWorld, projector: str) -> float:
    """The last loss of a run on images."""
    return last_loss(world.train({"task": {"kind": "image-text-to-text", "projector": projector}, **seen(world)}))


def seen(world: OptionWorld) -> dict[str, Any]:
    """A model that sees and rows with images."""
    if not (base := world.root / "llava").exists():
        tiny_vision.make_llava(base)
        write_rows(world.root / "rows" / "seen.jsonl", draw_rows(world.root / "rows", 4))
    return {"model.base": "../llava", "data.train": "../rows/seen.jsonl"}


def last_of_words(world: OptionWorld, labels: list[str]) -> float:
    """The last loss of a run on words with labels."""
    rows = world.root / "rows" / "words.jsonl"
    rows.write_text("".join(f'{{"words": ["red", "mug", "{n}"], "labels": ["O", "B-X", "O"]}}\n' for n in range(8)))
    task = {"kind": "token-classification", "labels": labels}
    return last_loss(world.train({"task": task, "data.train": "../rows/words.jsonl", **NO_ANSWERS}))


def apart(world: OptionWorld, family: str, tokenizer: Any = None) -> dict[str, Any]:
    """An encoder-decoder and rows that it reads."""
    base = world.root / family
    if not base.exists():
        tiny_seq2seq.make_base(base, family)
        if tokenizer is not None:
            tokenizer.save_pretrained(base)
    write_rows(world.root / "rows" / "apart.jsonl", tiny_seq2seq.make_texts(4))
    return {"model.base": f"../{family}", "data.train": "../rows/apart.jsonl", "data.overlength": "truncate"}


def sides_of(world: OptionWorld, option: str, value: Any) -> list[Any]:
    """Source and target of each row as tokens, with an option of the task; a tokenizer that writes languages."""
    has_languages = option.endswith("language")
    named = {"source_language": "ro_RO", "target_language": "ro_RO"} if has_languages else {}
    world_of = apart(world, "mbart", tiny_seq2seq.make_language_tokenizer()) if has_languages else apart(world, "t5")
    rows = world.job({**world_of, "task": {"kind": "seq2seq-lm", **named, option: value}}).rows.train
    return [[list(map(int, rows[row][side])) for side in ("source", "target")] for row in range(len(rows))]


def tokens_of_answers(world: OptionWorld, option: str, value: Any) -> int:
    """Tokens that a search with beams writes where half of all tokens end an answer."""
    ends = [token for token in range(300) if token % 2]
    with patch.object(generate, "find_stop_ids", lambda *_: ends):
        changes = {"evaluation.final": ["chrf"], "evaluation.num_beams": 3, f"evaluation.{option}": value}
        speed = world.evaluate(changes).tuned_speed
    assert speed is not None
    return speed.tokens


def augment_cases(world: OptionWorld) -> dict[str, Case]:
    """Changed copies of training rows."""
    values = {
        "field": ("instruction", "input"),
        "templates": ([], ["Q: {instruction}"]),
        **dict.fromkeys(("drop", "swap", "typo"), (0.0, 0.5)),
    }

    def rows(copies: int = 1, **field: Any) -> Any:
        changed = {"field": "instruction", "drop": 0.1, "templates": ["so: {instruction}"], **field}
        if changed["field"] != "instruction":
            changed["templates"] = []
        section = {"copies": copies, "fields": [changed]}
        return world.rows({"data.train": "../rows/alpaca.jsonl", "data.augment": section})

    return {
        "data.augment": Case((None, {"fields": [{"field": "question", "drop": 0.5}]}), of_rows(world, "data.augment")),
        "data.augment.fields": Case(
            ([{"field": "instruction", "drop": 0.5}], [{"field": "input", "drop": 0.5}]),
            of_rows(world, "data.augment.fields", {"data.train": "../rows/alpaca.jsonl"}),
        ),
        "data.augment.copies": Case((1, 2), lambda value: rows(copies=value)),
        **{
            f"data.augment.fields[].{option}": Case(pair, lambda value, option=option: rows(**{option: value}))
            for option, pair in values.items()
        },
    }


def last_of_numbers(world: OptionWorld, outputs: list[str], head: str = "drawn") -> float:
    """The last loss of a run on texts with so many numbers each."""
    rows = world.root / "rows" / "numbers.jsonl"
    numbers = [[n, n % 3][: len(outputs)] for n in range(8)]
    rows.write_text("".join(f'{{"text": "red mug {n}", "score": {row}}}\n' for n, row in enumerate(numbers)))
    task = {"kind": "sequence-regression", "outputs": outputs, "head": head}
    return last_loss(world.train({"task": task, "data.train": "../rows/numbers.jsonl", **NO_ANSWERS}))


def ids_of_texts(world: OptionWorld, task: dict[str, Any]) -> list[list[int]]:
    """What is left of texts that are too long."""
    rows = world.root / "rows" / "long.jsonl"
    texts = [f"red mug and {9 * 'blue '} bowl {n}" for n in (1, 2)]
    rows.write_text("".join(json.dumps({"text": text, "label": text, "score": 1}) + "\n" for text in texts))
    name = "text_label" if task["kind"] == "sequence-classification" else "text_score"
    cut = {"data.max_length": 8, "data.overlength": "truncate"}
    source = [{"path": "../rows/long.jsonl", "format": name}]
    examples = world.job({"task": task, "data.train": source, **cut, **NO_ANSWERS}).rows.train
    return [[int(token) for token in examples[number]["tokens"]] for number in range(len(examples))]


def given_above(option: str, value: Any) -> list[list[bool]]:
    """Which labels rows get for their probabilities."""
    task: Any = tasks.make("sequence-classification", labels=["no", "yes"], multi_label=True, **{option: value})
    shares = [(0.2, 0.9), (0.4, 0.8), (0.1, 0.7), (0.35, 0.95)]
    classes = [(0.0, 0.0), (1.0, 0.0), (0.0, 0.0), (0.0, 1.0)]
    rows = [{"shares": row, "classes": right} for row, right in zip(shares, classes, strict=True)]
    settled = task.choose(rows)[0]
    return [[share > above for share, above in zip(row, settled.thresholds, strict=True)] for row in shares]


def best_by(world: OptionWorld, metric: str) -> float:
    """The value of the best evaluation by one metric."""
    during = {"evaluation.during": ["loss", "token_accuracy", "rouge"]}
    run = world.train({**STOPPING, **during, "evaluation.early_stopping": {"metric": metric, "patience": 9}})
    return float(read_object(run.best)["value"])


def loss_of_revision(world: OptionWorld, revision: str | None) -> float:
    """A hub, which tests cannot reach, that has another model under another revision."""

    def snapshot_download(name: str, *, repo_type: str, revision: str | None, allow_patterns: list[str]) -> str:
        assert (name, repo_type) == ("owner/model", "model") and "model*.safetensors" in allow_patterns
        return str(world.root / ("base" if revision is None else "other"))

    with patch("huggingface_hub.snapshot_download", snapshot_download), named_commits():
        return first_loss(world.train({"model.base": "owner/model", "model.revision": revision}))


def shapes_of_kind(world: OptionWorld, look: Callable[[RunDir], Any], kind: Any) -> Any:
    """What a run with an adapter of that kind leaves; of a method at linears, what two steps do."""
    return two_steps(world.root, kind) if kind in AT_LINEARS else look(world.train({"adapter": kind}))


def first_loss_from(world: OptionWorld, kind: str, adapter: str | None) -> float:
    """The loss before the first step, from scratch or from a trained adapter."""
    if adapter is not None and not Path(adapter).exists():
        run = world.train(of_kind(kind))
        Path(adapter).symlink_to(run.checkpoint(run.steps()[-1]) / "adapter")
    return first_loss(world.train({**of_kind(kind), "adapter.init_from": adapter}))


def first_loss_of(world: OptionWorld, kind: str, adapter: str | None) -> float:
    """The loss before the first step, of a fresh adapter of few options or of a trained one."""
    section: dict[str, Any] = {
        "kind": kind,
        **({"tokens": 3} if "tokens" in adapters.section(kind).model_fields else {}),
    }
    biased = world.root / "biased"  # Llama has no bias that could be trained
    if kind == "bias" and not biased.exists():
        make_base(biased, attention_bias=True)
    base = {"model.base": str(biased)} if kind == "bias" else {}
    if adapter is not None and not Path(adapter).exists():
        Path(adapter).symlink_to(world.train({**base, "adapter": section, "training.learning_rate": 0.1}).adapter)
    return first_loss(world.train({**base, "adapter": {**section, "init_from": adapter}}))


def saved_bytes(world: OptionWorld, key: str, value: Any) -> int:
    """Bytes that forward passes keep for their backward, over a whole run."""
    import torch

    kept = 0

    def pack(tensor: Any) -> Any:
        nonlocal kept
        kept += tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        pipeline.train(world.recipe({key: value}))
    return kept


def memory_on_a_card(world: OptionWorld, key: str, value: Any) -> int:
    """What a step of the recipe is said to need on a GPU."""
    recipe = world.load({key: value, "model.dtype": "bf16"}).recipe
    base = json.loads((world.root / "base" / "config.json").read_text(encoding="utf-8"))
    return recipe_step(recipe, find_shape(base), None, parse_gpu("24GiB")).at(4096, False).needed_bytes


def forward_passes(world: OptionWorld, tokens: int) -> int:
    """How often a run calls its model."""
    import torch
    from transformers import LlamaModel

    calls = 0

    def count(module: Any, *rest: Any) -> None:
        nonlocal calls
        calls += isinstance(module, LlamaModel)

    hook = torch.nn.modules.module.register_module_forward_hook(count)
    try:
        pipeline.train(world.recipe({"training.micro_batch_tokens": tokens}))
    finally:
        hook.remove()
    return calls


def times_unpacked(world: OptionWorld, kind: str, keep_unpacked: bool) -> int:
    """How often a run dequantises a weight."""
    from bitsandbytes import functional

    real, calls = functional.dequantize_4bit, 0

    def count(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        return real(*arguments, **options)

    section = {"kind": kind, "keep_unpacked": keep_unpacked}
    with patch.object(functional, "dequantize_4bit", count):
        pipeline.train(world.recipe({"model.quantization": section}))
    return calls


def forward_tokens(world: OptionWorld, packing: bool) -> int:
    """Tokens that a run gives to its model, padding among them."""
    import torch
    from transformers import LlamaModel

    tokens = 0

    def count(module: Any, _: Any, inputs: Mapping[str, Any]) -> None:
        nonlocal tokens
        tokens += inputs["input_ids"].numel()

    hooks = []

    def watch(module: Any, *rest: Any) -> None:
        if isinstance(module, LlamaModel) and not hooks:
            hooks.append(module.register_forward_pre_hook(count, with_kwargs=True))

    first = torch.nn.modules.module.register_module_forward_pre_hook(watch)
    try:
        pipeline.train(world.recipe({"data.packing": packing, "training.micro_batch_tokens": 64}))
    finally:
        first.remove()
    return tokens


def places_of_runs(world: OptionWorld, changes: Changes) -> list[str]:
    """Where the run is, as seen from the recipe."""
    recipe = world.recipe(changes)
    pipeline.train(recipe)
    return [path.relative_to(recipe.parent).as_posix() for path in recipe.parent.rglob("metrics.jsonl")]


def classifier(**options: Any) -> dict[str, Any]:
    """Of a recipe: classification with these options."""
    return {"kind": "sequence-classification", **options}


def last_of_classes(world: OptionWorld, task: Any) -> list[float]:
    """Losses of a run on texts with labels, which next-token prediction reads without them."""
    rows = world.root / "rows" / "classes.jsonl"
    rows.write_text("".join(f'{{"text": "red mug {n}", "label": "{"yes" if n % 3 else "no"}"}}\n' for n in range(8)))
    source = {"path": "../rows/classes.jsonl", "format": "text" if task == "causal-lm" else "text_label"}
    return [last_loss(world.train({"task": task, "data.train": [source], **NO_ANSWERS}))]
