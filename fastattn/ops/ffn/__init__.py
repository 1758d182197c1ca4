"""linear with a fused activation, and the feed-forward block, plain and gated."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastattn import _library, checks, dispatch, registry
from fastattn.ops import philox
from fastattn.ops.ffn import choice, reference

ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu")


def _cpu_refusals(input: Tensor, *others: object) -> list[str]:
    return dispatch.cpu_refusals(input)  # and all the others are like it


def _product(input: Tensor, *weights: Tensor) -> choice.Product:
    """What projects `input` by all of these weights together."""
    cols, depth = sum(weight.shape[0] for weight in weights), weights[0].shape[1]
    return choice.Product(math.prod(input.shape[:-1]), cols, depth)


def _linear_gpu_refusals(
    kernel: str,
    refusals: Callable[..., list[str]],  # of the kernels' language
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    save: bool,
) -> list[str]:
    if reasons := refusals(input):
        return reasons
    product = _product(input, weight)
    saved = 0 if activation == "identity" else 1 if save else 2
    return choice.refusals(
        kernel,
        input,
        (product, *product.gradients()) if save else (product,),
        saved * product.rows * product.cols,
    )


def _linear_derivative(needs: tuple, args: tuple, outs: tuple, grads: tuple) -> tuple:
    input, weight, bias, activation, _ = args
    dx, dweight, dbias = LINEAR.backward(
        grads[0].contiguous(), input, weight, bias, outs[0], activation, *needs[:3]
    )
    found = (dx, dweight, dbias)
    return (*(g if need else None for g, need in zip(found, needs, strict=False)), None, None)


def _empty_if(wanted: bool, tensor: Tensor | None, other: Tensor) -> Tensor:
    """A gradient, laid out as its tensor, or one of no elements."""
    if not wanted or tensor is None:
        return other.new_empty(0)
    return torch.empty_like(tensor)


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
        "cpu": _cpu_refusals,
        "cuda": functools.partial(_linear_gpu_refusals, "cuda", dispatch.cuda_refusals),
        "triton": functools.partial(_linear_gpu_refusals, "triton", dispatch.triton_refusals),
    },
    keep=(1,),
)


def _ffn_gpu_refusals(
    kernel: str,
    refusals: Callable[..., list[str]],
    input: Tensor,
    up_weight: Tensor,
    up_bias: Tensor | None,
    gate_weight: Tensor | None,
    gate_bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    seed: Tensor | None,
    activation: str,
    dropout_p: float,
    save: bool,
) -> list[str]:
    if reasons := refusals(input):
        return reasons
    projections = (up_weight,) if gate_weight is None else (gate_weight, up_weight)
    up = _product(input, *projections)
    hidden = up.rows * up_weight.shape[0]
    down = choice.Product(up.rows, *down_weight.shape)
    products = [up, down]
    if _save(input, up_weight, up_bias, gate_weight, gate_bias, down_weight, down_bias):
        products += [*up.gradients(), *down.gradients()]
        if not save:
            products.append(up)  # again
    # Backward writes anew what the activation gives, which eager keeps.
    saved = len(projections) - 1 if save else 2 * len(projections)
    return choice.refusals(kernel, input, products, saved * hidden)


def _ffn_derivative(needs: tuple, args: tuple, outs: tuple, grads: tuple) -> tuple:
    *tensors, activation, dropout_p, _ = args  # with the seed
    found = FFN.backward(grads[0].contiguous(), *tensors, *outs, activation, dropout_p, *needs[:7])
    grads = (g if need else None for g, need in zip(found, needs, strict=False))
    return (*grads, None, None, None, None)


def _ffn_backward_arguments(grad_out: Tensor, *rest: object) -> tuple:
    tensors, (activation, dropout_p) = rest[:8], rest[10:12]
    return (*tensors, activation, dropout_p, False), (grad_out,), tuple(range(7))


def _ffn_backward_fake(grad_out: Tensor, *rest: object) -> tuple[Tensor, ...]:
    tensors, needs = rest[:7], rest[12:]
    return tuple(
        _empty_if(need, tensor, tensors[0]) for need, tensor in zip(needs, tensors, strict=True)
    )


FFN = registry.op(
    "ffn_fwd(Tensor input, Tensor up_weight, Tensor? up_bias, Tensor? gate_weight,"
    " Tensor? gate_bias, Tensor down_weight, Tensor? down_bias, Tensor? seed, str activation,"
    " float dropout_p, bool save)"
    " -> (Tensor out, Tensor up, Tensor gate)",
    "ffn_bwd(Tensor grad_out, Tensor input, Tensor up_weight, Tensor? up_bias,"
    " Tensor? gate_weight, Tensor? gate_bias, Tensor down_weight, Tensor? down_bias, Tensor? seed,"
    " Tensor up, Tensor gate, str activation, float dropout_p, bool need_input,"
    " bool need_up_weight, bool need_up_bias, bool need_gate_weight, bool need_gate_bias,"
    " bool need_down_weight, bool need_down_bias)"
    " -> (Tensor grad_input, Tensor grad_up_weight, Tensor grad_up_bias,"
    " Tensor grad_gate_weight, Tensor grad_gate_bias, Tensor grad_down_weight,"
    " Tensor grad_down_bias)",
    reference=reference.ffn,
    backward_arguments=_ffn_backward_arguments,
    backward_fake=_ffn_backward_fake,
    derivative=_ffn_derivative,
    kernels={
        "cpu": _cpu_refusals,
        "cuda": functools.partial(_ffn_gpu_refusals, "cuda", dispatch.cuda_refusals),
        "triton": functools.partial(_ffn_gpu_refusals, "triton", dispatch.triton_refusals),
    },
    keep=(1, 2),
)


def _checked_activation(activation: str | None, choices: tuple) -> str:
    if activation not in choices:
        raise ValueError(f"activation must be one of {list(choices)}, got {activation!r}")
    return "identity" if activation is None else activation


def _known(activation: str) -> bool:
    return type(activation) is str and activation in ACTIVATIONS


def _save(*tensors: Tensor | None) -> bool:
    """Whether a gradient is needed; the tensors may still be anything."""
    return torch.is_grad_enabled() and any([getattr(t, "requires_grad", False) for t in tensors])


PLAIN_LINEAR = registry.plain_op(
    "linear(Tensor input, Tensor weight, Tensor? bias, str activation) -> Tensor",
    LINEAR,
    lambda input, weight, bias, activation: (input, weight, bias, activation, True),
)
PLAIN_FFN = registry.plain_op(
    "ffn(Tensor input, Tensor up_weight, Tensor down_weight, Tensor? up_bias, Tensor? down_bias,"
    " Tensor? gate_weight, Tensor? gate_bias, str activation) -> Tensor",
    FFN,
    lambda input, up_weight, down_weight, up_bias, down_bias, gate_weight, gate_bias, activation: (
        *(input, up_weight, up_bias, gate_weight, gate_bias, down_weight, down_bias, None),
        *(activation, 0.0, True),
    ),
)


def _laid_out(parameter: Tensor | None) -> Tensor | None:
    """A weight or a bias as the kernels take it: contiguous, or on the CPU a matrix's transpose."""
    if parameter is None or (
        parameter.dim() == 2
        and parameter.is_cpu
        and dispatch.forced() in (None, "cpu")
        and not _library.WHY_NOT
        and parameter.t().is_contiguous()
    ):
        return parameter
    return parameter.contiguous()


