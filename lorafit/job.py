"""What a recipe names, opened: base, tokenizer, rows, device; and the model, loaded and proven, when it is needed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from lorafit.contracts import JsonMapping, JsonObject, Reporter
from lorafit.kinds.adapters import begins_as_base
from lorafit.kinds.linear_targets import check_new_tokens, new_tokens
from lorafit.kinds.quantizations import quantizations
from lorafit.kinds.tasks import Task, TaskSection, tasks
from lorafit.machine.version import installed_versions
from lorafit.run.named_files import look_for_rows, placed

if TYPE_CHECKING:
    from datetime import datetime
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lorafit.contracts import Examples
    from lorafit.data.pictures import ProcessorPictures
    from lorafit.data.prepare import Prepared, Renderer
    from lorafit.facts import DeviceFacts, ModelShape
    from lorafit.model.base import Base
    from lorafit.model.tokenizer_files import Companions
    from lorafit.objective import Objective
    from lorafit.ops.kernels import Kernels
    from lorafit.plan import ResolvedPlan
    from lorafit.recipe.load import LoadedRecipe
    from lorafit.recipe.schema import Recipe
    from lorafit.run.card import RunCard

_PROOF_TOKENS = 512
_ROWS_TO_COMPARE = 16
_PROOF_LOGITS_BYTES = 64 << 20  # fp32, all at once, and copied: such is a model's own loss


@dataclass(frozen=True)
class Job:
    """Everything that a recipe names, opened and checked, weights apart.

    Attributes:
        linears: Kinds of linears by path, which a run or calibration rows have chosen.
    """

    loaded: LoadedRecipe
    base: Base
    shape: ModelShape
    tokenizer: PreTrainedTokenizerBase
    renderer: Renderer
    rows: Prepared
    device: DeviceFacts
    linears: Mapping[str, str] = field(default_factory=dict)

    @property
    def recipe(self) -> Recipe:
        """The recipe's values, with the kinds of linears that it leaves open and somebody has chosen."""
        asked, chosen = self.loaded.recipe, quantizations.bind(self.loaded.recipe.model.quantization)
        if not self.linears or not chosen.candidates():
            return asked
        model = asked.model.model_copy(update={"quantization": chosen.told_by(self.linears)})
        return asked.model_copy(update={"model": model})

    @property
    def task(self) -> Task[TaskSection]:
        """What is learnt, with what the rows decided."""
        return self.rows.task

    @property
    def pad_id(self) -> int:
        """What fills up short rows."""
        from lorafit.evaluation.runner import find_pad_id

        return find_pad_id(self.tokenizer, self.shape.vocabulary)

    def shows(self, examples: Examples) -> Callable[[int], bool]:
        """Whether a proof on a row sees all of the model: of one that reads images, on a row that has some."""
        return lambda row: not self.task.reads_pictures or bool(self.task.pictures(examples[row]))

    def writes_chats(self) -> bool:
        """Whether training rows were rendered by a chat template; else prompts go to the model verbatim."""
        if self.recipe.data.chat_template is not None:
            return True
        return any(sample.messages is not None for sample in self.rows.samples("train").first_samples())

    def stop_ids(self) -> list[int]:
        """The token that ends an answer in training's rows, which need not be the model's eos: the chat template's, or
        what the tokenizer writes behind a target.
        """
        if self.renderer.apart is not None:
            return self.renderer.apart.ends
        end = self.renderer.chats.end_of_turn_id() if self.writes_chats() else None
        return [] if end is None else [end]

    def card(self, resolved: ResolvedPlan) -> RunCard:
        """What whoever answers with the run must know of it."""
        from lorafit.model.tokenizer_files import TokenizerFolder, digest_templates, end_with
        from lorafit.run.card import RunCard

        recipe, stop_ids = self.recipe, self.stop_ids()
        beside = TokenizerFolder(self.base.path, follows_links=True)
        ends = [*([] if self.tokenizer.eos_token_id is None else [int(self.tokenizer.eos_token_id)]), *stop_ids]
        begins = {} if self.renderer.apart is None else self.renderer.apart.begins
        chat = self.writes_chats()
        templates = self.renderer.chats.templates if chat else self.renderer.templates()
        return RunCard(
            task=self.task.section,
            base=self.base.origin,
            base_path=str(self.base.path.resolve()),
            adapter=recipe.adapter,
            quantization=recipe.model.quantization,
            dtype=resolved.dtype,
            compute_dtype=resolved.compute_dtype,
            attention=resolved.attention,
            chat=chat,
            template_is_named=recipe.data.chat_template is not None,
            templates=templates,
            system_prompt=self.renderer.chats.system_prompt if chat else None,
            template_date=self.renderer.template_date if chat else None,
            template_dates=self.renderer.chats.dates if chat else {},
            stop_ids=stop_ids,
            pad_id=self.pad_id,
            generation=end_with(beside.generation(), self.base.config, ends, begins),
            max_length=recipe.data.max_length,
            embedding_rows=self.shape.vocabulary,
            tokenizer=self.renderer.key["tokenizer"],
            chat_template=digest_templates(templates),
            versions=installed_versions(),
            seed=recipe.seed,
        )

    def rows_to_compare(self) -> JsonObject:
        """A few rows by column, held-out ones where there are any, for the merge's comparison of logits."""
        import numpy as np

        examples = self.rows.splits.get("test") or self.rows.validation or self.rows.train
        rows = [examples[row].columns for row in range(min(_ROWS_TO_COMPARE, len(examples)))]
        as_lists = [{name: np.asarray(values).tolist() for name, values in columns.items()} for columns in rows]
        return {"format": 1, "rows": as_lists}

    def prompts(self) -> JsonObject | None:
        """What training rows ask, as a server must know it of its adapters; None where no server answers with them."""
        from lorafit.data.prompt_texts import draw_prompts

        if not self.task.writes_answers or self.renderer.apart is not None:
            return None
        return {"format": 1, "rows": len(self.rows.train), "prompts": draw_prompts(self.rows, self.recipe.seed)}

    def companions(self, card: RunCard) -> Companions:
        """What every adapter of the run gets beside its weights."""
        from lorafit.model.tokenizer_files import PROCESSOR_PATTERNS, Companions, TokenizerFolder

        beside = TokenizerFolder(self.base.path, follows_links=True)
        if self.base.new_tokens:
            from lorafit.model.new_tokens import keep_tokenizer

            beside = TokenizerFolder(keep_tokenizer(self.tokenizer, self.renderer.key["tokenizer"]))
        processor = beside.files(PROCESSOR_PATTERNS) if self.task.reads_pictures else ()
        return Companions(beside, card.shipped_templates, card.generation, type(self.tokenizer).__name__, processor)

    def facts(self) -> JsonObject:
        """What the run is made of, and what a resume must find again."""
        return {
            "seed": self.recipe.seed,
            "recipe": self.loaded.digest,
            "data": self.rows.digest,
            "base": {"name": self.base.origin.name, "digest": self.base.origin.digest},
            **{name.replace(" ", "_"): digest for name, digest in self.renderer.key.items()},
        }

    def origin(self) -> JsonObject:
        """The facts, and what a resume takes from the run instead of finding it again."""
        facts, date = self.facts(), self.renderer.template_date
        return {**facts, "base": {**facts["base"], "content": self.base.origin.content}, "template_date": date}


