"""Memory that ran out is told from every other error, and what is cut in two goes on."""

from __future__ import annotations

import errno
from collections.abc import Sequence

import pytest
import torch

from lorafit.ops.process_memory import is_out_of_memory, run_or_halve

CUBLAS = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        CUBLAS,
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("std::bad_alloc"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
)
def test_what_ran_out_of_memory(error: Exception) -> None:
    assert is_out_of_memory(error)


def test_torchs_own_allocator_on_a_cpu() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"),
        RuntimeError("CUDA error: no kernel image is available"),
        OSError(errno.ENOSPC, "No space left on device"),
        ValueError("out of memory"),
    ],
)
def test_what_did_not(error: Exception) -> None:
    assert not is_out_of_memory(error)


def test_groups_that_do_not_fit_are_halved_and_keep_their_order() -> None:
    tried = []

    def add(group: Sequence[int]) -> int:
        tried.append(len(group))
        if len(group) > 2:
            raise CUBLAS
        return sum(group)

    done = list(run_or_halve(add, [[1, 2, 3, 4, 5], [6], [7, 8, 9]], CPU))
    assert done == [([1, 2], 3), ([3], 3), ([4, 5], 9), ([6], 6), ([7], 7), ([8, 9], 17)]
    assert tried == [5, 2, 3, 1, 2, 1, 3, 1, 2]


def test_one_alone_and_other_errors_are_raised() -> None:
    def fail(group: Sequence[int]) -> int:
        raise CUBLAS if group == [1] else RuntimeError("another reason")

    for groups, says in (([[1]], "ALLOC_FAILED"), ([[2, 3]], "another reason")):
        with pytest.raises(RuntimeError, match=says):
            list(run_or_halve(fail, groups, CPU))
