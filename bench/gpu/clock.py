"""The clock of a race on a GPU: calls take turns, and each is summed up by its median and spread.

A call is captured into a CUDA graph, as often as fills it, and the replays are timed between CUDA
events: launched from Python one by one, short kernels would wait for Python. What cannot be
captured is called between the events instead. What a call costs Python is on Python's own clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, cuda

from bench.gpu.rows import EVENTS, GRAPH, PYTHON
from bench.measure import Timing, summarise
from bench.run import first_line

ROUNDS = 11
FULL, MOST = 0.5e-3, 20  # seconds of calls that fill a graph, and how many it holds at most
SAMPLE = {GRAPH: 2e-3, EVENTS: 2e-3, PYTHON: 10e-3}  # seconds that a sample should last at least

Call = Callable[[], Any]


@dataclass
class Lane:
    """One call in a race: `repeat(n)` makes n times `calls` of it."""

    repeat: Callable[[int], None]
    timed: str  # graph, events, python
    calls: int = 1
    note: str = ""  # why there is no graph
    result: Sequence[Tensor] | None = None  # of the last call, which a replay writes anew
    repeats: int = 1  # in a sample
    samples: list[float] = field(default_factory=list)  # seconds

    def start(self) -> None:
        """Warm up, and find how many calls fill a sample."""
        self.repeat(1)
        self.repeats = max(1, round(SAMPLE[self.timed] / max(self.seconds(1), 1e-6)))

    def sample(self) -> None:
        self.samples.append(self.seconds(self.repeats))

    def seconds(self, times: int) -> float:
        if self.timed == PYTHON:
            return python_seconds(self.repeat, times)
        return gpu_seconds(self.repeat, times)

    @property
    def timing(self) -> Timing:
        return summarise(self.samples, self.repeats * self.calls)


def gpu_seconds(repeat: Callable[[int], None], times: int) -> float:
    """Between two events on the current stream."""
    begin, end = (cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    repeat(times)
    end.record()
    end.synchronize()
    return 1e-3 * begin.elapsed_time(end)


def python_seconds(repeat: Callable[[int], None], times: int) -> float:
    """Until all has been launched and the GPU is done."""
    cuda.synchronize()
    begin = time.perf_counter()
    repeat(times)
    cuda.synchronize()
    return time.perf_counter() - begin


def race(prepare: dict[str, Callable[[], Lane]]) -> dict[str, Lane | str]:
    """Let all that can be prepared take turns; the others, and those that fail, say why."""
    lanes: dict[str, Lane] = {}
    failed: dict[str, str] = {}
    for name, prepared in prepare.items():
        try:
            lane = prepared()
            lane.start()
            lanes[name] = lane
        except Exception as error:  # whatever a call raises is its result
            failed[name] = first_line(error)
    for done in range(ROUNDS):
        order = list(lanes)
        lead = done % max(1, len(order))
        for name in order[lead:] + order[:lead]:
            try:
                lanes[name].sample()
            except Exception as error:
                failed[name] = first_line(error)
                del lanes[name]
    return lanes | failed


def on_gpu(calls: dict[str, Call]) -> dict[str, Lane | str]:
    """How long the GPU works on each call, or why that is not known.

    The current stream must not be the default one, which cannot be captured.
    """
    return race({name: lambda call=call: captured(call) for name, call in calls.items()})


def captured(call: Call) -> Lane:
    """A lane for a graph of the call, or for the call itself where there can be none."""

    def repeat(times: int) -> None:
        for _ in range(times):
            call()

    repeat(2)  # the first may compile, load and choose
    calls = min(MOST, max(1, round(FULL / max(gpu_seconds(repeat, 2) / 2, 1e-6))))
    try:
        graph, result = capture(call, calls)
    except Exception as error:
        return Lane(repeat, EVENTS, note=f"without a graph: {first_line(error)}")

    def replay(times: int) -> None:
        for _ in range(times):
            graph.replay()

    return Lane(replay, GRAPH, calls, result=result)


def capture(call: Call, calls: int) -> tuple[cuda.CUDAGraph, Any]:
    """A graph of that many calls, and what the last of them returns."""
    graph, stream = cuda.CUDAGraph(), cuda.current_stream()
    generator = cuda.default_generators[cuda.current_device()]
    state = generator.clone_state()
    try:
        with cuda.stream(stream), cuda.graph(graph, stream=stream):
            for _ in range(calls):
                result = call()
    except Exception:
        generator.graphsafe_set_state(state)  # it would wait for the graph's end for ever
        raise
    return graph, result


def in_python(
    calls: dict[str, tuple[Callable[[], AbstractContextManager], Call]],
) -> dict[str, Lane | str]:
    """How long each call takes from Python, inside its context, one launched after the other."""
    return race({name: lambda pair=pair: launched(*pair) for name, pair in calls.items()})


def launched(context: Callable[[], AbstractContextManager], call: Call) -> Lane:
    """A lane for the call without gradients."""

    def repeat(times: int) -> None:
        with torch.no_grad(), context():
            for _ in range(times):
                call()

    repeat(20)
    return Lane(repeat, PYTHON)
