"""An op: schema, reference, derivative and kernels in one record, and the road of a call to it."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from fastattn import dispatch

Tensors = tuple[torch.Tensor | None, ...]

_AUTOGRAD = torch._C.DispatchKey.AutogradFunctionality

TRITON = "triton", "triton-emulator"
ORDINARY = torch.Tensor, torch.nn.Parameter

OPS: dict[str, Op | InferenceOp] = {}
FUNCTIONS: dict[str, tuple[Callable[..., tuple], Op | InferenceOp]] = {}


@dataclass(frozen=True, eq=False)  # hashed by identity, which torch.compile needs
class Op:
    """A forward and a backward torch op, and all that the dispatcher and autograd know of them.

    `reference` takes the forward op's arguments and returns its outputs in eager PyTorch, in any
    dtype. `derivative(needs, args, outs, grads)` returns one gradient per argument by calling the
    backward op. `kernels` maps a kernel's name to a function that lists its refusals.
    """

    name: str
    reference: Callable[..., tuple[torch.Tensor, ...]]
    derivative: Callable[..., Tensors]
    kernels: dict[str, Callable[..., list[str]]]
    differentiable: int  # the leading outputs that carry a gradient
    keep: tuple[int, ...]  # the outputs that the derivative reads
    backward_arguments: Callable[..., tuple]
    tensors: int = field(init=False)  # the leading arguments, which are tensors or None
    compiled: TorchOps = field(init=False)  # C++, on the CPU and on a GPU
    triton: TorchOps | None = field(init=False)
    cuda_backward: bool = field(init=False)  # whether the library has it for a GPU

    def __call__(self, *args: Any) -> tuple[torch.Tensor, ...]:
        """Run the op on the kernel that dispatch chooses, recording a gradient if one is needed.

        Returns the outputs that carry one.
        """
        kernel = dispatch.kernel_for(self, args)
        if kernel == "reference":
            return self.reference(*args)[: self.differentiable]
        ops = self.triton if kernel in TRITON else self.compiled
        if torch.is_grad_enabled():
            for tensor in args[: self.tensors]:
                if tensor is not None and tensor.requires_grad:
                    if torch.compiler.is_compiling():
                        args = _distinct(args)
                    return ops.function.apply(*args)
        return ops.forward(*args)[: self.differentiable]

    def backward(self, *args: Any) -> tuple[torch.Tensor, ...]:
        """Run the backward op, which `derivative` calls, on the kernel that dispatch chooses."""
        ops = self.triton if dispatch.backward_in_triton(self, args) else self.compiled
        return ops.backward(*args)


@dataclass(frozen=True, eq=False)
class TorchOps:
    """The torch ops of one op, both ways, and the autograd function that ties them together."""

    forward: Any
    backward: Any
    function: type[torch.autograd.Function]

    @functools.cached_property
    def apply(self) -> Callable[..., tuple[torch.Tensor, ...]]:
        """function.apply without its preparations for transforms of torch.func."""
        return super(torch.autograd.Function, self.function).apply


def op(
    schema: str,
    backward_schema: str,
    *,
    reference: Callable[..., tuple[torch.Tensor, ...]],
    fake: Callable[..., tuple[torch.Tensor, ...]] | None = None,
    backward_fake: Callable[..., tuple[torch.Tensor, ...]],
    backward_arguments: Callable[..., tuple],
    derivative: Callable[..., Tensors],
    kernels: dict[str, Callable[..., list[str]]],
    differentiable: int = 1,
    keep: tuple[int, ...] = (),
) -> Op:
    """Define `fastattn::<name>_fwd` and `_bwd`, with the reference as their fallback on any device.

    Where `kernels` has "triton", their overloads `.triton` run the functions of these names in
    `triton.py` beside the reference, which is imported by the first call.

    The forward reference also computes output shapes on fake tensors, unless `fake` is given
    because the reference reads values. The backward op needs none of its own:
    `backward_arguments(*backward_args)` gives the forward arguments and the gradients from which
    autograd over the reference derives it.
    """
    name = schema.split("(", 1)[0].removesuffix("_fwd")
    record = Op(name, reference, derivative, kernels, differentiable, keep, backward_arguments)

    def reference_backward(*args: Any) -> tuple[torch.Tensor, ...]:
        forward_args, grads, wanted = backward_arguments(*args)
        # Of these arguments, hence real; of no elements where not asked for.
        outs = backward_fake(*args)
        with torch._C._SetExcludeDispatchKeyGuard(_AUTOGRAD, False):  # it is off below an op
            found = vjp(record, forward_args, grads, wanted, create_graph=False)
        for out, grad in zip(outs, found, strict=True):
            if out.numel():
                out.zero_() if grad is None else out.copy_(grad)
        return outs

    fakes = fake or reference, backward_fake
    schemas = schema, backward_schema

    def define(overload: str, bodies: tuple[Callable[..., Any], Callable[..., Any]]) -> TorchOps:
        ops = [
            define_op(definition, overload, body, shapes)
            for definition, body, shapes in zip(schemas, bodies, fakes, strict=True)
        ]
        return TorchOps(*ops, _function(record, ops[0]))

    triton = None
    if "triton" in kernels:
        module = f"{reference.__module__.rpartition('.')[0]}.triton"
        triton = define(
            "triton", (imported(module, f"{name}_fwd"), imported(module, f"{name}_bwd"))
        )
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    compiled = define("", (reference, reference_backward))
    for attribute, value in (
        ("tensors", _tensors(compiled.forward)),
        ("compiled", compiled),
        ("triton", triton),
        ("cuda_backward", has_kernel(f"fastattn::{name}_bwd", "CUDA")),
    ):
        object.__setattr__(record, attribute, value)
    OPS[name] = record
    return record


def _tensors(op: torch._ops.OpOverload) -> int:
    """How many arguments are tensors or None, which are the leading ones."""
    return sum("Tensor" in str(argument.type) for argument in op._schema.arguments)


def define_op(
    schema: str, overload: str, body: Callable[..., Any], fake: Callable[..., Any]
) -> torch._ops.OpOverload:
    """A torch op of this schema and overload, which runs `body` on any device."""
    packet, _, signature = schema.partition("(")
    qualified = f"fastattn::{packet}" + (overload and f".{overload}")
    torch.library.define(qualified, f"({signature}")
    torch.library.impl(qualified, "CompositeExplicitAutograd", body)
    torch.library.register_fake(qualified, fake)
    return getattr(getattr(torch.ops.fastattn, packet), overload or "default")


def imported(module: str, name: str) -> Callable[..., tuple[torch.Tensor, ...]]:
    """A function of a module that is imported when it is called."""

    def call(*args: Any) -> tuple[torch.Tensor, ...]:
        return getattr(importlib.import_module(module), name)(*args)

    return call


@dataclass(frozen=True, eq=False)
class InferenceOp:
    """A torch op without a derivative, which may write into its arguments."""

    name: str
    reference: Callable[..., Any]
    kernels: dict[str, Callable[..., list[str]]]
    compiled: Any
    triton: Any
    written: tuple[int, ...]  # the arguments that the schema marks as written to

    def __call__(self, *args: Any) -> Any:
        """Run the op on the kernel that dispatch chooses."""
        kernel = dispatch.choose(self, args).kernel
        if kernel == "reference":
            return self.reference(*args)
        outs = (self.triton if kernel in TRITON else self.compiled)(*args)
        if not torch.compiler.is_compiling():
            count_writes(*(args[i] for i in self.written))
        return outs


def inference_op(
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    kernels: dict[str, Callable[..., list[str]]],
    file: str = "triton",
) -> InferenceOp:
    """Define `fastattn::<name>`, with the reference as its fallback on any device.

    Where `kernels` has "triton", its overload `.triton` runs the function of this name in
    `<file>.py` beside the reference, which is imported by the first call.

    `fake` computes output shapes. Arguments that the op writes to bear an alias annotation with an
    exclamation mark in the schema.
    """
    name = schema.split("(", 1)[0]
    compiled, triton = define_op(schema, "", reference, fake), None
    if "triton" in kernels:
        module = f"{reference.__module__.rpartition('.')[0]}.{file}"
        triton = define_op(schema, "triton", imported(module, name), fake)
    written = tuple(
        i
        for i, argument in enumerate(compiled._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )
    record = InferenceOp(name, reference, kernels, compiled, triton, written)
    OPS[name] = record
    return record


def count_writes(*tensors: torch.Tensor) -> None:
    """Tell autograd, which would miss it, that a kernel has written to these tensors."""
    for tensor in tensors:
        if not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)


@dataclass(frozen=True, eq=False)
class PlainOp:
    """What a function tries first: an op in C++ that takes plain calls, on the CPU.

    Small calls cost what is done around the kernel. This op takes the function's own arguments,
    tensors first, gives its results and no more, and checks everything in C++.
    """

    run: Callable[..., Any]
    required: int  # the leading tensors that are there in any call
    tensors: int  # and those that may be None, behind them
    alone: bool  # it returns one tensor
    record: Op | None  # the op that records a gradient, if there is one,
    arguments: Callable[..., tuple]  # and what it takes in place of the same arguments

    def __call__(self, *args: Any) -> Any:
        """The results, or None for a call that is not plain or not right.

        Then checks in Python say what is wrong, in words: they take longer than a small call, and
        most calls need none.
        """
        if not dispatch.plain():
            return None
        tensors = args[: self.tensors]
        for tensor in tensors:
            if tensor is not None and type(tensor) not in ORDINARY:
                return None
        for tensor in args[: self.required]:
            if tensor is None:
                return None
        try:
            if torch.is_grad_enabled():
                for tensor in tensors:
                    if tensor is not None and tensor.requires_grad:
                        return self._recorded(args)
            return self.run(*args)
        except (RuntimeError, TypeError, ValueError):
            return None

    def _recorded(self, args: tuple) -> Any:
        if self.record is None:
            return None
        for tensor in args[: self.tensors]:
            if tensor is not None and (
                not tensor.is_cpu or tensor.layout is not torch.strided or tensor.is_nested
            ):
                return None
        outs = self.record.compiled.apply(*self.arguments(*args))
        return outs[0] if self.alone else outs


def plain_op(
    schema: str, record: Op | None = None, arguments: Callable[..., tuple] | None = None
) -> PlainOp:
    """Define `fastattn::<name>.plain`, which the library has for the CPU and no one else.

    Where a gradient is needed `record` runs instead, on `arguments(*args)`, which may raise
    ValueError; without it such a call is not plain.
    """
    name, _, signature = schema.partition("(")
    torch.library.define(f"fastattn::{name}.plain", f"({signature}")
    op = getattr(torch.ops.fastattn, name).plain
    kinds = [str(argument.type) for argument in op._schema.arguments]
    required, tensors = kinds.count("Tensor"), sum("Tensor" in kind for kind in kinds)
    alone = len(op._schema.returns) == 1
    return PlainOp(op._op, required, tensors, alone, record, arguments)


def function(name: str, prepare: Callable[..., tuple], record: Op | InferenceOp) -> None:
    """Let `fastattn.explain(name, ...)` know how public arguments become the op's."""
    FUNCTIONS[name] = (prepare, record)


