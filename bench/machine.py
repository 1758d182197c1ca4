"""The machine that the speeds belong to: what it is, and the limits measured on it."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import fastattn
from fastattn import _library

COPY_BYTES, PROBE_BYTES = 256 << 20, 64 << 20  # beyond any cache
PROBE_SECONDS = 2e-3


@dataclass(frozen=True)
class Machine:
    """Processor, versions, and the limits measured with `threads` threads."""

    processor: str
    cores: int
    threads: int
    isa: str  # the instruction set of fastattn's kernels
    torch: str
    fastattn: str
    python: str
    peak_gflops: float  # fp32
    peak_by: str  # how that was measured
    copy_gbs: float  # bytes read plus bytes written
    read_gbs: float


def survey(threads: int, *, seconds: float = 1.0) -> Machine:
    """Describe this machine and measure its limits for torch's current `threads` threads."""
    peak, peak_by = peak_gflops(threads, seconds)
    return Machine(
        processor=processor(),
        cores=cores(),
        threads=threads,
        isa=fastattn.isa() or "no compiled kernels",
        torch=torch.__version__,
        fastattn=fastattn.__version__,
        python=platform.python_version(),
        peak_gflops=peak,
        peak_by=peak_by,
        copy_gbs=copy_gbs(seconds),
        read_gbs=read_gbs(seconds),
    )


def peak_gflops(threads: int, seconds: float) -> tuple[float, str]:
    """fp32 GFLOP/s of independent multiply-adds in registers, and how they were measured.

    Without the compiled library a large matrix product stands in, which is less than the peak.
    """
    if _library.LIBRARY is not None:
        best = max(_library.LIBRARY.fastattn_fma_peak(threads, seconds / 4) for _ in range(4))
        return best, "FMA loop"
    size = 2048
    a, b = torch.randn(2, size, size)
    out = torch.empty(size, size)
    return 2e-9 * size**3 / fastest(lambda: torch.mm(a, b, out=out), seconds), "torch.mm"


def copy_gbs(seconds: float) -> float:
    """GB/s of copying memory to memory with torch's threads, counting both directions."""
    source = torch.ones(COPY_BYTES // 4)
    target = torch.zeros_like(source)
    return 2e-9 * COPY_BYTES / fastest(lambda: target.copy_(source), seconds)


def read_gbs(seconds: float) -> float:
    """GB/s of reading memory with torch's threads."""
    source = torch.ones(COPY_BYTES // 4)
    return 1e-9 * COPY_BYTES / fastest(source.sum, seconds)


def probe(bound: str, threads: int) -> Callable[[], float]:
    """What measures within milliseconds how fast the machine is now.

    bound: "arithmetic" in GFLOP/s, "copying" or "reading" in GB/s, as in `survey`.
    """
    if bound == "arithmetic":
        return lambda: peak_gflops(threads, PROBE_SECONDS)[0]
    source = torch.ones(PROBE_BYTES // 4)
    target = torch.zeros_like(source) if bound == "copying" else source
    call, passes = (source.sum, 1) if bound == "reading" else (lambda: target.copy_(source), 2)

    def rate() -> float:
        start = time.perf_counter()
        call()
        return 1e-9 * passes * PROBE_BYTES / (time.perf_counter() - start)

    return rate


def fastest(call: Callable[[], object], seconds: float) -> float:
    """The shortest time of a call within `seconds`, since a limit is what was ever reached."""
    call()
    best, end = float("inf"), time.perf_counter() + seconds
    while (start := time.perf_counter()) < end:
        call()
        best = min(best, time.perf_counter() - start)
    return best


def processor() -> str:
    """The processor's name as the system gives it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def cores() -> int:
    """The cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
