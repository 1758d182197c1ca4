"""Every public function on every kernel, dtype and layout, enumerated from the registry."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastattn
from fastattn import registry
from fastattn.testing import (
    DTYPES,
    LAYOUTS,
    Case,
    all_cases,
    assert_close_to_oracle,
    assert_vanishes,
    cases,
    poisoned,
    run,
    widened,
)

CASES = {case.id: case for case in all_cases()}
SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}


def name_of(value: object) -> str | None:
    return SHORT.get(value) if isinstance(value, torch.dtype) else None


@functools.lru_cache(maxsize=16)
def baseline(case_id: str, dtype: torch.dtype, repeated: bool) -> tuple[dict[str, Tensor], ...]:
    """Eager PyTorch's results in `dtype`, and the oracle's from the same values."""
    case = CASES[case_id]
    inputs = case.inputs(dtype, "expanded" if repeated else "contiguous")
    inputs = {name: tensor.contiguous() for name, tensor in inputs.items()}
    return run(case, inputs, "reference"), run(case, widened(inputs), "reference")


def check(case: Case, inputs: dict[str, Tensor], found: dict[str, Tensor], repeated: bool) -> None:
    """All outputs and gradients keep the error rule; a gradient that vanishes, its own."""
    eager, oracle = baseline(case.id, next(iter(inputs.values())).dtype, repeated)
    assert found.keys() == oracle.keys()
    for name in oracle:
        if name.removeprefix("grad ") in case.vanishing:
            largest = [t.double().abs().max().item() for t in inputs.values()]
            # grad_out . value, which is up to 4 max |value| here, times the query or the key
            terms = max(tensor.numel() for tensor in inputs.values())
            assert_vanishes(found[name], 4 * max(largest) ** 2, terms, name)
        else:
            assert_close_to_oracle(
                found[name], eager[name], oracle[name], 2 if name.startswith("out") else 3, name
            )


def test_every_function_and_op_has_cases() -> None:
    public = {
        name
        for name in fastattn.__all__
        if callable(function := getattr(fastattn, name)) and "ops" in function.__module__
    }
    assert public == set(registry.FUNCTIONS)
    without = [name for name in registry.FUNCTIONS if not cases(name)]
    assert not without, f"functions without cases in fastattn.testing: {without}"
    served = {record.name for _, record in registry.FUNCTIONS.values()}
    assert served == set(registry.OPS)
    assert len(CASES) == len(all_cases()), "two cases have one id"


# values and gradients


def enumerated() -> Iterator[tuple[str, str, torch.dtype, str]]:
    for case in CASES.values():
        layouts = [
            layout
            for layout in LAYOUTS
            if layout != "heads_inside" or any(len(d.shape) == 4 for d in case.tensors.values())
        ]
        for dtype in DTYPES:
            yield from ((case.id, dtype, "cpu", layout) for layout in layouts)
            yield case.id, dtype, "reference", "sliced"
        yield from ((case.id, torch.float32, "reference", layout) for layout in layouts[2:])


@pytest.mark.parametrize(("case_id", "dtype", "kernel", "layout"), enumerated(), ids=name_of)
def test_matches_oracle(case_id: str, dtype: torch.dtype, kernel: str, layout: str) -> None:
    case = CASES[case_id]
    inputs = case.inputs(dtype, layout)
    if case.refused and kernel == "cpu":
        with pytest.raises(fastattn.UnavailableKernelError, match=case.refused):
            run(case, inputs, "cpu")
        kernel = None
    found = run(case, inputs, kernel)
    check(case, inputs, found, layout == "expanded")
