"""Rotary position embedding of queries and keys: forward, backward and in place."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastattn import checks, dispatch, registry
from fastattn.ops.rope import reference


def _refusals(
    common: Callable[..., list[str]],
    query: Tensor,
    key: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *rest: Any,
) -> list[str]:
    # The other tensors are on query's device and of its dtype, or fp32.
    reasons = common(query)
    if cos.requires_grad or sin.requires_grad:
        reasons.append("cos or sin requires a gradient")
    return reasons


def _derivative(needs: tuple, args: tuple, outs: tuple, grads: tuple) -> tuple:
    found = ROPE.backward(*grads, *args[2:])
    return (
        *(g if grad is not None else None for g, grad in zip(found, grads, strict=True)),
        *(None,) * (len(args) - 2),
    )


def _backward_arguments(grad_query: Tensor | None, grad_key: Tensor | None, *rest: Any) -> tuple:
    # A rotation is linear: of query and key no more than the shape counts, which gradients have.
    query = grad_key if grad_query is None else grad_query
    return (query, grad_key, *rest), (grad_query, grad_key), (0, 1)


def _backward_fake(
    grad_query: Tensor | None, grad_key: Tensor | None, cos: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    grads = zip((grad_query, grad_key), rest[-2:], strict=True)
    return tuple(
        cos.new_empty(0)
        if grad is None
        else reference.laid_out(
            torch.empty(grad.shape, dtype=grad.dtype, device=grad.device), inside
        )
        for grad, inside in grads
    )


ROPE = registry.op(
    "rope_fwd(Tensor query, Tensor? key, Tensor cos, Tensor sin, Tensor? positions,"
    " bool interleaved, bool query_inside, bool key_inside)"
    " -> (Tensor out_query, Tensor out_key)",
    "rope_bwd(Tensor? grad_query, Tensor? grad_key, Tensor cos, Tensor sin, Tensor? positions,"
    " bool interleaved, bool query_inside, bool key_inside)"
    " -> (Tensor query_grad, Tensor key_grad)",
    reference=reference.rope,
    backward_arguments=_backward_arguments,
    backward_fake=_backward_fake,
    derivative=_derivative,
    kernels={
        "cpu": functools.partial(_refusals, dispatch.cpu_refusals),
        "triton": functools.partial(_refusals, dispatch.triton_refusals),
    },
    differentiable=2,
)


def _reference_in_place(
    query: Tensor,
    key: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    interleaved: bool,
) -> None:
    for x in (query, key):
        if x is not None:
            x.copy_(reference.rotated(x, cos, sin, positions, interleaved))


_COMPILED, _TRITON = (
    registry.define_op(
        "rope_(Tensor(a!) query, Tensor(b!)? key, Tensor cos, Tensor sin, Tensor? positions,"
        " bool interleaved) -> ()",
        overload,
        body,
        fake=lambda *args: None,
    )
    for overload, body in (
        ("", _reference_in_place),
        ("triton", registry.imported(f"{__name__}.triton", "rope_")),
    )
)


class _InPlace(torch.autograd.Function):
    """The rotation in place, undone by backward on the gradients; keeps nothing of x."""

    @staticmethod
    def forward(ctx: Any, op: Any, *args: Any) -> tuple[Tensor, ...]:
        query, key, *rest = args
        op(*args[:6])
        ctx.save_for_backward(*args[2:5])
        ctx.others = rest[3:]
        ctx.set_materialize_grads(False)
        outs = (query,) if key is None else (query, key)
        ctx.mark_dirty(*outs)
        return outs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grads = (*grads, None)[:2]
        args = (*ctx.saved_tensors, *ctx.others)
        if torch.is_grad_enabled():  # a rotation is linear: the derivative is one of its kind
            cos, sin, *rest = args
            found = [None if g is None else ROPE(g, None, cos, -sin, *rest)[0] for g in grads]
        else:
            found = _derivative((), (None, None, *args), (), grads)[:2]
        return None, *found, *(None,) * len(args)


def _checked(
    query: Tensor,
    key: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    *,
    interleaved: bool = False,
    inplace: bool = False,
) -> tuple:
    checks.floating("query", query)
    for name, flag in (("interleaved", interleaved), ("inplace", inplace)):
        if not isinstance(flag, bool):
            raise TypeError(f"{name} must be a bool, got {type(flag).__name__}")
    for name, x in (("query", query), ("key", key)):
        if x is None:
            continue
        checks.same(name, x, "query", query, shape=False)
        if x.dim() != 4:
            raise ValueError(f"{name} must be (B, H, S, D), got {x.dim()} dimensions")
        if inplace and any(n > 1 and s == 0 for n, s in zip(x.shape, x.stride(), strict=True)):
            raise ValueError(f"{name} must not repeat elements in memory, got strides {x.stride()}")
    batch, _, length, width = query.shape
    if key is not None and (key.shape[0], *key.shape[2:]) != (batch, length, width):
        raise ValueError(
            f"key must have query's (B, S, D) {[batch, length, width]}, got {list(key.shape)}"
        )
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    tables = []
    for name, table in (("cos", cos), ("sin", sin)):
        checks.floating(name, table)
        checks.on_device(name, table, "query", query)
        if table.shape != cos.shape:
            raise ValueError(f"sin must have cos' shape {list(cos.shape)}, got {list(sin.shape)}")
        if table.dim() < 2 or 2 * table.shape[-1] > width:
            raise ValueError(
                f"{name} must be (..., angles) with 2 * angles <= D = {width}, "
                f"got {list(table.shape)}"
            )
        table = table.to(wide)
        tables.append(table if table.stride(-1) == 1 else table.contiguous())
    shape = tuple(cos.shape[:-1])
    if positions is None:
        if shape not in ((length,), (1, length), (batch, length)):
            raise ValueError(
                f"cos must be (S, angles) or (B, S, angles) with (B, S) = {[batch, length]}, "
                f"got {list(cos.shape)}"
            )
    else:
        checks.on_device("positions", positions, "query", query)
        if positions.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"positions must be int64 or int32, got {positions.dtype}")
        if tuple(positions.shape) not in ((length,), (1, length), (batch, length)):
            raise ValueError(
                f"positions must be (S,) or (B, S) with (B, S) = {[batch, length]}, "
                f"got {list(positions.shape)}"
            )
        if len(shape) != 1:
            raise ValueError(
                f"cos must be a table (positions, angles) for positions, got {list(cos.shape)}"
            )
        _in_table(positions, shape[0])
        positions = positions.long().expand(batch, length)
    return query, key, *tables, positions, interleaved


def _in_table(positions: Tensor, count: int) -> None:
    """Raise where a position has no angles."""
    if not positions.numel() or not checks.readable(positions):
        return
    low, high = positions.aminmax()
    if low < 0 or high >= count:
        raise ValueError(f"positions must be in [0, {count}), got {low} to {high}")


def _heads_inside(x: Tensor | None) -> bool:
    """Whether x [B, H, S, D] lies in memory as [B, S, H, D]."""
    return x is not None and bool(x.stride(1) < x.stride(2))


def _rope_args(
    query: Tensor, key: Tensor | None, cos: Tensor, sin: Tensor, **options: Any
) -> tuple:
    args = _checked(query, key, cos, sin, **options)
    return *args, _heads_inside(query), _heads_inside(key)


def _plain_arguments(
    query: Tensor, cos: Tensor, sin: Tensor, key: Tensor | None, interleaved: bool
) -> tuple:
    """What the op takes of a plain call that needs a gradient."""
    if query.dim() != 4 or cos.requires_grad or sin.requires_grad:
        raise ValueError("query, cos or sin")
    if key is not None and (
        key.dim() != 4
        or key.dtype is not query.dtype
        or (key.shape[0], *key.shape[2:]) != (query.shape[0], *query.shape[2:])
    ):
        raise ValueError("key")
    inside = _heads_inside(query), _heads_inside(key)
    return query, key, cos, sin, None, interleaved, *inside


PLAIN_ROPE = registry.plain_op(
    "apply_rope(Tensor query, Tensor cos, Tensor sin, Tensor? key, bool interleaved)"
    " -> (Tensor out_query, Tensor? out_key)",
    ROPE,
    _plain_arguments,
)


def apply_rope(
    query: Tensor,
    key: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *,
    positions: Tensor | None = None,
    interleaved: bool = False,
    inplace: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864).

    Turns pairs (a, b) of a row by the angle of its position: (a cos - b sin, b cos + a sin). Of a
    row's D elements the first 2 * angles are turned, the others kept. Backward turns the gradients
    by the negative angles and keeps nothing of query and key in memory for itself.

    Args:
        query: [B, H, S, D] in fp32, bf16, fp16 or fp64, with any strides; a tensor [B, S, H, D] is
            passed as its `transpose(1, 2)`.
        key: [B, Hkv, S, D], or None to rotate `query` alone.
        cos, sin: [S, angles] or [B, S, angles], floating; computed with in fp32 (fp64 for fp64).
            Hugging Face's tables hold every angle twice: pass `cos[..., : cos.shape[-1] // 2]`.
        positions: int64 or int32 [S] or [B, S], each row's own line in tables [N, angles].
        interleaved: pairs are neighbours (GPT-J, arXiv:2104.09864) rather than element i with
            i + angles (GPT-NeoX, LLaMA).
        inplace: write the results over `query` and `key` and return these.

    Returns:
        (query, key) rotated, or query alone without a key, in their dtype and laid out as they are:
        contiguous, or as [B, S, H, D] where the heads lie inside.

    Raises:
        TypeError: a dtype or a kind of argument is wrong. ValueError: a shape, a device or a
        position does not fit, or an element to be overwritten stands for several. Positions on a
        GPU are not waited for: the kernel makes NaN of rows whose position is in no table.
    """
    if positions is None and inplace is False and type(interleaved) is bool:
        outs = PLAIN_ROPE(query, cos, sin, key, interleaved)
        if outs is not None:
            return outs[0] if key is None else outs
    options = {"positions": positions, "interleaved": interleaved, "inplace": inplace}
    args = _rope_args(query, key, cos, sin, **options)
    if inplace:
        return _apply_in_place(args)
    out_query, out_key = ROPE(*args)
    return out_query if key is None else (out_query, out_key)


def _apply_in_place(args: tuple) -> Tensor | tuple[Tensor, Tensor]:
    query, key = args[:2]
    kernel = dispatch.choose(ROPE, args).kernel
    if kernel == "reference" or torch.compiler.is_compiling():
        for x, out in zip((query, key), ROPE(*args), strict=True):
            if x is not None:
                x.copy_(out)
        return query if key is None else (query, key)
    op = _TRITON if kernel in registry.TRITON else _COMPILED
    if torch.is_grad_enabled() and (query.requires_grad or (key is not None and key.requires_grad)):
        _InPlace.apply(op, *args)
    else:
        op(*args[:6])
    return query if key is None else (query, key)


registry.function("apply_rope", _rope_args, ROPE)
