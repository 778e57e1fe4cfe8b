"""Composition root and Python API: each command of lorafit as a function. Read `train` first, then `Training.run`.

    recipe ─> output free? ─> base, tokenizer ─> rows ─> plan ─> fits? ─> model + adapter ─> objective, proven
                                                          ─> rehearsal ─> fit ─> run folder

Every other room gets its section of the recipe or plain values from here; none of them knows the whole. What an
argument means stands once, at the function of the same name in `lorafit.api`; a reporter of None is silent.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafit.console.arguments import check_arguments, check_search
from lorafit.contracts import JsonMapping, JsonObject, Reporter, Silent
from lorafit.errors import UsageError
from lorafit.files.atomic import read_object
from lorafit.files.rundir import RunDir
from lorafit.job import build_objective, open_job, open_pictures, prove
from lorafit.kinds.metrics import metrics
from lorafit.kinds.tasks import tasks
from lorafit.machine.devices import parse_gpu, read_device, seems_to_have_card
from lorafit.recipe.load import load_recipe
from lorafit.run.answered import Classified, Generated
from lorafit.run.named_files import look_at_template, placed
from lorafit.run.output_folder import check_output, check_own, check_reports, check_unused, claimed
from lorafit.run.results import Evaluated, Merged, Validated
from lorafit.run.trained import Trained
from lorafit.run.workspace import (
    check_answerable,
    check_same_recipe,
    chosen_linears,
    inputs_of,
    is_lone_adapter,
    is_model,
    open_run,
    own_rank,
    recorded_start,
    resume_command,
    usual_split,
)

if TYPE_CHECKING:
    from lorafit.answering.generate import Answer
    from lorafit.data.preview import Preview
    from lorafit.estimation import CardComparison, RecipeEstimate
    from lorafit.evaluation.runner import Side


def validate(recipe: Path | JsonMapping, *, overrides: Sequence[str] = ()) -> Validated:
    """Checks a recipe and looks whether its chat template is there: no torch, no data, no model."""
    loaded = load_recipe(recipe, overrides, look_at_template=look_at_template)
    return Validated(loaded)


def preview(
    recipe: Path | JsonMapping,
    *,
    overrides: Sequence[str] = (),
    show: int | None = 3,
    counts_all: bool = True,
    reporter: Reporter | None = None,
) -> Preview:
    """Rows as the model will see them.

    `counts_all`: prepare and count all rows; else, of many, only the first of each source.
    """
    from lorafit.data import preview as room
    from lorafit.run.curriculum import describe_curriculum

    glance = None if counts_all else show
    loaded = load_recipe(recipe, overrides, look_at_template=look_at_template)
    job = open_job(loaded, reporter or Silent(), glance=glance, device=read_device("cpu"))  # nothing will run
    return room.preview(job.rows, job.renderer, show, describe_curriculum(job))


def estimate(
    recipe: Path | JsonMapping,
    *,
    overrides: Sequence[str] = (),
    gpu: str | None = None,
    headroom: float | None = None,
    fit: str | None = None,
    price_per_hour: float | None = None,
    exact: bool = False,
    reporter: Reporter | None = None,
) -> RecipeEstimate:
    """Peak memory, time and price from a recipe and its base's config, and from its rows where they are here."""
    from lorafit.estimation import Options, check_headroom, estimate_recipe
    from lorafit.estimation.local_rows import read_lengths
    from lorafit.estimation.measured import MeasuredSteps
    from lorafit.model.base import read_config
    from lorafit.model.class_shape import find_shape
    from lorafit.plan import check_price

    device = parse_gpu(gpu) if gpu is not None else None
    fit_device = parse_gpu(fit, "--fit") if fit is not None else None
    check_price(price_per_hour, device or fit_device)
    headroom = check_headroom(headroom, device or fit_device)
    loaded = load_recipe(recipe, overrides)
    with placed(loaded):
        config = read_config(loaded.recipe.model, loaded.folder)
    rows = read_lengths(loaded, reporter or Silent(), open_pictures)
    here = None if device or fit_device or seems_to_have_card() else read_device("cpu")
    options = Options(device, headroom, fit_device, price_per_hour, here)
    with placed(loaded):
        engine = MeasuredSteps(config, reporter or Silent())
        shape = find_shape(config, tasks.bind(loaded.recipe.task).model_class)
        found = estimate_recipe(loaded.recipe, shape, rows, options, engine)
    if not exact:
        return found
    from lorafit.estimation.dry_run import run_exactly

    return run_exactly(found, config, reporter or Silent())


