"""Chooses the kernel of an op within a device, and says in words why others were refused."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from fastattn import _library

if TYPE_CHECKING:
    from fastattn.registry import InferenceOp, Op

log = logging.getLogger("fastattn")

KERNELS = ("cpu", "reference")
LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Choice(NamedTuple):
    """The kernel that a call runs on, and the reasons for which each better one was refused."""

    kernel: str
    refused: dict[str, list[str]]

    def __str__(self) -> str:
        lines = [f"{self.kernel}: chosen"]
        lines += [f"{name}: {reason}" for name, why in self.refused.items() for reason in why]
        return "\n".join(lines)


class UnavailableKernelError(RuntimeError):
    """A kernel was forced that cannot serve the call."""


def _checked(name: str | None, source: str) -> str | None:
    if name in (None, ""):
        return None
    if name not in KERNELS:
        raise ValueError(f"{source} must be one of {KERNELS}, got {name!r}")
    return name


# A plain global, for torch.compile can guard on it but not trace a ContextVar.
_forced: str | None = _checked(os.environ.get("FASTATTN_KERNEL"), "FASTATTN_KERNEL")
_told: set[tuple[str, str]] = set()
if _level := os.environ.get("FASTATTN_LOG"):
    if _level.upper() not in LEVELS:
        raise ValueError(f"FASTATTN_LOG must be one of {LEVELS}, got {_level!r}")
    logging.basicConfig()
    log.setLevel(_level.upper())


@contextlib.contextmanager
def use_kernel(name: str) -> Iterator[None]:
    """Force kernel `name` ("cpu", "reference") for the calls inside the `with` block.

    A call that it cannot serve raises `UnavailableKernelError`; nothing falls back. Overrides
    the environment variable `FASTATTN_KERNEL`. The choice is the process's, not the thread's.

    Raises:
        ValueError: `name` is not a kernel.
    """
    global _forced
    before, _forced = _forced, _checked(name, "name")
    try:
        yield
    finally:
        _forced = before


def autocast(*tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """What torch.autocast makes of the operands of a product: its dtype, except where fp64.

    The first tensor's device decides. Norms do not ask: on the CPU autocast leaves them alone.
    """
    device = tensors[0].device.type if isinstance(tensors[0], torch.Tensor) else "meta"
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        tensor.to(dtype)
        if isinstance(tensor, torch.Tensor)
        and tensor.device.type == device
        and tensor.is_floating_point()
        and tensor.dtype != torch.float64
        else tensor
        for tensor in tensors
    )


def cpu_refusals(*tensors: torch.Tensor | None) -> list[str]:
    """The reasons, common to all ops, for which the C++ CPU kernels do not take these tensors."""
    reasons = []
    if _library.LIBRARY is None:
        reasons.append(_library.WHY_NOT)
    for tensor in tensors:
        if tensor is None:
            continue
        if not tensor.is_cpu:
            reasons.append(f"a tensor is on {tensor.device}")
            break
        if tensor.dtype not in CPU_DTYPES:
            reasons.append(f"dtype {tensor.dtype} has no C++ kernel")
            break
    if torch._C._are_functorch_transforms_active():  # a test that torch.compile can trace
        reasons.append("inside a torch.func transform")
    if torch.autograd.forward_ad._current_level >= 0:
        reasons.append("inside forward-mode differentiation")
    return reasons


def choose(op: Op | InferenceOp, args: tuple[Any, ...]) -> Choice:
    """The kernel for one call of `op`: the first in its list that refuses nothing.

    Raises:
        UnavailableKernelError: the forced kernel refuses the call.
    """
    refused: dict[str, list[str]] = {}
    for name, refusals in op.kernels.items():
        if _forced not in (None, name):
            continue
        if not (reasons := refusals(*args)):
            return Choice(name, refused)
        refused[name] = reasons
        if _forced is not None:
            raise UnavailableKernelError(f"{op.name}: {name!r} is forced, but {'; '.join(reasons)}")
    return Choice("reference", refused)


def kernel_for(op: Op, args: tuple[Any, ...]) -> str:
    """The name of the kernel that `choose` gives, logged where it says something new."""
    choice = choose(op, args)
    if torch.compiler.is_compiling():
        return choice.kernel
    if log.isEnabledFor(logging.DEBUG):
        log.debug("%s: %s", op.name, choice)
    elif choice.refused and (op.name, text := str(choice)) not in _told:
        _told.add((op.name, text))
        log.warning("%s falls back: %s", op.name, text)
    return choice.kernel


def backends() -> dict[str, str]:
    """Each kernel's name, and "" where it can run on this machine or the reason why it cannot."""
    return {"cpu": _library.WHY_NOT, "reference": ""}
