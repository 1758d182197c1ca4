"""Compiles the Triton kernels of a race ahead, on all cores: one after the other takes minutes.

Each process makes one call of a case; what Triton compiles for it stays in its cache on disk.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress

import torch

from bench.gpu import providers
from bench.kinds import Case

PROCESSES = 12  # of half a gigabyte of GPU memory each, beside what a case needs


def compile_all(
    cases: Sequence[Case],
    tick: Callable[[], None],
    device: str = "cuda",
    kernel: str = "triton",
) -> None:
    """Have every case compiled; `tick` hears of each that is done. What fails, the race tells."""
    count = min(PROCESSES, os.cpu_count() or 1, len(cases))
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    with suppress(BrokenProcessPool), ProcessPoolExecutor(count, context) as pool:
        jobs = [pool.submit(compile_one, case, device, kernel) for case in cases]
        for done in as_completed(jobs):
            done.exception()
            tick()


def compile_one(case: Case, device: str, kernel: str) -> None:
    """Make one call, forward and backward if the case has it, and forget the result."""
    with torch.device(device):
        providers.build(case, [kernel]).calls[kernel]()
    if device == "cuda":
        torch.cuda.empty_cache()