def compare_cards(
    recipe: Path | JsonMapping, gpus: Sequence[str], *, fit: str | None = None, **options: Any
) -> CardComparison:
    """The recipe on several cards, a row each; `options` are those of `estimate`, all but what is of one card alone."""
    from lorafit.estimation import CardComparison

    for name, value in (("--fit", fit), ("--price-per-hour", options.get("price_per_hour"))):
        if value is not None:
            raise UsageError("is of one card, and several are named", key=name, todo="name one --gpu, or leave it out")
    for gpu in gpus:
        parse_gpu(gpu)  # all names are told before any work
    return CardComparison(tuple(estimate(recipe, gpu=gpu, **options) for gpu in gpus))


def train(
    recipe: Path | JsonMapping,
    *,
    overrides: Sequence[str] = (),
    output: Path | None = None,
    resume: bool = False,
    resume_from: int | None = None,
    plan_file: Path | None = None,
    dry_run: bool = False,
    allow_inexact: bool = False,
    measure_memory: bool = False,
    profile: bool = False,
    reporter: Reporter | None = None,
) -> Trained:
    """Plans, checks, trains and saves a run; or goes on with one.

    `measure_memory` counts live tensors in every step; `profile` writes where the steps' time goes into the run folder.
    """
    from lorafit.estimation.measured import MeasuredSteps
    from lorafit.plan import ResolvedPlan, plan, require_fit, show_plan
    from lorafit.run.curriculum import known_difficulty

    reporter = (reporter or Silent()) if own_rank() == 0 else Silent()
    loaded = load_recipe(recipe, overrides, output=output, look_at_template=look_at_template)
    run, command = RunDir(loaded.output), resume_command(recipe, overrides, output)
    resume = resume or resume_from is not None
    check_output(run.root, inputs_of(loaded))
    with placed(loaded), nullcontext() if dry_run or own_rank() != 0 else claimed(run):
        if resume:
            check_own(run)
            check_same_recipe(run, loaded, reporter)
            if resume_from is not None:
                run.find_checkpoint(str(resume_from))
        elif not dry_run:
            check_unused(run, loaded, command=command)
        given = ResolvedPlan.from_json(read_object(plan_file), str(plan_file)) if plan_file is not None else None
        job = open_job(loaded, reporter, *(recorded_start(run) if resume else ()))
        job = replace(job, linears=chosen_linears(loaded, run if resume else None, given))
        engine = MeasuredSteps(job.base.config, reporter)
        the_plan = plan(job.recipe, job.shape, job.rows.facts(), job.device, engine)
        if not resume:  # which takes what the run began with
            known_difficulty(job)
        if dry_run:
            from lorafit.model.shippable import check_shippable_unloaded

            show_plan(the_plan, reporter)
            require_fit(the_plan)
            check_shippable_unloaded(job.base, job.recipe.adapter, job.recipe.seed, job.task.model_class)
            return Trained(run, the_plan, None, None, resumes=resume)
        from lorafit.ops.determinism import deterministic_algorithms
        from lorafit.training import Training

        training = Training(
            job,
            run,
            the_plan,
            reporter,
            resume_command=command,
            counts_memory=measure_memory,
            profiles=profile,
        )
        with deterministic_algorithms(job.recipe.training.deterministic):
            return training.run(resume=resume, resume_from=resume_from, given=given, allow_inexact=allow_inexact)


