"""An adapter into its base's weights, tensor by tensor, a few MiB at a time, checked against what was written.

    base shard --rows--> W  (as the file has it, or the quantised values that training saw, proven by the run's hashes)
    adapter    --its kind--> a fold of W, e.g. W + s * B A
                         folded in fp32, rounded once --> output shard --read back--> equal to the fold in fp64?

Never a 4-bit result: quantising a merged weight again would erase the adapter, whose update is finer than a 4-bit step.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from lorafit.contracts import JsonMapping, JsonObject, Reporter
from lorafit.errors import ResourceError, UsageError
from lorafit.facts import SEQ2SEQ_CLASS
from lorafit.files.atomic import atomic_dir, make_folder
from lorafit.files.safetensors import read_index
from lorafit.kinds.tasks import tasks
from lorafit.model.adapter import NOTES, AdapterFolder, check_base, read_adapter
from lorafit.model.base import Base
from lorafit.model.companions import choose_companions, write_rest
from lorafit.model.inspect import summarise_quantization
from lorafit.model.merge.merge_targets import plan_updates
from lorafit.model.merge.new_rows import take_rows
from lorafit.model.merge.own_head import OwnHead
from lorafit.model.merge.shards import ShardMerger
from lorafit.model.merge.sources import check_quantization, choose_values
from lorafit.model.tokenizer_files import Companions, write_object
from lorafit.run.card import RunCard

BaseKind = Literal["dequantized", "original"]


@dataclass(frozen=True, slots=True)
class MergeReport:
    """What a merge did.

    Attributes:
        kind: The base that was merged into.
        tensors: Tensors written.
        merged_tensors: Of those, the ones that got an update.
        rebuilt_tensors: Of those, the ones taken as training's quantised values.
        proven: Whether the rebuilt base was compared with hashes of the run.
        codes_off: Codes one level off, on another kind of device than the run's.
        verified: Whether every written tensor was read back and compared.
        largest_error: Largest |written - exact| over its bound, 0 to 1; 0 where not verified.
    """

    output: Path
    kind: BaseKind
    tensors: int
    merged_tensors: int
    rebuilt_tensors: int
    written_bytes: int
    proven: bool
    codes_off: int
    verified: bool
    largest_error: float
    seconds: float

    def to_json(self) -> JsonObject:
        """Plain values; the output by its name."""
        return {**asdict(self), "output": self.output.name}

    def describe(self) -> list[str]:
        """For people, line by line."""
        size = self.written_bytes / 2**20
        what = f"merged {self.merged_tensors} of {self.tensors} tensors into the {self.kind} base"
        lines = [f"{what}: {self.output}, {size:,.0f} MiB in {self.seconds:.1f} s"]
        if self.proven:
            off = f", {self.codes_off} codes one level off" if self.codes_off else ""
            lines.append(f"{self.rebuilt_tensors} quantised tensors rebuilt and proven to be the run's{off}")
        if self.verified:
            within = f"within {self.largest_error:.2f} of its rounding bound"
            lines.append(f"every tensor read back: equal to its merged value in fp64 {within}")
        return lines


def merge_adapter(
    base: Base,
    adapter_folder: Path,
    output: Path,
    *,
    kind: BaseKind,
    quantization: JsonMapping | None = None,
    verify: bool = True,
    judge: Callable[[Companions], None] | None = None,
    check: Callable[[Path], None] | None = None,
    reporter: Reporter,
) -> MergeReport:
    """Writes base + adapter as a model folder that plain transformers loads.

    Args:
        base: The base that the adapter was trained on.
        adapter_folder: In PEFT's layout. Its tokenizer and chat template are taken before the base's, with a word
            where they differ.
        output: The folder to make; it may exist, empty.
        kind: `dequantized`: the quantised values that training saw, in its dtype. `original`: the base's own weights.
        quantization: The run's quantization.json (`inspect.describe_quantization`); needed for `dequantized`.
        verify: Whether each written tensor is read back and compared with what it must be.
        judge: Called before anything is written with the tokenizer and templates that are taken; may raise.
        check: Called with the finished folder before it gets its name; what it raises leaves no output.
        reporter: Shows progress.

    Raises:
        UsageError: The output is an input, lies inside one, or is not empty.
        ModelError: The adapter cannot be merged as a plain update, or does not fit the base.
        NumericsError: The rebuilt base is not the one of the run, or a written tensor is not what it must be.
        ResourceError: The disk is too small.
    """
    started = time.monotonic()
    _check_output(output, base.path, adapter_folder)
    adapter = read_adapter(adapter_folder)
    check_base(adapter, base)
    adapter.check_values(reporter)
    # raises where the method changes no weight
    adapter.kind.folding({**adapter.config, "modules_to_save": None, "trainable_token_indices": None})
    with tempfile.TemporaryDirectory(prefix="lorafit-rows-") as place:
        index = read_index(base.path)
        head, folded = take_rows(OwnHead.of(adapter), adapter, index, base.config, Path(place))
        entries = head.put_on(index, is_cast=kind == "dequantized")
        updates = plan_updates(head.take_off(folded), base, entries)
        updates.copies.update(head.tensors)
        companions = choose_companions(base, adapter, reporter)
        if judge is not None:
            judge(companions)
        used = None if kind == "original" else check_quantization(quantization, base)
        merger = ShardMerger(entries, updates, choose_values(base, used, entries), verify=verify)
        make_folder(output.parent)
        free = shutil.disk_usage(output.parent).free
        if free < merger.total_bytes:
            raise ResourceError(
                f"the merged model takes {merger.total_bytes / 2**30:.1f} GiB, the disk has {free / 2**30:.1f} left",
                file=str(output),
                todo="choose an output on another disk",
            )
        with atomic_dir(output, replace=output.exists(), digests=merger.digests) as temporary:
            with reporter.track(len(entries), "merging") as bar:
                merger.write(temporary, bar)
            codes_off, proven = merger.conclude(reporter)
            write_rest(base, companions, temporary, merger.cast_dtypes, head.config)
            _write_notes(temporary, base, adapter, kind, used)
            if check is not None:
                check(temporary)
    return MergeReport(
        output=output,
        kind=kind,
        tensors=len(entries),
        merged_tensors=len(updates.patches),
        rebuilt_tensors=len(merger.rebuilt),
        written_bytes=merger.total_bytes,
        proven=proven,
        codes_off=codes_off,
        verified=verify,
        largest_error=merger.largest_error,
        seconds=time.monotonic() - started,
    )


def _check_output(output: Path, base: Path, adapter: Path) -> None:
    made = output.resolve()
    for source in (base.resolve(), adapter.resolve()):
        if made == source or source in made.parents or made in source.parents:
            raise UsageError("the output is also an input, or lies inside one", file=str(output), todo="choose another")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UsageError("the output exists and is not empty", file=str(output), todo="choose another, or remove it")


def _write_notes(target: Path, base: Base, adapter: AdapterFolder, kind: BaseKind, used: JsonMapping | None) -> None:
    """lorafit.json of the merged model: what it was made from, and whether it is asked in chats or verbatim."""
    card = adapter.card()
    origin = base.origin.model_dump(mode="json")
    notes = {
        "format": 1,
        "merged": {"base": origin, "into": kind, "quantization": summarise_quantization(used or {}) or None},
        "adapter": {
            "name": adapter.path.name,
            **{ours: adapter.config.get(key) for key, ours in adapter.kind.recipe_fields.items()},
        },
        "chat": card.chat if card else None,
        **(_note_task(card) if card and ("head" in adapter.notes or _is_asked_otherwise(card)) else {}),
    }
    write_object(target / NOTES, notes)


def _is_asked_otherwise(card: RunCard) -> bool:
    """Whether whoever opens the merged model must know its task: its base is an encoder with a decoder, or sees."""
    return card.model_class.auto_class == SEQ2SEQ_CLASS or tasks.bind(card.task).reads_pictures


def _note_task(card: RunCard) -> JsonObject:
    """What whoever asks a merged model must know beside config.json."""
    return {"task": card.to_json()["task"], "max_length": card.max_length, "pad_id": card.pad_id}
