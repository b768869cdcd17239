"""Large host memory that is present before it is used."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeAlias

import torch

from hicache_core.errors import NotEnoughMemory

Progress: TypeAlias = Callable[[int, int], None]
"""Called with (bytes faulted in, bytes in all) after each step."""

STEP_NBYTES = 1 << 30
CUDA_HOST_REGISTER_PORTABLE = 1
CUDA_HOST_REGISTER_MAPPED = 2


def map_memory(nbytes: int, progress: Progress | None = None) -> memoryview:
    """Maps anonymous memory of zeros, in huge pages if the kernel has them, and faults it in.

    The first access to a page costs several times a copy, so it is made here and not by the first
    request. torch's threads access one byte of every 4 KiB; with huge pages that was faster than
    MADV_POPULATE_WRITE, which runs on one thread and under Python's lock.

    The memory is freed when the last view of it is gone.

    Args:
        nbytes: size, positive.
        progress: called after every GiB; may raise to give up.
    """
    mapping = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without huge pages: 4 KiB pages do, only slower
            mapping.madvise(mmap.MADV_HUGEPAGE)
    view = memoryview(mapping)
    touched = torch.frombuffer(view, dtype=torch.uint8)[:: mmap.PAGESIZE]
    step = STEP_NBYTES // mmap.PAGESIZE
    for start in range(0, len(touched), step):
        touched[start : start + step].zero_()
        if progress is not None:
            progress(min((start + step) * mmap.PAGESIZE, nbytes), nbytes)
    return view


def pin_memory(block: torch.Tensor) -> None:
    """Registers ``block`` with CUDA: page-locked, for all devices, and readable by kernels.

    Raises:
        NotEnoughMemory: CUDA refused; the message has its error.
    """
    flags = CUDA_HOST_REGISTER_PORTABLE | CUDA_HOST_REGISTER_MAPPED
    _call_cuda("cudaHostRegister", block, block.numel(), flags)


def unpin_memory(block: torch.Tensor) -> None:
    """Undoes ``pin_memory``; no copy may be running."""
    _call_cuda("cudaHostUnregister", block)


def _call_cuda(function: str, block: torch.Tensor, *arguments: int) -> None:
    cudart: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    error = int(getattr(cudart, function)(block.data_ptr(), *arguments))
    if error != 0:
        raise NotEnoughMemory(
            f"{function} of {block.numel() / 1e9:.2f} GB failed with CUDA error {error}; lower "
            "hicache_size, or raise the limit of locked memory (ulimit -l)"
        )
