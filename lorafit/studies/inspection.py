"""`lorafit inspect`: what an adapter changes, module by module, what stands out, and what each part is worth.

RUN | ADAPTER ──> base, found again ──> each update beside its weight ──> norms, ranks, directions ──> findings
RUN ──> base and adapter in memory ──> held-out rows with one part off after the other ──> importances
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from lorafit.contracts import JsonMapping, Reporter, Silent
from lorafit.errors import UsageError
from lorafit.run.output_folder import check_output
from lorafit.run.workspace import OpenedRun, check_answerable, is_lone_adapter, is_model, open_run, usual_split

if TYPE_CHECKING:
    from lorafit.answering.tuned import Tuned
    from lorafit.evaluation.ablation import Ablation
    from lorafit.model.adapter import AdapterFolder
    from lorafit.model.base import Base
    from lorafit.model.updates import UpdateReader
    from lorafit.studies.inspected import Inspected, Other

Ablated = Literal["layers", "modules", "none"]


def inspect_adapter(
    run: Path,
    *,
    ablate: str | None = None,
    split: str | None = None,
    limit: int | None = 12,
    compare: Path | None = None,
    output: Path | None = None,
    checkpoint: str | None = None,
    base_model: str | None = None,
    overrides: Sequence[str] = (),
    reporter: Reporter | None = None,
) -> Inspected:
    """Measures the updates of a run's adapter, or of an adapter alone, and what each layer or module is worth.

    With `compare` importances are measured only where `ablate` asks for them.
    """
    reporter = reporter or Silent()
    ablate = ablate or ("layers" if compare is None else "none")
    if ablate not in get_args(Ablated):
        raise UsageError(f"'{ablate}' is no part of an adapter", key="--ablate", todo="use layers, modules or none")
    if split not in (None, "test", "validation", "train"):
        raise UsageError(f"'{split}' is no split", key="--split", todo="use test, validation or train")
    for path in (run, *([compare] if compare is not None else [])):
        _require_adapter(path, checkpoint if path is run else None)
    if output is not None:
        check_output(output, [run, *([compare] if compare is not None else [])])
        if output.exists():
            raise UsageError("exists already", file=str(output), key="output", todo="choose another --output")
    from lorafit.files.atomic import atomic_dir

    subject = _Subject.open(run, checkpoint, base_model, overrides, reporter)
    other = None if compare is None else _Subject.open(compare, None, str(subject.base.path), (), reporter)
    found, reader = _measure(subject, reporter)
    if compare is not None and other is not None:
        found = replace(found, other=_compare(compare, other, reader, reporter))
    why = "" if ablate == "none" else _why_not_ablated(subject, found)
    if ablate == "none" or why:
        found = replace(found, not_ablated=why)
    else:
        unit: Literal["layers", "modules"] = "layers" if ablate == "layers" else "modules"
        found = replace(found, ablation=_ablate(subject, unit, split, limit, overrides, reporter))
    if output is not None:
        found = replace(found, output=output)
        with atomic_dir(output) as folder:
            found.write(folder)
    return found


def _require_adapter(path: Path, checkpoint: str | None) -> None:
    """Says before any library is loaded where there is no adapter."""
    if is_model(path):
        what = "is a whole model, in which no adapter can be told from its base"
        raise UsageError(what, file=str(path), todo="name a run or an adapter folder")
    check_answerable(path, checkpoint)


@dataclass(frozen=True)
class _Subject:
    """An adapter that is looked at, its base found.

    Attributes:
        saved: The adapter.
        base: Its base.
        quantization: How training quantised that, weight by weight; None where it did not, or did not note it.
        is_noted: Whether an adapter on a quantised base brings that note.
        tuned: With its run's card; None of an adapter alone.
        opened: Its run.
    """

    saved: AdapterFolder
    base: Base
    quantization: JsonMapping | None
    is_noted: bool
    tuned: Tuned | None = None
    opened: OpenedRun | None = None

    @classmethod
    def open(
        cls, path: Path, checkpoint: str | None, base_model: str | None, overrides: Sequence[str], reporter: Reporter
    ) -> _Subject:
        """From a run, its recipe, or an adapter folder.

        Raises:
            ModelError: It is no adapter, or its base is not on this disk, or is another one.
        """
        from lorafit.answering.tuned import open_lone_adapter, open_tuned
        from lorafit.files.atomic import read_object
        from lorafit.model.adapter import check_base, read_adapter

        if is_lone_adapter(path):
            if overrides:
                raise UsageError("an adapter alone has no recipe", key="--set", todo="name its run, or leave it out")
            saved, base = open_lone_adapter(path, base_model, reporter)
            check_base(saved, base)
            noted = saved.quantization() or {}
            is_quantised, is_noted = noted.get("kind", "none") != "none", "tensors" in noted
            return cls(saved, base, noted if is_quantised and is_noted else None, is_noted or not is_quantised)
        opened = open_run(path, overrides)
        tuned = open_tuned(opened, checkpoint, base_model, reporter)
        used = read_object(opened.run.quantization) if tuned.card.quantization.kind != "none" else None
        return cls(read_adapter(tuned.adapter), tuned.base, used, True, tuned, opened)

    @property
    def kind(self) -> str:
        """The method's name in a recipe."""
        from lorafit.model.low_rank import method_of

        return method_of(self.saved) if self.tuned is None else self.tuned.card.adapter.kind

    def prove_base(self, rebuilt: int) -> str:
        """What is known of the base being what the adapter was trained on."""
        trained = (self.saved.notes.get("base") or {}).get("digest")
        digest = self.base.origin.digest
        proof = "not proven: the adapter notes no digest of its base"
        if trained and digest:
            proof = f"the one that it was trained on, by digest {digest[:12]}"
        if rebuilt:
            proof += f"; {rebuilt} quantised weights made again, equal to what training saw"
        elif not self.is_noted:
            proof += "; weights as they are in its files: how training quantised them is not noted"
        return proof


