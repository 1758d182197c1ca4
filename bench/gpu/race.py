"""One race on a GPU from start to end: build, check, time in turns, check again.

Every call is held against float64 before it is timed, and once more by what the last replay of its
graph has written. The oracle runs on the GPU too, attention's one head after the other.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastattn
from bench import parity
from bench.gpu import clock, providers
from bench.gpu.clock import Lane
from bench.gpu.machine import Machine
from bench.gpu.rows import KERNELS, Row
from bench.kinds import Case
from bench.parity import Verdict
from bench.rows import FAILED, LEFT_OUT, MISMATCH, OK
from bench.run import first_line
from bench.work import Work

Clock = Callable[[Case, Work, Sequence[str]], dict[str, Lane | str]]


class Outcome(NamedTuple):
    """What becomes of a provider: its status, the reason for it, and the verdict if there is one.

    A rival that raises is left out, and so is a kernel of fastattn that refuses a call in words;
    any other error of fastattn's is a failure.
    """

    status: str
    note: str = ""
    verdict: Verdict | None = None

    @classmethod
    def raised(cls, provider: str, error: Exception) -> Outcome:
        excused = provider not in KERNELS or isinstance(error, fastattn.UnavailableKernelError)
        return cls(LEFT_OUT if excused else FAILED, first_line(error))


def race(
    group: str,
    case: Case,
    machine: Machine,
    names: Sequence[str],
    device: str,
    measure: Clock | None,
) -> list[Row]:
    """One row per provider that can take part. One whose result does not match gets no speed.

    Without `measure`, which takes providers and times them, no one gets a speed.
    """
    try:
        with torch.device(device):
            work = providers.build(case, names)
    except Exception as error:  # whatever a case raises is its result
        outcomes = {name: Outcome.raised(name, error) for name in names if name in KERNELS}
        return rows(group, case, machine, outcomes, {})
    outcomes = {name: check(case, work, name, device) for name in work.calls}
    right = [name for name, outcome in outcomes.items() if outcome.status == OK]
    try:
        lanes = measure(case, work, right) if measure else {}
    except Exception as error:
        lanes = dict.fromkeys(right, first_line(error))
    for name, lane in lanes.items():
        if isinstance(lane, str):
            outcomes[name] = Outcome(FAILED if name in KERNELS else LEFT_OUT, lane)
        else:  # dropout's draw cannot be repeated in a graph
            outcomes[name] = check(case, work, name, device, None if work.random else lane.result)
    return rows(group, case, machine, outcomes, lanes)


def check(
    case: Case, work: Work, name: str, device: str, result: Sequence[Tensor] | None = None
) -> Outcome:
    """Hold a result, or that of a call made now, against float64."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            with torch.device(device):
                found = parity.run(work, name) if result is None else result
                verdict = parity.judge(work, name, found, getattr(torch, case.dtype))
        except Exception as error:
            outcome = Outcome.raised(name, error)
            reasons = refusals(told) if name.startswith("sdpa") else []
            return outcome._replace(note="; ".join(reasons) or outcome.note)
    if verdict.matches:
        return Outcome(OK, verdict=verdict)
    return Outcome(MISMATCH, str(verdict), verdict)


def refusals(warned: Iterable[warnings.WarningMessage]) -> list[str]:
    """Why a backend of SDPA refuses, of which it warns.

    Without the headings, the backends that were not asked, and the place in PyTorch's source.
    """
    texts = [str(each.message).split(" (Triggered internally")[0].rstrip(". ") for each in warned]
    empty = re.compile(r"because:$|runtime disabled$")
    return list(dict.fromkeys(text for text in texts if not empty.search(text)))


def rows(
    group: str,
    case: Case,
    machine: Machine,
    outcomes: dict[str, Outcome],
    lanes: dict[str, Lane | str],
) -> list[Row]:
    """What there is to say about each provider."""
    made = []
    for name, (status, note, verdict) in outcomes.items():
        measured: dict[str, Any] = {}
        if verdict is not None:
            measured["error"], measured["eager_error"] = verdict.error, verdict.eager_error
            measured["allowed"], measured["judged"] = verdict.allowed, verdict.where
        if status == OK and name in lanes:
            measured |= speed(case, lanes[name])
            note = lanes[name].note
        row = Row(
            group=group,
            case=case.name,
            title=case.title,
            shape=case.shape,
            passes=case.passes,
            dtype=case.dtype,
            provider=name,
            status=status,
            note=note,
            **measured,
            **dataclasses.asdict(machine),
        )
        made.append(row)
    return made


def speed(case: Case, lane: Lane) -> dict[str, object]:
    """The columns of a row that follow from its timing."""
    timing = lane.timing
    return {
        "timed": lane.timed,
        "median_ms": 1e3 * timing.median,
        "p20_ms": 1e3 * timing.p20,
        "p80_ms": 1e3 * timing.p80,
        "samples": timing.samples,
        "calls_per_sample": timing.calls,
        "tflops": 1e-12 * case.flops / timing.median or None,
        "gbs": 1e-9 * case.traffic / timing.median or None,
    }


def on_gpu(case: Case, work: Work, names: Sequence[str]) -> dict[str, Lane | str]:
    """The time that the calls need on the GPU."""
    return clock.on_gpu({name: work.calls[name] for name in names})


def in_python(case: Case, work: Work, names: Sequence[str]) -> dict[str, Lane | str]:
    """The time that launching their functions takes, of small inputs drawn once more."""
    with torch.device("cuda"):
        bare = providers.bare(case, names)
    return clock.in_python(bare)
