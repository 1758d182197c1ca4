"""layer_norm and rms_norm, each also with a residual added in front."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastattn import checks, dispatch, registry
from fastattn.ops.norm import reference


def _refusals(
    input: Tensor, residual: Tensor | None, weight: Tensor | None, *rest: object
) -> list[str]:
    bias = rest[0] if len(rest) == 2 else None
    return dispatch.cpu_refusals(input, residual, weight, bias)


def _grad_summed(grad: Tensor | None, residual: Tensor | None) -> Tensor | None:
    """None without a residual: torch.compile hands out zeros for what no one has used."""
    return None if grad is None or residual is None else grad.contiguous()


def _layer_norm_derivative(needs: tuple, args: tuple, outs: tuple, grads: tuple) -> tuple:
    input, residual, weight, bias, eps = args
    summed, mean, rstd = outs
    grad_out, grad_summed = grads
    dx, dweight, dbias = LAYER_NORM.backward(
        None if grad_out is None else grad_out.contiguous(),
        _grad_summed(grad_summed, residual),
        input if residual is None else summed,
        weight,
        bias,
        mean,
        rstd,
        eps,
    )
    return (
        dx if needs[0] else None,
        dx if needs[1] else None,
        dweight if needs[2] else None,
        dbias if needs[3] else None,
        None,
    )


def _rms_norm_derivative(needs: tuple, args: tuple, outs: tuple, grads: tuple) -> tuple:
    input, residual, weight, eps = args
    summed, rstd = outs
    grad_out, grad_summed = grads
    dx, dweight = RMS_NORM.backward(
        None if grad_out is None else grad_out.contiguous(),
        _grad_summed(grad_summed, residual),
        input if residual is None else summed,
        weight,
        rstd,
        eps,
    )
    return (
        dx if needs[0] else None,
        dx if needs[1] else None,
        dweight if needs[2] else None,
        None,
    )


def _empty_like(tensor: Tensor | None, other: Tensor) -> Tensor:
    return other.new_empty(0) if tensor is None else torch.empty_like(tensor)


LAYER_NORM = registry.op(
    "layer_norm_fwd(Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, float eps)"
    " -> (Tensor out, Tensor summed, Tensor mean, Tensor rstd)",
    "layer_norm_bwd(Tensor? grad_out, Tensor? grad_summed, Tensor summed, Tensor? weight,"
    " Tensor? bias, Tensor mean, Tensor rstd, float eps)"
    " -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)",
    reference=reference.layer_norm,
    backward_arguments=lambda grad_out, grad_summed, summed, weight, bias, mean, rstd, eps: (
        (summed, torch.zeros_like(summed), weight, bias, eps),
        (grad_out, grad_summed),
        (0, 2, 3),
    ),
    backward_fake=lambda grad_out, grad_summed, summed, weight, bias, mean, rstd, eps: (
        torch.empty_like(summed),
        _empty_like(weight, summed),
        _empty_like(bias, summed),
    ),
    derivative=_layer_norm_derivative,
    kernels={"cpu": _refusals},
    differentiable=2,
    keep=(1, 2, 3),
)

RMS_NORM = registry.op(
    "rms_norm_fwd(Tensor input, Tensor? residual, Tensor? weight, float eps)"
    " -> (Tensor out, Tensor summed, Tensor rstd)",
    "rms_norm_bwd(Tensor? grad_out, Tensor? grad_summed, Tensor summed, Tensor? weight,"
    " Tensor rstd, float eps) -> (Tensor grad_input, Tensor grad_weight)",
    reference=reference.rms_norm,
    backward_arguments=lambda grad_out, grad_summed, summed, weight, rstd, eps: (
        (summed, torch.zeros_like(summed), weight, eps),
        (grad_out, grad_summed),
        (0, 2),
    ),
    backward_fake=lambda grad_out, grad_summed, summed, weight, rstd, eps: (
        torch.empty_like(summed),
        _empty_like(weight, summed),
    ),
    derivative=_rms_norm_derivative,
    kernels={"cpu": _refusals},
    differentiable=2,
    keep=(1, 2),
)


def _rows(
    input: Tensor,
    residual: Tensor | None,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Check the arguments of a norm, and flatten: input [rows, cols], weight and bias [cols]."""
    checks.floating("input", input)
    if not isinstance(normalized_shape, (int, Sequence)):
        raise TypeError(
            "normalized_shape must be an int or a sequence of ints, "
            f"got {type(normalized_shape).__name__}"
        )
    shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    if not shape or tuple(input.shape[-len(shape) :]) != shape:
        raise ValueError(
            "normalized_shape must be the last dimensions of input, "
            f"got {list(shape)} for an input of shape {list(input.shape)}"
        )
    checks.finite("eps", eps)
    if residual is not None:
        checks.same("residual", residual, "input", input)
    cols = math.prod(shape)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        checks.on_device(name, tensor, "input", input)
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} must have the normalized shape {list(shape)}, got {list(tensor.shape)}"
            )
        if tensor.dtype not in (input.dtype, torch.float32):
            raise TypeError(f"{name} must be {input.dtype} or torch.float32, got {tensor.dtype}")
    rows = math.prod(input.shape[: -len(shape)])
    return (
        input.reshape(rows, cols).contiguous(),
        None if residual is None else residual.reshape(rows, cols).contiguous(),
        None if weight is None else weight.reshape(cols).contiguous(),
        None if bias is None else bias.reshape(cols).contiguous(),
    )