def explain(function_name: str, *args: Any, **kwargs: Any) -> dispatch.Choice:
    """Say which kernel `fastattn.<function_name>(*args, **kwargs)` would run on, and why.

    Nothing is computed. Returns a `Choice` whose `refused` maps each better kernel to its reasons.

    Raises:
        ValueError: the function is unknown, or as the function itself would.
    """
    if function_name not in FUNCTIONS:
        raise ValueError(f"function_name must be one of {sorted(FUNCTIONS)}, got {function_name!r}")
    prepare, record = FUNCTIONS[function_name]
    return dispatch.choose(record, prepare(*args, **kwargs))


def vjp(
    record: Op, args: tuple, grads: Tensors, wanted: tuple[int, ...], *, create_graph: bool
) -> list:
    """Gradients of the reference with respect to the arguments at positions `wanted`.

    `grads` belong to the leading outputs; None stands for a zero gradient. With `create_graph` the
    arguments are those of the graph, and the result is differentiable in turn.
    """

    def own(i: int, arg: Any) -> Any:
        # One tensor may stand in several places, each of which has a gradient.
        if not isinstance(arg, torch.Tensor):
            return arg
        return arg.view_as(arg) if create_graph else arg.detach().requires_grad_(i in wanted)

    with torch.enable_grad():
        args = tuple(own(i, arg) for i, arg in enumerate(args))
        pairs = [
            (out, grad)
            for out, grad in zip(record.reference(*args), grads, strict=False)
            if grad is not None and out.requires_grad
        ]
        inputs = {
            i: args[i]
            for i in wanted
            if isinstance(args[i], torch.Tensor) and args[i].requires_grad
        }
        found = torch.autograd.grad(
            [out for out, _ in pairs],
            list(inputs.values()),
            [grad.to(out.dtype) for out, grad in pairs],
            create_graph=create_graph,
            allow_unused=True,
        )
    by_position = dict(zip(inputs, found, strict=True))
    return [by_position.get(i) for i in wanted]


