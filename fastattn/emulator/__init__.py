"""Runs NVIDIA PTX on the CPU, with the checks that hardware lacks.

    kernel = fastattn.emulator.load("kernel.ptx")["layer_norm"]
    report = kernel.check((rows,), (256,), x, weight, bias, out, columns, 1e-5)
    print(report, report.counters)

Every instruction is executed for a warp at a time by an interpreter in the compiled library, so
neither a GPU nor a compiler is needed. Data races within and between blocks, reads of shared
memory that nobody wrote, accesses out of bounds or misaligned, asynchronous copies that nobody
waited for, divergent or mismatched barriers and deadlocks are reported with the line of the PTX and
of the source (`nvcc -lineinfo`), the block, the thread and the address.
"""

from fastattn.emulator.launch import Kernel, Memory, Module, load
from fastattn.emulator.ptx import PtxError
from fastattn.emulator.report import Counters, EmulatorError, Finding, Report
from fastattn.emulator.tensor_map import TensorMap

__all__ = [
    "Counters",
    "EmulatorError",
    "Finding",
    "Kernel",
    "Memory",
    "Module",
    "PtxError",
    "Report",
    "TensorMap",
    "load",
]
