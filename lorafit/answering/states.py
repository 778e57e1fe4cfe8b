"""Mean hidden states of texts in the base alone, a third of the way up: what a text is about, by which servers route.

    text ──> its first 256 tokens ──> the lowest third of the layers ──> mean over tokens, each scaled to length 1

No layer above runs, no adapter is on and no template stands around the text. The token before the first one belongs to
nobody: models put numbers of their own there, larger than all others.
"""

from __future__ import annotations

import contextlib
import copy
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from lorafit.answering.batched import BatchedEngine, as_ours
from lorafit.answering.live_batch import READ_AT_ONCE_TOKENS
from lorafit.answering.plain_generation import room_of
from lorafit.data.prompt_texts import LONGEST_PROMPT
from lorafit.errors import LorafitError, ModelError, QueueFull
from lorafit.model.layer_numbers import layer_list
from lorafit.ops.output_head import text_part
from lorafit.ops.process_memory import release_memory

if TYPE_CHECKING:
    from lorafit.answering.engine import Engine

LONGEST_TOKENS = 256
_SHARE_OF_LAYERS = 3  # one of so many


class _LayerReachedError(Exception):
    """The layer has answered; nothing above it is needed."""


def mean_states(engine: Engine, rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """A state for each row of tokens, `[rows, width]`, fp32, on the CPU. For the thread that owns the model.

    Raises:
        ModelError: The model has no layers, one behind the other, that give a state for each token.
    """
    model: Any = engine.model
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    layers = layer_list(text_part(base) or base)
    longest = max(map(len, rows))
    tokens = torch.tensor([[*ids, *[ids[-1]] * (longest - len(ids))] for ids in rows], device=engine.device)
    found: list[torch.Tensor] = []

    def keep(_: torch.nn.Module, __: Any, output: Any) -> None:
        found.append(output if torch.is_tensor(output) else output[0])
        raise _LayerReachedError

    reached = layers[: max(1, len(layers) // _SHARE_OF_LAYERS)][-1:]  # none of a model that keeps them in no list
    with contextlib.ExitStack() as held:
        for layer in reached:
            held.enter_context(layer.register_forward_hook(keep))
        with engine.using(None), contextlib.suppress(_LayerReachedError):
            base(input_ids=tokens, use_cache=False)
    if not found or found[0].shape[:2] != tokens.shape:  # Gemma 3n's answer several times
        what = f"{type(base).__name__} has no layers that give a state for each token"
        raise ModelError(what, todo="serve it without --route and --drift")
    states = torch.nn.functional.normalize(found[0].float(), dim=-1)
    means = [state[1 : len(ids)].mean(0) for state, ids in zip(states, rows, strict=True)]
    return torch.stack(means).cpu()


class StateReader:
    """Reads texts' states in an engine's own thread; those that wait for its next turn share a forward.

    Args:
        engine: Its answers go on meanwhile: each turn reads no more tokens here than of a prompt.

    Attributes:
        longest: Tokens of a text that are looked at.
    """

    def __init__(self, engine: BatchedEngine) -> None:
        self._engine = engine
        self._tokenizer = copy.deepcopy(engine.engine.tokenizer)  # requests are rendered in another thread
        self.longest = room_of(engine.engine.model, 1, LONGEST_TOKENS)
        self._lock, self._tokenizes = threading.Lock(), threading.Lock()
        self._waiting: deque[tuple[list[int], Future[torch.Tensor]]] = deque()
        self._is_ordered = False
        engine.failed.add_done_callback(self._note_failure)

    def ids(self, text: str) -> list[int]:
        """The tokens of a text that are looked at, behind one of nobody's."""
        first = next((i for i in (self._tokenizer.bos_token_id, self._tokenizer.eos_token_id) if i is not None), 0)
        with self._tokenizes:  # not the other one: the engine would wait for it
            ids = self._tokenizer(text[:LONGEST_PROMPT], add_special_tokens=False).input_ids[: self.longest]
        return [first, *(ids or [first])]

    def submit(self, ids: list[int]) -> Future[torch.Tensor]:
        """The state of such tokens, `[width]`, once the engine has read it; from any thread.

        Raises:
            QueueFull: Too many wait already.
            UsageError: The engine is closed.
            LorafitError: What made it fail.
        """
        done: Future[torch.Tensor] = Future()
        with self._lock:
            if len(self._waiting) >= self._engine.limits.waiting:
                what = f"{len(self._waiting)} prompts wait to be routed, the most that may"
                raise QueueFull(what, todo="ask again later")
            self._waiting.append((ids, done))
            try:
                self._order()
            except LorafitError:
                self._waiting.pop()
                raise
        return done

    def _note_failure(self, failed: Future[None]) -> None:
        with self._lock:
            self._give_up(failed.exception())

    def _give_up(self, error: BaseException | None) -> None:
        """Nobody is read any more."""
        for _, done in self._waiting:
            if done.set_running_or_notify_cancel():
                done.set_exception(error)
        self._waiting.clear()
        self._is_ordered = False

    def read_all(self, texts: Sequence[str], advance: Callable[[int], None]) -> torch.Tensor:
        """The states of many texts, `[texts, width]`, while others are answered; `advance` is told of each batch."""
        rows = [self.ids(text) for text in texts]
        order = sorted(range(len(rows)), key=lambda place: len(rows[place]))
        states: list[torch.Tensor | None] = [None] * len(rows)
        for places in _batches(order, rows):
            read = partial(mean_states, rows=[rows[place] for place in places])
            for place, state in zip(places, self._engine.between_steps(read), strict=True):
                states[place] = state
            advance(len(places))
        return torch.stack([state for state in states if state is not None])

    def _order(self) -> None:
        if self._waiting and not self._is_ordered:
            self._engine.order(self._read)
            self._is_ordered = True

    def _read(self, engine: Engine) -> None:
        """Reads those that wait, as far as one turn may; the rest is for the next one."""
        with self._lock:
            self._is_ordered = False
            rows = [ids for ids, _ in self._waiting]
            taken = [self._waiting.popleft() for _ in next(_batches(range(len(rows)), rows), ())]
            batch = [(ids, done) for ids, done in taken if done.set_running_or_notify_cancel()]
            try:
                self._order()
            except LorafitError as error:  # the engine is closed
                self._give_up(error)
        try:
            states = mean_states(engine, [ids for ids, _ in batch]) if batch else ()
            for state, (_, done) in zip(states, batch, strict=True):
                done.set_result(state)
        except Exception as error:  # raised again where the states are waited for
            release_memory(engine.device)
            for _, done in batch:
                done.set_exception(as_ours(error))


def _batches(order: Sequence[int], rows: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Places of rows that share a forward."""
    batch: list[int] = []
    for place in order:
        longest = max(len(rows[other]) for other in [*batch, place])
        if batch and longest * (len(batch) + 1) > READ_AT_ONCE_TOKENS:
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch
