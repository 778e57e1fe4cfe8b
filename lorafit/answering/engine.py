"""One base model in memory that answers with any of several adapters, or with none.

    requests ──by adapter and sampling──> batches ──generate_answers──> answers, in the requests' order
                                                   └─ stream: text, token by token

`lorafit generate` and `eval` ask an Engine; the comparison of a merge takes two.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

from lorafit.answering.generate import Answer, Request, find_stop_ids, generate_answers
from lorafit.answering.pieces import Pieces
from lorafit.answering.sampling import Sampling
from lorafit.contracts import Reporter, Silent
from lorafit.data.id_range import check_ids
from lorafit.errors import ModelError, UsageError
from lorafit.model.adapter import ADAPTER_NAME, AdapterFolder, read_adapter
from lorafit.model.attach import check_adapter, open_adapter
from lorafit.model.base import Base
from lorafit.model.detach import drop_adapter
from lorafit.ops.isolation import adapter_off, evaluating

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers.generation.streamers import BaseStreamer

    from lorafit.pictures import PictureReader


class Engine:
    """A loaded causal model that answers requests, each with one of its adapters or with none.

    Args:
        model: The base, or a PEFT model around it.
        tokenizer: Decodes answers; knows the pad and end tokens.
        autocast_dtype: Compute in it; None: as the weights are.
        base: The base on this disk, which further adapters must have been trained on; not compared where None.
        quantization: The kind in which it is loaded, which theirs must be; not compared where None.
        reader: Makes tensors of prompts' images; None for a model of text alone.

    Attributes:
        folders: Where the adapters that were added lie.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        autocast_dtype: torch.dtype | None = None,
        base: Base | None = None,
        quantization: str | None = None,
        reader: PictureReader | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.autocast_dtype = autocast_dtype
        self._base = base
        self._quantization = quantization
        self._reader = reader
        self.folders: dict[str, Path] = {}
        self._peft_names: dict[str, str] = {}
        self._added = 0

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the loaded adapters, in the order in which they were added."""
        ours = {theirs: name for name, theirs in self._peft_names.items()}
        return tuple(ours.get(theirs, theirs) for theirs in getattr(self.model, "peft_config", {}))

    @property
    def device(self) -> torch.device:
        """Where prompts go."""
        device: torch.device = self.model.get_input_embeddings().weight.device
        return device

    @property
    def embedding_rows(self) -> int:
        """Token ids that the model knows: 0 to one less."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    def add_adapter(self, name: str, folder: Path, reporter: Reporter | None = None) -> None:
        """Loads one more adapter beside those that are there; the base stays in memory once.

        Raises:
            UsageError: The name is taken.
            ModelError: The adapter does not fit this base, in any respect: its digest, how it is quantised, its layers.
        """
        if name in self.adapters:
            raise UsageError(f"two adapters are called '{name}'", todo="give each a name of its own")
        self._check_quantization(read_adapter(folder))
        within = name
        if name != ADAPTER_NAME:  # PEFT takes no name with a dot, and stumbles over parts of its own, `a` or `weight`
            self._added += 1
            within = f"adapter-{self._added}"
        self.model = open_adapter(self.model, folder, name=within, base=self._base, reporter=reporter or Silent())
        self.folders[name], self._peft_names[name] = folder, within

    def check_adapter(self, folder: Path, reporter: Reporter) -> AdapterFolder:
        """An adapter on disk that belongs on this base, nothing loaded.

        Raises:
            ModelError: It was trained on another base, or one that was quantised otherwise; or its values are broken.
        """
        saved = check_adapter(folder, self._base, reporter)
        self._check_quantization(saved)
        return saved

    def _check_quantization(self, saved: AdapterFolder) -> None:
        trained_on = (saved.quantization() or {}).get("kind")
        if self._quantization is not None and trained_on not in (None, self._quantization):
            what = f"trained on a base in {trained_on}, and this one is loaded in {self._quantization}"
            raise ModelError(what, file=str(saved.path), todo="load it by a process of its own")

    def remove_adapter(self, name: str) -> None:
        """Drops an adapter; without any the model is the base again, as it was before the first.

        Raises:
            UsageError: There is no such adapter.
        """
        self._require(name)
        self.folders.pop(name, None)
        self.model = drop_adapter(cast("PeftModel", self.model), self._peft_names.pop(name, name))

    def virtual_tokens(self, adapter: str | None) -> int:
        """Positions that an adapter of learned prompts takes before every prompt; 0 of all others."""
        config = getattr(self.model, "peft_config", {}).get(self._peft_names.get(adapter or "", adapter))
        return int(config.num_virtual_tokens) if config is not None and config.is_prompt_learning else 0

    @contextlib.contextmanager
    def using(self, adapter: str | None) -> Iterator[None]:
        """Within it the model is the base with that adapter, or alone. Gradient flags are left as they were.

        Raises:
            UsageError: There is no such adapter.
        """
        if adapter is not None:
            self._require(adapter)
        if not self.adapters:
            yield
        elif adapter is None:
            with adapter_off(self.model):
                yield
        else:
            with _active(self.model, self._peft_names.get(adapter, adapter)):
                yield

    def _require(self, adapter: str) -> None:
        if adapter not in self.adapters:
            known = ", ".join(self.adapters) or "none, it is a plain model"
            raise UsageError(f"no adapter is called '{adapter}'", todo=f"loaded: {known}")

    def check_prompts(self, prompts: Sequence[Sequence[int]]) -> None:
        """Raises ModelError where a token of a prompt has no row in the embedding."""
        for ids in prompts:
            check_ids(ids, self.tokenizer, self.embedding_rows)

    def answer(
        self,
        requests: Sequence[Request],
        *,
        reporter: Reporter | None = None,
        what: str = "answers",
    ) -> list[Answer]:
        """Answers in the requests' order. The model's mode and all random numbers are left as they were.

        Args:
            requests: May name different adapters and sampling.
            reporter: Gets bars and warnings; silent where None.
            what: Name of the bars.

        Raises:
            UsageError: A request names an adapter that is not loaded.
            ResourceError: Not even one row fits into memory.
        """
        groups: dict[tuple[str | None, Sampling, tuple[int, ...]], list[int]] = {}  # places of what may share a batch
        for place, request in enumerate(requests):
            groups.setdefault((request.adapter, request.sampling, request.stop_ids), []).append(place)
        answers: dict[int, Answer] = {}
        for places in groups.values():
            written = self._write([requests[place] for place in places], reporter, what)
            answers |= dict(zip(places, written, strict=True))
        return [answers[place] for place in range(len(requests))]

    def stream(self, request: Request) -> Generator[str, None, Answer]:
        """The answer's text as it is written; the pieces together are the text of `answer`'s.

        Generation runs in a thread of its own and ends at the next token where the iterator is closed.

        Returns:
            The whole answer, which tells how it ended.

        Raises:
            UsageError: The request names an adapter that is not loaded, or beams, whose answer is known at the end.
            ResourceError: It does not fit into memory.
        """
        if request.sampling.num_beams > 1:
            raise UsageError("a beam search knows its answer only at the end", todo="stream without beams, or answer")
        from transformers.generation.streamers import BaseStreamer

        tokens: queue.SimpleQueue[int | Answer | BaseException] = queue.SimpleQueue()
        stops, closed = find_stop_ids(self.model, self.tokenizer, request.stop_ids), threading.Event()

        class Written(BaseStreamer):  # type: ignore[misc]
            def put(self, value: torch.Tensor) -> None:
                if closed.is_set():
                    raise InterruptedError
                for token in value.tolist() if value.ndim == 1 else ():  # the prompt comes first, as a batch
                    if token not in stops:
                        tokens.put(token)

            def end(self) -> None: ...

        def write() -> None:
            try:
                tokens.put(self._write([request], streamer=Written())[0])
            except BaseException as error:  # raised again where the pieces are read
                tokens.put(error)

        writer = threading.Thread(target=write, name="lorafit answer", daemon=True)
        writer.start()
        pieces = Pieces(self.tokenizer)
        try:
            while not isinstance(item := tokens.get(), Answer | BaseException):
                if piece := pieces.step(item):
                    yield piece
            if isinstance(item, BaseException):
                raise item
            if rest := item.text[len(pieces.text) :]:  # what waited for the rest of a character
                yield rest
            return item
        finally:
            closed.set()
            writer.join()

    def _write(
        self,
        requests: Sequence[Request],
        reporter: Reporter | None = None,
        what: str = "answer",
        streamer: BaseStreamer | None = None,
    ) -> list[Answer]:
        """Answers of requests for the same adapter, with the same sampling and stop tokens."""
        with evaluating(self.model), self.using(requests[0].adapter), self.autocast():
            return generate_answers(
                self.model,
                self.tokenizer,
                requests,
                reporter=reporter or Silent(),
                what=what,
                streamer=streamer,
                reader=self._reader,
            )

    def autocast(self) -> torch.autocast:
        """The precision that the model was trained in."""
        return torch.autocast(self.device.type, dtype=self.autocast_dtype, enabled=self.autocast_dtype is not None)


@contextlib.contextmanager
def _active(model: PeftModel, adapter: str) -> Iterator[None]:
    """One adapter is active; PEFT makes the active one trainable, so that gradient flags are put back."""
    before = model.active_adapter
    if before == adapter:
        yield
        return
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.set_adapter(adapter)
        yield
    finally:
        model.set_adapter(before)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
