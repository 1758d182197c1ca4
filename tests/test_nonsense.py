"""Nonsense handed to the torch ops behind the public functions' back crashes nothing."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

import pytest

FUZZ = """
import collections, random, torch, fastattn
from fastattn import registry, testing
from torch.utils._python_dispatch import TorchDispatchMode

random.seed({seed})
torch.manual_seed({seed})
calls = []

class Recorder(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastattn":
            calls.append((func, [a.detach() if isinstance(a, torch.Tensor) else a for a in args]))
        return func(*args, **(kwargs or {{}}))

plain = collections.Counter()

def recorded(op, *args):
    if plain[op] < 6:
        plain[op] += 1
        calls.append((op.run, list(args)))
    return tried(op, *args)

tried = registry.PlainOp.__call__
registry.PlainOp.__call__ = recorded
for name in registry.FUNCTIONS:
    cases = [case for case in testing.cases(name) if not case.refused]
    for case in cases:
        testing.run(case, case.inputs(torch.float32), "cpu", gradients=False)
    with Recorder():
        for case in cases[::3]:
            testing.run(case, case.inputs(torch.float32), "cpu")
assert len(plain) == 9

TENSORS = [
    lambda t: None,
    lambda t: t.double(),
    lambda t: t.long(),
    lambda t: t.bool(),
    lambda t: t.to(torch.complex64),
    lambda t: t.to("meta"),
    lambda t: t.flatten(),
    lambda t: t[None],
    lambda t: t[:0],
    lambda t: t[..., :0],
    lambda t: t[..., :-1],
    lambda t: t[:1],
    lambda t: torch.cat([t, t], -1),
    lambda t: torch.cat([t, t]),
    lambda t: t.mT if t.dim() > 1 else t,
    lambda t: t.flatten()[0],
    lambda t: t.as_strided(t.shape, [0] * t.dim()),
    lambda t: torch.full_like(t, float("nan")) if t.is_floating_point() else t,
    lambda t: torch.empty(0),
    lambda t: torch.empty(0, 5, 0),
]
NUMBERS = [0, 1, -1, 2**31, 2**40, -(2**62), 2**63 - 1, -(2**63), None]
FLOATS = [0.0, -1.0, 2.0, float("nan"), float("inf"), -float("inf"), 1e308, None]
refused = answered = 0
for func, args in calls:
    for _ in range({rounds}):
        bad = list(args)
        for i in random.sample(range(len(bad)), random.choice([1, 1, 2])):
            if isinstance(bad[i], torch.Tensor) and bad[i].numel():
                bad[i] = random.choice(TENSORS)(bad[i] if bad[i].dim() else bad[i][None])
            elif isinstance(bad[i], torch.Tensor):
                bad[i] = torch.zeros(2, 3)
            elif isinstance(bad[i], bool):
                bad[i] = not bad[i]
            elif isinstance(bad[i], int):
                bad[i] = random.choice(NUMBERS)
            elif isinstance(bad[i], float):
                bad[i] = random.choice(FLOATS)
            elif isinstance(bad[i], str):
                bad[i] = random.choice(["", "gelu", "relu" * 100, "identity"])
            else:
                bad[i] = random.choice([None, torch.zeros(1), 3])
        try:
            func(*bad)
            answered += 1
        except Exception:  # which one is no matter: the kernels run unasked in any case
            refused += 1
print(refused, answered)
"""


@pytest.mark.parametrize("seed", [0, 1])
def test_nonsense_to_the_torch_ops_never_crashes(
    python: Callable[..., subprocess.CompletedProcess[str]], seed: int
) -> None:
    """Calls behind the public functions' back, each with one or two arguments replaced."""
    found = python("-c", FUZZ.format(seed=seed, rounds=20))
    assert found.returncode == 0, found.stderr[-3000:]
    refused, answered = map(int, found.stdout.split())
    assert refused > 200 and answered > 50
