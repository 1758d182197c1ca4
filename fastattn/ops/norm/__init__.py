"""layer_norm and rms_norm, each also with dropout and a residual added in front."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn import checks, dispatch, registry
from fastattn.ops import philox
from fastattn.ops.norm import reference


def _refusals(input: Tensor, *rest: Any) -> list[str]:
    # The other tensors are on input's device, and of its dtype or fp32.
    return dispatch.cpu_refusals(input)


def _cuda_refusals(input: Tensor, *rest: Any) -> list[str]:
    return dispatch.cuda_refusals(input)


def _triton_refusals(input: Tensor, *rest: Any) -> list[str]:
    return dispatch.triton_refusals(input)


def _apart(input: Tensor, residual: Tensor | None, dropout_p: float) -> bool:
    """Whether the gradients of input and residual differ."""
    return residual is not None and (dropout_p > 0 or input.dtype != residual.dtype)


def _sources(args: tuple, outs: tuple, grads: tuple) -> tuple:
    """What the backward op takes in front of the parameters."""
    input, residual = args[:2]
    grad_out, grad_summed = grads
    summed = None if residual is None or not args[-1] else outs[0]
    if grad_out is not None:
        grad_out = grad_out.contiguous()
    # torch.compile hands out zeros for what no one has used.
    grad_summed = None if grad_summed is None or summed is None else grad_summed.contiguous()
    return grad_out, grad_summed, input, residual, summed


def _by_argument(needs: tuple, args: tuple, found: tuple) -> tuple:
    """The gradients (input, residual, parameters ...), each where it is needed."""
    input, residual = args[:2]
    if not _apart(input, residual, args[-2]):
        found = (found[0], found[0], *found[2:])
    wanted = [grad if need else None for grad, need in zip(found, needs, strict=False)]
    return (*wanted, *[None] * (len(args) - len(wanted)))


def _layer_norm_derivative(needs: tuple, args: tuple, outs: tuple, grads: tuple) -> tuple:
    _, _, weight, bias, seed, dims, eps, dropout_p, _ = args
    sources = _sources(args, outs, grads)
    found = LAYER_NORM.backward(*sources, weight, bias, seed, *outs[1:], dims, eps, dropout_p)
    return _by_argument(needs, args, found)


def _rms_norm_derivative(needs: tuple, args: tuple, outs: tuple, grads: tuple) -> tuple:
    _, _, weight, seed, dims, eps, dropout_p, _ = args
    sources = _sources(args, outs, grads)
    found = RMS_NORM.backward(*sources, weight, seed, *outs[1:], dims, eps, dropout_p)
    return _by_argument(needs, args, found)


def _layer_norm_arguments(
    grad_out, grad_summed, input, residual, summed, weight, bias, seed, mean, rstd, *rest
) -> tuple:
    forward_args = (input, residual, weight, bias, seed, *rest, True)
    return forward_args, (grad_out, grad_summed), (0, 1, 2, 3)


def _rms_norm_arguments(
    grad_out, grad_summed, input, residual, summed, weight, seed, rstd, *rest
) -> tuple:
    return (input, residual, weight, seed, *rest, True), (grad_out, grad_summed), (0, 1, 2)


def _fake(input: Tensor, residual: Tensor | None, dropout_p: float, *parameters: Tensor) -> tuple:
    """The gradients' shapes; those of no elements stand for what is not there."""
    residual = residual if _apart(input, residual, dropout_p) else None
    return tuple(
        input.new_empty(0) if t is None else torch.empty_like(t)
        for t in (input, residual, *parameters)
    )


LAYER_NORM = registry.op(
    "layer_norm_fwd(Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? seed,"
    " int dims, float eps, float dropout_p, bool keep_sum)"
    " -> (Tensor out, Tensor summed, Tensor mean, Tensor rstd)",
    "layer_norm_bwd(Tensor? grad_out, Tensor? grad_summed, Tensor input, Tensor? residual,"
    " Tensor? summed, Tensor? weight, Tensor? bias, Tensor? seed, Tensor mean, Tensor rstd,"
    " int dims, float eps, float dropout_p)"
    " -> (Tensor grad_input, Tensor grad_residual, Tensor grad_weight, Tensor grad_bias)",
    reference=reference.layer_norm,
    backward_arguments=_layer_norm_arguments,
    backward_fake=lambda *args: _fake(args[2], args[3], args[12], args[5], args[6]),
    derivative=_layer_norm_derivative,
    kernels={"cpu": _refusals, "cuda": _cuda_refusals, "triton": _triton_refusals},
    differentiable=2,
    keep=(1, 2, 3),
)

