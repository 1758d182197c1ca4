"""Logits that a loss can do without: a tensor that knows what it is to be computed from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastattn
from fastattn import dispatch

Step = tuple[Callable[..., Tensor], Any]  # a function of logits, and what else it takes


@dataclass(frozen=True)
class Source:
    """What logits are computed from: a linear layer, and what is done to each of its results."""

    states: Tensor  # [..., E]
    weight: Tensor  # [V, E]
    bias: Tensor | None  # [V]
    versions: tuple[int | None, ...]  # of these when the layer was called
    steps: tuple[Step, ...] = ()

    def logits(self) -> Tensor:
        """All of them, [..., V]."""
        self.check()
        out = fastattn.linear(self.states, self.weight, self.bias)
        for function, argument in self.steps:
            out = function(out, argument)
        return out

    def check(self) -> None:
        """Raise where the result would not be that of the call."""
        if self.versions != versions(self.states, self.weight, self.bias):
            raise RuntimeError(
                "logits of a model that is patched with loss=True must be read before its weights "
                "change, got an access after that: read them before the optimizer's step"
            )

    @property
    def softcap(self) -> float | None:
        """The cap, if they are capped as Gemma's; raises LookupError where they are otherwise."""
        functions = [step for step in self.steps if step[0] is not Tensor.to]
        if not functions:
            return None
        if [function for function, _ in functions] == [Tensor.div, _tanh, Tensor.mul]:
            cap = functions[0][1]
            if cap == functions[2][1] and cap > 0:
                return float(cap)
        raise LookupError


