"""One call of a public function, and what it computes on any kernel."""

from __future__ import annotations

import contextlib
import copy
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import fastattn
from fastattn.testing.inputs import Draw, laid_out, widened

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Case:
    """One call of a public function.

    `vanishing` names the arguments whose gradient is mathematically zero, `refused` the reason for
    which the compiled kernels leave the case to the reference, `written` the arguments that the
    call writes to. An `inference` case has no gradients.
    """

    function: str
    name: str
    tensors: Mapping[str, Draw]
    options: Mapping[str, Any] = field(default_factory=dict)
    vanishing: tuple[str, ...] = ()
    refused: str = ""
    written: tuple[str, ...] = ()
    inference: bool = False

    @property
    def id(self) -> str:
        return f"{self.function}-{self.name}"

    def inputs(self, dtype: torch.dtype, layout: str = "contiguous") -> dict[str, Tensor]:
        """The tensor arguments; values depend on the case alone, except that "expanded" repeats."""
        generator = torch.Generator().manual_seed(zlib.crc32(self.id.encode()))
        return {
            name: laid_out(
                draw.draw(generator, dtype),
                "contiguous" if (layout, draw.kind) == ("expanded", "distinct") else layout,
            )
            for name, draw in self.tensors.items()
        }

    def on(self, device: str) -> Case:
        """The same call of tensors on a device, where those among its options are then too."""
        moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in self.options.items()}
        return replace(self, options=moved)

    def call(self, **tensors: Tensor) -> tuple[Tensor, ...]:
        """The function's outputs as a tuple."""
        out = getattr(fastattn, self.function)(**tensors, **self.options)
        return out if isinstance(out, tuple) else (out,)

    def differentiable(self, tensors: Mapping[str, Tensor]) -> list[str]:
        """Names of the arguments that get a gradient."""
        if self.inference:
            return []
        return [
            name
            for name, tensor in tensors.items()
            if tensor.is_floating_point() and self.tensors[name].kind != "slopes"
        ]


def run(
    case: Case,
    inputs: Mapping[str, Tensor],
    kernel: str | None = None,
    gradients: bool = True,
    grads: Sequence[Tensor] | None = None,
) -> dict[str, Tensor]:
    """Outputs "out 0", ... and gradients "grad query", ... for these gradients of the outputs, by
    default random and always the same.

    What the call writes to is a copy of the input, and an output "written key_cache", ... too.
    """
    leaves = {
        name: copy.deepcopy(tensor) if name in case.written else tensor.detach()
        for name, tensor in inputs.items()
    }
    wanted = case.differentiable(leaves) if gradients else []
    for name in wanted:
        leaves[name].requires_grad_()
    with fastattn.use_kernel(kernel) if kernel else contextlib.nullcontext():
        outs = case.call(**leaves)
        found = {f"out {i}": out.detach() for i, out in enumerate(outs)}
        found |= {f"written {name}": leaves[name] for name in case.written}
        if wanted:
            generator = torch.Generator().manual_seed(1)
            # Sixteenths are exact in every dtype, so the oracle gets the same gradients.
            grads = grads or [
                (torch.randn(out.shape, generator=generator) * 16).round().div(16).to(out)
                for out in outs
            ]
            got = torch.autograd.grad(outs, [leaves[name] for name in wanted], grads)
            found |= {f"grad {name}": grad for name, grad in zip(wanted, got, strict=True)}
    return found


def eager_and_oracle(case: Case, inputs: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], ...]:
    """What eager PyTorch computes of the inputs' values, in their dtype and in fp64."""
    plain = {name: tensor.contiguous() for name, tensor in inputs.items()}
    return run(case, plain, "reference"), run(case, widened(inputs), "reference")
