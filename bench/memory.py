"""Peak memory: what a call adds to the resident memory of a fresh process.

A child process, forked from a server that has computed nothing yet, loads the code with a tiny
case, builds the inputs, resets its high-water mark and makes one call; the mark's growth counts
all that the call touched: outputs, gradients, scratch, packed weights, inside torch or not.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import multiprocessing
import os
import sys
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

from bench.kinds import Case

TIMEOUT = 300.0  # seconds
PRELOAD = ["bench.baselines", "bench.models", "transformers.models.bert.modeling_bert"]

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt


def why_not() -> str | None:
    """Why peak memory cannot be measured here, in one sentence; None where it can."""
    if not Path("/proc/self/clear_refs").exists():
        return f"peak memory is not measured on {sys.platform}: it needs Linux's /proc"
    return None


def prepare() -> None:
    """Start the server, and import here what it imports, each on a core of its own.

    Nothing that is timed should run beside it.
    """
    context = _context()
    waits = context.Process(target=os.getpid, daemon=True)  # for the server to be ready
    waits.start()
    for name in PRELOAD:
        with contextlib.suppress(ImportError):  # what a case needs, it asks for in words
            importlib.import_module(name)
    waits.join()


def _context() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


def peak_growth(case: Case, providers: list[str], threads: int) -> dict[str, float]:
    """Bytes that one call of each provider adds at its peak; without those whose child failed.

    The children run at the same time: none of them is timed.
    """
    context = _context()
    children = {}
    for provider in providers:
        receiver, sender = context.Pipe(duplex=False)
        arguments = (case, provider, threads, sender)
        child = context.Process(target=_measure, args=arguments, daemon=True)
        child.start()
        sender.close()
        children[provider] = child, receiver
    found = {}
    for provider, (child, receiver) in children.items():
        with contextlib.suppress(EOFError):
            if receiver.poll(TIMEOUT):
                found[provider] = receiver.recv()
        child.kill()
        child.join()
    return found


def _measure(case: Case, provider: str, threads: int, sender: Connection) -> None:
    import torch

    from bench import baselines

    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        torch.set_num_threads(threads)
        baselines.build(replace(case, **case.tiny)).calls[provider]()
        libc = ctypes.CDLL(None)
        with contextlib.suppress(AttributeError):  # other C libraries than glibc
            # from now on freed memory goes back at once: what is resident is what is in use
            libc.mallopt(M_MMAP_THRESHOLD, 1 << 16)
            libc.mallopt(M_TRIM_THRESHOLD, 1 << 16)
        call = baselines.build(case).calls[provider]
        gc.collect()
        with contextlib.suppress(AttributeError):
            libc.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the mark falls to what is resident now
        before = _high_water()
        result = call()
        sender.send(_high_water() - before)
        del result


def available() -> float:
    """Bytes of memory that are available now; infinite where the system does not tell."""
    try:
        return _kilobytes("/proc/meminfo", "MemAvailable:")
    except OSError:
        return float("inf")


def _high_water() -> float:
    return _kilobytes("/proc/self/status", "VmHWM:")


def _kilobytes(path: str, name: str) -> float:
    for line in Path(path).read_text().splitlines():
        if line.startswith(name):
            return 1024.0 * int(line.split()[1])
    raise OSError(f"{path} has no {name}")