RMS_NORM = registry.op(
    "rms_norm_fwd(Tensor input, Tensor? residual, Tensor? weight, Tensor? seed,"
    " int dims, float eps, float dropout_p, bool keep_sum)"
    " -> (Tensor out, Tensor summed, Tensor rstd)",
    "rms_norm_bwd(Tensor? grad_out, Tensor? grad_summed, Tensor input, Tensor? residual,"
    " Tensor? summed, Tensor? weight, Tensor? seed, Tensor rstd,"
    " int dims, float eps, float dropout_p)"
    " -> (Tensor grad_input, Tensor grad_residual, Tensor grad_weight)",
    reference=reference.rms_norm,
    backward_arguments=_rms_norm_arguments,
    backward_fake=lambda *args: _fake(args[2], args[3], args[10], args[5]),
    derivative=_rms_norm_derivative,
    kernels={"cpu": _refusals, "cuda": _cuda_refusals, "triton": _triton_refusals},
    differentiable=2,
    keep=(1, 2),
)


def _checked(
    input: Tensor,
    residual: Tensor | None,
    normalized_shape: Sequence[int],
    parameters: dict[str, Tensor | None],
    eps: float,
) -> tuple[list[Tensor | None], int]:
    """Check the arguments of a norm; the tensors, contiguous, and how many dimensions it spans."""
    checks.floating("input", input)
    if not isinstance(normalized_shape, (int, tuple, Sequence)):  # of which the last is slow to ask
        raise TypeError(
            "normalized_shape must be an int or a sequence of ints, "
            f"got {type(normalized_shape).__name__}"
        )
    shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    dims = len(shape)
    if not dims or input.shape[-dims:] != shape:
        raise ValueError(
            "normalized_shape must be the last dimensions of input, "
            f"got {list(shape)} for an input of shape {list(input.shape)}"
        )
    checks.finite("eps", eps)
    tensors = [input.contiguous(), None]
    if residual is not None:
        checks.on_device("residual", residual, "input", input)
        if residual.shape != input.shape:
            raise ValueError(
                f"residual must have input's shape {list(input.shape)}, got {list(residual.shape)}"
            )
        if residual.dtype != input.dtype and (
            residual.dtype != torch.float32 or input.dtype == torch.float64
        ):
            raise TypeError(
                f"residual must be {input.dtype} or, for a narrower input, torch.float32, "
                f"got {residual.dtype}"
            )
        tensors[1] = residual.contiguous()
    for name, tensor in parameters.items():
        if tensor is not None:
            checks.on_device(name, tensor, "input", input)
            if tensor.shape != shape:
                raise ValueError(
                    f"{name} must have the normalized shape {list(shape)}, got {list(tensor.shape)}"
                )
            if tensor.dtype not in (input.dtype, torch.float32):
                raise TypeError(
                    f"{name} must be {input.dtype} or torch.float32, got {tensor.dtype}"
                )
            tensor = tensor.contiguous()
        tensors.append(tensor)
    return tensors, dims


