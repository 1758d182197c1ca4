"""The rule that a call must keep before its speed is printed: its error beside eager's own.

max |call - oracle| <= 2 * max |eager - oracle| + 2 * rounding, where the oracle is eager PyTorch in
float64, eager runs in the call's dtype, and rounding is max |(oracle + 0.3 - 0.3) - oracle| in that
dtype. Gradients may have three times eager's error. For a deep model's gradients the root mean
square stands in for max: there, the greatest error is one outlier's luck, and PyTorch's own SDPA
exceeds three times eager's at times.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.work import SEED, Work


@dataclass(frozen=True)
class Verdict:
    """How a call compares with the oracle, for the tensor that comes closest to its bound."""

    error: float
    eager_error: float
    allowed: float
    where: str

    @property
    def matches(self) -> bool:
        return self.error <= self.allowed  # False for NaN

    def __str__(self) -> str:
        return (
            f"{self.where}: error {self.error:.1e}, allowed {self.allowed:.1e}, "
            f"eager's own {self.eager_error:.1e}"
        )


def run(work: Work, provider: str) -> Sequence[Tensor]:
    """The call's result under the seed that the oracle knows."""
    torch.manual_seed(SEED)
    return work.calls[provider]()


def judge(work: Work, provider: str, found: Sequence[Tensor], dtype: torch.dtype) -> Verdict:
    """Judge a result by the tensor that comes closest to its bound, or exceeds it most.

    Tensors of one name are judged as one.
    """
    oracle, eager = work.exact(provider, torch.float64), work.exact(provider, dtype)
    groups: dict[str, list[tuple[Tensor, ...]]] = {}
    for name, *tensors in zip(work.names, found, oracle, eager, strict=True):
        groups.setdefault(name, []).append(tuple(tensor.detach() for tensor in tensors))
    outputs = set(work.names[: work.outputs])
    verdicts = [
        compare(name, group, factor=2)
        if name in outputs
        else compare(name, group, factor=3, measure=mean if work.deep else greatest)
        for name, group in groups.items()
    ]
    return max(verdicts, key=lambda v: (not v.matches, v.error / v.allowed if v.allowed else 0.0))


def greatest(differences: Sequence[Tensor]) -> float:
    """The largest absolute value; NaN if there is one, 0 if there is nothing."""
    largest = [difference.abs().max() for difference in differences if difference.numel()]
    return torch.stack(largest).max().item() if largest else 0.0


def mean(differences: Sequence[Tensor]) -> float:
    """The root mean square."""
    count = sum(difference.numel() for difference in differences)
    return math.sqrt(sum(d.square().sum().item() for d in differences) / max(count, 1))


def compare(
    name: str,
    group: Sequence[tuple[Tensor, Tensor, Tensor]],
    *,
    factor: int,
    measure: Callable[[Sequence[Tensor]], float] = greatest,
) -> Verdict:
    """The error of some tensors, each with its oracle and eager's, by the rule."""
    for found, oracle, eager in group:
        if found.shape != oracle.shape or found.dtype != eager.dtype:
            wrong = (
                f"{name} is {found.dtype} of shape {list(found.shape)}, "
                f"not {eager.dtype} of shape {list(oracle.shape)}"
            )
            return Verdict(math.inf, 0.0, 0.0, wrong)
    rounded = [oracle.to(found.dtype) for found, oracle, _ in group]
    rounding = measure([((ref + 0.3 - 0.3) - ref).double() for ref in rounded])
    error = measure([found.double() - oracle for found, oracle, _ in group])
    eager_error = measure([eager.double() - oracle for _, oracle, eager in group])
    return Verdict(error, eager_error, factor * eager_error + 2 * rounding, name)
