"""Bytes given to threads arrive whole, in order and hashed, in little memory; their errors are raised here."""

from __future__ import annotations

import errno
import hashlib
import threading
import time
from pathlib import Path

import pytest
import torch

from lorafit.model.merge import background_writer
from lorafit.model.merge.background_writer import BackgroundWriter


@pytest.fixture(autouse=True)
def no_thread_is_left() -> object:
    before = threading.active_count()
    yield
    assert threading.active_count() == before


def test_files_hold_what_was_put_and_are_hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = background_writer._write_all

    def dawdle(*given: object) -> None:
        time.sleep(0.001)  # so that blocks are handed out again while others still wait
        write(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(background_writer, "_write_all", dawdle)
    torch.manual_seed(0)
    wanted: dict[str, bytes] = {}
    with BackgroundWriter() as writer:
        for name, count in (("a", 60), ("empty", 0), ("b", 3)):
            writer.begin(tmp_path / name)
            wanted[name] = b"header"
            done = writer.put(wanted[name])
            for number in range(count):
                values = torch.randint(256, (1000 + 37 * (number % 5),), dtype=torch.uint8)
                block = writer.take_block(values.numel())
                block.copy_(values)
                done = writer.put(block)
                wanted[name] += values.numpy().tobytes()
            done.result()
            assert (tmp_path / name).read_bytes() == wanted[name]
    assert {name: (tmp_path / name).read_bytes() for name in wanted} == wanted
    assert writer.digests == {name: hashlib.sha256(content).hexdigest() for name, content in wanted.items()}


def test_memory_is_bounded_however_slow_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background_writer, "_write_all", lambda *_: time.sleep(0.002))
    seen = set()
    with BackgroundWriter() as writer:
        writer.begin(tmp_path / "a")
        for _ in range(3 * background_writer._MOST_PENDING):
            block = writer.take_block(4096)
            seen.add(block.data_ptr())
            writer.put(block)
    assert len(seen) == background_writer._MOST_PENDING


def test_a_full_disk_is_raised_here() -> None:
    with pytest.raises(OSError, match="No space left") as caught, BackgroundWriter() as writer:
        writer.begin(Path("/dev/full"))
        writer.put(b"some bytes")
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(OSError, match="No space left"), BackgroundWriter() as writer:
        writer.begin(Path("/dev/full"))
        for _ in range(1000):
            writer.take_block(10)
            writer.put(b"some bytes")
        pytest.fail("the error came only at the end")


def test_an_interruption_drops_what_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    gate = threading.Event()
    monkeypatch.setattr(background_writer, "_write_all", lambda _, view: (gate.wait(10), written.append(bytes(view))))
    with pytest.raises(KeyboardInterrupt), BackgroundWriter() as writer:
        writer.begin(tmp_path / "a")
        for number in range(8):
            writer.put(bytes([number]))
        threading.Timer(0.05, gate.set).start()
        raise KeyboardInterrupt
    assert written in ([], [b"\0"]) and not writer.digests


def test_bytes_need_a_file() -> None:
    with BackgroundWriter() as writer, pytest.raises(ValueError, match="no file"):
        writer.put(b"x")