def _layer_norm_args(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    residual: Tensor | None = None,
) -> tuple:
    return (*_rows(input, residual, normalized_shape, weight, bias, eps), float(eps))


def _rms_norm_args(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    residual: Tensor | None = None,
) -> tuple:
    if eps is None:
        checks.floating("input", input)
        wide = torch.float64 if input.dtype == torch.float64 else torch.float32
        eps = torch.finfo(wide).eps
    input2d, residual2d, weight, _ = _rows(input, residual, normalized_shape, weight, None, eps)
    return input2d, residual2d, weight, float(eps)


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Layer normalisation, `torch.nn.functional.layer_norm` (Ba et al. 2016, arXiv:1607.06450).

    Args:
        input: [..., *normalized_shape], fp32, bf16, fp16 or fp64; statistics are at least fp32.
        normalized_shape: the trailing dimensions that are normalised together.
        weight, bias: [*normalized_shape], in the dtype of `input` or fp32.
        eps: added to the variance.

    Returns:
        The normalised tensor, in the shape and dtype of `input`.

    Raises:
        TypeError: a dtype is none of the above. ValueError: a shape, device or eps does not fit.
    """
    args = _layer_norm_args(input, normalized_shape, weight, bias, eps)
    return LAYER_NORM(*args)[0].view(input.shape)


def add_layer_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """`layer_norm(input + residual)` in one pass over memory; returns (out, input + residual).

    Takes `layer_norm`'s arguments and a `residual` of the shape and dtype of `input`. The sum is
    rounded to that dtype before it is normalised, as the two separate operations would.

    Raises:
        TypeError, ValueError: as `layer_norm`, and when `residual` differs from `input`.
    """
    checks.tensor("residual", residual)
    args = _layer_norm_args(input, normalized_shape, weight, bias, eps, residual)
    out, summed, *_ = LAYER_NORM(*args)
    return out.view(input.shape), summed.view(input.shape)


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """Root-mean-square normalisation, `torch.nn.functional.rms_norm` (arXiv:1910.07467).

    Args:
        input: [..., *normalized_shape], fp32, bf16, fp16 or fp64; statistics are at least fp32.
        normalized_shape: the trailing dimensions that are normalised together.
        weight: [*normalized_shape], in the dtype of `input` or fp32.
        eps: added to the mean square; None takes the machine epsilon of fp32 (fp64 for fp64).

    Returns:
        The normalised tensor, in the shape and dtype of `input`.

    Raises:
        TypeError: a dtype is none of the above. ValueError: a shape, device or eps does not fit.
    """
    args = _rms_norm_args(input, normalized_shape, weight, eps)
    return RMS_NORM(*args)[0].view(input.shape)


def add_rms_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`rms_norm(input + residual)` in one pass over memory; returns (out, input + residual).

    Takes `rms_norm`'s arguments and a `residual` of the shape and dtype of `input`. The sum is
    rounded to that dtype before it is normalised, as the two separate operations would.

    Raises:
        TypeError, ValueError: as `rms_norm`, and when `residual` differs from `input`.
    """
    checks.tensor("residual", residual)
    args = _rms_norm_args(input, normalized_shape, weight, eps, residual)
    out, summed, _ = RMS_NORM(*args)
    return out.view(input.shape), summed.view(input.shape)


registry.function("layer_norm", _layer_norm_args, LAYER_NORM)
registry.function(
    "add_layer_norm",
    lambda input, residual, *args, **kwargs: _layer_norm_args(
        input, *args, residual=residual, **kwargs
    ),
    LAYER_NORM,
)
registry.function("rms_norm", _rms_norm_args, RMS_NORM)
registry.function(
    "add_rms_norm",
    lambda input, residual, *args, **kwargs: _rms_norm_args(
        input, *args, residual=residual, **kwargs
    ),
    RMS_NORM,
)
