"""The GPU that the speeds belong to: what it is, and the limits measured on it."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import subprocess
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import cuda

import fastattn
from bench.gpu.clock import gpu_seconds

SIZE = 8192  # of a square matrix, far larger than any cache


@dataclass(frozen=True)
class Machine:
    """The GPU, versions, the day, and the limits measured; None where there is no GPU."""

    gpu: str
    driver: str
    torch: str = torch.__version__
    triton: str = ""
    fastattn: str = fastattn.__version__
    python: str = platform.python_version()
    date: str = ""
    product_tflops: float | None = None  # of two matrices in bf16
    copy_gbs: float | None = None  # bytes read plus bytes written


EMULATOR = Machine(gpu="in the emulator", driver="")


def survey() -> Machine:
    """Describe the current GPU and measure its limits."""
    return Machine(
        gpu=cuda.get_device_name(),
        driver=driver(),
        triton=version("triton"),
        date=datetime.date.today().isoformat(),
        product_tflops=product_tflops(),
        copy_gbs=copy_gbs(),
    )


def driver() -> str:
    """The version of NVIDIA's driver; empty where its tool does not tell."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.split("\n")[0].strip()


def version(package: str) -> str:
    """That of a package; empty where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def product_tflops() -> float:
    """bf16 TFLOP/s of a large matrix product by cuBLAS."""
    left, right = torch.randn(2, SIZE, SIZE, dtype=torch.bfloat16, device="cuda")
    out = torch.empty_like(left)
    return 2e-12 * SIZE**3 / fastest(lambda: torch.mm(left, right, out=out))


def copy_gbs() -> float:
    """GB/s of copying memory to memory, counting both directions."""
    source = torch.randn(4, SIZE, SIZE, dtype=torch.float32, device="cuda")
    target = torch.empty_like(source)
    return 2e-9 * source.nbytes / fastest(lambda: target.copy_(source))


def fastest(call: Callable[[], object]) -> float:
    """The shortest time of a call, since a limit is what was ever reached."""
    return min(gpu_seconds(lambda times: call(), 1) for _ in range(20))
