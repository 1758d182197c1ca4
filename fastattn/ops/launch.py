"""Launches Triton kernels: on a GPU through Triton, on CPU tensors in the emulator.

Imported by the rooms' `triton.py` alone, and they on first use: nothing else needs Triton. What the
emulator runs is the PTX that Triton's own launcher would have made of the very same arguments, with
its hints on what is divisible by 16 or equal to 1, for the oldest GPU that the kernels are for or
one that `device.emulating` names.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from fastattn import emulator
from fastattn.emulator import device

Knobs = TypeVar("Knobs")


def of_architecture(table: Mapping[int, Knobs], tensor: Tensor) -> Knobs:
    """The knobs for the GPU of a tensor: those of the newest architecture that is not newer."""
    architecture = architecture_of(tensor)
    return table[max((a for a in table if a <= architecture), default=min(table))]


def architecture_of(tensor: Tensor) -> int:
    """That of the GPU which kernels with this tensor run on, or are compiled for, say 90."""
    if _compiling is not None:
        return _compiling[0]
    if tensor.is_cuda:
        major, minor = torch.cuda.get_device_capability(tensor.device)
        return 10 * major + minor
    return device.architecture


def launch(
    kernel: JITFunction,
    grid: Sequence[int],
    arguments: Mapping[str, Any],
    *,
    writes: Sequence[str],
    num_warps: int,
    num_stages: int = 1,
    fuse: bool = False,
    registers: int | None = None,
) -> None:
    """Run `kernel` on the device of its tensors.

    Args:
        grid: how many programs there are in each dimension; where one is 0 nothing runs.
        arguments: every argument by its name, None for a tensor that is not there.
        writes: the tensors that the kernel writes to, and does not read unless they are given
            under another name too.
        fuse: let the compiler make one instruction of a product and a sum. Not where products are
            summed across threads: there two threads would add the same numbers, but each round
            the other's alone, and all of them write their result to one place.
        registers: of a thread, at most; without it ptxas may rather spill than take a few more.

    Raises:
        RuntimeError: the emulator has found a fault.
    """
    if 0 in grid:
        return
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": fuse}
    if registers is not None:
        options["maxnreg"] = registers
    if _compiling is not None:
        _compiling[1].append(compile_for(_compiling[0], kernel, arguments, options))
        return
    first = next(value for value in arguments.values() if isinstance(value, Tensor))
    if first.is_cuda:
        with torch.cuda.device(first.device):
            kernel[tuple(grid)](**arguments, **options)
        return
    compiled = compile_for(device.architecture, kernel, arguments, options)
    given = [
        _memory(value, name in writes) if isinstance(value, Tensor) else value
        for name, value in passed(compiled, arguments)
    ]
    emulated = _emulated(compiled)
    given += [None] * (len(emulated.function.params) - len(given))  # Triton's own scratch memory
    device.execute(
        emulated, grid, 32 * compiled.metadata.num_warps, given, compiled.metadata.shared
    )


def passed(compiled: CompiledKernel, arguments: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The arguments that are passed at run time; the others are compiled in."""

    def flat(name: str, kind: Any, value: Any) -> Iterator[tuple[str, Any]]:
        if isinstance(kind, tuple):
            for part in zip(kind, value, strict=True):
                yield from flat(name, *part)
        elif kind != "constexpr":
            yield name, value

    for name, kind in compiled.src.signature.items():
        yield from flat(name, kind, arguments[name])


def _memory(tensor: Tensor, written: bool) -> emulator.Memory | None:
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    size = 0 if tensor.numel() == 0 else (last + 1) * tensor.element_size()
    return emulator.Memory(tensor.data_ptr(), size, written, not written) if size else None


_compiling: tuple[int, list[CompiledKernel]] | None = None


@contextmanager
def compiling(architecture: int) -> Iterator[list[CompiledKernel]]:
    """Compile for a GPU of `architecture`, say 90, what launches inside the `with` block would run.

    They run nothing, so that results are garbage. Yields what they compiled.
    """
    global _compiling
    before, _compiling = _compiling, (architecture, [])
    try:
        yield _compiling[1]
    finally:
        _compiling = before


class _Driver:
    """As much of a driver of Triton as is asked while it compiles for a GPU that is not there."""

    def __init__(self, architecture: int):
        self.architecture = architecture

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return -self.architecture  # Triton keeps what it compiled by device

    def get_current_stream(self, device: int) -> int:
        return 0


_lock = threading.RLock()


@contextmanager
def _driver(architecture: int) -> Iterator[None]:
    # Triton's driver is made on first use, and fails without a GPU; so not even asked for.
    with _lock:
        config = triton.runtime.driver
        before, config._active = config._active, _Driver(architecture)
        try:
            yield
        finally:
            config._active = before


def compile_for(
    architecture: int, kernel: JITFunction, arguments: Mapping[str, Any], options: Mapping[str, Any]
) -> CompiledKernel:
    """What Triton's launcher would run on a GPU of `architecture`, say 80, for these arguments."""
    with _driver(architecture):
        return kernel.warmup(grid=(1,), **arguments, **options)


_kernels: dict[str, emulator.Kernel] = {}


def _emulated(compiled: CompiledKernel) -> emulator.Kernel:
    if compiled.hash not in _kernels:
        _kernels[compiled.hash] = emulator.load(compiled.asm["ptx"])[compiled.name]
    return _kernels[compiled.hash]
