"""Files written while the next bytes are made: hashed in one thread, written in another, synced in a third.

    caller --block--> hashing thread --> SHA-256, for the MANIFEST: nothing is read again
                  └─> writing thread --> page cache --> syncing thread: fsync of each finished file

Hashing, writing and waiting for a disk leave the interpreter's lock to others, so threads are enough. The memory of a
block is used again: fresh pages cost a page fault each, which for a merge is as much time as its arithmetic.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch

_MOST_PENDING = 16
"""Blocks that may wait in memory; a merge's are about a MiB each."""


class BackgroundWriter:
    """Writes one file after the other. An error of a thread is raised by a later call, or at the end of the block.

    Leaving the block waits until every file is whole and on the disk; leaving it by an exception drops what waits.

    Attributes:
        digests: SHA-256 in hex of each file's bytes as they were given, by the file's name.
    """

    def __init__(self) -> None:
        self.digests: dict[str, str] = {}
        self._hashing, self._writing, self._syncing = (ThreadPoolExecutor(1) for _ in range(3))
        self._pending: deque[tuple[Future[None], Future[None], torch.Tensor | None]] = deque()
        self._free: list[torch.Tensor] = []
        self._taken: torch.Tensor | None = None
        self._synced: list[Future[None]] = []
        self._streams = ExitStack()
        self._stream: BinaryIO | None = None

    def __enter__(self) -> BackgroundWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            if error is None:
                self._finish_file()
                while self._pending:
                    self._settle_oldest()
                for synced in self._synced:
                    synced.result()
        finally:
            for threads in (self._hashing, self._writing, self._syncing):
                threads.shutdown(wait=True, cancel_futures=True)
            self._streams.close()

    def begin(self, file: Path) -> None:
        """Makes the file that the bytes put from now on go to; the one before is finished."""
        self._finish_file()
        self._stream = self._streams.enter_context(file.open("wb", buffering=0))
        self._name, self._digest = file.name, hashlib.sha256()

    def take_block(self, size_bytes: int) -> torch.Tensor:
        """Memory for the next `put`: uint8, `[size_bytes]`, its values undefined. Waits where too many are pending."""
        while len(self._pending) >= _MOST_PENDING:
            self._settle_oldest()
        fitting = (number for number, block in enumerate(self._free) if block.numel() >= size_bytes)
        number = next(fitting, None)
        self._taken = torch.empty(size_bytes, dtype=torch.uint8) if number is None else self._free.pop(number)
        return self._taken[:size_bytes]

    def put(self, data: bytes | torch.Tensor) -> Future[None]:
        """Appends bytes, or what `take_block` gave, which is not the caller's any more.

        Returns:
            What is done once these bytes, and all before them, can be read from the file.
        """
        if self._stream is None:
            raise ValueError("no file was begun")
        block, self._taken = self._taken, None
        view = memoryview(data if isinstance(data, bytes) else data.numpy())  # type: ignore[arg-type]
        hashed = self._hashing.submit(self._digest.update, view)
        written = self._writing.submit(_write_all, self._stream, view)
        self._pending.append((hashed, written, block))
        return written

    def _settle_oldest(self) -> None:
        hashed, written, block = self._pending.popleft()
        hashed.result()
        written.result()
        if block is not None:
            self._free.append(block)

    def _finish_file(self) -> None:
        if self._stream is None:
            return
        name, digest, stream = self._name, self._digest, self._stream
        self._stream = None
        hashed = self._hashing.submit(lambda: self.digests.update({name: digest.hexdigest()}))
        written = self._writing.submit(lambda: None)
        self._pending.append((hashed, written, None))
        self._synced.append(self._syncing.submit(_sync_and_close, stream, written))


def _write_all(stream: BinaryIO, view: memoryview) -> None:
    """Writes every byte: an unbuffered write may take fewer than it was given."""
    while view:
        view = view[stream.write(view) :]


def _sync_and_close(stream: BinaryIO, written: Future[None]) -> None:
    with stream:
        written.result()
        os.fsync(stream.fileno())
