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
    groups: dict[str, list[Tensor]] = {}
    for name, tensor in zip(work.names, found, strict=True):
        groups.setdefault(name, []).append(tensor.detach())
    verdicts = [
        standard.judge(groups[standard.name]) for standard in standards(work, provider, dtype)
    ]
    return max(verdicts, key=lambda v: (not v.matches, v.error / v.allowed if v.allowed else 0.0))


def standards(work: Work, provider: str, dtype: torch.dtype) -> list[Standard]:
    """What the tensors of each name are judged by, kept for all providers of an exact result."""
    oracle, eager = work.exact(provider, torch.float64), work.exact(provider, dtype)
    if id(oracle) not in work.standards:  # the work keeps its exact results
        groups: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for name, *pair in zip(work.names, oracle, eager, strict=True):
            groups.setdefault(name, []).append((pair[0].detach(), pair[1].detach()))
        outputs = set(work.names[: work.outputs])
        gradient = mean if work.deep else greatest
        work.standards[id(oracle)] = [
            Standard.of(name, pairs, factor=2)
            if name in outputs
            else Standard.of(name, pairs, factor=3, measure=gradient)
            for name, pairs in groups.items()
        ]
    return work.standards[id(oracle)]


def greatest(differences: Sequence[Tensor]) -> float:
    """The largest absolute value; NaN if there is one, 0 if there is nothing."""
    largest = [difference.abs().max() for difference in differences if difference.numel()]
    return torch.stack(largest).max().item() if largest else 0.0


def mean(differences: Sequence[Tensor]) -> float:
    """The root mean square."""
    count = sum(difference.numel() for difference in differences)
    return math.sqrt(sum(d.square().sum().item() for d in differences) / max(count, 1))


@dataclass(frozen=True)
class Standard:
    """The oracle of some tensors of one name, and the error that the rule allows them."""

    name: str
    oracle: Sequence[Tensor]
    dtypes: Sequence[torch.dtype]
    measure: Callable[[Sequence[Tensor]], float]
    eager_error: float
    allowed: float

    @classmethod
    def of(
        cls,
        name: str,
        pairs: Sequence[tuple[Tensor, Tensor]],
        *,
        factor: int,
        measure: Callable[[Sequence[Tensor]], float] = greatest,
    ) -> Standard:
        """From the oracle and eager's result of each tensor."""
        rounded = [oracle.to(eager.dtype) for oracle, eager in pairs]
        rounding = measure([((ref + 0.3 - 0.3) - ref).double() for ref in rounded])
        eager_error = measure([eager.double() - oracle for oracle, eager in pairs])
        oracles, eagers = zip(*pairs, strict=True)
        dtypes = [eager.dtype for eager in eagers]
        allowed = factor * eager_error + 2 * rounding
        return cls(name, oracles, dtypes, measure, eager_error, allowed)

    def judge(self, found: Sequence[Tensor]) -> Verdict:
        """The error of what was found, beside what is allowed."""
        for tensor, oracle, dtype in zip(found, self.oracle, self.dtypes, strict=True):
            if tensor.shape != oracle.shape or tensor.dtype != dtype:
                wrong = (
                    f"{self.name} is {tensor.dtype} of shape {list(tensor.shape)}, "
                    f"not {dtype} of shape {list(oracle.shape)}"
                )
                return Verdict(math.inf, 0.0, 0.0, wrong)
        error = self.measure([t.double() - o for t, o in zip(found, self.oracle, strict=True)])
        return Verdict(error, self.eager_error, self.allowed, self.name)
