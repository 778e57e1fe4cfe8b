"""Requests for the base and any of several adapters, answered at once: each joins when there is room, and leaves when
it is over.

    submit ──> waiting line ──room for a row?──> running ──token by token──> Ticket
                 │ full: QueueFull                  one thread owns the model
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from lorafit.answering.answer_text import AnswerText
from lorafit.answering.choosing import LiveRow
from lorafit.answering.engine import Engine
from lorafit.answering.generate import find_stop_ids
from lorafit.answering.live_adapters import LiveAdapters
from lorafit.answering.live_batch import READ_AT_ONCE_TOKENS, LiveBatch, LoneRow, SharedRows
from lorafit.answering.plain_generation import head_sees_last, plain_generation, room_of
from lorafit.answering.ticket import Figures, LiveRequest, Ticket
from lorafit.console.wording import counted, first_line
from lorafit.contracts import Reporter, Silent
from lorafit.errors import LorafitError, QueueFull, ResourceError, UsageError
from lorafit.ops.isolation import without_training
from lorafit.ops.process_memory import is_out_of_memory, release_memory

Made = TypeVar("Made")
_LONGEST = 2**31


@dataclass(frozen=True, slots=True)
class Limits:
    """What a BatchedEngine takes at once.

    Attributes:
        rows: Requests that are answered at the same time.
        tokens: Bound of rows x (longest prompt + answer): memory for keys and values.
        waiting: Requests that wait beside so many that are answered; one more is refused.
    """

    rows: int = 16
    tokens: int = 16_384
    waiting: int = 64


class BatchedEngine:
    """A base in memory that answers many requests at once, each with one of its adapters or with none.

    From its first request until `close` the engine's model is its own: nobody else may call it, but in
    `between_steps`.

    Args:
        engine: A causal model, with or without adapters.
        limits: What is taken at once.
        reporter: Warned where requests cannot share a forward; silent where None.

    Raises:
        UsageError: The model is an encoder-decoder.
        ModelError: It answers otherwise token by token than from a whole text.

    Attributes:
        failed: Gets the error that ended the engine's thread, if ever one does; then nobody is answered any more.
    """

    def __init__(self, engine: Engine, limits: Limits = Limits(), reporter: Reporter | None = None) -> None:
        if engine.model.config.is_encoder_decoder:
            what = "an encoder-decoder is not answered in batches that requests join and leave"
            raise UsageError(what, todo="use lorafit generate")
        self.engine, self.limits = engine, limits
        self.failed: Future[None] = Future()
        self._changed = threading.Condition()
        self._waiting: deque[LiveRow] = deque()
        self._orders: deque[Callable[[], None]] = deque()
        self._adapters = LiveAdapters(engine)
        self._lone: list[LoneRow] = []
        self._shared: dict[str | None, SharedRows] = {}
        self._leaving: set[str] = set()
        self._ending: str | None = None
        self._model_changed = False
        self._stepped = time.monotonic()
        self._prompt_tokens: Counter[str | None] = Counter()
        self._written_tokens: Counter[str | None] = Counter()
        self._finished: Counter[tuple[str | None, str]] = Counter()
        self._worker = threading.Thread(target=self._work, name="lorafit answers", daemon=True)
        self._worker.start()
        try:
            self._change_model(lambda: self._adapters.start(reporter or Silent()))
        except BaseException:
            self.close(finish=False)
            raise

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters that requests may ask for."""
        return tuple(name for name in self._adapters.names if name not in self._leaving)

    @property
    def why_alone(self) -> str | None:
        """Why no two requests share a forward, in words; None where those for the base and plain adapters do."""
        return self._adapters.why_alone

    def room(self, prompt_tokens: int, adapter: str | None = None) -> int:
        """The longest answer, in tokens, to a prompt of so many; less than 1: none."""
        before = self._virtual_tokens(adapter)
        in_model = room_of(self.engine.model, before + prompt_tokens, _LONGEST)
        return min(in_model, self.limits.tokens - before - prompt_tokens)

    def submit(self, request: LiveRequest, wake: Callable[[], None] | None = None) -> Ticket:
        """Takes a request, from any thread.

        Args:
            request: It.
            wake: See `Ticket`.

        Raises:
            QueueFull: Too many wait already.
            UsageError: The adapter is not loaded, prompt and answer are too long, or a beam search is asked for; or
                the engine is closed.
            LorafitError: What `failed` has.
            ModelError: A token of the prompt has no row in the embedding.
        """
        sampling = request.sampling
        if sampling.num_beams > 1:
            raise UsageError("a beam search knows its answer only at the end", todo="ask without beams")
        self.engine.check_prompts([request.prompt_ids])
        stops = find_stop_ids(self.engine.model, self.engine.tokenizer, request.stop_ids)
        first = self.engine.tokenizer.bos_token_id
        prompt = list(request.prompt_ids) or [int(first if first is not None else stops[0] if stops else 0)]
        with self._changed:
            self._require_open()
            self._require_adapter(request.adapter)
            room = self.room(len(prompt), request.adapter)
            if room < sampling.max_new_tokens:
                what = f"a prompt of {counted(len(prompt), 'token')} leaves room for {max(room, 0):,} more, and "
                what += f"{sampling.max_new_tokens:,} are asked for"
                raise UsageError(what, key="max_new_tokens", todo="shorten the prompt or ask for fewer")
            running, waiting = len(self._running()), len(self._waiting)
            if running + waiting >= self.limits.rows + self.limits.waiting:  # a free place is taken at the next turn
                what = f"{running} requests are being answered and {waiting} wait, the most that may"
                raise QueueFull(what, todo="ask again later")
            ticket = Ticket(request, self._virtual_tokens(request.adapter) + len(prompt), wake)
            text = AnswerText(self.engine.tokenizer, request.stop_strings)
            if not self._rows():
                self._stepped = time.monotonic()
            self._waiting.append(LiveRow(ticket, prompt, frozenset(stops), text))
            self._changed.notify_all()
        return ticket

    def load_adapter(self, name: str, folder: Path, reporter: Reporter | None = None) -> None:
        """Loads one more adapter, while others answer.

        Raises:
            UsageError: The name is taken.
            ModelError: See `Engine.add_adapter`.
        """
        if name in self._leaving:
            what = f"'{name}' is being unloaded, and its last request not answered yet"
            raise UsageError(what, todo="load it again later, or under another name")
        found = self._adapters.read(name, folder, reporter or Silent())
        self._change_model(lambda: self._adapters.add(name, *found, reporter or Silent()))

    def unload_adapter(self, name: str) -> None:
        """Drops an adapter; waits until every request for it is answered, and takes no new one meanwhile.

        Raises:
            UsageError: There is no such adapter.
        """
        with self._changed:
            self._require_adapter(name)
            self._leaving.add(name)
            self._changed.wait_for(lambda: all(row.ticket.adapter != name for row in self._rows()))

        try:
            self._change_model(lambda: self._adapters.remove(name))
        finally:
            self._leaving.discard(name)

    def _change_model(self, work: Callable[[], None]) -> None:
        def change(_: Engine) -> None:
            self._model_changed = True
            work()

        self.between_steps(change)

    def between_steps(self, work: Callable[[Engine], Made]) -> Made:
        """What a function makes of the engine, called where no forward runs, in the thread that owns the model."""
        done = self.order(work)
        wait((done, self.failed), return_when=FIRST_COMPLETED)  # type: ignore[misc]  # of two types
        if not done.done():
            self.failed.result()
        return done.result()

    def order(self, work: Callable[[Engine], Made]) -> Future[Made]:
        """The same, to be waited for by whoever wants it. Raises UsageError where the engine is closed."""
        done: Future[Made] = Future()

        def call() -> None:
            try:
                done.set_result(work(self.engine))
            except BaseException as error:  # raised again where the result is asked for
                done.set_exception(error)

        with self._changed:
            self._require_open()
            self._orders.append(call)
            self._changed.notify_all()
        return done

    def figures(self) -> Figures:
        """What is going on now."""
        with self._changed:
            counts = dict(self._prompt_tokens), dict(self._written_tokens), dict(self._finished)
            still = time.monotonic() - self._stepped if self._rows() else 0.0
            reading = sum(not row.tokens for row in self._running())
            return Figures(len(self._running()), len(self._waiting), reading, still, *counts)

    def close(self, *, finish: bool) -> None:
        """Takes no more requests, and ends.

        Args:
            finish: Whether those that run or wait are answered first; else they are cancelled.
        """
        with self._changed:
            self._ending = "finish" if finish else "cancel"
            for row in () if finish else self._rows():
                row.ticket.cancel()
            self._changed.notify_all()
        self._worker.join()

    def _require_open(self) -> None:
        if self.failed.done():
            self.failed.result()
        if self._ending is not None:
            raise UsageError("the engine is closed", todo="open another one")

    def _require_adapter(self, name: str | None) -> None:
        if name is not None and name not in self.adapters:
            known = ", ".join(self.adapters) or "none"
            raise UsageError(f"no adapter is called '{name}'", todo=f"loaded: {known}")

    def _virtual_tokens(self, adapter: str | None) -> int:
        return self.engine.virtual_tokens(self._adapters.mode(adapter))

    def _batches(self) -> list[LiveBatch]:
        return [*self._lone, *self._shared.values()]

    def _running(self) -> list[LiveRow]:
        return [row for batch in self._batches() for row in batch.rows]

    def _rows(self) -> list[LiveRow]:
        return [*self._waiting, *self._running()]

    def _work(self) -> None:
        """The worker's life, and the end of everybody who waits where it is cut short."""
        try:
            self._live()
        except BaseException as error:  # the model could not be prepared: nobody will be answered any more
            self.failed.set_exception(as_ours(error))  # from here on nobody is let in
            self._end_all(as_ours(error))

    def _live(self) -> None:
        """Turn after turn; the model is prepared anew whenever its layers were changed."""
        goes_on = True
        while goes_on:
            self._model_changed = False
            with self._prepared():
                while goes_on and not self._model_changed:
                    try:
                        goes_on = self._turn()
                    except Exception as error:  # nobody would be answered any more
                        self._end_all(as_ours(error))

    @contextlib.contextmanager
    def _prepared(self) -> Iterator[None]:
        """Eval mode, the precision of the engine, logits of last positions alone."""
        engine = self.engine
        with contextlib.ExitStack() as held:
            held.enter_context(without_training(engine.model))
            held.enter_context(engine.autocast())
            held.enter_context(plain_generation(engine.model, []))
            held.enter_context(head_sees_last(engine.model))
            yield

    def _turn(self) -> bool:
        """Does what was ordered, then takes every row one token further; whether there may be more to do."""
        with self._changed:
            self._changed.wait_for(lambda: self._orders or self._rows() or self._ending)
            if self._ending and not self._orders and not self._rows():
                return False
            orders = [*self._orders]
            self._orders.clear()
        for order in orders:
            order()
        if not self._model_changed:
            self._admit()
            self._step_all()
            self._drop_ended()
        self._stepped = time.monotonic()
        return True

    def _step_all(self) -> None:
        """One token for every row; of prompts so much as a forward may read. Rows that may share do so from then on."""
        budget = READ_AT_ONCE_TOKENS
        for lone in self._lone:
            if lone.reads and budget <= 0:
                continue
            budget -= lone.reads
            self._step(lone.rows, lone.step)
        for batch in self._shared.values():
            self._step(batch.rows, batch.step)
        for lone in [lone for lone in self._lone if lone.may_share]:
            batch = self._shared.setdefault(
                self._adapters.mode(lone.rows[0].ticket.adapter), SharedRows(self._adapters)
            )
            self._step(lone.rows, partial(batch.join, lone))
            self._lone.remove(lone)

    def _admit(self) -> None:
        """Lets rows in from the waiting line, first come first served, while there is room."""
        with self._changed:
            for row in self._rows():
                if row.ticket.is_cancelled:
                    row.end("cancelled")
            self._drop_ended()
            while self._waiting and self._has_room(self._waiting[0]):
                row = self._waiting.popleft()
                self._lone.append(LoneRow(self._adapters, row))
                asked = row.ticket.request
                is_told = asked.counts and not asked.repeats
                self._prompt_tokens[row.ticket.adapter] += row.ticket.prompt_tokens * is_told

    def _has_room(self, row: LiveRow) -> bool:
        running = [*self._running(), row]
        together: dict[object, list[int]] = {}
        for one in running:
            name = one.ticket.adapter
            key = self._adapters.mode(name) if self._adapters.may_share(name) else one
            together.setdefault(key, []).append(one.most_tokens)
        cells = sum(len(lengths) * max(lengths) for lengths in together.values())
        return len(running) <= self.limits.rows and cells <= self.limits.tokens

    def _step(self, rows: list[LiveRow], step: Callable[[], None]) -> None:
        """Does something for rows; what goes wrong ends them, and nothing else. Out of memory, the last one ends."""
        written = [len(row.tokens) for row in rows]
        try:
            step()
        except Exception as error:
            release_memory(self.engine.device)
            for row in rows[-1:] if is_out_of_memory(error) else rows:
                row.end("error", as_ours(error))
        self._stepped = time.monotonic()
        for row, before in zip(rows, written, strict=True):
            self._written_tokens[row.ticket.adapter] += (len(row.tokens) - before) * row.ticket.request.counts

    def _end_all(self, error: LorafitError) -> None:
        """Ends every request, and begins anew with empty batches."""
        with self._changed:
            for row in self._rows():
                row.end("error", error)
                self._finished[row.ticket.adapter, "error"] += row.ticket.request.counts
            self._waiting.clear()
            self._lone, self._shared = [], {}
            self._changed.notify_all()

    def _drop_ended(self) -> None:
        """Takes rows that are over out, and counts them."""
        with self._changed:
            for row in self._rows():
                if row.is_over:
                    self._finished[row.ticket.adapter, str(row.ticket.finish_reason)] += row.ticket.request.counts
            self._waiting = deque(row for row in self._waiting if not row.is_over)
            for batch in self._batches():
                batch.drop_ended()
            self._lone = [lone for lone in self._lone if lone.rows]
            self._shared = {mode: batch for mode, batch in self._shared.items() if batch.rows}
            self._changed.notify_all()


def as_ours(error: BaseException) -> LorafitError:
    """What a request is told of what went wrong."""
    if isinstance(error, LorafitError):
        return error
    if is_out_of_memory(error):
        made: LorafitError = ResourceError("out of memory while answering", todo="ask for less, or lower the limits")
    else:
        made = LorafitError(f"the model failed: {first_line(error)}", todo="please report it with the model's name")
    made.__cause__ = error
    return made
