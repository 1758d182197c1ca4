"""Long runs, threads and processes: memory stays, and forks and DataLoader workers compute."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from fastattn import testing

CASES = list({case.function: case for case in testing.all_cases() if not case.refused}.values())

# Each function forward and backward, on sizes that take microseconds.
CALLS = """
import os, resource, sys, torch, fastattn
from fastattn.testing import Case, Draw, run
qkv = {name: Draw((1, 2, 5, 8)) for name in ("query", "key", "value")}
x, square = Draw((3, 8)), Draw((8, 8))
CASES = [
    Case("attention", "small", qkv | {"bias": Draw((2, 5, 5))}, {"dropout_p": 0.1, "seed": 1}),
    Case("additive_attention", "small", qkv | {"weight": Draw((8,))}),
    Case("add_layer_norm", "small", {"input": x, "residual": x}, {"normalized_shape": [8]}),
    Case("rms_norm", "small", {"input": x, "weight": Draw((8,))}, {"normalized_shape": [8]}),
    Case("linear", "small", {"input": x, "weight": square}, {"activation": "gelu"}),
    Case("ffn", "small", {"input": x, "up_weight": square, "down_weight": square}),
    Case(
        "linear_cross_entropy",
        "small",
        {"input": x, "linear_weight": square, "target": Draw((3,), "numbers", (1, 7, 2))},
    ),
]
INPUTS = [case.inputs(torch.float32) for case in CASES]

def results():
    found = []
    for case, inputs in zip(CASES, INPUTS):
        found += run(case, inputs, "cpu").values()
    return found
"""

MEMORY = """
def resident():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize()

def rounds(calls):
    for _ in range(calls // len(CASES)):
        results()

torch.set_num_threads(1)
rounds(15000)  # until the heap has its holes
before = resident()
rounds(10000)
grown = [resident() - before]
kept = []
for _ in range(200):  # what the check must see: 16 KiB kept per round
    results()
    kept.append(torch.ones(4096))
grown.append(resident() - before)
print(*grown)
"""

FORK = """
torch.set_num_threads(2)
expected_results = results()
big = torch.randn(1, 8, 300, 64)
expected = fastattn.attention(big, big, big)  # on the threads of the parent
children = []
for _ in range(2):
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # as a DataLoader's worker does: libgomp has no threads here
        same = all(a.equal(b) for a, b in zip(results(), expected_results))
        os._exit(0 if same and fastattn.attention(big, big, big).equal(expected) else 1)
    children.append(child)
codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
assert fastattn.attention(big, big, big).equal(expected)  # and the parent goes on
print(*codes)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_memory_does_not_grow(python: Callable) -> None:
    """10,000 calls, forward and backward; and the check sees results that are kept."""
    found = python("-c", CALLS + MEMORY)
    assert found.returncode == 0, found.stderr
    grown, with_leak = map(int, found.stdout.split())
    assert grown < 1 << 18  # 26 bytes a call: less than one string takes
    assert with_leak > 2 << 20


FIRST = """
import statistics, time, torch
from fastattn.models.gpt2 import GPT2, GPT2Config
torch.set_num_threads(1)
model = GPT2(GPT2Config(n_layer=2, vocab_size=1000)).eval()
times = []
with torch.no_grad():
    for _ in range(8):
        start = time.perf_counter()
        model(torch.arange(192)[None])
        times.append(time.perf_counter() - start)
print(times[0] / statistics.median(times[1:]))
"""


def test_the_first_call_takes_hardly_longer(python: Callable) -> None:
    """The best of a few processes: on a machine with other work any one call may be late."""
    ratios = []
    while not ratios or (ratios[-1] > 1.5 and len(ratios) < 5):
        done = python("-c", FIRST)
        assert done.returncode == 0, done.stderr
        ratios.append(float(done.stdout))
    assert ratios[-1] <= 1.5, ratios


def test_gradients_from_several_threads() -> None:
    """Each thread of Python runs forward and backward, each of them on threads of its own."""
    inputs = [case.inputs(torch.float32) for case in CASES]
    alone = [testing.run(case, given) for case, given in zip(CASES, inputs, strict=True)]
    with ThreadPoolExecutor(4) as pool:
        order = [*range(len(CASES))] * 6
        for i, found in zip(
            order, pool.map(lambda i: testing.run(CASES[i], inputs[i]), order), strict=True
        ):
            for name, tensor in found.items():
                assert tensor.equal(alone[i][name]), f"{CASES[i].id} {name}"


def test_works_after_fork(python: Callable) -> None:
    found = python("-c", CALLS + FORK)
    assert found.returncode == 0, found.stderr
    assert found.stdout.split() == ["0", "0"]


class Attended(torch.utils.data.Dataset):
    """Items that are computed by the ops, gradients too, in whatever process asks for them."""

    def __len__(self) -> int:
        return len(CASES)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return testing.run(CASES[index], CASES[index].inputs(torch.float32), "cpu")


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_works_in_dataloader_workers(context: str) -> None:
    items = [Attended()[i] for i in range(len(CASES))]
    loader = torch.utils.data.DataLoader(
        Attended(), batch_size=None, num_workers=2, multiprocessing_context=context, timeout=100
    )
    for found, expected in zip(loader, items, strict=True):
        for name, tensor in found.items():
            assert tensor.equal(expected[name]), name
