"""Times the GPU kernels beside PyTorch's and flash-attn's: `python -m bench.gpu`.

Each call is first held against float64, as `python -m bench` does it. Times are medians, of calls
that take turns, between CUDA events. None is known: this has not run on a GPU. `--emulated` does
all but the timing, with tiny sizes and CPU tensors, whose CUDA kernels run in the emulator.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

import fastattn
from bench import baselines, parity
from bench.cases import Attention, Case, Decode, FeedForward, Linear, Norm, Varlen
from bench.run import first_line
from bench.work import Work, differentiate

ROUNDS, CALLS = 20, 5  # how often each has its turn, and calls then

CASES: tuple[Case, ...] = tuple(
    replace(case, dtype="bfloat16", backward=backward)
    for case in (
        Attention(batch=4, heads=16, seq=4096, head_dim=64),
        Attention(batch=4, heads=16, seq=4096, head_dim=64, causal=True),
        Attention(batch=4, heads=16, seq=4096, head_dim=128, causal=True),
        Attention(batch=4, heads=16, seq=2048, head_dim=64, bias=True),
        Varlen(batch=8, heads=16, seq=2048, head_dim=64, causal=True),
        Decode(batch=8, heads=32, kv_heads=8, seq=8192, head_dim=128),
        Norm(kind="layer_norm", rows=16384, cols=4096),
        Norm(kind="add_rms_norm", rows=16384, cols=4096),
        Linear(rows=8192, width_in=768, width_out=3072, activation="gelu"),
        FeedForward(rows=8192, width=768, hidden=3072),
    )
    for backward in ((False,) if isinstance(case, Decode) else (False, True))
)


def forced(kernel: str, call: Callable[[], Any]) -> Callable[[], Any]:
    """The call on a kernel."""

    def run() -> Any:
        with fastattn.use_kernel(kernel):
            return call()

    return run


def flash(case: Attention, query, key, value, bias, mask) -> torch.Tensor:
    """flash-attn, which takes and gives [B, S, H, D]."""
    from flash_attn import flash_attn_func

    tensors = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return flash_attn_func(*tensors, causal=case.causal).transpose(1, 2)


def racers(case: Case, work: Work, kernels: Sequence[str]) -> dict[str, Callable[[], Any]]:
    """The calls of a case by name: fastattn's kernels first."""
    fused = work.calls["fused"]
    calls = {kernel: forced(kernel, fused) for kernel in kernels}
    calls |= {name: call for name, call in work.calls.items() if name != "fused"}
    if isinstance(case, Attention) and not case.bias and importlib.util.find_spec("flash_attn"):
        _, inputs, cotangents = fused.args
        flashed = functools.partial(flash, case)
        calls["flash-attn"] = functools.partial(differentiate, flashed, inputs, cotangents)
    return calls


def milliseconds(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """The median of each on the GPU's own clock."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(CALLS):
                call()
            end.record()
            end.synchronize()
            times[name].append(begin.elapsed_time(end) / CALLS)
    return {name: statistics.median(each) for name, each in times.items()}


def race(case: Case, device: str, kernels: Sequence[str]) -> tuple[dict[str, str], bool]:
    """What is to be said of each call of a case, and whether all of fastattn's match."""
    with torch.device(device):
        work = baselines.build(case)
        calls, said = racers(case, work, kernels), {}
        for name, call in list(calls.items()):
            try:
                verdict = parity.judge(work, "fused", call(), getattr(torch, case.dtype))
                said[name] = "matches" if verdict.matches else str(verdict)
            except Exception as error:  # whatever a call raises is its result
                said[name] = first_line(error)
            if said[name] != "matches":
                del calls[name]
        sound = all(kernel in calls for kernel in kernels)
        if device == "cuda":
            said |= {name: f"{time:.3f} ms" for name, time in milliseconds(calls).items()}
    return said, sound


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a line for each call of each case; 1 where one of fastattn's does not match."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--emulated", action="store_true", help="in the emulator, without times")
    emulated = parser.parse_args(arguments).emulated
    if not emulated and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device: --emulated shows that this works")
    status = 0
    for case in CASES:
        if emulated:
            said, sound = race(replace(case, **case.tiny), "cpu", ["emulator"])
        else:
            said, sound = race(case, "cuda", ["cuda", "triton"])
        status |= not sound
        print(case.name, *(f"  {name}: {words}" for name, words in said.items()), sep="\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