def _measure(subject: _Subject, reporter: Reporter) -> tuple[Inspected, UpdateReader]:
    """Every module, one after the other, and what several have in common."""
    from lorafit.model.updates import UpdateReader
    from lorafit.ops.update_matrix import UpdateMatrix, same_directions
    from lorafit.studies.inspected import Inspected, Module

    reader = UpdateReader(subject.saved, subject.base, subject.quantization)
    modules, traces = list[Module](), dict[str, UpdateMatrix]()
    with reporter.track(len(reader.modules), "measuring updates") as bar:
        for name in reader.modules:
            update = reader.read(name)
            matrix, own = update.matrix, update.weight_norm
            if matrix is None:
                modules.append(Module(name, update.shape, own, None, None, None, None))
            else:
                figures = matrix.norm, matrix.spectral_norm, matrix.effective_rank, matrix.rank
                modules.append(Module(name, update.shape, own, *figures))
                if matrix.norm:
                    traces[name] = matrix.trace()
            bar.advance()
    reader.conclude(reporter)
    same_modules, same_ranks = same_directions(traces, {module.name: module.shape for module in modules})
    found = Inspected(
        adapter=subject.saved.path,
        kind=subject.kind,
        base=subject.base.origin.name,
        base_proof=subject.prove_base(reader.rebuilt),
        base_digest=subject.base.origin.digest,
        modules=tuple(modules),
        same_modules=tuple(same_modules),
        same_ranks=same_ranks,
        beside=reader.beside,
    )
    return found, reader


def _compare(path: Path, other: _Subject, reader: UpdateReader, reporter: Reporter) -> Other:
    """The updates of two adapters of one base beside each other."""
    from lorafit.model.updates import UpdateReader
    from lorafit.studies.inspected import Other, Pair

    theirs = UpdateReader(other.saved, other.base, other.quantization)
    both = [name for name in reader.modules if name in set(theirs.modules)]
    pairs = []
    with reporter.track(len(both), "comparing updates") as bar:
        for name in both:
            one, two = reader.read(name), theirs.read(name)
            cosine = overlap = None
            if one.matrix is not None and two.matrix is not None:
                cosine, overlap = one.matrix.cosine(two.matrix), one.matrix.overlap(two.matrix)
            reads, writes = overlap or (None, None)
            pairs.append(Pair(name, one.ratio, two.ratio, cosine, reads, writes))
            bar.advance()
    missing, added = (
        tuple(name for name in mine.modules if name not in set(others.modules))
        for mine, others in ((reader, theirs), (theirs, reader))
    )
    return Other(path, other.kind, tuple(pairs), missing, added)


def _why_not_ablated(subject: _Subject, found: Inspected) -> str:
    """Why nothing can be scored without parts of an adapter; empty where it can."""
    if subject.opened is None:
        return "an adapter alone has no rows to lose on; name its run"
    if found.not_finite:
        return "with NaN or Inf in the adapter there is no loss"
    return ""


def _ablate(
    subject: _Subject,
    unit: Literal["layers", "modules"],
    split: str | None,
    limit: int | None,
    overrides: Sequence[str],
    reporter: Reporter,
) -> Ablation:
    """The run's adapter on its base in memory, and its held-out rows, as `eval` scores them."""
    from lorafit.answering.evaluation_rows import open_evaluation, refer_as_begun, settle_evaluation
    from lorafit.evaluation.ablation import ablate
    from lorafit.evaluation.runner import find_pad_id
    from lorafit.job import build_objective, prove

    assert subject.opened is not None and subject.tuned is not None, "_why_not_ablated was asked"
    opened, tuned = settle_evaluation(subject.opened, overrides, reporter), subject.tuned
    split = split or usual_split(opened.loaded.recipe)
    job = open_evaluation(opened, tuned, split, reporter)
    engine = tuned.load(job.tokenizer, reporter)
    objective = build_objective(job, engine.model, tuned.card.dtype)
    prove(job, objective, job.rows.splits[split], reporter)
    refer_as_begun(job, objective, opened, tuned, split, reporter)
    return ablate(
        engine,
        objective,
        job.rows.splits[split],
        unit,
        split=split,
        limit=limit,
        micro_batch_tokens=opened.resolved().evaluation_micro_batch_tokens,
        pad_id=find_pad_id(engine.tokenizer, engine.embedding_rows),
        seed=job.recipe.seed,
        reporter=reporter,
    )