def open_job(
    loaded: LoadedRecipe,
    reporter: Reporter,
    now: datetime | None = None,
    commit: str | None = None,
    glance: int | None = None,
    device: DeviceFacts | None = None,
) -> Job:
    """Opens a recipe. Files of rows are looked for before anything heavy starts.

    Args:
        loaded: The recipe.
        reporter: Gets progress and warnings.
        now: The moment that a run took for the present one when it began; this minute where None.
        commit: Of the base on the hub, which a run began with; what the recipe's revision means by now where None.
        glance: Enough to prepare so many rows of each split, for who only looks at them; all where None.
        device: What the model would be on; this machine's where None.

    Raises:
        DataError: Files or rows are bad.
        ModelError: Base or tokenizer cannot be used.
        ResourceError: There is a card, and torch cannot use it.
    """
    recipe = loaded.recipe
    look_for_rows(loaded)
    from lorafit.data.prepare import build_renderer
    from lorafit.machine.devices import read_device
    from lorafit.model.base import resolve_base
    from lorafit.model.class_shape import find_shape
    from lorafit.model.load import load_tokenizer

    device = device or read_device()
    model = recipe.model if commit is None else recipe.model.model_copy(update={"revision": commit})
    with placed(loaded):
        base = resolve_base(model, loaded.folder, reporter).known_as(revision=recipe.model.revision)
    base = replace(base, new_tokens=new_tokens(recipe.adapter))
    task = tasks.bind(recipe.task)
    find_shape(base.config, task.model_class)  # a config of no model is told before all else
    check_new_tokens(recipe.adapter, reads_pictures=task.reads_pictures)
    pictures = open_pictures(base) if task.reads_pictures else None
    with placed(loaded):
        tokenizer = load_tokenizer(base) if pictures is None else pictures.tokenizer
    renderer = build_renderer(tokenizer, recipe.data, loaded.folder, now, task.two_texts, pictures)
    rows, shape = prepare_rows(loaded, renderer, base.config, reporter, glance=glance)
    return Job(loaded, base, shape, tokenizer, renderer, rows, device)


