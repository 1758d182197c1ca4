"""One race from start to end: build, check, time in turns, check again, weigh the memory."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from bench import baselines, measure, memory, parity, rows
from bench.kinds import Case
from bench.machine import Machine, probe
from bench.parity import Verdict
from bench.rows import Row
from bench.work import COMPILED, OWN_THREADS, UnavailableError, Work, kernels_used


@dataclass(frozen=True)
class Settings:
    """How thoroughly to measure."""

    seconds: float = 4.0  # of timing per case
    rounds: int = 5  # at least
    compiled: bool = False
    memory: bool = True


def race(
    case: Case,
    machine: Machine,
    settings: Settings,
    tick: Callable[[float], None] = lambda done: None,
) -> list[Row]:
    """One row per provider. A provider whose result does not match gets no speed.

    `tick` hears the fraction of the case that is done.
    """
    limits = {k: v for k, v in dataclasses.asdict(machine).items() if k in rows.KINDS}

    def row(provider: str, status: str, note: str = "", **measured: object) -> Row:
        return Row(
            case=case.name,
            group=case.group,
            title=case.title,
            shape=case.shape,
            passes=case.passes,
            dtype=case.dtype,
            provider=provider,
            status=status,
            note=note,
            **limits,
            **measured,
        )

    torch.set_num_threads(machine.threads)
    if settings.compiled:
        torch.compiler.reset()
    try:
        work = baselines.build(case, compiled=settings.compiled)
    except UnavailableError as missing:
        return [row("fused", rows.LEFT_OUT, str(missing))]
    except Exception as error:  # the other cases are raced all the same
        return [row("fused", rows.FAILED, first_line(error))]
    left_out = dict(work.left_out)
    if case.eager_bytes > 0.7 * memory.available():
        left_out["eager"] = f"needs {case.eager_bytes / 1e9:.0f} GB of memory"
    found: dict[str, Row] = {p: row(p, rows.LEFT_OUT, why) for p, why in left_out.items()}
    verdicts: dict[str, Verdict] = {}
    notes: dict[str, str] = {}
    firsts: dict[str, float] = {}  # seconds
    dtype = getattr(torch, case.dtype)
    for provider in work.calls:
        if provider in left_out:
            continue
        try:
            with kernels_used() as kernels:
                start = time.perf_counter()
                result = parity.run(work, provider)
                firsts[provider] = time.perf_counter() - start
        except Exception as error:  # whatever a provider raises is its result
            status = rows.LEFT_OUT if provider in COMPILED else rows.FAILED
            found[provider] = row(provider, status, first_line(error))
            continue
        notes[provider] = "; ".join(f"{op}: {kernel}" for op, kernel in kernels.items())
        verdicts[provider] = parity.judge(work, provider, result, dtype)
        del result
    timed = {p: work.calls[p] for p, verdict in verdicts.items() if verdict.matches}
    tick(0.2)
    limited_by = bound(case, work)
    rate = probe(limited_by, machine.threads) if limited_by else None
    reached: list[float] = []  # of the limit, in each round

    def between(done: float) -> None:
        if rate:
            reached.append(rate())
        tick(0.2 + 0.6 * done)

    timings, last = measure.interleave(
        timed,
        seconds=settings.seconds,
        rounds=(settings.rounds, 1000),
        rest=measure.REST if any(p in OWN_THREADS for p in timed) else 0.0,
        tick=between,
    )
    tick(0.8)
    with ThreadPoolExecutor(1) as aside:  # nothing is timed any more
        weighed = [p for p in timed if p not in COMPILED] if settings.memory else []
        peaks = aside.submit(memory.peak_growth, case, weighed, machine.threads)
        for provider in timed:  # the timed calls themselves; dropout's draw cannot be repeated
            result = parity.run(work, provider) if work.random else last.pop(provider)
            verdicts[provider] = parity.judge(work, provider, result, dtype)
            del result
    for provider, verdict in verdicts.items():
        judged = {
            "error": verdict.error,
            "eager_error": verdict.eager_error,
            "allowed": verdict.allowed,
            "judged": verdict.where,
        }
        if not verdict.matches:
            found[provider] = row(provider, rows.MISMATCH, str(verdict), **judged)
            continue
        peak = peaks.result().get(provider)
        found[provider] = row(
            provider,
            rows.OK,
            notes[provider],
            **judged,
            first_ms=1e3 * firsts[provider],
            **speed(case, work, timings[provider], statistics.median(reached) if rate else None),
            peak_mb=None if peak is None else peak / 1e6,
        )
    tick(1.0)
    order = [*work.calls, *left_out]
    return sorted(found.values(), key=lambda r: order.index(r.provider))


def bound(case: Case, work: Work) -> str | None:
    """What limits the speed of a case, as `machine.probe` names it; None where it has no rate."""
    if work.flops or case.flops:
        return "arithmetic"
    if work.traffic or case.traffic:
        return "reading" if case.reads else "copying"
    return None


def speed(case: Case, work: Work, timing: measure.Timing, limit: float | None) -> dict[str, object]:
    """The columns of a row that follow from its timing, and from its bound in 1e9 per second."""
    gflops = (work.flops or case.flops) / timing.median / 1e9 or None
    gbs = (work.traffic or case.traffic) / timing.median / 1e9 or None
    rate = gflops or gbs
    return {
        "median_ms": 1e3 * timing.median,
        "p20_ms": 1e3 * timing.p20,
        "p80_ms": 1e3 * timing.p80,
        "samples": timing.samples,
        "calls_per_sample": timing.calls,
        "gflops": gflops,
        "gbs": gbs,
        "limit": limit,
        "of_limit": rate / limit if rate and limit else None,
    }


def first_line(error: Exception) -> str:
    """An exception's kind and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