def evaluate(
    run: Path,
    *,
    overrides: Sequence[str] = (),
    checkpoint: str | None = None,
    split: str | None = None,
    limit: int | None = None,
    base_model: str | None = None,
    base_sides: dict[str, Side] | None = None,
    reporter: Reporter | None = None,
) -> Evaluated:
    """Scores base and tuned model on the same held-out rows, and writes the report into the run folder.

    `base_sides`: what the base scored in earlier calls, by all that decides it; added to.
    """
    reporter, started = reporter or Silent(), time.perf_counter()
    if split not in (None, "test", "validation", "train"):
        raise UsageError(f"'{split}' is no split", key="--split", todo="use test, validation or train")
    opened = open_run(run, overrides)
    checkpoint = checkpoint if checkpoint is not None else opened.checkpoint
    _, step = opened.adapter(checkpoint)  # said before the libraries are loaded
    from lorafit.answering.evaluation_rows import (
        about_evaluation,
        changed_evaluation,
        fit_base_side,
        open_asking,
        open_evaluation,
        refer_as_begun,
        score_base_once,
        settle_evaluation,
    )
    from lorafit.answering.sampling import Sampling
    from lorafit.answering.tuned import open_tuned
    from lorafit.evaluation.report import name_report, write_report
    from lorafit.evaluation.runner import evaluate_pair

    opened = settle_evaluation(opened, overrides, reporter)
    split = split or usual_split(opened.loaded.recipe)
    tuned = open_tuned(opened, checkpoint, base_model, reporter)
    job = open_evaluation(opened, tuned, split, reporter)
    examples = job.rows.splits[split]
    report = name_report(
        split=split if split != opened.usual_split() else None,
        limit=limit if limit is not None and limit < len(examples) else None,
        checkpoint_step=step if checkpoint is not None else None,
        changed=changed_evaluation(opened, split),
    )
    check_reports(opened.run, report)
    with_calls = any(metrics.get(name).needs == "calls" for name in job.recipe.evaluation.final)
    asked = job.rows.generation_rows(split, limit, with_calls=with_calls)
    asking = open_asking(opened, job, asked, reporter)
    engine = tuned.load(job.tokenizer, reporter)
    objective = build_objective(job, engine.model, tuned.card.dtype)
    prove(job, objective, job.rows.splits[split], reporter)
    refer_as_begun(job, objective, opened, tuned, split, reporter)
    examples = job.rows.splits[split] if limit is None else job.rows.splits[split].first(limit)
    base_scorer, base_note = fit_base_side(job, objective, opened, tuned, reporter)
    evaluation = job.recipe.evaluation
    tokens = opened.resolved().evaluation_micro_batch_tokens
    result = evaluate_pair(
        engine,
        objective,
        examples,
        asked,
        evaluation.final,
        sampling=Sampling.of_recipe(evaluation),
        stop_ids=tuned.card.stop_ids,
        micro_batch_tokens=tokens,
        seed=job.recipe.seed,
        reporter=reporter,
        retention=job.rows.splits.get("retention"),
        base_scorer=base_scorer,
        base_note=base_note,
        base_once=score_base_once(base_sides, job, tuned, examples, tokens),
        asking=asking,
        about=about_evaluation(opened, engine.model, split, step),
    )
    result = replace(result, seconds=time.perf_counter() - started)
    write_report(opened.run, result, report)
    return Evaluated(opened.run, result, report, opened.loaded.folder)


def merge(
    run: Path,
    *,
    output: Path,
    base: str | None = None,
    checkpoint: str | None = None,
    base_model: str | None = None,
    verify: bool = True,
    reporter: Reporter | None = None,
) -> Merged:
    """Merges an adapter into its base tensor by tensor, and compares logits where both models fit into memory."""
    reporter = reporter or Silent()
    if base not in (None, "dequantized", "original"):
        raise UsageError(f"'{base}' is no base", key="--base", todo="use dequantized or original")
    check_answerable(run, checkpoint)  # said before the libraries are loaded
    opened = None if is_lone_adapter(run) else open_run(run)
    check_output(output, [opened.run.root if opened is not None else run])
    from lorafit.merging import merge_adapter_folder, merge_run

    if opened is None:
        return merge_adapter_folder(run, output, base, base_model, verify=verify, reporter=reporter)
    return merge_run(opened, output, base, checkpoint, base_model, verify=verify, reporter=reporter)


