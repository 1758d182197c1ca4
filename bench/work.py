"""What a case becomes when it is run: one call per provider, and the exact result of each."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

SEED = 20240607

# fused first, then its rivals in the order of the columns
PROVIDERS = {
    "fused": "fastattn",
    "eager": "eager",
    "sdpa": "SDPA",
    "compile": "torch.compile",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
}
OWN_THREADS = {"onnxruntime", "openvino"}  # torch.compile takes PyTorch's
COMPILED = {"compile", *OWN_THREADS}  # take part if asked for, and if they can


class UnavailableError(RuntimeError):
    """A case cannot run here; the message says in one sentence what is missing."""


@dataclass(frozen=True)
class Work:
    """One case made runnable.

    `calls` maps a provider to a call that returns its outputs and then its gradients, named by
    `names`, of which the first `outputs` are outputs. `exact(provider, dtype)` is the result that
    this provider should have: in float64 the oracle, in the case's own dtype the eager result
    whose error sets the rule; it keeps its results, and `standards` what `parity` makes of them.
    `left_out` says why a provider takes no part.
    """

    calls: dict[str, Callable[[], Sequence[Tensor]]]
    exact: Callable[[str, torch.dtype], Sequence[Tensor]]
    names: Sequence[str]
    outputs: int
    random: bool = False  # the result depends on torch's generator
    deep: bool = False  # gradients have come through many layers
    flops: float | None = None  # where the case cannot know them
    traffic: float | None = None
    left_out: dict[str, str] = field(default_factory=dict)
    standards: dict[int, Any] = field(default_factory=dict)


def differentiate(
    function: Callable[..., Any], inputs: dict[str, Any], cotangents: Sequence[Tensor] | None
) -> tuple[Tensor, ...]:
    """The outputs of function(**inputs), then the gradient of each input that requires one.

    The gradients are those of the sum of outputs times `cotangents`; None means forward only.
    """
    with torch.set_grad_enabled(cotangents is not None):
        outputs = function(**inputs)
        outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
        if cotangents is None:
            return outputs
        leaves = [v for v in inputs.values() if isinstance(v, Tensor) and v.requires_grad]
        gradients = torch.autograd.grad(outputs, leaves, cotangents)
    return (*(out.detach() for out in outputs), *gradients)


@contextlib.contextmanager
def kernels_used() -> Iterator[dict[str, str]]:
    """Collects, for each fastattn op called inside, the kernel that it ran on.

    Values are a kernel's name, or the reason why the reference ran, from fastattn's own log.
    """
    used: dict[str, str] = {}

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if isinstance(record.args, tuple) and hasattr(record.args[-1], "kernel"):
                op, choice = record.args
                why = "; ".join(reason for reasons in choice.refused.values() for reason in reasons)
                used[op] = f"{choice.kernel} ({why})" if why else choice.kernel

    log, handler = logging.getLogger("fastattn"), Collect()
    level, propagate = log.level, log.propagate
    log.addHandler(handler)
    log.setLevel(logging.DEBUG)
    log.propagate = False
    try:
        yield used
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        log.propagate = propagate
