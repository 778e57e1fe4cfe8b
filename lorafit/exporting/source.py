"""What is exported, found and checked: a run's adapter, an adapter alone, or a whole model such as a merge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from lorafit.answering.opening import Voice, open_answerer
from lorafit.answering.tuned import open_lone_adapter, open_tuned
from lorafit.contracts import Reporter
from lorafit.errors import UsageError
from lorafit.exporting.exported import Wish
from lorafit.files.portable import is_local_path
from lorafit.merging import merge_adapter_folder, merge_run
from lorafit.model.adapter import AdapterFolder, read_adapter
from lorafit.model.base import Base, check_made, read_base
from lorafit.model.companions import choose_companions
from lorafit.model.tokenizer_files import Companions, TokenizerFolder
from lorafit.run.workspace import OpenedRun, is_lone_adapter, is_model, open_run

if TYPE_CHECKING:
    from lorafit.run.card import RunCard

BASE_NAME = "base_model_name_or_path"


@dataclass(frozen=True)
class Source:
    """What a user named, no weight loaded.

    Attributes:
        path: As it was named.
        wish: What is wanted of it.
        base: The base; of a whole model the model itself.
        adapter: None of a whole model.
        opened: The run; None of an adapter alone and of a whole model.
        companions: Tokenizer, templates and generation settings that it was trained with.
        reporter: Told what is done.
    """

    path: Path
    wish: Wish
    base: Base
    adapter: AdapterFolder | None
    opened: OpenedRun | None
    companions: Companions
    reporter: Reporter

    @property
    def place(self) -> Path:
        """The folder beside which an export goes that nobody gave a place, and whose name it takes."""
        return (self.opened.run.root if self.opened is not None else self.path).absolute()

    @property
    def card(self) -> RunCard | None:
        """Of the run that trained it; None for other tools' adapters, and for whole models."""
        return None if self.adapter is None else self.adapter.card()

    @cached_property
    def base_id(self) -> str | None:
        """The base's hub id; None where it came from elsewhere and its author states none.

        Raises:
            UsageError: Another one is stated than the adapter's.
        """
        origin, written = self.base.origin, str(self.require_adapter().config.get(BASE_NAME) or "")
        named = written if self.card is None and written and not is_local_path(written) else None
        known, stated = origin.name if origin.kind == "hub" else named, self.wish.base_id
        if known and stated and known != stated:
            raise UsageError(f"the adapter was trained on {known}", key="--base-id", todo="leave it out")
        return known or stated

    @property
    def is_base_stated(self) -> bool:
        """Whether nothing but the author's word names the hub's model that it was trained on."""
        return self.wish.base_id is not None and self.base.origin.kind != "hub"

    def note_quantised(self, way: str) -> list[str]:
        """What is to be known where the base was quantised in training, with a way to have it so again."""
        if self.card is None or self.card.quantization.kind == "none":
            return []
        kind = self.card.quantization.kind
        return [f"it was trained on the base in {kind}: on other weights it answers less well; {way}"]

    @cached_property
    def voice(self) -> Voice:
        """How it is asked. Raises ModelError where it writes no text."""
        wish = self.wish
        return open_answerer(self.path, wish.checkpoint, wish.base_model, self.reporter).voice

    @property
    def ends(self) -> list[int]:
        """Tokens that end an answer."""
        written = (self.companions.generation or {}).get("eos_token_id")
        known = written if isinstance(written, list) else [] if written is None else [written]
        return list(dict.fromkeys([*self.voice.stop_ids, *known]))

    def require_adapter(self) -> AdapterFolder:
        """The adapter. Raises UsageError for a whole model."""
        if self.adapter is None:
            what = f"is a whole model, and --to {self.wish.to} exports an adapter"
            raise UsageError(what, file=str(self.path), todo="name a run or an adapter, or use --to gguf or ollama")
        return self.adapter

    def merge(self, folder: Path) -> Path:
        """The whole model: merged into a folder that is made, proven as `lorafit merge` does; or the one named."""
        wish = self.wish
        if self.opened is not None:
            merge_run(
                self.opened,
                folder,
                wish.base,
                wish.checkpoint,
                wish.base_model,
                verify=True,
                reporter=self.reporter,
            )
        elif self.adapter is not None:
            merge_adapter_folder(self.path, folder, wish.base, wish.base_model, verify=True, reporter=self.reporter)
        else:
            return self.path
        return folder


def open_source(path: Path, wish: Wish, reporter: Reporter) -> Source:
    """Finds adapter and base.

    Raises:
        UsageError: There is nothing at the path, or an option that belongs to something else.
        CheckpointError: It is neither a run nor an adapter nor a model.
        ModelError: The base is not on this disk, or is another one.
    """
    if is_model(path):
        for name, value in (("--base", wish.base), ("--base-model", wish.base_model)):
            if value is not None:
                raise UsageError("a whole model has no base", key=name, todo="name a run or an adapter folder")
        check_made(path)
        files = TokenizerFolder(path, follows_links=True)
        companions = Companions(files if files.has_tokenizer() else None, files.templates(), files.generation())
        return Source(path, wish, read_base(path, is_compared=False), None, None, companions, reporter)
    opened = None if is_lone_adapter(path) else open_run(path)
    if opened is None:
        saved, base = open_lone_adapter(path, wish.base_model, reporter)
    else:
        tuned = open_tuned(opened, wish.checkpoint, wish.base_model, reporter)
        saved, base = read_adapter(tuned.adapter), tuned.base
    saved.check_values(reporter)
    return Source(path, wish, base, saved, opened, choose_companions(base, saved, reporter), reporter)


def inputs_of(source: Source) -> Sequence[Path]:
    """Folders that an export must not write over."""
    found = [source.path, source.base.path]
    return [*found, source.opened.run.root] if source.opened is not None else found
