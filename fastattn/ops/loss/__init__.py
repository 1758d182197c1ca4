"""The cross-entropy of a linear layer's logits, without keeping all of them."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn import checks, dispatch, registry
from fastattn.ops.loss import reference

REDUCTIONS = ("none", "mean", "sum")


def _refusals(*args: object) -> list[str]:
    return dispatch.cpu_refusals(args[0])  # and all the others are like it


def _triton_refusals(*args: object) -> list[str]:
    return dispatch.triton_refusals(args[0])


def _wide_if(wanted: bool, tensor: Tensor | None, other: Tensor) -> Tensor:
    dtype = torch.float64 if other.dtype == torch.float64 else torch.float32
    shape = tensor.shape if wanted and tensor is not None else (0,)
    return other.new_empty(shape, dtype=dtype)


def _fake(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    reduction: str,
    *options: object,
) -> tuple[Tensor, ...]:
    loss = _wide_if(True, target if reduction == "none" else input.new_empty(()), input)
    tensors, saves = (input, weight, bias), options[3:]
    return loss, *(_wide_if(s, t, input) for s, t in zip(saves, tensors, strict=True))


def _backward_fake(grad_loss: Tensor, *rest: object) -> tuple[Tensor, ...]:
    tensors, needs = rest[:3], rest[8:]
    return tuple(_wide_if(n, t, rest[0]) for n, t in zip(needs, tensors, strict=True))


def _derivative(needs: tuple, args: tuple, outs: tuple, grads: tuple) -> tuple:
    tensors, reduction = args[:3], args[4]
    if reduction == "none":  # forward did not know how the rows would be weighted
        found = LINEAR_CROSS_ENTROPY.backward(grads[0].contiguous(), *args[:8], *needs[:3])
    else:
        found = _scaled(outs, grads[0])
    given = zip(found, tensors, needs, strict=False)
    return *(grad.to(t.dtype) if need else None for grad, t, need in given), *(None,) * 8


def _scaled(grads: tuple, by: Tensor) -> list[Tensor]:
    """Gradients times that of the loss, in their own memory if no one can ask for them again."""
    if (
        torch.compiler.is_compiling()
        or type(by) is not Tensor
        or torch._C._are_functorch_transforms_active()
        or torch._C._autograd._get_current_graph_task_keep_graph()
    ):
        return [grad * by for grad in grads]
    if by.is_cpu and by == 1:
        return list(grads)
    return [grad.mul_(by) for grad in grads]


LINEAR_CROSS_ENTROPY = registry.op(
    "linear_cross_entropy_fwd(Tensor input, Tensor linear_weight, Tensor? linear_bias,"
    " Tensor target, str reduction, int ignore_index, float label_smoothing, float softcap,"
    " bool save_input, bool save_weight, bool save_bias)"
    " -> (Tensor loss, Tensor grad_input, Tensor grad_weight, Tensor grad_bias)",
    "linear_cross_entropy_bwd(Tensor grad_loss, Tensor input, Tensor linear_weight,"
    " Tensor? linear_bias, Tensor target, str reduction, int ignore_index, float label_smoothing,"
    " float softcap, bool need_input, bool need_weight, bool need_bias)"
    " -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)",
    reference=reference.linear_cross_entropy,
    fake=_fake,
    backward_arguments=lambda grad_loss, *rest: (
        (*rest[:8], False, False, False),
        (grad_loss,),
        (0, 1, 2),
    ),
    backward_fake=_backward_fake,
    derivative=_derivative,
    kernels={"cpu": _refusals, "triton": _triton_refusals},
    keep=(1, 2, 3),
)


def _args(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
) -> tuple:
    input, linear_weight, linear_bias = dispatch.autocast(input, linear_weight, linear_bias)
    checks.features(input)
    classes = checks.projection("linear_", linear_weight, linear_bias, input, input.shape[-1])
    if classes == 0:
        raise ValueError(f"linear_weight must have a class, got {list(linear_weight.shape)}")
    checks.on_device("target", target, "input", input)
    if target.dtype != torch.int64:
        raise TypeError(f"target must be int64, got {target.dtype}")
    if target.shape != input.shape[:-1]:
        raise ValueError(
            f"target must have input's leading sizes {list(input.shape[:-1])}, "
            f"got {list(target.shape)}"
        )
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {list(REDUCTIONS)}, got {reduction!r}")
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index must be an int, got {type(ignore_index).__name__}")
    checks.finite("label_smoothing", label_smoothing)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
    if softcap is not None:
        checks.finite("softcap", softcap)
        if softcap <= 0:
            raise ValueError(f"softcap must be > 0 or None, got {softcap}")
    _in_range(target, classes, ignore_index)
    tensors = input, linear_weight, linear_bias
    trained = torch.is_grad_enabled() and reduction != "none"
    saves = (trained and t is not None and t.requires_grad for t in tensors)
    return (
        *(checks.contiguous(tensor) for tensor in tensors),
        target.contiguous(),
        reduction,
        ignore_index,
        float(label_smoothing),
        float(softcap or 0.0),
        *saves,
    )


def _in_range(target: Tensor, classes: int, ignore_index: int) -> None:
    """Raise where a target is no class."""
    if not checks.readable(target):
        return
    wrong = target[((target < 0) | (target >= classes)) & (target != ignore_index)]
    if wrong.numel():
        raise ValueError(
            f"target must be in [0, {classes}) or ignore_index = {ignore_index}, "
            f"got {wrong[0].item()}"
        )


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
) -> Tensor:
    """`cross_entropy(linear(input, linear_weight, linear_bias), target)`, some logits at a time.

    The loss of a language model, whose logits are its largest tensor by far. The kernel computes
    them for 256 rows or more at once, and not at all for those that are ignored; with reduction
    "mean" or "sum" forward finds the gradients while the logits are there. The arguments are those
    of `torch.nn.functional.linear_cross_entropy`, the idea that of Liger Kernel (arXiv:2410.10989).

    Args:
        input: [..., features], fp32, bf16, fp16 or fp64; products are summed in at least fp32.
        linear_weight: [classes, features]; linear_bias: [classes].
        target: int64 [...], the class of each row, or ignore_index.
        reduction: "mean" over the rows that are not ignored, "sum", or "none".
        ignore_index: the target of rows that do not count.
        label_smoothing: the share of the target in [0, 1] that is spread evenly over all classes
            (arXiv:1512.00567).
        softcap: makes a logit x softcap * tanh(x / softcap), as Gemma does (arXiv:2408.00118).

    Returns:
        A scalar, or with "none" [...], 0 for an ignored row; in fp32, for fp64 in fp64. The mean of
        no rows is NaN.

    Raises:
        TypeError: a dtype or a kind of argument is wrong. ValueError: a shape, a device or a value
        does not fit. Targets on a GPU are not waited for: the kernel makes NaN of the loss where
        one is no class.
    """
    args = _args(
        input,
        linear_weight,
        target,
        linear_bias=linear_bias,
        reduction=reduction,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        softcap=softcap,
    )
    return LINEAR_CROSS_ENTROPY(*args)[0]


registry.function("linear_cross_entropy", _args, LINEAR_CROSS_ENTROPY)
