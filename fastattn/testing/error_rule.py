"""The error rule: how far from the truth a kernel may be."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fastattn.testing.case import Case, run
from fastattn.testing.inputs import widened

DRAWS = 8


def assert_case_close_to_oracle(
    case: Case, dtype: torch.dtype, kernel: str, device: str = "cpu"
) -> None:
    """All outputs and gradients of a case in `dtype` on `kernel` keep the error rule.

    What runs on a device leaves its results there, and is compared with eager PyTorch's from there.
    Where that says too little, being of few elements, its error is the largest of some draws.
    """

    def computed(case: Case, inputs: Mapping[str, Tensor], kernel: str) -> dict[str, Tensor]:
        there = {name: tensor.to(device) for name, tensor in inputs.items()}
        found = run(case.on(device), there, kernel)
        assert {str(tensor.device) for tensor in found.values()} == {device}
        return {name: tensor.cpu() for name, tensor in found.items()}

    def eager_and_oracle(case: Case, inputs: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], ...]:
        return computed(case, inputs, "reference"), run(case, widened(inputs), "reference")

    inputs = case.inputs(dtype)
    found, eager, oracle = computed(case, inputs, kernel), *eager_and_oracle(case, inputs)
    errors = dict.fromkeys(oracle, 0.0)
    for draw in range(1, DRAWS):
        with contextlib.suppress(AssertionError):
            return assert_results_close_to_oracle(case, inputs, found, eager, oracle, errors)
        other = replace(case, name=f"{case.name}, draw {draw}")
        for name, error in largest_errors(*eager_and_oracle(other, other.inputs(dtype))).items():
            errors[name] = max(errors[name], error)
    assert_results_close_to_oracle(case, inputs, found, eager, oracle, errors)


def largest_errors(found: Mapping[str, Tensor], oracle: Mapping[str, Tensor]) -> dict[str, float]:
    """By result, how far from the oracle it is where both are finite."""
    return {
        name: _largest((found[name].double() - true).nan_to_num(0, 0, 0))
        for name, true in oracle.items()
    }


def assert_results_close_to_oracle(
    case: Case,
    inputs: Mapping[str, Tensor],
    found: Mapping[str, Tensor],
    eager: Mapping[str, Tensor],
    oracle: Mapping[str, Tensor],
    errors: Mapping[str, float] | None = None,
) -> None:
    """All outputs and gradients of a case keep the error rule; a gradient that vanishes, its own.

    Args:
        found, eager, oracle: what `run` returns, of these inputs' values.
        errors: by name, an error that eager may make beside the one seen here.
    """
    assert found.keys() == oracle.keys(), f"{case.id}: {list(found)}, not {list(oracle)}"
    for name in oracle:
        where = f"{case.id} {name}"
        if name.removeprefix("grad ") in case.vanishing:
            largest = max(tensor.double().abs().max().item() for tensor in inputs.values())
            terms = max(tensor.numel() for tensor in inputs.values())
            assert_vanishes(found[name], 4 * largest**2, terms, where)
        else:
            factor = 3 if name.startswith("grad") else 2
            extra = (errors or {}).get(name, 0.0)
            assert_close_to_oracle(found[name], eager[name], oracle[name], factor, where, extra)


def assert_close_to_oracle(
    kernel: Tensor,
    eager: Tensor,
    oracle: Tensor,
    factor: float = 2.0,
    name: str = "result",
    eager_error: float = 0.0,
) -> None:
    """`kernel` is as close to the truth as eager PyTorch in the same dtype, within a factor.

    max |kernel - oracle| <= factor * max |eager - oracle| + 2 * rounding, where rounding is
    max |(oracle + 0.3 - 0.3) - oracle| computed in the dtype of `kernel`. The factor is 2 for
    outputs and 3 for gradients. An fp64 result, which eager gives no error to compare with, may
    differ from the oracle by 300 eps of the largest value. Where the oracle is infinite or NaN,
    `kernel` must be too.

    Args:
        kernel: the result in question; eager: eager PyTorch's, in the same dtype and shape.
        oracle: eager PyTorch's in fp64, from the same inputs.
        eager_error: an error that eager may make beside the one seen here; the larger one counts.

    Raises:
        AssertionError: with both errors and the bound; also where a shape or a dtype differs.
    """
    assert kernel.dtype == eager.dtype, f"{name}: dtype {kernel.dtype}, not {eager.dtype}"
    assert kernel.shape == oracle.shape, f"{name}: shape {kernel.shape}, not {oracle.shape}"
    kernel, eager, oracle = kernel.detach(), eager.detach(), oracle.detach().double()
    finite = oracle.isfinite()
    strange, wanted = kernel[~finite].double(), oracle[~finite]
    assert bool(((strange == wanted) | (strange.isnan() & wanted.isnan())).all()), (
        f"{name}: differs where the oracle is infinite or NaN"
    )
    kernel, eager, oracle = kernel[finite], eager[finite], oracle[finite]
    error = _largest(kernel.double() - oracle)
    if kernel.dtype == torch.float64:
        limit = max(300 * torch.finfo(torch.float64).eps * _largest(oracle), factor * eager_error)
        assert error <= limit, f"{name}: error {error:.2e}, allowed {limit:.2e} in fp64"
        return
    rounded = oracle.to(kernel.dtype)
    eager_error = max(eager_error, _largest(eager.double() - oracle))
    limit = factor * eager_error + 2 * _largest((rounded + 0.3 - 0.3) - rounded)
    assert error <= limit, (
        f"{name}: error {error:.2e}, allowed {limit:.2e}, eager's own {eager_error:.2e}"
    )


def assert_vanishes(gradient: Tensor, magnitude: float, terms: int, name: str = "result") -> None:
    """A gradient that is mathematically zero is no more than the rounding noise of its terms.

    Its relative error means nothing, so the bound is absolute: `terms` addends of size `magnitude`,
    each with a rounding error of a few eps of the gradient's dtype, at random.
    """
    limit = 8 * torch.finfo(gradient.dtype).eps * magnitude * math.sqrt(terms)
    found = _largest(gradient)
    assert found <= limit, f"{name}: {found:.2e} should be zero, allowed {limit:.2e}"


def _largest(difference: Tensor) -> float:
    """The largest absolute value, NaN if there is one, 0 of nothing."""
    return difference.abs().max().item() if difference.numel() else 0.0
