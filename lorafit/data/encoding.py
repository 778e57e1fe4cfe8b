"""Samples to tokens, chunk by chunk, here or in worker processes; the order and the result are the same.

samples ──chunks of 256──> encode_chunk (in this process, or in forked workers) ──in order──> EncodedChunk ──> writer
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal

from lorafit.contracts import Encoded, Sample
from lorafit.data.overlong import SURE_FACTOR
from lorafit.data.sample_renderer import Renderer
from lorafit.data.store import Chunk, pack_chunk
from lorafit.errors import DataError, ResourceError

Encode = Callable[[Sample, Callable[[Sample], Encoded | None]], Encoded | None]
PlacedSample = tuple[int, int, Sample]
"""Number of its source, line there, sample."""

CHUNK_ROWS = 256
PARALLEL_FROM_ROWS = 5000
WORKERS_LIMIT = 16
_PR_SET_PDEATHSIG = 1  # of Linux' prctl: the signal that a process gets when its parent ends
_CHUNKS_AHEAD = 4  # for each worker; bounds what waits in memory


@dataclass(slots=True)
class EncodedChunk:
    """What became of a chunk of samples.

    Attributes:
        chunk: The rows that can be trained on.
        examples: (source, number of examples) of each usable sample.
        bad: Samples of which nothing can be trained, with the reason.
        overlong: Samples that are too long where the recipe says that this is an error.
        lengths: (what, source, line, reason) of samples that were dropped, cut or split.
        seen: What the renderer counted.
        samples: Samples in the chunk.
    """

    chunk: Chunk
    examples: list[tuple[int, int]] = field(default_factory=list)
    bad: list[tuple[int, int, DataError]] = field(default_factory=list)
    overlong: list[tuple[int, int, DataError]] = field(default_factory=list)
    lengths: list[tuple[str, int, int, str]] = field(default_factory=list)
    seen: Counter[str] = field(default_factory=Counter)
    samples: int = 0


@dataclass(frozen=True, slots=True)
class Encoder:
    """Makes tokens of samples by the rules of one recipe.

    Attributes:
        renderer: Renders a sample.
        encode: The task's `encode`.
        max_length: Longest row, in tokens.
        overlength: What happens to longer ones.
    """

    renderer: Renderer
    encode: Encode
    max_length: int
    overlength: Literal["error", "drop", "truncate", "split"]

    def encode_chunk(self, samples: Sequence[PlacedSample]) -> EncodedChunk:
        """Encodes samples one by one; what is wrong with one is noted and the others go on."""
        rows: list[tuple[int, int, Encoded]] = []
        result = EncodedChunk(pack_chunk([]), samples=len(samples))
        self.renderer.seen.clear()
        for source, line, sample in samples:
            try:
                encoded = self._encode_one(source, line, sample, result)
            except DataError as error:
                error.at(file=sample.file, line=line)
                result.bad.append((source, line, error))
                continue
            if encoded:
                result.examples.append((source, len(encoded)))
                rows += [(source, line, row) for row in encoded]
        result.chunk, result.seen = pack_chunk(rows), Counter(self.renderer.seen)
        return result

    def _encode_one(self, source: int, line: int, sample: Sample, result: EncodedChunk) -> list[Encoded]:
        if self.renderer.is_surely_longer(sample):
            reason = f"over {SURE_FACTOR * self.max_length} tokens, max_length is {self.max_length}"
        else:
            whole = self.encode(sample, self.renderer.render)
            if whole is None:
                raise DataError(
                    "no trainable tokens", todo="every answer is empty or has weight 0; correct or remove the row"
                )
            if len(whole.input_ids) <= self.max_length:
                return [whole]
            reason = f"{len(whole.input_ids)} tokens, max_length is {self.max_length}"
        if self.overlength == "truncate":
            cut = self.encode(sample, self.renderer.truncate)
            if cut is not None:
                result.lengths.append(("cut", source, line, reason))
                return [cut]
            result.lengths.append(("dropped", source, line, f"{reason}, and no trained token fits"))
        elif self.overlength == "split" and sample.text is not None:
            pieces = [self.encode(sample, _give(piece)) for piece in self.renderer.split(sample)]
            result.lengths.append(("split", source, line, f"{reason}: {len(pieces)} rows"))
            return [piece for piece in pieces if piece is not None]
        elif self.overlength == "drop":
            result.lengths.append(("dropped", source, line, reason))
        else:
            result.overlong.append((source, line, self._overlong(sample, line, reason)))
        return []

    def _overlong(self, sample: Sample, line: int, reason: str) -> DataError:
        if self.overlength == "split":
            reason, todo = f"{reason}; only plain text can be split", "set data.overlength: truncate or drop"
        else:
            rules = "split, truncate or drop" if sample.text is not None else "truncate or drop"
            todo = f"raise data.max_length, or set data.overlength: {rules}"
        return DataError(reason, file=sample.file, line=line, todo=todo)


def _give(encoded: Encoded) -> Callable[[Sample], Encoded | None]:
    return lambda sample: encoded


def count_workers(rows: int) -> int:
    """Processes that are worth starting for that many rows: 0 means to encode in this one."""
    if rows < PARALLEL_FROM_ROWS or sys.platform != "linux":  # elsewhere a fork is not safe and a spawn slow
        return 0
    cores = len(os.sched_getaffinity(0))
    return min(cores, WORKERS_LIMIT, rows // CHUNK_ROWS) if cores > 1 else 0


def encode_all(encoder: Encoder, samples: Iterable[PlacedSample], workers: int) -> Iterator[EncodedChunk]:
    """Encodes samples in order, a chunk at a time; never holds more than some chunks of them.

    Args:
        encoder: The rules.
        samples: Any number of them, read as needed.
        workers: Processes; 0 for none.

    Raises:
        ModelError: There is no usable chat template or tokenizer.
        ResourceError: A worker was killed, as the system does where memory runs out.
    """
    remaining = iter(samples)
    chunks = iter(lambda: tuple(islice(remaining, CHUNK_ROWS)), ())
    for first in chunks:  # here, so that what is wrong with all rows shows before processes start
        yield encoder.encode_chunk(first)
        break
    if workers:
        yield from _encode_in_workers(encoder, chunks, workers)
    else:
        yield from map(encoder.encode_chunk, chunks)


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
                    waiting.append(pool.submit(_encode_in_worker, chunk))
                    if len(waiting) >= workers * _CHUNKS_AHEAD:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    except BrokenProcessPool:
        raise ResourceError("a process that tokenises rows was killed: memory ran out?", todo="free memory") from None
    finally:
        if before is None:
            os.environ.pop("TOKENIZERS_PARALLELISM", None)
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before
