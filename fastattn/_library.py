"""Finds, loads and describes the compiled library, libfastattn.so."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import torch

PATH = Path(__file__).with_name("libfastattn.so")


def _load() -> tuple[ctypes.CDLL | None, str]:
    if not PATH.exists():
        return None, "libfastattn.so was not built: run `pip install .` in the source tree"
    try:
        torch.ops.load_library(PATH)
    except OSError as error:
        return None, f"libfastattn.so does not load under torch {torch.__version__}: {error}"
    library = ctypes.CDLL(str(PATH))
    for name, result, arguments in (
        ("fastattn_isa_name", ctypes.c_char_p, [ctypes.c_int]),
        ("fastattn_isa_supported", ctypes.c_int, [ctypes.c_int]),
        ("fastattn_isa_current", ctypes.c_int, []),
        ("fastattn_isa_select", ctypes.c_int, [ctypes.c_int]),
        ("fastattn_isa_last_run", ctypes.c_int, []),
        ("fastattn_poison_scratch", None, [ctypes.c_int]),
        ("fastattn_fma_peak", ctypes.c_double, [ctypes.c_int, ctypes.c_double]),
        ("fastattn_build_info", ctypes.c_char_p, []),
        (
            "fastattn_cuda_ptx",
            ctypes.c_void_p,
            [ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(ctypes.c_int64)],
        ),
        ("fastattn_emulate", None, [ctypes.c_void_p, ctypes.c_int]),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library, ""


LIBRARY, WHY_NOT = _load()


def ptx(room: str, kernel: str | None = None) -> str:
    """The PTX of a room's CUDA kernels, or of one; empty where the library was built without."""
    size = ctypes.c_int64()
    name = kernel and kernel.encode()
    text = LIBRARY and LIBRARY.fastattn_cuda_ptx(room.encode(), name, ctypes.byref(size))
    return ctypes.string_at(text, size.value).decode() if text else ""


WHY_NO_CUDA = WHY_NOT or ("" if ptx("norm") else "the library was built without nvcc")


def isas() -> dict[str, bool]:
    """Every ISA compiled into the library, and whether this machine can run it."""
    names: dict[str, bool] = {}
    index = 0
    while LIBRARY is not None and (name := LIBRARY.fastattn_isa_name(index)) is not None:
        names[name.decode()] = bool(LIBRARY.fastattn_isa_supported(index))
        index += 1
    return names


def _runnable() -> list[str]:
    return [name for name, supported in isas().items() if supported]


def isa() -> str | None:
    """The ISA that the CPU kernels run on now; None without a compiled library."""
    return None if LIBRARY is None else list(isas())[LIBRARY.fastattn_isa_current()]


def last_isa() -> str | None:
    """The ISA of the kernel body that ran last; None when none has run yet."""
    ran = -1 if LIBRARY is None else LIBRARY.fastattn_isa_last_run()
    return None if ran < 0 else list(isas())[ran]


def select_isa(name: str) -> None:
    """Run the CPU kernels on ISA `name` from now on.

    Raises ValueError when the library lacks it or this machine cannot run it.
    """
    if name not in _runnable():
        raise ValueError(f"name must be an ISA of {_runnable()} on this machine, got {name!r}")
    LIBRARY.fastattn_isa_select(list(isas()).index(name))


def build_info() -> str:
    """Compiler, flags and torch ABI target of the library; why there is none otherwise."""
    return WHY_NOT if LIBRARY is None else LIBRARY.fastattn_build_info().decode()


if LIBRARY is not None and LIBRARY.fastattn_isa_current() < 0:
    raise ValueError(
        f"FASTATTN_ISA must be one of {_runnable()} on this machine, "
        f"got {os.environ['FASTATTN_ISA']!r}"
    )
