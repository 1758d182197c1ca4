"""The cross-entropy of a linear layer in Triton: torch multiplies some rows at a time, and a kernel
in between makes losses of the products and puts the gradients of the logits in their place."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn.ops import launch, tiles

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _logit(product, bias, col, inside, softcap):
    """In fp32 the logits, or if there is a softcap what it leaves of them, of these columns."""
    x = tl.load(product + col, inside, 0).to(tl.float32)
    if bias is not None:
        x += tl.load(bias + col, inside, 0).to(tl.float32)
    if softcap is not None:
        x = softcap * tiles.tanh(x / softcap)
    return x


@triton.jit
def loss_rows(
    products, bias, grads, target, grad_losses, losses, stride, classes, ignore_index, smoothing,
    softcap, BLOCK: tl.constexpr,
):  # fmt: skip
    """The loss of a row of logits, products and a bias, and `grads` of this loss by the logits,
    which may take the place of the products.

    Rows are `stride` apart. No grads: none are wanted; no grad_losses: 1 each; no smoothing or
    softcap: there is none. What is ignored has neither loss nor gradient; of a target that is no
    class, both are NaN.
    """
    row = tl.program_id(0).to(tl.int64)
    products += row * stride
    wanted = tl.load(target + row)
    counted = wanted != ignore_index
    known = (wanted >= 0) & (wanted < classes)
    # Read now: the first to be done with the sums below overwrite it.
    own = _logit(products, bias, wanted, counted & known, softcap)
    own = tl.where(known, own, float("nan"))
    top = tl.full([], float("-inf"), tl.float32)
    power = tl.zeros([], tl.float32)
    whole = tl.zeros([], tl.float32)
    for first in range(0, classes, BLOCK):
        col = first + tl.arange(0, BLOCK)
        x = _logit(products, bias, col, col < classes, softcap)
        x = tl.where(col < classes, x, float("-inf"))
        higher = tl.maximum(top, tl.max(x, 0))
        anchor = tl.where(higher == float("-inf"), 0, higher)
        power = power * tl.exp2(LOG2E * (top - anchor)) + tl.sum(tl.exp2(LOG2E * (x - anchor)), 0)
        top = higher
        if smoothing is not None:
            whole += tl.sum(tl.where(col < classes, x, 0), 0)
    # In fp64, once a row: in fp32 the logarithm alone would cost the loss two of its bits.
    loss = tl.log(power.to(tl.float64))
    if smoothing is None:
        loss += top - own
    else:
        loss += (1 - smoothing) * (top - own) + smoothing * (top - whole / classes)
    tl.store(losses + row, tl.where(counted, loss, 0))
    if grads is not None:
        grads += row * stride
        factor = tl.where(known, 1.0, float("nan"))
        if grad_losses is not None:
            factor *= tl.load(grad_losses + row)
        for first in range(0, classes, BLOCK):
            col = first + tl.arange(0, BLOCK)
            x = _logit(products, bias, col, col < classes, softcap)
            grad = tl.exp2(LOG2E * (x - top)) / power
            hit = tl.where(col == wanted, 1.0, 0.0)
            if smoothing is None:
                grad -= hit
            else:
                grad -= (1 - smoothing) * hit + smoothing / classes
            if softcap is not None:
                share = x / softcap
                grad *= 1 - share * share
            grad = tl.where(counted, grad * factor, 0)
            tl.store(grads + col, grad.to(grads.dtype.element_ty), col < classes)


@dataclass(frozen=True)
class Knobs:
    """Rows of logits at a time; classes of which the weight's gradient is summed at a time; logits
    of a program's tile, no fewer than its threads, and warps.

    The three products of a chunk do 6 * rows operations for each element of the weight, which they
    read twice, 4 bytes in bf16, and of whose gradient an fp32 product is written, read and added,
    16 bytes. A GPU that does 300 operations in the time of a byte, as an H100 does, spends 1/4 of
    the products' time on that with 4096 rows, and 4 times as long as on the products with 256.
    """

    rows: int = 4096
    classes: int = 8192
    elements: int = 4096
    warps: int = 8

    def block(self, classes: int) -> int:
        """The tile for rows of so many classes."""
        return min(self.elements, max(32 * self.warps, triton.next_power_of_2(classes)))


KNOBS = {80: Knobs()}


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left right in fp32, which torch has for 16-bit matrices on a GPU alone."""
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def _live(target: Tensor, ignore_index: int) -> Tensor:
    """The rows that count; while a CUDA graph is captured, which cannot wait for them, all rows."""
    if target.is_cuda and torch.cuda.is_current_stream_capturing():
        return torch.arange(len(target), device=target.device)
    return (target != ignore_index).nonzero().flatten()


