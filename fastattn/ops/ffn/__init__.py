"""linear with a fused activation, and the feed-forward block, plain and gated."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from fastattn import checks, dispatch, registry
from fastattn.ops.ffn import choice, reference

ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu")


def _linear_refusals(
    input: Tensor, weight: Tensor, bias: Tensor | None, activation: str, save: bool
) -> list[str]:
    return dispatch.cpu_refusals(input)  # and all the others are like it


def _linear_fused_refusals(
    refusals: Callable[..., list[str]],  # of the kernels' language
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    save: bool,
) -> list[str]:
    if reasons := refusals(input):
        return reasons
    saved = 0 if activation == "identity" else 1 if save else 2
    return choice.refusals(input, weight.shape[1:], weight.shape[:1], 3 if save else 1, saved)


def _linear_derivative(needs: tuple, args: tuple, outs: tuple, grads: tuple) -> tuple:
    input, weight, bias, activation, _ = args
    dx, dweight, dbias = LINEAR.backward(
        grads[0].contiguous(), input, weight, bias, outs[0], activation, *needs[:3]
    )
    found = (dx, dweight, dbias)
    return (*(g if need else None for g, need in zip(found, needs, strict=False)), None, None)


def _empty_if(wanted: bool, tensor: Tensor | None, other: Tensor) -> Tensor:
    if not wanted or tensor is None:
        return other.new_empty(0)
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)


LINEAR = registry.op(
    "linear_fwd(Tensor input, Tensor weight, Tensor? bias, str activation, bool save)"
    " -> (Tensor out, Tensor pre)",
    "linear_bwd(Tensor grad_out, Tensor input, Tensor weight, Tensor? bias, Tensor pre,"
    " str activation, bool need_input, bool need_weight, bool need_bias)"
    " -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)",
    reference=reference.linear,
    backward_arguments=lambda grad_out, input, weight, bias, pre, activation, *needs: (
        (input, weight, bias, activation, False),
        (grad_out,),
        (0, 1, 2),
    ),
    backward_fake=lambda grad_out, input, weight, bias, pre, activation, *needs: tuple(
        _empty_if(need, tensor, input)
        for need, tensor in zip(needs, (input, weight, bias), strict=True)
    ),
    derivative=_linear_derivative,
    kernels={
        "cpu": _linear_refusals,
        "cuda": functools.partial(_linear_fused_refusals, dispatch.cuda_refusals),
        "triton": functools.partial(_linear_fused_refusals, dispatch.triton_refusals),
    },
    keep=(1,),
)


def _ffn_refusals(*args: object) -> list[str]:
    return dispatch.cpu_refusals(args[0])  # and all the others are like it


def _ffn_fused_refusals(
    refusals: Callable[..., list[str]],
    input: Tensor,
    up_weight: Tensor,
    up_bias: Tensor | None,
    gate_weight: Tensor | None,
    gate_bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    activation: str,
    save: bool,
) -> list[str]:
    if reasons := refusals(input):
        return reasons
    hidden, features = up_weight.shape
    projections = 1 if gate_weight is None else 2
    depths = (features,) * projections + down_weight.shape[:1]
    # Backward writes anew what the activation gives, which eager keeps.
    saved = projections - 1 if save else 2 * projections
    return choice.refusals(input, depths, (hidden, down_weight.shape[0]), 3 if save else 1, saved)


def _ffn_derivative(needs: tuple, args: tuple, outs: tuple, grads: tuple) -> tuple:
    *tensors, activation, _ = args
    found = FFN.backward(grads[0].contiguous(), *tensors, *outs, activation, *needs[:7])
    return (*(g if need else None for g, need in zip(found, needs, strict=False)), None, None)


def _ffn_backward_arguments(grad_out: Tensor, *rest: object) -> tuple:
    tensors, activation = rest[:7], rest[9]
    return (*tensors, activation, False), (grad_out,), tuple(range(7))


def _ffn_backward_fake(grad_out: Tensor, *rest: object) -> tuple[Tensor, ...]:
    tensors, needs = rest[:7], rest[10:]
    return tuple(
        _empty_if(need, tensor, tensors[0]) for need, tensor in zip(needs, tensors, strict=True)
    )


FFN = registry.op(
    "ffn_fwd(Tensor input, Tensor up_weight, Tensor? up_bias, Tensor? gate_weight,"
    " Tensor? gate_bias, Tensor down_weight, Tensor? down_bias, str activation, bool save)"
    " -> (Tensor out, Tensor up, Tensor gate)",
    "ffn_bwd(Tensor grad_out, Tensor input, Tensor up_weight, Tensor? up_bias,"
    " Tensor? gate_weight, Tensor? gate_bias, Tensor down_weight, Tensor? down_bias, Tensor up,"
    " Tensor gate, str activation, bool need_input, bool need_up_weight, bool need_up_bias,"
    " bool need_gate_weight, bool need_gate_bias, bool need_down_weight, bool need_down_bias)"
    " -> (Tensor grad_input, Tensor grad_up_weight, Tensor grad_up_bias,"
    " Tensor grad_gate_weight, Tensor grad_gate_bias, Tensor grad_down_weight,"
    " Tensor grad_down_bias)",
    reference=reference.ffn,
    backward_arguments=_ffn_backward_arguments,
    backward_fake=_ffn_backward_fake,
    derivative=_ffn_derivative,
    kernels={
        "cpu": _ffn_refusals,
        "cuda": functools.partial(_ffn_fused_refusals, dispatch.cuda_refusals),
        "triton": functools.partial(_ffn_fused_refusals, dispatch.triton_refusals),
    },
    keep=(1, 2),
)


def _checked_linear(
    prefix: str, weight: Tensor, bias: Tensor | None, input: Tensor, in_features: int
) -> int:
    """Check one projection of `in_features`; returns its number of output features."""
    checks.same(prefix + "weight", weight, "input", input, shape=False)
    shape = weight.shape
    if len(shape) != 2 or shape[1] != in_features:
        raise ValueError(f"{prefix}weight must be (out_features, {in_features}), got {list(shape)}")
    if bias is not None:
        checks.same(prefix + "bias", bias, "input", input, shape=False)
        if bias.shape != shape[:1]:
            raise ValueError(f"{prefix}bias must have shape [{shape[0]}], got {list(bias.shape)}")
    return shape[0]


def _checked_input(input: Tensor) -> None:
    checks.floating("input", input)
    if input.dim() == 0:
        raise ValueError("input must be (..., in_features), got a 0-dimensional tensor")


def _checked_activation(activation: str | None, choices: tuple) -> str:
    if activation not in choices:
        raise ValueError(f"activation must be one of {list(choices)}, got {activation!r}")
    return "identity" if activation is None else activation


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _save(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _linear_args(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None
) -> tuple:
    input, weight, bias = dispatch.autocast(input, weight, bias)
    _checked_input(input)
    _checked_linear("", weight, bias, input, input.shape[-1])
    return (
        input.contiguous(),
        weight.contiguous(),
        _contiguous(bias),
        _checked_activation(activation, (None, *ACTIVATIONS)),
        activation is not None and _save(input, weight, bias),
    )


def linear(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """`activation(input @ weight.T + bias)` with bias and activation fused into the product.

    Args:
        input: [..., in_features], fp32, bf16, fp16 or fp64; products are summed in at least fp32.
        weight: [out_features, in_features], as `torch.nn.Linear` keeps it; bias: [out_features].
        activation: None, "relu", "gelu" (erf, arXiv:1606.08415), "gelu_tanh" or "silu".

    Returns:
        [..., out_features] in the dtype of `input`; under `torch.autocast` in its dtype.

    Raises:
        TypeError: dtypes differ or are none of the above. ValueError: a shape, a device or the
        activation does not fit.
    """
    return LINEAR(*_linear_args(input, weight, bias, activation))[0]


def _ffn_args(
    input: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    *,
    gate_weight: Tensor | None = None,
    gate_bias: Tensor | None = None,
    activation: str = "gelu",
) -> tuple:
    input, up_weight, down_weight, up_bias, down_bias, gate_weight, gate_bias = dispatch.autocast(
        input, up_weight, down_weight, up_bias, down_bias, gate_weight, gate_bias
    )
    _checked_input(input)
    hidden = _checked_linear("up_", up_weight, up_bias, input, input.shape[-1])
    _checked_linear("down_", down_weight, down_bias, input, hidden)
    if gate_weight is not None:
        gate = _checked_linear("gate_", gate_weight, gate_bias, input, input.shape[-1])
        if gate != hidden:
            raise ValueError(f"gate_weight must have up_weight's {hidden} rows, got {gate}")
    elif gate_bias is not None:
        raise ValueError("gate_bias needs a gate_weight, got None")
    activation = _checked_activation(activation, ACTIVATIONS)
    tensors = (up_weight, up_bias, gate_weight, gate_bias, down_weight, down_bias)
    save = _save(input, *tensors)
    return (input.contiguous(), *(_contiguous(tensor) for tensor in tensors), activation, save)


def ffn(
    input: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    *,
    gate_weight: Tensor | None = None,
    gate_bias: Tensor | None = None,
    activation: str = "gelu",
) -> Tensor:
    """The Transformer's feed-forward block: two projections, or three with a gate.

    Plain: `down(activation(up(input)))`. With `gate_weight`: `down(activation(gate(input)) *
    up(input))`, which is SwiGLU for "silu", GeGLU for "gelu" and "gelu_tanh", ReGLU for "relu"
    (Shazeer 2020, arXiv:2002.05202). Backward keeps the projections, not what the activation makes
    of them.

    Args:
        input: [..., features], fp32, bf16, fp16 or fp64; products are summed in at least fp32.
        up_weight, gate_weight: [hidden, features]; down_weight: [out_features, hidden].
        up_bias, gate_bias: [hidden]; down_bias: [out_features].
        activation: "relu", "gelu" (erf), "gelu_tanh" or "silu".

    Returns:
        [..., out_features] in the dtype of `input`; under `torch.autocast` in its dtype.

    Raises:
        TypeError: dtypes differ or are none of the above. ValueError: a shape, a device or the
        activation does not fit.
    """
    args = _ffn_args(
        input,
        up_weight,
        down_weight,
        up_bias,
        down_bias,
        gate_weight=gate_weight,
        gate_bias=gate_bias,
        activation=activation,
    )
    return FFN(*args)[0]


registry.function("linear", _linear_args, LINEAR)
registry.function("ffn", _ffn_args, FFN)