def _layer_norm_args(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple:
    parameters = {"weight": weight, "bias": bias}
    tensors, dims = _checked(input, None, normalized_shape, parameters, eps)
    return *tensors, None, dims, float(eps), 0.0, False


def _rms_norm_args(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> tuple:
    eps = _epsilon(input, eps)
    tensors, dims = _checked(input, None, normalized_shape, {"weight": weight}, eps)
    return *tensors, None, dims, float(eps), 0.0, False


def _epsilon(input: Tensor, eps: float | None) -> float:
    """The machine epsilon of the statistics where none is given."""
    if eps is not None:
        return eps
    checks.floating("input", input)
    return torch.finfo(torch.float64 if input.dtype == torch.float64 else torch.float32).eps


def _add_layer_norm_args(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    return_sum: bool = True,
) -> tuple:
    checks.tensor("residual", residual)
    parameters = {"weight": weight, "bias": bias}
    tensors, dims = _checked(input, residual, normalized_shape, parameters, eps)
    return *tensors, *_options(input, dims, eps, dropout_p, seed, return_sum)


def _add_rms_norm_args(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    return_sum: bool = True,
) -> tuple:
    eps = _epsilon(input, eps)
    checks.tensor("residual", residual)
    tensors, dims = _checked(input, residual, normalized_shape, {"weight": weight}, eps)
    return *tensors, *_options(input, dims, eps, dropout_p, seed, return_sum)


def _options(
    input: Tensor,
    dims: int,
    eps: float,
    dropout_p: float,
    seed: int | Tensor | None,
    return_sum: bool,
) -> tuple:
    if not isinstance(return_sum, bool):
        raise TypeError(f"return_sum must be a bool, got {type(return_sum).__name__}")
    seed = philox.checked_seed(dropout_p, seed, input.device)
    return seed, dims, float(eps), float(dropout_p), return_sum


def _without_dropout(dropout_p: float, seed: Any, return_sum: bool) -> bool:
    """Whether an `add_` function is asked for no dropout, in options of the right types."""
    return type(return_sum) is bool and philox.unused(dropout_p, seed)


def _dims(input: Tensor, normalized_shape: Sequence[int]) -> int:
    """How many dimensions a plain call normalises together."""
    shape = (normalized_shape,) if type(normalized_shape) is int else normalized_shape
    if not isinstance(shape, (tuple, list)) or input.shape[-len(shape) :] != tuple(shape):
        raise ValueError("normalized_shape")
    return len(shape)


PLAIN_LAYER_NORM = registry.plain_op(
    "layer_norm(Tensor input, Tensor? weight, Tensor? bias, int[1] normalized_shape, float eps)"
    " -> Tensor",
    LAYER_NORM,
    lambda input, weight, bias, shape, eps: (
        *(input, None, weight, bias, None),
        *(_dims(input, shape), eps, 0.0, False),
    ),
)
PLAIN_RMS_NORM = registry.plain_op(
    "rms_norm(Tensor input, Tensor? weight, int[1] normalized_shape, float? eps) -> Tensor",
    RMS_NORM,
    lambda input, weight, shape, eps: (
        *(input, None, weight, None),
        *(_dims(input, shape), _epsilon(input, eps), 0.0, False),
    ),
)
PLAIN_ADD_LAYER_NORM = registry.plain_op(
    "add_layer_norm(Tensor input, Tensor residual, Tensor? weight, Tensor? bias,"
    " int[1] normalized_shape, float eps, bool return_sum) -> (Tensor out, Tensor? summed)",
    LAYER_NORM,
    lambda input, residual, weight, bias, shape, eps, return_sum: (
        *(input, residual, weight, bias, None),
        *(_dims(input, shape), eps, 0.0, return_sum),
    ),
)
PLAIN_ADD_RMS_NORM = registry.plain_op(
    "add_rms_norm(Tensor input, Tensor residual, Tensor? weight,"
    " int[1] normalized_shape, float? eps, bool return_sum) -> (Tensor out, Tensor? summed)",
    RMS_NORM,
    lambda input, residual, weight, shape, eps, return_sum: (
        *(input, residual, weight, None),
        *(_dims(input, shape), _epsilon(input, eps), 0.0, return_sum),
    ),
)


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
    if type(eps) is float:
        out = PLAIN_LAYER_NORM(input, weight, bias, normalized_shape, eps)
        if out is not None:
            return out
    return LAYER_NORM(*_layer_norm_args(input, normalized_shape, weight, bias, eps))[0]


def add_layer_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    return_sum: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """`layer_norm(sum)` of `sum = residual + dropout(input)`, in one pass over memory.

    Serves residual streams that are normalised in front of a block (which go on with the sum) and
    behind it (which do not). Both results are differentiable.

    Args:
        input, normalized_shape, weight, bias, eps: as `layer_norm` takes them.
        residual: the shape of `input`, in its dtype, or fp32 for a bf16 or fp16 `input`, as under
            torch.autocast. The sum is rounded to this dtype before it is normalised, as separate
            operations would.
        dropout_p: probability of dropping an element of `input`, the rest scaled by 1 / (1 - p).
            Bits come from Philox 4x32-10, counted by row and column, the same for any kernel and
            any number of threads; backward draws them again and keeps no mask.
        seed: an int or one int64 for dropout; drawn from torch's generator when None.
        return_sum: False returns `out` alone and never writes the sum to memory; backward adds it
            up again.

    Returns:
        (out, sum), out in the dtype of `input` and sum in that of `residual`, or `out` alone.

    Raises:
        TypeError, ValueError: as `layer_norm`; also when `residual` or an option does not fit.
    """
    outs = None
    if type(eps) is float and _without_dropout(dropout_p, seed, return_sum):
        outs = PLAIN_ADD_LAYER_NORM(
            input, residual, weight, bias, normalized_shape, eps, return_sum
        )
    if outs is None:
        options = {"dropout_p": dropout_p, "seed": seed, "return_sum": return_sum}
        operands = input, residual, normalized_shape, weight, bias, eps
        outs = LAYER_NORM(*_add_layer_norm_args(*operands, **options))
    return outs if return_sum else outs[0]


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
    if eps is None or type(eps) is float:
        out = PLAIN_RMS_NORM(input, weight, normalized_shape, eps)
        if out is not None:
            return out
    return RMS_NORM(*_rms_norm_args(input, normalized_shape, weight, eps))[0]


def add_rms_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    return_sum: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """`rms_norm(sum)` of `sum = residual + dropout(input)`, in one pass over memory.

    Takes `rms_norm`'s arguments and the others, returns and raises as `add_layer_norm`.
    """
    outs = None
    if (eps is None or type(eps) is float) and _without_dropout(dropout_p, seed, return_sum):
        outs = PLAIN_ADD_RMS_NORM(input, residual, weight, normalized_shape, eps, return_sum)
    if outs is None:
        options = {"dropout_p": dropout_p, "seed": seed, "return_sum": return_sum}
        operands = input, residual, normalized_shape, weight, eps
        outs = RMS_NORM(*_add_rms_norm_args(*operands, **options))
    return outs if return_sum else outs[0]


registry.function("layer_norm", _layer_norm_args, LAYER_NORM)
registry.function("add_layer_norm", _add_layer_norm_args, LAYER_NORM)
registry.function("rms_norm", _rms_norm_args, RMS_NORM)
registry.function("add_rms_norm", _add_rms_norm_args, RMS_NORM)
