"""Rows of a recipe, prepared: read, checked, rendered, tokenised, kept in the cache, and split.

data.train ──> samples ──> tokens ──> store (cache) ──┬─ rows ──> train
                                                      └─ fraction drawn by the seed ──> validation
data.validation, data.test, evaluation.retention ──> a store each
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np

from lorafit.contracts import GenerationRow, Reporter, Sample
from lorafit.data.augment import Augmenter
from lorafit.data.batch import rows_per_epoch, shuffle
from lorafit.data.cache import PreparedCache, code_version
from lorafit.data.encode_rows import Encoder, encode_all
from lorafit.data.pictures import find_changed
from lorafit.data.report import DataReport, finish_report, report_split
from lorafit.data.row_counts import Ledger
from lorafit.data.sample_renderer import Renderer, build_renderer
from lorafit.data.sources.sample_set import SampleSet, read_sources
from lorafit.data.store import ExampleSet, StoreWriter, is_sound
from lorafit.errors import DataError, Problems
from lorafit.facts import DatasetFacts
from lorafit.files.strict_json import read_json_file
from lorafit.kinds.tasks import Task, TaskSection
from lorafit.recipe.schema import DataSection, SourceSection, ValidationFraction

__all__ = ["ExampleSet", "Prepared", "Renderer", "build_renderer", "prepare"]

_REPORT = "report.json"
_GLANCE_ROWS = 256  # prepared in a second, and enough to see what rows are like
_FRACTION_KEY = 3  # tells this draw of the seed from the orders of epochs


@dataclass(frozen=True, slots=True)
class Prepared:
    """The splits of a recipe, all of them or those that were asked for.

    Attributes:
        splits: The rows by split: `train`, which is trained on; `validation`, scored while training; `test`, scored at
            the end only; `retention`, rows of general ability.
        report: What was found.
        digest: SHA-256 of the tokens and loss positions of these splits.
        task: What made the rows, with what the training rows decided.
    """

    splits: dict[str, ExampleSet]
    report: DataReport
    digest: str
    task: Task[TaskSection]
    _sources: dict[str, SampleSet]
    _renderer: Renderer

    @property
    def train(self) -> ExampleSet:
        """What is trained on."""
        return self.splits["train"]

    @property
    def validation(self) -> ExampleSet | None:
        """Scored while training."""
        return self.splits.get("validation")

    def facts(self) -> DatasetFacts:
        """What plan and memory must know of the rows."""
        source_of = np.asarray(self.train.source_of)
        repeats = np.asarray(self.train.repeats)[source_of]
        lengths, trained = np.asarray(self.train.lengths), np.asarray(self.train.trained_tokens)
        squares = np.square(lengths, dtype=np.float64) / self.task.sequences
        return DatasetFacts(
            rows=rows_per_epoch(self.train),
            tokens=round(float((lengths * repeats).sum())),
            trained_tokens=round(float((trained * repeats).sum())),
            longest_tokens=int(lengths.max()),
            longest_trained_tokens=int(trained.max()),
            longest_sequence_tokens=self._longest_sequence(),
            squared_tokens=round(float((squares * repeats).sum())),
            validation_rows=len(self.validation) if self.validation is not None else 0,
            classes=self.report.splits["train"].classes,
            class_weights=self.task.class_weights,
            pictures=self.task.picture_facts(self.train),
            validation_longest_tokens=int(np.max(self.validation.lengths)) if self.validation is not None else 0,
        )

    def _longest_sequence(self) -> int:
        """Tokens of the longest one that is trained on or scored while training, as a micro-batch pads it."""
        sets = [self.train, *([] if self.validation is None else [self.validation])]
        columns = [column.name for column in self.task.columns if column.holds_tokens]
        longest = max(examples.longest(name) for examples in sets for name in columns)
        return math.ceil(longest / self.task.pads_to) * self.task.pads_to

    def samples(self, split: str) -> SampleSet:
        """The sources that the rows of a split came from; rows that were held out came from those of `train`."""
        return self._sources[split] if split in self._sources else self._sources["train"]

    def generation_rows(self, split: str, limit: int | None = None, *, with_calls: bool = False) -> list[GenerationRow]:
        """Prompts and reference answers for the rows of a split, in their order; plain text has none.

        Args:
            split: `train`, `validation`, `test` or `retention`.
            limit: Only for the split's first rows.
            with_calls: Also for the last turn of a row that calls tools, where that is not its last answer.

        Raises:
            DataError: The chat template refuses a prompt.
        """
        examples = self.splits.get(split)
        if examples is None:
            return []
        source_of, lines = np.asarray(examples.source_of)[:limit], examples.lines[:limit]
        wanted = set(zip(source_of.tolist(), lines.tolist(), strict=True))
        found = []
        for number, line, sample in self.samples(split).rows():
            if isinstance(sample, Sample) and (number, line) in wanted:
                try:
                    found += self._renderer.generation_rows(sample, with_calls=with_calls)
                except DataError as error:
                    raise error.at(file=sample.file, line=line) from None
        return found


def prepare(
    data: DataSection,
    *,
    folder: Path,
    renderer: Renderer,
    task: Task[TaskSection],
    seed: int,
    cache_dir: Path,
    reporter: Reporter,
    retention: Sequence[SourceSection] | None = None,
    only: Collection[str] | None = None,
    glance: int | None = None,
) -> Prepared:
    """Prepares every split of a recipe, or takes it from the cache.

    Args:
        data: The recipe's section.
        folder: The recipe's folder.
        renderer: From `build_renderer`.
        task: Makes rows of what is rendered.
        seed: Draws the rows of `validation: {fraction: ...}`.
        cache_dir: Folder of prepared rows, e.g. `~/.cache/lorafit/data`.
        reporter: Gets progress, cache hits and misses, and warnings.
        retention: Sources of `evaluation.retention`.
        only: Splits that are wanted of a run that was trained: files of others are not opened. Rows that are held out
            of the training rows need those.
        glance: Enough to look at so many rows of each split: where many are not prepared yet, only the first of each
            source are; none are held out then, and the digest is not that of a training.

    Raises:
        DataError: Rows or files are bad, too long, none are left, or all that are trained on are of one class.
        RecipeError: The chat template can do nothing with the recipe's system prompt.
        ModelError: There is no usable chat template or tokenizer.
        ResourceError: The cache cannot be written, or memory ran out.
    """
    sections = {"train": data.train, "validation": data.validation, "test": data.test, "retention": retention}
    held_out = data.validation if isinstance(data.validation, ValidationFraction) else None
    wanted = set(sections if only is None else only)
    opened = wanted | {"train"} if held_out and "validation" in wanted else wanted
    sources = {
        split: read_sources(section, folder, data.bad_rows, reporter, task)
        for split, section in sections.items()
        if isinstance(section, Sequence) and split in opened
    }
    first = (sample for samples in sources.values() for sample in samples.first_samples())
    if data.system_prompt is not None and any(renderer.is_chat(sample) for sample in first):
        renderer.chats.check_system_prompt()
    augmenter = _augmenter(data, seed, sources)
    if "train" in sources:
        task = task.settle(sample for *_, sample in sources["train"].rows() if isinstance(sample, Sample))
    cache = PreparedCache(cache_dir)
    encoder = Encoder(renderer, task)
    sets: dict[str, ExampleSet] = {}
    ledgers: dict[str, Ledger] = {}
    said: dict[str, str] = {}
    partial: dict[str, int] = {}
    for split, samples in list(sources.items()):
        preparation = _Preparation(split, samples, encoder, cache, reporter, augmenter if split == "train" else None)
        if glance is not None and (few := preparation.first(glance)) is not None:
            with contextlib.suppress(DataError, Problems):  # said of all rows, not of a few
                sets[split], ledgers[split], said[split] = few.run()
                sources[split], partial[split] = few.samples, samples.guess_rows()
                continue
        sets[split], ledgers[split], said[split] = preparation.run()
    if held_out and "train" in sets and "train" not in partial:
        sets["train"], sets["validation"] = hold_out(sets["train"], held_out.fraction, seed)
        said["validation"] = said["train"]
    reports = {part: report_split(sets[part], ledgers.get(part), said[part], task, partial.get(part)) for part in sets}
    report = finish_report(reports, sets, sources, data, renderer, task, is_decided=only is not None)
    for warning in report.warnings:
        reporter.warn(warning)
    digests = {split: examples.digest() for split, examples in sorted(sets.items())}
    return Prepared(
        splits={split: examples for split, examples in sets.items() if split in wanted},
        report=report,
        digest=hashlib.sha256(json.dumps(digests).encode()).hexdigest(),
        task=task,
        _sources=sources,
        _renderer=renderer,
    )


def _augmenter(data: DataSection, seed: int, sources: Mapping[str, SampleSet]) -> Augmenter | None:
    """What makes copies of the training rows, checked against their formats; None where none are asked for."""
    if data.augment is None or "train" not in sources:
        return None
    augmenter = Augmenter(data.augment, seed)
    augmenter.check({source.format for source in sources["train"].sources})
    return augmenter


def hold_out(examples: ExampleSet, fraction: float, seed: int) -> tuple[ExampleSet, ExampleSet]:
    """Splits rows into those that stay and `fraction` of them, at least one, drawn by the seed.

    Changed copies are never held out, and those of rows that are do not stay.

    Raises:
        DataError: There are too few rows to leave one on each side.
    """
    originals = np.flatnonzero(examples.copies == 0)
    if len(originals) < 2:
        todo = "give data.validation sources of its own"
        raise DataError(f"{len(originals)} row is too few to hold out a fraction", file=examples.files[0], todo=todo)
    order = originals[shuffle(len(originals), seed, _FRACTION_KEY)]
    count = min(len(originals) - 1, max(1, round(fraction * len(originals))))
    held_out, kept = order[:count], order[count:]
    if len(originals) < len(examples):
        copies = np.flatnonzero(examples.copies > 0)
        places = list(zip(np.asarray(examples.source_of).tolist(), examples.lines.tolist(), strict=True))
        taken = {places[row] for row in held_out}
        kept = np.concatenate([kept, [row for row in copies if places[row] not in taken]]).astype(np.int64)
    return examples.select(kept), examples.select(held_out)


@dataclass(frozen=True, slots=True)
class _Preparation:
    """One split on its way into the cache."""

    split: str
    samples: SampleSet
    encoder: Encoder
    cache: PreparedCache
    reporter: Reporter
    augmenter: Augmenter | None = None
    is_partial: bool = False

    def first(self, rows: int) -> _Preparation | None:
        """The preparation of the first rows of each source; None where all are prepared already, or are few."""
        if self.samples.guess_rows() <= 2 * _GLANCE_ROWS or self.cache.find(self._parts(), "").hit:
            return None
        most = max(rows, _GLANCE_ROWS // len(self.samples.sources), 1)
        return replace(self, samples=self.samples.first(most), is_partial=True)

    def run(self) -> tuple[ExampleSet, Ledger, str]:
        """The rows, what was counted, and what the cache said."""
        where = [self.split, [source.place for source in self.samples.sources]]
        place = json.dumps([*where, "first rows"] if self.is_partial else where)
        parts = self._parts()
        names = [source.name for source in self.samples.sources]
        spoken = {_data_part(number): f"data of {name}" for number, name in enumerate(names)}
        wait = f"{self.split} rows: another process prepares them; waiting for it"
        with self.cache.locked(parts, lambda: self.reporter.info(wait)):
            lookup = self.cache.find(parts, place, spoken)
            ledger = self._read_ledger(lookup.folder, names) if lookup.hit else None
            if lookup.hit and ledger is None:
                lookup = replace(lookup, hit=False, reason="cache miss: the cached copy is damaged (its content)")
            elif ledger is not None and (changed := self._find_changed_picture(lookup.folder, ledger)) is not None:
                lookup, ledger = replace(lookup, hit=False, reason=f"cache miss: {changed} changed"), None
            self.reporter.info(f"{self.split} rows: {lookup.reason}")
            if ledger is None:
                self._build(lookup.folder)
                ledger = self._read_ledger(lookup.folder, names)
        assert ledger is not None
        self.cache.remember(parts, place)
        ledger.judge(may_skip=True)  # behind the cache: what is wrong is said again without preparing again
        self._check_left(ledger)
        for source, counts in zip(self.samples.sources, ledger.sources, strict=True):
            source.unread.update({} if source.unread else counts.unread)
        repeats = [getattr(source.section, "repeats", 1.0) for source in self.samples.sources]
        return ExampleSet(lookup.folder, self.encoder.task.columns, names, repeats), ledger, lookup.reason

    def _read_ledger(self, folder: Path, names: Sequence[str]) -> Ledger | None:
        """What a cached split says of itself; None where that, or its rows, are not what was written."""
        try:
            stored = read_json_file(folder / _REPORT)
            whole = is_sound(folder, self.encoder.task.columns)
            return Ledger.from_json(stored, names, self.encoder.renderer.data.bad_rows) if whole else None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def _find_changed_picture(self, folder: Path, ledger: Ledger) -> str | None:
        """An image of the rows that is not as it was when they were prepared, or for which one was bad; None where all
        are."""
        task = self.encoder.task
        if not task.reads_pictures:
            return None
        names = [source.file for source in ledger.sources]
        rows = ExampleSet(folder, task.columns, names, [1.0] * len(names))
        placed = (one for number in range(len(rows)) for one in task.pictures(rows[number]))
        return find_changed(chain(ledger.unusable.items(), ((one.file, one.changed_at_ns) for one in placed)))

    def _parts(self) -> dict[str, str]:
        parts = {_data_part(number): source.key() for number, source in enumerate(self.samples.sources)}
        for number, source in enumerate(self.samples.sources):
            section = source.section
            kind = Path(section.path).suffix.lower()
            reading = [kind, source.format, section.columns, section.limit]
            reading += [source.place] if self.encoder.task.reads_pictures else []  # where its images' paths start
            parts[f"source {number + 1}"] = json.dumps(reading, sort_keys=True)
        parts |= self.encoder.renderer.key
        options = self.encoder.renderer.data.model_dump(
            include={"system_prompt", "dropped_fields", "train_on", "max_length", "overlength"}, mode="json"
        )
        parts |= {option: json.dumps(value) for option, value in options.items()}
        if self.encoder.renderer.written_date is not None:
            parts["date in the chat template"] = self.encoder.renderer.written_date
        if self.augmenter is not None:
            parts["data.augment"] = json.dumps([self.augmenter.section.model_dump(mode="json"), self.augmenter.seed])
        task = self.encoder.task.section.model_dump_json()
        return {**parts, "task": task, "code": code_version()}

    def _build(self, target: Path) -> None:
        each = 1 if self.augmenter is None else 1 + self.augmenter.section.copies
        guess = each * self.samples.guess_rows()
        ledger = self.samples.new_ledger()
        samples = self.encoder.task.arrange(self.samples.usable(ledger, self.augmenter))
        with self.cache.build(target) as folder:
            count, what = self.samples.count_for_bar(), f"preparing {self.split} rows"
            total = None if count is None else each * count
            with StoreWriter(folder, self.encoder.task.columns) as writer, self.reporter.track(total, what) as bar:
                began, done = time.monotonic(), 0
                with contextlib.closing(encode_all(self.encoder, samples, guess)) as chunks:
                    for encoded in chunks:
                        writer.write(encoded.chunk)
                        for number, examples in encoded.examples:
                            ledger.sources[number].kept += examples
                        for noted in encoded.notes:
                            ledger.note(noted)
                        ledger.seen.update(encoded.seen)
                        done += encoded.samples
                        seconds = time.monotonic() - began
                        bar.advance(encoded.samples, **({"rows/s": round(done / seconds)} if seconds > 1 else {}))
            ledger.sort()
            for source, counts in zip(self.samples.sources, ledger.sources, strict=True):
                counts.unread = dict(source.unread)
                if source.changed():
                    raise DataError("was written to while it was read", file=source.name, todo="start again")
            (folder / _REPORT).write_text(json.dumps(ledger.to_json()), encoding="utf-8")

    def _check_left(self, ledger: Ledger) -> None:
        """Raises DataError where no row is left, and says where they went."""
        if any(source.kept for source in ledger.sources):
            return
        files = ", ".join(source.file for source in ledger.sources)
        read, dropped = (sum(getattr(source, name) for source in ledger.sources) for name in ("read", "dropped"))
        if not read:
            raise DataError("no rows", file=files)
        if dropped:
            limits = self.encoder.task.limits(self.encoder.renderer.data.max_length)
            longest = " or ".join(f"{limit.name} {limit.most}" for limit in limits)
            what = f"no rows left: {dropped} of {read} are longer than {longest}"
            cut = "" if "data.overlength=truncate" in self.encoder.task.unread else ", or set data.overlength: truncate"
            todo = f"raise {' or '.join(limit.option for limit in limits)}{cut}"
            raise DataError(what, file=files, todo=todo)
        raise DataError(f"no rows left: {read} of {read} are bad", file=files, todo="correct them")


def _data_part(number: int) -> str:
    return f"data {number + 1}"