def generate(
    run: Path,
    *,
    prompt: str | None = None,
    input_file: Path | None = None,
    rows: Sequence[str | JsonMapping] | None = None,
    compare_base: bool = False,
    checkpoint: str | None = None,
    base_model: str | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    max_new_tokens: int = 256,
    min_new_tokens: int = 0,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    no_repeat_ngram_size: int = 0,
    seed: int = 0,
    reporter: Reporter | None = None,
) -> Generated:
    """Answers a prompt or a file of prompts, with the base model beside the tuned one where asked."""
    search: JsonObject = {"num_beams": num_beams, "length_penalty": length_penalty, "temperature": float(temperature)}
    search |= {"top_p": top_p, "max_new_tokens": max_new_tokens, "min_new_tokens": min_new_tokens, "seed": seed}
    search["no_repeat_ngram_size"] = no_repeat_ngram_size
    check_arguments(search)
    check_search(search)
    reporter = reporter or Silent()
    from lorafit.answering.prompts import check_prompts, read_prompts

    check_prompts(prompt, input_file, rows)
    from lorafit.model.base import model_folder

    run = model_folder(run, reporter)
    check_answerable(run, checkpoint)
    prompts = read_prompts(run, prompt, input_file, rows, reporter)
    from lorafit.answering.generate import Request
    from lorafit.answering.opening import open_answerer, warn_of_cut, warn_of_cut_texts, warn_of_empty
    from lorafit.answering.sampling import Sampling

    if compare_base and is_model(run):
        raise UsageError("a model folder has no base beside it", key="--compare-base", todo="name a run folder")
    answerer = open_answerer(run, checkpoint, base_model, reporter)
    voice = answerer.voice
    asked = [voice.ask(each) for each in prompts]  # a prompt that cannot be asked is told before a load
    warn_of_cut_texts(asked, "prompt", voice.max_length, reporter)
    engine = answerer.load()
    engine.check_prompts([each.input_ids for each in asked])
    sampling = Sampling(**search)

    def answer(adapter: str | None, what: str) -> list[Answer]:
        requests = [
            Request(each.input_ids, adapter, sampling, voice.stop_ids, row, each.pictures)
            for row, each in enumerate(asked)
        ]
        return engine.answer(requests, reporter=reporter, what=what)

    tuned = answer(answerer.adapter, "answers")
    base = answer(None, "answers, base model") if compare_base else None
    warn_of_empty(tuned, voice, reporter)
    warn_of_cut([*tuned, *(base or ())], max_new_tokens, reporter)
    return Generated(prompts, tuned, base, are_chats=voice.chats is not None)


def classify(
    run: Path,
    *,
    prompt: str | None = None,
    input_file: Path | None = None,
    rows: Sequence[str | JsonMapping] | None = None,
    output: Path | None = None,
    checkpoint: str | None = None,
    base_model: str | None = None,
    reporter: Reporter | None = None,
) -> Classified:
    """Labels of a text or a file of texts, with probabilities; written as a table or JSON lines where asked."""
    reporter = reporter or Silent()
    from lorafit.answering.prompts import check_prompts

    check_prompts(prompt, input_file, rows)
    if output is not None:
        Classified.check_output(output)
    check_answerable(run, checkpoint)
    from lorafit.answering.classify import open_classifier

    classifier = open_classifier(run, checkpoint, base_model, reporter)
    texts = classifier.read(run, prompt, input_file, rows, reporter)
    result = Classified(texts, classifier.label(texts, reporter))
    if output is not None:
        result.write(output)
    return result