def _losses(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    grad_losses: Tensor | None,  # [rows]
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor, list[Tensor]]:
    """Losses like target, and gradients of their sum, each times its `grad_losses`.

    Products are rounded to the dtype of input, and the logits not again: addmm would round twice,
    the product and its sum with the bias, wherever `out` is not contiguous.
    """
    (classes, features), rows = weight.shape, target.numel()
    losses = input.new_zeros(rows, dtype=torch.float64)
    grads = [
        torch.zeros_like(tensor, dtype=torch.float32)
        if want and tensor is not None
        else input.new_empty(0, dtype=torch.float32)
        for tensor, want in zip((input, weight, bias), wanted, strict=True)
    ]
    grad_input, grad_weight, grad_bias = grads
    shape, input, target = target.shape, input.reshape(rows, features), target.flatten()
    knobs = launch.of_architecture(KNOBS, input)
    live = _live(target, ignore_index)
    parts = live.tensor_split(max(1, triton.cdiv(len(live), knobs.rows)))
    stride = triton.cdiv(classes, 16) * 16  # so that rows begin at whole vectors
    room = input.new_empty(len(parts[0]), stride)
    for part in parts:
        x, products = input[part], room[: len(part), :classes]
        torch.mm(x, weight.T, out=products)
        found = torch.empty_like(part, dtype=torch.float64)
        launch.launch(
            loss_rows,
            (len(part),),
            {
                "products": products,
                "bias": bias,
                "grads": products if any(wanted) else None,
                "target": target[part],
                "grad_losses": None if grad_losses is None else grad_losses[part],
                "losses": found,
                "stride": stride,
                "classes": classes,
                "ignore_index": ignore_index,
                "smoothing": label_smoothing or None,
                "softcap": softcap or None,
                "BLOCK": knobs.block(classes),
            },
            writes=("grads", "losses"),
            num_warps=knobs.warps,
        )
        losses[part] = found
        grad_logits = products  # whose place they have taken
        if wanted[0]:
            grad_input.view(rows, features)[part] = _product(grad_logits, weight)
        if wanted[1]:
            for first in range(0, classes, knobs.classes):
                some = slice(first, first + knobs.classes)
                grad_weight[some] += _product(grad_logits[:, some].T, x)
        if wanted[2] and bias is not None:
            grad_bias += grad_logits.sum(0, dtype=torch.float32)
    return losses.view(shape), grads


def linear_cross_entropy_fwd(
    input, weight, bias, target, reduction, ignore_index, label_smoothing, softcap, *saves
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op of this name."""
    options = ignore_index, label_smoothing, softcap
    loss, grads = _losses(input, weight, bias, target, None, *options, saves)
    if reduction != "none":
        loss = loss.sum()
    if reduction == "mean":
        count = (target != ignore_index).sum()
        loss /= count
        for grad in grads:
            grad /= count.clamp(min=1)
    return loss.float(), *grads


def linear_cross_entropy_bwd(
    grad_loss, input, weight, bias, target, reduction, ignore_index, label_smoothing, softcap,
    *needs,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The op of this name."""
    options = ignore_index, label_smoothing, softcap
    if reduction == "mean":
        grad_loss = grad_loss / (target != ignore_index).sum().clamp(min=1)
    if reduction == "none":
        _, grads = _losses(input, weight, bias, target, grad_loss.flatten(), *options, needs)
    else:
        _, grads = _losses(input, weight, bias, target, None, *options, needs)
        for grad in grads:
            grad *= grad_loss
    return tuple(grads)