def _linear_args(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None
) -> tuple:
    input, weight, bias = dispatch.autocast(input, weight, bias)
    checks.features(input)
    checks.projection("", weight, bias, input, input.shape[-1])
    return (
        input.contiguous(),
        _laid_out(weight),
        checks.contiguous(bias),
        _checked_activation(activation, (None, *ACTIVATIONS)),
        activation is not None and _save(input, weight, bias),
    )


def linear(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """`activation(input @ weight.T + bias)` with bias and activation fused into the product.

    Args:
        input: [..., in_features], fp32, bf16, fp16 or fp64; products are summed in at least fp32.
        weight: [out_features, in_features], as `torch.nn.Linear` keeps it, or on the CPU the
            transpose of what lies so in memory, as GPT-2 has it; else it is copied.
        bias: [out_features].
        activation: None, "relu", "gelu" (erf, arXiv:1606.08415), "gelu_tanh" or "silu".

    Returns:
        [..., out_features] in the dtype of `input`; under `torch.autocast` in its dtype.

    Raises:
        TypeError: dtypes differ or are none of the above. ValueError: a shape, a device or the
        activation does not fit.
    """
    if activation is None or _known(activation):
        out = PLAIN_LINEAR(input, weight, bias, activation or "identity")
        if out is not None:
            return out
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
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    recompute: bool = False,
) -> tuple:
    input, up_weight, down_weight, up_bias, down_bias, gate_weight, gate_bias = dispatch.autocast(
        input, up_weight, down_weight, up_bias, down_bias, gate_weight, gate_bias
    )
    checks.features(input)
    hidden = checks.projection("up_", up_weight, up_bias, input, input.shape[-1])
    checks.projection("down_", down_weight, down_bias, input, hidden)
    if gate_weight is not None:
        gate = checks.projection("gate_", gate_weight, gate_bias, input, input.shape[-1])
        if gate != hidden:
            raise ValueError(f"gate_weight must have up_weight's {hidden} rows, got {gate}")
    elif gate_bias is not None:
        raise ValueError("gate_bias needs a gate_weight, got None")
    activation = _checked_activation(activation, ACTIVATIONS)
    seed = philox.checked_seed(dropout_p, seed, input.device)
    if not isinstance(recompute, bool):
        raise TypeError(f"recompute must be a bool, got {type(recompute).__name__}")
    tensors = (up_weight, up_bias, gate_weight, gate_bias, down_weight, down_bias)
    save = not recompute and _save(input, *tensors)
    tensors = (input.contiguous(), *(_laid_out(tensor) for tensor in tensors))
    return (*tensors, seed, activation, float(dropout_p), save)


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
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    recompute: bool = False,
) -> Tensor:
    """The Transformer's feed-forward block: two projections, or three with a gate.

    Plain: `down(dropout(activation(up(input))))`. With `gate_weight`:
    `down(dropout(activation(gate(input)) * up(input)))`, which is SwiGLU for "silu", GeGLU for
    "gelu" and "gelu_tanh", ReGLU for "relu" (Shazeer 2020, arXiv:2002.05202). On the CPU, where
    there is no dropout and nothing is kept for backward, [..., hidden] takes no memory but some
    hundred rows of it.

    Args:
        input: [..., features], fp32, bf16, fp16 or fp64; products are summed in at least fp32.
        up_weight, gate_weight: [hidden, features]; down_weight: [out_features, hidden]; in memory
            as `linear` takes them.
        up_bias, gate_bias: [hidden]; down_bias: [out_features].
        activation: "relu", "gelu" (erf), "gelu_tanh" or "silu".
        dropout_p: probability of dropping an element of [..., hidden], the rest scaled by
            1 / (1 - p). Bits come from Philox 4x32-10, counted by row and column, the same for any
            kernel and any number of threads; backward draws them again and keeps no mask.
        seed: an int or one int64 for dropout; drawn from torch's generator when None.
        recompute: forward keeps nothing of [..., hidden] for backward, which projects `input`
            again, for the same gradients bit by bit. Otherwise it keeps the projections, not what
            the activation makes of them. Of no use inside a transform of torch.func.

    Returns:
        [..., out_features] in the dtype of `input`; under `torch.autocast` in its dtype.

    Raises:
        TypeError: dtypes differ or are none of the above, or an option is of another type.
        ValueError: a shape, a device or an option does not fit.
    """
    if recompute is False and _known(activation) and philox.unused(dropout_p, seed):
        weights = up_weight, down_weight, up_bias, down_bias, gate_weight, gate_bias
        out = PLAIN_FFN(input, *weights, activation)
        if out is not None:
            return out
    args = _ffn_args(
        input,
        up_weight,
        down_weight,
        up_bias,
        down_bias,
        gate_weight=gate_weight,
        gate_bias=gate_bias,
        activation=activation,
        dropout_p=dropout_p,
        seed=seed,
        recompute=recompute,
    )
    if recompute and not dispatch.transforms() and dispatch.choose(FFN, args).kernel == "reference":
        # of which autograd would keep all
        return checkpoint(_out, *args, use_reentrant=False, preserve_rng_state=False)
    return _out(*args)


def _out(*args: object) -> Tensor:
    return FFN(*args)[0]


registry.function("linear", _linear_args, LINEAR)
registry.function("ffn", _ffn_args, FFN)
