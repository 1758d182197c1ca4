"""Every instruction set that the machine has is forced, proved to have run, and agrees."""

from __future__ import annotations

import functools
from itertools import product

import pytest
import torch

import fastattn
from fastattn import _library, testing

RUNNABLE = [name for name, runs in _library.isas().items() if runs]
CASES = [case for case in testing.all_cases() if not case.refused]
ONE_PER_FUNCTION = list({case.function: case for case in CASES}.values())

pytestmark = pytest.mark.skipif(not RUNNABLE, reason=f"no compiled library: {_library.WHY_NOT}")


def test_the_portable_ones_are_there() -> None:
    assert {"scalar", "emu16"} <= set(RUNNABLE)
    assert fastattn.isa() in RUNNABLE


@pytest.mark.parametrize("isa", RUNNABLE)
@pytest.mark.parametrize("case", ONE_PER_FUNCTION, ids=lambda case: case.id)
def test_forced_isa_runs(case: testing.Case, isa: str) -> None:
    other = next(name for name in RUNNABLE if name != isa)
    inputs = case.inputs(torch.float32)
    with testing.use_isa(other):
        testing.run(case, inputs, "cpu")
    assert _library.last_isa() == other
    with testing.use_isa(isa):
        testing.run(case, inputs, "cpu", gradients=False)
    assert _library.last_isa() == isa


@functools.lru_cache(maxsize=len(CASES))
def baseline(case: int, dtype: torch.dtype) -> tuple[dict[str, torch.Tensor], ...]:
    """What every ISA's results are compared with."""
    return testing.eager_and_oracle(CASES[case], CASES[case].inputs(dtype))


# All ISAs of one dtype in a row: they share the baseline.
@pytest.mark.parametrize(("dtype", "isa"), list(product(testing.DTYPES, RUNNABLE)), ids=str)
def test_isas_keep_the_error_rule(dtype: torch.dtype, isa: str) -> None:
    with testing.use_threads(1):  # small work: two threads wait for each other
        for i, case in enumerate(CASES):
            inputs = case.inputs(dtype)
            with testing.use_isa(isa), testing.poisoned():
                found = testing.run(case, inputs, "cpu")
            testing.assert_results_close_to_oracle(case, inputs, found, *baseline(i, dtype))


# Products read whole groups of rows where they lie, if they lie well, and pack the others.
@pytest.mark.parametrize("depth", [64, 65, 300])
@pytest.mark.parametrize(("rows", "cols"), [(130, 200), (500, 70)])
@pytest.mark.parametrize(("dtype", "isa"), list(product(testing.DTYPES, RUNNABLE)), ids=str)
def test_operands_may_begin_anywhere(
    dtype: torch.dtype, isa: str, rows: int, cols: int, depth: int
) -> None:
    operands = [torch.randn(count, depth).to(dtype) for count in (rows, cols)]

    def placed(matrix: torch.Tensor, at: int) -> torch.Tensor:
        """The same amid NaN, `at` elements from where an allocation begins."""
        memory = torch.full((matrix.numel() + 4,), float("nan"), dtype=dtype)
        own = memory[at : at + matrix.numel()].view_as(matrix)
        return own.copy_(matrix)

    with testing.use_isa(isa):
        found = [fastattn.linear(*(placed(x, at) for x in operands)) for at in range(3)]
    assert found[0].equal(found[1]) and found[0].equal(found[2])
    oracle = torch.nn.functional.linear(*(x.double() for x in operands))
    eager = torch.nn.functional.linear(*operands)
    testing.assert_close_to_oracle(found[0], eager, oracle)


@pytest.mark.parametrize("isa", RUNNABLE)
def test_environment_forces_an_isa(isa: str, python) -> None:
    code = (
        "import torch, fastattn; from fastattn import _library;"
        "fastattn.layer_norm(torch.ones(2, 8), [8]); print(fastattn.isa(), _library.last_isa())"
    )
    assert python("-c", code, FASTATTN_ISA=isa).stdout.split() == [isa, isa]


def test_unknown_isa_is_refused_in_words(python) -> None:
    with pytest.raises(ValueError, match="sse9"):
        _library.select_isa("sse9")
    code = "import torch, fastattn; fastattn.layer_norm(torch.ones(2, 8), [8])"
    found = python("-c", code, FASTATTN_ISA="sse9")
    assert found.returncode != 0
    assert "FASTATTN_ISA must be one of" in found.stderr
    assert "sse9" in found.stderr
