"""The structs of csrc/emulator/program.h for ctypes, and the compiled runtime behind them."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, c_char, c_char_p, c_int32, c_int64, c_uint32, c_uint64
from functools import cache

from fastattn import _library


class Instruction(Structure):  # noqa: D101
    _fields_ = [
        ("operation", c_int32),
        ("flags", c_uint32),
        ("guard", c_int32),
        ("operands", c_int32),
        ("leader", c_int32),
    ]


class Initial(Structure):  # noqa: D101
    _fields_ = [
        ("slot", c_int32),
        ("bytes", c_int32),
        ("special", c_int32),
        ("pad", c_int32),
        ("value", c_uint64),
    ]


class Program(Structure):  # noqa: D101
    _fields_ = [
        ("instructions", POINTER(Instruction)),
        ("operands", POINTER(c_int32)),
        ("initials", POINTER(Initial)),
        ("instruction_count", c_int32),
        ("initial_count", c_int32),
        ("file_bytes", c_int32),
        ("local_bytes", c_int32),
        ("static_shared", c_int32),
        ("pad", c_int32),
    ]


class Buffer(Structure):  # noqa: D101
    _fields_ = [
        ("host", c_uint64),
        ("base", c_uint64),
        ("size", c_uint64),
        ("writable", c_int32),
        ("checked", c_int32),
        ("initialised", c_int32),
        ("pad", c_int32),
    ]


class Launch(Structure):  # noqa: D101
    _fields_ = [
        ("grid", c_uint32 * 3),
        ("block", c_uint32 * 3),
        ("cluster", c_uint32 * 3),
        ("dynamic_shared", c_uint32),
        ("order", c_int32),
        ("late", c_int32),
        ("check", c_int32),
        ("count", c_int32),
        ("seed", c_uint64),
        ("patience", c_uint64),
        ("buffer_count", c_int32),
        ("max_findings", c_int32),
        ("buffers", POINTER(Buffer)),
    ]


class Finding(Structure):  # noqa: D101
    _fields_ = [
        ("kind", c_char_p),
        ("instruction", c_int32),
        ("other_instruction", c_int32),
        ("block", c_int32),
        ("other_block", c_int32),
        ("thread", c_int32),
        ("other_thread", c_int32),
        ("space", c_int32),
        ("buffer", c_int32),
        ("offset", c_int64),
        ("count", c_uint64),
        ("detail", c_char * 160),
    ]


class Site(Structure):  # noqa: D101
    _fields_ = [
        ("executed", c_uint64),
        ("lanes", c_uint64),
        ("transfers", c_uint64),
        ("ideal", c_uint64),
    ]


def library() -> ctypes.CDLL:
    """The compiled library. Raises RuntimeError where it was not built."""
    if _library.LIBRARY is None:
        raise RuntimeError(f"the emulator needs the compiled library: {_library.WHY_NOT}")
    _library.LIBRARY.fastattn_emulator_operation.restype = c_char_p
    return _library.LIBRARY


@cache
def operations() -> dict[str, int]:
    """The operations of the runtime and their indices."""
    names: dict[str, int] = {}
    while (name := library().fastattn_emulator_operation(len(names))) is not None:
        names[name.decode()] = len(names)
    return names