def _distinct(args: tuple) -> tuple:
    """A view of each tensor that has come before: torch.compile traces no Function with repeats."""
    return tuple(
        arg.view_as(arg)
        if isinstance(arg, torch.Tensor) and any(arg is before for before in args[:i])
        else arg
        for i, arg in enumerate(args)
    )


def _function(record: Op, forward_op: Any) -> type[torch.autograd.Function]:
    # Plain names for the methods to close over: torch.compile in torch 2.10 knows no other objects.
    name, derivative, tensors = record.name, record.derivative, _tensors(forward_op)
    differentiable, keep = record.differentiable, record.keep

    class Fused(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> tuple[torch.Tensor, ...]:
            outs = forward_op(*args)
            ctx.save_for_backward(*args[:tensors], *[outs[i] for i in keep])
            ctx.others = args[tensors:]
            ctx.set_materialize_grads(False)
            return outs[:differentiable]

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor | None) -> Tensors:
            saved = ctx.saved_tensors
            args = (*saved[:tensors], *ctx.others)
            count = len(args)
            if all([grad is None for grad in grads]):
                return (None,) * count
            if torch.is_grad_enabled():  # create_graph=True: the reference is differentiable again
                wanted = tuple(i for i in range(count) if ctx.needs_input_grad[i])
                found = vjp(OPS[name], args, grads, wanted, create_graph=True)
                by_position = dict(zip(wanted, found, strict=True))
                return tuple(by_position.get(i) for i in range(count))
            return derivative(ctx.needs_input_grad, args, saved[tensors:], grads)

    Fused.__name__ = Fused.__qualname__ = name
    return Fused
