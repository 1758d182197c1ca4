"""The cross-entropy of a linear layer's logits in eager PyTorch: all logits are there at once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_cross_entropy(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    save_input: bool,
    save_weight: bool,
    save_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, its gradients by input, weight and bias), in at least fp32.

    Gradients are empty where they are not to be saved, or where autograd finds them itself.
    """

    def loss_of(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        logits = wide(F.linear(input, weight, bias))  # [..., classes]
        if softcap:
            logits = softcap * (logits / softcap).tanh()
        options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing}
        losses = F.cross_entropy(
            logits.flatten(0, -2) if target.dim() else logits[None],
            target.flatten(),
            reduction=reduction,
            **options,
        )
        return losses.view(target.shape) if reduction == "none" else losses

    tensors = input, weight, bias
    saves = save_input, save_weight, save_bias
    found = [wide(input.new_empty(0)) for _ in tensors]
    if not any(saves) or torch.is_grad_enabled():
        return loss_of(*tensors), *found
    with torch.enable_grad(), torch._C._SetExcludeDispatchKeyGuard(AUTOGRAD, False):
        leaves = [t if t is None else t.detach().requires_grad_() for t in tensors]
        loss = loss_of(*leaves)
        wanted = [i for i, leaf in enumerate(leaves) if saves[i] and leaf is not None]
        grads = torch.autograd.grad(loss.sum(), [leaves[i] for i in wanted])
    for i, grad in zip(wanted, grads, strict=True):
        found[i] = wide(grad)
    return loss.detach(), *found


AUTOGRAD = torch._C.DispatchKey.AutogradFunctionality  # which is off below a torch op


def wide(tensor: Tensor) -> Tensor:
    """fp64 stays, all else becomes fp32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
