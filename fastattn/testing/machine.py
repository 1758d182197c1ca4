"""The machine under test: its ISA, its threads, and memory that holds what hurts."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

import torch

import fastattn
from fastattn import _library

M_PERTURB, MALLOC_BYTE = -6, 0x7F  # glibc's mallopt; four such bytes are 3e38, two are an fp16 NaN


@contextlib.contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Run the CPU kernels on ISA `name` inside the `with` block.

    Raises:
        ValueError: the library lacks it or this machine cannot run it.
    """
    before = fastattn.isa()
    _library.select_isa(name)
    try:
        yield
    finally:
        _library.select_isa(before)


@contextlib.contextmanager
def use_threads(count: int) -> Iterator[None]:
    """Let torch, and with it the CPU kernels, use `count` threads inside the `with` block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fill memory that kernels have not written yet with NaN and huge values.

    Scratch memory of the kernels becomes NaN. Whatever the C library allocates, the kernels'
    outputs among it, is filled with the byte 0x7f: 3e38 in fp32 and bf16, NaN in fp16, 1e306 in
    fp64, so that what a kernel forgets to write fails any comparison. Other threads are poisoned
    too.

    Raises:
        RuntimeError: there is no compiled library, or the C library is not glibc.
    """
    if _library.LIBRARY is None:
        raise RuntimeError(_library.WHY_NOT)
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        raise RuntimeError("fresh memory is poisoned through glibc's mallopt, got none") from None
    _library.LIBRARY.fastattn_poison_scratch(1)
    mallopt(M_PERTURB, MALLOC_BYTE ^ 0xFF)  # glibc fills with the complement
    try:
        yield
    finally:
        mallopt(M_PERTURB, 0)
        _library.LIBRARY.fastattn_poison_scratch(0)
