"""However a command ends, it is one line on stderr and the right exit code."""

from __future__ import annotations

import re

import pytest
import torch

import lorafit
from lorafit import pipeline
from lorafit.console.exits import exit_code
from lorafit.errors import DataError, Problems, ResourceError

RAN_OUT = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23 GiB."),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 400000 bytes. Error code 12"),
]
SAYS = [
    "out of memory;",
    "out of memory of the GPU, 2.00 GiB more were needed;",
    "out of memory of the GPU;",
    "out of memory, 400000 bytes more were needed;",
]


def end(error: BaseException, command: str) -> int:
    def fail() -> None:
        raise error

    return exit_code(fail, command, debug=lambda: False, json_head=lambda: None)


@pytest.mark.parametrize(("error", "says"), zip(RAN_OUT, SAYS, strict=True))
@pytest.mark.parametrize(
    ("command", "todo"),
    [
        ("train", "lower data.max_length or training.micro_batch_tokens"),
        ("eval", "lower evaluation.max_new_tokens"),
        ("generate", "ask for fewer new tokens"),
        ("merge", "free what other processes hold"),
    ],
)
def test_memory_that_ran_out_anywhere_is_exit_7(
    capsys: pytest.CaptureFixture[str], error: Exception, says: str, command: str, todo: str
) -> None:
    assert end(error, command) == 7
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {says} {todo}")


def test_another_error_of_a_library_is_our_bug(capsys: pytest.CaptureFixture[str]) -> None:
    assert end(RuntimeError("CUDA error: no kernel image"), "train") == 1
    assert "a bug in lorafit (RuntimeError: CUDA error: no kernel image)" in capsys.readouterr().err


@pytest.mark.parametrize("error", RAN_OUT)
def test_python_gets_the_same_error(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def evaluate(**_: object) -> None:
        raise error

    monkeypatch.setattr(pipeline, "evaluate", evaluate)
    with pytest.raises(ResourceError, match=re.escape("lower evaluation.max_new_tokens")) as caught:
        lorafit.evaluate("run")
    assert caught.value.exit_code == 7 and caught.value.__cause__ is error


def test_errors_in_the_same_words_are_one_line_with_all_their_places(capsys: pytest.CaptureFixture[str]) -> None:
    alike = [DataError("is empty", file="d.jsonl", line=line, key="text") for line in (3, 4, 9)]
    other = DataError("is empty", file="e.jsonl", line=1, key="text")
    long = [DataError("w" * 400, file="f.jsonl", line=line) for line in (1, 2)]
    assert end(Problems([alike[0], other, *alike[1:], *long], file="data"), "train") == 4
    first, second, *each, last = capsys.readouterr().err.splitlines()
    assert (first, second) == (
        "error: d.jsonl:3: text: is empty (and lines 4, 9)",
        "error: e.jsonl:1: text: is empty",
    )
    assert [line.split(": ")[1] for line in each] == ["f.jsonl:1", "f.jsonl:2"], "no room for the other's line"
    assert last == "error: data: 6 errors; first: d.jsonl:3: text: is empty"
    assert all(len(line) <= 300 for line in [first, second, *each, last])