def open_pictures(base: Base, folder: Path | None = None) -> ProcessorPictures:
    """What looks at images and makes tensors of them, by the processor of a base, or that in another folder.

    Raises:
        ModelError: It cannot be read, or writes no token for an image.
    """
    from lorafit.data.pictures import ProcessorPictures
    from lorafit.files.cache import cache_folder
    from lorafit.model.processor import load_processor, refuse_token_kinds

    refuse_token_kinds(base.config)
    return ProcessorPictures(load_processor(base, folder), cache_folder() / "images")


def prepare_rows(
    loaded: LoadedRecipe,
    renderer: Renderer,
    config: JsonMapping,
    reporter: Reporter,
    only: Collection[str] | None = None,
    glance: int | None = None,
) -> tuple[Prepared, ModelShape]:
    """The recipe's rows as tokens, every one of which the model has a row for, and the model's shape for their task.

    Args:
        loaded: The recipe.
        renderer: Renders them.
        config: The base's config.json.
        reporter: Gets progress and warnings.
        only: The splits that are wanted; all where None.
        glance: Enough to prepare so many rows of each split; all where None.

    Raises:
        DataError: Files or rows are bad.
        ModelError: A token has no row in the embedding, or there is no usable chat template.
    """
    from lorafit.data.id_range import check_examples
    from lorafit.data.prepare import prepare
    from lorafit.files.cache import cache_folder
    from lorafit.model.class_shape import find_shape
    from lorafit.model.new_tokens import with_rows

    recipe = loaded.recipe
    task = tasks.bind(recipe.task)
    with placed(loaded):
        rows = prepare(
            recipe.data,
            folder=loaded.folder,
            renderer=renderer,
            task=task if renderer.pictures is None else task.seeing(renderer.pictures),
            seed=recipe.seed,
            cache_dir=cache_folder() / "data",
            reporter=reporter,
            retention=recipe.evaluation.retention,
            only=only,
            glance=glance,
        )
    shape = with_rows(find_shape(config, rows.task.model_class), recipe.adapter, renderer.tokenizer)
    check_examples(rows.splits, rows.task.columns, renderer.tokenizer, shape.vocabulary)
    return rows, shape


def build_objective(job: Job, model: PreTrainedModel, dtype: str, kernels: Kernels | None = None) -> Objective:
    """The objective around a model, not proven yet. Its loss takes the kernels that the layers were given."""
    from lorafit.ops.dtypes import autocast_dtype

    exact = not job.shape.plain_head
    objective = job.task.build_objective(model, autocast_dtype=autocast_dtype(dtype), exact=exact)
    objective.kernels = kernels or objective.kernels
    return objective


def refer(job: Job, objective: Objective, splits: Collection[str], reporter: Reporter) -> None:
    """Gives rows of the job the columns that its task asks of the model as it was before the first step.

    Args:
        job: Whose rows; those of a task that asks nothing stay as they are.
        objective: Around the model as it was then.
        splits: Which rows.
        reporter: Gets a bar.

    Raises:
        ResourceError: The cache cannot be written.
    """
    if not job.task.reference_columns:
        return
    from lorafit.evaluation.reference import add_reference
    from lorafit.model.adapter import hash_adapter

    made_of = {
        "base": job.base.origin.digest,
        "adapter": None if begins_as_base(job.recipe.adapter) else hash_adapter(objective.model),
        "quantization": job.recipe.model.quantization.model_dump(mode="json"),
        "dtype": str(objective.autocast_dtype),
    }
    asked = {split: rows for split, rows in job.rows.splits.items() if split in splits}
    job.rows.splits.update(add_reference(objective, job.task, asked, made_of, job.pad_id, reporter))


def prove(job: Job, objective: Objective, examples: Examples, reporter: Reporter) -> None:
    """Compares an objective with the model's own loss on one row.

    Raises:
        NumericsError: They differ on every path.
    """
    from lorafit.objective import choose_probe, prove_objective

    task = job.task
    most_tokens = min(_PROOF_TOKENS, _PROOF_LOGITS_BYTES // (4 * job.shape.vocabulary))
    probe = choose_probe(examples.lengths, most_tokens=most_tokens, shows=job.shows(examples))
    row = task.cut_probe(examples[probe], most_tokens)
    prove_objective(objective, objective.batch_of(row, job.pad_id), reporter)
