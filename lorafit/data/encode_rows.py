"""Samples to tokens, chunk by chunk, here or in worker processes; the order and the result are the same.

samples ──chunks──> encode_chunk, in this process while it is not worth more ──in order──> EncodedChunk ──> writer
                                 in forked workers once seconds of work are left
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from lorafit.console.wording import alternatives, counted
from lorafit.contracts import Encoded, PlacedSample, Sample, TaskRow
from lorafit.data.row_counts import OVERLONG, Noted
from lorafit.data.sample_renderer import NO_ANSWER, Renderer
from lorafit.data.store import Chunk, pack_chunk
from lorafit.data.truncate import SURE_FACTOR
from lorafit.errors import DataError, ResourceError
from lorafit.kinds.row_limits import Limit
from lorafit.kinds.tasks import Task, TaskSection

CHUNK_ROWS = 256
CHUNK_CHARACTERS = 400_000
SMALL_CHUNKS, SMALL_PART = 2, 1 / 8
SECONDS_A_WORKER = 0.7  # of work, that are worth a process: starting one takes about 0.1
WORKERS_LIMIT = 16
_PR_SET_PDEATHSIG = 1  # of Linux' prctl: the signal that a process gets when its parent ends
_CHUNKS_AHEAD = 4  # for each worker; bounds what waits in memory
_MANAGER_SECONDS = 2.0  # it sees at once that its processes are gone


@dataclass(slots=True)
class EncodedChunk:
    """What became of a chunk of samples.

    Attributes:
        chunk: The rows that can be trained on.
        examples: (source, number of examples) of each usable sample.
        notes: What happened to samples that cannot be trained on, or are too long.
        seen: What the renderer counted.
        samples: Samples in the chunk.
    """

    chunk: Chunk
    examples: list[tuple[int, int]] = field(default_factory=list)
    notes: list[Noted] = field(default_factory=list)
    seen: Counter[str] = field(default_factory=Counter)
    samples: int = 0


@dataclass(frozen=True, slots=True)
class Encoder:
    """Makes tokens of samples by the rules of one recipe.

    Attributes:
        renderer: Renders a sample.
        task: Makes rows of what is rendered.
    """

    renderer: Renderer
    task: Task[TaskSection]

    def encode_chunk(self, samples: Sequence[PlacedSample]) -> EncodedChunk:
        """Encodes samples one by one; what is wrong with one is noted and the others go on."""
        rows: list[tuple[int, int, TaskRow]] = []
        copies: list[int] = []
        result = EncodedChunk({}, samples=len(samples))
        self.renderer.seen.clear()
        endless = [self.renderer.is_surely_longer(sample) for _, _, sample in samples]
        shorter = [sample for (_, _, sample), is_endless in zip(samples, endless, strict=True) if not is_endless]
        rendered = iter(self.renderer.render_all(shorter))
        for (source, line, sample), is_endless in zip(samples, endless, strict=True):
            try:
                whole = None if is_endless else self._take(sample, next(rendered))
                excess = self._surely_over() if whole is None else self._excess(whole)
                if whole is not None and not excess:
                    encoded = [whole]
                else:
                    encoded, fate, why = self._shorten(sample, excess)
                    result.notes.append(Noted(fate, source, why.at(file=sample.file, line=line)))
            except DataError as error:
                result.notes.append(Noted("bad", source, error.at(file=sample.file, line=line)))
                continue
            if encoded:
                result.examples.append((source, len(encoded)))
                rows += [(source, line, self._bound(row)) for row in encoded]
                copies += [sample.copy] * len(encoded)
        result.chunk = pack_chunk(rows, self.task.columns, self.task.row_tokens, copies)
        result.seen = Counter(self.renderer.seen)
        return result

    def _take(self, sample: Sample, rendered: Encoded | DataError) -> TaskRow:
        """What the task makes of a rendered sample."""
        if isinstance(rendered, DataError):
            raise rendered
        whole = self.task.encode(sample, lambda asked: rendered if asked is sample else self._render_beside(asked))
        if whole is None:
            raise DataError("no trainable tokens", todo=NO_ANSWER)
        return whole

    def _render_beside(self, sample: Sample) -> Encoded | None:
        """A sample that the task made of another one; of one that is far too long what fits."""
        is_endless = self.renderer.is_surely_longer(sample)
        return self.renderer.truncate(sample) if is_endless else self.renderer.render(sample)

    def _bound(self, row: TaskRow) -> TaskRow:
        """The row with what stands beside its own sequence cut to `max_length`."""
        limit, beside = (
            self.renderer.data.max_length,
            [column.name for column in self.task.columns if column.is_bounded],
        )
        if not beside:
            return row
        cut = {name: row.columns[name][:limit] for name in beside}
        return replace(row, columns={**row.columns, **cut}, tokens=max(row.tokens, *map(len, cut.values())))

    @property
    def _limits(self) -> tuple[Limit, ...]:
        return self.task.limits(self.renderer.data.max_length)

    def _surely_over(self) -> str:
        """The same of a sample that nobody counted, since it is far too long."""
        return " or ".join(
            f"over {SURE_FACTOR * each.most} tokens, {each.name} is {each.most}" for each in self._limits
        )

    def _excess(self, row: TaskRow) -> str:
        """What of a row is over a limit, in words; empty where all of it fits."""
        return "; ".join(said for limit in self._limits if (said := limit.excess(row)))

    def _shorten(self, sample: Sample, reason: str) -> tuple[list[TaskRow], str, DataError]:
        """What is left of a sample that is too long, its fate and why."""
        rule = self.renderer.data.overlength
        if rule == "truncate":
            cut = self.task.encode(sample, partial(self.renderer.truncate, keep=self.task.keeps))
            if cut is not None:
                return [cut], "cut", DataError(reason)
            return [], "dropped", DataError(f"{reason}, and no trained token fits")
        if rule == "drop":
            return [], "dropped", DataError(reason)
        can_split = sample.text is not None and not sample.is_labelled
        if rule == "split" and can_split:
            pieces = [self.task.encode(sample, _give(piece)) for piece in self.renderer.split(sample)]
            rows = [piece for piece in pieces if piece is not None]
            return rows, "split", DataError(f"{reason}: {counted(len(pieces), 'row')}")
        rules = [*(["split"] if can_split else []), "truncate", "drop"]
        ways = alternatives([each for each in rules if f"data.overlength={each}" not in self.task.unread])
        if rule == "split":
            reason, todo = f"{reason}; only plain text can be split", f"set data.overlength: {ways}"
        else:
            options = " and ".join(limit.option for limit in self._limits if limit.name in reason)
            todo = f"raise {options}, or set data.overlength: {ways}"
        return [], OVERLONG, DataError(reason, todo=todo)


def _give(encoded: Encoded) -> Callable[[Sample], Encoded | None]:
    return lambda sample: encoded


def count_workers(seconds: float) -> int:
    """Processes that are worth starting for so much work of one: 0 means to encode in this one."""
    if sys.platform != "linux":  # elsewhere a fork is not safe and a spawn slow
        return 0
    workers = min(len(os.sched_getaffinity(0)), WORKERS_LIMIT, int(seconds / SECONDS_A_WORKER))
    return workers if workers > 1 else 0


def encode_all(encoder: Encoder, samples: Iterable[PlacedSample], expected: int) -> Generator[EncodedChunk, None, None]:
    """Encodes samples in order, a chunk at a time; never holds more than some chunks of them.

    Args:
        expected: About how many there are.

    Raises:
        ModelError: There is no usable chat template or tokenizer.
        ResourceError: A worker was killed, as the system does where memory runs out.
    """
    chunks = cut_chunks(samples)
    done = 0
    is_frozen = gc.get_freeze_count() > 0  # by the program around
    gc.freeze()  # else Python's collector walks over every library object again and again while rows are made, and so
    try:  # makes each worker copy the pages that it shares with its parent
        for number, chunk in enumerate(chunks):
            began = time.monotonic()
            encoded = encoder.encode_chunk(chunk)
            seconds, done = time.monotonic() - began, done + len(chunk)
            yield encoded
            workers = count_workers(seconds / len(chunk) * (expected - done)) if number else 0  # the first one compiles
            if workers:
                yield from _encode_in_workers(encoder, chunks, workers)
    finally:
        if not is_frozen:
            gc.unfreeze()


def cut_chunks(samples: Iterable[PlacedSample]) -> Iterator[tuple[PlacedSample, ...]]:
    """Samples in chunks of a few hundred rows or kilobytes, whichever is less; the first ones are smaller, so that it
    shows soon how long the others take.
    """
    chunk: list[PlacedSample] = []
    cut = characters = 0
    for placed in samples:
        chunk.append(placed)
        characters += len(str(placed[2]))
        part = SMALL_PART if cut < SMALL_CHUNKS else 1
        if len(chunk) >= CHUNK_ROWS * part or characters >= CHUNK_CHARACTERS * part:
            yield tuple(chunk)
            chunk, characters, cut = [], 0, cut + 1
    if chunk:
        yield tuple(chunk)


_worker_encoder: Encoder | None = None


def _start_worker(encoder: Encoder, parent: int) -> None:
    """Keeps the encoder, leaves Ctrl-C to the parent, and dies with it even where it was killed.

    A worker that outlived its parent would wait for work for ever, and hold the lock that it got from it.
    """
    global _worker_encoder
    _worker_encoder = encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if os.getppid() != parent:  # killed before that call: no signal comes any more
        os._exit(1)


def _encode_in_worker(samples: Sequence[PlacedSample]) -> EncodedChunk:
    assert _worker_encoder is not None
    return _worker_encoder.encode_chunk(samples)


def _encode_in_workers(
    encoder: Encoder, chunks: Iterator[tuple[PlacedSample, ...]], workers: int
) -> Iterator[EncodedChunk]:
    """A fork hands the tokenizer over without pickling it; the tokenizers' own threads must be off in a fork."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    waiting: deque[Future[EncodedChunk]] = deque()
    context = multiprocessing.get_context("fork")
    try:
        with ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(encoder, os.getpid())) as pool:
            try:
                for chunk in chunks:
                    with _without_interrupts() if not waiting else contextlib.nullcontext():
                        waiting.append(pool.submit(_encode_in_worker, chunk))
                    if len(waiting) >= workers * _CHUNKS_AHEAD:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            except BaseException:  # nobody wants the chunks any more that workers are in the midst of
                manager: Any = pool._executor_manager_thread  # a thread, whatever typeshed says
                for process in list((pool._processes or {}).values()):  # as Python 3.14's `kill_workers`
                    process.kill()
                pool.shutdown(wait=False, cancel_futures=True)
                if manager is not None:  # Python's exit would wake it while it closes its pipe, and print a traceback
                    manager.join(_MANAGER_SECONDS)
                raise
    except BrokenProcessPool:
        raise ResourceError("a process that tokenises rows was killed: memory ran out?", todo="free memory") from None
    finally:
        if before is None:
            os.environ.pop("TOKENIZERS_PARALLELISM", None)
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """Holds Ctrl-C back while workers are forked: they would answer it until they leave it to their parent, and in what
    Python runs around a fork it is lost. A mask does not do: another thread, such as a bar's, would get the signal.
    """
    if threading.current_thread() is not threading.main_thread():  # Ctrl-C does not come here
        yield
        return
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came and callable(before):
        before(signal.SIGINT, None)
