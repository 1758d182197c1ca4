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

KERNELS = ("cpu", "cuda", "emulator", "reference")
LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CUDA_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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
_forced: str | None = None
_told: set[tuple[str, str]] = set()
if _level := os.environ.get("FASTATTN_LOG"):
    if _level.upper() not in LEVELS:
        raise ValueError(f"FASTATTN_LOG must be one of {LEVELS}, got {_level!r}")
    logging.basicConfig()
    log.setLevel(_level.upper())


def _force(name: str | None) -> None:
    global _forced
    if "emulator" in (name, _forced) and name != _forced and not _library.WHY_NO_CUDA:
        from fastattn.emulator import device

        device.attach(name == "emulator")
    _forced = name


@contextlib.contextmanager
def use_kernel(name: str) -> Iterator[None]:
    """Force kernel `name` for the calls inside the `with` block.

    "cpu" and "cuda" are the C++ kernels, "reference" is eager PyTorch, and "emulator" runs the CUDA
    kernels on CPU tensors in `fastattn.emulator`, slowly and with all of its checks. A call that a
    kernel cannot serve raises `UnavailableKernelError`; nothing falls back. Overrides the
    environment variable `FASTATTN_KERNEL`. The choice is the process's, not the thread's.

    Raises:
        ValueError: `name` is not a kernel.
    """
    before = _forced
    _force(_checked(name, "name"))
    try:
        yield
    finally:
        _force(before)


def forced() -> str | None:
    """The kernel that is forced now."""
    return _forced


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


_force(_checked(os.environ.get("FASTATTN_KERNEL"), "FASTATTN_KERNEL"))


def cpu_refusals(*tensors: torch.Tensor | None) -> list[str]:
    """The reasons, common to all ops, for which the C++ CPU kernels do not take these tensors."""
    return _refusals(_library.WHY_NOT, "is_cpu", CPU_DTYPES, "C++", tensors)


def cuda_refusals(*tensors: torch.Tensor | None) -> list[str]:
    """The same for the CUDA kernels, on a GPU or, where that is forced, in the emulator."""
    there = "is_cpu" if _forced == "emulator" else "is_cuda"
    return _refusals(_library.WHY_NO_CUDA, there, CUDA_DTYPES, "CUDA", tensors)


def _refusals(
    missing: str,
    there: str,  # the attribute that a tensor has where it should; device.type is slow to ask
    dtypes: tuple[torch.dtype, ...],
    language: str,
    tensors: tuple[torch.Tensor | None, ...],
) -> list[str]:
    """The reasons in the library, `missing` if any, in the tensors, and in where a call stands."""
    reasons = [missing] if missing else []
    for tensor in tensors:
        if tensor is None:
            continue
        if not getattr(tensor, there):
            reasons.append(f"a tensor is on {tensor.device}")
            break
        if tensor.dtype not in dtypes:
            reasons.append(f"dtype {tensor.dtype} has no {language} kernel")
            break
    return reasons + _transforms()


def _transforms() -> list[str]:
    """The reasons that lie in where a call stands."""
    reasons = []
    if torch._C._are_functorch_transforms_active():  # a test that torch.compile can trace
        reasons.append("inside a torch.func transform")
    if torch.autograd.forward_ad._current_level >= 0:
        reasons.append("inside forward-mode differentiation")
    return reasons


def choose(op: Op | InferenceOp, args: tuple[Any, ...]) -> Choice:
    """The kernel for one call of `op`: the one of its device, unless that refuses.

    Raises:
        UnavailableKernelError: the forced kernel refuses the call.
    """
    if _forced == "reference":
        return Choice("reference", {})
    name = _forced or ("cuda" if "cuda" in op.kernels and args[0].is_cuda else "cpu")
    refusals = op.kernels.get("cuda" if name == "emulator" else name)
    reasons = refusals(*args) if refusals else ["it has no CUDA kernel"]
    if not reasons:
        return Choice(name, {})
    if _forced is not None:
        raise UnavailableKernelError(f"{op.name}: {name!r} is forced, but {'; '.join(reasons)}")
    return Choice("reference", {name: reasons})


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
    no_gpu = "" if torch.cuda.is_available() else "torch sees no CUDA device"
    return {
        "cpu": _library.WHY_NOT,
        "cuda": _library.WHY_NO_CUDA or no_gpu,
        "emulator": _library.WHY_NO_CUDA,
        "reference": "",
    }
