"""The clock: calls take turns in one process, and each is summed up by its median and spread."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

WARM_UP = 0.1  # seconds each, and at least two calls: weights get packed, code gets compiled
SAMPLE = 2e-3  # seconds that one sample should last at least, for the clock's sake
REST = 0.02  # seconds before a sample, where threads of the call before may still spin


@dataclass(frozen=True)
class Timing:
    """Seconds per call over `samples` samples of `calls` calls each."""

    median: float
    p20: float
    p80: float
    samples: int
    calls: int


def summarise(samples: Sequence[float], calls: int) -> Timing:
    """Median, 20th and 80th percentile of seconds per sample, turned into seconds per call."""
    fifths = statistics.quantiles(samples, n=5, method="inclusive")
    return Timing(
        median=statistics.median(samples) / calls,
        p20=fifths[0] / calls,
        p80=fifths[3] / calls,
        samples=len(samples),
        calls=calls,
    )


def warm_up(call: Callable[[], Any], seconds: float = WARM_UP) -> int:
    """Call until `seconds` have passed, at least twice; how many calls then fill one sample."""
    end = time.perf_counter() + seconds
    call()
    while True:
        start = time.perf_counter()
        call()
        now = time.perf_counter()
        if now >= end:
            return max(1, round(SAMPLE / (now - start)))


def interleave(
    calls: dict[str, Callable[[], Any]],
    *,
    seconds: float,
    rounds: tuple[int, int] = (5, 1000),
    rest: float = 0.0,
    tick: Callable[[float], None] = lambda done: None,
) -> tuple[dict[str, Timing], dict[str, Any]]:
    """Time `calls` in turns for about `seconds`, within a least and a greatest number of rounds.

    Each round takes one sample of every call, starting with another one each time, so that a
    disturbance or a change of the clock rate meets all alike; each follows a rest of so many
    seconds. `tick` hears the fraction done.
    Returns the timings, and what each call returned last.
    """
    if not calls:
        return {}, {}
    per_sample = {name: warm_up(call) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    results: dict[str, Any] = {}
    order = list(calls)
    least, most = rounds
    collecting = gc.isenabled()
    gc.disable()
    try:
        start = time.perf_counter()
        for done in range(most):
            elapsed = time.perf_counter() - start
            if done >= least and elapsed >= seconds:
                break
            tick(min(max(elapsed / seconds, 0.0), done / least, 1.0))
            for name in order:
                call = calls[name]
                results.pop(name, None)  # freed here, not on the clock
                time.sleep(rest)
                begin = time.perf_counter()
                for _ in range(per_sample[name]):
                    result = call()
                samples[name].append(time.perf_counter() - begin)
                results[name] = result
                del result
            order.append(order.pop(0))
    finally:
        if collecting:
            gc.enable()
    return {name: summarise(samples[name], per_sample[name]) for name in calls}, results
