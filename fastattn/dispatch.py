"""Chooses the kernel of an op within a device, and says in words why others were refused."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import logging
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.autograd import forward_ad

from fastattn import _library

if TYPE_CHECKING:
    from fastattn.registry import InferenceOp, Op

log = logging.getLogger("fastattn")

KERNELS = ("cpu", "cuda", "emulator", "triton", "triton-emulator", "reference")
# Whose kernels those of another name are, run elsewhere.
LANGUAGES = {"cpu": "C++", "cuda": "CUDA", "triton": "Triton"}
RUNS = {"emulator": "cuda", "triton-emulator": "triton"}
TRITON_VERSIONS = (3, 6), (3, 9)  # the oldest and the newest that the kernels are tried with
LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CUDA_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _why_no_triton() -> str:
    """Why there is no Triton, which is not imported to find out; "" where there is."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: `pip install 'fastattn[triton]'` brings it"
    try:
        version = importlib.metadata.version("triton")
        numbers = tuple(int(part) for part in version.split(".")[:2])
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return ""  # a build of one's own, of which nothing is known
    oldest, newest = (".".join(map(str, v)) for v in TRITON_VERSIONS)
    if numbers < TRITON_VERSIONS[0]:
        return f"Triton {version} is older than {oldest} (tried up to {newest})"
    return ""


WHY_NO_TRITON = _why_no_triton()


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

    "cpu" and "cuda" are the C++ kernels, "triton" those in Triton, "reference" is eager PyTorch.
    "emulator" runs the CUDA kernels, and "triton-emulator" what Triton compiles for sm_80, on CPU
    tensors in `fastattn.emulator`, slowly and with all of its checks. A call that a kernel cannot
    serve raises `UnavailableKernelError`; nothing falls back. Overrides the environment variable
    `FASTATTN_KERNEL`. The choice is the process's, not the thread's.

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


def triton_refusals(*tensors: torch.Tensor | None) -> list[str]:
    """The same for the Triton kernels, on a GPU or, where that is forced, in the emulator."""
    emulated = _forced == "triton-emulator"
    missing = WHY_NO_TRITON or (_library.WHY_NOT if emulated else "")
    return _refusals(missing, "is_cpu" if emulated else "is_cuda", CUDA_DTYPES, "Triton", tensors)


def _refusals(
    missing: str,
    there: str,  # the attribute that a tensor has where it should; device.type is slow to ask
    dtypes: tuple[torch.dtype, ...],
    language: str,
    tensors: tuple[torch.Tensor | None, ...],
) -> list[str]:
    """The reasons in the library, `missing` if any, in the tensors, and in where a call stands."""
    reasons = transforms()
    if missing:
        reasons.append(missing)
    for tensor in tensors:
        if tensor is None:
            continue
        if not getattr(tensor, there):
            reasons.append(f"a tensor is on {tensor.device}")
            break
        if tensor.dtype not in dtypes:
            reasons.append(f"dtype {tensor.dtype} has no {language} kernel")
            break
    return reasons


def transforms() -> list[str]:
    """The reasons that lie in where a call stands."""
    reasons = []
    if torch._C._are_functorch_transforms_active():  # a test that torch.compile can trace
        reasons.append("inside a torch.func transform")
    if forward_ad._current_level >= 0:
        reasons.append("inside forward-mode differentiation")
    return reasons


def plain() -> bool:
    """Whether calls are eager PyTorch's now, nothing special, and those on the CPU are C++'s."""
    return not (
        torch.compiler.is_compiling()
        or _forced not in (None, "cpu")
        or _library.WHY_NOT
        or torch._C._is_any_autocast_enabled()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or forward_ad._current_level >= 0
        or log.isEnabledFor(logging.DEBUG)
    )


def choose(op: Op | InferenceOp, args: tuple[Any, ...]) -> Choice:
    """The kernel for one call of `op`: the first of its device that does not refuse.

    On a GPU these are the CUDA C++ kernel and then the Triton kernel;
    fastattn/ops/README.md says why.

    Raises:
        UnavailableKernelError: the forced kernel refuses the call.
    """
    if _forced == "reference":
        return Choice("reference", {})
    refused = {}
    for name in (_forced,) if _forced else ("cuda", "triton") if args[0].is_cuda else ("cpu",):
        kind = RUNS.get(name, name)
        refusals = op.kernels.get(kind)
        reasons = refusals(*args) if refusals else [f"it has no {LANGUAGES[kind]} kernel"]
        if not reasons:
            return Choice(name, refused)
        refused[name] = reasons
    if _forced is not None:
        raise UnavailableKernelError(f"{op.name}: {_forced!r} is forced, but {'; '.join(reasons)}")
    return Choice("reference", refused)


def kernel_for(op: Op, args: tuple[Any, ...]) -> str:
    """The name of the kernel that `choose` gives, logged where it says something new."""
    choice = choose(op, args)
    kernel, refused = choice
    if torch.compiler.is_compiling():
        return kernel
    if log.isEnabledFor(logging.DEBUG):
        log.debug("%s: %s", op.name, choice)
    elif refused and kernel == "reference" and (op.name, text := str(choice)) not in _told:
        _told.add((op.name, text))
        log.warning("%s falls back: %s", op.name, text)
    return kernel


def backward_in_triton(op: Op, args: tuple[Any, ...]) -> bool:
    """Whether the backward op of a call with these arguments, those of backward, is Triton's.

    It is where Triton is forced, and on a GPU where there is no CUDA C++ kernel for both ways: what
    one forward saves every backward takes.

    Raises:
        UnavailableKernelError: the Triton kernel is forced and refuses the call.
    """
    if "triton" not in op.kernels or _forced not in (None, "triton", "triton-emulator"):
        return False
    if _forced is None and not next(arg for arg in args if arg is not None).is_cuda:
        return False
    forward_args = op.backward_arguments(*args)[0]
    if _forced is not None:
        return choose(op, forward_args).kernel == _forced
    if op.cuda_backward and not op.kernels["cuda"](*forward_args):
        return False
    return not op.kernels["triton"](*forward_args)


def backends() -> dict[str, str]:
    """Each kernel's name, and "" where it can run on this machine or the reason why it cannot."""
    no_gpu = "" if torch.cuda.is_available() else "torch sees no CUDA device"
    return {
        "cpu": _library.WHY_NOT,
        "cuda": _library.WHY_NO_CUDA or no_gpu,
        "emulator": _library.WHY_NO_CUDA,
        "triton": WHY_NO_TRITON or no_gpu,
        "triton-emulator": WHY_NO_TRITON or _library.WHY_NOT,
        "reference": "",
    }
