"""The emulator as the device of the library's own CUDA kernels: use_kernel("emulator")."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator, Sequence
from ctypes import POINTER, Structure, c_char_p, c_int32, c_int64, c_uint32, c_void_p, cast
from functools import cache
from typing import Any

import torch

from fastattn import _library
from fastattn.emulator import abi
from fastattn.emulator.launch import Kernel, Memory, load
from fastattn.emulator.report import EmulatorError, Report
from fastattn.emulator.tensor_map import TensorMap


class Argument(Structure):
    """`Argument` of csrc/cuda/launch.h."""

    _fields_ = [
        ("value", c_void_p),
        ("bytes", c_int64),
        ("extent", c_int64),
        ("written", c_int32),
        ("fresh", c_int32),
        ("boxed", c_int32),
    ]


class Boxed(Structure):
    """`Boxed` of csrc/cuda/launch.h."""

    _fields_ = [("data", c_void_p), ("rows", c_int64), ("cols", c_int64)]

    BOX, SWIZZLE = (64, 64), 128  # what csrc/cuda/driver.cpp tells the copy engine besides

    def tensor_map(self) -> TensorMap:
        memory = (ctypes.c_int16 * (self.rows * self.cols)).from_address(self.data)
        matrix = torch.frombuffer(memory, dtype=torch.int16).view(self.rows, self.cols)
        return TensorMap(matrix, self.BOX, self.SWIZZLE)


class Launch(Structure):
    """`Launch` of csrc/cuda/launch.h."""

    _fields_ = [
        ("room", c_char_p),
        ("kernel", c_char_p),
        ("grid", c_uint32 * 3),
        ("block", c_uint32 * 3),
        ("shared", c_uint32),
        ("count", c_int32),
        ("arguments", POINTER(Argument)),
    ]


@cache
def kernel(room: str, name: str) -> Kernel:
    """A CUDA kernel of a room. Raises RuntimeError where the library was built without."""
    if not (text := _library.ptx(room, name)):
        raise RuntimeError(_library.WHY_NO_CUDA)
    return load(text)[name]


architecture = 80  # of the GPU that is emulated: sm_80, the oldest that the kernels are for


@contextlib.contextmanager
def emulating(other: int) -> Iterator[None]:
    """Emulate a GPU of another architecture inside the `with` block, say 90 for sm_90a."""
    global architecture
    before, architecture = architecture, other
    try:
        if _attached:
            attach(True)
        yield
    finally:
        architecture = before
        if _attached:
            attach(True)


_thorough = False
_reports: list[Report] | None = None


@contextlib.contextmanager
def watching(thorough: bool = False) -> Iterator[list[Report]]:
    """Collect the reports of launches, with their counters, inside the `with` block.

    `thorough` runs every launch under all schedules and compares the results, instead of once.
    """
    global _thorough, _reports
    before = _thorough, _reports
    _thorough, _reports = thorough, []
    try:
        yield _reports
    finally:
        _thorough, _reports = before


def _argument(given: Argument) -> Memory | TensorMap | bytes | None:
    if given.boxed:
        return Boxed.from_address(given.value).tensor_map()
    value = ctypes.string_at(given.value, given.bytes)
    if given.extent < 0:
        return value
    if not (address := int.from_bytes(value, "little")):
        return None
    return Memory(address, given.extent, bool(given.written), not given.fresh)


def execute(
    launched: Kernel,
    grid: Sequence[int],
    block: int | Sequence[int],
    arguments: Sequence[Any],
    shared: int,
) -> None:
    """Launch a kernel as `watching` asks. Raises EmulatorError for what it finds."""
    run = launched.check if _thorough else launched.launch
    count = _reports is not None
    report = run(grid, block, *arguments, shared=shared, count=count).require()
    if _reports is not None:
        _reports.append(report)


def _run(launch: Launch) -> None:
    launched = kernel(launch.room.decode(), launch.kernel.decode())
    arguments = [_argument(launch.arguments[i]) for i in range(launch.count)]
    execute(launched, launch.grid[:], launch.block[:], arguments, launch.shared)


_message = ctypes.create_string_buffer(b"")  # of the last failure, which the library copies


@ctypes.CFUNCTYPE(c_void_p, POINTER(Launch))
def _hook(launch: Launch) -> int | None:
    global _message
    try:
        _run(launch[0])
    except (EmulatorError, MemoryError, RuntimeError, TypeError, ValueError, KeyError) as error:
        _message = ctypes.create_string_buffer(f"{type(error).__name__}: {error}".encode())
        return ctypes.addressof(_message)
    return None


_attached = False


def attach(on: bool) -> None:
    """Send the launches of the library's CUDA kernels to the emulator, or no longer."""
    global _attached
    _attached = on
    abi.library().fastattn_emulate(cast(_hook, c_void_p) if on else None, architecture)
