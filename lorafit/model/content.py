"""Every byte of a base's weights, hashed: what a run was begun on, and what it must find again.

`fingerprint` reads 4 KiB of each tensor and tells one base from another in milliseconds; an edit beside those bytes it
does not see. This hash sees all of them, and names the tensor. A file is read once: `files.cache` keeps its hashes
for as long as the file stays the same.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event

from lorafit.console.wording import list_names
from lorafit.contracts import JsonObject
from lorafit.errors import CheckpointError
from lorafit.files.atomic import read_object
from lorafit.files.cache import remember
from lorafit.files.safetensors import TensorEntry, read_header, read_index

_HASHING = "tensors 1"
_READ_BYTES = 4 << 20
_MOST_THREADS = 4  # beyond that a disk is slower than the hashing


@dataclass(frozen=True, slots=True)
class Content:
    """What a base's weights are.

    Attributes:
        tensors: SHA-256 of each tensor's dtype, shape and bytes, by its name in the files.
    """

    tensors: Mapping[str, str]

    @property
    def digest(self) -> str:
        """One SHA-256 over all of them; how they are spread over files does not matter."""
        lines = "".join(f"{name} {value}\n" for name, value in sorted(self.tensors.items()))
        return hashlib.sha256(lines.encode("utf-8", "surrogatepass")).hexdigest()

    def to_json(self) -> JsonObject:
        """base.json of a run."""
        return {"format": 1, "content": self.digest, "tensors": dict(self.tensors)}


def read_content(folder: Path, stop: Event | None = None) -> Content:
    """Hashes all weights of a model folder; seconds for each 10 GB that were not hashed before.

    Args:
        folder: The model's.
        stop: Ends it, without a result, once it is set.

    Raises:
        InterruptedError: It was set.
    """
    files = sorted({entry.file for entry in read_index(folder).values()})
    tensors: dict[str, str] = {}
    for file in files:
        tensors |= remember(_HASHING, file, partial(_hash_tensors, stop=stop or Event()))
    return Content(tensors)


@contextmanager
def reading_content(folder: Path) -> Iterator[Future[Content]]:
    """The same in a thread, beside what is done inside: hashing does not hold Python's lock, and the pages are shared.

    An error inside ends the reading.
    """
    stop = Event()
    with ThreadPoolExecutor(1, thread_name_prefix="lorafit-hash") as pool:
        try:
            yield pool.submit(read_content, folder, stop)
        finally:
            stop.set()


def require_recorded(folder: Path, file: Path, content: Content | None = None) -> None:
    """Compares a base with what a run recorded when it began; older runs have no such file.

    Args:
        folder: The base's.
        file: Where it is recorded: what `to_json` gave.
        content: Of the base as it is now; read where None.

    Raises:
        CheckpointError: They differ; names the tensors, or the record is none.
    """
    if not file.exists():
        return
    content, recorded = content or read_content(folder), read_object(file)
    if recorded.get("content") == content.digest:
        return
    before = recorded.get("tensors")
    if not isinstance(before, dict):
        raise CheckpointError("holds no hashes of tensors", file=str(file), key="tensors", todo="restore it")
    names = before.keys() | content.tensors.keys()
    changed = [str(name) for name in names if before.get(name) != content.tensors.get(name)]
    raise CheckpointError(
        f"the base changed since the run was started: {len(changed)} tensors differ ({list_names(changed)})",
        file=str(folder),
        todo="restore the base's files, or train anew on this one",
    )


def describe_difference(folder: Path, file: Path) -> str:
    """`2 tensors differ (a, b)`: what tells a base from the one that a run recorded; empty where it recorded none."""
    try:
        require_recorded(folder, file)
    except CheckpointError as error:
        return error.what
    return ""


def _hash_tensors(file: Path, stop: Event) -> dict[str, str]:
    entries = read_header(file)
    with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)) as pool:
        hashes = pool.map(partial(_hash_tensor, stop=stop), entries.values())
        return dict(zip(entries, hashes, strict=True))


def _hash_tensor(entry: TensorEntry, stop: Event) -> str:
    digest = hashlib.sha256(f"{entry.dtype} {list(entry.shape)}\n".encode())
    descriptor = os.open(entry.file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        done = 0
        while piece := os.pread(descriptor, min(_READ_BYTES, entry.size_bytes - done), entry.offset + done):
            if stop.is_set():
                raise InterruptedError
            digest.update(piece)
            done += len(piece)
    finally:
        os.close(descriptor)
    return digest.hexdigest()