class Logits(Tensor):
    """Logits [..., V] that are computed when something other than a cross-entropy asks for them.

    What only selects rows, changes the dtype, adds a bias or caps them leaves them uncomputed, and
    their cross-entropy with classes is `fastattn.linear_cross_entropy`. All else gets an ordinary
    tensor, with the gradients that it would have had. They cannot be written to.
    """

    source: Source
    computed: Tensor | None

    def plain(self) -> Tensor:
        """An ordinary tensor, computed once."""
        if self.computed is None:
            self.computed = self.source.logits()
        return self.computed

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func in METADATA:
                return func(*args, **kwargs)
            first = args[0] if args else kwargs.get("input")
            if isinstance(first, Logits):
                if _writes(func):
                    raise RuntimeError(
                        "logits of a model that is patched with loss=True must not be written to, "
                        f"got {func.__name__}: clone them first"
                    )
                if first.computed is None and (lazy := LAZY.get(func)) is not None:
                    found = lazy(*args, **kwargs)
                    if found is not None:
                        return found
            return func(*_plain(args), **_plain(kwargs))

    @classmethod
    def __torch_dispatch__(
        cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        raise RuntimeError(  # below autograd it is too late to compute them
            f"logits of a model that is patched with loss=True cannot be used by {func} where "
            "__torch_function__ is disabled, got a call there: clone them before"
        )


def lazy_linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """`layer`, a linear layer, of x [..., E], computed if need be."""
    traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    if traced or torch.jit.is_tracing() or type(x) is not Tensor:
        return type(layer).forward(layer, x)
    states, weight, bias = dispatch.autocast(x, layer.weight, layer.bias)
    return _logits(Source(states, weight, bias, versions(states, weight, bias)))


def versions(*tensors: Tensor | None) -> tuple[int | None, ...]:
    """How often each has been written to."""
    return tuple(None if t is None or t.is_inference() else t._version for t in tensors)


def _logits(source: Source, dtype: torch.dtype | None = None) -> Logits:
    tensors = source.states, source.weight, source.bias
    made = Tensor._make_wrapper_subclass(
        Logits,
        (*source.states.shape[:-1], source.weight.shape[0]),
        dtype=dtype or source.states.dtype,
        device=source.states.device,
        requires_grad=torch.is_grad_enabled()
        and any(t is not None and t.requires_grad for t in tensors),
    )
    made.source, made.computed = source, None
    return made


def _plain(value: Any) -> Any:
    if isinstance(value, Logits):
        return value.plain()
    if isinstance(value, (tuple, list)) and any(
        isinstance(v, (Logits, tuple, list)) for v in value
    ):
        return type(value)(map(_plain, value))
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    return value


def _writes(func: Callable) -> bool:
    name = func.__name__
    if name.startswith("__"):
        return name == "__setitem__" or (name.startswith("__i") and name not in READING)
    return name.endswith("_")


# what leaves logits uncomputed; each returns None where it does not after all


def _rows(x: Logits, states: Tensor) -> Logits:
    """The logits of some of the states."""
    x.source.check()
    source = replace(x.source, states=states)
    return _logits(replace(source, versions=(*versions(states), *source.versions[1:])), x.dtype)


def _stepped(x: Logits, function: Callable, argument: Any, dtype: torch.dtype) -> Logits:
    return _logits(replace(x.source, steps=(*x.source.steps, (function, argument))), dtype)


def _view(x: Logits, *shape: Any) -> Logits | None:
    if len(shape) == 1 and isinstance(shape[0], (tuple, list)):
        shape = tuple(shape[0])
    if not shape or shape[-1] != x.shape[-1] or isinstance(shape[0], torch.dtype):
        return None
    return _rows(x, x.source.states.reshape(*shape[:-1], x.source.states.shape[-1]))


def _flatten(x: Logits, start_dim: int = 0, end_dim: int = -1) -> Logits | None:
    if end_dim % x.dim() == x.dim() - 1:
        return None
    return _rows(x, x.source.states.flatten(start_dim, end_dim))


def _getitem(x: Logits, index: Any) -> Logits | None:
    leading = x.dim() - 1
    if isinstance(index, Tensor):
        taken = index.dim() if index.dtype == torch.bool else 1
        return _rows(x, x.source.states[index]) if taken <= leading else None
    index = index if isinstance(index, tuple) else (index,)
    taken = [one for one in index if one is not Ellipsis]
    if not all(isinstance(one, (int, slice)) and not isinstance(one, bool) for one in taken):
        return None
    reaches_last = len(taken) > leading or (len(taken) < len(index) and index[-1] is not Ellipsis)
    if reaches_last and not (isinstance(index[-1], slice) and index[-1] == slice(None)):
        return None
    return _rows(x, x.source.states[index])


def _to(x: Logits, *args: Any, **kwargs: Any) -> Logits | None:
    dtypes = [arg for arg in (*args, *kwargs.values()) if isinstance(arg, torch.dtype)]
    if len(dtypes) != 1 or len(args) + len(kwargs) != 1 or not dtypes[0].is_floating_point:
        return None
    return _stepped(x, Tensor.to, dtypes[0], dtypes[0])


def _contiguous(x: Logits) -> Logits:
    return x


def _by_number(function: Callable) -> Callable[..., Logits | None]:
    def stepped(x: Logits, other: Any) -> Logits | None:
        if isinstance(other, bool) or not isinstance(other, (int, float)):
            return None
        return _stepped(x, function, other, x.dtype)

    return stepped


def _tanh(x: Tensor, nothing: None = None) -> Tensor:
    return x.tanh()


def _capped(x: Logits) -> Logits:
    return _stepped(x, _tanh, None, x.dtype)


def _add(x: Logits, other: Any) -> Logits | None:
    source = x.source
    if source.steps or not isinstance(other, Tensor) or isinstance(other, Logits):
        return None
    if other.dtype != x.dtype or other.shape[-1:] != x.shape[-1:]:
        return None
    if other.numel() != x.shape[-1] or other.dim() > x.dim():
        return None
    bias = other.reshape(-1)
    bias = bias if source.bias is None else source.bias + bias
    return _logits(replace(source, bias=bias, versions=(*source.versions[:2], *versions(bias))))


def _cross_entropy(
    input: Logits,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor | None:
    if any(value is not None for value in (weight, size_average, reduce)):
        return None
    if target.dtype != torch.int64 or input.dim() != 2 or target.shape != input.shape[:1]:
        return None
    source = input.source
    try:
        softcap = source.softcap
    except LookupError:
        return None
    source.check()
    loss = fastattn.linear_cross_entropy(
        source.states,
        source.weight,
        target,
        linear_bias=source.bias,
        reduction=reduction,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        softcap=softcap,
    )
    autocast = torch.is_autocast_enabled(input.device.type)  # makes the loss fp32
    return loss if autocast else loss.to(input.dtype)


LAZY: dict[Callable, Callable[..., Tensor | None]] = {
    F.cross_entropy: _cross_entropy,
    Tensor.view: _view,
    Tensor.reshape: _view,
    Tensor.flatten: _flatten,
    torch.flatten: _flatten,
    Tensor.__getitem__: _getitem,
    Tensor.to: _to,
    Tensor.float: lambda x: _to(x, torch.float32),
    Tensor.contiguous: _contiguous,
    Tensor.div: _by_number(Tensor.div),
    Tensor.__truediv__: _by_number(Tensor.div),
    Tensor.mul: _by_number(Tensor.mul),
    Tensor.__mul__: _by_number(Tensor.mul),
    Tensor.tanh: _capped,
    torch.tanh: _capped,
    Tensor.add: _add,
    Tensor.__add__: _add,
}
METADATA = {
    *(
        getattr(Tensor, name).__get__
        for name in ("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_sparse")
    ),
    *(getattr(Tensor, name).__get__ for name in ("is_cuda", "is_cpu", "is_meta", "is_nested")),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.nelement, Tensor.ndimension, Tensor.__len__),
    *(Tensor.is_floating_point, Tensor.is_complex, Tensor.element_size, Tensor.get_device),
}
READING = {"__int__", "__index__", "__invert__"}  # not the in-place operators that they look like
